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

from edge_serve.errors import SourceExhausted, StoppedError, UnavailableError
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
    """Delays between attempts that double up to a limit, each with jitter, so that a fleet does not come back as one."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._delay = 0.0
        self._said = ""
        self._said_at = 0.0

    def failed(self, error: Exception) -> float:
        """Note a failure; gives the seconds until the next attempt, and logs it if there is something new to say."""
        self._delay = min(LONGEST_DELAY_S, self._delay * 2 if self._delay else FIRST_DELAY_S)
        wait = self._delay * random.uniform(0.5, 1.0)  # noqa: S311  # jitter, no secret
        now = time.monotonic()
        if str(error) != self._said or now - self._said_at > REPEAT_S:
            log.warning("%s: %s; trying again for as long as it takes", self._what, error)
            self._said, self._said_at = str(error), now
        return wait

    def succeeded(self) -> None:
        """Note a success; the next failure begins anew."""
        if self._said:
            log.info("%s: connected again", self._what)
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
                    backoff.succeeded()
                    self.connected.set()
                    self._read()
                except UnavailableError as error:
                    self.connected.clear()
                    self._source.close()
                    self._stop.wait(backoff.failed(error))
                except SourceExhausted as end:
                    log.info("%s: %s", self.name, end)
                    break
            self._mailbox.end()
        except BaseException as error:  # noqa: BLE001  # a thread that dies in silence would look like a quiet source
            self._fatal(error)

    def _read(self) -> None:
        while not self._stop.is_set():
            delivery = self._source.read(TICK_S)
            if delivery is None:
                continue
            self._counters.came_in()
            while not self._mailbox.put(delivery, TICK_S):
                if self._stop.is_set():
                    delivery.settle(StoppedError("the service is stopping"))
                    break

    def stop_reading(self) -> None:
        """End the thread; the connection stays, so that what is in work can still be acknowledged."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

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
        self._stopping = False
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

    def _pump(self) -> None:
        """Send what waits, as far as the send window goes."""
        while True:
            with self._sending:
                with self._lock:
                    room = self._connected and self._waiting and len(self._on_the_way) < self._sink.window
                    if not room:
                        return
                    item = self._waiting.popleft()
                    self._on_the_way[item.order] = item
                    epoch = self._epoch
                    self._changed.notify()
                try:
                    self._sink.send(item.result, partial(self._done, item, epoch))
                except (UnavailableError, RejectedError) as error:
                    self._done(item, epoch, error)
                    if isinstance(error, UnavailableError):
                        return

    def _done(self, item: _Item, epoch: int, error: Exception | None) -> None:
        # May run inside a client library's callback, under its locks: only the hand-over happens here.
        self._outcomes.put((item, epoch, error))

    def _run(self) -> None:
        backoff = Backoff(f"{self.name}: sink")
        next_attempt = 0.0
        try:
            while not self._finished():
                wait: float | None = None
                if not self._connected:
                    if time.monotonic() >= next_attempt:
                        next_attempt = time.monotonic() + self._connect(backoff)
                    if not self._connected:
                        wait = max(0.0, next_attempt - time.monotonic())
                try:
                    outcome = self._outcomes.get(timeout=wait)
                except queue.Empty:
                    continue
                if outcome is not None:
                    self._take(*outcome)
        except BaseException as error:  # noqa: BLE001  # a thread that dies in silence would hold all results for ever
            self._fatal(error)

    def _finished(self) -> bool:
        with self._lock:
            return self._stopping and not self._waiting and not self._on_the_way

    def _connect(self, backoff: Backoff) -> float:
        """Try once; gives the seconds to wait before the next attempt."""
        try:
            self._sink.connect()
        except UnavailableError as error:
            return backoff.failed(error)
        backoff.succeeded()
        with self._lock:
            self._connected = True
        self.connected.set()
        self._pump()
        return 0.0

    def _take(self, item: _Item, epoch: int, error: Exception | None) -> None:
        with self._changed:
            if epoch != self._epoch or item.order not in self._on_the_way:
                return  # of an earlier connection: it is being sent again
            if error is None or isinstance(error, RejectedError):
                del self._on_the_way[item.order]
                self._changed.notify_all()
            else:
                self._lost()
        if isinstance(error, RejectedError):
            self._counters.dropped("rejected")
            log.error("%s: sink: result %s is lost: %s", self.name, item.result.frame_id, error)
            error = None
        if error is None:
            item.done(None)
            self._pump()
        else:
            log.warning("%s: sink: %s", self.name, error)

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
