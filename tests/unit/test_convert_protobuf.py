"""Protocol buffers' wire format: the bytes of the documentation's examples, and refusals for bytes that are no message."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_serve_converters.protobuf import (
    bytes_field,
    double_field,
    fields,
    integer_field,
    packed_integers,
    text_field,
)


def test_fields_are_written_as_the_documentation_shows() -> None:
    assert integer_field(1, 150).hex() == "089601"
    assert text_field(2, "testing").hex() == "120774657374696e67"
    assert bytes_field(3, integer_field(1, 150)).hex() == "1a03089601"
    assert double_field(2, 1.0).hex() == "11000000000000f03f"
    assert integer_field(16, 0).hex() == "800100", "field numbers above 15 take two bytes"


def test_what_is_written_is_read() -> None:
    message = integer_field(1, 2**63) + text_field(2, "größe" * 40) + double_field(3, -2.5) + bytes_field(2, b"")
    found: list[tuple[int, Any]] = list(fields(memoryview(message), "message"))
    assert found == [
        (1, 2**63),
        (2, ("größe" * 40).encode()),
        (3, int.from_bytes(np.float64(-2.5).tobytes(), "little")),
        (2, b""),
    ]


def test_packed_integers_are_read_with_their_sign() -> None:
    packed = bytes.fromhex("00ac02ffffffffffffffffff01")
    np.testing.assert_array_equal(packed_integers(memoryview(packed)), [0, 300, -1])
    assert len(packed_integers(memoryview(b""))) == 0


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("00", "is no cake"),
        ("0b", "is no cake"),
        ("80", "ends within a number"),
        ("08", "ends within a number"),
        ("08ffffffffffffffffffff01", "too long"),
        ("0a05616263", "ends within a field"),
        ("09000000", "ends within a field"),
    ],
)
def test_what_is_no_message_is_refused(message: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        list(fields(memoryview(bytes.fromhex(message)), "cake"))


@pytest.mark.parametrize(("packed", "reason"), [("0180", "ends within a number"), ("ff" * 10 + "01", "too long")])
def test_what_is_no_list_is_refused(packed: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        packed_integers(memoryview(bytes.fromhex(packed)))
