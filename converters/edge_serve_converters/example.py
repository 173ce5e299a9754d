"""tf.train.Example without TensorFlow: the features of a serialized record, decoded one by one as they are needed.

Messages (tensorflow/core/example/{example,feature}.proto): Example { Features features = 1 }, Features { map<string,
Feature> feature = 1 }, Feature { oneof BytesList 1 | FloatList 2 | Int64List 3 }, each list { repeated value = 1 }, numbers
packed or not. Everything here raises ValueError with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from edge_serve_converters import protobuf
from edge_serve_converters.store import Array

MAX_FEATURES = 4096


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
        np.array([value], np.uint64).view(np.int64) if isinstance(value, int) else protobuf.packed_integers(value)
        for _, value in _fields(content)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


_LISTS: dict[int, Any] = {1: _byte_strings, 2: _floats, 3: _integers}


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    return protobuf.fields(message, "tf.train.Example")
