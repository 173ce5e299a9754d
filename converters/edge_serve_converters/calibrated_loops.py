"""Calibration of loops (WHILE: recurrent layers), which crashes TensorFlow's calibrator where all their shapes are known.

The kernel of a loop plans its memory ahead if it can, and the calibrator then reads tensors that are not there yet. So one
input of each loop gets a shape that is only known at run time, by a RESHAPE to its own shape, computed; after calibration both
operators are taken out again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

_MARK = b"edge_serve_loop_input"


@contextmanager
def calibrated_with_loops() -> Iterator[None]:
    """Let TensorFlow's converter calibrate loops inside this context."""
    from tensorflow.lite.python.optimize import calibrator

    original = calibrator.Calibrator

    class Calibrator(original):  # type: ignore[misc, valid-type]  # tensorflow has no types
        def __init__(self, model_content: bytes, *arguments: Any) -> None:
            super().__init__(loosen(bytes(model_content)), *arguments)

        def calibrate(self, dataset_gen: Any) -> bytes:
            return tighten(bytes(super().calibrate(dataset_gen)))

    calibrator.Calibrator = Calibrator
    try:
        yield
    finally:
        calibrator.Calibrator = original


def loosen(data: bytes) -> bytes:
    """Give the file with one input of each loop of a shape that only running it tells; a file without loops as it is."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils as buffers

    model = buffers.read_model_from_bytearray(bytearray(data))
    found = [
        (graph, operator)
        for graph in model.subgraphs
        for operator in graph.operators
        if buffers.opcode_to_name(model, operator.opcodeIndex) == "WHILE"
    ]
    for graph, loop in found:
        given = [int(index) for index in loop.inputs]
        wide = [index for index in given if _is_float_array(schema, graph.tensors[index])]
        if wide:
            _loosen_input(schema, model, graph, loop, wide[0])
    return bytes(buffers.convert_object_to_bytearray(model)) if found else data


def _is_float_array(schema: Any, tensor: Any) -> bool:
    return bool(tensor.type == schema.TensorType.FLOAT32 and tensor.shape is not None and len(tensor.shape))


def _loosen_input(schema: Any, model: Any, graph: Any, loop: Any, source: int) -> None:
    tensor = graph.tensors[source]
    shape = _add_tensor(graph, schema.TensorType.INT32, [len(tensor.shape)], _add_buffer(schema, model, tensor.shape))
    # The smaller of two equal shapes: unlike a constant or a SHAPE, the runtime does not compute it ahead.
    computed = _add_tensor(graph, schema.TensorType.INT32, [len(tensor.shape)], 0)
    loose = copy.copy(tensor)
    loose.name, loose.buffer = _MARK, 0
    graph.tensors.append(loose)
    reshaped = len(graph.tensors) - 1
    minimum, reshape = schema.OperatorT(), schema.OperatorT()
    minimum.opcodeIndex = _add_code(schema, model, schema.BuiltinOperator.MINIMUM)
    minimum.inputs, minimum.outputs = np.array([shape, shape], np.int32), np.array([computed], np.int32)
    reshape.opcodeIndex = _add_code(schema, model, schema.BuiltinOperator.RESHAPE)
    reshape.inputs, reshape.outputs = np.array([source, computed], np.int32), np.array([reshaped], np.int32)
    at = next(number for number, operator in enumerate(graph.operators) if operator is loop)
    graph.operators[at:at] = [minimum, reshape]
    inputs = [int(index) for index in loop.inputs]
    inputs[inputs.index(source)] = reshaped
    loop.inputs = np.array(inputs, np.int32)


def _add_buffer(schema: Any, model: Any, values: Any) -> int:
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(np.asarray(values, np.int32).tobytes(), np.uint8)
    model.buffers.append(buffer)
    return len(model.buffers) - 1


def _add_tensor(graph: Any, kind: int, shape: list[int], buffer: int) -> int:
    from ai_edge_litert import schema_py_generated as schema

    tensor = schema.TensorT()
    tensor.type, tensor.shape, tensor.buffer, tensor.name = kind, np.array(shape, np.int32), buffer, _MARK
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def _add_code(schema: Any, model: Any, number: int) -> int:
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = number, number, 1
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def tighten(data: bytes) -> bytes:
    """Take out what `loosen` put in; the ranges that calibration wrote stay."""
    from ai_edge_litert.tools import flatbuffer_utils as buffers

    model = buffers.read_model_from_bytearray(bytearray(data))
    changed = False
    for graph in model.subgraphs:
        marked = {index for index, tensor in enumerate(graph.tensors) if tensor.name == _MARK}
        inserted = [operator for operator in graph.operators if int(operator.outputs[0]) in marked]
        # RESHAPE gives what the loop takes, of what it took before.
        before = {int(operator.outputs[0]): int(operator.inputs[0]) for operator in inserted}
        graph.operators = [operator for operator in graph.operators if not any(operator is one for one in inserted)]
        for operator in graph.operators:
            operator.inputs = np.array([before.get(int(index), int(index)) for index in operator.inputs], np.int32)
        changed |= bool(inserted)
    return bytes(buffers.convert_object_to_bytearray(model)) if changed else data
