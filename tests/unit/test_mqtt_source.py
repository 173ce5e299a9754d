"""What a source does with messages before any broker: pushed where there is room, queued behind each other where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from edge_serve.config import Config, MqttBroker
from edge_serve.errors import TooLargeError
from edge_serve.frame import Delivery
from edge_serve.health import Counters
from edge_serve.mqtt_packets import Message
from edge_serve.sources import SourceContext
from edge_serve.sources.mqtt import BATCH_ITEMS, MqttSource, MqttSourceOptions


class Taker:
    """Takes what is offered, as long as it has room."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.taken: list[Delivery] = []
        self.offers: list[int] = []

    def __call__(self, deliveries: Sequence[Delivery]) -> int:
        taken = min(self.room, len(deliveries))
        self.offers.append(len(deliveries))
        self.taken += deliveries[:taken]
        self.room -= taken
        return taken


def make(tmp_path: Path, **options: object) -> MqttSource:
    """Give a source that is not connected."""
    config = Config(tmp_path / "c.toml", "dev", tmp_path, "auto", 1, {"": MqttBroker("mqtt://x")}, ())
    made = MqttSource(
        MqttSourceOptions(topic="in/#", **options),  # type: ignore[arg-type]
        SourceContext(config, "line", Counters(), dict),
    )
    made._session(False)
    return made


def message(number: int, **fields: object) -> Message:
    """Give a QoS 1 message with a number."""
    made = Message("in/x", str(number).encode(), 1, number, False, False, None, None, None, {}, 0)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def numbers(deliveries: Sequence[Delivery]) -> list[int]:
    """Give their payloads."""
    return [int(each.frame.payload) for each in deliveries]


def read(source: MqttSource, number: int) -> list[int]:
    """Read that many, and no more."""
    found = []
    for _ in range(number):
        delivery = source.read(0)
        assert delivery is not None
        found.append(delivery)
    return numbers(found)


def test_what_came_together_is_offered_together(tmp_path: Path) -> None:
    source, taker = make(tmp_path), Taker(100)
    source.push_to(taker)
    for number in range(1, 6):
        source._arrived(message(number))
    assert taker.offers == []
    source._hand_over()
    source._hand_over()
    assert taker.offers == [5]
    assert numbers(taker.taken) == [1, 2, 3, 4, 5]
    assert source.read(0) is None


def test_a_large_burst_is_offered_in_parts(tmp_path: Path) -> None:
    source, taker = make(tmp_path), Taker(1000)
    source.push_to(taker)
    for number in range(1, 2 * BATCH_ITEMS + 4):
        source._arrived(message(number))
    assert taker.offers == [BATCH_ITEMS, BATCH_ITEMS]
    source._hand_over()
    assert taker.offers[-1] == 3


def test_what_finds_no_room_waits_and_nothing_overtakes_it(tmp_path: Path) -> None:
    source, taker = make(tmp_path), Taker(2)
    source.push_to(taker)
    for number in (1, 2, 3, 4):
        source._arrived(message(number))
    source._hand_over()
    taker.room = 10
    source._arrived(message(5))
    source._hand_over()
    assert numbers(taker.taken) == [1, 2]
    assert read(source, 2) == [3, 4]
    source._arrived(message(6))
    source._hand_over()
    assert numbers(taker.taken) == [1, 2], "4 is read, but perhaps not handed on yet"
    assert read(source, 2) == [5, 6]
    assert source.read(0) is None
    source._arrived(message(7))
    source._hand_over()
    assert numbers(taker.taken) == [1, 2, 7], "nothing waits any more"


def test_what_was_gathered_is_handed_on_before_a_loss(tmp_path: Path) -> None:
    source, taker = make(tmp_path), Taker(10)
    source.push_to(taker)
    source._arrived(message(1))
    source.close()
    assert numbers(taker.taken) == [1], "it is held as being in work, so it has to be"


def test_without_anybody_to_push_to_messages_are_read(tmp_path: Path) -> None:
    source = make(tmp_path)
    for number in (1, 2, 3):
        source._arrived(message(number))
    assert read(source, 3) == [1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"properties": 300_000}, "300000 bytes of properties"),
        ({"skipped": 100_000_000, "payload": b""}, "max_payload"),
    ],
)
def test_a_message_over_a_limit_is_an_error_to_answer(tmp_path: Path, fields: dict[str, object], said: str) -> None:
    source = make(tmp_path)
    source._arrived(message(1, **fields))
    delivery = source.read(0)
    assert delivery is not None
    assert isinstance(delivery.frame.error, TooLargeError)
    assert said in str(delivery.frame.error)
    assert delivery.frame.payload == b""
