"""Operators that only move values, left float in a quantized file: brought onto its integers.

The quantizer leaves what follows a loop (WHILE) float, because loops hand floats on: a bidirectional recurrent layer takes the
last step by a STRIDED_SLICE between float and QUANTIZE. Quantizing first and moving then gives the same values, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import numpy as np

MOVES = {
    "EXPAND_DIMS": 1,
    "GATHER": 2,
    "RESHAPE": 1,
    "SLICE": 2,
    "SQUEEZE": 1,
    "STRIDED_SLICE": 2,
    "TRANSPOSE": 2,
}
"""Operators whose first input alone holds values → the version in which they take int8 (TensorFlow Lite's op_version.cc)."""


def quantize_moves(data: bytes, keep_float: Collection[str] = ()) -> bytes:
    """Give the file with QUANTIZE ahead of moving operators that fed nothing else; layers in `keep_float` stay as they are."""
    from ai_edge_litert.tools import flatbuffer_utils as buffers

    model = buffers.read_model_from_bytearray(bytearray(data))
    changed = False
    for graph in model.subgraphs:
        while _move_one(buffers, model, graph, keep_float):  # the operator before may be the next
            changed = True
    return bytes(buffers.convert_object_to_bytearray(model)) if changed else data


def _move_one(buffers: Any, model: Any, graph: Any, keep_float: Collection[str]) -> bool:
    from ai_edge_litert import schema_py_generated as schema

    kinds = schema.TensorType
    readers: dict[int, list[Any]] = {}
    for operator in graph.operators:
        for index in operator.inputs:
            readers.setdefault(int(index), []).append(operator)
    for place, move in enumerate(graph.operators):
        name = str(buffers.opcode_to_name(model, move.opcodeIndex))
        if name not in MOVES or len(move.outputs) != 1:
            continue
        source, result = int(move.inputs[0]), int(move.outputs[0])
        tensor = graph.tensors[result]
        if tensor.type != kinds.FLOAT32 or tensor.name.decode("utf-8", "replace") in keep_float:
            continue
        following = readers.get(result, [])
        if len(following) != 1 or result in set(map(int, graph.outputs)):
            continue
        quantize = following[0]
        if buffers.opcode_to_name(model, quantize.opcodeIndex) != "QUANTIZE":
            continue
        if graph.tensors[int(quantize.outputs[0])].type != kinds.INT8:
            continue
        _swap(model, graph, place, quantize, _code(schema, model, name), source)
        return True
    return False


def _swap(model: Any, graph: Any, place: int, quantize: Any, code: int, source: int) -> None:
    """Let `quantize`, which follows the moving operator at `place`, go before it."""
    move = graph.operators[place]
    integers = copy.copy(graph.tensors[source])
    like = graph.tensors[int(quantize.outputs[0])]
    integers.type, integers.quantization = like.type, copy.deepcopy(like.quantization)
    integers.name = graph.tensors[source].name + b"_quantized"
    integers.buffer = like.buffer if model.buffers[like.buffer].data is None else 0
    graph.tensors.append(integers)
    index = len(graph.tensors) - 1
    move.inputs = np.array([index, *map(int, move.inputs[1:])], np.int32)
    move.outputs = np.array(quantize.outputs, np.int32)
    move.opcodeIndex = code
    quantize.inputs, quantize.outputs = np.array([source], np.int32), np.array([index], np.int32)
    others = [operator for operator in graph.operators if operator is not quantize]
    others.insert(next(number for number, operator in enumerate(others) if operator is move), quantize)
    graph.operators = others


def _code(schema: Any, model: Any, name: str) -> int:
    """Give the index of the operator's code in the version that takes int8; add it if the file has none."""
    number = getattr(schema.BuiltinOperator, name)
    for index, code in enumerate(model.operatorCodes):
        if number == code.builtinCode and code.version >= MOVES[name]:
            return index
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = number, number, MOVES[name]
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1
