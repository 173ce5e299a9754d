"""Warm-up requests: records with good checksums that hold the requests that TensorFlow Serving would get.

The decoder here knows nothing of the encoder: protobuf's wire format by the rules of its documentation.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve.errors import UsageError
from edge_serve_converters.warmup import encode
from tests.unit.record_files import records

DTYPES = {1: "<f4", 3: "<i4", 4: "u1", 6: "i1", 9: "<i8", 10: "?", 19: "<f2"}


def fields(message: bytes) -> list[tuple[int, Any]]:
    """Take a protobuf message apart: field number and number or bytes, in order."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    found: list[tuple[int, Any]] = []
    while place < len(message):
        tag = varint()
        assert tag & 7 in (0, 2)
        if tag & 7 == 0:
            found.append((tag >> 3, varint()))
        else:
            length = varint()
            assert place + length <= len(message)
            found.append((tag >> 3, message[place : place + length]))
            place += length
    return found


def only(message: bytes, number: int) -> Any:
    """Give the one field that a message has."""
    ((found, value),) = fields(message)
    assert found == number
    return value


def request(record: bytes) -> tuple[str, str, dict[str, Any]]:
    """Read model, signature and inputs of a PredictionLog (predict_log is 6, its request 1)."""
    inputs = {}
    (spec_number, spec), *entries = fields(only(only(record, 6), 1))
    assert spec_number == 1
    for number, entry in entries:
        assert number == 2
        key, tensor = dict(fields(entry))[1], dict(fields(dict(fields(entry))[2]))
        shape = [only(dimension, 1) for _, dimension in fields(tensor[2])]
        inputs[key.decode()] = np.frombuffer(tensor[4], DTYPES[tensor[1]]).reshape(shape)
    named = dict(fields(spec))
    return named[1].decode(), named[3].decode(), inputs


def test_each_run_is_one_request_with_all_inputs() -> None:
    rng = np.random.default_rng(1)
    arrays: dict[str, Any] = {
        "window": rng.random((3, 1, 50, 3)).astype(np.float32),
        "größe": np.arange(3, dtype=np.int64),
        "mask": np.array([[[True, False]]] * 3),
        "half": np.ones((3, 2), np.float16),
        "big_endian": np.array([[1], [2], [3]], ">i4"),
        "transposed": np.arange(18, dtype=np.uint8).reshape(2, 3, 3).T,
    }
    found = [request(record) for record in records(encode("bearing", "serving_default", arrays))]
    assert len(found) == 3
    for run, (name, signature, inputs) in enumerate(found):
        assert (name, signature) == ("bearing", "serving_default")
        assert set(inputs) == set(arrays)
        for key, array in arrays.items():
            assert inputs[key].dtype == array.dtype.newbyteorder("=")
            np.testing.assert_array_equal(inputs[key], array[run])


def test_equal_requests_give_equal_bytes_in_whatever_order_inputs_come() -> None:
    a, b = np.zeros((2, 3), np.float32), np.ones((2, 1), np.int8)
    assert encode("m", "s", {"a": a, "b": b}) == encode("m", "s", {"b": b, "a": a})


def test_there_are_never_more_requests_than_serving_takes() -> None:
    arrays = {"x": np.zeros((1500, 1), np.int8)}
    assert len(records(encode("m", "s", arrays, limit=2))) == 2
    assert len(records(encode("m", "s", arrays, limit=5000))) == 1000
    assert encode("m", "s", arrays, limit=0) == b""


def test_the_file_is_bounded_in_bytes() -> None:
    arrays = {"x": np.zeros((100, 1000), np.float32)}
    data = encode("m", "s", arrays, max_bytes=50_000)
    assert 40_000 < len(data) <= 50_000
    assert len(records(data)) == 12
    assert encode("m", "s", arrays, max_bytes=1000) == b""


def test_inputs_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match="input 'x': warm-up requests cannot hold"):
        encode("m", "s", {"x": np.array([["text"]])})


READ = """
import json, sys
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2
lengths = [len(record.numpy()) for record in tf.data.TFRecordDataset(sys.argv[1])]
tensor = tensor_pb2.TensorProto.FromString(sys.stdin.buffer.read())
print(json.dumps([lengths, tf.make_ndarray(tensor).tolist(), tf.make_ndarray(tensor).dtype.name]))
"""


@pytest.mark.convert
@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow: the [convert] extra")
def test_tensorflow_reads_the_records_and_their_tensors(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(2, 1, 2, 3)
    data = encode("m", "s", {"x": array})
    (tmp_path / "requests").write_bytes(data)
    parts = [value for number, value in fields(only(only(records(data)[1], 6), 1)) if number == 2]
    told = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "requests")],
        input=dict(fields(parts[0]))[2],
        capture_output=True,
        check=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
    )
    lengths, values, dtype = json.loads(told.stdout)
    assert lengths == [len(record) for record in records(data)]
    assert (values, dtype) == (array[1].tolist(), "float32")
