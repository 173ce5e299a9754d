"""A folder of WAV files as calibration data: recordings are cut into windows and normalized as on the device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec
from edge_serve_converters.plan import SignaturePlan, as_input
from edge_serve_converters.source import Layout, Source, folder_names, listed, only_input
from edge_serve_converters.store import Array, Arrays
from edge_serve_converters.wav import WavFile
from edge_serve_converters.windows import normalize, window_layout, window_starts

SUFFIXES = frozenset({".wav", ".wave"})
# Floats in a WAV file are -1..1 by convention; a little more is clipping, this much is another scale.
LOUDEST = 2.0


class WavSource(Source):
    """WAV files, in the order of their paths; all windows of all of them, none across two.

    Files that are shorter than one window are left out with a note: zeros in their place would be silence that nobody
    recorded. Only the windows that are drawn are read.
    """

    unit = "WAV file"

    def __init__(self, path: Path, files: Sequence[Path], spec: InputSpec) -> None:
        super().__init__(path, spec)
        if spec.kind not in (None, "window"):
            raise UsageError(f"{path}: holds WAV files, which become windows; say --kind window, not {spec.kind}")
        self._paths = files
        self._files = [WavFile.open(file) for file in files]
        self._check_rates()
        self._file = np.empty(0, np.int64)
        self._start = np.empty(0, np.int64)
        self._length = 1
        self._loud = False
        self._digest = hashlib.sha256()

    def _check_rates(self) -> None:
        wanted, by = self._files[0].rate, str(self._files[0].path)
        if self.spec.rate_hz is not None:
            wanted, by = int(self.spec.rate_hz) if self.spec.rate_hz.is_integer() else 0, "--rate-hz"
        for file in self._files:
            if file.rate != wanted:
                said = f"{self.spec.rate_hz:g}" if self.spec.rate_hz is not None else str(wanted)
                raise UsageError(
                    f"{file.path}: has {file.rate} samples a second, {by} says {said}; nothing is resampled: "
                    "bring all files to the rate that the model was trained on"
                )

    @property
    def units(self) -> int:
        """Give the number of files."""
        return len(self._files)

    def open(self, signature: SignaturePlan) -> Layout:
        """Cut the recordings; UsageError if one has other channels than the model, or none is long enough."""
        entry = only_input(self.path, signature)
        length, channels = window_layout(entry, self.spec)
        for file in self._files:
            if file.channels != channels:
                raise UsageError(
                    f"{file.path}: has {file.channels} channels; input {entry.name!r} of shape {list(entry.shape)} takes "
                    f"{channels}. Mix or select channels first, as in training"
                )
        starts = [window_starts(file.frames, length, self.spec.hop) for file in self._files]
        short = [file.path.name for file, windows in zip(self._files, starts, strict=True) if not len(windows)]
        if len(short) == len(self._files):
            raise UsageError(
                f"{self.path}: no WAV file is as long as one window of input {entry.name!r}, {length} samples"
            )
        if short:
            self.notes.append(
                f"{len(short)} of {len(self._files)} WAV files are shorter than one window ({length} samples) and left out: "
                f"{listed(short)}"
            )
        self._length = length
        self._start = np.concatenate(starts)
        self._file = np.repeat(np.arange(len(starts)), [len(windows) for windows in starts])
        if len(short) == len(self._files) - 1:
            # Neighbours in one recording are alike even where they share no sample: split in time, not at random.
            return Layout(len(self._start), self._start, length)
        return Layout(len(self._start), files=self._file)

    def take(self, signature: SignaturePlan, indices: Array) -> Arrays:
        """Read windows by index, scaled to -1..1 and normalized by mean and std."""
        entry = only_input(self.path, signature)
        channels = self._files[0].channels
        windows = np.empty((len(indices), self._length, channels), np.float32)
        for number in np.unique(self._file[indices]).tolist():
            places = np.flatnonzero(self._file[indices] == number)
            file, starts = self._files[number], self._start[indices[places]]
            windows[places] = file.read(starts, self._length)
            loudest = float(np.abs(windows[places]).max())
            if loudest > LOUDEST and not self._loud:
                self._loud = True  # of a thousand such files one is enough to know
                self.notes.append(
                    f"{file.path}: has samples up to {loudest:g}, where WAV files hold -1..1: they are taken as they are"
                )
            self._digest.update(f"{file.path.relative_to(self.path).as_posix()} {starts.tolist()}\n".encode())
        self._digest.update(windows.tobytes())
        return {entry.name: as_input(normalize(windows, self.spec), entry, str(self.path))}

    def folders(self) -> list[str]:
        """Give the folder of each file."""
        return folder_names(self.path, self._paths)

    def fold(self, values: Array) -> Array:
        """Give each window its file's label."""
        if values.ndim != 1:
            raise UsageError(f"{self.path}: masks are for pictures and .npz data; a WAV file has one class")
        return values[self._file]

    def fingerprint(self) -> str:
        """Hash the names, places and samples of the windows that were drawn."""
        return self._digest.hexdigest()
