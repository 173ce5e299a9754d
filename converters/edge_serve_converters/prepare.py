"""Before any conversion: the source model is described, signatures and shapes are settled, data is drawn, and the float
model answers on it. What the variants are measured against lies on disk afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve_converters import distribution, meaning, probes, quality, store, task
from edge_serve_converters.calibration import Drawn, Source, Warnings, draw
from edge_serve_converters.channel import Report
from edge_serve_converters.model_file import Format
from edge_serve_converters.plan import SignaturePlan, make_plan
from edge_serve_converters.request import Request
from edge_serve_converters.session import Session
from edge_serve_converters.trial import Prepared
from edge_serve_converters.truth import Truth

_PACKAGES: tuple[str, ...] = ("tensorflow", "litert_quantizer")
# Golden samples are for a quick check on the device: a handful, and no more bytes than a small model.
GOLDEN_RUNS = 8
GOLDEN_BYTES = 2 * 2**20


@dataclass(frozen=True, slots=True)
class Preparation:
    """What is known before the first variant is made."""

    signatures: list[Prepared]
    """The default one first."""
    format: Format
    made_with: dict[str, str]
    """The package that converts, and its version."""
    weights: str
    """How the source keeps its weights: float32, or what a .tflite file was quantized to."""
    statistics: dict[str, Any] | None
    """Of the calibration samples, by input, for people."""


def prepare(
    request: Request,
    source: Source | None,
    truth: Truth | None,
    session: Session,
    form: Format,
    work: Path,
    warnings: Warnings,
    report: Report,
) -> Preparation:
    """Describe the model, settle shapes, draw data and run the float model on it.

    UsageError if the model cannot be loaded or converted as it is, or the data does not fit it.
    """
    what = str(request.model.resolve())
    described = session.call(what, "describe", report)
    plans = make_plan(described["signatures"], request, source.hint if source is not None else lambda *_: None)
    meaning.check_input(request.input, plans[0])
    prepared, statistics = [], None
    for number, plan in enumerate(plans):
        folder = work / f"signature-{number}"
        folder.mkdir()
        drawn = None
        if source is not None:
            # Labels are of the default signature's samples.
            known = truth if number == 0 else None
            drawn = draw(source, plan, samples=request.samples, seed=request.seed, warnings=warnings, truth=known)
            statistics = statistics or distribution.statistics(drawn)
        prepared.append(_write_data(request, plan, drawn, folder))
    signatures = [
        {
            **entry.plan.to_command(),
            "data": [[str(entry.folder / role), str(target)] for role, target in entry.expected.items()],
        }
        for entry in prepared
    ]
    session.call(what, "reference", report, signatures=signatures)
    _look_at_reference(prepared, warnings)
    settled = [dataclasses.replace(entry, classifier=_classifier(request, entry)) for entry in prepared]
    if settled[0].truth:
        _check_truth(request, settled[0], warnings)
    made_with = {name: str(described[name]) for name in _PACKAGES if name in described}
    return Preparation(settled, form, made_with, described.get("weights", "float32"), statistics)


def _write_data(request: Request, plan: SignaturePlan, drawn: Drawn | None, folder: Path) -> Prepared:
    calibration = None
    if drawn is not None:
        calibration = store.save(folder / "calibration", drawn.calibration)
        measured = drawn.held_back
        extremes = probes.extremes_of(drawn.calibration, drawn.held_back)
        if drawn.truth is not None:
            store.save(folder / "truth", {"truth": drawn.truth})
    else:
        measured = probes.random_inputs(plan, request.seed)
        extremes = probes.guessed_extremes(plan)
    run_bytes = sum(array[0].nbytes for array in measured.values())
    golden = max(1, min(GOLDEN_RUNS, store.runs(measured), GOLDEN_BYTES // max(1, run_bytes)))
    entry = Prepared(plan, folder, calibration, golden, None, drawn is not None and drawn.truth is not None)
    store.save(entry.measured, measured)
    store.save(entry.probes, probes.make_probes(plan, extremes))
    store.save(entry.golden_inputs, {name: array[:golden] for name, array in measured.items()})
    return entry


def _check_truth(request: Request, entry: Prepared, warnings: Warnings) -> None:
    """Measure the source model itself: UsageError if the labels fit no output, a warning if they seem to be another model's."""
    outputs = store.load(entry.expected["measured"])
    figures = task.task_figures(
        entry.labels(), store.load(entry.measured), outputs, outputs, entry.classifier, request.metric
    )
    doubt = task.doubt(figures)
    if doubt is not None:
        warnings.add(doubt)


def _look_at_reference(prepared: Sequence[Prepared], warnings: Warnings) -> None:
    for entry in prepared:
        for role, text in (("measured", "some of the samples"), ("probes", "zeros or extremes")):
            for name, array in store.load(entry.expected[role]).items():
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    warnings.add(
                        f"the source model itself gives NaN or infinity in output {name!r} on {text}; these values are not compared"
                    )


def _classifier(request: Request, entry: Prepared) -> str | None:
    """Find the output whose largest value is the answer."""
    spec = request.output_spec
    outputs = store.load(entry.expected["measured"])
    name = spec.tensor or (next(iter(outputs)) if len(outputs) == 1 else None)
    if spec.type not in (None, "classification") or name is None or name not in outputs:
        return None
    scores = outputs[name]
    said = request.labels is not None or spec.type == "classification"
    return name if (said and scores.ndim >= 2 and scores.shape[-1] > 1) or quality.is_classifier(scores) else None
