"""tf.train.Example without TensorFlow: the features of a serialized record, decoded one by one as they are needed.

Messages (tensorflow/core/example/{example,feature}.proto): Example { Features features = 1 }, Features { map<string,
Feature> feature = 1 }, Feature { oneof BytesList 1 | FloatList 2 | Int64List 3 }, each list { repeated value = 1 }, numbers
packed or not. Encoding: the Protocol Buffers specification. Everything here raises ValueError with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from edge_serve_converters.store import Array

MAX_FEATURES = 4096
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10


def features(record: bytes) -> dict[str, memoryview]:
    """Give the features of an Example by name, still serialized."""
    found: dict[str, memoryview] = {}
    for number, value in _fields(memoryview(record)):
        if number == 2:
            raise ValueError("is a SequenceExample; write tf.train.Example, one sample a record")
        if number != 1 or not isinstance(value, memoryview):
            raise ValueError("is no tf.train.Example")
        for _, entry in _fields(value):
            name, feature = _entry(entry)
            found[name] = feature
            if len(found) > MAX_FEATURES:
                raise ValueError(f"has more than {MAX_FEATURES} features")
    return found


def _entry(entry: int | memoryview) -> tuple[str, memoryview]:
    if not isinstance(entry, memoryview):
        raise ValueError("is no tf.train.Example")
    parts = {number: value for number, value in _fields(entry) if isinstance(value, memoryview)}
    empty = memoryview(b"")
    return str(parts.get(1, empty), "utf-8"), parts.get(2, empty)


def decode(feature: memoryview) -> list[bytes] | Array:
    """Give a feature's values: byte strings, or a float32 or int64 array of one dimension. An empty feature is []."""
    values: list[bytes] | Array = []
    for number, content in _fields(feature):
        if not isinstance(content, memoryview) or number not in _LISTS:
            raise ValueError("is a feature of an unknown kind")
        values = _LISTS[number](content)
    return values


def _byte_strings(content: memoryview) -> list[bytes]:
    return [bytes(value) for number, value in _fields(content) if number == 1 and isinstance(value, memoryview)]


def _floats(content: memoryview) -> Array:
    parts = []
    for _, value in _fields(content):
        if isinstance(value, int):
            parts.append(np.array([value], "<u4").view("<f4"))
        elif len(value) % 4:
            raise ValueError("holds half a float")
        else:
            parts.append(np.frombuffer(value, "<f4"))
    return np.concatenate(parts).astype(np.float32) if parts else np.empty(0, np.float32)


def _integers(content: memoryview) -> Array:
    parts = [
        np.array([value], np.uint64).view(np.int64) if isinstance(value, int) else _packed_varints(value)
        for _, value in _fields(content)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


_LISTS: dict[int, Any] = {1: _byte_strings, 2: _floats, 3: _integers}


def _packed_varints(content: memoryview) -> Array:
    """Decode varints all at once, a byte position at a time: pictures may come as lists of integers."""
    raw = np.frombuffer(content, np.uint8)
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


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Give (field number, value) of a message: numbers as int, everything with a length as its bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ValueError("is no tf.train.Example")
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError("is no tf.train.Example")
        if size > len(message) - at:
            raise ValueError("ends within a feature")
        content = message[at : at + size]
        at += size
        yield number, content if kind == _BYTES else int.from_bytes(content, "little")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for place in range(_LONGEST_VARINT):
        if at + place >= len(message):
            raise ValueError("ends within a number")
        byte = message[at + place]
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at + place + 1
    raise ValueError("holds a number that is too long")
