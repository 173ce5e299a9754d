"""One conversion from beginning to end: SavedModel and data in, a bundle of checked variants out."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_serve.bundle import read_labels
from edge_serve.errors import BundleError, UsageError
from edge_serve.model.interpreter import load_runtime
from edge_serve.spec import OutputSpec
from edge_serve_converters import meaning, store, writer
from edge_serve_converters.calibration import Warnings, open_source
from edge_serve_converters.errors import ConversionError
from edge_serve_converters.outcome import Failure, Outcome, recipe, report
from edge_serve_converters.prepare import prepare
from edge_serve_converters.request import VARIANT_NAMES, Request
from edge_serve_converters.trial import Prepared
from edge_serve_converters.variants import Made, make


class Listener(Protocol):
    """Who hears how far the work is."""

    def stage(self, work: str, stage: str, done: int, total: int) -> None:
        """Hear of a stage of a piece of work; `total` is 0 where nobody can say."""
        ...


def convert(request: Request, listener: Listener) -> Outcome:
    """Convert; UsageError for what only a person can change. Variants that failed are in the outcome, not raised."""
    _check_request(request)
    request = dataclasses.replace(request, input=meaning.settle_input(request.input, request.calibration))
    source = open_source(request.calibration, request.input) if request.calibration is not None else None
    labels = _labels(request)
    warnings = Warnings()
    outcome = Outcome(measured_on="random inputs" if source is None else "held-back samples")
    with writer.reserved(request.output), tempfile.TemporaryDirectory(prefix="edge-serve-convert-") as temporary:
        outcome.version = writer.choose_version(request.output, request.version, request.force)
        work = Path(temporary)
        started = time.monotonic()
        prepared, tensorflow = prepare(
            request, source, work, warnings, lambda *stage: listener.stage("SavedModel", *stage)
        )
        outcome.seconds["prepare"] = time.monotonic() - started
        _check_labels(labels, request.output_spec, prepared[0])
        _look_for_logits(request.output_spec, prepared[0], warnings)
        _make_all(request, prepared, work, outcome, listener)
        outcome.warnings = [*warnings.texts, *(text for made in outcome.made for text in made.warnings)]
        if outcome.made:
            content = writer.Content(
                name=request.name or request.output.resolve().name,
                variants=outcome.made,
                input=request.input,
                output=_output(request.output_spec, labels, prepared[0]),
                labels=labels,
                samples=_golden_samples(prepared[0], outcome.made[0]),
                recipe=recipe(request, prepared, tensorflow, source),
                report=report(outcome),
            )
            outcome.bundle = writer.write(request.output, outcome.version, request.force, content)
    return outcome


def _check_request(request: Request) -> None:
    path = request.saved_model
    if not path.exists():
        raise UsageError(f"{path}: no such SavedModel")
    if path.is_file():
        keras = path.suffix in (".keras", ".h5", ".hdf5")
        remedy = "; in Keras: keras.models.load_model(FILE).export(FOLDER)" if keras else ""
        raise UsageError(f"{path}: is a file; a SavedModel is a folder with saved_model.pb{remedy}")
    if not any((path / name).is_file() for name in ("saved_model.pb", "saved_model.pbtxt")):
        raise UsageError(
            f"{path}: is no SavedModel, it holds no saved_model.pb; save one with model.export(FOLDER) or tf.saved_model.save"
        )
    if "int8" in request.modes and request.calibration is None:
        raise UsageError(
            "--quantize int8 needs --calibration DATA: samples of real inputs, from which the ranges of all tensors are taken"
        )
    if request.io != "float" and "int8" not in request.modes:
        raise UsageError(f"--io {request.io} goes with --quantize int8; the other modes take and give floats")
    if importlib.util.find_spec("tensorflow") is None:
        raise UsageError(
            "edge-serve convert needs tensorflow, which is not installed: pip install 'edge-serve[convert]'"
        )
    load_runtime()
    if importlib.util.find_spec("ai_edge_litert") is None:
        raise UsageError(
            "edge-serve convert checks its files with ai-edge-litert, which is not installed: pip install ai-edge-litert"
        )


def _labels(request: Request) -> tuple[str, ...] | None:
    if request.labels is None:
        return None
    try:
        labels = read_labels(request.labels)
    except BundleError as error:
        raise UsageError(str(error)) from error
    if not labels:
        raise UsageError(f"{request.labels}: is empty; write one label a line, in the order of the model's classes")
    return labels


def _check_labels(labels: tuple[str, ...] | None, spec: OutputSpec, entry: Prepared) -> None:
    outputs = store.load(entry.expected["measured"])
    for option, name in _named_outputs(spec).items():
        if name not in outputs:
            raise UsageError(f"--{option} {name}: the model has no such output; it has: {', '.join(outputs)}")
    if labels is None or spec.type not in (None, "classification"):
        return
    if entry.classifier is None:
        raise UsageError(
            f"labels need to know which output holds the scores of the classes ({', '.join(outputs)}): say --scores-output"
        )
    classes = outputs[entry.classifier].shape[-1]
    if classes != len(labels):
        raise UsageError(
            f"{len(labels)} labels for the {classes} classes of output {entry.classifier!r}; give exactly one for each class"
        )


def _look_for_logits(spec: OutputSpec, entry: Prepared, warnings: Warnings) -> None:
    if entry.classifier is None or spec.activation is not None:
        return
    scores = store.load(entry.expected["measured"])[entry.classifier]
    if scores.dtype.kind == "f" and scores.size and (np.nanmin(scores) < 0 or np.nanmax(scores) > 1):
        warnings.add(
            f"output {entry.classifier!r} goes beyond 0..1: if these are logits, say --activation softmax (or sigmoid)"
        )


def _named_outputs(spec: OutputSpec) -> dict[str, str]:
    """Give option → output name for all options that name one."""
    named = {
        "scores-output": spec.tensor,
        **{role: getattr(spec, role) for role in ("boxes", "classes", "scores", "count")},
    }
    return {option: name for option, name in named.items() if name is not None}


def _make_all(request: Request, prepared: list[Prepared], work: Path, outcome: Outcome, listener: Listener) -> None:
    path = str(request.saved_model.resolve())
    for mode in request.modes:
        name = VARIANT_NAMES[mode]

        def progress(stage: str, done: int, total: int, name: str = name) -> None:
            listener.stage(name, stage, done, total)

        started = time.monotonic()
        try:
            outcome.made.append(make(request, mode, prepared, path, work, progress))
        except ConversionError as error:
            outcome.failures.append(Failure(name, str(error), error.log))
        except UsageError as error:
            outcome.failures.append(Failure(name, str(error), ""))
        outcome.seconds[name] = time.monotonic() - started


def _output(spec: OutputSpec, labels: tuple[str, ...] | None, entry: Prepared) -> OutputSpec:
    kind = spec.type or ("classification" if labels is not None or spec.top_k is not None else "tensor")
    tensor = entry.classifier if kind == "classification" and spec.tensor is None else spec.tensor
    return dataclasses.replace(
        spec, type=kind, tensor=tensor, labels_file=writer.LABELS if labels is not None else None
    )


def _golden_samples(entry: Prepared, default: Made) -> store.Arrays:
    inputs = store.load(entry.golden_inputs)
    samples = {f"input/{name}": np.array(array) for name, array in inputs.items()}
    if "max_error" in default.quality:  # else the SavedModel's outputs are a stand-in's
        outputs = store.load(entry.expected["measured"])
        samples.update({f"output/{name}": np.array(array[: entry.golden]) for name, array in outputs.items()})
    return samples
