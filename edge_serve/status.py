"""The status topic: a retained document that says how this device is, and a last will that says that it is gone.

The reporter has a thread and a connection of its own: it waits for nobody, and nobody waits for it. Nothing is kept for a
broker that is away; what is published on its return is how things are then.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edge_serve import __version__, watchdog
from edge_serve.config import Config
from edge_serve.errors import SendError, UnavailableError
from edge_serve.frame import format_time
from edge_serve.health import Health, board
from edge_serve.line import Line
from edge_serve.runner import Backoff

if TYPE_CHECKING:
    from edge_serve.mqtt import Connection

log = logging.getLogger(__name__)

VERSION = 1
# How soon a change is seen, and the least time between two documents.
LOOK_S = 1.0
# How long the end may wait for the broker to take the farewell; a network that is dead takes none.
FAREWELL_S = 1.0
NO_SPOOL = {"items": 0, "bytes": 0, "oldest_s": None, "dropped": 0}


class Reporter:
    """Makes the document, for all who ask."""

    def __init__(
        self,
        device: str,
        runtime: str,
        health: Health,
        lines: Callable[[], Sequence[Line]],
        spool: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> None:
        self.health = health
        self._facts = {"device": device, "version": __version__, "runtime": runtime, "board": board()}
        self._lines = lines
        self._spool = spool
        self._started = time.monotonic()

    def document(self) -> dict[str, Any]:
        """Give the status as it is now, JSON-ready (README, Status)."""
        troubles = self.health.look()
        state, since = self.health.state
        return {
            "v": VERSION,
            "state": state,
            "since": format_time(since),
            **self._facts,
            "uptime_s": round(time.monotonic() - self._started, 3),
            "pipelines": {line.name: _pipeline(line) for line in self._lines()},
            "spool": dict(self._spool() or NO_SPOOL),
            "problems": [each.text for each in troubles],
        }

    def changing(self) -> tuple[object, ...]:
        """Give what makes a new document worth its while before the interval is over."""
        troubles = self.health.look()
        models = tuple((line.name, line.pipeline.model) for line in self._lines())
        return self.health.state[0], tuple(each.key for each in troubles), models

    def farewell(self, reason: str) -> dict[str, Any]:
        """Give the last document, with the last counts."""
        return {
            **self.document(),
            "state": "offline",
            "since": format_time(time.time()),
            "problems": [],
            "reason": reason,
        }

    def will(self) -> dict[str, Any]:
        """Give what the broker shall say when this device is gone without a word; when that is, nobody can know now."""
        return {"v": VERSION, "state": "offline", "since": None, **self._facts, "reason": "the connection was lost"}


def _pipeline(line: Line) -> dict[str, Any]:
    model = line.pipeline.model
    return {
        "model": model.name,
        "version": model.version,
        "variant": model.variant,
        "delegate": model.delegate,
        "reasons": list(line.reasons),
        "connected": line.connected,
        **line.counters.snapshot(),
    }


class Publisher:
    """Keeps the status topic up to date from a thread of its own."""

    def __init__(self, config: Config, reporter: Reporter) -> None:
        self._config = config
        self._options = config.status
        self._topic = self._options.topic_of(config.device)
        self._client_id = self._options.client_id or f"{config.device}.status"
        self._reporter = reporter
        self._backoff = Backoff("status")
        self._connection: Connection | None = None
        self._next_attempt = 0.0
        self._wake = threading.Event()
        self._lost: Exception | None = None
        self._stopping = False
        self._reason = ""
        self._deadline = 0.0
        self._unacknowledged = False
        self._refused = ""
        self._published: object = None
        self._next_due = 0.0
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def start(self) -> None:
        """Start connecting and publishing."""
        self._thread.start()

    def stop(self, reason: str) -> None:
        """Say `offline` and why, if there is a connection that takes it at once, and disconnect."""
        self._reason, self._deadline = reason, time.monotonic() + FAREWELL_S
        self._stopping = True
        self._wake.set()
        # A connection that is just being made is not waited for: its broker has the last will from before, or nothing.
        self._thread.join(2 * FAREWELL_S if self._connection is not None else LOOK_S / 4)

    def _run(self) -> None:
        beat = watchdog.begin("status")
        try:
            while not self._stopping:
                beat.tick()
                if self._connection is None and time.monotonic() >= self._next_attempt:
                    with beat.allowing(watchdog.CONNECT_SILENCE_S):
                        self._connect()
                if self._lost is not None:
                    self._disconnect(self._lost)
                self._publish_if_due()
                self._wake.wait(LOOK_S)
                self._wake.clear()
            self._say_goodbye()
        except Exception as error:  # what is served does not depend on what is said about it
            log.exception("status: nothing is published any more: %s", error)
        finally:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()
            beat.end()

    def _connect(self) -> None:
        from edge_serve.mqtt import Connection

        self._lost = None
        try:
            connection = Connection(
                self._config,
                self._options.broker,
                self._client_id,
                clean=True,
                will=(self._topic, _encode(self._reporter.will())),
                on_sent=self._sent,
                on_lost=self._fail,
            )
            connection.open()
        except UnavailableError as error:
            self._next_attempt = time.monotonic() + self._backoff.failed(error)
            return
        self._connection = connection
        self._backoff.connected()
        self._unacknowledged, self._published = False, None

    def _disconnect(self, error: Exception) -> None:
        connection, self._connection = self._connection, None
        self._lost = None
        if connection is not None:
            connection.close()
            self._next_attempt = time.monotonic() + self._backoff.failed(error)

    def _publish_if_due(self) -> None:
        if self._connection is None or self._unacknowledged:
            return
        changing = self._reporter.changing()
        now = time.monotonic()
        if changing == self._published and now < self._next_due:
            return
        if self._publish(self._connection, self._reporter.document()):
            self._published, self._next_due = changing, now + self._options.interval_s

    def _publish(self, connection: Connection, document: Mapping[str, Any]) -> bool:
        self._unacknowledged = True
        try:
            connection.publish(self._topic, _encode(document), 1, content_type="application/json", retain=True)
        except SendError as error:
            # Too large for the broker, or the connection is being lost: the next one may be taken.
            self._sent(0, error)
            self._next_due = time.monotonic() + self._options.interval_s
            return False
        return True

    def _sent(self, _packet_id: int, error: Exception | None) -> None:
        self._unacknowledged = False
        if error is None:
            self._backoff.worked()
            self._refused = ""
        # A refusal is the broker's answer; that the connection is lost is told by itself.
        elif hasattr(error, "lasting") and str(error) != self._refused:
            log.warning("status: %s; check the broker's access rules for %s", error, self._topic)
            self._refused = str(error)
        self._wake.set()

    def _fail(self, error: Exception) -> None:
        self._lost = error
        self._wake.set()

    def _say_goodbye(self) -> None:
        if self._connection is None or not self._publish(self._connection, self._reporter.farewell(self._reason)):
            return
        while self._unacknowledged and self._lost is None and time.monotonic() < self._deadline:
            self._wake.wait(max(0.0, self._deadline - time.monotonic()))
            self._wake.clear()


def _encode(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
