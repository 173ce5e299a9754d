"""Inputs from files: a folder of pictures or arrays, or a stream of MJPEG or JSON lines from a file or standard input.

``rpicam-vid --codec mjpeg -o - | edge-serve run -c edge-serve.toml`` with ``path = "-"`` is a camera.
"""

from __future__ import annotations

import os
import selectors
import stat
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_serve.config import Wiring, exists
from edge_serve.errors import InputError, Problem, SourceExhausted, TooLargeError, UnavailableError
from edge_serve.frame import Capture, Delivery, Frame
from edge_serve.schema import join, option
from edge_serve.sources import SourceContext
from edge_serve.sources.streams import JpegSplitter, LineSplitter

STDIN = "-"
# Opening a named pipe would wait for its writer otherwise, and no signal could end that.
OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
CHUNK = 64 * 1024
TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".npy": "application/x-npy",
    ".npz": "application/x-npz",
    ".json": "application/json",
    ".csv": "text/csv",
    ".bin": "application/octet-stream",
}


@dataclass(frozen=True, slots=True)
class FileSourceOptions:
    """Inputs from a folder, a file or standard input; the pipeline ends with them."""

    path: str = option(doc='a folder of pictures or arrays, a file, or "-" for standard input', example="photos")
    format: Literal["auto", "mjpeg", "jsonl"] = option(
        "auto", "of a stream: mjpeg (JPEG after JPEG) or jsonl (a JSON document a line); auto: by its first bytes"
    )
    policy: Literal["lossless", "latest"] = option(
        "lossless", "lossless: a writer on the pipe has to wait; latest: the newest picture wins, for live cameras"
    )
    recursive: bool = option(False, "look into the folders below, too")
    max_payload: int = option(
        16 * 1024 * 1024,
        "bytes; a larger file, picture or line gets an error result (too_large)",
        low=1,
        high=256 * 1024 * 1024,
    )


class FileSource:
    """Reads a folder once in the order of its names, or a stream to its end."""

    Options = FileSourceOptions

    def __init__(self, options: FileSourceOptions, context: SourceContext) -> None:
        self._options = options
        self._context = context
        self._path = options.path if options.path == STDIN else str(context.config.resolve(options.path))
        self._files: Iterator[Path] | None = None
        self._stream: _Stream | None = None

    @classmethod
    def check(cls, options: FileSourceOptions, key: str, wiring: Wiring) -> list[Problem]:
        """Find paths that are not there, and a second pipeline on standard input."""
        problems = []
        if options.path == STDIN:
            users = [
                pipeline.name
                for pipeline in wiring.config.pipelines
                if isinstance(pipeline.source.options, FileSourceOptions) and pipeline.source.options.path == STDIN
            ]
            if users and users[0] != wiring.pipeline.name:
                problems.append(
                    Problem(
                        join(key, "path"),
                        f"standard input is already read by pipeline {users[0]!r}",
                        "One pipeline can read it",
                    )
                )
        elif not exists(wiring.config.resolve(options.path)):
            problems.append(
                Problem(join(key, "path"), f"{wiring.config.resolve(options.path)} does not exist", "Check the path")
            )
        return problems

    @property
    def policy(self) -> str:
        """Give the configured policy."""
        return self._options.policy

    @property
    def hold_limit(self) -> int | None:
        """A file never waits for anything to be settled."""
        return None

    def connect(self) -> None:
        """Open the stream or list the folder."""
        if self._path != STDIN and Path(self._path).is_dir():
            pattern = "**/*" if self._options.recursive else "*"
            try:
                found = sorted(p for p in Path(self._path).glob(pattern) if p.suffix.lower() in TYPES and p.is_file())
            except OSError as error:
                raise UnavailableError(f"{self._path}: cannot be read: {error.strerror}") from error
            self._files = iter(found)
        elif self._is_one_input():
            self._files = iter([Path(self._path)])
        else:
            self._stream = _Stream(self._path, self._options, self._context.pipeline)

    def _is_one_input(self) -> bool:
        """Tell a picture, an array or a document by its name: read as a folder's files are, it would be no stream."""
        path = Path(self._path)
        return self._options.format == "auto" and path.suffix.lower() in TYPES and path.is_file()

    def read(self, timeout: float) -> Delivery | None:
        """Give the next file, picture or line."""
        if self._files is not None:
            path = next(self._files, None)
            if path is None:
                raise SourceExhausted(f"{self._path}: no more files")
            return Delivery(self._from_file(path), _ignore)
        if self._stream is None:
            raise UnavailableError(f"{self._path}: not open")
        frame = self._stream.read(timeout)
        return None if frame is None else Delivery(frame, _ignore)

    def _from_file(self, path: Path) -> Frame:
        name = str(path.relative_to(self._path)) if path != Path(self._path) else path.name
        payload = b""
        error: Exception | None = None
        try:
            size = path.stat().st_size
            if size > self._options.max_payload:
                error = TooLargeError(
                    f"{path}: {size} bytes are over the limit of {self._options.max_payload} (max_payload)"
                )
            else:
                payload = path.read_bytes()
        except OSError as failure:
            error = InputError(f"{path}: cannot be read: {failure.strerror}")
        return Frame(name, self._path, Capture.now(), TYPES[path.suffix.lower()], payload, {"path": str(path)}, error)

    def close(self) -> None:
        """Close the stream."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None


def _ignore(_error: Exception | None) -> None:
    """Settle an input from a file: nobody waits for that."""


class _Stream:
    """A file or pipe that is read as it comes, cut into pictures or lines."""

    def __init__(self, path: str, options: FileSourceOptions, pipeline: str) -> None:
        self._name = "stdin" if path == STDIN else path
        self._pipeline = pipeline
        self._limit = options.max_payload
        self._format = options.format
        try:
            self._fd = os.dup(sys.stdin.fileno()) if path == STDIN else os.open(path, OPEN_FLAGS)
        except (OSError, ValueError, AttributeError) as error:  # a process may have no standard input at all
            raise UnavailableError(f"{self._name}: cannot be opened: {error}") from error
        mode = os.fstat(self._fd).st_mode
        # A regular file is always ready, and epoll does not take it.
        self._selector: selectors.BaseSelector | None = None
        if not stat.S_ISREG(mode):
            self._selector = selectors.DefaultSelector()
            try:
                self._selector.register(self._fd, selectors.EVENT_READ)
            except PermissionError:  # /dev/null and its like
                self._selector = None
        self._splitter: JpegSplitter | LineSplitter | None = None
        self._ready: deque[bytes | Exception] = deque()
        self._number = 0
        self._ended = False

    def read(self, timeout: float) -> Frame | None:
        """Give the next picture or line; None if none was complete within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self._ready:
            if self._ended:
                raise SourceExhausted(f"{self._name}: end of the stream")
            # A writer that trickles must not keep the thread here: it has to see when it shall stop.
            left = deadline - time.monotonic()
            if self._selector is not None and not self._selector.select(max(0.0, left)):
                return None
            try:
                data = os.read(self._fd, CHUNK)
            except BlockingIOError:
                continue
            except OSError as error:
                raise UnavailableError(f"{self._name}: cannot be read: {error.strerror}") from error
            if self._splitter is None and data:
                self._splitter = self._make_splitter(data)
            if not data:
                self._ended = True
            if self._splitter is not None:
                self._ready.extend(self._splitter.feed(data) if data else self._splitter.finish())
            if left <= 0 and not self._ready and not self._ended:
                return None
        item = self._ready.popleft()
        self._number += 1
        captured = Capture.now()
        kind = "image/jpeg" if isinstance(self._splitter, JpegSplitter) else "application/json"
        identity = f"{self._name}-{self._number}-{captured.utc:.6f}"
        payload, wrong = (b"", item) if isinstance(item, Exception) else (item, None)
        return Frame(identity, self._name, captured, kind, payload, {}, wrong)

    def _make_splitter(self, data: bytes) -> JpegSplitter | LineSplitter:
        kind = self._format
        if kind == "auto":
            kind = "mjpeg" if data[:1] == b"\xff" else "jsonl"  # of a pipe, the first byte may come alone
        return JpegSplitter(self._limit) if kind == "mjpeg" else LineSplitter(self._limit)

    def close(self) -> None:
        """Close the file; standard input itself stays open."""
        if self._selector is not None:
            self._selector.close()
        os.close(self._fd)
