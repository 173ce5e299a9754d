"""`edge-serve send`: the client that people and scripts use."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from edge_serve.framing import Reader
from tests.support import (
    CLASSES,
    DIGITS,
    MOTION,
    PATIENCE_S,
    InProcess,
    digit_arrays,
    digit_png,
    edge_serve,
    environment,
    motion_label,
    motion_series,
    write_config,
)

CONFIG = """
    schema = 1
    device = "dev"
    grace_s = 1
    [pipeline]
    name = "line"
    model = "{model}"
    threads = 1
    {input}
    [pipeline.output]
    type = "classification"
    top_k = 1
    [pipeline.source]
    type = "socket"
    listen = "{listen}"
    {source}
    [[pipeline.sink]]
    type = "file"
    path = "results.jsonl"
"""
WINDOW = '[pipeline.input]\nkind = "window"\nhop = {hop}\nchannels = ["ax", "ay", "az", "gx", "gy", "gz"]'


class Server:
    """A service, and the address to send to."""

    def __init__(self, folder: Path, short: Path) -> None:
        self.folder = folder
        self.address = f"unix://{short}/in.sock"

    def serve(self, model: Path = DIGITS, **words: Any) -> InProcess:
        """Give the service, not started."""
        defaults: dict[str, Any] = {"listen": self.address, "source": "", "input": "", "model": model}
        return InProcess(write_config(self.folder, CONFIG, **{**defaults, **words}))

    def results(self) -> list[dict[str, Any]]:
        """What the service's sink has."""
        return [json.loads(line) for line in (self.folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture
def server(tmp_path: Path, short_path: Path) -> Server:
    """A server of the test's own."""
    return Server(tmp_path, short_path)


def lines(output: bytes) -> list[dict[str, Any]]:
    """Read JSON lines."""
    return [json.loads(line) for line in output.splitlines()]


def test_files_are_sent_and_answers_printed(server: Server, tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.png").write_bytes(digit_png(number))
    with server.serve():
        done = edge_serve("send", server.address, *sorted(tmp_path.glob("*.png")))
    assert done.returncode == 0, done.stderr
    answers = lines(done.stdout)
    assert [each["id"] for each in answers] == [f"{number:02}.png" for number in range(30)]
    right = sum(each["result"]["classes"][0]["index"] == digit_arrays()[1][n] for n, each in enumerate(answers))
    assert right >= 28


def test_an_error_answer_is_exit_code_1_and_the_others_come(server: Server, tmp_path: Path) -> None:
    for name, data in (("a.png", digit_png(0)), ("b.png", b"nonsense"), ("c.png", digit_png(0))):
        (tmp_path / name).write_bytes(data)
    with server.serve():
        done = edge_serve("send", server.address, *(tmp_path / f"{name}.png" for name in "abc"))
    assert done.returncode == 1
    assert [(each["id"], each["type"]) for each in lines(done.stdout)] == [
        ("a.png", "result"), ("b.png", "error"), ("c.png", "result"),
    ]  # fmt: skip


def test_standard_input_is_a_frame(server: Server) -> None:
    with server.serve():
        done = edge_serve("send", server.address, "-", input=digit_png(0))
    assert done.returncode == 0, done.stderr
    assert lines(done.stdout)[0]["result"]["classes"][0]["index"] == digit_arrays()[1][0]


@pytest.mark.parametrize(("answer", "hop", "windows"), [("at_once", 10, 6), ("when_safe", 50, 2)])
def test_lines_of_samples_fill_windows(server: Server, tmp_path: Path, answer: str, hop: int, windows: int) -> None:
    names = ("ax", "ay", "az", "gx", "gy", "gz")
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in motion_series(10)))
    table = tmp_path / "samples.csv"
    table.write_text("".join(",".join(map(str, row)) + "\n" for row in motion_series(20)))
    # Windows are longer than what a client that waits for answers in between would have on its way.
    source = f'answer = "{answer}"\nmax_inflight = 1000'
    with server.serve(MOTION, input=WINDOW.replace("{hop}", str(hop)), source=source):
        for file, recording in ((samples, 10), (table, 20)):
            done = edge_serve("send", server.address, "--lines", file, "--key", file.name, "--timeout", "5")
            assert done.returncode == 0, done.stderr
            labels = [each["result"]["classes"][0]["index"] for each in lines(done.stdout)]
            assert len(labels) == windows
            assert {CLASSES[label] for label in labels} == {motion_label(recording)}
    assert {each["key"] for each in server.results()} == {"samples.jsonl", "samples.csv"}


def test_answers_come_while_standard_input_is_open(server: Server) -> None:
    sample = json.dumps((digit_arrays()[0][0] / 255.0)[None, :, :, None].tolist()).encode() + b"\n"
    with (
        server.serve(),
        subprocess.Popen(
            [sys.executable, "-m", "edge_serve", "send", server.address, "--lines", "-", "--timeout", "1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
        ) as sending,
    ):
        assert sending.stdin is not None
        assert sending.stdout is not None
        for number in range(1, 4):
            sending.stdin.write(sample)
            sending.stdin.flush()
            assert json.loads(sending.stdout.readline())["id"] == f"stdin:{number}"
        # Nothing is waited for now; a quiet input is no failure.
        with pytest.raises(subprocess.TimeoutExpired):
            sending.wait(1.5)
        sending.stdin.close()
        assert sending.wait(PATIENCE_S) == 0


def test_without_replies_it_returns_when_all_is_taken(server: Server, tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02}.png").write_bytes(digit_png(number))
    with server.serve() as service:
        done = edge_serve("send", server.address, "--no-reply", *sorted(tmp_path.glob("*.png")))
        assert done.returncode == 0, done.stderr
        assert done.stdout == b""
        assert service.counts()["in"] == 50


def test_describe_prints_what_the_pipeline_takes(server: Server) -> None:
    with server.serve():
        done = edge_serve("send", server.address, "--describe")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["inputs"]["image"]["dtype"] == "int8"


def test_a_token_file_opens_the_door_and_a_wrong_one_is_told(server: Server, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("sesame\n")
    (tmp_path / "wrong").write_text("please\n")
    (tmp_path / "a.png").write_bytes(digit_png(0))
    pictures = [tmp_path / "a.png"] * 40
    with server.serve(source='token_file = "token"'):
        assert edge_serve("send", server.address, "--token-file", tmp_path / "token", *pictures).returncode == 0
        for arguments in (["--token-file", str(tmp_path / "wrong")], []):
            done = edge_serve("send", server.address, *arguments, *pictures)
            assert done.returncode == 1
            (answer,) = lines(done.stdout)
            assert "token" in answer["message"]
        done = edge_serve("send", server.address, "--token-file", tmp_path / "gone", *pictures)
        assert done.returncode == 2
        assert b"gone" in done.stderr


def test_nobody_there_is_exit_code_3_with_the_reason(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(digit_png(0))
    for address in (server.address, "tcp://127.0.0.1:1"):
        done = edge_serve("send", address, tmp_path / "a.png")
        assert done.returncode == 3
        assert address.encode() in done.stderr
        assert b"edge-serve run" in done.stderr
        assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["http://x", "-"], ["unix://", "-"], ["tcp://127.0.0.1", "-"], ["unix:///tmp/x"], []]
)
def test_wrong_use_is_exit_code_2(arguments: list[str]) -> None:
    done = edge_serve("send", *arguments)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


def test_an_input_that_is_not_there_is_exit_code_2(server: Server, tmp_path: Path) -> None:
    with server.serve():
        done = edge_serve("send", server.address, tmp_path / "gone.png")
    assert done.returncode == 2
    assert b"gone.png" in done.stderr


class HalfServer:
    """Answers the first frames, then hangs up, or falls silent."""

    def __init__(self, path: str, answered: int, *, hang_up: bool) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(1)
        self._answered = answered
        self._hang_up = hang_up
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="test.half", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        connection, _ = self._listener.accept()
        reader = Reader()
        with connection:
            left = self._answered
            while data := connection.recv(65536):
                reader.feed(data)
                while (message := reader.next()) is not None and left:
                    left -= 1
                    connection.sendall(
                        json.dumps({"type": "result", "id": message.header["id"], "length": 0}).encode() + b"\n"
                    )
                if self._hang_up and not left:
                    return
            self._done.wait(PATIENCE_S)

    def __enter__(self) -> HalfServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(PATIENCE_S)
        self._listener.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture's file."""
    path = tmp_path / "a.png"
    path.write_bytes(digit_png(0))
    return path


def test_a_server_that_hangs_up_too_early_is_exit_code_3(server: Server, picture: Path) -> None:
    with HalfServer(server.address.removeprefix("unix://"), 2, hang_up=True):
        done = edge_serve("send", server.address, *[picture] * 5)
    assert done.returncode == 3, "answers are missing, and nobody would know"
    assert len(lines(done.stdout)) == 2
    assert b"Traceback" not in done.stderr


def test_a_server_that_does_not_answer_is_exit_code_3(server: Server, picture: Path) -> None:
    with HalfServer(server.address.removeprefix("unix://"), 2, hang_up=False):
        done = edge_serve("send", server.address, "--timeout", "0.5", *[picture] * 5)
    assert done.returncode == 3
    assert b"no answer in time" in done.stderr
    assert len(lines(done.stdout)) == 2
