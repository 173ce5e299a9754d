"""Calibration data as numpy files: the tensors as the signature takes them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec
from edge_serve_converters.plan import InputPlan, Shape, SignaturePlan, as_input
from edge_serve_converters.source import LABEL_NAMES, Layout, OwnLabels, Source
from edge_serve_converters.store import Array, Arrays

SUFFIXES = (".npz", ".npy")
# Samples are looked at in pieces of about this size, so that checks need no second copy of the data.
_PIECE_BYTES = 16 * 2**20


def load_arrays(path: Path) -> Arrays:
    """Read an .npz file (name → array) or an .npy file ("" → array); UsageError if it is none or holds pickled objects."""
    try:
        with path.open("rb") as stream:
            loaded: Any = np.load(stream, allow_pickle=False)
            return dict(loaded.items()) if isinstance(loaded, np.lib.npyio.NpzFile) else {"": loaded}
    except Exception as error:  # numpy, zipfile and the decompressors raise whatever damaged bytes lead them to
        reason = str(error) or type(error).__name__
        raise UsageError(f"{path}: is no readable {path.suffix} file of numbers ({reason})") from error


class ArraySource(Source):
    """.npz (arrays named after the inputs, or signature/input) and .npy. An array `label` that is no input holds labels."""

    def __init__(self, path: Path, spec: InputSpec) -> None:
        super().__init__(path, spec)
        self._arrays = load_arrays(path)
        self._texts = {
            name: self._arrays.pop(name)
            for name in list(self._arrays)
            if name.lower() in LABEL_NAMES and self._arrays[name].dtype.kind in "US"
        }
        if not self._arrays:
            raise UsageError(f"{path}: holds no arrays{' of numbers' if self._texts else ''}")
        for name, array in self._arrays.items():
            self._check(name, array)

    def _check(self, name: str, array: Array) -> None:
        if array.dtype.kind not in "biuf":
            raise UsageError(f"{self._where(name)}: has dtype {array.dtype}; calibration data are numbers")
        if array.ndim == 0 or array.size == 0:
            raise UsageError(
                f"{self._where(name)}: is empty; calibration needs samples, at least 20, better 100 or more"
            )
        if array.dtype.kind != "f":
            return
        bad = np.concatenate([~np.isfinite(piece).all(axis=tuple(range(1, array.ndim))) for piece in _pieces(array)])
        if bad.any():
            raise UsageError(
                f"{self._where(name)}: {int(bad.sum())} of {len(array)} samples hold NaN or infinite values, "
                f"the first is sample {int(bad.argmax())}; "
                "leave them out (the converter would silently make a float model of them)"
            )

    @property
    def as_is(self) -> bool:
        """Numbers are taken as they are."""
        return True

    @property
    def units(self) -> int | None:
        """Give the number of samples, if all arrays agree."""
        lengths = {len(array) for name, array in self._arrays.items() if name in self._data()}
        return lengths.pop() if len(lengths) == 1 else None

    def _data(self) -> list[str]:
        """Give the names of the arrays that are samples for sure: all but labels, unless there is nothing else."""
        return [name for name in self._arrays if name.lower() not in LABEL_NAMES] or list(self._arrays)

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
        if key is None and len(self._data()) == 1:
            key = self._data()[0]
        return None if key is None else self._arrays[key].shape[1:]

    def open(self, signature: SignaturePlan) -> Layout:
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
            lengths = ", ".join(f"{name}: {count}" for name, count in counts.items())
            raise UsageError(
                f"{self.path}: the arrays have different numbers of samples ({lengths}); sample i of each belongs together"
            )
        return Layout(next(iter(counts.values())))

    def _key(self, signature: SignaturePlan, entry: InputPlan) -> str:
        key = self._find(signature.key, entry.name)
        if key is None and len(self._data()) == 1 and len(signature.inputs) == 1:
            key = self._data()[0]
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

    def own_labels(self) -> OwnLabels | None:
        """Give the array `label` or `labels` beside the samples."""
        for name in (*self._texts, *self._arrays):
            if name.lower() in LABEL_NAMES and (name in self._texts or len(self._arrays) > 1):
                return OwnLabels(name, self._texts[name] if name in self._texts else self._arrays[name])
        return None

    def fingerprint(self) -> str:
        """Hash names, shapes, dtypes and values: the same numbers packed anew have the same fingerprint."""
        digest = hashlib.sha256()
        for name in sorted(self._arrays):
            array = self._arrays[name]
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def _pieces(array: Array) -> Iterator[Array]:
    step = max(1, _PIECE_BYTES // max(1, array[0].nbytes))
    for start in range(0, len(array), step):
        yield array[start : start + step]


def _same_sample(shape: Shape, entry: InputPlan) -> bool:
    """Tell whether the data's samples have the input's shape; samples saved with a batch of 1 do too."""
    return shape == entry.sample_shape or (entry.batched and shape == (1, *entry.sample_shape))
