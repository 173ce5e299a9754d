"""Sources: where inputs come from. A source connects, gives deliveries, and closes; the runner does all the rest.

A plug-in is a class with these members, registered under the entry point group ``edge_serve.sources``. It never
reconnects, retries or sleeps by itself.

A source whose inputs come in a thread of its own may also have ``push_to(offer)``, called once before ``connect``: then it may
offer deliveries from that thread, ``offer(deliveries) -> int``, which never waits and says how many of the first ones were
taken (worked off, even, where the model is quick). What was not taken comes by ``read``, before anything later is offered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from edge_serve.config import Config, Wiring
from edge_serve.errors import Problem
from edge_serve.frame import Delivery
from edge_serve.health import Counters


@dataclass(frozen=True, slots=True)
class SourceContext:
    """What a source may know of its pipeline."""

    config: Config
    pipeline: str
    counters: Counters
    describe: Callable[[], dict[str, Any]]
    """Gives what a client may ask: model, inputs, outputs (JSON-ready)."""
    window: int = 0
    """Samples in a window, 0 without windows: a source that bounds what is unsettled leaves room for some of them."""


class Source(Protocol):
    """One connection to where inputs come from. All methods but `settle` and `reply` run in the runner's thread."""

    Options: type

    def __init__(self, options: Any, context: SourceContext) -> None: ...

    @classmethod
    def check(cls, options: Any, key: str, wiring: Wiring) -> list[Problem]:
        """Find what is wrong with the options beyond their types, without touching the network."""
        ...

    @property
    def policy(self) -> str:
        """Say what a full mailbox means: "latest" or "lossless"."""
        ...

    @property
    def hold_limit(self) -> int | None:
        """Say how many deliveries may be unsettled before the source gives no more; None: it never stops for that."""
        ...

    def connect(self) -> None:
        """Get ready to read; UnavailableError if that is not possible now. Called again after a connection was lost."""
        ...

    def read(self, timeout: float) -> Delivery | None:
        """Give the next input, None after `timeout` seconds without one.

        Raises UnavailableError when the connection is lost, SourceExhausted when there will never be another input.
        """
        ...

    def close(self) -> None:
        """Let go of the connection; deliveries may still be settled afterwards, to no effect. May be called twice."""
        ...
