"""A delegate that fails in service: the next in line runs the same input, and what failed is taken up again when it is well.

What fails here stands in for a delegate behind its own face (`Runnable`); tests/system/test_delegates.py does it with libraries.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve.bundle import TensorSpec
from edge_serve.errors import DelegateAwayError, DelegateError, DelegateFailedError, InferenceError, ModelError
from edge_serve.model import resilient
from edge_serve.model.delegate import Candidate, Claims, DelegateSpec, Runnable
from edge_serve.model.resilient import ResilientEngine
from tests.support import wait_for

NAN = float("nan")


class Device:
    """A delegate as it is today: what it does with an input, how often it was opened, whether it is there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.away: Exception | None = None
        self.fails: Exception | None = None
        self.gives: float | None = None
        self.opened = 0
        self.closed = 0
        self.runs = 0
        self.thread = 0


class Fake:
    """One signature on such a delegate: y = x."""

    path = Path("model.tflite")
    signature = "serving_default"
    threads = 1
    detection_outputs = None
    claims = Claims({"ADD": 1}, {"ADD": 1})
    operators = claims.operators

    def __init__(self, device: Device) -> None:
        self.device = device
        self.closed = False
        self.delegate = device.name
        self.inputs = {"x": TensorSpec("x", "float32", (1, 2))}
        self.outputs = {"y": TensorSpec("y", "float32", (1, 2))}
        device.opened += 1

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if self.closed:
            raise DelegateFailedError("was unplugged, and is closed")
        self.device.runs += 1
        self.device.thread = threading.get_ident()
        if self.device.fails is not None:
            raise self.device.fails
        y = inputs["x"].copy()
        if self.device.gives is not None:
            y[0, 1] = self.device.gives
        return {"y": y}

    def close(self) -> None:
        self.closed = True
        self.device.closed += 1


class Machine:
    """A line of delegates: an accelerator, XNNPACK, none."""

    def __init__(self, *names: str) -> None:
        self.devices = [Device(name) for name in names]
        self.line = [Candidate("int8", Path("m"), "", DelegateSpec(name), 1) for name in names]
        self.engine: ResilientEngine | None = None
        self.changes: list[str] = []

    def open(self, candidate: Candidate) -> Runnable:
        device = next(each for each in self.devices if each.name == candidate.spec.name)
        if device.away is not None:
            raise device.away
        return Fake(device)

    def start(self, **options: Any) -> ResilientEngine:
        self.engine = ResilientEngine("p", self.line, self.open, **options)
        self.engine.changed = lambda engine: self.changes.append(engine.delegate)
        return self.engine

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
            assert [each.opened for each in self.devices] == [each.closed for each in self.devices]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setattr(resilient, "FIRST_DELAY_S", 0.01)
    found = Machine("edgetpu", "xnnpack", "none")
    yield found
    found.close()


def once(engine: ResilientEngine, *values: float) -> list[float]:
    return [float(each) for each in engine.run({"x": np.array([values], np.float32)})["y"][0]]


def back(engine: ResilientEngine, name: str) -> None:
    """Run inputs until a delegate is taken up again."""

    def look() -> bool:
        assert once(engine, 5, 6) == [5, 6]
        return engine.delegate == name

    wait_for(look, f"{name} is taken up again")


def test_the_first_in_line_runs_and_the_others_are_not_even_opened(machine: Machine) -> None:
    engine = machine.start()
    assert once(engine, 1, 2) == [1, 2]
    assert (engine.delegate, engine.trouble, [each.opened for each in machine.devices]) == ("edgetpu", None, [1, 0, 0])


@pytest.mark.parametrize(
    "failure",
    [InferenceError("invoke failed"), DelegateFailedError("did not answer within 0.6 s")],
    ids=["raises", "hangs"],
)
def test_the_input_that_a_delegate_fails_on_is_run_by_the_next_one(machine: Machine, failure: Exception) -> None:
    engine = machine.start()
    tpu, xnnpack, _ = machine.devices
    tpu.fails = failure
    tpu.away = DelegateAwayError("edgetpu: is not there")
    assert once(engine, 1, 2) == [1, 2]
    assert (engine.delegate, machine.changes, tpu.closed) == ("xnnpack", ["xnnpack"], 1)
    assert str(failure) in str(engine.trouble) or "is not there" in str(engine.trouble)
    assert "xnnpack instead of edgetpu" in str(engine.trouble)
    assert once(engine, 3, 4) == [3, 4]
    assert xnnpack.opened == 1


def test_it_is_taken_up_again_when_it_is_well_and_not_before(machine: Machine) -> None:
    engine = machine.start()
    tpu = machine.devices[0]
    tpu.fails = InferenceError("unplugged")
    once(engine, 1, 2)
    opened = tpu.opened
    wait_for(lambda: tpu.opened >= opened + 2, "it is tried again and again")
    assert engine.delegate == "xnnpack", "it failed each time on the input that it had failed on"
    tpu.fails = None
    back(engine, "edgetpu")
    assert (engine.trouble, machine.changes) == (None, ["xnnpack", "edgetpu"])


def test_delays_double_and_begin_anew_after_a_time_of_health(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = machine.start()
    tpu = machine.devices[0]
    for _ in range(3):
        tpu.fails = InferenceError("overheated")
        assert once(engine, 1, 2) == [1, 2]
        tpu.fails = None
        back(engine, "edgetpu")
    before = engine._delay
    assert before >= 0.04, "it was never well for long"
    monkeypatch.setattr(resilient, "WELL_AFTER_S", 0.0)
    monkeypatch.setattr(resilient, "WELL_FACTOR", 0.0)
    tpu.fails = InferenceError("overheated")
    once(engine, 1, 2)
    tpu.fails = None
    back(engine, "edgetpu")
    assert engine._delay < before


def test_an_input_that_everybody_fails_on_is_to_blame_itself(machine: Machine) -> None:
    engine = machine.start()
    for device in machine.devices:
        device.fails = InferenceError("division by zero")
    with pytest.raises(InferenceError, match="division by zero"):
        once(engine, 1, 0)
    for device in machine.devices:
        device.fails = None
    assert once(engine, 1, 2) == [1, 2]
    assert (engine.delegate, engine.trouble, machine.changes) == ("edgetpu", None, [])


def test_nan_where_the_next_one_has_none_is_a_failure(machine: Machine) -> None:
    engine = machine.start()
    tpu = machine.devices[0]
    tpu.gives = NAN
    assert once(engine, 1, 2) == [1, 2]
    assert engine.delegate == "xnnpack"
    assert "NaN" in str(engine.trouble)
    tpu.gives = None
    back(engine, "edgetpu")


def test_nan_that_the_model_itself_gives_is_a_result(machine: Machine) -> None:
    engine = machine.start()
    first, second = once(engine, 1, NAN)
    assert (first, np.isnan(second)) == (1, True)
    assert (engine.delegate, engine.trouble) == ("edgetpu", None)


def test_infinities_and_huge_values_are_no_nan(machine: Machine) -> None:
    engine = machine.start()
    assert once(engine, float("inf"), float("-inf")) == [float("inf"), float("-inf")]
    assert once(engine, 3e38, -3e38) == pytest.approx([3e38, -3e38])
    assert machine.devices[1].opened == 0, "nobody was asked"


def test_the_line_goes_on_to_its_end(machine: Machine) -> None:
    engine = machine.start()
    tpu, xnnpack, none = machine.devices
    tpu.fails = xnnpack.fails = InferenceError("broken")
    assert once(engine, 1, 2) == [1, 2]
    assert (engine.delegate, none.runs) == ("none", 1)
    xnnpack.fails = None
    back(engine, "xnnpack")
    tpu.fails = None
    back(engine, "edgetpu")


def test_a_delegate_of_the_cpu_stands_in_before_another_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resilient, "FIRST_DELAY_S", 100.0)
    machine = Machine("edgetpu", "gpu", "xnnpack")
    engine = machine.start()
    machine.devices[0].fails = InferenceError("unplugged")
    once(engine, 1, 2)
    assert (engine.delegate, machine.devices[1].opened) == ("xnnpack", 0)
    machine.close()


def test_what_cannot_be_opened_at_the_start_is_tried_later(machine: Machine) -> None:
    tpu = machine.devices[0]
    tpu.away = DelegateAwayError("edgetpu: no stick is plugged in")
    engine = machine.start()
    assert engine.delegate == "xnnpack"
    assert "no stick is plugged in" in str(engine.trouble)
    tpu.away = None
    back(engine, "edgetpu")


@pytest.mark.parametrize("error", [DelegateAwayError("not there"), DelegateError("refuses")])
def test_an_explicit_choice_is_not_replaced_at_the_start(machine: Machine, error: Exception) -> None:
    machine.devices[0].away = error
    with pytest.raises(type(error), match=str(error)):
        machine.start(strict=True)
    assert [each.opened for each in machine.devices] == [0, 0, 0]


def test_if_nothing_can_be_opened_the_first_reason_is_told(machine: Machine) -> None:
    for number, device in enumerate(machine.devices):
        device.away = ModelError(f"reason {number}")
    with pytest.raises(ModelError, match="reason 0"):
        machine.start()


def test_with_nobody_to_stand_in_inputs_fail_until_it_is_well_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resilient, "FIRST_DELAY_S", 0.01)
    machine = Machine("edgetpu")
    engine = machine.start()
    tpu = machine.devices[0]
    tpu.fails, tpu.away = DelegateFailedError("was unplugged"), DelegateAwayError("is not there")
    for _ in range(2):
        with pytest.raises(InferenceError, match="was unplugged"):
            once(engine, 1, 2)
    assert "runs on nothing" in str(engine.trouble)
    tpu.fails = tpu.away = None

    def well() -> bool:
        try:
            return once(engine, 1, 2) == [1, 2]
        except InferenceError:
            return False

    wait_for(well, "it runs again")
    assert (engine.trouble, tpu.opened - tpu.closed) == (None, 1)
    machine.close()


def test_it_ends_while_a_delegate_is_tried_again(machine: Machine) -> None:
    engine = machine.start()
    machine.devices[0].fails = InferenceError("broken")
    once(engine, 1, 2)
    thread = engine._thread
    assert thread is not None
    engine.close()
    assert not thread.is_alive()
    machine.engine = None
