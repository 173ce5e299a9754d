"""Where a variant's error begins: the output of every layer of the float file against the same layer of the variant.

Runs in the device child: both files in the TFLite runtime, with its built-in kernels (a delegate keeps no intermediate
tensors), run by run, so that only one run's activations are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve.errors import ModelError
from edge_serve.model import signatures
from edge_serve.model.interpreter import load_runtime
from edge_serve_converters.alignment import computing, match
from edge_serve_converters.engine_run import fed
from edge_serve_converters.errors import ConversionError
from edge_serve_converters.graph import Tensor
from edge_serve_converters.quality import MAX_DB, decibels, rounded
from edge_serve_converters.signature_graph import SignatureGraph, read_graph
from edge_serve_converters.store import Array

BINS = 32
# Layer outputs are looked at in pieces of this many values, which stay in the processor's cache.
PIECE = 2**16
# Channels are the last dimension (NHWC); one longer than this holds no channels.
_MAX_CHANNELS = 2**14
# A channel whose power is this far below the strongest is dead: what an 8-bit tensor makes of it concerns nobody.
_DEAD = 1e-10
# Largest and smallest integer of the types that activations are quantized to.
_LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767)}
# Noise where the float file has next to nothing but zeros: bad, but no reason for figures of thirty digits.
WORST_RATIO = 1e6
INPUT = "INPUT"
"""What stands for the operator of a layer that is an input of the model, quantized; its index is -1."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One tensor that a layer gives, in float file and variant, over all runs. Powers are sums of squares."""

    index: int
    """The operator's place in the float file's subgraph; -1: an input. Operators with several outputs appear several times."""
    operator: str
    name: str
    """The tensor's name in the float file."""
    sqnr_db: float
    """10 * log10(power of the float values / power of the error), within ±quality.MAX_DB."""
    channel_sqnr_db: float
    """The same with every channel (last dimension) scaled to the same power, and no channel counting for worse than lost:
    a tensor whose range belongs to one channel may have a high SQNR although all other channels are gone."""
    cosine: float
    max_error: float
    range: tuple[float, float]
    """The smallest and the largest value in the float file."""
    quantized_range: tuple[float, float] | None
    """What the variant's 8- or 16-bit tensor can express; None where the variant computes in float."""
    saturated: float
    """The part of the float values outside quantized_range, by more than a step and a half."""
    broken: int
    """Values that are NaN or infinite in the variant and numbers in the float file."""
    local_error: float
    """Noise-to-signal ratio (powers) of this layer less the largest of its inputs, at least 0: what this layer adds."""
    channel_error: float
    """The same of the ratios behind channel_sqnr_db: about the part of the channels that this layer loses."""
    histogram: tuple[int, ...]
    """How many float values lie in each of BINS equal parts of range."""
    inputs: tuple[int, ...]
    """Places in the list of layers of those that this one's values come from."""

    def to_json(self) -> dict[str, Any]:
        """Give the figures for report.json: its keys are the fields."""
        figures = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in figures.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layer:
        """Read what to_json gave: how layers come back from the child."""
        lists = {name: tuple(data[name]) for name in ("range", "histogram", "inputs")}
        limits = data["quantized_range"]
        return cls(**{**data, **lists, "quantized_range": None if limits is None else tuple(limits)})


@dataclass(frozen=True, slots=True)
class Comparison:
    """All layers that could be compared, in the order in which they run."""

    layers: list[Layer]
    operators: int
    """How many operators of the float file compute something."""
    matched: int
    """How many of them have a counterpart in the variant; those with whole numbers as output are matched, but no layers."""


def compare_layers(
    reference: Path, variant: Path, signature: str, inputs: Mapping[str, Array], runs: int
) -> Comparison:
    """Compare a variant with the float file (float32 inside and out) on the first `runs` inputs, layer by layer.

    `inputs`: name → [runs, *shape], real values. Loops and branches count as one layer. ConversionError if a file cannot be
    run, if the signature is missing or no run is given.
    """
    graphs = read_graph(reference, signature), read_graph(variant, signature)
    count = min(runs, *(len(array) for array in inputs.values())) if inputs else 0
    if count < 1:
        raise ConversionError("layers cannot be compared without inputs")
    pairs = match(*graphs)
    watched = list(_watched(*graphs, pairs))
    ours, theirs = _Model(reference, graphs[0], signature), _Model(variant, graphs[1], signature)
    for number in range(count):
        ours.run(inputs, number)
        for entry in watched:
            entry.widen(ours.value(entry.ours))
    for number in range(count):
        ours.run(inputs, number)
        theirs.run(inputs, number)
        for entry in watched:
            entry.add(ours.value(entry.ours), theirs.value(entry.theirs))
    seen = [entry for entry in watched if entry.comparable]
    return Comparison(_layers(graphs[0], seen), len(computing(graphs[0])), len(pairs))


class _Model:
    """A file in the runtime, with every tensor kept after a run."""

    def __init__(self, path: Path, graph: SignatureGraph, signature: str) -> None:
        runtime = load_runtime()
        self.graph = graph
        self.path = path
        try:
            self.interpreter = runtime.interpreter_class(
                model_path=str(path),
                num_threads=1,
                experimental_op_resolver_type=runtime.without_delegates,
                experimental_preserve_all_tensors=True,
            )
            self.interpreter.allocate_tensors()
            self.binding = signatures.bind(self.interpreter, signature, path.name)
        except (ValueError, RuntimeError, ModelError) as error:
            raise ConversionError(f"layers cannot be compared: {path.name} cannot be loaded ({error})") from error

    def run(self, inputs: Mapping[str, Array], number: int) -> None:
        given = fed(inputs, number, {name: spec for name, (_, spec) in self.binding.inputs.items()})
        try:
            if self.binding.runner is not None:
                self.binding.runner(**given)
                return
            indices = {name: index for name, (index, _) in self.binding.inputs.items()}
            for name, values in given.items():
                if tuple(self.interpreter.get_tensor(indices[name]).shape) != values.shape:
                    self.interpreter.resize_tensor_input(indices[name], values.shape)
                    self.interpreter.allocate_tensors()
            for name, values in given.items():
                self.interpreter.set_tensor(indices[name], values)
            self.interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise ConversionError(f"layers cannot be compared: {self.path.name} fails ({error})") from error

    def value(self, tensor: Tensor) -> Array | None:
        """Give a tensor's real values after a run; None if the runtime holds none for it (a branch that was not taken)."""
        try:
            found: Array = self.interpreter.get_tensor(tensor.index, self.graph.subgraph)
        except ValueError:
            return None
        if tensor.scale is None or found.dtype.kind == "f":
            return found
        return (found.astype(np.float32) - np.float32(tensor.zero_points[0])) * np.float32(tensor.scale)


class _Watched:
    """The sums over all runs of one tensor of the float file and its counterpart."""

    def __init__(self, index: int, operator: str, ours: Tensor, theirs: Tensor) -> None:
        self.index = index
        self.operator = operator
        self.ours = ours
        self.theirs = theirs
        self.low, self.high = np.inf, -np.inf
        self.power: Array = np.zeros(1)
        self.noise: Array = np.zeros(1)
        self.dot = self.given_power = self.largest = 0.0
        self.values = self.outside = self.broken = 0
        self.histogram = np.zeros(BINS, np.int64)
        self.comparable = True
        self.limits = _quantized_range(theirs)

    def widen(self, values: Array | None) -> None:
        """Learn the range, which the histogram needs before it can count."""
        if values is None or not values.size:
            self.comparable = False
            return
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            known = values[np.isfinite(values)]
            low, high = float(known.min(initial=np.inf)), float(known.max(initial=-np.inf))
        self.low, self.high = min(self.low, low), max(self.high, high)

    def add(self, values: Array | None, given: Array | None) -> None:
        """Count one run."""
        if values is None or given is None or values.shape != given.shape:
            self.comparable = False
        if not self.comparable or values is None or given is None:
            return
        channels = values.shape[-1] if values.ndim > 1 and values.shape[-1] <= _MAX_CHANNELS else 1
        if len(self.power) != channels:
            self.power, self.noise = np.zeros((2, channels))
        rows = max(1, PIECE // channels)
        flat, other = values.reshape(-1, channels), given.reshape(-1, channels)
        for start in range(0, len(flat), rows):
            self._add(flat[start : start + rows], other[start : start + rows])

    def _add(self, values: Array, given: Array) -> None:
        wide, narrow = values.astype(np.float64), given.astype(np.float64)
        known = np.isfinite(wide)
        wrong = known & ~np.isfinite(narrow)
        if not known.all() or wrong.any():
            self.broken += int(np.count_nonzero(wrong))
            wide[~known] = 0.0
            narrow[~known | wrong] = 0.0
        self.values += wide.size
        self.power += np.einsum("ij,ij->j", wide, wide)
        self.dot += float(np.einsum("ij,ij->", wide, narrow))
        self.given_power += float(np.einsum("ij,ij->", narrow, narrow))
        narrow -= wide
        self.noise += np.einsum("ij,ij->j", narrow, narrow)
        self.largest = max(self.largest, float(narrow.max()), -float(narrow.min()))
        if self.limits is not None:
            low, high, step = self.limits
            # Rounding reaches half a step further; the kernels' fixed scale of 1/256 for probabilities leaves 1.0 one out.
            low, high = low - 1.5 * step, high + 1.5 * step
            if self.low < low or self.high > high:
                self.outside += int(np.count_nonzero((wide < low) | (wide > high)))
        if self.high > self.low:
            wide -= self.low
            wide *= BINS / (self.high - self.low)
            bins = np.minimum(wide.astype(np.int32), BINS - 1)[known]
        else:
            bins = np.zeros(int(np.count_nonzero(known)), np.int32)
        self.histogram += np.bincount(bins, minlength=BINS)

    @property
    def ratio(self) -> float:
        """Give the noise-to-signal ratio, at most WORST_RATIO."""
        power, noise = float(self.power.sum()), float(self.noise.sum())
        return min(WORST_RATIO, noise / power) if power else WORST_RATIO * (noise > 0)

    @property
    def channel_ratio(self) -> float:
        """Give the mean over the living channels of the noise-to-signal ratio, of which no channel has more than 1."""
        alive = self.power > _DEAD * self.power.max()
        if not alive.any():
            return self.ratio
        return float(np.minimum(1.0, self.noise[alive] / self.power[alive]).mean())


def _quantized_range(tensor: Tensor) -> tuple[float, float, float] | None:
    """Give the smallest and the largest real value of a quantized tensor, and its step."""
    if tensor.scale is None or tensor.dtype not in _LIMITS:
        return None
    zero_point = tensor.zero_points[0]
    low, high = _LIMITS[tensor.dtype]
    return (low - zero_point) * tensor.scale, (high - zero_point) * tensor.scale, tensor.scale


def _watched(
    reference: SignatureGraph, variant: SignatureGraph, pairs: Sequence[tuple[Any, Any]]
) -> Iterator[_Watched]:
    """Give what is compared: quantized inputs, and every float output of an operator that has a counterpart.

    What nobody reads is left out: loops do not even fill those of their outputs.
    """
    read = reference.outputs.union(*(operator.inputs for operator in reference.operators))
    quantized = {
        operator.inputs[0]: operator.outputs[0]
        for operator in reversed(variant.operators)
        if operator.name == "QUANTIZE" and operator.inputs and operator.outputs
    }
    for name, index in reference.inputs.items():
        if name in variant.inputs:
            there = variant.inputs[name]
            theirs = variant.tensors[quantized.get(there, there)]
            if reference.tensors[index].dtype == "float32" and _quantized_range(theirs) is not None:
                yield _Watched(-1, INPUT, reference.tensors[index], theirs)
    for ours, other in pairs:
        for mine, yours in zip(ours.outputs, other.outputs, strict=False):
            tensor, counterpart = reference.tensors[mine], variant.tensors[yours]
            real = counterpart.dtype in ("float32", "float16") or _quantized_range(counterpart) is not None
            if tensor.dtype == "float32" and real and mine in read:
                yield _Watched(ours.index, ours.name, tensor, counterpart)


def _layers(graph: SignatureGraph, seen: Sequence[_Watched]) -> list[Layer]:
    place = {entry.ours.index: number for number, entry in enumerate(seen)}
    origins: dict[int, tuple[int, ...]] = {}
    for operator in graph.operators:
        # Through operators that have no counterpart or give whole numbers, to the layers before them.
        sources = dict.fromkeys(
            source
            for tensor in operator.inputs
            for source in ((place[tensor],) if tensor in place else origins.get(tensor, ()))
        )
        origins.update(dict.fromkeys(operator.outputs, tuple(sources)))
    made = []
    for position, entry in enumerate(seen):
        # A damaged file may go in circles; what blames layers follows them backwards.
        before = tuple(number for number in origins.get(entry.ours.index, ()) if number < position)
        power, noise = float(entry.power.sum()), float(entry.noise.sum())
        lengths = np.sqrt(power) * np.sqrt(entry.given_power)
        ratio, channel_ratio = entry.ratio, entry.channel_ratio
        known = entry.low <= entry.high
        made.append(
            Layer(
                index=entry.index,
                operator=entry.operator,
                name=entry.ours.name,
                sqnr_db=rounded(-MAX_DB if entry.broken else decibels(power, noise)),
                channel_sqnr_db=rounded(decibels(1.0, channel_ratio)),
                cosine=rounded(
                    float(np.clip(entry.dot / lengths, -1, 1)) if lengths else float(power == entry.given_power)
                ),
                max_error=rounded(entry.largest),
                range=(rounded(entry.low), rounded(entry.high)) if known else (0.0, 0.0),
                quantized_range=(rounded(entry.limits[0]), rounded(entry.limits[1])) if entry.limits else None,
                saturated=rounded(entry.outside / max(1, entry.values)),
                broken=entry.broken,
                local_error=rounded(max(0.0, ratio - max((seen[number].ratio for number in before), default=0.0))),
                channel_error=rounded(
                    max(0.0, channel_ratio - max((seen[number].channel_ratio for number in before), default=0.0))
                ),
                histogram=tuple(int(value) for value in entry.histogram),
                inputs=before,
            )
        )
    return made
