"""What a .tflite file really holds: operators, tensor types, weights, and what keeps devices from running it.

The converter's exit status says little: it also writes files without weights and "int8" files that compute in float.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from edge_serve_converters import graph
from edge_serve_converters.runtimes import BUILTIN_CUSTOM

# What detectors end in: one custom operator where the SavedModel has a stand-in that computes nothing of the kind.
FUSED_OPERATORS = frozenset({"TFLite_Detection_PostProcess"})
# These move values between types or steer control flow; they compute nothing, so float tensors at them are no fallback.
_NEUTRAL = frozenset(
    {"QUANTIZE", "DEQUANTIZE", "CAST", "SHAPE", "RANK", "WHILE", "IF", "CALL", "CALL_ONCE", *FUSED_OPERATORS}
)
_FLOATS = frozenset({"float32", "float16"})
_INTEGERS = frozenset({"int8", "uint8"})


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
    """The types of the tensors that hold data, the weights, as the schema writes them: INT8, FLOAT32, …"""
    custom: tuple[str, ...]
    """Custom operators that device runtimes do not have."""
    weightless: bool
    """Reads variables that nothing in the file sets: it loads, and fails when it runs."""
    stateful: bool
    """Writes variables while it runs."""


def read_contents(data: bytes) -> Contents:
    """Read a .tflite file; ValueError if it is none, or damaged."""
    found = graph.read(data)
    operators: Counter[str] = Counter()
    floats: Counter[str] = Counter()
    integers = 0
    for operator in found.operators:
        operators[operator.name] += 1
        touched = {tensor.dtype for tensor in operator.present + operator.outputs}
        if operator.name in _NEUTRAL:
            continue
        if touched & _FLOATS:
            floats[operator.name] += 1
        elif touched & _INTEGERS:
            integers += 1
    constants = {tensor.dtype for subgraph in found.subgraphs for tensor in _held(subgraph)}
    assigns = "ASSIGN_VARIABLE" in operators
    return Contents(
        dict(sorted(operators.items())),
        dict(sorted(floats.items())),
        integers,
        frozenset(dtype.upper() for dtype in constants),
        tuple(sorted({operator.name for operator in found.operators if operator.custom} - BUILTIN_CUSTOM)),
        "VAR_HANDLE" in operators and not assigns,
        assigns,
    )


def _held(subgraph: graph.Subgraph) -> list[graph.Tensor]:
    """List the tensors whose data the file has; other constants are unpacked from them when it is loaded."""
    made = {tensor.index for operator in subgraph.operators for tensor in operator.outputs}
    return [tensor for tensor in subgraph.tensors if tensor.constant and tensor.index not in made]


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
