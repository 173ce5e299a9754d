"""Inputs that kill the process: marked while they are in work, recognised after the restart, and in the end not run again.

An exception of one input is answered with an error result. A crash of the interpreter (or of a picture's decoder), a hang that
the watchdog ends, or memory that one input eats up ends the process, and a source that keeps its promise delivers that input
again: without a memory of it, for ever. The memory is a mark: before an input is worked on, its worker writes what it is into a
slot of a memory-mapped file; afterwards it takes the mark back. Who finds a mark at the start knows what the last process died
on. That costs a few stores, no system call and, in a file system that is memory (`runtime_folder`), no byte on a disk.

**What a mark costs.** Entering and leaving takes 0.45 µs for 100 bytes and at most 0.9 µs for more (x86-64, CPython 3.11).
A hash of the payload would be the larger part (blake2b: 0.3 µs for 100 bytes, 145 µs for 150 KB), so the mark holds the length
and a CRC-32 of the first and last 512 bytes only. That is enough to suspect; nothing is convicted by it: whoever looks like a
suspect is hashed whole (blake2b) before it runs again, and that hash is what a quarantine goes by.

**Who is convicted.** A death is *explained* if the process had time to say (faulthandler, crash.py) that the worker's own thread
got a fatal signal; SIGKILL leaves no trace, and may be an operator, the kernel short of memory, or a watchdog. An explained
death is worth 2 points, any other 1; at 2 the pipeline runs on the next delegate, at 3 the payload is quarantined. So the first
crash changes the delegate, the second quarantines; of deaths without a trace it takes one more. An innocent input that was in
work when a SIGKILL came must therefore be hit three times in a row:

- Only deaths in a row count. A start after a death that was on something else forgets unexplained points.
- A payload that runs to its end is acquitted at once. After a restart it is among the first to be delivered again.
- An unexplained point lapses when its payload does not come back within LAPSE_S of a start.
- While somebody is suspected the workers of a process take turns, so that a death finds one mark: a crash in one pipeline
  does not strike the innocent input of another one again and again.

With an input in work all the time, a process that is killed every t seconds and a model that takes m, that is a chance of about
(m / t)² for each kill: the second and the third would have to come within the m seconds of that same input. Thirty kills among
ten thousand inputs convict nobody (tests/system/test_quarantine.py). Should it happen all the same, one input gets an error
result instead of a result, and is free again after KEPT_S.

**The delegate.** A payload that crashed on one delegate and runs on the next one is acquitted, but the pipeline stays on that
next delegate: another such input would cost another crash. A payload that crashes on both is to blame itself; with its
quarantine the pipeline returns to the delegate that was asked for.

Strikes live in the same file: they survive restarts, not reboots, and at most STRIKES of them; the oldest is forgotten. A file
that is torn, of another boot or of another format is begun anew. A process that ends in order leaves no marks, and no file
without strikes.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import threading
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zlib import crc32

from edge_serve.crash import FILE as CRASH_FILE
from edge_serve.crash import Crash, CrashFile
from edge_serve.errors import QuarantinedError
from edge_serve.health import Trouble
from edge_serve.marks import (
    CONVICTION,
    EXAMINED,
    EXPLAINED,
    FILE,
    FREE,
    MARK,
    MARK_AT,
    MARKED,
    OWNER,
    OWNER_AT,
    PLACE,
    SLOTS,
    SLOTS_AT,
    STRIKES,
    STRIKES_AT,
    STRONG,
    STRONG_AT,
    UNEXPLAINED,
    Mark,
    Strike,
    open_file,
    short,
    unpack_mark,
    unpack_strike,
    write_strike,
)

log = logging.getLogger(__name__)

# Of the folders that we make for ourselves.
PREFIX = "edge-serve-"
# What of a long payload is looked at while nobody is suspected: this many bytes of its beginning and of its end.
SAMPLE = 512
# A suspect that is not delivered again for so long after a start is none any more, as far as there is no proof.
LAPSE_S = 60.0
# Proven strikes and quarantines are kept for so long.
KEPT_S = 24 * 3600.0
# A worker waits for its turn this long at most: one that hangs must not keep the others from being served.
TURN_S = 5.0

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # in a folder of our own, whose owner is checked


def runtime_folder(state_dir: Path) -> Path:
    """Give the folder for what outlasts the process but not the boot: in memory, where there is such a place.

    systemd's $RUNTIME_DIRECTORY (with RuntimeDirectoryPreserve=restart), else a folder of this state directory's own in
    $XDG_RUNTIME_DIR or /dev/shm, else the state directory itself.
    """
    given = os.environ.get("RUNTIME_DIRECTORY")
    if given:
        # With a dynamic user it is a link into /run/private, where only the service comes.
        return Path(given.split(":", 1)[0]).resolve()
    digest = blake2b(os.fsencode(state_dir.absolute()), digest_size=6).hexdigest()
    for base in (os.environ.get("XDG_RUNTIME_DIR"), str(SHARED_MEMORY)):
        if base and os.access(base, os.W_OK | os.X_OK):
            return Path(base) / f"{PREFIX}{os.geteuid()}-{digest}"
    return state_dir


class Quarantine:
    """The marks and strikes of a process: opened before its first worker starts, closed when it ends in order."""

    def __init__(
        self, folder: Path = Path(), memory: mmap.mmap | None = None, fd: int = -1, crash: CrashFile | None = None
    ) -> None:
        self._folder = folder
        self._map = memory
        self._fd = fd
        self._crash = crash
        self._lock = threading.Lock()
        self._free = list(range(SLOTS - 1, -1, -1)) if memory is not None else []
        self.strikes: list[Strike] = []
        self.wary = False
        """Whether workers take turns, because one of them may be about to meet a suspect."""
        self._turn = threading.Lock()
        self._lapse_at = time.monotonic() + LAPSE_S
        self._demoted: dict[str, str] = {}
        """Pipeline → what to say of the delegate that it runs on."""

    @classmethod
    def open(cls, folder: Path) -> Quarantine:
        """Open the file in `folder` (made if need be) and draw conclusions from what the last process has left there.

        Never fails: without a place for marks, and beside a living process that has it, inputs are run unmarked.
        """
        try:
            memory, fd = open_file(folder)
        except OSError as error:
            log.warning("%s: inputs that crash cannot be recognised: %s", folder / FILE, error.strerror or error)
            return cls()
        crash = CrashFile(folder)
        quarantine = cls(folder, memory, fd, crash)
        quarantine._load()
        quarantine._judge(crash.last)
        return quarantine

    def guard(self, pipeline: str, model: Path, line: Sequence[str]) -> Guard:
        """Give the guard of one worker, with the delegate that its model shall be opened on.

        `line` names the delegates that may run it: first the one that was chosen, then who goes on when it fails.
        """
        key = _model_key(model)
        with self._lock:
            mine = [each for each in self.strikes if (each.pipeline, each.model) == (pipeline, key)]
            place = self._free.pop() if self._free else None
        left = {each.delegate for each in mine if each.demotes}
        chosen = next((each for each in line if short(each) not in left), line[-1])
        if chosen != line[0]:
            self._demoted[pipeline] = f"runs on {chosen} instead of {line[0]}, on which an input crashed"
            log.warning("%s: %s", pipeline, self._demoted[pipeline])
        else:
            self._demoted.pop(pipeline, None)
        return Guard(self, self._map if place is not None else None, place, pipeline, key, chosen, mine)

    def troubles(self) -> list[Trouble]:
        """Say what a person should know: quarantined inputs, and pipelines that are not on the delegate asked for."""
        with self._lock:
            convicted = [each for each in self.strikes if each.convicted]
            demoted = dict(self._demoted)
        found = [Trouble(f"{name}.demoted", f"{name}: {what}", logged=True) for name, what in demoted.items()]
        found += [
            Trouble(
                f"{each.pipeline}.quarantined.{each.strong.hex()}",
                f"{each.pipeline}: input {each.identity} ({each.length} bytes) is quarantined, because the process died "
                "each time that it ran; look at who sends it, or update the runtime; a stop and a start forget it",
                degrades=False,
                logged=True,
            )
            for each in convicted
        ]
        return found

    def close(self) -> None:
        """End in order: what is still in work is no suspect."""
        memory, self._map = self._map, None
        if memory is None:
            return
        for slot in range(SLOTS):
            memory[SLOTS_AT + slot * PLACE] = FREE
        if self._crash is not None:
            self._crash.close()
        if not self.strikes:
            self._tidy()
        fcntl.flock(self._fd, fcntl.LOCK_UN)  # the map has a descriptor of its own, and goes with its last guard
        os.close(self._fd)

    def _tidy(self) -> None:
        """Leave nothing behind where there is nothing to remember: nobody else clears a folder in /dev/shm."""
        with contextlib.suppress(OSError):
            for name in (FILE, CRASH_FILE):
                (self._folder / name).unlink(missing_ok=True)
            if self._folder.name.startswith(PREFIX):
                self._folder.rmdir()

    # The start.

    def _load(self) -> None:
        assert self._map is not None
        now = time.monotonic()
        for place in range(STRIKES):
            strike = unpack_strike(self._map, place)
            if strike is not None and 0 <= now - strike.at < KEPT_S:
                self.strikes.append(strike)
            else:
                self._erase(place)

    def _judge(self, crash: Crash | None) -> None:
        """Turn the marks of the dead process into strikes."""
        marks = self._take_marks()
        if crash is not None:
            log.error("the last process crashed: %s\n%s", crash.reason, crash.trace)
        culprits = [mark for mark in marks if crash is not None and crash.thread == mark.thread]
        if crash is not None and crash.thread is None and len(marks) == 1:
            culprits = marks  # one of the interpreter's own threads, and there was only one that ran
        if crash is not None and crash.thread is not None and not culprits and not crash.aborted:
            marks = []  # a thread that works on no input crashed all by itself
        suspects = culprits or marks
        for strike in list(self.strikes):
            if not strike.explained and not strike.convicted and not any(strike.is_of(mark) for mark in suspects):
                self._forget(strike)  # it was not that one again
        for mark in suspects:
            self._strike(mark, proven=mark in culprits, reason=crash.reason if crash is not None else "it was killed")
        self._look_for_suspects()

    def _take_marks(self) -> list[Mark]:
        assert self._map is not None
        marks = []
        for slot in range(SLOTS):
            at = SLOTS_AT + slot * PLACE
            if self._map[at] in (MARKED, EXAMINED):
                marks.append(unpack_mark(self._map, at))
            self._map[at] = FREE
        return marks

    def _strike(self, mark: Mark, *, proven: bool, reason: str) -> None:
        strike = next((each for each in self.strikes if each.is_of(mark)), None)
        if strike is None:
            fields = (mark.pipeline, mark.model, mark.length, mark.crc)
            strike = Strike(*fields, b"", 0, False, mark.delegate, mark.identity, 0.0)
            self._make_room()
            self.strikes.append(strike)
        strike.points = min(CONVICTION, strike.points + (EXPLAINED if proven else UNEXPLAINED))
        strike.explained = strike.explained or proven
        strike.strong = strike.strong or mark.strong
        strike.delegate, strike.identity, strike.at = mark.delegate, mark.identity, time.monotonic()
        self._write(strike)
        what = "it is quarantined" if strike.convicted else "it is tried once more"
        log.warning(
            "%s: process %d ended (%s) while frame %s (%d bytes) was in work on %s; %s",
            mark.pipeline,
            mark.pid,
            reason,
            mark.identity,
            mark.length,
            mark.delegate,
            what,
        )

    def _make_room(self) -> None:
        if len(self.strikes) >= STRIKES:
            self._forget(min(self.strikes, key=lambda each: each.at))

    # Later, from the workers' threads.

    def acquit(self, strike: Strike, delegate: str) -> None:
        """Take note that a suspect has run to its end on a delegate."""
        with self._lock:
            if strike not in self.strikes or strike.convicted:
                return
            log.info("%s: frame %s ran to its end on %s", strike.pipeline, strike.identity, delegate)
            if strike.explained and strike.delegate != short(delegate):
                strike.points = 0
                self._write(strike)
            else:
                self._forget(strike)
            self._look_for_suspects()

    def forget_old(self, strike: Strike) -> bool:
        """Forget a strike whose time has passed; says whether it has."""
        now = time.monotonic()
        with self._lock:
            lapsed = not strike.explained and not strike.convicted and now > self._lapse_at
            if strike in self.strikes and (lapsed or now - strike.at >= KEPT_S):
                self._forget(strike)
            return strike not in self.strikes

    def take_turn(self) -> bool:
        """Wait until no other worker has an input in work; False if that took too long."""
        if time.monotonic() > self._lapse_at:
            with self._lock:
                self._look_for_suspects()
        return self._turn.acquire(timeout=TURN_S)

    def end_turn(self) -> None:
        """Let the next worker go on."""
        self._turn.release()

    def give_back(self, place: int) -> None:
        """Take a worker's slot back."""
        with self._lock:
            self._free.append(place)

    def _look_for_suspects(self) -> None:
        self.wary = time.monotonic() <= self._lapse_at and any(each.suspected for each in self.strikes)

    def _forget(self, strike: Strike) -> None:
        self.strikes.remove(strike)
        self._erase(strike.place)

    def _erase(self, place: int) -> None:
        if self._map is not None and place >= 0:
            at = STRIKES_AT + place * PLACE
            self._map[at : at + PLACE] = bytes(PLACE)

    def _write(self, strike: Strike) -> None:
        if self._map is None:
            return
        if strike.place < 0:
            taken = {each.place for each in self.strikes}
            strike.place = next(place for place in range(STRIKES) if place not in taken)
        write_strike(self._map, strike)


class Guard:
    """Marks what one worker has in work. `enter` and `leave` are called by that worker's thread, for every input."""

    def __init__(
        self,
        owner: Quarantine,
        memory: mmap.mmap | None,
        place: int | None,
        pipeline: str,
        model: int,
        delegate: str,
        strikes: list[Strike],
    ) -> None:
        self.delegate = delegate
        """The delegate to open the model on."""
        self._owner = owner
        self._place = place
        self._pipeline = pipeline
        self._model = model
        # Without a slot the marks go nowhere: one way through `enter` for all.
        self._map: mmap.mmap | bytearray = memory if memory is not None else bytearray(PLACE)
        self._at = SLOTS_AT + place * PLACE if memory is not None and place is not None else 0
        self._mark_at = self._at + MARK_AT
        self._strikes: dict[tuple[int, int], list[Strike]] = {}
        for strike in strikes:
            self._strikes.setdefault((strike.length, strike.crc), []).append(strike)
        self._suspects: list[Strike] = []
        self._has_turn = False

    @classmethod
    def unmarked(cls) -> Guard:
        """Give a guard that remembers nothing and knows of nothing."""
        return cls(Quarantine(), None, None, "", 0, "", [])

    @property
    def wary(self) -> bool:
        """Say whether somebody is suspected, so that `enter` may have to wait for its turn."""
        return self._owner.wary

    def attach(self) -> None:
        """Say which thread works here: the one that calls this."""
        owner = (threading.get_ident(), os.getpid(), self._model, self.delegate.encode(), self._pipeline.encode())
        OWNER.pack_into(self._map, self._at + OWNER_AT, *owner)

    def enter(self, identity: str, payload: Any) -> None:
        """Mark an input as in work; QuarantinedError if it shall not be. `leave` follows in either case."""
        if type(payload) is not bytes:
            payload = _flat(payload)
        length = len(payload)
        crc = crc32(payload) if length <= 2 * SAMPLE else crc32(payload[-SAMPLE:], crc32(payload[:SAMPLE]))
        state = MARKED
        if self._owner.wary and not self._has_turn:
            self._has_turn = self._owner.take_turn()
        if self._strikes or self._suspects:
            self._acquit()
            state = self._examine(identity, payload, length, crc)
        MARK.pack_into(self._map, self._mark_at, length & 0xFFFFFFFF, crc, identity.encode(errors="replace"))
        self._map[self._at] = state

    def leave(self) -> None:
        """Take the mark back: the input is done with, whatever came of it."""
        self._map[self._at] = FREE
        if self._suspects:
            self._acquit()
        if self._has_turn:
            self._has_turn = False
            self._owner.end_turn()

    def close(self) -> None:
        """Give the slot back; the worker has ended."""
        place, self._place = self._place, None
        if place is not None and self._map[self._at] == FREE:  # else it has not, and keeps what it writes to
            self._owner.give_back(place)

    def _acquit(self) -> None:
        suspects, self._suspects = self._suspects, []
        for strike in suspects:
            self._owner.acquit(strike, self.delegate)

    def _examine(self, identity: str, payload: Any, length: int, crc: int) -> int:
        """Compare an input with what is known of crashes; it looks like one of them by its length and CRC."""
        known = self._strikes.get((length, crc))
        if known is None:
            return MARKED
        known[:] = [strike for strike in known if not self._owner.forget_old(strike)]
        if not known:
            del self._strikes[length, crc]
            return MARKED
        strong = blake2b(payload, digest_size=STRONG).digest()
        for strike in known:
            if strike.strong and strike.strong != strong:
                continue
            if strike.convicted:
                if not strike.told:
                    strike.told = True
                    log.error("%s: frame %s is quarantined; it gets an error result", self._pipeline, identity)
                raise QuarantinedError(
                    f"this input is not run: the process died each time that it was, last on {strike.delegate} "
                    f"as frame {strike.identity}"
                )
            if strike.suspected:
                self._suspects.append(strike)
        at = self._at + STRONG_AT
        self._map[at : at + STRONG] = strong
        return EXAMINED


def _flat(payload: Any) -> Any:
    """Give the bytes of a payload that is no bytes object: an array, or a view of something."""
    view = memoryview(payload)
    return view.cast("B") if view.c_contiguous and view.nbytes else view.tobytes()


def _model_key(path: Path) -> int:
    """Tell model files apart: another version of a model gets a trial of its own."""
    try:
        status = path.stat()
        return crc32(f"{path}|{status.st_size}|{status.st_mtime_ns}".encode(errors="replace"))
    except OSError:
        return 0
