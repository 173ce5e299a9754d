"""Which runtimes load a .tflite file and compute it as it is meant: told from the file, for runtimes that are not installed.

tflite-runtime 2.14.0 is the last of its name and the only runtime of 32-bit ARM boards. What it refuses was measured with
the real thing: operator versions (all of them), and beyond versions the kernels below, which it loads a file for and then
fails in, or computes wrong values with.
"""

from __future__ import annotations

from edge_serve_converters.graph import Graph, Operator
from edge_serve_converters.operator_versions import Release, highest, parse, release

TFLITE_RUNTIME: Release = (2, 14, 0)
# Custom operators that both runtimes have built in.
BUILTIN_CUSTOM = frozenset({"TFLite_Detection_PostProcess", "AudioSpectrogram", "Mfcc", "NumericVerify"})
EDGETPU_OPERATOR = "edgetpu-custom-op"
NEEDS_EDGETPU = ": runs with an Edge TPU and its delegate only"
_FLEX = "Flex"

# Types that came after it, and 4-bit weights, which it reads as if they were 8-bit ones.
_UNKNOWN_TYPES = frozenset({"int2", "uint4", "float8_e4m3fn", "float8_e5m2", "bfloat16"})
# It loads these versions, and has no kernel for this type of values.
_NO_KERNEL = frozenset({("DIV", "int8"), ("GELU", "int16"), ("NEG", "int16"), ("RSQRT", "int16"), ("TILE", "int16")})
_INT16_MUL_RANK = 4
# FULLY_CONNECTED on floats with weights that have a scale for each output.
_PER_CHANNEL_DYNAMIC = 12


def loads_in_tflite_runtime_2_14(graph: Graph) -> list[str]:
    """List why tflite-runtime 2.14.0 does not load the file or computes wrong values with it; empty: it is expected to work.

    Each reason names an operator once, however often the file has it.
    """
    reasons: dict[str, None] = {}
    for operator in graph.operators:
        reason = _reason(operator)
        if reason is not None:
            reasons.setdefault(f"{operator.name}{reason}")
    return list(reasons)


def custom_operators(graph: Graph) -> tuple[list[str], list[str]]:
    """List the operators that devices lack, by name: those of TensorFlow itself (Flex), and other custom ones."""
    names = sorted(
        {operator.name for operator in graph.operators if operator.custom} - BUILTIN_CUSTOM - {EDGETPU_OPERATOR}
    )
    return [name for name in names if name.startswith(_FLEX)], [name for name in names if not name.startswith(_FLEX)]


def min_runtime(graph: Graph) -> str | None:
    """Give the first TensorFlow release whose runtime has all operators in their versions; None if one is not known.

    The file's own `min_runtime_version` is not asked: tools that change a file after its conversion leave it as it was.
    """
    releases = []
    for operator in graph.operators:
        if operator.custom:
            continue
        if _unknown_type(operator) is not None:
            return None
        found = release(operator.name, max(operator.version, _least_version(operator)))
        if found is None:
            return None
        releases.append(found)
    return max(releases, key=parse, default=None)


def _least_version(operator: Operator) -> int:
    """Give the version that the operator's form needs; litert-quantizer leaves versions as the float file had them."""
    return _PER_CHANNEL_DYNAMIC if _per_channel_dynamic(operator) else 1


def _per_channel_dynamic(operator: Operator) -> bool:
    if operator.name != "FULLY_CONNECTED" or len(operator.inputs) < 2:
        return False
    weights = operator.inputs[1]
    on_floats = any(tensor.dtype == "float32" for tensor in operator.values)
    return on_floats and weights is not None and weights.dtype == "int8" and weights.scales > 1


def _reason(operator: Operator) -> str | None:
    if operator.name == EDGETPU_OPERATOR:
        return NEEDS_EDGETPU
    if operator.custom:
        return None if operator.name in BUILTIN_CUSTOM else ": a custom operator that it does not have"
    known = highest(operator.name, TFLITE_RUNTIME)
    if known is None:
        return ": it does not have that operator"
    if operator.version > known:
        since = release(operator.name, operator.version)
        return (
            f" version {operator.version}" + (f" (of TensorFlow {since})" if since else "") + f": it has up to {known}"
        )
    return _unknown_type(operator) or _missing_kernel(operator) or _wrong_values(operator)


def _unknown_type(operator: Operator) -> str | None:
    tensors = operator.present + operator.outputs
    unknown = sorted({tensor.dtype for tensor in tensors} & _UNKNOWN_TYPES)
    if unknown:
        return f" on {unknown[0]}: it does not know that type"
    if any(tensor.dtype == "int4" for tensor in tensors):
        return " with int4 weights: it refuses them or computes wrong values"
    if any(tensor.blockwise for tensor in tensors):
        return " with weights that are quantized in blocks: it computes wrong values"
    return None


def _missing_kernel(operator: Operator) -> str | None:
    values = {tensor.dtype for tensor in operator.values}
    for dtype in sorted(values):
        if (operator.name, dtype) in _NO_KERNEL:
            return f" on {dtype}: it has no kernel for that"
    if operator.name == "TRANSPOSE_CONV" and "float32" in values and _weights(operator) == "int8":
        return " with int8 weights and float32 values (dynamic range): it has no kernel for that"
    if operator.name == "MUL" and "int16" in values:
        shapes = {tensor.shape for tensor in operator.present}
        if len(shapes) > 1 and max(map(len, shapes)) > _INT16_MUL_RANK:
            return " on int16 that broadcasts over more than 4 dimensions: it crashes"
    return None


def _wrong_values(operator: Operator) -> str | None:
    values = {tensor.dtype for tensor in operator.values}
    if operator.name == "SUM" and "int16" in values:
        return " on int16: it computes wrong values"
    if _per_channel_dynamic(operator):
        return " with a scale for each output and float32 values (dynamic range): it computes wrong values"
    return None


def _weights(operator: Operator) -> str | None:
    weights = operator.inputs[1] if len(operator.inputs) > 1 else None
    return weights.dtype if weights is not None else None
