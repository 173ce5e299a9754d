"""Results to a file, one JSON document a line, with a bound on what the files may take of the disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from edge_serve.config import Wiring
from edge_serve.errors import Problem, SendError, UnavailableError
from edge_serve.frame import Result
from edge_serve.schema import join, option
from edge_serve.sinks import SYNCHRONOUS, Done, Encoded, SinkContext


@dataclass(frozen=True, slots=True)
class FileSinkOptions:
    """Results appended to a file as JSON lines."""

    path: str = option(doc="the file; its folder must exist", example="results.jsonl")
    max_bytes: int = option(64 * 1024 * 1024, "bytes; a full file is renamed to PATH.1, and so on; 0: no limit", low=0)
    keep: int = option(3, "how many full files are kept besides", low=0, high=1000)
    sync: bool = option(False, "safe only when the disk has it (fsync after each result; slow, wears out SD cards)")


class FileSink:
    """Appends lines; safe when the kernel has them, or with `sync` when the disk has."""

    Options = FileSinkOptions

    def __init__(self, options: FileSinkOptions, context: SinkContext) -> None:
        self._options = options
        self._path = context.config.resolve(options.path)
        self._fd: int | None = None
        self._size = 0

    @classmethod
    def check(cls, options: FileSinkOptions, key: str, wiring: Wiring) -> list[Problem]:
        """Find folders that are not there or may not be written, and two sinks on one file."""
        path = wiring.config.resolve(options.path)
        try:
            usable = path.parent.is_dir() and not path.is_dir()
            writable = os.access(path if path.exists() else path.parent, os.W_OK)
        except OSError:  # a folder that may not be entered, a name that is too long
            usable = writable = False
        if not usable:
            return [
                Problem(
                    join(key, "path"),
                    f"{path} cannot be a file: no such folder, or a folder itself",
                    "Make the folder, check the path",
                )
            ]
        if not writable:
            return [Problem(join(key, "path"), f"{path} may not be written", "Check the permissions")]
        users = [
            (pipeline.name, sink.key)
            for pipeline in wiring.config.pipelines
            for sink in pipeline.sinks
            if isinstance(sink.options, FileSinkOptions) and wiring.config.resolve(sink.options.path) == path
        ]
        if users and users[0] != (wiring.pipeline.name, key):
            return [
                Problem(
                    join(key, "path"),
                    f"{path} is already written by pipeline {users[0][0]!r}",
                    "Give each its own file",
                )
            ]
        return []

    @property
    def window(self) -> int:
        """Every line is written when `send` returns."""
        return SYNCHRONOUS

    def connect(self) -> None:
        """Open the file; a line that a crash cut off is ended, so that it spoils no other."""
        self.close()
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._fd = fd
            self._size = os.fstat(fd).st_size
            if self._size and os.pread(fd, 1, self._size - 1) != b"\n":
                self._size += os.write(fd, b"\n")
        except OSError as error:
            self.close()
            raise UnavailableError(f"{self._path}: cannot be opened: {error.strerror}") from error

    @property
    def target(self) -> str:
        """Give the path as it is configured."""
        return self._options.path

    def encode(self, result: Result) -> Encoded:
        """Render the line, without its end."""
        return Encoded(result.frame_id, result.to_json())

    def send(self, result: Result, done: Done) -> None:
        """Append one line."""
        self._append(result.to_json() + b"\n", done)

    def send_encoded(self, content: Encoded, done: Done) -> None:
        """Append a line that has waited."""
        self._append(content.body + b"\n", done)

    def _append(self, line: bytes, done: Done) -> None:
        if self._fd is None:
            raise SendError(f"{self._path}: is not open")
        try:
            if self._options.max_bytes and self._size and self._size + len(line) > self._options.max_bytes:
                self._rotate()
            written = os.write(self._fd, line)
            if written < len(line):
                # A full disk takes a part; that part is taken back, and the whole line is written when there is room.
                os.ftruncate(self._fd, self._size)
                raise SendError(f"{self._path}: the disk is full")
            self._size += written
            if self._options.sync:
                os.fsync(self._fd)
        except OSError as error:
            raise SendError(f"{self._path}: cannot be written: {error.strerror}") from error
        done(None)

    def _rotate(self) -> None:
        def numbered(number: int) -> Path:
            return self._path.with_name(f"{self._path.name}.{number}")

        for number in range(self._options.keep, 0, -1):
            older = numbered(number - 1) if number > 1 else self._path
            if older.exists():
                older.replace(numbered(number))
        if self._options.keep == 0:
            self._path.unlink()
        self.connect()

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
