"""Sinks: where results go. A sink connects, sends, and closes; the runner bounds, repeats and reconnects.

A plug-in is a class with these members, registered under the entry point group ``edge_serve.sinks``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from edge_serve.config import Config, Wiring
from edge_serve.errors import Problem
from edge_serve.frame import Result
from edge_serve.health import Counters

# The window of a sink whose results are safe when `send` returns.
SYNCHRONOUS = 256

Done = Callable[["Exception | None"], None]


@dataclass(frozen=True, slots=True)
class SinkContext:
    """What a sink may know of its pipeline."""

    config: Config
    pipeline: str
    counters: Counters
    number: int = 0
    """Which of the pipeline's sinks this is, from 0."""


class Sink(Protocol):
    """One connection to where results go."""

    Options: type

    def __init__(self, options: Any, context: SinkContext) -> None: ...

    @classmethod
    def check(cls, options: Any, key: str, wiring: Wiring) -> list[Problem]:
        """Find what is wrong with the options beyond their types, without touching the network."""
        ...

    @property
    def window(self) -> int:
        """Say how many results may be on the way at a time."""
        ...

    def connect(self) -> None:
        """Get ready to send; UnavailableError if that is not possible now. Called again after a failure."""
        ...

    def send(self, result: Result, done: Done) -> None:
        """Send one result; `done` is called once, from any thread, with None when it is safe, or with an error.

        After an error (here or in `done`) the runner connects again and repeats what was not safe. RejectedError says
        that this result will never be taken, GoneError (raised here) that none will be any more: the service ends.
        """
        ...

    def close(self) -> None:
        """Let go of the connection; may be called twice."""
        ...


class RejectedError(Exception):
    """The other side will not take this result, however often it is sent."""
