"""The harness behind test_no_loss.py and scripts/soak: a service between two brokers, and an account of every message.

    publisher → input broker → tap → edge-serve run → tap → result broker → collector (a persistent session)

The taps see each packet before the other end does, so they know what was promised: which input the service acknowledged, and
which result upstream acknowledged. The account leans on none of edge-serve's own code or counters.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_serve.errors import UnavailableError
from edge_serve.spool.look import Reader
from tests.support import PATIENCE_S, Mosquitto, Service, digit_png, end, wait_for, write_config

# A client that is away for so long is a forgotten one: for ever, by the protocol's own number.
FOR_EVER_S = 0xFFFFFFFF
# What systemd waits for before it starts a service again.
RESTART_S = 0.1
# Everything there is comes through within this long, even on a machine that does other things besides.
END_S = 90.0
# No message is on its way any more when none has moved for so long.
QUIET_S = 3.0
PUBLISH, PUBACK = 3, 4
REFUSED = 0x80

CONFIG = """
    schema = 1
    device = "dev"
    grace_s = 5
    state_dir = "{state}"
    [mqtt]
    url = "{near}"
    connect_timeout_s = 2
    keepalive_s = 5
    [mqtt.upstream]
    url = "{far}"
    connect_timeout_s = 2
    keepalive_s = 5
    [spool]
    max_bytes = 268435456
    [status]
    enabled = false
    [pipeline]
    name = "digits"
    model = "{digits}"
    threads = 1
    {pipeline}
    [pipeline.source]
    {source}
    [pipeline.sink]
    type = "mqtt"
    broker = "upstream"
    topic = "results"
"""
MQTT_SOURCE = 'type = "mqtt"\n    topic = "in/#"'

# By default mosquitto drops what it queues beyond a thousand messages for one client.
QUEUES = ("allow_anonymous true", "max_queued_messages 0")


def persistent(folder: Path) -> tuple[str, ...]:
    """Give the lines of a mosquitto that saves its database at every change."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    saved = ("persistence true", f"persistence_location {folder}/", "autosave_interval 1", "autosave_on_changes true")
    return (*QUEUES, *saved)


def named(topic: str, payload: bytes) -> str:
    """Give the id of an input (in/ID) or of a result (its document's)."""
    if topic.startswith("in/"):
        return topic[3:]
    return str(json.loads(payload)["id"])


class Packets:
    """One direction of a connection: cuts a stream into MQTT 5 packets (MQTT 5, section 2.1)."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Take bytes; gives (type, flags, body) of each packet that is whole."""
        self._buffer += data
        while True:
            length, shift, at = 0, 0, 1
            while True:
                if at >= len(self._buffer):
                    return
                byte = self._buffer[at]
                length |= (byte & 0x7F) << shift
                at, shift = at + 1, shift + 7
                if not byte & 0x80:
                    break
            if len(self._buffer) < at + length:
                return
            first = self._buffer[0]
            body = bytes(self._buffer[at : at + length])
            del self._buffer[: at + length]
            yield first >> 4, first & 15, body


def published(body: bytes) -> tuple[int, str]:
    """Give packet id and our id of a PUBLISH of QoS 1 (MQTT 5, section 3.3)."""
    (size,) = struct.unpack_from(">H", body)
    topic = body[2 : 2 + size].decode()
    (packet_id,) = struct.unpack_from(">H", body, 2 + size)
    length, shift, at = 0, 0, 4 + size
    while True:
        byte = body[at]
        length |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            break
    return packet_id, named(topic, body[at + length :])


class Tap:
    """A proxy in front of a broker that notes each QoS 1 message and its acknowledgement, and cuts the link when told to."""

    def __init__(self, target: int, host: str = "127.0.0.1") -> None:
        self._target, self.host = target, host
        self._listener = socket.create_server((host, 0))
        self.port = int(self._listener.getsockname()[1])
        self.delivered: list[str] = []
        """Ids of what was sent, in order, again as often as it was sent again."""
        self.acknowledged: list[str] = []
        """Ids of what the receiver has acknowledged, in order."""
        self._open = threading.Event()
        self._open.set()
        self._refusing = self._closed = False
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._unanswered: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    @property
    def url(self) -> str:
        """Give the address for a configuration."""
        return f"mqtt://{self.host}:{self.port}"

    def cut(self) -> None:
        """Cut all connections and let none in until `restore`."""
        self._refusing = True
        self._shut()

    def swallow(self) -> None:
        """Pass nothing on until `restore`, and say nothing: packets vanish, as on a cable that was pulled."""
        self._open.clear()

    def restore(self) -> None:
        """Let connections in and bytes through again."""
        with self._lock:
            for each in self._unanswered:
                each.close()
            self._unanswered.clear()
            self._refusing = False
            self._open.set()

    def _shut(self) -> None:
        with self._lock:
            for each in self._sockets:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def _start(self, run: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=run, args=arguments, name="test.tap", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if not self._open.is_set():
                    self._unanswered.append(client)
                    continue
            try:
                if self._refusing:
                    raise ConnectionRefusedError
                broker = socket.create_connection((self.host, self._target))
            except OSError:
                client.close()
                continue
            packet_ids: dict[int, str] = {}
            ends = [2]
            for each in (client, broker):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets |= {client, broker}
            for reader, writer in ((client, broker), (broker, client)):
                self._start(self._pump, reader, writer, packet_ids, ends)

    def _pump(self, reader: socket.socket, writer: socket.socket, packet_ids: dict[int, str], ends: list[int]) -> None:
        packets = Packets()
        with contextlib.suppress(OSError):
            while data := reader.recv(65536):
                self._open.wait()
                for kind, flags, body in packets.feed(data):
                    self._note(kind, flags, body, packet_ids)
                writer.sendall(data)
        self._open.wait()  # the end of a connection is nothing that a pulled cable would tell, either
        with self._lock:
            for each in (reader, writer):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            ends[0] -= 1
            if not ends[0]:
                for each in (reader, writer):
                    self._sockets.discard(each)
                    each.close()

    def _note(self, kind: int, flags: int, body: bytes, packet_ids: dict[int, str]) -> None:
        if kind == PUBLISH and flags & 6 == 2:
            packet_id, identity = published(body)
            packet_ids[packet_id] = identity
            self.delivered.append(identity)
        elif kind == PUBACK and (len(body) < 3 or body[2] < REFUSED):
            (packet_id,) = struct.unpack_from(">H", body)
            self.acknowledged.append(packet_ids.pop(packet_id))

    def close(self) -> None:
        """End all connections."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.restore()
        self._shut()
        for each in self._threads:
            each.join(PATIENCE_S)

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def paho_client(client_id: str) -> paho.Client:
    """Make a client of a persistent session that reconnects at once."""
    made = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTProtocolVersion.MQTTv5)
    made.reconnect_delay_set(0.2, 0.2)  # type: ignore[arg-type]  # a number of seconds
    made.max_inflight_messages_set(1000)

    def no_delay(_client: Any, _data: Any, sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    made.on_socket_open = no_delay
    return made


def connect(client: paho.Client, host: str, port: int) -> None:
    """Connect with a session that outlives every absence."""
    session = Properties(PacketTypes.CONNECT)
    session.SessionExpiryInterval = FOR_EVER_S
    client.connect(host, port, clean_start=False, properties=session)
    client.loop_start()
    wait_for(client.is_connected, "the test's client is connected")


class Feed(Protocol):
    """What sends inputs f0, f1, … into the service, and sends again what may have been lost on the way."""

    sent: int

    def look(self) -> bool:
        """Give whether all that was sent has arrived at who keeps it from now on."""

    def close(self) -> None:
        """End it."""


class Publisher:
    """Publishes pictures as fast as they are taken, each with an id as its user property; sends again what was not taken."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.sent = 0
        self.taken = 0
        """How many of those sent the broker has acknowledged."""
        self._client = paho_client("publisher")
        self._client.on_publish = self._published
        connect(self._client, host, port)

    def _published(self, *_: Any) -> None:
        self.taken += 1

    def more(self, number: int) -> None:
        """Publish so many more, without waiting."""
        for _ in range(number):
            identity = f"f{self.sent}"
            properties = Properties(PacketTypes.PUBLISH)
            properties.UserProperty = [("id", identity)]
            properties.ContentType = "image/png"
            self._client.publish(f"in/{identity}", digit_png(self.sent % 500), 1, False, properties)
            self.sent += 1

    def look(self) -> bool:
        """Give whether the broker has acknowledged all; paho sends again what it had not before a break."""
        return self.taken == self.sent

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        end(self._client)


class Collector:
    """Counts results by id, in a session that outlives its connections."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.results: Counter[str] = Counter()
        self.wrong: list[str] = []
        """What is wrong with results: a property that is not the document's id, a copy that says something else."""
        self.days: set[str] = set()
        """The days on which inputs were captured, by the service's clock."""
        self._said: dict[str, str] = {}
        self._client = paho_client("collector")
        self._client.on_message = self._message
        subscribed = threading.Event()
        self._client.on_connect = self._connected
        self._client.on_subscribe = lambda *_: subscribed.set()
        connect(self._client, host, port)
        assert subscribed.wait(PATIENCE_S)

    def _connected(self, *_: Any) -> None:
        self._client.subscribe("results", 1)  # again after each break: a broker may have forgotten

    def _message(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        document = json.loads(message.payload)
        identity = document["id"]
        properties = dict(getattr(message.properties, "UserProperty", []))
        if properties.get("id") != identity:
            self.wrong.append(f"{identity}: the property says {properties.get('id')}")
        result = json.dumps([document.get("result"), document.get("error")])
        if self._said.setdefault(identity, result) != result:
            self.wrong.append(f"{identity}: {self._said[identity]} and {result}")
        self.days.add(str(document["captured_at"])[:10])
        self.results[identity] += 1

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        end(self._client)


def in_spool(state: Path) -> set[str]:
    """Give the ids of what waits in the spool of a dead service; looks at a copy, so that nothing is mended by looking."""
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder)
        for each in (state / "spool").glob("spool.db*"):
            shutil.copy(each, copied)
        if not (copied / "spool.db").exists():
            return set()
        with contextlib.closing(sqlite3.connect(copied / "spool.db")) as db:
            query = "SELECT frame FROM rows JOIN lanes ON lanes.id = rows.lane WHERE kind = 'queue'"
            try:
                return {frame.decode() for (frame,) in db.execute(query)}
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):  # it was killed when it began to make the file
                    return set()
                raise


def is_drained(state: Path) -> bool:
    """Whether nothing waits in the spool of a running service, which may delete its files at any moment."""
    try:
        with Reader(state / "spool") as reader:
            return not any(lane.items for lane in reader.lanes() if lane.kind == "queue")
    except UnavailableError:
        return False


@dataclass
class Account:
    """What became of the messages of one trial."""

    case: str
    seed: int
    messages: int = 0
    acknowledged: int = 0
    """Inputs that the service acknowledged."""
    missing: int = 0
    """Of these, those whose result upstream has not acknowledged: must be 0."""
    received: int = 0
    """Different results that the collector has."""
    duplicates: int = 0
    """Results that it has more often than once."""
    lost_by_input_broker: int = 0
    """Inputs that the input broker acknowledged and never delivered."""
    lost_by_result_broker: int = 0
    """Results that the result broker acknowledged and never delivered."""
    kills: int = 0
    most_in_spool: int = 0
    """Of what was seen at each kill."""
    published_per_s: float = 0.0
    settled_per_s: float = 0.0
    seconds: float = 0.0


@dataclass
class Trial:
    """A service between two brokers, started again whenever it ends, as systemd does; and what it promised."""

    folder: Path
    near: Mosquitto
    far: Mosquitto
    case: str = ""
    seed: int = 1
    words: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    state: Path | None = None
    near_side: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    """Where the service, the publisher and their broker are: a network namespace."""
    far_side: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    """Where the collector and its broker are."""
    far_host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.account = Account(self.case, self.seed)
        self._began = time.monotonic()
        self.state = self.state or self.folder / "state"
        with self.near_side():
            self.inputs = Tap(self.near.port)
            self.publisher = Publisher(self.near.port)
        self.feed: Feed = self.publisher
        self.promised = self.inputs.acknowledged
        """Ids of inputs that the service has acknowledged."""
        with self.far_side():
            self.results = Tap(self.far.port, self.far_host)
            self.collector = Collector(self.far.port)
        words: Mapping[str, Any] = {"pipeline": "", "source": MQTT_SOURCE, **self.words}
        self.config = write_config(
            self.folder, CONFIG, near=self.inputs.url, far=self.results.url, state=self.state, **words
        )
        self.logs: list[Path] = []
        self.service = self.start()

    def start(self) -> Service:
        """Start the service and wait until it serves; brokers may be away."""
        with self.near_side():
            self.service = Service(self.config, env=self.env)
        self.logs.append(self.service.log)
        self.service.said("started in")
        return self.service

    # Faults.

    def kill(self) -> None:
        """Kill the service, compare what it promised with what there is, and start it again."""
        self.service.kill()
        self.account.kills += 1
        self.check_promises("killed")
        time.sleep(RESTART_S)
        self.start()

    def check_promises(self, when: str) -> None:
        """Every input that the dead service acknowledged has a result upstream, or in the spool."""
        assert self.state is not None
        assert self.service.process.poll() is not None
        waiting = in_spool(self.state)
        self.account.most_in_spool = max(self.account.most_in_spool, len(waiting))
        lost = set(self.promised) - set(self.results.acknowledged) - waiting
        assert not lost, f"{when} (seed {self.seed}): {len(lost)} promised, and nowhere: {sorted(lost)[:10]}"

    def settled(self, number: int) -> None:
        """Wait until the service has acknowledged so many inputs."""

        def enough() -> bool:
            code = self.service.process.poll()
            assert code is None, f"the service ended with {code}:\n{self.service.text}"
            return len(self.promised) >= number

        wait_for(enough, f"{number} inputs are acknowledged (at first {len(self.promised)})", END_S)

    def jitter(self, number: int) -> int:
        """Give a number that is up to a tenth more."""
        return number + self.rng.randrange(number // 10 + 1)

    def publish(self, number: int) -> None:
        """Publish, as fast as the broker takes it."""
        began = time.monotonic()
        self.publisher.more(number)
        self.account.published_per_s = round(number / (time.monotonic() - began))

    # The end.

    def finish(self, *, brokers_live: bool = True) -> Account:
        """Wait until all came through, stop the service in order, and balance the account."""
        account, state = self.account, self.state
        assert state is not None
        wait_for(self.feed.look, "the broker has taken all inputs", END_S)
        sent = {f"f{number}" for number in range(self.feed.sent)}
        if brokers_live:
            wait_for(lambda: sent <= set(self.collector.results.copy()), self._lacking(sent), END_S)
            wait_for(lambda: sent <= set(self.promised), "all inputs are acknowledged", END_S)
        else:
            self.quiet()
        account.settled_per_s = round(len(self.promised) / (time.monotonic() - self._began))
        wait_for(lambda: is_drained(state), "the spool is drained", END_S)
        assert self.service.terminate() == 0, self.service.text
        self.check_promises("stopped")
        assert in_spool(state) == set(), "nothing came into it at the end"
        acknowledged, upstream = set(self.promised), set(self.results.acknowledged)
        received = set(self.collector.results)
        account.messages = self.feed.sent
        account.acknowledged = len(acknowledged)
        account.missing = len(acknowledged - upstream)
        account.received = len(received)
        account.duplicates = self.collector.results.total() - len(received) if received else 0
        if self.feed is self.publisher:
            account.lost_by_input_broker = len(sent - set(self.inputs.delivered))
        account.lost_by_result_broker = len(upstream - received)
        account.seconds = round(time.monotonic() - self._began, 1)
        print(json.dumps(asdict(account)))
        assert account.missing == 0, f"seed {self.seed}: {sorted(acknowledged - upstream)[:10]}"
        assert received <= sent, "every result carries the id of an input"
        assert self.collector.wrong == [], "copies carry the same id and the same result"
        for log in self.logs:
            assert "Traceback" not in log.read_text(errors="replace"), log
        if brokers_live:
            assert received == sent, f"end to end 0 lost, where the brokers live (seed {self.seed})"
            assert acknowledged == sent
        return account

    def _lacking(self, sent: set[str]) -> str:
        return f"a result of each of {len(sent)} inputs (seed {self.seed}); at first {len(self.collector.results)}"

    def quiet(self) -> None:
        """Wait until nothing moves any more."""
        last: list[Any] = [None, time.monotonic()]

        def moves_no_more() -> bool:
            now = [len(self.promised), len(self.results.acknowledged), self.collector.results.total()]
            if now != last[0]:
                last[:] = [now, time.monotonic()]
            return bool(time.monotonic() - last[1] > QUIET_S)

        wait_for(moves_no_more, "nothing moves any more", END_S)

    def freeze(self, pid: int, seconds: float) -> None:
        """Stop a process as a debugger or a starved machine does, and let it go on."""
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.service.__exit__(kind, error, None)
        for each in (self.inputs, self.results):
            each.close()
        self.feed.close()
        self.publisher.close()
        self.collector.close()
