"""How old a row is, on boards whose clock is not set: monotonic time within a boot, wall time only where it is known.

A Raspberry Pi has no clock of its own. After a power cut it starts in the past, works, spools, and jumps by days when the
network is back. Nothing may expire because of such a jump.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from edge_serve.frame import CLOCK_PLAUSIBLE_AFTER

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# adjtimex(2): the kernel says that nobody keeps its clock right. A clock that a board remembers from its last shutdown is
# plausible, and still hours behind.
STA_UNSYNC = 0x0040
# struct timex: modes (int, padded to a long), then offset, freq, maxerror, esterror (longs), then status (int).
_LONGS_BEFORE_STATUS = 5
# Larger than any kernel's struct timex (208 bytes on 64-bit machines).
_TIMEX_BYTES = 512


@dataclass(frozen=True, slots=True)
class Moment:
    """A point in time: seconds since this boot (suspend included), and wall time with whether that can be trusted."""

    boot: str
    seconds: float
    utc: float
    synced: bool


class Clock:
    """This machine's clocks."""

    def __init__(self) -> None:
        try:
            self._boot = BOOT_ID.read_text(encoding="ascii").strip()
        except OSError:
            import uuid  # only where /proc is not there

            # No boot is like any other then, and ages are counted from each start of the process.
            self._boot = str(uuid.uuid4())

    def now(self) -> Moment:
        """Give this moment."""
        utc = time.time()
        synced = utc >= CLOCK_PLAUSIBLE_AFTER and kernel_synced()
        return Moment(self._boot, time.clock_gettime(time.CLOCK_BOOTTIME), utc, synced)


def kernel_synced() -> bool:
    """Say whether somebody (NTP, a host, a GPS) keeps the kernel's clock right; False where that cannot be asked."""
    import ctypes  # only where something waits on disk

    try:
        library = ctypes.CDLL(None, use_errno=True)
        buffer = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes = 0: only read
        if library.adjtimex(buffer) < 0:
            return False
    except (OSError, AttributeError):
        return False
    status = ctypes.c_int.from_buffer(buffer, _LONGS_BEFORE_STATUS * ctypes.sizeof(ctypes.c_long)).value
    return not status & STA_UNSYNC


def age(now: Moment, boot: str, seconds: float, utc: float, synced: bool, first_seen: float) -> float:
    """Give the seconds that a row has waited: exactly within its boot, else at least so long.

    A row of another boot has waited since this boot first saw it (`first_seen`, seconds of this boot); where both clocks
    are known to be right, since its wall time.
    """
    if boot == now.boot:
        return max(0.0, now.seconds - seconds)
    seen = max(0.0, now.seconds - first_seen)
    return max(seen, now.utc - utc) if synced and now.synced else seen
