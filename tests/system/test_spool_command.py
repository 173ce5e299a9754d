"""`edge-serve spool` as a process: with and without a service, on sound and damaged spools."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_serve.spool import segments
from edge_serve.spool.row import Encoded
from tests.support import Client, Mosquitto, Service, digit_png, edge_serve, environment, free_port, wait_for
from tests.system.test_spill import config, ids, in_spool
from tests.unit.spool_files import Opened, filled, many

KEY = "digits/mqtt/upstream:results"


def answer(*arguments: str | Path, code: int = 0) -> Any:
    """Run a command that prints JSON."""
    done = edge_serve("spool", *arguments)
    assert done.returncode == code, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.fixture
def waiting(tmp_path: Path) -> Path:
    """A state folder in which results of two sinks wait, one of them a large one, and a dead letter lies."""
    with Opened(tmp_path, key="line/mqtt/:old") as made:
        made.fill(*many(5))
        made.fill("large", body=b'"' + b"x" * segments.INLINE_LIMIT + b'"')
        outcome: list[Exception | None] = []
        made.lane.bury(Encoded("bad", b"\xff\xfe", "application/x", (("a", "b"),)), 0.0, "too long", outcome.append)
        wait_for(lambda: outcome, "the dead letter is there")
    filled(tmp_path, 3, key="other/file/x")
    return tmp_path


def test_it_says_what_waits_and_for_whom(waiting: Path) -> None:
    document = answer("status", "--state-dir", waiting, "--json")
    found = {(each["key"], each["kind"]): each["items"] for each in document["sinks"]}
    assert found == {("line/mqtt/:old", "queue"): 6, ("line/mqtt/:old", "dead"): 1, ("other/file/x", "queue"): 3}
    assert all(each["oldest_s"] < 60 for each in document["sinks"])
    text = edge_serve("spool", "status", "--state-dir", waiting).stdout.decode()
    assert "line/mqtt/:old: 6 results" in text
    assert "line/mqtt/:old: 1 dead letters" in text
    assert (
        "line/mqtt"
        not in edge_serve("spool", "status", "--state-dir", waiting, "--sink", "other/file/x").stdout.decode()
    )


def test_a_look_changes_nothing(waiting: Path) -> None:
    before = {each: each.read_bytes() for each in waiting.rglob("*") if each.is_file()}
    answer("status", "--state-dir", waiting, "--json")
    edge_serve("spool", "export", "--state-dir", waiting)
    assert {each: each.read_bytes() for each in waiting.rglob("*") if each.is_file()} == before


def test_where_nothing_ever_waited_nothing_waits(tmp_path: Path) -> None:
    assert answer("status", "--state-dir", tmp_path, "--json")["sinks"] == []
    assert edge_serve("spool", "status", "--state-dir", tmp_path).stdout == b"nothing waits\n"
    assert edge_serve("spool", "export", "--state-dir", tmp_path).stdout == b""
    assert answer("purge", "--state-dir", tmp_path, "--json")["purged"] == 0
    assert list(tmp_path.iterdir()) == []


def test_an_export_has_the_results_in_order(waiting: Path, tmp_path: Path) -> None:
    done = edge_serve("spool", "export", "--state-dir", waiting)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["id"] for each in lines] == [*many(5), "large", *many(3)]
    assert lines[0] == {
        "v": 1, "pipeline": "line", "sink": "line/mqtt/:old", "id": "f0", "captured_at": "2027-01-15T08:00:00.000000Z",
        "content_type": "application/json", "result": {"id": "f0"},
    }  # fmt: skip
    assert lines[5]["result"] == "x" * segments.INLINE_LIMIT
    assert done.stderr == b"9 results\n"
    file = tmp_path / "dead.jsonl"
    assert edge_serve("spool", "export", "--state-dir", waiting, "--dead", "-o", file).returncode == 0
    (dead,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert (dead["reason"], dead["body_base64"], dead["properties"]) == ("too long", "//4=", [["a", "b"]])
    only = edge_serve("spool", "export", "--state-dir", waiting, "--pipeline", "nobody")
    assert (only.returncode, only.stdout) == (0, b"")
    assert edge_serve("spool", "export", "--state-dir", waiting, "-o", tmp_path / "no/such/folder").returncode == 3


def test_a_purge_asks_first(waiting: Path) -> None:
    refused = edge_serve("spool", "purge", "--state-dir", waiting)
    assert refused.returncode == 2
    assert b"say --yes" in refused.stderr
    assert answer("purge", "--state-dir", waiting, "--sink", "line/mqtt/:old", "--yes", "--json")["purged"] == 6
    left = answer("status", "--state-dir", waiting, "--json")["sinks"]
    assert {(each["key"], each["kind"]): each["items"] for each in left} == {
        ("line/mqtt/:old", "queue"): 0, ("line/mqtt/:old", "dead"): 1, ("other/file/x", "queue"): 3,
    }  # fmt: skip
    assert list((waiting / "spool/segments").iterdir()) == [], "no service runs: large bodies are gone at once"
    assert answer("purge", "--state-dir", waiting, "--dead", "--yes", "--json")["purged"] == 1


@pytest.mark.parametrize(("said", "code"), [(b"y\n", 0), (b"n\n", 130)])
def test_at_a_terminal_a_person_decides(waiting: Path, said: bytes, code: int) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "edge_serve", "spool", "purge", "--state-dir", str(waiting)]
    with subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        os.write(ours, said)
        _, error = process.communicate(timeout=30)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == code, error.decode()
    assert b"Delete 9 results for good?" in error


def test_a_damaged_spool_is_told_not_touched(waiting: Path) -> None:
    file = waiting / "spool/spool.db"
    file.write_bytes(b"no database" * 1000)
    for command in ("status", "export"):
        done = edge_serve("spool", command, "--state-dir", waiting)
        assert done.returncode == 3
        assert b"is damaged" in done.stderr
    with Opened(waiting):
        wait_for((waiting / "spool/spool.db.damaged-1").exists, "it is set aside")
    assert answer("status", "--state-dir", waiting, "--json")["set_aside"] == ["spool.db.damaged-1"]


@pytest.mark.broker
def test_beside_a_running_service(tmp_path: Path, broker: Mosquitto) -> None:
    away = f"mqtt://127.0.0.1:{free_port()}"
    path = config(tmp_path, broker.url, away)
    filled(tmp_path / "state", 4, key="gone/mqtt/:x")
    with Client(broker.port) as client, Service(path) as service:
        service.said("cannot connect")
        service.said("4 results wait for gone/mqtt/:x, which the configuration does not name")
        wait_for(lambda: "Sending SUBACK to dev.digits.in" in broker.log_text(), "the subscription")
        for each in range(30):
            client.publish("in/x", digit_png(each), user={"id": f"f{each}"})

        def waits() -> dict[str, Any]:
            return {each["key"]: each for each in answer("status", "-c", path, "--json")["sinks"]}

        wait_for(lambda: waits().get(KEY, {}).get("items") == 30, "all wait")
        assert (waits()[KEY]["orphaned"], waits()["gone/mqtt/:x"]["orphaned"]) == (False, True)
        exported = edge_serve("spool", "export", "-c", path, "--sink", KEY).stdout.splitlines()
        assert [json.loads(line)["id"] for line in exported] == ids(30)
        assert answer("purge", "-c", path, "--sink", "gone/mqtt/:x", "--yes", "--json")["purged"] == 4
        assert answer("purge", "-c", path, "--sink", KEY, "--yes", "--json")["purged"] == 30
        for each in range(30, 35):
            client.publish("in/x", digit_png(each), user={"id": f"f{each}"})
        wait_for(lambda: waits()[KEY]["items"] == 5, "the service goes on")
        assert service.terminate() == 0
        assert "5 results wait in the spool" in service.text
    assert in_spool(tmp_path) == ids(5, first=30)
