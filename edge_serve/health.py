"""How the service is: counters of each pipeline, what is wrong now, and the state that follows from that.

One `Health` is asked by all who want to know: the status topic, `edge-serve status`, and systemd's status line.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

# Ages of this many latest results give the percentiles.
AGES_KEPT = 1024
BOARD_FILES = ("/proc/device-tree/model", "/sys/firmware/devicetree/base/model")
MAX_BOARD = 128


class Counters:
    """Counts of one pipeline; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in = 0
        self._out = 0
        self._errors: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._early = 0
        self._retries = 0
        self._ages: deque[float] = deque(maxlen=AGES_KEPT)

    def came_in(self, number: int = 1) -> None:
        """Count frames that a source gave."""
        with self._lock:
            self._in += number

    def went_out(self, age_ms: float) -> None:
        """Count a result that all sinks have, and its age at that moment."""
        with self._lock:
            self._out += 1
            self._ages.append(age_ms)

    def failed(self, code: str) -> None:
        """Count an error result by its code."""
        with self._lock:
            self._errors[code] += 1

    def dropped(self, reason: str, number: int = 1) -> None:
        """Count what was let go without a result."""
        if number:
            with self._lock:
                self._dropped[reason] += number

    def early_settled(self) -> None:
        """Count a sample that was settled before its window was complete."""
        with self._lock:
            self._early += 1

    def retried(self) -> None:
        """Count a result that a sink has to send again."""
        with self._lock:
            self._retries += 1

    def snapshot(self) -> dict[str, Any]:
        """Give all counts and the ages' percentiles, JSON-ready."""
        with self._lock:
            ages = sorted(self._ages)
            return {
                "in": self._in,
                "out": self._out,
                "errors": dict(self._errors),
                "dropped": dict(self._dropped),
                "settled_early": self._early,
                "retried": self._retries,
                "age_ms": {"p50": percentile(ages, 50), "p99": percentile(ages, 99)},
            }


def percentile(ordered: list[float], percent: float) -> float | None:
    """Give the nearest-rank percentile of ascending values, rounded to microseconds; None if there are none."""
    if not ordered:
        return None
    rank = max(1, math.ceil(percent * len(ordered) / 100))
    return round(ordered[rank - 1], 3)


State = Literal["online", "degraded"]


class Trouble(NamedTuple):
    """Something that is wrong now. `key` stays the same while it lasts; `text` says what it is and what to do."""

    key: str
    text: str
    degrades: bool = True
    """Whether results are late, lost or worse than they should be because of it; else it is only worth knowing."""
    logged: bool = False
    """Whether who found it has logged it already."""


class Health:
    """The state of the service, and since when; every method may be called from any thread."""

    def __init__(self, diagnose: Callable[[], Iterable[Trouble]]) -> None:
        self._diagnose = diagnose
        self._lock = threading.Lock()
        self._state: State = "online"
        self._since = time.time()

    def look(self) -> tuple[Trouble, ...]:
        """Find out what is wrong now; the state follows from that."""
        with self._lock:
            troubles = tuple(self._diagnose())
            state: State = "degraded" if any(each.degrades for each in troubles) else "online"
            if state != self._state:
                self._state, self._since = state, time.time()
            return troubles

    @property
    def state(self) -> tuple[State, float]:
        """Give the state as it was found last, and since when, in UTC seconds."""
        with self._lock:
            return self._state, self._since


def board() -> str:
    """Name the board as its device tree does, else the machine's architecture."""
    for file in BOARD_FILES:
        try:
            said = Path(file).read_bytes()[:MAX_BOARD].split(b"\0")[0].decode("utf-8", errors="replace").strip()
        except OSError:
            continue
        if said:
            return said
    return os.uname().machine
