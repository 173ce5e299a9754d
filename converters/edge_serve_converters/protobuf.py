"""Protocol buffers' wire format (protobuf.dev, "Encoding"), written and read without a schema compiler or its runtime.

A message is a row of fields, each a key (field number and kind) and a value. Who writes and reads here knows the fields.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from edge_serve_converters.store import Array

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10


def integer_field(field: int, value: int) -> bytes:
    """Encode a field that holds a whole number of at least 0, a truth value or an enumeration's."""
    return _varint(field << 3 | _VARINT) + _varint(value)


def double_field(field: int, value: float) -> bytes:
    """Encode a field that holds a float of 64 bits."""
    return _varint(field << 3 | _FIXED64) + struct.pack("<d", value)


def bytes_field(field: int, value: bytes) -> bytes:
    """Encode a field that holds bytes: a text, a packed list, or a message that is encoded already."""
    return _varint(field << 3 | _BYTES) + _varint(len(value)) + value


def text_field(field: int, value: str) -> bytes:
    """Encode a field that holds a text."""
    return bytes_field(field, value.encode())


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def fields(message: memoryview, what: str) -> Iterator[tuple[int, int | memoryview]]:
    """Give (field number, value) of a message: numbers as int, everything with a length as its bytes, which are not copied.

    ValueError says what is wrong with it, as a predicate: "is no {what}", "ends within a number".
    """
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ValueError(f"is no {what}")
        if kind == _VARINT:
            value, at = _read_varint(message, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _read_varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"is no {what}")
        if size > len(message) - at:
            raise ValueError("ends within a field")
        held = message[at : at + size]
        at += size
        yield number, held if kind == _BYTES else int.from_bytes(held, "little")


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for place in range(_LONGEST_VARINT):
        if at + place >= len(message):
            raise ValueError("ends within a number")
        byte = message[at + place]
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at + place + 1
    raise ValueError("holds a number that is too long")


def packed_integers(packed: memoryview) -> Array:
    """Decode a packed list of whole numbers into int64, all at once, a byte position at a time: pictures may come so."""
    raw = np.frombuffer(packed, np.uint8)
    if not len(raw):
        return np.empty(0, np.int64)
    ends = np.flatnonzero(raw < 0x80)
    if not len(ends) or ends[-1] != len(raw) - 1:
        raise ValueError("ends within a number")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    longest = int(lengths.max())
    if longest > _LONGEST_VARINT:
        raise ValueError("holds a number that is too long")
    values = np.zeros(len(starts), np.uint64)
    for place in range(longest):
        here = lengths > place
        values[here] |= (raw[starts[here] + place] & np.uint8(0x7F)).astype(np.uint64) << np.uint64(7 * place)
    return values.view(np.int64)
