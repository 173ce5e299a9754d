"""What the contract and system tests share: a broker, a proxy to cut its connections, clients, and edge-serve processes.

Nothing here sleeps and hopes: everything waits for a condition, with a deadline.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import io
import json
import os
import queue
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_serve.app import App, load
from edge_serve.config import Config

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "tests" / "data" / "models"
DIGITS = MODELS / "digits.tflite"
MOTION = MODELS / "motion.tflite"
DEMO_DATA = ROOT / "edge_serve" / "demo" / "data"
CLASSES = ("Standing", "Running", "Walking", "Badminton")

# A loaded machine may take its time; what is right does not depend on it.
PATIENCE_S = 20.0
POLL_S = 0.005

T = TypeVar("T")


def wait_for(condition: Callable[[], T | None], what: str, timeout: float = PATIENCE_S) -> T:
    """Wait until `condition` gives something true, and give that; AssertionError names `what` did not come."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}")
        time.sleep(POLL_S)


def stays(condition: Callable[[], object], what: str, seconds: float) -> None:
    """Check for some time that `condition` remains true: for what must not happen, where no event can be waited for."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert condition(), what
        time.sleep(POLL_S)


def free_port() -> int:
    """Give a TCP port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def resident_bytes(pid: int) -> int:
    """Give the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """Give the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Inputs.


@functools.cache
def digit_arrays() -> tuple[Any, Any]:
    """Give the demo's test pictures, uint8 [500, 28, 28], and what they show."""
    with np.load(DEMO_DATA / "digits.npz") as data:
        return data["images"], data["labels"]


@functools.cache
def digit_png(number: int) -> bytes:
    """Give a test picture as a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(digit_arrays()[0][number]).save(buffer, "PNG")
    return buffer.getvalue()


@functools.cache
def digit_jpeg(number: int) -> bytes:
    """Give a test picture as a JPEG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(digit_arrays()[0][number]).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@functools.cache
def motion_series(number: int = 0) -> list[list[float]]:
    """Give a recording of 100 samples of six axes."""
    with np.load(DEMO_DATA / "motion.npz") as data:
        series: list[list[float]] = data["series"][number].tolist()
        return series


def motion_label(number: int) -> str:
    """Give what a recording shows."""
    with np.load(DEMO_DATA / "motion.npz") as data:
        return CLASSES[int(data["labels"][number])]


# The broker.


def mosquitto_path() -> str | None:
    """Give mosquitto's executable: EDGE_SERVE_MOSQUITTO, else the one on PATH or in /usr/sbin; None if there is none."""
    named = os.environ.get("EDGE_SERVE_MOSQUITTO")
    if named is not None:
        return named or None
    return shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


class Mosquitto:
    """A mosquitto of our own on 127.0.0.1, with the given lines of configuration."""

    def __init__(
        self, executable: str, folder: Path, *lines: str, port: int | None = None, listener: str | None = None
    ) -> None:
        self.executable = executable
        self.folder = folder
        self.port = port if port is not None else free_port()
        self.lines = lines or ("allow_anonymous true",)
        self.listener = listener if listener is not None else f"listener {self.port} 127.0.0.1"
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / f"mosquitto-{self.port}.log"
        self._log_before = 0

    @property
    def url(self) -> str:
        """Give the address for a configuration."""
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> Mosquitto:
        """Start and wait until it listens."""
        self._log_before = self.log.stat().st_size if self.log.exists() else 0
        text = [self.listener, *self.lines, "set_tcp_nodelay true", "log_type all"]
        if os.geteuid() == 0:
            text.append("user root")
        file = self.folder / f"mosquitto-{self.port}.conf"
        file.write_text("\n".join(text) + "\n", encoding="utf-8")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.executable, "-c", str(file)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_for(self._listens, f"mosquitto on port {self.port}; its log: {self.log}")
        return self

    def _listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"mosquitto ended: {self.log.read_text(errors='replace')}"
        return b" running" in self.log.read_bytes()[self._log_before :]

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it with a signal."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(PATIENCE_S)
            self.process = None

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        self.stop(signal.SIGKILL)

    def log_text(self) -> str:
        """Give what it has logged."""
        return self.log.read_text(errors="replace")

    def __enter__(self) -> Mosquitto:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class Proxy:
    """A TCP proxy in front of a broker: cuts connections, refuses new ones, or holds bytes back, when told to."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._wake_in, self._wake_out = socket.socketpair()
        self._closed = False
        self.refusing = False
        self._frozen = False
        self._rounds = 0
        self.delay = 0.0
        """Seconds that everything from the broker takes on its way."""
        self.rate = 0
        """Bytes a second that may come from the broker; 0: no limit."""
        self._delayed: collections.deque[tuple[float, socket.socket, bytes]] = collections.deque()
        self.accepted = 0
        self._thread = threading.Thread(target=self._run, name="test.proxy", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Give the address for a configuration."""
        return f"mqtt://127.0.0.1:{self.port}"

    def cut(self, *, refuse: bool = False) -> None:
        """Cut all connections; with `refuse` new ones are cut at once, too, until `restore`."""
        with self._lock:
            self.refusing = refuse
            for pair in self._pairs:
                for each in pair:
                    with contextlib.suppress(OSError):
                        each.shutdown(socket.SHUT_RDWR)
        self._wake()

    def freeze(self) -> None:
        """Read nothing and pass nothing on: the network is there, but dead."""
        self._frozen = True
        self._wake()
        rounds = self._rounds
        wait_for(lambda: self._rounds > rounds + 1, "the proxy has noticed")

    def restore(self) -> None:
        """Take connections and pass bytes on again."""
        self.refusing = self._frozen = False
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_out.send(b"\0")

    def _run(self) -> None:
        while not self._closed:
            with self._lock:
                watched: list[socket.socket] = [self._listener, self._wake_in]
                if not self._frozen:
                    watched += [each for pair in self._pairs for each in pair]
            self._rounds += 1
            self._pass_on_delayed()
            for ready in select.select(watched, [], [], 0.005 if self._delayed else 0.05)[0]:
                if ready is self._listener:
                    self._accept()
                elif ready is self._wake_in:
                    self._wake_in.recv(4096)
                else:
                    self._pass_on(ready)

    def _pass_on_delayed(self) -> None:
        while self._delayed and self._delayed[0][0] <= time.monotonic():
            _, receiver, data = self._delayed.popleft()
            with contextlib.suppress(OSError):
                receiver.sendall(data)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        if self.refusing:
            client.close()
            return
        try:
            server = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            client.close()
            return
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self.accepted += 1
            self._pairs.append((client, server))

    def _pass_on(self, ready: socket.socket) -> None:
        with self._lock:
            pair = next((pair for pair in self._pairs if ready in pair), None)
        if pair is None:
            return
        other = pair[1] if ready is pair[0] else pair[0]
        try:
            limited = self.rate and ready is pair[1]
            data = ready.recv(self.rate // 50 if limited else 65536)
            if limited:
                time.sleep(0.02)
            if data and self.delay and ready is pair[1]:
                self._delayed.append((time.monotonic() + self.delay, other, data))
                return
            if data:
                other.sendall(data)
                return
        except OSError:
            pass
        with self._lock:
            self._pairs.remove(pair)
        for each in pair:
            each.close()

    def close(self) -> None:
        """End the proxy and all its connections."""
        self._closed = True
        self._wake()
        self._thread.join(PATIENCE_S)
        for pair in self._pairs:
            for each in pair:
                each.close()
        for each in (self._listener, self._wake_in, self._wake_out):
            each.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Got:
    """A message that a test's client received."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    content_type: str | None
    user: dict[str, str]
    correlation: bytes | None

    @property
    def document(self) -> dict[str, Any]:
        """Give the payload's JSON document."""
        document: dict[str, Any] = json.loads(self.payload)
        return document


def end(client: paho.Client) -> None:
    """Stop a client's thread, and close the sockets by which paho wakes it.

    Left to the garbage collector they may go before the client that would close them, and the warning fails whatever test runs then.
    """
    client.loop_stop()
    client._reset_sockets()


class Client:
    """A plain paho client that publishes, and remembers what it receives."""

    def __init__(self, port: int, *topics: str, protocol: int = 5, client_id: str = "", qos: int = 1) -> None:
        self.messages: list[Got] = []
        self._five = protocol == 5
        self._qos = qos
        self._topics = topics
        self._subscribed = threading.Event()
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=MQTTProtocolVersion.MQTTv5 if self._five else MQTTProtocolVersion.MQTTv311,
        )
        self._client.reconnect_delay_set(1, 1)
        self._client.max_inflight_messages_set(1000)
        self._client.on_message = self._message
        self._client.on_connect = self._connected
        self._client.on_subscribe = lambda *_: self._subscribed.set()

        def no_delay(_client: Any, _data: Any, sock: Any) -> None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        self._client.on_socket_open = no_delay
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        if topics:
            assert self._subscribed.wait(PATIENCE_S), "the broker did not answer the test's subscription"
        else:
            wait_for(self._client.is_connected, "the test's client is connected")

    def _connected(self, *_: Any) -> None:
        # Again after every reconnect, so that a broker's restart is no matter.
        if self._topics:
            self._client.subscribe([(topic, self._qos) for topic in self._topics])

    def _message(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        properties: Any = message.properties
        self.messages.append(
            Got(
                message.topic,
                bytes(message.payload),
                message.qos,
                bool(message.retain),
                getattr(properties, "ContentType", None),
                dict(getattr(properties, "UserProperty", None) or []),
                getattr(properties, "CorrelationData", None),
            )
        )

    def publish(
        self,
        topic: str,
        payload: bytes | str = b"",
        *,
        qos: int = 1,
        retain: bool = False,
        wait: bool = True,
        **properties: Any,
    ) -> None:
        """Publish, and wait until the broker has it; further names are MQTT 5 properties, `user` the user properties."""
        sent: Properties | None = None
        if self._five:
            sent = Properties(PacketTypes.PUBLISH)
            for name, value in properties.items():
                if name == "user":
                    sent.UserProperty = list(value.items())
                else:
                    setattr(sent, name, value)
        info = self._client.publish(topic, payload, qos, retain, sent)
        if wait:
            info.wait_for_publish(PATIENCE_S)
            assert info.is_published(), f"the broker did not take a message on {topic}"

    def wait(self, number: int, timeout: float = PATIENCE_S) -> list[Got]:
        """Wait until `number` messages are there."""
        wait_for(
            lambda: len(self.messages) >= number,
            f"{number} messages on {', '.join(self._topics)} (there are {len(self.messages)})",
            timeout,
        )
        return self.messages

    def wait_ids(self, ids: set[str], timeout: float = PATIENCE_S) -> list[dict[str, Any]]:
        """Wait until there is a result of each of these frames; gives all results."""

        def missing() -> set[str]:
            return ids - {message.document["id"] for message in list(self.messages)}

        wait_for(lambda: not missing(), f"results of {len(ids)} frames; missing now: {sorted(missing())[:5]}…", timeout)
        return [message.document for message in self.messages]

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        end(self._client)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# edge-serve.


def write_config(folder: Path, text: str, file: str = "edge-serve.toml", **values: object) -> Path:
    """Write a configuration; {words} are filled in from `values` and from the models' paths."""
    known: dict[str, object] = {"digits": DIGITS, "motion": MOTION, **values}
    text = textwrap.dedent(text)
    for word, value in known.items():
        text = text.replace("{" + word + "}", str(value))
    path = folder / file
    path.write_text(text, encoding="utf-8")
    return path


def environment(**extra: str) -> dict[str, str]:
    """Give a process's environment: ours, without edge-serve's own variables, with this checkout first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_SERVE")}
    paths = [str(ROOT), str(ROOT / "converters"), str(ROOT / "devices")]
    if "PYTHONPATH" in kept:
        paths.append(kept["PYTHONPATH"])
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **extra}


def state_home(config: Path) -> str:
    """Give a folder for the state of who says nothing about it: one service at a time may have it."""
    return str(config.parent / f"{config.stem}.state")


def edge_serve(*arguments: str | Path, timeout: float = 60.0, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a command of edge-serve to its end."""
    command = [sys.executable, "-m", "edge_serve", *map(str, arguments)]
    files = [Path(argument) for argument in arguments if str(argument).endswith(".toml")]
    options.setdefault("env", environment(**({"XDG_STATE_HOME": state_home(files[0])} if files else {})))
    if "input" not in options:
        options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run(command, capture_output=True, timeout=timeout, **options)


class Service:
    """A real `edge-serve run` in a process of its own."""

    def __init__(
        self,
        config: Path,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self._folder = config.parent
        self.log = self._folder / f"service-{time.monotonic_ns()}.log"
        self.out = self._folder / f"service-{time.monotonic_ns()}.out"
        with self.log.open("wb") as log, self.out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edge_serve", "run", "-c", str(config), *arguments],
                stdin=stdin,
                stdout=out if stdout is None else stdout,
                stderr=log,
                env=environment(**{"XDG_STATE_HOME": state_home(config), **(env or {})}),
                preexec_fn=before,  # noqa: PLW1509  # no lock is taken in there
            )

    @property
    def pid(self) -> int:
        """Give its process id."""
        return self.process.pid

    @property
    def text(self) -> str:
        """Give what it has logged."""
        return self.log.read_text(errors="replace")

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Give the results that it has written to its standard output."""
        return [json.loads(line) for line in self.out.read_bytes().split(b"\n")[:-1]]

    def ready(self) -> Service:
        """Wait until it says that it has started and all is connected."""
        self.said(r"started in")
        assert "not connected yet" not in self.text, self.text
        return self

    def said(self, pattern: str, timeout: float = PATIENCE_S) -> re.Match[str]:
        """Wait until its log holds a text."""

        def look() -> re.Match[str] | None:
            found = re.search(pattern, self.text)
            if found is None:
                assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.text}"
            return found

        return wait_for(look, f"{pattern!r} in the log:\n{self.text}", timeout)

    def said_at_last(self, pattern: str) -> re.Match[str]:
        """Give what its log holds, after its end."""
        found = re.search(pattern, self.text)
        assert found is not None, f"{pattern!r} is not in the log:\n{self.text}"
        return found

    def wait(self, timeout: float = PATIENCE_S) -> int:
        """Wait for its end; gives the exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end within {timeout:g} s:\n{self.text}") from None

    def terminate(self, number: int = signal.SIGTERM, timeout: float = PATIENCE_S) -> int:
        """Send a signal and wait for the end; gives the exit code."""
        self.process.send_signal(number)
        return self.wait(timeout)

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE_S)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if error is not None:
            error.add_note(f"the service's log:\n{self.text}") if hasattr(error, "add_note") else None


_states: set[Path] = set()


class InProcess:
    """A configuration that runs in a thread of the test: all of the service but its process and its signals."""

    def __init__(self, config: Path) -> None:
        self.config: Config = load(config)
        self._state = Path(state_home(config))
        while self._state in _states:  # another one with this configuration runs, which only tests do
            self._state = self._state.with_suffix(f"{self._state.suffix}x")
        _states.add(self._state)
        if "state_dir" not in config.read_text(encoding="utf-8"):
            self.config = dataclasses.replace(self.config, state_dir=self._state)
        self._ready = threading.Event()
        self.app = App(self.config, self._ready.set)
        self._code: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="test.app", daemon=True)
        self._ended: int | None = None

    def _run(self) -> None:
        try:
            self._code.put(self.app.run())
        except BaseException as error:  # noqa: BLE001  # told to the test
            self._code.put(error)
            self._ready.set()

    def start(self) -> InProcess:
        """Start and wait until it serves."""
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)
        return self

    def counts(self, pipeline: int = 0) -> dict[str, Any]:
        """Give a pipeline's counters."""
        return self.app.lines[pipeline].counters.snapshot()

    def stop(self) -> int:
        """Stop as SIGTERM does; gives the exit code."""
        if self._ended is None:
            self.app.stop()
            self._ended = self.wait()
        return self._ended

    def wait(self) -> int:
        """Wait for the end; gives the exit code."""
        outcome = self._code.get(timeout=PATIENCE_S)
        self._thread.join(PATIENCE_S)
        _states.discard(self._state)
        if isinstance(outcome, BaseException):
            raise outcome
        self._ended = outcome
        return outcome

    def __enter__(self) -> InProcess:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


# The socket protocol, written by hand: the tests shall not lean on what they test.


@dataclass
class Raw:
    """A connection to a pipeline's socket that sends any bytes and reads answers line by line."""

    sock: socket.socket
    _buffer: bytearray = field(default_factory=bytearray)

    @classmethod
    def connect(cls, address: str | Path | tuple[str, int]) -> Raw:
        """Connect to a Unix socket's path or to a host and port."""
        if isinstance(address, tuple):
            sock = socket.create_connection(address, PATIENCE_S)
        else:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(str(address))  # with a time-out set, this would not wait until there is room
            except OSError:
                sock.close()
                raise
            sock.settimeout(PATIENCE_S)
        return cls(sock)

    @classmethod
    def connect_when_there(cls, path: Path) -> Raw:
        """Connect to a Unix socket as soon as somebody listens."""

        def attempt() -> Raw | None:
            try:
                return cls.connect(path)
            except OSError:
                return None

        return wait_for(attempt, f"somebody listens on {path}")

    def send(self, data: bytes) -> Raw:
        """Send bytes as they are."""
        self.sock.sendall(data)
        return self

    def frame(self, body: bytes = b"", **header: Any) -> Raw:
        """Send a frame."""
        line = json.dumps({"type": "frame", "length": len(body), **header})
        return self.send(line.encode() + b"\n" + body)

    def answer(self) -> dict[str, Any] | None:
        """Give the next answer, None at the end of the stream."""
        line = self._line()
        if line is None:
            return None
        header: dict[str, Any] = json.loads(line)
        if header["length"]:
            body = self._exactly(header["length"])
            header |= json.loads(body)
        return header

    def _line(self) -> bytes | None:
        while (end := self._buffer.find(b"\n")) < 0:
            if not self._more():
                assert not self._buffer, f"half an answer: {bytes(self._buffer)!r}"
                return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _exactly(self, length: int) -> bytes:
        while len(self._buffer) < length:
            assert self._more(), "the stream ended inside an answer"
        body = bytes(self._buffer[:length])
        del self._buffer[:length]
        return body

    def _more(self) -> bool:
        data = self.sock.recv(65536)
        self._buffer += data
        return bool(data)

    def answers(self, number: int) -> list[dict[str, Any]]:
        """Give that many answers."""
        found: list[dict[str, Any]] = []
        for _ in range(number):
            answer = self.answer()
            assert answer is not None, f"the stream ended after {len(found)} of {number} answers"
            found.append(answer)
        return found

    def ended(self) -> bool:
        """Wait for the end of the stream; False if an answer comes instead."""
        return self.answer() is None

    def finish(self) -> Raw:
        """Say that nothing more will be sent."""
        self.sock.shutdown(socket.SHUT_WR)
        return self

    def close(self) -> None:
        """Close."""
        self.sock.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def clients(number: int, address: str | Path | tuple[str, int]) -> Iterator[list[Raw]]:
    """Open that many connections."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Raw.connect(address)) for _ in range(number)]
