"""Calibration data: opened from files, checked, drawn by seed, and split so that quality is never measured on samples
that calibrated.

A source gives samples (without batch) of every input of a signature; `draw` picks, groups them into batches and checks.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec
from edge_serve_converters.plan import InputPlan, Shape, SignaturePlan, as_input
from edge_serve_converters.request import HELD_BACK
from edge_serve_converters.store import Array, Arrays

# Fewer held-back samples than this say little; half of a very small set is the most that is taken for it.
MIN_HELD_BACK = 4
# Fewer than this and the ranges of activations are guesswork (the TFLite guide asks for 100 to 500).
FEW_SAMPLES = 20
ARRAY_SUFFIXES = (".npz", ".npy")


class Source(Protocol):
    """Where samples come from."""

    def hint(self, signature: str, name: str) -> Shape | None:
        """Give the shape of one sample of an input, as far as the data says it before the signature is settled."""
        ...

    def open(self, signature: SignaturePlan) -> tuple[int, int | None]:
        """Check the data against a signature; give the number of samples and, where neighbours share data, a border.

        Samples from the border on share nothing with those before it. UsageError says what does not fit.
        """
        ...

    def take(self, signature: SignaturePlan, indices: Array) -> Arrays:
        """Give samples by index, input name → [len(indices), *sample_shape] in the input's dtype."""
        ...

    def fingerprint(self) -> str:
        """Give a SHA-256 of the data."""
        ...


@dataclass(frozen=True, slots=True)
class Drawn:
    """Data of one signature, input name → [runs, *shape]. No sample is in both parts."""

    calibration: Arrays
    held_back: Arrays


@dataclass(slots=True)
class Warnings:
    """Sentences for the person; each is said once."""

    texts: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Add a sentence unless it was said already."""
        if text not in self.texts:
            self.texts.append(text)


def open_source(path: Path, spec: InputSpec) -> Source:
    """Open calibration data: .npz, .npy, .csv, or a folder of pictures; UsageError says what is wrong with it."""
    if path.is_dir():
        from edge_serve_converters.pictures import PictureSource  # Pillow only where there are pictures

        return PictureSource(path, spec)
    if not path.is_file():
        raise UsageError(f"{path}: no such calibration data; give an .npz, .npy or .csv file, or a folder of pictures")
    suffix = path.suffix.lower()
    if suffix in ARRAY_SUFFIXES:
        return ArraySource(path)
    if suffix == ".csv":
        from edge_serve_converters.tables import TableSource

        return TableSource(path, spec)
    raise UsageError(
        f"{path}: calibration data of this kind is not read; give an .npz, .npy or .csv file, or a folder of pictures"
    )


class ArraySource:
    """.npz (arrays named after the inputs, or signature/input) and .npy: the tensors as the signature takes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                loaded: Any = np.load(stream, allow_pickle=False)
                archive = isinstance(loaded, np.lib.npyio.NpzFile)
                self._arrays: Arrays = dict(loaded.items()) if archive else {"": loaded}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise UsageError(f"{path}: is no readable {path.suffix} file of numbers ({error})") from error
        if not self._arrays:
            raise UsageError(f"{path}: holds no arrays")
        for name, array in self._arrays.items():
            if array.dtype.kind not in "biuf":
                raise UsageError(f"{self._where(name)}: has dtype {array.dtype}; calibration data are numbers")
            if array.ndim == 0 or len(array) == 0:
                raise UsageError(
                    f"{self._where(name)}: is empty; calibration needs samples, at least {FEW_SAMPLES}, better 100 or more"
                )
            if array.dtype.kind == "f":
                bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))
                if len(bad):
                    raise UsageError(
                        f"{self._where(name)}: {len(bad)} of {len(array)} samples hold NaN or infinite values, "
                        f"the first is sample {bad[0]}; "
                        "leave them out (the converter would silently make a float model of them)"
                    )

    def _where(self, name: str) -> str:
        return f"{self.path}[{name!r}]" if name else str(self.path)

    def _find(self, signature: str, name: str) -> str | None:
        for key in (f"{signature}/{name}", name):
            if key in self._arrays:
                return key
        return None

    def hint(self, signature: str, name: str) -> Shape | None:
        """Give the shape of one sample."""
        key = self._find(signature, name)
        if key is None and len(self._arrays) == 1:
            key = next(iter(self._arrays))
        return None if key is None else self._arrays[key].shape[1:]

    def open(self, signature: SignaturePlan) -> tuple[int, int | None]:
        """Check names, shapes and counts."""
        counts = {}
        for entry in signature.inputs:
            key = self._key(signature, entry)
            array = self._arrays[key]
            if not _same_sample(array.shape[1:], entry):
                raise UsageError(
                    f"{self._where(key)}: has shape {list(array.shape)}; input {entry.name!r} takes "
                    f"[samples, {', '.join(map(str, entry.sample_shape))}]"
                )
            counts[key] = len(array)
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
            raise UsageError(
                f"{self.path}: the arrays have different numbers of samples ({listed}); sample i of each belongs together"
            )
        return next(iter(counts.values())), None

    def _key(self, signature: SignaturePlan, entry: InputPlan) -> str:
        key = self._find(signature.key, entry.name)
        if key is None and len(self._arrays) == 1 and len(signature.inputs) == 1:
            key = next(iter(self._arrays))
        if key is None:
            names = ", ".join(plan.name for plan in signature.inputs)
            if "" in self._arrays:
                raise UsageError(
                    f"{self.path}: signature {signature.key} has several inputs ({names}); give an .npz with these names"
                )
            raise UsageError(
                f"{self.path}: has the arrays {', '.join(self._arrays)}, none is named {entry.name!r}; "
                f"name them after the inputs of signature {signature.key}: {names}"
            )
        return key

    def take(self, signature: SignaturePlan, indices: Array) -> Arrays:
        """Give samples by index."""
        return {
            entry.name: as_input(self._arrays[self._key(signature, entry)][indices], entry, str(self.path))
            for entry in signature.inputs
        }

    def fingerprint(self) -> str:
        """Hash names, shapes, dtypes and values: the same numbers packed anew have the same fingerprint."""
        digest = hashlib.sha256()
        for name in sorted(self._arrays):
            array = self._arrays[name]
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def _same_sample(shape: Shape, entry: InputPlan) -> bool:
    """Tell whether the data's samples have the input's shape; samples saved with a batch of 1 do too."""
    return shape == entry.sample_shape or (entry.batched and shape == (1, *entry.sample_shape))


def draw(source: Source, signature: SignaturePlan, *, samples: int, seed: int, warnings: Warnings) -> Drawn:
    """Draw at most `samples` calibration samples, and a quarter as many to hold back (a fifth of all), without replacement."""
    count, border = source.open(signature)
    batch = max((entry.shape[0] for entry in signature.inputs if entry.batched), default=1)
    rng = np.random.default_rng(seed)
    if border is None:
        order = rng.permutation(count)
        order = order[: (samples + _share(samples)) * batch]
        held_count = _held_back(len(order) // batch) * batch
        held, used = order[:held_count], order[held_count:]
    else:
        used = rng.permutation(border)[: samples * batch]
        held = border + rng.permutation(count - border)[: _share(samples) * batch]
    if min(len(held), len(used)) < batch:
        raise UsageError(
            f"calibration data hold {count} samples; at least {2 * batch} are needed, "
            f"one batch of {batch} to calibrate and one to measure quality on; {FEW_SAMPLES} or more are sensible"
        )
    drawn = Drawn(*(_group(source.take(signature, part), signature, batch) for part in (used, held)))
    _look(drawn, signature, warnings)
    return drawn


def _share(samples: int) -> int:
    """Give how many are held back beside that many that calibrate."""
    return max(MIN_HELD_BACK, round(samples * HELD_BACK / (1 - HELD_BACK)))


def _held_back(runs: int) -> int:
    """Give how many of few runs are held back."""
    return max(round(runs * HELD_BACK), min(MIN_HELD_BACK, runs // 2))


def _group(samples: Mapping[str, Array], signature: SignaturePlan, batch: int) -> Arrays:
    grouped = {}
    for entry in signature.inputs:
        array = samples[entry.name]
        whole = len(array) // batch
        # An input without batch dimension gets one sample for each run.
        grouped[entry.name] = (
            array[: whole * batch].reshape(whole, *entry.shape) if entry.batched else array[: whole * batch : batch]
        )
    return grouped


def _look(drawn: Drawn, signature: SignaturePlan, warnings: Warnings) -> None:
    for entry in signature.inputs:
        array = drawn.calibration[entry.name]
        if array.size and array.min() == array.max():
            warnings.add(
                f"calibration data for input {entry.name!r} are constant ({array.flat[0]:g}): the ranges will fit nothing else"
            )
        elif len(array) > 1 and (array == array[0]).all():
            warnings.add(
                f"all calibration samples for input {entry.name!r} are equal: the ranges will fit nothing else"
            )
    number = len(next(iter(drawn.calibration.values())))
    if number < FEW_SAMPLES:
        warnings.add(
            f"only {number} calibration samples; {FEW_SAMPLES} or more, better 100, make the ranges trustworthy"
        )
