"""How the values of the calibration data are distributed, for the report: a few figures and a histogram for each input."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_serve_converters.calibration import Drawn
from edge_serve_converters.checks import drawn_values
from edge_serve_converters.quality import rounded
from edge_serve_converters.store import Array

BINS = 32


def statistics(drawn: Drawn) -> dict[str, Any]:
    """Describe the calibration part by input: min, max, mean, std, p01, p99 and a histogram (33 edges, 32 counts).

    Least, largest, mean and deviation are of all values; percentiles and counts of at most a million, always the same ones.
    """
    return {name: _describe(array) for name, array in drawn.calibration.items()}


def _describe(array: Array) -> dict[str, Any]:
    low, high = float(array.min()), float(array.max())
    values = drawn_values(array).astype(np.float64)
    # numpy would widen the range of equal values by 0.5 on both sides, which large numbers swallow.
    span = (low, high) if high > low else (low - max(0.5, abs(low) / 2), high + max(0.5, abs(high) / 2))
    counts, edges = np.histogram(values, BINS, span)
    first, last = np.percentile(values, [1, 99])
    return {
        "min": rounded(low),
        "max": rounded(high),
        "mean": rounded(float(array.mean(dtype=np.float64))),
        "std": rounded(_deviation(array)),
        "p01": rounded(float(first)),
        "p99": rounded(float(last)),
        "histogram": {"edges": [rounded(float(edge)) for edge in edges], "counts": [int(count) for count in counts]},
    }


def _deviation(array: Array) -> float:
    """Give the standard deviation, run by run: numpy would make a second copy of everything, in 64 bits."""
    mean = float(array.mean(dtype=np.float64))
    total = sum(float(np.square(run.astype(np.float64) - mean).sum()) for run in array)
    return float(np.sqrt(total / array.size))
