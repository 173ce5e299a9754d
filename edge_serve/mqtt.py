"""One MQTT connection: address, TLS, password, session, acknowledgements; the only module that knows paho.

A Connection lives from one `open` to its loss and is then thrown away: paho never reconnects and never stores messages
for us, so what it would do to them after a reconnect cannot surprise anybody. Reconnecting is the runner's.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_serve.config import Config, MqttBroker, password_of
from edge_serve.errors import SendError, UnavailableError

log = logging.getLogger(__name__)

# A PUBLISH is its payload, a topic of at most 64 KiB and properties; a longer rest of a packet is cut off and skipped.
PACKET_OVERHEAD = 192 * 1024
SKIP_CHUNK = 64 * 1024
PUBLISH = 0x30
# MQTT 5, 2.4: the broker is out of quota for now; the same publish may succeed later.
QUOTA_EXCEEDED = 0x97
NOT_AUTHORIZED = 0x87
# A network that is dead, not cut, takes no DISCONNECT; after this long it is closed without one.
GOODBYE_S = 1.0
# While nothing is read, the network thread looks this often whether it may go on, and sends what has to be sent.
PAUSE_S = 0.01


@dataclass(frozen=True, slots=True)
class Message:
    """A message that arrived. `skipped` is the whole packet's length where its payload was over the limit, else 0."""

    topic: str
    payload: bytes
    qos: int
    packet_id: int
    duplicate: bool
    retained: bool
    content_type: str | None
    response_topic: str | None
    correlation: bytes | None
    user: Mapping[str, str]
    skipped: int

    @property
    def size(self) -> int:
        """Count the bytes that are kept of it."""
        texts = (self.topic, self.content_type or "", self.response_topic or "")
        return len(self.payload) + sum(map(len, texts)) + len(self.correlation or b"")


class _Client(paho.Client):
    """paho with a bound on what one packet may take of memory, and with acknowledgements that the kernel sends at once.

    paho buffers a packet of any announced length. Here the rest of a PUBLISH beyond `limit` is read and let go, so that
    the message still arrives, marked, and can be answered and acknowledged instead of coming back for ever.

    While `flowing` is not set nothing is read, so that the broker has to wait; acknowledgements and pings still leave.
    """

    def __init__(self, limit: int, died: Callable[[Exception], None], **options: Any) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, **options)
        self.limit = limit
        self.skipped = 0
        self._skip = 0
        self._died = died
        self.flowing = threading.Event()
        self.flowing.set()

    def loop_forever(self, timeout: float = 1.0, retry_first_connection: bool = False) -> MQTTErrorCode:
        """Run the network thread; a packet that paho cannot read ends it, and would do so without a word."""
        try:
            return super().loop_forever(timeout, retry_first_connection)
        except Exception as error:  # noqa: BLE001  # whatever it is, somebody has to connect again
            self._died(error)
            return MQTTErrorCode.MQTT_ERR_PROTOCOL

    def _sock_recv(self, bufsize: int) -> bytes:
        if not self.flowing.is_set():
            self._is_alive()  # its answers to pings are not read either
            if not self.flowing.wait(PAUSE_S):
                raise BlockingIOError
        while self._skip:
            chunk = super()._sock_recv(min(self._skip, SKIP_CHUNK))
            if not chunk:
                return chunk
            self._is_alive()
            self._skip -= len(chunk)
        packet = self._in_packet
        if packet["have_remaining"] and not packet["packet"]:
            # The body of a packet begins. Re-armed each time: Linux falls back to delayed ACKs, and a broker that
            # leaves Nagle's algorithm on then takes 40 ms for a round trip.
            self._quick_ack()
            if packet["to_process"] > self.limit:
                if packet["command"] & 0xF0 != PUBLISH:
                    raise OSError(f"packet of {packet['to_process']} bytes that is no PUBLISH")
                self.skipped = packet["to_process"]
                self._skip = packet["to_process"] - self.limit
                packet["to_process"] = packet["remaining_length"] = self.limit
        data = super()._sock_recv(min(bufsize, packet["to_process"]) if packet["have_remaining"] else bufsize)
        if self._ping_t and data:
            self._is_alive()
        return data

    def _is_alive(self) -> None:
        # The answer to a ping comes behind a large message, and a slow network takes its time for that: whoever sends is
        # alive. paho would disconnect, and the message would come again, for ever.
        self._ping_t = 0.0
        self._last_bytes_received = time.monotonic()

    def _quick_ack(self) -> None:
        sock: Any = self._sock
        if sock is not None and hasattr(socket, "TCP_QUICKACK") and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


class _TlsSocket(ssl.SSLSocket):
    """A TLS socket that is closed when its handshake fails; paho forgets it then."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


class Connection:
    """A connection to a broker, with its own network thread. Callbacks run in that thread and must not block."""

    def __init__(
        self,
        config: Config,
        broker: str,
        client_id: str,
        *,
        clean: bool,
        receive_maximum: int | None = None,
        on_message: Callable[[Message], None] | None = None,
        on_session: Callable[[bool], None] | None = None,
        on_sent: Callable[[int, Exception | None], None] | None = None,
        on_lost: Callable[[Exception], None] | None = None,
    ) -> None:
        self.broker: MqttBroker = config.brokers[broker]
        self.address = self.broker.url
        self._on_message, self._on_session, self._on_sent, self._on_lost = on_message, on_session, on_sent, on_lost
        self._five = self.broker.version == "5"
        self._clean = clean
        self._receive_maximum = receive_maximum
        self._outcome: Exception | None = None
        self._answered = threading.Event()
        self._subscription = threading.Condition()
        self._wanted: tuple[list[str], int] = ([], 0)
        self._granted: list[ReasonCode] | None = None
        self._awaited = True
        self._closing = False
        self._up = False
        self.send_limit = 65535
        """The broker's Receive Maximum: how many QoS 1 publishes may be unacknowledged."""
        self._packet_limit: int | None = None
        url = urlsplit(self.broker.url)
        self._host = unquote(url.path) if url.scheme == "unix" else url.hostname or ""
        self._port = url.port or (8883 if url.scheme == "mqtts" else 1883)
        options: dict[str, Any] = {} if self._five else {"clean_session": clean}
        self._client = _Client(
            self.broker.max_payload + PACKET_OVERHEAD,
            self._died,
            client_id=client_id,
            protocol=MQTTProtocolVersion.MQTTv5 if self._five else MQTTProtocolVersion.MQTTv311,
            transport="unix" if url.scheme == "unix" else "tcp",
            reconnect_on_failure=False,
            manual_ack=True,
            **options,
        )
        self._client.connect_timeout = self.broker.connect_timeout_s
        # The send window is the runner's; paho must neither queue nor hold back on its own.
        self._client.max_inflight_messages_set(0)
        if url.scheme == "mqtts":
            self._client.tls_set_context(_tls(config, self.broker))
            self._client.tls_insecure_set(self.broker.insecure)
        if self.broker.username is not None:
            self._client.username_pw_set(self.broker.username, _password(config, broker))
        self._client.on_connect = self._connected
        self._client.on_disconnect = self._disconnected
        self._client.on_message = self._message
        self._client.on_publish = self._published
        self._client.on_subscribe = self._suback
        self._client.on_socket_open = self._no_delay

    def open(self) -> None:
        """Connect and wait for the broker's answer; UnavailableError with the reason if there is none or it refuses."""
        properties = None
        options: dict[str, Any] = {}
        if self._five:
            properties = Properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = 0 if self._clean else self.broker.session_expiry_s
            if self._receive_maximum is not None:
                properties.ReceiveMaximum = self._receive_maximum
            options = {"clean_start": self._clean, "properties": properties}
        try:
            self._client.connect(self._host, self._port, keepalive=self.broker.keepalive_s, **options)
        except ssl.SSLError as error:
            raise UnavailableError(
                f"{self.address}: TLS failed: {error.reason or error}{_tls_remedy(error)}"
            ) from error
        except (OSError, ValueError) as error:
            raise UnavailableError(f"{self.address}: cannot connect: {error}") from error
        self._client.loop_start()
        if thread := self._client._thread:
            thread.name = f"mqtt.{self._client._client_id.decode(errors='replace')}"
        if not self._answered.wait(self.broker.connect_timeout_s):
            self.close()
            raise UnavailableError(f"{self.address}: connected, but the broker does not answer")
        if self._outcome is not None:
            self.close()
            raise self._outcome
        self._up = True

    def subscribe(self, filters: list[str], qos: int, *, retained: bool) -> None:
        """Subscribe and wait for the broker's consent; UnavailableError if it refuses or grants a lower QoS.

        `retained` asks for retained messages, once for each new subscription. MQTT 3.1.1 cannot ask: there they come
        at every connect, marked as retained. Where the flow is held before the answer is there (a session may bring
        much), a refusal is told through `on_lost`.
        """
        how = SubscribeOptions(
            qos=qos,
            retainHandling=SubscribeOptions.RETAIN_SEND_IF_NEW_SUB if retained else SubscribeOptions.RETAIN_DO_NOT_SEND,
        )
        wanted: Any = [(each, how) if self._five else (each, qos) for each in filters]
        self._wanted = (filters, qos)
        code, mid = self._client.subscribe(wanted)
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS or mid is None:
            raise UnavailableError(f"{self.address}: cannot subscribe: {paho.error_string(code)}")
        with self._subscription:
            self._subscription.wait_for(
                lambda: (
                    self._granted is not None or not self._client.is_connected() or not self._client.flowing.is_set()
                ),
                self.broker.connect_timeout_s,
            )
            self._awaited = False
            if self._granted is None:
                if not self._client.flowing.is_set() and self._client.is_connected():
                    return
                raise UnavailableError(f"{self.address}: the broker does not answer the subscription")
        if refusal := self._refusal(self._granted):
            raise refusal

    def _refusal(self, codes: list[ReasonCode]) -> UnavailableError | None:
        filters, qos = self._wanted
        for each, reason in zip(filters, codes, strict=False):
            if reason.is_failure:
                return UnavailableError(
                    f"{self.address}: refuses the subscription to {each!r}: {reason}; check the broker's access rules"
                )
            if reason.value < qos:
                return UnavailableError(
                    f"{self.address}: grants only QoS {reason.value} for {each!r}; this pipeline needs {qos}"
                )
        return None

    def hold(self) -> None:
        """Read no more messages; what is to be sent is sent on."""
        self._client.flowing.clear()
        with self._subscription:
            self._subscription.notify_all()

    def go_on(self) -> None:
        """Read messages again."""
        self._client.flowing.set()

    def publish(
        self,
        topic: str,
        payload: bytes,
        qos: int,
        *,
        content_type: str | None = None,
        user: Mapping[str, str] | None = None,
        correlation: bytes | None = None,
        retain: bool = False,
    ) -> int:
        """Send a message; gives its packet id, by which `on_sent` tells its fate (QoS 1).

        SendError if that fails now, PublishRefusedError if it will always fail.
        """
        properties = None
        if self._five:
            properties = Properties(PacketTypes.PUBLISH)
            if content_type is not None:
                properties.ContentType = content_type
            if user:
                properties.UserProperty = list(user.items())
            if correlation is not None:
                properties.CorrelationData = correlation
        try:
            if self._packet_limit is not None:
                self._check_size(topic, payload, properties)
            info = self._client.publish(topic, payload, qos, retain, properties)
        except ValueError as error:
            raise PublishRefusedError(f"{self.address}: cannot publish to {topic!r}: {error}", lasting=True) from error
        except OSError as error:
            raise SendError(f"{self.address}: cannot publish: {error}") from error
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise SendError(f"{self.address}: cannot publish: {paho.error_string(info.rc)}")
        return info.mid

    def _check_size(self, topic: str, payload: bytes, properties: Properties | None) -> None:
        # Fixed header, topic length and packet id take at most 9 bytes. A broker closes the connection over a packet
        # that it has said it will not take (MQTT 5, 3.2.2.3.6), as often as it is sent.
        size = 9 + len(topic.encode()) + len(payload) + (len(properties.pack()) if properties is not None else 0)
        if self._packet_limit is not None and size > self._packet_limit:
            raise ValueError(
                f"{len(payload)} bytes are over the broker's limit of {self._packet_limit} for a packet; raise that, "
                "or let the result say less (top_k, threshold, max_objects)"
            )

    @property
    def has_room(self) -> bool:
        """Say whether the broker takes one more QoS 1 publish now; over its Receive Maximum it disconnects."""
        return len(self._client._out_messages) < self.send_limit

    def acknowledge(self, packet_id: int) -> None:
        """Send the PUBACK of a QoS 1 message; if the connection is gone, so is the need to."""
        try:
            self._client.ack(packet_id, 1)
        except OSError:
            pass  # closed in this moment

    def close(self) -> None:
        """Disconnect and end the network thread; may be called twice, not from a callback."""
        self._closing = True
        self._client.disconnect()
        thread = self._client._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(GOODBYE_S)
            if thread.is_alive():
                self.break_off()
        self._client.loop_stop()
        # paho leaves its own pair of sockets to the garbage collector, which may take its time.
        self._client._reset_sockets()

    def break_off(self) -> None:
        """Cut the connection from inside a callback; the broker keeps the session."""
        sock: Any = self._client.socket()
        if sock is not None:
            try:
                # Not SSLSocket's own: that one gives encrypted bytes as received ones from then on.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                pass  # it is gone already

    def _connected(
        self, _client: Any, _data: Any, flags: Any, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._outcome = UnavailableError(
                f"{self.address}: refuses the connection: {reason}{_refusal_remedy(reason)}"
            )
        else:
            if self._five and properties is not None:
                self.send_limit = int(getattr(properties, "ReceiveMaximum", 65535))
                self._packet_limit = getattr(properties, "MaximumPacketSize", None)
            if self._on_session is not None:
                self._on_session(bool(flags.session_present))
        self._answered.set()

    def _disconnected(self, _client: Any, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        self._lost(UnavailableError(f"{self.address}: connection lost: {reason}"))

    def _died(self, error: Exception) -> None:
        log.error("%s: the connection's thread failed", self.address, exc_info=error)
        self._lost(UnavailableError(f"{self.address}: a packet cannot be handled: {type(error).__name__}: {error}"))

    def _lost(self, error: UnavailableError) -> None:
        if not self._answered.is_set():
            self._outcome = error
            self._answered.set()
        with self._subscription:
            self._subscription.notify_all()
        if self._on_lost is not None and not self._closing:
            self._on_lost(error)

    def _message(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        client = self._client
        skipped, client.skipped = client.skipped, 0
        properties: Any = message.properties
        user = getattr(properties, "UserProperty", None) or []
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        if self._on_message is not None:
            self._on_message(
                Message(
                    topic,
                    b"" if skipped else bytes(message.payload),
                    message.qos,
                    message.mid,
                    bool(message.dup),
                    bool(message.retain),
                    getattr(properties, "ContentType", None),
                    getattr(properties, "ResponseTopic", None),
                    getattr(properties, "CorrelationData", None),
                    {str(key): str(value) for key, value in user},
                    skipped,
                )
            )

    def _published(self, _client: Any, _data: Any, mid: int, reason: ReasonCode, _properties: Any) -> None:
        if self._on_sent is not None:
            failed = reason.is_failure
            self._on_sent(
                mid,
                PublishRefusedError(
                    f"{self.address}: refuses the message: {reason}",
                    lasting=reason.value not in (QUOTA_EXCEEDED, NOT_AUTHORIZED),
                )
                if failed
                else None,
            )

    def _suback(self, _client: Any, _data: Any, mid: int, codes: list[ReasonCode], _properties: Any) -> None:
        with self._subscription:
            self._granted = codes
            self._subscription.notify_all()
            late = not self._awaited
        if late and (refusal := self._refusal(codes)):
            self._lost(refusal)

    def _no_delay(self, _client: Any, _data: Any, sock: Any) -> None:
        # Without it Nagle's algorithm and delayed ACKs make a QoS 1 round trip take 44 ms.
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class PublishRefusedError(SendError):
    """A message that the broker does not take (a reason code of 0x80 or more), or that MQTT cannot carry."""

    def __init__(self, message: str, *, lasting: bool) -> None:
        super().__init__(message)
        self.lasting = lasting
        """Whether the same message would be refused for ever; quotas pass, and rights can be given."""


def _password(config: Config, broker: str) -> str | None:
    try:
        return password_of(config, broker)
    except (OSError, ValueError) as error:
        raise UnavailableError(f"the password of {config.brokers[broker].url} cannot be read: {error}") from error


def _tls(config: Config, broker: MqttBroker) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(config.resolve(broker.ca_file)) if broker.ca_file else None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.sslsocket_class = _TlsSocket
        if broker.cert_file is not None and broker.key_file is not None:
            # A password would be asked for at a terminal that a service does not have.
            context.load_cert_chain(
                config.resolve(broker.cert_file), config.resolve(broker.key_file), password=lambda: b""
            )
    except (OSError, ValueError) as error:
        files: list[Path] = [config.resolve(f) for f in (broker.ca_file, broker.cert_file, broker.key_file) if f]
        raise UnavailableError(
            f"{broker.url}: TLS files cannot be used ({', '.join(map(str, files))}): {error}"
        ) from error
    if broker.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _tls_remedy(error: ssl.SSLError) -> str:
    message = str(getattr(error, "verify_message", "")) or str(error)
    if "not yet valid" in message:
        return " (certificate is not yet valid: is this device's clock set?)"
    return f" ({message}; say ca_file = the certificate that signed the broker's)" if "verify" in str(error) else ""


def _refusal_remedy(reason: ReasonCode) -> str:
    text = str(reason)
    if "password" in text or "uthorized" in text:
        return "; check username and password"
    return '; try protocol = "3.1.1"' if "protocol" in text.lower() else ""
