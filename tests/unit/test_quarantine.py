"""Inputs that kill the process are recognised after the restart; innocent ones that were in work by chance are not."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_serve.marks as mark_file
from edge_serve import quarantine
from edge_serve.crash import parse
from edge_serve.errors import QuarantinedError
from edge_serve.marks import CONVICTION, FILE, MAGIC, SIZE, SLOTS, STRIKES, STRIKES_AT
from edge_serve.quarantine import Guard, Quarantine, runtime_folder

# A process with one worker thread for each pipeline that is named: it works through its inputs, and dies as it is told to.
PROCESS = """
import json, os, signal, sys, threading, time
from pathlib import Path
from edge_serve.errors import QuarantinedError
from edge_serve.quarantine import Quarantine

folder, model, wanted, plan = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
marks = Quarantine.open(folder)
told = {"strikes": [[s.pipeline, s.identity, s.points] for s in marks.strikes], "wary": marks.wary, "outcomes": []}
guards = {name: marks.guard(name, model, list(dict.fromkeys([wanted, "none"]))) for name in plan}
told["delegates"] = {name: guard.delegate for name, guard in guards.items()}
in_work = threading.Barrier(len(plan) + 1)

def work(name, guard, steps):
    guard.attach()
    for identity, payload, end in steps:
        try:
            guard.enter(identity, payload.encode())
        except QuarantinedError as error:
            told["outcomes"].append([identity, str(error)])
        else:
            told["outcomes"].append([identity, "run"])
            if end:
                in_work.wait()
                if end == "hang":
                    time.sleep(60)
                os.write(1, json.dumps(told).encode())
                os.abort() if end == "abort" else os.kill(os.getpid(), signal.SIGKILL)
        guard.leave()
    in_work.wait()

threads = [threading.Thread(target=work, args=(name, guards[name], steps), daemon=True) for name, steps in plan.items()]
for thread in threads:
    thread.start()
in_work.wait()
for thread in threads:
    thread.join(0.5)  # one that hangs stays where it is
if "close" in sys.argv[5:]:
    marks.close()
os.write(1, json.dumps(told).encode())
if "killed" in sys.argv[5:]:
    os.kill(os.getpid(), signal.SIGKILL)
if "watchdog" in sys.argv[5:]:
    os.kill(os.getpid(), signal.SIGABRT)
"""


@dataclass
class Runs:
    """Processes one after the other with the same folder of marks, as a service manager starts them."""

    folder: Path
    model: Path
    wanted: str = "xnnpack"

    def __call__(self, *words: str, **plan: list[list[str]]) -> dict[str, Any]:
        """Run one; `plan` gives each pipeline its inputs: id, payload, and how the process ends in the middle of it."""
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, self.folder, self.model, self.wanted, json.dumps(plan), *words],
            capture_output=True,
            timeout=30,
            env={**os.environ, "PYTHONFAULTHANDLER": ""},
        )
        assert done.stdout, done.stderr.decode()
        found: dict[str, Any] = json.loads(done.stdout)
        return {**found, "rc": done.returncode, "log": done.stderr.decode()}


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    (tmp_path / "model.tflite").write_bytes(b"model")
    return Runs(tmp_path / "run", tmp_path / "model.tflite")


@pytest.fixture
def marks(tmp_path: Path) -> Iterator[Quarantine]:
    opened = Quarantine.open(tmp_path / "run")
    yield opened
    opened.close()


def guarded(marks: Quarantine, tmp_path: Path, name: str = "p") -> Guard:
    guard = marks.guard(name, tmp_path / "model.tflite", ("xnnpack", "none"))
    guard.attach()
    return guard


def test_the_first_crash_changes_the_delegate_and_the_second_quarantines(runs: Runs) -> None:
    poison = [["good", "a", ""], ["bad", "poison", "abort"]]
    first = runs(p=poison)
    assert (first["rc"], first["delegates"]) == (-signal.SIGABRT, {"p": "xnnpack"})
    second = runs(p=poison)
    assert second["strikes"] == [["p", "bad", 2]]
    assert (second["rc"], second["delegates"]) == (-signal.SIGABRT, {"p": "none"})
    third = runs("close", p=[*poison, ["next", "b", ""]])
    assert third["rc"] == 0
    assert [outcome[0] for outcome in third["outcomes"]] == ["good", "bad", "next"]
    assert third["outcomes"][0][1] == third["outcomes"][2][1] == "run"
    assert third["outcomes"][1][1] == (
        "this input is not run: the process died each time that it was, last on none as frame bad"
    )
    # The payload is to blame, not the delegate: it did not live on the other one.
    assert third["delegates"] == {"p": "xnnpack"}


def test_the_log_says_what_the_last_process_died_of_and_where(runs: Runs) -> None:
    runs(p=[["bad", "poison", "abort"]])
    log = runs(p=[["other", "b", ""]])["log"]
    assert "the last process crashed: Aborted" in log
    assert 'File "<string>"' in log
    assert "frame bad (6 bytes) was in work on xnnpack; it is tried once more" in log
    assert "p: runs on none instead of xnnpack, on which an input crashed" in log


def test_a_quarantined_payload_is_known_again_under_any_id_and_others_are_not(runs: Runs) -> None:
    for _ in range(2):
        runs(p=[["bad", "poison", "abort"]])
    found = runs("close", p=[["new-id", "poison", ""], ["again", "poison", ""], ["bad", "another", ""]])
    assert [said == "run" for _, said in found["outcomes"]] == [False, False, True]
    assert found["log"].count("is quarantined; it gets an error result") == 1


def test_deaths_without_a_trace_take_three_in_a_row(runs: Runs) -> None:
    poison = [["bad", "poison", "kill"]]
    assert runs(p=poison)["delegates"] == {"p": "xnnpack"}
    assert runs(p=poison)["delegates"] == {"p": "xnnpack"}, "one kill is nobody's fault"
    assert runs(p=poison)["delegates"] == {"p": "none"}
    assert runs("close", p=poison)["outcomes"][0][1] != "run"


def test_an_input_that_runs_to_its_end_is_acquitted(runs: Runs) -> None:
    bad, good = [["x", "payload", "kill"]], [["x", "payload", ""]]
    runs(p=bad)
    runs(p=bad)
    assert runs("killed", p=good)["strikes"] == [["p", "x", 2]]
    assert runs("close", p=good)["strikes"] == []


def test_only_deaths_in_a_row_count(runs: Runs) -> None:
    for _ in range(5):
        runs(p=[["x", "payload", "kill"]])
        runs("killed", p=[["other", "b", ""]])  # between inputs: nobody's mark
    assert runs("close", p=[["x", "payload", ""]])["strikes"] == []


def test_a_thousand_kills_at_different_inputs_quarantine_none(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for number in range(1000):
        marks = Quarantine.open(folder)
        guard = guarded(marks, tmp_path)
        assert guard.delegate == "xnnpack"
        for redelivered in range(max(0, number - 3), number):
            guard.enter(str(redelivered), b"%d" % redelivered)
            guard.leave()
        guard.enter(str(number), b"%d" % number)
        die(marks)
    marks = Quarantine.open(folder)
    assert [strike.points for strike in marks.strikes] == [1]
    assert marks.troubles() == []
    marks.close()


def die(marks: Quarantine) -> None:
    """Let go of the file as a killed process does: the kernel takes the lock back, the marks stay."""
    assert marks._map is not None
    assert marks._crash is not None
    os.close(marks._fd)
    marks._crash.close()
    marks._map.close()


def test_what_crashed_on_one_delegate_and_runs_on_the_next_keeps_the_pipeline_there(runs: Runs) -> None:
    runs(p=[["bad", "poison", "abort"]])
    assert runs("killed", p=[["bad", "poison", ""]])["delegates"] == {"p": "none"}
    later = runs(p=[["bad", "poison", ""], ["x", "b", "kill"]])
    assert later["delegates"] == {"p": "none"}
    assert later["wary"] is False, "nobody is suspected any more"
    after = runs("close", p=[["bad", "poison", ""]])
    assert after["outcomes"] == [["bad", "run"]], "acquitted: a kill at another input is not added to it"
    assert after["delegates"] == {"p": "none"}


def test_a_pipeline_without_another_delegate_still_quarantines(runs: Runs) -> None:
    runs.wanted = "none"
    for _ in range(2):
        assert runs(p=[["bad", "poison", "abort"]])["delegates"] == {"p": "none"}
    assert runs("close", p=[["bad", "poison", ""]])["outcomes"][0][1] != "run"


def test_the_innocent_input_of_another_pipeline_is_not_struck_with_the_guilty_one(runs: Runs) -> None:
    """The thread that got the signal is known."""
    plan: dict[str, list[list[str]]] = {"guilty": [["bad", "poison", "abort"]], "slow": [["good", "long work", "hang"]]}
    runs(**plan)
    found = runs("close", guilty=[], slow=[["good", "long work", ""]])
    assert found["strikes"] == [["guilty", "bad", 2]]
    assert found["delegates"] == {"guilty": "none", "slow": "xnnpack"}


def test_nobody_is_struck_for_a_crash_of_a_thread_that_works_on_no_input(runs: Runs) -> None:
    runs(p=[["good", "payload", ""]])
    trace = "Fatal Python error: Segmentation fault\n\nCurrent thread 0x0000000000000001 (most recent call first):\n"
    runs(p=[["good", "payload", "kill"]])
    (runs.folder / "crash.txt").write_text(trace)
    assert runs("close", p=[["good", "payload", ""]])["strikes"] == []


def test_a_watchdogs_abort_counts_like_a_kill(runs: Runs) -> None:
    """It comes to the main thread: there is no proof of what hung, or that anything did."""
    runs(p=[["slow", "payload", "kill"]])
    trace = "Fatal Python error: Aborted\n\nCurrent thread 0x0000000000000001 [main] (most recent call first):\n"
    (runs.folder / "crash.txt").write_text(trace)
    assert runs("close", p=[["x", "b", ""]])["strikes"] == [["p", "slow", 1]]


def test_workers_take_turns_while_somebody_is_suspected(tmp_path: Path, marks: Quarantine) -> None:
    first, second = guarded(marks, tmp_path, "a"), guarded(marks, tmp_path, "b")
    marks.wary = True
    first.enter("1", b"1")
    assert not marks._turn.acquire(blocking=False)
    first.leave()
    second.enter("2", b"2")
    second.enter("2", b"its window")  # a second mark within one turn
    second.leave()
    assert marks._turn.acquire(blocking=False)


def test_an_orderly_end_leaves_no_marks(runs: Runs) -> None:
    runs("close", p=[["slow", "payload", "hang"]])
    assert runs("close", p=[])["strikes"] == []


def test_nothing_is_left_behind_where_there_is_nothing_to_remember(tmp_path: Path) -> None:
    own, given = tmp_path / f"{quarantine.PREFIX}0-a", tmp_path / "given"
    for folder in (own, given):
        marks = Quarantine.open(folder)
        guarded(marks, tmp_path).enter("x", b"payload")
        marks.close()
    assert [path.name for path in tmp_path.iterdir()] == ["given"], "only what we made ourselves goes"
    assert list(given.iterdir()) == []


def test_another_version_of_the_model_gets_a_trial_of_its_own(runs: Runs) -> None:
    for _ in range(2):
        runs(p=[["bad", "poison", "abort"]])
    runs.model.write_bytes(b"a newer model")
    found = runs("close", p=[["bad", "poison", ""]])
    assert (found["outcomes"], found["delegates"]) == ([["bad", "run"]], {"p": "xnnpack"})


def test_payloads_that_only_look_alike_are_told_apart_before_anybody_is_convicted(tmp_path: Path) -> None:
    """A long payload's length, beginning and end are all that the mark of a first death holds."""
    edge = bytes(1000)
    poison, twin = edge + b"poison" + edge, edge + b"harmless"[:6] + edge
    folder = tmp_path / "run"
    for _ in range(3):
        marks = Quarantine.open(folder)
        guarded(marks, tmp_path).enter("bad", poison)
        die(marks)
    marks = Quarantine.open(folder)
    guard = guarded(marks, tmp_path)
    guard.enter("twin", twin)
    guard.leave()
    with pytest.raises(QuarantinedError):
        guard.enter("bad", poison)
    guard.leave()
    (trouble,) = marks.troubles()
    assert trouble.text.startswith("p: input bad (2006 bytes) is quarantined")
    assert trouble.degrades is False
    marks.close()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        bytearray(b"bytes"),
        memoryview(b"a view"),
        np.arange(6, dtype=np.float32),
        np.zeros((0, 3)),
        np.arange(12).reshape(3, 4)[:, ::2],
        np.array(1.5),
        np.zeros((480, 640, 3), np.uint8),
    ],
    ids=str,
)
def test_every_kind_of_payload_can_be_marked_and_is_known_again(tmp_path: Path, payload: Any) -> None:
    for _ in range(3):
        marks = Quarantine.open(tmp_path / "run")
        guarded(marks, tmp_path).enter("caf\udce9 " * 40, payload)
        die(marks)
    marks = Quarantine.open(tmp_path / "run")
    with pytest.raises(QuarantinedError):
        guarded(marks, tmp_path).enter("x", payload)
    marks.close()


def test_strikes_grow_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        marks = Quarantine.open(tmp_path / "run")
        guarded(marks, tmp_path).enter("bad", b"poison")
        die(marks)
    marks = Quarantine.open(tmp_path / "run")
    guard = guarded(marks, tmp_path)
    with pytest.raises(QuarantinedError):
        guard.enter("bad", b"poison")
    monkeypatch.setattr(quarantine, "KEPT_S", 0.0)
    guard.enter("bad", b"poison")
    guard.leave()
    assert marks.troubles() == []
    marks.close()


def test_a_suspicion_without_proof_lapses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = Quarantine.open(tmp_path / "run")
    guarded(marks, tmp_path).enter("x", b"payload")
    die(marks)
    monkeypatch.setattr(quarantine, "LAPSE_S", -1.0)
    marks = Quarantine.open(tmp_path / "run")
    assert [strike.points for strike in marks.strikes] == [1]
    assert marks.wary is False
    guard = guarded(marks, tmp_path)
    guard.enter("x", b"payload")
    assert marks.strikes == []
    die(marks)


def test_the_oldest_strike_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "EXPLAINED", CONVICTION)
    monkeypatch.setattr(quarantine, "UNEXPLAINED", CONVICTION)
    for number in range(STRIKES + 3):
        marks = Quarantine.open(tmp_path / "run")
        guarded(marks, tmp_path).enter(f"bad-{number}", b"%d" % number)
        die(marks)
    marks = Quarantine.open(tmp_path / "run")
    assert len(marks.strikes) == STRIKES
    assert {strike.identity for strike in marks.strikes} == {f"bad-{n}" for n in range(3, STRIKES + 3)}
    marks.close()


# The file.


@pytest.mark.parametrize("damage", ["cut", "longer", "foreign", "noise", "empty"])
def test_a_torn_or_foreign_file_is_begun_anew(tmp_path: Path, damage: str) -> None:
    for _ in range(3):
        marks = Quarantine.open(tmp_path / "run")
        guarded(marks, tmp_path).enter("bad", b"poison")
        die(marks)
    file = tmp_path / "run" / FILE
    whole = file.read_bytes()
    file.write_bytes(
        {
            "cut": whole[:1000],
            "longer": whole + b"x",
            "foreign": b"SQLite format 3\0" + whole[16:],
            "noise": np.random.default_rng(1).bytes(len(whole)),
            "empty": b"",
        }[damage]
    )
    marks = Quarantine.open(tmp_path / "run")
    assert marks.strikes == []
    guarded(marks, tmp_path).enter("bad", b"poison")
    marks.close()


def test_a_damaged_strike_is_no_strike(tmp_path: Path) -> None:
    for _ in range(3):
        marks = Quarantine.open(tmp_path / "run")
        guarded(marks, tmp_path).enter("bad", b"poison")
        die(marks)
    die(Quarantine.open(tmp_path / "run"))
    file = tmp_path / "run" / FILE
    data = bytearray(file.read_bytes())
    data[STRIKES_AT + 50] ^= 1
    file.write_bytes(data)
    marks = Quarantine.open(tmp_path / "run")
    assert marks.strikes == []
    marks.close()


def test_marks_full_of_noise_lead_to_no_harm(tmp_path: Path) -> None:
    die(Quarantine.open(tmp_path / "run"))
    file = tmp_path / "run" / FILE
    noise = np.random.default_rng(2).integers(0, 3, SIZE, np.uint8).tobytes()
    file.write_bytes(file.read_bytes()[:STRIKES_AT] + noise[STRIKES_AT:])
    marks = Quarantine.open(tmp_path / "run")
    guard = guarded(marks, tmp_path)
    guard.enter("x", b"payload")
    guard.leave()
    marks.close()


def test_another_boots_file_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = Quarantine.open(tmp_path / "run")
    guarded(marks, tmp_path).enter("x", b"payload")
    die(marks)
    (tmp_path / "boot_id").write_text("11111111-2222-3333-4444-555555555555\n")
    monkeypatch.setattr(mark_file, "BOOT_ID", tmp_path / "boot_id")
    marks = Quarantine.open(tmp_path / "run")
    assert marks.strikes == []
    marks.close()


def test_a_living_process_keeps_its_marks_to_itself(
    tmp_path: Path, marks: Quarantine, caplog: pytest.LogCaptureFixture
) -> None:
    guarded(marks, tmp_path).enter("x", b"payload")
    with caplog.at_level(logging.WARNING):
        second = Quarantine.open(tmp_path / "run")
    assert "another process of this state directory is running" in caplog.text
    guard = guarded(second, tmp_path)
    guard.enter("y", b"other")  # unmarked, and otherwise as usual
    guard.leave()
    guard.close()
    second.close()
    assert len(marks._take_marks()) == 1


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_marks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.WARNING):
        for name in ("file", "file/below", "link"):
            marks = Quarantine.open(tmp_path / name)
            guarded(marks, tmp_path).enter("x", b"payload")
            marks.close()
    assert caplog.text.count("inputs that crash cannot be recognised") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what belongs to somebody else")
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """In /dev/shm anybody may take a name first, to read marks or to have a link followed."""
    trap, place = tmp_path / "trap", tmp_path / "place"
    trap.mkdir()
    if kind == "link":
        place.symlink_to(trap)
        os.chown(place, 12345, 12345, follow_symlinks=False)
    else:
        place = trap
        os.chown(place, 12345, 12345)
    with caplog.at_level(logging.WARNING):
        Quarantine.open(place).close()
    assert "the folder belongs to somebody else" in caplog.text
    assert list(trap.iterdir()) == []


def test_a_link_of_our_own_is_followed(tmp_path: Path) -> None:
    """A kept runtime directory of a dynamic user is a link, made by systemd."""
    (tmp_path / "private").mkdir()
    (tmp_path / "place").symlink_to(tmp_path / "private")
    marks = Quarantine.open(tmp_path / "place")
    assert (tmp_path / "private" / FILE).exists()
    marks.close()


def test_only_the_owner_can_read_the_marks(tmp_path: Path, marks: Quarantine) -> None:
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "run" / FILE).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "run" / FILE).read_bytes().startswith(MAGIC)


def test_more_workers_than_slots_work_unmarked_and_slots_come_back(tmp_path: Path, marks: Quarantine) -> None:
    guards = [guarded(marks, tmp_path, f"p{number}") for number in range(SLOTS + 2)]
    for number, guard in enumerate(guards):
        guard.enter(str(number), b"payload")
    assert [mark.pipeline for mark in marks._take_marks()].count("p1") == 1
    for guard in guards:
        guard.leave()
        guard.close()
    assert len(marks._free) == SLOTS


def test_marks_lie_in_memory_where_the_system_has_a_place_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path / 'systemd'}:{tmp_path / 'second'}")
    assert runtime_folder(state) == tmp_path / "systemd"
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    chosen = runtime_folder(state)
    assert chosen.parent == tmp_path
    assert chosen != runtime_folder(tmp_path / "another"), "each state directory has a folder of its own"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    monkeypatch.setattr(quarantine, "SHARED_MEMORY", tmp_path)
    assert runtime_folder(state).parent == tmp_path
    monkeypatch.setattr(quarantine, "SHARED_MEMORY", tmp_path / "missing")
    assert runtime_folder(state) == state


# The trace.


def test_a_trace_says_the_reason_and_the_thread() -> None:
    trace = "Fatal Python error: Floating point exception\n\nCurrent thread 0x00007f1e3b230b80 [w] (most recent call first):\n"
    crash = parse(trace)
    assert crash is not None
    assert (crash.reason, crash.thread, crash.aborted) == ("Floating point exception", 0x7F1E3B230B80, False)
    elsewhere = parse("Fatal Python error: Segmentation fault\n\nThread 0x00007f1e3b230b80 (most recent call first):\n")
    assert elsewhere is not None
    assert elsewhere.thread is None
    assert parse("") is None
    assert parse("nothing of the kind") is None
