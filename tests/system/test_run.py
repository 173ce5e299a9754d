"""`edge-serve run` as a process: inputs from pipes and folders, signals, exit codes, output, several pipelines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import (
    MODELS,
    Client,
    Mosquitto,
    Proxy,
    Raw,
    Service,
    cpu_seconds,
    digit_arrays,
    digit_jpeg,
    digit_png,
    edge_serve,
    free_port,
    motion_label,
    motion_series,
    wait_for,
    write_config,
)

CONFIG = """
    schema = 1
    device = "dev"
    grace_s = {grace}
    [pipeline]
    name = "digits"
    model = "{digits}"
    threads = 1
    [pipeline.output]
    type = "classification"
    top_k = 1
    [pipeline.source]
    {source}
    [pipeline.sink]
    {sink}
"""
STDIN = 'type = "file"\npath = "-"'
STDOUT = 'type = "stdout"'


def config(folder: Path, source: str = STDIN, sink: str = STDOUT, **words: Any) -> Path:
    """Write the configuration of a digits pipeline."""
    return write_config(folder, CONFIG, **{"grace": 3, "source": source, "sink": sink, **words})


def right(results: list[dict[str, Any]]) -> int:
    """Count the results that say what the picture of the same number shows."""
    labels = digit_arrays()[1]
    return sum(each["result"]["classes"][0]["index"] == labels[number] for number, each in enumerate(results))


# Inputs until their end.


def test_mjpeg_through_a_pipe(tmp_path: Path) -> None:
    stream = b"".join(digit_jpeg(number) for number in range(100))
    with Service(config(tmp_path), stdin=subprocess.PIPE) as service:
        assert service.process.stdin is not None
        for position in range(0, len(stream), 777):  # as a camera's encoder writes: in pieces of any size
            service.process.stdin.write(stream[position : position + 777])
            service.process.stdin.flush()
        service.process.stdin.close()
        assert service.wait() == 0
        results = service.lines
    assert len(results) == 100
    assert right(results) >= 95
    assert len({each["id"] for each in results}) == 100


def test_a_picture_is_worked_on_before_the_next_one_comes(tmp_path: Path) -> None:
    with Service(config(tmp_path), stdin=subprocess.PIPE) as service:
        assert service.process.stdin is not None
        for number in range(1, 4):
            service.process.stdin.write(digit_jpeg(number))
            service.process.stdin.flush()
            wait_for(lambda: len(service.lines) == number, "the result while the stream goes on")  # noqa: B023
        service.process.stdin.close()
        assert service.wait() == 0


def test_what_is_cut_off_in_a_stream_is_an_error_result(tmp_path: Path) -> None:
    stream = digit_jpeg(0) + digit_jpeg(1)[:-20] + digit_jpeg(2) + digit_jpeg(3)[:100]
    done = edge_serve("run", "-c", config(tmp_path), input=stream)
    assert done.returncode == 0
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert ["error" in each for each in results] == [False, True, False, True]
    assert {each["error"]["code"] for each in results if "error" in each} == {"bad_input"}


def test_json_lines_through_a_pipe(tmp_path: Path) -> None:
    pixels = [(digit_arrays()[0][number] / 255.0)[None, :, :, None].tolist() for number in range(20)]
    stream = b"\n".join(json.dumps(each).encode() for each in pixels) + b'\nnonsense\n\n{"half": '
    done = edge_serve("run", "-c", config(tmp_path), input=stream)
    assert done.returncode == 0
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 22
    assert right(results[:20]) >= 19
    assert [each["error"]["code"] for each in results[20:]] == ["bad_input", "bad_input"]


def test_samples_as_json_lines_fill_windows(tmp_path: Path) -> None:
    text = """
        schema = 1
        [pipeline]
        model = "{motion}"
        threads = 1
        [pipeline.input]
        kind = "window"
        hop = 10
        channels = ["ax", "ay", "az", "gx", "gy", "gz"]
        [pipeline.output]
        type = "classification"
        labels = ["Standing", "Running", "Walking", "Badminton"]
        [pipeline.source]
        type = "file"
        path = "-"
        [pipeline.sink]
        type = "stdout"
    """
    names = ("ax", "ay", "az", "gx", "gy", "gz")
    stream = "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in motion_series(30))
    done = edge_serve("run", "-c", write_config(tmp_path, text), input=stream.encode())
    assert done.returncode == 0, done.stderr
    labels = [json.loads(line)["result"]["classes"][0]["label"] for line in done.stdout.splitlines()]
    assert labels == [motion_label(30)] * 6


def test_a_folder_of_pictures_is_worked_through_in_the_order_of_names(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(40):
        data, kind = (digit_png(number), "png") if number % 2 else (digit_jpeg(number), "jpg")
        (folder / f"{number:02}.{kind}").write_bytes(data)
    (folder / "notes.txt").write_text("no picture")
    (folder / "99.png").write_bytes(b"no picture either")
    done = edge_serve("run", "-c", config(tmp_path, 'type = "file"\npath = "photos"'))
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["id"] for each in results] == [
        *(f"{number:02}.{'png' if number % 2 else 'jpg'}" for number in range(40)), "99.png",
    ]  # fmt: skip
    assert right(results[:40]) >= 38
    assert results[40]["error"]["code"] == "bad_input"


@pytest.mark.broker
def test_a_folder_waits_until_upstream_has_everything(tmp_path: Path, make_broker: Callable[..., Mosquitto]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.png").write_bytes(digit_png(number))
    broker = make_broker()
    path = config(tmp_path, 'type = "file"\npath = "photos"', 'type = "mqtt"\ntopic = "results"')
    path.write_text(path.read_text() + f'\n[mqtt]\nurl = "{broker.url}"\n')
    with Service(path) as service:
        service.said("cannot connect")
        broker.start()
        with Client(broker.port, "results") as client:
            client.wait_ids({f"{number:02}.png" for number in range(60)})
            assert service.wait() == 0
            assert len(client.messages) == 60


def test_a_folder_whose_results_cannot_be_sent_ends_with_exit_code_3_when_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(digit_png(0))
    sink = 'type = "file"\npath = "/dev/full"\nmax_bytes = 0\n[spool]\nenabled = false'
    with Service(config(tmp_path, 'type = "file"\npath = "photos"', sink, grace=0.5)) as service:
        service.said("started in")
        assert service.terminate() == 3, "that input does not come again"
        assert "1 results are not upstream" in service.text


def test_a_folder_whose_results_cannot_be_sent_leaves_them_in_the_spool(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(digit_png(0))
    sink = 'type = "file"\npath = "/dev/full"\nmax_bytes = 0'
    with Service(config(tmp_path, 'type = "file"\npath = "photos"', sink, grace=0.5)) as service:
        service.said("started in")
        assert service.terminate() == 0, "its result is safe"
        assert "1 results wait in the spool" in service.text


def test_no_standard_input_is_told(tmp_path: Path) -> None:
    with Service(config(tmp_path), before=lambda: os.close(0)) as service:
        service.said("stdin: cannot be opened")
        assert service.terminate() == 0


# Standard output.


def test_standard_output_has_json_lines_and_nothing_else(tmp_path: Path) -> None:
    done = edge_serve("run", "-c", config(tmp_path), input=digit_jpeg(0) + digit_jpeg(1))
    assert [json.loads(line)["v"] for line in done.stdout.splitlines()] == [1, 1]
    assert done.stdout.endswith(b"\n")
    assert b"started" in done.stderr


def test_a_reader_that_ends_ends_the_service(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with Service(config(tmp_path), stdin=subprocess.PIPE, stdout=writing) as service:
        os.close(writing)
        assert service.process.stdin is not None
        service.process.stdin.write(digit_jpeg(0))
        service.process.stdin.flush()
        assert b'"v":1' in os.read(reading, 100_000)
        os.close(reading)
        service.process.stdin.write(digit_jpeg(1))
        service.process.stdin.flush()
        assert service.wait() == 3
        assert "whoever read standard output is gone" in service.text
        assert "Traceback" not in service.text


def test_a_reader_that_does_not_read_holds_the_input_back_and_no_stop_up(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with Service(config(tmp_path, grace=0.5), stdin=subprocess.PIPE, stdout=writing) as service:
        os.close(writing)
        assert service.process.stdin is not None
        os.set_blocking(service.process.stdin.fileno(), False)
        frame, sent, last = digit_jpeg(0), 0, time.monotonic()
        while sent < 20_000_000 and time.monotonic() - last < 1.0:
            try:
                sent += os.write(service.process.stdin.fileno(), frame)
                last = time.monotonic()
            except BlockingIOError:
                time.sleep(0.01)
        assert sent < 5_000_000
        began = time.monotonic()
        assert service.terminate() == 0
        assert time.monotonic() - began < 4
        os.close(reading)


# Signals.


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_drains_what_is_in_work(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with Service(config(tmp_path), stdin=subprocess.PIPE) as service:
        assert service.process.stdin is not None
        service.ready()
        service.process.stdin.write(b"".join(digit_jpeg(each) for each in range(300)))
        service.process.stdin.flush()
        wait_for(lambda: service.lines, "the first result")
        assert service.terminate(number) == code
        taken = int(service.said_at_last(r"digits: (\d+) in, (\d+) out").group(1))
        assert taken == len(service.lines) > 0
        assert "stopping" in service.text


def test_sigterm_while_idle_is_quick(tmp_path: Path) -> None:
    with Service(config(tmp_path), stdin=subprocess.PIPE) as service:
        service.ready()
        began = time.monotonic()
        assert service.terminate() == 0
        assert time.monotonic() - began < 2


def test_a_signal_during_the_start_ends_it(tmp_path: Path) -> None:
    for delay in (0.0, 0.05, 0.1, 0.15, 0.2):
        with Service(config(tmp_path), stdin=subprocess.PIPE) as service:
            time.sleep(delay)
            service.process.send_signal(signal.SIGINT)
            if service.wait() == 1 and "Fatal Python error: init_" in service.text:
                continue  # the interpreter itself was still starting
            assert service.wait() in (130, -signal.SIGINT), service.text
            if "info" in service.text:
                assert "Traceback" not in service.text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_it_at_once(tmp_path: Path, number: signal.Signals, code: int, short_path: Path) -> None:
    # The result goes nowhere, so the first signal waits for the grace.
    source = f'type = "socket"\nlisten = "unix://{short_path}/in.sock"'
    path = config(tmp_path, source, 'type = "file"\npath = "/dev/full"\nmax_bytes = 0', grace=60)
    path.write_text(path.read_text() + "\n[spool]\nenabled = false\n")
    with Service(path) as service:
        service.ready()
        with Raw.connect(short_path / "in.sock") as client:
            client.frame(digit_png(0), id="first")
            client.answers(1)
            service.process.send_signal(number)
            service.said("stopping")
            with pytest.raises(subprocess.TimeoutExpired):
                service.process.wait(0.5)
            began = time.monotonic()
            service.process.send_signal(number)
            assert service.wait() == code
            assert time.monotonic() - began < 2


# Mistakes.

PARTS = '[pipeline.source]\ntype = "file"\npath = "-"\n[pipeline.sink]\ntype = "stdout"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schema = ", ["not TOML"]),
        ("schema = 2", ["schema", "pipeline"]),
        (f'schema = 1\n[pipeline]\nmodel = "gone.tflite"\n{PARTS}', ["pipeline.model", "does not exist"]),
        (f'schema = 1\n[pipeline]\nmodel = "bad.tflite"\n{PARTS}', ["bad.tflite"]),
        (
            f'schema = 1\n[pipeline]\nmodel = "{{digits}}"\nsignature = "no_such"\n{PARTS}',
            ["no_such", "serving_default"],
        ),
        (
            (
                'schema = 1\nspeed = 9\n[pipeline]\nmodel = "{digits}"\nthreads = "many"\n[pipeline.source]\n'
                'type = "mqtt"\ntopic = "a/#"\nqos = 2\n[pipeline.sink]\ntype = "mqtt"\ntopic = "a/b"\n'
                '[mqtt]\nurl = "http://x"\n'
            ),
            ["speed", "threads", "qos", "mqtt.url", "own source", "unknown key"],
        ),
        (f'schema = 1\n[pipeline]\nmodel = "{MODELS}/linear.tflite"\n[pipeline.input]\nkind = "image"\n{PARTS}', ["x"]),
    ],
    ids=["toml", "schema", "model", "damaged", "signature", "all", "kind"],
)  # fmt: skip
def test_a_bad_configuration_is_exit_code_2_with_every_reason(tmp_path: Path, text: str, said: list[str]) -> None:
    (tmp_path / "bad.tflite").write_bytes(b"\x1c\0\0\0TFL3" + b"\xff" * 500)
    path = write_config(tmp_path, text)
    for more in ([], ["-v"]):
        done = edge_serve("run", "-c", path, *more)
        assert done.returncode == 2, done.stderr
        assert done.stdout == b""
        message = done.stderr.decode()
        assert "Traceback" not in message
        assert str(path) in message
        for word in said:
            assert word in message


def test_a_configuration_that_is_not_there_is_exit_code_2(tmp_path: Path) -> None:
    done = edge_serve("run", "-c", tmp_path / "gone.toml")
    assert done.returncode == 2
    assert b"gone.toml" in done.stderr
    done = edge_serve("run", cwd=tmp_path)
    assert done.returncode == 2
    assert b"edge-serve.toml" in done.stderr
    assert edge_serve("run", "--no-such-option").returncode == 2


# Logs.


def test_logs_as_json_are_json(tmp_path: Path) -> None:
    done = edge_serve("run", "-c", config(tmp_path), "--log-format", "json", input=digit_jpeg(0))
    assert done.returncode == 0
    documents = [json.loads(line) for line in done.stderr.splitlines() if not line.startswith(b"INFO: Created")]
    assert {"time", "level", "logger", "message"} <= set(documents[0])
    assert any("started in" in each["message"] for each in documents)


def test_quiet_says_nothing_when_all_is_well(tmp_path: Path) -> None:
    done = edge_serve("run", "-c", config(tmp_path), "-q", input=digit_jpeg(0))
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if not line.startswith(b"INFO: Created")] == []


def test_no_line_is_logged_for_every_message(tmp_path: Path) -> None:
    done = edge_serve("run", "-c", config(tmp_path), input=b"[1]\n" * 500)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 500
    assert len(done.stderr.splitlines()) < 12
    assert b"500 bad_input" in done.stderr
    verbose = edge_serve("run", "-c", config(tmp_path), "-v", input=b"[1]\n" * 500)
    assert len(verbose.stderr.splitlines()) > 500


# Several pipelines in one process.

SEVERAL = """
    schema = 1
    device = "dev"
    grace_s = 1
    [mqtt]
    url = "{url}"
    [mqtt.away]
    url = "{away}"
    [[pipeline]]
    name = "good"
    model = "{digits}"
    threads = 1
    [pipeline.source]
    type = "mqtt"
    topic = "good/in"
    [pipeline.sink]
    type = "mqtt"
    topic = "good/out"
    [[pipeline]]
    name = "poisoned"
    model = "{motion}"
    threads = 1
    [pipeline.source]
    type = "mqtt"
    topic = "poisoned/in"
    [pipeline.sink]
    type = "mqtt"
    topic = "poisoned/out"
    [[pipeline]]
    name = "stuck"
    model = "{digits}"
    threads = 1
    [pipeline.source]
    type = "mqtt"
    topic = "stuck/in"
    [pipeline.sink]
    type = "mqtt"
    broker = "away"
    topic = "stuck/out"
    [[pipeline]]
    name = "refused"
    model = "{digits}"
    threads = 1
    [pipeline.source]
    type = "socket"
    listen = "unix://{short}/no/such/folder.sock"
    [[pipeline]]
    name = "socket"
    model = "{digits}"
    threads = 1
    [pipeline.source]
    type = "socket"
    listen = "unix://{short}/in.sock"
"""


@pytest.fixture
def several(tmp_path: Path, short_path: Path, broker: Mosquitto) -> Iterator[Service]:
    """Five pipelines, of which three have their troubles."""
    words: dict[str, Any] = {"url": broker.url, "away": f"mqtt://127.0.0.1:{free_port()}", "short": short_path}
    with Service(write_config(tmp_path, SEVERAL, **words)) as service:
        service.said("started in")
        yield service


@pytest.mark.broker
def test_one_pipelines_trouble_is_no_others(several: Service, broker: Mosquitto, short_path: Path) -> None:
    with Client(broker.port, "good/out", "poisoned/out") as client, Raw.connect(short_path / "in.sock") as local:
        for number in range(100):
            client.publish("poisoned/in", b"garbage %d" % number, wait=False)
            client.publish("stuck/in", digit_png(number), wait=False)
            client.publish("good/in", digit_png(number), user={"id": str(number)}, wait=False)
            local.frame(digit_png(number), id=number)
        assert [each["id"] for each in local.answers(100)] == list(range(100))
        client.wait(200)
        good = [each.document for each in client.messages if each.topic == "good/out"]
        poisoned = [each.document for each in client.messages if each.topic == "poisoned/out"]
        assert [each["id"] for each in good] == [str(number) for number in range(100)]
        assert not [each for each in good if "error" in each]
        assert {each["error"]["code"] for each in poisoned} == {"bad_input"}
        used = cpu_seconds(several.pid)
        time.sleep(1.0)
        assert cpu_seconds(several.pid) - used < 0.3, "somebody spins"
    assert several.terminate() == 0
    assert "Traceback" not in several.text
    assert "stuck: 100 results wait in the spool" in several.text


# A file as a sink.


def socket_to_file(folder: Path, short: Path, options: str, file: str = "results.jsonl") -> Path:
    """Write a configuration from a socket to a file."""
    return config(
        folder, f'type = "socket"\nlisten = "unix://{short}/in.sock"', f'type = "file"\npath = "{file}"\n{options}'
    )


def test_a_full_file_is_renamed_and_old_ones_go(tmp_path: Path, short_path: Path) -> None:
    with Service(socket_to_file(tmp_path, short_path, "max_bytes = 5000\nkeep = 2")) as service:
        service.ready()
        with Raw.connect(short_path / "in.sock") as client:
            for number in range(60):
                client.frame(digit_png(0), id=number)
            client.answers(60)
        assert service.terminate() == 0
    files = [tmp_path / name for name in ("results.jsonl.2", "results.jsonl.1", "results.jsonl")]
    assert sorted(tmp_path.glob("results.jsonl*")) == sorted(files)
    found = []
    for file in files:
        assert file.stat().st_size <= 5000
        found += [json.loads(line)["id"] for line in file.read_text().splitlines()]
    assert found == [str(number) for number in range(60 - len(found), 60)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_withholds_and_loses_nothing(tmp_path: Path, short_path: Path, small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 50_000)
    source = f'type = "socket"\nlisten = "unix://{short_path}/in.sock"\nmax_inflight = 1000'
    path = config(tmp_path, source, f'type = "file"\npath = "{small_disk}/results.jsonl"')
    with Service(path) as service, Raw.connect_when_there(short_path / "in.sock") as client:
        service.ready()
        for number in range(100):
            client.frame(digit_png(number), id=number, reply=False)
        service.said("the disk is full|No space left")
        used = cpu_seconds(service.pid)
        time.sleep(1.0)
        assert cpu_seconds(service.pid) - used < 0.3, "it spins"
        assert service.text.count("No space left") + service.text.count("disk is full") <= 4, "one line an event"
        ballast.unlink()
        results = small_disk / "results.jsonl"
        wait_for(lambda: len(results.read_bytes().splitlines()) >= 100, "all results", 60)
        assert service.terminate() == 0
        found = [json.loads(line)["id"] for line in results.read_text().splitlines()]
        assert found == [str(number) for number in range(100)], "no half line, none lost, none twice, in order"


@pytest.mark.broker
def test_two_sinks_on_one_broker_do_not_disturb_each_other(tmp_path: Path, broker: Mosquitto) -> None:
    sinks = 'type = "mqtt"\ntopic = "one"\n[[pipeline.sink]]\ntype = "mqtt"\ntopic = "two"'
    path = config(tmp_path, 'type = "mqtt"\ntopic = "in"', sinks)
    path.write_text(
        path.read_text().replace("[pipeline.sink]", "[[pipeline.sink]]", 1) + f'[mqtt]\nurl = "{broker.url}"'
    )
    with Client(broker.port, "one", "two") as client, Service(path) as service:
        service.ready()
        for number in range(20):
            client.publish("in", digit_png(number))
        found = client.wait(40)
        assert sum(each.topic == "one" for each in found) == 20
        assert service.terminate() == 0
        assert "lost" not in service.text


@pytest.mark.broker
def test_with_two_sinks_an_input_is_safe_when_both_have_its_result(
    tmp_path: Path, make_broker: Callable[..., Mosquitto]
) -> None:
    near, far = make_broker().start(), make_broker().start()
    with Proxy(far.port) as uplink, Client(near.port, "near") as client, Client(far.port, "far") as upstream:
        text = f"""
            schema = 1
            device = "dev"
            grace_s = 1
            [mqtt]
            url = "{near.url}"
            [mqtt.far]
            url = "{uplink.url}"
            [pipeline]
            model = "{{digits}}"
            threads = 1
            [pipeline.source]
            type = "mqtt"
            topic = "in"
            [[pipeline.sink]]
            type = "mqtt"
            topic = "near"
            [[pipeline.sink]]
            type = "mqtt"
            broker = "far"
            topic = "far"
        """
        with Service(write_config(tmp_path, text)) as service:
            service.ready()
            client.publish("in", digit_png(0), user={"id": "first"})
            client.wait_ids({"first"})
            upstream.wait_ids({"first"})
            uplink.freeze()
            client.publish("in", digit_png(0), user={"id": "second"})
            client.wait_ids({"second"})
            service.kill()
        # Killed before the second sink had it, the input comes again.
        uplink.restore()
        with Service(tmp_path / "edge-serve.toml") as service:
            service.ready()
            upstream.wait_ids({"first", "second"})
            assert service.terminate() == 0
