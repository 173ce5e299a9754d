"""TFRecord framing: checksums that are those of the standard, whatever the length, and records that TensorFlow wrote."""

from __future__ import annotations

import numpy as np
import pytest

from edge_serve_converters.record_framing import HEADER, crc32c, framed, is_header
from tests.unit.record_files import plain_crc


@pytest.mark.parametrize(
    ("data", "checksum"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # this and the next two: RFC 3720, appendix B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_checksums_are_those_of_the_standard(data: bytes, checksum: int) -> None:
    assert crc32c(data) == checksum


@pytest.mark.parametrize("length", [1, 127, 1000, 4095, 4096, 4097, 4224, 4225, 8191, 16385, 70_001])
def test_long_data_have_the_same_checksum_as_bit_by_bit(length: int) -> None:
    data = np.random.default_rng(length).bytes(length)
    assert crc32c(data) == plain_crc(data)


def test_a_record_is_what_tensorflow_writes() -> None:
    # TFRecordWriter of TensorFlow 2.21 on b"edge".
    assert framed(b"edge") == bytes.fromhex("040000000000000042455204656467654cf49700")


def test_a_header_is_known_by_its_checksum() -> None:
    head = framed(b"record")[: HEADER.size]
    assert is_header(head)
    assert not is_header(head[:-1])
    for place in range(len(head)):
        damaged = bytearray(head)
        damaged[place] ^= 0x10
        assert not is_header(bytes(damaged))
