"""The spool's thread: commits what waits in batches, deletes what was sent, reads ahead what is to be sent.

All use of the disk is here, so that no worker, network callback or reconnecting sink ever waits for it. The thread begins
with the first result that has to wait, or where rows from before are there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_serve import watchdog
from edge_serve.config import SpoolConfig
from edge_serve.health import Counters
from edge_serve.spool.clock import Clock
from edge_serve.spool.lane import (
    READ_AHEAD,
    READ_AHEAD_BYTES,
    READ_AHEAD_NEWEST,
    READ_BELOW,
    REMOVE_AFTER_S,
    REMOVE_BATCH,
    Lane,
)
from edge_serve.spool.row import Done, Row

if TYPE_CHECKING:
    from edge_serve.spool.store import LaneRecord, Limits, Store

log = logging.getLogger(__name__)

FOLDER = "spool"
FILE = "spool.db"
# One transaction takes so many rows, or about so many bytes.
BATCH = 1024
BATCH_BYTES = 4 * 1024 * 1024
# Where the disk has no room for a batch, the next one is so much smaller.
SMALLER = 8
# How long the thread waits at most before it looks for what is too old, and ticks.
TICK_S = 1.0
# A disk that is full is asked again after this long.
RETRY_S = 1.0
# When nothing has waited for so long, files and thread are let go of.
CLOSE_AFTER_S = 5.0
# The same reason is said again after this long.
REPEAT_S = 600.0
# A disk that damages what was just written is not filled with what was set aside.
RESCUE_AGAIN_S = 10.0
# The default bound: so many bytes, or this share of what is free, whichever is less; and no less than a little.
DEFAULT_BYTES = 256 * 1024 * 1024
DEFAULT_SHARE = 10
LEAST_BYTES = 1024 * 1024

# Reasons by which drops are counted.
FULL, EXPIRED, DAMAGED, DEAD = "spool_full", "spool_expired", "spool_damaged", "dead_letters"


@dataclass(slots=True)
class _Work:
    """What one transaction does for one lane, and what came of it."""

    lane: Lane
    puts: list[Row] = field(default_factory=list)
    removes: list[Row] = field(default_factory=list)
    refused: list[Row] = field(default_factory=list)
    accepted: list[Row] = field(default_factory=list)
    places: list[tuple[int, int | None]] = field(default_factory=list)
    settled: int = 0
    """So many of `puts`, from the first on, are accepted, dropped or not wanted any more."""
    expired: int = 0
    dead_dropped: int = 0


class Spool:
    """The spool of one state folder, for all pipelines and sinks of a service."""

    def __init__(self, state_dir: Path, options: SpoolConfig, clock: Clock | None = None) -> None:
        """Nothing is read or written yet."""
        self.folder = state_dir / FOLDER
        self._options = options
        self._clock = clock or Clock()
        self._lock = threading.Condition(threading.Lock())
        self._lanes: dict[str, Lane] = {}
        # What lies there for sinks that nobody has named since the start.
        self._unnamed: dict[str, int] = {}
        self._thread: threading.Thread | None = None
        self._store: Store | None = None
        self._closing = False
        self._deadline = 0.0
        self._full = False
        self._said = ""
        self._said_at = 0.0
        self._trouble = ""
        self._may_hold_rows: bool | None = None
        self._fatal: Callable[[BaseException], None] = _ignore
        self._status: dict[str, Any] = {"items": 0, "bytes": 0, "oldest_s": None, "dropped": {}}
        self._dropped: dict[str, int] = {}
        self._looked = 0.0
        self._expired_at = 0.0
        self._limit: Limits | None = None
        self._next_id = 0
        self._busy_at = time.monotonic()
        self._batch = BATCH
        self._rescued_at = -RESCUE_AGAIN_S

    # What the rest of the service calls.

    def lane(self, key: str, pipeline: str, counters: Counters, *, required: bool = True) -> Lane:
        """Give the lane of a sink; the same one when asked again, after a reload of the configuration."""
        with self._lock:
            lane = self._lanes.get(key)
            if lane is None:
                lane = Lane(self._lock, key, pipeline, required, counters, self._options.drain)
                lane.opening = self._thread is not None or self._holds_rows()
                lane.begin = self._begin
                self._lanes[key] = lane
                self._lock.notify_all()
            lane.required, lane.counters, lane.drain = required, counters, self._options.drain
        return lane

    def start(self, fatal: Callable[[BaseException], None]) -> None:
        """Begin with what is there from before, if anything is; `fatal` is told if the thread fails."""
        self._fatal = fatal
        with self._lock:
            if self._holds_rows():
                self._begin()

    def reconfigure(self, options: SpoolConfig) -> None:
        """Take other bounds; another durability counts from the next start."""
        with self._lock:
            self._options = options
            self._limit = None
            for lane in self._lanes.values():
                lane.drain = options.drain
            self._lock.notify_all()

    def status(self) -> dict[str, Any]:
        """Give the numbers as of the last transaction, JSON-ready; costs nothing.

        items, bytes, oldest_s (None if nothing waits), dropped {reason: n} since the start; once anything has waited also
        dead_letters and limit_bytes, and a problem where there is one.
        """
        with self._lock:
            status = dict(self._status, dropped=dict(self._dropped))
            if (problem := self.problem) is not None:
                status["problem"] = problem
            if status["oldest_s"] is not None:
                status["oldest_s"] = round(status["oldest_s"] + time.monotonic() - self._looked, 3)
            return status

    @property
    def problem(self) -> str | None:
        """Say why nothing can be written now, None if it can; for the status."""
        if self._trouble:
            return f"the spool cannot be used: {self._trouble}"
        return "the spool is full: results wait for room" if self._full else None

    def left_behind(self, named: Collection[str]) -> dict[str, int]:
        """Give how many results wait for sinks that are not `named`, by the lanes' keys: nothing sends them."""
        with self._lock:
            waiting = {**self._unnamed, **{lane.key: lane.items for lane in self._lanes.values()}}
        return {key: items for key, items in waiting.items() if items and key not in named}

    def flush(self, lane: Lane, deadline: float) -> None:
        """Wait until all that a lane was given is committed, until `deadline` (monotonic seconds) at most."""
        with self._lock:
            while (lane.puts or lane.refused) and not self._full:
                left = deadline - time.monotonic()
                if left <= 0 or self._thread is None or not self._thread.is_alive():
                    return
                self._begin()
                self._lock.wait(min(left, 0.1))

    def close(self, deadline: float | None = None) -> None:
        """Commit what can be, close the files and end the thread; waits until `deadline`, by default two seconds."""
        with self._lock:
            self._closing = True
            self._deadline = time.monotonic() + 2.0 if deadline is None else deadline
            thread = self._thread
            self._lock.notify_all()
        if thread is not None:
            thread.join(max(0.1, self._deadline - time.monotonic() + 1.0))

    # The thread.

    def _holds_rows(self) -> bool:
        if self._may_hold_rows is None:
            self._may_hold_rows = _anything_there(self.folder)
        return self._may_hold_rows

    def _begin(self) -> None:
        """Start the thread if it does not run. The lock is held."""
        if self._thread is None and not self._closing:
            self._busy_at = time.monotonic()
            self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        beat = watchdog.begin("spool")
        store: Store | None = None
        try:
            while True:
                with self._lock:
                    self._lock.wait_for(lambda: self._closing or self._has_work(), self._patience())
                    work = self._has_work()
                    ended = self._closing and (not work or time.monotonic() > self._deadline)
                    if ended or (not work and self._long_idle()):
                        store, self._store = self._store, None
                        if store is not None:
                            self._next_id = store.next_id
                        if not ended:
                            self._thread = None  # the next result that has to wait begins a new one
                            self._may_hold_rows = False
                        break
                    works = self._gather()
                beat.tick()
                with beat.allowing(watchdog.LOAD_SILENCE_S):  # a database that is looked through, a disk that stalls
                    self._do(works)
            if store is not None:
                store.close()
        except BaseException as error:  # noqa: BLE001  # a thread that dies in silence would hold all results for ever
            self._fatal(error)
        finally:
            beat.end()

    def _long_idle(self) -> bool:
        """Say whether nothing has waited for long. The lock is held."""
        now = time.monotonic()
        if self._trouble or self._full or any(lane.items or lane.puts or lane.removes for lane in self._lanes.values()):
            self._busy_at = now
        return now - self._busy_at > CLOSE_AFTER_S

    def _patience(self) -> float:
        waiting = [lane.removing_since for lane in self._lanes.values() if lane.removes]
        if not waiting or self._trouble:
            return TICK_S
        return min(TICK_S, max(0.0, min(waiting) + REMOVE_AFTER_S - time.monotonic()))

    def _has_work(self) -> bool:
        """Say whether there is anything to do at once. The lock is held."""
        if any(lane.opening for lane in self._lanes.values()):
            return True
        now = time.monotonic()
        for lane in self._lanes.values():
            if lane.refused or (lane.puts and not self._full):
                return True
            if lane.removes and (
                len(lane.removes) >= REMOVE_BATCH
                or now - lane.removing_since >= REMOVE_AFTER_S
                or self._full
                or self._closing
            ):
                return True
            if self._wants_rows(lane):
                return True
        return False

    @staticmethod
    def _wants_rows(lane: Lane) -> bool:
        return (
            lane.flowing and lane.unread > 0 and len(lane.ready) < (READ_BELOW if lane.drain == "oldest_first" else 1)
        )

    def _gather(self) -> list[_Work]:
        """Take what the next transaction does. The lock is held; nothing is taken out of the lanes yet."""
        works = []
        for lane in self._lanes.values():
            work = _Work(lane)
            size = 0
            for row in lane.puts:
                work.puts.append(row)
                size += row.size
                if len(work.puts) >= self._batch or size >= BATCH_BYTES:
                    break
            work.removes = list(lane.removes)
            work.refused = [row for row in lane.refused if not row.unwanted][:BATCH]
            works.append(work)
        return works

    def _do(self, works: list[_Work]) -> None:
        """Do one round; what fails is done again, or set aside."""
        from edge_serve.spool.store import SpoolDamagedError, SpoolUnavailableError

        trouble: Exception | None = None
        try:
            store = self._open()
            try:
                if self._commit(store, works):
                    store.tidy()
                self._batch = min(BATCH, self._batch * 2)
            except SpoolUnavailableError as error:
                # A disk that is full can still be read; and what is smaller may find room.
                trouble, self._batch = error, max(1, self._batch // SMALLER)
                if self._begin_anew(store):
                    return
            self._read_ahead(store)
            self._look(store)
        except SpoolDamagedError as error:
            trouble = self._rescue(error)
        except SpoolUnavailableError as error:
            trouble = error
        for work in works:
            if work.puts or work.removes or work.refused or work.lane.ready:
                work.lane.progress()
        if trouble is not None:
            self._in_trouble(trouble)
        else:
            self._out_of_trouble()

    def _begin_anew(self, store: Store) -> bool:
        """Delete the files if upstream has every row that is in them; False if not.

        On a disk that this spool has filled nothing else makes room: deleting rows, too, writes to the log first.
        """
        with self._lock:
            sent = {row.id for lane in self._lanes.values() for row in lane.removes}
        if not sent or not store.holds_only(sent):
            return False
        log.warning("spool: upstream has all that is in %s, which is deleted, so that there is room again", self.folder)
        self._next_id, self._store = store.next_id, None
        store.discard()
        return True

    def _open(self) -> Store:
        if self._store is not None:
            if self._store.look() or any(lane.opening for lane in list(self._lanes.values())):
                self._resync(self._store)
            return self._store
        from edge_serve.spool.rescue import adopt
        from edge_serve.spool.store import Store, translated

        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            adopt(self.folder)
        except OSError as error:
            raise translated(error, self.folder) from error
        store = Store(self.folder, durable=self._options.durability == "power", clock=self._clock)
        store.tidy(everything=True)
        # Rows that are on the way keep their ids through a rescue; no new row may take one of those.
        store.next_id = max(store.next_id, self._next_id)
        self._store = store
        self._resync(store)
        self._report(store)
        return store

    def _resync(self, store: Store) -> None:
        """Learn from the database what the lanes hold."""
        with self._lock:
            self._unnamed = {
                record.key: record.items
                for record in store.lanes.values()
                if record.kind != "dead" and record.key not in self._lanes
            }
            for lane in self._lanes.values():
                record = _record(store, lane)
                lane.items = record.items if record is not None else 0
                lane.opening = False
                lane.generation += 1
                lane.position = 0
                for row in lane.ready:
                    row.held = False
                    lane.held.discard(row)
                lane.ready.clear()
                on_the_way = sum(row.id != 0 for row in lane.held)
                lane.unread = max(0, lane.items - len(lane.removes) - len(lane.refused) - on_the_way)
                lane.count_ahead()

    def _report(self, store: Store) -> None:
        for record in store.lanes.values():
            if not record.items or record.kind == "dead":
                continue
            if record.key in self._lanes:
                log.info("%s: %d results from before wait in the spool, and go first", record.pipeline, record.items)
            else:
                log.warning(
                    "spool: %d results wait for %s, which the configuration does not name; they are kept: "
                    "`edge-serve spool export` and `purge` take them out",
                    record.items,
                    record.key,
                )

    def _limits(self, store: Store) -> Limits:
        from edge_serve.spool.store import Limits

        if self._limit is None:
            options = self._options
            self._limit = Limits(
                options.max_bytes or default_bytes(self.folder, sum(lane.bytes for lane in store.lanes.values())),
                options.max_items,
                options.max_age_s,
                options.policy,
            )
        return self._limit

    def _commit(self, store: Store, works: list[_Work]) -> bool:
        """Write, delete and drop what is due, as one, then tell everybody; False if nothing was due."""
        now, limits = self._clock.now(), self._limits(store)
        due = limits.max_age_s > 0 and time.monotonic() - self._expired_at >= min(TICK_S, limits.max_age_s / 10)
        busy = [work for work in works if work.puts or work.removes or work.refused or due]
        if not busy:
            return False
        with store.transaction():
            for work in busy:
                if work.removes and (record := _record(store, work.lane)) is not None:
                    store.remove(record, work.removes)
            if due:
                self._expire(store, busy, limits)
            for work in busy:
                for row in work.refused:
                    record = store.lane(work.lane.key, work.lane.pipeline, required=work.lane.required)
                    work.dead_dropped += store.bury(record, row, limits, now)
            gone: dict[int, int] = {}
            for work in busy:
                if work.puts:
                    self._admit(store, work, limits, gone)
            for record_id, number in gone.items():
                store.note_dropped(record_id, FULL, number)
            for work in busy:
                for reason, number in ((EXPIRED, work.expired), (DEAD, work.dead_dropped)):
                    record = _record(store, work.lane) if number else None
                    if record is not None:
                        store.note_dropped(record.id, reason, number)
        if due:
            self._expired_at = time.monotonic()
        self._committed(store, busy, gone)
        return True

    def _expire(self, store: Store, works: list[_Work], limits: Limits) -> None:
        now = self._clock.now()
        mine = {work.lane.key: work for work in works}
        for record in [record for record in store.lanes.values() if record.kind == "queue" and record.items]:
            work = mine.get(record.key)
            number = store.expire(record, limits, now, self._held_ids())
            if work is not None:
                work.expired = number
            elif number:
                store.note_dropped(record.id, EXPIRED, number)
                self._count(EXPIRED, number)

    def _held_ids(self) -> frozenset[int]:
        with self._lock:
            return frozenset(row.id for lane in self._lanes.values() for row in lane.held if row.id)

    def _admit(self, store: Store, work: _Work, limits: Limits, gone: dict[int, int]) -> None:
        """Decide about the rows of a lane, in order, and write those that may come in."""
        record = store.lane(work.lane.key, work.lane.pipeline, required=work.lane.required)
        rows = [row for row in work.puts if not row.unwanted]
        accepted: list[Row] = []
        size = 0
        if store.room(limits, len(rows), sum(row.size for row in rows)) == (0, 0):
            accepted, work.settled = rows, len(work.puts)
        else:
            policy = limits.policy if work.lane.required else "drop_newest"
            if policy == "drop_oldest":
                over = store.room(limits, len(rows), sum(row.size for row in rows))
                _add(gone, store.drop_oldest(*over, self._held_ids()))
            for row in work.puts:
                if not row.unwanted:
                    over = store.room(limits, len(accepted) + 1, size + row.size)
                    while over != (0, 0) and policy == "drop_oldest" and accepted:
                        size -= accepted.pop(0).size
                        _add(gone, {record.id: 1})
                        over = store.room(limits, len(accepted) + 1, size + row.size)
                    # One row always finds room in an empty spool, whatever its size: it would block all others for ever.
                    if over == (0, 0) or (store.empty and not accepted):
                        accepted.append(row)
                        size += row.size
                    elif policy == "block":
                        break
                    else:
                        _add(gone, {record.id: 1})
                work.settled += 1
        work.accepted = accepted
        work.places = store.append(record, accepted, self._clock.now())

    def _committed(self, store: Store, works: list[_Work], gone: dict[int, int]) -> None:
        dones: list[Done] = []
        with self._lock:
            self._full = any(work.settled < len(work.puts) for work in works)
            for work in works:
                lane = work.lane
                for row, (number, segment) in zip(work.accepted, work.places, strict=True):
                    row.id, row.segment = number, segment
                accepted = set(work.accepted)
                caught_up = lane.unread == 0
                for _ in range(work.settled):
                    row = lane.puts.popleft()
                    lane.puts_bytes -= row.size
                    if row.done is not None:
                        dones.append(row.done)
                        row.done = None
                    self._place(lane, row, caught_up=caught_up, kept=row in accepted)
                del lane.removes[: len(work.removes)]
                lane.removing_since = time.monotonic()
                for row in work.refused:
                    if row in lane.refused:
                        lane.refused.remove(row)
                    if row.done is not None:
                        dones.append(row.done)
                        row.done = None
                lane.counters.dropped(EXPIRED, work.expired)
                lane.counters.dropped(DEAD, work.dead_dropped)
                self._count(EXPIRED, work.expired)
                self._count(DEAD, work.dead_dropped)
            keys = {record.key: record for record in store.lanes.values() if record.kind == "queue"}
            for lane in self._lanes.values():
                if (record := keys.get(lane.key)) is not None:
                    lane.items = record.items
                    number = gone.pop(record.id, 0)
                    lane.counters.dropped(FULL, number)
                    self._count(FULL, number)
                held = sum(row.id != 0 for row in lane.held)
                lane.unread = max(0, lane.items - len(lane.removes) - held - sum(row.id != 0 for row in lane.refused))
                lane.count_ahead()
            for number in gone.values():
                self._count(FULL, number)
            self._lock.notify_all()
        for done in dones:
            done(None)

    @staticmethod
    def _place(lane: Lane, row: Row, *, caught_up: bool, kept: bool) -> None:
        """Find a committed (or dropped) row its place in the lane. The lock is held."""
        if not kept:
            lane.held.discard(row)
        elif row.unwanted:
            if not lane.removes:
                lane.removing_since = time.monotonic()
            lane.removes.append(row)
        elif not row.held and caught_up and lane.flowing and len(lane.ready) < READ_BELOW:
            # Nothing is unread before it: it need not be read back. The first that is not taken ends that.
            row.held = True
            lane.held.add(row)
            lane.ready.append(row)
            lane.position = row.id

    def _read_ahead(self, store: Store) -> None:
        for lane in list(self._lanes.values()):
            with self._lock:
                if not self._wants_rows(lane):
                    continue
                generation, after, newest = lane.generation, lane.position, lane.drain == "newest_first"
                held = frozenset(row.id for row in (*lane.held, *lane.removes, *lane.refused) if row.id)
                unread = lane.unread
            record = _record(store, lane)
            if record is None:
                continue
            number = READ_AHEAD_NEWEST if newest else READ_AHEAD
            rows, damaged = store.fetch(record, after, number, READ_AHEAD_BYTES, newest=newest, held=held)
            if damaged:
                self._let_go(store, lane, record, damaged)
            with self._lock:
                if generation != lane.generation:
                    continue
                for row in rows:
                    row.held = True
                    lane.held.add(row)
                    lane.ready.append(row)
                    lane.position = max(lane.position, row.id)
                lane.unread = max(0, lane.unread - len(rows))
                lost = not rows and not damaged and lane.unread > 0
                if lost and lane.position:
                    lane.position = 0  # once more, from the beginning
                    continue
            if lost:
                from edge_serve.spool.store import SpoolDamagedError

                raise SpoolDamagedError(f"{unread} rows cannot be found")

    def _let_go(self, store: Store, lane: Lane, record: LaneRecord, ids: list[int]) -> None:
        """Delete rows that are not what was written, and say so."""
        with store.transaction():
            store.delete_damaged(record, ids)
            store.note_dropped(record.id, DAMAGED, len(ids))
        log.error("%s: %d results in the spool are damaged and lost", lane.pipeline, len(ids))
        with self._lock:
            lane.items = record.items
            lane.unread = max(0, lane.unread - len(ids))
            lane.count_ahead()
            lane.counters.dropped(DAMAGED, len(ids))
            self._count(DAMAGED, len(ids))

    def _look(self, store: Store) -> None:
        """Note the numbers of the status."""
        now = time.monotonic()
        queues = [record for record in store.lanes.values() if record.kind == "queue"]
        oldest = self._status["oldest_s"]
        if now - self._looked >= TICK_S or not any(record.items for record in queues):
            oldest = store.oldest_age(queues, self._clock.now())
        elif oldest is not None:
            oldest += now - self._looked
        with self._lock:
            self._looked = now
            self._status = {
                "items": sum(record.items for record in queues),
                "bytes": sum(record.bytes for record in queues),
                "oldest_s": oldest,
                "dead_letters": sum(record.items for record in store.lanes.values() if record.kind == "dead"),
                "limit_bytes": self._limits(store).max_bytes,
            }

    def _count(self, reason: str, number: int) -> None:
        if number:
            self._dropped[reason] = self._dropped.get(reason, 0) + number

    # When something is wrong.

    def _in_trouble(self, error: Exception) -> None:
        now = time.monotonic()
        if str(error) != self._said or now - self._said_at > REPEAT_S:
            log.error("spool: %s; results that cannot be written are not acknowledged; trying again", error)
            self._said, self._said_at = str(error), now
        with self._lock:
            self._trouble = str(error)
            for lane in self._lanes.values():
                lane.trouble = True
                lane.opening = False
                lane.count_ahead()
            self._lock.notify_all()
        for lane in list(self._lanes.values()):
            lane.progress()
        with self._lock:
            self._lock.wait_for(lambda: self._closing, RETRY_S)

    def _out_of_trouble(self) -> None:
        if self._trouble:
            log.warning("spool: it can be used again")
            with self._lock:
                self._trouble = self._said = ""
                for lane in self._lanes.values():
                    lane.trouble = False

    def _rescue(self, error: Exception) -> Exception | None:
        """Set a damaged database aside and go on with a new one; gives why that is not possible now, if so."""
        from edge_serve.spool.rescue import rescue
        from edge_serve.spool.store import SpoolUnavailableError

        if self._store is not None:
            self._next_id = self._store.next_id
            self._store.close()
            self._store = None
        if time.monotonic() - self._rescued_at < RESCUE_AGAIN_S:
            return SpoolUnavailableError(f"{self.folder / FILE}: damaged again, just after a rescue: {error}")
        try:
            found = rescue(self.folder)
        except SpoolUnavailableError as reason:
            return reason
        self._rescued_at = time.monotonic()
        of = f" of {found.expected}" if found.expected is not None else ""
        log.error(
            "spool: %s is damaged (%s). It is set aside as %s; %d%s results in it could be rescued and go on waiting",
            self.folder / FILE,
            error,
            found.aside,
            found.rescued,
            of,
        )
        with self._lock:
            self._count(DAMAGED, max(0, (found.expected or 0) - found.rescued))
            for lane in self._lanes.values():
                lane.opening = True
            self._lock.notify_all()
        return None


def _ignore(error: BaseException) -> None:
    """Stand for whoever wants to know of failures, before there is anybody."""


def _record(store: Store, lane: Lane) -> LaneRecord | None:
    return next(
        (record for record in store.lanes.values() if record.key == lane.key and record.kind == "queue"),
        None,
    )


def _add(total: dict[int, int], more: dict[int, int]) -> None:
    for key, number in more.items():
        total[key] = total.get(key, 0) + number


def _anything_there(folder: Path) -> bool:
    try:
        if not folder.is_dir() or not any(folder.glob(FILE + "*")):
            return False
    except OSError:
        return True  # the thread will say what is wrong with it
    from edge_serve.spool.store import holds_rows

    return holds_rows(folder)


def default_bytes(folder: Path, used: int = 0) -> int:
    """Give the bound where none is configured: 256 MiB, or a tenth of what is free if that is less."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return DEFAULT_BYTES
    free = disk.f_bavail * disk.f_frsize + used
    return max(LEAST_BYTES, min(DEFAULT_BYTES, free // DEFAULT_SHARE))
