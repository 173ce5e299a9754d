"""Children that crash, hang, eat memory, fail or print: what the converter makes of each."""

from __future__ import annotations

import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from edge_serve.errors import UsageError
from edge_serve_converters.child import Child, ChildCrashedError, resident_bytes
from edge_serve_converters.errors import ConversionError

MODULE = """
import os, signal, sys, time
from edge_serve.errors import ModelError
from edge_serve_converters import channel
from edge_serve_converters.errors import ConversionError

def echo(command, report):
    report("work", 1, 2)
    print("noise on standard output")
    print("noise on standard error", file=sys.stderr)
    return {"said": command["word"]}

def crash(command, report):
    print("about to crash", file=sys.stderr, flush=True)
    os.kill(os.getpid(), getattr(signal, command["signal"]))
    time.sleep(60)

def leave(command, report):
    os._exit(7)

def hang(command, report):
    time.sleep(60)

def eat(command, report):
    held = bytearray(300 * 2**20)
    held[:] = b"x" * len(held)
    time.sleep(60)

def wrong(command, report):
    raise ModelError("the model is wrong")

def refuse(command, report):
    raise ConversionError("the operator is unknown")

def fail(command, report):
    raise KeyError("something unforeseen")

channel.serve({name: value for name, value in list(globals().items()) if callable(value)})
"""

Start = Callable[..., AbstractContextManager[Child]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start children of a module made for these tests."""
    (tmp_path / "stand_in.py").write_text(textwrap.dedent(MODULE), encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    @contextmanager
    def starting(timeout_s: float = 30.0, memory_limit_mb: int | None = None) -> Iterator[Child]:
        with Child("stand_in", tmp_path, timeout_s=timeout_s, memory_limit_mb=memory_limit_mb, verbose=False) as child:
            yield child

    return starting


def test_answers_come_back_and_prints_stay_in_the_log(start: Start) -> None:
    stages = []
    with start() as child:
        for word in ("one", "two"):
            assert child.call("work", {"do": "echo", "word": word}, lambda *stage: stages.append(stage)) == {
                "said": word
            }
        assert "noise on standard output" in child.log_tail()
        assert "noise on standard error" in child.log_tail()
    assert stages == [("work", 1, 2)] * 2


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT"])
def test_a_crash_is_named_by_its_signal(start: Start, name: str) -> None:
    with (
        start() as child,
        pytest.raises(ChildCrashedError, match=f"int8: the child process was killed by {name}") as caught,
    ):
        child.call("int8", {"do": "crash", "signal": name})
    assert caught.value.signal is signal.Signals[name]
    assert "about to crash" in caught.value.log


def test_being_killed_hints_at_memory(start: Start) -> None:
    with start() as child, pytest.raises(ChildCrashedError, match="SIGKILL, by the system if memory ran out"):
        child.call("int8", {"do": "crash", "signal": "SIGKILL"})


def test_leaving_without_an_answer_is_a_crash(start: Start) -> None:
    with start() as child:
        with pytest.raises(ChildCrashedError, match="ended with status 7"):
            child.call("int8", {"do": "leave"})
        with pytest.raises(ChildCrashedError, match="ended with status 7"):
            child.call("int8", {"do": "echo", "word": "still there?"})


def test_a_hang_ends_with_the_time_limit(start: Start) -> None:
    begun = time.monotonic()
    with start(timeout_s=1.0) as child, pytest.raises(ConversionError, match="took longer than 1 s; raise --timeout"):
        child.call("int8", {"do": "hang"})
    assert time.monotonic() - begun < 10


def test_too_much_memory_ends_the_child(start: Start) -> None:
    with start(memory_limit_mb=150) as child:
        with pytest.raises(ConversionError, match="the limit is 150 MiB; raise --memory-limit"):
            child.call("int8", {"do": "eat"})
        assert resident_bytes(child.pid) == 0


def test_errors_keep_their_kind(start: Start) -> None:
    with start() as child:
        with pytest.raises(UsageError, match="model: the model is wrong"):
            child.call("model", {"do": "wrong"})
        with pytest.raises(ConversionError, match="int8: the operator is unknown") as explained:
            child.call("int8", {"do": "refuse"})
        with pytest.raises(ConversionError, match="KeyError: 'something unforeseen'") as unforeseen:
            child.call("int8", {"do": "fail"})
    assert explained.value.log == ""
    assert "Traceback" in unforeseen.value.log


def test_a_child_ends_when_its_parent_lets_go(start: Start) -> None:
    with start() as child:
        child.call("work", {"do": "echo", "word": "ready"})
        child.hang_up()
        deadline = time.monotonic() + 10
        while resident_bytes(child.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
