"""How far a variant is from the source model: errors, SQNR, cosine and agreement on the same inputs, and values that are no numbers.

Outputs may be gigabytes (segmentation): they are read from disk in pieces, so that the figures need a few megabytes of memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edge_serve_converters.store import Array

# Rounding noise beyond this says nothing and would make two equal conversions differ in print.
DIGITS = 6
# A ratio of powers beyond this many decibels means "equal" or "nothing in common"; float64 resolves no more, and JSON
# has no infinity.
MAX_DB = 200.0
# Values in one piece: 4 MB as float64, and about ten pieces are alive at a time.
PIECE = 2**19
# Rows of a classifier's output add up to 1 within this (int8 outputs are multiples of 1/256).
_SUM_TOLERANCE = 1e-3
# Two scores this close are a tie: two steps of the int8 form of probabilities, whose scale TFLite fixes at 1/256.
TIE = 2 / 256
# A run whose vectors are both shorter than this part of the usual length (RMS over the runs) is near silence: what an
# 8-bit tensor makes of it points anywhere. Its error still counts in every other figure.
SILENT = 0.1


def rounded(value: float) -> float:
    """Give a figure with the significant digits that manifests keep."""
    return float(f"{value:.{DIGITS}g}")


def decibels(signal: float, noise: float) -> float:
    """Give 10 * log10(signal / noise) of two powers, within ±MAX_DB; no noise is MAX_DB, noise alone is -MAX_DB."""
    if noise <= 0:
        return MAX_DB
    if signal <= 0:
        return -MAX_DB
    # Nobody needs a millionth of a decibel, and "-1e-15" for equal powers would only puzzle.
    return round(min(MAX_DB, max(-MAX_DB, 10 * (math.log10(signal) - math.log10(noise)))), DIGITS) + 0.0


def compare(
    reference: Mapping[str, Array], actual: Mapping[str, Array], scores: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Compare outputs [runs, *shape] by name; values that the source model itself does not give as numbers are left out.

    Per output, with the error as actual - reference:

    - max_error, mean_error: of the absolute error; range: the smallest and the largest value of the reference.
    - sqnr_db: signal to quantization noise, 10 * log10(sum(reference²) / sum(error²)) over all runs.
    - variation_db: the same, but only what differs between the runs counts as signal: the sum of
      (reference - its mean over the runs)². An answer that never changes gets 0 dB at best, however large it is: it is
      1 - R² in decibels. Absent with one run, and where the reference hardly varies (under 80 dB below its own power).
    - cosine, mean_cosine: the lowest and the mean of the runs; near silent ones are left out (see SILENT).
    - values: how many one run has.
    - broken: how many values are no numbers although the reference's are; absent if there are none.
    - for outputs of whole numbers: equal, the part of the values that are the same, and choices, how many there are.
    - for scores (outputs named in `scores`, and those that look like probabilities) [runs, …, classes]: agreement, the
      part of all choices (runs, or pixels) that are the same; clear_agreement, the same but with ties of the reference
      forgiven (see TIE); choices, how many there are.
    """
    return {
        name: {
            **_compare(reference[name], actual[name]),
            **(_equal(reference[name], actual[name]) if reference[name].dtype.kind in "iub" else {}),
            **(_choices(reference[name], actual[name]) if name in scores or are_scores(reference[name]) else {}),
        }
        for name in reference
    }


def overall(outputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Give the worst figure of all outputs of `compare`: max_error, mean_error, cosine, sqnr_db, variation_db if known."""
    figures = list(outputs.values())
    worst: dict[str, Any] = {
        name: pick(entry[name] for entry in figures)
        for name, pick in (("max_error", max), ("mean_error", max), ("cosine", min), ("sqnr_db", min))
    }
    known = [entry["variation_db"] for entry in figures if "variation_db" in entry]
    return {**worst, "variation_db": min(known)} if known else worst


def _pieces(runs: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Cut [runs, width] into pieces of at most PIECE values; all runs of a band of columns come one after the other."""
    for left in range(0, width, PIECE):
        right = min(width, left + PIECE)
        rows = max(1, PIECE // (right - left))
        for top in range(0, runs, rows):
            yield slice(top, min(runs, top + rows)), slice(left, right)


def _part(array: Array, rows: slice, columns: slice) -> Array:
    """Give a piece of an array [runs, *shape] as [rows, columns]; nothing is copied."""
    taken = array[rows]
    return taken.reshape(len(taken), -1)[:, columns]


def _width(array: Array) -> int:
    return math.prod(array.shape[1:])


def _compare(reference: Array, actual: Array) -> dict[str, Any]:
    runs, width = len(reference), _width(reference)
    dots, signal, given_power = np.zeros((3, runs))
    noise = total = largest = variation = 0.0
    low, high = np.inf, -np.inf
    known_values = broken = 0
    first: Array = np.zeros(0)
    sums: Array = np.zeros(0)
    for rows, columns in _pieces(runs, width):
        wide = _part(reference, rows, columns).astype(np.float64)
        given = _part(actual, rows, columns).astype(np.float64)
        known = np.isfinite(wide)
        wrong = known & ~np.isfinite(given)
        known_values += int(np.count_nonzero(known))
        broken += int(np.count_nonzero(wrong))
        wide[~known] = 0.0
        given[~known | wrong] = 0.0
        low, high = min(low, float(wide.min())), max(high, float(wide.max()))
        dots[rows] += np.einsum("ij,ij->i", wide, given)
        signal[rows] += np.einsum("ij,ij->i", wide, wide)
        given_power[rows] += np.einsum("ij,ij->i", given, given)
        given -= wide
        noise += float(np.einsum("ij,ij->", given, given))
        np.abs(given, out=given)
        total += float(given.sum())
        largest = max(largest, float(given.max()))
        # Variance from sums of differences to the first run: plain sums of squares would lose a small variation
        # around a large offset.
        if rows.start == 0:
            variation -= float(np.dot(sums, sums)) / max(1, runs)
            first, sums = wide[0].copy(), np.zeros(wide.shape[1])
        wide -= first
        sums += wide.sum(axis=0)
        variation += float(np.einsum("ij,ij->", wide, wide))
    variation -= float(np.dot(sums, sums)) / max(1, runs)
    power = float(signal.sum())
    cosines = _cosines(dots, signal, given_power)
    figures: dict[str, Any] = {
        "max_error": rounded(largest),
        "mean_error": rounded(total / max(1, known_values)),
        "sqnr_db": rounded(-MAX_DB if broken else decibels(power, noise)),
        "cosine": rounded(float(cosines.min(initial=1.0))),
        "mean_cosine": rounded(float(cosines.mean()) if len(cosines) else 1.0),
        "range": [rounded(low), rounded(high)] if low <= high else [0.0, 0.0],
        "values": width,
    }
    # Below -80 dB a variation is a rounding of float16 weights, not something that the model says.
    if runs > 1 and variation > 1e-8 * power:
        figures["variation_db"] = rounded(-MAX_DB if broken else decibels(variation, noise))
    if broken:
        figures["broken"] = broken
    return figures


def _cosines(dots: Array, reference: Array, actual: Array) -> Array:
    """Give the cosine of each run from its dot product and squared lengths; near silent runs are left out."""
    both = np.sqrt(reference) * np.sqrt(actual)
    # Two vectors of zeros are equal; one alone points nowhere near the other.
    same = (reference == 0) & (actual == 0)
    cosine: Array = np.clip(np.where(same, 1.0, dots / np.where(both == 0, 1.0, both)), -1.0, 1.0)
    silent = SILENT**2 * (reference.mean() if len(reference) else 0.0)
    return cosine[(reference >= silent) | (actual >= silent)]


def is_classifier(output: Array) -> bool:
    """Tell whether an output [runs, batch, classes] looks like probabilities of two or more classes."""
    return output.ndim == 3 and are_scores(output)


def are_scores(output: Array) -> bool:
    """Tell whether an output [runs, …, classes] looks like probabilities of two or more classes, for each pixel perhaps."""
    if output.ndim < 3 or output.shape[-1] < 2 or output.dtype.kind != "f" or not output.size:
        return False
    for rows in _rows(output):
        if not (rows >= 0).all() or not (np.abs(rows.sum(axis=1, dtype=np.float64) - 1) < _SUM_TOLERANCE).all():
            return False  # NaN compares as false, infinity has no sum of 1
    return True


def _rows(*outputs: Array) -> Iterator[Any]:
    """Give [n, classes] of one output [runs, …, classes], or pairs of them of two."""
    flat = [output.reshape(-1, output.shape[-1]) for output in outputs]
    step = max(1, PIECE // flat[0].shape[1])
    for start in range(0, len(flat[0]), step):
        parts = [array[start : start + step] for array in flat]
        yield parts[0] if len(parts) == 1 else tuple(parts)


def agreement(reference: Array, actual: Array) -> float:
    """Give the part of all runs for which both choose the same class, from scores [runs, …, classes]."""
    return float(_choices(reference, actual)["agreement"])


def _choices(reference: Array, actual: Array) -> dict[str, Any]:
    count, other, clear = 0, 0, 0
    low, high = np.inf, -np.inf
    for rows in _rows(reference):
        known = rows[np.isfinite(rows)]
        low, high = float(known.min(initial=low)), float(known.max(initial=high))
    # Scores that are no probabilities have no fixed step: an 8-bit tensor divides their range by 255.
    tie = TIE if low >= 0 and high <= 1 else TIE * (high - low)
    for wanted, given in _rows(reference, actual):
        different = wanted.argmax(axis=1) != given.argmax(axis=1)
        count += len(wanted)
        other += int(np.count_nonzero(different))
        if wanted.shape[1] > 1 and different.any():
            best = np.partition(wanted[different].astype(np.float64), -2, axis=1)[:, -2:]
            clear += int(np.count_nonzero(~(best[:, 1] - best[:, 0] <= tie)))
    return {
        "agreement": rounded(1 - other / max(1, count)),
        "clear_agreement": rounded(1 - clear / max(1, count)),
        "choices": count,
    }


def _equal(reference: Array, actual: Array) -> dict[str, Any]:
    same = 0
    for rows, columns in _pieces(len(reference), _width(reference)):
        same += int(np.count_nonzero(_part(reference, rows, columns) == _part(actual, rows, columns)))
    return {"equal": rounded(same / max(1, reference.size)), "choices": reference.size}


def broken_values(
    reference: Mapping[str, Array], actual: Mapping[str, Array], runs: Sequence[str] | None = None
) -> list[str]:
    """Say where a variant gives NaN or infinity and the source model a number; `runs` names the inputs."""
    found = []
    for name, wanted in reference.items():
        given = actual[name]
        if given.dtype.kind != "f":
            continue
        wrong: Array = np.zeros(len(given), np.bool_)
        value = 0.0
        for rows, columns in _pieces(len(given), _width(given)):
            part = _part(given, rows, columns)
            lost = ~np.isfinite(part) & np.isfinite(_part(wanted, rows, columns))
            if lost.any():
                hit: Any = lost.any(axis=1)
                if not wrong.any():
                    number = int(hit.argmax())
                    value = float(part[number][lost[number]][0])
                wrong[rows] |= hit
        if wrong.any():
            where = (
                f"on {runs[int(wrong.argmax())]}"
                if runs is not None
                else f"on {int(wrong.sum())} of {len(wrong)} samples"
            )
            found.append(f"output {name!r} is {value} {where}, where the source model gives numbers")
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
        least = max(2 * step if step is not None else 0.0, 1e-3 * largest + 1e-6)
        allowed[name] = rounded(max(2 * measured, least))
    return allowed
