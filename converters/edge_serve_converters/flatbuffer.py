"""What a .tflite file really holds, read from its flatbuffer: operators, tensor types, weights, and the runtime it needs.

The converter's exit status says little: it also writes files without weights and "int8" files that compute in float.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

# What detectors end in; device runtimes have it although it is a custom operator.
DEVICE_CUSTOM_OPERATORS = frozenset({"TFLite_Detection_PostProcess"})
# These move values between types or steer control flow; they compute nothing, so float tensors at them are no fallback.
_NEUTRAL = frozenset(
    {"QUANTIZE", "DEQUANTIZE", "CAST", "SHAPE", "RANK", "WHILE", "IF", "CALL", "CALL_ONCE", *DEVICE_CUSTOM_OPERATORS}
)
_RUNTIME_METADATA = b"min_runtime_version"


@dataclass(frozen=True, slots=True)
class Contents:
    """The facts of one file, over all its subgraphs."""

    operators: dict[str, int]
    """Operator name (a custom operator's own name) → how many."""
    float_operators: dict[str, int]
    """Those that compute on float tensors."""
    integer_operators: int
    """How many compute on 8-bit tensors."""
    constants: frozenset[str]
    """The types of the tensors that hold data: the weights."""
    custom: tuple[str, ...]
    """Custom operators that device runtimes do not have."""
    weightless: bool
    """Reads variables that nothing in the file sets: it loads, and fails when it runs."""
    stateful: bool
    """Writes variables while it runs."""
    min_runtime: str | None
    """The first TensorFlow Lite version that has all operators in their versions; every ai-edge-litert is newer."""


def read_contents(data: bytes) -> Contents:
    """Read a .tflite file; ValueError if it is not one."""
    from ai_edge_litert import schema_py_generated as schema  # only conversion needs it

    if data[4:8] != b"TFL3":
        raise ValueError("not a TFLite flatbuffer")
    model = schema.Model.GetRootAs(data, 0)
    codes = [_operator_name(model.OperatorCodes(index)) for index in range(model.OperatorCodesLength())]
    types = _names(schema.TensorType)
    operators: Counter[str] = Counter()
    floats: Counter[str] = Counter()
    integers = 0
    constants: set[str] = set()
    for number in range(model.SubgraphsLength()):
        subgraph = model.Subgraphs(number)
        kinds = []
        for index in range(subgraph.TensorsLength()):
            tensor = subgraph.Tensors(index)
            kinds.append(types[tensor.Type()])
            buffer = model.Buffers(tensor.Buffer())
            # Weights beyond 2 GB lie behind the flatbuffer: no length, but an offset (0 and 1 mean none).
            if buffer.DataLength() or buffer.Offset() > 1:
                constants.add(kinds[-1])
        for index in range(subgraph.OperatorsLength()):
            operator = subgraph.Operators(index)
            name, _ = codes[operator.OpcodeIndex()]
            operators[name] += 1
            touched = {kinds[index] for index in _tensors(operator) if index >= 0}
            if name in _NEUTRAL:
                continue
            if touched & {"FLOAT32", "FLOAT16"}:
                floats[name] += 1
            elif touched & {"INT8", "UINT8"}:
                integers += 1
    assigns = "ASSIGN_VARIABLE" in operators
    return Contents(
        dict(sorted(operators.items())),
        dict(sorted(floats.items())),
        integers,
        frozenset(constants),
        tuple(sorted({name for name, custom in codes if custom and name not in DEVICE_CUSTOM_OPERATORS})),
        "VAR_HANDLE" in operators and not assigns,
        assigns,
        _min_runtime(model),
    )


def fix_batch(data: bytes) -> bytes:
    """Give the file with an input batch that was left open declared as what it is by default: 1.

    Only the declared shapes (`shape_signature`) of the subgraphs' inputs change, in place. Outputs keep theirs: an open
    first dimension there may also be a number of things found.
    """
    from ai_edge_litert import schema_py_generated as schema

    changed = bytearray(data)
    model = schema.Model.GetRootAs(changed, 0)
    for number in range(model.SubgraphsLength()):
        subgraph = model.Subgraphs(number)
        for index in range(subgraph.InputsLength()):
            tensor = subgraph.Tensors(subgraph.Inputs(index))
            if tensor.ShapeSignatureLength() and tensor.ShapeSignature(0) == -1 and tensor.Shape(0) == 1:
                tensor.ShapeSignatureAsNumpy()[0] = 1  # a view of `changed`
    return bytes(changed)


def _tensors(operator: Any) -> list[int]:
    inputs = [operator.Inputs(index) for index in range(operator.InputsLength())]
    return inputs + [operator.Outputs(index) for index in range(operator.OutputsLength())]


def _operator_name(code: Any) -> tuple[str, bool]:
    from ai_edge_litert import schema_py_generated as schema

    # Files of before 2020 keep the code in the older 8-bit field; the larger one is right in both.
    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
    if number == schema.BuiltinOperator.CUSTOM:
        custom = code.CustomCode()
        return custom.decode("utf-8", "replace") if custom else "CUSTOM", True
    return _names(schema.BuiltinOperator).get(number, f"BUILTIN_{number}"), False


@cache
def _names(enumeration: type) -> dict[int, str]:
    return {value: name for name, value in vars(enumeration).items() if not name.startswith("_")}


def _min_runtime(model: Any) -> str | None:
    for index in range(model.MetadataLength()):
        entry = model.Metadata(index)
        if entry.Name() == _RUNTIME_METADATA:
            text = bytes(model.Buffers(entry.Buffer()).DataAsNumpy()).rstrip(b"\0").decode("ascii", "replace")
            return text or None
    return None
