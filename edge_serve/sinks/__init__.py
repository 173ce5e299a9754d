"""Sinks: where results go. A sink connects, sends, and closes; the runner bounds, repeats and reconnects.

A plug-in is a class with these members, registered under the entry point group ``edge_serve.sinks``. Two more are optional:
``prompt``, true where ``done`` always comes from a thread of the sink's own, outside of ``send`` and with no lock held (then what
follows a success runs there); and an attribute ``on_lost``, which the runner sets to a function of one argument that tells of a
connection's loss while nothing is on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from edge_serve.config import Config, Wiring
from edge_serve.errors import Problem
from edge_serve.frame import Result
from edge_serve.health import Counters
from edge_serve.spool.row import Encoded

__all__ = ["SYNCHRONOUS", "Done", "Encoded", "RejectedError", "Sink", "SinkContext", "SpoolingSink"]

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


class SpoolingSink(Sink, Protocol):
    """A sink whose results can wait on disk while the other side is away; others hold their pipeline back then.

    What it sends of a result is rendered when that goes to the spool, and sent as it is later, by another process too.
    """

    @property
    def target(self) -> str:
        """Name where results go, as the configuration does: results wait for this, whatever else changes."""
        ...

    def encode(self, result: Result) -> Encoded:
        """Render a result in the bytes that are sent. Called from any thread, connected or not."""
        ...

    def send_encoded(self, content: Encoded, done: Done) -> None:
        """Send what `encode` has given, under the terms of `send`."""
        ...


class RejectedError(Exception):
    """The other side will not take this result, however often it is sent."""
