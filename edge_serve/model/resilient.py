"""A model with a line of delegates behind it: when one fails in service the next one runs the same input, and nothing is lost.

A run that raises is repeated on the next delegate in line. If that gives a result the first one was to blame and is left; if
nobody gives one, the input was. An accelerator's result with NaN is held against the next delegate's in the same way. A delegate that hung
or died is left in any case. Frames in service go on at once on what opens quickly, which is the CPU; whatever stands higher in line is
tried again in a thread of its own, with delays that double, until it is taken up again between two runs. Where there is nobody
else (a file compiled for an accelerator, and no other variant), inputs get errors meanwhile.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edge_serve.errors import DelegateAwayError, DelegateFailedError, InferenceError, InputError, ModelError
from edge_serve.model.delegate import CPU

if TYPE_CHECKING:
    from pathlib import Path

    from edge_serve.frame import Array
    from edge_serve.model.delegate import Candidate, Claims, Runnable

log = logging.getLogger(__name__)

# Delays before a delegate that failed is tried again; each with jitter, so that a fleet does not do it as one.
FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 300.0
# A delegate that was well for so long, or for several times its last delay, begins anew with the first delay.
WELL_AFTER_S = 60.0
WELL_FACTOR = 4.0
CLOSE_S = 1.0

least = np.minimum.reduce
Open = Callable[["Candidate"], "Runnable"]


class ResilientEngine:
    """The engine of one worker. It is run by one thread at a time; what it runs on may change between two runs."""

    def __init__(
        self,
        name: str,
        line: Sequence[Candidate],
        open_one: Open,
        *,
        strict: bool = False,
    ) -> None:
        """Open the first candidate of `line` that can be opened; with `strict` it must be the very first.

        `open_one` opens a candidate so that all show the same tensors. Raises what opening the first one raises, if none can be opened.
        """
        self._name = name
        self._line = tuple(line)
        self._open = open_one
        self.changed: Callable[[ResilientEngine], None] | None = None
        """Is told when another one runs, in the thread that runs it."""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._delay = 0.0
        self._since = time.monotonic()
        self._reason = ""
        self._dead = False
        """Whether what should run hung or died, and nobody is there to stand in."""
        self._standby: dict[int, Runnable] = {}
        self._returned: tuple[int, Runnable] | None = None
        self._sample: dict[str, Array] | None = None
        self._thread: threading.Thread | None = None
        self._place, self._engine = self._first(strict)
        self.signature = self._engine.signature
        self.inputs = self._engine.inputs
        self.outputs = self._engine.outputs
        self.detection_outputs = self._engine.detection_outputs
        self._real = tuple(name for name, spec in self.outputs.items() if np.issubdtype(spec.dtype, np.floating))
        self._checked: tuple[str, ...] = ()
        self._settle()
        if self._place:
            log.warning("%s: %s", name, self.trouble)
            self._begin_recovery()

    def _first(self, strict: bool) -> tuple[int, Runnable]:
        failure: ModelError | DelegateAwayError | None = None
        for place, candidate in enumerate(self._line):
            try:
                return place, self._open(candidate)
            except (ModelError, DelegateAwayError) as error:
                if strict:
                    raise
                failure = failure or error
                self._reason = self._reason or str(error)
        assert failure is not None, "a line holds at least one candidate"
        raise failure

    # What runs now.

    @property
    def candidate(self) -> Candidate:
        """Give what runs now."""
        return self._line[self._place]

    @property
    def path(self) -> Path:
        """Give the file that runs now."""
        return self._engine.path

    @property
    def threads(self) -> int:
        """Count the interpreter's threads."""
        return self._engine.threads

    @property
    def delegate(self) -> str:
        """Name the delegate that runs now; "none" where it claims no operator."""
        return self._engine.delegate

    @property
    def claims(self) -> Claims:
        """Say which operators the delegate took."""
        return self._engine.claims

    @property
    def operators(self) -> dict[str, int]:
        """Operator name → how many of them the model has."""
        return self._engine.operators

    @property
    def in_process(self) -> bool:
        """Say whether what runs now is of this process and cannot keep its thread waiting; the CPU's delegates are."""
        return self.candidate.spec.name in CPU

    @property
    def holds(self) -> str | None:
        """Name the delegate that runs now if nobody else may have it meanwhile; None on the CPU, and where it hung or died."""
        return None if self.in_process or self._dead else self.candidate.spec.name

    @property
    def trouble(self) -> str | None:
        """Say what is wrong while another delegate runs than should; None when all is well."""
        place = self._place
        wished, runs = self._line[0], self._line[place]
        if self._dead:
            return f"the model runs on nothing: {self._reason}; {_label(wished)} is tried again for as long as it takes"
        if not place:
            return None
        return (
            f"the model runs on {_label(runs)} instead of {_label(wished)}: {self._reason or 'it failed'}; "
            f"{_label(wished)} is tried again for as long as it takes"
        )

    # Runs.

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once, on the next delegate in line if this one fails; InferenceError if nobody gives a result."""
        if self._returned is not None:
            self._take_over()
        try:
            outputs = self._engine.run(inputs)
        except InferenceError as error:
            return self._elsewhere(inputs, error)
        for name in self._checked:
            # The least of them is NaN if any is.
            if math.isnan(least(outputs[name], None, initial=0.0)):
                return self._compared(inputs, outputs)
        return outputs

    def _elsewhere(self, inputs: Mapping[str, Array], error: InferenceError) -> dict[str, Array]:
        """Give the result of the next delegate that has one, and leave this one for it; else the input was to blame."""
        for place in self._next_places():
            engine = self._stand_by(place)
            if engine is None:
                continue
            try:
                outputs = engine.run(inputs)
            except InferenceError:
                continue
            self._leave(place, str(error), inputs)
            return outputs
        if isinstance(error, DelegateFailedError):
            self._replace(str(error), inputs)
        raise error

    def _compared(self, inputs: Mapping[str, Array], outputs: dict[str, Array]) -> dict[str, Array]:
        """Hold a result with NaN against the next delegate's; both have it where the model itself gives it."""
        for place in self._next_places():
            engine = self._stand_by(place)
            if engine is None:
                continue
            try:
                others = engine.run(inputs)
            except InferenceError:
                continue
            if any(np.isnan(others[name]).any() for name in self._checked):
                return outputs
            self._leave(place, "it gave NaN where the next one in line does not", inputs)
            return others
        return outputs

    def _next_places(self) -> list[int]:
        """Give who may run an input that failed here: those that open quickly first, and nobody who stands higher in line."""
        after = range(self._place + 1, len(self._line))
        return sorted(after, key=lambda place: self._line[place].spec.name not in CPU)

    def _stand_by(self, place: int) -> Runnable | None:
        """Give an engine that is opened once and kept for the next failure; None if it cannot be opened."""
        if place not in self._standby:
            try:
                self._standby[place] = self._open(self._line[place])
            except (ModelError, DelegateAwayError) as error:
                log.warning("%s: %s cannot stand in: %s", self._name, _label(self._line[place]), error)
                return None
        return self._standby[place]

    def _replace(self, reason: str, inputs: Mapping[str, Array]) -> None:
        """Leave an engine that is of no use any more for whoever can be opened, else wait for it to be well again."""
        for place in self._next_places():
            if self._stand_by(place) is not None:
                self._leave(place, reason, inputs)
                return
        if not self._dead:
            log.warning("%s: %s failed, and nobody stands in: %s", self._name, _label(self.candidate), reason)
            self._dead, self._reason = True, reason
            self._sample = {name: array.copy() for name, array in inputs.items()}
            self._engine.close()  # it may hold what a new one needs
            self._begin_recovery()

    def _leave(self, place: int, reason: str, inputs: Mapping[str, Array]) -> None:
        """Run on another delegate from now on."""
        left, old = self._line[self._place], self._engine
        well_s = time.monotonic() - self._since
        with self._lock:
            self._engine = self._standby.pop(place)
            self._place = place
            self._reason = reason
            self._sample = {name: array.copy() for name, array in inputs.items()}
            failed = [self._standby.pop(each) for each in list(self._standby) if each < place]
            if well_s > max(WELL_AFTER_S, WELL_FACTOR * self._delay):
                self._delay = 0.0
        log.warning(
            "%s: %s failed and is left: %s; goes on on %s", self._name, _label(left), reason, _label(self.candidate)
        )
        for engine in (old, *failed):
            engine.close()
        self._settle()
        self._begin_recovery()
        if self.changed is not None:
            self.changed(self)

    def _settle(self) -> None:
        """Settle whose results are held against another's: an accelerator's, where there is anybody to ask."""
        self._since = time.monotonic()
        last = self._place == len(self._line) - 1
        self._checked = () if last or self.in_process else self._real

    # The way back.

    def _begin_recovery(self) -> None:
        with self._lock:
            if not (self._place or self._dead) or self._thread is not None or self._closed.is_set():
                return
            self._thread = threading.Thread(target=self._recover, name=f"delegate.{self._name}", daemon=True)
            self._thread.start()

    def _recover(self) -> None:
        """Try those that stand higher in line, until one of them is well."""
        while True:
            self._delay = min(LONGEST_DELAY_S, self._delay * 2 if self._delay else FIRST_DELAY_S)
            if self._closed.wait(self._delay * random.uniform(0.5, 1.0)):  # noqa: S311  # jitter, no secret
                return
            for place in range(self._place + self._dead):
                engine = self._well_again(place)
                if engine is None:
                    continue
                with self._lock:
                    self._thread = None
                    if not self._closed.is_set():
                        self._returned = (place, engine)
                        return
                engine.close()
                return

    def _well_again(self, place: int) -> Runnable | None:
        """Give an engine that opens, and runs what its predecessor failed on; None while it does not."""
        try:
            engine = self._open(self._line[place])
        except (ModelError, DelegateAwayError) as error:
            self._reason = str(error)
            log.debug("%s: %s is not back: %s", self._name, _label(self._line[place]), error)
            return None
        if self._sample is None:
            return engine
        try:
            outputs = engine.run(self._sample)
            if not any(np.isnan(outputs[name]).any() for name in self._real):
                return engine
        except (InferenceError, InputError) as error:
            log.debug("%s: %s fails again: %s", self._name, _label(self._line[place]), error)
        engine.close()
        return None

    def _take_over(self) -> None:
        """Run on the delegate that is well again; what ran meanwhile stays open for the next time."""
        with self._lock:
            assert self._returned is not None
            place, engine = self._returned
            self._returned = None
            if not self._dead:
                self._standby[self._place] = self._engine
            self._dead = False
            self._place, self._engine = place, engine
        log.info("%s: %s is well again and taken up", self._name, _label(self.candidate))
        self._settle()
        self._begin_recovery()  # for whoever stands higher still
        if self.changed is not None:
            self.changed(self)

    def close(self) -> None:
        """Close everything that is open."""
        with self._lock:
            self._closed.set()
            returned, self._returned = self._returned, None
            thread = self._thread
        if thread is not None:
            thread.join(CLOSE_S)
        for engine in (self._engine, *self._standby.values(), *([returned[1]] if returned else [])):
            engine.close()
        self._standby.clear()


def _label(candidate: Candidate) -> str:
    return candidate.spec.label
