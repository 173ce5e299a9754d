"""The embedded broker of the extra [broker]: rumqttd from the wheel `iotcore`, as a child process on loopback."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

from edge_serve.errors import UnavailableError

CONFIG = """\
id = 0

[router]
id = 0
max_connections = 64
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10

[v5.1]
name = "mqtt5"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = 16777216
max_inflight_count = 100
dynamic_filters = true
"""
# What rumqttd sends a client ahead, at most, whatever that asks for.
IN_FLIGHT = 100
START_TIMEOUT_S = 20.0


def available() -> bool:
    """Say whether the extra is installed."""
    return importlib.util.find_spec("iotcore") is not None


class EmbeddedBroker:
    """A broker for MQTT 5 on a free port of 127.0.0.1 that ends with this process. Its queues are in memory only."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._file = folder / "broker.toml"
        self._broker: Any = None

    @property
    def url(self) -> str:
        """Give the address as a configuration has it."""
        return f"mqtt://127.0.0.1:{self.port}"

    def __enter__(self) -> EmbeddedBroker:
        import iotcore

        # Its default listener takes 20 KB payloads on all addresses; with a file of ours there is only this one.
        self._file.write_text(CONFIG.format(port=self.port), encoding="utf-8")
        self._broker = iotcore.Broker(config_path=str(self._file), listen="127.0.0.1")
        try:
            self._broker.start(START_TIMEOUT_S)
        except (OSError, RuntimeError) as error:
            raise UnavailableError(f"the embedded broker does not start on {self.url}: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._broker.stop()
