"""One variant from conversion to verdict: made in a child, read, tried in the device runtime.

Whatever is wrong with it ends in a ConversionError; a Made that comes back may be shipped.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_serve_converters import store, trial
from edge_serve_converters.channel import Report
from edge_serve_converters.child import ChildCrashedError
from edge_serve_converters.errors import ConversionError
from edge_serve_converters.flatbuffer import DEVICE_CUSTOM_OPERATORS, Contents, read_contents
from edge_serve_converters.request import VARIANT_NAMES, Io, Mode, Request
from edge_serve_converters.trial import Prepared, Seen

WORKER = "edge_serve_converters.worker"


@dataclass(frozen=True, slots=True)
class Made:
    """A variant that passed every check."""

    name: str
    mode: Mode
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

    @property
    def default(self) -> Seen:
        """Give the default signature."""
        return next(iter(self.seen.values()))


def make(
    request: Request, mode: Mode, signatures: Sequence[Prepared], saved_model: str, work: Path, report: Report
) -> Made:
    """Convert to one mode and check the result; ConversionError says why there is none."""
    name = VARIANT_NAMES[mode]
    folder = work / name
    folder.mkdir()
    file = _convert(request, mode, signatures, saved_model, folder, report)
    contents = read_contents(file.read_bytes())
    _check_types(mode, contents, request.allow_float_operators)
    seen = []
    for entry in signatures:
        one = trial.run(request, name, entry, file, report, golden=entry is signatures[0])
        trial.check_values(name, entry, one)
        if mode == "int8" and request.io != "float":
            _check_io(request.io, contents, entry, one)
        seen.append(one)
    figures: dict[str, Any] = {
        "measured_on": "held-back" if signatures[0].calibration is not None else "random",
        "samples": store.runs(store.load(signatures[0].measured)),
    }
    found = []
    fused = DEVICE_CUSTOM_OPERATORS & set(contents.operators)
    if fused:
        # The SavedModel computes a placeholder where the file has the operator: a comparison would mean nothing.
        found.append(
            f"{name}: ends in {', '.join(fused)}, of which the SavedModel has only a stand-in: errors cannot be measured"
        )
    else:
        figures.update(trial.measure(signatures, seen))
        found += trial.warnings(name, figures)
    figures["tolerance"] = trial.tolerance(signatures[0], seen[0], quantized=mode == "int8")
    return Made(
        name=name,
        mode=mode,
        io=request.io if mode == "int8" and request.io != "float" else "float32",
        file=file,
        bytes=file.stat().st_size,
        contents=contents,
        seen={entry.plan.key: one for entry, one in zip(signatures, seen, strict=True)},
        quality=figures,
        golden=trial.golden(signatures[0], seen[0]),
        warnings=tuple(found),
    )


def _convert(
    request: Request, mode: Mode, signatures: Sequence[Prepared], saved_model: str, folder: Path, report: Report
) -> Path:
    single = all(tensor.shape[0] == 1 for entry in signatures for tensor in entry.plan.inputs if tensor.batched)
    target = folder / "model.tflite"
    # The calibrator crashes on loops (LSTM, GRU) of which every shape is known; with the batch left open it does not.
    attempts = (False, True) if mode == "int8" and single else (False,)
    for dynamic_batch in attempts:
        command = {
            "do": "convert",
            "saved_model": saved_model,
            "target": str(target),
            "work": str(folder / f"trace-{int(dynamic_batch)}"),
            "mode": mode,
            "io": request.io,
            "single_batch": single,
            "dynamic_batch": dynamic_batch,
            "allow_float": request.allow_float_operators,
            "signatures": [
                {**entry.plan.to_command(), "calibration": str(entry.calibration) if entry.calibration else None}
                for entry in signatures
            ],
        }
        with trial.start_child(request, WORKER, folder) as child:
            try:
                child.call(VARIANT_NAMES[mode], command, report)
                break
            except ChildCrashedError as error:
                if dynamic_batch is attempts[-1] or error.signal is signal.SIGKILL:
                    raise _crashed(mode, error) from error
    return target


def _crashed(mode: Mode, crash: ChildCrashedError) -> ConversionError:
    if crash.signal is signal.SIGKILL:
        return ConversionError(f"{crash}; convert on a machine with more memory, or give fewer --samples", crash.log)
    advice = "convert to float16 or dynamic, which do not calibrate" if mode == "int8" else "convert to another mode"
    return ConversionError(f"{crash} while it converted: a defect of TensorFlow's converter; {advice}", crash.log)


def _check_types(mode: Mode, contents: Contents, allow_float: bool) -> None:
    """Refuse files that are not what their mode says."""
    if mode == "dynamic" and "INT8" not in contents.constants:
        raise ConversionError(
            "dynamic: nothing in the file was quantized (TensorFlow leaves weights of less than 1024 values alone), "
            "so it would be the float32 file; convert to none or float16"
        )
    if mode == "float16" and "FLOAT16" not in contents.constants:
        raise ConversionError(
            "float16: the file holds no float16 weights, so it would be the float32 file; convert to none"
        )
    if mode != "int8":
        return
    floats = ", ".join(f"{name} ×{count}" for name, count in contents.float_operators.items())
    if contents.integer_operators == 0:
        raise ConversionError(
            f"int8: nothing in the file was quantized (it computes in float: {floats or 'no operators'}); convert to none or float16"
        )
    if contents.float_operators and not allow_float:
        raise ConversionError(
            f"int8: these operators stay float, TensorFlow has no int8 form of them here: {floats}; replace them in the model, "
            "or accept them with --allow-float-operators"
        )


def _check_io(io: Io, contents: Contents, signature: Prepared, seen: Seen) -> None:
    # The outputs of a float operator that was accepted (detection, --allow-float-operators) have nothing to quantize with.
    float_outputs = bool(contents.float_operators) or not DEVICE_CUSTOM_OPERATORS.isdisjoint(contents.operators)
    wanted = [(tensor.name, tensor.dtype, seen.inputs[tensor.name]) for tensor in signature.plan.inputs]
    if not float_outputs:
        wanted += [(name, dtype, seen.outputs[name]) for name, dtype in signature.plan.outputs.items()]
    for name, dtype, found in wanted:
        if dtype == "float32" and found.dtype != io:
            raise ConversionError(
                f"int8: tensor {name!r} stayed {found.dtype}, --io {io} asked for {io}; use --io float"
            )
