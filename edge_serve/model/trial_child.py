"""The child of trial.py: opens a model on delegates, holds the results against what is right, and times them.

All that look fast after a few runs are timed in rounds, one after the other, so that whatever else the machine does hits all of
them alike. Run as `python -m edge_serve.model.trial_child`; request and answers are JSON lines.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.errors import DelegateAwayError, EdgeServeError, InferenceError, InputError, ModelError
from edge_serve.model.delegate import CPU, DelegateSpec, Runnable
from edge_serve.model.interpreter import Runtime, load_runtime
from edge_serve.model.opening import open_model
from edge_serve.model.trial import LONG_RUNS, MOST_TOTAL_S, TOTAL_S
from edge_serve.processing.tensor import dequantize, fit

Arrays = dict[str, Any]

MAX_REQUEST_BYTES = 4 * 1024 * 1024
MAX_SAMPLES_BYTES = 256 * 1024 * 1024
# Of golden samples that many are run; of a slow model so many as this time allows, and some at least.
MOST_SAMPLES = 8
LEAST_SAMPLES = 2
SAMPLES_S = 0.5
RANDOM_SAMPLES = 2
SEED = 20240229
# A first look: at least some runs and at most some, for about this long.
LOOK_S = 0.02
LOOK_RUNS = (3, 200)
# Who was seen to be slower than the fastest by more is not timed in rounds; a first look is no better than that.
NEAR = 1.3
NEAR_S = 3e-6
MOST_FINALISTS = 6
ROUNDS = 7
LEAST_ROUNDS = 3
ROUND_S = 0.01
ROUND_RUNS = (1, 400)
# More threads than two are tried where two won by at least so much. A run that is faster than this is over before another thread is awake.
THREADS_GAIN = 0.95
WORTH_SPLITTING_S = 5e-6
# Results may differ by so much of an output's largest value where nothing says how much: delegates compute in half precision.
LOOSE = 0.01
# … and by so much from those of another file of the model.
LOOSEST = 0.05
LOOSE_STEPS = 3.0
MOST_RUNS = 1_000_000


@dataclass
class Way:
    """A candidate as it was asked for, and what is known of it."""

    number: int
    variant: str
    file: Path
    threads: int
    spec: DelegateSpec
    engine: Runnable | None = None
    look_s: float = 0.0
    memory: int = 0
    away: bool = False
    """Whether its hardware is not there, or not free."""

    @property
    def known(self) -> dict[str, Any]:
        """Give what can be said of it."""
        if self.engine is None:
            return {"number": self.number, "away": self.away}
        claims = self.engine.claims
        return {
            "number": self.number,
            "taken": claims.taken,
            "total": claims.total,
            "claimed": claims.claimed,
            "memory_bytes": self.memory,
        }


def say(**document: Any) -> None:
    """Write one line for the parent."""
    os.write(3, json.dumps(document).encode() + b"\n")


class Trials:
    """One request."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._runtime: Runtime = load_runtime(request["runtime"])
        self._signature: str | None = request["signature"]
        self._begun = time.monotonic()
        self._total_s: float = request["total_s"]
        self._longest_s = MOST_TOTAL_S - (TOTAL_S - self._total_s)
        """What the total may grow to; a child that goes on after another one's death has less of both."""
        self._seconds: float | None = request["seconds"]
        self._golden = request["golden"]
        self._expected: dict[str, list[tuple[Arrays, Arrays | None, dict[str, float]]]] = {}
        self._ways = [
            Way(
                each["number"],
                each["variant"],
                Path(each["file"]),
                each["threads"],
                DelegateSpec(
                    each["delegate"]["name"],
                    each["delegate"]["index"],
                    each["delegate"]["library"],
                    tuple(each["delegate"]["options"].items()),
                ),
            )
            for each in request["candidates"]
        ]

    def run(self) -> None:
        """Try all, in order."""
        best = float("inf")
        looks: dict[tuple[str, str], float] = {}
        finalists: list[Way] = []
        single = {(way.variant, way.spec.label) for way in self._ways if way.threads == 1}
        for way in self._ways:
            if self._late() and finalists:
                break  # the parent says so of what it hears nothing of
            one = (way.variant, way.spec.label)
            if self._seconds is None and way.threads > 1 and one in single:
                before = looks.get(one)
                if before is None or before < WORTH_SPLITTING_S:
                    say(
                        number=way.number, reason="more threads do not help" if before else "is not right on one thread"
                    )
                    continue
            say(at=way.number)
            begun = time.monotonic()
            reason = self._open(way)
            if way.spec.name not in CPU:
                # A GPU compiles its shaders; the CPU's ways are tried all the same.
                self._begun += time.monotonic() - begun
            if reason:
                say(**way.known, reason=reason)
                self._close(way)
                continue
            try:
                if self._seconds is not None:
                    self._measure(way, self._seconds)
                    self._close(way)
                    continue
                way.look_s = _look(self._inputs(way), way.engine)
                self._total_s = max(self._total_s, min(self._longest_s, LONG_RUNS * min(best, way.look_s)))
            except InferenceError as error:
                say(**way.known, reason=f"fails after some runs: {error}")
                self._close(way)
                continue
            say(**way.known, latency_s=way.look_s, runs=LOOK_RUNS[0])
            if way.threads > 1 and one in looks and way.look_s > looks[one] * THREADS_GAIN:
                looks[one] = 0.0  # still more of them do not help either
            else:
                looks[one] = way.look_s
            best = min(best, way.look_s)
            finalists.append(way)
            near = best * NEAR + NEAR_S
            for each in [each for each in finalists if each.look_s > near]:
                finalists.remove(each)
                self._close(each)
        finalists.sort(key=lambda each: each.look_s)
        for each in finalists[MOST_FINALISTS:]:
            self._close(each)
        self._rounds(finalists[:MOST_FINALISTS])

    def _late(self) -> bool:
        return time.monotonic() - self._begun > self._total_s

    def _open(self, way: Way) -> str:
        """Open one and hold its results against what is right; gives why it is not."""
        before = _resident()
        try:
            way.engine = open_model(way.file, way.spec, self._runtime, threads=way.threads, signature=self._signature)
        except (ModelError, DelegateAwayError) as error:
            way.away = isinstance(error, DelegateAwayError)
            return str(error)
        if way.spec.name != "none" and not way.engine.claims.taken:
            return f"{way.spec.label} takes no operator of this model"
        try:
            reason = self._compare(way)
        except (InferenceError, InputError) as error:
            return f"fails: {error}"
        way.memory = max(0, _resident() - before)
        return reason

    def _close(self, way: Way) -> None:
        if way.engine is not None:
            way.engine.close()
            way.engine = None

    # What is right.

    def _inputs(self, way: Way) -> Arrays:
        assert way.engine is not None
        inputs = self._samples(way)[0][0]
        return {name: fit(inputs[name], spec) for name, spec in way.engine.inputs.items()}

    def _samples(self, way: Way) -> list[tuple[Arrays, Arrays | None, dict[str, float]]]:
        """Give inputs, the outputs that are right (None: nobody knows) and the tolerances, for one variant."""
        if way.variant not in self._expected:
            golden = self._golden.get(way.variant, {})
            found = self._from_file(way, golden) if golden.get("file") else None
            self._expected[way.variant] = found or self._made_up(way)
        return self._expected[way.variant]

    def _from_file(
        self, way: Way, golden: Mapping[str, Any]
    ) -> list[tuple[Arrays, Arrays | None, dict[str, float]]] | None:
        assert way.engine is not None
        file = Path(golden["file"])
        if file.stat().st_size > MAX_SAMPLES_BYTES:
            return None
        with np.load(file, allow_pickle=False) as archive:
            inputs = {name: archive[f"input/{name}"] for name in way.engine.inputs if f"input/{name}" in archive}
            if inputs.keys() != way.engine.inputs.keys():
                return None  # they are of another signature
            outputs, tolerance = {}, dict(golden["tolerance"])
            for name in way.engine.outputs:
                own = f"variant/{golden['variant']}/{name}"
                if own in archive and name in tolerance:
                    outputs[name] = archive[own]
                    continue
                others = [key for key in archive if key.startswith("variant/") and key.endswith(f"/{name}")]
                source = f"output/{name}" if f"output/{name}" in archive else others[0] if others else None
                if source is not None:
                    outputs[name] = archive[source]
                    tolerance[name] = LOOSEST * _largest(outputs[name])
        number = min(MOST_SAMPLES, *(len(array) for array in inputs.values()))
        return [
            (
                {name: array[nth] for name, array in inputs.items()},
                {name: array[nth] for name, array in outputs.items()},
                tolerance,
            )
            for nth in range(number)
        ]

    def _made_up(self, way: Way) -> list[tuple[Arrays, Arrays | None, dict[str, float]]]:
        """Random inputs, and what the interpreter's own kernels give for them."""
        assert way.engine is not None
        rng = np.random.default_rng(SEED)
        inputs = [{name: _random(spec, rng) for name, spec in way.engine.inputs.items()} for _ in range(RANDOM_SAMPLES)]
        if way.spec.name == "none":
            reference = way.engine
        else:
            try:
                reference = open_model(way.file, DelegateSpec("none"), self._runtime, signature=self._signature)
            except ModelError:
                return [(each, None, {}) for each in inputs]  # compiled for an accelerator: nobody else can run it
        found: list[tuple[Arrays, Arrays | None, dict[str, float]]] = []
        for each in inputs:
            given = {name: fit(each[name], spec) for name, spec in reference.inputs.items()}
            outputs = _real(reference, reference.run(given))
            if reference.detection_outputs:
                # Random pictures show nothing, and boxes of equal scores come in any order.
                outputs = {name: outputs[name] for name in reference.detection_outputs[2:]}
            tolerance = {
                name: max(LOOSE_STEPS * (reference.outputs[name].scale or 0.0), LOOSE * _largest(array))
                for name, array in outputs.items()
            }
            found.append((each, outputs, tolerance))
        if reference is not way.engine:
            reference.close()
        return found

    def _compare(self, way: Way) -> str:
        engine = way.engine
        assert engine is not None
        begun = time.monotonic()
        for nth, (inputs, expected, tolerance) in enumerate(self._samples(way)):
            if nth >= LEAST_SAMPLES and time.monotonic() - begun > SAMPLES_S:
                break
            given = {name: fit(inputs[name], spec) for name, spec in engine.inputs.items()}
            outputs = _real(engine, engine.run(given))
            for name, array in outputs.items():
                if expected is None:
                    if not np.isfinite(array).all():
                        return f"gives NaN or infinity at output {name!r}"
                    continue
                if name not in expected:
                    continue
                wanted = expected[name].astype(np.float64).reshape(-1)
                have = array.astype(np.float64).reshape(-1)
                if have.shape != wanted.shape:
                    return f"gives {have.size} values at output {name!r}, and not {wanted.size}"
                finite = np.isfinite(wanted)
                if not np.isfinite(have[finite]).all():
                    return f"gives NaN or infinity at output {name!r}, where the model gives numbers"
                allowed = tolerance[name]
                if way.spec.name not in ("none", "xnnpack"):
                    allowed = max(allowed, LOOSE * _largest(wanted))
                off = float(np.abs(have[finite] - wanted[finite]).max(initial=0.0))
                if off > allowed:
                    return f"is wrong: output {name!r} is off by {off:.3g}, and {allowed:.3g} is allowed"
        return ""

    # How fast it is.

    def _rounds(self, ways: list[Way]) -> None:
        if not ways:
            return
        inputs = [self._inputs(way) for way in ways]
        times: list[list[list[float]]] = [[] for _ in ways]
        for done in range(ROUNDS):
            if done >= LEAST_ROUNDS and self._late():
                break  # of slow models, fewer rounds: what differs there differs by far more than a round does from the next
            for nth, way in enumerate(ways):
                if way.engine is None:
                    continue
                say(at=way.number)
                runs = min(ROUND_RUNS[1], max(ROUND_RUNS[0], int(ROUND_S / max(way.look_s, 1e-7))))
                try:
                    times[nth].append(_timed(way.engine, inputs[nth], runs))
                except InferenceError as error:
                    say(**way.known, reason=f"fails after some runs: {error}")
                    self._close(way)
        for nth, way in enumerate(ways):
            if way.engine is None:
                continue
            every = [each for one in times[nth] for each in one]
            middle = float(np.median([np.median(one) for one in times[nth]]))
            say(**way.known, latency_s=middle, runs=len(every), percentiles=_percentiles(every))
            self._close(way)

    def _measure(self, way: Way, seconds: float) -> None:
        assert way.engine is not None
        inputs = self._inputs(way)
        _look(inputs, way.engine)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < LOOK_RUNS[0] or (time.perf_counter() < end and len(times) < MOST_RUNS):
            times += _timed(way.engine, inputs, 1)
        say(**way.known, latency_s=float(np.median(times)), runs=len(times), percentiles=_percentiles(times))


def _timed(engine: Runnable, inputs: Arrays, runs: int) -> list[float]:
    now = time.perf_counter
    times = []
    for _ in range(runs):
        start = now()
        engine.run(inputs)
        times.append(now() - start)
    return times


def _look(inputs: Arrays, engine: Runnable | None) -> float:
    assert engine is not None
    engine.run(inputs)
    times: list[float] = []
    end = time.perf_counter() + LOOK_S
    while len(times) < LOOK_RUNS[0] or (time.perf_counter() < end and len(times) < LOOK_RUNS[1]):
        times += _timed(engine, inputs, 1)
    return float(np.median(times))


def _percentiles(times: list[float]) -> dict[str, float]:
    return {f"p{share}": float(np.percentile(times, share)) for share in (50, 90, 99)}


def _real(engine: Runnable, outputs: Mapping[str, Any]) -> Arrays:
    return {name: dequantize(array, engine.outputs[name]) for name, array in outputs.items()}


def _largest(values: Any) -> float:
    wide = np.asarray(values, np.float64)
    return float(np.abs(wide[np.isfinite(wide)]).max(initial=0.0))


def _random(spec: TensorSpec, rng: np.random.Generator) -> Any:
    shape, dtype = tuple(abs(size) for size in spec.shape), np.dtype(spec.dtype)
    if dtype.kind == "f":
        return rng.uniform(-1, 1, shape).astype(dtype)
    if dtype.kind in "iu" and spec.scale is not None:
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    if dtype == np.uint8:
        return rng.integers(0, 255, shape, dtype, endpoint=True)  # pixels
    return np.zeros(shape, dtype)  # indices into something: any other may lie outside


def _resident() -> int:
    with Path("/proc/self/statm").open("rb") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _end_with_the_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def main() -> None:
    """Answer one request."""
    # What native code prints goes to the standard error, whatever stream it takes for it; lines for the parent go by 3.
    os.dup2(1, 3)
    os.dup2(2, 1)
    request = json.loads(sys.stdin.buffer.readline(MAX_REQUEST_BYTES))
    threading.Thread(target=_end_with_the_parent, name="parent", daemon=True).start()
    try:
        Trials(request).run()
    except EdgeServeError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(1)
    say(done=True)
    os._exit(0)  # a delegate's destructor may hang, and nobody waits for it


if __name__ == "__main__":
    main()
