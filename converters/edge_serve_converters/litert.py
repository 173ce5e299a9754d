"""The one place that drives litert-quantizer, inside the child process: a float .tflite file to any mode, without tensorflow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve_converters import store
from edge_serve_converters.channel import Report, first_line
from edge_serve_converters.errors import ConversionError, UnexplainedError
from edge_serve_converters.request import Mode

# TensorFlow's converter leaves weights of fewer values as they are: quantizing them saves next to nothing.
_SMALLEST_WEIGHTS = 1024


class _Runs:
    """Calibration data that the quantizer goes over twice: mapped from disk, one run after the other."""

    def __init__(self, arrays: store.Arrays, report: Report, counted: list[int], total: int) -> None:
        self._arrays = arrays
        self._report = report
        self._counted = counted
        self._total = total

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(store.runs(self._arrays)):
            yield {name: np.asarray(array[number]) for name, array in self._arrays.items()}
            self._counted[0] += 1
            # The first pass only counts.
            self._report("calibrate", max(0, self._counted[0] - self._total), self._total)


class FloatFile:
    """One float .tflite file (as of tflite_source.normalise) and its calibration, which several variants share."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._ranges: dict[int, Any] = {}

    def make(
        self,
        mode: Mode,
        io: str,
        keep_float: Sequence[str],
        samples: Mapping[str, Path],
        report: Report,
        *,
        per_channel_dense: bool,
    ) -> bytes:
        """Quantize, calibrated by `samples` (signature → folder, always the same); ConversionError says why there is no file."""
        if mode == "none":
            return self.data
        if io == "uint8":
            raise ConversionError(
                "the quantizer of .tflite files gives int8 or float inputs and outputs; use --io int8"
            )
        try:
            return self._quantize(mode, io, keep_float, samples, report, per_channel_dense=per_channel_dense)
        except ConversionError:
            raise
        except Exception as error:  # the quantizer raises anything on operators that it does not know
            raise UnexplainedError(f"litert-quantizer refuses the model: {first_line(error)}") from error

    def _quantize(
        self,
        mode: Mode,
        io: str,
        keep_float: Sequence[str],
        samples: Mapping[str, Path],
        report: Report,
        *,
        per_channel_dense: bool,
    ) -> bytes:
        from litert_quantizer import quantizer

        made = quantizer.Quantizer(bytearray(self.data))
        for regex, operation, config, algorithm in _recipe(mode, io, keep_float, per_channel_dense):
            made.update_quantization_recipe(regex, operation, config, algorithm)
        ranges = None
        if mode in ("int8", "selective", "int16x8"):
            ranges = self._calibrate(16 if mode == "int16x8" else 8, samples, report)
        report("quantize", 0, 0)
        return bytes(made.quantize(ranges, enable_progress_report=False).quantized_model)

    def _calibrate(self, bits: int, samples: Mapping[str, Path], report: Report) -> Any:
        """Give the range of every tensor, the smallest and the largest value over all samples."""
        if bits not in self._ranges:
            from litert_quantizer import calibrator, recipe, recipe_manager
            from litert_quantizer.utils import qsv_utils

            manager = recipe_manager.RecipeManager()
            manager.load_quantization_recipe(recipe.static_wi8_ai8() if bits == 8 else recipe.static_wi8_ai16())
            loaded = {key: store.load(folder) for key, folder in samples.items()}
            total, counted = sum(store.runs(arrays) for arrays in loaded.values()), [0]
            found = calibrator.Calibrator(bytearray(self.data), num_threads=1, qsv_update_func=qsv_utils.min_max_update)
            found.calibrate({key: _Runs(arrays, report, counted, total) for key, arrays in loaded.items()}, manager)
            self._ranges[bits] = found.get_model_qsvs()
        return self._ranges[bits]


def _recipe(
    mode: Mode, io: str, keep_float: Sequence[str], per_channel_dense: bool
) -> Iterator[tuple[str, Any, Any, str]]:
    """Give the quantizer's rules: pattern of layer names, operator, configuration, algorithm; later ones win."""
    from litert_quantizer import qtyping
    from litert_quantizer.algorithm_manager import AlgorithmName

    operator = qtyping.TFLOperationName
    minmax, untouched = AlgorithmName.MIN_MAX_UNIFORM_QUANT, AlgorithmName.NO_QUANTIZE

    def tensor(bits: int, granularity: Any, *, symmetric: bool) -> Any:
        return qtyping.TensorQuantizationConfig(num_bits=bits, symmetric=symmetric, granularity=granularity)

    channelwise, tensorwise = qtyping.QuantGranularity.CHANNELWISE, qtyping.QuantGranularity.TENSORWISE
    if mode == "float16":
        half = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
        config = qtyping.OpQuantizationConfig(
            weight_tensor_config=half,
            compute_precision=qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        )
        for name in (
            operator.FULLY_CONNECTED,
            operator.CONV_2D,
            operator.DEPTHWISE_CONV_2D,
            operator.CONV_2D_TRANSPOSE,
            operator.EMBEDDING_LOOKUP,
        ):
            yield ".*", name, config, AlgorithmName.FLOAT_CASTING
        return

    def config_of(granularity: Any) -> Any:
        if mode == "dynamic":
            return qtyping.OpQuantizationConfig(
                weight_tensor_config=tensor(8, granularity, symmetric=True),
                compute_precision=qtyping.ComputePrecision.INTEGER,
                explicit_dequantize=False,
                min_weight_elements=_SMALLEST_WEIGHTS,
            )
        return qtyping.OpQuantizationConfig(
            activation_tensor_config=tensor(16 if mode == "int16x8" else 8, tensorwise, symmetric=mode == "int16x8"),
            weight_tensor_config=tensor(8, granularity, symmetric=True),
            compute_precision=qtyping.ComputePrecision.INTEGER,
            explicit_dequantize=False,
        )

    yield ".*", operator.ALL_SUPPORTED, config_of(channelwise), minmax
    if mode == "dynamic" or not per_channel_dense:
        # One scale for each output of a dense layer needs a FULLY_CONNECTED that the only runtime of 32-bit ARM refuses.
        yield ".*", operator.FULLY_CONNECTED, config_of(tensorwise), minmax
    if mode != "dynamic" and io == "float":
        yield ".*", operator.INPUT, None, untouched
        yield ".*", operator.OUTPUT, None, untouched
    for layer in keep_float:
        yield f"^{re.escape(layer)};?$", operator.ALL_SUPPORTED, None, untouched
