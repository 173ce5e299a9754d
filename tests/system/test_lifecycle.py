"""The life of a service: its status topic, reloads under load, one instance, and what a supervisor is told."""

from __future__ import annotations

import itertools
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import (
    DIGITS,
    MODELS,
    PATIENCE_S,
    Client,
    Mosquitto,
    Proxy,
    Raw,
    Service,
    digit_png,
    edge_serve,
    environment,
    stays,
    wait_for,
    write_config,
)

TOP = """
    schema = 1
    device = "dev"
    grace_s = 5
    state_dir = "state"
"""
BROKERS = """
    [mqtt]
    url = "{url}"
    [mqtt.upstream]
    url = "{upstream}"
    connect_timeout_s = 2
    [status]
    interval_s = {interval}
"""
PIPELINE = """
    [[pipeline]]
    name = "{name}"
    model = "{model}"
    threads = 1
    [pipeline.source]
    type = "mqtt"
    topic = "{name}/in/#"
    {source}
    [[pipeline.sink]]
    type = "mqtt"
    topic = "{name}/out"
    {sink}
"""
SOCKET = """
    [pipeline]
    name = "digits"
    model = "{digits}"
    threads = 1
    [pipeline.source]
    type = "socket"
    listen = "unix://{short}/in.sock"
"""
STATUS = "edge-serve/dev/status"


def fill(text: str, **words: object) -> str:
    """Fill in {words}."""
    for word, value in words.items():
        text = text.replace("{" + word + "}", str(value))
    return textwrap.dedent(text)


def pipeline(name: str = "digits", model: object = DIGITS, source: str = "", sink: str = "") -> str:
    """Give a pipeline from and to MQTT."""
    return fill(PIPELINE, name=name, model=model, source=source, sink=sink)


def write(folder: Path, *pipelines: str, url: str, upstream: str = "", top: str = TOP, interval: float = 60) -> Path:
    """Write a configuration, as an editor that replaces the file does."""
    head = fill(top) + fill(BROKERS, url=url, upstream=upstream or url, interval=interval)
    write_config(folder, head + "".join(pipelines), "draft.toml").replace(folder / "edge-serve.toml")
    return folder / "edge-serve.toml"


def states(client: Client) -> list[str]:
    """Give the states that have been published, each run of equal ones as one."""
    found = [message.document["state"] for message in list(client.messages)]
    return [state for number, state in enumerate(found) if number == 0 or found[number - 1] != state]


def wait_state(client: Client, *expected: str, timeout: float = PATIENCE_S) -> dict[str, Any]:
    """Wait until the states were these, one after the other; gives the last document."""
    wait_for(lambda: states(client) == list(expected), f"the states {expected}; so far {states(client)}", timeout)
    document: dict[str, Any] = client.messages[-1].document
    return document


class Load:
    """Numbered inputs at a steady pace from a thread, until it is stopped."""

    def __init__(self, port: int, *topics: str, pause: float = 0.002) -> None:
        self.sent: dict[str, list[str]] = {topic: [] for topic in topics}
        self._client = Client(port)
        self._stop = threading.Event()
        self._pause = pause
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        picture, number = digit_png(0), 0
        while not self._stop.wait(self._pause):
            for topic, sent in self.sent.items():
                identity = f"{number:06}"
                self._client.publish(topic, picture, user={"id": identity}, wait=False)
                sent.append(identity)
            number += 1

    def more(self, number: int) -> None:
        """Wait until so many more were sent to each topic."""
        least = min(map(len, self.sent.values())) + number
        wait_for(lambda: min(map(len, self.sent.values())) >= least, f"{number} more inputs")

    def stop(self) -> dict[str, list[str]]:
        """Send no more, and give the ids of all that were sent, by topic."""
        self._stop.set()
        self._thread.join(PATIENCE_S)
        self._client.publish("flush", b"")  # the broker has all that went before
        return self.sent

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._client.close()


def check_results(client: Client, topic: str, sent: list[str]) -> int:
    """Check that every input has a result and that the first ones of each are in order; gives how many came twice."""
    wait_for(
        lambda: len({m.document["id"] for m in list(client.messages) if m.topic == topic}) >= len(sent),
        f"{len(sent)} different results on {topic}",
    )
    ids = [message.document["id"] for message in client.messages if message.topic == topic]
    assert list(dict.fromkeys(ids)) == sent, "something is missing, or has overtaken"
    return len(ids) - len(sent)


# The status topic.


@pytest.mark.broker
def test_the_status_is_retained_and_says_what_runs(tmp_path: Path, broker: Mosquitto) -> None:
    with Service(write(tmp_path, pipeline(), url=broker.url)).ready() as service:
        with Client(broker.port, STATUS) as early:
            wait_state(early, "online")
        with Client(broker.port, STATUS) as late:
            (message,) = late.wait(1)
        assert message.retain
        assert message.content_type == "application/json"
        document = message.document
        assert document["v"] == 1
        assert document["problems"] == []
        assert document["runtime"] in ("litert", "tflite-runtime")
        assert document["uptime_s"] >= 0
        assert document["spool"]["items"] == 0
        assert {"since", "version", "board", "device"} <= document.keys()
        digits = document["pipelines"]["digits"]
        assert (digits["model"], digits["variant"], digits["in"], digits["out"]) == ("digits", "file", 0, 0)
        assert digits["delegate"] in ("xnnpack", "none")
        assert digits["connected"]
        assert service.terminate() == 0


@pytest.mark.broker
def test_a_clean_stop_says_offline_with_the_last_counts(tmp_path: Path, broker: Mosquitto) -> None:
    with Client(broker.port, STATUS, "digits/out") as client:
        with Service(write(tmp_path, pipeline(), url=broker.url)).ready() as service:
            wait_for(lambda: states(client) == ["online"], "it is online")
            client.publish("digits/in/x", digit_png(0), user={"id": "one"})
            wait_for(lambda: any(m.topic == "digits/out" for m in client.messages), "the result")
            assert service.terminate() == 0
        documents = [m.document for m in client.messages if m.topic == STATUS]
        assert documents[-1]["state"] == "offline"
        assert documents[-1]["reason"] == "signal 15"
        assert documents[-1]["pipelines"]["digits"]["out"] == 1


@pytest.mark.broker
def test_a_killed_service_is_offline_by_its_last_will_and_online_again(tmp_path: Path, broker: Mosquitto) -> None:
    path = write(tmp_path, pipeline(), url=broker.url)
    with Client(broker.port, STATUS) as client:
        with Service(path).ready() as service:
            wait_state(client, "online")
            service.kill()
        document = wait_state(client, "online", "offline")
        assert document["since"] is None, "nobody knows since when"
        assert "lost" in document["reason"]
        with Service(path).ready():
            wait_state(client, "online", "offline", "online")
    with Client(broker.port, STATUS) as late:
        assert late.wait(1)[0].retain


@pytest.mark.broker
def test_mqtt_3_1_1_has_status_and_will_too(tmp_path: Path, broker: Mosquitto) -> None:
    path = write(tmp_path, pipeline(), url=broker.url)
    path.write_text(path.read_text().replace("[mqtt]", '[mqtt]\nprotocol = "3.1.1"'))
    with Client(broker.port, STATUS, protocol=4) as client, Service(path).ready() as service:
        wait_state(client, "online")
        service.kill()
        wait_state(client, "online", "offline")


@pytest.mark.broker
def test_counters_come_every_interval(tmp_path: Path, broker: Mosquitto) -> None:
    with (
        Client(broker.port, STATUS) as client,
        Service(write(tmp_path, pipeline(), url=broker.url, interval=1)).ready(),
    ):
        client.wait(3)
        assert states(client) == ["online"]
        client.publish("digits/in/x", digit_png(0))
        wait_for(lambda: client.messages[-1].document["pipelines"]["digits"]["out"] == 1, "the count")
        ages = client.messages[-1].document["pipelines"]["digits"]["age_ms"]
        assert ages["p50"] > 0


@pytest.mark.broker
def test_a_sink_whose_broker_is_away_makes_it_degraded_until_it_is_back(
    tmp_path: Path, make_broker: Callable[..., Mosquitto]
) -> None:
    near, far = make_broker().start(), make_broker().start()
    path = write(tmp_path, pipeline(sink='broker = "upstream"'), url=near.url, upstream=far.url)
    with Client(near.port, STATUS) as client, Service(path).ready():
        wait_state(client, "online")
        far.stop()
        document = wait_state(client, "online", "degraded")
        (problem,) = [text for text in document["problems"] if "sink" in text]
        assert "digits: sink is away: " in problem
        assert far.url in problem
        shown = edge_serve("status", "-c", path)
        assert shown.returncode == 1
        assert b"dev: degraded" in shown.stdout
        assert b"! digits: sink is away" in shown.stdout
        far.start()
        assert wait_state(client, "online", "degraded", "online", timeout=60)["problems"] == []


@pytest.mark.broker
def test_a_source_that_never_came_is_a_problem_too(tmp_path: Path, broker: Mosquitto) -> None:
    path = write(tmp_path, pipeline(source='broker = "upstream"'), url=broker.url, upstream="mqtt://127.0.0.1:1")
    with Client(broker.port, STATUS) as client, Service(path) as service:
        document = wait_for(
            lambda: next((m.document for m in client.messages if m.document["problems"]), None), "a problem"
        )
        assert document["state"] == "degraded"
        assert not document["pipelines"]["digits"]["connected"]
        assert "digits: source is away: mqtt://127.0.0.1:1: cannot connect" in document["problems"][0]
        assert service.terminate() == 0


@pytest.mark.broker
def test_a_status_broker_that_is_away_holds_nobody_up_and_gets_the_newest(
    tmp_path: Path, make_broker: Callable[..., Mosquitto]
) -> None:
    near, told = make_broker().start(), make_broker()
    path = write(tmp_path, pipeline(), url=near.url, upstream=told.url)
    path.write_text(path.read_text().replace("[status]", '[status]\nbroker = "upstream"'))
    with Client(near.port, "digits/out") as client, Service(path).ready() as service:
        service.said("status: .*cannot connect")
        for number in range(20):
            client.publish("digits/in/x", digit_png(0), user={"id": str(number)})
        client.wait_ids({str(number) for number in range(20)})
        told.start()
        with Client(told.port, STATUS) as listener:
            (message, *_) = listener.wait(1, 60)
            assert message.document["pipelines"]["digits"]["out"] == 20
            assert message.document["state"] == "online"
            began = time.monotonic()
            assert service.terminate() == 0
            assert time.monotonic() - began < 5
            wait_state(listener, "online", "offline")


@pytest.mark.broker
def test_a_dead_network_holds_the_end_up_for_a_moment_only(tmp_path: Path, broker: Mosquitto) -> None:
    with Proxy(broker.port) as proxy, Client(broker.port, STATUS) as client:
        path = write(tmp_path, pipeline(), url=broker.url, upstream=proxy.url)
        path.write_text(path.read_text().replace("[status]", '[status]\nbroker = "upstream"'))
        with Service(path).ready() as service:
            wait_state(client, "online")
            proxy.freeze()
            began = time.monotonic()
            assert service.terminate() == 0
            assert time.monotonic() - began < 6


@pytest.mark.broker
def test_no_status_where_none_is_wanted(tmp_path: Path, broker: Mosquitto) -> None:
    path = write(tmp_path, pipeline(), url=broker.url)
    path.write_text(path.read_text().replace("[status]", "[status]\nenabled = false"))
    with Client(broker.port, STATUS, "digits/out") as client, Service(path).ready() as service:
        client.publish("digits/in/x", digit_png(0))
        wait_for(lambda: client.messages, "the result")
        assert service.terminate() == 0
        assert [m.topic for m in client.messages] == ["digits/out"]


def test_without_mqtt_there_is_no_status_and_no_mqtt_library(tmp_path: Path, short_path: Path) -> None:
    path = socket_config(tmp_path, short_path)
    with Service(path).ready() as service:
        wait_for((tmp_path / "state" / "control.sock").exists, "it takes commands")
        assert edge_serve("status", "-c", path).returncode == 0
        maps = Path(f"/proc/{service.pid}/maps").read_text()
        assert "_ssl" not in maps, "paho would have brought it"
        assert [m for m in threads(service.pid) if m.startswith(("status", "mqtt"))] == []


def threads(pid: int) -> list[str]:
    """Give the names of a process's threads, as far as the system knows them."""
    return [(each / "comm").read_text().strip() for each in Path(f"/proc/{pid}/task").iterdir()]


def socket_config(folder: Path, short: Path) -> Path:
    """Write a configuration without a broker."""
    return write_config(folder, TOP + SOCKET, short=short)


# edge-serve status.


@pytest.mark.broker
def test_the_command_shows_a_table_or_the_document(tmp_path: Path, broker: Mosquitto) -> None:
    path = write(tmp_path, pipeline("one"), pipeline("two"), url=broker.url)
    with Service(path).ready() as service, Client(broker.port, "one/out") as client:
        client.publish("one/in/x", digit_png(0), user={"id": "a"})
        client.publish("one/in/x", b"nonsense", user={"id": "b"})
        client.wait_ids({"a", "b"})
        shown = edge_serve("status", "-c", path)
        assert shown.returncode == 0, shown.stderr
        first, second, _, header, one, two = shown.stdout.decode().splitlines()
        assert first.startswith("dev: online since ")
        assert f"process {service.pid}" in second
        assert header.split()[:4] == ["pipeline", "model", "delegate", "connected"]
        assert one.split()[:1] == ["one"]
        assert "1 (bad_input)" in one
        assert "yes" in two
        document = json.loads(edge_serve("status", "-c", path, "--json").stdout)
        assert document["state"] == "online"
        assert document["pid"] == service.pid
        assert document["pipelines"]["one"]["out"] == 2
        assert document["pipelines"]["one"]["errors"] == {"bad_input": 1}


def test_without_a_service_the_command_says_how_to_start_it(tmp_path: Path, short_path: Path) -> None:
    path = socket_config(tmp_path, short_path)
    for command in ("status", "reload"):
        shown = edge_serve(command, "-c", path)
        assert shown.returncode == 3
        assert b"no service answers there" in shown.stderr
        assert b"edge-serve run -c" in shown.stderr


# One instance.


def test_a_second_service_with_the_same_state_is_refused_and_a_killed_one_forgotten(
    tmp_path: Path, short_path: Path
) -> None:
    path = socket_config(tmp_path, short_path)
    with Service(path).ready() as first:
        second = edge_serve("run", "-c", path)
        assert second.returncode == 3
        assert f"another edge-serve (process {first.pid}) uses this state folder".encode() in second.stderr
        assert b"Traceback" not in second.stderr
        with Raw.connect(short_path / "in.sock") as client:
            assert client.frame(digit_png(0)).answers(1)[0]["type"] == "result", "the first one goes on"
        first.kill()
    with Service(path).ready() as third:
        assert third.terminate() == 0


# Reload.


@pytest.fixture
def patient(make_broker: Callable[..., Mosquitto]) -> Mosquitto:
    """A broker that keeps what comes; by default one drops all over 1000 messages for a client without a word."""
    return make_broker("allow_anonymous true", "max_queued_messages 0").start()


def reloaded(path: Path) -> dict[str, Any]:
    """Reload and give what was done."""
    done = edge_serve("reload", "-c", path, "--json")
    assert done.returncode == 0, done.stderr.decode()
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.broker
def test_reloads_under_load_lose_nothing_and_keep_the_order(tmp_path: Path, patient: Mosquitto) -> None:
    path = write(tmp_path, pipeline("a"), pipeline("b"), url=patient.url)
    with (
        Service(path).ready() as service,
        Client(patient.port, "a/out", "b/out") as client,
        Load(patient.port, "a/in/x", "b/in/x") as load,
    ):
        load.more(100)
        assert edge_serve("reload", "-c", path).stdout == b"reloaded: nothing has changed\n"
        # Again and again another window: each makes a new source, a new worker and a new sink in the same session.
        for turn, window in enumerate((7, 30, 3)):
            write(tmp_path, pipeline("a", source=f"receive_maximum = {window}"), pipeline("b"), url=patient.url)
            document = reloaded(path)
            assert document["changed"] == {"a": ["source"]}, turn
            assert document["kept"] == ["b"]
            load.more(100)
        sent = load.stop()
        twice = check_results(client, "a/out", sent["a/in/x"])
        assert check_results(client, "b/out", sent["b/in/x"]) == 0, "who did not change has seen nothing"
        assert twice == 0, "a pipeline that could finish leaves nothing to be delivered again"
        document = json.loads(edge_serve("status", "-c", path, "--json").stdout)
        assert document["pipelines"]["a"]["out"] == len(sent["a/in/x"]), "counts go on"
        assert service.terminate() == 0
    log = patient.log_text()
    assert log.count("as dev.b.in ") == 1, "who did not change has stayed connected"
    assert log.count("as dev.a.in ") == 4


@pytest.mark.broker
def test_a_signal_reloads_too_and_a_newer_version_is_picked_up(tmp_path: Path, patient: Mosquitto) -> None:
    base = tmp_path / "models" / "digits"
    (base / "1").mkdir(parents=True)
    shutil.copy(DIGITS, base / "1" / "model.tflite")
    path = write(tmp_path, pipeline("a", model=base), url=patient.url)
    with (
        Service(path).ready() as service,
        Client(patient.port, "a/out") as client,
        Load(patient.port, "a/in/x") as load,
    ):
        load.more(50)
        draft = base / "draft"
        draft.mkdir()
        shutil.copy(DIGITS, draft / "model.tflite")
        draft.rename(base / "2")
        service.process.send_signal(signal.SIGHUP)
        service.said(r"reload: a changed \(model\)")
        service.said("a: model digits version 2")
        load.more(50)
        check_results(client, "a/out", load.stop()["a/in/x"])
        versions = [message.document["model"]["version"] for message in client.messages]
        assert versions == sorted(versions)
        assert set(versions) == {1, 2}


@pytest.mark.broker
def test_pipelines_come_and_go(tmp_path: Path, broker: Mosquitto) -> None:
    path = write(tmp_path, pipeline("a"), pipeline("b"), url=broker.url)
    with (
        Client(broker.port, "+/out") as client,
        Client(broker.port, STATUS) as status,
        Service(path).ready() as service,
    ):
        wait_state(status, "online")
        write(tmp_path, pipeline("b"), pipeline("c"), url=broker.url)
        document = reloaded(path)
        assert (document["kept"], document["added"], document["removed"]) == (["b"], ["c"], ["a"])
        wait_for(lambda: list(status.messages[-1].document["pipelines"]) == ["b", "c"], "the status says so")
        assert states(status) == ["online"]
        for name in ("b", "c"):
            client.publish(f"{name}/in/x", digit_png(0), user={"id": name})
        client.wait_ids({"b", "c"})
        assert service.terminate() == 0
    assert "a: 0 in" in service.text


@pytest.mark.broker
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text + "nonsense = 1\n", "nonsense: unknown key"),
        (lambda text: text.replace(str(DIGITS), "/nowhere.tflite"), "/nowhere.tflite does not exist"),
        (lambda text: text.replace(str(DIGITS), str(MODELS / "broken.tflite")), "broken.tflite"),
        (lambda text: text.replace('device = "dev"', 'device = "other"'), r"device \(dev → other\)"),
        (lambda text: text.replace('device = "dev"', 'device = "dev"\nruntime = "litert"'), "runtime"),
        (lambda text: text + "[", "is not TOML"),
    ],
    ids=["unknown key", "no model", "a broken model", "device", "runtime", "no TOML"],
)
def test_what_cannot_be_changes_nothing(
    tmp_path: Path, broker: Mosquitto, change: Callable[[str], str], said: str
) -> None:
    path = write(tmp_path, pipeline("a"), url=broker.url)
    text = path.read_text()
    broken = change(text)
    if "broken.tflite" in broken:
        (tmp_path / "broken.tflite").write_bytes(DIGITS.read_bytes()[:1000])
        broken = broken.replace(str(MODELS / "broken.tflite"), str(tmp_path / "broken.tflite"))
    with Service(path).ready() as service, Client(broker.port, "a/out") as client:
        wait_for((tmp_path / "state" / "control.sock").exists, "it takes commands")
        path.write_text(broken)
        done = edge_serve("reload", "-c", path)
        assert done.returncode == 2, done.stderr
        service.process.send_signal(signal.SIGHUP)
        service.said(f"not reloaded, the old one goes on(.|\n)*{said}")
        client.publish("a/in/x", digit_png(0), user={"id": "still there"})
        client.wait_ids({"still there"})
        path.write_text(text)
        assert reloaded(path)["kept"] == ["a"]
        assert service.terminate() == 0
        assert "Traceback" not in service.text


@pytest.mark.broker
def test_another_configurations_service_is_not_reloaded(tmp_path: Path, broker: Mosquitto) -> None:
    path = write(tmp_path, pipeline("a"), url=broker.url)
    with Service(path).ready():
        wait_for((tmp_path / "state" / "control.sock").exists, "it takes commands")
        other = tmp_path / "other.toml"
        shutil.copy(path, other)
        done = edge_serve("reload", "-c", other)
        assert done.returncode == 2
        assert f"this service runs with {path}".encode() in done.stderr


@pytest.mark.broker
def test_what_could_not_be_finished_comes_again_after_a_reload(
    tmp_path: Path, make_broker: Callable[..., Mosquitto]
) -> None:
    near, far = make_broker().start(), make_broker().start()
    with Proxy(far.port) as uplink:
        top = TOP.replace("grace_s = 5", "grace_s = 0.5") + "\n    [spool]\n    enabled = false\n"
        sink = 'broker = "upstream"'
        path = write(tmp_path, pipeline("a", sink=sink), url=near.url, upstream=uplink.url, top=top)
        with (
            Service(path).ready() as service,
            Client(near.port) as publisher,
            Client(far.port, "a/out") as client,
        ):
            wait_for((tmp_path / "state" / "control.sock").exists, "it takes commands")
            uplink.cut(refuse=True)
            ids = [f"{number:03}" for number in range(60)]
            for identity in ids:
                publisher.publish("a/in/x", digit_png(0), user={"id": identity})
            # Its upstream is found to be at another address: just what a reload is for.
            write(tmp_path, pipeline("a", sink=sink), url=near.url, upstream=far.url, top=top)
            assert reloaded(path)["changed"] == {"a": ["broker upstream"]}
            check_results(client, "a/out", ids)
            assert service.terminate() == 0


@pytest.mark.broker
def test_results_for_a_sink_that_is_named_no_more_are_told_of_and_leave_when_it_is_named_again(
    tmp_path: Path, make_broker: Callable[..., Mosquitto]
) -> None:
    near, far = make_broker().start(), make_broker().start()

    def now() -> dict[str, Any]:
        document: dict[str, Any] = json.loads(edge_serve("status", "-c", path, "--json").stdout)
        return document

    def told() -> bool:
        return any("the configuration does not name" in text for text in now()["problems"])

    with Proxy(far.port) as uplink:
        uplink.cut(refuse=True)
        old = pipeline(sink='broker = "upstream"')
        path = write(tmp_path, old, url=near.url, upstream=uplink.url)
        with Service(path) as service, Client(near.port) as client:
            wait_for((tmp_path / "state" / "control.sock").exists, "it takes commands")
            wait_for(lambda: "connection lost" in service.text, "upstream is away")
            client.publish("digits/in/x", digit_png(0))
            wait_for(lambda: now()["spool"]["items"] == 1, "the result waits")
            write(tmp_path, old.replace("digits/out", "elsewhere"), url=near.url, upstream=uplink.url)
            assert reloaded(path)["changed"] == {"digits": ["sinks"]}
            wait_for(told, "it is told of")
            write(tmp_path, old, url=near.url, upstream=uplink.url)
            reloaded(path)
            uplink.restore()
            wait_for(lambda: now()["spool"]["items"] == 0, "it has left")
            assert not told()


@pytest.mark.broker
def test_a_signal_during_a_reload_ends_the_service_in_order(tmp_path: Path, patient: Mosquitto) -> None:
    path = write(tmp_path, pipeline("a"), url=patient.url)
    with Service(path).ready() as first:
        assert first.terminate() == 0  # the broker keeps what comes from now on
    with Client(patient.port, "a/out") as client, Load(patient.port, "a/in/x") as load:
        for turn in range(4):
            with Service(path).ready() as service:
                load.more(20)
                write(tmp_path, pipeline("a", source=f"receive_maximum = {turn + 5}"), url=patient.url)
                service.process.send_signal(signal.SIGHUP)
                time.sleep(0.1 * turn)
                assert service.terminate() == 0, service.text
                assert "Traceback" not in service.text
        with Service(path).ready():
            check_results(client, "a/out", load.stop()["a/in/x"])


# The end.


@pytest.mark.broker
def test_a_source_that_cannot_connect_takes_nothing_of_the_others_grace(
    tmp_path: Path, make_broker: Callable[..., Mosquitto]
) -> None:
    near = make_broker().start()
    # Takes connections and says nothing: an attempt lasts until its time-out.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"mqtt://127.0.0.1:{silent.getsockname()[1]}"
        away = pipeline("away", source='broker = "upstream"')
        path = write(tmp_path, away, pipeline("a"), pipeline("b"), url=near.url, upstream=url)
        path.write_text(path.read_text().replace("connect_timeout_s = 2", "connect_timeout_s = 60"))
        with (
            Service(path) as service,
            Client(near.port, "a/out", "b/out") as client,
        ):
            service.said("started in")
            for number in range(200):
                client.publish("a/in/x", digit_png(0), user={"id": f"a{number}"}, wait=False)
                client.publish("b/in/x", digit_png(0), user={"id": f"b{number}"}, wait=False)
            wait_for(lambda: len(client.messages) > 20, "it is at it")
            began = time.monotonic()
            assert service.terminate() == 0
            assert time.monotonic() - began < 4
            assert "were not finished" not in service.text


# What a supervisor is told.


class Supervisor:
    """A datagram socket in systemd's place."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(self.path))
        self._sock.settimeout(0.1)
        self.heard: list[tuple[float, list[str]]] = []
        self._over = False
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._over:
            try:
                message = self._sock.recv(4096).decode()
            except TimeoutError:
                continue
            self.heard.append((time.monotonic(), message.split("\n")))

    def environment(self, watchdog_s: float | None = None) -> dict[str, str]:
        """Give what a service finds in its environment."""
        found = {"NOTIFY_SOCKET": str(self.path)}
        return found if watchdog_s is None else {**found, "WATCHDOG_USEC": str(round(watchdog_s * 1e6))}

    def times(self, line: str) -> list[float]:
        """Give when a line was heard."""
        return [when for when, lines in list(self.heard) if line in lines]

    def said(self, text: str) -> bool:
        """Say whether a text was in any line."""
        return any(text in line for _, lines in list(self.heard) for line in lines)

    def close(self) -> None:
        """Stop listening."""
        self._over = True
        self._thread.join(5)
        self._sock.close()


@pytest.fixture
def supervisor(short_path: Path) -> Iterator[Supervisor]:
    """A supervisor of the test's own."""
    made = Supervisor(short_path)
    yield made
    made.close()


@pytest.mark.broker
def test_a_supervisor_hears_each_stage(tmp_path: Path, broker: Mosquitto, supervisor: Supervisor) -> None:
    path = write(tmp_path, pipeline("a"), url=broker.url)
    with Service(path, env=supervisor.environment()).ready() as service:
        wait_for((tmp_path / "state" / "control.sock").exists, "it takes commands")
        write(tmp_path, pipeline("a", source="receive_maximum = 5"), url=broker.url)
        reloaded(path)
        assert service.terminate() == 0
    stages = [lines[0].split("=")[0] for _, lines in supervisor.heard]
    stages = [stage for stage in stages if stage != "STATUS"]
    assert stages == ["EXTEND_TIMEOUT_USEC", "READY", "RELOADING", "READY", "STOPPING"]
    reloading = next(lines for _, lines in supervisor.heard if lines[0] == "RELOADING=1")
    assert reloading[1].startswith("MONOTONIC_USEC=")
    assert supervisor.said("STATUS=1 pipeline")


def test_a_broker_that_is_away_does_not_keep_ready_back(tmp_path: Path, supervisor: Supervisor) -> None:
    began = time.monotonic()
    path = write(tmp_path, pipeline("a"), url="mqtt://127.0.0.1:1")
    with Service(path, env=supervisor.environment(20)) as service:
        (ready,) = wait_for(lambda: supervisor.times("READY=1"), "READY")
        assert ready - began < 4, "before it gives up waiting for a connection"
        wait_for((tmp_path / "state" / "control.sock").exists, "commands, while it waits for the broker")
        service.said("ready, but not connected yet")
        wait_for(lambda: supervisor.said("STATUS=degraded: a: source is away"), "what is wrong")
        assert service.terminate() == 0


@pytest.mark.broker
def test_the_watchdog_is_fed_by_a_service_that_works_idles_or_waits(
    tmp_path: Path, make_broker: Callable[..., Mosquitto], supervisor: Supervisor
) -> None:
    near, far = make_broker().start(), make_broker().start()
    path = write(tmp_path, pipeline("a", sink='broker = "upstream"'), url=near.url, upstream=far.url)
    with Service(path, env=supervisor.environment(2)).ready() as service, Client(near.port) as publisher:
        pings = len(supervisor.times("WATCHDOG=1"))
        wait_for(lambda: len(supervisor.times("WATCHDOG=1")) >= pings + 3, "pings while it idles")
        far.stop()
        for number in range(60):
            publisher.publish("a/in/x", digit_png(0), user={"id": str(number)})
        pings = len(supervisor.times("WATCHDOG=1"))
        wait_for(lambda: len(supervisor.times("WATCHDOG=1")) >= pings + 4, "pings while its upstream is away")
        assert service.terminate() == 0
    times = supervisor.times("WATCHDOG=1")
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 2


STUCK = '''
"""A source whose driver hangs: read never comes back."""
import threading

from edge_serve.schema import option
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Options:
    """Nothing to choose."""


class StuckSource:
    Options = Options
    policy = "lossless"
    hold_limit = None

    def __init__(self, options, context):
        self._over = threading.Event()

    @classmethod
    def check(cls, options, key, wiring):
        return []

    def connect(self):
        pass

    def read(self, timeout):
        return self.wait_for_a_driver_that_hangs()

    def wait_for_a_driver_that_hangs(self):
        self._over.wait()

    def close(self):
        pass
'''


@pytest.mark.slow
def test_a_thread_that_hangs_starves_the_watchdog_and_is_named_with_its_stack(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    site = plug_in(tmp_path, "stuck_source", "StuckSource", STUCK)
    # Half a minute is normal for a thread; the test has less patience, but more than the longest idle wait.
    (site / "sitecustomize.py").write_text(
        "import edge_serve.watchdog as w\nw.SILENCE_S = 12.0\nw.begin.__defaults__ = ('', 12.0)\n"
    )
    source = 'type = "stuck"\n[[pipeline.sink]]\ntype = "stdout"'
    text = SOCKET.replace('    type = "socket"\n    listen = "unix://{short}/in.sock"', source)
    path = write_config(tmp_path, fill(TOP) + fill(text))
    env = {**supervisor.environment(1), "PYTHONPATH": f"{site}{os.pathsep}{Path(__file__).parents[2]}"}
    with Service(path, env=env) as service:
        wait_for(lambda: supervisor.times("WATCHDOG=1"), "a ping as long as all is well")
        service.said(r"thread source\.digits has given no sign of life for \d+ s(.|\n)*wait_for_a_driver_that_hangs")
        wait_for(lambda: supervisor.said("STATUS=degraded: thread source.digits"), "the status")
        before = len(supervisor.times("WATCHDOG=1"))
        stays(lambda: len(supervisor.times("WATCHDOG=1")) == before, "it is alive, but must not say so", 2.0)
        shown = edge_serve("status", "-c", path, env=environment(PYTHONPATH=env["PYTHONPATH"]))
        assert shown.returncode == 1, shown.stderr
        assert b"thread source.digits gives no sign of life" in shown.stdout
        assert service.text.count("has given no sign of life") == 1, "once is enough"
        assert service.terminate() == 0, "and it can be stopped in order"


def plug_in(folder: Path, module: str, name: str, text: str) -> Path:
    """Write a source as an installed distribution has it; gives the folder for the module path."""
    site = folder / "site"
    info = site / "stuck-1.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text(text)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stuck\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[edge_serve.sources]\nstuck = {module}:{name}\n")
    return site


def test_a_process_that_was_stopped_for_a_while_blames_nobody(tmp_path: Path, short_path: Path) -> None:
    with Service(socket_config(tmp_path, short_path)).ready() as service:
        service.process.send_signal(signal.SIGSTOP)
        time.sleep(1.0)
        service.process.send_signal(signal.SIGCONT)
        with Raw.connect(short_path / "in.sock") as client:
            assert client.frame(digit_png(0)).answers(1)[0]["type"] == "result"
        assert "no sign of life" not in service.text
        assert service.terminate() == 0


def test_closing_a_terminal_ends_what_ran_in_it(tmp_path: Path, short_path: Path) -> None:
    controller, terminal = pty.openpty()
    path = socket_config(tmp_path, short_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_serve", "run", "-c", str(path)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment(),
    )
    os.close(terminal)
    try:
        Raw.connect_when_there(short_path / "in.sock").close()
        process.send_signal(signal.SIGHUP)
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
