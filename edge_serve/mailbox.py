"""The bounded hand-off between a source's thread and a pipeline's worker: latest | lossless.

`lossless`: the putter waits while the box is full, so the source is held back. `latest`: the newest frame wins, what it
replaces is settled as dropped and counted. Bounded in items and in bytes; one item always fits, whatever its size.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from edge_serve.errors import DroppedError, StoppedError
from edge_serve.frame import Delivery
from edge_serve.health import Counters

Policy = Literal["latest", "lossless"]
DEFAULT_ITEMS = 32
DEFAULT_BYTES = 64 * 1024 * 1024


def payload_bytes(delivery: Delivery) -> int:
    """Give the memory that a frame's payload takes."""
    payload = delivery.frame.payload
    if type(payload) is bytes:
        return len(payload)
    size = getattr(payload, "nbytes", None)
    return int(size) if size is not None else len(payload)


class Mailbox:
    """A queue of deliveries between two threads; put and take may be called from any number of them."""

    def __init__(
        self, policy: Policy, counters: Counters, *, items: int = DEFAULT_ITEMS, limit_bytes: int = DEFAULT_BYTES
    ) -> None:
        self.policy = policy
        self._counters = counters
        self._items = 1 if policy == "latest" else items
        self._limit = limit_bytes
        self._queue: deque[tuple[Delivery, int]] = deque()
        self._bytes = 0
        self._ended = False
        self._closed = False
        # Taken by itself where nobody has to be woken up: that is cheaper than by way of a condition.
        self._lock = threading.Lock()
        self._readable = threading.Condition(self._lock)
        self._writable = threading.Condition(self._lock)
        self._readers = 0
        self._writers = 0
        """How many wait for which of the two."""
        self._working = 0
        self._claimed = False
        self.helper: Callable[[Sequence[Delivery]], int] | None = None
        """Works in an offering thread on the first ones of what it is given, if it may `claim` that; gives their number."""

    def put(self, delivery: Delivery, timeout: float) -> bool:
        """Hand a delivery on; False if a lossless box stayed full for `timeout` seconds (the caller still has it)."""
        size = payload_bytes(delivery)
        replaced: list[Delivery] = []
        with self._readable:
            if self.policy == "latest":
                while self._queue:
                    replaced.append(self._pop())
            elif not self._wait_to_write(size, timeout):
                return False
            closed = self._closed
            if not closed:
                self._queue.append((delivery, size))
                self._bytes += size
                if self._readers:
                    self._readable.notify()
        self._drop(replaced)
        if closed:
            delivery.settle(StoppedError("the pipeline has stopped"))
        return True

    def offer(self, deliveries: Sequence[Delivery]) -> int:
        """Hand deliveries on without waiting; gives how many there was room for, from the first on.

        Where nothing waits the helper may work them off before this returns, so that no other thread has to wake up.
        """
        taken = 0
        if self.policy == "latest" and len(deliveries) > 1:
            taken = len(deliveries) - 1
            self._counters.came_in(taken)
            self._drop(deliveries[:taken])
        while taken < len(deliveries):
            if self.helper is not None and not self._queue:
                taken += self.helper(deliveries[taken:] if taken else deliveries)
            put = self._put_at_once(deliveries, taken)
            if not put:
                break
            taken += put
        return taken

    def _put_at_once(self, deliveries: Sequence[Delivery], first: int) -> int:
        """Put deliveries from the given one on, as many as fit; gives their number."""
        replaced: list[Delivery] = []
        put = first
        with self._lock:
            while put < len(deliveries) and not self._ended:
                size = payload_bytes(deliveries[put])
                if self.policy == "latest":
                    while self._queue:
                        replaced.append(self._pop())
                elif not self._fits(size):
                    break
                self._queue.append((deliveries[put], size))
                self._bytes += size
                put += 1
            if self._readers and self._queue:
                self._readable.notify(len(self._queue))
        self._drop(replaced)
        self._counters.came_in(put - first)
        return put - first

    def claim(self) -> bool:
        """Say whether the calling thread may work on what it has itself: nothing waits, and nobody else works.

        Until it calls `release`, `take` gives nothing.
        """
        with self._lock:
            if self._claimed or self._working or self._queue or self._ended:
                return False
            self._claimed = True
            return True

    def release(self) -> None:
        """End the claim."""
        with self._lock:
            self._claimed = False
            if self._readers and (self._queue or self._ended):
                self._readable.notify_all()

    def _following(self) -> Delivery:
        delivery = self._pop()
        if self._writers:
            self._writable.notify()
        return delivery

    def _wait_to_write(self, size: int, timeout: float) -> bool:
        self._writers += 1
        try:
            return self._writable.wait_for(lambda: self._closed or self._fits(size), timeout)
        finally:
            self._writers -= 1

    def _wait_to_read(self, timeout: float) -> None:
        self._readers += 1
        try:
            self._readable.wait_for(lambda: not self._claimed and (self._queue or self._ended), timeout)
        finally:
            self._readers -= 1

    def _drop(self, replaced: Sequence[Delivery]) -> None:
        if not replaced:
            return
        self._counters.dropped("latest", len(replaced))
        for old in replaced:
            old.settle(DroppedError("a newer frame came before this one was taken"))

    def _fits(self, size: int) -> bool:
        return not self._queue or (len(self._queue) < self._items and self._bytes + size <= self._limit)

    def _pop(self) -> Delivery:
        delivery, size = self._queue.popleft()
        self._bytes -= size
        return delivery

    def take(self, timeout: float) -> Delivery | None:
        """Give the next delivery; None if there was none for `timeout` seconds, or there will be none (`drained`).

        Whoever gets one says `worked` when it is done with it.
        """
        with self._lock:
            if self._claimed or not (self._queue or self._ended):
                self._wait_to_read(timeout)
            if not self._queue or self._claimed:
                return None
            self._working += 1
            return self._following()

    def worked(self) -> None:
        """Say that a taken delivery is worked off."""
        with self._lock:
            self._working -= 1

    @property
    def drained(self) -> bool:
        """Say whether the source has ended and everything was taken."""
        with self._readable:
            return self._ended and not self._queue and not self._claimed

    @property
    def waiting(self) -> int:
        """Count what is inside, without waiting for those who are at it."""
        return len(self._queue)

    def end(self) -> None:
        """Say that nothing more will be put; what is inside can still be taken."""
        with self._readable:
            self._ended = True
            self._readable.notify_all()

    def close(self) -> None:
        """Refuse what comes and settle what is inside as stopped."""
        with self._readable:
            self._ended = self._closed = True
            rest = [self._pop() for _ in range(len(self._queue))]
            self._readable.notify_all()
            self._writable.notify_all()
        for delivery in rest:
            delivery.settle(StoppedError("the pipeline has stopped"))
