"""TFRecord files without TensorFlow: where each record lies, and its bytes, checked.

A record is a little-endian length (8 bytes), the masked CRC32C of the length (4), the bytes, and their masked CRC32C (4);
the file may be gzip'd as a whole (tensorflow/core/lib/io/record_writer.h says so). Records are counted from 0.
"""

from __future__ import annotations

import array
import gzip
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from edge_serve.errors import UsageError
from edge_serve_converters.store import Array

# One sample; longer than the longest recording or picture that a device would take.
MAX_RECORD_BYTES = 256 * 2**20
MAX_RECORDS = 20_000_000
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_GZIP_MAGIC = b"\x1f\x8b\x08"
# Castagnoli's polynomial, bits reversed (RFC 3720, appendix B.4).
_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8
# Bytes that one lane of the vectorized checksum takes.
_LANE = 128


class RecordFile:
    """One TFRecord file. Opening it reads the lengths only (of a gzip'd one everything is unpacked, and nothing kept)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets = array.array("Q")
        self._packed = False
        with self._reading(), path.open("rb") as stream:
            head = stream.read(_HEADER.size)
            self._packed = head.startswith(_GZIP_MAGIC) and not _is_header(head)
        with self._open() as stream:
            self._index(stream)

    def __len__(self) -> int:
        return len(self._offsets)

    def _index(self, stream: BinaryIO) -> None:
        offset = 0
        while head := stream.read(_HEADER.size):
            where = f"{self.path}, record {len(self._offsets)}"
            if len(head) < _HEADER.size:
                raise UsageError(f"{where}: the file ends within it; copy or write the file again")
            length, _ = _HEADER.unpack(head)
            if not _is_header(head):
                what = "is no TFRecord file" if not self._offsets else "is damaged here"
                raise UsageError(f"{where}: {what}, the checksum of the length does not fit; write the file again")
            if length > MAX_RECORD_BYTES:
                raise UsageError(
                    f"{where}: has {length} bytes; at most {MAX_RECORD_BYTES} are read, one sample a record"
                )
            stream.seek(length, 1)
            if len(stream.read(_FOOTER.size)) < _FOOTER.size:
                raise UsageError(f"{where}: the file ends within it; copy or write the file again")
            if len(self._offsets) == MAX_RECORDS:
                raise UsageError(
                    f"{self.path}: holds more than {MAX_RECORDS} records; a few thousand calibrate as well"
                )
            self._offsets.append(offset)
            offset += _HEADER.size + length + _FOOTER.size

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Give (number, bytes) of records, whose numbers ascend; UsageError names one whose bytes are not as written."""
        with self._open() as stream:
            for number in numbers:
                stream.seek(self._offsets[number])
                length, _ = _HEADER.unpack(stream.read(_HEADER.size))
                payload = stream.read(length)
                footer = stream.read(_FOOTER.size)
                if len(footer) < _FOOTER.size or _FOOTER.unpack(footer)[0] != masked_crc32c(payload):
                    raise UsageError(
                        f"{self.path}, record {number}: is damaged, the checksum of its bytes does not fit; write the file again"
                    )
                yield number, payload

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        with self._reading():
            if not self._packed:
                with self.path.open("rb") as stream:
                    yield stream
                return
            with gzip.open(self.path, "rb") as packed:
                yield cast(BinaryIO, packed)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, zlib.error) as error:
            where = f", after record {len(self._offsets) - 1}" if self._offsets else ""
            raise UsageError(f"{self.path}{where}: cannot be read ({error})") from error


def _is_header(head: bytes) -> bool:
    return len(head) == _HEADER.size and _HEADER.unpack(head)[1] == masked_crc32c(head[:8])


def masked_crc32c(data: bytes) -> int:
    """Give the checksum as TFRecord files hold it: rotated and moved, so that a checksum of checksums is no trivial one."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Give the CRC-32C (RFC 3720, appendix B.4) of bytes.

    Long data are cut into lanes that advance together, since a byte at a time takes Python a second for ten megabytes;
    two neighbours combine by moving the left one past the right one's bytes, which is linear.
    """
    if len(data) <= _LANE:
        listed, crc = _byte_list(), 0xFFFFFFFF
        for byte in data:
            crc = listed[(crc ^ byte) & 0xFF] ^ crc >> 8
        return crc ^ 0xFFFFFFFF
    # Zeros before the data leave a register of 0 as it is; the true initial value, all ones, is folded into the data.
    lanes = -(-len(data) // _LANE)
    padded = np.zeros(lanes * _LANE, np.uint8)
    start = len(padded) - len(data)
    padded[start:] = np.frombuffer(data, np.uint8)
    padded[start : start + 4] ^= 0xFF
    columns = np.ascontiguousarray(padded.reshape(lanes, _LANE).T)
    table = _byte_table()
    state = np.zeros(lanes, np.uint32)
    for column in columns:
        state = table[(state ^ column) & 0xFF] ^ (state >> 8)
    level = 0
    while len(state) > 1:
        if len(state) % 2:
            state = np.concatenate([np.zeros(1, np.uint32), state])
        state = _move(state[::2], _moved_by(level)) ^ state[1::2]
        level += 1
    return int(state[0]) ^ 0xFFFFFFFF


@cache
def _byte_table() -> Array:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table


@cache
def _byte_list() -> list[int]:
    listed: list[int] = _byte_table().tolist()
    return listed


@cache
def _moved_by(level: int) -> Array:
    """Give [4, 256]: what _LANE · 2^level bytes of zeros make of each value of each byte of the register."""
    if level:
        half = _moved_by(level - 1)
        return _move(half, half)
    state = np.arange(256, dtype=np.uint32) << np.array([[0], [8], [16], [24]], np.uint32)
    for _ in range(_LANE):
        state = _byte_table()[state & 0xFF] ^ (state >> 8)
    return state


def _move(state: Array, moved: Array) -> Array:
    parts = [moved[place][state >> np.uint32(8 * place) & 0xFF] for place in range(4)]
    result: Array = parts[0] ^ parts[1] ^ parts[2] ^ parts[3]
    return result
