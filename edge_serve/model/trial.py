"""Tries a model on delegates, in a child process with time limits: what opens, what is right, and how fast it is.

A delegate may crash or hang when a model is loaded: that costs this candidate, and the others go on in a new child. The child
(trial_child.py) takes one request on its standard input and answers with JSON lines; it ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from edge_serve.errors import StoppedError, UnavailableError
from edge_serve.model.delegate import CPU, Candidate

# From one line of the child to its next: it loads one model, or runs it for a while. A GPU compiles shaders for 20 to 25 s.
CANDIDATE_LIMIT_S = 60.0
# What trials on the CPU take at most, for a model of some milliseconds …
TOTAL_S = 8.0
# … and for any other: it is measured for as long as so many of its runs take, because it has the most to gain.
LONG_RUNS = 40
MOST_TOTAL_S = 60.0
LINE_BYTES = 256 * 1024
STDERR_BYTES = 400
POLL_S = 0.2
# A child that goes on after another one's death gets at least so long, to time what was right.
LEAST_S = 0.5


@dataclass(frozen=True, slots=True)
class Golden:
    """What a variant shall give: where its samples lie, and how far each output may be off. No file: random inputs are taken."""

    file: Path | None = None
    variant: str = ""
    tolerance: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one candidate."""

    candidate: Candidate
    reason: str = ""
    """Why it is not to be used; empty if it is right."""
    latency_s: float | None = None
    """The median of one run; of those that were soon seen to be slow, of a few runs."""
    percentiles: dict[str, float] = field(default_factory=dict)
    """p50, p90 and p99 in seconds."""
    runs: int = 0
    taken: int = 0
    """Operators that the delegate took …"""
    total: int = 0
    """… of so many."""
    claimed: dict[str, int] = field(default_factory=dict)
    memory_bytes: int = 0
    """By how much the child's resident memory grew."""
    crashed: bool = False
    away: bool = False
    """Whether its hardware is not there, or another process has it: it may be there later."""

    @property
    def right(self) -> bool:
        """Say whether it opened and gave right results."""
        return not self.reason


@dataclass(frozen=True, slots=True)
class Plan:
    """How candidates are tried."""

    runtime: str
    signature: str | None = None
    total_s: float = TOTAL_S
    """After so long on the CPU nothing further is begun; accelerators do not count, they are few. A model whose run takes long gets
    more, see LONG_RUNS."""
    seconds: float | None = None
    """Run each candidate for so long, by itself (a benchmark); None: find the fastest in rounds of all that are near it."""
    limit_s: float = CANDIDATE_LIMIT_S


def try_all(
    candidates: Sequence[Candidate],
    golden: dict[str, Golden],
    plan: Plan,
    *,
    progress: Callable[[Candidate], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[Trial]:
    """Try candidates; gives a trial of each, in their order. `golden` is by variant.

    StoppedError if `stop` said so meanwhile.
    """
    late = "was not tried: the time for trials was over"
    found = [Trial(candidate, late) for candidate in candidates]
    refused: set[int] = set()
    deadline = time.monotonic() + plan.total_s
    while len(refused) < len(candidates):
        left = [number for number in range(len(candidates)) if number not in refused]
        child = _Child(candidates, golden, replace(plan, total_s=max(LEAST_S, deadline - time.monotonic())), left)
        at: int | None = None
        begun = time.monotonic()
        try:
            for line in child.lines(stop):
                if "at" in line:
                    at, begun = int(line["at"]), time.monotonic()
                    if progress is not None:
                        progress(candidates[at])
                    continue
                number = int(line["number"])
                found[number] = _trial(candidates[number], line)
                if found[number].reason:
                    refused.add(number)
            break
        except _DiedError as death:
            if at is None:
                raise UnavailableError(f"models cannot be tried: the process that does it {death}") from death
            if candidates[at].spec.name not in CPU:
                deadline += time.monotonic() - begun  # an accelerator that hangs takes nothing away from the others
            found[at] = Trial(candidates[at], str(death), crashed=death.crashed)
            refused.add(at)  # the others go on in a new child, those that were right as well: they are timed at the end
        finally:
            child.end()
    return found


def _trial(candidate: Candidate, line: dict[str, Any]) -> Trial:
    return Trial(
        candidate,
        str(line.get("reason", "")),
        line.get("latency_s"),
        dict(line.get("percentiles", {})),
        int(line.get("runs", 0)),
        int(line.get("taken", 0)),
        int(line.get("total", 0)),
        dict(line.get("claimed", {})),
        int(line.get("memory_bytes", 0)),
        away=bool(line.get("away", False)),
    )


class _DiedError(Exception):
    """The child died, or did not answer; its text says how."""

    def __init__(self, text: str, *, crashed: bool) -> None:
        super().__init__(text)
        self.crashed = crashed


class _Child:
    """One child process and what it says."""

    def __init__(
        self, candidates: Sequence[Candidate], golden: dict[str, Golden], plan: Plan, numbers: Sequence[int]
    ) -> None:
        request = {
            "runtime": plan.runtime,
            "signature": plan.signature,
            "total_s": plan.total_s,
            "seconds": plan.seconds,
            "candidates": [
                {
                    "number": number,
                    "variant": candidates[number].variant,
                    "file": str(candidates[number].file),
                    "threads": candidates[number].threads,
                    "delegate": {
                        "name": candidates[number].spec.name,
                        "index": candidates[number].spec.index,
                        "library": candidates[number].spec.library,
                        "options": dict(candidates[number].spec.options),
                    },
                }
                for number in numbers
            ],
            "golden": {
                name: {
                    "file": str(each.file) if each.file else None,
                    "variant": each.variant,
                    "tolerance": each.tolerance,
                }
                for name, each in golden.items()
            },
        }
        self._limit_s = plan.limit_s
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as the child
        # A session of its own: Ctrl-C is for the parent, which ends it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edge_serve.model.trial_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def lines(self, stop: Callable[[], bool] | None) -> Iterator[dict[str, Any]]:
        """Give what it says until it is done; _DiedError if it ends before, or is silent for longer than the limit."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        waiting = b""
        heard = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while True:
                if stop is not None and stop():
                    raise StoppedError("the service was stopped while its models were tried")
                if time.monotonic() - heard > self._limit_s:
                    raise _DiedError(f"did not answer within {self._limit_s:g} s", crashed=False)
                if not selector.select(POLL_S):
                    continue
                data = os.read(fd, LINE_BYTES)
                heard = time.monotonic()
                if not data:
                    raise self._death()
                waiting += data
                *whole, waiting = waiting.split(b"\n")
                for line in whole:
                    document = json.loads(line)
                    if document.get("done"):
                        return
                    yield document
                if len(waiting) > LINE_BYTES:
                    raise _DiedError("what it says is no answer", crashed=False)

    def _death(self) -> _DiedError:
        code = self._process.wait()
        said = _last_words(self._stderr)
        if code < 0:
            return _DiedError(f"crashes the process ({signal.Signals(-code).name}){said}", crashed=True)
        return _DiedError(f"ends the process with {code}{said}", crashed=True)

    def end(self) -> None:
        """Kill it and let go of everything."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue  # what it was to read is of no use any more


def _last_words(stream: IO[bytes]) -> str:
    """Give the last line of a dead process's standard error, if it is short enough to help."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - STDERR_BYTES))
    lines = stream.read().decode("utf-8", "replace").strip().splitlines()
    return f": {lines[-1]}" if lines else ""
