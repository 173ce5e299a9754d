"""Before any conversion: the SavedModel is described, signatures and shapes are settled, data is drawn, and the float
model answers on it. What the variants are measured against lies on disk afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_serve_converters import meaning, probes, quality, store
from edge_serve_converters.calibration import Source, Warnings, draw
from edge_serve_converters.channel import Report
from edge_serve_converters.plan import SignaturePlan, make_plan
from edge_serve_converters.request import Request
from edge_serve_converters.trial import Prepared, start_child
from edge_serve_converters.variants import WORKER

# Golden samples are for a quick check on the device: a handful, and no more bytes than a small model.
GOLDEN_RUNS = 8
GOLDEN_BYTES = 2 * 2**20


def prepare(
    request: Request, source: Source | None, work: Path, warnings: Warnings, report: Report
) -> tuple[list[Prepared], str]:
    """Give the signatures with their data, the default one first, and the version of tensorflow.

    UsageError if the SavedModel cannot be loaded or converted as it is, or the data does not fit it.
    """
    path = str(request.saved_model.resolve())
    with start_child(request, WORKER, work) as child:
        what = str(request.saved_model)
        described = child.call(what, {"do": "describe", "saved_model": path}, report)
        plans = make_plan(described["signatures"], request, source.hint if source is not None else lambda *_: None)
        meaning.check_input(request.input, plans[0])
        prepared = [
            _write_data(request, plan, source, work / f"signature-{number}", warnings)
            for number, plan in enumerate(plans)
        ]
        signatures = [
            {
                "key": entry.plan.key,
                "data": [[str(entry.folder / role), str(target)] for role, target in entry.expected.items()],
            }
            for entry in prepared
        ]
        child.call(what, {"do": "reference", "saved_model": path, "signatures": signatures}, report)
    _look_at_reference(prepared, warnings)
    settled = [dataclasses.replace(entry, classifier=_classifier(request, entry)) for entry in prepared]
    return settled, str(described["tensorflow"])


def _write_data(
    request: Request, plan: SignaturePlan, source: Source | None, folder: Path, warnings: Warnings
) -> Prepared:
    folder.mkdir()
    calibration = None
    if source is not None:
        drawn = draw(source, plan, samples=request.samples, seed=request.seed, warnings=warnings)
        calibration = store.save(folder / "calibration", drawn.calibration)
        measured = drawn.held_back
        extremes = probes.extremes_of(drawn.calibration, drawn.held_back)
    else:
        measured = probes.random_inputs(plan, request.seed)
        extremes = probes.guessed_extremes(plan)
    run_bytes = sum(array[0].nbytes for array in measured.values())
    golden = max(1, min(GOLDEN_RUNS, store.runs(measured), GOLDEN_BYTES // max(1, run_bytes)))
    entry = Prepared(plan, folder, calibration, golden, None)
    store.save(entry.measured, measured)
    store.save(entry.probes, probes.make_probes(plan, extremes))
    store.save(entry.golden_inputs, {name: array[:golden] for name, array in measured.items()})
    return entry


def _look_at_reference(prepared: Sequence[Prepared], warnings: Warnings) -> None:
    for entry in prepared:
        for role, text in (("measured", "some of the samples"), ("probes", "zeros or extremes")):
            for name, array in store.load(entry.expected[role]).items():
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    warnings.add(
                        f"the SavedModel itself gives NaN or infinity in output {name!r} on {text}; these values are not compared"
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
