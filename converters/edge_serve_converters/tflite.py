"""The one place that drives TensorFlow's TFLiteConverter, inside the child process: modes, calibration, error messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve_converters import store
from edge_serve_converters.calibrated_loops import calibrated_with_loops
from edge_serve_converters.channel import Report, first_line
from edge_serve_converters.errors import ConversionError, UnexplainedError
from edge_serve_converters.flatbuffer import FUSED_OPERATORS, Contents, fix_batch, read_contents
from edge_serve_converters.quantized_moves import quantize_moves
from edge_serve_converters.request import Io, Mode
from edge_serve_converters.saved_model import trace

# ConverterError.errors[i].error_code (converter_error_data.proto).
_NEEDS_FLEX = 1
_NEEDS_CUSTOM = 2
# What the converter makes of Keras 2's recurrent layers. Their state lives in the file and is carried from one call into the
# next, where the SavedModel begins anew; no runtime resets it by itself.
_KEEP_STATE = frozenset(
    {
        "UNIDIRECTIONAL_SEQUENCE_LSTM",
        "BIDIRECTIONAL_SEQUENCE_LSTM",
        "UNIDIRECTIONAL_SEQUENCE_RNN",
        "BIDIRECTIONAL_SEQUENCE_RNN",
        "LSTM",
        "RNN",
        "SVDF",
    }
)


@dataclass(frozen=True, slots=True)
class Job:
    """One variant to make of the signatures."""

    mode: Mode
    io: Io
    single_batch: bool
    """All batches are 1: lists of tensors (recurrent layers) may take it as their unknown dimension."""
    dynamic_batch: bool
    allow_float: bool
    keep_float: tuple[str, ...]
    """Names of the layers (output tensors of the float file) that stay float."""
    per_channel_dense: bool


class Converter:
    """One loaded SavedModel, and what its variants share: the graph traced with fixed shapes, and its calibrated float file.

    Quantizing is quick once a model is calibrated, so int8 variants with other I/O or other layers left float cost little.
    """

    def __init__(self, tf: Any, loaded: Any, signatures: Sequence[Mapping[str, Any]], work: Path) -> None:
        self._tf = tf
        self._loaded = loaded
        self._signatures = signatures
        self._work = work
        self._traced: dict[tuple[bool, bool], str] = {}
        self._calibrated: dict[tuple[bool, bool], bytes] = {}
        # Set once the graph as it is was seen to lead to no good file.
        self._freeze = False

    def make(self, job: Job, report: Report) -> bytes:
        """Convert; with the weights frozen if they are lost otherwise, or if operators would keep state between calls.

        ConversionError says why there is no file.
        """
        for freeze in self._ways():
            data = self._convert(job, freeze, report)
            contents = read_contents(data)
            if job.io != "float" and not FUSED_OPERATORS.isdisjoint(contents.operators):
                # Calibration has only seen the stand-in of a fused operator: no range fits what the operator really gives.
                data = self._convert(job, freeze, report, float_outputs=True)
            _refuse(contents)
            if self._good(contents, freeze):
                return fix_batch(data) if job.dynamic_batch else data
        raise ConversionError(
            "the converter lost the weights, also with the graph frozen; save the model with model.export() or plain tf.Variables"
        )

    def float_file(self, job: Job, report: Report) -> bytes:
        """Give the float file that layers are compared with: the calibrated one, whose names the int8 files share."""
        for freeze in self._ways():
            if self._signatures[0]["calibration"] is not None:
                data = self._calibrate(job, freeze, report)
            else:
                data = self._run(self._new_converter(job, freeze, report))
            if self._good(read_contents(data), freeze):
                return fix_batch(data) if job.dynamic_batch else data
        raise ConversionError("the converter lost the weights")

    def _ways(self) -> tuple[bool, ...]:
        """Say with which values of `freeze` to try."""
        return (True,) if self._freeze else (False, True)

    def _good(self, contents: Contents, freeze: bool) -> bool:
        """Say whether a file may be used; if not, all further ones are made of the frozen graph."""
        # A frozen graph has no composite functions left to make such operators of.
        good = not contents.weightless and (freeze or _KEEP_STATE.isdisjoint(contents.operators))
        self._freeze = self._freeze or not good
        return good

    def _convert(self, job: Job, freeze: bool, report: Report, *, float_outputs: bool = False) -> bytes:
        tf = self._tf
        if job.mode in ("int8", "selective"):
            return self._quantize(job, self._calibrate(job, freeze, report), report, float_outputs=float_outputs)
        converter = self._new_converter(job, freeze, report)
        if job.mode == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if job.mode == "dynamic":
            # Per-channel weights of dense layers need FULLY_CONNECTED version 12 (TFLite 2.17), which the only runtime of
            # 32-bit ARM refuses: a dynamic variant shall load on every board.
            converter._experimental_disable_per_channel_quantization_for_dense_layers = True
        if job.mode == "int16x8":
            ops = tf.lite.OpsSet
            builtin = [ops.TFLITE_BUILTINS] if job.allow_float else []
            converter.target_spec.supported_ops = [
                ops.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8,
                *builtin,
            ]
            converter._experimental_disable_per_channel_quantization_for_dense_layers = not job.per_channel_dense
            converter.representative_dataset = lambda: self._samples(report)
        return self._run(converter)

    def _new_converter(self, job: Job, freeze: bool, report: Report) -> Any:
        """Set up a converter of the traced graph; tracing is done once."""
        key = (freeze, job.dynamic_batch)
        if key not in self._traced:
            report("trace", 0, 0)
            target = self._work / f"traced-{int(freeze)}{int(job.dynamic_batch)}"
            self._traced[key] = trace(
                self._tf, self._loaded, self._signatures, target, freeze=freeze, dynamic_batch=job.dynamic_batch
            )
        report("convert", 0, 0)
        converter = self._tf.lite.TFLiteConverter.from_saved_model(
            self._traced[key], signature_keys=[entry["key"] for entry in self._signatures]
        )
        converter._experimental_default_to_single_batch_in_tensor_list_ops = job.single_batch
        if job.mode != "none":
            converter.optimizations = [self._tf.lite.Optimize.DEFAULT]
        return converter

    def _calibrate(self, job: Job, freeze: bool, report: Report) -> bytes:
        """Give the float file with the ranges of all tensors in it."""
        key = (freeze, job.dynamic_batch)
        if key not in self._calibrated:
            converter = self._new_converter(job, freeze, report)
            converter.optimizations = [self._tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda: self._samples(report)
            converter.target_spec.supported_ops = [self._tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter._experimental_calibrate_only = True
            with calibrated_with_loops():
                self._calibrated[key] = self._run(converter)
        return self._calibrated[key]

    def _quantize(self, job: Job, calibrated: bytes, report: Report, *, float_outputs: bool) -> bytes:
        from tensorflow.lite.python import convert

        report("quantize", 0, 0)
        io = self._tf.float32 if job.io == "float" else getattr(self._tf, job.io)
        try:
            data = convert.mlir_quantize(
                calibrated,
                input_data_type=io,
                output_data_type=self._tf.float32 if float_outputs else io,
                denylisted_nodes=list(job.keep_float) or None,
                disable_per_channel_for_dense_layers=not job.per_channel_dense,
            )
            return quantize_moves(bytes(convert.deduplicate_readonly_buffers(data)), job.keep_float)
        except Exception as error:  # whatever the converter's C++ half raises
            raise explain(error) from error

    def _run(self, converter: Any) -> bytes:
        try:
            return bytes(converter.convert())
        except Exception as error:  # ConverterError, and whatever its Python half raises
            raise explain(error) from error

    def _samples(self, report: Report) -> Iterator[Any]:
        loaded = [(entry["key"], store.load(Path(entry["calibration"]))) for entry in self._signatures]
        total = sum(store.runs(arrays) for _, arrays in loaded)
        done = 0
        for key, arrays in loaded:
            for number in range(store.runs(arrays)):
                sample = {name: np.array(array[number]) for name, array in arrays.items()}
                yield sample if len(loaded) == 1 else (key, sample)
                done += 1
                report("calibrate", done, total)
        report("quantize", 0, 0)


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
    ranges = re.search(r"Max and min for dynamic tensors should be recorded.*Failed for tensor (\S+)", str(error))
    if ranges is not None:
        what = "a loop (recurrent layer)" if "while" in ranges[1] else "this model's integers"
        return ConversionError(
            f"TensorFlow's 16-bit quantizer cannot take {what}: it finds no range for tensor {ranges[1]}; convert to int8, "
            "dynamic or float16"
        )
    sixteen = re.search(r"Quantization to 16x8-bit not yet supported for op: '(\w+)'", str(error))
    if sixteen is not None:
        if sixteen[1] in ("QUANTIZE", "DEQUANTIZE"):
            return ConversionError(
                "the model was trained for 8 bits (it holds fake quantization) and has no 16-bit form; convert to int8"
            )
        return ConversionError(
            f"there is no 16-bit form of {sixteen[1]}: accept it in float with --allow-float-operators, or convert to int8, "
            "dynamic or float16"
        )
    messages = [detail.error_message.strip().splitlines()[0] for detail in details if detail.error_message.strip()]
    return UnexplainedError(
        f"TensorFlow's converter refuses the model: {messages[0] if messages else first_line(error)}"
    )


def _listed(names: Sequence[str]) -> str:
    return f"the operator {names[0]}" if len(names) == 1 else f"the operators {', '.join(names)}"
