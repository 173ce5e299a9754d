"""Small .tflite files, written operator by operator: what a converter would write if it did just that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema


@dataclass(frozen=True, eq=False)
class T:
    """A tensor; with `data` it is a constant."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "int8"
    data: Any = None
    scales: int = 1
    zero_point: int = 0
    signature: tuple[int, ...] | None = None
    blockwise: bool = False


@dataclass(frozen=True, eq=False)
class Op:
    """An operator; `options` is a table of the schema, a custom operator is named by its own name."""

    name: str
    inputs: Sequence[T | None]
    outputs: Sequence[T]
    version: int = 1
    options: Any = None
    custom: bool = False


def x(shape: tuple[int, ...], dtype: str = "int8", **more: Any) -> T:
    """Give a value that flows."""
    return T("x", shape, dtype, **more)


def ints(*values: int) -> T:
    """Give an int32 constant: axes, shapes, paddings."""
    return T("parameter", (len(values),), "int32", np.array(values, np.int32), scales=0)


def pairs(*values: tuple[int, int]) -> T:
    """Give paddings: how much before and after each dimension."""
    return T("paddings", (len(values), 2), "int32", np.array(values, np.int32), scales=0)


def weights(shape: tuple[int, ...], dtype: str = "int8", scales: int = 1, **more: Any) -> T:
    """Give constant weights."""
    kind = {"int4": np.int8, "int2": np.int8}.get(dtype, dtype)
    return T("weights", shape, dtype, np.ones(shape, kind), scales=scales, **more)


def build(*graphs: Sequence[Op], inputs: Sequence[T] = (), outputs: Sequence[T] = ()) -> bytes:
    """Write a file; the first graph has the inputs and outputs (default: of its first and last operator)."""
    model = schema.ModelT()
    model.version = 3
    model.operatorCodes, model.buffers, model.subgraphs = [], [schema.BufferT()], []
    for number, operators in enumerate(graphs):
        graph = schema.SubGraphT()
        graph.name = f"graph{number}"
        tensors: list[T] = []
        for operator in operators:
            for tensor in (*operator.inputs, *operator.outputs):
                if tensor is not None and tensor not in tensors:
                    tensors.append(tensor)
        graph.tensors = [_tensor(model, tensor) for tensor in tensors]
        graph.operators = [_operator(model, operator, tensors) for operator in operators]
        first = [tensor for tensor in operators[0].inputs if tensor is not None and tensor.data is None]
        graph.inputs = [tensors.index(tensor) for tensor in (inputs if inputs and not number else first)]
        graph.outputs = [
            tensors.index(tensor) for tensor in (outputs if outputs and not number else operators[-1].outputs)
        ]
        model.subgraphs.append(graph)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _tensor(model: Any, tensor: T) -> Any:
    table = schema.TensorT()
    table.name, table.shape = tensor.name, list(tensor.shape)
    table.shapeSignature = list(tensor.signature) if tensor.signature is not None else None
    table.type = getattr(schema.TensorType, tensor.dtype.upper())
    table.buffer = 0
    if tensor.data is not None:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(tensor.data).tobytes(), np.uint8)
        table.buffer = len(model.buffers)
        model.buffers.append(buffer)
    if tensor.scales or tensor.blockwise:
        table.quantization = schema.QuantizationParametersT()
        table.quantization.scale = [0.1] * tensor.scales
        table.quantization.zeroPoint = [tensor.zero_point] * tensor.scales
        if tensor.blockwise:
            table.quantization.detailsType = schema.QuantizationDetails.BlockwiseQuantization
            table.quantization.details = schema.BlockwiseQuantizationT()
    return table


def _operator(model: Any, operator: Op, tensors: list[T]) -> Any:
    code = schema.OperatorCodeT()
    number = schema.BuiltinOperator.CUSTOM if operator.custom else getattr(schema.BuiltinOperator, operator.name)
    code.builtinCode, code.deprecatedBuiltinCode = number, min(number, 127)
    code.customCode = operator.name if operator.custom else None
    code.version = operator.version
    table = schema.OperatorT()
    table.opcodeIndex = len(model.operatorCodes)
    model.operatorCodes.append(code)
    table.inputs = [-1 if tensor is None else tensors.index(tensor) for tensor in operator.inputs]
    table.outputs = [tensors.index(tensor) for tensor in operator.outputs]
    if operator.options is not None:
        table.builtinOptions = operator.options
        table.builtinOptionsType = getattr(schema.BuiltinOptions, type(operator.options).__name__.removesuffix("T"))
    return table


def options(kind: str, **values: Any) -> Any:
    """Make a table of options: options("Conv2DOptions", dilationHFactor=2)."""
    table = getattr(schema, f"{kind}T")()
    for name, value in values.items():
        assert hasattr(table, name)
        setattr(table, name, value)
    return table
