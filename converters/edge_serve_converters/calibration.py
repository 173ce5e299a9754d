"""Calibration data: opened from files, checked, drawn by seed, and split so that quality is never measured on samples
that calibrated.

A source gives samples (without batch) of every input of a signature; `draw` picks, groups them into batches and checks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from edge_serve.errors import UsageError
from edge_serve.spec import InputKind, InputSpec
from edge_serve_converters import arrays, audio, checks, records
from edge_serve_converters.plan import SignaturePlan
from edge_serve_converters.source import Source, listed
from edge_serve_converters.split import split
from edge_serve_converters.store import Array, Arrays

if TYPE_CHECKING:
    from edge_serve_converters.truth import Truth

__all__ = ["FEW_SAMPLES", "Drawn", "Source", "Warnings", "draw", "fingerprint", "kind_of", "open_source"]

# Fewer than this and the ranges of activations are guesswork (the TFLite guide asks for 100 to 500).
FEW_SAMPLES = 20
# Files under a folder, of any kind: whoever has more than this pointed at the wrong folder.
MAX_FILES = 5_000_000
KINDS = "an .npz, .npy, .csv or .tfrecord file, or a folder of pictures, of WAV files or of TFRecord files"
_PICTURES = frozenset({".jpg", ".jpeg", ".png"})


@dataclass(frozen=True, slots=True)
class Drawn:
    """Data of one signature, input name → [runs, *shape]. No sample is in both parts."""

    calibration: Arrays
    held_back: Arrays
    truth: Array | None = None
    """Labels of the held-back samples: class indices [runs, batch] int64, or masks of them [runs, batch, H, W] int32."""
    truth_kind: Literal["classes", "mask"] | None = None
    classes: tuple[str, ...] | None = None
    """The names of the classes by index, where the labels are names."""


@dataclass(slots=True)
class Warnings:
    """Sentences for the person; each is said once."""

    texts: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Add a sentence unless it was said already."""
        if text not in self.texts:
            self.texts.append(text)


def open_source(path: Path, spec: InputSpec) -> Source:
    """Open calibration data of any kind that is read (KINDS); UsageError says what is wrong with it."""
    if path.is_dir():
        return _open_folder(path, spec)
    if not path.is_file():
        raise UsageError(f"{path}: no such calibration data; give {KINDS}")
    suffix = path.suffix.lower()
    if suffix in arrays.SUFFIXES:
        return arrays.ArraySource(path, spec)
    if suffix == ".csv":
        from edge_serve_converters.tables import TableSource

        return TableSource(path, spec)
    if records.is_record_file(path):
        return records.RecordSource(path, [path], spec)
    raise UsageError(f"{path}: calibration data of this kind is not read; give {KINDS}")


def kind_of(path: Path) -> InputKind | None:
    """Tell the kind of input from the data alone: pictures in a folder are images, WAV files windows; else None."""
    if not path.is_dir():
        return None
    found = _files(path)
    return "image" if found["pictures"] else "window" if found["WAV files"] else None


def _open_folder(path: Path, spec: InputSpec) -> Source:
    found = {kind: files for kind, files in _files(path).items() if files}
    if len(found) > 1:
        amounts = " and ".join(f"{len(files)} {kind}" for kind, files in found.items())
        raise UsageError(
            f"{path}: holds {amounts}; calibration data are of one kind, put them into folders of their own"
        )
    if "WAV files" in found:
        return audio.WavSource(path, found["WAV files"], spec)
    if "TFRecord files" in found:
        return records.RecordSource(path, found["TFRecord files"], spec)
    if "pictures" not in found:
        raise UsageError(
            f"{path}: holds no pictures ({', '.join(sorted(_PICTURES))}), no .wav and no .tfrecord files, also not in its folders"
        )
    from edge_serve_converters.pictures import PictureSource  # Pillow only where there are pictures

    return PictureSource(path, found["pictures"], spec)


def _files(path: Path) -> dict[str, list[Path]]:
    """Find the files of each kind under a folder, sorted by path. Hidden ones (.Trash, ._x of macOS) are no data."""
    found: dict[str, list[Path]] = {"pictures": [], "WAV files": [], "TFRecord files": []}
    seen = 0
    for folder, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith(".")]
        seen += len(names)
        if seen > MAX_FILES:
            raise UsageError(
                f"{path}: holds more than {MAX_FILES} files; name the folder that holds the calibration data"
            )
        for name in names:
            file = Path(folder, name)
            kind = _kind_of_file(file)
            if kind is not None and not name.startswith(".") and file.is_file():
                found[kind].append(file)
    return {kind: sorted(files) for kind, files in found.items()}


def _kind_of_file(file: Path) -> str | None:
    suffix = file.suffix.lower()
    if suffix in _PICTURES:
        return "pictures"
    if suffix in audio.SUFFIXES:
        return "WAV files"
    return "TFRecord files" if records.is_record_file(file) else None


def draw(
    source: Source,
    signature: SignaturePlan,
    *,
    samples: int,
    seed: int,
    warnings: Warnings,
    truth: Truth | None = None,
) -> Drawn:
    """Draw at most `samples` calibration samples, and a quarter as many to hold back (a fifth of all), without replacement.

    With `truth`, the labels of this signature's samples, both parts hold the classes in proportion.
    """
    layout = source.open(signature)
    batch = max((entry.shape[0] for entry in signature.inputs if entry.batched), default=1)
    labels = truth.of_samples(source, signature, layout.count) if truth is not None else None
    classes = labels if truth is not None and truth.kind == "classes" else None
    used, held = split(layout, classes, samples=samples, batch=batch, rng=np.random.default_rng(seed))
    used, held = (part[: len(part) // batch * batch] for part in (used, held))
    if min(len(held), len(used)) < batch:
        raise UsageError(
            f"calibration data hold {layout.count} samples; at least {2 * batch} are needed, "
            f"one batch of {batch} to calibrate and one to measure quality on{_apart(layout.starts is not None)}; "
            f"{FEW_SAMPLES} or more are sensible"
        )
    parts = source.take(signature, used), source.take(signature, held)
    for note in source.notes:
        warnings.add(note)
    if len(used) // batch < FEW_SAMPLES:
        warnings.add(
            f"only {len(used) // batch} calibration samples; {FEW_SAMPLES} or more, better 100, make the ranges trustworthy"
        )
    for text in checks.look(signature, source, *parts):
        warnings.add(text)
    calibration, held_back = (_group(part, signature, batch) for part in parts)
    if truth is None or labels is None:
        return Drawn(calibration, held_back)
    if classes is not None:
        _look_at_classes(truth, classes, held, warnings)
    chosen = np.ascontiguousarray(labels[held], np.int64 if classes is not None else np.int32)
    chosen = chosen.reshape(len(chosen) // batch, batch, *chosen.shape[1:])
    return Drawn(calibration, held_back, chosen, truth.kind, truth.classes)


def fingerprint(source: Source, truth: Truth | None = None) -> str:
    """Give a SHA-256 of the data that was used, with its labels where they were given."""
    if truth is None:
        return source.fingerprint()
    return hashlib.sha256(f"{source.fingerprint()} {truth.fingerprint()}".encode()).hexdigest()


def _apart(overlapping: bool) -> str:
    return ", and windows that share rows cannot be in both (choose a larger --hop)" if overlapping else ""


def _group(samples: Mapping[str, Array], signature: SignaturePlan, batch: int) -> Arrays:
    grouped = {}
    for entry in signature.inputs:
        array = samples[entry.name]
        # An input without batch dimension gets one sample for each run.
        grouped[entry.name] = array.reshape(len(array) // batch, *entry.shape) if entry.batched else array[::batch]
    return grouped


def _look_at_classes(truth: Truth, classes: Array, held: Array, warnings: Warnings) -> None:
    missing = np.setdiff1d(classes, classes[held]).tolist()
    if missing:
        names = [truth.name(index) for index in missing]
        warnings.add(
            f"no sample of class {listed(names)} is held back, the figures say nothing of it: "
            "give more samples of it (of recordings, more files)"
        )
