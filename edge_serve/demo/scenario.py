"""The demo's course: a broker, `edge-serve run` as a process of its own, inputs sent, results gathered and judged."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edge_serve.client import Client
from edge_serve.demo import data
from edge_serve.demo.broker import IN_FLIGHT
from edge_serve.errors import UnavailableError
from edge_serve.health import percentile

if TYPE_CHECKING:
    from edge_serve.demo.broker import EmbeddedBroker
    from edge_serve.frame import Array
    from edge_serve.mqtt import Connection, Message

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
RESULT_TIMEOUT_S = 30.0
# Points that a quantized model may lose against its float SavedModel.
TOLERANCE = 0.01
# Samples of one recording that are sent before the results so far are waited for.
DEVICE = "demo"
SHOWN = 3

MQTT_CONFIG = """
[mqtt]
url = "{url}"
"""
MOTION_CONFIG = """
[[pipeline]]
name = "motion"
model = "{models}/motion"
"""
DIGITS_CONFIG = """
[[pipeline]]
name = "digits"
model = "{models}/digits"
[pipeline.source]
type = "socket"
listen = "unix://{folder}/digits.sock"
"""
MQTT_SINK = """
[[pipeline.sink]]
type = "mqtt"
"""


@dataclass(slots=True)
class Outcome:
    """What came back from one pipeline."""

    name: str
    transport: str
    model: str
    inputs: int
    expected: int
    labels: Array
    reference: Array
    classes: dict[int, int] = field(default_factory=dict)
    """Number of the window or picture → the class that was answered."""
    milliseconds: list[float] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Give the share of right answers; what is missing is wrong."""
        return sum(int(self.labels[i]) == c for i, c in self.classes.items()) / len(self.labels)

    @property
    def float_accuracy(self) -> float:
        """Give the float SavedModel's share of right answers on the same data."""
        return float((self.reference == self.labels).mean())

    def judge(self) -> None:
        """Note everything that is not as it has to be."""
        if len(self.classes) != self.expected:
            self.problems.append(f"{len(self.classes)} results for {self.expected} expected")
        if self.accuracy < self.float_accuracy - TOLERANCE:
            self.problems.append(
                f"accuracy {self.accuracy:.1%} is more than one point below the float SavedModel's {self.float_accuracy:.1%}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Give the outcome, JSON-ready."""
        ordered = sorted(self.milliseconds)
        return {
            "pipeline": self.name,
            "transport": self.transport,
            "model": self.model,
            "inputs": self.inputs,
            "results": len(self.classes),
            "accuracy": round(self.accuracy, 4),
            "float_accuracy": round(self.float_accuracy, 4),
            "latency_ms": {"p50": percentile(ordered, 50), "p99": percentile(ordered, 99)},
            "problems": self.problems,
        }


Say = Callable[[str], None]


def run(models: Path, reference: Path | None, folder: Path, broker: EmbeddedBroker | None, say: Say) -> list[Outcome]:
    """Serve both models from `folder`, send all test data and give what came back, judged."""
    config = _write_config(models, folder, broker)
    with _service(config, folder, say):
        outcomes = []
        if broker is not None:
            say(f"sending 40 recordings, sample by sample, to {broker.url}")
            outcomes.append(_motion_over_mqtt(config, reference))
        else:
            say("sending 40 recordings, sample by sample, to the Unix socket")
            outcomes.append(_motion_over_socket(folder, reference))
        say("sending 500 pictures to the Unix socket")
        outcomes.append(_digits_over_socket(folder, reference, config if broker is not None else None))
    for outcome in outcomes:
        outcome.judge()
    return outcomes


def _write_config(models: Path, folder: Path, broker: EmbeddedBroker | None) -> Path:
    # A state folder of its own: a service of this user may be running.
    text = f'schema = 1\ndevice = "{DEVICE}"\nstate_dir = "state"\n'
    text += MQTT_CONFIG.format(url=broker.url) if broker is not None else ""
    text += MOTION_CONFIG.format(models=models)
    if broker is not None:
        text += '[pipeline.source]\ntype = "mqtt"\ntopic = "demo/motion/+"\n'
        text += f"receive_maximum = {IN_FLIGHT}  # this broker's own limit\n" + MQTT_SINK
    else:
        text += f'[pipeline.source]\ntype = "socket"\nlisten = "unix://{folder}/motion.sock"\n'
    text += DIGITS_CONFIG.format(models=models, folder=folder) + (MQTT_SINK if broker is not None else "")
    path = folder / "edge-serve.toml"
    path.write_text(text, encoding="utf-8")
    return path


@contextmanager
def _service(config: Path, folder: Path, say: Say) -> Iterator[None]:
    """Run `edge-serve run` until the block is left; UnavailableError with its log if it does not get ready or end well."""
    say(f"starting edge-serve run -c {config}")
    command = [sys.executable, "-m", "edge_serve", "run", "-c", str(config)]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    ready = threading.Event()
    reader = threading.Thread(target=_follow, args=(process.stderr, lines, ready), name="demo.log", daemon=True)
    reader.start()
    try:
        if not ready.wait(READY_TIMEOUT_S) or process.poll() is not None:
            raise UnavailableError("edge-serve run did not get ready:\n" + "".join(lines[-20:]))
        for line in lines:
            if ": ready: " in line:
                say("  " + line.strip())
        yield
    finally:
        process.terminate()
        try:
            code = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        reader.join(STOP_TIMEOUT_S)
        process.stderr.close()
    if code != 0:
        raise UnavailableError(f"edge-serve run ended with exit code {code}:\n" + "".join(lines[-20:]))


def _follow(stream: IO[str], lines: list[str], ready: threading.Event) -> None:
    for line in stream:
        lines.append(line)
        if "started in" in line:
            ready.set()
    ready.set()


def _outcome(name: str, transport: str, inputs: int, labels: Array, reference: Path | None) -> Outcome:
    return Outcome(name, transport, "", inputs, len(labels), labels, data.reference(name, reference))


def _take(outcome: Outcome, number: int, document: dict[str, Any], latency_ms: float) -> None:
    """Note one result document for the input of that number."""
    if "error" in document or document.get("type") == "error":
        outcome.problems.append(f"input {number}: {document.get('error') or document.get('message')}")
        return
    model, best = document["model"], document["result"]["classes"][0]
    outcome.model = f"{model['name']} {model['variant']} on {model['delegate']}"
    outcome.classes[number] = best["index"]
    outcome.milliseconds.append(latency_ms)
    if len(outcome.shown) < SHOWN:
        invoke = document["timings_ms"]["invoke"]
        outcome.shown.append(f"{document['source']}: {best['label']} ({best['score']:.2f}), invoke {invoke:.2f} ms")


def _samples(recording: Array) -> list[bytes]:
    return [json.dumps([round(float(value), 6) for value in sample]).encode() for sample in recording]


def _motion_over_mqtt(config: Path, reference: Path | None) -> Outcome:
    """Publish every sample as a message of its own; a window's latency runs from its last sample to its result."""
    motion = data.motion()
    outcome = _outcome(
        "motion", "MQTT", motion.series.shape[0] * motion.series.shape[1], motion.window_labels, reference
    )
    per_series = len(outcome.labels) // len(motion.series)
    with _subscriber(config, f"edge-serve/{DEVICE}/motion/result") as (connection, results):
        for number, recording in enumerate(motion.series):
            topic = f"demo/motion/{number}"
            windows = 0
            for position, sample in enumerate(_samples(recording), 1):
                published = time.perf_counter()
                connection.publish(topic, sample, 1)
                if position < data.LENGTH or (position - data.LENGTH) % data.HOP:
                    continue
                payload, arrived = _next(results, outcome)
                if payload is None:
                    return outcome
                document = json.loads(payload)
                _take(outcome, number * per_series + windows, document, (arrived - published) * 1e3)
                windows += 1
                if document["key"] != topic:
                    outcome.problems.append(f"a result of {document['key']} came in the place of one of {topic}")
    return outcome


def _next(results: queue.SimpleQueue[tuple[bytes, float]], outcome: Outcome) -> tuple[bytes | None, float]:
    try:
        return results.get(timeout=RESULT_TIMEOUT_S)
    except queue.Empty:
        outcome.problems.append(f"no result for {RESULT_TIMEOUT_S:g} s")
        return None, 0.0


@contextmanager
def _subscriber(config: Path, topic: str) -> Iterator[tuple[Connection, queue.SimpleQueue[tuple[bytes, float]]]]:
    """Give a connection that has subscribed to a topic, and the queue of what arrives there."""
    from edge_serve.app import load
    from edge_serve.mqtt import Connection

    results: queue.SimpleQueue[tuple[bytes, float]] = queue.SimpleQueue()

    def arrived(message: Message) -> None:
        results.put((message.payload, time.perf_counter()))
        connection.acknowledge(message.packet_id)

    connection = Connection(load(config), "", "demo-user", clean=True, on_message=arrived)
    connection.open()
    try:
        connection.subscribe([topic], 1, retained=False)
        yield connection, results
    finally:
        connection.close()


def _motion_over_socket(folder: Path, reference: Path | None) -> Outcome:
    motion = data.motion()
    outcome = _outcome(
        "motion", "Unix socket", motion.series.shape[0] * motion.series.shape[1], motion.window_labels, reference
    )
    per_series = len(outcome.labels) // len(motion.series)
    with Client(f"unix://{folder}/motion.sock") as client:
        for number, recording in enumerate(motion.series):
            windows = 0
            for position, sample in enumerate(_samples(recording)):
                begun = time.perf_counter()
                header = {"type": "frame", "id": f"{number}-{position}", "meta": {"key": str(number)}}
                client.send(header, sample)
                answer = client.receive()
                if answer is not None and answer["type"] != "accepted":
                    _take(outcome, number * per_series + windows, answer, (time.perf_counter() - begun) * 1e3)
                    windows += 1
    return outcome


def _digits_over_socket(folder: Path, reference: Path | None, config: Path | None) -> Outcome:
    """Send picture after picture; where there is a broker, each result has to arrive there, too."""
    digits = data.digits()
    outcome = _outcome("digits", "Unix socket", len(digits.labels), digits.labels, reference)
    if config is None:
        _send_digits(folder, digits, outcome)
        return outcome
    with _subscriber(config, f"edge-serve/{DEVICE}/digits/result") as (_, results):
        _send_digits(folder, digits, outcome)
        upstream: set[str] = set()
        while len(upstream) < outcome.expected:
            payload, _ = _next(results, outcome)
            if payload is None:
                break
            upstream.add(json.loads(payload)["id"])
    return outcome


def _send_digits(folder: Path, digits: data.Digits, outcome: Outcome) -> None:
    with Client(f"unix://{folder}/digits.sock") as client:
        for number in range(len(digits.labels)):
            picture = digits.png(number)
            begun = time.perf_counter()
            client.send({"type": "frame", "id": str(number), "content_type": "image/png"}, picture)
            answer = client.receive()
            if answer is not None:
                _take(outcome, number, answer, (time.perf_counter() - begun) * 1e3)
