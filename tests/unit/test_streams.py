"""Cutting streams into lines and pictures: whole items only, however the bytes come, and never more than the limit."""

from __future__ import annotations

import random
import struct
import time

import pytest
from PIL import Image

from edge_serve.errors import InputError, TooLargeError
from edge_serve.sources.streams import JpegSplitter, LineSplitter
from tests.unit.material import encoded, noise, plain

Items = list["bytes | Exception"]


def lines(data: bytes, step: int = 1 << 20, limit: int = 1000) -> Items:
    splitter = LineSplitter(limit)
    items: Items = []
    for start in range(0, len(data), step):
        items += splitter.feed(data[start : start + step])
    return items + splitter.finish()


def pictures(data: bytes, step: int = 1 << 20, limit: int = 1 << 20) -> Items:
    splitter = JpegSplitter(limit)
    items: Items = []
    for start in range(0, len(data), step):
        items += splitter.feed(data[start : start + step])
    return items + splitter.finish()


def good(items: Items) -> list[bytes]:
    return [item for item in items if isinstance(item, bytes)]


def bad(items: Items) -> list[str]:
    return [f"{type(item).__name__}: {item}" for item in items if isinstance(item, Exception)]


# Lines.


@pytest.mark.parametrize("step", [1, 2, 3, 1000])
def test_lines_come_out_whole_without_their_ends(step: int) -> None:
    assert lines(b'{"a": 1}\n\r\n  \n[2]\r\n3', step) == [b'{"a": 1}', b"[2]", b"3"]


@pytest.mark.parametrize("data", [b"", b"\n", b"\n\n \r\n"])
def test_empty_lines_do_not_count(data: bytes) -> None:
    assert lines(data) == []


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_line_at_the_limit_passes_and_one_over_it_is_told_once(step: int) -> None:
    items = lines(b"x" * 10 + b"\n" + b"y" * 11 + b"\n" + b"z" * 500 + b"\nok\n", step, limit=10)
    assert good(items) == [b"x" * 10, b"ok"]
    assert len(bad(items)) == 2
    assert isinstance(items[1], TooLargeError)
    assert "line is longer than the limit of 10 bytes (max_payload)" in str(items[1])


def test_a_line_over_the_limit_at_the_end_of_the_stream_is_told_once() -> None:
    assert bad(lines(b"x" * 50, 20, limit=10)) == [
        "TooLargeError: line is longer than the limit of 10 bytes (max_payload)"
    ]


def test_a_line_without_end_is_not_kept() -> None:
    splitter = LineSplitter(1000)
    told = 0
    for _ in range(1000):
        told += len(splitter.feed(b"x" * 4096))
    assert told == 1
    assert splitter.feed(b"\nok\n") == [b"ok"]


def test_a_long_line_in_small_pieces_takes_linear_time() -> None:
    start = time.perf_counter()
    assert lines(b"x" * (1 << 20) + b"\n", 8, limit=1 << 21) == [b"x" * (1 << 20)]
    assert time.perf_counter() - start < 5


# Pictures.


def with_thumbnail(picture: bytes, thumbnail: bytes) -> bytes:
    """Put a whole JPEG into the header of another, as cameras do."""
    segment = b"Exif\0\0" + thumbnail
    return picture[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + picture[2:]


PICTURES = {
    "baseline": encoded(noise(40, 30), "JPEG"),
    "progressive": encoded(noise(40, 30), "JPEG", progressive=True),
    "restart markers": encoded(noise(64, 64), "JPEG", restart_marker_blocks=1),
    "gray": encoded(noise(20, 20).convert("L"), "JPEG"),
    "cmyk": encoded(noise(20, 20).convert("CMYK"), "JPEG"),
    "comment with markers": encoded(plain(8, 8), "JPEG", comment=b"\xff\xd9\xff\xd8\xff\xda\xff\xd9"),
    "thumbnail": with_thumbnail(encoded(noise(40, 30), "JPEG"), encoded(noise(16, 12), "JPEG")),
    "fill bytes": encoded(plain(8, 8), "JPEG")
    .replace(b"\xff\xdb", b"\xff\xff\xff\xdb")
    .replace(b"\xff\xd9", b"\xff\xff\xd9"),
}


@pytest.mark.parametrize("name", list(PICTURES))
@pytest.mark.parametrize("step", [1, 2, 17, 1 << 20])
def test_every_kind_of_jpeg_comes_out_as_it_went_in(name: str, step: int) -> None:
    assert pictures(PICTURES[name] * 3, step) == [PICTURES[name]] * 3


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_what_stands_between_pictures_is_passed_over(step: int) -> None:
    data = b"\0\0--boundary\r\nContent-Type: image/jpeg\r\n\r\n".join([b"", *PICTURES.values(), b"\xff"])
    assert pictures(data, step) == list(PICTURES.values())


@pytest.mark.parametrize("step", [1, 1000])
def test_a_picture_that_is_cut_off_in_its_scan_is_told_and_the_next_one_is_whole(step: int) -> None:
    first, second = PICTURES["baseline"], PICTURES["progressive"]
    items = pictures(first[: len(first) // 2] + second, step)
    assert good(items) == [second]
    assert bad(items) == ["InputError: picture is cut off: another one begins inside it"]


def test_after_a_picture_that_is_cut_off_in_its_header_pictures_come_again() -> None:
    """A segment's length swallows the beginning of the next picture, but not the one after that."""
    whole = PICTURES["baseline"]
    items = pictures(whole[:100] + whole * 3)
    assert good(items)[-2:] == [whole] * 2
    assert bad(items)


@pytest.mark.parametrize("cut", [2, 3, 5, 30, 300, 700])
def test_a_stream_that_ends_inside_a_picture_says_so(cut: int) -> None:
    whole = PICTURES["baseline"]
    assert len(whole) > 700
    items = pictures(whole + whole[:cut])
    assert good(items) == [whole]
    assert bad(items) == [f"InputError: the stream ended inside a picture, after {cut} bytes of it"]


@pytest.mark.parametrize("data", [b"", b"\xff", b"no picture at all", bytes(10_000)])
def test_a_stream_without_pictures_gives_none(data: bytes) -> None:
    assert pictures(data) == []


@pytest.mark.parametrize("step", [1, 100, 1 << 20])
def test_a_picture_over_the_limit_is_told_once_and_the_next_one_is_whole(step: int) -> None:
    small, large = encoded(plain(8, 8), "JPEG"), encoded(noise(200, 200), "JPEG")
    items = pictures(small + large + small, step, limit=len(small))
    assert good(items) == [small, small]
    assert bad(items) == [f"TooLargeError: picture is larger than the limit of {len(small)} bytes (max_payload)"]


def test_a_picture_without_end_is_not_kept() -> None:
    splitter = JpegSplitter(10_000)
    head = PICTURES["baseline"]
    items = splitter.feed(head[: head.index(b"\xff\xda") + 20])
    for _ in range(1000):
        items += splitter.feed(bytes(4096))
        assert len(splitter._buffer) <= 20_000
    assert len(items) == 1
    assert isinstance(items[0], TooLargeError)


def test_random_bytes_and_damaged_streams_never_raise_and_good_pictures_survive_at_the_end() -> None:
    rng = random.Random(7)
    whole = b"".join(PICTURES.values())
    last = PICTURES["gray"]
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 30)):
            data[rng.randrange(len(data))] = rng.choice((0xFF, 0xD8, 0xD9, 0xDA, rng.randrange(256)))
        # Two empty segments' worth of padding: a damaged length swallows at most 64 KiB.
        items = pictures(bytes(data) + bytes(70_000) + last * 3, rng.choice((100, 4096, 1 << 20)))
        assert good(items)[-2:] == [last, last]


def test_a_large_picture_in_small_pieces_takes_linear_time() -> None:
    large = encoded(Image.effect_noise((1200, 1200), 80), "JPEG", quality=95)
    assert len(large) > 800_000
    start = time.perf_counter()
    assert pictures(large, 8, limit=1 << 23) == [large]
    assert time.perf_counter() - start < 8


def test_errors_are_of_the_kind_that_settles_one_input() -> None:
    items = pictures(PICTURES["baseline"][:-2])
    assert isinstance(items[0], InputError)
