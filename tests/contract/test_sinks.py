"""What every sink keeps: the Sink protocol's promises and the delivery contract's part of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterator

import pytest

from edge_serve.errors import UnavailableError
from edge_serve.frame import Result
from edge_serve.health import Counters
from edge_serve.runner import SinkRunner
from edge_serve.sinks import RejectedError, Sink
from tests.contract.cases import SinkCase, identity_of, make_failure, make_result, sinks_that
from tests.support import wait_for


@contextlib.contextmanager
def connected(case: SinkCase) -> Iterator[Sink]:
    """Make and connect a sink."""
    sink = case.make()
    sink.connect()
    try:
        yield sink
    finally:
        sink.close()


class Outcomes:
    """What `done` was called with, by frame id; twice is once too often."""

    def __init__(self) -> None:
        self.by_id: dict[str, Exception | None] = {}
        self._lock = threading.Lock()
        self.repeated: list[str] = []

    def send(self, sink: Sink, result: Result) -> None:
        """Send a result and note its outcome."""

        def done(error: Exception | None) -> None:
            with self._lock:
                if result.frame_id in self.by_id:
                    self.repeated.append(result.frame_id)
                self.by_id[result.frame_id] = error

        sink.send(result, done)

    def wait(self, number: int) -> None:
        """Wait for that many outcomes, all of them good."""
        wait_for(lambda: len(self.by_id) >= number, f"{number} outcomes")
        assert not [error for error in self.by_id.values() if error is not None]
        assert not self.repeated


def both(case: SinkCase) -> list[bytes]:
    """Wait until two results have arrived, and give them."""

    def look() -> list[bytes] | None:
        found = case.received()
        return found if len(found) == 2 else None

    return wait_for(look, "both results")


def test_its_options_are_a_documented_dataclass(sink_case: SinkCase) -> None:
    sink = sink_case.make()
    assert dataclasses.is_dataclass(sink.Options)
    for field in dataclasses.fields(sink.Options):
        assert field.metadata.get("doc"), f"{field.name} says nowhere what it does"


def test_good_options_are_no_problem(sink_case: SinkCase) -> None:
    assert sink_case.check() == []


def test_it_says_how_much_may_be_on_the_way(sink_case: SinkCase) -> None:
    assert sink_case.make().window > 0
    with connected(sink_case) as sink:
        assert sink.window > 0


def test_a_result_arrives_as_it_is_written(sink_case: SinkCase) -> None:
    outcomes = Outcomes()
    with connected(sink_case) as sink:
        for result in (make_result("a"), make_failure("b")):
            outcomes.send(sink, result)
        outcomes.wait(2)
        first, second = both(sink_case)
    document = json.loads(first)
    expected = make_result("a").to_dict()
    for moving in ("age_ms", "captured_at"):
        document.pop(moving)
        expected.pop(moving)
    assert document == expected
    assert "ß und ein 🙂" in first.decode(), "text is UTF-8, not escaped"
    failed = json.loads(second)
    assert failed["error"] == {"code": "bad_input", "message": "no\nsuch\nthing"}
    assert "result" not in failed


def test_results_keep_their_order(sink_case: SinkCase) -> None:
    outcomes = Outcomes()
    with connected(sink_case) as sink:
        for number in range(100):
            wait_for(lambda number=number: number - len(outcomes.by_id) < sink.window, "room in the window")  # type: ignore[misc]
            outcomes.send(sink, make_result(str(number)))
        outcomes.wait(100)
        wait_for(lambda: len(sink_case.received()) >= 100, "all results")
    assert [identity_of(each) for each in sink_case.received()] == [str(number) for number in range(100)]


@pytest.mark.parametrize(
    "identity",
    ["", " ", "a\nb", "a\0b", "\x1f", "\x85", "\ufdd0\uffff", "\ud800", "ß🙂", "x" * 256, '{"id": 1}'],
    ids=["empty", "space", "newline", "nul", "control", "c1", "noncharacter", "surrogate", "text", "long", "json"],
)
def test_any_id_arrives(sink_case: SinkCase, identity: str) -> None:
    # An id comes from outside: whatever it is, its result must not block those behind it.
    outcomes = Outcomes()
    with connected(sink_case) as sink:
        outcomes.send(sink, make_result(identity))
        outcomes.send(sink, make_result("next"))
        outcomes.wait(2)
        found = both(sink_case)
    # UTF-8 has no halves of characters.
    assert [identity_of(each) for each in found] == [identity.encode(errors="replace").decode(), "next"]


@pytest.mark.parametrize("identity", ["a", "a\nb", "\ud800", "ß🙂"], ids=["plain", "newline", "surrogate", "text"])
def test_what_it_renders_for_the_spool_arrives_as_it_is(sink_case: SinkCase, identity: str) -> None:
    sink = sink_case.make()
    if not hasattr(sink, "send_encoded"):
        pytest.skip("its results do not wait on disk")
    content = sink.encode(make_result(identity))  # type: ignore[attr-defined]
    assert content.frame_id == identity
    assert sink.target == sink_case.make().target  # type: ignore[attr-defined]
    outcomes: list[Exception | None] = []
    with contextlib.suppress(UnavailableError):
        sink.send_encoded(content, outcomes.append)
        pytest.fail("sent without a connection")
    sink.connect()
    sink.send_encoded(content, outcomes.append)
    sink.send(make_result("next"), outcomes.append)
    first, _ = both(sink_case)
    sink.close()
    assert first == content.body, "what has waited is what is sent"


def test_a_large_result_arrives_whole(sink_case: SinkCase) -> None:
    outcomes = Outcomes()
    decoded = {"tensors": {"y": {"dtype": "float32", "shape": [300_000], "data": [0.123456] * 300_000}}}
    with connected(sink_case) as sink:
        outcomes.send(sink, make_result("large", type="tensor", decoded=decoded))
        outcomes.wait(1)
        wait_for(lambda: len(sink_case.received()) == 1, "the result")
    assert json.loads(sink_case.received()[0])["result"] == decoded


def test_it_closes_twice_and_without_having_been_connected(sink_case: SinkCase) -> None:
    sink_case.make().close()
    with connected(sink_case) as sink:
        sink.close()
        sink.close()


@sinks_that(lambda case: case.has_connection)
def test_sending_without_a_connection_is_told(sink_case: SinkCase) -> None:
    sink = sink_case.make()
    with pytest.raises(UnavailableError):
        sink.send(make_result(), lambda error: None)
    sink.connect()
    sink.close()
    with pytest.raises(UnavailableError):
        sink.send(make_result(), lambda error: None)


def test_it_connects_again_after_a_close(sink_case: SinkCase) -> None:
    outcomes = Outcomes()
    with connected(sink_case) as sink:
        outcomes.send(sink, make_result("before"))
        outcomes.wait(1)
        sink.close()
        sink.connect()
        outcomes.send(sink, make_result("after"))
        outcomes.wait(2)
        sink.connect()  # without a close, as after a failure
        outcomes.send(sink, make_result("at last"))
        outcomes.wait(3)
        wait_for(lambda: len(sink_case.received()) == 3, "all results")


def test_a_start_that_cannot_work_says_so(sink_case: SinkCase) -> None:
    sink_case.break_start()
    sink = sink_case.make()
    with pytest.raises(UnavailableError) as caught:
        sink.connect()
    assert len(str(caught.value)) > 20, "a message says what, where and why"
    sink.close()


@sinks_that(lambda case: case.survives_loss and case.loses_nothing)
def test_nothing_is_safe_that_was_sent_into_the_void(sink_case: SinkCase) -> None:
    outcomes = Outcomes()
    with connected(sink_case) as sink:
        outcomes.send(sink, make_result("before"))
        outcomes.wait(1)
        sink_case.lose()
        with contextlib.suppress(UnavailableError):
            outcomes.send(sink, make_result("lost"))
            wait_for(lambda: "lost" in outcomes.by_id, "an outcome")
            assert outcomes.by_id["lost"] is not None
        with pytest.raises(UnavailableError):
            sink.connect()
        sink_case.restore()
        sink.connect()
        outcomes.send(sink, make_result("after"))
        wait_for(lambda: outcomes.by_id.get("after", outcomes) is None, "the outcome")
    assert not outcomes.repeated


def test_what_is_on_the_way_at_a_close_is_told(sink_case: SinkCase) -> None:
    outcomes = Outcomes()
    sink = sink_case.make()
    sink.connect()
    for number in range(min(10, sink.window)):
        outcomes.send(sink, make_result(str(number)))
    sink.close()
    assert len(outcomes.by_id) == min(10, sink.window), "who waits for an outcome would wait for ever"
    assert not outcomes.repeated


def test_the_runner_brings_every_result_in_order(sink_case: SinkCase) -> None:
    failures: list[BaseException] = []
    runner = SinkRunner("line", sink_case.make(), Counters(), failures.append)
    runner.start()
    outcomes: list[str] = []
    for number in range(300):
        runner.submit(make_result(str(number)), lambda error, number=number: outcomes.append(f"{number} {error}"))  # type: ignore[misc]
    assert runner.idle(20)
    assert runner.stop(0) == 0
    wait_for(lambda: len(sink_case.received()) >= 300, "all results")
    assert [identity_of(each) for each in sink_case.received()] == [str(number) for number in range(300)]
    assert outcomes == [f"{number} None" for number in range(300)]
    assert not failures


@sinks_that(lambda case: case.survives_loss and case.loses_nothing)
def test_the_runner_brings_every_result_through_outages(sink_case: SinkCase) -> None:
    failures: list[BaseException] = []
    runner = SinkRunner("line", sink_case.make(), Counters(), failures.append)
    runner.start()
    assert runner.connected.wait(10)
    outcomes: list[list[Exception | None]] = []

    def submit(number: int) -> None:
        for _ in range(number):
            outcomes.append([])
            runner.submit(make_result(str(len(outcomes) - 1)), outcomes[-1].append)

    for _ in range(2):
        submit(50)
        sink_case.lose()
        submitting = threading.Thread(target=submit, args=(50,), name="test.submitting")
        submitting.start()
        wait_for(lambda: not runner.connected.is_set(), "the loss")
        sink_case.restore()
        assert runner.connected.wait(20)
        submitting.join(20)
    assert runner.idle(20)
    assert runner.stop(0) == 0
    assert outcomes == [[None]] * 200
    wait_for(lambda: {identity_of(each) for each in sink_case.received()} == set(map(str, range(200))), "all results")
    assert not failures


def test_a_result_that_is_rejected_is_counted_and_blocks_no_other(sink_case: SinkCase) -> None:
    sink = sink_case.make()
    send = sink.send

    def picky(result: Result, done: object) -> None:
        if result.frame_id == "poison":
            raise RejectedError("nobody wants this")
        send(result, done)  # type: ignore[arg-type]

    sink.send = picky  # type: ignore[method-assign]
    counters = Counters()
    runner = SinkRunner("line", sink, counters, lambda error: None)
    runner.start()
    outcomes: list[Exception | None] = []
    for identity in ("before", "poison", "after"):
        runner.submit(make_result(identity), outcomes.append)
    assert runner.idle(10)
    assert runner.stop(0) == 0
    assert outcomes == [None, None, None]
    assert counters.snapshot()["dropped"] == {"rejected": 1}
    wait_for(lambda: [identity_of(each) for each in sink_case.received()] == ["before", "after"], "the other two")


def test_its_threads_have_names_and_end_with_it(sink_case: SinkCase) -> None:
    before = set(threading.enumerate())
    with connected(sink_case):
        for thread in set(threading.enumerate()) - before:
            assert not thread.name.startswith(("Thread-", "paho")), f"{thread.name} says nothing to who looks at it"
    wait_for(
        lambda: not [t for t in threading.enumerate() if t not in before and not t.name.startswith("test.")],
        "its threads have ended",
    )
