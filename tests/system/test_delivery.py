"""The delivery contract with a real broker: late and ordered acknowledgements, outages, kills, redeliveries, bounds."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_serve import runner
from edge_serve.config import Config, MqttBroker
from edge_serve.errors import UnavailableError
from edge_serve.frame import Delivery
from edge_serve.health import Counters
from edge_serve.mqtt import Message
from edge_serve.sources import SourceContext
from edge_serve.sources.mqtt import MqttSource, MqttSourceOptions
from tests.support import (
    PATIENCE_S,
    Client,
    InProcess,
    Mosquitto,
    Proxy,
    Service,
    digit_png,
    free_port,
    motion_label,
    motion_series,
    resident_bytes,
    stays,
    wait_for,
    write_config,
)

pytestmark = pytest.mark.broker

CONFIG = """
    schema = 1
    device = "dev"
    grace_s = {grace}
    [mqtt]
    url = "{url}"
    connect_timeout_s = 5
    {broker}
    [mqtt.upstream]
    url = "{upstream}"
    connect_timeout_s = 5
    [pipeline]
    name = "digits"
    model = "{digits}"
    threads = 1
    [pipeline.source]
    type = "mqtt"
    topic = {topic}
    {source}
    [pipeline.sink]
    type = "mqtt"
    broker = "upstream"
    topic = "results"
    {sink}
"""

# Inputs are held back while upstream is away, as they are where a sink cannot spool; test_spill.py has the other way.
NO_SPOOL = """
    [spool]
    enabled = false
"""


def config(folder: Path, url: str, upstream: str | None = None, file: str = "edge-serve.toml", **words: object) -> Path:
    """Write the configuration of a digits pipeline."""
    defaults: dict[str, object] = {
        "url": url,
        "upstream": upstream or url,
        "grace": 3,
        "broker": "",
        "topic": '"in/#"',
        "source": "",
        "sink": "",
    }
    return write_config(folder, CONFIG, file=file, **{**defaults, **words})


def acknowledged(broker: Mosquitto, client_id: str = "dev.digits.in") -> list[int]:
    """Give the packet ids that a client has acknowledged, from the broker's log."""
    found = re.findall(rf"Received PUBACK from {re.escape(client_id)} \(Mid: (\d+)", broker.log_text())
    return [int(each) for each in found]


def delivered(broker: Mosquitto, client_id: str = "dev.digits.in") -> list[tuple[int, bool]]:
    """Give the packet ids that a client was sent, and whether as a duplicate, from the broker's log."""
    found = re.findall(rf"Sending PUBLISH to {re.escape(client_id)} \(d(\d), q1, r\d, m(\d+)", broker.log_text())
    return [(int(packet_id), duplicate == "1") for duplicate, packet_id in found]


def test_nothing_is_acknowledged_before_its_result_is_upstream(
    tmp_path: Path, make_broker: Callable[..., Mosquitto]
) -> None:
    near, far = make_broker().start(), make_broker().start()
    with (
        Proxy(far.port) as uplink,
        Client(near.port) as publisher,
        Client(far.port, "results") as upstream,
        InProcess(config(tmp_path, near.url, uplink.url)) as service,
    ):
        publisher.publish("in/x", digit_png(0), user={"id": "first"})
        upstream.wait_ids({"first"})
        wait_for(lambda: acknowledged(near) == [1], "the acknowledgement")
        uplink.freeze()
        ids = {f"frame-{number}" for number in range(10)}
        for identity in sorted(ids):
            publisher.publish("in/x", digit_png(0), user={"id": identity})
        wait_for(lambda: service.counts()["in"] == 11, "all inputs are in work")
        stays(lambda: acknowledged(near) == [1], "acknowledged although no result is upstream", 0.5)
        uplink.restore()
        upstream.wait_ids(ids)
        wait_for(lambda: len(acknowledged(near)) == 11, "all acknowledgements")


@pytest.mark.parametrize("protocol", [5, "3.1.1"])
def test_no_result_is_lost_while_upstream_is_away(
    tmp_path: Path, make_broker: Callable[..., Mosquitto], protocol: int | str
) -> None:
    near, far = make_broker().start(), make_broker().start()
    number = 100
    ids = {f"in/{each}" for each in range(number)}
    with (
        Proxy(far.port) as uplink,
        Client(near.port) as publisher,
        Client(far.port, "results") as upstream,
        InProcess(
            config(tmp_path, near.url, uplink.url, broker=f"protocol = {json.dumps(protocol)}", sink=NO_SPOOL)
        ) as service,
    ):
        publisher.publish("in/0", digit_png(0))
        upstream.wait(1)
        wait_for(lambda: len(acknowledged(near)) == 1, "the first acknowledgement")
        uplink.cut(refuse=True)
        for each in range(1, number):
            publisher.publish(f"in/{each}", digit_png(each))
        wait_for(lambda: service.counts()["in"] > 10, "as many are in work as may be")
        stays(lambda: len(acknowledged(near)) == 1, "acknowledged although upstream is away", 0.5)
        # The source is held back: not everything is in memory.
        assert service.counts()["in"] < number
        uplink.restore()
        wait_for(
            lambda: ids <= {each.document["source"] for each in list(upstream.messages)}, "all results, upstream again"
        )
        wait_for(lambda: len(acknowledged(near)) == number, "all acknowledgements")
        assert service.counts()["out"] == number
        assert service.counts()["dropped"] == {}


def test_a_stop_while_upstream_is_away_loses_nothing(tmp_path: Path, broker: Mosquitto) -> None:
    away = f"mqtt://127.0.0.1:{free_port()}"
    ids = {str(number) for number in range(60)}
    with Client(broker.port, "results") as client:
        with Service(config(tmp_path, broker.url, away, grace=0.5, sink=NO_SPOOL)) as service:
            service.said("source: .*|cannot connect")
            wait_for(lambda: "SUBSCRIBE from dev.digits.in" in broker.log_text(), "the subscription")
            for identity in sorted(ids):
                client.publish("in/x", digit_png(0), user={"id": identity})
            wait_for(lambda: len(delivered(broker)) >= 20, "they are in work")
            assert service.terminate() == 0
            assert "were not acknowledged" in service.text
        assert acknowledged(broker) == []
        with Service(config(tmp_path, broker.url)) as service:
            service.ready()
            assert len(client.wait_ids(ids)) == 60
            assert service.terminate() == 0


def test_the_newest_wins_where_the_policy_says_so(tmp_path: Path, broker: Mosquitto, proxy: Proxy) -> None:
    options = 'qos = 0\npolicy = "latest"'
    with (
        Client(broker.port, "results") as client,
        InProcess(config(tmp_path, broker.url, proxy.url, source=options, sink="max_inflight = 1")) as service,
    ):
        client.publish("in/x", digit_png(0), qos=0, user={"id": "first"})
        client.wait_ids({"first"})
        proxy.freeze()
        number = 100
        for each in range(number):
            client.publish("in/x", digit_png(0), qos=0, user={"id": str(each)})
        wait_for(lambda: service.counts()["in"] == number + 1, "all have come in")
        wait_for(lambda: service.counts()["dropped"].get("latest", 0) > 80, "the older ones are let go, and counted")
        proxy.restore()
        results = client.wait_ids({str(number - 1)})
        counts = service.counts()
        assert len(results) + counts["dropped"]["latest"] == number + 1, "each is a result or a counted drop"


def test_reconnecting_leaves_nothing_behind(
    tmp_path: Path, broker: Mosquitto, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "FIRST_DELAY_S", 0.01)
    descriptors = Path("/proc/self/fd")
    # Source and sink alone: the status has a connection and a rhythm of its own.
    alone = config(tmp_path, proxy.url, sink=f"{NO_SPOOL}\n    [status]\n    enabled = false")
    with Client(broker.port, "results") as client, InProcess(alone) as service:
        client.publish("in/x", digit_png(0))
        client.wait(1)
        # The last part of a start.
        wait_for(lambda: "control" in {thread.name for thread in threading.enumerate()}, "the control socket")
        line = service.app.lines[0]
        gc.disable()
        try:
            before = len(list(descriptors.iterdir())), threading.active_count()
            for number in range(2, 12):
                accepted = proxy.accepted
                proxy.cut()
                # Source and sink are back sooner than anybody could see them away.
                wait_for(lambda: proxy.accepted >= accepted + 2, "new connections")  # noqa: B023  # waited for here
                client.publish("in/x", digit_png(0))
                client.wait(number)
                assert line.source.connected.wait(PATIENCE_S)
            wait_for(
                lambda: (len(list(descriptors.iterdir())), threading.active_count()) == before,
                f"as many descriptors and threads as before: {before}",
            )
        finally:
            gc.enable()


def test_acknowledgements_leave_in_the_order_of_arrival(broker: Mosquitto, tmp_path: Path) -> None:
    with source(broker.url, tmp_path, receive_maximum=20) as mqtt, Client(broker.port) as publisher:
        for number in range(10):
            publisher.publish("in/x", str(number))
        deliveries = read(mqtt, 10)
        for number in (3, 1, 9, 2):
            deliveries[number].settle(None)
        deliveries[4].settle(UnavailableError("upstream is away"))
        stays(lambda: acknowledged(broker, "dev.line.in") == [], "acknowledged before one that came earlier", 0.2)
        deliveries[0].settle(None)
        wait_for(lambda: acknowledged(broker, "dev.line.in") == [1, 2, 3, 4], "those up to the first unsettled one")
        for number in (8, 7, 6, 5):
            deliveries[number].settle(None)
        stays(lambda: len(acknowledged(broker, "dev.line.in")) == 4, "acknowledged past a failed one", 0.2)
        deliveries[4].settle(None)
        wait_for(lambda: acknowledged(broker, "dev.line.in") == list(range(1, 11)), "all, in order")


@contextlib.contextmanager
def source(url: str, folder: Path, *, counters: Counters | None = None, **options: Any) -> Iterator[MqttSource]:
    """Give a connected source on in/#."""
    broker = {name: options.pop(name) for name in ("max_payload", "protocol", "keepalive_s") if name in options}
    settings = Config(
        folder / "c.toml", "dev", folder, "auto", 1, {"": MqttBroker(url, connect_timeout_s=5, **broker)}, ()
    )
    context = SourceContext(settings, "line", counters or Counters(), dict)
    made = MqttSource(MqttSourceOptions(**{"topic": "in/#", **options}), context)
    made.connect()
    try:
        yield made
    finally:
        made.close()


def read(mqtt: MqttSource, number: int) -> list[Delivery]:
    """Read that many deliveries."""
    found: list[Delivery] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < number:
        assert time.monotonic() < deadline, f"{len(found)} of {number} deliveries"
        delivery = mqtt.read(0.1)
        if delivery is not None:
            found.append(delivery)
    return found


def read_on(mqtt: MqttSource) -> None:
    """Read for ever; only an error ends it."""
    while True:
        assert mqtt.read(0.1) is None


def lose(mqtt: MqttSource, proxy: Proxy) -> None:
    """Cut the source's connection and wait until it says so."""
    proxy.cut()
    with pytest.raises(UnavailableError):
        read_on(mqtt)


@pytest.mark.parametrize("protocol", [5, "3.1.1"])
def test_a_redelivery_whose_first_delivery_is_in_work_is_no_second_frame(
    broker: Mosquitto, proxy: Proxy, tmp_path: Path, protocol: Any
) -> None:
    with source(proxy.url, tmp_path, protocol=protocol) as mqtt, Client(broker.port) as publisher:
        for number in range(4):
            publisher.publish("in/x", str(number))
        deliveries = read(mqtt, 4)
        lose(mqtt, proxy)
        deliveries[0].settle(None)  # while there is no connection
        mqtt.connect()
        wait_for(lambda: len(delivered(broker, "dev.line.in")) == 8, "the redeliveries")
        assert [duplicate for _, duplicate in delivered(broker, "dev.line.in")] == [False] * 4 + [True] * 4
        wait_for(lambda: acknowledged(broker, "dev.line.in") == [1], "what was settled in the meantime")
        assert mqtt.read(0.2) is None, "a redelivery became a second frame"
        for delivery in (deliveries[3], deliveries[1], deliveries[2]):
            delivery.settle(None)
        wait_for(lambda: acknowledged(broker, "dev.line.in") == [1, 2, 3, 4], "all acknowledgements, in order")
        publisher.publish("in/x", "next")
        assert read(mqtt, 1)[0].frame.payload == b"next"


def test_a_redelivery_to_a_new_process_has_the_same_derived_id(broker: Mosquitto, proxy: Proxy, tmp_path: Path) -> None:
    with Client(broker.port) as publisher:
        with source(proxy.url, tmp_path) as mqtt:
            for _ in range(3):
                publisher.publish("in/x", "same")
            publisher.publish("in/big", "x" * 100_000)
            before = [each.frame.id for each in read(mqtt, 4)]
            proxy.cut()
        with source(proxy.url, tmp_path) as mqtt:
            after = [each.frame.id for each in read(mqtt, 4)]
    assert before == after
    assert len(set(before)) == 4, "equal readings are different frames"


def test_a_reused_packet_id_is_a_new_frame(tmp_path: Path, make_broker: Callable[..., Mosquitto]) -> None:
    # The broker has forgotten its sessions: what it sends under a known packet id is something else.
    broker = make_broker().start()
    with source(broker.url, tmp_path) as mqtt:
        with Client(broker.port) as publisher:
            publisher.publish("in/x", "old")
            (old,) = read(mqtt, 1)
        broker.kill()
        with pytest.raises(UnavailableError):
            read_on(mqtt)
        broker.start()
        mqtt.connect()
        with Client(broker.port) as publisher:
            publisher.publish("in/x", "new")
            (new,) = read(mqtt, 1)
        assert (old.frame.payload, new.frame.payload) == (b"old", b"new")
        old.settle(None)
        stays(
            lambda: acknowledged(broker, "dev.line.in") == [], "the old one's settlement acknowledged the new one", 0.2
        )
        new.settle(None)
        wait_for(lambda: acknowledged(broker, "dev.line.in") == [1], "the new one's acknowledgement")


@pytest.mark.parametrize(
    ("present", "packet_id", "duplicate", "payload", "frames"),
    [
        (True, 1, True, b"same", 1),
        (True, 1, False, b"same", 2),
        (True, 1, True, b"other", 2),
        (True, 2, True, b"same", 2),
        (False, 1, True, b"same", 2),
    ],
    ids=["redelivery", "not marked", "another payload", "another packet id", "forgotten session"],
)
def test_only_a_redelivery_in_the_same_session_takes_the_first_ones_place(
    tmp_path: Path, present: bool, packet_id: int, duplicate: bool, payload: bytes, frames: int
) -> None:
    settings = Config(tmp_path / "c.toml", "dev", tmp_path, "auto", 1, {"": MqttBroker("mqtt://x")}, ())
    mqtt = MqttSource(MqttSourceOptions(topic="in/#"), SourceContext(settings, "line", Counters(), dict))

    def message(number: int, again: bool, body: bytes) -> Message:
        return Message("in/x", body, 1, number, again, False, None, None, None, {}, 0)

    mqtt._session(False)
    mqtt._arrived(message(1, False, b"same"))
    mqtt._session(present)
    mqtt._arrived(message(packet_id, duplicate, payload))
    assert len(read(mqtt, frames)) == frames
    assert mqtt.read(0) is None


def test_a_failure_in_the_networks_thread_is_no_silence(
    tmp_path: Path, broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    with source(broker.url, tmp_path) as mqtt, Client(broker.port) as publisher:
        make_frame = MqttSource._frame
        monkeypatch.setattr(MqttSource, "_frame", lambda *_: 1 // 0)
        publisher.publish("in/x", b"1")
        with pytest.raises(UnavailableError, match="ZeroDivisionError"):  # noqa: PT012
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                mqtt.read(0.1)
        monkeypatch.setattr(MqttSource, "_frame", make_frame)
        mqtt.connect()
        assert read(mqtt, 1)[0].frame.payload == b"1"


def test_many_cuts_lose_nothing_and_repeat_little(broker: Mosquitto, proxy: Proxy, tmp_path: Path) -> None:
    number = 400
    ids = {str(each) for each in range(number)}
    with (
        Client(broker.port, "results") as client,
        InProcess(config(tmp_path, proxy.url, broker.url, source="receive_maximum = 50")) as service,
    ):
        done = threading.Event()

        def cut() -> None:
            while not done.wait(0.3):
                proxy.cut()

        cutting = threading.Thread(target=cut, name="test.cutting")
        cutting.start()
        for each in range(number):
            client.publish("in/x", digit_png(each % 500), user={"id": str(each)})
        client.wait_ids(ids)
        done.set()
        cutting.join()
        wait_for(lambda: service.counts()["out"] >= number, "all are settled")
        assert service.counts()["dropped"] == {}
        # Only what was acknowledged in the very moment of a cut can come a second time.
        assert len(client.messages) - number <= 50 * proxy.accepted


def test_the_worker_killed_in_between_loses_nothing(broker: Mosquitto, tmp_path: Path) -> None:
    number = 400
    ids = {str(each) for each in range(number)}
    path = config(tmp_path, broker.url)
    with Client(broker.port, "results") as client:
        with Service(path) as service:
            service.ready()

            def publish() -> None:
                for n in range(number):
                    client.publish("in/x", digit_png(n % 500), user={"id": str(n)})

            publishing = threading.Thread(target=publish)
            publishing.start()
            for share in (0.1, 0.25, 0.4):
                client.wait(int(number * share))
                service.kill()
                service = Service(path)  # the next life of the same device
                service.ready()
            publishing.join()
            results = client.wait_ids(ids)
            wait_for(lambda: len(acknowledged(broker)) >= number, "all acknowledgements")
            assert service.terminate() == 0
        # What was acknowledged has a result; the broker has nothing left for this session.
        assert all("error" not in each for each in results)
        repeated = len(results) - number
        assert repeated <= 3 * 60
        with Service(path) as service:
            service.ready()
            client.publish("in/x", digit_png(0), user={"id": "last"})
            client.wait_ids({"last"})
            assert len(client.messages) == number + repeated + 1, "something had been left over"


def test_no_acknowledgement_is_earlier_than_its_result_even_when_killed(broker: Mosquitto, tmp_path: Path) -> None:
    # The broker's log has both in the order in which they came.
    path = config(tmp_path, broker.url)
    with Client(broker.port, "results") as client, Service(path) as service:
        service.ready()
        for number in range(100):
            client.publish("in/x", digit_png(number), user={"id": str(number)}, wait=False)
        client.wait(20)
        service.kill()
    results = acknowledgements = 0
    for line in broker.log_text().splitlines():
        results += bool(re.search(r"Received PUBLISH from dev\.digits\.out ", line))
        if "Received PUBACK from dev.digits.in " in line:
            acknowledgements += 1
            assert acknowledgements <= results, line
    assert acknowledgements > 0


def test_the_brokers_restart_is_survived(tmp_path: Path, make_broker: Callable[..., Mosquitto]) -> None:
    broker = make_broker("allow_anonymous true", "persistence true", f"persistence_location {tmp_path}/").start()
    path = config(tmp_path, broker.url)
    with Client(broker.port, "results", client_id="reader") as client, Service(path) as service:
        service.ready()
        for each in range(50):
            client.publish("in/x", digit_png(each), user={"id": f"before-{each}"})
        client.wait_ids({f"before-{each}" for each in range(50)})
        for _ in range(2):
            broker.stop()
            service.said("connection lost")
            client._subscribed.clear()
            broker.start()
            assert client._subscribed.wait(PATIENCE_S)
            mark = time.monotonic_ns()
            for each in range(20):
                client.publish("in/x", digit_png(each), user={"id": f"after-{mark}-{each}"})
            client.wait_ids({f"after-{mark}-{each}" for each in range(20)})
        assert service.terminate() == 0


def test_a_broker_that_is_not_there_at_the_start_may_come_later(
    tmp_path: Path, make_broker: Callable[..., Mosquitto]
) -> None:
    broker = make_broker()
    with Service(config(tmp_path, broker.url)) as service:
        service.said(rf"digits: source: {broker.url}: cannot connect: .*refused")
        service.said("ready, but not connected yet")
        broker.start()
        service.said("digits: source: connected again")
        with Client(broker.port, "results") as client:
            client.publish("in/x", digit_png(0))
            client.wait(1)
        # An outage is told once, not with every attempt.
        assert service.text.count("digits: source: ") == 2
        assert service.terminate() == 0


def test_a_broker_that_never_comes_holds_up_no_stop(tmp_path: Path) -> None:
    with Service(config(tmp_path, f"mqtt://127.0.0.1:{free_port()}")) as service:
        service.said("cannot connect")
        began = time.monotonic()
        assert service.terminate() == 0
        assert time.monotonic() - began < 3


def test_a_broker_that_accepts_and_says_nothing_holds_up_no_stop(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"mqtt://127.0.0.1:{silent.getsockname()[1]}"
        path = config(tmp_path, url, grace=1)
        path.write_text(path.read_text().replace("connect_timeout_s = 5", "connect_timeout_s = 60"))
        with Service(path) as service:
            connection, _ = silent.accept()
            with connection:
                began = time.monotonic()
                assert service.terminate() == 0
                assert time.monotonic() - began < 5


def test_a_dead_network_holds_up_no_stop(broker: Mosquitto, proxy: Proxy, tmp_path: Path) -> None:
    with Client(broker.port, "results") as client, Service(config(tmp_path, proxy.url, grace=1)) as service:
        service.ready()
        client.publish("in/x", digit_png(0))
        client.wait(1)
        proxy.freeze()
        for _ in range(5):
            client.publish("in/x", digit_png(0))
        began = time.monotonic()
        assert service.terminate() == 0
        assert time.monotonic() - began < 6


def test_the_receive_maximum_is_told_to_the_broker(broker: Mosquitto, tmp_path: Path) -> None:
    with source(broker.url, tmp_path, receive_maximum=7) as mqtt, Client(broker.port) as publisher:
        assert mqtt.hold_limit == 7
        for number in range(30):
            publisher.publish("in/x", str(number))
        read(mqtt, 7)
        assert mqtt.read(0.2) is None, "more came than the Receive Maximum"


@pytest.mark.parametrize(("receive_maximum", "size"), [(3, 200_000), (20, 1000)])
def test_surplus_is_bounded_by_max_bytes_and_nothing_is_lost(
    broker: Mosquitto, tmp_path: Path, receive_maximum: int, size: int
) -> None:
    # mosquitto 2.0.11 lets a whole Receive Maximum of messages out for each single acknowledgement, so a backlog comes
    # almost at once. Every message here is also padding, so that it counts.
    number = 150
    picture = digit_png(0)
    options = f"receive_maximum = {receive_maximum}\nmax_bytes = {10 * (size + 2000)}"
    path = config(tmp_path, broker.url, source=options)
    with Service(path) as service:  # so that the session is there
        service.ready()
        assert service.terminate() == 0
    with Client(broker.port, "results") as client:
        for each in range(number):
            client.publish("in/x", picture + b"\0" * (size - len(picture)), user={"id": str(each)}, wait=False)
        with Service(path) as service:
            service.said("started in")
            before = resident_bytes(service.pid)
            highest = before

            def missing() -> set[str]:
                nonlocal highest
                highest = max(highest, resident_bytes(service.pid))
                return {str(each) for each in range(number)} - {each.document["id"] for each in list(client.messages)}

            wait_for(lambda: not missing(), "all results", 60)
            wait_for(lambda: len(set(acknowledged(broker))) >= number, "all acknowledgements")
            assert service.terminate() == 0
            assert highest - before < 40 * size + 20_000_000
        assert len(client.messages) < 2 * number, "most was worked on more than once"


def test_a_broker_that_ignores_the_receive_maximum_is_bounded_and_nothing_is_lost(tmp_path: Path) -> None:
    pytest.importorskip("iotcore")
    port, other = free_port(), free_port()
    settings = IOTCORE.format(port=port, other=other)
    (tmp_path / "iotcore.toml").write_text(settings, encoding="utf-8")
    import subprocess
    import sys

    starter = (
        "import iotcore, sys\n"
        f"broker = iotcore.Broker(config_path={str(tmp_path / 'iotcore.toml')!r}, listen='127.0.0.1')\n"
        "broker.start()\nprint('up', flush=True)\nsys.stdin.read()\nbroker.stop()\n"
    )
    number = 150
    ids = {str(each) for each in range(number)}
    with subprocess.Popen(
        [sys.executable, "-c", starter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as broker:
        try:
            assert broker.stdout is not None
            assert broker.stdout.readline() == b"up\n"
            wait_for(lambda: listens(port), "the broker")
            picture = digit_png(0)
            path = config(tmp_path, f"mqtt://127.0.0.1:{port}", source="receive_maximum = 2\nmax_bytes = 1000000")
            with Client(port, "results") as client, InProcess(path) as service:
                for each in range(number):
                    payload = picture + b"\0" * (100_000 - len(picture))
                    client.publish("in/x", payload, user={"id": str(each)}, wait=False)
                client.wait_ids(ids, 60)
                assert service.counts()["dropped"] == {}
        finally:
            broker.kill()


IOTCORE = """
id = 0
[router]
id = 0
max_connections = 100
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10
[v4.1]
name = "v4-1"
listen = "127.0.0.1:{other}"
next_connection_delay_ms = 1
[v4.1.connections]
connection_timeout_ms = 60000
max_payload_size = 16777216
max_inflight_count = 100
dynamic_filters = true
[v5.1]
name = "v5-1"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = 16777216
max_inflight_count = 100
dynamic_filters = true
"""


def listens(port: int) -> bool:
    """Say whether somebody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("qos", [0, 1])
def test_no_publisher_can_fill_the_memory(broker: Mosquitto, tmp_path: Path, qos: int) -> None:
    limit = 200_000
    options: dict[str, Any] = {"max_bytes": limit, "receive_maximum": 60_000}
    with source(broker.url, tmp_path, **options) as mqtt, Client(broker.port) as publisher:
        for number in range(1000):
            publisher.publish("in/x", str(number), qos=qos, wait=False)
        publisher.publish("in/x", b"last", qos=1)
        wait_for(lambda: mqtt._waiting_bytes > limit, "as much waits as may")
        stays(lambda: mqtt._queue.qsize() < limit / 1500 + 2, "more came than max_bytes", 0.3)
        found: list[bytes] = []
        for delivery in read(mqtt, 1001):
            found.append(delivery.frame.payload)
            delivery.settle(None)
        assert found == [*(str(number).encode() for number in range(1000)), b"last"]


def test_a_connection_that_is_held_back_stays_alive_and_acknowledges(
    broker: Mosquitto, proxy: Proxy, tmp_path: Path
) -> None:
    with (
        source(proxy.url, tmp_path, max_bytes=100_000, receive_maximum=60_000, keepalive_s=1) as mqtt,
        Client(broker.port) as publisher,
    ):
        for number in range(200):
            publisher.publish("in/x", str(number), wait=False)
        (first,) = read(mqtt, 1)
        wait_for(lambda: mqtt._waiting_bytes > 90_000, "as much waits as may")
        # Longer than the broker and the client would wait for each other.
        stays(lambda: mqtt._up, "the connection is lost", 3.5)
        first.settle(None)
        wait_for(lambda: acknowledged(broker, "dev.line.in") == [1], "an acknowledgement while nothing is read")
        read(mqtt, 199)
        assert proxy.accepted == 1


@pytest.mark.parametrize("cap", [1_000_000, 10_000])
def test_a_slow_network_may_take_longer_for_a_message_than_for_a_ping(
    broker: Mosquitto, proxy: Proxy, tmp_path: Path, cap: int
) -> None:
    # The answer to a ping comes behind the message. Taken or skipped: it must not be asked for again and again.
    with (
        source(proxy.url, tmp_path, max_payload=cap, keepalive_s=1) as mqtt,
        Client(broker.port) as publisher,
    ):
        proxy.rate = 200_000
        publisher.publish("in/x", b"x" * 600_000)
        (delivery,) = read(mqtt, 1)
        assert (delivery.frame.error is None) == (cap == 1_000_000)
        publisher.publish("in/x", b"next")
        assert read(mqtt, 1)[0].frame.payload == b"next"
        assert proxy.accepted == 1


def test_a_shared_subscription_shares_the_work(tmp_path: Path, broker: Mosquitto) -> None:
    number = 200
    ids = {str(each) for each in range(number)}
    services = []
    with Client(broker.port, "results") as client, contextlib.ExitStack() as stack:
        for name in ("left", "right"):
            path = config(tmp_path, broker.url, topic='"$share/workers/in/#"', file=f"{name}.toml")
            path.write_text(path.read_text().replace('"dev"', f'"{name}"'))
            services.append(stack.enter_context(Service(path)))
        for service in services:
            service.ready()
        for each in range(number):
            client.publish("in/x", digit_png(each), user={"id": str(each)})
        results = client.wait_ids(ids)
        assert len(results) == number, "each message is worked on once"
        share = sum(each["device"] == "left" for each in results)
        assert 0.2 * number < share < 0.8 * number
        # One of them ends in order; the other takes over, also what the first had not begun.
        assert services[0].terminate() == 0
        for each in range(number, number + 50):
            client.publish("in/x", digit_png(0), user={"id": str(each)})
        right = {each["id"] for each in results if each["device"] == "right"}
        wait_for(lambda: len(client.messages) > number, "the other works on")
        assert services[1].terminate() == 0
        with Service(tmp_path / "left.toml") as left, Service(tmp_path / "right.toml") as other:
            left.ready()
            other.ready()
            client.wait_ids({str(each) for each in range(number + 50)})
        assert right


# Windows.

WINDOW = """
    schema = 1
    device = "dev"
    grace_s = 3
    [mqtt]
    url = "{url}"
    {broker}
    [pipeline]
    name = "motion"
    model = "{motion}"
    threads = 1
    [pipeline.input]
    kind = "window"
    hop = 10
    timeout_s = 60
    [pipeline.output]
    type = "classification"
    top_k = 1
    labels = ["Standing", "Running", "Walking", "Badminton"]
    [pipeline.source]
    type = "mqtt"
    topic = "in/+"
    {source}
    [pipeline.sink]
    type = "mqtt"
    topic = "results"
"""


def test_windows_are_gathered_by_topic(tmp_path: Path, broker: Mosquitto) -> None:
    path = write_config(tmp_path, WINDOW, url=broker.url, broker="", source="")
    recordings = (0, 10, 20, 30)
    with Client(broker.port, "results") as client, InProcess(path) as service:
        series = {number: motion_series(number) for number in recordings}
        for sample in range(100):
            for number in recordings:
                client.publish(f"in/{number}", json.dumps(series[number][sample]), wait=False)
        results = [each.document for each in client.wait(4 * 6)]
        wait_for(lambda: service.counts()["out"] == 24, "all are settled")
        assert service.counts()["settled_early"] == 0
        assert service.counts()["in"] == 400
    for number in recordings:
        mine = [each for each in results if each["source"] == f"in/{number}"]
        assert len(mine) == 6
        assert {each["key"] for each in mine} == {f"in/{number}"}
        assert {each["window"]["samples"] for each in mine} == {50}
        assert all(each["window"]["from"] < each["window"]["to"] for each in mine)
        assert {each["result"]["classes"][0]["label"] for each in mine} == {motion_label(number)}


def test_samples_are_acknowledged_when_the_last_window_that_contains_them_is_safe(
    tmp_path: Path, broker: Mosquitto
) -> None:
    path = write_config(tmp_path, WINDOW, url=broker.url, broker="", source="")
    client_id = "dev.motion.in"
    series = motion_series(0)
    with Client(broker.port, "results") as client, InProcess(path):
        for sample in series[:49]:
            client.publish("in/0", json.dumps(sample))
        stays(lambda: acknowledged(broker, client_id) == [], "acknowledged without a window", 0.3)
        client.publish("in/0", json.dumps(series[49]))
        client.wait(1)
        # The next window begins ten samples later: those ten are in no other one.
        wait_for(lambda: acknowledged(broker, client_id) == list(range(1, 11)), "the first ten")
        for sample in series[50:60]:
            client.publish("in/0", json.dumps(sample))
        client.wait(2)
        wait_for(lambda: acknowledged(broker, client_id) == list(range(1, 21)), "the next ten")
    # The service was stopped; the next process gets the samples of the unfinished windows again.
    with Client(broker.port, "results") as client, InProcess(path) as service:
        for sample in series[60:70]:
            client.publish("in/0", json.dumps(sample))
        (result,) = client.wait(1)
        assert result.document["window"]["samples"] == 50
        assert result.document["result"]["classes"][0]["label"] == motion_label(0)
        assert service.counts()["in"] == 50


@pytest.mark.parametrize("source_options", ["", "receive_maximum = 10"])
def test_windows_longer_than_what_may_be_unacknowledged_do_not_stall(
    tmp_path: Path, make_broker: Callable[..., Mosquitto], source_options: str
) -> None:
    broker = make_broker("allow_anonymous true", "max_inflight_messages 20").start()
    path = write_config(tmp_path, WINDOW, url=broker.url, broker='protocol = "3.1.1"', source=source_options)
    with Client(broker.port, "results") as client, InProcess(path) as service:
        for sample in motion_series(0):
            client.publish("in/0", json.dumps(sample), wait=False)
        results = client.wait(6)
        assert {each.document["result"]["classes"][0]["label"] for each in results} == {motion_label(0)}
        assert service.counts()["settled_early"] > 0, "an early settlement is counted"


def cut_behind(service: InProcess, proxy: Proxy, broker: Mosquitto, sent: int) -> None:
    """Wait until all samples so far are in windows and what is due is acknowledged; then cut, and wait for the return."""
    wait_for(lambda: service.counts()["in"] == sent, "all so far")
    wait_for(lambda: len(acknowledged(broker, "dev.motion.in")) >= max(0, (sent - 40) // 10 * 10), "acks")
    accepted = proxy.accepted
    proxy.cut()
    wait_for(lambda: proxy.accepted > accepted, "it is back")


def test_a_request_with_a_sample_is_answered_when_it_completes_a_window(tmp_path: Path, broker: Mosquitto) -> None:
    path = write_config(tmp_path, WINDOW, url=broker.url, broker="", source="")
    with Client(broker.port, "results", "reply") as client, InProcess(path):
        for number, sample in enumerate(motion_series(0)[:60]):
            client.publish(
                "in/0", json.dumps(sample), ResponseTopic="reply", CorrelationData=str(number).encode(), wait=False
            )
        client.wait(4)
        assert [each.correlation for each in client.messages if each.topic == "reply"] == [b"49", b"59"]


def test_a_cut_puts_no_sample_into_a_window_twice(tmp_path: Path, broker: Mosquitto, proxy: Proxy) -> None:
    path = write_config(tmp_path, WINDOW, url=proxy.url, broker="", source="")
    series = motion_series(10)
    with Client(broker.port, "results") as client, InProcess(path) as service:
        for sent, sample in enumerate(series, 1):
            moment = f"2026-01-01T00:00:{(sent - 1) / 10:06.3f}Z"
            client.publish("in/0", json.dumps(sample), user={"captured_at": moment})
            if sent in (30, 62):
                cut_behind(service, proxy, broker, sent)
        results = [each.document for each in client.wait(6)]
        assert service.counts()["in"] == 100, "a redelivery became another sample"
    assert [each["window"]["from"] for each in results] == [f"2026-01-01T00:00:0{n}.000000Z" for n in range(6)]
    assert [each["window"]["to"] for each in results] == [f"2026-01-01T00:00:0{n + 4}.900000Z" for n in range(6)]


# A broker that breaks the protocol.


class FakeBroker:
    """Lets one client in, grants its subscription, and then sends whatever it is told to."""

    def __init__(self, *packets: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._packets = packets
        self._thread = threading.Thread(target=self._run, name="test.fake", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(PATIENCE_S)
            connection.recv(4096)
            connection.sendall(bytes([0x20, 3, 0, 0, 0]))
            subscription = connection.recv(4096)
            connection.sendall(bytes([0x90, 4]) + subscription[2:4] + bytes([0, 1]))
            for packet in self._packets:
                connection.sendall(packet)
            with contextlib.suppress(OSError):
                while connection.recv(4096):
                    pass

    def __enter__(self) -> FakeBroker:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(PATIENCE_S)
        self._listener.close()


GOOD = bytes([0x32, 12]) + struct.pack("!H4s", 4, b"in/x") + struct.pack("!H", 1) + b"\0" + b"yes"


@pytest.mark.parametrize(
    "packet",
    [
        b"\x32\x01\x00",
        b"\x32\x04\x00\x08in",
        b"\x32\x09\x00\x04in/x\x00\x01\x7f",
        b"\x32\x0b\x00\x04in/x\x00\x01\x02\xfe\x00",
        b"\x32\x0e\x00\x04in/x\x00\x01\x05\x03\x00\x02\xff\xfe",
        b"\x32\xff\xff\xff\xff\x7f",
        b"\xf0\xff\xff\xff\x7f" + b"x" * 1000,
        b"\x36\x09\x00\x04in/x\x00\x01\x00",
        b"\x00\x00",
        b"\x40\x00",
        b"\x90\x00",
        b"\xe0\x00",
    ],
    ids=[
        "short", "topic", "properties", "property", "text", "length", "huge", "qos3", "type", "puback", "suback", "bye",
    ],
)  # fmt: skip
def test_a_broker_that_sends_garbage_is_left_and_tried_again(tmp_path: Path, packet: bytes) -> None:
    with FakeBroker(GOOD, packet) as broker, source(f"mqtt://127.0.0.1:{broker.port}", tmp_path) as mqtt:
        assert read(mqtt, 1)[0].frame.payload == b"yes"
        with pytest.raises(UnavailableError):  # noqa: PT012
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                assert mqtt.read(0.1) is None
        mqtt.close()
