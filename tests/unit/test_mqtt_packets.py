"""PUBLISH and PUBACK as bytes: the same as paho's own code says, bounded, and no bytes lead astray."""

from __future__ import annotations

import time
from typing import Any

import pytest
from paho.mqtt import _packet
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_serve.mqtt_packets import (
    MAX_PROPERTIES,
    MalformedError,
    Message,
    envelope,
    puback,
    read_puback,
    read_publish,
    user_property,
    variable,
)

FIVE, THREE = MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311


def body(packet: bytes) -> tuple[int, bytes]:
    """Split a whole packet into its first byte and what follows the fixed header."""
    at = 1
    while packet[at] & 0x80:
        at += 1
    return packet[0], packet[at + 1 :]


def read(packet: bytes, *, five: bool = True, skipped: int = 0) -> Message:
    """Read a whole packet."""
    first, rest = body(packet)
    return read_publish(first, rest, 0, len(rest), five, skipped)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152])
@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("five", [True, False])
def test_what_is_written_is_what_paho_reads(size: int, qos: int, five: bool) -> None:
    properties: dict[str, Any] = {"content_type": "text/csv", "user": [("a", "ü"), ("b", "")], "correlation": b"\0\1"}
    shared = envelope("plant/ä", qos, retain=True, five=five, **(properties if five else {}))
    packet = shared.seal(b"x" * size, 77, user_property("id", "17") if five else b"")
    first, rest = body(packet)
    assert len(packet) == len(rest) + 1 + len(variable(len(rest)))
    found = _packet.decode_publish(first, rest, FIVE if five else THREE)
    assert found.topic.decode() == "plant/ä"
    assert (found.qos, found.retain, found.dup, found.mid) == (qos, True, False, 77 * qos)
    assert found.payload == b"x" * size
    if five:
        said: Any = found.properties
        assert said.ContentType == "text/csv"
        assert said.CorrelationData == b"\0\1"
        assert said.UserProperty == [("a", "ü"), ("b", ""), ("id", "17")]


@pytest.mark.parametrize("qos", [0, 1])
def test_what_paho_writes_is_read_with_all_properties(qos: int) -> None:
    properties = Properties(PacketTypes.PUBLISH)
    properties.PayloadFormatIndicator = 1
    properties.MessageExpiryInterval = 3600
    properties.ContentType = "application/json"
    properties.ResponseTopic = "answers/ä"
    properties.CorrelationData = b"\xff\0"
    properties.SubscriptionIdentifier = [1, 200, 268_435_455]
    properties.UserProperty = [("id", "press-3/17"), ("id", "second"), ("key", "µ")]
    packed = properties.pack()
    topic = b"plant/1"
    rest = len(topic).to_bytes(2, "big") + topic + (b"\x12\x34" if qos else b"") + packed + b"payload"
    message = read_publish(0x39 | qos << 1, b"junk" + rest + b"more", 4, 4 + len(rest), True)
    assert (message.topic, message.payload, message.qos) == ("plant/1", b"payload", qos)
    assert message.packet_id == (0x1234 if qos else 0)
    assert message.duplicate
    assert message.retained
    assert message.content_type == "application/json"
    assert message.response_topic == "answers/ä"
    assert message.correlation == b"\xff\0"
    assert message.user == {"id": "second", "key": "µ"}
    assert message.skipped == message.properties == 0


def test_a_message_without_properties_shares_the_empty_ones() -> None:
    message = read(envelope("a", 1).seal(b"1", 1))
    assert not message.user
    assert message.content_type is None
    assert message.size == 2


def test_properties_over_the_limit_are_cut_off_and_told() -> None:
    many = b"".join(user_property(f"k{number}", "v" * 20) for number in range(20_000))
    assert len(many) > 2 * MAX_PROPERTIES
    message = read(envelope("a", 1).seal(b"payload", 9, user_property("id", "first") + many))
    assert message.properties == len(many) + len(user_property("id", "first"))
    assert message.user["id"] == "first"
    assert sum(len(key) + len(value) for key, value in message.user.items()) < MAX_PROPERTIES
    assert message.packet_id == 9, "it can be acknowledged"


def test_the_time_for_properties_grows_with_their_number_only() -> None:
    def seconds(number: int) -> float:
        packet = envelope("a", 1).seal(b"", 1, b"".join(user_property(str(n), "") for n in range(number)))
        begun = time.perf_counter()
        read(packet)
        return time.perf_counter() - begun

    few = min(seconds(1_000) for _ in range(5))
    many = min(seconds(16_000) for _ in range(5))
    assert many < 16 * few * 4, "paho's takes 256 times as long"


@pytest.mark.parametrize("kept", [3, 10, 20, 40, 60])
def test_of_a_message_that_was_cut_off_the_beginning_is_read(kept: int) -> None:
    packet = envelope("topic", 1, content_type="text/csv").seal(b"x" * 1000, 5, user_property("id", "17"))
    first, rest = body(packet)
    if kept < 9:
        with pytest.raises(MalformedError):
            read_publish(first, rest, 0, kept, True, len(rest))
        return
    message = read_publish(first, rest, 0, kept, True, len(rest))
    assert (message.topic, message.packet_id, message.payload) == ("topic", 5, b"")
    assert message.skipped == len(rest)
    assert message.user == ({"id": "17"} if kept >= 30 else {})


def wrong(tail: bytes, first: int = 0x32) -> tuple[int, bytes]:
    """Give a PUBLISH on topic "a" with packet id 1 and what comes behind that."""
    return first, b"\0\1a\0\1" + tail


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        (0x32, b""),
        (0x32, b"\0"),
        (0x32, b"\0\5ab"),
        (0x32, b"\0\1a\0"),
        wrong(b""),
        wrong(b"\0", 0x34),
        wrong(b"\0", 0x36),
        wrong(b"\xff\xff\xff\xff\x01"),
        wrong(b"\x05abc"),
        wrong(b"\x02\xfe\0"),
        wrong(b"\x03\x26\0\1"),
        wrong(b"\x05\x03\0\2\xff\xfe"),
        wrong(b"\x04\x03\0\1\0"),
        wrong(b"\x03\x09\0\x09"),
        wrong(b"\x02\x02\0"),
        wrong(b"\x01\x0b"),
        wrong(b"\x05\x26\0\2id"),
    ],
)
def test_bytes_that_are_no_publish_are_refused(first: int, rest: bytes) -> None:
    with pytest.raises(MalformedError):
        read_publish(first, rest, 0, len(rest), True)


def test_a_topic_that_is_no_text_still_is_a_message_to_acknowledge() -> None:
    message = read_publish(0x32, b"\0\2\xff\xfe\0\7\0x", 0, 8, True)
    assert (message.topic, message.packet_id, message.payload) == ("", 7, b"x")


def test_no_bytes_lead_to_anything_but_a_message_or_a_refusal() -> None:
    import random

    generator = random.Random(7)
    good = envelope("a/b", 1, content_type="text/csv", user=[("id", "1")]).seal(b"payload", 3)
    _, rest = body(good)
    for _ in range(20_000):
        mutated = bytearray(rest[: generator.randrange(len(rest) + 1)])
        for _ in range(generator.randrange(4)):
            if mutated:
                mutated[generator.randrange(len(mutated))] = generator.randrange(256)
        flags = 0x30 | generator.randrange(16)
        try:
            message = read_publish(flags, bytes(mutated), 0, len(mutated), generator.random() < 0.8)
        except MalformedError:
            continue
        assert len(message.payload) <= len(mutated)


def test_acknowledgements_are_written_and_read() -> None:
    assert puback(0x1234) == b"\x40\x02\x12\x34"
    assert read_puback(b"\x12\x34", 0, 2) == (0x1234, 0)
    assert read_puback(b"..\x12\x34\x97..", 2, 5) == (0x1234, 0x97)
    assert read_puback(b"\x12\x34\x10\0", 0, 4) == (0x1234, 0x10)
    with pytest.raises(MalformedError):
        read_puback(b"\x12", 0, 1)


@pytest.mark.parametrize("topic", ["", "a/+", "#", "a\0b", "\ud800"])
def test_what_is_no_topic_is_refused(topic: str) -> None:
    with pytest.raises(ValueError, match=r"topic|surrogates"):
        envelope(topic, 1)


def test_what_mqtt_cannot_carry_is_refused() -> None:
    with pytest.raises(ValueError, match="65535"):
        user_property("id", "x" * 65_536)
    with pytest.raises(ValueError, match="65535"):
        envelope("x" * 65_536, 1)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, b"\0"), (127, b"\x7f"), (128, b"\x80\x01"), (16_383, b"\xff\x7f"), (16_384, b"\x80\x80\x01"),
        (268_435_455, b"\xff\xff\xff\x7f"),
    ],
)  # fmt: skip
def test_lengths_are_written_as_the_standard_says(value: int, written: bytes) -> None:
    assert variable(value) == written
