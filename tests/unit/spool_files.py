"""What the spool's tests share: a spool with a clock of the test's own, and one that was filled and closed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_serve.config import SpoolConfig
from edge_serve.health import Counters
from edge_serve.spool.clock import Moment
from edge_serve.spool.lane import Lane
from edge_serve.spool.row import Encoded, Row
from edge_serve.spool.spooler import Spool
from tests.support import wait_for

KEY = "line/fake/up"


class FakeClock:
    """A clock that stands still until it is moved, in a boot that the test names."""

    def __init__(
        self, boot: str = "boot-a", seconds: float = 1000.0, utc: float = 1.8e9, *, synced: bool = True
    ) -> None:
        self.moment = Moment(boot, seconds, utc, synced)

    def now(self) -> Moment:
        """Give the moment."""
        return self.moment

    def forward(self, seconds: float) -> None:
        """Let time pass."""
        self.moment = replace(self.moment, seconds=self.moment.seconds + seconds, utc=self.moment.utc + seconds)


class Opened:
    """A spool with one lane, and what became of what was put into it."""

    def __init__(
        self, folder: Path, clock: Any = None, key: str = KEY, *, required: bool = True, **options: Any
    ) -> None:
        self.failures: list[BaseException] = []
        self.spool = Spool(folder, SpoolConfig(**options), clock)
        self.counters = Counters()
        self.lane: Lane = self.spool.lane(key, "line", self.counters, required=required)
        self.outcomes: dict[str, list[Exception | None]] = {}
        self.spool.start(self.failures.append)

    def put(self, identity: str, body: bytes | None = None, **options: Any) -> Row:
        """Put a result."""
        self.outcomes[identity] = []
        content = Encoded(identity, f'{{"id":"{identity}"}}'.encode() if body is None else body)
        return self.lane.put(content, 1.8e9, self.outcomes[identity].append, **options)

    def fill(self, *identities: str, body: bytes | None = None) -> Opened:
        """Put results and wait until they are settled."""
        for identity in identities:
            self.put(identity, body)
        self.settled(*identities)
        return self

    def settled(self, *identities: str) -> None:
        """Wait until these results are settled, once and well."""
        wait_for(lambda: all(self.outcomes[each] for each in identities), f"all of {identities[:5]}… are settled")
        assert {tuple(self.outcomes[each]) for each in identities} == {(None,)}

    def drain(self, number: int | None = None, *, acknowledge: bool = True) -> list[Row]:
        """Take rows as a sink would: so many, or all that are there."""
        self.lane.flow(True)
        rows: list[Row] = []

        def step() -> bool:
            while len(rows) != number and (row := self.lane.take()) is not None:
                rows.append(row)
                if acknowledge:
                    content = row.content
                    self.lane.sent(row, time.monotonic())
                    row.content = content  # the test wants to see it
            return len(rows) == number or (not self.lane.opening and self.lane.ahead == 0)

        wait_for(step, f"rows (there are {len(rows)})")
        return rows

    def ids(self, number: int | None = None) -> list[str]:
        """Take rows and give their frame ids."""
        return [row.content.frame_id for row in self.drain(number)]

    def empty(self) -> None:
        """Wait until nothing is left."""
        wait_for(lambda: self.lane.backlog == 0 and self.spool.status()["items"] == 0, "the spool is empty")

    def close(self) -> Opened:
        """Close; nothing may have failed."""
        self.spool.close()
        assert not self.failures
        return self

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.spool.close()
        if self.failures:
            raise self.failures[0]


def many(number: int, first: int = 0) -> list[str]:
    """Give frame ids."""
    return [f"f{each}" for each in range(first, first + number)]


def filled(folder: Path, number: int = 100, body: Callable[[str], bytes] | None = None, **options: Any) -> list[str]:
    """Make a spool with rows, closed; gives the frame ids."""
    ids = many(number)
    with Opened(folder, **options) as made:
        for each in ids:
            made.put(each, None if body is None else body(each))
        made.settled(*ids)
    return ids
