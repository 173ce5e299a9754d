"""What a capture recorded, at the end that asked for it: gathered within its bounds, and written as one .npz file.

The file holds one array [samples, *sample_shape] for each of the model's inputs, by the input's name, in real values; that
is what `edge-serve convert --calibration` takes. It is written beside its place and renamed: never half a file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from edge_serve.capture import MAX_SAMPLES, Layout, Part
from edge_serve.errors import ProtocolError, UnavailableError, UsageError

MAX_PARTS = 256
MAX_DIMENSIONS = 32
# The numbers that a tensor can hold.
DTYPES = (
    "bool",
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    "float16",
    "float32",
    "float64",
)
# Names and shapes of the arrays, and the archive's table of contents.
FILE_OVERHEAD = 64 * 1024
# A ZIP entry needs a date; the earliest that one can have, so that equal samples make equal files.
EPOCH = (1980, 1, 1, 0, 0, 0)


class Recording:
    """Samples by slot, in at most `max_bytes` of memory."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._slots: dict[int, bytes] = {}
        self.layout: Layout | None = None

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Give the bytes of all samples."""
        return len(self._slots) * self.layout.nbytes if self.layout is not None else 0

    def begin(self, header: Mapping[str, Any]) -> Layout:
        """Take the service's word for what samples look like; ProtocolError if it makes no sense or breaks the bound."""
        try:
            parts = tuple(_part(entry) for entry in header["parts"])
            layout = Layout(parts, int(header["capacity"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProtocolError(f"the service described its samples in no way that is known here: {error}") from error
        names = {part.name for part in parts}
        right = 1 <= len(parts) == len(names) <= MAX_PARTS and 1 <= layout.capacity <= MAX_SAMPLES
        if not right or layout.capacity * layout.nbytes > self._max_bytes:
            raise ProtocolError("the service wants to send more than was asked for")
        self.layout = layout
        return layout

    def put(self, header: Mapping[str, Any], body: bytes | None) -> None:
        """Take one sample; a later one in the same slot replaces the earlier. ProtocolError if it does not fit."""
        slot = header.get("slot")
        if self.layout is None or not isinstance(slot, int) or not 0 <= slot < self.layout.capacity:
            raise ProtocolError(f"the service sent a sample for no slot that there is: {slot!r:.40}")
        if body is None or len(body) != self.layout.nbytes:
            raise ProtocolError(f"the service sent a sample that is not {self.layout.nbytes} bytes long")
        self._slots[slot] = body

    def write(self, stream: IO[bytes]) -> None:
        """Write an uncompressed .npz (NumPy's format 1.0 in a ZIP): boards are slow, and measured values pack badly."""
        assert self.layout is not None
        order = sorted(self._slots)
        offset = 0
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for part in self.layout.parts:
                entry = zipfile.ZipInfo(f"{part.name}.npy", EPOCH)
                with archive.open(entry, "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(
                        member,
                        {
                            "descr": np.dtype(part.dtype).str,
                            "fortran_order": False,
                            "shape": (len(order), *part.shape),
                        },
                    )
                    for slot in order:
                        member.write(memoryview(self._slots[slot])[offset : offset + part.nbytes])
                offset += part.nbytes


def _part(entry: Mapping[str, Any]) -> Part:
    name, shape, dtype = entry["name"], entry["shape"], entry["dtype"]
    right = isinstance(name, str) and isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    # numpy must not be asked: it evaluates what a name holds as Python.
    if not right or not all(type(size) is int and 0 < size < 2**31 for size in shape) or dtype not in DTYPES:
        raise ValueError(f"{entry!r:.200}")
    return Part(name, dtype, tuple(shape))


class Draft:
    """The file while it is not there yet: beside its place, so that what cannot be written is known before anything else."""

    def __init__(self, path: Path, *, force: bool) -> None:
        """Make the draft. UsageError if `path` is no name for it, is taken (unless `force`), or cannot be written."""
        if path.suffix.lower() != ".npz":
            raise UsageError(f"{path}: is written as .npz; name it so, that `edge-serve convert` knows it")
        self.path = path
        self._force = force
        self._draft = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            if path.is_dir():
                raise UsageError(f"{path}: is a folder; give the name of a file in it")
            if not force and (path.exists() or path.is_symlink()):
                raise UsageError(f"{path}: exists; choose another name, or replace it with --force")
            self._draft.unlink(missing_ok=True)  # of a process that had this number and was killed
            self._stream = self._draft.open("xb")
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be written there ({error.strerror}); choose a folder that is there and that you may write"
            ) from error
        self._kept = False

    def reserve(self, size: int) -> None:
        """Claim disk space for that many bytes of samples; UnavailableError if there is too little."""
        try:
            os.posix_fallocate(self._stream.fileno(), 0, size + FILE_OVERHEAD)
        except OSError as error:
            # File systems that cannot reserve say something else; then the disk has to prove itself at the end.
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise self._full(error) from error

    def _full(self, error: OSError) -> UnavailableError:
        return UnavailableError(
            f"{self.path}: cannot be written ({error.strerror}); make room, or record less (--samples, --max-bytes)"
        )

    def keep(self, recording: Recording) -> int:
        """Write it to the end and put it into its place; gives the file's size in bytes."""
        try:
            recording.write(self._stream)
            size = self._stream.tell()
            self._stream.truncate()  # not earlier: what was reserved would be given back before it is used
            os.fsync(self._stream.fileno())
            self._stream.close()
        except OSError as error:
            raise self._full(error) from error
        try:
            self._place()
        except OSError as error:
            self._kept = True
            raise UnavailableError(
                f"{self.path}: cannot be put there ({error.strerror}); the samples are in {self._draft}"
            ) from error
        self._kept = True
        return size

    def _place(self) -> None:
        if self._force:
            self._draft.replace(self.path)
            return
        try:
            # Unlike a rename, a link never replaces what came there in the meantime.
            os.link(self._draft, self.path)
        except FileExistsError:
            raise
        except OSError:  # memory cards' file systems know no links
            if self.path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
            self._draft.replace(self.path)
        else:
            self._draft.unlink()

    def __enter__(self) -> Draft:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        # Flushing what was buffered may fail on a full disk; what was wrong is told already.
        with contextlib.suppress(OSError):
            self._stream.close()
        if not self._kept:
            with contextlib.suppress(OSError):
                self._draft.unlink()
