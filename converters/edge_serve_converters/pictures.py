"""A folder of pictures as calibration data: each goes through the same processing as on the device."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.errors import EdgeServeError, UsageError
from edge_serve.processing.image import ImageProcessor
from edge_serve.spec import InputSpec
from edge_serve_converters.plan import Shape, SignaturePlan
from edge_serve_converters.store import Array, Arrays

SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})


class PictureSource:
    """All JPEG and PNG files under a folder, in the order of their paths. Only those that are drawn are decoded."""

    def __init__(self, path: Path, spec: InputSpec) -> None:
        self.path = path
        self._spec = spec
        self._files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not self._files:
            raise UsageError(f"{path}: holds no pictures ({', '.join(sorted(SUFFIXES))}), also not in its folders")
        self._digest = hashlib.sha256()

    def hint(self, signature: str, name: str) -> Shape | None:
        """Pictures come in all sizes: the model (or --size) decides."""
        return None

    def open(self, signature: SignaturePlan) -> tuple[int, int | None]:
        """Check that the model takes one picture."""
        self._processor(signature)
        return len(self._files), None

    def _processor(self, signature: SignaturePlan) -> ImageProcessor:
        if len(signature.inputs) != 1:
            names = ", ".join(entry.name for entry in signature.inputs)
            raise UsageError(
                f"{self.path}: signature {signature.key} has several inputs ({names}); give an .npz with these names"
            )
        entry = signature.inputs[0]
        return ImageProcessor(self._spec, TensorSpec(entry.name, entry.dtype, (1, *entry.sample_shape)))

    def take(self, signature: SignaturePlan, indices: Array) -> Arrays:
        """Decode pictures; UsageError names the file that is none."""
        entry = signature.inputs[0]
        processor = self._processor(signature)
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

    def fingerprint(self) -> str:
        """Hash the names and bytes of the pictures that were drawn, in their order."""
        return self._digest.hexdigest()
