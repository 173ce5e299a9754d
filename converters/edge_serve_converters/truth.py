"""Labels: what the samples truly are, so that accuracy, AUC or mean IoU can be measured on those that are held back.

They come from the names of folders, from a file beside the data, or from the data themselves, and are checked all at once:
as many as there are units (samples, rows, pictures, recordings), known names, indices of classes.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edge_serve.errors import UsageError
from edge_serve_converters.arrays import load_arrays
from edge_serve_converters.plan import SignaturePlan
from edge_serve_converters.source import LABEL_NAMES, OwnLabels, Source, listed
from edge_serve_converters.store import Array

# Words for --labels-for beside a path.
FOLDERS = "folders"
DATA = "data"
# In masks: pixels that count for nothing (borders and objects that nobody could tell), as in PASCAL VOC.
IGNORED = 255
MAX_TEXT_BYTES = 256 * 2**20
MAX_CLASSES = 1_000_000
# Labels (masks may be large) that are looked at together.
_PIECE = 1024


@dataclass(frozen=True, slots=True)
class Truth:
    """One label for each unit of a source."""

    kind: Literal["classes", "mask"]
    values: Array
    """Class indices, [units], or masks of them, [units, H, W]; integers."""
    classes: tuple[str, ...] | None
    """Names by index: those of --labels, else the sorted names that were found; None where labels are mere indices."""
    where: str
    own: str | None = None
    """The name that the labels have in the calibration data themselves."""

    def of_samples(self, source: Source, signature: SignaturePlan, count: int) -> Array:
        """Give the labels of the samples, [count] or [count, H, W]; UsageError if there are more or fewer."""
        if self.own is not None and self.own in {entry.name for entry in signature.inputs}:
            raise UsageError(
                f"{self.where}: {self.own!r} is an input of the model; give the labels in a file of their own"
            )
        _check_count(self, source.units if source.units is not None else count, source.unit)
        labels = source.fold(self.values)
        if len(labels) != count:
            raise UsageError(f"{self.where}: {len(labels)} labels for {count} samples")
        return labels

    def name(self, index: int) -> str:
        """Name a class for a message."""
        return repr(self.classes[index]) if self.classes is not None and index < len(self.classes) else str(index)

    def check_classes(self, count: int, what: str) -> None:
        """Check that there are `count` classes at least; `what` says whose, as in "output 'scores' has". UsageError if not."""
        pieces = [self.values[start : start + _PIECE] for start in range(0, len(self.values), _PIECE)]
        if self.kind == "mask":
            pieces = [piece[piece != IGNORED] for piece in pieces]
        pieces = [piece for piece in pieces if piece.size]
        if not pieces:
            return
        lowest, highest = (int(f([int(f(piece)) for piece in pieces])) for f in (np.min, np.max))
        if highest < count:
            return
        remedy = "say with --labels which name has which index"
        if lowest >= 1 and highest == count:
            remedy = "they seem to be counted from 1, classes are counted from 0"
        elif self.own is None and self.classes is None:
            remedy = "check which model these labels belong to"
        raise UsageError(
            f"{self.where}: holds the class {self.name(highest)} with index {highest}; {what} {count} classes, "
            f"0 to {count - 1}: {remedy}"
        )

    def fingerprint(self) -> str:
        """Give a SHA-256 of the labels and the names of the classes."""
        digest = hashlib.sha256(f"{self.kind} {self.values.shape} {self.classes}\n".encode())
        for start in range(0, len(self.values), _PIECE):
            digest.update(np.ascontiguousarray(self.values[start : start + _PIECE], "<i8").data)
        return digest.hexdigest()


def open_truth(spec: str | Path, source: Source, labels: tuple[str, ...] | None) -> Truth:
    """Read the labels of a source; UsageError says what is wrong with them.

    `spec` is "folders" (the folder of each file is its class), "data" or the path of the data (labels in the data
    themselves: an array, column or feature `label`), or a file: .npy or .npz ([units] numbers or text, or masks
    [units, H, W]), or .csv or .txt with one label a line. `labels` are the names of the model's classes by index, if known.
    """
    path = Path(spec)
    same = path.exists() and source.path.exists() and path.samefile(source.path)
    folders = source.folders()
    if str(spec) == FOLDERS or (same and folders is not None):
        if folders is None:
            raise UsageError(f"--labels-for folders: {source.path} is no folder of pictures or WAV files")
        truth = _from_folders(source, folders, labels)
    elif str(spec) == DATA or same:
        own = source.own_labels()
        if own is None:
            raise UsageError(
                f"--labels-for {spec}: {source.path} holds no labels; name them {LABEL_NAMES[0]!r} in it, or give a file"
            )
        truth = _from_values(own.values, labels, f"{source.path}, {own.name!r}", own)
    else:
        truth = _from_file(path, source, labels)
    if source.units is not None:
        _check_count(truth, source.units, source.unit)
    return truth


def _check_count(truth: Truth, units: int, unit: str) -> None:
    if len(truth.values) != units:
        raise UsageError(
            f"{truth.where}: {len(truth.values)} labels for {units} {unit}s; give one for each {unit}, in the same order"
        )


def _from_folders(source: Source, folders: Sequence[str], labels: tuple[str, ...] | None) -> Truth:
    where = f"--labels-for folders, {source.path}"
    if "" in folders:
        raise UsageError(
            f"{where}: {folders.count('')} of {len(folders)} {source.unit}s lie in no class folder; "
            f"put each into {source.path.name}/<class>/"
        )
    names = sorted(set(folders))
    if labels is None and all(name.isdecimal() for name in names):
        numbers = [int(name) for name in names]
        if numbers != list(range(len(names))):
            raise UsageError(
                f"{where}: the folders {listed(names)} do not say which index each class has in the model; "
                "give --labels with one folder name a line, in the order of the classes"
            )
    return _from_names(np.array(folders), labels, where, None)


def _from_file(path: Path, source: Source, labels: tuple[str, ...] | None) -> Truth:
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".npz", ".csv", ".txt") or not path.is_file():
        problem = "no such file" if not path.exists() else "labels of this kind are not read"
        raise UsageError(
            f"--labels-for {path}: {problem}; give .npy, .npz, .csv or .txt, or say folders (the class is the folder's name) "
            "or data (the labels are in the calibration data)"
        )
    if suffix in (".csv", ".txt"):
        return _from_values(np.array(_lines(path, source, labels)), labels, str(path), None)
    found = load_arrays(path)
    named = [name for name in found if name.lower() in LABEL_NAMES] or list(found)
    if len(named) != 1:
        raise UsageError(
            f"{path}: holds the arrays {listed(list(found))}; name the one with the labels {LABEL_NAMES[0]!r}"
        )
    return _from_values(found[named[0]], labels, str(path), None)


def _lines(path: Path, source: Source, labels: tuple[str, ...] | None) -> list[str]:
    """Give the label of each line: the line, or of several columns the one named label."""
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise UsageError(f"{path}: larger than {MAX_TEXT_BYTES} bytes; this is no list of labels")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: labels cannot be read ({error})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if path.suffix.lower() == ".csv" and lines:
        lines = _column(path, lines)
    if _has_header(lines, source.units, labels):
        lines = lines[1:]
    if not lines:
        raise UsageError(f"{path}: is empty; write one label a line, in the order of the samples")
    return lines


def _column(path: Path, lines: list[str]) -> list[str]:
    delimiter = max(",;\t", key=lines[0].count)
    try:
        rows = list(csv.reader(lines, delimiter=delimiter))
    except csv.Error as error:
        raise UsageError(f"{path}: is no readable CSV file ({error})") from error
    place = 0
    if len(rows[0]) > 1:
        place = next((place for place, name in enumerate(rows[0]) if name.strip().lower() in LABEL_NAMES), -1)
        if place < 0:
            raise UsageError(
                f"{path}: has {len(rows[0])} columns, none is named {LABEL_NAMES[0]!r}; give one label a line"
            )
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise UsageError(f"{path}, row {number}: has {len(row)} cells, the first one has {len(rows[0])}")
    return [row[place].strip() for row in rows]


def _has_header(lines: list[str], units: int | None, labels: tuple[str, ...] | None) -> bool:
    """Tell a header from a label: there is one line too many, or it alone is no number, or it says label."""
    if len(lines) < 2 or (labels is not None and lines[0] in labels):
        return False
    if units is not None:
        return len(lines) == units + 1
    return lines[0].lower() in LABEL_NAMES or (not _is_index(lines[0]) and all(map(_is_index, lines[1:])))


def _is_index(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _from_values(values: Array, labels: tuple[str, ...] | None, where: str, own: OwnLabels | None) -> Truth:
    name = own.name if own is not None else None
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.dtype.kind in "SU":
        if values.ndim != 1:
            raise UsageError(f"{where}: has shape {list(values.shape)}; text labels are one for each sample")
        texts = _decoded(values, where)
        # Digits that are themselves names of classes are names: labels.txt of ten digits may be in any order.
        if not all(map(_is_index, set(texts))) or (labels is not None and set(texts) <= set(labels)):
            return _from_names(np.array(texts), labels, where, name)
        values = np.array([int(text) for text in texts])
    return _from_numbers(values, labels, where, name)


def _decoded(values: Array, where: str) -> list[str]:
    try:
        return [value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in values.tolist()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: holds a label that is no UTF-8 text ({error.reason})") from error


def _from_numbers(values: Array, labels: tuple[str, ...] | None, where: str, own: str | None) -> Truth:
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim not in (1, 3):
        hint = "; of one-hot rows take argmax(axis=1) first" if values.ndim == 2 else ""
        raise UsageError(
            f"{where}: has shape {list(values.shape)}; labels are [samples] or masks [samples, height, width]{hint}"
        )
    if values.dtype.kind not in "biuf":
        raise UsageError(f"{where}: has dtype {values.dtype}; labels are whole numbers or text")
    if not values.size:
        raise UsageError(f"{where}: is empty; give one label for each sample")
    kind: Literal["classes", "mask"] = "classes" if values.ndim == 1 else "mask"
    lowest, highest = values.min(), values.max()
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or not np.array_equal(values, np.rint(values)):
            raise UsageError(f"{where}: holds values that are no whole numbers; a label is the index of a class")
        values = values.astype(np.int64) if abs(highest) <= MAX_CLASSES and lowest >= 0 else values
    if values.dtype.kind == "b":
        values = values.astype(np.int64)
    if lowest < 0 or highest >= MAX_CLASSES:
        raise UsageError(f"{where}: holds the label {lowest if lowest < 0 else highest}; classes are counted from 0")
    if labels is not None:
        Truth(kind, values, labels, where).check_classes(len(labels), "--labels names")
    return Truth(kind, values, labels, where, own)


def _from_names(values: Array, labels: tuple[str, ...] | None, where: str, own: str | None) -> Truth:
    names, inverse = np.unique(values, return_inverse=True)
    found: list[str] = names.tolist()
    classes = labels if labels is not None else tuple(found)
    indices = {name: index for index, name in reversed(list(enumerate(classes)))}
    folded = {name.casefold(): index for name, index in indices.items()}
    chosen = []
    for name in found:
        index = indices.get(name, folded.get(name.casefold()))
        if index is None:
            close = difflib.get_close_matches(name, classes, 1)
            suggestion = f"did you mean {close[0]!r}?" if close else f"the classes are {listed(classes)}"
            raise UsageError(f"{where}: {name!r} is no class of --labels; {suggestion}")
        chosen.append(index)
    return Truth("classes", np.array(chosen, np.int64)[inverse.reshape(-1)], classes, where, own)
