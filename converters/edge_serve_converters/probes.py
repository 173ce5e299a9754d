"""Inputs that no data set needs to hold: random ones where there is no calibration data, zeros and extremes always.

A float16 file may be right on every photo and NaN on a black one; an event detector meets silence all day.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_serve_converters.plan import InputPlan, SignaturePlan
from edge_serve_converters.store import Array, Arrays

RANDOM_SAMPLES = 16
PROBE_NAMES = ("zeros", "the smallest value everywhere", "the largest value everywhere")
# Where no data say what is large: what standardized or 0..1 inputs rarely leave.
_FLOAT_EXTREMES = (-3.0, 3.0)


def random_inputs(signature: SignaturePlan, seed: int) -> Arrays:
    """Make seeded random inputs, input name → [RANDOM_SAMPLES, *shape]: normal for floats, any value for 8-bit integers.

    Wider integers are mostly indices whose range nobody knows here; they are drawn from 0 and 1.
    """
    rng = np.random.default_rng(seed)
    return {entry.name: _random(entry, rng) for entry in signature.inputs}


def _random(entry: InputPlan, rng: np.random.Generator) -> Array:
    shape = (RANDOM_SAMPLES, *entry.shape)
    dtype = np.dtype(entry.dtype)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if dtype.kind in "iu" and dtype.itemsize == 1:
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    return rng.integers(0, 2, shape).astype(dtype)


Extremes = dict[str, tuple[float, float]]


def extremes_of(*parts: Mapping[str, Array]) -> Extremes:
    """Give the smallest and the largest value of each input in the data."""
    return {
        name: (min(part[name].min().item() for part in parts), max(part[name].max().item() for part in parts))
        for name in parts[0]
    }


def guessed_extremes(signature: SignaturePlan) -> Extremes:
    """Give extremes where there is no data."""
    guessed: Extremes = {}
    for entry in signature.inputs:
        dtype = np.dtype(entry.dtype)
        if dtype.kind == "f":
            guessed[entry.name] = _FLOAT_EXTREMES
        elif dtype.kind in "iu" and dtype.itemsize == 1:
            limits = np.iinfo(dtype)
            guessed[entry.name] = limits.min, limits.max
        else:
            guessed[entry.name] = 0, 1
    return guessed


def make_probes(signature: SignaturePlan, extremes: Extremes) -> Arrays:
    """Make the inputs of PROBE_NAMES, input name → [3, *shape]."""
    return {
        entry.name: np.stack([np.full(entry.shape, value).astype(entry.dtype) for value in (0, *extremes[entry.name])])
        for entry in signature.inputs
    }
