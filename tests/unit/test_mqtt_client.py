"""The client around paho: packets in any pieces, bounds, what leaves and when; and that paho is still the one it was made for."""

from __future__ import annotations

import hashlib
import inspect
import select
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edge_serve.mqtt_client import Client
from edge_serve.mqtt_network import Network
from edge_serve.mqtt_packets import Message, envelope, puback, user_property

# What is replaced, and what is called of paho's private methods or relied on in how it works.
USED = (
    "_check_keepalive", "_do_on_disconnect", "_handle_connack", "_handle_disconnect", "_handle_suback", "_loop_rc_handle",
    "_packet_handle", "_packet_queue", "_packet_write", "_send_connect", "_send_disconnect", "_send_simple_command",
    "_send_subscribe", "_sock_close", "_sock_recv", "_sock_send", "loop_misc", "loop_read", "loop_write", "reconnect",
)  # fmt: skip
LOOKED_AT = {"2.1.0": "54b4408e3a55c572", "2.2.0": "a45157e31697c1d1"}
ATTRIBUTES = (
    "_in_packet", "_last_msg_out", "_out_packet", "_ping_t", "_protocol", "_sock", "_ssl",
)  # fmt: skip


def digest_of_paho() -> str:
    """Give a digest of the source of all that is used."""
    source = "".join(inspect.getsource(getattr(paho.Client, name)) for name in USED)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def test_paho_is_one_that_this_client_was_made_for() -> None:
    found = version("paho-mqtt"), digest_of_paho()
    assert found in LOOKED_AT.items(), (
        f"paho-mqtt {found[0]} differs in methods that edge_serve/mqtt_client.py replaces or calls: compare {', '.join(USED)} "
        f"with the version before, and add {found} here when all of it still fits"
    )


@dataclass
class Stub:
    """What a network thread is to a client, without a thread: the test's own."""

    ident: int = field(default_factory=threading.get_ident)
    gathering: bool = False
    gathered: list[Client] = field(default_factory=list)
    woken: int = 0

    def add(self, client: Client) -> None:
        """Take no notice."""

    def remove(self, client: Client) -> None:
        """Take no notice."""

    def wake(self) -> None:
        """Count."""
        self.woken += 1

    def gather(self, client: Client) -> None:
        """Keep what has something to send."""
        self.gathered.append(client)


class Rig:
    """A client whose socket the test has the other end of."""

    def __init__(self, limit: int = 1000, *, five: bool = True) -> None:
        self.messages: list[Message] = []
        self.settled: list[tuple[int, int]] = []
        self.failures: list[Exception] = []
        self.pauses: list[int] = []
        self.lost: list[Any] = []
        self.network = Stub()
        self.client = Client(
            limit,
            arrived=self.arrived,
            paused=lambda: self.pauses.append(len(self.messages)),
            settled=lambda *ack: self.settled.append(ack),
            failed=self.failures.append,
            brings_inputs=True,
            few=0,
            owed=lambda: 0,
            client_id="test",
            protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
            **({} if five else {"clean_session": True}),
        )
        self.hold_after = 0
        self.client.on_disconnect = lambda *arguments: self.lost.append(arguments)
        ours, self.peer = socket.socketpair()
        ours.setblocking(False)
        self.peer.setblocking(False)
        self.client._sock = ours
        self.client.serve(self.network)  # type: ignore[arg-type]  # all that it needs of one

    def arrived(self, message: Message) -> None:
        """Keep a message; hold after as many as were said."""
        self.messages.append(message)
        if len(self.messages) == self.hold_after:
            self.client.hold()

    def feed(self, data: bytes) -> None:
        """Send bytes and let the client read them."""
        self.peer.sendall(data)
        self.client.readable()

    def received(self) -> bytes:
        """Give what the client has sent by now."""
        try:
            return self.peer.recv(1 << 20)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """Close both ends."""
        self.client._sock_close()
        self.client._reset_sockets()
        self.peer.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A client."""
    made = Rig()
    yield made
    made.close()


SHARED = envelope("in/x", 1)
PACKETS = [
    SHARED.seal(b"x" * size, number, user_property("id", str(size))) for number, size in enumerate((0, 5, 130, 700), 1)
]
STREAM = b"".join(PACKETS[:2]) + puback(77) + PACKETS[2] + puback(78) + PACKETS[3]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 131, 5000])
def test_packets_are_whole_however_they_come(rig: Rig, piece: int) -> None:
    for start in range(0, len(STREAM), piece):
        rig.feed(STREAM[start : start + piece])
    assert [len(each.payload) for each in rig.messages] == [0, 5, 130, 700]
    assert [each.packet_id for each in rig.messages] == [1, 2, 3, 4]
    assert rig.settled == [(77, 0), (78, 0)]
    assert not rig.lost


def test_what_came_together_is_handed_on_together(rig: Rig) -> None:
    rig.feed(STREAM)
    assert rig.pauses == [4]


@pytest.mark.parametrize("piece", [100, 1000, 5000, 1 << 20])
def test_of_a_message_over_the_limit_only_the_beginning_is_kept(rig: Rig, piece: int) -> None:
    packet = SHARED.seal(b"x" * 100_000, 9, user_property("id", "big"))
    stream = PACKETS[1] + packet + PACKETS[2]
    for start in range(0, len(stream), piece):
        rig.feed(stream[start : start + piece])
        assert sum(map(len, rig.client._begun)) <= 1100
    while len(rig.messages) < 3:
        rig.client.readable()
    small, big, after = rig.messages
    assert (len(small.payload), len(after.payload)) == (5, 130)
    assert (big.payload, big.packet_id, big.user) == (b"", 9, {"id": "big"})
    assert big.skipped > 100_000


def test_a_packet_over_the_limit_that_is_no_publish_ends_the_connection(rig: Rig) -> None:
    rig.feed(b"\x90\xff\x7f" + b"\0" * 100)
    assert rig.lost
    assert rig.client.socket() is None


@pytest.mark.parametrize(
    "garbage", [b"\x32\xff\xff\xff\xff\x01", b"\x32\x01\0", b"\x40\0", b"\x00\0", b"\x36\x06\0\1a\0\1\0"]
)
def test_garbage_ends_the_connection_behind_what_was_right(rig: Rig, garbage: bytes) -> None:
    rig.feed(PACKETS[1] + garbage)
    assert len(rig.messages) == 1
    assert rig.pauses[0] == 1
    assert rig.client.socket() is None
    assert rig.client.gone.is_set()


def test_a_hold_takes_effect_between_two_messages_of_one_read(rig: Rig) -> None:
    rig.hold_after = 2
    rig.feed(b"".join(PACKETS))
    assert len(rig.messages) == 2
    assert rig.client.interest() == 0, "nothing is waited for"
    rig.client.readable()
    assert len(rig.messages) == 2
    rig.client.go_on()
    assert rig.client.pending(), "the rest is there, though the socket does not say so"
    rig.client.readable()
    assert [each.packet_id for each in rig.messages] == [1, 2, 3, 4]
    assert not rig.client.pending()


def test_a_single_packet_leaves_at_once_and_those_of_a_burst_together(rig: Rig) -> None:
    rig.client.post(b"one")
    assert rig.received() == b"one"
    rig.network.gathering = True
    for _ in range(3):
        rig.client.post(b"more")
    assert rig.received() == b""
    assert rig.network.gathered
    assert rig.client.interest() == select.POLLIN, "the network thread sends it by itself"
    rig.client.flush()
    assert rig.received() == b"moremoremore"


def test_from_another_thread_it_leaves_at_once(rig: Rig) -> None:
    rig.network.gathering = True
    thread = threading.Thread(target=rig.client.post, args=(b"result",))
    thread.start()
    thread.join()
    assert rig.received() == b"result"


def test_what_the_network_does_not_take_now_is_sent_later_in_order(rig: Rig) -> None:
    taken: list[bool] = []
    rig.client.post(b"a" * 3_000_000)
    rig.client.post(b"b" * 1000, lambda: taken.append(True))
    rig.client.post(b"c" * 1000)
    assert not taken
    assert rig.network.woken
    received = b""
    while len(received) < 3_002_000:
        received += rig.received()
        assert rig.client.interest() is not None
        rig.client.writable()
    assert received == b"a" * 3_000_000 + b"b" * 1000 + b"c" * 1000
    assert taken == [True]
    assert rig.client.interest() == select.POLLIN


def test_what_paho_sends_itself_comes_behind_what_was_posted(rig: Rig) -> None:
    rig.network.gathering = True
    rig.client.post(b"first")
    rig.client.disconnect()
    rig.client.writable()
    assert rig.received().startswith(b"first\xe0"), "DISCONNECT came first"


def test_a_closed_connection_takes_nothing(rig: Rig) -> None:
    rig.client._sock_close()
    with pytest.raises(OSError, match="closed"):
        rig.client.post(b"late")
    assert rig.client.interest() is None


def test_an_end_of_the_stream_is_a_loss(rig: Rig) -> None:
    rig.peer.sendall(PACKETS[0][:5])
    rig.peer.shutdown(socket.SHUT_WR)
    rig.client.readable()
    rig.client.readable()
    assert rig.lost
    assert not rig.messages


def test_segments_are_acknowledged_at_once_where_the_broker_waits_for_that() -> None:
    rig = Rig()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        rig.peer.close()
        rig.peer = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
        ours.setblocking(False)
        rig.client._sock_close()
        rig.client._sock = ours
        rig.client.serve(rig.network)  # type: ignore[arg-type]
    for gap in (0.0, 0.001, 0.044, 1.0, 0.044):
        rig.client._last_read -= gap
        rig.peer.sendall(PACKETS[0])
        select.select([ours], [], [], 5)
        rig.client.readable()
        assert not rig.client._quick
    rig.client._last_read -= 0.044
    rig.peer.sendall(PACKETS[0])
    select.select([ours], [], [], 5)
    rig.client.readable()
    assert rig.client._quick, "three messages have come just when a delayed ACK was sent"
    rig.close()


def test_reading_names_no_packet_twice_with_3_1_1() -> None:
    rig = Rig(five=False)
    shared = envelope("in/x", 1, five=False)
    rig.feed(b"".join(shared.seal(b"p", number) for number in range(1, 301)))
    assert [each.packet_id for each in rig.messages] == list(range(1, 301))
    rig.close()


def test_attributes_of_paho_that_are_used_are_there() -> None:
    plain = paho.Client(CallbackAPIVersion.VERSION2)
    for name in ATTRIBUTES:
        assert hasattr(plain, name), name
    assert hasattr(plain, "_last_msg_in" if version("paho-mqtt").startswith("2.1.") else "_last_bytes_received")


# The thread.


def test_the_thread_begins_with_its_first_connection_and_ends_with_its_last() -> None:
    name = "test-network"
    first, second = Network.join(name), Network.join(name)
    assert first is second
    thread = first._thread
    assert thread.is_alive()
    assert thread.name == "mqtt.test-network"
    first.leave()
    assert thread.is_alive()
    second.leave()
    assert not thread.is_alive()
    again = Network.join(name)
    assert again is not first
    again.leave()
