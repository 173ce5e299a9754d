"""The control socket of a running service: `<state_dir>/control.sock`, by which local commands reach `edge-serve run`.

A caller sends one request, `{"type": "capture", "v": 1, …}`, in the framing of the socket protocol (framing.py) and
without a body; what comes back depends on the request, `{"type": "error", "code", "message"}` at any time. Whoever closes
the connection, or only its sending half, ends what it asked for. The socket is its owner's alone (mode 0600).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from edge_serve import framing, watchdog
from edge_serve.errors import EdgeServeError, ProtocolError, UnavailableError, UsageError

log = logging.getLogger(__name__)

FILE = "control.sock"
VERSION = 1
# sun_path has 108 bytes, with its end.
MAX_PATH = 107
# A request names a command and a few numbers.
MAX_REQUEST = 4096
# Each costs a thread; a person with a few terminals needs no more.
MAX_CONNECTIONS = 8
REQUEST_TIMEOUT_S = 5.0
# A caller that takes nothing for so long is as good as gone.
SEND_TIMEOUT_S = 30.0
# How long the service's end waits for what its callers are still being told.
CLOSE_GRACE_S = 1.0
# How long no connection is accepted when the process has no file descriptor left.
ACCEPT_PAUSE_S = 1.0
# The thread that accepts looks after this long whether it lives.
IDLE_S = 5.0
RECEIVE_CHUNK = 256 * 1024


class Peer:
    """A caller, as the service sees it. Used by one thread, which may wait for it."""

    def __init__(self, sock: socket.socket, stopping: threading.Event) -> None:
        self._sock = sock
        self._stopping = stopping

    @property
    def stopping(self) -> bool:
        """Say whether the service is about to end: what is left to be told has about a second."""
        return self._stopping.is_set()

    def request(self) -> dict[str, Any]:
        """Read the request; ProtocolError if it is none, is longer than MAX_REQUEST or does not come in time."""
        deadline = time.monotonic() + REQUEST_TIMEOUT_S
        reader = framing.Reader(max_payload=0, max_header=MAX_REQUEST)
        while (message := reader.next()) is None:
            self._sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._sock.recv(MAX_REQUEST)
            except TimeoutError as error:
                raise ProtocolError(f"no whole request came within {REQUEST_TIMEOUT_S:g} s") from error
            if not data:
                raise ProtocolError("the connection was closed before a request came")
            reader.feed(data)
        if message.body is None:
            raise ProtocolError("a request has no body")
        if message.header.get("v") != VERSION:
            said = message.header.get("v")
            raise ProtocolError(
                f"the request is of version {said!r:.20}, this service speaks version {VERSION}; "
                "use the same edge-serve on both ends"
            )
        return message.header

    def send(self, header: Mapping[str, Any], body: bytes = b"") -> None:
        """Send one message; OSError if the caller is gone or takes nothing for SEND_TIMEOUT_S."""
        self._sock.settimeout(SEND_TIMEOUT_S)
        self._sock.sendall(framing.encode(dict(header), body))

    def refuse(self, error: EdgeServeError) -> None:
        """Tell an error, if the caller still listens."""
        code = "usage" if isinstance(error, UsageError) else "unavailable"
        code = "protocol" if isinstance(error, ProtocolError) else code
        with contextlib.suppress(OSError):
            # The text may quote what the caller sent; a header has its limit.
            self.send({"type": "error", "code": code, "message": str(error)[:MAX_REQUEST]})

    def left(self) -> bool:
        """Say whether the caller has closed its sending half, or all; anything more that it sends means nothing."""
        self._sock.setblocking(False)
        try:
            return not self._sock.recv(MAX_REQUEST)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def shut(self) -> None:
        """End what its thread waits for."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()


Command = Callable[[dict[str, Any], Peer], None]
"""Answers one request in a thread of its own; an EdgeServeError is told to the caller, OSError means that it is gone."""


class Control:
    """Listens for local commands; one thread accepts, each connection has one of its own."""

    def __init__(self, folder: Path, commands: Mapping[str, Command]) -> None:
        """Listen in `folder`, which is made if need be. Whoever has the folder's lock (instance.py) may do that.

        UnavailableError says why it cannot: another service runs there, or the folder cannot be written.
        """
        self._commands = commands
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._peers: dict[threading.Thread, Peer] = {}
        try:
            self._listener, self._undo = _listen(folder)
        except OSError as error:
            raise UnavailableError(f"{folder / FILE}: cannot listen: {error.strerror or error}") from error
        self._ending, self._end = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        beat = watchdog.begin("control")
        try:
            self._accept(beat)
        finally:
            beat.end()

    def _accept(self, beat: watchdog.Heartbeat) -> None:
        waiting = select.poll()  # select() cannot take descriptors over 1023
        waiting.register(self._listener, select.POLLIN)
        waiting.register(self._ending, select.POLLIN)
        self._listener.setblocking(False)
        while not self._stopping.is_set():
            beat.tick()
            if not waiting.poll(IDLE_S * 1e3) or self._stopping.is_set():
                continue
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                continue  # the caller has gone already
            except OSError as error:
                log.warning("control socket: cannot accept a connection: %s", error)
                self._stopping.wait(ACCEPT_PAUSE_S)
                continue
            sock.setblocking(True)
            self._take(Peer(sock, self._stopping))

    def _take(self, peer: Peer) -> None:
        with self._lock:
            thread = threading.Thread(target=self._answer, args=(peer,), name="control.peer", daemon=True)
            room = len(self._peers) < MAX_CONNECTIONS and not self._stopping.is_set()
            if room:
                self._peers[thread] = peer
        try:
            if not room:
                raise RuntimeError
            thread.start()
        except RuntimeError:  # the system has no thread left, either
            peer.refuse(UnavailableError(f"the service answers {len(self._peers)} other commands; try later"))
            peer.close()
            with self._lock:
                self._peers.pop(thread, None)

    def _answer(self, peer: Peer) -> None:
        try:
            request = peer.request()
            command = self._commands.get(request["type"])
            if command is None:
                raise ProtocolError(f"unknown request {request['type']!r:.60}; known: {', '.join(self._commands)}")
            command(request, peer)
        except OSError as error:
            log.debug("control socket: the caller is gone: %s", error)
        except EdgeServeError as error:
            log.debug("control socket: %s", error)
            peer.refuse(error)
        except Exception as error:  # a command that fails harms nothing that is served
            log.exception("control socket: a command failed")
            peer.refuse(UnavailableError(f"the command failed inside the service: {type(error).__name__}: {error}"))
        finally:
            with self._lock:
                self._peers.pop(threading.current_thread(), None)
            peer.close()

    def close(self) -> None:
        """Take no more commands, let those that are answered come to their end, and remove the socket."""
        self._stopping.set()
        self._end.close()  # wakes the thread that accepts
        self._thread.join()
        self._ending.close()
        with self._lock:
            peers = dict(self._peers)
        _join(peers)
        for peer in peers.values():
            peer.shut()
        _join(peers)
        self._undo.close()


def _join(threads: Iterable[threading.Thread]) -> None:
    deadline = time.monotonic() + CLOSE_GRACE_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _listen(folder: Path) -> tuple[socket.socket, contextlib.ExitStack]:
    """Bind and listen; gives the listener and what undoes it all."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as undo:
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        undo.callback(os.close, place)
        address = _address(folder, place)
        if _somebody_listens(address):
            raise _occupied(folder)
        _remove_stale(folder, place)
        listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(address)
        undo.callback(_unlink, place)
        os.chmod(FILE, 0o600, dir_fd=place)
        # Not earlier: until now whoever tries to connect is refused, whatever the mode was.
        listener.listen(MAX_CONNECTIONS)
        return listener, undo.pop_all()


def _address(folder: Path, place: int) -> str:
    """Give a name of the socket that fits into an address: a long path is gone by way of the open folder."""
    path = str(folder / FILE)
    return path if len(os.fsencode(path)) <= MAX_PATH else f"/proc/self/fd/{place}/{FILE}"


def _occupied(folder: Path) -> UnavailableError:
    return UnavailableError(
        f"{folder / FILE}: another service with this state folder is running; give each its own state_dir"
    )


def _somebody_listens(address: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except BlockingIOError:  # as many wait there as may
            return True
    return True


def _remove_stale(folder: Path, place: int) -> None:
    try:
        mode = os.stat(FILE, dir_fd=place, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UnavailableError(f"{folder / FILE}: is in the way and no socket; move it elsewhere")
    os.unlink(FILE, dir_fd=place)


def _unlink(place: int) -> None:
    with contextlib.suppress(OSError):  # somebody has removed it already
        os.unlink(FILE, dir_fd=place)


class Caller:
    """The other end: a local command that asks a running service."""

    def __init__(self, folder: Path, max_payload: int = 0) -> None:
        """Connect to the service whose state folder this is.

        UnavailableError if none runs there, UsageError if it belongs to somebody else.
        """
        self._path = folder / FILE
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(REQUEST_TIMEOUT_S)
        self._reader = framing.Reader(max_payload)
        try:
            place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self._sock.connect(_address(folder, place))
            finally:
                os.close(place)
        except PermissionError as error:
            self._sock.close()
            raise UsageError(
                f"{self._path}: belongs to another user; run this as the user of the service, or with sudo"
            ) from error
        except OSError as error:
            self._sock.close()
            raise UnavailableError(f"{self._path}: no service answers there ({error.strerror or error})") from error

    def ask(self, kind: str, **fields: Any) -> None:
        """Send the request."""
        try:
            self._sock.sendall(framing.encode({"type": kind, "v": VERSION, **fields}))
        except OSError as error:
            raise UnavailableError(f"{self._path}: the service has closed the connection ({error})") from error

    def receive(self, timeout: float) -> framing.Message | None:
        """Give the service's next message, None if `timeout` seconds were not enough for it.

        An error that the service tells is raised as UsageError, UnavailableError or ProtocolError; the end of the
        connection as UnavailableError.
        """
        deadline = time.monotonic() + timeout
        while (message := self._reader.next()) is None:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._sock], [], [], left)[0]:
                return None
            try:
                data = self._sock.recv(RECEIVE_CHUNK)
            except OSError as error:
                raise UnavailableError(f"{self._path}: the connection is lost ({error})") from error
            if not data:
                raise UnavailableError(f"{self._path}: the service has closed the connection")
            self._reader.feed(data)
        if message.header["type"] == "error":
            kinds = {"usage": UsageError, "protocol": ProtocolError}
            raise kinds.get(str(message.header.get("code")), UnavailableError)(str(message.header.get("message")))
        return message

    def finish(self) -> None:
        """Ask for the end; what is left to be told still comes."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
