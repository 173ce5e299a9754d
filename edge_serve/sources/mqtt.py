"""Inputs from MQTT topics: QoS 1, acknowledged by hand and in order once their results are safe upstream.

A session outlives connections. What was held unacknowledged when a connection was lost is delivered again with the same
packet id; while its first delivery is still in work, that takes the redelivery's place, so no input is processed twice.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

from edge_serve.config import Wiring
from edge_serve.errors import Problem, SendError, TooLargeError, UnavailableError
from edge_serve.frame import Capture, Delivery, Frame, Result, Settle, parse_time
from edge_serve.schema import join, option
from edge_serve.sources import SourceContext

if TYPE_CHECKING:
    from edge_serve.mqtt import Connection, Message

log = logging.getLogger(__name__)

DEFAULT_RECEIVE_MAXIMUM = 20
# MQTT 3.1.1 cannot tell the broker; this is below what brokers allow a client by default (mosquitto: 20).
DEFAULT_IN_FLIGHT_311 = 16
# Windows hold their samples unsettled; this many windows' worth may be on the way before the broker has to wait.
WINDOWS_ON_THE_WAY = 4
MAX_RECEIVE_MAXIMUM = 65535
MAX_ID_LENGTH = 256


@dataclass(frozen=True, slots=True)
class MqttSourceOptions:
    """Inputs from an MQTT broker."""

    topic: str | tuple[str, ...] = option(
        doc='topic filter, or a list of them; + and # are wildcards; "$share/GROUP/FILTER" shares the work among devices',
        example="plant/+/vibration",
    )
    broker: str = option("", "name of the [mqtt.NAME] table; default: [mqtt]", example="plant")
    qos: int = option(1, "1 with policy lossless, 0 with latest", low=0, high=2)
    policy: Literal["lossless", "latest"] = option(
        "lossless", "lossless: every message is worked through, the broker waits; latest: the newest wins, for cameras"
    )
    client_id: str | None = option(None, "client id; default {device}.{pipeline}.in", example="press-3.vibration.in")
    receive_maximum: int = option(
        0,
        "most messages that may be unacknowledged; 0: 20, or four windows of samples, or with 3.1.1 16 (set it to the broker's own limit)",
        low=0,
        high=MAX_RECEIVE_MAXIMUM,
    )
    max_bytes: int = option(
        64 * 1024 * 1024,
        "bytes that a broker which ignores receive_maximum may send ahead; then it is disconnected",
        low=1024,
    )
    retained: bool = option(False, "take retained messages as inputs, too; they may be old")


class _Held:
    """A QoS 1 message that is not acknowledged yet."""

    __slots__ = ("digest", "epoch", "packet_id", "settled")

    def __init__(self, packet_id: int, epoch: int, digest: bytes) -> None:
        self.packet_id = packet_id
        self.epoch = epoch
        self.digest = digest
        self.settled = False


class MqttSource:
    """A subscription in a lasting session."""

    Options = MqttSourceOptions

    def __init__(self, options: MqttSourceOptions, context: SourceContext) -> None:
        self._options = options
        self._context = context
        self._filters = [options.topic] if isinstance(options.topic, str) else list(options.topic)
        self._limit = receive_maximum(options, context.window, context.config.brokers[options.broker].version)
        self._connection: Connection | None = None
        self._lock = threading.Lock()
        self._epoch = 0
        self._held: OrderedDict[int, _Held] = OrderedDict()
        self._waiting_bytes = 0
        self._queue: queue.SimpleQueue[Delivery | tuple[int, Exception]] = queue.SimpleQueue()

    @classmethod
    def check(cls, options: MqttSourceOptions, key: str, wiring: Wiring) -> list[Problem]:
        """Find topics that are none, pairs of settings that cannot keep their promise, and brokers that are not there."""
        from edge_serve.mqtt import filter_problem

        problems = []
        if options.broker not in wiring.config.brokers:
            table = f"[mqtt.{options.broker}]" if options.broker else "[mqtt]"
            problems.append(Problem(join(key, "broker"), f"there is no table {table}", f"Add {table} with url = …"))
        filters = [options.topic] if isinstance(options.topic, str) else list(options.topic)
        if not filters:
            problems.append(Problem(join(key, "topic"), "is an empty list", "Name at least one topic filter"))
        for pattern in filters:
            wrong = filter_problem(pattern)
            if wrong is not None:
                problems.append(
                    Problem(join(key, "topic"), f"{pattern!r} is no topic filter", wrong[0].upper() + wrong[1:])
                )
        if options.qos == 2:
            problems.append(
                Problem(
                    join(key, "qos"),
                    "2 is not supported: the client confirms such a message while it is only in memory, so a crash loses it",
                    "Use 1",
                )
            )
        elif options.policy == "lossless" and options.qos != 1:
            problems.append(
                Problem(
                    join(key, "qos"),
                    "0 cannot be lossless: the broker sends such a message once and forgets it",
                    'Use qos = 1 or policy = "latest"',
                )
            )
        elif options.policy == "latest" and options.qos != 0:
            problems.append(
                Problem(
                    join(key, "policy"),
                    "latest with qos = 1 would acknowledge messages that were dropped",
                    'Use qos = 0 or policy = "lossless"',
                )
            )
        return problems

    @property
    def policy(self) -> str:
        """Give the configured policy."""
        return self._options.policy

    @property
    def hold_limit(self) -> int | None:
        """Give the Receive Maximum: a broker sends no more while that many are unacknowledged."""
        return self._limit if self._options.qos else None

    def connect(self) -> None:
        """Connect, resume the session and subscribe."""
        from edge_serve.mqtt import Connection

        self.close()
        with self._lock:
            self._epoch += 1
            epoch = self._epoch
        options = self._options
        connection = Connection(
            self._context.config,
            options.broker,
            options.client_id or f"{self._context.config.device}.{self._context.pipeline}.in",
            clean=options.qos == 0,
            receive_maximum=self._limit if options.qos else None,
            on_message=lambda message: self._arrived(message, epoch),
            on_session=self._session,
            on_lost=lambda error: self._queue.put((epoch, error)),
        )
        self._connection = connection
        connection.open()
        connection.subscribe(self._filters, options.qos, retained=options.retained)

    def read(self, timeout: float) -> Delivery | None:
        """Give the next message as a delivery."""
        try:
            item = self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, tuple):
            epoch, error = item
            if epoch != self._epoch:
                return None
            raise UnavailableError(str(error)) from error
        with self._lock:
            self._waiting_bytes -= len(item.frame.payload)
        return item

    def close(self) -> None:
        """Disconnect; the broker keeps the session and what is unacknowledged."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _session(self, present: bool) -> None:
        with self._lock:
            if not present:
                # The broker has forgotten: its packet ids mean new messages from now on.
                self._held.clear()

    def _arrived(self, message: Message, epoch: int) -> None:
        captured = Capture.now()
        digest = blake2b(message.topic.encode() + b"\0" + message.payload, digest_size=12).digest()
        settle: Settle = _ignore
        if message.qos:
            held = self._hold(message, epoch, digest)
            if held is None:
                return
            settle = self._settler(held)
        if message.retained and not self._options.retained:
            settle(None)
            return
        with self._lock:
            self._waiting_bytes += len(message.payload)
            too_much = self._waiting_bytes > self._options.max_bytes
        frame = self._frame(message, captured, digest)
        self._queue.put(Delivery(frame, settle, self._replier(message)))
        if too_much and self._connection is not None:
            log.warning(
                "%s: the broker ignores receive_maximum: more than %d bytes wait; disconnecting until they are worked off",
                self._context.pipeline,
                self._options.max_bytes,
            )
            self._connection.break_off()

    def _hold(self, message: Message, epoch: int, digest: bytes) -> _Held | None:
        """Note a QoS 1 message as unacknowledged; None if its first delivery is still in work and takes it over."""
        with self._lock:
            known = self._held.get(message.packet_id)
            if known is not None and message.duplicate and known.digest == digest and known.epoch != epoch:
                known.epoch = epoch
                self._held.move_to_end(message.packet_id)
                self._acknowledge_in_order()
                return None
            held = self._held[message.packet_id] = _Held(message.packet_id, epoch, digest)
            self._held.move_to_end(message.packet_id)
            return held

    def _settler(self, held: _Held) -> Settle:
        def settle(error: Exception | None) -> None:
            if error is not None:
                return  # unacknowledged, it comes again
            with self._lock:
                held.settled = True
                self._acknowledge_in_order()

        return settle

    def _acknowledge_in_order(self) -> None:
        """Send the PUBACKs of all settled messages that no unsettled one stands before (MQTT 5, section 4.6)."""
        connection = self._connection
        if connection is None:
            return
        for packet_id, held in list(self._held.items()):
            if held.epoch != self._epoch:
                continue  # of an earlier connection and not delivered again yet
            if not held.settled:
                break
            connection.acknowledge(packet_id)
            del self._held[packet_id]

    def _frame(self, message: Message, captured: Capture, digest: bytes) -> Frame:
        identity = message.user.get("id")
        if not identity or len(identity) > MAX_ID_LENGTH:
            # A resent PUBLISH keeps its packet id, so within one session this names the same message again.
            identity = (
                f"{message.packet_id:04x}-{digest.hex()}" if message.qos else f"{captured.monotonic:.6f}-{digest.hex()}"
            )
        said = message.user.get("captured_at")
        error: Exception | None = None
        if said:
            try:
                captured = Capture.at(parse_time(said))
            except (ValueError, OverflowError):
                log.debug("%s: user property captured_at is no RFC 3339 time: %.40r", self._context.pipeline, said)
        size = message.skipped or len(message.payload)
        limit = self._context.config.brokers[self._options.broker].max_payload
        if size > limit:
            error = TooLargeError(
                f"message of {size} bytes on {message.topic} is over the limit of {limit} (max_payload)"
            )
        meta = {"topic": message.topic}
        if "key" in message.user:
            meta["key"] = message.user["key"]
        return Frame(
            identity, message.topic, captured, message.content_type, b"" if error else message.payload, meta, error
        )

    def _replier(self, message: Message) -> _Reply | None:
        topic = message.response_topic
        if not topic:
            return None
        from edge_serve.mqtt import topic_matches

        if any(wild in topic for wild in "+#\0") or any(topic_matches(pattern, topic) for pattern in self._filters):
            # A reply there would be our own next input.
            self._context.counters.dropped("response_topic")
            return None
        return _Reply(self, topic, message.correlation, message.qos)

    def answer(self, topic: str, correlation: bytes | None, qos: int, results: Sequence[Result]) -> None:
        """Publish results to a requester's response topic; who is gone or offline misses them."""
        connection = self._connection
        if connection is None:
            return
        for result in results:
            try:
                connection.publish(
                    topic,
                    result.to_json(),
                    qos,
                    content_type="application/json",
                    user={"edge-serve": "1"},
                    correlation=correlation,
                )
            except SendError as error:
                log.debug("%s: no reply to %s: %s", self._context.pipeline, topic, error)


@dataclass(frozen=True, slots=True)
class _Reply:
    """Answers one request on the connection that it came by."""

    source: MqttSource
    topic: str
    correlation: bytes | None
    qos: int

    def __call__(self, results: Sequence[Result]) -> None:
        self.source.answer(self.topic, self.correlation, min(self.qos, 1), results)


def _ignore(_error: Exception | None) -> None:
    """Settle a QoS 0 message: nobody waits for that."""


def receive_maximum(options: MqttSourceOptions, window: int, version: str) -> int:
    """Give how many messages may be unacknowledged: as configured, else 20, or enough for some windows of samples."""
    if options.receive_maximum:
        return options.receive_maximum
    if version == "3.1.1":
        return DEFAULT_IN_FLIGHT_311
    return min(MAX_RECEIVE_MAXIMUM, max(DEFAULT_RECEIVE_MAXIMUM, WINDOWS_ON_THE_WAY * window))
