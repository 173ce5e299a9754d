"""CSV as calibration data: a row is one sample, or the rows are a time series that is cut into windows as on the device."""

from __future__ import annotations

import csv
import hashlib
import math
from pathlib import Path

import numpy as np

from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec
from edge_serve_converters.plan import InputPlan, Shape, SignaturePlan, as_input
from edge_serve_converters.request import HELD_BACK
from edge_serve_converters.store import Array, Arrays

DELIMITERS = ",;\t"
FLOAT32_MAX = float(np.finfo(np.float32).max)


class TableSource:
    """A CSV file of numbers, with or without a header."""

    def __init__(self, path: Path, spec: InputSpec) -> None:
        self.path = path
        self._spec = spec
        self._rows = _read(path, spec.channels)
        self._starts: Array | None = None

    def hint(self, signature: str, name: str) -> Shape | None:
        """A table does not say how rows become samples; only the signature (or --length) does."""
        return None

    def open(self, signature: SignaturePlan) -> tuple[int, int | None]:
        """Settle what a row is: a sample, or one moment of a window."""
        if len(signature.inputs) != 1:
            names = ", ".join(entry.name for entry in signature.inputs)
            raise UsageError(
                f"{self.path}: signature {signature.key} has several inputs ({names}); give an .npz with these names"
            )
        entry = signature.inputs[0]
        columns = self._rows.shape[1]
        length, channels = _window(entry, self._spec)
        several = sum(size != 1 for size in entry.sample_shape) > 1
        as_windows = self._spec.kind == "window" or (columns != math.prod(entry.sample_shape) and several)
        if not as_windows:
            if columns != math.prod(entry.sample_shape):
                raise UsageError(self._misfit(entry, columns, math.prod(entry.sample_shape)))
            return len(self._rows), None
        if columns != channels:
            raise UsageError(self._misfit(entry, columns, channels))
        if len(self._rows) < length:
            raise UsageError(
                f"{self.path}: has {len(self._rows)} rows; one window of input {entry.name!r} takes {length}"
            )
        return self._cut(length)

    def _misfit(self, entry: InputPlan, columns: int, wanted: int) -> str:
        return (
            f"{self.path}: has {columns} columns of numbers; input {entry.name!r} of shape {list(entry.shape)} takes {wanted}. "
            "Choose columns by their names in the header with --channels a,b,…"
        )

    def _cut(self, length: int) -> tuple[int, int | None]:
        """Place the windows. Where they overlap, those held back come from the end and share no row with the others."""
        hop = self._spec.hop or length
        last = len(self._rows) - length
        starts = np.arange(0, last + 1, hop)
        if hop >= length:
            self._starts = starts
            return len(starts), None
        border = starts[round(len(starts) * (1 - HELD_BACK))] if len(starts) > 1 else 0
        head = starts[starts + length <= border]
        tail = starts[starts >= border]
        self._starts = np.concatenate([head, tail])
        return len(self._starts), len(head)

    def take(self, signature: SignaturePlan, indices: Array) -> Arrays:
        """Give samples by index; windows are normalized by mean and std, as the device does it."""
        entry = signature.inputs[0]
        if self._starts is None:
            return {entry.name: as_input(self._rows[indices], entry, str(self.path))}
        length, channels = _window(entry, self._spec)
        rows = self._rows
        if self._spec.mean is not None or self._spec.std is not None:
            rows = (rows - self._per_channel(self._spec.mean, 0.0, channels)) / self._per_channel(
                self._spec.std, 1.0, channels
            )
        windows = np.stack([rows[start : start + length] for start in self._starts[indices]])
        return {entry.name: as_input(windows, entry, str(self.path))}

    def _per_channel(self, values: tuple[float, ...] | None, default: float, channels: int) -> Array:
        given = np.array(values or (default,), np.float32)
        if given.size not in (1, channels):
            raise UsageError(
                f"--mean and --std take one number or {channels}, one for each channel; {given.size} were given"
            )
        return given

    def fingerprint(self) -> str:
        """Hash the numbers that are used."""
        return hashlib.sha256(f"{self._rows.shape}\n".encode() + self._rows.tobytes()).hexdigest()


def _window(entry: InputPlan, spec: InputSpec) -> tuple[int, int]:
    """Give length and channels of a window input: [length], [length, channels], either with further ones."""
    sizes = [size for size in entry.sample_shape if size != 1] or [1]
    if len(sizes) == 1:
        channels = len(spec.channels) if spec.channels and sizes[0] % len(spec.channels) == 0 else 1
        if spec.length is not None and sizes[0] % spec.length == 0:
            channels = sizes[0] // spec.length
        return sizes[0] // channels, channels
    return math.prod(sizes[:-1]), sizes[-1]


def _read(path: Path, channels: tuple[str, ...] | None) -> Array:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            first = stream.readline()
            stream.seek(0)
            delimiter = max(DELIMITERS, key=first.count)
            reader = csv.reader(stream, delimiter=delimiter)
            lines = [(reader.line_num, line) for line in reader if any(cell.strip() for cell in line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: is no readable CSV file ({error})") from error
    if not lines:
        raise UsageError(f"{path}: is empty; calibration needs rows of numbers")
    header = (
        None if all(_number(cell) is not None for cell in lines[0][1]) else [cell.strip() for cell in lines.pop(0)[1]]
    )
    if not lines:
        raise UsageError(f"{path}: has a header and no rows; calibration needs rows of numbers")
    names = header or [str(number + 1) for number in range(len(lines[0][1]))]
    chosen = list(range(len(names)))
    if channels is not None and header is not None:
        missing = [name for name in channels if name not in names]
        if missing:
            raise UsageError(f"{path}: has no column {missing[0]!r}; it has: {', '.join(names)}")
        chosen = [names.index(name) for name in channels]
    rows = np.empty((len(lines), len(chosen)), np.float32)
    for row, (number, line) in zip(rows, lines, strict=True):
        if len(line) != len(names):
            raise UsageError(f"{path}, line {number}: has {len(line)} cells, the first line has {len(names)}")
        for place, column in enumerate(chosen):
            value = _number(line[column])
            if value is None or not abs(value) <= FLOAT32_MAX:
                raise UsageError(
                    f"{path}, line {number}, column {names[column]!r}: {line[column]!r} is no finite number; leave the row out"
                )
            row[place] = value
    return rows


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
