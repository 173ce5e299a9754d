"""Named arrays in a folder, one .npy file each: how the converter and its children hand data over without copying it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = dict[str, Array]

# Tensor names hold characters that file names do not, so files are numbered and this one says which is which.
_INDEX = "names.json"


def save(folder: Path, arrays: Mapping[str, Array]) -> Path:
    """Write every array into a new folder and give the folder."""
    folder.mkdir(parents=True)
    for number, array in enumerate(arrays.values()):
        np.save(folder / f"{number}.npy", array)
    (folder / _INDEX).write_text(json.dumps(list(arrays)), encoding="utf-8")
    return folder


def load(folder: Path) -> Arrays:
    """Map the arrays of a folder into memory, read-only."""
    names = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return {name: np.load(folder / f"{number}.npy", mmap_mode="r") for number, name in enumerate(names)}


def runs(arrays: Mapping[str, Array]) -> int:
    """Give the length of the first dimension, which all arrays of a folder share: one entry for each run of the model."""
    return min((len(array) for array in arrays.values()), default=0)
