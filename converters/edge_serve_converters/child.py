"""The converter's child processes: started, talked to, watched, and ended whatever happens.

TensorFlow's converter may crash, hang, or eat all memory; each of these becomes a ConversionError that says so.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from edge_serve.errors import UsageError
from edge_serve_converters.channel import Report
from edge_serve_converters.errors import ConversionError

# How often the child's memory and time are looked at.
POLL_S = 0.2
LOG_LINES = 20
# Of the memory that this machine (or container) has, one child may take this part before it is stopped.
MEMORY_SHARE = 0.9


class ChildCrashedError(ConversionError):
    """The child died of a signal (`signal`) or left without an answer (None)."""

    def __init__(self, message: str, log: str, killed_by: signal.Signals | None) -> None:
        super().__init__(message, log)
        self.signal = killed_by


class Child:
    """One child process that runs `module`; use it as a context manager."""

    def __init__(
        self, module: str, work: Path, *, timeout_s: float, memory_limit_mb: int | None, verbose: bool
    ) -> None:
        self._timeout = timeout_s
        self._limit = memory_limit_mb * 2**20 if memory_limit_mb else int(_machine_memory() * MEMORY_SHARE)
        self._log = work / f"{module.rpartition('.')[2]}-{time.monotonic_ns()}.log"
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        environment = {
            **os.environ,
            # The child shall find what this process finds, and nothing that lies about in the current folder.
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            "PYTHONSAFEPATH": "1",
            # Equal conversions give equal bytes and equal figures: no GPU, no random hash order, no oneDNN rounding.
            "PYTHONHASHSEED": "0",
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_ENABLE_ONEDNN_OPTS": "0",
            "PYTHONUNBUFFERED": "1",
            # tensorflow leaves files there when it is ended.
            "TMPDIR": str(work),
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if verbose else log,
                env=environment,
                encoding="utf-8",
                # Ctrl-C in a terminal goes to the whole group; the parent alone decides what it means.
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self._reader = threading.Thread(
            target=self._read, args=(self._process.stdout,), name=f"read-{module}", daemon=True
        )
        self._reader.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Give the process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Say whether it can take another command."""
        return self._process.poll() is None

    def hang_up(self) -> None:
        """Close the line, as the end of this process would: the child then ends itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def close(self) -> None:
        """End the child, gently or not, and reap it."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass  # an unsent command of a child that died

    def call(self, what: str, command: dict[str, Any], progress: Report | None = None) -> dict[str, Any]:
        """Send a command and wait for its answer; `what` names the work in error messages.

        Raises UsageError or ConversionError as the child says, ChildCrashedError when it dies, ConversionError when it is
        over its time or memory (and has been ended).
        """
        deadline = time.monotonic() + self._timeout
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it is dead; the loop below reads how it died
        while True:
            try:
                line = self._lines.get(timeout=POLL_S)
            except queue.Empty:
                self._check_limits(what, deadline)
                continue
            if line is None:
                self._lines.put(None)  # for whoever calls again
                raise self._crashed(what)
            message = json.loads(line)
            if message["event"] == "stage":
                if progress is not None:
                    progress(message["stage"], message["done"], message["total"])
                self._check_limits(what, deadline)
            elif message["event"] == "failed":
                text = message["message"]
                if not text.startswith(f"{what}: "):  # what concerns the source model as a file begins with its path
                    text = f"{what}: {text}"
                raise (
                    UsageError(text)
                    if message["usage"]
                    else ConversionError(text, self.log_tail() if message["log"] else "")
                )
            else:
                return dict(message["result"])

    def log_tail(self) -> str:
        """Give the last lines of what the child printed."""
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-LOG_LINES:])

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line)
        self._lines.put(None)

    def _check_limits(self, what: str, deadline: float) -> None:
        used = resident_bytes(self._process.pid)
        if used > self._limit:
            self.close()
            raise ConversionError(
                f"{what}: stopped because it used {used // 2**20} MiB of memory, the limit is {self._limit // 2**20} MiB; "
                "raise --memory-limit, or give fewer --samples",
                self.log_tail(),
            )
        if time.monotonic() > deadline:
            self.close()
            raise ConversionError(
                f"{what}: stopped because it took longer than {self._timeout:g} s; raise --timeout if the model is that large",
                self.log_tail(),
            )

    def _crashed(self, what: str) -> ChildCrashedError:
        status = self._process.wait()
        killed_by = signal.Signals(-status) if status < 0 else None
        how = f"was killed by {killed_by.name}" if killed_by is not None else f"ended with status {status}"
        if killed_by is signal.SIGKILL:
            how += ", by the system if memory ran out"
        return ChildCrashedError(f"{what}: the child process {how}", self.log_tail(), killed_by)


def resident_bytes(pid: int) -> int:
    """Give a process's resident memory in bytes; 0 where the system does not say (no /proc) or the process is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _machine_memory() -> int:
    """Give the memory that this process may use at all: the machine's, or its container's if that is less."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        total = 2**63
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):
        return total
