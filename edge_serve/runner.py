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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from edge_serve.errors import GoneError, SourceExhausted, StoppedError, UnavailableError
from edge_serve.frame import Result
from edge_serve.health import Counters
from edge_serve.mailbox import Mailbox
from edge_serve.sinks import Done, RejectedError, Sink
from edge_serve.sources import Source

log = logging.getLogger(__name__)

# How long a thread waits at most before it looks whether it shall stop.
TICK_S = 0.5
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

    def failed(self, error: Exception) -> float:
        """Note a failure; gives the seconds until the next attempt, and logs it if there is something new to say."""
        now = time.monotonic()
        if self._connected_at is not None and now - self._connected_at > LONGEST_DELAY_S:
            self._delay = 0.0
        self._connected_at = None
        self._delay = min(LONGEST_DELAY_S, self._delay * 2 if self._delay else FIRST_DELAY_S)
        wait = self._delay * random.uniform(0.5, 1.0)  # noqa: S311  # jitter, no secret
        if str(error) != self._said or now - self._said_at > REPEAT_S:
            log.warning("%s: %s; trying again for as long as it takes", self._what, error)
            self._said, self._said_at, self._announced = str(error), now, True
        return wait

    def connected(self) -> None:
        """Note that the connection stands."""
        self._connected_at = time.monotonic()
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
        self.connected = threading.Event()
        """Set while connected; app.py waits for it to say ready."""
        self.exhausted = threading.Event()
        """Set when there will never be another input: what is lost then does not come again."""
        self._thread = threading.Thread(target=self._run, name=f"source.{name}", daemon=True)

    def start(self) -> None:
        """Start connecting and reading."""
        self._thread.start()

    def _run(self) -> None:
        try:
            backoff = Backoff(f"{self.name}: source")
            while not self._stop.is_set():
                try:
                    self._source.connect()
                    backoff.connected()
                    self.connected.set()
                    self._read(backoff)
                except UnavailableError as error:
                    self.connected.clear()
                    self._source.close()
                    self._stop.wait(backoff.failed(error))
                except SourceExhausted as end:
                    log.info("%s: %s", self.name, end)
                    self.exhausted.set()
                    break
            self._mailbox.end()
        except BaseException as error:  # noqa: BLE001  # a thread that dies in silence would look like a quiet source
            self._fatal(error)

    def _read(self, backoff: Backoff) -> None:
        while not self._stop.is_set():
            delivery = self._source.read(TICK_S)
            if delivery is None:
                continue
            backoff.worked()
            self._counters.came_in()
            while not self._mailbox.put(delivery, TICK_S):
                if self._stop.is_set():
                    delivery.settle(StoppedError("the service is stopping"))
                    break

    def stop_reading(self, deadline: float) -> None:
        """End the thread; the connection stays, so that what is in work can still be acknowledged.

        Waits until `deadline` (monotonic seconds) at most: an attempt to connect cannot be broken off.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Close the connection."""
        self._source.close()


@dataclass(slots=True, eq=False)
class _Item:
    """A result on its way; `order` is its place in the line."""

    order: int
    result: Result
    done: Done


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
        self._sending = threading.Lock()
        self._waiting: deque[_Item] = deque()
        self._on_the_way: OrderedDict[int, _Item] = OrderedDict()
        self._order = 0
        self._epoch = 0
        self._connected = False
        self._failed = False
        self._stopping = False
        self._backoff = Backoff(f"{name}: sink")
        self._next_attempt = 0.0
        self._rejected_at = -REPEAT_S
        self._outcomes: queue.SimpleQueue[tuple[_Item, int, Exception | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"sink.{name}", daemon=True)
        self.connected = threading.Event()

    def start(self) -> None:
        """Start connecting."""
        self._thread.start()

    def submit(self, result: Result, done: Done) -> None:
        """Take a result over; `done(None)` is called when it is safe, `done(error)` if the runner stops before.

        Waits while as many results are on the way as may be.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or len(self._waiting) < QUEUED_RESULTS)
            stopping = self._stopping
            if not stopping:
                self._order += 1
                self._waiting.append(_Item(self._order, result, done))
        if stopping:
            done(StoppedError("the service has stopped"))
        else:
            self._pump()

    def _may_send(self) -> bool:
        """Say whether there is a result to send and room for it. The lock is held."""
        ready = self._connected and not self._failed and bool(self._waiting)
        return ready and len(self._on_the_way) < self._sink.window

    def _pump(self) -> None:
        """Send what waits, as far as the send window goes."""
        while True:
            with self._lock:
                if not self._may_send():
                    return  # without waiting for a connection that is just being made
            with self._sending:
                with self._lock:
                    if not self._may_send():
                        return
                    item = self._waiting.popleft()
                    self._on_the_way[item.order] = item
                    epoch = self._epoch
                    self._changed.notify()
                try:
                    self._sink.send(item.result, partial(self._done, item, epoch))
                except RejectedError as error:
                    self._done(item, epoch, error)
                except GoneError as error:
                    with self._lock:
                        self._failed = True
                    self._fatal(error)
                    return
                except UnavailableError as error:
                    with self._lock:
                        # Nothing overtakes this result before the connection is made anew.
                        self._failed = self._failed or epoch == self._epoch
                    self._done(item, epoch, error)
                    return

    def _done(self, item: _Item, epoch: int, error: Exception | None) -> None:
        # May run inside a client library's callback, under its locks: only the hand-over happens here.
        self._outcomes.put((item, epoch, error))

    def _run(self) -> None:
        try:
            while not self._finished():
                wait: float | None = None
                if not self._connected:
                    if time.monotonic() >= self._next_attempt:
                        self._connect()
                    if not self._connected:
                        wait = max(0.0, self._next_attempt - time.monotonic())
                try:
                    outcome = self._outcomes.get(timeout=wait)
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

    def _finished(self) -> bool:
        with self._lock:
            return self._stopping and not self._waiting and not self._on_the_way

    def _connect(self) -> None:
        """Try once."""
        try:
            with self._sending:  # whoever still sends on the old connection is done with it first
                self._sink.connect()
        except UnavailableError as error:
            self._next_attempt = time.monotonic() + self._backoff.failed(error)
            return
        self._backoff.connected()
        with self._lock:
            self._connected, self._failed = True, False
        self.connected.set()
        self._pump()

    def _take(self, item: _Item, epoch: int, error: Exception | None) -> None:
        with self._changed:
            if epoch != self._epoch or item.order not in self._on_the_way:
                return  # of an earlier connection: it is being sent again
            if error is None or isinstance(error, RejectedError):
                del self._on_the_way[item.order]
                self._changed.notify_all()
            else:
                self._lost()
        if error is None:
            self._backoff.worked()
        elif isinstance(error, RejectedError):
            self._rejected(item, error)
        else:
            self._next_attempt = time.monotonic() + self._backoff.failed(error)
            return
        item.done(None)
        self._pump()

    def _rejected(self, item: _Item, error: RejectedError) -> None:
        self._counters.dropped("rejected")
        now = time.monotonic()
        often = now - self._rejected_at < REPEAT_S
        log.log(
            logging.DEBUG if often else logging.ERROR,
            "%s: sink: result %s is lost, and others may be (counted as rejected): %s",
            self.name,
            item.result.frame_id,
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
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._on_the_way, timeout)

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
