"""One conversion from beginning to end: model and data in, a bundle of checked variants out."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_serve.bundle import read_labels
from edge_serve.errors import BundleError, UsageError
from edge_serve.model.interpreter import load_runtime
from edge_serve.model.metadata import read_metadata
from edge_serve.schema import merge
from edge_serve.spec import OutputSpec
from edge_serve_converters import meaning, model_file, store, wanted, warmup, writer
from edge_serve_converters.calibration import Source, Warnings, fingerprint, open_source
from edge_serve_converters.compare_cli import write_report
from edge_serve_converters.errors import ConversionError, InconvertibleError, RefusedError
from edge_serve_converters.model_file import Format
from edge_serve_converters.outcome import Failure, Outcome, recipe, report
from edge_serve_converters.prepare import GOLDEN_BYTES, prepare
from edge_serve_converters.request import Request, Wanted
from edge_serve_converters.session import device_session, source_session
from edge_serve_converters.tensorboard import write as write_events
from edge_serve_converters.trial import Prepared
from edge_serve_converters.truth import Truth, open_truth
from edge_serve_converters.variants import Made, Meaning, Workshop


class Listener(Protocol):
    """Who hears how far the work is."""

    def stage(self, work: str, stage: str, done: int, total: int) -> None:
        """Hear of a stage of a piece of work; `total` is 0 where nobody can say."""
        ...


def convert(request: Request, listener: Listener) -> Outcome:
    """Convert; UsageError for what only a person can change. Variants that failed are in the outcome, not raised."""
    form = model_file.recognise(request.model)
    asked = wanted.settle(request)
    model_file.check_packages(form)
    load_runtime()
    warnings = Warnings()
    request, own_labels = _with_metadata(request, form, warnings)
    request = dataclasses.replace(request, input=meaning.settle_input(request.input, request.calibration))
    source = open_source(request.calibration, request.input) if request.calibration is not None else None
    labels = _labels(request) or own_labels
    truth = _truth(request, source, labels)
    outcome = Outcome(measured_on="random inputs" if source is None else "held-back samples", format=form)
    with (
        writer.reserved(request.output),
        tempfile.TemporaryDirectory(prefix="edge-serve-convert-") as temporary,
        source_session(request, form, Path(temporary)) as model,
        device_session(request, Path(temporary)) as device,
    ):
        outcome.version = writer.choose_version(request.output, request.version, request.force)
        work = Path(temporary)
        started = time.monotonic()
        try:
            prepared = prepare(
                request, source, truth, model, form, work, warnings, lambda *stage: listener.stage("model", *stage)
            )
        except ConversionError as error:
            raise InconvertibleError(str(error), error.log) from error
        asked = wanted.for_source(asked, prepared.weights)
        outcome.seconds["prepare"] = time.monotonic() - started
        first = prepared.signatures[0]
        _check_labels(labels, request.output_spec, first)
        _check_classes(truth, first)
        _look_for_logits(request.output_spec, first, warnings)
        outcome.name = request.name or request.output.resolve().name
        spoken = Meaning(
            outcome.name, outcome.version, request.input, _output(request.output_spec, labels, first), labels
        )
        _make_all(Workshop(request, prepared, spoken, model, device, work), asked, outcome, listener)
        outcome.warnings = [*warnings.texts, *(text for made in outcome.made for text in made.warnings)]
        outcome.recipe = recipe(request, asked, prepared, fingerprint(source, truth) if source is not None else None)
        outcome.statistics = prepared.statistics
        if outcome.made:
            content = writer.Content(
                name=outcome.name,
                variants=outcome.made,
                input=request.input,
                output=spoken.output,
                labels=labels,
                samples=_golden_samples(first, outcome.made[0]),
                warm_up=_warm_up(outcome.name, first),
                recipe=outcome.recipe,
                report=report(outcome),
            )
            outcome.bundle = writer.write(request.output, outcome.version, request.force, content)
        if request.report is not None:
            write_report(request.report, report(outcome))
        if request.tensorboard is not None:
            write_events(request.tensorboard, report(outcome))
    return outcome


def _with_metadata(request: Request, form: Format, warnings: Warnings) -> tuple[Request, tuple[str, ...] | None]:
    """Lay the options over what a .tflite file says of itself; gives the request and the file's labels."""
    found = read_metadata(request.model) if form == "TFLite" else None
    if found is None:
        return request, None
    for note in found.notes:
        warnings.add(f"{request.model}: {note}")
    given = request.input
    # Options of another kind of input say that the file is wrong about it.
    inputs = merge(found.input, given) if given.kind in (None, found.input.kind) else given
    output = merge(found.output, request.output_spec)
    return dataclasses.replace(request, input=inputs, output_spec=output), found.labels


def _warm_up(name: str, entry: Prepared) -> bytes | None:
    """Give requests for TensorFlow Serving to warm the model up with; None where the inputs are too large for any."""
    return warmup.encode(name, entry.plan.key, store.load(entry.golden_inputs), max_bytes=GOLDEN_BYTES) or None


def _truth(request: Request, source: Source | None, labels: tuple[str, ...] | None) -> Truth | None:
    if request.labels_for is None:
        if request.metric is not None:
            raise UsageError(f"--metric {request.metric} is measured with labels; give them with --labels-for")
        return None
    if source is None:
        raise UsageError("--labels-for goes with --calibration DATA: it says what those samples are")
    return open_truth(request.labels_for, source, labels)


def _labels(request: Request) -> tuple[str, ...] | None:
    if request.labels is None:
        return request.output_spec.labels
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
    if labels is None and spec.type != "classification":
        return
    if spec.type not in (None, "classification"):
        return
    if entry.classifier is None:
        raise UsageError(
            f"a classifier needs to say which output holds the scores of the classes ({', '.join(outputs)}): --scores-output NAME"
        )
    classes = outputs[entry.classifier].shape[-1]
    if labels is not None and classes != len(labels):
        raise UsageError(
            f"{len(labels)} labels for the {classes} classes of output {entry.classifier!r}; give exactly one for each class"
        )


def _check_classes(truth: Truth | None, entry: Prepared) -> None:
    """Check that the classes of the labels are those that the scores have."""
    if truth is None or entry.classifier is None:
        return
    scores = store.load(entry.expected["measured"])[entry.classifier]
    truth.check_classes(scores.shape[-1], f"output {entry.classifier!r} has")


def _look_for_logits(spec: OutputSpec, entry: Prepared, warnings: Warnings) -> None:
    if entry.classifier is None:
        return
    scores = store.load(entry.expected["measured"])[entry.classifier]
    if spec.activation not in (None, "none"):
        if scores.size and np.all((scores >= 0) & (scores <= 1)):
            warnings.add(
                f"output {entry.classifier!r} lies within 0..1 already: --activation {spec.activation} would be applied a second "
                "time if the model ends in one; leave it out then"
            )
        return
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


def _make_all(workshop: Workshop, asked: Sequence[Wanted], outcome: Outcome, listener: Listener) -> None:
    for variant in asked:

        def progress(stage: str, done: int, total: int, name: str = variant.name) -> None:
            listener.stage(name, stage, done, total)

        started = time.monotonic()
        try:
            outcome.made.append(workshop.make(variant, progress))
        except RefusedError as error:
            outcome.failures.append(Failure(variant.name, str(error), error.log, details=error.details))
        except ConversionError as error:
            inconvertible = isinstance(error, InconvertibleError)
            outcome.failures.append(Failure(variant.name, str(error), error.log, inconvertible))
        outcome.seconds[variant.name] = time.monotonic() - started


def _output(spec: OutputSpec, labels: tuple[str, ...] | None, entry: Prepared) -> OutputSpec:
    kind = spec.type or ("classification" if labels is not None or spec.top_k is not None else "tensor")
    tensor = entry.classifier if kind == "classification" and spec.tensor is None else spec.tensor
    return dataclasses.replace(
        spec, type=kind, tensor=tensor, labels=None, labels_file=writer.LABELS if labels is not None else None
    )


def _golden_samples(entry: Prepared, default: Made) -> store.Arrays:
    inputs = store.load(entry.golden_inputs)
    samples = {f"input/{name}": np.array(array) for name, array in inputs.items()}
    if "max_error" in default.quality:  # else the source model's outputs are a stand-in's
        outputs = store.load(entry.expected["measured"])
        samples.update({f"output/{name}": np.array(array[: entry.golden]) for name, array in outputs.items()})
    return samples
