"""One bad input: what its error result says, what a quarantined window takes with it, and what it costs all others."""

from __future__ import annotations

import base64
import json
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve.bundle import TensorSpec
from edge_serve.errors import InputError, QuarantinedError, TooLargeError
from edge_serve.frame import ModelInfo, Result
from edge_serve.health import Counters
from edge_serve.mailbox import Mailbox
from edge_serve.pipeline import Pipeline, Worker
from edge_serve.processing.intake import Job, SingleIntake
from edge_serve.processing.window import WindowIntake
from edge_serve.quarantine import Guard, Quarantine
from edge_serve.spec import InputSpec
from tests.unit.material import Settled, problems, sound, tensor


class Sink:
    """Keeps results, and says that they are safe."""

    ready = True

    def __init__(self) -> None:
        self.results: list[Result] = []

    def submit(self, result: Result, done: Callable[[Exception | None], None], **_: Any) -> None:
        self.results.append(result)
        done(None)


class Model:
    """An engine that fails as it is told to."""

    def __init__(self) -> None:
        self.inputs = {"x": TensorSpec("x", "float32", (1, 2))}
        self.fails: Exception | None = None

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.fails is not None:
            raise self.fails
        return {"y": inputs["x"]}


def worker(sink: Sink, model: Model, decode: Any = None, **options: Any) -> Callable[[Any], None]:
    """Give what works on one delivery."""
    pipeline = Pipeline(
        "p",
        "d",
        "tensor",
        [
            Worker(
                model,  # type: ignore[arg-type]
                SingleIntake(InputSpec(kind="tensor"), model.inputs),
                decode or (lambda tensors, _geometry: {"sum": float(sum(tensors["y"][0]))}),
                Guard.unmarked(),
                ModelInfo("m", None, "file", "none", "serving_default"),
            )
        ],
        Mailbox("lossless", Counters()),
        [sink],  # type: ignore[list-item]
        Counters(),
        lambda error: pytest.fail(f"the worker would have ended: {error}"),
        **options,
    )
    return lambda delivery: pipeline._work(pipeline._first, delivery)


@pytest.mark.parametrize("error", [RuntimeError("bug"), MemoryError(), RecursionError(), ArithmeticError("inexact")])
def test_whatever_a_model_raises_is_one_error_result_and_the_next_input_is_served(error: Exception) -> None:
    sink, settled, model = Sink(), Settled(), Model()
    work = worker(sink, model)
    model.fails = error
    work(settled.delivery(b"[1, 2]"))
    model.fails = None
    work(settled.delivery(b"[1, 2]"))
    assert [result.error.code if result.error else None for result in sink.results] == ["internal", None]
    assert settled.outcomes == {0: None, 1: None}


def test_a_decoder_that_raises_is_one_error_result(caplog: pytest.LogCaptureFixture) -> None:
    sink, settled = Sink(), Settled()

    def broken(_tensors: object, _geometry: object) -> dict[str, Any]:
        raise ZeroDivisionError("in the decoder")

    worker(sink, Model(), broken)(settled.delivery(b"[1, 2]"))
    (result,) = sink.results
    assert result.error is not None
    assert (result.error.code, result.error.message) == ("internal", "ZeroDivisionError: in the decoder")
    assert settled.outcomes == {0: None}
    assert "frame 0: unexpected error" in caplog.text


@pytest.mark.parametrize(
    ("payload", "asked", "told"),
    [
        (b"rubbish", 0, None),
        (b"rubbish", 3, b"rub"),
        (b"rubbish", 100, b"rubbish"),
        (bytearray(b"rubbish"), 3, b"rub"),
        (memoryview(b"rubbish"), 3, b"rub"),
        (np.arange(100, dtype=np.int16).reshape(10, 10)[:, ::2], 6, np.array([0, 2, 4], np.int16).tobytes()),
    ],
    ids=str,
)
def test_an_error_result_carries_as_much_of_the_payload_as_is_asked_for(
    payload: Any, asked: int, told: bytes | None
) -> None:
    sink, settled = Sink(), Settled()
    worker(sink, Model(), error_payload_bytes=asked)(settled.delivery(payload, "application/octet-stream"))
    (result,) = sink.results
    error = json.loads(result.to_json())["error"]
    assert error["code"] == "bad_input"
    assert (base64.b64decode(error["payload"]) if "payload" in error else None) == told


def test_what_the_source_did_not_take_is_not_in_the_error_result() -> None:
    sink, settled = Sink(), Settled()
    worker(sink, Model(), error_payload_bytes=8)(settled.delivery(b"", error=TooLargeError("9 bytes are over 8")))
    assert "payload" not in json.loads(sink.results[0].to_json())["error"]


def test_how_much_of_the_payload_is_a_number_in_bounds(tmp_path: Path) -> None:
    assert problems(sound(**{'name = "one"': 'name = "one"\nerror_payload_bytes = 64'}), tmp_path) == []
    for wrong in ("-1", "65537", '"all"'):
        (problem,) = problems(sound(**{'name = "one"': f'name = "one"\nerror_payload_bytes = {wrong}'}), tmp_path)
        assert problem.key == "pipeline.error_payload_bytes"


def test_a_key_of_a_thousand_parts_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (problem,) = problems("a." * 200_000 + "a = 1", tmp_path)
    assert problem.what == "is not TOML that anybody wrote: a key has over 64 parts"
    assert problems(sound(**{'"bench"': '"bench"  # a.b.c. ' + "And so on. " * 20}), tmp_path) == []


# Windows.


class Windows:
    """Windows of 4 samples of one channel, and how their samples were settled."""

    def __init__(self, hop: int) -> None:
        self.counters = Counters()
        self.settled = Settled()
        self.intake = WindowIntake(InputSpec(kind="window", hop=hop), {"x": tensor((1, 4, 1))}, self.counters)

    def feed(self, *samples: float, key: str = "k") -> list[Job]:
        payload = json.dumps([[sample] for sample in samples]).encode()
        return self.intake.feed(self.settled.delivery(payload, meta={"key": key}))


def samples(job: Job) -> list[float]:
    return [float(value) for value in job.inputs["x"].reshape(-1)]


def test_the_samples_of_a_quarantined_window_are_in_no_later_one() -> None:
    windows = Windows(hop=1)
    found = [job for number in range(4) for job in windows.feed(number)]
    windows.intake.spoil(found, 0)
    found[0].settle(None)
    assert windows.settled.order == [0, 1, 2, 3], "all of them are settled with that window"
    later = [job for number in range(4, 9) for job in windows.feed(number)]
    assert [samples(job) for job in later] == [[4, 5, 6, 7], [5, 6, 7, 8]]


def test_another_keys_windows_go_on() -> None:
    windows = Windows(hop=1)
    for number in range(3):
        windows.feed(number, key="other")
    found = [job for number in range(4) for job in windows.feed(number)]
    windows.intake.spoil(found, 0)
    (job,) = windows.feed(3, key="other")
    assert samples(job) == [0, 1, 2, 3]


def test_windows_without_overlap_are_not_touched() -> None:
    windows = Windows(hop=4)
    found = windows.feed(*range(10))
    windows.intake.spoil(found, 0)
    assert [job.error for job in found] == [None, None]
    (job,) = windows.feed(10, 11)
    assert samples(job) == [8, 9, 10, 11]


def test_of_one_payloads_windows_those_that_overlap_are_not_run() -> None:
    windows = Windows(hop=2)
    found = windows.feed(*range(12))
    assert [samples(job)[0] for job in found] == [0, 2, 4, 6, 8]
    windows.intake.spoil(found, 1)
    assert [type(job.error) for job in found] == [type(None), type(None), QuarantinedError, type(None), type(None)]
    (job,) = windows.feed(12, 13)
    assert samples(job) == [10, 11, 12, 13], "the last window was sound, and so are its samples"


def test_a_refused_sample_leaves_the_window_as_it_was() -> None:
    windows = Windows(hop=4)
    windows.feed(0, 1)
    with pytest.raises(InputError):
        windows.feed(float("nan"))
    (job,) = windows.feed(2, 3)
    assert samples(job) == [0, 1, 2, 3]
    job.settle(None)
    assert windows.settled.outcomes == {0: None, 2: None}


# What all others pay.


def test_a_mark_costs_a_microsecond_or_so(tmp_path: Path) -> None:
    """Measured: 0.45 µs for 100 bytes, 0.9 µs for any longer payload; a slow board and a busy machine get ten times that."""
    marks = Quarantine.open(tmp_path / "run")
    guard = marks.guard("p", tmp_path, ("none",))
    guard.attach()
    for size in (100, 1_000_000):
        payload = bytes(size)

        def once(payload: bytes = payload) -> None:
            guard.enter("0001-0123456789abcdef01234567", payload)
            guard.leave()

        assert min(timeit.repeat(once, number=2000, repeat=5)) / 2000 < 10e-6
    marks.close()
