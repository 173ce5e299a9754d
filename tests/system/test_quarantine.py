"""Poison: inputs that cannot be decoded, fail in the model or kill the process; and innocent ones when the process is killed."""

from __future__ import annotations

import base64
import contextlib
import json
import platform
import random
import re
import signal
import struct
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support import MODELS, Client, InProcess, Mosquitto, Raw, Service, digit_png, wait_for, write_config

pytestmark = pytest.mark.broker

needs_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "i686"), reason="what kills these models is x86's trap on INT_MIN mod -1"
)
CONFIG = """
    schema = 1
    device = "dev"
    state_dir = "state"
    [mqtt]
    url = "{url}"
    [pipeline]
    name = "p"
    model = "{model}"
    delegate = "xnnpack"
    threads = 1
    {more}
    [pipeline.source]
    type = "mqtt"
    topic = "in/#"
    [pipeline.input]
    {input}
    [pipeline.sink]
    type = "mqtt"
    topic = "results"
"""
POISON = (-(2**31), 0)


def config(folder: Path, url: str, model: str, **words: object) -> Path:
    defaults: dict[str, object] = {"more": "", "input": ""}
    defaults |= {"url": url, "model": MODELS / f"{model}.tflite", **words}
    return write_config(folder, CONFIG, "edge-serve.toml", **defaults)


def pair(first: int, second: int) -> bytes:
    """Give a raw input of the model `remainder`, or a sample."""
    return struct.pack("<2i", first, second)


class Supervisor:
    """Starts a service again whenever it ends, as systemd does."""

    def __init__(self, config: Path) -> None:
        self._config = config
        self._stop = threading.Event()
        self.services: list[Service] = []
        self.codes: list[int] = []
        self._thread = threading.Thread(target=self._run, name="test.supervisor", daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            # A runtime folder with RuntimeDirectoryPreserve=restart; traces are not wanted anywhere else.
            env = {"RUNTIME_DIRECTORY": str(self._config.parent / "run"), "PYTHONFAULTHANDLER": ""}
            with Service(self._config, env=env) as service:
                self.services.append(service)
                while service.process.poll() is None:
                    if self._stop.wait(0.01):
                        service.terminate()
                self.codes.append(service.process.returncode)

    @property
    def log(self) -> str:
        """Give what all of them have logged."""
        return "".join(service.text for service in self.services)

    def kill(self) -> None:
        """Kill the one that runs."""
        self.services[-1].process.send_signal(signal.SIGKILL)

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()


def assert_crashed_twice(supervisor: Supervisor) -> None:
    """Assert that two processes died of the division and the third ended well.

    What the first signal was is told by the trace. While it is written other threads run on, and the writer may fall over one of
    them (a limit of faulthandler): then the process ends of SIGSEGV.
    """
    *died, last = supervisor.codes
    assert len(died) == 2, supervisor.log
    assert set(died) <= {-signal.SIGFPE, -signal.SIGSEGV}, supervisor.log
    assert last == 0, supervisor.log
    assert supervisor.log.count("the last process crashed: Floating point exception") == 2, supervisor.log


def results(client: Client) -> list[dict[str, Any]]:
    return [message.document for message in list(client.messages) if message.topic == "results"]


@needs_x86
def test_one_input_that_kills_the_process_costs_two_restarts_and_no_other_input(
    tmp_path: Path, broker: Mosquitto
) -> None:
    ids = {f"good-{number}" for number in range(100)}
    with Client(broker.port, "results", "edge-serve/dev/status") as client:
        with Supervisor(config(tmp_path, broker.url, "remainder")) as supervisor:
            wait_for(lambda: "SUBSCRIBE from dev.p.in" in broker.log_text(), "the subscription")
            for number in range(100):
                if number == 50:
                    client.publish("in/x", pair(*POISON), user={"id": "poison"}, wait=False)
                client.publish("in/x", pair(number, 8), user={"id": f"good-{number}"}, wait=False)

            def missing() -> set[str]:
                return (ids | {"poison"}) - {document["id"] for document in results(client)}

            wait_for(lambda: not missing(), f"a result of each input:\n{supervisor.log}", 60)

            def status() -> dict[str, Any] | None:
                said = [message.document for message in list(client.messages) if message.topic != "results"]
                return next((each for each in said if "quarantined" in str(each.get("problems"))), None)

            problems = wait_for(status, "the status names it")["problems"]
            assert any("input poison (8 bytes) is quarantined" in each for each in problems)
            # Nothing is left over: everything was acknowledged, the poison included.
            pubacks = rf"Received PUBACK from {re.escape('dev.p.in')} "
            wait_for(lambda: len(re.findall(pubacks, broker.log_text())) >= 101, "all acknowledgements")
        poisoned = [document for document in results(client) if document["id"] == "poison"]
        assert [document["error"]["code"] for document in poisoned] == ["quarantined"]
        for document in results(client):
            if document["id"] != "poison":
                number = int(document["id"].removeprefix("good-"))
                assert document["result"]["tensors"]["rest"]["data"] == [[number % 7]]
    assert_crashed_twice(supervisor)
    assert "the last process crashed: Floating point exception" in supervisor.log
    assert "p: runs on none instead of xnnpack" in supervisor.services[1].text
    assert "runs on none" not in supervisor.services[2].text, "the payload is to blame, not the delegate"


@needs_x86
def test_a_window_that_kills_the_process_takes_no_other_window_with_it(tmp_path: Path, broker: Mosquitto) -> None:
    """With a hop of 1 the poisoned sample is in four windows; only the first of them is run, twice."""
    window = 'kind = "window"\nhop = 1\nkey = "topic"\n'
    with Client(broker.port, "results") as client:
        with Supervisor(config(tmp_path, broker.url, "remainders", input=window)) as supervisor:
            wait_for(lambda: "SUBSCRIBE from dev.p.in" in broker.log_text(), "the subscription")
            for number in range(20):
                for key in ("in/a", "in/b"):
                    sample = POISON if (number, key) == (9, "in/a") else (number, 8)
                    client.publish(key, json.dumps(sample), user={"id": f"{key}-{number}"}, wait=False)
            # Key b: 17 windows. Key a: 6 before the poison, the quarantined one, and 7 after it, from new samples.
            expected = {f"in/b-{number}" for number in range(3, 20)}
            expected |= {f"in/a-{number}" for number in (*range(3, 10), *range(13, 20))}

            def missing() -> set[str]:
                return expected - {document["id"] for document in results(client)}

            wait_for(lambda: not missing(), f"a result of each window:\n{supervisor.log}", 60)
        found = {document["id"]: document for document in results(client)}
    assert set(found) == expected
    failed = {identity: each["error"]["code"] for identity, each in found.items() if "error" in each}
    assert failed == {"in/a-9": "quarantined"}
    assert found["in/a-13"]["result"]["tensors"]["rest"]["data"] == [[number % 7 for number in range(10, 14)]]
    assert_crashed_twice(supervisor)


@needs_x86
def test_a_client_that_sends_a_killer_again_gets_an_error_in_the_end(short_path: Path) -> None:
    """A socket delivers nothing again; whoever sends the same once more is known all the same."""
    text = """
        schema = 1
        device = "dev"
        state_dir = "state"
        [pipeline]
        name = "p"
        model = "{model}"
        [pipeline.source]
        type = "socket"
        listen = "unix:{socket}"
    """
    place = short_path / "s"
    file = write_config(short_path, text, model=MODELS / "remainder.tflite", socket=place)
    with Supervisor(file) as supervisor:
        for number in range(2):
            with Raw.connect_when_there(place) as client:
                assert client.frame(pair(9, 8), id="good").answer()["result_type"] == "tensor"  # type: ignore[index]
                with contextlib.suppress(ConnectionError):
                    assert client.frame(pair(*POISON), id="killer").ended()
            wait_for(lambda number=number: len(supervisor.codes) > number, "the crash")  # type: ignore[misc]
        with Raw.connect_when_there(place) as client:
            answer = client.frame(pair(*POISON), id="killer").answer()
            assert answer is not None
            assert (answer["type"], answer["code"]) == ("error", "quarantined")
            assert client.frame(pair(9, 8), id="good").answer()["result_type"] == "tensor"  # type: ignore[index]
    assert_crashed_twice(supervisor)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_thirty_kills_under_load_quarantine_nothing(tmp_path: Path, broker: Mosquitto) -> None:
    dice = random.Random(4)
    broker.stop()
    broker.lines = ("allow_anonymous true", "max_queued_messages 0")
    broker.start()
    with Client(broker.port, "results") as client:
        with Supervisor(config(tmp_path, broker.url, "digits")) as supervisor:
            wait_for(lambda: "SUBSCRIBE from dev.p.in" in broker.log_text(), "the subscription")
            published = 0
            for _ in range(30):
                begun = len(supervisor.services)
                supervisor.services[-1].said(r"p: ready")
                for _ in range(400):
                    client.publish("in/x", digit_png(published % 500), user={"id": str(published)}, wait=False)
                    published += 1
                time.sleep(dice.uniform(0.0, 0.2))
                supervisor.kill()
                wait_for(lambda begun=begun: len(supervisor.services) > begun, "the next one")  # type: ignore[misc]
            ids = {str(number) for number in range(published)}
            client.wait_ids(ids, 120)
        assert all("error" not in document for document in results(client))
    assert Counter(supervisor.codes) == {-signal.SIGKILL: 30, 0: 1}
    struck = re.findall(
        r"while frame (\d+) \(\d+ bytes\) was in work on xnnpack; it is tried once more", supervisor.log
    )
    assert struck, "no kill met an input in work: nothing was tested"
    # On a busy machine two kills in a row may meet one input, which then runs on the next delegate; a conviction takes three.
    assert "it is quarantined" not in supervisor.log


# Inputs that only fail.


def test_what_cannot_be_decoded_or_fails_in_the_model_gets_one_error_result_and_is_settled(
    tmp_path: Path, broker: Mosquitto
) -> None:
    inputs = {
        "good": pair(9, 8),
        "short": b"\x01\x02",
        "text": b'{"x": "words"}',
        "broken": b"[[1, 2",
        "shape": b"[1, 2, 3]",
        "empty": b"",
        "nan": b"[[NaN, 1]]",
        "fails": pair(7, 1),
        "last": b"[[10, 8]]",
    }
    with (
        Client(broker.port, "results") as client,
        InProcess(config(tmp_path, broker.url, "remainder", more="error_payload_bytes = 4")) as service,
    ):
        for identity, payload in inputs.items():
            client.publish("in/x", payload, user={"id": identity})
        found = {document["id"]: document for document in client.wait_ids(set(inputs))}
        assert len(client.messages) == len(inputs)
        assert {identity: each["error"]["code"] for identity, each in found.items() if "error" in each} == {
            **dict.fromkeys(("short", "text", "broken", "shape", "empty", "nan"), "bad_input"),
            "fails": "inference_failed",
        }
        for identity, each in found.items():
            if "error" in each:
                assert base64.b64decode(each["error"]["payload"]) == inputs[identity][:4]
        assert service.counts()["errors"] == {"bad_input": 6, "inference_failed": 1}
        wait_for(lambda: broker.log_text().count("Received PUBACK from dev.p.in ") == len(inputs), "all settled")


def test_error_results_hold_no_payload_unless_asked_for(tmp_path: Path, broker: Mosquitto) -> None:
    with Client(broker.port, "results") as client, InProcess(config(tmp_path, broker.url, "remainder")):
        client.publish("in/x", b"secret", user={"id": "bad"})
        (document,) = client.wait_ids({"bad"})
        assert set(document["error"]) == {"code", "message"}


def test_a_bad_sample_costs_its_window_nothing(tmp_path: Path, broker: Mosquitto) -> None:
    window = 'kind = "window"\nhop = 4\n'
    with Client(broker.port, "results") as client, InProcess(config(tmp_path, broker.url, "remainders", input=window)):
        for number, payload in enumerate(
            (b"[1, 8]", b"[2, 8]", b"rubbish", b"[3]", b"[[NaN, 1]]", b"[3, 8]", b"[4, 8]")
        ):
            client.publish("in/x", payload, user={"id": str(number)})
        found = {document["id"]: document for document in client.wait_ids({"2", "3", "4", "6"})}
        assert {identity: each.get("error", {}).get("code") for identity, each in found.items()} == {
            "2": "bad_input",
            "3": "bad_input",
            "4": "bad_input",
            "6": None,
        }
        assert found["6"]["result"]["tensors"]["rest"]["data"] == [[1, 2, 3, 4]]
        wait_for(lambda: broker.log_text().count("Received PUBACK from dev.p.in ") == 7, "all settled")


def test_numbers_that_are_none_leave_as_null(tmp_path: Path, broker: Mosquitto) -> None:
    with Client(broker.port, "results") as client, InProcess(config(tmp_path, broker.url, "linear")):
        client.publish("in/x", b"[[3e38, 0, 3e38, 0]]", user={"id": "overflow"})
        (document,) = client.wait_ids({"overflow"})
        assert None in document["result"]["tensors"]["scores"]["data"][0]
