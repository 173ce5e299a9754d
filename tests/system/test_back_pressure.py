"""A model that is slower than its source: nothing grows, the network goes on, and every drop is counted; and many workers."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_serve.model.engine import Engine
from tests.support import (
    Client,
    InProcess,
    Mosquitto,
    Proxy,
    digit_png,
    environment,
    resident_bytes,
    state_home,
    stays,
    wait_for,
    write_config,
)

pytestmark = pytest.mark.broker

CONFIG = """
    schema = 1
    device = "dev"
    grace_s = 3
    [status]
    enabled = false
    [mqtt]
    url = "{url}"
    {broker}
    [mqtt.upstream]
    url = "{upstream}"
    [pipeline]
    name = "digits"
    model = "{digits}"
    threads = 1
    {pipeline}
    [pipeline.source]
    type = "mqtt"
    topic = "in/#"
    {source}
    [pipeline.sink]
    type = "mqtt"
    broker = "upstream"
    topic = "results"
"""


def config(folder: Path, url: str, **words: Any) -> Path:
    """Write the configuration of a digits pipeline."""
    defaults: dict[str, Any] = {"url": url, "upstream": url, "broker": "", "pipeline": "", "source": ""}
    return write_config(folder, CONFIG, **{**defaults, **words})


class SlowModel:
    """Makes every run of every model take so long, from now on; counts runs, and how many were going on at once."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        self.runs = 0
        self.most_at_once = 0
        self.threads: set[str] = set()
        self._now = 0
        self._lock = threading.Lock()
        run = Engine.run

        def slow(engine: Engine, inputs: Any) -> Any:
            with self._lock:
                self.runs += 1
                self._now += 1
                self.most_at_once = max(self.most_at_once, self._now)
                self.threads.add(threading.current_thread().name)
            time.sleep(self.seconds)
            try:
                return run(engine, inputs)
            finally:
                with self._lock:
                    self._now -= 1

        patch.setattr(Engine, "run", slow)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> SlowModel:
    """The model, slowed down when the test says so."""
    return SlowModel(monkeypatch)


def acknowledged(broker: Mosquitto) -> list[int]:
    """Give the packet ids that the pipeline has acknowledged, from the broker's log."""
    return [int(each) for each in re.findall(r"Received PUBACK from dev\.digits\.in \(Mid: (\d+)", broker.log_text())]


def test_a_slow_model_does_not_keep_the_network_from_answering(
    tmp_path: Path, broker: Mosquitto, model: SlowModel
) -> None:
    service = InProcess(config(tmp_path, broker.url))
    # mosquitto closes a connection that says nothing for one and a half times as long.
    service.config.brokers[""] = dataclasses.replace(service.config.brokers[""], keepalive_s=2)  # type: ignore[index]
    with service, Client(broker.port, "results") as client:
        client.publish("in/x", digit_png(0))
        client.wait(1)
        model.seconds = 5
        for _ in range(60):
            client.publish("in/x", digit_png(0), wait=False)
        wait_for(lambda: service.app.lines[0].mailbox.waiting > 10, "the mailbox fills up")
        pings = broker.log_text().count("Received PINGREQ from dev.digits.in")
        client.wait(2)
        assert broker.log_text().count("Received PINGREQ from dev.digits.in") - pings >= 2
        model.seconds = 0
        client.wait(61)
        assert broker.log_text().count("as dev.digits.in ") == 1, "the connection was lost"


def test_one_slow_input_among_quick_ones_is_the_last_that_the_networks_thread_works_on(
    tmp_path: Path, broker: Mosquitto, model: SlowModel
) -> None:
    with InProcess(config(tmp_path, broker.url)), Client(broker.port, "results") as client:
        for number in range(200):
            client.publish("in/x", digit_png(number))
        client.wait(200)
        model.seconds = 0.02
        client.publish("in/x", digit_png(0))
        client.wait(201)
        model.threads.clear()
        for number in range(20):
            client.publish("in/x", digit_png(number), wait=False)
        client.wait(221)
        assert model.threads == {"worker.digits"}


def test_a_lossless_source_is_held_back_by_a_slow_model(tmp_path: Path, broker: Mosquitto, model: SlowModel) -> None:
    with (
        InProcess(config(tmp_path, broker.url, source="receive_maximum = 5")) as service,
        Client(broker.port, "results") as client,
    ):
        model.seconds = 0.1
        ids = {str(number) for number in range(200)}
        for identity in sorted(ids):
            client.publish("in/x", digit_png(0), user={"id": identity}, wait=False)
        wait_for(lambda: service.counts()["in"] >= 5, "the first ones")
        stays(
            # mosquitto 2.0.11 lets many more out for one acknowledgement; the mailbox takes 32 and the worker has one, the rest
            # stays where it came in. Results that the broker has yet to acknowledge are no longer held back by anything.
            lambda: service.counts()["in"] - model.runs <= 33,
            "more came in than the mailbox holds",
            1,
        )
        model.seconds = 0
        client.wait_ids(ids)
        wait_for(lambda: len(acknowledged(broker)) == 200, "all acknowledgements")
        assert acknowledged(broker) == sorted(acknowledged(broker))
        assert service.counts()["dropped"] == {}


def test_of_what_a_slow_model_cannot_take_the_newest_wins_and_the_rest_is_counted(
    tmp_path: Path, broker: Mosquitto, model: SlowModel
) -> None:
    source = 'qos = 0\npolicy = "latest"'
    with (
        InProcess(config(tmp_path, broker.url, source=source)) as service,
        Client(broker.port, "results") as client,
    ):
        model.seconds = 0.05
        number = 500
        for each in range(number):
            client.publish("in/x", digit_png(0), qos=0, user={"id": str(each)})
        found = client.wait_ids({str(number - 1)})
        wait_for(lambda: service.counts()["in"] == number, "all have come in")
        wait_for(lambda: len(client.messages) == service.counts()["out"], "all results")
        counts = service.counts()
        assert counts["dropped"]["latest"] + counts["out"] == number, "each is a result or a counted drop"
        assert counts["dropped"]["latest"] > number / 2
        order = [int(each["id"]) for each in found]
        assert order == sorted(order)
        # What was chosen was new: the time that a result had waited is a run of the model or two.
        assert max(each["timings_ms"]["wait"] for each in found) < 1000


SLOW_PROGRAM = """
import sys, time
from edge_serve.model.engine import Engine
run = Engine.run
def slow(engine, inputs):
    time.sleep(0.02)
    return run(engine, inputs)
Engine.run = slow
from edge_serve.cli import main
main()
"""


@pytest.mark.parametrize(
    "source", ["receive_maximum = 1000\nmax_bytes = 3000000", 'qos = 0\npolicy = "latest"'], ids=["lossless", "latest"]
)
def test_a_fast_source_of_large_messages_does_not_fill_the_memory(
    tmp_path: Path, make_broker: Callable[..., Mosquitto], source: str
) -> None:
    broker = make_broker("allow_anonymous true", "max_queued_messages 0").start()
    program = tmp_path / "slow.py"
    program.write_text(SLOW_PROGRAM, encoding="ascii")
    path = config(tmp_path, broker.url, source=source)
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, str(program), "run", "-c", str(path)],
            stderr=stream,
            env=environment(XDG_STATE_HOME=state_home(path)),
        )
    try:
        wait_for(lambda: "started in" in log.read_text(encoding="utf-8"), "the start")
        with Client(broker.port, "results") as client:
            payload = digit_png(0) + b"\0" * 100_000
            client.publish("in/x", payload)
            client.wait(1)
            before = resident_bytes(process.pid)
            highest = before
            for _ in range(10):
                for _ in range(100):
                    client.publish("in/x", payload, qos=1 if "latest" not in source else 0, wait=False)
                time.sleep(0.1)
                highest = max(highest, resident_bytes(process.pid))
            deadline = time.monotonic() + 3
            while time.monotonic() < deadline:
                highest = max(highest, resident_bytes(process.pid))
                time.sleep(0.01)
            # The mailbox holds 32 of them besides.
            assert highest - before < 3_000_000 + 32 * 100_000 + 12_000_000
            assert len(client.messages) > 15, "it works on all the while"
    finally:
        process.kill()
        process.wait()


# Workers.


def test_several_workers_work_side_by_side_and_acknowledge_in_order(
    tmp_path: Path, broker: Mosquitto, model: SlowModel
) -> None:
    with (
        InProcess(config(tmp_path, broker.url, pipeline="workers = 3")) as service,
        Client(broker.port, "results") as client,
    ):
        assert "3 workers" in service.app.lines[0].summary
        model.seconds = 0.03
        model.most_at_once = 0
        ids = {str(number) for number in range(120)}
        begun = time.monotonic()
        for number in range(120):
            client.publish("in/x", digit_png(number), user={"id": str(number)}, wait=False)
        results = client.wait_ids(ids)
        assert time.monotonic() - begun < 0.75 * 120 * 0.03, "no faster than one"
        assert model.most_at_once == 3
        assert len(results) == 120
        wait_for(lambda: len(acknowledged(broker)) == 120, "all acknowledgements")
        found = acknowledged(broker)
        assert found == sorted(found), "acknowledged past an input that was still in work"
        assert {name for name in model.threads if name.startswith("worker")} == {
            "worker.digits", "worker.digits.1", "worker.digits.2",
        }  # fmt: skip


def test_no_worker_acknowledges_past_the_one_that_is_slow(
    tmp_path: Path, broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    run = Engine.run
    first: list[int] = []

    def one_waits(engine: Engine, inputs: Any) -> Any:
        if not first:
            first.append(1)
            assert gate.wait(20)
        return run(engine, inputs)

    with (
        InProcess(config(tmp_path, broker.url, pipeline="workers = 2")),
        Client(broker.port, "results") as client,
    ):
        monkeypatch.setattr(Engine, "run", one_waits)
        for number in range(10):
            client.publish("in/x", digit_png(number), user={"id": str(number)})
        client.wait_ids({str(number) for number in range(1, 10)})
        stays(lambda: acknowledged(broker) == [], "acknowledged before one that came earlier", 0.3)
        gate.set()
        client.wait_ids({"0"})
        wait_for(lambda: acknowledged(broker) == list(range(1, 11)), "all, in order")


# Connections that nobody uses.


def test_a_lost_connection_is_made_anew_before_anything_has_to_be_sent(tmp_path: Path, broker: Mosquitto) -> None:
    with (
        Proxy(broker.port) as uplink,
        InProcess(config(tmp_path, broker.url, upstream=uplink.url)) as service,
        Client(broker.port, "results") as client,
    ):
        client.publish("in/x", digit_png(0))
        client.wait(1)
        sink = service.app.lines[0].sinks[0]
        accepted = uplink.accepted
        uplink.cut()
        wait_for(lambda: uplink.accepted > accepted, "it is back, though there is no result to send")
        wait_for(sink.connected.is_set, "and says so")
        assert service.counts()["retried"] == 0
        client.publish("in/x", digit_png(0))
        client.wait(2)
