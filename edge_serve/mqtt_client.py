"""paho with another way to its socket: many packets a read, many a write, no thread of its own, and bounds on memory.

paho stays the protocol's engine: it connects, shakes hands, subscribes, pings and says good-bye. What comes with every message
goes past it (mqtt_packets.py). The methods of paho that are replaced or called here are private: tests/unit/test_mqtt_client.py
fails where another release has changed them.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho
import paho.mqtt.properties as properties
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from edge_serve.mqtt_network import TICK_S, TICKS_IN_A_KEEPALIVE, Network
from edge_serve.mqtt_packets import PUBACK, PUBLISH, MalformedError, Message, read_puback, read_publish

# One read takes this many bytes at most: whole bursts of small messages.
READ_BYTES = 64 * 1024
# The rest of a large message comes in larger pieces.
LARGE_READ_BYTES = 1024 * 1024
# So many reads in a row; then the other connection has its turn, and what was gathered leaves.
READS_AT_A_TIME = 8
# Linux delays the ACK of a segment by 40 ms, in the hope of an answer to send it with. A broker that leaves Nagle's algorithm
# on (mosquitto does by default) sends nothing small in the meantime. ACKs at once cost 4 µs a message, so they are asked for
# only where so many messages came after just that time.
DELAYED_ACK_S = (0.035, 0.060)
STALLS = 3
# The longest header of a packet: its type, and a length of up to four bytes.
LONGEST_HEADER = 5

# 2.1 has it there only.
MQTTException: type[Exception] = properties.MQTTException  # type: ignore[attr-defined]

Settled = Callable[[int, int], None]


class Client(paho.Client):
    """One connection, served by a Network thread.

    paho buffers a packet of any announced length. Here the rest of a PUBLISH beyond `limit` is read and let go, so that the
    message still arrives, marked, and can be answered and acknowledged instead of coming back for ever.

    `arrived` gets each message, `paused` is called when there are no more for now, `settled` gets the packet id and the reason
    code of each PUBACK, `failed` the exception if handling a packet failed. All are called in the
    network thread. `brings_inputs`, `few` and `owed` are what mqtt_network.Client says.
    """

    def __init__(
        self,
        limit: int,
        *,
        arrived: Callable[[Message], None],
        paused: Callable[[], None],
        settled: Settled,
        failed: Callable[[Exception], None],
        brings_inputs: bool,
        few: int,
        owed: Callable[[], int],
        **options: Any,
    ) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, reconnect_on_failure=False, manual_ack=True, **options)
        self.brings_inputs = brings_inputs
        self.few, self.owed = few, owed
        self.tick_s = TICK_S
        self.limit = limit
        self.gone = threading.Event()
        """Set when the socket is closed."""
        self._five = self._protocol == MQTTProtocolVersion.MQTTv5
        self.arrived, self.paused, self._settled, self._failed = arrived, paused, settled, failed
        self._network: Network | None = None
        self._held = False
        self._rest = b""
        """The beginning of a packet whose end has not come yet, or what came behind the message that made us hold."""
        self._behind = False
        """Whether `_rest` is what came behind such a message."""
        self._begun: list[bytes] = []
        """The pieces of a large packet, its header included; `_missing` bytes of it are to come, then `_skip` to be let go."""
        self._missing = 0
        self._skip = 0
        self._whole = 0
        # Reentrant: paho closes the socket while it writes.
        self._writing = threading.RLock()
        self._ready: list[bytes] = []
        self._gathered = False
        """Whether `_ready` leaves at the end of the network thread's round."""
        self._written: list[Callable[[], None]] = []
        self._slow_acks = False
        """Whether the system may delay its acknowledgements of TCP segments, and can be told not to."""
        self._stalls = 0
        self._last_read = 0.0
        self._quick = False
        """Whether it is told so."""
        self._number = -1
        self.on_socket_register_write = self._write_wanted

    # What the network thread asks for.

    def serve(self, network: Network) -> None:
        """Let a network thread read and write from now on."""
        self._network = network
        self.gone.clear()
        sock: Any = self._sock
        self._number = sock.fileno()
        self.tick_s = min(TICK_S, self._keepalive / TICKS_IN_A_KEEPALIVE)
        self._slow_acks = hasattr(socket, "TCP_QUICKACK") and sock.family in (socket.AF_INET, socket.AF_INET6)
        self._last_read = time.monotonic()
        network.add(self)

    def leave(self) -> None:
        """Be served no more."""
        network, self._network = self._network, None
        if network is not None:
            network.remove(self)

    def fileno(self) -> int:
        """Give the socket's number, as it was when it was opened."""
        return self._number

    def interest(self) -> int | None:
        """Say what is waited for."""
        if self._sock is None:
            return None
        wants_to_write = self._out_packet or (self._ready and not self._gathered)
        return (0 if self._held else select.POLLIN) | (select.POLLOUT if wants_to_write else 0)

    def pending(self) -> bool:
        """Say whether there are bytes to handle that the socket does not show: decrypted ones, or those behind a hold."""
        sock: Any = self._sock
        return self._stalled or (self._ssl and sock is not None and sock.pending() > 0)

    def readable(self) -> None:
        """Read and handle what is there."""
        self.loop_read()

    def writable(self) -> None:
        """Send what waits."""
        if not self._out_packet:
            self.flush()
        if self._out_packet:
            self.loop_write()

    def broken(self) -> None:
        """End the connection."""
        self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_CONN_LOST)

    def tick(self) -> None:
        """Send pings, and find out that they are not answered."""
        if self._held:
            self._ping_t = 0.0  # its answers to pings are not read either
            self._heard()
        self.loop_misc()

    def died(self, error: Exception) -> None:
        """End the connection over what nobody has foreseen."""
        self._sock_close()
        self._failed(error)

    def hold(self) -> None:
        """Read nothing, so that the broker has to wait; acknowledgements and pings still leave."""
        if not self._held:
            self._held = True
            if self._network is not None:
                self._network.wake()

    def go_on(self) -> None:
        """Read again."""
        if self._held:
            self._held = False
            if self._network is not None:
                self._network.wake()

    @property
    def held(self) -> bool:
        """Say whether nothing is read."""
        return self._held

    @property
    def _stalled(self) -> bool:
        """Say whether packets wait that were read before a hold."""
        return self._behind and not self._held

    # Reading.

    def loop_read(self, max_packets: int = 1) -> MQTTErrorCode:  # paho's signature
        """Read what is there and handle all whole packets in it."""
        rc = MQTTErrorCode.MQTT_ERR_SUCCESS
        sock: Any = self._sock
        try:
            for _ in range(READS_AT_A_TIME):
                if self._sock is None or self._held:
                    break
                if self._behind:
                    self._behind, data, self._rest = False, self._rest, b""
                    rc = self._handle(data)
                    continue
                wanted = READ_BYTES
                if self._missing or self._skip:
                    wanted = min(max(self._missing + self._skip, READ_BYTES), LARGE_READ_BYTES)
                data = self._sock_recv(wanted) if self._ssl else sock.recv(wanted)
                if not data:
                    rc = MQTTErrorCode.MQTT_ERR_CONN_LOST
                    break
                # Whoever sends is alive: the answer to a ping comes behind a large message on a slow network, and paho
                # would disconnect, and the message would come again, for ever.
                self._ping_t = 0.0
                self._heard()
                rc = self._take(data)
                if rc != MQTTErrorCode.MQTT_ERR_SUCCESS or (len(data) < READ_BYTES and not self._ssl):
                    break  # this was all
        except BlockingIOError:
            pass
        except OSError:
            rc = MQTTErrorCode.MQTT_ERR_CONN_LOST
        except (MalformedError, MQTTException):
            rc = MQTTErrorCode.MQTT_ERR_PROTOCOL
        self.paused()
        if rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            return self._loop_rc_handle(rc)
        if self._quick and self._sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)  # each time: Linux falls back to delayed ones
        return rc

    def _heard(self) -> None:
        now = time.monotonic()
        if self._slow_acks and DELAYED_ACK_S[0] < now - self._last_read < DELAYED_ACK_S[1]:
            self._stalls += 1
            self._quick = self._stalls >= STALLS
        # The same by its names in paho 2.2 and in 2.1.
        self._last_read = self._last_bytes_received = self._last_msg_in = now

    def _take(self, data: bytes) -> MQTTErrorCode:
        """Put what was read to what came before, and handle it."""
        if self._missing or self._skip:
            used = min(len(data), self._missing)
            if used:
                self._begun.append(data[:used])
                self._missing -= used
            let_go = min(len(data) - used, self._skip)
            self._skip -= let_go
            if self._missing or self._skip:
                return MQTTErrorCode.MQTT_ERR_SUCCESS
            packet, self._begun = b"".join(self._begun), []
            _, start, _ = _header(packet, 0, len(packet)) or (0, 0, 0)
            rc = self._packet(packet, packet[0], start, len(packet), self._whole)
            data = data[used + let_go :]
            if rc != MQTTErrorCode.MQTT_ERR_SUCCESS or not data:
                return rc
        elif self._rest:
            data, self._rest = self._rest + data, b""
        return self._handle(data)

    def _handle(self, data: bytes) -> MQTTErrorCode:
        """Handle all whole packets in what was read; keep the beginning of the next one."""
        at, end = 0, len(data)
        arrived, five, limit, network = self.arrived, self._five, self.limit, self._network
        success = MQTTErrorCode.MQTT_ERR_SUCCESS
        while at < end:
            if end - at > 1 and data[at + 1] < 0x80:  # nearly always
                first, start, length = data[at], at + 2, data[at + 1]
            else:
                found = _header(data, at, end)
                if found is None:
                    self._rest = data[at:]
                    return success
                first, start, length = found
            if self._held:
                self._rest, self._behind = data[at:], True
                return success
            stop = start + length
            if stop < end and network is not None:
                network.gathering = True  # this is not all
            elif stop > end:
                self._begin(data, at, first, start, length)
                return success
            if first & 0xF0 == PUBLISH and length <= limit:
                arrived(read_publish(first, data, start, stop, five))
            elif (rc := self._packet(data, first, start, stop, length if length > limit else 0)) != success:
                return rc
            at = stop
        return success

    def _begin(self, data: bytes, at: int, first: int, start: int, length: int) -> None:
        """Keep the beginning of a packet; of a large PUBLISH the end will be let go."""
        here = len(data) - start
        kept, self._whole = length, 0
        if length > self.limit:
            if first & 0xF0 != PUBLISH:
                raise MalformedError(f"a packet of {length} bytes that is no PUBLISH")
            kept, self._whole = self.limit, length
        used = min(here, kept)
        self._begun = [data[at : start + used]]
        self._missing = kept - used
        self._skip = length - kept - (here - used)
        if not self._missing and not self._skip:
            raise MalformedError("a packet that is whole was taken for a part of one")

    def _packet(self, data: bytes, first: int, start: int, stop: int, whole: int) -> MQTTErrorCode:
        """Handle the packet in data[start:stop]; `whole` is its length where that is over the limit, else 0."""
        kind = first & 0xF0
        if kind == PUBLISH:
            if whole:
                stop = min(stop, start + self.limit)
            self.arrived(read_publish(first, data, start, stop, self._five, whole))
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        if whole:
            raise MalformedError(f"a packet of {whole} bytes that is no PUBLISH")
        if kind == PUBACK:
            self._settled(*read_puback(data, start, stop))
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        self.paused()
        self._in_packet["command"] = first
        self._in_packet["packet"] = bytearray(data[start:stop])
        self._in_packet["remaining_length"] = stop - start
        self._in_packet["pos"] = 0
        return self._packet_handle()

    # Writing.

    def post(self, packet: bytes, written: Callable[[], None] | None = None) -> None:
        """Send a packet, from any thread; `written` is called when the system has taken it. OSError if there is no connection."""
        network = self._network
        inside = network is not None and threading.get_ident() == network.ident
        with self._writing:
            sock: Any = self._sock
            if sock is None or network is None:
                raise OSError("the connection is closed")
            gathering = inside and network.gathering
            # OpenSSL's objects belong to one thread at a time.
            if not gathering and (inside or not self._ssl) and not (self._ready or self._out_packet or written):
                self._last_msg_out = time.monotonic()
                try:
                    sent = sock.send(packet)
                except OSError:
                    sent = 0  # full, or broken: then reading says so, with the reason
                if sent == len(packet):
                    return
                self._queue(memoryview(packet)[sent:])
            else:
                self._ready.append(packet)
                if written is not None:
                    self._written.append(written)
                self._gathered = gathering
        if gathering:
            network.gather(self)
        elif inside or not self._ssl:
            self.flush()
        else:
            network.wake()

    def flush(self) -> None:
        """Send what was gathered, in one piece; what the network does not take now is sent when it does."""
        with self._writing:
            self._gathered = False
            if self._out_packet:
                self._queue_ready()
            elif self._ready and self._sock is not None:
                self._send_ready()
            written = self._taken()
            wanted = bool(self._out_packet)
        for each in written:
            each()
        if wanted and self._network is not None:
            self._network.wake()

    def _send_ready(self) -> None:
        ready = self._ready
        rest = memoryview(ready[0] if len(ready) == 1 else b"".join(ready))
        ready.clear()
        self._last_msg_out = time.monotonic()
        sock: Any = self._sock
        try:
            while rest:
                rest = rest[sock.send(rest) :]
        except OSError:
            pass  # full, or broken: then reading says so, with the reason
        if rest:
            self._queue(rest)

    def _queue_ready(self) -> None:
        for packet in self._ready:
            self._queue(packet)
        self._ready.clear()

    def _queue(self, packet: Any) -> None:
        # QoS 1 in paho's books, so that it does not call on_publish.
        self._out_packet.append(
            {
                "command": PUBLISH,
                "mid": 0,
                "qos": 1,
                "pos": 0,
                "to_process": len(packet),
                "packet": memoryview(packet),  # type: ignore[typeddict-item]  # paho takes slices of it: none is a copy
                "info": None,
            }
        )

    def _taken(self) -> list[Callable[[], None]]:
        """Give what is due because everything is written. The lock is held."""
        if self._out_packet or self._ready or not self._written:
            return []
        written, self._written = self._written, []
        return written

    def _packet_queue(self, *arguments: Any) -> MQTTErrorCode:
        with self._writing:
            self._queue_ready()  # it was first
            return super()._packet_queue(*arguments)

    def _packet_write(self) -> MQTTErrorCode:
        with self._writing:
            self._queue_ready()
            rc = super()._packet_write()
            written = self._taken()
        for each in written:
            each()
        return rc

    def _write_wanted(self, *_: Any) -> None:
        if self._network is not None:
            self._network.wake()

    def _sock_close(self) -> None:
        with self._writing:
            super()._sock_close()
            self._ready.clear()
            self._out_packet.clear()
            self._written.clear()
        self.gone.set()


def _header(data: bytes, at: int, end: int) -> tuple[int, int, int] | None:
    """Read a fixed header; gives its first byte, the position behind it and the remaining length; None if it is not all there.

    MalformedError if the length has more than four bytes (2.1.4).
    """
    length = shift = 0
    for position in range(at + 1, min(end, at + LONGEST_HEADER)):
        byte = data[position]
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            return data[at], position + 1, length
        shift += 7
    if end - at >= LONGEST_HEADER:
        raise MalformedError("a packet's length has more than four bytes")
    return None
