"""How the contract suite handles each source and sink: a case makes the part and plays the other end of its line.

A plug-in's author writes one case and names it in EDGE_SERVE_CONTRACT (module:Class, several separated by commas); the
suite then runs over it as it runs over ours:

    EDGE_SERVE_CONTRACT=my_plugin.cases:MySourceCase python -m pytest tests/contract -k MySourceCase

A case gets a Lab (a folder, and a broker for who needs one) and is closed after each test.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_serve import plugins
from edge_serve.config import Config, MqttBroker, PartConfig, PipelineConfig, Wiring
from edge_serve.config import ModelConfig as Model
from edge_serve.frame import Capture, ModelInfo, Result, ResultError
from edge_serve.health import Counters
from edge_serve.sinks import Sink, SinkContext
from edge_serve.sources import Source, SourceContext
from tests.support import Client, Mosquitto, Proxy, Raw

_numbers = itertools.count(1)


@dataclass
class Lab:
    """What a case may use."""

    folder: Path
    short: Path
    """A folder whose path is short enough for a Unix socket."""
    make_broker: Callable[..., Mosquitto]


class Case:
    """What source and sink cases share."""

    kind = ""
    """The part's name in the configuration."""
    survives_loss = False
    """Whether the connection can be lost and come back (`lose`, `restore`)."""
    needs_broker = False
    """Whether mosquitto is asked for (`Lab.make_broker`)."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.counters = Counters()
        self.device = f"device{next(_numbers)}"

    def options(self) -> dict[str, Any]:
        """Give the part's options for this test."""
        return {}

    def brokers(self) -> dict[str, MqttBroker]:
        """Give the brokers of the configuration."""
        return {}

    def config(self) -> Config:
        """Give a configuration around the part."""
        return Config(
            self.lab.folder / "edge-serve.toml", self.device, self.lab.folder, "auto", 5.0, self.brokers(), ()
        )

    def lose(self) -> None:
        """Take away what the part is connected to."""

    def restore(self) -> None:
        """Bring it back."""

    def break_start(self) -> None:
        """See to it that the next `connect` cannot work."""
        self.lose()

    def close(self) -> None:
        """Let go of everything."""


class SourceCase(Case):
    """How a source is fed."""

    redelivers = False
    """Whether what was not settled comes again after a reconnect."""
    bounded = False
    """Whether it stops while `hold_limit` deliveries are unsettled."""
    finite = False
    """Whether everything has to be fed before `make`, and the source ends."""
    names_ids = False
    """Whether `feed` can pass an id."""
    counts_unsettled = True
    """Whether nothing at all comes while `hold_limit` deliveries are unsettled."""
    limit = 4096
    """A payload limit that `options` sets, for the test of what is over it."""
    content_type = "application/json"

    def make(self) -> Source:
        """Make the source; it is not connected yet."""
        part = plugins.load("sources", self.kind)
        context = SourceContext(self.config(), "line", self.counters, lambda: {"device": self.device})
        source: Source = part(part.Options(**self.options()), context)
        return source

    def check(self) -> list[Any]:
        """Ask the part what is wrong with its options."""
        part = plugins.load("sources", self.kind)
        options = part.Options(**self.options())
        pipeline = PipelineConfig("line", Model("m"), PartConfig(self.kind, options, "pipeline.source"), ())
        config = self.config()
        config = Config(
            config.path, config.device, config.state_dir, config.runtime, config.grace_s, config.brokers, (pipeline,)
        )
        problems: list[Any] = part.check(options, "pipeline.source", Wiring(config, pipeline))
        return problems

    def feed(self, payload: bytes, identity: str | None = None) -> None:
        """Send an input; it is a JSON document in one line."""
        raise NotImplementedError

    def close_client(self) -> None:
        """Forget a connection that the source's `close` has ended."""


class MqttSourceCase(SourceCase):
    """MQTT 5, lossless."""

    kind = "mqtt"
    redelivers = survives_loss = needs_broker = True
    names_ids = bounded = True
    counts_unsettled = False  # the broker counts: mosquitto 2.0.11 lets more out for each acknowledgement
    protocol: Any = 5
    lines: tuple[str, ...] = ("allow_anonymous true",)

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.broker = lab.make_broker(*self.lines).start()
        self.proxy = Proxy(self.broker.port)
        self.client = Client(self.broker.port)

    def options(self) -> dict[str, Any]:
        return {"topic": "in/#", "receive_maximum": 5}

    def brokers(self) -> dict[str, MqttBroker]:
        return {"": MqttBroker(self.proxy.url, protocol=self.protocol, max_payload=self.limit, connect_timeout_s=5)}

    def feed(self, payload: bytes, identity: str | None = None) -> None:
        user: dict[str, Any] = {"user": {"id": identity}} if identity is not None else {}
        self.client.publish("in/line", payload, ContentType="application/json", **user)

    def lose(self) -> None:
        self.proxy.cut(refuse=True)

    def restore(self) -> None:
        self.proxy.restore()

    def close(self) -> None:
        self.client.close()
        self.proxy.close()


class Mqtt311SourceCase(MqttSourceCase):
    """MQTT 3.1.1, lossless: no properties, so no ids, no content types, and the broker's limit instead of ours."""

    protocol = "3.1.1"
    names_ids = False
    lines = ("allow_anonymous true", "max_inflight_messages 5")


class MqttLatestSourceCase(MqttSourceCase):
    """MQTT at QoS 0, the newest wins."""

    redelivers = bounded = False

    def options(self) -> dict[str, Any]:
        return {"topic": "in/#", "qos": 0, "policy": "latest"}


class MqttSharedSourceCase(MqttSourceCase):
    """A shared subscription."""

    def options(self) -> dict[str, Any]:
        return {"topic": "$share/group/in/#", "receive_maximum": 5}


class UnixSocketCase(SourceCase):
    """A Unix socket."""

    kind = "socket"
    names_ids = bounded = True

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.path = lab.short / f"{self.device}.sock"
        self.raw: Raw | None = None

    def options(self) -> dict[str, Any]:
        return {"listen": f"unix://{self.path}", "max_payload": self.limit, "max_inflight": 5}

    def address(self) -> str | tuple[str, int]:
        """Give where to connect to."""
        return str(self.path)

    def feed(self, payload: bytes, identity: str | None = None) -> None:
        if self.raw is None:
            self.raw = Raw.connect(self.address())
        self.raw.frame(payload, content_type="application/json", **({"id": identity} if identity is not None else {}))

    def break_start(self) -> None:
        self.path = self.lab.short / "no" / "folder.sock"

    def close_client(self) -> None:
        if self.raw is not None:
            self.raw.close()
            self.raw = None

    def close(self) -> None:
        self.close_client()


class TcpSocketCase(UnixSocketCase):
    """A TCP socket on loopback."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        from tests.support import free_port

        self.port = free_port()
        self.taken: socket.socket | None = None

    def options(self) -> dict[str, Any]:
        return {"listen": f"tcp://127.0.0.1:{self.port}", "max_payload": self.limit, "max_inflight": 5}

    def address(self) -> str | tuple[str, int]:
        return "127.0.0.1", self.port

    def break_start(self) -> None:
        self.taken = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.taken.getsockname()[1])

    def close(self) -> None:
        super().close()
        if self.taken is not None:
            self.taken.close()


class FolderCase(SourceCase):
    """A folder of files."""

    kind = "file"
    finite = True

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.path = lab.folder / "inputs"
        self.path.mkdir()
        self._fed = 0

    def options(self) -> dict[str, Any]:
        return {"path": str(self.path), "max_payload": self.limit}

    def feed(self, payload: bytes, identity: str | None = None) -> None:
        self._fed += 1
        (self.path / f"{self._fed:05}.json").write_bytes(payload)

    def break_start(self) -> None:
        self.path = self.path / "gone.jsonl"


class LinesCase(SourceCase):
    """A file of JSON lines."""

    kind = "file"
    finite = True

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.path = lab.folder / "inputs.jsonl"
        self.path.touch()

    def options(self) -> dict[str, Any]:
        return {"path": str(self.path), "max_payload": self.limit}

    def feed(self, payload: bytes, identity: str | None = None) -> None:
        with self.path.open("ab") as file:
            file.write(payload + b"\n")

    def break_start(self) -> None:
        self.path = self.lab.folder / "gone.jsonl"


class FifoCase(LinesCase):
    """JSON lines through a named pipe, as from a program that goes on and on."""

    finite = False

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.path.unlink()
        os.mkfifo(self.path)
        # Held open for reading and writing, neither end of a pipe waits for the other.
        self._fd = os.open(self.path, os.O_RDWR)

    def feed(self, payload: bytes, identity: str | None = None) -> None:
        os.write(self._fd, payload + b"\n")

    def close(self) -> None:
        os.close(self._fd)


class SinkCase(Case):
    """How a sink's other end is read."""

    loses_nothing = True
    """Whether what `done(None)` was said of is really there (QoS 0 promises nothing)."""
    has_connection = True
    """Whether sending without one can fail."""

    def make(self) -> Sink:
        """Make the sink; it is not connected yet."""
        part = plugins.load("sinks", self.kind)
        sink: Sink = part(part.Options(**self.options()), SinkContext(self.config(), "line", self.counters))
        return sink

    def check(self) -> list[Any]:
        """Ask the part what is wrong with its options."""
        part = plugins.load("sinks", self.kind)
        options = part.Options(**self.options())
        sink = PartConfig(self.kind, options, "pipeline.sink")
        pipeline = PipelineConfig("line", Model("m"), PartConfig("none", None, "pipeline.source"), (sink,))
        config = self.config()
        config = Config(
            config.path, config.device, config.state_dir, config.runtime, config.grace_s, config.brokers, (pipeline,)
        )
        problems: list[Any] = part.check(options, "pipeline.sink", Wiring(config, pipeline))
        return problems

    def received(self) -> list[bytes]:
        """Give the documents that have arrived, in order."""
        raise NotImplementedError


class MqttSinkCase(SinkCase):
    """MQTT 5 at QoS 1."""

    kind = "mqtt"
    survives_loss = needs_broker = True
    protocol: Any = 5

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.broker = lab.make_broker().start()
        self.proxy = Proxy(self.broker.port)
        self.client = Client(self.broker.port, "results/#")

    def options(self) -> dict[str, Any]:
        return {"topic": "results/{device}"}

    def brokers(self) -> dict[str, MqttBroker]:
        return {"": MqttBroker(self.proxy.url, protocol=self.protocol, connect_timeout_s=5)}

    def received(self) -> list[bytes]:
        return [message.payload for message in list(self.client.messages)]

    def lose(self) -> None:
        self.proxy.cut(refuse=True)

    def restore(self) -> None:
        self.proxy.restore()

    def close(self) -> None:
        self.client.close()
        self.proxy.close()


class Mqtt311SinkCase(MqttSinkCase):
    """MQTT 3.1.1."""

    protocol = "3.1.1"


class MqttQos0SinkCase(MqttSinkCase):
    """MQTT at QoS 0."""

    loses_nothing = False

    def options(self) -> dict[str, Any]:
        return {"topic": "results/{device}", "qos": 0}


class FileSinkCase(SinkCase):
    """A file."""

    kind = "file"

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.path = lab.folder / "results.jsonl"

    def options(self) -> dict[str, Any]:
        return {"path": str(self.path)}

    def received(self) -> list[bytes]:
        return self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []

    def break_start(self) -> None:
        self.path = self.lab.folder / "no" / "folder.jsonl"


class SyncedFileSinkCase(FileSinkCase):
    """A file that is synced to the disk."""

    def options(self) -> dict[str, Any]:
        return {**super().options(), "sync": True}


class StdoutSinkCase(SinkCase):
    """Standard output, put onto a pipe for the time of the test."""

    kind = "stdout"
    has_connection = False

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._reading, writing = os.pipe()
        self._stream = os.fdopen(writing, "w")
        self._before: Any = None
        self._data = bytearray()
        self._thread = threading.Thread(target=self._drain, name="test.stdout", daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        while data := os.read(self._reading, 65536):
            self._data += data

    def make(self) -> Sink:
        # Not earlier: pytest sets its own sys.stdout when a test begins.
        if self._before is None:
            self._before, sys.stdout = sys.stdout, self._stream
        return super().make()

    def received(self) -> list[bytes]:
        return bytes(self._data).split(b"\n")[:-1]

    def break_start(self) -> None:
        self._stream.close()
        self._thread.join(10)

    def close(self) -> None:
        if sys.stdout is self._stream:
            sys.stdout = self._before
        self.break_start()
        os.close(self._reading)


def _from_outside(base: type[Case]) -> list[Any]:
    found = []
    for name in filter(None, os.environ.get("EDGE_SERVE_CONTRACT", "").split(",")):
        module, _, attribute = name.partition(":")
        case = getattr(importlib.import_module(module), attribute)
        if issubclass(case, base):
            found.append(case)
    return found


SOURCES: list[type[SourceCase]] = [
    MqttSourceCase,
    Mqtt311SourceCase,
    MqttLatestSourceCase,
    MqttSharedSourceCase,
    UnixSocketCase,
    TcpSocketCase,
    FolderCase,
    LinesCase,
    FifoCase,
    *_from_outside(SourceCase),
]
SINKS: list[type[SinkCase]] = [
    MqttSinkCase,
    Mqtt311SinkCase,
    MqttQos0SinkCase,
    FileSinkCase,
    SyncedFileSinkCase,
    StdoutSinkCase,
    *_from_outside(SinkCase),
]


def parameters(cases: Iterable[type[Case]]) -> list[Any]:
    """Give the cases as a fixture's parameters."""
    return [
        pytest.param(case, id=case.__name__, marks=[pytest.mark.broker] if case.needs_broker else []) for case in cases
    ]


def sources_that(fit: Callable[[type[SourceCase]], bool]) -> pytest.MarkDecorator:
    """Run a test over some of the sources only: not every promise is every source's."""
    return pytest.mark.parametrize("source_case", parameters(case for case in SOURCES if fit(case)), indirect=True)


def sinks_that(fit: Callable[[type[SinkCase]], bool]) -> pytest.MarkDecorator:
    """Run a test over some of the sinks only."""
    return pytest.mark.parametrize("sink_case", parameters(case for case in SINKS if fit(case)), indirect=True)


def make_result(identity: str = "frame-1", **fields: Any) -> Result:
    """Make a result as a pipeline would."""
    values: dict[str, Any] = {
        "frame_id": identity,
        "device": "device",
        "pipeline": "line",
        "source": "in/line",
        "captured": Capture(time.time(), time.monotonic()),
        "model": ModelInfo("model", 1, "int8", "xnnpack", "serving_default"),
        "type": "classification",
        "decoded": {"classes": [{"index": 1, "label": "ein ß und ein 🙂", "score": 0.5}]},
    }
    return Result(**{**values, **fields})


def make_failure(identity: str = "frame-1") -> Result:
    """Make an error result."""
    return make_result(identity, decoded=None, error=ResultError("bad_input", "no\nsuch\nthing"))


def identity_of(document: bytes) -> str:
    """Give the frame id that a result's document names."""
    return str(json.loads(document)["id"])
