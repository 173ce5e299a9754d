"""`edge-serve capture`: what a running service's model sees becomes calibration data, whatever happens on the way."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve.model.engine import Engine
from edge_serve.model.interpreter import load_runtime
from edge_serve.spec import InputSpec
from tests.support import (
    DIGITS,
    MODELS,
    MOTION,
    PATIENCE_S,
    Client,
    InProcess,
    Mosquitto,
    Raw,
    Service,
    digit_arrays,
    digit_png,
    edge_serve,
    environment,
    motion_series,
    resident_bytes,
    wait_for,
    write_config,
)

CONFIG = """
    schema = 1
    device = "dev"
    grace_s = 2
    state_dir = "{state}"
    {more}
    [[pipeline]]
    name = "line"
    model = "{model}"
    threads = 1
    {signature}
    {input}
    [pipeline.source]
    {source}
    [[pipeline.sink]]
    type = "file"
    path = "results.jsonl"
"""


class Site:
    """A folder with a configuration, a socket to send to, and a place for what is recorded."""

    def __init__(self, folder: Path, short: Path) -> None:
        self.folder = folder
        self.socket = short / "in.sock"
        self.output = folder / "calibration.npz"
        self.config = folder / "edge-serve.toml"

    def configure(self, model: Path = MODELS / "linear.tflite", **words: Any) -> Path:
        """Write the configuration, with a socket as source unless another is given."""
        source = f'type = "socket"\nlisten = "unix://{self.socket}"'
        defaults: dict[str, Any] = {"state": "state", "more": "", "signature": "", "input": "", "source": source}
        return write_config(self.folder, CONFIG, **{**defaults, "model": model, **words})

    def arguments(self, *more: str | Path) -> tuple[str | Path, ...]:
        """Give the command line of a capture."""
        return ("capture", "-c", self.config, "-o", self.output, *more)

    def capture(self, *more: str | Path) -> subprocess.CompletedProcess[bytes]:
        """Capture to the end."""
        return edge_serve(*self.arguments(*more))

    def arrays(self) -> dict[str, Any]:
        """What was recorded."""
        with np.load(self.output, allow_pickle=False) as loaded:
            return dict(loaded.items())

    def left(self) -> list[str]:
        """Files of a capture that lie around, finished or not."""
        return [each.name for each in self.folder.iterdir() if ".npz" in each.name]


@pytest.fixture
def site(tmp_path: Path, short_path: Path) -> Site:
    """A site of the test's own."""
    return Site(tmp_path, short_path)


@contextlib.contextmanager
def fed(site: Site, payloads: Sequence[bytes], **header: Any) -> Iterator[None]:
    """Send payloads over and over again, each after the answer to the one before."""
    stop = threading.Event()
    failed: list[Any] = []

    def feed() -> None:
        with Raw.connect_when_there(site.socket) as raw:
            for payload in itertools.cycle(payloads):
                if stop.is_set():
                    return
                try:
                    answer = raw.frame(payload, **header).answer()
                except OSError:
                    return  # the service is gone, as some tests want it
                if answer is None:
                    return
                if answer["type"] != "result":
                    failed.append(answer)
                    return

    thread = threading.Thread(target=feed, name="test.feed", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(PATIENCE_S)
    assert not failed, failed


class Watched:
    """A capture in a process of its own, whose standard error is a terminal."""

    def __init__(self, site: Site, *more: str | Path) -> None:
        self._master, slave = pty.openpty()
        command = [sys.executable, "-m", "edge_serve", *map(str, site.arguments(*more))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=slave, env=environment()
        )
        os.close(slave)
        self.text = ""
        self._thread = threading.Thread(target=self._read, name="test.terminal", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other end of the terminal is closed
            while data := os.read(self._master, 4096):
                self.text += data.decode(errors="replace")

    def says(self, pattern: str) -> None:
        """Wait until the terminal shows a text."""
        wait_for(lambda: re.search(pattern, self.text), f"{pattern!r} on the terminal")

    def has_samples(self) -> None:
        """Wait until at least one sample is there."""
        self.says(r"line: [1-9]\d* of \d+ samples")

    def end(self, number: int | None = None) -> int:
        """Send a signal and wait for the end; gives the exit code."""
        if number is not None:
            self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        self._thread.join(PATIENCE_S)
        return code

    @property
    def document(self) -> dict[str, Any]:
        """What it printed."""
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.read())
        return found

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE_S)
        self._thread.join(PATIENCE_S)
        os.close(self._master)
        if self.process.stdout is not None:
            self.process.stdout.close()


def numbers(count: int) -> list[bytes]:
    """Inputs [1, 4] of the linear model, all different."""
    return [np.arange(4, dtype=np.float32).tobytes()] + [
        (np.arange(4, dtype=np.float32) * np.float32(0.1) + number).tobytes() for number in range(1, count)
    ]


def places(found: Any, expected: Sequence[bytes]) -> list[int]:
    """Tell which of the expected samples each recorded one is, bit for bit."""
    where = {each: place for place, each in enumerate(expected)}
    assert len(where) == len(expected)
    return [where[np.ascontiguousarray(sample).tobytes()] for sample in found]


def real(values: Any, scale: float, zero_point: int) -> Any:
    """Give what an int8 tensor holds of float values, as real values."""
    quantized = np.clip(np.rint(values.astype(np.float32) / np.float32(scale)) + zero_point, -128, 127)
    return (quantized.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)


# What is recorded.


def test_float_tensors_are_recorded_bit_for_bit(site: Site) -> None:
    payloads = numbers(500)
    with Service(site.configure()).ready(), fed(site, payloads):
        done = site.capture("--every", "3", "--samples", "25", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = site.arrays().values()
    assert found.shape == (25, 4)
    assert found.dtype == np.float32
    steps = np.diff(places(found, payloads)) % 500
    assert set(steps) == {3}, "every third, and none is missing"
    document = json.loads(done.stdout)
    assert (document["samples"], document["ended"], document["dropped"]) == (25, "full", {})
    assert document["arrays"] == {"x": {"dtype": "float32", "shape": [25, 4]}}
    assert document["bytes"] == site.output.stat().st_size
    assert document["model"]["name"] == "linear"


def test_pictures_are_recorded_as_the_model_saw_them(site: Site) -> None:
    engine = Engine.open(DIGITS, runtime=load_runtime())
    spec = engine.inputs["image"]
    assert spec.scale is not None
    assert spec.zero_point is not None
    pixels = digit_arrays()[0][:60, :, :, None].astype(np.float32) * np.float32(1 / 255)
    expected = [real(each, spec.scale, spec.zero_point).tobytes() for each in pixels]
    engine.close()
    with Service(site.configure(DIGITS)).ready(), fed(site, [digit_png(number) for number in range(60)]):
        done = site.capture("--every", "1", "--samples", "30")
    assert done.returncode == 0, done.stderr
    found = site.arrays()["image"]
    assert found.shape == (30, 28, 28, 1)
    assert found.dtype == np.float32
    assert set(np.diff(places(found, expected)) % 60) == {1}
    assert b"30 samples" in done.stdout


@pytest.mark.broker
def test_windows_over_mqtt_are_recorded_whole(site: Site, shared_broker: Mosquitto, name: str) -> None:
    names = ("ax", "ay", "az", "gx", "gy", "gz")
    engine = Engine.open(MOTION, runtime=load_runtime())
    (spec,) = engine.inputs.values()
    engine.close()
    rows = np.array(motion_series(3))
    assert spec.shape[1:] == (50, 6)
    starts = range(0, 51, 10)
    windows = [rows[start : start + 50] for start in starts]
    if spec.scale is not None and spec.zero_point is not None:
        windows = [real(each, spec.scale, spec.zero_point) for each in windows]
    expected = [each.astype(np.float32).tobytes() for each in windows]
    config = site.configure(
        MOTION,
        more=f'[mqtt]\nurl = "{shared_broker.url}"',
        source=f'type = "mqtt"\ntopic = "{name}/#"',
        input=f'[pipeline.input]\nkind = "window"\nhop = 10\nchannels = {json.dumps(names)}',
    )
    with Service(config).ready(), Watched(site, "--json", "--seconds", "60") as watched:
        watched.says("of 0 inputs")
        with Client(shared_broker.port) as client:
            for row in rows.tolist():
                client.publish(f"{name}/one", json.dumps(dict(zip(names, row, strict=True))).encode())
            watched.says("of 6 inputs")
        assert watched.end(signal.SIGTERM) == 0
        assert watched.document["samples"] == 6
    (found,) = site.arrays().values()
    assert found.shape == (6, 50, 6)
    assert places(found, expected) == list(range(6))


def test_several_inputs_feed_the_converter(site: Site) -> None:
    calibration = pytest.importorskip("edge_serve_converters.calibration")
    plan = pytest.importorskip("edge_serve_converters.plan")
    payloads = [json.dumps({"a": [[n, n]], "b": [[n, n + 0.5, -n]]}).encode() for n in range(100)]
    with Service(site.configure(MODELS / "two_by_two.tflite")).ready(), fed(site, payloads):
        done = site.capture("--samples", "40", "--seconds", "1.5")
    assert done.returncode == 0, done.stderr
    inputs = (plan.InputPlan("a", "float32", (1, 2), True), plan.InputPlan("b", "float32", (1, 3), True))
    signature = plan.SignaturePlan("serving_default", inputs, {"total": "float32"})
    source = calibration.open_source(site.output, InputSpec())
    source.open(signature)  # checks names, shapes and numbers
    found = source.take(signature, np.arange(40))
    assert (found["a"][:, 0] == found["b"][:, 0]).all(), "sample i of each belongs together"
    assert (found["b"][:, 2] == -found["a"][:, 0]).all()


def test_the_signature_that_runs_is_recorded(site: Site) -> None:
    config = site.configure(MODELS / "named.tflite", signature='signature = "total"')
    with Service(config).ready(), fed(site, numbers(50)):
        done = site.capture("--every", "1", "--samples", "5", "--json")
    assert json.loads(done.stdout)["model"]["signature"] == "total"
    assert site.arrays()["x"].shape == (5, 4)


def test_the_whole_time_is_recorded_and_not_its_beginning(site: Site) -> None:
    with Service(site.configure()).ready(), fed(site, numbers(2000)):
        done = site.capture("--samples", "50", "--seconds", "2", "--json")
    document = json.loads(done.stdout)
    assert document["ended"] == "time"
    assert document["samples"] == 50
    assert document["seen"] > 500
    assert 1.9 < document["seconds"] < 6
    chosen = places(site.arrays()["x"], numbers(2000))
    assert max(chosen) - min(chosen) > 200 or document["seen"] > 2000


def test_values_that_calibration_would_refuse_are_left_out_and_told(site: Site) -> None:
    bad = np.array([1, np.nan, 3, 4], np.float32).tobytes()
    with Service(site.configure()).ready(), fed(site, [*numbers(3), bad]):
        done = site.capture("--every", "1", "--samples", "30")
    assert done.returncode == 0, done.stderr
    assert np.isfinite(site.arrays()["x"]).all()
    assert b"held NaN or infinite values" in done.stderr


def test_bytes_bound_the_file(site: Site) -> None:
    with Service(site.configure()).ready(), fed(site, numbers(100)):
        done = site.capture("--every", "1", "--samples", "1000", "--max-bytes", "480")
    assert done.returncode == 0, done.stderr
    assert site.arrays()["x"].shape == (30, 4)
    assert b"room for 30 of 1000 samples" in done.stderr


# Its end, in every way.


def test_ctrl_c_and_sigterm_keep_what_is_there(site: Site) -> None:
    with Service(site.configure()).ready() as service, fed(site, numbers(100)):
        for number in (signal.SIGINT, signal.SIGTERM):
            with Watched(site, "--force", "--json") as watched:
                watched.has_samples()
                assert watched.end(number) == 0, watched.text
                document = watched.document
            assert document["ended"] == "interrupted"
            assert len(site.arrays()["x"]) == document["samples"] > 0
        assert site.left() == ["calibration.npz"]
        assert service.terminate() == 0


def test_ctrl_c_before_the_first_sample_leaves_nothing(site: Site) -> None:
    with Service(site.configure()).ready(), Watched(site) as watched:
        watched.says("of 0 inputs")
        assert watched.end(signal.SIGINT) == 130
    assert site.left() == []


def test_a_killed_service_leaves_what_had_come(site: Site) -> None:
    with (
        Service(site.configure()).ready() as service,
        fed(site, numbers(100)),
        Watched(site, "--json", "--seconds", "3600") as watched,
    ):
        watched.has_samples()
        service.kill()
        assert watched.end() == 0, watched.text
        assert watched.document["ended"] == "lost"
    assert "connection to the service was lost" in watched.text
    places(site.arrays()["x"], numbers(100))
    assert site.left() == ["calibration.npz"]


def test_a_killed_service_without_a_sample_is_exit_code_3(site: Site) -> None:
    with Service(site.configure()).ready() as service, Watched(site) as watched:
        watched.says("of 0 inputs")
        service.kill()
        assert watched.end() == 3
    assert site.left() == []


def test_a_service_that_stops_says_so_and_is_not_held_up(site: Site) -> None:
    with (
        Service(site.configure()).ready() as service,
        fed(site, numbers(100)),
        Watched(site, "--json", "--seconds", "3600") as watched,
    ):
        watched.has_samples()
        assert service.terminate(timeout=6) == 0
        assert watched.end() == 0, watched.text
        assert watched.document["ended"] == "stopped"
    assert "the service stopped" in watched.text
    assert "Traceback" not in service.text


def test_the_end_of_a_stream_is_the_end_of_its_recording(site: Site) -> None:
    config = site.configure(source='type = "file"\npath = "-"')
    with Service(config, stdin=subprocess.PIPE) as service:
        assert service.process.stdin is not None
        service.said("started in")
        with Watched(site, "--json") as watched:
            watched.says("of 0 inputs")
            for number in range(30):
                service.process.stdin.write(json.dumps([[number, 0, 0, 1]]).encode() + b"\n")
            service.process.stdin.flush()
            watched.says("of 30 inputs")
            service.process.stdin.close()
            assert watched.end() == 0, watched.text
            assert watched.document["ended"] in ("source", "stopped")
        assert service.wait() == 0
    assert sorted(site.arrays()["x"][:, 0].tolist()) == list(range(30))


def test_a_killed_capture_frees_its_pipeline_and_disturbs_nobody(site: Site) -> None:
    with Service(site.configure()).ready() as service, fed(site, numbers(100)):
        with Watched(site) as watched:
            watched.has_samples()
            watched.process.kill()

        def again() -> bool:
            return site.capture("--every", "1", "--samples", "3", "--force").returncode == 0

        wait_for(again, "the pipeline may be recorded again")
        assert "Traceback" not in service.text


def test_a_caller_that_reads_nothing_fills_no_memory_and_stops_no_frame(site: Site) -> None:
    with Service(site.configure(MODELS / "gray.tflite", input='[pipeline.input]\nkind = "tensor"')).ready() as service:
        big = np.ones((1, 8, 16, 1), np.float32).tobytes()
        with Raw.connect_when_there(site.folder / "state/control.sock") as caller, Raw.connect(site.socket) as raw:
            request = {"type": "capture", "v": 1, "pipeline": "line", "samples": 100_000, "max_bytes": 2**30}
            caller.send(json.dumps({**request, "seconds": 600, "every": 1, "seed": 0}).encode() + b"\n")
            caller.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            assert caller._line() is not None  # recording
            before = resident_bytes(service.pid)
            for _ in range(200):
                for _ in range(100):
                    raw.frame(big)
                assert all(each["type"] == "result" for each in raw.answers(100))
            # 20 000 samples of 512 bytes came; 4096 of them may wait.
            assert resident_bytes(service.pid) - before < 12 * 1024 * 1024
            caller.finish()
            text = b""
            while data := caller.sock.recv(1 << 20):
                text = (text + data)[-4096:]
        done = json.loads(text[text.rindex(b'{"type":"done"') :])
        assert done["dropped"]["behind"] > 0
        assert done["kept"] + done["dropped"]["behind"] == 20_000


# What cannot be.


def test_no_service_is_exit_code_3_with_how_to_start_it(site: Site) -> None:
    site.configure()
    done = site.capture()
    assert done.returncode == 3
    assert b"edge-serve run -c" in done.stderr
    assert site.left() == []


def test_a_service_that_was_killed_counts_as_none(site: Site) -> None:
    with Service(site.configure()).ready() as service:
        wait_for((site.folder / "state" / "control.sock").exists, "it listens")
        service.kill()
    assert (site.folder / "state" / "control.sock").exists()
    assert site.capture().returncode == 3
    with Service(site.config).ready(), fed(site, numbers(20)):
        assert site.capture("--every", "1", "--samples", "3").returncode == 0


TWO = """
    schema = 1
    state_dir = "state"
    [[pipeline]]
    name = "{one}"
    model = "{linear}"
    threads = 1
    source = { type = "socket", listen = "unix://{socket}" }
    [[pipeline]]
    name = "second"
    model = "{linear}"
    threads = 1
    source = { type = "socket", listen = "unix://{socket}2" }
"""


def test_a_pipeline_that_is_not_there_is_exit_code_2_and_the_others_are_named(site: Site) -> None:
    words: dict[str, Any] = {"linear": MODELS / "linear.tflite", "socket": site.socket}
    with InProcess(write_config(site.folder, TWO, one="first", **words)), fed(site, numbers(20)):
        for arguments in (("--pipeline", "third"), ()):
            done = site.capture(*arguments)
            assert done.returncode == 2
            assert b"first, second" in done.stderr
        assert site.capture("--pipeline", "first", "--every", "1", "--samples", "2").returncode == 0
        # The file may say more than the service that began with it.
        write_config(site.folder, TWO, one="newer", **words)
        done = site.capture("--pipeline", "newer", "--force")
        assert done.returncode == 2
        assert b"the running service has no pipeline 'newer'; it has: first, second" in done.stderr


def test_a_second_capture_of_one_pipeline_is_exit_code_3(site: Site) -> None:
    with InProcess(site.configure()), fed(site, numbers(100)), Watched(site, "--json") as watched:
        watched.has_samples()
        done = edge_serve("capture", "-c", site.config, "-o", site.folder / "second.npz")
        assert done.returncode == 3
        assert b"recorded already" in done.stderr
        assert not (site.folder / "second.npz").exists()
        assert watched.end(signal.SIGINT) == 0
        assert watched.document["samples"] > 0


def test_nothing_within_the_time_is_exit_code_3(site: Site) -> None:
    with InProcess(site.configure()):
        done = site.capture("--seconds", "0.5")
    assert done.returncode == 3
    assert b"no input arrived in" in done.stderr
    assert site.left() == []


def test_inputs_that_are_all_too_large_are_told(site: Site) -> None:
    with InProcess(site.configure()), fed(site, numbers(20)):
        done = site.capture("--seconds", "0.5", "--max-bytes", "15")
    assert done.returncode == 3
    assert b"larger than --max-bytes" in done.stderr


def test_a_full_disk_is_known_at_the_first_sample(site: Site) -> None:
    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    with InProcess(site.configure()), fed(site, numbers(20)):
        done = edge_serve(*site.arguments("--seconds", "3600"), preexec_fn=little_room)
    assert done.returncode == 3
    assert b"make room" in done.stderr
    assert site.left() == []


def test_another_configuration_of_the_same_service_is_told(site: Site) -> None:
    with InProcess(site.configure()), fed(site, numbers(20)):
        copy = site.folder / "copy.toml"
        copy.write_text(site.config.read_text())
        done = edge_serve("capture", "-c", copy, "-o", site.output, "--every", "1", "--samples", "20")
    assert done.returncode == 0
    assert f"serves {site.config}, not {copy}" in done.stderr.decode()


def test_quiet_says_nothing_but_the_result(site: Site) -> None:
    with InProcess(site.configure()), fed(site, numbers(20)):
        done = site.capture("--every", "1", "--samples", "2", "-q")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"2 samples" in done.stdout


def test_a_file_that_exists_is_known_before_anything_is_recorded(site: Site) -> None:
    site.configure()
    site.output.write_bytes(b"precious")
    done = site.capture()
    assert done.returncode == 2
    assert b"--force" in done.stderr
    assert site.output.read_bytes() == b"precious"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-bytes", "many"], ["--max-bytes", "0"], ["--max-bytes", "2GiB"], ["--samples", "0"], ["--every", "0"],
        ["--seconds", "0"], ["--every", "2", "--seed", "1"],
    ],
)  # fmt: skip
def test_wrong_use_is_exit_code_2(site: Site, arguments: list[str]) -> None:
    site.configure()
    done = site.capture(*arguments)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert site.left() == []


def test_a_state_folder_that_cannot_be_written_stops_no_service(site: Site) -> None:
    (site.folder / "state").write_text("no folder")
    with Service(site.configure()).ready() as service, Raw.connect(site.socket) as raw:
        (answer,) = raw.frame(numbers(1)[0]).answers(1)
        assert answer["type"] == "result"
        service.said("cannot be written.*no local commands")
        assert service.text.count("no local commands") == 1
        assert service.terminate() == 0
