"""Results to standard output, one JSON document a line."""

from __future__ import annotations

import os
import select
import sys
import threading
from dataclasses import dataclass

from edge_serve import watchdog
from edge_serve.config import Wiring
from edge_serve.errors import GoneError, Problem, SendError, UnavailableError
from edge_serve.frame import Result
from edge_serve.sinks import SYNCHRONOUS, Done, SinkContext

# How long a thread waits for a reader at most before it shows that it lives.
TICK_S = 0.5
# Several pipelines may write; a line of one never lands inside a line of another.
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class StdoutSinkOptions:
    """Results to standard output as JSON lines."""


class StdoutSink:
    """Writes lines; safe when the kernel has them.

    They do not wait on disk: whoever reads a pipe next is not who read it before.
    """

    Options = StdoutSinkOptions

    def __init__(self, options: StdoutSinkOptions, context: SinkContext) -> None:
        self._fd = -1
        self._ready = select.poll()

    @classmethod
    def check(cls, options: StdoutSinkOptions, key: str, wiring: Wiring) -> list[Problem]:
        """Nothing can be wrong."""
        return []

    @property
    def window(self) -> int:
        """Every line is written when `send` returns."""
        return SYNCHRONOUS

    def connect(self) -> None:
        """Take hold of standard output."""
        try:
            self._fd = sys.stdout.fileno()
        except (OSError, ValueError, AttributeError) as error:
            raise UnavailableError(f"standard output is closed: {error}") from error
        self._ready = select.poll()
        self._ready.register(self._fd, select.POLLOUT)

    def send(self, result: Result, done: Done) -> None:
        """Write one line."""
        data = memoryview(result.to_json() + b"\n")
        try:
            while not _LOCK.acquire(timeout=TICK_S):
                watchdog.tick()  # another pipeline waits for the reader
            try:
                while data:
                    while not self._ready.poll(TICK_S * 1e3):
                        watchdog.tick()  # a reader that does not read holds the inputs back; that is not stuck
                    data = data[os.write(self._fd, data[: select.PIPE_BUF]) :]
            finally:
                _LOCK.release()
        except BrokenPipeError as error:
            raise GoneError("whoever read standard output is gone") from error
        except OSError as error:
            raise SendError(f"standard output cannot be written: {error.strerror}") from error
        done(None)

    def close(self) -> None:
        """Standard output stays open."""
