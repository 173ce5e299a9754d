"""Delegates in a running service: chosen and told of, left when they fail without losing an input, and taken up again."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_serve import line
from edge_serve.app import App, load
from edge_serve.errors import ConfigError, DelegateAwayError, ModelError
from edge_serve.model import resilient
from edge_serve.model.wish import Choice
from edge_serve.pipeline import Pipeline
from edge_serve.processing.setup import settle
from tests.delegates import add_model, library, tpu_model
from tests.support import MODELS, Client, InProcess, Mosquitto, Service, edge_serve, wait_for, write_config
from tests.unit.material import bundle

pytestmark = pytest.mark.broker

CONFIG = """
    schema = 1
    device = "dev"
    state_dir = "state"
    [mqtt]
    url = "{url}"
    [status]
    interval_s = 1
    [pipeline]
    name = "p"
    model = "{model}"
    {pipeline}
    [pipeline.source]
    type = "mqtt"
    topic = "in/#"
    [pipeline.sink]
    type = "mqtt"
    topic = "results"
"""


def config(folder: Path, url: str, pipeline: str, model: Path | None = None) -> Path:
    return write_config(folder, CONFIG, url=url, model=model or add_model(folder), pipeline=pipeline)


def delegate(**options: object) -> str:
    """Write the `delegate` of a pipeline: the test library with these options."""
    listed = ", ".join(f'{key} = "{value}"' for key, value in options.items())
    return f'delegate = {{ library = "{library()}", options = {{ {listed} }} }}'


def both_ways(folder: Path) -> Path:
    """Write a model that an Edge TPU takes and the CPU runs as well: what EdgeTpu looks for stands behind the file's end."""
    model = add_model(folder)
    with model.open("ab") as stream:
        stream.write(b"edgetpu-custom-op")
    return model


def tpu(**options: object) -> str:
    """Write the `delegate` of a pipeline: a stand-in Edge TPU that takes both_ways' model."""
    listed = ", ".join(f'{key} = "{value}"' for key, value in {"claims": "all", **options}.items())
    return f'delegate = {{ name = "edgetpu", library = "{library()}", options = {{ {listed} }} }}'


def payload(number: int) -> bytes:
    return struct.pack("<4f", number, 0.5, -1.0, 2.0)


class Feed:
    """Sends numbered inputs and holds the results against them."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.sent = 0

    def send(self, number: int) -> None:
        for _ in range(number):
            self.client.publish(
                f"in/{self.sent}",
                payload(self.sent),
                user={"id": f"f{self.sent}"},
                ContentType="application/octet-stream",
            )
            self.sent += 1

    def all_there(self) -> list[str]:
        """Wait for the results of all; gives the delegates that they were made on, in order."""
        documents = {each["id"]: each for each in self.client.wait_ids({f"f{number}" for number in range(self.sent)})}
        for number in range(self.sent):
            found = documents[f"f{number}"]["result"]["tensors"]["y"]["data"]
            assert found == [[-2.0 * number, -1.0, 2.0, -4.0]], "no result is lost, and none is wrong"
        return [documents[f"f{number}"]["model"]["delegate"] for number in range(self.sent)]


def status(config: Path) -> dict[str, Any]:
    done = edge_serve("status", "-c", config, "--json")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.fixture
def broker(make_broker: Callable[..., Mosquitto]) -> Mosquitto:
    return make_broker().start()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"invoke": "fail"}, "the test delegate fails, as it was told to"),
        ({"invoke": "hang"}, "did not answer within 0.6"),
        ({"invoke": "crash"}, "SIGSEGV"),
        ({"invoke": "nan"}, "it gave NaN where the next one in line does not"),
    ],
    ids=["raises", "hangs", "crashes", "gives NaN"],
)
def test_a_delegate_that_fails_in_service_costs_no_input(
    tmp_path: Path, broker: Mosquitto, how: dict[str, str], says: str
) -> None:
    when = tmp_path / "when"
    file = config(tmp_path, broker.url, "threads = 1\n" + delegate(**how, when=when))
    with Service(file).ready() as service, Client(broker.port, "results") as client:
        feed = Feed(client)
        feed.send(20)
        assert set(feed.all_there()) == {"external:libmisbehave"}
        when.touch()
        feed.send(200)
        assert "external:libmisbehave" not in feed.all_there()[20:]
        assert says in service.text


def test_what_was_unplugged_is_degraded_and_taken_up_again(tmp_path: Path, broker: Mosquitto) -> None:
    gone = tmp_path / "gone"
    file = config(tmp_path, broker.url, "threads = 1\n" + delegate(unplugged=gone))
    with Service(file).ready() as service, Client(broker.port, "results") as client:
        feed = Feed(client)
        feed.send(10)
        assert set(feed.all_there()) == {"external:libmisbehave"}
        assert status(file)["state"] == "online"
        gone.touch()
        begun = time.monotonic()
        feed.send(10)
        assert "external:libmisbehave" not in feed.all_there()[10:]
        assert time.monotonic() - begun < 20
        found = status(file)
        assert found["state"] == "degraded"
        (problem,) = found["problems"]
        assert "instead of external:libmisbehave" in problem
        gone.unlink()

        def back() -> bool:
            feed.send(1)
            return feed.all_there()[-1] == "external:libmisbehave"

        wait_for(back, "it is taken up again", 60.0)
        assert "is well again and taken up" in service.text
        wait_for(lambda: status(file)["state"] == "online", "the service is well")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stop_does_not_wait_for_what_is_measured_at_a_first_start(
    tmp_path: Path, broker: Mosquitto, number: signal.Signals, code: int
) -> None:
    file = config(tmp_path, broker.url, delegate(create="hang"))
    service = Service(file)
    service.said("trying it on external:libmisbehave")
    begun = time.monotonic()
    assert service.terminate(number) == code
    assert time.monotonic() - begun < 5.0, "a trial that hangs is given up after 60 s only"
    service.said_at_last("stopped before the start was done")


def test_an_explicit_delegate_that_is_not_there_stops_the_start(tmp_path: Path, broker: Mosquitto) -> None:
    file = config(tmp_path, broker.url, 'delegate = "/none/libx.so"')
    done = edge_serve("run", "-c", file)
    assert done.returncode == 2
    assert b"/none/libx.so cannot be loaded" in done.stderr


def test_a_fallback_takes_its_place_and_says_so(tmp_path: Path, broker: Mosquitto) -> None:
    file = config(tmp_path, broker.url, 'delegate = "/none/libx.so"\nfallback = ["xnnpack"]')
    with Service(file).ready() as service, Client(broker.port, "results") as client:
        feed = Feed(client)
        feed.send(3)
        assert "external:libx" not in feed.all_there()
        assert "cannot be loaded" in service.text
        found = status(file)
        assert any("cannot be loaded" in reason for reason in found["pipelines"]["p"]["reasons"])
        assert found["state"] == "degraded"
        assert "not on external:libx" in found["problems"][0]


def test_a_fallback_gives_way_when_what_was_asked_for_is_there(tmp_path: Path, broker: Mosquitto) -> None:
    gone = tmp_path / "gone"
    gone.touch()
    wished = tpu(unplugged=gone)
    model = both_ways(tmp_path)
    with (
        Service(config(tmp_path, broker.url, f'{wished}\nfallback = ["xnnpack"]', model)).ready() as service,
        Client(broker.port, "results") as client,
    ):
        feed = Feed(client)
        feed.send(3)
        assert "edgetpu" not in feed.all_there()
        assert "instead of edgetpu" in service.text
        gone.unlink()

        def back() -> bool:
            feed.send(1)
            return feed.all_there()[-1] == "edgetpu"

        wait_for(back, "the Edge TPU is taken up", 60.0)


def test_auto_says_why_in_the_log_the_status_and_inspect(tmp_path: Path, broker: Mosquitto) -> None:
    file = config(tmp_path, broker.url, "", MODELS / "digits.tflite")
    nothing = edge_serve("inspect", MODELS / "digits.tflite", "-c", file).stdout
    assert f"nothing was chosen yet in {load(file).state_dir}".encode() in nothing
    with Service(file).ready() as service:
        assert "; chosen" in service.text
        (reasons,) = (each["reasons"] for each in status(file)["pipelines"].values())
        assert "; chosen" in reasons[0]
    told = edge_serve("inspect", MODELS / "digits.tflite", "-c", file, "--json")
    assert json.loads(told.stdout)["choices"] == [reasons]
    with Service(file).ready() as service:
        assert "; chosen" not in service.text, "the choice is kept"


def test_a_stand_in_edge_tpu_that_two_want_is_had_by_one(tmp_path: Path, broker: Mosquitto) -> None:
    text = tpu(claims="tpu", lock=tmp_path / "tpu")
    compiled = tpu_model(tmp_path)
    first = config(tmp_path, broker.url, text, compiled)
    other = tmp_path / "other"
    other.mkdir()
    second = config(other, broker.url, text, compiled)
    with Service(first).ready():
        done = edge_serve("run", "-c", second)
        assert done.returncode == 3, "it may be free later, so a restart helps"
        assert b"does no other process have it" in done.stderr


def test_a_damaged_file_from_nowhere_does_not_take_the_service_down(tmp_path: Path, broker: Mosquitto) -> None:
    data = bytearray((MODELS / "digits.tflite").read_bytes())
    # A table's offset that leads far away: the runtime reads what is not there.
    data[100:400] = b"\xff" * 300
    damaged = tmp_path / "damaged.tflite"
    damaged.write_bytes(data)
    done = edge_serve("run", "-c", config(tmp_path, broker.url, "", damaged))
    assert done.returncode in (2, 3), done.stderr
    assert b"damaged.tflite" in done.stderr


def test_in_process_a_quick_pipeline_never_helps_with_a_delegate_that_may_hang(
    tmp_path: Path, broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resilient, "FIRST_DELAY_S", 0.05)
    file = config(tmp_path, broker.url, "threads = 1\n" + delegate())
    with InProcess(file) as service, Client(broker.port, "results") as client:
        feed = Feed(client)
        feed.send(50)
        assert set(feed.all_there()) == {"external:libmisbehave"}
        assert not service.app.lines[0].pipeline._may_help()


def test_a_reload_hands_over_an_accelerator_that_only_one_may_have(tmp_path: Path, broker: Mosquitto) -> None:
    def wished(lock: Path, more: str) -> None:
        config(tmp_path, broker.url, f"{tpu(claims='tpu', lock=lock)}\n{more}", compiled)

    def delegates(feed: Feed) -> set[str]:
        """Wait for all results; what the stand-in computes is nobody's."""
        found = feed.client.wait_ids({f"f{number}" for number in range(feed.sent)})
        return {str(each["model"]["delegate"]) for each in found}

    compiled = tpu_model(tmp_path)
    mine, taken = tmp_path / "tpu", tmp_path / "taken"
    wished(mine, "")
    file = tmp_path / "edge-serve.toml"
    with InProcess(file) as service, Client(broker.port, "results") as client, taken.open("w") as other:
        feed = Feed(client)
        feed.send(20)
        wished(mine, "threads = 1\nerror_payload_bytes = 16")
        assert "error_payload_bytes" in str(service.app.reload())
        feed.send(20)
        # A third process has the one that is asked for next: the old pipeline is made again.
        fcntl.flock(other, fcntl.LOCK_EX)
        wished(taken, "threads = 1\nerror_payload_bytes = 16")
        with pytest.raises(DelegateAwayError, match="does no other process have it"):
            service.app.reload()
        feed.send(20)
        assert delegates(feed) == {"edgetpu"}
        wished(mine, "threads = 1")
        service.app.reload()
        feed.send(20)
        assert delegates(feed) == {"edgetpu"}


def test_a_reload_leaves_alone_what_runs_on_its_stand_in(tmp_path: Path, broker: Mosquitto) -> None:
    model, gone = both_ways(tmp_path), tmp_path / "gone"
    file = config(tmp_path, broker.url, tpu(unplugged=gone), model)
    with InProcess(file) as service, Client(broker.port, "results") as client:
        feed = Feed(client)
        feed.send(3)
        assert set(feed.all_there()) == {"edgetpu"}
        gone.touch()
        feed.send(3)
        assert feed.all_there()[-1] != "edgetpu"
        serving = service.app.lines[0]
        config(tmp_path, broker.url, f"{tpu(unplugged=gone)}\nerror_payload_bytes = 16", model)
        with pytest.raises(DelegateAwayError, match="edgetpu"):
            service.app.reload()
        assert service.app.lines == [serving]
        feed.send(3)
        feed.all_there()


def test_a_reload_with_a_fallback_goes_on_on_the_accelerator(tmp_path: Path, broker: Mosquitto) -> None:
    model = both_ways(tmp_path)
    wished = f'{tpu(lock=tmp_path / "tpu")}\nfallback = ["xnnpack"]'
    with InProcess(config(tmp_path, broker.url, wished, model)) as service, Client(broker.port, "results") as client:
        config(tmp_path, broker.url, f"{wished}\nerror_payload_bytes = 16", model)
        service.app.reload()
        feed = Feed(client)
        feed.send(5)
        assert set(feed.all_there()) == {"edgetpu"}, "not on the fallback, not for a moment"


@pytest.mark.parametrize("stopped", [False, True], ids=["goes on", "is stopped meanwhile"])
def test_a_reload_that_fails_late_takes_the_model_back_that_ran(
    tmp_path: Path, broker: Mosquitto, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    def unusable(*_: object) -> Choice:
        raise ModelError("the new version is unusable")

    def settle_and_stop(*given: Any) -> Any:
        if stopped:  # while the old one is made again
            service.app.stop()
        return settle(*given)

    models = tmp_path / "linear"
    bundle(models, 1)
    with InProcess(config(tmp_path, broker.url, "threads = 1", models)) as service:
        bundle(models, 2)
        # As if the new version wanted what the old one has.
        monkeypatch.setattr(App, "_build_early", lambda *_: None)
        monkeypatch.setattr(line, "choose_model", unusable)
        monkeypatch.setattr(line, "settle", settle_and_stop)
        with pytest.raises(ConfigError, match="unusable"):
            service.app.reload()
        assert [each.version.version for each in service.app.lines] == ([] if stopped else [1])
        assert (service.wait() if stopped else service.stop()) == 0


def test_what_was_chosen_while_an_accelerator_was_not_free_is_chosen_again_when_it_is(
    tmp_path: Path, broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy: list[bool] = []
    whole = line.choose_model

    def choose_model(*given: Any) -> Choice:
        # As if the pipeline that is about to end had a TPU.
        busy.append(not service.app.lines[0].ended)
        return dataclasses.replace(whole(*given), away=busy[-1])

    file = config(tmp_path, broker.url, "threads = 1")
    with InProcess(file) as service, Client(broker.port, "results") as client:
        monkeypatch.setattr(line, "choose_model", choose_model)
        monkeypatch.setattr(Pipeline, "accelerators", {"edgetpu"})
        config(tmp_path, broker.url, "threads = 1\nerror_payload_bytes = 16")
        service.app.reload()
        assert busy == [True, False]
        assert not service.app.lines[0].wanting
        feed = Feed(client)
        feed.send(5)
        assert len(feed.all_there()) == 5
