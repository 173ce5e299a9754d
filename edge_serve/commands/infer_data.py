"""What `edge-serve infer` is given: whatever `convert` calibrates with is cut into samples, the rest stays one payload.

What a device takes as one message (a picture, an array of the input's own shape, JSON, samples of a signal for windows) goes
the device's way. Data of many samples, which only the converter takes, are tensors as the model takes them.
"""

from __future__ import annotations

import array
import csv
import io
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.errors import InputError
from edge_serve.processing import tensor as tensors
from edge_serve.sources.file import TYPES
from edge_serve.spec import InputSpec

if TYPE_CHECKING:
    from edge_serve.frame import Array

PICTURES = frozenset({".jpg", ".jpeg", ".png"})
# Pictures of other formats, which are counted and named, and data that only the converter reads.
OTHER_PICTURES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".ppm", ".tif", ".tiff", ".webp"}
)
FOREIGN = frozenset({".wav", ".tfrecord", ".tfrecords"})
# Whoever wants to see more pictures one by one named the wrong folder.
MAX_PICTURES = 100_000
LABELS = ("label", "labels")
DELIMITERS = ",;\t"
# Columns that a message proposes by name.
MOST_NAMED = 12
# Rows of a recording that are handed on at a time: a small hop makes many windows of few rows.
CHUNK_ROWS = 256
CHUNK_VALUES = 2**22
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Given:
    """What one file holds."""

    payloads: Sequence[bytes | Array]
    content_type: str | None = None
    """Of payloads that are bytes."""
    unit: str | None = None
    """What each payload is of the file (sample, row); None: the payloads together are the file."""
    kind: str | None = None
    """How the model's input is to be taken, where that is not as the model says: tensor or window."""


def expand(path: Path) -> tuple[list[Path], str | None]:
    """Give the pictures of a folder, sorted by path, and a note on other pictures; a file stands for itself.

    InputError if a folder holds no JPEG or PNG pictures. Hidden files and folders are left out.
    """
    if not path.is_dir():
        return [path], None
    found: list[Path] = []
    others: Counter[str] = Counter()
    for folder, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for file in (Path(folder, name) for name in names if not name.startswith(".")):
            suffix = file.suffix.lower()
            if suffix in PICTURES:
                found.append(file)
            elif suffix in OTHER_PICTURES:
                others[suffix] += 1
        if len(found) > MAX_PICTURES:
            raise InputError(f"{path}: holds more than {MAX_PICTURES} pictures; name a smaller folder, or single files")
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
    if not found:
        seen = f" ({kinds} cannot be read)" if others else ""
        raise InputError(
            f"{path}: is a folder without JPEG or PNG pictures{seen}; give a folder of pictures, or .npy, .npz, .csv or .json files"
        )
    note = f"{path}: other pictures were left out ({kinds}); only JPEG and PNG are read" if others else None
    return sorted(found), note


def read(
    path: Path,
    payload: bytes,
    declared: str | None,
    inputs: Mapping[str, TensorSpec],
    spec: InputSpec,
    signature: str,
) -> Given:
    """Cut a file into payloads for a model with these inputs; InputError says what does not fit, and what to do.

    `declared` is the content type that the person gives; else the file's name or its first bytes say it. Arrays of an .npz
    may be named `signature`/input, as for convert.
    """
    if declared is None and path.suffix.lower() in FOREIGN:
        raise InputError(
            f"{path.suffix} files are read by convert and compare only; give the samples as .npy or .npz, or the signal as .csv"
        )
    kind = tensors.content_type(payload, declared or TYPES.get(path.suffix.lower()), spec.content_type)
    if kind == tensors.NPY:
        given = tensors.read_npy(payload)
        if len(inputs) == 1 and _count(given, next(iter(inputs.values())), spec) is not None:
            return Given(_Samples({"": given}), None, "sample", _as_tensor(spec))
    elif kind == tensors.NPZ:
        return _archive(payload, inputs, spec, signature)
    elif kind == tensors.CSV and spec.key != "field" and spec.time_field is None:
        return _table(payload, inputs, spec)
    return Given([payload], kind)


def _as_tensor(spec: InputSpec) -> str | None:
    """Say that whole windows are taken as they are; only a signal is normalized."""
    return "tensor" if spec.kind == "window" else None


def _count(given: Array, spec: TensorSpec, meaning: InputSpec) -> int | None:
    """Give how many samples an array holds along its first dimension; None if it is one input by itself."""
    wanted = spec.shape
    batch = len(wanted) > 0 and (wanted[0] == 1 or (wanted[0] == -1 and len(wanted) > 1))
    if batch and _fits(given.shape, (-1, *wanted[1:])):
        return None if len(given) == 1 else len(given)
    if _fits(given.shape, (-1, *wanted)):  # as if each had been saved with its batch of 1, or an input without a batch
        return len(given)
    pixels = meaning.kind == "image" and given.dtype == np.uint8 and given.ndim == 4 and len(given) != 1
    return len(given) if pixels else None


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, have) for have, want in zip(shape, wanted, strict=True))


def _archive(payload: bytes, inputs: Mapping[str, TensorSpec], spec: InputSpec, signature: str) -> Given:
    """Read an .npz: one array for each input, by name; labels beside them are left out."""
    arrays = tensors.read_npz(payload)
    known = {name: arrays[key] for name in inputs for key in (name, f"{signature}/{name}") if key in arrays}
    rest = [values for name, values in arrays.items() if name.lower() not in LABELS]
    if not known and len(rest) == 1 and len(inputs) == 1:
        known = {next(iter(inputs)): rest[0]}
    if set(known) != set(inputs):
        missing = ", ".join(repr(name) for name in inputs if name not in known)
        raise InputError(
            f"lacks the input {missing}; it has the arrays {', '.join(arrays)}: name them after the model's inputs"
        )
    counts = {name: _count(values, inputs[name], spec) for name, values in known.items()}
    if None in counts.values():
        if len(known) > 1:
            return Given([payload], tensors.NPZ)
        return Given([next(iter(known.values()))], None, None, _as_tensor(spec))
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise InputError(f"the arrays have different numbers of samples ({told}); sample i of each belongs together")
    return Given(_Samples(known), tensors.NPZ, "sample", _as_tensor(spec))


class _Samples(Sequence["bytes | Array"]):
    """Arrays [samples, …] as a sequence of payloads: of one array its parts, of several a small .npz, made when it is wanted."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        parts = {name: values[index, ...] for name, values in self._arrays.items()}
        if len(parts) == 1:
            return next(iter(parts.values()))
        stream = io.BytesIO()
        np.savez(stream, **parts)  # type: ignore[arg-type]  # keyword names are the archive's keys
        return stream.getvalue()


def _table(payload: bytes, inputs: Mapping[str, TensorSpec], spec: InputSpec) -> Given:
    """Read CSV: a row is a sample, or the rows are a signal that is cut into windows."""
    if spec.kind == "image" or len(inputs) != 1:
        told = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
        raise InputError(f"a table does not fit a model that takes {told}; give {_other(spec)}")
    name, tensor = next(iter(inputs.items()))
    rows = _numbers(payload, spec.channels)
    shape = [size for size in tensor.shape[1:] if size != 1] if len(tensor.shape) > 1 else list(tensor.shape)
    if -1 in shape:
        raise InputError(f"input {name!r} has the dynamic shape {list(tensor.shape)}; give it as .npy")
    values, width = math.prod(shape), rows.shape[1]
    # As convert decides it: rows that are too short for a sample are moments of a signal.
    if spec.kind == "window" or (width != values and len(shape) > 1):
        channels = _channels(shape, spec)
        if width != channels:
            raise InputError(_misfit(width, name, tensor, channels))
        step = max(1, min(CHUNK_ROWS, CHUNK_VALUES // values))
        return Given([rows[at : at + step] for at in range(0, len(rows), step)], None, None, "window")
    if width != values:
        raise InputError(_misfit(width, name, tensor, values))
    return Given(_Samples({"": rows}), None, "row")


def _channels(shape: Sequence[int], spec: InputSpec) -> int:
    """Give how many numbers one moment of a window has."""
    if len(shape) > 1:
        return shape[-1]
    return math.prod(shape) // spec.length if spec.length else len(spec.channels or (1,))


def _other(spec: InputSpec) -> str:
    return "pictures" if spec.kind == "image" else "an .npz with an array for each of them"


def _misfit(width: int, name: str, tensor: TensorSpec, wanted: int) -> str:
    return (
        f"has {width} columns of numbers; input {name!r} of shape {list(tensor.shape)} takes {wanted}. "
        "Choose columns by their names in the header with --channels a,b,…"
    )


def _numbers(payload: bytes, channels: tuple[str, ...] | None) -> Array:
    """Give a table's numbers, [rows, columns] float32; the column of labels is left out unless it is asked for."""
    try:
        lines = _lines(payload)
        first = next(lines, None)
        if first is None:
            raise InputError("is empty; give rows of numbers")
        header = any(_number(cell) is None for cell in first[1])
        names = [cell.strip() if header else str(place + 1) for place, cell in enumerate(first[1])]
        chosen = _chosen(names, channels, header=header)
        values = array.array("f")
        for number, cells in lines if header else chain([first], lines):
            if len(cells) != len(names):
                raise InputError(f"line {number}: has {len(cells)} cells, the first line has {len(names)}")
            for column in chosen:
                value = _number(cells[column])
                if value is None or not abs(value) <= FLOAT32_MAX:
                    where = f"line {number}, column {names[column]!r}: {cells[column]!r}"
                    if value is None and header and len(values) < len(chosen):  # not one bad row, but a column of text
                        raise InputError(
                            f"{where} is text; choose the columns that are samples: {_numeric(names, cells)}"
                        )
                    raise InputError(f"{where} is no finite number; leave the row out")
                values.append(value)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"is no readable CSV ({error})") from error
    if not values:
        raise InputError("has a header and no rows; give rows of numbers")
    return np.frombuffer(values, np.float32).reshape(-1, len(chosen))


def _lines(payload: bytes) -> Iterator[tuple[int, list[str]]]:
    """Give line number and cells of each line that is not empty."""
    stream = io.TextIOWrapper(io.BytesIO(payload), encoding="utf-8-sig", newline="")
    first = stream.readline()
    stream.seek(0)
    reader = csv.reader(stream, delimiter=max(DELIMITERS, key=first.count))
    return ((reader.line_num, line) for line in reader if any(cell.strip() for cell in line))


def _numeric(names: Sequence[str], cells: Sequence[str]) -> str:
    """Say how the columns that are numbers are chosen, by their names if they are few."""
    found = [name for name, cell in zip(names, cells, strict=True) if _number(cell) is not None]
    return f"--channels {','.join(found) if 0 < len(found) <= MOST_NAMED else 'a,b,…'}"


def _chosen(names: Sequence[str], channels: tuple[str, ...] | None, *, header: bool) -> list[int]:
    """Give the columns that are samples."""
    if channels is not None and header:
        missing = [name for name in channels if name not in names]
        if missing:
            raise InputError(f"has no column {missing[0]!r}; it has: {', '.join(names)}")
        return [names.index(name) for name in channels]
    found = [place for place, name in enumerate(names) if not (header and name.lower() in LABELS)]
    if not found:
        raise InputError(f"has no columns beside {names[0]!r}; give rows of numbers")
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
