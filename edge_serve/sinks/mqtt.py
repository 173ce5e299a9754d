"""Results to an MQTT topic: QoS 1, safe when the broker has acknowledged them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from edge_serve.config import Wiring
from edge_serve.errors import Problem, SendError
from edge_serve.frame import Result
from edge_serve.mqtt_packets import user_property
from edge_serve.schema import join, option
from edge_serve.sinks import Done, Encoded, RejectedError, SinkContext
from edge_serve.topics import topic_matches

if TYPE_CHECKING:
    from edge_serve.mqtt import Connection
    from edge_serve.mqtt_packets import Envelope

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
        self._connection: Connection | None = None
        self._envelope: Envelope | None = None
        self._names_ids = False
        self.on_lost: Callable[[Exception], None] | None = None
        """Called when the connection is lost, whether or not anything was on the way (the runner sets this)."""

    @property
    def prompt(self) -> bool:
        """Say that `done` comes from the network thread, never from inside `send`, and with no lock held."""
        return self._options.qos == 1

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
            network=f"{context.config.device}.{context.pipeline}",
            window=options.max_inflight,
            on_lost=self._lost,
        )
        self._envelope = connection.envelope(
            self._topic,
            options.qos,
            retain=options.retain,
            content_type="application/json",
            user={"edge-serve": "1"},
        )
        self._names_ids = connection.broker.version == "5"
        connection.open()
        self._connection = connection

    def _lost(self, error: Exception) -> None:
        if self.on_lost is not None:
            self.on_lost(error)

    def send(self, result: Result, done: Done) -> None:
        """Publish one result."""
        self._publish(result.frame_id, result.to_json(), done)

    @property
    def target(self) -> str:
        """Give topic and broker; the broker by its table's name, so that it may move."""
        return f"{self._options.broker}:{self._topic}"

    def encode(self, result: Result) -> Encoded:
        """Render the payload."""
        return Encoded(result.frame_id, result.to_json())

    def send_encoded(self, content: Encoded, done: Done) -> None:
        """Publish a result that has waited."""
        self._publish(content.frame_id, content.body, done)

    def _publish(self, frame_id: str, body: bytes, done: Done) -> None:
        connection, envelope = self._connection, self._envelope
        if connection is None or envelope is None:
            raise SendError("not connected")
        further = b""
        # Ids come from outside; brokers disconnect over control characters. The document has the id in any case.
        if self._names_ids and frame_id.isprintable():
            further = user_property("id", frame_id)
        try:
            connection.send(envelope, body, partial(_tell, done), further)
        except SendError as error:
            if getattr(error, "lasting", False):
                raise RejectedError(str(error)) from error
            raise

    def close(self) -> None:
        """Disconnect; what was not acknowledged is told as failed."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _tell(done: Done, error: Exception | None) -> None:
    """Tell the runner a result's fate in its own terms."""
    done(RejectedError(str(error)) if getattr(error, "lasting", False) else error)


def fill(template: str, device: str, pipeline: str) -> str:
    """Fill a topic template's placeholders."""
    return template.replace("{device}", device).replace("{pipeline}", pipeline)
