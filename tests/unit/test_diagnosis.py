"""What is found wrong with a machine and a spool, what follows from it for the state, and how it is shown."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edge_serve import diagnosis
from edge_serve.commands.status import duration, render
from edge_serve.diagnosis import Diagnosis
from edge_serve.health import Health, Trouble


def keys(folder: Path, numbers: Mapping[str, Any] | None = None) -> list[str]:
    """Diagnose a service without pipelines; gives the keys of what is wrong."""
    return [each.key for each in Diagnosis(folder, list, lambda: numbers)() if not each.key.startswith("thread.")]


def test_a_sound_machine_has_no_trouble(tmp_path: Path) -> None:
    assert keys(tmp_path) == []


# The disk.


def test_a_disk_that_is_nearly_full_is_told_with_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "LEAST_FREE_BYTES", (10**18, 10**18))
    monkeypatch.setattr(diagnosis, "SMALL_DISK_SHARE", 1.1)
    (trouble,) = [each for each in Diagnosis(tmp_path, list)() if each.key == "disk"]
    assert trouble.degrades
    assert f"the disk of {tmp_path} is nearly full" in trouble.text
    assert "make room" in trouble.text


def test_a_small_disk_is_full_only_in_its_last_tenth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "LEAST_FREE_BYTES", (10**18, 10**18))
    monkeypatch.setattr(diagnosis, "SMALL_DISK_SHARE", 0.0)
    assert keys(tmp_path) == []


def test_a_folder_that_is_not_made_yet_is_looked_for_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert keys(tmp_path / "not" / "yet") == []
    monkeypatch.setattr(diagnosis, "LEAST_FREE_BYTES", (10**18, 10**18))
    monkeypatch.setattr(diagnosis, "SMALL_DISK_SHARE", 1.1)
    assert keys(tmp_path / "not" / "yet") == ["disk"]


# The clock.


def test_a_clock_that_was_never_set_is_worth_knowing_but_degrades_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "CLOCK_PLAUSIBLE_AFTER", time.time() + 3600)
    (trouble,) = [each for each in Diagnosis(tmp_path, list)() if each.key == "clock"]
    assert not trouble.degrades
    assert "NTP" in trouble.text


# The spool.


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"items": 0, "bytes": 0, "dropped": 0}, []),
        ({"items": 5, "bytes": 799, "dropped": {}, "limit_bytes": 1000}, []),
        ({"items": 5, "bytes": 801, "dropped": {}, "limit_bytes": 1000}, ["spool.full"]),
        ({"items": 5, "bytes": 5, "dropped": {"spool_full": 2, "spool_expired": 1}}, ["spool.dropped"]),
        ({"items": 5, "bytes": 5, "dropped": 3}, ["spool.dropped"]),
        ({"items": 0, "bytes": 0, "dropped": 0, "problem": "no room"}, ["spool.problem"]),
        ({"items": 0, "bytes": 0, "dropped": 0, "problem": None}, []),
    ],
)
def test_a_spool_is_told_of_when_it_fills_drops_or_fails(
    tmp_path: Path, numbers: dict[str, Any], expected: list[str]
) -> None:
    assert keys(tmp_path, numbers) == expected


def test_drops_are_told_for_a_while_and_again_when_there_are_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "DROPS_TOLD_S", 0.05)
    numbers = {"dropped": {"spool_full": 1}}
    look = Diagnosis(tmp_path, list, lambda: numbers)
    assert "spool.dropped" in [each.key for each in look()]
    time.sleep(0.06)
    assert "spool.dropped" not in [each.key for each in look()]
    numbers["dropped"]["spool_full"] = 2
    assert "spool.dropped" in [each.key for each in look()]


# The state.


def test_the_state_follows_from_the_troubles_and_keeps_its_time() -> None:
    found: list[Trouble] = []
    health = Health(lambda: found)
    health.look()
    began = health.state
    assert began[0] == "online"
    found.append(Trouble("clock", "the clock was never set", degrades=False))
    assert [each.key for each in health.look()] == ["clock"]
    assert health.state == began, "worth knowing, no more"
    found.append(Trouble("disk", "full"))
    health.look()
    degraded = health.state
    assert degraded[0] == "degraded"
    assert degraded[1] >= began[1]
    health.look()
    assert health.state == degraded, "since then, not since the last look"
    found.clear()
    health.look()
    assert health.state[0] == "online"
    assert health.state[1] >= degraded[1]


# What a person sees.


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min 0 s"), (3725, "1 h 2 min"), (86400, "1 d 0 h"), (200000, "2 d 7 h")],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_table_has_a_row_for_each_pipeline_and_the_problems_below() -> None:
    numbers = {
        "model": "bearing", "version": 3, "variant": "int8", "delegate": "xnnpack", "connected": False,
        "in": 10, "out": 7, "errors": {"bad_input": 1}, "dropped": {"latest": 1, "rejected": 2},
        "age_ms": {"p50": 1.25, "p99": None},
    }  # fmt: skip
    document = {
        "device": "press-3", "state": "degraded", "since": "2026-11-22T15:04:05Z", "version": "1", "uptime_s": 61.0,
        "runtime": "litert", "board": "Raspberry Pi 4", "pipelines": {"vibration": numbers},
        "spool": {"items": 4, "bytes": 4000, "oldest_s": 3, "dropped": 0}, "problems": ["the sink is away; wait"],
    }  # fmt: skip
    text = render(document, 77)
    assert text.splitlines()[:2] == [
        "press-3: degraded since 2026-11-22T15:04:05Z",
        "edge-serve 1 (process 77), up 1 min 1 s, litert on Raspberry Pi 4",
    ]
    header, row = text.splitlines()[3:5]
    assert header.index("delegate") == row.index("xnnpack")
    assert row.split() == [
        "vibration", "bearing", "3", "(int8)", "xnnpack", "no", "10", "7", "1", "(bad_input)",
        "3", "(1", "latest,", "2", "rejected)", "1.2", "-",
    ]  # fmt: skip
    assert "spool: 4 results, 4000 bytes; dropped: 0" in text
    assert text.endswith("\n! the sink is away; wait")
