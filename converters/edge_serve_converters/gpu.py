"""What a GPU delegate is expected to take of a file, operator by operator.

The rules are those of TensorFlow Lite's GPU delegate and LiteRT's ML Drift, which share them (`gpu_compatibility.cc` and
`model_builder.cc`, August 2026): 16- and 32-bit floats; 8-bit integers, which are computed as floats; four dimensions at
most. A driver may take less, and a delegate leaves small pieces to the CPU, so a verdict is an expectation.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_serve_converters.delegate_rules import Verdict, computed, dynamic, input_at, verdict, written
from edge_serve_converters.graph import Graph, Operator

_VALUES = frozenset({"float16", "float32", "int8", "uint8"})
MAX_RANK = 4
# Operators that take or give other types than the values that are computed with.
_INPUTS: dict[str, frozenset[str]] = {
    "CAST": frozenset({"bool", "int32"}),
    "GATHER": frozenset({"int32"}),
    "LOGICAL_AND": frozenset({"bool"}),
    "ONE_HOT": frozenset({"int32"}),
    "SELECT": frozenset({"bool"}),
    "SELECT_V2": frozenset({"bool"}),
}
_COMPARISONS = frozenset({"EQUAL", "GREATER", "GREATER_EQUAL", "LESS", "LESS_EQUAL", "NOT_EQUAL"})
_OUTPUTS: dict[str, frozenset[str]] = {
    "CAST": frozenset({"bool", "int32"}),
    "LOGICAL_AND": frozenset({"bool"}),
    **dict.fromkeys(_COMPARISONS, frozenset({"bool"})),
}
_CONTROL_FLOW = frozenset({"CALL", "CALL_ONCE", "IF", "STABLEHLO_CASE", "STABLEHLO_WHILE", "WHILE"})
_UNARY = frozenset(
    [
        "ABS",
        "CEIL",
        "COS",
        "ELU",
        "EXP",
        "FLOOR",
        "GELU",
        "HARD_SWISH",
        "LEAKY_RELU",
        "LOG",
        "LOGISTIC",
        "NEG",
        "RELU",
        "RELU6",
        "RELU_N1_TO_1",
        "ROUND",
        "RSQRT",
        "SIGN",
        "SIN",
        "SQRT",
        "SQUARE",
        "TANH",
    ]
)
_BINARY = (
    frozenset(
        [
            "ADD",
            "ATAN2",
            "DIV",
            "FLOOR_DIV",
            "FLOOR_MOD",
            "LOGICAL_AND",
            "MAXIMUM",
            "MINIMUM",
            "MUL",
            "POW",
            "SQUARED_DIFFERENCE",
            "SUB",
        ]
    )
    | _COMPARISONS
)
_REDUCTIONS = frozenset({"MEAN", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD", "REVERSE_V2", "SUM"})
_PADS = frozenset({"MIRROR_PAD", "PAD", "PADV2"})
# Taken whatever their options are.
_PLAIN = frozenset(
    [
        "AVERAGE_POOL_2D",
        "CONCATENATION",
        "CUMSUM",
        "MAX_POOL_2D",
        "ONE_HOT",
        "PACK",
        "PRELU",
        "QUANTIZE",
        "RESHAPE",
        "RESIZE_NEAREST_NEIGHBOR",
        "SELECT",
        "SELECT_V2",
        "SPLIT",
        "SPLIT_V",
        "TILE",
        "TRANSPOSE",
    ]
)


def examine(graph: Graph) -> tuple[Verdict, ...]:
    """Judge all operators of a file."""
    return tuple(
        verdict(
            operator, _rule(operator) if subgraph.entry else "it runs inside a loop or branch, which stays on the CPU"
        )
        for subgraph in graph.subgraphs
        for operator in subgraph.operators
    )


def _rule(operator: Operator) -> str | None:
    if operator.custom:
        return "the GPU has no such custom operator"
    if operator.name in _CONTROL_FLOW:
        return "loops and branches stay on the CPU"
    special = _special(operator.name)
    if special is None and operator.name not in _PLAIN | _UNARY:
        return "the GPU has no such operator"
    return (special(operator) if special else None) or _types(operator) or dynamic(operator) or _shapes(operator)


def _special(name: str) -> Callable[[Operator], str | None] | None:
    for names, rule in ((_BINARY, _broadcast), (_REDUCTIONS, _reduction), (_PADS, _pad)):
        if name in names:
            return rule
    return _SPECIAL.get(name)


def _types(operator: Operator) -> str | None:
    """Only what flows is asked for: constants are converted when the delegate is built."""
    for tensor in operator.present:
        if not tensor.constant and tensor.dtype not in _VALUES | _INPUTS.get(operator.name, frozenset()):
            return f"it takes {tensor.dtype}; only float16, float32, int8 and uint8 are taken"
    for tensor in operator.outputs:
        if tensor.dtype not in _VALUES | _OUTPUTS.get(operator.name, frozenset()):
            return f"it gives {tensor.dtype}; only float16, float32, int8 and uint8 are given"
    return None


def _shapes(operator: Operator) -> str | None:
    for tensor in operator.values:
        if len(tensor.shape) > MAX_RANK:
            return f"the shape {written(tensor.shape)} has more than {MAX_RANK} dimensions"
        if len(tensor.shape) == MAX_RANK and tensor.shape[0] != 1:
            return f"the batch of {written(tensor.shape)} is above 1, which several GPU back ends refuse"
    return None


def _broadcast(operator: Operator) -> str | None:
    if operator.activation in ("SIGN_BIT", "UNKNOWN"):
        return f"the fused activation {operator.activation} is not taken"
    first, second = input_at(operator, 0), input_at(operator, 1)
    if first is None or second is None or len(operator.inputs) != 2:
        return "it takes two inputs"
    if first.constant and second.constant:
        return "it must have an input that is no constant"
    if operator.name == "MUL" and len(first.shape) == len(second.shape):
        pairs = list(zip(first.shape, second.shape, strict=True))
        if any(one < other for one, other in pairs) and any(one > other for one, other in pairs):
            return f"{written(first.shape)} and {written(second.shape)} both grow; only one side may be repeated"
    return None


def _reduction(operator: Operator) -> str | None:
    axes = input_at(operator, 1)
    if axes is not None and axes.constant and axes.dtype != "int32":
        return f"its axes are {axes.dtype}; they must be int32"
    return computed(operator, (1,))


def _pad(operator: Operator) -> str | None:
    if operator.name == "MIRROR_PAD" and operator.options.get("mode", 0) != 0:
        return "of mirrored padding only REFLECT is taken"
    amounts = input_at(operator, 1)
    if amounts is not None and amounts.shape not in ((3, 2), (4, 2)):
        return "it pads tensors of 3 or 4 dimensions only"
    return computed(operator, (1,))


def _batch_matmul(operator: Operator) -> str | None:
    second = input_at(operator, 1)
    if second is not None and second.constant and len(second.shape) != 2:
        return f"a constant factor must have 2 dimensions; it is {written(second.shape)}"
    return None


def _cast(operator: Operator) -> str | None:
    given, made = {tensor.dtype for tensor in operator.present}, {tensor.dtype for tensor in operator.outputs}
    if not (given | made <= {"float32", "int32"} or given | made <= {"float16", "float32", "bool"}):
        return f"it does not cast {', '.join(sorted(given))} to {', '.join(sorted(made))}"
    return None


def _convolution(operator: Operator) -> str | None:
    # Weights may be computed, but not both they and the bias.
    if sum(not tensor.constant for tensor in operator.present) > 2:
        return "only one of its weights and bias may be computed while the model runs"
    return None


def _depthwise(operator: Operator) -> str | None:
    given = input_at(operator, 0)
    multiplier = operator.options.get("depth_multiplier", 1)
    if given is not None and multiplier != 1 and given.shape[-1] != 1:
        return f"a depth multiplier ({multiplier:g}) is taken for one input channel only"
    return _convolution(operator)


def _fully_connected(operator: Operator) -> str | None:
    if operator.options.get("weights_format", 0) != 0:
        return "only the default format of weights is taken"
    given = input_at(operator, 0)
    if given is None or given.constant:
        return "its input must not be a constant"
    if operator.options.get("keep_num_dims") and len(given.shape) != len(operator.outputs[0].shape):
        return "input and output must have equally many dimensions"
    return _convolution(operator)


def _dequantize(operator: Operator) -> str | None:
    given = input_at(operator, 0)
    if given is not None and given.dtype in ("int16", "int4"):
        return f"it cannot dequantize {given.dtype}"
    return None


def _depth(operator: Operator) -> str | None:
    return "the block size must be above 1" if operator.options.get("block_size", 0) <= 1 else None


def _embedding(operator: Operator) -> str | None:
    identifiers = input_at(operator, 0)
    return "it takes one dimension of ids" if identifiers is not None and len(identifiers.shape) != 1 else None


def _gather(operator: Operator) -> str | None:
    values, indices = input_at(operator, 0), input_at(operator, 1)
    if values is not None and values.dtype == "int32":
        return "it does not gather int32"
    if indices is not None and (len(indices.shape) != 1 or indices.dtype != "int32"):
        return "its indices must be one dimension of int32"
    return None


def _lstm(operator: Operator) -> str | None:
    if operator.options.get("cell_clip") or operator.options.get("proj_clip"):
        return "clipping is not taken"
    return None


def _resize_bilinear(operator: Operator) -> str | None:
    if operator.options.get("align_corners") and operator.options.get("half_pixel_centers"):
        return "align_corners and half_pixel_centers exclude each other"
    return None


def _slice(operator: Operator) -> str | None:
    given = input_at(operator, 0)
    if given is not None and len(given.shape) not in (3, 4):
        return f"it takes 3 or 4 dimensions; this is {written(given.shape)}"
    for mask in ("ellipsis_mask", "new_axis_mask", "shrink_axis_mask"):
        if operator.options.get(mask):
            return f"{mask} is not taken"
    return None


def _softmax(operator: Operator) -> str | None:
    return "a beta other than 1 is not taken" if operator.options.get("beta", 1.0) != 1.0 else None


_SPECIAL: dict[str, Callable[[Operator], str | None]] = {
    "BATCH_MATMUL": _batch_matmul,
    "CAST": _cast,
    "CONV_2D": _convolution,
    "DEPTHWISE_CONV_2D": _depthwise,
    "DEPTH_TO_SPACE": _depth,
    "DEQUANTIZE": _dequantize,
    "EMBEDDING_LOOKUP": _embedding,
    "FULLY_CONNECTED": _fully_connected,
    "GATHER": _gather,
    "LSTM": _lstm,
    "RESIZE_BILINEAR": _resize_bilinear,
    "SLICE": _slice,
    "SOFTMAX": _softmax,
    "SPACE_TO_DEPTH": _depth,
    "STRIDED_SLICE": _slice,
    "TRANSPOSE_CONV": _convolution,
}
