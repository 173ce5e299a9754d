"""Two models on the same data: how far B's answers are from A's, and what each costs. A is the reference.

Both run in the device runtime, in a child. The outcome is a document of the shape of a conversion's report.json, with
`kind` comparison: its variants are the files that were compared, each with its quality against A.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve import __version__
from edge_serve.bundle import TensorSpec, sha256_of
from edge_serve.errors import UsageError
from edge_serve.model.repository import ModelVersion, find
from edge_serve.spec import InputSpec
from edge_serve_converters import compare_plan, quality, store
from edge_serve_converters.calibration import fingerprint, kind_of, open_source
from edge_serve_converters.child import Child, ChildCrashedError
from edge_serve_converters.errors import ConversionError
from edge_serve_converters.gates import Gates, unmeasurable
from edge_serve_converters.latency import summary
from edge_serve_converters.plan import InputPlan
from edge_serve_converters.report_markup import TASKS
from edge_serve_converters.request import DEFAULT_SAMPLES, DEFAULT_TIMEOUT_S
from edge_serve_converters.task import doubt, task_figures
from edge_serve_converters.truth import open_truth

CHILD = "edge_serve_converters.compare_device"
DELEGATE = "xnnpack"
# Latency is taken in rounds over all files, so that a machine that slows down meanwhile slows all of them.
ROUNDS = 3
ROUND_SECONDS = 0.4
ROUND_RUNS = 100

Listener = Callable[[str, str, int, int], None]
"""What is worked on, stage, steps done, steps in all (0: unknown)."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What shall be compared, and which figures are good enough."""

    reference: Path
    other: Path
    data: Path
    reference_variant: str | None = None
    """None: the bundle's default."""
    other_variant: str | None = None
    every_variant: bool = False
    """Compare all variants of both with the reference."""
    signature: str | None = None
    samples: int = DEFAULT_SAMPLES
    seed: int = 0
    threads: int = 1
    channels: tuple[str, ...] | None = None
    """Columns of a CSV file that are the samples. None: as the manifest says, else all."""
    labels_for: str | None = None
    """What the samples truly are, as `truth.open_truth` takes it."""
    gates: Gates = Gates()
    """Only what is set is asked for: two models may differ by purpose, and no default knows by how much."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    memory_limit_mb: int | None = None
    verbose: bool = False


@dataclass(slots=True)
class _Entry:
    """One file of the comparison."""

    side: str
    name: str
    version: ModelVersion
    signature: str = ""
    inputs: dict[str, TensorSpec] = field(default_factory=dict)
    outputs: dict[str, TensorSpec] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)
    given: Path = Path()
    """The folder of its inputs."""
    answers: Path = Path()
    """The folder of its outputs."""
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Fed:
    """The data that all files were given."""

    samples: int
    fingerprint: str
    truth: store.Array | None
    """Labels, [runs, batch] or masks of them."""


def compare(request: Comparison, listener: Listener) -> dict[str, Any]:
    """Compare and give the document; what failed a gate is in its `failed`.

    UsageError if the models cannot be compared on the data, ConversionError if a file takes the runtime down.
    """
    entries = _entries(request)
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="edge-serve-compare-") as temporary:
        work = Path(temporary)
        child = Child(
            CHILD,
            work,
            timeout_s=request.timeout_s,
            memory_limit_mb=request.memory_limit_mb,
            verbose=request.verbose,
        )
        with child:
            for entry in entries:
                _describe(child, request, entry, listener)
            fed = _feed(request, entries, work, notes)
            for place, entry in enumerate(entries):
                _run(child, request, entry, work / f"answers-{place}", listener)
            for _ in range(ROUNDS):
                for entry in entries:
                    _time(child, request, entry, listener)
        variants, failed = _measure(request, entries, fed, notes)
    return {
        "report": 1,
        "kind": "comparison",
        "name": " and ".join(_title(entry) for entry in (entries[0], entries[-1])),
        "version": None,
        "default": entries[0].name,
        "measured_on": f"samples of {request.data.name}",
        "compared": {
            entry.name: {"file": entry.version.file.name, "sha256": sha256_of(entry.version.file)} for entry in entries
        },
        "converter": {"edge_serve": __version__, "runtime": entries[0].seen["runtime"]},
        "data": {"sha256": fed.fingerprint, "samples": fed.samples},
        "seed": request.seed,
        "variants": variants,
        "failed": failed,
        "warnings": notes,
    }


def _entries(request: Comparison) -> list[_Entry]:
    """Find the files; the reference is the first."""
    found = [
        _Entry(side, _name(side, version), version)
        for side, path, variant in (
            ("A", request.reference, request.reference_variant),
            ("B", request.other, request.other_variant),
        )
        for version in _versions(path, variant, request.every_variant)
    ]
    if len(found) == 1:
        raise UsageError(f"{request.other}: there is nothing to compare with the reference")
    return found


def _versions(path: Path, variant: str | None, every: bool) -> list[ModelVersion]:
    chosen = find(path, variant=variant)
    if not every or chosen.bundle is None:
        return [chosen]
    names = [one.name for one in chosen.bundle.manifest.variants if one.name != chosen.variant]
    return [chosen, *(find(chosen.bundle.path, variant=name) for name in names)]


def _name(side: str, version: ModelVersion) -> str:
    return f"{side} {version.file.stem if version.bundle is None else version.variant}"


def _title(entry: _Entry) -> str:
    number = entry.version.version
    return f"{entry.side}: {entry.version.name}" + (f" {number}" if number is not None else "")


def _call(child: Child, entry: _Entry, command: dict[str, Any], listener: Listener) -> dict[str, Any]:
    try:
        return child.call(f"{entry.name} in the device runtime", command, lambda *stage: listener(entry.name, *stage))
    except ChildCrashedError as error:
        if error.signal is None:  # it left by itself: nothing that a file can do
            raise
        raise ConversionError(f"{error}: the file takes the runtime down", error.log) from error


def _command(request: Comparison, entry: _Entry) -> dict[str, Any]:
    return {
        "model": str(entry.version.file),
        "signature": entry.signature or request.signature,
        "delegate": DELEGATE,
        "threads": request.threads,
    }


def _describe(child: Child, request: Comparison, entry: _Entry, listener: Listener) -> None:
    entry.seen = _call(child, entry, {"do": "describe", **_command(request, entry)}, listener)
    entry.signature = entry.seen["signature"]
    entry.inputs, entry.outputs = (
        {tensor["name"]: TensorSpec(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in entry.seen[role]}
        for role in ("inputs", "outputs")
    )


def _spec(entries: Sequence[_Entry], side: str, notes: list[str]) -> InputSpec:
    """Give what a side's inputs mean; a bare file is taken to mean what the other model's do."""
    versions = {entry.side: entry.version for entry in reversed(entries)}
    own, other = versions[side], versions["B" if side == "A" else "A"]
    if own.bundle is not None or other.bundle is None:
        return own.input
    if other.input.kind not in (None, "tensor"):
        _add(
            notes,
            f"{side} is a bare file and does not say how inputs are processed: it gets them as the other model does",
        )
    return other.input


def _add(notes: list[str], text: str) -> None:
    if text not in notes:
        notes.append(text)


def _feed(request: Comparison, entries: Sequence[_Entry], work: Path, notes: list[str]) -> _Fed:
    """Write each file's inputs: the same samples for all, processed as each model wants them."""
    reference = entries[0]
    # Each model resizes pictures itself; all other data are the tensors, so these must have one shape.
    pictures = kind_of(request.data) == "image"
    if pictures:
        compare_plan.check_pictures(request.data, [(entry.name, entry.inputs) for entry in entries])
    # The data are named after the reference's inputs. What does not fit together is said before what does not fit the data.
    pairs = [_matched(reference, entry, notes, shapes=not pictures) for entry in entries]
    specs = {side: _spec(entries, side, notes) for side in "AB"}
    if request.channels is not None:
        specs = {side: dataclasses.replace(spec, channels=request.channels) for side, spec in specs.items()}
    if specs["A"] != specs["B"]:
        _add(notes, "the models process inputs differently: each gets the same samples in its own way")
    sources = {side: open_source(request.data, spec) for side, spec in specs.items()}
    written: dict[tuple[str, tuple[InputPlan, ...], tuple[str, ...]], Path] = {}
    chosen: store.Array | None = None
    labels: store.Array | None = None
    truth = None
    if request.labels_for is not None:
        truth = open_truth(request.labels_for, sources["A"], reference.version.labels)
    count = samples = 0
    batch = 1
    for entry, names in zip(entries, pairs, strict=True):
        source = sources[entry.side]
        plan = compare_plan.plan(entry.name, reference.signature, entry.inputs, names, entry.outputs, source)
        found = source.open(plan).count
        if chosen is None:
            batch = compare_plan.batch_of(plan)
            count = found
            samples = min(count, request.samples * batch) // batch * batch
            if samples == 0:
                raise UsageError(f"{request.data}: holds {count} samples, fewer than one run of {batch} takes")
            labels = truth.of_samples(source, plan, count) if truth is not None else None
            chosen = np.sort(np.random.default_rng(request.seed).permutation(count)[:samples])
        elif found != count:
            raise UsageError(
                f"{request.data}: makes {count} samples for {reference.name} and {found} for {entry.name}: "
                "the models cut them in different ways, so that their answers do not belong together"
            )
        key = entry.side, plan.inputs, tuple(names.values())
        if key not in written:  # variants of one bundle mostly take the same
            runs = compare_plan.grouped(source.take(plan, chosen), plan, names)
            written[key] = store.save(work / f"inputs-{len(written)}", runs)
        entry.given = written[key]
    for source in sources.values():
        for note in source.notes:
            _add(notes, note)
    if labels is not None and chosen is not None:
        labels = np.ascontiguousarray(labels[chosen], np.int64)
        labels = labels.reshape(samples // batch, batch, *labels.shape[1:])
    return _Fed(samples, fingerprint(sources["A"], truth), labels)


def _matched(reference: _Entry, entry: _Entry, notes: list[str], *, shapes: bool) -> dict[str, str]:
    """Give the reference's input names → this file's; UsageError if the inputs do not belong together."""
    names = compare_plan.pair("inputs", reference.inputs, entry.inputs, shapes=shapes)
    if any(name != partner for name, partner in names.items()):
        told = ", ".join(f"{name!r} with {partner!r}" for name, partner in names.items())
        _add(notes, f"{entry.name}: inputs were matched by position: {told}")
    return names


def _run(child: Child, request: Comparison, entry: _Entry, folder: Path, listener: Listener) -> None:
    command = {"do": "run", **_command(request, entry), "data": str(entry.given), "answers": str(folder)}
    _call(child, entry, command, listener)
    entry.answers = folder


def _time(child: Child, request: Comparison, entry: _Entry, listener: Listener) -> None:
    command = {
        "do": "latency",
        **_command(request, entry),
        "data": str(entry.given),
        "seconds": ROUND_SECONDS,
        "most": ROUND_RUNS,
    }
    entry.seconds += _call(child, entry, command, listener)["seconds"]


def _measure(
    request: Comparison, entries: Sequence[_Entry], fed: _Fed, notes: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Compare the answers; gives the document's variants and those that failed."""
    reference = entries[0]
    expected = store.load(reference.answers)
    scores = _scores(reference)
    variants, failed = [_variant(request, reference, {})], []
    own: dict[str, Any] = {}
    for entry in entries[1:]:
        matched = compare_plan.pair("outputs", reference.outputs, entry.outputs)
        if any(name != partner for name, partner in matched.items()):
            told = ", ".join(f"{name!r} with {partner!r}" for name, partner in matched.items())
            _add(notes, f"{entry.name}: outputs were matched by position: {told}")
        given = store.load(entry.answers)
        answers = {name: given[partner] for name, partner in matched.items()}
        for name, array in answers.items():
            if array.shape != expected[name].shape:
                raise UsageError(
                    f"output {name!r} has the shape {list(expected[name].shape[1:])} in {reference.name} and "
                    f"{list(array.shape[1:])} in {entry.name} on these data; they cannot be compared"
                )
        if scores is not None:
            order, note = compare_plan.class_order(reference.version.labels, entry.version.labels)
            if order is not None:
                answers[scores] = answers[scores][..., order]
            if note is not None:
                _add(notes, f"{entry.name}: {note}")
        figures = _quality(request, expected, answers, scores, fed.samples)
        if fed.truth is not None:
            figures["task"] = task_figures(fed.truth, store.load(reference.given), expected, answers, scores)
            # What the reference itself does is its own figure; against itself it has no drop.
            task = {key: value for key, value in figures["task"].items() if key != "drop"}
            own = {"task": {**task, "variant": task["float"]}}
            doubtful = doubt(figures["task"])
            if doubtful is not None:
                _add(notes, doubtful.replace("the source model itself", reference.name))
        gates = _gates(request.gates, figures)
        variants.append(_variant(request, entry, figures))
        if gates:
            reason = "; ".join(gate["text"] for gate in gates)
            failed.append({"name": entry.name, "reason": reason, "gates": gates, "quality": figures})
    variants[0]["quality"] = own
    return variants, failed


def _scores(entry: _Entry) -> str | None:
    """Name the output that holds the scores of the classes that the manifest has labels for."""
    output, labels = entry.version.output, entry.version.labels
    if output.tensor is not None:
        return output.tensor if output.tensor in entry.outputs else None
    if labels is None or output.type not in (None, "classification"):
        return None
    fitting = [name for name, spec in entry.outputs.items() if spec.shape and spec.shape[-1] == len(labels)]
    return fitting[0] if len(fitting) == 1 else None


def _quality(
    request: Comparison,
    expected: Mapping[str, store.Array],
    answers: Mapping[str, store.Array],
    scores: str | None,
    samples: int,
) -> dict[str, Any]:
    outputs = quality.compare(expected, answers, () if scores is None else (scores,))
    figures = {"measured_on": request.data.name, "samples": samples, **quality.overall(outputs)}
    known = [entry["agreement"] for entry in outputs.values() if "agreement" in entry]
    if known:
        figures["top1_agreement"] = outputs[scores]["agreement"] if scores is not None else min(known)
    return {**figures, "outputs": outputs}


def _gates(gates: Gates, figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give the gates that say no, each with the sentence that says why; UsageError if one cannot be measured here."""
    impossible = unmeasurable(gates, figures)
    if impossible is not None:
        raise UsageError(impossible)
    said = []
    for name, entry in figures["outputs"].items():
        if entry.get("broken"):
            text = f"output {name!r} has {entry['broken']} values that are no numbers (NaN or infinity), where A gives numbers"
            said.append({"gate": "numbers", "limit": 0, "value": entry["broken"], "text": text})
    task = figures.get("task", {})
    drop = task.get("drop")
    if gates.max_drop is not None and drop is not None and drop > gates.max_drop:
        text = (
            f"{TASKS[task['metric']]} falls from {task['float']:.4f} to {task['variant']:.4f}, by {100 * drop:.2f} points, "
            f"more than --max-drop {gates.max_drop:g} allows ({100 * gates.max_drop:.2f} points)"
        )
        said.append({"gate": "max_drop", "limit": gates.max_drop, "value": drop, "text": text})
    for gate, called, limit, value in (
        ("min_agreement", "part of equal choices", gates.min_agreement, figures.get("top1_agreement")),
        ("min_cosine", "lowest cosine", gates.min_cosine, figures["cosine"]),
        ("min_sqnr_db", "SQNR in dB", gates.min_sqnr_db, figures["sqnr_db"]),
    ):
        if limit is not None and value is not None and value < limit:
            text = f"{called} is {value:g}, below --{gate.replace('_', '-')} {limit:g}"
            said.append({"gate": gate, "limit": limit, "value": value, "text": text})
    return said


def _variant(request: Comparison, entry: _Entry, figures: dict[str, Any]) -> dict[str, Any]:
    version = entry.version
    found = version.bundle.manifest.variant(version.variant) if version.bundle is not None else None
    return {
        "name": entry.name,
        "side": entry.side,
        "model": version.name,
        "version": version.version,
        "quantization": None if found is None else found.quantization,
        "io": None if found is None else found.io,
        "bytes": version.file.stat().st_size,
        "file": version.file.name,
        "operators": entry.seen["operators"],
        "xnnpack_operators": entry.seen["claimed"],
        "min_runtime": None if found is None else found.min_runtime,
        "quality": figures,
        "latency_ms": {**summary(entry.seconds), "threads": request.threads, "delegate": entry.seen["delegate"]},
    }
