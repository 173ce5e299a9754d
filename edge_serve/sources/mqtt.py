"""Inputs from MQTT topics: QoS 1, acknowledged by hand and in order once their results are safe upstream.

A session outlives connections. What was held unacknowledged when a connection was lost is delivered again with the same
packet id; while its first delivery is still in work, that takes the redelivery's place, so no input is processed twice.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

from edge_serve.config import Wiring
from edge_serve.errors import Problem, SendError, TooLargeError, UnavailableError
from edge_serve.frame import Capture, Delivery, Frame, Result, Settle, parse_time
from edge_serve.mqtt_packets import MAX_PROPERTIES
from edge_serve.schema import join, option
from edge_serve.sources import SourceContext
from edge_serve.topics import filter_problem, topic_matches

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
MAX_KEY_LENGTH = 1024
# So many messages, or bytes of them, are pushed at once at most: as many as a mailbox holds.
BATCH_ITEMS = 32
BATCH_BYTES = 1024 * 1024
# What a waiting message takes besides its bytes (frame, delivery, closures): measured 1350 on CPython 3.11, 64 bits.
MESSAGE_OVERHEAD = 1536


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
        "bytes of messages that may wait; then the broker is not read: large messages, or one that ignores receive_maximum",
        low=1024,
    )
    retained: bool = option(False, "take retained messages as inputs, too; they may be old")


class _Held:
    """A QoS 1 message that is not acknowledged yet; called to settle it."""

    __slots__ = ("digest", "packet_id", "settled", "source")

    def __init__(self, source: MqttSource, packet_id: int, digest: bytes) -> None:
        self.source = source
        self.packet_id = packet_id
        self.digest = digest
        self.settled = False

    def __call__(self, error: Exception | None) -> None:
        if error is None:  # else it stays unacknowledged, and comes again
            self.source.settled(self)


@dataclass(frozen=True, slots=True)
class _Lost:
    """The end of a connection, behind everything that it has brought."""

    epoch: int
    error: Exception


class MqttSource:
    """A subscription in a lasting session."""

    Options = MqttSourceOptions

    def __init__(self, options: MqttSourceOptions, context: SourceContext) -> None:
        self._options = options
        self._context = context
        self._filters = [options.topic] if isinstance(options.topic, str) else list(options.topic)
        self._limit = receive_maximum(options, context.window, context.config.brokers[options.broker].version)
        self._max_payload = context.config.brokers[options.broker].max_payload
        self._connection: Connection | None = None
        self._lock = threading.Lock()
        self._epoch = 0
        self._up = False
        self._held: OrderedDict[int, _Held] = OrderedDict()
        """What this connection has brought and is not acknowledged yet, by packet id, in order of arrival."""
        self._stale: dict[int, _Held] = {}
        """The same of earlier connections: the broker will deliver it again."""
        self._waiting_bytes = 0
        self._held_back = False
        self._push: Callable[[Sequence[Delivery]], int] | None = None
        self._batch: list[Delivery] = []
        """What came together and is to be pushed together. Only the network thread looks at it, and at its size."""
        self._batch_bytes = 0
        self._queued = 0
        """What was put into the queue, or read from it, and has not reached the mailbox: later messages go behind it."""
        self._in_hand = False
        self._queue: queue.SimpleQueue[tuple[Delivery, int] | _Lost] = queue.SimpleQueue()

    @classmethod
    def check(cls, options: MqttSourceOptions, key: str, wiring: Wiring) -> list[Problem]:
        """Find topics that are none, pairs of settings that cannot keep their promise, and brokers that are not there."""
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
        status = wiring.config.status
        if wiring.config.has_status and status.broker == options.broker:
            topic = status.topic_of(wiring.config.device)
            problems.extend(
                Problem(
                    join(key, "topic"),
                    f"{pattern!r} matches this device's own status topic {topic!r}: it would come in as an input",
                    "Change one of the two, or set enabled = false under [status]",
                )
                for pattern in filters
                if topic_matches(pattern, topic)
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
            network=f"{self._context.config.device}.{self._context.pipeline}",
            on_message=self._arrived,
            on_pause=self._hand_over,
            on_session=self._session,
            on_lost=lambda error: self._lost(_Lost(epoch, error)),
        )
        self._connection = connection
        try:
            connection.open()
            connection.subscribe(self._filters, options.qos, retained=options.retained)
        except UnavailableError as error:
            with self._lock:
                waiting = self._waiting_bytes > 0
            if not waiting:
                raise
            # What came before has its results first, even if this goes on for hours.
            self._lost(_Lost(epoch, error))

    def push_to(self, offer: Callable[[Sequence[Delivery]], int]) -> None:
        """Offer deliveries from the network thread, before `connect`; what is not taken comes by `read`, as all else did.

        `offer` takes the first ones of what it is given, without waiting, and says how many.
        """
        self._push = offer

    def read(self, timeout: float) -> Delivery | None:
        """Give the next message as a delivery. Whoever asks again has put the one before into the mailbox."""
        if self._in_hand:
            self._in_hand = False
            with self._lock:
                self._queued -= 1
        try:
            item = self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, _Lost):
            if item.epoch != self._epoch:
                return None
            raise UnavailableError(str(item.error)) from item.error
        delivery, weight = item
        with self._lock:
            self._waiting_bytes -= weight
            self._set_flow()
        self._in_hand = True
        return delivery

    def close(self) -> None:
        """Disconnect; the broker keeps the session and what is unacknowledged."""
        with self._lock:
            self._up = False
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        # What was held as being in work has to be: it would be taken for that when it is delivered again.
        self._hand_over()

    def _session(self, present: bool) -> None:
        with self._lock:
            self._stale.update(self._held)
            self._held.clear()
            if not present:
                # The broker has forgotten: its packet ids mean new messages from now on.
                self._stale.clear()
            self._up = True

    def _lost(self, lost: _Lost) -> None:
        self._hand_over()
        with self._lock:
            # From here on an acknowledgement would reach nobody: what is settled now is kept, and acknowledged when the
            # broker delivers it again.
            self._up = self._up and lost.epoch != self._epoch
        self._queue.put(lost)

    def _arrived(self, message: Message) -> None:
        captured = Capture(time.time(), time.monotonic())
        digest = blake2b(message.topic.encode() + b"\0" + message.payload, digest_size=12).digest()
        # Before it counts as held: a redelivery of what is held is taken for being in work.
        frame = self._frame(message, captured, digest)
        settle: Settle = _ignore
        if message.qos:
            held = self._hold(message, digest)
            if held is None:
                return
            settle = held
        if message.retained and not self._options.retained:
            settle(None)
            return
        delivery = Delivery(frame, settle, self._replier(message) if message.response_topic else None)
        weight = MESSAGE_OVERHEAD + message.size
        if self._push is not None and not self._queued:
            self._batch.append(delivery)
            self._batch_bytes += weight
            if len(self._batch) >= BATCH_ITEMS or self._batch_bytes >= BATCH_BYTES:
                self._hand_over()
        else:
            self._enqueue([(delivery, weight)])

    def _hand_over(self) -> None:
        """Push what came together; what there is no room for waits in the queue."""
        batch = self._batch
        if not batch or self._push is None:
            return
        self._batch, self._batch_bytes = [], 0
        taken = self._push(batch)
        if taken < len(batch):
            self._enqueue([(each, MESSAGE_OVERHEAD + _size(each.frame)) for each in batch[taken:]])

    def _enqueue(self, items: Sequence[tuple[Delivery, int]]) -> None:
        with self._lock:
            self._queued += len(items)
            self._waiting_bytes += sum(weight for _, weight in items)
            self._set_flow()
        for item in items:
            self._queue.put(item)

    def _set_flow(self) -> None:
        """Hold the broker back while too much waits, until half of that is worked off. The lock is held.

        Not by disconnecting: a broker that numbers its messages anew would send the same ones again, and again.
        """
        connection, limit = self._connection, self._options.max_bytes
        if connection is None:
            return
        if self._waiting_bytes > limit:
            connection.hold()
            if not self._held_back:
                log.info(
                    "%s: more than %d bytes of messages wait (max_bytes); they come first",
                    self._context.pipeline,
                    limit,
                )
            self._held_back = True
        elif self._waiting_bytes <= limit // 2:
            connection.go_on()

    def _hold(self, message: Message, digest: bytes) -> _Held | None:
        """Note a QoS 1 message as unacknowledged; None if its first delivery is still in work and takes it over."""
        with self._lock:
            known = self._stale.pop(message.packet_id, None)
            if known is not None and message.duplicate and known.digest == digest:
                self._held[message.packet_id] = known
                self._acknowledge_in_order()
                return None
            held = self._held[message.packet_id] = _Held(self, message.packet_id, digest)
            self._held.move_to_end(message.packet_id)
            return held

    def settled(self, held: _Held) -> None:
        """Acknowledge a message, and those behind it that waited for that; from any thread."""
        with self._lock:
            held.settled = True
            self._acknowledge_in_order()

    def _acknowledge_in_order(self) -> None:
        """Send the PUBACKs of all settled messages that no unsettled one stands before (MQTT 5, section 4.6)."""
        connection = self._connection
        if connection is None or not self._up:
            return
        while self._held:
            packet_id, first = next(iter(self._held.items()))
            if not first.settled:
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
        said = message.user.get("captured_at") if message.user else None
        error: Exception | None = None
        if said:
            try:
                captured = Capture.at(parse_time(said))
            except (ValueError, OverflowError):
                log.debug("%s: user property captured_at is no RFC 3339 time: %.40r", self._context.pipeline, said)
        size = message.skipped or len(message.payload)
        if size > self._max_payload:
            error = TooLargeError(
                f"message of {size} bytes on {message.topic} is over the limit of {self._max_payload} (max_payload)"
            )
        elif message.properties:
            error = TooLargeError(
                f"message on {message.topic} has {message.properties} bytes of properties; {MAX_PROPERTIES} are the limit"
            )
        elif message.skipped:
            error = TooLargeError(f"message on {message.topic} has more properties than anybody reads: {size} bytes")
        meta = {"topic": message.topic}
        if "key" in message.user:
            meta["key"] = message.user["key"][:MAX_KEY_LENGTH]
        return Frame(
            identity, message.topic, captured, message.content_type, b"" if error else message.payload, meta, error
        )

    def _replier(self, message: Message) -> _Reply | None:
        topic = message.response_topic
        if not topic:
            return None
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
                    qos if connection.has_room else 0,
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


def _size(frame: Frame) -> int:
    """Count the bytes that are kept of a message, as Message.size does but for what is used up."""
    return len(frame.payload) + len(frame.source) + len(frame.content_type or "")


def _ignore(_error: Exception | None) -> None:
    """Settle a QoS 0 message: nobody waits for that."""


def receive_maximum(options: MqttSourceOptions, window: int, version: str) -> int:
    """Give how many messages may be unacknowledged: as configured, else 20, or enough for some windows of samples."""
    if options.receive_maximum:
        return options.receive_maximum
    if version == "3.1.1":
        return DEFAULT_IN_FLIGHT_311
    return min(MAX_RECEIVE_MAXIMUM, max(DEFAULT_RECEIVE_MAXIMUM, WINDOWS_ON_THE_WAY * window))
