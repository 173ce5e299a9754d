"""One sink's results in the spool, as its runner sees them: what waits to be written, what is ready to be sent.

Nothing here touches the disk or waits for it; the spool's thread does (spooler.py). All of it changes under the spool's one
lock, and no call into a runner is made while that is held.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from edge_serve.health import Counters
from edge_serve.spool.row import Done, Encoded, Row

Drain = Literal["oldest_first", "newest_first"]

# Results that wait in memory to be committed; the worker waits when they are as many, or as large.
MAX_UNWRITTEN = 1024
MAX_UNWRITTEN_BYTES = 8 * 1024 * 1024
# Rows that were read ahead: more are read when fewer than READ_BELOW are left.
READ_AHEAD = 512
READ_BELOW = 128
READ_AHEAD_BYTES = 4 * 1024 * 1024
# With newest_first a newer row may come at any time; little is read ahead.
READ_AHEAD_NEWEST = 16
# Acknowledged rows are deleted together: when they are so many, or the first has waited so long.
REMOVE_BATCH = 256
REMOVE_AFTER_S = 0.05

# What is left of a row that was sent: its bytes are not kept until it is deleted.
_SENT = Encoded("", b"")


def nothing() -> None:
    """Do nothing; what a lane calls while it has no runner."""


@dataclass(slots=True, eq=False)
class Lane:
    """The queue of one sink. Made by `Spool.lane`; its fields are the spool's, its methods the runner's."""

    lock: threading.Condition
    """The spool's."""
    key: str
    pipeline: str
    required: bool
    counters: Counters
    drain: Drain = "oldest_first"
    ahead: int = 0
    """How many results have to be sent before a new one may go to upstream directly."""
    opening: bool = False
    """Whether rows from before may be there that are not counted yet."""
    trouble: bool = False
    """Whether the spool cannot be written now."""
    flowing: bool = False
    """Whether upstream takes results: rows are read ahead."""
    items: int = 0
    """Committed rows."""
    unread: int = 0
    """Committed rows that are neither ready nor on the way."""
    position: int = 0
    """The highest id that was read, in order."""
    generation: int = 0
    """Grows with each `rewind`: what was read before it is void."""
    puts: deque[Row] = field(default_factory=deque)
    puts_bytes: int = 0
    ready: deque[Row] = field(default_factory=deque)
    removes: list[Row] = field(default_factory=list)
    removing_since: float = 0.0
    refused: deque[Row] = field(default_factory=deque)
    held: set[Row] = field(default_factory=set)
    progress: Callable[[], None] = nothing
    """Called, without the lock, when results were committed or are ready to be sent."""
    begin: Callable[[], None] = nothing
    """Called, with the lock, when there is something to be written: the spool's thread may not run yet."""

    @property
    def has_room(self) -> bool:
        """Say whether one more result may wait to be written."""
        return len(self.puts) < MAX_UNWRITTEN and self.puts_bytes < MAX_UNWRITTEN_BYTES

    @property
    def sendable(self) -> bool:
        """Say whether `take` has something to give."""
        if self.ready:
            return True
        return self.trouble and not self.unread and not self.opening and self.ahead > 0

    @property
    def backlog(self) -> int:
        """Count all results that upstream does not have."""
        with self.lock:
            return self.items - len(self.removes) + sum(row.id == 0 and not row.unwanted for row in self.puts)

    def put(self, content: Encoded, captured: float, done: Done | None, *, held: bool = False) -> Row:
        """Give a result to the spool; `done(None)` is called when it is committed, or dropped as the policy says.

        `held` says that it is on the way already, and is not to be sent again before a `rewind`.
        """
        row = Row(content, captured if math.isfinite(captured) else 0.0, done, held=held)
        with self.lock:
            self.begin()
            self.puts.append(row)
            self.puts_bytes += row.size
            if held:
                self.held.add(row)
            else:
                self.ahead += 1
            self.lock.notify_all()
        return row

    def take(self) -> Row | None:
        """Give the next row to send, None if none is ready."""
        with self.lock:
            row = None
            if self.ready:
                row = self.ready.popleft()
                if self.unread and len(self.ready) < READ_BELOW:
                    self.lock.notify_all()
            elif self.trouble and not self.unread and not self.opening:
                # A disk that is full takes nothing, and upstream is there: what could not be written is sent as it is.
                row = next((each for each in self.puts if not each.held and not each.unwanted), None)
                if row is not None:
                    row.held = True
                    self.held.add(row)
            if row is not None:
                self.ahead -= 1
            return row

    def sent(self, row: Row, now: float) -> None:
        """Note that upstream has a row: it is deleted soon."""
        with self.lock:
            self.held.discard(row)
            if row.id:
                if not self.removes:
                    self.removing_since = now
                self.removes.append(row)
                row.content = _SENT
                if len(self.removes) >= REMOVE_BATCH or len(self.removes) == 1:
                    self.lock.notify_all()
            else:
                row.unwanted = True
            done, row.done = row.done, None
        if done is not None:
            done(None)

    def refuse(self, row: Row, reason: str) -> None:
        """Put a row to the dead letters: upstream will never take it."""
        reason = _text(reason)
        with self.lock:
            self.begin()
            row.reason = reason
            self.held.discard(row)
            if row.id:
                self.refused.append(row)
            else:
                # Written as a dead letter in place of the row; its sender learns of it then.
                row.unwanted = True
                self.refused.append(Row(row.content, row.captured, row.done, reason=reason))
                row.done = None
            self.lock.notify_all()

    def bury(self, content: Encoded, captured: float, reason: str, done: Done | None) -> None:
        """Write a result that upstream will never take to the dead letters; `done(None)` is called when it is there."""
        with self.lock:
            self.begin()
            self.refused.append(Row(content, captured, done, reason=_text(reason)))
            self.lock.notify_all()

    def rewind(self) -> None:
        """Begin at the oldest row again: nobody knows what became of what was on the way."""
        with self.lock:
            self.generation += 1
            self.unread += sum(row.id != 0 for row in self.held)
            for row in self.held:
                row.held = False
            self.held.clear()
            self.ready.clear()
            self.position = 0
            self.count_ahead()
            self.lock.notify_all()

    def count_ahead(self) -> None:
        """Count anew what is ahead of a new result. The lock is held."""
        self.ahead = self.unread + len(self.ready) + sum(not row.held and not row.unwanted for row in self.puts)

    def flow(self, flowing: bool) -> None:
        """Say whether upstream takes results now."""
        with self.lock:
            self.flowing = flowing
            if flowing and self.unread:
                self.lock.notify_all()

    def withdraw(self) -> list[Done]:
        """Take back what is not committed; gives the `done` of each result that somebody waits for."""
        with self.lock:
            dones = []
            for row in (*self.puts, *self.refused):
                if not row.unwanted and not row.id:
                    row.unwanted = True
                    if row.done is not None:
                        dones.append(row.done)
                        row.done = None
            self.refused = deque(row for row in self.refused if row.id)
            self.count_ahead()
        return dones


def _text(reason: str) -> str:
    # Reasons quote what came from outside.
    return reason.encode(errors="replace").decode()
