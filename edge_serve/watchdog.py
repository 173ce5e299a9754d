"""Signs of life of the service's threads: each long-lived thread ticks at every bounded wait, and who is silent is found.

A thread begins a `Heartbeat` with the longest silence that is normal for it, and ticks whenever it is sure to go on: after
each frame, each idle wait, each wait for room. `silent()` gives those that have overstepped their time, `stack()` where they
stand. Both the status and systemd's watchdog ask this: the watchdog is told "alive" only while every thread is.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# What a thread may take between two ticks unless it says otherwise: its waits are a second or less, and a board that swaps
# or a disk that stalls makes tens of them.
SILENCE_S = 30.0
# An attempt to connect resolves a name, tries its addresses, shakes hands and subscribes; each part has its own time-out.
CONNECT_SILENCE_S = 900.0
# Loading a model, or measuring how it runs best, on the slowest of boards.
LOAD_SILENCE_S = 900.0
# Who looks comes by every second or less. After a longer pause the whole process stood still (SIGSTOP, a suspended
# machine), and nobody can be blamed for it.
PAUSE_S = 5.0


class Heartbeat:
    """The sign of life of one thread, which ticks; others only read."""

    __slots__ = ("_allowed", "_last", "_name", "_pardoned", "thread")

    def __init__(self, name: str, allowed: float) -> None:
        self._name = name
        self.thread = threading.current_thread()
        self._allowed = allowed
        self._pardoned = 0.0
        self._last = time.monotonic()

    @property
    def name(self) -> str:
        """Give the name that it was given, else its thread's."""
        return self._name or self.thread.name

    def tick(self) -> None:
        """Say that the thread goes on. Costs a call and the storing of one number."""
        self._last = time.monotonic()

    @contextmanager
    def allowing(self, seconds: float) -> Iterator[None]:
        """Allow a longer silence for what may take longer: connecting, loading."""
        usual, self._allowed = self._allowed, max(seconds, self._allowed)
        self.tick()
        try:
            yield
        finally:
            # In this order: with the shorter time and the older tick it would look silent for a moment.
            self.tick()
            self._allowed = usual

    @property
    def allowed(self) -> float:
        """Seconds of silence that are normal now."""
        return self._allowed

    def pardon(self) -> None:
        """Count silence from this moment on: the whole process stood still."""
        self._pardoned = time.monotonic()

    def silence(self) -> float:
        """Give the seconds since the last tick."""
        return time.monotonic() - max(self._last, self._pardoned)

    def end(self) -> None:
        """Say that the thread is about to end, as it should."""
        with _lock:
            _beats.pop(self.thread, None)


_lock = threading.Lock()
_beats: dict[threading.Thread, Heartbeat] = {}


def begin(name: str = "", allowed: float = SILENCE_S) -> Heartbeat:
    """Watch the calling thread from now on; `allowed` is the seconds of silence that are normal for it."""
    beat = Heartbeat(name, allowed)
    with _lock:
        _beats[beat.thread] = beat
    return beat


def tick() -> None:
    """Tick for the calling thread, if it is watched: for code that waits on behalf of several threads."""
    beat = _beats.get(threading.current_thread())
    if beat is not None:
        beat.tick()


def beats() -> list[Heartbeat]:
    """Give the heartbeats of all threads that live. A thread that died says so by its own means, not by silence."""
    with _lock:
        for thread in [thread for thread in _beats if not thread.is_alive()]:
            del _beats[thread]
        return list(_beats.values())


def silent(share: float = 1.0) -> list[Heartbeat]:
    """Give the threads that have been silent for longer than `share` of the time that is normal for them."""
    return [beat for beat in beats() if beat.silence() > beat.allowed * share]


def stack(thread: threading.Thread) -> str:
    """Give where a thread stands, as a traceback; empty if it has ended."""
    import traceback  # only where something hangs

    frame = sys._current_frames().get(thread.ident or -1)
    return "" if frame is None else "".join(traceback.format_stack(frame)).rstrip()


class Watch:
    """Looks at all heartbeats again and again, in the thread that would miss them, and says of each silence what it is."""

    def __init__(self) -> None:
        self._looked = time.monotonic()
        self._told: set[Heartbeat] = set()

    def look(self) -> tuple[list[Heartbeat], list[Heartbeat]]:
        """Give the threads that are silent, and those of them that were not at the last look."""
        now = time.monotonic()
        paused, self._looked = now - self._looked > PAUSE_S, now
        if paused:
            for beat in beats():
                beat.pardon()
        found = silent()
        new = [beat for beat in found if beat not in self._told]
        self._told = set(found)
        return found, new
