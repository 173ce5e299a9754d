"""The bounded hand-off between a source's thread and a pipeline's worker: latest | lossless.

`lossless`: the putter waits while the box is full, so the source is held back. `latest`: the newest frame wins, what it
replaces is settled as dropped and counted. Bounded in items and in bytes; one item always fits, whatever its size.
"""

from __future__ import annotations

import threading
from collections import deque
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
        condition = threading.Lock()
        self._readable = threading.Condition(condition)
        self._writable = threading.Condition(condition)

    def put(self, delivery: Delivery, timeout: float) -> bool:
        """Hand a delivery on; False if a lossless box stayed full for `timeout` seconds (the caller still has it)."""
        size = payload_bytes(delivery)
        replaced: list[Delivery] = []
        with self._readable:
            if self.policy == "latest":
                while self._queue:
                    replaced.append(self._pop())
            elif not self._writable.wait_for(lambda: self._closed or self._fits(size), timeout):
                return False
            closed = self._closed
            if not closed:
                self._queue.append((delivery, size))
                self._bytes += size
                self._readable.notify()
        for old in replaced:
            self._counters.dropped("latest")
            old.settle(DroppedError("a newer frame came before this one was taken"))
        if closed:
            delivery.settle(StoppedError("the pipeline has stopped"))
        return True

    def _fits(self, size: int) -> bool:
        return not self._queue or (len(self._queue) < self._items and self._bytes + size <= self._limit)

    def _pop(self) -> Delivery:
        delivery, size = self._queue.popleft()
        self._bytes -= size
        return delivery

    def take(self, timeout: float) -> Delivery | None:
        """Give the next delivery; None if there was none for `timeout` seconds, or there will be none (`drained`)."""
        with self._readable:
            if not self._queue and not self._ended:
                self._readable.wait_for(lambda: self._queue or self._ended, timeout)
            if not self._queue:
                return None
            delivery = self._pop()
            self._writable.notify()
            return delivery

    @property
    def drained(self) -> bool:
        """Say whether the source has ended and everything was taken."""
        with self._readable:
            return self._ended and not self._queue

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
