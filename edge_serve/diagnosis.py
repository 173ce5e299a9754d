"""What is wrong with a running service, found by looking at its parts: each in a sentence that says what to do.

Nothing here is told by the parts as it happens: whoever asks looks at the state as it is. So a trouble ends by itself, and
no path of a message pays for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_serve import watchdog
from edge_serve.frame import CLOCK_PLAUSIBLE_AFTER
from edge_serve.health import Trouble
from edge_serve.line import Line
from edge_serve.model.delegate import AUTO, DelegateSpec
from edge_serve.runner import SinkRunner, SourceRunner

# A broker's restart or a short loss of the network is nothing that somebody should look into.
AWAY_S = 5.0
# Inputs wait, everything is connected, and nothing was finished for so long.
STALLED_S = 30.0
# A thread is told of before the watchdog loses patience with it.
SILENT_SHARE = 0.5
# With less the next update of the system, or the spool, may find no place: 2 % of the disk, from 64 MiB to 1 GiB, but never
# more than a tenth of a small one.
LEAST_FREE_SHARE = 0.02
LEAST_FREE_BYTES = (64 * 1024 * 1024, 1024 * 1024 * 1024)
SMALL_DISK_SHARE = 0.1
# The spool is told of before it drops anything.
SPOOL_SHARE = 0.8
# How long what the spool has dropped stays a trouble.
DROPS_TOLD_S = 600.0


class Diagnosis:
    """Looks at the lines of a service and at the machine; it remembers counts, so that it sees what does not move."""

    def __init__(
        self,
        state_dir: Path,
        lines: Callable[[], Sequence[Line]],
        spool: Callable[[], Mapping[str, Any] | None] = lambda: None,
        quarantine: Callable[[], Sequence[Trouble]] = list,
    ) -> None:
        """`spool` gives the spool's numbers (items, bytes, dropped and, if known, limit_bytes) and its problem, if any.

        `quarantine` gives what is to be said of inputs that crash.
        """
        self._state_dir = state_dir
        self._lines = lines
        self._spool = spool
        self._quarantine = quarantine
        self._moved: dict[str, tuple[tuple[int, ...], float]] = {}
        self._dropped: tuple[int, float] = (0, -DROPS_TOLD_S)

    def __call__(self) -> list[Trouble]:
        """Give what is wrong now."""
        crashed = list(self._quarantine())
        return [
            *self._of_lines(frozenset(each.key for each in crashed)),
            *crashed,
            *_of_threads(),
            *self._of_spool(),
            *_of_disk(self._state_dir),
            *_of_clock(),
        ]

    def _of_lines(self, known: frozenset[str]) -> Iterator[Trouble]:
        now = time.monotonic()
        for line in self._lines():
            if line.ended:
                continue
            away = [*_away(line.name, "source", line.source, now)] if not line.source.exhausted.is_set() else []
            for number, sink in enumerate(line.sinks):
                away += _away(line.name, f"sink {number + 1}" if len(line.sinks) > 1 else "sink", sink, now)
            yield from away
            if f"{line.name}.demoted" not in known:
                yield from _delegates(line)
            if self._stalled(line, now) and not away:
                yield Trouble(
                    f"{line.name}.stalled",
                    f"{line.name}: inputs wait, but nothing was finished for {STALLED_S:g} s; is the model too slow, or "
                    "does a sink's upstream not answer?",
                )

    def _stalled(self, line: Line, now: float) -> bool:
        counts = line.counters.snapshot()
        done = (counts["out"], sum(counts["errors"].values()), sum(counts["dropped"].values()))
        before, since = self._moved.get(line.name, ((), now))
        if done != before or not line.mailbox.waiting:
            self._moved[line.name] = (done, now)
            return False
        return now - since > STALLED_S

    def _of_spool(self) -> Iterator[Trouble]:
        numbers = self._spool()
        if numbers is None:
            return
        if problem := numbers.get("problem"):
            yield Trouble("spool.problem", str(problem))
        now = time.monotonic()
        total = _number(numbers.get("dropped"))
        if total > self._dropped[0]:
            self._dropped = (total, now)
        if now - self._dropped[1] < DROPS_TOLD_S:
            yield Trouble(
                "spool.dropped",
                "the spool has dropped results; raise its bounds, or bring the upstream back sooner",
            )
        limit = _number(numbers.get("limit_bytes"))
        if limit and _number(numbers.get("bytes")) > SPOOL_SHARE * limit:
            yield Trouble(
                "spool.full",
                f"the spool is more than {SPOOL_SHARE:.0%} full ({limit} bytes); bring the upstream back, or raise its bound",
            )


def _number(value: object) -> int:
    """Give a count as it is, a table of counts by reason as their sum."""
    if isinstance(value, Mapping):
        return sum(_number(each) for each in value.values())
    return int(value) if isinstance(value, (int, float)) else 0


def _away(name: str, which: str, runner: SourceRunner | SinkRunner, now: float) -> Iterator[Trouble]:
    since = runner.backoff.away_since
    if runner.connected.is_set() or since is None or now - since < AWAY_S:
        return
    reason = runner.backoff.reason or "no answer yet"
    yield Trouble(
        f"{name}.{which}", f"{name}: {which} is away: {reason}; it is tried again for as long as it takes", logged=True
    )


def _delegates(line: Line) -> Iterator[Trouble]:
    for trouble in line.pipeline.troubles:
        yield Trouble(f"{line.name}.delegate", f"{line.name}: {trouble}", logged=True)
    wished, runs = line.config.model.delegate, line.pipeline.model.delegate
    if line.pipeline.troubles or wished is None or wished == AUTO:
        return
    label = DelegateSpec.parse(wished).label
    if label not in (runs, "none"):
        why = line.reasons[0] if line.reasons else f"{label} takes no operator of it"
        yield Trouble(f"{line.name}.delegate", f"{line.name}: the model runs on {runs}, not on {label}: {why}")


def _of_threads() -> Iterator[Trouble]:
    for beat in watchdog.silent(SILENT_SHARE):
        yield Trouble(
            f"thread.{beat.name}",
            f"thread {beat.name} gives no sign of life; the watchdog restarts the service after {beat.allowed:g} s, "
            "where there is one",
        )


def _of_disk(folder: Path) -> Iterator[Trouble]:
    while True:
        try:
            disk = os.statvfs(folder)
            break
        except OSError:
            if folder == folder.parent:
                return
            folder = folder.parent  # it is made when it is needed
    free, total = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    low, high = LEAST_FREE_BYTES
    if free < min(max(low, LEAST_FREE_SHARE * total), high, SMALL_DISK_SHARE * total):
        yield Trouble(
            "disk",
            f"the disk of {folder} is nearly full: {free // 2**20} of {total // 2**20} MiB are free; make room",
        )


def _of_clock() -> Iterator[Trouble]:
    if time.time() < CLOCK_PLAUSIBLE_AFTER:
        yield Trouble(
            "clock",
            "the clock was never set, so times of capture are wrong; give this device the network's time (NTP) or a clock",
            degrades=False,
        )
