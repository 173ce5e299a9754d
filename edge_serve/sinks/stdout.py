"""Results to standard output, one JSON document a line."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass

from edge_serve.config import Wiring
from edge_serve.errors import GoneError, Problem, SendError, UnavailableError
from edge_serve.frame import Result
from edge_serve.sinks import SYNCHRONOUS, Done, SinkContext

# Several pipelines may write; a line of one never lands inside a line of another.
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class StdoutSinkOptions:
    """Results to standard output as JSON lines."""


class StdoutSink:
    """Writes lines; safe when the kernel has them."""

    Options = StdoutSinkOptions

    def __init__(self, options: StdoutSinkOptions, context: SinkContext) -> None:
        self._fd = -1

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

    def send(self, result: Result, done: Done) -> None:
        """Write one line."""
        data = memoryview(result.to_json() + b"\n")
        try:
            with _LOCK:
                while data:
                    data = data[os.write(self._fd, data) :]
        except BrokenPipeError as error:
            raise GoneError("whoever read standard output is gone") from error
        except OSError as error:
            raise SendError(f"standard output cannot be written: {error.strerror}") from error
        done(None)

    def close(self) -> None:
        """Standard output stays open."""
