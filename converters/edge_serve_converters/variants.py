"""Variants from conversion to verdict: made in a child, read, tried in the device runtime, held against the gates.

Whatever is wrong with one ends in a ConversionError; a Made that comes back may be shipped.
"""

from __future__ import annotations

import dataclasses
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec, OutputSpec
from edge_serve_converters import blame, compatibility, edgetpu_compiler, gates, selective, store, trial
from edge_serve_converters.channel import Report
from edge_serve_converters.child import ChildCrashedError
from edge_serve_converters.errors import (
    ConversionError,
    InconvertibleError,
    NothingQuantizedError,
    RefusedError,
)
from edge_serve_converters.flatbuffer import FUSED_OPERATORS, Contents, read_contents
from edge_serve_converters.gates import Gates
from edge_serve_converters.layers import Layer
from edge_serve_converters.metadata import write_metadata
from edge_serve_converters.prepare import Preparation
from edge_serve_converters.request import Request, Wanted
from edge_serve_converters.session import Session
from edge_serve_converters.trial import Prepared, Seen

_FLOATS = frozenset({"none", "float16", "dynamic"})


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that was made and run; what is wrong with its answers is not yet decided."""

    wanted: Wanted
    file: Path
    contents: Contents
    seen: tuple[Seen, ...]
    quality: dict[str, Any]
    warnings: tuple[str, ...]
    kept_float: tuple[str, ...]
    broken: trial.Broken | None


@dataclass(frozen=True, slots=True)
class Made:
    """A variant that passed every check."""

    name: str
    wanted: Wanted
    quantization: str
    io: str
    file: Path
    bytes: int
    contents: Contents
    seen: dict[str, Seen]
    """Signature → the file as the device runtime sees it; the default signature is the first."""
    quality: dict[str, Any]
    golden: store.Arrays
    """What this variant gives on the golden inputs of the default signature."""
    warnings: tuple[str, ...]
    kept_float: tuple[str, ...] = ()
    layers: list[Layer] = field(default_factory=list)
    compatibility: dict[str, Any] = field(default_factory=dict)
    compiled: Path | None = None
    """The file that an Edge TPU runs."""

    @property
    def default(self) -> Seen:
        """Give the default signature."""
        return next(iter(self.seen.values()))

    @property
    def layers_on(self) -> int:
        """Say on how many samples the layers were compared."""
        return min(trial.LAYER_RUNS, int(self.quality["samples"])) if self.layers else 0

    @property
    def min_runtime(self) -> str | None:
        """Give the first TensorFlow Lite release that has all operators in their versions; every ai-edge-litert is newer."""
        found: str | None = self.compatibility["min_runtime"]
        return found

    @property
    def delegates(self) -> tuple[str, ...]:
        """Name the delegates that may run the file, those that it was made for first."""
        cpu = ("xnnpack", "none") if self.default.claimed else ("none",)
        # Only the compiled file runs on an Edge TPU.
        return ("gpu", *cpu) if self.wanted.target == "gpu" else cpu


@dataclass(frozen=True, slots=True)
class Meaning:
    """What is written into every file."""

    name: str
    version: int
    input: InputSpec
    output: OutputSpec
    labels: tuple[str, ...] | None


class Workshop:
    """Makes the variants of one request, one after the other; keeps what they share."""

    def __init__(
        self,
        request: Request,
        prepared: Preparation,
        meaning: Meaning,
        source: Session,
        device: Session,
        work: Path,
    ) -> None:
        self._request = request
        self._meaning = meaning
        self._format = prepared.format
        self._weights = prepared.weights
        self._signatures = prepared.signatures
        self._source = source
        self._device = device
        self._work = work
        self._gates = Gates(request.max_drop, request.min_agreement, request.min_cosine, request.min_sqnr_db)
        self._float_file: Path | None = None
        # Set once the calibrator was seen to crash on this model with its batch fixed.
        self._open_batch = False

    def make(self, wanted: Wanted, report: Report) -> Made:
        """Make one variant; ConversionError says why there is none, RefusedError also how far from the gates it was."""
        (self._work / wanted.name).mkdir()
        candidate = self._selective(wanted, report) if wanted.mode == "selective" else self._try(wanted, (), report)
        refused = self._refused(candidate)
        failed = bool(refused) or candidate.broken is not None
        compared = self._compare_layers(candidate, report, needed=failed)
        if failed:
            raise self._refusal(candidate, refused, compared)
        return self._finish(candidate, compared, report)

    def _selective(self, wanted: Wanted, report: Report) -> Candidate:
        """Leave the layers float that the person named, and with --auto as many more as the gates ask for, and no more."""
        reference = self._need_float_file(wanted, report)
        named = selective.match(wanted.keep_float, selective.layers_of(reference))
        best = self._try(wanted, selective.with_loops(reference, named), report)
        if not wanted.auto or self._passes(best):
            return best
        fixed = best.kept_float
        tried = {frozenset(fixed): best}

        def passes(kept: tuple[str, ...]) -> bool:
            if frozenset(kept) in tried:
                return self._passes(tried[frozenset(kept)])
            try:
                candidate = self._try(wanted, selective.with_loops(reference, kept), report)
            except NothingQuantizedError:
                return True  # the float model passes by itself: fewer layers may be enough
            except ConversionError:
                return False  # with other layers left float there may well be a file
            tried[frozenset(kept)] = candidate
            return self._passes(candidate)

        compared = self._compare_layers(best, report, needed=True)
        harmful = [layer.name for layer in blame.sensitivity(compared)]
        # The others may only be kept when all these are: they did no harm that was seen.
        ranked = [name for name in dict.fromkeys((*harmful, *selective.choices(reference))) if name not in fixed]
        kept = selective.fewest(ranked, passes, fixed)
        return tried.get(frozenset(kept), best) if kept is not None else best

    def _try(self, wanted: Wanted, kept: tuple[str, ...], report: Report) -> Candidate:
        """Convert, read and run; ConversionError for what no gate need be asked about."""
        folder = self._work / wanted.name / f"{len(list((self._work / wanted.name).iterdir()))}"
        folder.mkdir()
        file = self._convert(wanted, kept, folder / "model.tflite", report)
        contents = read_contents(file.read_bytes())
        left = selective.left_float(file, contents.float_operators, kept) if wanted.mode == "selective" else ()
        if wanted.auto:
            # What has no integer form is what must stay float, whatever the gates say.
            kept = (*kept, *(layer for _, layer in left))
        _check_types(wanted, contents, left, self._request.allow_float_operators or wanted.auto)
        seen, broken = [], None
        for number, entry in enumerate(self._signatures):
            outputs = folder / f"outputs-{number}"
            one = trial.run(self._device, wanted.name, entry, file, outputs, report, golden=number == 0)
            broken = broken or trial.broken_values(wanted.name, entry, one)
            if wanted.io != "float":
                _check_io(wanted, contents, entry, one)
            seen.append(one)
        quality, warnings = self._measure(wanted, contents, seen)
        return Candidate(wanted, file, contents, tuple(seen), quality, warnings, kept, broken)

    def _measure(
        self, wanted: Wanted, contents: Contents, seen: Sequence[Seen]
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        first = self._signatures[0]
        figures: dict[str, Any] = {
            "measured_on": "held-back" if first.calibration is not None else "random",
            "samples": store.runs(store.load(first.measured)),
        }
        found = []
        fused = FUSED_OPERATORS & set(contents.operators)
        if fused and self._source_has_stand_ins:
            # The SavedModel computes a placeholder where the file has the operator: a comparison would mean nothing.
            found.append(
                f"{wanted.name}: ends in {', '.join(fused)}, of which the SavedModel has only a stand-in: errors cannot be measured"
            )
        else:
            figures.update(trial.measure(self._signatures, seen, self._request.metric))
            cannot = gates.unmeasurable(self._gates, figures)
            if cannot is not None:
                raise UsageError(cannot)
            found += trial.warnings(wanted.name, figures)
        quantized = wanted.mode not in _FLOATS
        figures["tolerance"] = trial.tolerance(first, seen[0], quantized=quantized)
        return figures, tuple(found)

    @property
    def _source_has_stand_ins(self) -> bool:
        """A .tflite source runs its fused operators itself."""
        return self._format != "TFLite"

    def _passes(self, candidate: Candidate) -> bool:
        return candidate.broken is None and not self._refused(candidate)

    def _refused(self, candidate: Candidate) -> list[gates.Refused]:
        if "max_error" not in candidate.quality:
            return []
        return gates.check(candidate.quality, self._gates, candidate.wanted.mode)

    def _refusal(self, candidate: Candidate, refused: Sequence[gates.Refused], compared: list[Layer]) -> RefusedError:
        name = candidate.wanted.name
        reasons = [one.text for one in refused]
        if candidate.broken is not None:
            reasons = [f"{candidate.broken.text}. This variant must not be shipped; convert to another mode"]
        text = f"{name}: {'; '.join(reasons)}"
        reason = blame.explain(compared)
        if reason is not None:
            text += f". {reason}"
        if candidate.wanted.auto:
            text += ". Not even with every layer that helps left float does it pass"
        return RefusedError(
            text,
            quality=candidate.quality,
            gates=[one.to_json() for one in refused],
            layers=[layer.to_json() for layer in compared],
            first_bad_layer=_name(blame.first_bad(compared)),
        )

    def _compare_layers(self, candidate: Candidate, report: Report, *, needed: bool) -> list[Layer]:
        """Compare layer by layer where the float file is there anyway, or the person needs to know."""
        integer = candidate.wanted.mode not in _FLOATS
        if candidate.wanted.mode == "none" or not (needed or integer or self._float_file is not None):
            return []
        reference = self._need_float_file(candidate.wanted, report)
        inputs = candidate.broken.inputs if candidate.broken is not None else self._signatures[0].measured
        try:
            return trial.compare_layers(
                self._device, candidate.wanted.name, self._signatures[0], reference, candidate.file, report, inputs
            )
        except ConversionError:
            return []  # the runtime cannot keep all tensors of some files; the verdict does not hang on it

    def _need_float_file(self, wanted: Wanted, report: Report) -> Path:
        if self._float_file is None:
            target = self._work / "float.tflite"
            self._call_source(wanted, (), "float_file", target, report)
            self._float_file = target
        return self._float_file

    def _convert(self, wanted: Wanted, kept: tuple[str, ...], target: Path, report: Report) -> Path:
        self._call_source(wanted, kept, "convert", target, report)
        return target

    def _call_source(self, wanted: Wanted, kept: tuple[str, ...], do: str, target: Path, report: Report) -> None:
        single = all(
            tensor.shape[0] == 1 for entry in self._signatures for tensor in entry.plan.inputs if tensor.batched
        )
        calibrates = wanted.calibrated or (do == "float_file" and self._signatures[0].calibration is not None)
        while True:
            job = {
                "mode": wanted.mode,
                "io": wanted.io,
                "single_batch": single,
                "dynamic_batch": self._open_batch and calibrates,
                "allow_float": self._request.allow_float_operators,
                "keep_float": list(kept),
                "per_channel_dense": wanted.per_channel_dense,
            }
            signatures = [
                {**entry.plan.to_command(), "calibration": str(entry.calibration) if entry.calibration else None}
                for entry in self._signatures
            ]
            try:
                self._source.call(wanted.name, do, report, signatures=signatures, job=job, target=str(target))
                return
            except ChildCrashedError as error:
                # The calibrator crashes on loops (LSTM, GRU) of which every shape is known; with the batch left open it
                # does not.
                if error.signal is signal.SIGKILL or not (calibrates and single) or self._open_batch:
                    raise _crashed(wanted, error) from error
                self._open_batch = True
            except ConversionError as error:
                raise InconvertibleError(str(error), error.log) from error

    def _finish(self, candidate: Candidate, compared: list[Layer], report: Report) -> Made:
        wanted, seen = candidate.wanted, candidate.seen
        examined = compatibility.examine(
            candidate.file.read_bytes(), claimed=seen[0].claimed, runtime_version=seen[0].runtime.rpartition(" ")[2]
        )
        self._check_compat(wanted, examined)
        file = self._describe(candidate, report)
        made = Made(
            name=wanted.name,
            wanted=wanted,
            quantization=self._quantization(wanted, candidate.kept_float),
            io=self._io(wanted, seen[0]),
            file=file,
            bytes=file.stat().st_size,
            contents=candidate.contents,
            seen={entry.plan.key: one for entry, one in zip(self._signatures, seen, strict=True)},
            quality=candidate.quality,
            golden=trial.golden(self._signatures[0], seen[0]),
            warnings=candidate.warnings,
            kept_float=candidate.kept_float,
            layers=compared,
            compatibility=examined,
        )
        return self._compile(made, report) if wanted.target == "edgetpu" else made

    def _describe(self, candidate: Candidate, report: Report) -> Path:
        """Write what inputs and outputs mean into the file; the answers of the file that ships are what they were."""
        first, seen = self._signatures[0], candidate.seen[0]
        file = candidate.file.with_name("described.tflite")
        data = write_metadata(
            candidate.file.read_bytes(),
            name=self._meaning.name,
            description=f"{candidate.wanted.name} variant, made by edge-serve convert",
            input=self._meaning.input,
            output=self._meaning.output,
            labels=self._meaning.labels,
            inputs=tuple(seen.inputs.values()),
            outputs=tuple(seen.outputs.values()),
            version=str(self._meaning.version),
        )
        file.write_bytes(data)
        again = trial.run_golden(self._device, candidate.wanted.name, first, file, file.with_name("described"), report)
        for name, array in trial.golden(first, seen).items():
            if not np.array_equal(array, again[name], equal_nan=array.dtype.kind == "f"):
                raise ConversionError(
                    f"{candidate.wanted.name}: output {name!r} changed when metadata was written into the file, "
                    "a defect of edge-serve; please report it"
                )
        return file

    def _compile(self, made: Made, report: Report) -> Made:
        """Compile for the Edge TPU where its compiler is at hand, else say how to."""
        report("compile", 0, 0)
        folder = made.file.parent / "compiled"
        folder.mkdir()
        compiled = edgetpu_compiler.compile_file(made.file, folder, self._request.timeout_s)
        if compiled is None:
            text = edgetpu_compiler.how_to_compile(f"model.{made.name}.tflite")
            return dataclasses.replace(made, warnings=(*made.warnings, text))
        edgetpu = {**made.compatibility["edgetpu"], "compiler": compiled.to_json()}
        warnings = made.warnings
        if compiled.file is None:
            warnings = (*warnings, f"{made.name}: {compiled.reason}; the file that was not compiled is in the bundle")
        return dataclasses.replace(
            made,
            compatibility={**made.compatibility, "edgetpu": edgetpu},
            compiled=compiled.file,
            warnings=warnings,
        )

    def _io(self, wanted: Wanted, seen: Seen) -> str:
        """Say what dtype the file's inputs have: the caller's floats, or the integers that they become."""
        if wanted.io != "float":
            return wanted.io
        kinds = {spec.dtype for spec in seen.inputs.values() if spec.scale is not None}
        return kinds.pop() if len(kinds) == 1 else "float32"

    def _quantization(self, wanted: Wanted, kept: Sequence[str]) -> str:
        if wanted.mode == "none":
            return "none" if self._weights == "float32" else self._weights
        if wanted.mode == "selective":
            return "selective" if kept else "int8"
        return wanted.mode

    def _check_compat(self, wanted: Wanted, examined: dict[str, Any]) -> None:
        """Refuse a file that a runtime asked for would not load."""
        if self._request.compat is None:
            return
        for runtime in examined["runtimes"]:
            if runtime["name"].startswith(self._request.compat) and not runtime["loads"]:
                raise ConversionError(
                    f"{wanted.name}: {runtime['name']} does not load it: {'; '.join(runtime['reasons'])}; "
                    "convert to another mode, or leave --compat out"
                )


def _name(layer: Layer | None) -> str | None:
    return layer.name if layer is not None else None


def _crashed(wanted: Wanted, crash: ChildCrashedError) -> InconvertibleError:
    if crash.signal is signal.SIGKILL:
        return InconvertibleError(f"{crash}; convert on a machine with more memory, or give fewer --samples", crash.log)
    advice = "convert to float16 or dynamic, which do not calibrate" if wanted.calibrated else "convert to another mode"
    return InconvertibleError(f"{crash} while it converted: a defect of TensorFlow's converter; {advice}", crash.log)


def _check_types(wanted: Wanted, contents: Contents, left: Sequence[selective.Layer], allow_float: bool) -> None:
    """Refuse files that are not what their mode says."""
    name, mode = wanted.name, wanted.mode
    if mode == "dynamic" and "INT8" not in contents.constants:
        raise ConversionError(
            f"{name}: nothing in the file was quantized (weights of less than 1024 values are left alone), "
            "so it would be the float32 file; convert to none or float16"
        )
    if mode == "float16" and "FLOAT16" not in contents.constants:
        raise ConversionError(
            f"{name}: the file holds no float16 weights, so it would be the float32 file; convert to none"
        )
    if mode in _FLOATS:
        return
    floats = _counted(contents.float_operators)
    if contents.integer_operators == 0:
        raise NothingQuantizedError(
            f"{name}: nothing in the file was quantized (it computes in float: {floats or 'no operators'}); "
            "convert to none or float16"
        )
    if wanted.mode == "selective":
        if left and not allow_float:
            unasked = Counter(operator for operator, _ in left)
            raise ConversionError(
                f"{name}: besides the layers of --keep-float these operators stay float, there is no int8 form of them here: "
                f"{_counted(unasked)}; name them with --keep-float, too, or let --auto choose"
            )
    elif contents.float_operators and not allow_float:
        integers = "int16" if mode == "int16x8" else "int8"
        raise ConversionError(
            f"{name}: these operators stay float, there is no {integers} form of them here: {floats}; replace them in the "
            "model, or accept them with --allow-float-operators"
        )


def _counted(operators: Mapping[str, int]) -> str:
    return ", ".join(f"{operator} ×{count}" for operator, count in operators.items())


def _check_io(variant: Wanted, contents: Contents, signature: Prepared, seen: Seen) -> None:
    # The outputs of a float operator that was accepted (detection, --allow-float-operators) have nothing to quantize with.
    float_outputs = bool(contents.float_operators) or not FUSED_OPERATORS.isdisjoint(contents.operators)
    wanted = [(tensor.name, tensor.dtype, seen.inputs[tensor.name]) for tensor in signature.plan.inputs]
    if not float_outputs:
        wanted += [(name, dtype, seen.outputs[name]) for name, dtype in signature.plan.outputs.items()]
    for name, dtype, found in wanted:
        if dtype == "float32" and found.dtype != variant.io:
            raise ConversionError(
                f"{variant.name}: tensor {name!r} stayed {found.dtype}, {variant.io} was asked for; use --io float"
            )
