"""Windows of a signal: what length and how many channels an input takes, and the normalization that the device applies."""

from __future__ import annotations

import math

import numpy as np

from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec
from edge_serve_converters.plan import InputPlan
from edge_serve_converters.store import Array


def window_layout(entry: InputPlan, spec: InputSpec) -> tuple[int, int]:
    """Give length and channels of a window input: [length], [length, channels], either with further ones."""
    sizes = [size for size in entry.sample_shape if size != 1] or [1]
    if len(sizes) == 1:
        channels = len(spec.channels) if spec.channels and sizes[0] % len(spec.channels) == 0 else 1
        if spec.length is not None and sizes[0] % spec.length == 0:
            channels = sizes[0] // spec.length
        return sizes[0] // channels, channels
    return math.prod(sizes[:-1]), sizes[-1]


def window_starts(rows: int, length: int, hop: int | None) -> Array:
    """Give the first row of each window in a recording; what is left at its end is no window."""
    return np.arange(0, rows - length + 1, hop or length)


def normalize(rows: Array, spec: InputSpec) -> Array:
    """Subtract the mean and divide by std, [..., channels], where the specification says them; else give rows back.

    UsageError if there are neither one number nor one for each channel, or a std is 0.
    """
    if spec.mean is None and spec.std is None:
        return rows
    channels = rows.shape[-1]
    mean, std = _per_channel(spec.mean, 0.0, channels), _per_channel(spec.std, 1.0, channels)
    if not std.all():
        raise UsageError("--std holds a zero; every channel is divided by it")
    normalized: Array = (rows - mean) / std
    return normalized


def _per_channel(values: tuple[float, ...] | None, default: float, channels: int) -> Array:
    given = np.array(values or (default,), np.float32)
    if given.size not in (1, channels):
        raise UsageError(
            f"--mean and --std take one number or {channels}, one for each channel; {given.size} were given"
        )
    return given
