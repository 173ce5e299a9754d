"""Append-only files of large bodies: `segments/<number>.seg`, frames of a length, a CRC-32 and the bytes.

A large body inside the database would be written twice (log, then table) and torn into pages; here it is written once.
A row names its segment, offset and size. A file is deleted when no row names it any more, never rewritten.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from pathlib import Path

from edge_serve.errors import EdgeServeError

FOLDER = "segments"
SUFFIX = ".seg"
# Bodies over this many bytes go to a segment; below it, a row with an overflow chain of a few pages is cheaper.
INLINE_LIMIT = 16 * 1024
# A file is closed when it is this long: space comes back in pieces of this size.
SEGMENT_BYTES = 16 * 1024 * 1024
# Before each body: its length and its CRC-32, little-endian.
FRAME = struct.Struct("<II")
# What keeps a file from being read and says nothing of it.
PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR})


class SegmentDamagedError(EdgeServeError):
    """A body is not where its row says, or not what was written."""


class Segments:
    """The segment files of one spool; used by one thread."""

    def __init__(self, folder: Path, *, durable: bool) -> None:
        self._folder = folder
        self._durable = durable
        self._open: dict[int, tuple[int, int, int]] = {}  # by lane: number, file descriptor, length
        self._unsynced: set[int] = set()
        self._marks: dict[int, tuple[int, int]] = {}  # by lane, as the transaction began: number, length
        self._next = 1 + max(self.numbers(), default=0)

    def path(self, number: int) -> Path:
        """Give a segment's file."""
        return self._folder / f"{number:08d}{SUFFIX}"

    def numbers(self) -> list[int]:
        """Give the numbers of all files that are there."""
        with contextlib.suppress(FileNotFoundError):
            return [
                int(each.stem) for each in self._folder.iterdir() if each.suffix == SUFFIX and each.stem.isdecimal()
            ]
        return []

    def append(self, lane: int, body: bytes, crc: int) -> tuple[int, int]:
        """Write a body to the lane's segment; gives the segment's number and the offset of the frame.

        Each lane has files of its own, so that one that waits long keeps no others' bytes. OSError if there is no room.
        """
        number, fd, length = self._open.get(lane) or self._begin(lane)
        self._marks.setdefault(lane, (number, length))
        data = memoryview(FRAME.pack(len(body), crc) + body)
        position = length
        while data:
            written = os.pwrite(fd, data, position)
            data, position = data[written:], position + written
        self._open[lane] = (number, fd, position)
        if self._durable:
            self._unsynced.add(fd)
        if position >= SEGMENT_BYTES:
            self._end(lane)
        return number, length

    def _begin(self, lane: int) -> tuple[int, int, int]:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        number = self._next
        fd = os.open(self.path(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._next += 1
        if self._durable:
            for folder in (self._folder, self._folder.parent):
                sync_folder(folder)
        self._open[lane] = (number, fd, 0)
        self._marks[lane] = (number, 0)
        return number, fd, 0

    def _end(self, lane: int) -> None:
        _, fd, _ = self._open.pop(lane)
        self._marks.pop(lane, None)
        unsynced = fd in self._unsynced
        self._unsynced.discard(fd)
        try:
            if unsynced:
                os.fsync(fd)
        finally:
            os.close(fd)

    def sync(self) -> None:
        """Bring what was written to the disk, before the rows that name it are committed."""
        for fd in list(self._unsynced):
            os.fsync(fd)
            self._unsynced.discard(fd)

    def committed(self) -> None:
        """Note that the rows of all that was appended are there."""
        self._marks.clear()

    def rolled_back(self) -> None:
        """Take back what was appended since the last commit: it will be appended again."""
        for lane, (number, length) in self._marks.items():
            current = self._open.get(lane)
            if current is not None and current[0] == number:
                with contextlib.suppress(OSError):  # what stays is dead space, nothing worse
                    os.ftruncate(current[1], length)
                self._open[lane] = (number, current[1], length)
        self._marks.clear()

    def read(self, number: int, offset: int, size: int, crc: int) -> bytes:
        """Read a body; SegmentDamagedError if it is not there, cannot be read or is not the one that was written.

        Whether the bytes are right is for the caller to see, by the CRC of the whole row.
        """
        try:
            fd = os.open(self.path(number), os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.pread(fd, FRAME.size + size, offset)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno in PASSING:
                raise
            raise SegmentDamagedError(f"{self.path(number)} cannot be read: {error.strerror}") from error
        body = data[FRAME.size :]
        if len(body) != size or FRAME.unpack_from(data) != (size, crc):
            raise SegmentDamagedError(f"{self.path(number)}: the body at {offset} is damaged")
        return body

    def in_use(self) -> set[int]:
        """Give the files that are still appended to."""
        return {number for number, _, _ in self._open.values()}

    def delete(self, number: int) -> None:
        """Delete a file that no row names."""
        for lane, (current, _, _) in list(self._open.items()):
            if current == number:
                self._end(lane)
        with contextlib.suppress(FileNotFoundError):
            self.path(number).unlink()

    def close(self) -> None:
        """Close all files; errors of the disk are not the caller's any more."""
        for lane in list(self._open):
            with contextlib.suppress(OSError):
                self._end(lane)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk: a new file's name, a renamed one's."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
