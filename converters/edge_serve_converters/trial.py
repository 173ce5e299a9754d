"""A variant on trial: it runs in the device runtime, in a child, and its outputs are compared with the source model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve_converters import gates, layers, probes, quality, store, task
from edge_serve_converters.channel import Report
from edge_serve_converters.child import ChildCrashedError
from edge_serve_converters.errors import ConversionError
from edge_serve_converters.plan import SignaturePlan
from edge_serve_converters.session import Session

# Below these a variant is written, and a warning says what it may cost.
POOR_COSINE = 0.95
POOR_AGREEMENT = 0.95
# Steps between the smallest and the largest value of an 8-bit tensor.
_STEPS = 255
# Layers are compared on a few runs: their errors differ little from run to run, and keeping all tensors costs memory.
LAYER_RUNS = 4


@dataclass(frozen=True, slots=True)
class Prepared:
    """One signature with its data on disk: folders that the children read and write."""

    plan: SignaturePlan
    folder: Path
    calibration: Path | None
    """None: no calibration data was given."""
    golden: int
    """How many of the measured runs go into the bundle."""
    classifier: str | None
    """The output that holds the scores of classes, if there is one."""
    truth: bool = False
    """Whether labels of the measured runs are there."""

    @property
    def measured(self) -> Path:
        """Give the folder of the inputs that quality is measured on: held-back samples, or random ones."""
        return self.folder / "measured"

    @property
    def probes(self) -> Path:
        """Give the folder of zeros and extremes."""
        return self.folder / "probes"

    def labels(self) -> store.Array:
        """Give the labels of the measured runs, [runs, batch] or [runs, batch, height, width]."""
        return store.load(self.folder / "truth")["truth"]

    @property
    def golden_inputs(self) -> Path:
        """Give the folder of the first measured inputs: those that go into the bundle."""
        return self.folder / "golden"

    @property
    def expected(self) -> dict[str, Path]:
        """Give the folders of the SavedModel's outputs."""
        return {"measured": self.folder / "measured-expected", "probes": self.folder / "probes-expected"}


@dataclass(frozen=True, slots=True)
class Seen:
    """One signature of a file as the device runtime sees it, and where its outputs lie."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    claimed: dict[str, int]
    """Operators that XNNPACK took, by name."""
    latency_ms: dict[str, Any]
    runtime: str
    folder: Path

    def values(self, role: str) -> store.Arrays:
        """Give the outputs (dequantized) on the inputs of that role: measured, probes or golden."""
        return store.load(self.folder / role)


def run_golden(
    device: Session, name: str, signature: Prepared, file: Path, folder: Path, report: Report
) -> store.Arrays:
    """Give what a file answers on the golden inputs with XNNPACK; `folder` is new."""
    device.call(
        f"{name} in the device runtime",
        "run",
        report,
        **_command(signature, file),
        delegate="xnnpack",
        data=[[str(signature.golden_inputs), str(folder)]],
    )
    return store.load(folder)


def _command(signature: Prepared, file: Path) -> dict[str, Any]:
    return {
        "model": str(file),
        "signature": signature.plan.key,
        "inputs": [tensor.name for tensor in signature.plan.inputs],
        "outputs": list(signature.plan.outputs),
    }


def run(
    device: Session, name: str, signature: Prepared, file: Path, folder: Path, report: Report, *, golden: bool
) -> Seen:
    """Run measured inputs and probes with XNNPACK, as devices do by default; golden ones with the built-in kernels too.

    `folder` is new and gets the outputs. ConversionError if the runtime refuses the file, fails on it or dies of it.
    """
    command = _command(signature, file)
    what = f"{name} in the device runtime"
    try:
        pairs = [[str(signature.folder / role), str(folder / role)] for role in ("measured", "probes")]
        answer = device.call(what, "run", report, **command, delegate="xnnpack", data=pairs)
        if golden:
            pairs = [[str(signature.golden_inputs), str(folder / "golden")]]
            device.call(what, "run", report, **command, delegate="none", data=pairs)
    except ChildCrashedError as error:
        raise ConversionError(f"{error}: the file takes the runtime down and must not be shipped", error.log) from error
    return Seen(
        _specs(answer["inputs"]),
        _specs(answer["outputs"]),
        dict(answer["claimed"]),
        dict(answer["latency_ms"]),
        str(answer["runtime"]),
        folder,
    )


def compare_layers(
    device: Session, name: str, signature: Prepared, float_file: Path, file: Path, report: Report, inputs: Path
) -> list[layers.Layer]:
    """Compare the layers of a file with those of the float file, on some runs of a folder of inputs."""
    answer = device.call(
        f"{name}, layer by layer",
        "layers",
        report,
        reference=str(float_file),
        model=str(file),
        signature=signature.plan.key,
        inputs=str(inputs),
        runs=LAYER_RUNS,
    )
    return [layers.Layer.from_json(layer) for layer in answer["layers"]]


def _specs(tensors: list[dict[str, Any]]) -> dict[str, TensorSpec]:
    return {tensor["name"]: TensorSpec(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in tensors}


@dataclass(frozen=True, slots=True)
class Broken:
    """Values that are no numbers where the source model gives some: what a person is told, and the inputs that show it."""

    text: str
    inputs: Path


def broken_values(name: str, signature: Prepared, seen: Seen) -> Broken | None:
    """Look for values that are no numbers where the source model gives some; ConversionError if shapes differ."""
    texts, inputs = [], None
    for role, runs in (("probes", probes.PROBE_NAMES), ("measured", None)):
        expected, actual = store.load(signature.expected[role]), seen.values(role)
        for output, array in expected.items():
            if actual[output].shape != array.shape:
                shapes = f"{list(actual[output].shape[1:])}, the source model gives {list(array.shape[1:])}"
                raise ConversionError(f"{name}: output {output!r} has the shape {shapes}")
        found = quality.broken_values(expected, actual, runs)
        texts += found
        if found and inputs is None:
            inputs = signature.folder / role
    return Broken("; ".join(texts), inputs) if inputs is not None else None


def measure(signatures: Sequence[Prepared], seen: Sequence[Seen], metric: task.Metric | None) -> dict[str, Any]:
    """Compare all outputs with the source model's, and with the truth where it is known; gives the manifest's `quality`."""
    outputs: dict[str, dict[str, Any]] = {}
    for signature, one in zip(signatures, seen, strict=True):
        prefix = "" if len(signatures) == 1 else f"{signature.plan.key}/"
        scores = () if signature.classifier is None else (signature.classifier,)
        compared = quality.compare(store.load(signature.expected["measured"]), one.values("measured"), scores)
        outputs.update({f"{prefix}{output}": figures for output, figures in compared.items()})
    figures = quality.overall(outputs)
    first = signatures[0]
    if first.classifier is not None:
        prefix = "" if len(signatures) == 1 else f"{first.plan.key}/"
        figures["top1_agreement"] = outputs[f"{prefix}{first.classifier}"]["agreement"]
    if first.truth:
        figures["task"] = task.task_figures(
            first.labels(),
            store.load(first.measured),
            store.load(first.expected["measured"]),
            seen[0].values("measured"),
            first.classifier,
            metric,
        )
    return {**figures, "outputs": outputs}


def golden(signature: Prepared, seen: Seen) -> store.Arrays:
    """Give what the variant answers on the golden inputs."""
    return {name: np.array(array[: signature.golden]) for name, array in seen.values("measured").items()}


def tolerance(signature: Prepared, seen: Seen, *, quantized: bool) -> dict[str, float]:
    """Say how far another device's result may be from the golden one, by output."""
    expected = golden(signature, seen)
    steps = {name: seen.outputs[name].scale for name in expected}
    if quantized:
        # Float outputs of an int8 file come from a quantized tensor whose scale the signature does not show.
        steps = {name: step or float(np.ptp(expected[name])) / _STEPS for name, step in steps.items()}
    return quality.tolerance(expected, seen.values("golden"), steps)


def warnings(name: str, figures: dict[str, Any]) -> list[str]:
    """Give the sentences that a person should read before shipping the variant."""
    found = []
    wide = [one["cosine"] for one in figures["outputs"].values() if one["values"] >= gates.MIN_COSINE_VALUES]
    if min(wide, default=1.0) < POOR_COSINE:
        found.append(
            f"{name}: outputs point away from the source model's (lowest cosine {min(wide):.3f}); check its accuracy"
        )
    if figures.get("top1_agreement", 1.0) < POOR_AGREEMENT:
        found.append(
            f"{name}: chooses another class than the source model on {1 - figures['top1_agreement']:.1%} of the samples"
        )
    return found
