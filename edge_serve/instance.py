"""One service for each state folder: whoever runs holds `<state_dir>/lock`, and a second one is refused.

The kernel gives the lock back with the process, however that ends: nothing is left behind that somebody would have to remove.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from edge_serve.errors import UnavailableError

FILE = "lock"
# A process id and the end of a line.
MAX_BYTES = 32


class Instance:
    """The right to use a state folder, held until `close` or the end of the process."""

    def __init__(self, folder: Path) -> None:
        """Take the lock; the folder is made if need be.

        UnavailableError names the process that has it. OSError if the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                said = os.pread(self._lock, MAX_BYTES, 0).decode("ascii", errors="replace").strip()
                who = f" (process {said})" if said.isdecimal() else ""
                raise UnavailableError(
                    f"{folder}: another edge-serve{who} uses this state folder; stop it, or give each its own state_dir"
                ) from error
            with contextlib.suppress(OSError):  # a full disk: the name is for people, the lock holds without it
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, f"{os.getpid()}\n".encode("ascii"), 0)
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Give the lock back; may be called twice."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)
