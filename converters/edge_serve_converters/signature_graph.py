"""The operators and tensors of one signature of a .tflite file, in the order in which they run.

Only what comparing layers needs: the file is mapped, not read, and the subgraphs of loops and branches are not entered.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edge_serve_converters.errors import ConversionError

# A damaged file may say any length; no real subgraph comes near this many tensors or operators.
MAX_ENTRIES = 1_000_000
# Dimensions of a tensor, tensors of an operator.
MAX_LIST = 4096


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor. `scale` and `zero_point` are None where it is not quantized per tensor."""

    index: int
    name: str
    dtype: str
    """As the schema writes it: FLOAT32, INT8, …"""
    shape: tuple[int, ...]
    """The shape as stored: 1 for a dimension that the file leaves open."""
    constant: bool
    scale: float | None
    zero_point: int | None


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator: indices of its tensors, those that it leaves out not counted."""

    index: int
    name: str
    """As the schema writes it (CONV_2D); a custom operator's own name."""
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SignatureGraph:
    """The subgraph of one signature."""

    subgraph: int
    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: dict[str, int]
    """The signature's name of an input → its tensor; in a file without signatures, tensor names without ":0"."""
    outputs: frozenset[int]
    """The tensors that the subgraph gives."""


def read_graph(file: Path, signature: str) -> SignatureGraph:
    """Read the subgraph of a signature; ConversionError if the file is damaged, or has signatures without this one."""
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(data, signature, file.name)
    except (OSError, ValueError, struct.error, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ConversionError(f"{file.name} is no .tflite file, or a damaged one ({error})") from error


def _read(data: mmap.mmap, signature: str, where: str) -> SignatureGraph:
    from ai_edge_litert import schema_py_generated as schema  # only conversion needs it

    if data[4:8] != b"TFL3":
        raise ValueError("not a TFLite flatbuffer")
    model = schema.Model.GetRootAs(data, 0)
    number, inputs = _signature(model, signature, where)
    subgraph = model.Subgraphs(number)
    tensors = tuple(_tensor(model, subgraph, index) for index in range(_most(subgraph.TensorsLength(), MAX_ENTRIES)))
    if inputs is None:
        inputs = {tensors[index].name.removesuffix(":0"): index for index in _list(subgraph, "Inputs")}
    operators = []
    for index in range(_most(subgraph.OperatorsLength(), MAX_ENTRIES)):
        operator = subgraph.Operators(index)
        name = _operator_name(model.OperatorCodes(operator.OpcodeIndex()))
        operators.append(Operator(index, name, _list(operator, "Inputs"), _list(operator, "Outputs")))
    outputs = frozenset(_list(subgraph, "Outputs"))
    used = outputs.union(inputs.values(), *(operator.inputs + operator.outputs for operator in operators))
    if max(used, default=0) >= len(tensors):
        raise ValueError(f"it refers to tensor {max(used)} of {len(tensors)}")
    return SignatureGraph(number, tensors, tuple(operators), inputs, outputs)


def _signature(model: Any, wanted: str, where: str) -> tuple[int, dict[str, int] | None]:
    known = []
    for index in range(_most(model.SignatureDefsLength(), MAX_LIST)):
        entry = model.SignatureDefs(index)
        known.append(_text(entry.SignatureKey()))
        if known[-1] == wanted:
            maps = [entry.Inputs(place) for place in range(_most(entry.InputsLength(), MAX_LIST))]
            return int(entry.SubgraphIndex()), {_text(each.Name()): int(each.TensorIndex()) for each in maps}
    if known:
        raise ConversionError(f"{where} has no signature {wanted!r}; it has {', '.join(known)}")
    return 0, None


def _tensor(model: Any, subgraph: Any, index: int) -> Tensor:
    from ai_edge_litert import schema_py_generated as schema

    tensor = subgraph.Tensors(index)
    buffer = model.Buffers(tensor.Buffer())
    quantization = tensor.Quantization()
    single = quantization is not None and quantization.ScaleLength() == 1 == quantization.ZeroPointLength()
    return Tensor(
        index,
        _text(tensor.Name()),
        _names(schema.TensorType).get(tensor.Type(), str(tensor.Type())),
        tuple(int(tensor.Shape(place)) for place in range(_most(tensor.ShapeLength(), MAX_LIST))),
        # Weights beyond 2 GB lie behind the flatbuffer: no length, but an offset (0 and 1 mean none).
        bool(buffer.DataLength() or buffer.Offset() > 1),
        float(quantization.Scale(0)) if single else None,
        int(quantization.ZeroPoint(0)) if single else None,
    )


def _list(table: Any, field: str) -> tuple[int, ...]:
    get = getattr(table, field)
    values = (int(get(place)) for place in range(_most(getattr(table, f"{field}Length")(), MAX_LIST)))
    return tuple(value for value in values if value >= 0)


def _most(length: int, limit: int) -> int:
    if length > limit:
        raise ValueError(f"a list of {length} entries")
    return length


def _text(name: bytes | None) -> str:
    return name.decode("utf-8", "replace") if name else ""


def _operator_name(code: Any) -> str:
    from ai_edge_litert import schema_py_generated as schema

    # Files of before 2020 keep the code in the older 8-bit field; the larger one is right in both.
    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
    if number == schema.BuiltinOperator.CUSTOM:
        return _text(code.CustomCode()) or "CUSTOM"
    return _names(schema.BuiltinOperator).get(number, f"BUILTIN_{number}")


@cache
def _names(enumeration: type) -> dict[int, str]:
    return {value: name for name, value in vars(enumeration).items() if not name.startswith("_")}
