"""The socket protocol's framing, byte by byte: what comes out, what is refused, what is let go."""

from __future__ import annotations

import json
import time

import pytest

from edge_serve.errors import ProtocolError
from edge_serve.framing import MAX_HEADER, Message, Reader, encode


def messages(reader: Reader) -> list[Message]:
    found = []
    while (message := reader.next()) is not None:
        found.append(message)
    return found


def test_a_message_is_a_json_line_and_then_its_bytes() -> None:
    data = encode({"type": "frame", "id": "ä"}, b"\n{}\xff")
    assert data == '{"type":"frame","id":"ä","length":4}\n'.encode() + b"\n{}\xff"
    reader = Reader()
    reader.feed(data)
    assert messages(reader) == [Message({"type": "frame", "id": "ä", "length": 4}, b"\n{}\xff")]
    assert not reader.inside
    reader.finish()


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_it_does_not_matter_how_the_bytes_are_cut(step: int) -> None:
    sent = [encode({"type": "frame", "id": number}, bytes([number]) * number * 3) for number in range(20)]
    data = b"".join(sent)
    reader = Reader()
    found = []
    for start in range(0, len(data), step):
        reader.feed(data[start : start + step])
        found += messages(reader)
    assert [(message.header["id"], message.body) for message in found] == [(n, bytes([n]) * n * 3) for n in range(20)]
    assert reader.buffered == 0


def test_a_message_without_length_has_an_empty_body() -> None:
    reader = Reader()
    reader.feed(b'{"type":"describe"}\n{"type":"x"}\n')
    assert messages(reader) == [Message({"type": "describe"}, b""), Message({"type": "x"}, b"")]


def test_memory_is_taken_as_it_comes() -> None:
    reader = Reader()
    reader.feed(memoryview(encode({"type": "frame"}, memoryview(b"abc"))))
    assert messages(reader)[0].body == b"abc"


def test_a_body_at_the_limit_is_taken_and_one_over_it_is_let_go() -> None:
    reader = Reader(max_payload=10)
    reader.feed(encode({"type": "frame", "id": 1}, b"x" * 10))
    reader.feed(encode({"type": "frame", "id": 2}, b"x" * 11))
    reader.feed(encode({"type": "frame", "id": 3}, b"yyy"))
    assert [(message.header["id"], message.body) for message in messages(reader)] == [
        (1, b"x" * 10),
        (2, None),
        (3, b"yyy"),
    ]


@pytest.mark.parametrize("step", [1, 13, 4096])
def test_a_body_over_the_limit_is_never_kept(step: int) -> None:
    reader = Reader(max_payload=100)
    data = encode({"type": "frame", "id": 1}, bytes(50_000)) + encode({"type": "frame", "id": 2}, b"ok")
    found = []
    for start in range(0, len(data), step):
        reader.feed(data[start : start + step])
        found += messages(reader)
        assert reader.buffered <= 100 + step + 64
    assert [(message.header["id"], message.body) for message in found] == [(1, None), (2, b"ok")]


@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/1.1\r",
        b"",
        b"[]",
        b"5",
        b"{}",
        b'{"type": 5}',
        b'{"type": "frame", "length": -1}',
        b'{"type": "frame", "length": 1.5}',
        b'{"type": "frame", "length": 1e3}',
        b'{"type": "frame", "length": true}',
        b'{"type": "frame", "length": "5"}',
        b'{"type": "frame", "length": null}',
        b'{"type": "frame", "length": ' + b"9" * 5000 + b"}",
        b'{"type": "frame", "id": "\xff"}',
        b'{"type": "frame", "id": "\\ud800"}',
        b'{"type": "\\udfff"}',
        b"[" * 60_000,
    ],
)
def test_a_header_that_is_none_ends_the_conversation(line: bytes) -> None:
    reader = Reader()
    reader.feed(line + b"\n")
    with pytest.raises(ProtocolError):
        reader.next()


def test_escaped_characters_that_are_whole_are_fine() -> None:
    reader = Reader()
    reader.feed(rb'{"type":"frame","id":"\u00e4\ud83d\ude00"}' + b"\n")
    assert messages(reader)[0].header["id"] == "ä😀"


def test_a_header_without_end_is_refused_as_soon_as_it_is_too_long() -> None:
    reader = Reader(max_header=1000)
    reader.feed(b'{"type":"' + b"x" * 991)
    assert reader.next() is None
    reader.feed(b"x")
    with pytest.raises(ProtocolError, match="header is longer than 1000 bytes"):
        reader.next()


def test_a_header_that_is_too_long_is_refused_also_with_its_end() -> None:
    reader = Reader(max_header=1000)
    reader.feed(b'{"type":"' + b"x" * 1000 + b'"}\n')
    with pytest.raises(ProtocolError, match="header is longer than 1000 bytes"):
        reader.next()


def test_the_longest_header_that_is_sent_is_taken() -> None:
    room = MAX_HEADER - len(encode({"type": "frame", "id": ""}))
    data = encode({"type": "frame", "id": "x" * room})
    assert len(data) == MAX_HEADER
    reader = Reader()
    reader.feed(data)
    assert len(messages(reader)) == 1
    with pytest.raises(ProtocolError, match="is over the limit"):
        encode({"type": "frame", "id": "x" * (room + 1)})


def test_the_end_of_the_stream_inside_a_body_says_what_is_missing() -> None:
    reader = Reader()
    reader.feed(encode({"type": "frame"}, b"x" * 10)[:-4])
    assert reader.next() is None
    assert reader.inside
    with pytest.raises(ProtocolError, match="ended inside a frame: 4 of 10 bytes are missing"):
        reader.finish()


def test_the_end_of_the_stream_inside_a_body_that_is_let_go_says_so_too() -> None:
    reader = Reader(max_payload=5)
    reader.feed(encode({"type": "frame"}, b"x" * 10)[:-4])
    assert reader.next() is None
    with pytest.raises(ProtocolError, match="4 of 10 bytes are missing"):
        reader.finish()


def test_the_end_of_the_stream_inside_a_header_is_told() -> None:
    reader = Reader()
    reader.feed(b'{"type"')
    assert reader.next() is None
    with pytest.raises(ProtocolError, match="ended inside a header"):
        reader.finish()


def test_half_characters_in_an_answer_never_stop_it() -> None:
    line = encode({"type": "error", "message": "file \udcff"})
    assert json.loads(line)["message"] == "file ?"


def test_many_small_pieces_of_a_large_body_take_linear_time() -> None:
    """A piece costs the same however much is there already: 4 MB in pieces of 16 bytes within a few seconds."""
    body = bytes(4 * 1024 * 1024)
    data = encode({"type": "frame"}, body)
    reader = Reader()
    start = time.perf_counter()
    for at in range(0, len(data), 16):
        reader.feed(data[at : at + 16])
        message = reader.next()
    assert message is not None
    assert message.body == body
    assert time.perf_counter() - start < 5


def test_many_small_pieces_of_a_long_header_take_linear_time() -> None:
    reader = Reader(max_header=1 << 20)
    start = time.perf_counter()
    for _ in range(1 << 17):
        reader.feed(b"xxxxxxxx")
        assert reader.next() is None
    assert time.perf_counter() - start < 5
