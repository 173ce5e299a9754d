"""The two MQTT packets that come with every message, PUBLISH and PUBACK, as bytes: read and written without I/O.

paho reads and writes all others. These two are here because they are all of the work at a high rate, and because paho's time
for the properties of a PUBLISH grows with the square of their number. Formats: MQTT 5, sections 2.2.2, 3.3 and 3.4; MQTT 3.1.1
has the same without properties.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PUBLISH = 0x30
PUBACK = 0x40
# Properties beyond this are not read: no publisher that means well sends so many, and each is an object in memory.
MAX_PROPERTIES = 192 * 1024
# A PUBLISH is its payload, a topic of at most 64 KiB and properties; a longer rest of a packet is cut off and skipped.
PACKET_OVERHEAD = MAX_PROPERTIES
# The longest remaining length that four bytes can say (2.1.4).
LONGEST_PACKET = 268_435_455

# Property identifiers of a PUBLISH (MQTT 5, 2.2.2.2) and the bytes that their values take, where that is fixed.
_CONTENT_TYPE, _RESPONSE_TOPIC, _CORRELATION, _SUBSCRIPTION, _USER = 0x03, 0x08, 0x09, 0x0B, 0x26
_FIXED = {0x01: 1, 0x02: 4, 0x23: 2}
_TEXTS = (_CONTENT_TYPE, _RESPONSE_TOPIC)

_NOBODY: Mapping[str, str] = {}
_FIRST = [bytes((byte,)) for byte in range(256)]
_pack_id = struct.Struct("!H").pack
_pack_puback = struct.Struct("!BBH").pack


class MalformedError(ValueError):
    """Bytes that are no packet; the connection they came by cannot be used any more."""


@dataclass(slots=True)
class Message:
    """A message that arrived. `skipped` is the whole packet's length where its payload was over the limit, else 0.

    `properties` is the length of its properties where they were over MAX_PROPERTIES, else 0; those behind are not in here.
    """

    topic: str
    payload: bytes
    qos: int
    packet_id: int
    duplicate: bool
    retained: bool
    content_type: str | None
    response_topic: str | None
    correlation: bytes | None
    user: Mapping[str, str]
    skipped: int
    properties: int = 0

    @property
    def size(self) -> int:
        """Count the bytes that are kept of it."""
        size = len(self.payload) + len(self.topic)
        if self.content_type is not None:
            size += len(self.content_type)
        if self.response_topic is not None:
            size += len(self.response_topic)
        if self.correlation is not None:
            size += len(self.correlation)
        return size


def read_publish(flags: int, data: bytes, start: int, end: int, five: bool, skipped: int = 0) -> Message:
    """Read a PUBLISH from data[start:end], what follows its fixed header; `flags` is the header's first byte.

    `skipped` is the packet's whole length where only its beginning is there; then it has no payload. MalformedError if
    it is no PUBLISH, or one of QoS 2, which nobody here subscribes to.
    """
    qos = flags >> 1 & 3
    at = start + 2
    if qos > 1 or at > end:
        raise MalformedError(f"a PUBLISH of {end - start} bytes and QoS {qos}")
    stop = at + (data[start] << 8 | data[start + 1])
    if stop + 2 * qos > end:
        raise MalformedError("the topic reaches past the packet")
    try:
        topic = data[at:stop].decode()
    except UnicodeDecodeError:
        topic = ""  # the message still is one, and wants its acknowledgement
    at = stop
    packet_id = 0
    if qos:
        packet_id = data[at] << 8 | data[at + 1]
        at += 2
    message = Message(topic, b"", qos, packet_id, bool(flags & 8), bool(flags & 1), None, None, None, _NOBODY, skipped)
    if five:
        length, at = _variable(data, at, end)
        stop = at + length
        if length:
            whole = stop <= end and length <= MAX_PROPERTIES
            if stop > end and not skipped:
                raise MalformedError("the properties reach past the packet")
            if length > MAX_PROPERTIES:
                message.properties = length
            _read_properties(message, data, at, stop if whole else min(end, at + MAX_PROPERTIES), whole)
        at = stop
    if not skipped:
        message.payload = data[at:end]
    return message


def _variable(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Read a variable byte integer (1.5.5); gives its value and the position behind it."""
    value = shift = 0
    while at < end and shift <= 21:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise MalformedError("a variable byte integer does not end")


def _read_properties(message: Message, data: bytes, at: int, end: int, whole: bool) -> None:
    """Read properties from data[at:end] into a message; `whole` is false where they were cut off."""
    user: dict[str, str] = {}
    try:
        while at < end:
            kind = data[at]
            at += 1
            if kind == _USER:
                name, at = _text(data, at, end)
                user[name], at = _text(data, at, end)
            elif kind in _TEXTS:
                text, at = _text(data, at, end)
                if kind == _CONTENT_TYPE:
                    message.content_type = text
                else:
                    message.response_topic = text
            elif kind == _CORRELATION:
                message.correlation, at = _bytes(data, at, end)
            elif kind == _SUBSCRIPTION:
                _, at = _variable(data, at, end)
            elif kind in _FIXED:
                at += _FIXED[kind]
                if at > end:
                    raise MalformedError("a property reaches past the properties")
            else:
                raise MalformedError(f"property {kind:#x} is none of a PUBLISH")
    except MalformedError:
        if whole:
            raise
    if user:
        message.user = user


def _bytes(data: bytes, at: int, end: int) -> tuple[bytes, int]:
    start = at + 2
    if start > end:
        raise MalformedError("a property reaches past the properties")
    stop = start + (data[at] << 8 | data[at + 1])
    if stop > end:
        raise MalformedError("a property reaches past the properties")
    return data[start:stop], stop


def _text(data: bytes, at: int, end: int) -> tuple[str, int]:
    raw, at = _bytes(data, at, end)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise MalformedError(f"a property is no UTF-8 text: {error}") from error
    if "\0" in text:  # 1.5.4
        raise MalformedError("a property's text holds a NUL")
    return text, at


def read_puback(data: bytes, start: int, end: int) -> tuple[int, int]:
    """Read a PUBACK; gives the packet id and the reason code (0 where it says none, and in MQTT 3.1.1)."""
    if end - start < 2:
        raise MalformedError("a PUBACK without packet id")
    return data[start] << 8 | data[start + 1], data[start + 2] if end - start > 2 else 0


def puback(packet_id: int) -> bytes:
    """Write the PUBACK of a message that is safe."""
    return _pack_puback(PUBACK, 2, packet_id)


@dataclass(frozen=True, slots=True)
class Envelope:
    """What many publishes have in common, packed once: topic, QoS, retain flag and properties."""

    first: int
    """The fixed header's first byte."""
    topic: bytes
    """With its length in front."""
    properties: bytes | None
    """Without their length; None in MQTT 3.1.1, which has none."""

    @property
    def qos(self) -> int:
        """Give the QoS, 0 or 1."""
        return self.first >> 1 & 3

    def seal(self, payload: bytes, packet_id: int, further: bytes = b"") -> bytes:
        """Give the whole packet; `further` are packed properties of this message alone. ValueError if it is too large."""
        number = _pack_id(packet_id) if self.first & 6 else b""
        properties, described = self.properties, b""
        size = len(self.topic) + len(number) + len(payload)
        if properties is not None:
            described = variable(len(properties) + len(further)) + properties + further
            size += len(described)
        if size > LONGEST_PACKET:
            raise ValueError(f"{len(payload)} bytes are more than an MQTT packet can hold")
        return b"".join((_FIRST[self.first], variable(size), self.topic, number, described, payload))


def envelope(
    topic: str,
    qos: int,
    *,
    retain: bool = False,
    five: bool = True,
    content_type: str | None = None,
    user: Iterable[tuple[str, str]] = (),
    correlation: bytes | None = None,
) -> Envelope:
    """Pack what many publishes have in common. ValueError if MQTT cannot carry it."""
    name = topic.encode()
    if not name or b"+" in name or b"#" in name or b"\0" in name:
        raise ValueError("a topic to publish to is not empty and has no wildcards")
    properties: bytes | None = None
    if five:
        properties = b"" if content_type is None else b"\x03" + _prefixed(content_type.encode())
        if correlation is not None:
            properties += b"\x09" + _prefixed(correlation)
        properties += b"".join(user_property(key, value) for key, value in user)
    return Envelope(PUBLISH | qos << 1 | retain, _prefixed(name), properties)


def user_property(key: str, value: str) -> bytes:
    """Pack one user property (MQTT 5, 3.3.2.3.7)."""
    return b"\x26" + _prefixed(key.encode()) + _prefixed(value.encode())


def _prefixed(data: bytes) -> bytes:
    if len(data) > 65535:
        raise ValueError(f"{len(data)} bytes are more than a text of MQTT can hold (65535)")
    return _pack_id(len(data)) + data


def variable(value: int) -> bytes:
    """Write a variable byte integer."""
    if value < 0x80:
        return bytes((value,))
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)
