"""The files that TFLite Metadata appends to a model: a ZIP behind the flatbuffer, read member by member within limits.

Layout as in PKWARE's APPNOTE 6.3. This is no general unzip: `zipfile` reads a whole directory whatever its size, and its
import is slower than the start of a small model. Stored and deflated members are read; ZIP64 is not.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from edge_serve.model.flatbuffer import Source

END = struct.Struct("<4s4H2IH")
ENTRY = struct.Struct("<4s6H3I5H2I")
LOCAL = struct.Struct("<4s5H3I2H")
END_MARK, ENTRY_MARK, LOCAL_MARK = b"PK\5\6", b"PK\1\2", b"PK\3\4"
STORED, DEFLATED = 0, 8
ENCRYPTED = 1
MAX_COMMENT_BYTES = 0xFFFF
# Some label and vocabulary files; a longer directory is none of a model.
MAX_DIRECTORY_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Member:
    """One file as the directory says it."""

    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    position: int
    """Of the local header, in the whole file."""


@dataclass(frozen=True, slots=True)
class Archive:
    """The directory that was read."""

    source: Source
    members: tuple[Member, ...]

    @property
    def start(self) -> int:
        """Give the position of its first byte: where the flatbuffer ends."""
        return min(member.position for member in self.members)

    def read(self, name: str, most: int) -> bytes:
        """Unpack a file of at most `most` bytes; ValueError if it is not there, larger, damaged or packed unusually."""
        member = next((member for member in self.members if member.name == name), None)
        if member is None:
            raise ValueError(f"{name!r} is not among the files that the model carries")
        if member.size > most or member.packed > most:
            raise ValueError(f"{name!r} has {max(member.size, member.packed)} bytes; {most} at most are read")
        local = LOCAL.unpack(self.source.read(member.position, LOCAL.size))
        if local[0] != LOCAL_MARK or member.flags & ENCRYPTED:
            raise ValueError(f"{name!r} is damaged or encrypted")
        data = self.source.read(member.position + LOCAL.size + local[9] + local[10], member.packed)
        if member.method == DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
            except zlib.error as error:
                raise ValueError(f"{name!r} cannot be unpacked ({error})") from error
        elif member.method != STORED:
            raise ValueError(f"{name!r} is packed by method {member.method}; store it")
        if len(data) != member.size or zlib.crc32(data) != member.crc:
            raise ValueError(f"{name!r} is damaged: its length or checksum is wrong")
        return data


def open_archive(source: Source) -> Archive | None:
    """Read the directory of the ZIP at the end of a file; None if there is no ZIP, or none with files that can be read."""
    try:
        return _open(source)
    except (ValueError, struct.error):
        return None


def _open(source: Source) -> Archive | None:
    tail_size = min(source.size, END.size + MAX_COMMENT_BYTES)
    tail = source.read(source.size - tail_size, tail_size)
    at = tail.rfind(END_MARK)
    # The mark may also stand in the comment, or in weights: the comment's length has to lead exactly to the end.
    while at >= 0 and (len(tail) - at < END.size or at + END.size + END.unpack_from(tail, at)[7] != len(tail)):
        at = tail.rfind(END_MARK, 0, at)
    if at < 0:
        return None
    _, _, _, _, count, size, offset, _ = END.unpack_from(tail, at)
    position = source.size - tail_size + at - size
    # Offsets count from the ZIP's own beginning or from the file's, as the writer liked it.
    base = position - offset
    if size > MAX_DIRECTORY_BYTES or base < 0:
        return None
    directory = source.read(position, size)
    members = []
    place = 0
    for _ in range(count):
        entry = ENTRY.unpack_from(directory, place)
        name = directory[place + ENTRY.size : place + ENTRY.size + entry[10]]
        if entry[0] != ENTRY_MARK or len(name) != entry[10]:
            return None
        members.append(
            Member(name.decode("utf-8", "replace"), entry[3], entry[4], entry[7], entry[8], entry[9], base + entry[16])
        )
        place += ENTRY.size + entry[10] + entry[11] + entry[12]
    if not members or any(member.position >= position for member in members):
        return None
    return Archive(source, tuple(members))
