"""Lets one variant of a model stand in for another: the tensors of a float file as an int8 file has them, and the other way.

Whoever feeds a pipeline knows the tensors of one variant (raw payloads have its dtype). Which variant runs is chosen by
measurement, and changes when a delegate fails: nobody outside shall notice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.errors import InferenceError, InputError, ModelError
from edge_serve.processing.tensor import dequantize, quantize

if TYPE_CHECKING:
    from pathlib import Path

    from edge_serve.frame import Array
    from edge_serve.model.delegate import Claims, Runnable

Convert = Callable[["Array"], "Array"]


class AdaptedEngine:
    """An engine that shows the tensors of another variant, and converts at its border."""

    def __init__(self, engine: Runnable, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> None:
        """Take an engine and the tensors that it shall show; ModelError if it cannot stand in for a model with these."""
        self.inputs = dict(inputs)
        self.outputs = dict(outputs)
        self._engine = engine
        self.path: Path = engine.path
        self.signature = engine.signature
        self.threads = engine.threads
        self.delegate = engine.delegate
        self.claims: Claims = engine.claims
        self.detection_outputs = engine.detection_outputs
        if inputs.keys() != engine.inputs.keys() or outputs.keys() != engine.outputs.keys():
            raise ModelError(f"{engine.path}: has other inputs or outputs than the variant that it shall stand in for")
        self._into = {name: _converter(spec, engine.inputs[name]) for name, spec in self.inputs.items()}
        self._out = {name: _converter(engine.outputs[name], spec) for name, spec in self.outputs.items()}

    @property
    def operators(self) -> dict[str, int]:
        """Operator name → how many of them the model has."""
        return self.claims.operators

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once, on and with arrays of the shown tensors' dtypes; raises what the engine raises."""
        given = {name: array if (to := self._into[name]) is None else to(array) for name, array in inputs.items()}
        outputs = self._engine.run(given)
        try:
            return {name: array if (to := self._out[name]) is None else to(array) for name, array in outputs.items()}
        except InputError as error:
            raise InferenceError(f"{self.path.name}: an output {error}") from error

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


def adapt(engine: Runnable, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> Runnable:
    """Give an engine that shows these tensors: itself, where it has them. ModelError if it cannot stand in for them."""
    if _all_same(engine.inputs, inputs) and _all_same(engine.outputs, outputs):
        return engine
    return AdaptedEngine(engine, inputs, outputs)


def _all_same(have: Mapping[str, TensorSpec], want: Mapping[str, TensorSpec]) -> bool:
    return have.keys() == want.keys() and all(_same(have[name], spec) for name, spec in want.items())


def _same(one: TensorSpec, other: TensorSpec) -> bool:
    return (one.dtype, one.shape, one.scale, one.zero_point) == (
        other.dtype,
        other.shape,
        other.scale,
        other.zero_point,
    )


def _converter(have: TensorSpec, want: TensorSpec) -> Convert | None:
    if have.shape != want.shape:
        raise ModelError(
            f"tensor {have.name!r} has shape {list(have.shape)}, and {list(want.shape)} in the variant that stands in"
        )
    if _same(have, want):
        return None
    if _is_real(have) and _is_real(want):

        def convert(array: Array) -> Array:
            real = array if have.scale is None else dequantize(array, have)
            return real.astype(want.dtype) if want.scale is None else quantize(real, want)

        return convert
    if np.issubdtype(have.dtype, np.integer) and np.issubdtype(want.dtype, np.integer):
        return lambda array: array.astype(want.dtype)
    raise ModelError(f"tensor {have.name!r} is {have.dtype}, and {want.dtype} in the variant that stands in for it")


def _is_real(spec: TensorSpec) -> bool:
    """Say whether a tensor holds real numbers, quantized or not."""
    return spec.scale is not None or np.issubdtype(spec.dtype, np.floating)
