"""WAV files: where the samples lie and how they become -1..1.

RIFF/WAVE as in Microsoft's Multimedia Programming Interface 1.0 and its WAVE_FORMAT_EXTENSIBLE: chunks of a name, a
little-endian length and bytes, padded to an even length. Read are PCM of 8 (unsigned), 16, 24 and 32 bit and floats of 32
and 64 bit; the standard library's `wave` knows no floats.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edge_serve.errors import UsageError
from edge_serve_converters.store import Array

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
MAX_CHANNELS = 64
MAX_CHUNKS = 1000
_CHUNK = struct.Struct("<4sI")
_FORMAT = struct.Struct("<HHIIHH")
# After the common fields: size of the extension, valid bits, speakers, and the sub-format whose first two bytes are the tag.
_SUB_FORMAT_AT = 24
_MAX_FORMAT_BYTES = 1024
# What programs write that do not know the length yet (recording to a pipe).
_UNKNOWN_LENGTH = 0xFFFFFFFF
_KINDS = {(PCM, 8): "u1", (PCM, 16): "<i2", (PCM, 24): "u1", (PCM, 32): "<i4", (FLOAT, 32): "<f4", (FLOAT, 64): "<f8"}


@dataclass(frozen=True, slots=True)
class WavFile:
    """One recording: `frames` moments of `channels` samples each, `rate` moments a second."""

    path: Path
    rate: int
    channels: int
    frames: int
    kind: int
    bits: int
    offset: int

    @classmethod
    def open(cls, path: Path) -> WavFile:
        """Read the header; UsageError says what is wrong with the file."""
        try:
            with path.open("rb") as stream:
                return cls._parse(path, stream)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from error

    @classmethod
    def _parse(cls, path: Path, stream: BinaryIO) -> WavFile:
        head = stream.read(12)
        if head[:4] in (b"RF64", b"RIFX") or head[8:] != b"WAVE" or head[:4] != b"RIFF":
            raise UsageError(f"{path}: is no WAV file (RIFF/WAVE); remove it, or save it as 16-bit PCM")
        size = path.stat().st_size
        form: tuple[int, int, int, int] | None = None
        for _ in range(MAX_CHUNKS):
            chunk = stream.read(_CHUNK.size)
            if len(chunk) < _CHUNK.size:
                break
            name, length = _CHUNK.unpack(chunk)
            if name == b"fmt ":
                form = _read_format(path, stream.read(min(length, _MAX_FORMAT_BYTES)))
                stream.seek(max(0, length - _MAX_FORMAT_BYTES) + length % 2, 1)
            elif name == b"data":
                if form is None:
                    raise UsageError(f"{path}: is no whole WAV file, its samples come before their format")
                kind, channels, rate, bits = form
                offset = stream.tell()
                if length == _UNKNOWN_LENGTH:
                    length = size - offset
                if offset + length > size:
                    raise UsageError(
                        f"{path}: ends within its samples ({size - offset} of {length} bytes are there); copy it again"
                    )
                return cls(path, rate, channels, length // (channels * bits // 8), kind, bits, offset)
            else:
                stream.seek(length + length % 2, 1)
        raise UsageError(f"{path}: is no whole WAV file, it has no samples (no data chunk)")

    def read(self, starts: Array, length: int) -> Array:
        """Give [len(starts), length, channels] float32, -1..1; UsageError where the file holds no finite numbers."""
        size = self.channels * self.bits // 8
        windows = np.empty((len(starts), length, self.channels), np.float32)
        try:
            with self.path.open("rb") as stream:
                for window, start in zip(windows, starts.tolist(), strict=True):
                    stream.seek(self.offset + start * size)
                    window[:] = self._scaled(stream.read(length * size)).reshape(length, self.channels)
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.path}: cannot be read, it may have changed ({error})") from error
        finite = np.isfinite(windows).all(axis=(1, 2))
        if not finite.all():
            start = int(starts[int(finite.argmin())])
            raise UsageError(
                f"{self.path}: holds NaN or infinite values within {length} samples from sample {start}; remove or mend it"
            )
        return windows

    def _scaled(self, raw: bytes) -> Array:
        values = np.frombuffer(raw, _KINDS[self.kind, self.bits])
        if self.kind == FLOAT:
            with np.errstate(over="ignore"):  # found as infinite
                return values.astype(np.float32)
        if self.bits == 8:
            return (values.astype(np.float32) - 128) / 128
        if self.bits == 24:
            # Three bytes become the upper ones of four, which keeps the sign.
            wide = np.zeros((len(values) // 3, 4), np.uint8)
            wide[:, 1:] = values.reshape(-1, 3)
            values = wide.view("<i4")[:, 0]
        return (values / 2.0 ** (15 if self.bits == 16 else 31)).astype(np.float32)


def _read_format(path: Path, content: bytes) -> tuple[int, int, int, int]:
    """Give tag, channels, rate and bits."""
    if len(content) < _FORMAT.size:
        raise UsageError(f"{path}: is no whole WAV file, its format is cut off")
    kind, channels, rate, _, _, bits = _FORMAT.unpack_from(content)
    if kind == EXTENSIBLE and len(content) >= _SUB_FORMAT_AT + 2:
        kind = int.from_bytes(content[_SUB_FORMAT_AT : _SUB_FORMAT_AT + 2], "little")
    if (kind, bits) not in _KINDS:
        raise UsageError(
            f"{path}: holds samples of format {kind:#x} with {bits} bit; PCM of 8, 16, 24 or 32 bit and float are read. "
            "Save it as 16-bit PCM"
        )
    if not 1 <= channels <= MAX_CHANNELS or rate < 1:
        raise UsageError(f"{path}: says {channels} channels at {rate} Hz; this is no whole WAV file")
    return kind, channels, rate, bits
