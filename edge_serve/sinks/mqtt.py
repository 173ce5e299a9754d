"""Results to an MQTT topic: QoS 1, safe when the broker has acknowledged them."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_serve.config import Wiring
from edge_serve.errors import Problem, SendError
from edge_serve.frame import Result
from edge_serve.schema import join, option
from edge_serve.sinks import Done, RejectedError, SinkContext
from edge_serve.topics import topic_matches

if TYPE_CHECKING:
    from edge_serve.mqtt import Connection

PLACEHOLDERS = ("device", "pipeline")
DEFAULT_TOPIC = "edge-serve/{device}/{pipeline}/result"


@dataclass(frozen=True, slots=True)
class MqttSinkOptions:
    """Results to an MQTT broker."""

    topic: str = option(DEFAULT_TOPIC, "topic of the results; {device} and {pipeline} are filled in")
    broker: str = option("", "name of the [mqtt.NAME] table; default: [mqtt]", example="plant")
    qos: int = option(1, "1: safe when the broker has it; 0: sent and forgotten, may be lost", low=0, high=1)
    retain: bool = option(False, "let the broker keep the last result for new subscribers")
    client_id: str | None = option(None, "client id; default {device}.{pipeline}.out", example="press-3.vibration.out")
    max_inflight: int = option(
        20, "most results that may be unacknowledged; a broker may ask for fewer", low=1, high=65535
    )


class MqttSink:
    """A connection that publishes."""

    Options = MqttSinkOptions

    def __init__(self, options: MqttSinkOptions, context: SinkContext) -> None:
        self._options = options
        self._context = context
        self._topic = fill(options.topic, context.config.device, context.pipeline)
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._waiting: dict[int, Done] = {}
        self._early: dict[int, Exception | None] = {}
        self._lost: Exception | None = None

    @classmethod
    def check(cls, options: MqttSinkOptions, key: str, wiring: Wiring) -> list[Problem]:
        """Find topics that are none, and results that would come back as inputs."""
        problems = []
        if options.broker not in wiring.config.brokers:
            table = f"[mqtt.{options.broker}]" if options.broker else "[mqtt]"
            problems.append(Problem(join(key, "broker"), f"there is no table {table}", f"Add {table} with url = …"))
        unknown = [name for name in re.findall(r"\{([^}]*)\}", options.topic) if name not in PLACEHOLDERS]
        if unknown:
            problems.append(
                Problem(join(key, "topic"), f"unknown placeholder {{{unknown[0]}}}", "Known: {device}, {pipeline}")
            )
            return problems
        topic = fill(options.topic, wiring.config.device, wiring.pipeline.name)
        if not topic or any(wild in topic for wild in "+#\0"):
            problems.append(
                Problem(join(key, "topic"), f"{topic!r} is no topic", "A topic to publish to has no wildcards")
            )
        source = wiring.pipeline.source
        if source.type == "mqtt" and source.options.broker == options.broker:
            patterns = source.options.topic
            problems.extend(
                Problem(
                    join(key, "topic"),
                    f"{topic!r} matches the pipeline's own source {pattern!r}: results would come back as inputs",
                    "Change one of the two",
                )
                for pattern in ([patterns] if isinstance(patterns, str) else patterns)
                if topic_matches(pattern, topic)
            )
        twins = [sink for sink in wiring.pipeline.sinks if isinstance(sink.options, MqttSinkOptions)]
        ids = [(sink.options.broker, sink.options.client_id) for sink in twins]
        if options.client_id is not None and ids.count((options.broker, options.client_id)) > 1:
            problems.append(
                Problem(
                    join(key, "client_id"),
                    "is used by another sink; the broker would disconnect them in turn",
                    "Leave it out",
                )
            )
        return problems

    @property
    def window(self) -> int:
        """Give the send window: ours, or the broker's Receive Maximum if that is smaller."""
        connection = self._connection
        return (
            min(self._options.max_inflight, connection.send_limit)
            if connection is not None
            else self._options.max_inflight
        )

    def connect(self) -> None:
        """Connect anew; whatever an earlier connection still owed was told as failed."""
        from edge_serve.mqtt import Connection

        self.close()
        options, context = self._options, self._context
        suffix = f".{context.number}" if context.number else ""
        connection = Connection(
            context.config,
            options.broker,
            options.client_id or f"{context.config.device}.{context.pipeline}.out{suffix}",
            clean=True,
            on_sent=self._sent,
            on_lost=self._fail,
        )
        with self._lock:
            self._lost = None
        connection.open()
        self._connection = connection

    def send(self, result: Result, done: Done) -> None:
        """Publish one result."""
        connection = self._connection
        if connection is None:
            raise SendError("not connected")
        user = {"edge-serve": "1"}
        # Ids come from outside; brokers disconnect over control characters. The document has the id in any case.
        if result.frame_id.isprintable():
            user["id"] = result.frame_id
        try:
            packet_id = connection.publish(
                self._topic,
                result.to_json(),
                self._options.qos,
                content_type="application/json",
                user=user,
                retain=self._options.retain,
            )
        except SendError as error:
            if getattr(error, "lasting", False):
                raise RejectedError(str(error)) from error
            raise
        # The network thread may have been faster; no lock of ours is held while paho holds its own.
        with self._lock:
            if packet_id not in self._early:
                if self._lost is None:
                    self._waiting[packet_id] = done
                    return
                outcome: Exception | None = self._lost
            else:
                outcome = self._early.pop(packet_id)
        done(outcome)

    def _sent(self, packet_id: int, error: Exception | None) -> None:
        if getattr(error, "lasting", False):
            error = RejectedError(str(error))
        with self._lock:
            done = self._waiting.pop(packet_id, None)
            if done is None:
                self._early[packet_id] = error
                return
        done(error)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._lost = error
            waiting = list(self._waiting.values())
            self._waiting.clear()
            self._early.clear()
        for done in waiting:
            done(error)

    def close(self) -> None:
        """Disconnect; what was not acknowledged is told as failed."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            self._fail(SendError(f"{connection.address}: closed"))


def fill(template: str, device: str, pipeline: str) -> str:
    """Fill a topic template's placeholders."""
    return template.replace("{device}", device).replace("{pipeline}", pipeline)
