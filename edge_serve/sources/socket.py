"""Inputs from a Unix or TCP stream socket, answered on the same connection (README, Socket).

One thread serves all connections and never waits for any of them: a client that sends half a frame, does not read its
answers or sends without end holds up nobody else. A client is held back by not being read.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import queue
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from edge_serve import framing, watchdog
from edge_serve.config import Wiring
from edge_serve.errors import EdgeServeError, Problem, ProtocolError, TooLargeError, UnavailableError
from edge_serve.frame import Capture, Delivery, Frame, Result, parse_time
from edge_serve.processing.tensor import KNOWN_TYPES
from edge_serve.sources import SourceContext, listening
from edge_serve.sources.listening import SocketSourceOptions

log = logging.getLogger(__name__)

RECEIVE_CHUNK = 256 * 1024
MAX_ID_LENGTH = 256
MAX_KEY_LENGTH = 1024
# How often time-outs are looked at.
TICK_S = 0.25
# A connection that answers an error and closes gets this long to take the answer.
FAREWELL_S = 2.0
# Answers that a client has not read yet; with more, it is not read either: a client that only sends fills no memory.
MAX_UNREAD = 1024 * 1024
# Clients that come all at once are let in before any is served; more than this would keep the others waiting.
ACCEPT_AT_ONCE = 64
# How long no connection is accepted when the process has no file descriptor left.
ACCEPT_PAUSE_S = 1.0


class _Connection:
    """One client."""

    def __init__(self, sock: socket.socket, number: int, options: SocketSourceOptions, authorized: bool) -> None:
        self.sock = sock
        self.number = number
        self.reader = framing.Reader(options.max_payload)
        self.buffered = 0
        self.authorized = authorized
        self.unsettled = 0
        self.unanswered = 0
        self.out: deque[memoryview] = deque()
        self.out_bytes = 0
        self.progress = time.monotonic()
        self.half_closed = False
        self.wrong: EdgeServeError | None = None
        """Why it will be closed, as soon as what it sent before is answered."""
        self.closing_at: float | None = None
        self.closed = False
        self.events = 0


class SocketSource:
    """A listening socket and its clients."""

    Options = SocketSourceOptions
    answers = True

    def __init__(self, options: SocketSourceOptions, context: SourceContext) -> None:
        self._options = options
        self._context = context
        self._config = context.config
        self.when_safe = options.answer == "when_safe"
        self._lock = threading.RLock()
        self._queue: queue.SimpleQueue[Delivery | Exception] = queue.SimpleQueue()
        self._connections: dict[int, _Connection] = {}
        self._opened = 0
        self._sequence = 0
        self._frame_bytes = 0
        self._buffered_bytes = 0
        self._touched: set[_Connection] = set()
        self._pressed = False
        """Whether somebody is not read because of what others have in memory."""
        self._listener: socket.socket | None = None
        self._address: listening.Listening | None = None
        self._token: bytes | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._accept_again: float | None = None
        self._next_look = 0.0

    @classmethod
    def check(cls, options: SocketSourceOptions, key: str, wiring: Wiring) -> list[Problem]:
        """Find addresses that are none, remote access without a token, and two pipelines on one address."""
        return listening.problems(options, key, wiring)

    @property
    def policy(self) -> str:
        """Give the configured policy."""
        return self._options.policy

    @property
    def hold_limit(self) -> int | None:
        """Give how many frames of one connection may be unsettled."""
        return self._options.max_inflight

    def connect(self) -> None:
        """Bind and listen."""
        options = self._options
        self._token = listening.token(self._config, options)
        if self._token is None and options.token_file is not None:
            raise UnavailableError(f"{options.listen}: {self._config.resolve(options.token_file)} holds no token")
        self._address = listening.Listening(options)
        self._listener = self._address.socket
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._woken)
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name=f"socket.{self._context.pipeline}", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Give the TCP port that is listened on (useful with port 0)."""
        return int(self._listener.getsockname()[1]) if self._listener is not None else 0

    def read(self, timeout: float) -> Delivery | None:
        """Give the next frame of any client."""
        try:
            item = self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, Exception):
            raise UnavailableError(f"{self._options.listen}: the socket's thread failed: {item}") from item
        return item

    def close(self) -> None:
        """Close the listener and all connections; answers that can be sent at once still are."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stopping = True
        self._wake()
        thread.join()
        if self._address is not None:
            self._address.remove_path()

    # The thread.

    def _serve(self) -> None:
        beat = watchdog.begin(f"socket.{self._context.pipeline}")
        try:
            while not self._stopping:
                beat.tick()
                for key, events in self._selector.select(TICK_S):
                    if isinstance(key.data, _Connection):
                        self._ready(key.data, events)
                    else:
                        key.data()
                self._look_at_time()
        except Exception as error:  # told to the runner, which ends this connection and begins anew
            log.exception("%s: the socket's thread failed", self._context.pipeline)
            self._queue.put(error)
        finally:
            with self._lock:
                for connection in list(self._connections.values()):
                    self._close(connection)
            for each in (self._listener, self._wake_in, self._wake_out):
                if each is not None:
                    each.close()
            self._selector.close()
            beat.end()

    def _accept(self) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            if not self._accept_one():
                return

    def _accept_one(self) -> bool:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False  # nobody more, or gone already
        except OSError as error:
            # The process has no file descriptor left: those who are there are served, others have to wait.
            log.warning("%s: cannot accept a connection: %s", self._context.pipeline, error)
            self._selector.unregister(self._listener)
            self._accept_again = time.monotonic() + ACCEPT_PAUSE_S
            return False
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._opened += 1
            connection = _Connection(sock, self._opened, self._options, self._token is None)
            self._connections[connection.number] = connection
            self._interest(connection)
            if sum(each.wrong is None for each in self._connections.values()) > self._options.max_connections:
                self._give_up(
                    connection,
                    UnavailableError(
                        f"more than {self._options.max_connections} connections (max_connections); try later"
                    ),
                )
        return True

    def _woken(self) -> None:
        try:
            while self._wake_in.recv(4096):
                pass
        except BlockingIOError:
            pass
        with self._lock:
            concerned = list(self._connections.values() if self._pressed else self._touched)
            self._touched.clear()
            self._pressed = False
            for connection in concerned:
                self._work(connection)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it is awake already, or gone
            self._wake_out.send(b"\0")

    def _ready(self, connection: _Connection, events: int) -> None:
        with self._lock:
            if events & selectors.EVENT_WRITE:
                self._flush(connection)
            if events & selectors.EVENT_READ and not connection.closed:
                self._receive(connection)
            self._work(connection)

    def _receive(self, connection: _Connection) -> None:
        try:
            data = connection.sock.recv(RECEIVE_CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._close(connection)
            return
        connection.progress = time.monotonic()
        if connection.closing_at is not None:
            # Read and let go, so that the kernel does not throw the farewell away together with what was not read.
            if not data:
                self._close(connection)
        elif data:
            connection.reader.feed(data)
            self._count(connection)
        else:
            connection.half_closed = True

    def _work(self, connection: _Connection) -> None:
        """Take what the connection has sent, as far as it may go on, and settle what is to be waited for next."""
        try:
            while not connection.closed and connection.wrong is None and self._may_go_on(connection):
                message = connection.reader.next()
                if message is None:
                    if connection.half_closed:
                        connection.reader.finish()
                    break
                self._message(connection, message)
        except ProtocolError as error:
            self._give_up(connection, error)
        self._count(connection)
        if connection.wrong is not None and connection.unanswered == 0:
            self._farewell(connection, connection.wrong)
        if not connection.closed and connection.half_closed and connection.closing_at is None:
            done = connection.unanswered == 0 and (self._options.answer == "at_once" or connection.unsettled == 0)
            if done and not connection.out and not connection.reader.inside:
                self._close(connection)
        if not connection.closed:
            self._interest(connection)

    def _count(self, connection: _Connection) -> None:
        held = 0 if connection.closed else connection.reader.buffered
        self._buffered_bytes += held - connection.buffered
        connection.buffered = held

    def _may_go_on(self, connection: _Connection) -> bool:
        if self._frame_bytes >= self._options.max_bytes:
            self._pressed = True
            return False
        return connection.unsettled < self._options.max_inflight and connection.out_bytes < MAX_UNREAD

    def _may_receive(self, connection: _Connection) -> bool:
        """Bound the bytes of frames that are not complete, too: over the limit only the longest-waiting one goes on."""
        if connection.closing_at is not None:
            return True
        if not self._may_go_on(connection) or connection.half_closed or connection.wrong is not None:
            return False
        if self._frame_bytes + self._buffered_bytes < self._options.max_bytes:
            return True
        self._pressed = True
        first = min(
            (each for each in self._connections.values() if each.reader.inside),
            key=lambda each: each.number,
            default=None,
        )
        return first is connection

    def _interest(self, connection: _Connection) -> None:
        events = selectors.EVENT_READ if self._may_receive(connection) else 0
        if connection.out:
            events |= selectors.EVENT_WRITE
        if events == connection.events:
            return
        if not connection.events:
            self._selector.register(connection.sock, events, connection)
        elif not events:
            self._selector.unregister(connection.sock)
        else:
            self._selector.modify(connection.sock, events, connection)
        connection.events = events

    def _look_at_time(self) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + TICK_S
        if self._accept_again is not None and now > self._accept_again and self._listener is not None:
            self._accept_again = None
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        with self._lock:
            for connection in list(self._connections.values()):
                waited_for = connection.reader.inside or not connection.authorized
                if connection.closing_at is not None and now > connection.closing_at:
                    self._close(connection)
                elif connection.events & selectors.EVENT_READ and waited_for:
                    if now - connection.progress > self._options.frame_timeout_s:
                        where = "inside a frame" if connection.authorized else "and no token"
                        self._give_up(
                            connection,
                            ProtocolError(f"no byte for {self._options.frame_timeout_s:g} s {where} (frame_timeout_s)"),
                        )
                elif not connection.closed:
                    # What bounded it may be over without any event of its own.
                    connection.progress = now
                    self._interest(connection)

    def _message(self, connection: _Connection, message: framing.Message) -> None:
        kind = message.header["type"]
        if not connection.authorized:
            token = message.header.get("token")
            if (
                kind != "auth"
                or not isinstance(token, str)
                or not hmac.compare_digest(token.encode(), self._token or b"")
            ):
                raise ProtocolError('not authorized: send {"type": "auth", "token": …} with the right token first')
            connection.authorized = True
        elif kind == "auth":
            return  # sent to a server that does not ask for it
        elif kind == "describe":
            self._send(connection, {"type": "info", **self._describe()})
        elif kind == "frame":
            self._frame(connection, message)
        else:
            raise ProtocolError(f"unknown message type {kind!r:.60}; known: frame, describe, auth")

    def _describe(self) -> dict[str, Any]:
        limits = {
            "max_payload": self._options.max_payload,
            "max_header": framing.MAX_HEADER,
            "max_inflight": self._options.max_inflight,
        }
        return {"v": framing.VERSION, **self._context.describe(), "limits": limits}

    def _frame(self, connection: _Connection, message: framing.Message) -> None:
        header = message.header
        captured = Capture.now()
        error: EdgeServeError | None = None
        self._sequence += 1
        identity = header.get("id")
        if identity is None:
            identity = f"{connection.number}-{self._sequence}-{captured.utc:.6f}"
        elif not isinstance(identity, (str, int)) or isinstance(identity, bool) or len(str(identity)) > MAX_ID_LENGTH:
            raise ProtocolError(f'"id" must be text or a whole number of at most {MAX_ID_LENGTH} characters')
        said = header.get("captured_at")
        if said is not None:
            try:
                captured = Capture.at(parse_time(said))
            except (ValueError, TypeError, AttributeError, OverflowError) as failure:
                raise ProtocolError('"captured_at" must be RFC 3339 text with a zone') from failure
        content_type, reply, meta = header.get("content_type"), header.get("reply", True), header.get("meta", {})
        if content_type is not None and not isinstance(content_type, str):
            raise ProtocolError(f'"content_type" must be text, one of {", ".join(KNOWN_TYPES)}')
        if not isinstance(reply, bool) or not isinstance(meta, dict):
            raise ProtocolError('"reply" must be true or false, "meta" an object')
        if message.body is None:
            error = TooLargeError(
                f"frame of {header['length']} bytes is over the limit of {self._options.max_payload} (max_payload)"
            )
        body = message.body or b""
        source = f"{self._options.listen}#{connection.number}"
        key = meta.get("key")
        if key is not None and (
            not isinstance(key, (str, int)) or isinstance(key, bool) or len(str(key)) > MAX_KEY_LENGTH
        ):
            raise ProtocolError(
                f'"key" in "meta" must be text or a whole number of at most {MAX_KEY_LENGTH} characters'
            )
        frame = Frame(
            str(identity),
            self._options.listen,
            captured,
            content_type,
            body,
            {"key": str(key) if key is not None else source},
            error,
        )
        pending = _Pending(self, connection, header.get("id", identity), len(body), reply)
        connection.unsettled += 1
        connection.unanswered += 1
        self._frame_bytes += len(body)
        self._queue.put(Delivery(frame, pending.settle, pending.answer))

    # Sending, from any thread.

    def answered(self, pending: _Pending, answers: list[dict[str, Any]], settled: bool) -> None:
        """Send a frame's answers, once."""
        with self._lock:
            connection = pending.connection
            if not pending.answered:
                pending.answered = True
                connection.unanswered -= 1
                if pending.reply:
                    for header in answers:
                        if not connection.closed:
                            self._send(connection, header)
            if settled:
                connection.unsettled -= 1
                self._frame_bytes -= pending.size
            self._touched.add(connection)
        if settled or connection.half_closed or connection.wrong is not None:
            self._wake()

    def _send(self, connection: _Connection, header: dict[str, Any]) -> None:
        try:
            data = framing.encode(header)
        except ProtocolError:
            # A result with large tensors does not fit a header; it goes as a body, and "length" says so.
            data = framing.encode(
                {"type": header["type"], "id": header.get("id")},
                json.dumps(header, ensure_ascii=False).encode(errors="replace"),
            )
        connection.out.append(memoryview(data))
        connection.out_bytes += len(data)
        self._flush(connection)
        if connection.out_bytes > self._options.max_bytes:
            log.warning("%s: a client does not read its answers; its connection is closed", self._context.pipeline)
            self._close(connection)
        elif connection.out and threading.current_thread() is not self._thread:
            self._touched.add(connection)
            self._wake()

    def _flush(self, connection: _Connection) -> None:
        while connection.out and not connection.closed:
            data = connection.out[0]
            try:
                sent = connection.sock.send(data)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._close(connection)
                return
            connection.out_bytes -= sent
            connection.out.popleft()
            if sent < len(data):
                connection.out.appendleft(data[sent:])
        if connection.closing_at is not None and not connection.closed:
            if connection.half_closed:
                self._close(connection)
                return
            try:
                connection.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._close(connection)

    def _give_up(self, connection: _Connection, error: EdgeServeError) -> None:
        """Take nothing more from a connection; it is closed when all that it sent before is answered."""
        if connection.wrong is None and not connection.closed:
            log.info("%s: connection %d: %s", self._context.pipeline, connection.number, error)
            connection.wrong = error
            if connection.unanswered == 0:
                self._farewell(connection, error)

    def _farewell(self, connection: _Connection, error: EdgeServeError) -> None:
        """Answer an error, then close the connection."""
        if connection.closed or connection.closing_at is not None:
            return
        connection.closing_at = time.monotonic() + FAREWELL_S
        self._send(connection, {"type": "error", "id": None, "code": error.code, "message": str(error)})

    def _close(self, connection: _Connection) -> None:
        if connection.closed:
            return
        connection.closed = True
        if connection.events:
            self._selector.unregister(connection.sock)
            connection.events = 0
        connection.out.clear()
        self._count(connection)
        connection.sock.close()
        del self._connections[connection.number]


class _Pending:
    """A frame that is on its way through the pipeline."""

    __slots__ = ("answered", "connection", "identity", "kept", "reply", "size", "source")

    def __init__(self, source: SocketSource, connection: _Connection, identity: Any, size: int, reply: bool) -> None:
        self.source = source
        self.connection = connection
        self.identity = identity
        self.size = size
        self.reply = reply
        self.answered = False
        self.kept: Sequence[Result] = ()

    def answer(self, results: Sequence[Result]) -> None:
        """Send the results, or keep them until they are safe."""
        if self.source.when_safe:
            self.kept = results
        else:
            self.source.answered(self, _answers(self.identity, results), settled=False)

    def settle(self, error: Exception | None) -> None:
        """Free the frame's place; who has no answer yet gets it now: the results that are safe, or why there are none."""
        if error is None:
            answers = _answers(self.identity, self.kept)
        else:
            code = error.code if isinstance(error, EdgeServeError) else "internal"
            answers = [{"type": "error", "id": self.identity, "code": code, "message": str(error)}]
        self.source.answered(self, answers, settled=True)


def _answers(identity: Any, results: Sequence[Result]) -> list[dict[str, Any]]:
    if not results:
        return [{"type": "accepted", "id": identity}]
    answers = []
    for result in results:
        if result.error is not None:
            answers.append(
                {"type": "error", "id": identity, "code": result.error.code, "message": result.error.message}
            )
        else:
            document = result.to_dict()
            if document["id"] == str(identity):
                document["id"] = identity  # as the client wrote it: a number stays one
            # Both the message and the result have a "type": the message keeps the word.
            kind = document.pop("type")
            answers.append({"type": "result", **document, "result_type": kind})
    return answers
