"""Which decoder a pipeline has: classification, detection, or the tensors themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.processing.classify import make_classifier
from edge_serve.processing.detect import make_detector
from edge_serve.processing.tensor import dequantize
from edge_serve.spec import OutputSpec

if TYPE_CHECKING:
    from edge_serve.frame import Array
    from edge_serve.processing.image import Geometry

    Decoder = Callable[[Mapping[str, Array], Geometry | None], dict[str, Any]]


def make_decoder(
    spec: OutputSpec,
    outputs: Mapping[str, TensorSpec],
    labels: tuple[str, ...] | None,
    operator_order: tuple[str, ...] | None = None,
) -> Decoder:
    """Give the function from output tensors (raw dtypes) and the picture's geometry to the result's JSON body.

    ModelError if the specification does not fit the model's outputs.
    """
    if spec.type == "classification":
        classify = make_classifier(spec, outputs, labels)
        return lambda tensors, _geometry: classify(tensors)
    if spec.type == "detection":
        detect = make_detector(spec, outputs, labels, operator_order)
        return lambda tensors, geometry: detect(tensors, geometry if geometry is not None else _unit_square())
    return lambda tensors, _geometry: render_tensors(tensors, outputs)


def _unit_square() -> Geometry:
    """Give the geometry for inputs that were no picture: boxes stay in 0..1."""
    from edge_serve.processing.image import Geometry

    return Geometry(1, 1, 1.0, 1.0, 0.0, 0.0)


def render_tensors(tensors: Mapping[str, Array], outputs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """Give {"tensors": {name: {"dtype", "shape", "data"}}}; quantized outputs as real numbers, NaN and infinity as null."""
    rendered = {}
    for name, raw in tensors.items():
        spec = outputs[name]
        values = raw if spec.scale is None else dequantize(raw, spec)
        rendered[name] = {"dtype": _name(values.dtype), "shape": list(values.shape), "data": _numbers(values)}
    return {"tensors": rendered}


@cache
def _name(dtype: np.dtype[Any]) -> str:
    """Give a dtype's name; numpy makes it anew each time, which takes longer than reading a small tensor."""
    return str(dtype)


def _numbers(values: Array) -> Any:
    """Give an array as nested lists of JSON's numbers."""
    dtype = values.dtype
    if dtype.kind != "f":
        return values.tolist()
    if values.size == 1:
        # What a regression gives; numpy's functions take longer for one number than all that is done with it.
        number = float(str(values.reshape(-1)[0])) if dtype.itemsize < 8 else float(values.reshape(-1)[0])
        data: Any = number if math.isfinite(number) else None
        for _ in values.shape:
            data = [data]
        return data
    # float32 printed as float64 shows digits that the tensor never had.
    data = _shorten(values).tolist() if dtype.itemsize < 8 else values.tolist()
    return data if np.isfinite(values).all() else _null_non_finite(data)


def _shorten(values: Array) -> Any:
    """Give float32 values as the float64 numbers with the fewest digits that read back as the same float32."""
    flat = [float(str(value)) for value in values.reshape(-1)]
    return np.array(flat, np.float64).reshape(values.shape)


def _null_non_finite(data: Any) -> Any:
    if isinstance(data, list):
        return [_null_non_finite(item) for item in data]
    return data if np.isfinite(data) else None
