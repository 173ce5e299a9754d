"""How far a variant is from the SavedModel: errors, cosine and agreement on the same inputs, and values that are no numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edge_serve_converters.store import Array

# Rounding noise beyond this says nothing and would make two equal conversions differ in print.
DIGITS = 6
# Rows of a classifier's output add up to 1 within this (int8 outputs are multiples of 1/256).
_SUM_TOLERANCE = 1e-3


def rounded(value: float) -> float:
    """Give a figure with the significant digits that manifests keep."""
    return float(f"{value:.{DIGITS}g}")


def compare(reference: Mapping[str, Array], actual: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
    """Compare outputs [runs, *shape] by name; values that the SavedModel itself does not give as numbers are left out.

    Per output: the largest and the mean absolute error, the lowest cosine of a run, and the range of the reference.
    """
    return {name: _compare(reference[name], actual[name]) for name in reference}


def _compare(reference: Array, actual: Array) -> dict[str, Any]:
    wide = reference.reshape(len(reference), -1).astype(np.float64)
    other = actual.reshape(len(actual), -1).astype(np.float64)
    known = np.isfinite(wide)
    wide, other = np.where(known, wide, 0.0), np.where(known, other, 0.0)
    error = np.abs(other - wide)
    count = max(1, int(known.sum()))
    return {
        "max_error": rounded(float(error.max(initial=0.0))),
        "mean_error": rounded(float(error.sum() / count)),
        "cosine": rounded(_lowest_cosine(wide, other)),
        "range": [rounded(float(wide.min(initial=np.inf))), rounded(float(wide.max(initial=-np.inf)))]
        if wide.size
        else [0.0, 0.0],
    }


def _lowest_cosine(reference: Array, actual: Array) -> float:
    lengths = np.linalg.norm(reference, axis=1), np.linalg.norm(actual, axis=1)
    both = lengths[0] * lengths[1]
    # Two vectors of zeros are equal; one alone points nowhere near the other.
    same = (lengths[0] == 0) & (lengths[1] == 0)
    cosine = np.where(same, 1.0, np.sum(reference * actual, axis=1) / np.where(both == 0, 1.0, both))
    return float(np.clip(cosine, -1.0, 1.0).min(initial=1.0))


def is_classifier(output: Array) -> bool:
    """Tell whether an output [runs, batch, classes] looks like probabilities of two or more classes."""
    if output.ndim != 3 or output.shape[2] < 2 or output.dtype.kind != "f" or not np.isfinite(output).all():
        return False
    return bool((output >= 0).all() and (np.abs(output.sum(axis=2) - 1) < _SUM_TOLERANCE).all())


def agreement(reference: Array, actual: Array) -> float:
    """Give the part of all runs for which both choose the same class, from scores [runs, …, classes]."""
    return rounded(float((reference.argmax(axis=-1) == actual.argmax(axis=-1)).mean()))


def broken_values(
    reference: Mapping[str, Array], actual: Mapping[str, Array], runs: Sequence[str] | None = None
) -> list[str]:
    """Say where a variant gives NaN or infinity and the SavedModel a number; `runs` names the inputs."""
    found = []
    for name, wanted in reference.items():
        given = actual[name]
        if given.dtype.kind != "f":
            continue
        wrong: Array = np.any(
            (~np.isfinite(given) & np.isfinite(wanted.astype(np.float64))).reshape(len(given), -1), axis=1
        )
        for number in np.flatnonzero(wrong)[:1].tolist():
            value = given[number][~np.isfinite(given[number])].flat[0]
            where = f"on {runs[number]}" if runs is not None else f"on {int(wrong.sum())} of {len(wrong)} samples"
            found.append(f"output {name!r} is {value} {where}, where the SavedModel gives numbers")
    return found


def tolerance(
    variant: Mapping[str, Array], other_kernels: Mapping[str, Array], steps: Mapping[str, float | None]
) -> dict[str, float]:
    """Say how far another device's result may be from the variant's expected one, by output.

    Kernels (XNNPACK, built-in, other CPUs) round differently. What was measured between two of them on this machine is
    doubled, and is at least two quantization steps, or for floats a thousandth of the largest value.
    """
    allowed = {}
    for name, expected in variant.items():
        wide = expected.astype(np.float64)
        largest = float(np.abs(np.where(np.isfinite(wide), wide, 0.0)).max(initial=0.0))
        measured = float(
            np.nan_to_num(np.abs(other_kernels[name].astype(np.float64) - wide), posinf=0.0).max(initial=0.0)
        )
        step = steps.get(name)
        least = 2 * step if step is not None else 1e-3 * largest + 1e-6
        allowed[name] = rounded(max(2 * measured, least))
    return allowed
