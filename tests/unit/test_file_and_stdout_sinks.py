"""Results to files and to standard output: whole lines, bounded files, and no line that a crash spoils."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_serve.errors import GoneError, SendError, UnavailableError
from edge_serve.health import Counters
from edge_serve.sinks import SinkContext
from edge_serve.sinks.file import FileSink, FileSinkOptions
from edge_serve.sinks.stdout import StdoutSink, StdoutSinkOptions
from tests.unit.material import configured, problems, result, sound


def sink(folder: Path, path: str = "out.jsonl", **options: Any) -> FileSink:
    """Give a sink that is not connected yet."""
    return FileSink(FileSinkOptions(path, **options), SinkContext(configured(sound(), folder), "one", Counters()))


def send(opened: FileSink | StdoutSink, *ids: str) -> None:
    """Send results, each of which has to be safe at once."""
    for identity in ids:
        outcomes: list[Exception | None] = []
        opened.send(result(frame_id=identity), outcomes.append)
        assert outcomes == [None]


def ids(file: Path) -> list[str]:
    return [json.loads(line)["id"] for line in file.read_text(encoding="utf-8").splitlines()]


def test_each_result_is_a_line_that_is_there_when_send_returns(tmp_path: Path) -> None:
    opened = sink(tmp_path)
    opened.connect()
    send(opened, "a", "b")
    assert ids(tmp_path / "out.jsonl") == ["a", "b"]
    assert (tmp_path / "out.jsonl").read_bytes().endswith(b"}\n")
    opened.close()
    opened.close()


def test_results_are_appended_to_what_was_there(tmp_path: Path) -> None:
    for identity in ("a", "b"):
        opened = sink(tmp_path, sync=True)
        opened.connect()
        send(opened, identity)
        opened.close()
    assert ids(tmp_path / "out.jsonl") == ["a", "b"]


def test_a_line_that_a_crash_cut_off_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_bytes(b'{"id": "a"}\n{"id": "hal')
    opened = sink(tmp_path)
    opened.connect()
    send(opened, "c")
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ['{"id": "a"}', '{"id": "hal']
    assert json.loads(lines[2])["id"] == "c"
    opened.close()


def test_full_files_are_renamed_and_the_oldest_go(tmp_path: Path) -> None:
    length = len(result(frame_id="0").to_json()) + 20
    opened = sink(tmp_path, max_bytes=2 * length, keep=2)
    opened.connect()
    send(opened, *"01234567")
    opened.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.1", "out.jsonl.2"]
    kept = [ids(tmp_path / name) for name in ("out.jsonl.2", "out.jsonl.1", "out.jsonl")]
    assert kept == [["2", "3"], ["4", "5"], ["6", "7"]]
    assert all(file.stat().st_size <= 2 * length for file in tmp_path.iterdir())


def test_without_kept_files_a_full_file_begins_anew(tmp_path: Path) -> None:
    opened = sink(tmp_path, max_bytes=10, keep=0)
    opened.connect()
    send(opened, "a", "b")
    opened.close()
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]
    assert ids(tmp_path / "out.jsonl") == ["b"]


def test_without_a_limit_a_file_grows(tmp_path: Path) -> None:
    opened = sink(tmp_path, max_bytes=0)
    opened.connect()
    send(opened, *"abc")
    opened.close()
    assert ids(tmp_path / "out.jsonl") == ["a", "b", "c"]


def test_a_full_disk_is_told_and_nothing_is_called_safe() -> None:
    """/dev/full is a disk without room."""
    opened = sink(Path("/"), "/dev/full")
    opened.connect()
    outcomes: list[Exception | None] = []
    with pytest.raises(SendError, match="/dev/full: cannot be written: No space left on device"):
        opened.send(result(), outcomes.append)
    assert outcomes == []
    opened.close()


def test_a_folder_that_went_away_is_unavailable(tmp_path: Path) -> None:
    opened = sink(tmp_path, "gone/out.jsonl")
    with pytest.raises(UnavailableError, match=r"gone/out.jsonl: cannot be opened: No such file or directory"):
        opened.connect()
    with pytest.raises(SendError, match="is not open"):
        opened.send(result(), lambda _error: None)


@pytest.mark.parametrize("path", ["none/out.jsonl", ".", ""])
def test_a_path_that_can_be_no_file_is_a_mistake(path: str, tmp_path: Path) -> None:
    text = sound(**{'"stdout"': f'"file"\npath = "{path}"'})
    (found,) = problems(text, tmp_path)
    assert found.key == "pipeline.sink.path"
    assert "cannot be a file" in found.what


def test_two_sinks_cannot_write_one_file(tmp_path: Path) -> None:
    text = sound(**{'"stdout"': '"file"\npath = "x"'}) + '[[pipeline.sink]]\ntype = "file"\npath = "./x"\n'
    (found,) = problems(text, tmp_path)
    assert found.key == "pipeline.sink[1].path"
    assert "is already written by pipeline 'one'" in found.what


def stdout_sink(folder: Path) -> StdoutSink:
    return StdoutSink(StdoutSinkOptions(), SinkContext(configured(sound(), folder), "one", Counters()))


def test_standard_output_gets_a_line_for_each_result(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    opened = stdout_sink(tmp_path)
    opened.connect()
    send(opened, "a", "b")
    opened.close()
    assert [json.loads(line)["id"] for line in capfdbinary.readouterr().out.splitlines()] == ["a", "b"]


def test_a_long_line_is_written_whole_into_a_pipe_that_takes_it_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    inner, outer = os.pipe()
    received: list[bytes] = []

    def read() -> None:
        while data := os.read(inner, 1000):
            received.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(outer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        opened = stdout_sink(tmp_path)
        opened.connect()
        send(opened, "x" * 300_000)
    reader.join()
    os.close(inner)
    assert json.loads(b"".join(received))["id"] == "x" * 300_000


def test_a_reader_that_went_away_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, outer = os.pipe()
    os.close(inner)
    with os.fdopen(outer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        opened = stdout_sink(tmp_path)
        opened.connect()
        with pytest.raises(GoneError, match="whoever read standard output is gone"):
            opened.send(result(), lambda _error: None)


@pytest.mark.parametrize("closed", [None, "closed"])
def test_closed_standard_output_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str | None
) -> None:
    if closed:
        stream = (tmp_path / "x").open("w", encoding="utf-8")
        stream.close()
        monkeypatch.setattr(sys, "stdout", stream)
    else:
        monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(UnavailableError, match="standard output is closed"):
        stdout_sink(tmp_path).connect()
