"""TFRecord files taken apart by somebody who knows nothing of who writes them: a CRC bit by bit."""

from __future__ import annotations

import struct


def plain_crc(data: bytes) -> int:
    """CRC-32C of its definition: one bit after the other."""
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF


def unmasked(crc: int) -> int:
    """Undo what records do to their checksums."""
    turned = (crc - 0xA282EAD8) & 0xFFFFFFFF
    return (turned >> 17 | turned << 15) & 0xFFFFFFFF


def records(data: bytes) -> list[bytes]:
    """Take a file apart and check both checksums of each record."""
    found = []
    while data:
        length = struct.unpack("<Q", data[:8])[0]
        body, rest = data[12 : 12 + length], data[12 + length :]
        assert unmasked(struct.unpack("<I", data[8:12])[0]) == plain_crc(data[:8])
        assert unmasked(struct.unpack("<I", rest[:4])[0]) == plain_crc(body)
        found.append(body)
        data = rest[4:]
    return found
