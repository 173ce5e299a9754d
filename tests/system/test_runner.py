"""The runner, the loop and the wiring with sources and sinks that misbehave on purpose."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_serve import app, plugins, runner
from edge_serve.errors import ConfigError, SendError, SourceExhausted, StoppedError, UnavailableError
from edge_serve.frame import Capture, Delivery, Frame, Result
from edge_serve.health import Counters
from edge_serve.mailbox import Mailbox
from edge_serve.runner import Backoff, SinkRunner, SourceRunner
from edge_serve.sinks import Done, RejectedError
from edge_serve.sinks.stdout import StdoutSinkOptions
from edge_serve.sources.file import FileSourceOptions
from tests.contract.cases import make_result
from tests.support import InProcess, Raw, digit_png, stays, wait_for, write_config


class FakeSink:
    """Keeps what is sent, and does what the test says."""

    Options = StdoutSinkOptions

    def __init__(self, window: int = 4) -> None:
        self.window = window
        self.sent: list[str] = []
        self.pending: list[tuple[str, Done]] = []
        self.connects = 0
        self.on_connect: Callable[[], None] = lambda: None
        self.on_send: Callable[[str], None] = lambda identity: None
        self.synchronous = True
        self.busy = 0
        self.overlaps = 0
        self.closed = 0

    def connect(self) -> None:
        self.connects += 1
        self.overlaps += self.busy
        self.on_connect()

    def send(self, result: Result, done: Done) -> None:
        self.busy += 1
        try:
            self.on_send(result.frame_id)
            self.sent.append(result.frame_id)
        finally:
            self.busy -= 1
        if self.synchronous:
            done(None)
        else:
            self.pending.append((result.frame_id, done))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def sink() -> FakeSink:
    """A sink that works."""
    return FakeSink()


@dataclass
class Running:
    """A runner with its sink, and what it has told."""

    runner: SinkRunner
    counters: Counters
    failures: list[BaseException]
    outcomes: dict[str, list[Exception | None]]

    def submit(self, *identities: str) -> None:
        """Submit results of these frames."""
        for identity in identities:
            self.outcomes[identity] = []
            self.runner.submit(make_result(identity), self.outcomes[identity].append)


def running(sink: FakeSink) -> Running:
    """Start a runner."""
    failures: list[BaseException] = []
    counters = Counters()
    made = Running(SinkRunner("line", sink, counters, failures.append), counters, failures, {})  # type: ignore[arg-type]
    made.runner.start()
    return made


# Back-off.


def test_delays_double_up_to_a_limit_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    delays = [[0.0] * 12 for _ in range(2)]
    for each in delays:
        backoff = Backoff("line")
        for number in range(12):
            each[number] = backoff.failed(UnavailableError("away"))
    for number, delay in enumerate(delays[0]):
        whole = min(runner.LONGEST_DELAY_S, runner.FIRST_DELAY_S * 2**number)
        assert whole / 2 <= delay <= whole
    assert delays[0] != delays[1], "a fleet would come back as one"


def test_only_what_came_through_ends_the_doubling() -> None:
    backoff = Backoff("line")
    for _ in range(6):
        last = backoff.failed(UnavailableError("thrown out"))
        backoff.connected()
    assert last > runner.FIRST_DELAY_S * 4, "whoever is let in and thrown out again comes back at once, for ever"
    backoff.worked()
    assert backoff.failed(UnavailableError("away")) <= runner.FIRST_DELAY_S


def test_a_connection_that_lasted_ends_the_doubling(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    backoff = Backoff("line")
    for _ in range(6):
        backoff.failed(UnavailableError("away"))
    backoff.connected()
    now += runner.LONGEST_DELAY_S + 1
    assert backoff.failed(UnavailableError("away")) <= runner.FIRST_DELAY_S


def test_an_outage_is_told_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    backoff = Backoff("line")
    for _ in range(10):
        backoff.failed(UnavailableError("away"))
    backoff.failed(UnavailableError("another reason"))
    backoff.connected()
    backoff.worked()
    backoff.connected()
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "line: away", "line: another reason", "line: connected again",
    ]  # fmt: skip


def test_a_flapping_connection_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    backoff = Backoff("line")
    for _ in range(100):
        backoff.failed(UnavailableError("thrown out"))
        backoff.connected()
    assert len(caplog.records) == 2


# Sinks.


def test_a_result_is_sent_until_it_is_safe(sink: FakeSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "FIRST_DELAY_S", 0.01)
    failing = 3

    def on_send(identity: str) -> None:
        nonlocal failing
        if identity == "b" and failing:
            failing -= 1
            raise SendError("not now")

    sink.on_send = on_send
    made = running(sink)
    made.submit("a", "b", "c", "d")
    assert made.runner.idle(5)
    assert sink.sent == ["a", "b", "c", "d"], "nothing overtakes what has to wait"
    assert made.outcomes == {identity: [None] for identity in "abcd"}
    assert sink.connects == 4
    assert made.counters.snapshot()["retried"] >= 3
    assert made.runner.stop(0) == 0
    assert not made.failures


def test_nothing_is_sent_while_a_connection_is_made_anew(sink: FakeSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(runner, "LONGEST_DELAY_S", 0.002)
    counter = 0

    def on_send(identity: str) -> None:
        nonlocal counter
        counter += 1
        time.sleep(0.0005)
        if counter % 3 == 0:
            raise SendError("not now")

    sink.on_send = on_send
    sink.on_connect = lambda: time.sleep(0.001)
    made = running(sink)
    made.submit(*map(str, range(100)))
    assert made.runner.idle(10)
    assert sink.overlaps == 0, "a file would be closed under the hands of who writes it"
    assert sink.sent == [str(number) for number in range(100)]
    made.runner.stop(0)


def test_a_loss_that_is_told_while_another_result_is_sent_waits_for_that(
    sink: FakeSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "FIRST_DELAY_S", 0.01)
    sink.synchronous = False
    sending, go_on = threading.Event(), threading.Event()

    def on_send(identity: str) -> None:
        if identity == "b" and not go_on.is_set():
            sending.set()
            go_on.wait(5)

    sink.on_send = on_send
    made = running(sink)
    made.submit("a")
    wait_for(lambda: sink.pending, "the first is on the way")
    submitting = threading.Thread(target=made.submit, args=("b",))
    submitting.start()
    assert sending.wait(5)
    sink.pending.pop()[1](SendError("lost"))
    stays(lambda: sink.connects == 1, "connected anew under the hands of who sends", 0.2)
    go_on.set()
    submitting.join(5)
    wait_for(lambda: sink.sent == ["a", "b", "a", "b"], "both again, in order")
    assert sink.overlaps == 0
    for _, done in sink.pending:
        done(None)
    assert made.runner.idle(5)
    made.runner.stop(0)


def test_a_sink_that_connects_and_fails_is_not_tried_without_end(sink: FakeSink) -> None:
    def on_send(identity: str) -> None:
        raise SendError("the disk is full")

    sink.on_send = on_send
    made = running(sink)
    made.submit("a")
    time.sleep(1.2)
    assert sink.connects <= 5
    assert made.runner.stop(0) == 1
    assert [type(each) for each in made.outcomes["a"]] == [StoppedError]


def test_no_more_is_on_the_way_than_the_window_allows(sink: FakeSink) -> None:
    sink.synchronous = False
    made = running(sink)
    assert made.runner.connected.wait(5)
    identities = [str(number) for number in range(sink.window + runner.QUEUED_RESULTS)]
    made.submit(*identities)
    assert sink.sent == identities[: sink.window]
    submitting = threading.Thread(target=made.submit, args=("one more",))
    submitting.start()
    stays(submitting.is_alive, "the worker is not held back", 0.1)
    while len(sink.sent) <= len(identities) or sink.pending:
        assert len(sink.pending) <= sink.window
        if sink.pending:
            sink.pending.pop(0)[1](None)
    submitting.join(5)
    assert made.runner.idle(5)
    assert sink.sent == [*identities, "one more"]
    made.runner.stop(0)


def test_outcomes_of_an_earlier_connection_settle_nothing(sink: FakeSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "FIRST_DELAY_S", 0.01)
    sink.synchronous = False
    made = running(sink)
    made.submit("a", "b")
    wait_for(lambda: sink.sent == ["a", "b"], "both are on the way")
    (_, first), (_, second) = sink.pending
    sink.pending.clear()
    second(SendError("lost"))
    wait_for(lambda: sink.connects == 2, "the second connection")
    first(None)  # too late: whether that one was safe is not known any more
    wait_for(lambda: sink.sent == ["a", "b", "a", "b"], "both again, in order")
    assert made.outcomes == {"a": [], "b": []}
    for _, done in sink.pending:
        done(None)
    assert made.runner.idle(5)
    assert made.outcomes == {"a": [None], "b": [None]}
    made.runner.stop(0)


def test_a_stop_frees_who_waits_and_tells_what_is_unsent(sink: FakeSink) -> None:
    def on_connect() -> None:
        raise UnavailableError("away")

    sink.on_connect = on_connect
    made = running(sink)
    identities = [str(number) for number in range(runner.QUEUED_RESULTS + 1)]
    submitting = threading.Thread(target=made.submit, args=identities)
    submitting.start()
    wait_for(lambda: len(made.outcomes) == len(identities), "the last one waits")
    assert made.runner.stop(0) == runner.QUEUED_RESULTS
    submitting.join(5)
    assert not submitting.is_alive()
    assert {type(each[0]) for each in made.outcomes.values()} == {StoppedError}
    assert sink.closed


def test_an_attempt_to_connect_that_outlasts_the_stop_leaves_no_connection(sink: FakeSink) -> None:
    connecting, go_on = threading.Event(), threading.Event()

    def on_connect() -> None:
        connecting.set()
        go_on.wait(5)

    sink.on_connect = on_connect
    made = running(sink)
    assert connecting.wait(5)
    began = time.monotonic()
    made.runner.stop(0)
    assert time.monotonic() - began < 2
    closed = sink.closed
    go_on.set()
    wait_for(lambda: sink.closed > closed, "what was connected too late is closed")


def test_a_rejected_result_is_told_but_not_each_one(sink: FakeSink, caplog: pytest.LogCaptureFixture) -> None:
    def on_send(identity: str) -> None:
        if identity.startswith("bad"):
            raise RejectedError("too long")

    sink.on_send = on_send
    made = running(sink)
    made.submit("a", *(f"bad{number}" for number in range(50)), "b")
    assert made.runner.idle(5)
    assert sink.sent == ["a", "b"]
    assert made.counters.snapshot()["dropped"] == {"rejected": 50}
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    made.runner.stop(0)


def test_a_sink_that_breaks_its_promises_is_no_silence(sink: FakeSink) -> None:
    def on_connect() -> None:
        raise ValueError("a bug")

    sink.on_connect = on_connect
    made = running(sink)
    wait_for(lambda: made.failures, "the failure is told")
    assert isinstance(made.failures[0], ValueError)
    made.runner.stop(0)


# Sources.


class FakeSource:
    """Gives what the test says."""

    Options = FileSourceOptions
    policy = "lossless"
    hold_limit: int | None = None

    def __init__(self, *items: bytes | Exception) -> None:
        self.items = list(items)
        self.settled: list[Exception | None] = []
        self.connects = self.closed = 0
        self.on_connect: Callable[[], None] = lambda: None

    @classmethod
    def check(cls, options: Any, key: str, wiring: Any) -> list[Any]:
        return []

    def connect(self) -> None:
        self.connects += 1
        self.on_connect()

    def read(self, timeout: float) -> Delivery | None:
        if not self.items:
            time.sleep(min(timeout, 0.01))
            return None
        item = self.items.pop(0)
        if isinstance(item, Exception):
            raise item
        return Delivery(Frame("f", "fake", Capture.now(), None, item), self.settled.append)

    def close(self) -> None:
        self.closed += 1


def reading(source: FakeSource, items: int = 8) -> tuple[SourceRunner, Mailbox, list[BaseException]]:
    """Start a source's runner."""
    failures: list[BaseException] = []
    counters = Counters()
    mailbox = Mailbox("lossless", counters, items=items)
    made = SourceRunner("line", source, mailbox, counters, failures.append)  # type: ignore[arg-type]
    made.start()
    return made, mailbox, failures


def test_a_lost_source_is_closed_and_connected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "FIRST_DELAY_S", 0.01)
    source = FakeSource(b"1", UnavailableError("lost"), b"2", SourceExhausted("no more"))
    made, mailbox, failures = reading(source)
    wait_for(made.exhausted.is_set, "the end")
    payloads = [bytes(each.frame.payload) for each in (mailbox.take(1), mailbox.take(1)) if each is not None]
    assert payloads == [b"1", b"2"]
    assert mailbox.drained
    assert (source.connects, source.closed) == (2, 1)
    assert not failures


def test_a_source_that_breaks_its_promises_is_no_silence() -> None:
    made, _, failures = reading(FakeSource(ValueError("a bug")))
    wait_for(lambda: failures, "the failure is told")
    assert isinstance(failures[0], ValueError)
    made.stop_reading(time.monotonic())


def test_what_the_mailbox_had_no_room_for_is_given_back_at_a_stop() -> None:
    source = FakeSource(b"1", b"2")
    made, _, _ = reading(source, items=1)
    wait_for(lambda: not source.items, "the second waits for room")
    made.stop_reading(time.monotonic() + 5)
    assert [type(each) for each in source.settled] == [StoppedError]


def test_a_stop_waits_no_longer_for_a_connection_than_it_may() -> None:
    source = FakeSource()
    go_on = threading.Event()

    def on_connect() -> None:
        go_on.wait(10)

    source.on_connect = on_connect
    made, _, _ = reading(source)
    wait_for(lambda: source.connects == 1, "it connects")
    began = time.monotonic()
    made.stop_reading(began + 0.2)
    assert time.monotonic() - began < 1
    go_on.set()


# The wiring.

TEXT = """
    schema = 1
    device = "dev"
    grace_s = 1
    [[pipeline]]
    name = "good"
    model = "{digits}"
    threads = 1
    [pipeline.source]
    type = "socket"
    listen = "unix://{short}/in.sock"
    [[pipeline]]
    name = "bad"
    model = "{digits}"
    threads = 1
    [pipeline.source]
    type = "fake"
    path = "x"
    [pipeline.sink]
    type = "file"
    path = "results.jsonl"
"""


@pytest.fixture
def fake_source(monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    """A source that configurations know as "fake"."""
    source = FakeSource()
    load = plugins.load

    class Part(FakeSource):
        def __new__(cls, options: Any = None, context: Any = None) -> Any:
            return source

    monkeypatch.setattr(plugins, "load", lambda kind, name: Part if name == "fake" else load(kind, name))
    return source


def test_a_part_with_a_bug_ends_the_service_in_order(
    tmp_path: Path, short_path: Path, fake_source: FakeSource, caplog: pytest.LogCaptureFixture
) -> None:
    service = InProcess(write_config(tmp_path, TEXT, short=short_path)).start()
    with Raw.connect(short_path / "in.sock") as client:
        client.frame(digit_png(0), id="a")
        assert client.answers(1)[0]["id"] == "a"
        fake_source.items.append(ValueError("a bug"))
        assert service.wait() == 3, "a supervisor starts it again"
        assert client.ended()
    assert "a thread failed: ValueError: a bug" in caplog.text


def test_an_unexpected_error_in_one_frame_is_its_error_result(
    tmp_path: Path, short_path: Path, fake_source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_serve.processing.intake import SingleIntake

    feed = SingleIntake.feed

    def poisoned(self: SingleIntake, delivery: Delivery) -> Any:
        if delivery.frame.id == "poison":
            raise MemoryError("this one")
        return feed(self, delivery)

    monkeypatch.setattr(SingleIntake, "feed", poisoned)
    with InProcess(write_config(tmp_path, TEXT, short=short_path)) as service:
        with Raw.connect(short_path / "in.sock") as client:
            for identity in ("before", "poison", "after"):
                client.frame(digit_png(0), id=identity)
            before, poison, after = client.answers(3)
        assert (before["type"], after["type"]) == ("result", "result")
        assert poison["code"] == "internal"
        assert "MemoryError" in poison["message"]
        assert service.counts()["errors"] == {"internal": 1}


def test_a_model_that_does_not_fit_stops_the_start_and_names_the_pipeline(
    tmp_path: Path, short_path: Path, fake_source: FakeSource
) -> None:
    path = write_config(tmp_path, TEXT, short=short_path)
    path.write_text(path.read_text().replace('name = "bad"\n', 'name = "bad"\nsignature = "no_such"\n'))
    service = app.App(app.load(path))
    with pytest.raises(ConfigError) as caught:
        service.run()
    assert "pipeline 'bad'" in str(caught.value)
    assert "no_such" in str(caught.value)
    assert not (short_path / "in.sock").exists(), "nothing was started"


def test_a_clean_stop_leaves_no_thread(tmp_path: Path, short_path: Path, fake_source: FakeSource) -> None:
    before = set(threading.enumerate())
    with InProcess(write_config(tmp_path, TEXT, short=short_path)) as service:
        names = {thread.name for thread in set(threading.enumerate()) - before}
        assert {"worker.good", "worker.bad", "source.good", "source.bad", "sink.bad", "socket.good"} <= names
        assert service.stop() == 0
    wait_for(lambda: set(threading.enumerate()) <= before, "all threads have ended")
