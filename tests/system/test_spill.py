"""Spill when down: results wait on disk while upstream is away, in order, and through kills; nothing is written otherwise."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edge_serve import runner, spill
from edge_serve.config import SpoolConfig
from edge_serve.errors import SendError, StoppedError, UnavailableError
from edge_serve.frame import Result
from edge_serve.health import Counters
from edge_serve.sinks import Done, Encoded, RejectedError
from edge_serve.sinks.stdout import StdoutSinkOptions
from edge_serve.spill import OptionalRunner, SpillingRunner
from edge_serve.spool.spooler import Spool
from tests.contract.cases import make_result
from tests.support import (
    Client,
    InProcess,
    Mosquitto,
    Proxy,
    Raw,
    Service,
    digit_png,
    free_port,
    stays,
    wait_for,
    write_config,
)


class Upstream:
    """What a sink sends to: it may be away, silent, picky or slow, as the test says."""

    Options = StdoutSinkOptions
    target = "up"

    def __init__(self, window: int = 8) -> None:
        self.window = window
        self.away = False
        self.silent = False
        self.speaks_at = 0
        """The number of the connection from which on it is not silent any more."""
        self.poison: set[str] = set()
        self.delay = 0.0
        self.got: list[str] = []
        self.pending: list[tuple[str, Done]] = []
        self.connects = 0
        self.hanging: threading.Event | None = None
        self.lock = threading.Lock()
        """What comes first is in `got` first."""

    def connect(self) -> None:
        if self.hanging is not None:
            self.hanging.wait(20)
        self.connects += 1
        if self.connects == self.speaks_at:
            self.silent = False
        if self.away:
            raise UnavailableError("away")

    def encode(self, result: Result) -> Encoded:
        return Encoded(result.frame_id, result.to_json())

    def send(self, result: Result, done: Done) -> None:
        self.send_encoded(self.encode(result), done)

    def send_encoded(self, content: Encoded, done: Done) -> None:
        if self.away:
            raise SendError("lost")
        if content.frame_id in self.poison:
            raise RejectedError("nobody wants this")
        assert json.loads(content.body)["id"] == content.frame_id
        if self.delay:
            time.sleep(self.delay)
        with self.lock:
            if self.silent:
                self.pending.append((content.frame_id, done))
                return
            self.got.append(content.frame_id)
        done(None)

    def answer(self) -> None:
        """Acknowledge what was kept back, before anything that comes in the meantime."""
        with self.lock:
            self.silent = False
            late, self.pending = self.pending, []
            self.got += [identity for identity, _ in late]
        for _, done in late:
            done(None)

    def close(self) -> None:
        pass


@dataclass
class Spilling:
    """A runner with a spool, and what became of what was submitted."""

    folder: Path
    upstream: Upstream
    options: dict[str, Any] = field(default_factory=dict)
    required: bool = True
    drain_rate: float = 0.0
    write_through: bool = False
    outcomes: dict[str, list[Exception | None]] = field(default_factory=dict)
    failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counters = Counters()
        self.spool = Spool(self.folder, SpoolConfig(**self.options))
        self.lane = self.spool.lane("line/fake/up", "line", self.counters, required=self.required)
        self.runner = SpillingRunner(
            "line", self.upstream, self.counters, self.failures.append, self.lane, self.spool,  # type: ignore[arg-type]
            drain_rate=self.drain_rate, write_through=self.write_through,
        )  # fmt: skip
        self.spool.start(self.failures.append)
        self.runner.start()

    def submit(self, *identities: str) -> None:
        """Submit results of these frames."""
        for identity in identities:
            self.outcomes[identity] = []
            self.runner.submit(make_result(identity), self.outcomes[identity].append)

    def settled(self, *identities: str) -> None:
        """Wait until these are settled, once and well."""
        wait_for(lambda: all(self.outcomes.get(each) for each in identities), f"{len(identities)} are settled")
        assert {tuple(self.outcomes[each]) for each in identities} == {(None,)}

    def stop(self, seconds: float = 1.0) -> int:
        """Stop runner and spool."""
        left = self.runner.stop(time.monotonic() + seconds)
        self.spool.close()
        assert not self.failures
        return left

    def __enter__(self) -> Spilling:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.stop(0)
        self.spool.close()


@pytest.fixture
def upstream() -> Upstream:
    """An upstream that is there."""
    return Upstream()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "FIRST_DELAY_S", 0.02)
    monkeypatch.setattr(runner, "LONGEST_DELAY_S", 0.05)


def ids(number: int, first: int = 0) -> list[str]:
    """Give frame ids."""
    return [f"f{each}" for each in range(first, first + number)]


def test_nothing_is_written_while_upstream_is_there(tmp_path: Path, upstream: Upstream) -> None:
    with Spilling(tmp_path, upstream) as made:
        made.submit(*ids(2000))
        made.settled(*ids(2000))
        assert upstream.got == ids(2000)
        assert list(tmp_path.iterdir()) == []
        assert made.stop() == 0
    assert list(tmp_path.iterdir()) == []


def test_results_are_settled_on_disk_while_upstream_is_away_and_leave_in_order(
    tmp_path: Path, upstream: Upstream
) -> None:
    with Spilling(tmp_path, upstream) as made:
        made.submit(*ids(10))
        made.settled(*ids(10))
        upstream.away = True
        made.submit(*ids(500, first=10))
        made.settled(*ids(500, first=10))
        assert made.runner.waiting_on_disk == 500
        assert upstream.got == ids(10)
        upstream.away = False
        assert made.runner.idle(10)
        assert upstream.got == ids(510)
        wait_for(lambda: made.spool.status()["items"] == 0, "what was sent is deleted")
        made.submit("direct")
        made.settled("direct")
        assert made.stop() == 0


def test_what_waits_from_before_goes_first(tmp_path: Path, upstream: Upstream) -> None:
    upstream.away = True
    with Spilling(tmp_path, upstream) as made:
        made.submit(*ids(100))
        made.settled(*ids(100))
        assert made.stop() == 0
    upstream.away = False
    with Spilling(tmp_path, upstream) as again:
        again.submit(*ids(100, first=100))
        again.settled(*ids(100, first=100))
        assert again.runner.idle(10)
        assert upstream.got == ids(200)


def test_what_is_on_the_way_goes_to_the_spool_first_when_it_is_overdue(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "OVERDUE_S", 0.2)
    with Spilling(tmp_path, upstream) as made:
        assert made.runner.connected.wait(5)
        upstream.silent = True
        made.submit(*ids(5))
        assert made.outcomes["f0"] == []
        made.settled(*ids(5))  # in the spool
        made.submit(*ids(20, first=5))
        made.settled(*ids(20, first=5))
        assert [identity for identity, _ in upstream.pending] == ids(5)
        upstream.answer()
        assert made.runner.idle(10)
        assert upstream.got == ids(25), "late acknowledgements count, and nothing is sent twice"
        assert upstream.connects == 1
        assert made.stop() == 0


def test_an_upstream_that_never_answers_is_connected_anew(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "OVERDUE_S", 0.1)
    monkeypatch.setattr(spill, "GIVE_UP_S", 0.3)
    with Spilling(tmp_path, upstream) as made:
        assert made.runner.connected.wait(5)
        upstream.silent = True
        upstream.speaks_at = upstream.connects + 1
        made.submit(*ids(5))
        wait_for(lambda: upstream.connects > 1, "another connection")
        assert made.runner.idle(10)
        assert upstream.got == ids(5)
        assert upstream.connects == 2


def test_an_attempt_to_connect_that_hangs_holds_nobody_up(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "OVERDUE_S", 0.2)
    monkeypatch.setattr(spill, "TICK_S", 0.05)
    upstream.hanging = threading.Event()
    with Spilling(tmp_path, upstream) as made:
        made.submit(*ids(50))
        made.settled(*ids(50))
        upstream.hanging.set()
        assert made.runner.idle(10)
        assert upstream.got == ids(50)


def test_the_switch_back_happens_under_a_steady_load(tmp_path: Path, upstream: Upstream) -> None:
    with Spilling(tmp_path, upstream) as made:
        upstream.away = True
        made.submit(*ids(300))
        upstream.away = False
        number = 300
        while made.lane.ahead or number < 400:
            made.submit(f"f{number}")
            number += 1
            assert number < 50_000, "the spool is written for ever"
        made.settled(*ids(number))
        assert made.runner.idle(10)
        assert upstream.got == ids(number)
        wait_for(lambda: made.spool.status()["items"] == 0, "what was sent is deleted")
        log = (tmp_path / "spool/spool.db-wal").stat()
        made.submit(*ids(500, first=number))
        assert made.runner.idle(10)
        assert (tmp_path / "spool/spool.db-wal").stat().st_mtime_ns == log.st_mtime_ns, "upstream is there"


def test_draining_is_paced(tmp_path: Path, upstream: Upstream) -> None:
    upstream.away = True
    with Spilling(tmp_path, upstream, drain_rate=100.0) as made:
        made.submit(*ids(60))
        made.settled(*ids(60))
        upstream.away = False
        assert made.runner.connected.wait(5)
        began = time.monotonic()
        made.submit("late")
        assert made.runner.idle(10)
        assert 0.4 <= time.monotonic() - began <= 3
        assert upstream.got == [*ids(60), "late"]


def test_the_newest_leave_first_where_that_is_asked_for(tmp_path: Path, upstream: Upstream) -> None:
    upstream.away = True
    with Spilling(tmp_path, upstream, {"drain": "newest_first"}) as made:
        made.submit(*ids(200))
        made.settled(*ids(200))
        upstream.away = False
        assert made.runner.idle(10)
        assert upstream.got[:50] == ids(200)[:149:-1]
        assert sorted(upstream.got) == sorted(ids(200))


def test_a_refused_result_is_a_dead_letter_and_blocks_no_other(tmp_path: Path, upstream: Upstream) -> None:
    upstream.poison = {"f1", "f12"}
    with Spilling(tmp_path, upstream) as made:
        made.submit(*ids(5))
        made.settled(*ids(5))
        upstream.away = True
        made.submit(*ids(15, first=5))
        made.settled(*ids(15, first=5))
        upstream.away = False
        assert made.runner.idle(10)
        assert upstream.got == [each for each in ids(20) if each not in upstream.poison]
        assert made.counters.snapshot()["dropped"] == {"rejected": 2}
        wait_for(lambda: made.spool.status().get("dead_letters") == 2, "both are kept")


def test_who_is_not_required_withholds_no_acknowledgement(tmp_path: Path, upstream: Upstream) -> None:
    upstream.away = True
    with Spilling(tmp_path, upstream, {"max_items": 30}, required=False) as made:
        made.submit(*ids(50))
        assert all(made.outcomes[each] == [None] for each in ids(50)), "at once"
        wait_for(lambda: made.counters.snapshot()["dropped"] == {"spool_full": 20}, "what finds no room is counted")
        upstream.away = False
        assert made.runner.idle(10)
        assert upstream.got == ids(30)


def test_a_slow_sink_that_is_not_required_holds_nobody_back(tmp_path: Path, upstream: Upstream) -> None:
    with Spilling(tmp_path, upstream, required=False) as made:
        assert made.runner.connected.wait(5)
        upstream.silent = True
        began = time.monotonic()
        made.submit(*ids(200))
        assert time.monotonic() - began < 2
        upstream.answer()
        wait_for(lambda: len(upstream.got) + len(upstream.pending) > 10, "it goes on")
        assert made.runner.idle(10)
        assert upstream.got == ids(200)


def test_without_a_spool_what_finds_no_room_is_dropped_where_nobody_waits(upstream: Upstream) -> None:
    upstream.away = True
    counters = Counters()
    made = OptionalRunner("line", upstream, counters, lambda error: None)  # type: ignore[arg-type]
    made.start()
    outcomes: list[Exception | None] = []
    for identity in ids(50):
        made.submit(make_result(identity), outcomes.append)
    assert outcomes == [None] * 50
    assert counters.snapshot()["dropped"] == {"sink_away": 50 - runner.QUEUED_RESULTS}
    upstream.away = False
    assert made.idle(10)
    assert upstream.got == ids(runner.QUEUED_RESULTS)
    made.stop(0)


def test_everything_is_committed_before_it_is_settled_where_that_is_asked_for(
    tmp_path: Path, upstream: Upstream
) -> None:
    with Spilling(tmp_path, upstream, write_through=True) as made:
        made.submit(*ids(100))
        made.settled(*ids(100))
        assert (tmp_path / "spool/spool.db").exists()
        assert made.runner.idle(10)
        assert upstream.got == ids(100)
        assert made.stop() == 0


def test_a_stop_commits_what_is_in_memory(tmp_path: Path, upstream: Upstream) -> None:
    with Spilling(tmp_path, upstream) as made:
        assert made.runner.connected.wait(5)
        upstream.silent = True
        made.submit(*ids(12))
        assert made.stop(0.2) == 0
        made.settled(*ids(12))
    upstream.silent = False
    with Spilling(tmp_path, upstream) as again:
        assert again.runner.idle(10)
        assert upstream.got == ids(12)


def test_a_stop_gives_back_what_can_be_neither_sent_nor_committed(tmp_path: Path, upstream: Upstream) -> None:
    upstream.away = True
    (tmp_path / "spool").write_text("no folder")
    with Spilling(tmp_path, upstream) as made:
        made.submit(*ids(5))
        assert made.runner.stop(time.monotonic()) == 5
        assert {type(made.outcomes[each][0]) for each in ids(5)} == {StoppedError}


def test_an_upstream_that_comes_and_goes_loses_and_reorders_nothing(tmp_path: Path) -> None:
    for seed in range(6):
        rng = random.Random(seed)
        upstream = Upstream(window=rng.choice([1, 4, 64]))
        folder = tmp_path / str(seed)
        with Spilling(folder, upstream, drain_rate=rng.choice([0.0, 0.0, 3000.0])) as made:
            number = 0
            for _ in range(25):
                count = rng.randrange(60)
                made.submit(*ids(count, first=number))
                number += count
                upstream.away = rng.random() < 0.4
                time.sleep(rng.choice([0, 0.001, 0.03]))
            upstream.away = False
            assert made.runner.idle(20), seed
            made.settled(*ids(number))
            assert list(dict.fromkeys(upstream.got)) == ids(number), seed
            assert not made.failures


# With a real broker, real processes and kills. More seeds: EDGE_SERVE_TEST_SEEDS=20.

# By default mosquitto drops, without a word to anybody, what it queues beyond a thousand messages for a client that is away,
# or slower than a backlog that drains.
UNBOUNDED = ("allow_anonymous true", "max_queued_messages 0")
SEEDS = int(os.environ.get("EDGE_SERVE_TEST_SEEDS", "1"))

CONFIG = """
    schema = 1
    device = "dev"
    grace_s = 3
    state_dir = "state"
    [mqtt]
    url = "{url}"
    connect_timeout_s = 5
    [mqtt.upstream]
    url = "{upstream}"
    connect_timeout_s = 5
    [status]
    enabled = false
    [pipeline]
    name = "digits"
    model = "{digits}"
    threads = 1
    {pipeline}
    [pipeline.source]
    {source}
    [pipeline.sink]
    type = "mqtt"
    broker = "upstream"
    topic = "results"
    {sink}
"""

MQTT_SOURCE = 'type = "mqtt"\n    topic = "in/#"'


def config(folder: Path, url: str, upstream: str, **words: Any) -> Path:
    """Write the configuration of a digits pipeline."""
    defaults: dict[str, Any] = {"pipeline": "", "source": MQTT_SOURCE, "sink": ""}
    return write_config(folder, CONFIG, url=url, upstream=upstream, **{**defaults, **words})


def first_seen(messages: list[Any]) -> list[str]:
    """Give the ids of results in the order in which each came first."""
    return list(dict.fromkeys(message.document["id"] for message in messages))


def in_spool(folder: Path) -> list[str]:
    """Give the ids of what waits in the spool of a service that does not run."""
    file = folder / "state/spool/spool.db"
    if not file.exists():
        return []
    with contextlib.closing(sqlite3.connect(file)) as db:
        query = "SELECT frame FROM rows JOIN lanes ON lanes.id = rows.lane WHERE kind = 'queue' ORDER BY rows.id"
        return [frame.decode() for (frame,) in db.execute(query)]


@pytest.fixture
def two_brokers(make_broker: Callable[..., Mosquitto]) -> tuple[Mosquitto, Mosquitto]:
    """A broker for inputs, and one for results."""
    return make_broker().start(), make_broker().start()


@pytest.mark.broker
def test_a_broker_that_is_stopped_and_started_gets_everything_in_order(
    tmp_path: Path, two_brokers: tuple[Mosquitto, Mosquitto]
) -> None:
    near, far = two_brokers
    with Client(near.port) as publisher, InProcess(config(tmp_path, near.url, far.url)) as service:
        with Client(far.port, "results") as client:
            for each in range(50):
                publisher.publish("in/x", digit_png(each), user={"id": f"f{each}"})
            client.wait(50)
            assert not (tmp_path / "state/spool").exists(), "written although upstream is there"
            before = client.messages
        far.stop()
        for each in range(50, 150):
            publisher.publish("in/x", digit_png(each), user={"id": f"f{each}"})
        wait_for(lambda: service.counts()["out"] == 150, "all are in the spool, and their inputs acknowledged")
        far.start()
        with Client(far.port, "results") as client:
            for each in range(150, 200):
                publisher.publish("in/x", digit_png(each), user={"id": f"f{each}"})
            # The service may have been back before this client.
            wait_for(lambda: service.app._spool.status()["items"] == 0, "the spool is empty")
            client.wait_ids(set(ids(50, first=150)))
            after = first_seen(client.messages)
        assert first_seen(before) == ids(50)
        assert after == ids(200)[-len(after) :]
        assert service.counts()["dropped"] == {}


@pytest.mark.broker
def test_a_cut_link_costs_nothing_and_keeps_the_order(tmp_path: Path, two_brokers: tuple[Mosquitto, Mosquitto]) -> None:
    near, far = two_brokers
    number = 300
    with (
        Proxy(far.port) as uplink,
        Client(near.port) as publisher,
        Client(far.port, "results") as client,
        InProcess(config(tmp_path, near.url, uplink.url)) as service,
    ):
        rng = random.Random(2)
        for each in range(number):
            publisher.publish("in/x", digit_png(each), user={"id": f"f{each}"})
            if each % 50 == 20:
                uplink.cut(refuse=True)
            if each % 50 == 45:
                uplink.restore()
            if rng.random() < 0.05:
                time.sleep(0.05)
        uplink.restore()
        client.wait_ids(set(ids(number)))
        assert first_seen(client.messages) == ids(number)
        wait_for(lambda: service.counts()["out"] == number, "all are settled")


@pytest.mark.broker
def test_a_result_is_sent_as_it_would_have_been(tmp_path: Path, two_brokers: tuple[Mosquitto, Mosquitto]) -> None:
    near, far = two_brokers
    with (
        Proxy(far.port) as uplink,
        Client(near.port) as publisher,
        Client(far.port, "results") as client,
        InProcess(config(tmp_path, near.url, uplink.url)) as service,
    ):
        publisher.publish("in/x", digit_png(1), user={"id": "direct"})
        client.wait(1)
        uplink.cut(refuse=True)
        publisher.publish("in/x", digit_png(1), user={"id": "spooled"})
        wait_for(lambda: service.counts()["out"] == 2, "it is in the spool")
        uplink.restore()
        direct, spooled = client.wait(2)
        assert (spooled.topic, spooled.qos, spooled.content_type) == (direct.topic, direct.qos, direct.content_type)
        assert (direct.user, spooled.user) == (
            {"edge-serve": "1", "id": "direct"},
            {"edge-serve": "1", "id": "spooled"},
        )
        same = [{key: value for key, value in each.document.items() if key not in MOVING} for each in (direct, spooled)]
        assert same[0] == same[1]


MOVING = {"id", "age_ms", "captured_at", "timings_ms"}


@pytest.mark.broker
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_kills_in_the_switch_between_the_two_modes_lose_nothing(
    tmp_path: Path, make_broker: Callable[..., Mosquitto], seed: int
) -> None:
    near, far = make_broker(*UNBOUNDED).start(), make_broker(*UNBOUNDED).start()
    rng = random.Random(seed)
    number, kills = 0, 8
    with (
        Proxy(far.port) as uplink,
        Client(near.port) as publisher,
        Client(far.port, "results") as client,
    ):
        path = config(tmp_path, near.url, uplink.url)
        for _ in range(kills):
            with Service(path) as service:
                service.said("started in")
                stop = threading.Event()
                flapping = threading.Thread(target=flap, args=(uplink, random.Random(rng.random()), stop))
                flapping.start()
                until = time.monotonic() + rng.uniform(0.3, 1.5)
                while time.monotonic() < until:
                    publisher.publish("in/x", digit_png(number % 500), user={"id": f"f{number}"})
                    number += 1
                    time.sleep(rng.choice([0, 0, 0.002]))
                service.kill()
                stop.set()
                flapping.join()
        uplink.restore()
        with Service(path) as service:
            service.said("started in")
            client.wait_ids(set(ids(number)), timeout=40)
            assert service.terminate() == 0
        assert in_spool(tmp_path) == []
        results = [message.document["id"] for message in client.messages]
        assert set(results) == set(ids(number)), "0 missing"
        repeated = len(results) - number
        assert repeated <= kills * 2 * (20 + 20 + 600), (
            "duplicates are bounded by what was on the way or not deleted yet"
        )


def flap(uplink: Proxy, rng: random.Random, stop: threading.Event) -> None:
    """Let a link go and come again until told to stop."""
    while not stop.is_set():
        uplink.cut(refuse=True)
        stop.wait(rng.uniform(0.01, 0.4))
        uplink.restore()
        stop.wait(rng.uniform(0.01, 0.4))


@pytest.mark.broker
@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_answer_that_says_safe_is_safe_through_kills(
    tmp_path: Path, short_path: Path, make_broker: Callable[..., Mosquitto], seed: int
) -> None:
    """Over the Unix socket, with write_through: who was answered finds his result upstream or in the spool."""
    rng = random.Random(seed)
    far = make_broker(*UNBOUNDED).start()
    source = f'type = "socket"\n    listen = "unix://{short_path}/in.sock"\n    answer = "when_safe"'
    answered: list[str] = []
    sent = 0
    with Proxy(far.port) as uplink, Client(far.port, "results") as client:
        path = config(tmp_path, far.url, uplink.url, source=source, pipeline="write_through = true")
        for round_ in range(6):
            with Service(path) as service:
                socket = Raw.connect_when_there(short_path / "in.sock")
                if round_ % 2:
                    uplink.cut(refuse=True)
                until = time.monotonic() + rng.uniform(0.3, 1.0)
                with socket:
                    while time.monotonic() < until:
                        socket.frame(digit_png(sent % 500), id=f"f{sent}", content_type="image/png")
                        sent += 1
                        answer = socket.answer()
                        assert answer is not None
                        assert answer["type"] == "result", answer
                        answered.append(answer["id"])
                    service.kill()
                uplink.restore()
        with Service(path) as service:
            service.said("started in")
            client.wait_ids(set(answered), timeout=40)
            assert service.terminate() == 0
    assert len(answered) > 50
    assert in_spool(tmp_path) == []
    order = [each for each in first_seen(client.messages) if each in set(answered)]
    assert order == answered


@pytest.mark.broker
def test_a_service_that_is_stopped_while_upstream_is_away_goes_on_later(tmp_path: Path, broker: Mosquitto) -> None:
    away = f"mqtt://127.0.0.1:{free_port()}"
    with Client(broker.port, "results") as client:
        with Service(config(tmp_path, broker.url, away)) as service:
            service.said("cannot connect")
            wait_for(lambda: "Sending SUBACK to dev.digits.in" in broker.log_text(), "the subscription")
            for each in range(60):
                client.publish("in/x", digit_png(each), user={"id": f"f{each}"})
            wait_for(
                lambda: broker.log_text().count("Received PUBACK from dev.digits.in") == 60, "all are acknowledged"
            )
            assert service.terminate() == 0
            assert "60 results wait in the spool" in service.text
        assert in_spool(tmp_path) == ids(60)
        with Service(config(tmp_path, broker.url, broker.url)) as service:
            client.wait_ids(set(ids(60)))
            assert "60 results from before wait in the spool" in service.text
            assert service.terminate() == 0
        assert first_seen(client.messages) == ids(60)
        assert in_spool(tmp_path) == []


@pytest.mark.broker
def test_a_reload_takes_over_the_backlog(tmp_path: Path, two_brokers: tuple[Mosquitto, Mosquitto]) -> None:
    near, far = two_brokers
    with (
        Proxy(far.port) as uplink,
        Client(near.port) as publisher,
        Client(far.port, "results") as client,
        InProcess(config(tmp_path, near.url, uplink.url)) as service,
    ):
        uplink.cut(refuse=True)
        for each in range(40):
            publisher.publish("in/x", digit_png(each), user={"id": f"f{each}"})
        wait_for(lambda: service.counts()["out"] == 40, "all are in the spool")
        config(tmp_path, near.url, uplink.url, sink="max_inflight = 3\n    [spool]\n    max_items = 1000")
        service.app.reload()
        for each in range(40, 60):
            publisher.publish("in/x", digit_png(each), user={"id": f"f{each}"})
        wait_for(lambda: service.counts()["out"] == 60, "all are in the spool")
        uplink.restore()
        client.wait_ids(set(ids(60)))
        assert first_seen(client.messages) == ids(60)


@pytest.mark.broker
def test_a_damaged_spool_stops_no_start(tmp_path: Path, broker: Mosquitto) -> None:
    folder = tmp_path / "state/spool"
    folder.mkdir(parents=True)
    (folder / "spool.db").write_bytes(b"this was a spool once" * 500)
    with Client(broker.port, "results") as client:
        for _ in range(2):
            with Service(config(tmp_path, broker.url, broker.url)) as service:
                service.ready()
                client.publish("in/x", digit_png(0), user={"id": "a"})
                client.wait_ids({"a"})
                assert service.terminate() == 0
    assert (folder / "spool.db.damaged-1").exists()
    assert not (folder / "spool.db.damaged-2").exists()
    shutil.rmtree(folder)


@pytest.mark.broker
def test_nothing_is_written_below_the_state_folder_while_upstream_is_there(tmp_path: Path, broker: Mosquitto) -> None:
    with Client(broker.port, "results") as client, Service(config(tmp_path, broker.url, broker.url)) as service:
        service.ready()
        time.sleep(0.5)  # what the start has to remember is written
        state = tmp_path / "state"
        before = {each: each.stat().st_mtime_ns for each in state.rglob("*")}
        written = bytes_written(service.pid)
        for each in range(300):
            client.publish("in/x", digit_png(each), user={"id": f"f{each}"})
        client.wait_ids(set(ids(300)))
        stays(lambda: True, "", 0.3)
        assert {each: each.stat().st_mtime_ns for each in state.rglob("*")} == before
        assert bytes_written(service.pid) == written, "0 bytes to any disk"
        assert service.terminate() == 0


def bytes_written(pid: int) -> int:
    """Give the bytes that a process has caused to be written to disks."""
    for line in Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines():
        if line.startswith("write_bytes:"):
            return int(line.split()[1])
    raise AssertionError("the kernel does not say what was written")
