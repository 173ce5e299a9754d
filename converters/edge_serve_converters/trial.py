"""A variant on trial: it runs in the device runtime, in a child, and its outputs are compared with the SavedModel's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve_converters import probes, quality, store
from edge_serve_converters.channel import Report
from edge_serve_converters.child import Child, ChildCrashedError
from edge_serve_converters.errors import ConversionError
from edge_serve_converters.plan import SignaturePlan
from edge_serve_converters.request import Request

DEVICE = "edge_serve_converters.device"
# Below these a variant is written, and a warning says what it may cost.
POOR_COSINE = 0.95
POOR_AGREEMENT = 0.95
# Steps between the smallest and the largest value of an 8-bit tensor.
_STEPS = 255


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

    @property
    def measured(self) -> Path:
        """Give the folder of the inputs that quality is measured on: held-back samples, or random ones."""
        return self.folder / "measured"

    @property
    def probes(self) -> Path:
        """Give the folder of zeros and extremes."""
        return self.folder / "probes"

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
    claimed: int
    """Operators that XNNPACK took."""
    folder: Path

    def values(self, role: str) -> store.Arrays:
        """Give the outputs (dequantized) on the inputs of that role: measured, probes or golden."""
        return store.load(self.folder / role)


def run(request: Request, name: str, signature: Prepared, file: Path, report: Report, *, golden: bool) -> Seen:
    """Run measured inputs and probes with XNNPACK, as devices do by default; golden ones with the built-in kernels too.

    ConversionError if the runtime refuses the file, fails on it or dies of it.
    """
    folder = file.parent / "outputs" / signature.folder.name
    command = {
        "do": "run",
        "model": str(file),
        "signature": signature.plan.key,
        "inputs": [tensor.name for tensor in signature.plan.inputs],
        "outputs": list(signature.plan.outputs),
    }
    what = f"{name} in the device runtime"
    with start_child(request, DEVICE, file.parent) as child:
        try:
            pairs = [[str(signature.folder / role), str(folder / role)] for role in ("measured", "probes")]
            answer = child.call(what, {**command, "delegate": "xnnpack", "data": pairs}, report)
            if golden:
                pairs = [[str(signature.golden_inputs), str(folder / "golden")]]
                child.call(what, {**command, "delegate": "none", "data": pairs}, report)
        except ChildCrashedError as error:
            raise ConversionError(
                f"{error}: the file takes the runtime down and must not be shipped", error.log
            ) from error
    return Seen(_specs(answer["inputs"]), _specs(answer["outputs"]), int(answer["claimed"]), folder)


def start_child(request: Request, module: str, folder: Path) -> Child:
    """Start a child with the limits of the request."""
    return Child(
        module, folder, timeout_s=request.timeout_s, memory_limit_mb=request.memory_limit_mb, verbose=request.verbose
    )


def _specs(tensors: list[dict[str, Any]]) -> dict[str, TensorSpec]:
    return {tensor["name"]: TensorSpec(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in tensors}


def check_values(name: str, signature: Prepared, seen: Seen) -> None:
    """Raise ConversionError if shapes differ, or values are no numbers where the SavedModel gives some."""
    broken = []
    for role, runs in (("probes", probes.PROBE_NAMES), ("measured", None)):
        expected, actual = store.load(signature.expected[role]), seen.values(role)
        for output, array in expected.items():
            if actual[output].shape != array.shape:
                shapes = f"{list(actual[output].shape[1:])}, the SavedModel gives {list(array.shape[1:])}"
                raise ConversionError(f"{name}: output {output!r} has the shape {shapes}")
        broken += quality.broken_values(expected, actual, runs)
    if broken:
        raise ConversionError(f"{name}: {'; '.join(broken)}. This variant must not be shipped; convert to another mode")


def measure(signatures: Sequence[Prepared], seen: Sequence[Seen]) -> dict[str, Any]:
    """Compare all outputs with the SavedModel's; gives the manifest's `quality`."""
    outputs: dict[str, dict[str, Any]] = {}
    for signature, one in zip(signatures, seen, strict=True):
        prefix = "" if len(signatures) == 1 else f"{signature.plan.key}/"
        compared = quality.compare(store.load(signature.expected["measured"]), one.values("measured"))
        outputs.update({f"{prefix}{output}": figures for output, figures in compared.items()})
    figures: dict[str, Any] = {
        "max_error": max(entry["max_error"] for entry in outputs.values()),
        "mean_error": max(entry["mean_error"] for entry in outputs.values()),
        "cosine": min(entry["cosine"] for entry in outputs.values()),
    }
    scores = signatures[0].classifier
    if scores is not None:
        expected = store.load(signatures[0].expected["measured"])
        figures["top1_agreement"] = quality.agreement(expected[scores], seen[0].values("measured")[scores])
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
    if figures.get("cosine", 1.0) < POOR_COSINE:
        found.append(
            f"{name}: outputs point away from the SavedModel's (lowest cosine {figures['cosine']:.3f}); check its accuracy"
        )
    if figures.get("top1_agreement", 1.0) < POOR_AGREEMENT:
        found.append(
            f"{name}: chooses another class than the SavedModel on {1 - figures['top1_agreement']:.1%} of the samples"
        )
    return found
