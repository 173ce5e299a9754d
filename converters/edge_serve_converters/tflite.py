"""The one place that drives TensorFlow's TFLiteConverter, inside the child process: modes, calibration, error messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve_converters import store
from edge_serve_converters.channel import Report, first_line
from edge_serve_converters.errors import ConversionError, UnexplainedError
from edge_serve_converters.flatbuffer import DEVICE_CUSTOM_OPERATORS, Contents, fix_batch, read_contents
from edge_serve_converters.request import Io, Mode
from edge_serve_converters.saved_model import trace

# ConverterError.errors[i].error_code (converter_error_data.proto).
_NEEDS_FLEX = 1
_NEEDS_CUSTOM = 2


@dataclass(frozen=True, slots=True)
class Job:
    """One variant to make of the signatures."""

    mode: Mode
    io: Io
    signatures: Sequence[Mapping[str, Any]]
    single_batch: bool
    """All batches are 1: lists of tensors (recurrent layers) may take it as their unknown dimension."""
    dynamic_batch: bool
    allow_float: bool


def make(tf: Any, loaded: Any, job: Job, work: Path, report: Report) -> tuple[bytes, bool]:
    """Convert, with the weights frozen if they are lost otherwise; gives the file and whether that was needed."""
    for freeze in (False, True):
        report("trace", 0, 0)
        saved = trace(
            tf, loaded, job.signatures, work / f"traced-{int(freeze)}", freeze=freeze, dynamic_batch=job.dynamic_batch
        )
        data = _convert(tf, saved, job, report)
        contents = read_contents(data)
        if job.io != "float" and not DEVICE_CUSTOM_OPERATORS.isdisjoint(contents.operators):
            # Calibration has only seen the stand-in of a fused operator: no range fits what the operator really gives.
            data = _convert(tf, saved, job, report, float_outputs=True)
        _refuse(contents)
        if not contents.weightless:
            return fix_batch(data) if job.dynamic_batch else data, freeze
    raise ConversionError(
        "the converter lost the weights, also with the graph frozen; save the model with model.export() or plain tf.Variables"
    )


def _refuse(contents: Contents) -> None:
    if contents.stateful:
        raise ConversionError(
            "the signature writes variables (state that lives between calls), which bundles do not support; "
            "export a signature that takes the state as an input and gives it as an output"
        )
    if contents.custom:
        raise ConversionError(
            f"the file needs the custom operators {', '.join(contents.custom)}, which device runtimes do not have"
        )


def _convert(tf: Any, saved: str, job: Job, report: Report, *, float_outputs: bool = False) -> bytes:
    converter = tf.lite.TFLiteConverter.from_saved_model(
        saved, signature_keys=[entry["key"] for entry in job.signatures]
    )
    converter._experimental_default_to_single_batch_in_tensor_list_ops = job.single_batch
    if job.mode != "none":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if job.mode == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if job.mode == "dynamic":
        # Per-channel weights of dense layers need FULLY_CONNECTED version 12 (TFLite 2.17), which the only runtime of
        # 32-bit ARM refuses: a dynamic variant shall load on every board.
        converter._experimental_disable_per_channel_quantization_for_dense_layers = True
    if job.mode == "int8":
        converter.representative_dataset = lambda: _samples(job.signatures, report)
        builtin = [tf.lite.OpsSet.TFLITE_BUILTINS] if job.allow_float else []
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8, *builtin]
        if job.io != "float":
            converter.inference_input_type = getattr(tf, job.io)
            converter.inference_output_type = tf.float32 if float_outputs else getattr(tf, job.io)
    report("convert", 0, 0)
    try:
        return bytes(converter.convert())
    except Exception as error:  # ConverterError, and whatever its Python half raises
        raise explain(error) from error


def _samples(signatures: Sequence[Mapping[str, Any]], report: Report) -> Iterator[Any]:
    loaded = [(entry["key"], store.load(Path(entry["calibration"]))) for entry in signatures]
    total = sum(store.runs(arrays) for _, arrays in loaded)
    done = 0
    for key, arrays in loaded:
        for number in range(store.runs(arrays)):
            sample = {name: np.array(array[number]) for name, array in arrays.items()}
            yield sample if len(loaded) == 1 else (key, sample)
            done += 1
            report("calibrate", done, total)
    report("quantize", 0, 0)


def explain(error: Exception) -> ConversionError:
    """Say why the converter refused a model, with the operators' names where it names them."""
    details = list(getattr(error, "errors", None) or [])
    flex = sorted({detail.operator.name for detail in details if detail.error_code == _NEEDS_FLEX})
    custom = sorted({detail.operator.name for detail in details if detail.error_code == _NEEDS_CUSTOM})
    parts = []
    if flex:
        parts.append(f"{_listed(flex)} would need TensorFlow's own kernels (Flex), which device runtimes do not have")
    if custom:
        parts.append(f"{_listed(custom)} would need custom operators, which device runtimes do not have")
    if parts:
        return ConversionError(f"{'; '.join(parts)}. Replace them in the model by operators of TensorFlow Lite")
    if "TensorListReserve" in str(error):
        return ConversionError(
            "a loop (recurrent layer) over tensors of unknown shape; convert with --batch 1, or export the model with a fixed batch"
        )
    messages = [detail.error_message.strip().splitlines()[0] for detail in details if detail.error_message.strip()]
    return UnexplainedError(
        f"TensorFlow's converter refuses the model: {messages[0] if messages else first_line(error)}"
    )


def _listed(names: Sequence[str]) -> str:
    return f"the operator {names[0]}" if len(names) == 1 else f"the operators {', '.join(names)}"
