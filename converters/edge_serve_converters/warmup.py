"""Warm-up requests as TensorFlow Serving replays them: `assets.extra/tf_serving_warmup_requests` in a version's folder.

The file is a TFRecord of `tensorflow.serving.PredictionLog`; each holds one PredictRequest. Encoded by hand, because neither
TensorFlow nor its Serving API is needed for it. Field numbers: tensorflow_serving/apis/{prediction_log,predict,model}.proto,
tensorflow/core/framework/{tensor,tensor_shape,types}.proto. Record framing and the masked CRC-32C:
tensorflow/core/lib/io/record_writer.cc, lib/hash/crc32c.h; wire format: protobuf.dev, "Encoding".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache

import numpy as np

from edge_serve.errors import UsageError
from edge_serve_converters import store
from edge_serve_converters.store import Array, Arrays

FILE = "assets.extra/tf_serving_warmup_requests"
# TensorFlow Serving refuses to load a version with more (saved_model_warmup_util.h, kMaxNumRecords).
MAX_RECORDS = 1000
# What warms a model up need not double the bundle's size.
MAX_BYTES = 16 * 1024 * 1024

# types.proto, DataType.
DATA_TYPES = {
    "float32": 1,
    "float64": 2,
    "int32": 3,
    "uint8": 4,
    "int16": 5,
    "int8": 6,
    "int64": 9,
    "bool": 10,
    "uint16": 17,
    "float16": 19,
    "uint32": 22,
    "uint64": 23,
}
VARINT, BYTES = 0, 2
PREDICTION_PREDICT = 6
PREDICT_REQUEST = 1
REQUEST_SPEC, REQUEST_INPUTS = 1, 2
SPEC_NAME, SPEC_SIGNATURE = 1, 3
MAP_KEY, MAP_VALUE = 1, 2
TENSOR_DTYPE, TENSOR_SHAPE, TENSOR_CONTENT = 1, 2, 4
SHAPE_DIM = 2
DIM_SIZE = 1

# Castagnoli's polynomial, bits reversed (RFC 3720, appendix B.4).
POLYNOMIAL = 0x82F63B78
MASK_DELTA = 0xA282EAD8
# Below this a plain loop is faster than numpy.
LANES_WORTH_BYTES = 4096
LANES = 256


def encode(
    model_name: str,
    signature: str,
    inputs: Arrays,
    limit: int = MAX_RECORDS,
    max_bytes: int = MAX_BYTES,
) -> bytes:
    """Give the file for the first runs of `inputs`, name → [runs, *shape]; each run is one request with tensors [*shape].

    At most `limit` runs, never more than 1,000, and as many as fit into `max_bytes`: with large inputs that may be none, and
    the file is empty. The same arguments give the same bytes. UsageError for a dtype that requests cannot hold.
    """
    for name, array in inputs.items():
        if array.dtype.name not in DATA_TYPES:
            raise UsageError(f"input {name!r}: warm-up requests cannot hold {array.dtype.name}; give it numbers")
    spec = _field(SPEC_NAME, model_name.encode()) + _field(SPEC_SIGNATURE, signature.encode())
    records = []
    size = 0
    for run in range(min(limit, MAX_RECORDS, store.runs(inputs))):
        # The arrays' own bytes alone are a lower bound: what cannot fit is not encoded first.
        if size + sum(array[run].nbytes for array in inputs.values()) > max_bytes:
            break
        request = _field(REQUEST_SPEC, spec) + b"".join(
            _field(REQUEST_INPUTS, _field(MAP_KEY, name.encode()) + _field(MAP_VALUE, _tensor(array[run])))
            for name, array in sorted(inputs.items())
        )
        record = framed(_field(PREDICTION_PREDICT, _field(PREDICT_REQUEST, request)))
        size += len(record)
        if size > max_bytes:
            break
        records.append(record)
    return b"".join(records)


def _tensor(array: Array) -> bytes:
    dimensions = b"".join(_field(SHAPE_DIM, _number(DIM_SIZE, length)) for length in array.shape)
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return (
        _number(TENSOR_DTYPE, DATA_TYPES[array.dtype.name])
        + _field(TENSOR_SHAPE, dimensions)
        + _field(TENSOR_CONTENT, little.tobytes())
    )


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | VARINT) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | BYTES) + _varint(len(content)) + content


def framed(data: bytes) -> bytes:
    """Give one TFRecord: length (uint64), its masked CRC, the data, theirs; all little-endian."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(crc32c(length))) + data + struct.pack("<I", masked(crc32c(data)))


def masked(crc: int) -> int:
    """Give a CRC as records store it: turned by 15 bits and moved, so that the CRC of data with CRCs in it is a good one."""
    return ((crc >> 15 | crc << 17) + MASK_DELTA) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Give the CRC-32C (Castagnoli) of bytes.

    Large data are cut into lanes of equal length, which numpy takes through the table side by side. As a CRC is linear, the
    lanes' remainders are put together by moving each over the zeros of the lanes behind it.
    """
    remainder = 0xFFFFFFFF
    rest = data
    if len(data) >= LANES_WORTH_BYTES:
        length = len(data) // LANES
        rest = data[length * LANES :]
        lanes = np.frombuffer(data, np.uint8, length * LANES).reshape(LANES, length)
        table = np.array(_table(), np.uint32)
        states = np.zeros(LANES, np.uint32)
        # The start value belongs to the first byte of all; the other lanes begin with nothing.
        states[0] = remainder
        for column in np.ascontiguousarray(lanes.T):
            states = table[(states ^ column) & 0xFF] ^ (states >> np.uint32(8))
        move = _zeros(length)
        remainder = 0
        for state in states.tolist():
            remainder = _apply(move, remainder) ^ state
    table_of_ints = _table()
    for byte in rest:
        remainder = table_of_ints[(remainder ^ byte) & 0xFF] ^ remainder >> 8
    return remainder ^ 0xFFFFFFFF


@cache
def _table() -> tuple[int, ...]:
    """Give for each byte the remainder that it leaves."""
    entries = []
    for byte in range(256):
        remainder = byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (POLYNOMIAL if remainder & 1 else 0)
        entries.append(remainder)
    return tuple(entries)


@cache
def _zeros(count: int) -> tuple[int, ...]:
    """Give what `count` zero bytes do to a remainder: for each of its bits the remainder that becomes of it.

    By squaring: twice as many zeros are the same step done twice.
    """
    table = _table()
    bits = [1 << bit for bit in range(32)]
    step: Sequence[int] = [table[bit & 0xFF] ^ bit >> 8 for bit in bits]
    result: Sequence[int] = bits
    while count:
        if count & 1:
            result = [_apply(step, value) for value in result]
        step = [_apply(step, value) for value in step]
        count >>= 1
    return tuple(result)


def _apply(matrix: Sequence[int], value: int) -> int:
    result = 0
    for column in matrix:
        if value & 1:
            result ^= column
        value >>= 1
    return result
