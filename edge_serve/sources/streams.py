"""Cutting byte streams into inputs, without any I/O: JPEG after JPEG (MJPEG), and lines.

A splitter gives complete items (bytes), and an exception in the place of an item that cannot be one.
"""

from __future__ import annotations

from edge_serve.errors import InputError, TooLargeError

SOI, EOI, SOS, TEM = 0xD8, 0xD9, 0xDA, 0x01


class LineSplitter:
    """Lines of at most `limit` bytes; empty ones do not count; the last may lack its end."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._skipping = False

    def feed(self, data: bytes) -> list[bytes | Exception]:
        """Take bytes and give the lines that they complete."""
        items: list[bytes | Exception] = []
        *complete, rest = data.split(b"\n")
        for part in complete:
            self._take(part, items, ends=True)
        self._take(rest, items, ends=False)
        return items

    def _take(self, part: bytes, items: list[bytes | Exception], *, ends: bool) -> None:
        if not self._skipping:
            self._buffer += part
            if len(self._buffer) > self._limit:
                items.append(TooLargeError(f"line is longer than the limit of {self._limit} bytes (max_payload)"))
                self._buffer.clear()
                self._skipping = True
        if ends:
            line = bytes(self._buffer).strip()
            if line and not self._skipping:
                items.append(line)
            self._buffer.clear()
            self._skipping = False

    def finish(self) -> list[bytes | Exception]:
        """Say that the stream has ended; gives the last line if it lacked its end."""
        items: list[bytes | Exception] = []
        self._take(b"", items, ends=True)
        return items


class JpegSplitter:
    """Pictures of at most `limit` bytes, cut by JPEG's own structure (ITU T.81, annex B).

    Searching for the end marker alone would cut a picture at the end of the thumbnail in its header: segments are
    skipped by their length, and only entropy-coded data is searched.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._at = 0
        self._in_scan = False

    def feed(self, data: bytes) -> list[bytes | Exception]:
        """Take bytes and give the pictures that they complete."""
        self._buffer += data
        items: list[bytes | Exception] = []
        while self._step(items):
            pass
        if len(self._buffer) > self._limit and self._at:
            items.append(self._too_large())
            self._resynchronize(self._at)
        return items

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"picture is larger than the limit of {self._limit} bytes (max_payload)")

    def finish(self) -> list[bytes | Exception]:
        """Say that the stream has ended; what is left is a picture that was cut off."""
        left = len(self._buffer)
        self._buffer.clear()
        self._at = 0
        return [InputError(f"the stream ended inside a picture, after {left} bytes of it")] if left > 1 else []

    def _step(self, items: list[bytes | Exception]) -> bool:
        """Go on by one segment or scan; False if more bytes are needed."""
        buffer = self._buffer
        if self._at == 0:
            return self._start(items)
        if self._in_scan:
            return self._scan()
        if len(buffer) < self._at + 2:
            return False
        if buffer[self._at] != 0xFF:
            items.append(InputError("stream is not MJPEG: a JPEG marker was expected"))
            self._resynchronize(self._at)
            return True
        marker = buffer[self._at + 1]
        if marker == 0xFF:  # fill byte
            self._at += 1
        elif marker == EOI:
            fits = self._at + 2 <= self._limit
            items.append(bytes(memoryview(buffer)[: self._at + 2]) if fits else self._too_large())
            del buffer[: self._at + 2]
            self._at = 0
        elif marker == TEM or 0xD0 <= marker <= 0xD7:
            self._at += 2
        elif marker in (SOI, 0x00):
            items.append(InputError("picture is cut off: another one begins inside it"))
            self._resynchronize(self._at)
        else:
            return self._segment(marker)
        return True

    def _start(self, items: list[bytes | Exception]) -> bool:
        start = self._buffer.find(b"\xff\xd8")
        if start < 0:
            # Padding between pictures; a last 0xFF may be the first half of a marker.
            del self._buffer[: max(0, len(self._buffer) - 1)]
            return False
        del self._buffer[:start]
        self._at = 2
        return True

    def _segment(self, marker: int) -> bool:
        if len(self._buffer) < self._at + 4:
            return False
        length = int.from_bytes(self._buffer[self._at + 2 : self._at + 4], "big")
        if len(self._buffer) < self._at + 2 + length:
            return False
        self._at += 2 + max(2, length)
        self._in_scan = marker == SOS
        return True

    def _scan(self) -> bool:
        while True:
            mark = self._buffer.find(b"\xff", self._at)
            if mark < 0 or mark + 1 >= len(self._buffer):
                self._at = len(self._buffer) if mark < 0 else mark
                return False
            following = self._buffer[mark + 1]
            if following == 0x00 or 0xD0 <= following <= 0xD7:  # a stuffed byte, or a restart marker
                self._at = mark + 2
                continue
            self._at = mark
            self._in_scan = False
            return True

    def _resynchronize(self, at: int) -> None:
        """Drop what cannot be a picture and look for the next beginning from `at` on."""
        del self._buffer[:at]
        self._at = 0
        self._in_scan = False
