"""Which layers stay float: by patterns that a person gives, or the fewest with which the gates are passed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from edge_serve.errors import UsageError
from edge_serve.schema import closest
from edge_serve_converters import graph
from edge_serve_converters.quantized_moves import MOVES

# One trial quantizes and runs all held-back samples; on a large model this many take some minutes.
MAX_TRIALS = 40

Layer = tuple[str, str]
"""Operator, and the name of its output tensor in the float file."""
Passes = Callable[[tuple[str, ...]], bool]
"""Tell whether a file with these layers left float passes the gates."""


def match(patterns: Sequence[str], layers: Sequence[Layer]) -> tuple[str, ...]:
    """Give the names of the layers that patterns name: an operator (SOFTMAX), a layer, or either with * and ?.

    A fused layer goes by each of its names ("a;b;c"). UsageError names a pattern that fits nothing.
    """
    chosen: dict[str, None] = {}
    for pattern in patterns:
        wanted = pattern.lower()
        found = [name for operator, name in layers if _fits(wanted, operator, name)]
        if not found:
            known = {operator for operator, _ in layers} | {part for _, name in layers for part in name.split(";")}
            raise UsageError(
                f"--keep-float {pattern}: no operator or layer of the model is named so. {closest(pattern, known)}"
            )
        chosen.update(dict.fromkeys(found))
    return tuple(chosen)


def layers_of(file: Path) -> list[Layer]:
    """List the operators of a float file and their output tensors, over all signatures, and inside loops."""
    found: dict[Layer, None] = {}
    for subgraph in graph.read_file(file).subgraphs:
        for operator in subgraph.operators:
            found.update(dict.fromkeys((operator.name, tensor.name) for tensor in operator.outputs))
    return list(found)


def _fits(pattern: str, operator: str, name: str) -> bool:
    lower = name.lower()
    return any(fnmatchcase(text, pattern) for text in (operator.lower(), lower, *lower.split(";")))


def with_loops(file: Path, layers: Sequence[str]) -> tuple[str, ...]:
    """Add the layers inside the loops (WHILE: recurrent layers) that are among `layers`: a loop is as float as they are."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(file.read_bytes(), 0)
    bodies: dict[str, int] = {}
    inner: list[list[str]] = []
    for number in range(model.SubgraphsLength()):
        subgraph = model.Subgraphs(number)
        inner.append([])
        for place in range(subgraph.OperatorsLength()):
            operator = subgraph.Operators(place)
            names = [subgraph.Tensors(index).Name().decode("utf-8", "replace") for index in operator.OutputsAsNumpy()]
            inner[-1] += names
            if operator.BuiltinOptionsType() == schema.BuiltinOptions.WhileOptions:
                options, table = schema.WhileOptions(), operator.BuiltinOptions()
                options.Init(table.Bytes, table.Pos)
                bodies.update(dict.fromkeys(names, options.BodySubgraphIndex()))
    found = dict.fromkeys(layers)
    waiting = [name for name in layers if name in bodies]
    while waiting:
        fresh = [name for name in inner[bodies[waiting.pop()]] if name not in found]
        found.update(dict.fromkeys(fresh))
        waiting += [name for name in fresh if name in bodies]
    return tuple(found)


def choices(file: Path) -> list[str]:
    """List the layers that may be left float, the last first; those inside loops only go with the loop."""
    layers = layers_of(file)
    loops = [name for operator, name in layers if operator == "WHILE"]
    inner = set(with_loops(file, loops)) - set(loops)
    return [name for operator, name in reversed(layers) if operator not in MOVES and name not in inner]


def left_float(file: Path, operators: Collection[str], kept: Collection[str]) -> tuple[Layer, ...]:
    """List the layers of a quantized file that are float although nobody kept them so: there is no integer form of them.

    `operators` are those that compute in float somewhere in the file. What only moves values between float layers is no
    loss, and left out.
    """
    found: dict[Layer, None] = {}
    for subgraph in graph.read_file(file).subgraphs:
        for operator in subgraph.operators:
            if operator.name not in operators or operator.name in MOVES or not operator.outputs:
                continue
            tensors = (*(tensor for tensor in operator.inputs if tensor is not None), *operator.outputs)
            # Of a float tensor and its quantized twin, the quantizer numbers the second.
            name = operator.outputs[0].name
            if any(t.dtype in ("float32", "float16") for t in tensors) and not {name, name.rstrip("0123456789")} & {
                *kept
            }:
                found[operator.name, name] = None
    return tuple(found)


def fewest(ranked: Sequence[str], passes: Passes, fixed: Sequence[str] = ()) -> tuple[str, ...] | None:
    """Give the fewest layers (besides the fixed ones) that must stay float; None if not even all of them are enough.

    `ranked` holds the most harmful layer first. The shortest beginning of it that passes is found by doubling and halving,
    then it is tried without ever smaller parts of itself, the least harmful first. Layers mask each other, so this is no
    proof of the minimum; that would take a trial of every subset.
    """
    trials = 0
    known: dict[frozenset[str], bool] = {}

    def good(layers: Sequence[str]) -> bool:
        nonlocal trials
        key = frozenset(layers)
        if key not in known:
            trials += 1
            known[key] = passes((*fixed, *layers))
        return known[key]

    if good(()):
        return tuple(fixed)
    low, high = 0, 1
    while high < len(ranked) and not good(ranked[:high]):
        low, high = high, high * 2
    high = min(high, len(ranked))
    if not good(ranked[:high]):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if good(ranked[:middle]):
            high = middle
        else:
            low = middle
    kept = list(ranked[:high])
    size = len(kept) // 2
    while size:
        for end in range(len(kept), 0, -size):
            without = [*kept[: max(0, end - size)], *kept[end:]]
            if trials < MAX_TRIALS and good(without):
                kept = without
        size //= 2
    return (*fixed, *kept)
