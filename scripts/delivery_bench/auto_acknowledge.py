"""edge-serve that acknowledges each message when it comes, and so loses what it has not sent when it dies: for comparison only.

usage: python scripts/delivery_bench/auto_acknowledge.py run -c CONFIG
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from edge_serve.cli import main  # from this checkout, installed or not
from edge_serve.mqtt_packets import Message
from edge_serve.sources.mqtt import MqttSource


class _Settled:
    """What is acknowledged already."""

    def __call__(self, error: Exception | None) -> None:
        """Do nothing."""


def acknowledge(source: MqttSource, message: Message, _digest: bytes) -> _Settled:
    """Stand in for MqttSource._hold."""
    if source._connection is not None:
        source._connection.acknowledge(message.packet_id)
    return _Settled()


MqttSource._hold = acknowledge  # type: ignore[assignment,method-assign]

if __name__ == "__main__":
    main()
