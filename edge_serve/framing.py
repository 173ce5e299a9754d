"""The socket protocol's framing, without any I/O: one JSON line, then as many bytes as it says (README, Socket).

`Reader` is fed whatever bytes arrive and gives messages; `encode` makes them. Both ends use the same code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from edge_serve.errors import ProtocolError

# A header names things and describes them; what is longer is not a header.
MAX_HEADER = 64 * 1024
DEFAULT_MAX_PAYLOAD = 16 * 1024 * 1024
VERSION = 1


@dataclass(frozen=True, slots=True)
class Message:
    """One message: its header, and its body unless that was over the limit (then `body` is None and it was skipped)."""

    header: dict[str, Any]
    body: bytes | None


def encode(header: dict[str, Any], body: bytes | bytearray | memoryview = b"") -> bytes:
    """Give a message's bytes; `length` is set from the body. ProtocolError if the header is too long."""
    text = json.dumps({**header, "length": len(body)}, ensure_ascii=False, separators=(",", ":"))
    line = text.encode(errors="replace") + b"\n"
    if len(line) > MAX_HEADER:
        raise ProtocolError(f"header of {len(line)} bytes is over the limit of {MAX_HEADER}")
    return line + body if len(body) else line


class Reader:
    """Cuts a stream into messages; keeps at most one header and one body of `max_payload` bytes."""

    def __init__(self, max_payload: int = DEFAULT_MAX_PAYLOAD, max_header: int = MAX_HEADER) -> None:
        self.max_payload = max_payload
        self.max_header = max_header
        self._buffer = bytearray()
        self._scanned = 0
        self._header: dict[str, Any] | None = None
        self._length = 0
        self._skip = 0

    def feed(self, data: bytes | memoryview) -> None:
        """Take bytes as they came; those of a body over the limit are let go at once."""
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        self._buffer += data

    @property
    def buffered(self) -> int:
        """Count the bytes that are held."""
        return len(self._buffer)

    @property
    def inside(self) -> bool:
        """Say whether a message has begun and is not complete."""
        return bool(self._buffer) or self._header is not None

    def next(self) -> Message | None:
        """Give the next whole message, None if more bytes are needed; ProtocolError if the stream is not one of ours."""
        if self._header is None:
            self._header = self._next_header()
            if self._header is None:
                return None
            if self._length > self.max_payload:
                held = min(self._length, len(self._buffer))
                del self._buffer[:held]
                self._skip = self._length - held
        if self._length > self.max_payload:
            if self._skip:
                return None
            header, self._header = self._header, None
            return Message(header, None)
        if len(self._buffer) < self._length:
            return None
        body = bytes(memoryview(self._buffer)[: self._length])
        del self._buffer[: self._length]
        header, self._header = self._header, None
        return Message(header, body)

    def _next_header(self) -> dict[str, Any] | None:
        end = self._buffer.find(b"\n", self._scanned)
        if end < 0:
            self._scanned = len(self._buffer)
            if self._scanned > self.max_header:
                raise ProtocolError(
                    f"header is longer than {self.max_header} bytes; send one JSON line, then the payload"
                )
            return None
        self._scanned = 0
        if end > self.max_header:
            raise ProtocolError(f"header is longer than {self.max_header} bytes; send one JSON line, then the payload")
        line = bytes(memoryview(self._buffer)[:end])
        del self._buffer[: end + 1]
        try:
            header = json.loads(line)
            if b"\\u" in line:  # escapes can write halves of characters, which no text that we send on can hold
                json.dumps(header, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"header is not a JSON line: {error}") from error
        if not isinstance(header, dict) or not isinstance(header.get("type"), str):
            raise ProtocolError('header has no "type"; a frame begins with {"type": "frame", "length": …}')
        length = header.get("length", 0)
        if type(length) is not int or length < 0:
            raise ProtocolError(f'"length" must be a whole number of bytes, not {length!r:.40}')
        self._length = length
        return header

    def finish(self) -> None:
        """Say that the stream has ended; ProtocolError if it ended inside a message."""
        if self._header is not None:
            missing = self._skip or self._length - len(self._buffer)
            raise ProtocolError(f"the stream ended inside a frame: {missing} of {self._length} bytes are missing")
        if self._buffer:
            raise ProtocolError("the stream ended inside a header: no line end")
