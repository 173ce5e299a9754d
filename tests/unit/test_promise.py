"""What `check` says of a pipeline's delivery: the promise, and each setting that takes a piece of it away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_serve.app import load
from edge_serve.promise import Promise, promise
from tests.support import DIGITS, edge_serve, write_config

MQTT = 'type = "mqtt"\ntopic = "in"'
TO_MQTT = 'type = "mqtt"\ntopic = "out"'
SOCKET = 'type = "socket"\nlisten = "unix:///tmp/x.sock"'


def configure(folder: Path, source: str, *sinks: str, top: str = "", more: str = "", mqtt: str = "") -> Path:
    """Write a configuration."""
    parts = [
        f'schema = 1\n{top}\n[mqtt]\nurl = "mqtt://127.0.0.1"\n{mqtt}\n[pipeline]\nname = "p"\nmodel = "{DIGITS}"\n{more}',
        f"[pipeline.source]\n{source}",
        *(f"[[pipeline.sink]]\n{sink}" for sink in sinks),
    ]
    return write_config(folder, "\n".join(parts))


def told(folder: Path, source: str, *sinks: str, **options: str) -> Promise:
    """Give the promise of a pipeline."""
    config = load(configure(folder, source, *sinks, **options))
    return promise(config, config.pipelines[0])


def test_mqtt_to_mqtt_is_at_least_once_with_a_spool_behind_it(tmp_path: Path) -> None:
    found = told(tmp_path, MQTT, TO_MQTT, top='[spool]\ndurability = "power"\nmax_bytes = 1000000')
    assert found.text.startswith("at least once")
    assert found.text.endswith("while an upstream is away they wait on disk, up to 1000000 bytes")
    assert found.notes == ()


def test_without_a_spool_inputs_are_held_back(tmp_path: Path) -> None:
    found = told(tmp_path, MQTT, TO_MQTT, top="[spool]\nenabled = false")
    assert found.text.endswith("they wait in memory, a few, and inputs are held back")


def test_latest_promises_no_more_than_the_newest(tmp_path: Path) -> None:
    found = told(tmp_path, MQTT + '\nqos = 0\npolicy = "latest"', TO_MQTT + "\nqos = 0")
    assert found.text.startswith("the newest input wins")
    assert found.notes == ()


def test_a_socket_without_sinks_answers(tmp_path: Path) -> None:
    assert told(tmp_path, SOCKET).text == "every input is answered on its connection"


@pytest.mark.parametrize(
    ("source", "sinks", "options", "said"),
    [
        (MQTT, [TO_MQTT + "\nqos = 0"], {}, "sink (mqtt): qos = 0"),
        (MQTT, [TO_MQTT, TO_MQTT + "\nqos = 0"], {}, "sink 2 (mqtt): qos = 0"),
        (MQTT, [TO_MQTT, 'type = "file"\npath = "r.jsonl"\nrequired = false'], {}, "sink 2 (file): required = false"),
        (MQTT, ['type = "file"\npath = "r.jsonl"'], {}, "sink (file): a power cut may cost the last lines"),
        (MQTT, [TO_MQTT], {"mqtt": 'protocol = "3.1.1"'}, "windows of more than 16 samples"),
        (MQTT + "\nreceive_maximum = 50", [TO_MQTT], {"mqtt": 'protocol = "3.1.1"'}, "more than 50 samples"),
        (MQTT, [TO_MQTT], {"mqtt": "session_expiry_s = 0"}, "session_expiry_s = 0: what is sent while"),
        (MQTT, [TO_MQTT], {"top": '[spool]\npolicy = "drop_oldest"'}, "the oldest results are dropped"),
        (MQTT, [TO_MQTT], {"top": "[spool]\nmax_age_s = 60.0"}, "max_age_s = 60"),
        (MQTT, [TO_MQTT], {}, 'durability = "power" does not'),
        (SOCKET, [TO_MQTT], {}, "a client has its answer before the sinks have the result"),
        ('type = "file"\npath = "-"', [TO_MQTT], {}, "source (file): it cannot send an input again"),
    ],
)
def test_what_takes_a_piece_of_the_promise_away_is_told(
    tmp_path: Path, source: str, sinks: list[str], options: dict[str, str], said: str
) -> None:
    notes = told(tmp_path, source, *sinks, **options).notes
    assert [note for note in notes if said in note], notes


def test_writing_through_keeps_what_a_socket_cannot_send_again(tmp_path: Path) -> None:
    found = told(tmp_path, SOCKET, TO_MQTT, more="write_through = true", top='[spool]\ndurability = "power"')
    assert found.text.startswith("no result is lost: each is on disk before it is sent")
    assert found.notes == ()


def test_check_prints_it(tmp_path: Path) -> None:
    path = configure(tmp_path, MQTT, TO_MQTT + "\nqos = 0")
    shown = edge_serve("check", "-c", path, "--no-models")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.decode().splitlines()
    assert lines[0].startswith("p: delivery: at least once")
    assert any(line.startswith("p: note: sink (mqtt): qos = 0") for line in lines)
    assert lines[-1].endswith("no mistakes")
    document = json.loads(edge_serve("check", "-c", path, "--no-models", "--json").stdout)
    assert document["delivery"]["p"]["promise"].startswith("at least once")
