"""The client's end of the socket protocol, for `edge-serve send`, the demo and programs on the same board."""

from __future__ import annotations

import json
import select
import socket
import time
from typing import Any
from urllib.parse import urlsplit

from edge_serve import framing
from edge_serve.errors import UnavailableError, UsageError

RECEIVE_CHUNK = 64 * 1024
# A Unix socket does not let a client wait for a place in the line by itself.
CONNECT_PAUSE_S = 0.01
# Answers may hold whole tensors.
MAX_ANSWER = 256 * 1024 * 1024


class Client:
    """A connection to a pipeline's socket."""

    def __init__(self, address: str, timeout: float = 30.0, token: str | None = None) -> None:
        url = urlsplit(address)
        try:
            if url.scheme == "unix" and url.path:
                self._sock = _connect_unix(url.path, timeout)
            elif url.scheme == "tcp" and url.hostname and url.port:
                self._sock = socket.create_connection((url.hostname, url.port), timeout)
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            else:
                raise UsageError(f"{address!r} is no socket's address; write unix:///path or tcp://host:port")
        except OSError as error:
            raise UnavailableError(
                f"{address}: cannot connect: {error.strerror or error}; is `edge-serve run` running?"
            ) from error
        self._address = address
        self._reader = framing.Reader(max_payload=MAX_ANSWER)
        if token is not None:
            self.send({"type": "auth", "token": token})

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Send one message."""
        try:
            self._sock.sendall(framing.encode(header, body))
        except OSError as error:
            raise UnavailableError(f"{self._address}: connection lost while sending: {error}") from error

    def wait(self, seconds: float) -> bool:
        """Wait until there is something to receive; False if `seconds` were not enough."""
        return self._reader.inside or bool(select.select([self._sock], [], [], seconds)[0])

    def receive(self) -> dict[str, Any] | None:
        """Give the next answer's header (with what came as a body laid over it); None when the server has closed."""
        while (message := self._reader.next()) is None:
            try:
                data = self._sock.recv(RECEIVE_CHUNK)
            except TimeoutError as error:
                raise UnavailableError(f"{self._address}: no answer in time") from error
            except OSError as error:
                raise UnavailableError(f"{self._address}: connection lost: {error}") from error
            if not data:
                self._reader.finish()
                return None
            self._reader.feed(data)
        return {**message.header, **json.loads(message.body)} if message.body else message.header

    def finish(self) -> None:
        """Say that nothing more will be sent; answers still come."""
        self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _connect_unix(path: str, timeout: float) -> socket.socket:
    deadline = time.monotonic() + timeout
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:  # as many wait to be let in as may
                if time.monotonic() > deadline:
                    raise
                time.sleep(CONNECT_PAUSE_S)
            else:
                return sock
    except OSError:
        sock.close()
        raise
