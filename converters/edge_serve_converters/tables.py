"""CSV as calibration data: a row is one sample, or the rows are a time series that is cut into windows as on the device."""

from __future__ import annotations

import array
import csv
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec
from edge_serve_converters.plan import InputPlan, SignaturePlan, as_input
from edge_serve_converters.source import LABEL_NAMES, Layout, OwnLabels, Source, only_input
from edge_serve_converters.store import Array, Arrays
from edge_serve_converters.windows import normalize, window_layout, window_starts

DELIMITERS = ",;\t"
FLOAT32_MAX = float(np.finfo(np.float32).max)
# 1 GiB of float32; whoever has more recordings than that has them in a binary format.
MAX_VALUES = 2**28
# Columns that a message proposes by name.
MOST_NAMED = 12


@dataclass(frozen=True, slots=True)
class _Table:
    rows: Array
    """[rows, columns] float32, finite."""
    label: str | None
    labels: list[str]


class TableSource(Source):
    """A CSV file of numbers, with or without a header. A column `label` that is not among the channels holds labels."""

    unit = "row"

    def __init__(self, path: Path, spec: InputSpec) -> None:
        super().__init__(path, spec)
        self._table = _read(path, spec.channels)
        self._rows = self._table.rows
        self._starts: Array | None = None
        self._length = 1

    @property
    def as_is(self) -> bool:
        """Rows that are samples are taken as they are; windows are normalized here."""
        return self._starts is None

    @property
    def units(self) -> int:
        """Give the number of rows."""
        return len(self._rows)

    def open(self, signature: SignaturePlan) -> Layout:
        """Settle what a row is: a sample, or one moment of a window."""
        entry = only_input(self.path, signature)
        columns = self._rows.shape[1]
        length, channels = window_layout(entry, self.spec)
        several = sum(size != 1 for size in entry.sample_shape) > 1
        as_windows = self.spec.kind == "window" or (columns != math.prod(entry.sample_shape) and several)
        if not as_windows:
            if columns != math.prod(entry.sample_shape):
                raise UsageError(self._misfit(entry, columns, math.prod(entry.sample_shape)))
            self._starts = None
            return Layout(len(self._rows))
        if columns != channels:
            raise UsageError(self._misfit(entry, columns, channels))
        if len(self._rows) < length:
            raise UsageError(
                f"{self.path}: has {len(self._rows)} rows; one window of input {entry.name!r} takes {length}"
            )
        self._length = length
        self._starts = window_starts(len(self._rows), length, self.spec.hop)
        overlapping = (self.spec.hop or length) < length
        return Layout(len(self._starts), self._starts if overlapping else None, length)

    def _misfit(self, entry: InputPlan, columns: int, wanted: int) -> str:
        return (
            f"{self.path}: has {columns} columns of numbers; input {entry.name!r} of shape {list(entry.shape)} takes {wanted}. "
            "Choose columns by their names in the header with --channels a,b,…"
        )

    def take(self, signature: SignaturePlan, indices: Array) -> Arrays:
        """Give samples by index; windows are normalized by mean and std, as the device does it."""
        entry = only_input(self.path, signature)
        if self._starts is None:
            return {entry.name: as_input(self._rows[indices], entry, str(self.path))}
        windows = np.stack([self._rows[start : start + self._length] for start in self._starts[indices]])
        return {entry.name: as_input(normalize(windows, self.spec), entry, str(self.path))}

    def own_labels(self) -> OwnLabels | None:
        """Give the column `label` or `labels`."""
        if self._table.label is None:
            return None
        return OwnLabels(self._table.label, np.array(self._table.labels))

    def fold(self, values: Array) -> Array:
        """Give each window the label that most of its rows have; of several the one that was there last."""
        if self._starts is None:
            return values
        if values.ndim != 1:
            raise UsageError(f"{self.path}: masks are for pictures and .npz data; a row has one class")
        return majority(values, self._starts, self._length)

    def fingerprint(self) -> str:
        """Hash the numbers that are used."""
        return hashlib.sha256(f"{self._rows.shape}\n".encode() + self._rows.tobytes()).hexdigest()


def majority(values: Array, starts: Array, length: int) -> Array:
    """Give the most frequent value of values[start : start + length] for each start; ties go to the value seen last."""
    best = np.full(len(starts), -1)
    most, latest = np.zeros(len(starts), np.int64), np.full(len(starts), -1)
    rows = np.arange(len(values))
    for value in np.unique(values):
        here = values == value
        seen = np.concatenate([[0], np.cumsum(here)])
        count = seen[starts + length] - seen[starts]
        last = np.maximum.accumulate(np.where(here, rows, -1))[starts + length - 1]
        better = (count > most) | ((count == most) & (count > 0) & (last > latest))
        best = np.where(better, value, best)
        most, latest = np.where(better, count, most), np.where(better, last, latest)
    return best


def _read(path: Path, channels: tuple[str, ...] | None) -> _Table:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            return _parse(path, _lines(stream), channels)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: is no readable CSV file ({error})") from error


def _lines(stream: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Give line number and cells of each line that is not empty."""
    first = stream.readline()
    stream.seek(0)
    reader = csv.reader(stream, delimiter=max(DELIMITERS, key=first.count))
    return ((reader.line_num, line) for line in reader if any(cell.strip() for cell in line))


def _parse(path: Path, lines: Iterator[tuple[int, list[str]]], channels: tuple[str, ...] | None) -> _Table:
    first = next(lines, None)
    if first is None:
        raise UsageError(f"{path}: is empty; calibration needs rows of numbers")
    names, header = [str(number + 1) for number in range(len(first[1]))], False
    if any(_number(cell) is None for cell in first[1]):
        names, header = [cell.strip() for cell in first[1]], True
    chosen, label = _choose(path, names, channels if header else None, header)
    values, labels, count = array.array("f"), [], 0
    for number, line in lines if header else _again(first, lines):
        if len(line) != len(names):
            raise UsageError(f"{path}, line {number}: has {len(line)} cells, the first line has {len(names)}")
        for column in chosen:
            value = _number(line[column])
            if value is None or not abs(value) <= FLOAT32_MAX:
                where = f"{path}, line {number}, column {names[column]!r}: {line[column]!r}"
                if value is None and header and count == 0:  # not one bad row, but a column of something else
                    raise UsageError(f"{where} is text; {_numeric(names, line, label)}")
                raise UsageError(f"{where} is no finite number; leave the row out")
            values.append(value)
        if label is not None:
            labels.append(line[label].strip())
        count += 1
        if len(values) > MAX_VALUES:
            raise UsageError(f"{path}: holds more than {MAX_VALUES} numbers; a few thousand samples calibrate as well")
    if not count:
        raise UsageError(f"{path}: has a header and no rows; calibration needs rows of numbers")
    rows = np.frombuffer(values, np.float32).reshape(count, len(chosen))
    return _Table(rows, names[label] if label is not None else None, labels)


def _numeric(names: list[str], line: list[str], label: int | None) -> str:
    """Say how the columns that are numbers are chosen, by their names if they are few."""
    found = [name for place, name in enumerate(names) if _number(line[place]) is not None and place != label]
    shown = ",".join(found) if 0 < len(found) <= MOST_NAMED else "a,b,…"
    return f"choose the columns that are the samples by their names in the header: --channels {shown}"


def _again(first: tuple[int, list[str]], rest: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    yield first
    yield from rest


def _choose(
    path: Path, names: list[str], channels: tuple[str, ...] | None, header: bool
) -> tuple[list[int], int | None]:
    """Give the columns that are samples, and the one that holds labels."""
    label = next((place for place, name in enumerate(names) if header and name.lower() in LABEL_NAMES), None)
    if channels is None:
        chosen = [place for place in range(len(names)) if place != label]
        if not chosen:
            raise UsageError(f"{path}: has no columns beside {names[0]!r}; calibration needs rows of numbers")
        return chosen, label
    missing = [name for name in channels if name not in names]
    if missing:
        raise UsageError(f"{path}: has no column {missing[0]!r}; it has: {', '.join(names)}")
    chosen = [names.index(name) for name in channels]
    return chosen, None if label in chosen else label


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
