"""What a process says in its last moment: the trace that faulthandler writes when a fatal signal comes.

SIGSEGV, SIGBUS, SIGFPE, SIGILL and SIGABRT (of a library's abort(), and of systemd's watchdog) leave one line with the reason
and the stacks of all threads; SIGKILL leaves nothing. The trace goes to a file, where the next process finds it, tells it to
the log and knows from it which thread it was.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

FILE = "crash.txt"
# A trace is a few kilobytes; what is longer is cut off.
MAX_TRACE = 16 * 1024
_REASON = re.compile(r"^Fatal Python error: (.+)$", re.MULTILINE)
# pthread_self() in hexadecimal, as threading.get_ident() gives it.
_THREAD = re.compile(r"^Current thread (0x[0-9a-f]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Crash:
    """How the last process ended by a fatal signal."""

    reason: str
    thread: int | None
    """The thread (threading.get_ident) that the signal came to; None if it was no thread of Python's."""
    trace: str

    @property
    def aborted(self) -> bool:
        """Say whether it was SIGABRT, which may also come from outside."""
        return self.reason.startswith("Aborted")


def parse(trace: str) -> Crash | None:
    """Read a trace; None if it is none."""
    reason = _REASON.search(trace)
    if reason is None:
        return None
    thread = _THREAD.search(trace)
    return Crash(reason[1].strip(), int(thread[1], 16) if thread is not None else None, trace.strip())


class CrashFile:
    """The file for traces: what is in it is read as `last`, then it waits for this process's own."""

    def __init__(self, folder: Path) -> None:
        self.last: Crash | None = None
        self._fd = -1
        self._armed = False
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(folder / FILE, flags, 0o600)
            self.last = parse(os.pread(self._fd, MAX_TRACE, 0).decode(errors="replace"))
            os.ftruncate(self._fd, 0)
        except OSError as error:
            log.debug("%s: no traces of crashes: %s", folder / FILE, error)
            return
        # Somebody who has asked for traces elsewhere (PYTHONFAULTHANDLER, a test runner) gets them there.
        if not faulthandler.is_enabled():
            faulthandler.enable(self._fd)
            self._armed = True

    def close(self) -> None:
        """Write no more traces there."""
        if self._armed:
            faulthandler.disable()
            self._armed = False
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
