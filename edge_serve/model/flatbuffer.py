"""Reading flatbuffers without a schema compiler: tables, vectors and texts, every access checked against the data's end.

The binary format is FlatBuffers' (flatbuffers.dev, "FlatBuffers binary format"): a table begins with a signed offset back
to its vtable, which says where each field lies; offsets to other objects are unsigned and lead forward. A file is read
piece by piece, never as a whole: a model of 100 MB costs a few small reads. Whatever the bytes are, the answer is a value
or ValueError; nothing here recurses.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from io import RawIOBase
from typing import Protocol

# Of names and descriptions this much is read; hostile tables can share one long text a thousand times.
MAX_TEXT_BYTES = 16 * 1024
# The largest table of TensorFlow Lite's schemas has 14 fields; newer ones may have more, hostile ones claim 32,000.
MAX_FIELDS = 128


class Source(Protocol):
    """Where bytes come from."""

    size: int

    def read(self, offset: int, count: int) -> bytes:
        """Give exactly `count` bytes from `offset`; ValueError if they are not there."""
        ...


class ByteSource:
    """Bytes in memory."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = memoryview(data)
        self.size = len(data)

    def read(self, offset: int, count: int) -> bytes:
        """Give exactly `count` bytes from `offset`; ValueError if they are not there."""
        if offset < 0 or count < 0 or offset + count > self.size:
            raise ValueError(f"{count} bytes at {offset} lie outside the {self.size} that are there")
        return bytes(self._data[offset : offset + count])


class FileSource:
    """An open, unbuffered file. It is read, not mapped: a file that somebody cuts short meanwhile gives an error, not a SIGBUS."""

    def __init__(self, stream: RawIOBase) -> None:
        self._stream = stream
        self.size = stream.seek(0, os.SEEK_END)

    def read(self, offset: int, count: int) -> bytes:
        """Give exactly `count` bytes from `offset`; ValueError if they are not there."""
        if offset < 0 or count < 0 or offset + count > self.size:
            raise ValueError(f"{count} bytes at {offset} lie outside the {self.size} that are there")
        self._stream.seek(offset)
        data = self._stream.read(count)
        if data is None or len(data) != count:
            raise ValueError(f"the {count} bytes at {offset} could not be read")
        return data


def number(source: Source, layout: str, offset: int) -> int | float:
    """Read one little-endian number; `layout` is a format character of `struct`."""
    value: int | float = struct.unpack("<" + layout, source.read(offset, struct.calcsize("<" + layout)))[0]
    return value


def follow(source: Source, offset: int) -> int:
    """Give the position that the offset at a position leads to."""
    return offset + int(number(source, "I", offset))


@dataclass(frozen=True, slots=True)
class Table:
    """One table. Fields are asked for by their number in the schema; None, zero or nothing stands for one that is not there."""

    source: Source
    position: int
    slots: tuple[int, ...]
    """Field number → distance from the table's position; 0 for a field that is not there."""

    @classmethod
    def at(cls, source: Source, position: int) -> Table:
        """Open the table at a position."""
        vtable = position - int(number(source, "i", position))
        size = int(number(source, "H", vtable))
        if size < 4 or size % 2 or size > 4 + 2 * MAX_FIELDS:
            raise ValueError(f"a vtable of {size} bytes at {vtable}")
        return cls(source, position, struct.unpack(f"<{(size - 4) // 2}H", source.read(vtable + 4, size - 4)))

    @classmethod
    def root(cls, source: Source) -> Table:
        """Open the table that the flatbuffer is about."""
        return cls.at(source, follow(source, 0))

    def place(self, slot: int) -> int | None:
        """Give the position of a field; None if the table does not have it."""
        distance = self.slots[slot] if slot < len(self.slots) else 0
        return self.position + distance if distance else None

    def scalar(self, slot: int, layout: str) -> int | float:
        """Give a number; 0 if it is not there, which is every default of the schemas that are read with this."""
        place = self.place(slot)
        return 0 if place is None else number(self.source, layout, place)

    def whole(self, slot: int, layout: str) -> int:
        """Give a whole number, as `scalar`."""
        return int(self.scalar(slot, layout))

    def table(self, slot: int) -> Table | None:
        """Give the table that a field leads to."""
        place = self.place(slot)
        return None if place is None else Table.at(self.source, follow(self.source, place))

    def vector(self, slot: int, item_size: int, most: int | None) -> tuple[int, int]:
        """Give the position of a vector's first item and how many it has; ValueError if those are more than `most`."""
        place = self.place(slot)
        if place is None:
            return 0, 0
        start = follow(self.source, place)
        count = int(number(self.source, "I", start))
        if start + 4 + count * item_size > self.source.size or (most is not None and count > most):
            raise ValueError(f"a vector of {count} items at {start}")
        return start + 4, count

    def data(self, slot: int, most: int) -> bytes:
        """Give a vector of bytes."""
        start, count = self.vector(slot, 1, most)
        return self.source.read(start, count)

    def numbers(self, slot: int, layout: str, most: int) -> tuple[int | float, ...]:
        """Give a vector of numbers."""
        size = struct.calcsize("<" + layout)
        start, count = self.vector(slot, size, most)
        return struct.unpack(f"<{count}{layout}", self.source.read(start, count * size))

    def tables(self, slot: int, most: int) -> list[Table]:
        """Give a vector of tables."""
        start, count = self.vector(slot, 4, most)
        return [Table.at(self.source, follow(self.source, start + 4 * index)) for index in range(count)]

    def table_in(self, slot: int, index: int) -> Table:
        """Give one table of a vector of any length, without looking at the others."""
        start, count = self.vector(slot, 4, None)
        if not 0 <= index < count:
            raise ValueError(f"item {index} of a vector of {count}")
        return Table.at(self.source, follow(self.source, start + 4 * index))

    def text(self, slot: int) -> str | None:
        """Give a text, or the beginning of a very long one. What is not UTF-8 in it is replaced, as people will read it."""
        if self.place(slot) is None:
            return None
        start, count = self.vector(slot, 1, None)
        return self.source.read(start, min(count, MAX_TEXT_BYTES)).decode("utf-8", "replace")
