"""The file of marks: what each worker has in work, and what earlier processes died on (quarantine.py says how it is used).

A header, STRIKES places for strikes, SLOTS places for workers, PLACE bytes each. Strikes have a checksum; a mark is valid from
the moment that its first byte says so, and is written and taken back by one thread. The kernel keeps what a killed process
has stored, to the last byte.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

FILE = "marks"
# Points of one death, and what they lead to.
EXPLAINED, UNEXPLAINED = 2, 1
DOUBT, CONVICTION = 2, 3
# Bytes of the blake2b of a whole payload.
STRONG = 16

# The file: a header, the strikes, the workers' slots.
MAGIC = b"ESMARKS1"
STRIKES = 32
SLOTS = 64
PLACE = 256
_HEADER = struct.Struct("<8s40s")
# points, explained, model, length, CRC, monotonic seconds, blake2b, delegate, frame id, pipeline; its own CRC follows.
_STRIKE = struct.Struct("<BBxxIIId16s32s96s64s")
_CHECK = struct.Struct("<I")
# thread, pid, model, delegate, pipeline: written once by the worker.
OWNER = struct.Struct("<QII32s64s")
# length, CRC, frame id: written for every input; blake2b behind it for suspects.
MARK = struct.Struct("<II96s")
OWNER_AT, MARK_AT, STRONG_AT = 8, 120, 224
FREE, MARKED, EXAMINED = 0, 1, 2
STRIKES_AT = PLACE
SLOTS_AT = STRIKES_AT + STRIKES * PLACE
SIZE = SLOTS_AT + SLOTS * PLACE

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(slots=True, eq=False)
class Strike:
    """What is known of a payload that the process has died on."""

    pipeline: str
    model: int
    length: int
    crc: int
    strong: bytes
    """blake2b of the whole payload; empty until it has been seen twice."""
    points: int
    explained: bool
    """Whether it was proven that the payload (on `delegate`) was what killed the process."""
    delegate: str
    identity: str
    at: float
    """Monotonic seconds of this boot."""
    place: int = -1
    told: bool = False

    @property
    def convicted(self) -> bool:
        """Say whether the payload is not to be run any more."""
        return self.points >= CONVICTION

    @property
    def suspected(self) -> bool:
        """Say whether the payload's next run is a trial."""
        return 0 < self.points < CONVICTION

    @property
    def demotes(self) -> bool:
        """Say whether the pipeline avoids `delegate` because of it."""
        return not self.convicted and (self.explained or self.points >= DOUBT)

    def is_of(self, mark: Mark) -> bool:
        """Say whether a mark may be of this payload."""
        same = (self.pipeline, self.model, self.length, self.crc) == (mark.pipeline, mark.model, mark.length, mark.crc)
        return same and (not self.strong or not mark.strong or self.strong == mark.strong)


@dataclass(frozen=True, slots=True)
class Mark:
    """What a dead worker had in work."""

    thread: int
    pid: int
    pipeline: str
    model: int
    delegate: str
    length: int
    crc: int
    strong: bytes
    identity: str


def _boot() -> bytes:
    try:
        return BOOT_ID.read_bytes().strip()[:36]
    except OSError:
        return b"unknown"


def open_file(folder: Path) -> tuple[mmap.mmap, int]:
    """Open, lock and map the file; begin it anew if it is not this boot's. OSError says why that cannot be."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    # In a folder of all users anybody may have taken the name before. A link may be there, too: systemd makes one.
    if not {folder.lstat().st_uid, folder.stat().st_uid} <= {os.geteuid(), 0}:
        raise PermissionError(errno.EPERM, "the folder belongs to somebody else")
    fd = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            # The kernel gives it back with the process, however that ends: who has it finds the marks of the dead only.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another process of this state directory is running") from error
        header = _HEADER.pack(MAGIC, _boot())
        known = os.fstat(fd).st_size == SIZE and os.pread(fd, len(header), 0) == header
        if not known:
            os.ftruncate(fd, 0)
            # Room for all of it now: a store into a page for which there is none would end the process.
            os.posix_fallocate(fd, 0, SIZE)
            os.pwrite(fd, header, 0)
        return mmap.mmap(fd, SIZE), fd
    except BaseException:
        os.close(fd)
        raise


def short(delegate: str) -> str:
    """Give a delegate's name as it comes back from a record."""
    return _text(delegate.encode(errors="replace")[:32])


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def unpack_strike(memory: mmap.mmap, place: int) -> Strike | None:
    """Read the strike at a place; None if there is none, or a torn one."""
    at = STRIKES_AT + place * PLACE
    record = memory[at : at + _STRIKE.size]
    if not any(record) or _CHECK.unpack_from(memory, at + _STRIKE.size)[0] != crc32(record):
        return None
    points, explained, model, length, crc, when, strong, delegate, identity, pipeline = _STRIKE.unpack(record)
    strong = strong if any(strong) else b""
    fields = (
        _text(pipeline),
        model,
        length,
        crc,
        strong,
        points,
        bool(explained),
        _text(delegate),
        _text(identity),
        when,
    )
    return Strike(*fields, place=place)


def write_strike(memory: mmap.mmap, strike: Strike) -> None:
    """Write a strike to its place."""
    record = _STRIKE.pack(
        strike.points,
        strike.explained,
        strike.model,
        strike.length,
        strike.crc,
        strike.at,
        strike.strong,
        strike.delegate.encode(errors="replace"),
        strike.identity.encode(errors="replace"),
        strike.pipeline.encode(),
    )
    at = STRIKES_AT + strike.place * PLACE
    memory[at : at + _STRIKE.size + _CHECK.size] = record + _CHECK.pack(crc32(record))


def unpack_mark(memory: mmap.mmap, at: int) -> Mark:
    """Read the mark of the worker whose place begins at a byte."""
    thread, pid, model, delegate, pipeline = OWNER.unpack_from(memory, at + OWNER_AT)
    length, crc, identity = MARK.unpack_from(memory, at + MARK_AT)
    strong = memory[at + STRONG_AT : at + STRONG_AT + STRONG] if memory[at] == EXAMINED else b""
    return Mark(thread, pid, _text(pipeline), model, _text(delegate), length, crc, strong, _text(identity))
