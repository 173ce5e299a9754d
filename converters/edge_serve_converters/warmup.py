"""Warm-up requests as TensorFlow Serving replays them: `assets.extra/tf_serving_warmup_requests` in a version's folder.

The file is a TFRecord of `tensorflow.serving.PredictionLog`; each holds one PredictRequest. Encoded by hand, because neither
TensorFlow nor its Serving API is needed for it. Field numbers: tensorflow_serving/apis/{prediction_log,predict,model}.proto.
"""

from __future__ import annotations

from edge_serve.errors import UsageError
from edge_serve_converters import store
from edge_serve_converters.protobuf import bytes_field, text_field
from edge_serve_converters.record_framing import framed
from edge_serve_converters.store import Arrays
from edge_serve_converters.tensor_proto import DATA_TYPES, of_array

FILE = "assets.extra/tf_serving_warmup_requests"
# TensorFlow Serving refuses to load a version with more (saved_model_warmup_util.h, kMaxNumRecords).
MAX_RECORDS = 1000
# What warms a model up need not double the bundle's size.
MAX_BYTES = 16 * 1024 * 1024

PREDICTION_PREDICT = 6
PREDICT_REQUEST = 1
REQUEST_SPEC, REQUEST_INPUTS = 1, 2
SPEC_NAME, SPEC_SIGNATURE = 1, 3
MAP_KEY, MAP_VALUE = 1, 2


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
    spec = text_field(SPEC_NAME, model_name) + text_field(SPEC_SIGNATURE, signature)
    records = []
    size = 0
    for run in range(min(limit, MAX_RECORDS, store.runs(inputs))):
        # The arrays' own bytes alone are a lower bound: what cannot fit is not encoded first.
        if size + sum(array[run].nbytes for array in inputs.values()) > max_bytes:
            break
        request = bytes_field(REQUEST_SPEC, spec) + b"".join(
            bytes_field(REQUEST_INPUTS, text_field(MAP_KEY, name) + bytes_field(MAP_VALUE, of_array(array[run])))
            for name, array in sorted(inputs.items())
        )
        record = framed(bytes_field(PREDICTION_PREDICT, bytes_field(PREDICT_REQUEST, request)))
        size += len(record)
        if size > max_bytes:
            break
        records.append(record)
    return b"".join(records)
