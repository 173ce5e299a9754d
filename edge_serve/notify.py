"""What systemd is told: ready, reloading, stopping, how it goes, and that the service is alive (sd_notify(3)).

A few bytes to the datagram socket that $NOTIFY_SOCKET names; without one nothing is sent and nothing is imported for it.
"""

from __future__ import annotations

import logging
import os
import time

log = logging.getLogger(__name__)

SOCKET = "NOTIFY_SOCKET"
WATCHDOG_TIME = "WATCHDOG_USEC"
WATCHDOG_PROCESS = "WATCHDOG_PID"
# A status line is for a person who reads `systemctl status`.
MAX_STATUS = 256


class Notifier:
    """The way to whoever supervises this process; without one, every method does nothing."""

    def __init__(self) -> None:
        address = os.environ.get(SOCKET, "")
        # A leading "@" stands for the NUL byte of the abstract namespace. Other kinds of sockets are for machines, not us.
        self._address = "\0" + address[1:] if address.startswith("@") else address if address.startswith("/") else ""
        self._complained = False
        self.ping_s = _ping_interval() if self._address else None
        """Seconds between two pings, half of what the watchdog waits; None if there is no watchdog."""

    @property
    def listening(self) -> bool:
        """Say whether there is somebody to tell."""
        return bool(self._address)

    def send(self, *lines: str) -> None:
        """Send lines as `READY=1`; a supervisor that cannot be reached is complained of once, and harms nothing."""
        if not self._address:
            return
        import socket

        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as way:
                # A supervisor that is busy may not hold the service up: the next ping follows soon.
                way.setblocking(False)
                way.sendto("\n".join(lines).encode(errors="replace"), self._address)
        except OSError as error:
            if not self._complained:
                log.warning("cannot tell the supervisor (%s) %s: %s", SOCKET, lines[0], error)
            self._complained = True

    def loading(self, what: str, seconds: float) -> None:
        """Say what is loaded, and that this may take so long before the start is to be given up."""
        self.send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}", _status(f"loading {what}"))

    def ready(self, text: str) -> None:
        """Say that the service has started, or that a reload is over; `text` is for people."""
        self.send("READY=1", _status(text))

    def reloading(self) -> None:
        """Say that the configuration is read again, until `ready`."""
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", _status("reloading"))

    def stopping(self, text: str) -> None:
        """Say that the service has begun to end."""
        self.send("STOPPING=1", _status(text))

    def status(self, text: str) -> None:
        """Say how it goes."""
        self.send(_status(text))

    def ping(self) -> None:
        """Say that all is alive."""
        self.send("WATCHDOG=1")


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.split())[:MAX_STATUS]


def _ping_interval() -> float | None:
    """Give half of the watchdog's time in seconds; None if there is none, or it is meant for another process."""
    said, process = os.environ.get(WATCHDOG_TIME, ""), os.environ.get(WATCHDOG_PROCESS, "")
    if process and process != str(os.getpid()):
        return None
    return int(said) / 2e6 if said.isdecimal() and int(said) > 0 else None
