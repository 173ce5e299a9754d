"""The threads of sources and sinks: connect, back off, retry, bound what is on the way, stop.

Reconnection and back-off live here, once. A source or sink only says what went wrong.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from edge_serve import watchdog
from edge_serve.errors import GoneError, SourceExhausted, StoppedError, UnavailableError
from edge_serve.frame import Delivery, Result
from edge_serve.health import Counters
from edge_serve.mailbox import Mailbox
from edge_serve.sinks import Done, RejectedError, Sink
from edge_serve.sources import Source
from edge_serve.spool.row import Row

log = logging.getLogger(__name__)

# How long a thread waits at most before it looks whether it shall stop.
TICK_S = 0.5
# A sink's thread that has nothing to do looks after this long whether it lives.
IDLE_S = 5.0
FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
# The same reason is said again after this long, so that a log of a long outage stays short.
REPEAT_S = 600.0
# Results that wait for a place in the send window; the worker waits when they are as many.
QUEUED_RESULTS = 8


class Backoff:
    """Delays between attempts that double up to a limit, each with jitter, so that a fleet does not come back as one.

    A connection alone is no success: whoever is let in and thrown out again must not come back at once, for ever.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._delay = 0.0
        self._said = ""
        self._said_at = 0.0
        self._announced = False
        self._connected_at: float | None = None
        self.away_since: float | None = time.monotonic()
        """Since when there is no connection (monotonic seconds); None while there is one."""
        self.reason = ""
        """Why the last attempt failed."""

    def begin(self) -> None:
        """Note that it is tried from now on: until then nobody was away."""
        self.away_since = time.monotonic()

    def failed(self, error: Exception) -> float:
        """Note a failure; gives the seconds until the next attempt, and logs it if there is something new to say."""
        now = time.monotonic()
        if self._connected_at is not None and now - self._connected_at > LONGEST_DELAY_S:
            self._delay = 0.0
        self._connected_at = None
        if self.away_since is None:
            self.away_since = now
        self.reason = str(error)
        self._delay = min(LONGEST_DELAY_S, self._delay * 2 if self._delay else FIRST_DELAY_S)
        wait = self._delay * random.uniform(0.5, 1.0)  # noqa: S311  # jitter, no secret
        if str(error) != self._said or now - self._said_at > REPEAT_S:
            log.warning("%s: %s; trying again for as long as it takes", self._what, error)
            self._said, self._said_at, self._announced = str(error), now, True
        return wait

    def connected(self) -> None:
        """Note that the connection stands."""
        self._connected_at = time.monotonic()
        self.away_since = None
        if self._announced:
            log.info("%s: connected again", self._what)
            self._announced = False

    def worked(self) -> None:
        """Note that something came through; the next failure begins anew."""
        self._delay, self._said = 0.0, ""


class SourceRunner:
    """Reads a source in a thread of its own and hands its deliveries to the mailbox."""

    def __init__(
        self, name: str, source: Source, mailbox: Mailbox, counters: Counters, fatal: Callable[[BaseException], None]
    ) -> None:
        self.name = name
        self._source = source
        self._mailbox = mailbox
        self._counters = counters
        self._fatal = fatal
        self._stop = threading.Event()
        self._closed = False
        self.backoff = Backoff(f"{name}: source")
        self.connected = threading.Event()
        """Set while connected; app.py waits for it to say ready."""
        self.exhausted = threading.Event()
        """Set when there will never be another input: what is lost then does not come again."""
        push_to = getattr(source, "push_to", None)
        if push_to is not None:
            push_to(self._offer)
        self._thread = threading.Thread(target=self._run, name=f"source.{name}", daemon=True)

    def start(self) -> None:
        """Start connecting and reading."""
        self.backoff.begin()
        self._thread.start()

    def _run(self) -> None:
        beat = watchdog.begin(f"source.{self.name}")
        try:
            while not self._stop.is_set():
                try:
                    with beat.allowing(watchdog.CONNECT_SILENCE_S):
                        self._source.connect()
                    self.backoff.connected()
                    self.connected.set()
                    self._read(beat)
                except UnavailableError as error:
                    self.connected.clear()
                    with beat.allowing(watchdog.CONNECT_SILENCE_S):
                        self._source.close()
                        self._stop.wait(self.backoff.failed(error))
                except SourceExhausted as end:
                    log.info("%s: %s", self.name, end)
                    self.exhausted.set()
                    break
            self._mailbox.end()
        except BaseException as error:  # noqa: BLE001  # a thread that dies in silence would look like a quiet source
            self._fatal(error)
        finally:
            # An attempt to connect may outlast the one who closes this runner.
            if self._closed:
                self._source.close()
            beat.end()

    def _read(self, beat: watchdog.Heartbeat) -> None:
        while not self._stop.is_set():
            beat.tick()
            delivery = self._source.read(TICK_S)
            if delivery is None:
                continue
            self.backoff.worked()
            self._counters.came_in()
            while not self._mailbox.put(delivery, TICK_S):
                beat.tick()
                if self._stop.is_set():
                    delivery.settle(StoppedError("the service is stopping"))
                    break

    def _offer(self, deliveries: Sequence[Delivery]) -> int:
        """Take deliveries in the source's own thread, without waiting; gives how many there was room for."""
        taken = 0 if self._stop.is_set() else self._mailbox.offer(deliveries)
        if taken:
            self.backoff.worked()
        return taken

    def halt(self) -> None:
        """Ask the thread to read no more, without waiting for it."""
        self._stop.set()

    def stop_reading(self, deadline: float) -> None:
        """End the thread; the connection stays, so that what is in work can still be acknowledged.

        Waits until `deadline` (monotonic seconds) at most: an attempt to connect cannot be broken off.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Close the connection."""
        self._closed = True
        self._source.close()


@dataclass(slots=True, eq=False)
class _Item:
    """A result on its way; `order` is its place in the line."""

    order: int
    result: Result | None
    """None for one that comes from the spool."""
    done: Done
    row: Row | None = None
    """Its row in the spool, where it has one."""
    sent_at: float = 0.0
    """When it was handed to the sink (monotonic seconds), where that matters."""


class SinkRunner:
    """Sends results through a sink, in order, until each is safe.

    The worker's thread sends by itself while all goes well; this runner's thread takes up what came back and reconnects.
    What is on the way is bounded: `submit` waits when the sink is away, and so the source is held back.
    """

    def __init__(self, name: str, sink: Sink, counters: Counters, fatal: Callable[[BaseException], None]) -> None:
        self.name = name
        self._sink = sink
        self._counters = counters
        self._fatal = fatal
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._watched = 0
        """How many wait for a change: while nobody does, nobody has to be told."""
        self._sending = threading.Lock()
        self._waiting: deque[_Item] = deque()
        self._on_the_way: OrderedDict[int, _Item] = OrderedDict()
        self._order = 0
        self._epoch = 0
        self._connected = False
        self._failed = False
        self._stopping = False
        self.backoff = Backoff(f"{name}: sink")
        self._next_attempt = 0.0
        self._rejected_at = -REPEAT_S
        self._outcomes: queue.SimpleQueue[tuple[_Item | None, int, Exception | None] | None] = queue.SimpleQueue()
        # A sink may call `done` from a thread of its own, outside of `send` and with no lock held: what follows runs there.
        self._prompt = bool(getattr(sink, "prompt", False))
        if hasattr(sink, "on_lost"):
            sink.on_lost = self._gone
        self._thread = threading.Thread(target=self._run, name=f"sink.{name}", daemon=True)
        self.connected = threading.Event()

    def start(self) -> None:
        """Start connecting."""
        self.backoff.begin()
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Say whether `submit` would neither wait nor take long now: for threads that must not wait."""
        healthy = self._prompt and self._connected and not self._failed and not self._stopping
        return healthy and len(self._waiting) < QUEUED_RESULTS

    def submit(self, result: Result, done: Done, *, wait: bool = True) -> None:
        """Take a result over; `done(None)` is called when it is safe, `done(error)` if the runner stops before.

        Waits while as many results are on the way as may be, unless `wait` is false (after `ready` had said yes).
        """
        if self.send_now(result, done):
            return
        with self._lock:
            while wait and not self._has_room() and not self._wait_for(self._has_room, TICK_S):
                watchdog.tick()  # the worker is held back, not stuck
            stopping = self._stopping
            if not stopping:
                self._order += 1
                self._waiting.append(_Item(self._order, result, done))
        if stopping:
            done(StoppedError("the service has stopped"))
        else:
            self._pump()

    @property
    def _direct(self) -> bool:
        """Say whether results need not stand in line. The lock is held."""
        return self._connected and not self._failed and not self._stopping

    def send_now(self, result: Result, done: Done) -> bool:
        """Send a result past the line, if nobody stands there and there is room; else do nothing and say False.

        This is `submit` for the usual case, with a third of its steps.
        """
        if self._waiting or not self._sending.acquire(blocking=False):
            return False
        try:
            with self._lock:
                if self._waiting or not self._direct or len(self._on_the_way) >= self._sink.window:
                    return False
                self._order = order = self._order + 1
                self._on_the_way[order] = item = _Item(order, result, done, None, time.monotonic())
                epoch = self._epoch
            try:
                self._sink.send(result, partial(self._done, item, epoch))
            except (RejectedError, UnavailableError, GoneError) as error:
                self._not_sent(item, epoch, error)
        finally:
            self._sending.release()
        if self._waiting:
            self._pump()
        return True

    def _has_room(self) -> bool:
        return self._stopping or len(self._waiting) < QUEUED_RESULTS

    def _wait_for(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until the condition holds, at most so long. The lock is held."""
        self._watched += 1
        try:
            return self._changed.wait_for(condition, timeout)
        finally:
            self._watched -= 1

    def _may_send(self) -> bool:
        """Say whether there is a result to send and room for it. The lock is held."""
        ready = self._connected and not self._failed and bool(self._waiting)
        return ready and len(self._on_the_way) < self._sink.window

    def _pump(self) -> None:
        """Send what waits, as far as the send window goes; never waits for whoever is sending or connecting."""
        while self._may_send():
            if not self._sending.acquire(blocking=False):
                return  # who has it looks again afterwards
            try:
                while (following := self._next()) is not None and self._send(*following):
                    pass
            finally:
                self._sending.release()

    def _next(self) -> tuple[_Item, int] | None:
        """Take the next result out of the line, if it may be sent; gives it and the connection's epoch."""
        with self._lock:
            if not self._may_send():
                return None
            item = self._waiting.popleft()
            self._on_the_way[item.order] = item
            if self._watched:
                self._changed.notify_all()
            return item, self._epoch

    def _send(self, item: _Item, epoch: int) -> bool:
        """Send one result; False if that was the last one on this connection."""
        try:
            self._hand_over(item, partial(self._done, item, epoch))
        except (RejectedError, UnavailableError, GoneError) as error:
            return self._not_sent(item, epoch, error)
        return True

    def _not_sent(self, item: _Item, epoch: int, error: Exception) -> bool:
        """Take note that the sink has refused or failed; False if nothing more can be sent on this connection."""
        if isinstance(error, GoneError):
            with self._lock:
                self._failed = True
            self._fatal(error)
            return False
        if not isinstance(error, RejectedError):
            with self._lock:
                # Nothing overtakes this result before the connection is made anew.
                self._failed = self._failed or epoch == self._epoch
        self._outcomes.put((item, epoch, error))
        return isinstance(error, RejectedError)

    def _hand_over(self, item: _Item, done: Done) -> None:
        assert item.result is not None  # only a runner with a spool sends what comes from there
        self._sink.send(item.result, done)

    def _done(self, item: _Item, epoch: int, error: Exception | None) -> None:
        if error is not None or not self._prompt:
            # May run inside `send`, or in a client library's callback, under its locks: only the hand-over happens here.
            self._outcomes.put((item, epoch, error))
            return
        with self._lock:
            if epoch != self._epoch or self._on_the_way.pop(item.order, None) is None:
                return  # of an earlier connection: it is being sent again
            if self._watched:
                self._changed.notify_all()
        self.backoff.worked()
        item.done(None)
        if self._waiting:
            self._pump()

    def _gone(self, error: Exception) -> None:
        """Take note of a connection's loss even if nothing is on the way. Called by the sink, from any thread."""
        self._outcomes.put((None, self._epoch, error))

    def _run(self) -> None:
        beat = watchdog.begin(f"sink.{self.name}")
        try:
            while not self._finished():
                beat.tick()
                wait = IDLE_S
                if not self._connected:
                    if time.monotonic() >= self._next_attempt:
                        with beat.allowing(watchdog.CONNECT_SILENCE_S):
                            self._connect()
                    if not self._connected:
                        wait = min(wait, max(0.0, self._next_attempt - time.monotonic()))
                try:
                    outcome = self._outcomes.get(timeout=min(wait, self._look_after()))
                except queue.Empty:
                    continue
                if outcome is not None:
                    self._take(*outcome)
        except BaseException as error:  # noqa: BLE001  # a thread that dies in silence would hold all results for ever
            self._fatal(error)
        finally:
            # Here, too: an attempt to connect may outlast the one who stops this runner.
            if self._stopping:
                self._sink.close()
            beat.end()

    def _look_after(self) -> float:
        """Do what is due by now; gives the seconds after which something may be due again."""
        return IDLE_S

    def _unreachable(self) -> None:
        """Take note that an attempt to connect has failed."""

    def _reachable(self) -> None:
        """Take note of a new connection. The lock is held."""

    def _finished(self) -> bool:
        with self._lock:
            return self._stopping and not self._waiting and not self._on_the_way

    def _connect(self) -> None:
        """Try once."""
        try:
            with self._sending:  # whoever still sends on the old connection is done with it first
                self._sink.connect()
        except UnavailableError as error:
            self._next_attempt = time.monotonic() + self.backoff.failed(error)
            self._unreachable()
            return
        self.backoff.connected()
        with self._lock:
            self._connected, self._failed = True, False
            self._reachable()
        self.connected.set()
        self._pump()

    def _take(self, item: _Item | None, epoch: int, error: Exception | None) -> None:
        """Take up what came back: `item` is None where a connection was lost on which nothing was on the way."""
        with self._changed:
            if epoch != self._epoch or (not self._connected if item is None else item.order not in self._on_the_way):
                return  # of an earlier connection: it is being sent again
            if item is None or not (error is None or isinstance(error, RejectedError)):
                self._lost()
            else:
                del self._on_the_way[item.order]
                self._changed.notify_all()
        if item is None or not (error is None or isinstance(error, RejectedError)):
            self._next_attempt = time.monotonic() + self.backoff.failed(error or UnavailableError("connection lost"))
            return
        if error is None:
            self.backoff.worked()
            item.done(None)
        else:
            self._rejected(item, error)
        self._pump()

    def _rejected(self, item: _Item, error: RejectedError) -> None:
        """Let go of a result that the other side will never take."""
        self._tell_rejected(item.result.frame_id if item.result is not None else "", "is lost", error)
        item.done(None)

    def _tell_rejected(self, frame_id: str, fate: str, error: RejectedError) -> None:
        self._counters.dropped("rejected")
        now = time.monotonic()
        often = now - self._rejected_at < REPEAT_S
        log.log(
            logging.DEBUG if often else logging.ERROR,
            "%s: sink: result %s %s, and so may others (counted as rejected): %s",
            self.name,
            frame_id,
            fate,
            error,
        )
        if not often:
            self._rejected_at = now

    def _lost(self) -> None:
        """Put what is on the way back in line, in order, and connect again. The lock is held."""
        self._epoch += 1
        self._connected = False
        self.connected.clear()
        self._waiting.extendleft(reversed(self._on_the_way.values()))
        for _ in self._on_the_way:
            self._counters.retried()
        self._on_the_way.clear()

    def idle(self, timeout: float) -> bool:
        """Wait until everything that was submitted is safe; False if `timeout` seconds were not enough."""
        with self._lock:
            return self._wait_for(lambda: not self._waiting and not self._on_the_way, timeout)

    def stop(self, deadline: float) -> int:
        """Send what is left until `deadline` (monotonic seconds); gives how many results stay unsent."""
        self.idle(max(0.0, deadline - time.monotonic()))
        with self._changed:
            self._stopping = True
            left = [*self._on_the_way.values(), *self._waiting]
            self._waiting.clear()
            self._on_the_way.clear()
            self._changed.notify_all()
        self._outcomes.put(None)
        for item in left:
            item.done(StoppedError("the service stopped before the result was safe"))
        if self._thread.is_alive():
            self._thread.join(TICK_S)
        self._sink.close()
        return len(left)
