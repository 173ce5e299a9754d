"""What Coral's Edge TPU compiler is expected to take of a file, operator by operator.

The rules are those that Coral publishes ("TensorFlow models on the Edge TPU": supported operations and their limitations, for
runtime 14) and those that its last compiler, 16.0 of 2021, shows in its logs. The compiler has limits of its own besides
(the sizes of tensors, its memory), so a verdict is an expectation; what it did map is in its log (`edgetpu_compiler`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_serve_converters.delegate_rules import Verdict, axes_of, computed, dynamic, input_at, verdict, written
from edge_serve_converters.graph import Graph, Operator, Shape, Tensor, elements
from edge_serve_converters.operator_versions import highest, release
from edge_serve_converters.runtimes import EDGETPU_OPERATOR

# Compiler 16.0 reads what TensorFlow 2.6 writes: it refuses CONV_2D version 6 (2.9), QUANTIZE 3 (2.7), TRANSPOSE_CONV 4 (2.13).
COMPILER_RELEASE = (2, 6, 0)
COMPILER = "16.0"
# Elements of a softmax.
MAX_SOFTMAX = 16_000
_INTEGERS = frozenset({"int8", "uint8"})
# A reduction over the channels works on groups of this many.
_CHANNEL_GROUP = 4
_INNERMOST = 3

# Operator → which inputs are parameters, so must be constants.
_PARAMETERS: dict[str, tuple[int, ...]] = {
    "ADD": (),
    "AVERAGE_POOL_2D": (),
    "CONCATENATION": (),
    "CONV_2D": (1, 2),
    "DEPTHWISE_CONV_2D": (1, 2),
    "EXPAND_DIMS": (1,),
    "FULLY_CONNECTED": (1, 2),
    "L2_NORMALIZATION": (),
    "LOGISTIC": (),
    "LSTM": (),
    "MAXIMUM": (),
    "MAX_POOL_2D": (),
    "MEAN": (1,),
    "MINIMUM": (),
    "MUL": (),
    "PACK": (),
    "PAD": (1,),
    "PRELU": (1,),
    "QUANTIZE": (),
    "REDUCE_MAX": (1,),
    "REDUCE_MIN": (1,),
    "RELU": (),
    "RELU6": (),
    "RELU_N1_TO_1": (),
    "RESHAPE": (1,),
    "RESIZE_BILINEAR": (1,),
    "RESIZE_NEAREST_NEIGHBOR": (1,),
    "RSQRT": (),
    "SLICE": (1, 2),
    "SOFTMAX": (),
    "SPACE_TO_DEPTH": (),
    "SPLIT": (0,),
    "SQUARED_DIFFERENCE": (),
    "SQUEEZE": (),
    "STRIDED_SLICE": (1, 2, 3),
    "SUB": (),
    "SUM": (1,),
    "TANH": (),
    "TRANSPOSE": (1,),
    "TRANSPOSE_CONV": (0, 1, 3),
    "UNIDIRECTIONAL_SEQUENCE_LSTM": (),
}


@dataclass(frozen=True, slots=True)
class Expectation:
    """All operators of a file against the rules, and the piece that the compiler would make of them."""

    operators: tuple[Verdict, ...]
    prefix: int
    """How many operators are expected on the Edge TPU: those before the first that is not, in execution order."""
    stopped_by: Verdict | None
    """The operator that ends that piece; None: nothing does."""
    compiled: bool
    """The file comes from the compiler already."""


def examine(graph: Graph) -> Expectation:
    """Judge all operators of a file.

    The compiler makes one piece of the graph: what comes after the first operator that it does not take stays on the CPU,
    whatever it is. QUANTIZE and DEQUANTIZE at float inputs and outputs stay on the CPU too, and end nothing.
    """
    refused = [operator for operator in graph.operators if _too_new(operator)]
    verdicts: list[Verdict] = []
    prefix, stopped = 0, None
    for subgraph in graph.subgraphs:
        for operator in subgraph.operators:
            edge = _at_the_edge(operator, subgraph.inputs, subgraph.outputs)
            if subgraph.index > 0:
                rule: str | None = "it is not in the first graph, the only one that is compiled"
            else:
                rule = _rule(operator)
            found = verdict(operator, rule)
            verdicts.append(found)
            if subgraph.index > 0 or edge or stopped is not None:
                continue
            if found.expected:
                prefix += 1
            else:
                stopped = found
    if refused and prefix > 0:
        # The compiler does not get as far as looking at the others.
        prefix, stopped = 0, verdict(refused[0], _too_new(refused[0]))
    compiled = any(operator.name == EDGETPU_OPERATOR for operator in graph.operators)
    return Expectation(tuple(verdicts), prefix, None if compiled else stopped, compiled)


def _at_the_edge(operator: Operator, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    given = input_at(operator, 0)
    if operator.name == "QUANTIZE" and given is not None:
        return given.dtype == "float32" and any(given is tensor for tensor in inputs)
    return operator.name == "DEQUANTIZE" and any(tensor is end for tensor in operator.outputs for end in outputs)


def _too_new(operator: Operator) -> str | None:
    known = highest(operator.name, COMPILER_RELEASE)
    if operator.custom or (known is not None and operator.version <= known):
        return None
    since = release(operator.name, operator.version)
    return (
        f"version {operator.version}"
        + (f", of TensorFlow {since}," if since else "")
        + f" is newer than the compiler ({COMPILER}, 2021), which refuses a file that has it"
    )


def _rule(operator: Operator) -> str | None:
    if operator.name == EDGETPU_OPERATOR:
        return None
    if operator.custom:
        return "the Edge TPU has no custom operators"
    special = _SPECIAL.get(operator.name)
    return (
        _too_new(operator)
        or _not_listed(operator)
        or computed(operator, _PARAMETERS[operator.name])
        or _types(operator)
        or dynamic(operator)
        or (special(operator) if special else None)
        or _rank(operator)
    )


def _not_listed(operator: Operator) -> str | None:
    if operator.name in _PARAMETERS:
        return None
    given = input_at(operator, 0)
    if operator.name == "DEQUANTIZE" and given is not None and given.dtype in _INTEGERS:
        return "it gives floats: it stays on the CPU"
    if operator.name == "DEQUANTIZE" and given is not None and given.constant:
        return f"it unpacks {given.dtype} weights; only int8 and uint8 are taken"
    return "the Edge TPU has no such operator"


def _types(operator: Operator) -> str | None:
    """Everything that flows is 8 bits wide, and so are the weights; int32 is for biases, shapes and axes, all constants."""
    given = input_at(operator, 0)
    if operator.name == "QUANTIZE" and given is not None and given.dtype == "float32":
        return "it takes floats: it stays on the CPU"
    for tensor in operator.values:
        if tensor.dtype not in _INTEGERS:
            return f"it computes in {tensor.dtype}; only int8 and uint8 are taken"
    for tensor in operator.present:
        if tensor.dtype not in _INTEGERS and tensor.dtype != "int32":
            return f"it has {tensor.dtype} constants; only int8 and uint8 are taken"
    return None


def _rank(operator: Operator) -> str | None:
    for tensor in operator.values:
        if elements(tensor.shape[:-_INNERMOST]) > 1:
            return f"the shape {written(tensor.shape)} is above 1 outside its three innermost dimensions"
    return None


def _no_activation(operator: Operator) -> str | None:
    if operator.activation != "NONE":
        return f"the fused activation {operator.activation} is not taken here"
    return None


def _concatenation(operator: Operator) -> str | None:
    constants = [tensor for tensor in operator.present if tensor.constant]
    if constants and (len(operator.inputs) != 2 or not _is_zero(constants[0])):
        return "with a constant it takes only two inputs, and the constant must be zeros"
    return _no_activation(operator)


def _is_zero(tensor: Tensor) -> bool:
    if tensor.data is None:
        return False
    zero = tensor.zero_points[0] % 256 if tensor.zero_points else 0
    return bool((tensor.data == zero).all())


def _dilation(operator: Operator) -> str | None:
    height, width = (operator.options.get(f"dilation_{side}_factor", 1) for side in "hw")
    return None if height == width else f"the dilations of height ({height:g}) and width ({width:g}) must be equal"


def _fully_connected(operator: Operator) -> str | None:
    weights = input_at(operator, 1)
    if weights is not None and weights.scales > 1:
        return (
            "a dense layer with a scale for each output is newer than the compiler; convert it with one scale for all"
        )
    if operator.options.get("weights_format", 0) != 0:
        return "only the default format of weights is taken"
    if operator.options.get("keep_num_dims", 0) or not _one_dimensional(operator.outputs[0].shape):
        return f"the output must have one dimension; it is {written(operator.outputs[0].shape)}"
    return None


def _one_dimensional(shape: Shape) -> bool:
    return elements(shape[:-1]) == 1


def _softmax(operator: Operator) -> str | None:
    shape = operator.outputs[0].shape
    if not _one_dimensional(shape):
        return f"it takes one dimension only; this is {written(shape)}"
    if elements(shape) > MAX_SOFTMAX:
        return f"it takes at most {MAX_SOFTMAX:,} values; these are {elements(shape):,}"
    return None


def _reduction(operator: Operator) -> str | None:
    axes = axes_of(operator, 1)
    given = input_at(operator, 0)
    if axes is None or given is None:
        return "the axes of the reduction are not known"
    return "it must not reduce the batch" if 0 in axes and len(given.shape) > 1 else None


def _mean(operator: Operator) -> str | None:
    failed = _reduction(operator)
    if failed is not None:
        return failed
    given = input_at(operator, 0)
    axes = axes_of(operator, 1)
    if given is not None and axes and len(given.shape) - 1 in axes and given.shape[-1] % _CHANNEL_GROUP:
        return f"a mean over channels takes a multiple of {_CHANNEL_GROUP} channels; these are {given.shape[-1]}"
    return None


def _pack(operator: Operator) -> str | None:
    return "it must not pack along the batch" if operator.options.get("axis", 0) == 0 else None


def _pad(operator: Operator) -> str | None:
    amounts = input_at(operator, 1)
    values = amounts.integers() if amounts is not None else None
    if values is None:
        return "the padding is not known"
    return "it must not pad the batch" if len(values) > 2 and any(values[:2]) else None


def _prelu(operator: Operator) -> str | None:
    slopes = input_at(operator, 1)
    if slopes is not None and not _one_dimensional(slopes.shape):
        return f"its slopes must have one dimension (Keras: shared_axes=[1, 2]); they are {written(slopes.shape)}"
    return None


def _resize(operator: Operator) -> str | None:
    for option in ("half_pixel_centers", "align_corners"):
        if operator.options.get(option):
            return f"{option} makes it a version that the compiler reports as not supported"
    return None


def _split(operator: Operator) -> str | None:
    axis, given = input_at(operator, 0), input_at(operator, 1)
    values = axis.integers() if axis is not None else None
    if values is None or given is None or not values:
        return "the axis is not known"
    return "it must not split the batch" if values[0] % max(len(given.shape), 1) == 0 and len(given.shape) > 1 else None


def _strided_slice(operator: Operator) -> str | None:
    strides = input_at(operator, 3)
    values = strides.integers() if strides is not None else None
    if values is None or any(stride != 1 for stride in values):
        return "all strides must be 1"
    for mask in ("ellipsis_mask", "new_axis_mask"):
        if operator.options.get(mask):
            return f"{mask} is not taken"
    return None


_SPECIAL: dict[str, Callable[[Operator], str | None]] = {
    "AVERAGE_POOL_2D": _no_activation,
    "CONCATENATION": _concatenation,
    "CONV_2D": _dilation,
    "DEPTHWISE_CONV_2D": _dilation,
    "FULLY_CONNECTED": _fully_connected,
    "MAX_POOL_2D": _no_activation,
    "MEAN": _mean,
    "PACK": _pack,
    "PAD": _pad,
    "PRELU": _prelu,
    "REDUCE_MAX": _reduction,
    "REDUCE_MIN": _reduction,
    "RESIZE_BILINEAR": _resize,
    "RESIZE_NEAREST_NEIGHBOR": _resize,
    "SOFTMAX": _softmax,
    "SPLIT": _split,
    "STRIDED_SLICE": _strided_slice,
    "SUM": _reduction,
}
