"""A sink's runner whose results wait on disk while upstream is away; and one for sinks that nobody has to wait for.

Upstream is down when there is no connection, or when the oldest acknowledgement is overdue. Then what is on the way goes to
the spool first, in order; what comes later queues behind it; inputs are settled when that is committed. When upstream is back
the spool drains, in order. New results go directly again when all that was before them has been handed to the sink: what is
lost after that goes back to the spool in the order in which it was sent, so the switch reorders nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import cast

from edge_serve import plugins, watchdog
from edge_serve.config import Config, PartConfig, PipelineConfig
from edge_serve.errors import StoppedError, UnavailableError
from edge_serve.frame import Result
from edge_serve.health import Counters
from edge_serve.runner import QUEUED_RESULTS, TICK_S, SinkRunner, _Item
from edge_serve.sinks import Done, RejectedError, Sink, SinkContext, SpoolingSink
from edge_serve.spool.lane import Lane
from edge_serve.spool.row import Row
from edge_serve.spool.spooler import Spool

log = logging.getLogger(__name__)

# Upstream counts as down when it has not acknowledged the oldest result for so long,
OVERDUE_S = 5.0
# and a connection on which that does not change for so long is made anew.
GIVE_UP_S = 30.0
# When so few rows are left and upstream takes them, new results wait for them in memory: under a steady load the last row
# would never be sent otherwise, and the disk be written for ever.
CATCH_UP = 64
# While upstream takes more rows than that, one result comes in for every two that leave: a source that has much to give would
# keep the backlog alive for ever. So many may come in at once.
CREDIT = 256.0
CREDIT_PER_ROW = 0.5
# Pacing looks back so far: after a pause no burst is longer than this at the configured rate.
BURST_S = 0.1
# What is in memory when the service stops gets so long to be committed, besides the grace.
COMMIT_S = 2.0


def sink_runner(
    config: Config,
    pipeline: PipelineConfig,
    number: int,
    counters: Counters,
    fatal: Callable[[BaseException], None],
    spool: Spool | None = None,
) -> SinkRunner:
    """Make the runner of a pipeline's sink, with a lane in the spool where results may wait there."""
    part = pipeline.sinks[number]
    name = f"{pipeline.name}.{part.type}" if len(pipeline.sinks) > 1 else pipeline.name
    sink: Sink = plugins.load("sinks", part.type)(part.options, SinkContext(config, pipeline.name, counters, number))
    if spool is not None and config.spools(pipeline) and hasattr(sink, "send_encoded"):
        able = cast(SpoolingSink, sink)
        lane = spool.lane(_key(pipeline, part, number, able.target), pipeline.name, counters, required=part.required)
        rate, through = config.spool.drain_rate, pipeline.write_through
        return SpillingRunner(name, able, counters, fatal, lane, spool, drain_rate=rate, write_through=through)
    runner = SinkRunner if part.required else OptionalRunner
    return runner(name, sink, counters, fatal)


def keys(config: Config) -> set[str]:
    """Name the lanes of all sinks that spool, as `edge-serve spool status` shows them."""
    found = set()
    for pipeline in config.pipelines:
        for number, part in enumerate(pipeline.sinks):
            sink = plugins.load("sinks", part.type)(
                part.options, SinkContext(config, pipeline.name, Counters(), number)
            )
            if config.spools(pipeline) and hasattr(sink, "send_encoded"):
                found.add(_key(pipeline, part, number, sink.target))
    return found


def _key(pipeline: PipelineConfig, part: PartConfig, number: int, target: str) -> str:
    """Name a sink in the spool by what it is, not by its place: rows must not go to another one after an edit."""
    twins = [n for n, other in enumerate(pipeline.sinks) if (other.type, other.options) == (part.type, part.options)]
    twin = f"#{twins.index(number)}" if number != twins[0] else ""
    return f"{pipeline.name}/{part.type}/{target}{twin}"


class OptionalRunner(SinkRunner):
    """A sink that no input waits for: what finds no room while it is away or slow is dropped, and counted."""

    def submit(self, result: Result, done: Done, *, wait: bool = True) -> None:
        """Take a result over, if there is room; `done(None)` is called at once."""
        with self._changed:
            room = not self._stopping and len(self._waiting) < QUEUED_RESULTS
            if room:
                self._order += 1
                self._waiting.append(_Item(self._order, result, _ignore))
        if not room:
            self._counters.dropped("sink_away")
        done(None)
        self._pump()

    @property
    def ready(self) -> bool:
        """Say whether `submit` would take long: it never waits."""
        return self._prompt

    @property
    def _direct(self) -> bool:
        return False  # `submit` knows that nobody waits for the outcome

    def send_now(self, result: Result, done: Done) -> bool:
        """Leave it to `submit`, which waits for nobody."""
        return False


def _ignore(error: Exception | None) -> None:
    """Take no note of an outcome that nobody waits for."""


class SpillingRunner(SinkRunner):
    """Sends directly while upstream is there, and through the spool while it is not, or has a backlog."""

    def __init__(
        self,
        name: str,
        sink: SpoolingSink,
        counters: Counters,
        fatal: Callable[[BaseException], None],
        lane: Lane,
        spool: Spool,
        *,
        drain_rate: float = 0.0,
        write_through: bool = False,
    ) -> None:
        super().__init__(name, sink, counters, fatal)
        self._encoder = sink
        self._lane = lane
        self._spool = spool
        self._rate = drain_rate
        self._tokens, self._refilled = 1.0, time.monotonic()
        self._through = write_through
        self._credit = CREDIT
        self._down = False
        self._stopped_draining = False

    def start(self) -> None:
        """Start connecting; from here on the lane is this runner's (before, it may be an earlier one's)."""
        self._lane.progress = self._progressed
        super().start()

    @property
    def ready(self) -> bool:
        """Say whether `submit` would neither wait nor take long now: for threads that must not wait."""
        return super().ready and not self._down and not self._lane.ahead

    @property
    def waiting_on_disk(self) -> int:
        """Count the results that upstream does not have and that are in the spool, or on their way there."""
        return self._lane.backlog

    # Taking results over.

    def submit(self, result: Result, done: Done, *, wait: bool = True) -> None:
        """Take a result over; `done(None)` is called when it is safe, `done(error)` if the runner stops before.

        Safe is what upstream has or the spool has committed. Waits while there is no room for it in either.
        """
        if self.send_now(result, done):
            return
        required = self._lane.required
        outcome: Exception | None = None
        with self._changed:
            while not self._stopping:
                if self._spills():
                    if (self._lane.has_room and self._in_turn()) or not wait:
                        self._spill_waiting()
                        self._put(result, done if required else None)
                        break
                    if not required:
                        self._counters.dropped("spool_full")
                        break
                elif len(self._waiting) < QUEUED_RESULTS or not wait:
                    self._order += 1
                    self._waiting.append(_Item(self._order, result, done if required else _ignore))
                    break
                elif not required:
                    self._go_down()  # it is slow, and nothing waits for it
                    continue
                self._watched += 1
                changed = self._changed.wait(TICK_S)
                self._watched -= 1
                if not changed:
                    watchdog.tick()  # the worker is held back, not stuck
            else:
                outcome = StoppedError("the service has stopped")
        if outcome is not None or not required:
            done(None if not required else outcome)
        self._pump()

    @property
    def _direct(self) -> bool:
        upstream = self._connected and not self._failed and not self._stopping and not self._down
        return (
            upstream and not self._through and self._lane.required and not self._lane.ahead and not self._lane.opening
        )

    def _spills(self) -> bool:
        """Say whether a new result goes to the spool. The lock is held."""
        if self._down or self._through or self._lane.opening:
            return True
        if not self._connected and self._away_for() > OVERDUE_S:
            self._go_down()  # an attempt to connect takes its time
            return True
        return self._lane.ahead > (0 if self._rate else CATCH_UP)

    def _in_turn(self) -> bool:
        """Say whether a result may come into the spool now, and note that it does. The lock is held."""
        if self._down or self._rate or not self._lane.required or self._lane.ahead <= CATCH_UP:
            return True
        self._credit -= 1
        if self._credit >= 0:
            return True
        self._credit += 1
        return False

    def _away_for(self) -> float:
        since = self.backoff.away_since
        return time.monotonic() - since if since is not None else 0.0

    def _spill_waiting(self) -> None:
        while self._waiting:
            item = self._waiting.popleft()
            if item.result is not None:
                self._put(item.result, item.done)

    def _put(self, result: Result, done: Done | None, *, held: bool = False) -> Row | None:
        """Give a result to the spool. The lock is held, so that none overtakes another."""
        return self._lane.put(self._encoder.encode(result), result.captured.utc, done, held=held)

    def _go_down(self) -> None:
        """Let results wait in the spool from now on; what is on the way goes first. The lock is held."""
        self._down = True
        self._lane.flow(False)
        for item in self._on_the_way.values():
            if item.row is None and item.result is not None:
                item.row = self._put(item.result, item.done, held=True)
                item.done = partial(self._upstream_has, item.row)
        self._spill_waiting()
        self._changed.notify_all()

    def _progressed(self) -> None:
        """Go on: the spool has committed something, or has rows to send. Called by the spool's thread."""
        with self._changed:
            self._changed.notify_all()
        if self._lane.sendable:
            self._outcomes.put(None)  # sending is not for the spool's thread

    # Sending.

    def _may_send(self) -> bool:
        if not self._connected or self._failed or self._down or len(self._on_the_way) >= self._sink.window:
            return False
        if self._lane.ahead or self._lane.opening:
            return self._lane.sendable and not self._stopped_draining and self._paced() == 0
        return bool(self._waiting)

    def _next(self) -> tuple[_Item, int] | None:
        with self._changed:
            if not self._may_send():
                return None
            if self._lane.ahead:
                row = self._lane.take()
                if row is None:
                    return None
                self._tokens -= 1
                self._credit = min(CREDIT, self._credit + CREDIT_PER_ROW)
                self._order += 1
                item = _Item(self._order, None, partial(self._upstream_has, row), row)
            else:
                item = self._waiting.popleft()
            item.sent_at = time.monotonic()
            self._on_the_way[item.order] = item
            if self._watched:
                self._changed.notify_all()
            return item, self._epoch

    def _hand_over(self, item: _Item, done: Done) -> None:
        if item.result is None and item.row is not None:
            self._encoder.send_encoded(item.row.content, done)
        else:
            super()._hand_over(item, done)

    def _done(self, item: _Item, epoch: int, error: Exception | None) -> None:
        super()._done(item, epoch, error)
        if self._prompt and error is None and self._lane.ahead and not self._waiting:
            self._pump()  # a place in the window is free for a row, too

    def _paced(self) -> float:
        """Give the seconds until the next row may leave."""
        if not self._rate:
            return 0.0
        now = time.monotonic()
        self._tokens = min(max(1.0, self._rate * BURST_S), self._tokens + (now - self._refilled) * self._rate)
        self._refilled = now
        return 0.0 if self._tokens >= 1 else (1 - self._tokens) / self._rate

    def _upstream_has(self, row: Row | None, error: Exception | None) -> None:
        if error is None and row is not None:
            self._lane.sent(row, time.monotonic())

    def _rejected(self, item: _Item, error: RejectedError) -> None:
        content = item.row.content if item.row is not None else None
        if content is None and item.result is not None:
            content = self._encoder.encode(item.result)
        if content is None:
            return
        self._tell_rejected(content.frame_id, "is a dead letter (`edge-serve spool export --dead`)", error)
        if item.row is not None:
            self._lane.refuse(item.row, str(error))
        elif item.result is not None:
            self._lane.bury(content, item.result.captured.utc, str(error), item.done)

    # Upstream comes and goes.

    def _unreachable(self) -> None:
        with self._changed:
            if not self._stopping:  # the lane may be another runner's by now
                self._go_down()

    def _reachable(self) -> None:
        if self._stopping:
            return
        self._down = False
        self._credit = CREDIT
        self._lane.flow(True)

    def _lost(self) -> None:
        self._epoch += 1
        self._connected = False
        self.connected.clear()
        for _ in self._on_the_way:
            self._counters.retried()
        self._go_down()
        self._on_the_way.clear()
        self._lane.rewind()

    def _look_after(self) -> float:
        """See whether upstream is overdue, or is not any more; and whether the next row may leave."""
        wait = TICK_S
        give_up = False
        if self._stopping:
            return wait
        with self._changed:
            oldest = next(iter(self._on_the_way.values()), None)
            silent = time.monotonic() - oldest.sent_at if oldest is not None else 0.0
            if self._connected and not self._failed:
                if silent > OVERDUE_S and not self._down:
                    log.warning(
                        "%s: sink: upstream has not acknowledged a result for %g s; results wait in the spool",
                        self.name,
                        OVERDUE_S,
                    )
                    self._go_down()
                elif silent <= OVERDUE_S and self._down:
                    self._reachable()
                give_up = silent > GIVE_UP_S
            elif not self._connected and not self._down and self._away_for() > OVERDUE_S:
                self._go_down()
            if self._lane.sendable and (paced := self._paced()) > 0:
                wait = min(wait, paced)
        if give_up:
            self._gone(UnavailableError(f"no acknowledgement for {GIVE_UP_S:g} s"))
        self._pump()
        return wait

    # The end.

    def idle(self, timeout: float) -> bool:
        """Wait until upstream has everything that was submitted; False if `timeout` seconds were not enough."""
        with self._lock:
            return self._wait_for(self._all_upstream, timeout)

    def _all_upstream(self) -> bool:
        return not self._waiting and not self._on_the_way and not self._lane.opening and self._lane.backlog == 0

    def stop(self, deadline: float) -> int:
        """Send what is in memory until `deadline` (monotonic seconds), spool the rest; gives how many are not safe."""
        with self._changed:
            self._stopped_draining = True
            self._wait_for(self._nothing_in_memory, max(0.0, deadline - time.monotonic()))
            self._stopping = True
            self._go_down()
            self._on_the_way.clear()
            self._lane.rewind()
            self._changed.notify_all()
        self._outcomes.put(None)
        self._spool.flush(self._lane, max(deadline, time.monotonic() + COMMIT_S))
        left = self._lane.withdraw()
        for done in left:
            done(StoppedError("the service stopped before the result was safe"))
        backlog = self._lane.backlog
        if backlog:
            log.info("%s: %d results wait in the spool, and go first at the next start", self.name, backlog)
        if self._thread.is_alive():
            self._thread.join(TICK_S)
        self._sink.close()
        return len(left)

    def _nothing_in_memory(self) -> bool:
        return self._down or (not self._waiting and not self._on_the_way)
