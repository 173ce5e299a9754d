"""The demo's test data, and what the float SavedModels answered to it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from edge_serve.frame import Array

HERE = Path(__file__).resolve().parent
LENGTH = 50
HOP = 10


@dataclass(frozen=True, slots=True)
class Motion:
    """Recordings of a wrist: `series` float32 [40, 100, 6], `labels` int64 [40]; and the windows that they are cut into."""

    series: Array
    labels: Array

    @property
    def windows(self) -> Array:
        """Give all windows, series by series, float32 [240, 50, 6]."""
        starts = range(0, self.series.shape[1] - LENGTH + 1, HOP)
        return np.stack([one[start : start + LENGTH] for one in self.series for start in starts])

    @property
    def window_labels(self) -> Array:
        """Give each window's class, int64 [240]."""
        return np.repeat(self.labels, len(range(0, self.series.shape[1] - LENGTH + 1, HOP)))


@dataclass(frozen=True, slots=True)
class Digits:
    """Handwritten digits: `images` uint8 [500, 28, 28], `labels` int64 [500]."""

    images: Array
    labels: Array

    def png(self, index: int) -> bytes:
        """Give one picture as PNG."""
        from PIL import Image

        stream = io.BytesIO()
        Image.fromarray(self.images[index]).save(stream, "PNG")
        return stream.getvalue()


def _load(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def motion() -> Motion:
    """Load the motion test recordings."""
    return Motion(**_load(HERE / "data" / "motion.npz"))


def digits() -> Digits:
    """Load the test digits."""
    return Digits(**_load(HERE / "data" / "digits.npz"))


def reference(name: str, folder: Path | None = None) -> Array:
    """Give the classes that the float SavedModel chose, int64 [inputs]."""
    loaded = _load((folder or HERE / "data" / "reference") / f"{name}.npz")
    chosen: Array = loaded["probabilities"].argmax(axis=1)
    return chosen
