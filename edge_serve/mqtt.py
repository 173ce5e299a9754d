"""One MQTT connection: address, TLS, password, session, acknowledgements. Only this and mqtt_client.py know paho.

A Connection lives from one `open` to its loss and is then thrown away: paho never reconnects and never stores messages
for us, so what it would do to them after a reconnect cannot surprise anybody. Reconnecting is the runner's.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_serve.config import Config, MqttBroker, password_of
from edge_serve.errors import SendError, UnavailableError
from edge_serve.mqtt_client import Client, MQTTException
from edge_serve.mqtt_network import Network
from edge_serve.mqtt_packets import PACKET_OVERHEAD, Envelope, Message, envelope, puback

__all__ = ["Connection", "Message", "PublishRefusedError"]

log = logging.getLogger(__name__)

# MQTT 5, 2.4: the broker is out of quota for now; the same publish may succeed later.
QUOTA_EXCEEDED = 0x97
NOT_AUTHORIZED = 0x87
# Reason codes from here on are failures.
FAILURE = 0x80
# A network that is dead, not cut, takes no DISCONNECT; after this long it is closed without one.
GOODBYE_S = 1.0
# While no more publishes are unacknowledged, nobody waits for the acknowledgements.
FEW = 8
# Packet identifiers have 16 bits; some are left for subscriptions.
MOST_ON_THE_WAY = 65000

Fate = Callable[["Exception | None"], None]
_NOBODY: Any = object()
# Brokers of which it was said that they are not verified: that is said once, not with every connection.
_told: set[str] = set()


class _TlsSocket(ssl.SSLSocket):
    """A TLS socket that is closed when its handshake fails; paho forgets it then."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


class Connection:
    """A connection to a broker. Callbacks run in its network thread and must not wait for anything.

    Connections with the same `network` share that thread; by default each has its own.
    """

    def __init__(
        self,
        config: Config,
        broker: str,
        client_id: str,
        *,
        clean: bool,
        receive_maximum: int | None = None,
        will: tuple[str, bytes] | None = None,
        network: str | None = None,
        window: int = 0,
        on_message: Callable[[Message], None] | None = None,
        on_pause: Callable[[], None] | None = None,
        on_session: Callable[[bool], None] | None = None,
        on_sent: Callable[[int, Exception | None], None] | None = None,
        on_lost: Callable[[Exception], None] | None = None,
    ) -> None:
        """`window` is how many publishes will be unacknowledged at most, where somebody waits for room in it.

        `on_pause` follows on the last one of several calls of `on_message`, for what is cheaper done once for all."""
        self.broker: MqttBroker = config.brokers[broker]
        self.address = self.broker.url
        self._on_session, self._on_sent, self._on_lost = on_session, on_sent, on_lost
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
        self._owed: dict[int, Fate | None] = {}
        """Who wants to know the fate of which publish of QoS 1, by packet id."""
        self._unwritten: dict[int, Fate | None] = {}
        """The same of QoS 0, whose fate is whether the system has taken them, by numbers of our own."""
        # The first one is for paho's subscription.
        self._numbers = count(1)
        self.send_limit = 65535
        """The broker's Receive Maximum: how many QoS 1 publishes may be unacknowledged."""
        self._packet_limit: int | None = None
        self._network_name = network or client_id
        self._network: Network | None = None
        url = urlsplit(self.broker.url)
        self._host = unquote(url.path) if url.scheme == "unix" else url.hostname or ""
        self._port = url.port or (8883 if url.scheme == "mqtts" else 1883)
        options: dict[str, Any] = {} if self._five else {"clean_session": clean}
        self._client = Client(
            self.broker.max_payload + PACKET_OVERHEAD,
            arrived=on_message if on_message is not None else _ignore,
            paused=on_pause if on_pause is not None else _ignore,
            settled=self._published,
            failed=self._died,
            brings_inputs=on_message is not None,
            few=min(FEW, (window or receive_maximum or 0) // 4),
            owed=self._owed.__len__,
            client_id=client_id,
            protocol=MQTTProtocolVersion.MQTTv5 if self._five else MQTTProtocolVersion.MQTTv311,
            transport="unix" if url.scheme == "unix" else "tcp",
            **options,
        )
        self._client.connect_timeout = self.broker.connect_timeout_s
        if url.scheme == "mqtts":
            self._client.tls_set_context(_tls(config, self.broker))
            self._client.tls_insecure_set(self.broker.insecure)
        if self.broker.username is not None:
            self._client.username_pw_set(self.broker.username, _password(config, broker))
        if will is not None:
            # What the broker says, retained, when this connection ends without a goodbye.
            properties = None
            if self._five:
                properties = Properties(PacketTypes.WILLMESSAGE)
                properties.ContentType = "application/json"
            self._client.will_set(*will, qos=1, retain=True, properties=properties)
        self._client.on_connect = self._connected
        self._client.on_disconnect = self._disconnected
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
        self._network = Network.join(self._network_name)
        self._client.serve(self._network)
        if not self._answered.wait(self.broker.connect_timeout_s):
            self.close()
            raise UnavailableError(f"{self.address}: connected, but the broker does not answer")
        if self._outcome is not None:
            self.close()
            raise self._outcome

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
                lambda: self._granted is not None or not self._client.is_connected() or self._client.held,
                self.broker.connect_timeout_s,
            )
            self._awaited = False
            if self._granted is None:
                if self._client.held and self._client.is_connected():
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
        self._client.hold()
        with self._subscription:
            self._subscription.notify_all()

    def go_on(self) -> None:
        """Read messages again."""
        self._client.go_on()

    def envelope(
        self,
        topic: str,
        qos: int,
        *,
        retain: bool = False,
        content_type: str | None = None,
        user: Mapping[str, str] | None = None,
        correlation: bytes | None = None,
    ) -> Envelope:
        """Pack what many publishes on this connection have in common. PublishRefusedError if MQTT cannot carry it."""
        try:
            return envelope(
                topic,
                qos,
                retain=retain,
                five=self._five,
                content_type=content_type,
                user=(user or {}).items(),
                correlation=correlation,
            )
        except ValueError as error:
            raise PublishRefusedError(f"{self.address}: cannot publish to {topic!r}: {error}", lasting=True) from error

    def send(self, shared: Envelope, payload: bytes, done: Fate | None = None, further: bytes = b"") -> int:
        """Send a message; gives its packet id. `further` are packed properties of this one alone (MQTT 5).

        `done` gets its fate: None when the broker has it (QoS 1) or the system has taken it (QoS 0), else the error. That
        of QoS 1 comes from another thread than the one that sends, unless that one closes. SendError if sending fails now,
        PublishRefusedError if it will always fail.
        """
        owed, packet_id = (self._owed, self._packet_id()) if shared.qos else (self._unwritten, next(self._numbers))
        try:
            packet = shared.seal(payload, packet_id, further)
        except ValueError as error:
            raise PublishRefusedError(f"{self.address}: cannot publish: {error}", lasting=True) from error
        if self._packet_limit is not None and len(packet) > self._packet_limit:
            # A broker closes the connection over a packet that it has said it will not take (MQTT 5, 3.2.2.3.6).
            raise PublishRefusedError(
                f"{self.address}: cannot publish: {len(payload)} bytes are over the broker's limit of "
                f"{self._packet_limit} for a packet; raise that, or let the result say less (top_k, threshold, max_objects)",
                lasting=True,
            )
        owed[packet_id] = done
        try:
            self._client.post(packet, None if shared.qos else partial(self._resolve, owed, packet_id, None))
        except OSError as error:
            if owed.pop(packet_id, _NOBODY) is not _NOBODY:  # else it was told already
                raise SendError(f"{self.address}: cannot publish: {error}") from error
        return packet_id

    def _packet_id(self) -> int:
        if len(self._owed) >= MOST_ON_THE_WAY:
            raise SendError(f"{self.address}: cannot publish: {len(self._owed)} messages are unacknowledged")
        while (packet_id := next(self._numbers) % 65535 + 1) in self._owed:
            pass  # the numbers have come around
        return packet_id

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
        """Send a single message; gives its packet id, by which `on_sent` tells its fate. Raises as `send` does."""
        packed = self.envelope(topic, qos, retain=retain, content_type=content_type, user=user, correlation=correlation)
        return self.send(packed, payload)

    @property
    def has_room(self) -> bool:
        """Say whether the broker takes one more QoS 1 publish now; over its Receive Maximum it disconnects."""
        return len(self._owed) < self.send_limit

    def acknowledge(self, packet_id: int) -> None:
        """Send the PUBACK of a QoS 1 message; if the connection is gone, so is the need to."""
        try:
            self._client.post(puback(packet_id))
        except OSError:
            pass  # closed in this moment

    def close(self) -> None:
        """Disconnect; may be called twice. No callback follows; what was not acknowledged is told as failed."""
        self._closing = True
        client = self._client
        client.arrived = client.paused = _ignore
        network, self._network = self._network, None
        if network is not None:
            client.disconnect()
            inside = threading.get_ident() == network.ident
            if inside or not client.gone.wait(GOODBYE_S):
                client._sock_close()
            client.leave()
            network.leave()
        client._sock_close()
        self._fail_owed(SendError(f"{self.address}: closed"))

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
        self._fail_owed(error)
        if self._on_lost is not None and not self._closing:
            self._on_lost(error)

    def _fail_owed(self, error: Exception) -> None:
        for owed in (self._owed, self._unwritten):
            for packet_id in list(owed):
                self._resolve(owed, packet_id, error)

    def _published(self, packet_id: int, code: int) -> None:
        if code < FAILURE:
            self._resolve(self._owed, packet_id, None)
            return
        try:
            said = str(ReasonCode(PacketTypes.PUBACK, identifier=code))
        except (KeyError, MQTTException):
            said = f"reason code {code:#x}"
        self._resolve(
            self._owed,
            packet_id,
            PublishRefusedError(
                f"{self.address}: refuses the message: {said}", lasting=code not in (QUOTA_EXCEEDED, NOT_AUTHORIZED)
            ),
        )

    def _resolve(self, owed: dict[int, Fate | None], packet_id: int, error: Exception | None) -> None:
        """Tell the fate of a publish to whoever wants to know; once, even if its connection is lost at the same time."""
        done = owed.pop(packet_id, _NOBODY)
        if done is _NOBODY:
            return
        if done is not None:
            done(error)
        elif self._on_sent is not None:
            self._on_sent(packet_id, error)

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


def _ignore(*_: object) -> None:
    """Take no notice."""


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
    if broker.alpn:
        context.set_alpn_protocols(list(broker.alpn))
    if broker.insecure:
        if broker.url not in _told:
            _told.add(broker.url)
            log.warning("%s: the broker's certificate is not verified (insecure = true); for tests only", broker.url)
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
