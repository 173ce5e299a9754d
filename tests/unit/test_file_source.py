"""The file source: folders in the order of their names, single files, pipes that come as they like."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_serve.errors import InputError, SourceExhausted, TooLargeError, UnavailableError
from edge_serve.frame import Frame
from edge_serve.health import Counters
from edge_serve.sources import SourceContext
from edge_serve.sources.file import TYPES, FileSource, FileSourceOptions
from tests.unit.material import configured, encoded, noise, plain, problems, sound

JPEG = encoded(noise(16, 16), "JPEG")
PNG = encoded(plain(8, 8), "PNG")


def source(folder: Path, path: str, **options: Any) -> FileSource:
    """Give a source that is not connected yet."""
    config = configured(sound(), folder)
    return FileSource(FileSourceOptions(path, **options), SourceContext(config, "one", Counters(), dict))


def frames(folder: Path, path: str, **options: Any) -> list[Frame]:
    """Read everything."""
    opened = source(folder, path, **options)
    opened.connect()
    found = []
    try:
        while True:
            delivery = opened.read(5)
            assert delivery is not None
            assert delivery.reply is None
            delivery.settle(None)
            found.append(delivery.frame)
    except SourceExhausted:
        return found
    finally:
        opened.close()
        opened.close()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    (folder / "b.JPG").write_bytes(JPEG)
    (folder / "a.png").write_bytes(PNG)
    (folder / "c.txt").write_text("no input", encoding="utf-8")
    (folder / "d.png").mkdir()
    (folder / "deeper" / "e.json").write_text("[1]", encoding="utf-8")
    return folder


def test_a_folder_is_read_once_in_the_order_of_its_names(photos: Path, tmp_path: Path) -> None:
    found = frames(tmp_path, "photos")
    assert [(each.id, each.content_type, each.payload) for each in found] == [
        ("a.png", "image/png", PNG),
        ("b.JPG", "image/jpeg", JPEG),
    ]
    assert {each.source for each in found} == {str(photos)}
    assert found[0].meta["path"] == str(photos / "a.png")


def test_a_recursive_source_looks_into_the_folders_below(photos: Path, tmp_path: Path) -> None:
    assert [each.id for each in frames(tmp_path, "photos", recursive=True)] == ["a.png", "b.JPG", "deeper/e.json"]


def test_an_empty_folder_is_at_its_end_at_once(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert frames(tmp_path, "none") == []


def test_a_file_over_the_limit_is_told_and_the_others_are_read(photos: Path, tmp_path: Path) -> None:
    with (photos / "a.png").open("wb") as stream:
        stream.truncate(1 << 40)
    large, small = frames(tmp_path, "photos", max_payload=len(JPEG))
    assert isinstance(large.error, TooLargeError)
    assert f"{1 << 40} bytes are over the limit of {len(JPEG)} (max_payload)" in str(large.error)
    assert (large.payload, small.payload, small.error) == (b"", JPEG, None)


def test_a_file_that_went_away_is_told_and_the_others_are_read(photos: Path, tmp_path: Path) -> None:
    opened = source(tmp_path, "photos")
    opened.connect()
    (photos / "a.png").unlink()
    first, second = opened.read(0), opened.read(0)
    assert first is not None
    assert second is not None
    assert isinstance(first.frame.error, InputError)
    assert "a.png: cannot be read: No such file or directory" in str(first.frame.error)
    assert second.frame.payload == JPEG


def test_a_file_name_that_is_no_text_gives_a_frame_like_any_other(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.png")).write_bytes(PNG)
    (found,) = frames(tmp_path, "photos")
    assert found.payload == PNG


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("x.png", PNG, "image/png"),
        ("x.csv", b"a,b\n1,2\n", "text/csv"),
        ("x.json", b"[\n1\n]", "application/json"),
        ("x.jpg", JPEG, "image/jpeg"),
    ],
)
def test_a_single_file_is_one_input_as_it_is_in_a_folder(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    (tmp_path / name).write_bytes(content)
    (found,) = frames(tmp_path, name)
    assert (found.id, found.content_type, found.payload) == (name, kind, content)


def test_every_known_name_is_one_input(tmp_path: Path) -> None:
    for suffix in TYPES:
        (tmp_path / f"x{suffix}").write_bytes(b"1\n2\n")
        assert [each.payload for each in frames(tmp_path, f"x{suffix}")] == [b"1\n2\n"]


def test_a_stream_in_a_file_is_cut_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b'{"a": 1}\n[2]\n')
    (tmp_path / "camera.mjpeg").write_bytes(JPEG * 3)
    assert [(each.payload, each.content_type) for each in frames(tmp_path, "lines")] == [
        (b'{"a": 1}', "application/json"),
        (b"[2]", "application/json"),
    ]
    assert [(each.payload, each.content_type) for each in frames(tmp_path, "camera.mjpeg")] == [
        (JPEG, "image/jpeg")
    ] * 3


def test_the_format_can_be_said(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"1\n2\n")
    (tmp_path / "x").write_bytes(b"--boundary\r\n" + JPEG)
    assert [each.payload for each in frames(tmp_path, "x.json", format="jsonl")] == [b"1", b"2"]
    assert [each.payload for each in frames(tmp_path, "x", format="mjpeg")] == [JPEG]


def test_ids_of_a_stream_differ_also_for_equal_lines(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"1\n1\n1\n")
    assert len({each.id for each in frames(tmp_path, "lines")}) == 3


def test_bad_items_of_a_stream_are_told_in_their_place(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"1\n" + b"x" * 100 + b"\n3\n")
    one, two, three = frames(tmp_path, "lines", max_payload=10)
    assert (one.payload, two.payload, three.payload) == (b"1", b"", b"3")
    assert isinstance(two.error, TooLargeError)


def test_a_file_with_very_many_short_lines_is_read_in_linear_time(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"1\n" * 200_000)
    start = time.perf_counter()
    assert len(frames(tmp_path, "lines")) == 200_000
    assert time.perf_counter() - start < 10


def test_a_path_that_is_not_there_is_unavailable_and_tried_again(tmp_path: Path) -> None:
    opened = source(tmp_path, "later")
    with pytest.raises(UnavailableError, match="later: cannot be opened"):
        opened.connect()
    with pytest.raises(UnavailableError, match="not open"):
        opened.read(0)
    (tmp_path / "later").write_bytes(b"1\n")
    opened.connect()
    delivery = opened.read(1)
    assert delivery is not None
    assert delivery.frame.payload == b"1"
    opened.close()


def test_a_device_that_cannot_be_polled_is_read_to_its_end(tmp_path: Path) -> None:
    assert frames(tmp_path, "/dev/null") == []


# Pipes.


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A pipe in the place of standard input; gives the end that is written to."""
    inner, outer = os.pipe()
    with os.fdopen(inner) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        yield outer


def test_a_pipe_gives_each_item_as_soon_as_it_is_whole(stdin: int, tmp_path: Path) -> None:
    opened = source(tmp_path, "-")
    opened.connect()
    os.write(stdin, b"[1]\n[2")
    first = opened.read(1)
    assert first is not None
    assert (first.frame.payload, first.frame.source) == (b"[1]", "stdin")
    start = time.monotonic()
    assert opened.read(0.05) is None
    assert time.monotonic() - start >= 0.05
    os.write(stdin, b"]\n")
    second = opened.read(1)
    assert second is not None
    assert second.frame.payload == b"[2]"
    os.close(stdin)
    with pytest.raises(SourceExhausted):
        opened.read(1)
    opened.close()


def test_a_camera_whose_first_byte_comes_alone_is_still_a_camera(stdin: int, tmp_path: Path) -> None:
    opened = source(tmp_path, "-")
    opened.connect()
    for byte in JPEG[:40]:
        os.write(stdin, bytes([byte]))
        assert opened.read(0.001) is None
    os.write(stdin, JPEG[40:])
    delivery = opened.read(1)
    assert delivery is not None
    assert (delivery.frame.payload, delivery.frame.content_type) == (JPEG, "image/jpeg")
    opened.close()
    os.close(stdin)


def test_closing_leaves_standard_input_itself_open(stdin: int, tmp_path: Path) -> None:
    opened = source(tmp_path, "-")
    opened.connect()
    opened.close()
    os.write(stdin, b"1\n")
    os.close(stdin)
    assert sys.stdin.readline() == "1\n"


def test_a_writer_that_trickles_does_not_hold_the_reader(stdin: int, tmp_path: Path) -> None:
    """Else a stop would wait for the end of a line that takes minutes."""
    opened = source(tmp_path, "-")
    opened.connect()
    ended = threading.Event()

    def trickle() -> None:
        while not ended.wait(0.005):
            os.write(stdin, b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    start = time.monotonic()
    assert opened.read(0.1) is None
    assert time.monotonic() - start < 3
    ended.set()
    thread.join()
    opened.close()
    os.close(stdin)


def test_a_writer_without_pause_that_completes_nothing_does_not_hold_the_reader_either(tmp_path: Path) -> None:
    opened = source(tmp_path, "/dev/zero", format="mjpeg")
    opened.connect()
    start = time.monotonic()
    assert opened.read(0.1) is None
    assert time.monotonic() - start < 3
    opened.close()


def test_a_named_pipe_without_a_writer_does_not_hold_the_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    opened = source(tmp_path, "pipe")
    opened.connect()
    assert opened.read(0.02) is None
    with (tmp_path / "pipe").open("wb") as writer:
        writer.write(b"[1]\n")
        writer.flush()
        delivery = opened.read(5)
    assert delivery is not None
    assert delivery.frame.payload == b"[1]"
    with pytest.raises(SourceExhausted):
        opened.read(5)
    opened.close()


# Checks.


def test_a_path_that_does_not_exist_is_a_mistake(tmp_path: Path) -> None:
    (found,) = problems(sound(**{'path = "-"': 'path = "none"'}), tmp_path)
    assert str(found) == f"pipeline.source.path: {tmp_path}/none does not exist. Check the path"


def test_two_pipelines_cannot_read_standard_input(tmp_path: Path) -> None:
    second = sound().split("[[pipeline]]", 1)[1].replace('name = "one"', 'name = "two"')
    (found,) = problems(sound() + "[[pipeline]]" + second, tmp_path)
    assert found.key == "pipeline[1].source.path"
    assert "already read by pipeline 'one'" in found.what


def test_the_policy_is_the_configured_one_and_a_file_never_waits(tmp_path: Path) -> None:
    assert source(tmp_path, "-").policy == "lossless"
    assert source(tmp_path, "-", policy="latest").policy == "latest"
    assert source(tmp_path, "-").hold_limit is None
