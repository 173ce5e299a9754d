"""How a TFRecord file frames its records, which TensorFlow's data, warm-up requests and TensorBoard's events have in common.

A record is a little-endian length (8 bytes), the masked CRC32C of the length (4), the bytes, and their masked CRC32C (4):
tensorflow/core/lib/io/record_writer.h, lib/hash/crc32c.h.
"""

from __future__ import annotations

import struct
from functools import cache

import numpy as np

from edge_serve_converters.store import Array

HEADER = struct.Struct("<QI")
"""Length and its checksum."""
FOOTER = struct.Struct("<I")
"""The checksum of the bytes."""
# Castagnoli's polynomial, bits reversed (RFC 3720, appendix B.4).
_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8
# Up to here a plain loop takes less time than numpy needs to begin.
_SHORT_BYTES = 4096
# Bytes that one lane of the vectorized checksum takes.
_LANE = 128


def framed(data: bytes) -> bytes:
    """Give bytes as a record."""
    length = struct.pack("<Q", len(data))
    return HEADER.pack(len(data), masked_crc32c(length)) + data + FOOTER.pack(masked_crc32c(data))


def is_header(head: bytes) -> bool:
    """Tell whether these are the 12 bytes that a record begins with."""
    return len(head) == HEADER.size and HEADER.unpack(head)[1] == masked_crc32c(head[:8])


def masked_crc32c(data: bytes) -> int:
    """Give the checksum as records hold it: rotated and moved, so that a checksum of checksums is no trivial one."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Give the CRC-32C (RFC 3720, appendix B.4) of bytes.

    Long data are cut into lanes that advance together, since a byte at a time takes Python a second for ten megabytes;
    two neighbours combine by moving the left one past the right one's bytes, which is linear.
    """
    if len(data) <= _SHORT_BYTES:
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
