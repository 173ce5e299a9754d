"""tensorflow.TensorProto without TensorFlow: arrays and texts as TensorFlow Serving and TensorBoard take them.

Field numbers and types: tensorflow/core/framework/{tensor,tensor_shape,types}.proto.
"""

from __future__ import annotations

import numpy as np

from edge_serve_converters.protobuf import bytes_field, integer_field, text_field
from edge_serve_converters.store import Array

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
STRING = 7
TENSOR_DTYPE, TENSOR_SHAPE, TENSOR_CONTENT, TENSOR_STRING = 1, 2, 4, 8
SHAPE_DIM = 2
DIM_SIZE = 1


def of_array(array: Array) -> bytes:
    """Encode an array of a dtype that DATA_TYPES has; KeyError if it has another."""
    dimensions = b"".join(bytes_field(SHAPE_DIM, integer_field(DIM_SIZE, length)) for length in array.shape)
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return (
        integer_field(TENSOR_DTYPE, DATA_TYPES[array.dtype.name])
        + bytes_field(TENSOR_SHAPE, dimensions)
        + bytes_field(TENSOR_CONTENT, little.tobytes())
    )


def of_text(text: str) -> bytes:
    """Encode one text, without dimensions."""
    return integer_field(TENSOR_DTYPE, STRING) + bytes_field(TENSOR_SHAPE, b"") + text_field(TENSOR_STRING, text)
