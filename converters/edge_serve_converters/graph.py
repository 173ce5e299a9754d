"""A .tflite file as typed values: subgraphs, operators with their options, tensors with shapes, types and quantization.

What a variant holds, which layers belong together, and what delegates and runtimes take is decided over these. The layout
is TensorFlow Lite's `schema.fbs`; names of operators and options are the schema's. Whatever the bytes are, the answer is a
Graph or ValueError.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

Shape = tuple[int, ...]
Entry = TypeVar("Entry")

IDENTIFIER = b"TFL3"
# Of an honest file each vector and text is read once or twice; a file whose parts point at each other over and over would
# cost more memory than it has bytes.
_MOST_READ = 2
_LEAST_BUDGET = 1 << 16
# What an entry of a vector takes at least: a number, or an offset with the smallest table that it leads to.
_NUMBER_BYTES, _TABLE_BYTES = 4, 16
# TensorFlow Lite's own kernels end at 8.
MAX_RANK = 32
# Of constants they make constants.
_UNPACKS = frozenset({"DENSIFY", "DEQUANTIZE"})

# Of the many options, those that rules are about.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "AddOptions": ("FusedActivationFunction",),
    "ConcatenationOptions": ("FusedActivationFunction", "Axis"),
    "Conv2DOptions": ("FusedActivationFunction", "StrideH", "StrideW", "DilationHFactor", "DilationWFactor"),
    "DepthToSpaceOptions": ("BlockSize",),
    "DepthwiseConv2DOptions": (
        "FusedActivationFunction",
        "StrideH",
        "StrideW",
        "DilationHFactor",
        "DilationWFactor",
        "DepthMultiplier",
    ),
    "DivOptions": ("FusedActivationFunction",),
    "FullyConnectedOptions": ("FusedActivationFunction", "WeightsFormat", "KeepNumDims"),
    "LSTMOptions": ("FusedActivationFunction", "CellClip", "ProjClip", "KernelType"),
    "MirrorPadOptions": ("Mode",),
    "MulOptions": ("FusedActivationFunction",),
    "OneHotOptions": ("Axis",),
    "PackOptions": ("Axis",),
    "Pool2DOptions": ("FusedActivationFunction", "FilterHeight", "FilterWidth", "StrideH", "StrideW"),
    "ResizeBilinearOptions": ("AlignCorners", "HalfPixelCenters"),
    "ResizeNearestNeighborOptions": ("AlignCorners", "HalfPixelCenters"),
    "SoftmaxOptions": ("Beta",),
    "SpaceToDepthOptions": ("BlockSize",),
    "StridedSliceOptions": ("BeginMask", "EndMask", "EllipsisMask", "NewAxisMask", "ShrinkAxisMask"),
    "SubOptions": ("FusedActivationFunction",),
    "TransposeConvOptions": ("FusedActivationFunction", "StrideH", "StrideW"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """One tensor of a subgraph."""

    index: int
    name: str
    dtype: str
    """float32, int8, … as numpy names them; also int4, int2, string, resource."""
    shape: Shape
    signature: Shape
    """The shape that the file declares: -1 for what is open. Equal to `shape` where nothing is."""
    scales: int
    """How many scales it has: 0 is not quantized, 1 per tensor, more per channel."""
    scale: float | None
    """The scale of a tensor that has one scale and one zero point for all its values."""
    zero_points: tuple[int, ...]
    axis: int
    """The dimension that the scales belong to, where there are several."""
    blockwise: bool
    """Quantized in blocks (scales of their own along the rows)."""
    constant: bool
    """Holds data, or is unpacked from data (float16 weights behind DEQUANTIZE): delegates take both as constants."""
    data: Any = field(repr=False)
    """A constant's bytes (uint8 array, a view of the file); None if it is none, or lies behind the flatbuffer."""

    @property
    def open(self) -> bool:
        """Tell whether a dimension other than a batch of 1 is open."""
        return any(size == -1 and not (axis == 0 and self.shape[0] == 1) for axis, size in enumerate(self.signature))

    def integers(self) -> tuple[int, ...] | None:
        """Give the values of an int32 or int64 constant, in order; None if it is none."""
        if self.data is None or self.dtype not in ("int32", "int64") or len(self.data) % np.dtype(self.dtype).itemsize:
            return None
        return tuple(self.data.view(np.dtype(self.dtype).newbyteorder("<")).tolist())


@dataclass(frozen=True, slots=True, eq=False)
class Operator:
    """One operator; `index` is its place in the execution order of its subgraph."""

    index: int
    name: str
    """The schema's name; of a custom operator its own."""
    version: int
    custom: bool
    inputs: tuple[Tensor | None, ...]
    """None: an optional input that is left out."""
    outputs: tuple[Tensor, ...]
    options: Mapping[str, float]
    """Of the built-in options those that rules are about, by the schema's names."""

    @property
    def activation(self) -> str:
        """Give the fused activation: NONE, RELU, RELU6, …"""
        return _activations().get(int(self.options.get("fused_activation_function", 0)), "UNKNOWN")

    @property
    def present(self) -> tuple[Tensor, ...]:
        """Give the inputs that are there."""
        return tuple(tensor for tensor in self.inputs if tensor is not None)

    @property
    def values(self) -> tuple[Tensor, ...]:
        """Give the inputs and outputs that are no constants."""
        return tuple(tensor for tensor in self.present + self.outputs if not tensor.constant)

    @property
    def layer(self) -> str:
        """Give the name of its first output, which converters take from the layer."""
        return self.outputs[0].name if self.outputs else ""


@dataclass(frozen=True, slots=True, eq=False)
class Subgraph:
    """One subgraph: a signature's graph, or a body of a loop or branch."""

    index: int
    name: str
    entry: bool
    """A signature begins here; the others are called by operators."""
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """Where callers enter."""

    subgraph: int
    inputs: Mapping[str, int]
    """The signature's name of an input → the index of its tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A whole file."""

    subgraphs: tuple[Subgraph, ...]
    signatures: Mapping[str, Signature]

    @property
    def operators(self) -> Iterator[Operator]:
        """Go over all operators, subgraph by subgraph in execution order."""
        return (operator for subgraph in self.subgraphs for operator in subgraph.operators)


def read_file(path: Path) -> Graph:
    """Read a .tflite file that is mapped, not copied, as long as the graph is there; OSError, and ValueError as of `read`."""
    with path.open("rb") as stream:
        return read(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def read(data: bytes | mmap.mmap) -> Graph:
    """Read the bytes of a .tflite file; ValueError if it is none or damaged. Weights are not copied."""
    if data[4:8] != IDENTIFIER:
        raise ValueError("not a TFLite flatbuffer")
    try:
        return _Reader(data).graph()
    except (struct.error, ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"a damaged TFLite file ({error})") from error


class _Reader:
    """Reads one file; every vector and text is paid for from a budget, so that no file costs much more than its size."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        from ai_edge_litert import schema_py_generated as schema  # only conversion needs it

        self._schema = schema
        self._size = len(data)
        self._left = max(_MOST_READ * len(data), _LEAST_BUDGET)
        self._model = schema.Model.GetRootAs(data, 0)
        self._types = {value: name.lower() for name, value in _enumeration(schema.TensorType).items()}
        self._options = {
            value: (getattr(schema, name), tuple((option, _snake(option)) for option in _OPTIONS[name]))
            for name, value in _enumeration(schema.BuiltinOptions).items()
            if name in _OPTIONS
        }

    def graph(self) -> Graph:
        model = self._model
        codes = [
            self._code(model.OperatorCodes(index))
            for index in range(self._count(model.OperatorCodesLength(), "operator codes"))
        ]
        signatures = self._signatures()
        entries = {signature.subgraph for signature in signatures.values()}
        subgraphs = [
            self._subgraph(index, index in (entries or {0}), codes)
            for index in range(self._count(model.SubgraphsLength(), "subgraphs"))
        ]
        if not subgraphs:
            raise ValueError("no graph")
        for signature in signatures.values():
            entered = _pick(subgraphs, signature.subgraph, "graph")
            for index in signature.inputs.values():
                _pick(entered.tensors, index, "tensor")
        return Graph(tuple(subgraphs), MappingProxyType(signatures))

    def _signatures(self) -> dict[str, Signature]:
        found: dict[str, Signature] = {}
        for index in range(self._count(self._model.SignatureDefsLength(), "signatures")):
            table = self._model.SignatureDefs(index)
            count = self._count(table.InputsLength(), "inputs of signatures")
            maps = [table.Inputs(place) for place in range(count)]
            inputs = {self._text(entry.Name()): int(entry.TensorIndex()) for entry in maps}
            found.setdefault(self._text(table.SignatureKey()), Signature(table.SubgraphIndex(), inputs))
        return found

    def _count(self, length: int, what: str, size: int = _TABLE_BYTES) -> int:
        """Pay for a vector before it is gone over."""
        self._pay(size * length, what)
        return length

    def _pay(self, size: int, what: str) -> None:
        self._left -= size
        if size > max(self._size, _LEAST_BUDGET) or self._left < 0:
            raise ValueError(f"more {what} than its {self._size} bytes can hold")

    def _text(self, text: bytes | None) -> str:
        self._pay(len(text or b""), "text")
        return (text or b"").decode("utf-8", "replace")

    def _code(self, code: Any) -> tuple[str, int, bool]:
        # Files of before 2020 keep the code in the older 8-bit field; the larger one is right in both.
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        if number == self._schema.BuiltinOperator.CUSTOM:
            return self._text(code.CustomCode()) or "CUSTOM", code.Version(), True
        return _operators().get(number, f"BUILTIN_{number}"), code.Version(), False

    def _subgraph(self, index: int, entry: bool, codes: list[tuple[str, int, bool]]) -> Subgraph:
        table = self._model.Subgraphs(index)
        tensors = [
            self._tensor(number, table.Tensors(number))
            for number in range(self._count(table.TensorsLength(), "tensors"))
        ]
        operators = tuple(
            self._operator(number, table.Operators(number), codes, tensors)
            for number in range(self._count(table.OperatorsLength(), "operators"))
        )
        return Subgraph(
            index,
            self._text(table.Name()),
            entry,
            self._referred(table.InputsLength(), table.Inputs, tensors),
            self._referred(table.OutputsLength(), table.Outputs, tensors),
            tuple(tensors),
            operators,
        )

    def _referred(self, length: int, at: Callable[[int], int], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            _pick(tensors, at(index), "tensor")
            for index in range(self._count(length, "references to tensors", _NUMBER_BYTES))
        )

    def _operator(self, index: int, table: Any, codes: list[tuple[str, int, bool]], tensors: list[Tensor]) -> Operator:
        name, version, custom = codes[table.OpcodeIndex()]
        inputs = []
        for place in range(self._count(table.InputsLength(), "references to tensors", _NUMBER_BYTES)):
            number = table.Inputs(place)
            inputs.append(None if number < 0 else _pick(tensors, number, "tensor"))
        outputs = self._referred(table.OutputsLength(), table.Outputs, tensors)
        if name in _UNPACKS and inputs and inputs[0] is not None and inputs[0].constant:
            outputs = tuple(replace(tensor, constant=True) for tensor in outputs)
            for tensor in outputs:
                tensors[tensor.index] = tensor
        options: dict[str, float] = {}
        known = self._options.get(table.BuiltinOptionsType())
        held = table.BuiltinOptions() if known else None
        if known and held is not None:
            reader = known[0]()
            reader.Init(held.Bytes, held.Pos)
            options = {key: getattr(reader, option)() for option, key in known[1]}
        return Operator(index, name, version, custom, tuple(inputs), outputs, MappingProxyType(options))

    def _tensor(self, index: int, table: Any) -> Tensor:
        number = table.Type()
        rank, declared = table.ShapeLength(), table.ShapeSignatureLength()
        if max(rank, declared) > MAX_RANK:
            raise ValueError(f"a tensor of {max(rank, declared)} dimensions")
        shape = tuple(int(table.Shape(axis)) for axis in range(rank))
        signature = tuple(int(table.ShapeSignature(axis)) for axis in range(declared)) if declared == rank else shape
        quantization = table.Quantization()
        scales, axis, blockwise = 0, 0, False
        scale: float | None = None
        zero_points: tuple[int, ...] = ()
        if quantization is not None:
            scales = self._count(quantization.ScaleLength(), "scales", _NUMBER_BYTES)
            self._pay(8 * quantization.ZeroPointLength(), "zero points")
            if quantization.ZeroPointLength():
                zero_points = tuple(quantization.ZeroPointAsNumpy().tolist())
            if scales == 1 == len(zero_points):
                scale = float(quantization.Scale(0))
            axis = quantization.QuantizedDimension()
            blockwise = quantization.DetailsType() == self._schema.QuantizationDetails.BlockwiseQuantization
        buffer = self._model.Buffers(table.Buffer())
        held = buffer is not None and buffer.DataLength() > 0
        # Weights beyond 2 GB lie behind the flatbuffer: no length, but an offset (0 and 1 mean none).
        behind = buffer is not None and buffer.Offset() > 1
        return Tensor(
            index,
            self._text(table.Name()),
            self._types.get(number, f"type {number}"),
            shape,
            signature,
            scales,
            scale,
            zero_points,
            axis,
            blockwise,
            held or behind,
            buffer.DataAsNumpy() if held else None,
        )


def elements(shape: Shape) -> int:
    """Count the values of a shape."""
    return math.prod(shape)


def _pick(entries: Sequence[Entry], index: int, what: str) -> Entry:
    if not 0 <= index < len(entries):
        raise ValueError(f"it refers to {what} {index} of {len(entries)}")
    return entries[index]


def _enumeration(enumeration: type) -> dict[str, int]:
    return {name: value for name, value in vars(enumeration).items() if not name.startswith("_")}


@cache
def _operators() -> dict[int, str]:
    from ai_edge_litert import schema_py_generated as schema

    return {value: name for name, value in _enumeration(schema.BuiltinOperator).items()}


@cache
def _activations() -> dict[int, str]:
    from ai_edge_litert import schema_py_generated as schema

    return {value: name for name, value in _enumeration(schema.ActivationFunctionType).items()}


@cache
def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
