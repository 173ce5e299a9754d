"""A folder of pictures as calibration data: each goes through the same processing as on the device."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.errors import EdgeServeError, UsageError
from edge_serve.processing.image import ImageProcessor
from edge_serve.spec import InputSpec
from edge_serve_converters.plan import InputPlan, SignaturePlan
from edge_serve_converters.source import Layout, Source, folder_names, only_input
from edge_serve_converters.store import Array, Arrays

SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
# What else people keep pictures in; the device reads none of it.
OTHERS = frozenset({".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".ppm", ".tif", ".tiff", ".webp"})


class PictureSource(Source):
    """JPEG and PNG files, in the order of their paths. Only those that are drawn are decoded."""

    unit = "picture"

    def __init__(self, path: Path, files: Sequence[Path], spec: InputSpec) -> None:
        super().__init__(path, spec)
        self._files = files
        self._digest = hashlib.sha256()
        left_out = _others(path)
        if left_out:
            count = sum(left_out.values())
            kinds = ", ".join(f"{number} {suffix}" for suffix, number in left_out.most_common())
            self.notes.append(
                f"{path}: {count} other picture file{'s were' if count > 1 else ' was'} left out ({kinds}); "
                "only JPEG and PNG are read, as on the device: convert them to use them, too"
            )

    @property
    def units(self) -> int:
        """Give the number of pictures."""
        return len(self._files)

    def open(self, signature: SignaturePlan) -> Layout:
        """Check that the model takes one picture."""
        image_processor(self.spec, only_input(self.path, signature))
        return Layout(len(self._files))

    def take(self, signature: SignaturePlan, indices: Array) -> Arrays:
        """Decode pictures; UsageError names the file that is none."""
        entry = only_input(self.path, signature)
        processor = image_processor(self.spec, entry)
        samples = np.empty((len(indices), *entry.sample_shape), entry.dtype)
        for place, index in enumerate(indices.tolist()):
            file = self._files[index]
            try:
                payload = file.read_bytes()
                samples[place] = processor.decode(payload)[0].reshape(entry.sample_shape)
            except (OSError, EdgeServeError) as error:
                raise UsageError(f"{file}: {error}; remove or replace it") from error
            self._digest.update(f"{file.relative_to(self.path).as_posix()}\n".encode() + payload)
        return {entry.name: samples}

    def folders(self) -> list[str]:
        """Give the folder of each picture."""
        return folder_names(self.path, self._files)

    def fingerprint(self) -> str:
        """Hash the names and bytes of the pictures that were drawn, in their order."""
        return self._digest.hexdigest()


def _others(path: Path) -> Counter[str]:
    """Count the pictures of other formats under a folder, by suffix; hidden files and folders are none."""
    found: Counter[str] = Counter()
    for _, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith(".")]
        suffixes = (Path(name).suffix.lower() for name in names if not name.startswith("."))
        found.update(suffix for suffix in suffixes if suffix in OTHERS)
    return found


def image_processor(spec: InputSpec, entry: InputPlan) -> ImageProcessor:
    """Give the device's processing of pictures for an input; ModelError (a UsageError) if it takes no pictures."""
    return ImageProcessor(spec, TensorSpec(entry.name, entry.dtype, (1, *entry.sample_shape)))
