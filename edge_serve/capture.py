"""Recording what a model really sees: a sample of a pipeline's input tensors, chosen while it runs.

The worker shows every input to a `Recorder`, which decides before it copies anything; a thread of the control socket takes
the copies, turns them into real values and hands them to whoever asked. What nobody takes is dropped and counted: neither
a slow disk nor a slow caller holds up the worker or fills memory.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.control import Peer
from edge_serve.errors import UnavailableError, UsageError
from edge_serve.frame import ModelInfo
from edge_serve.processing.tensor import dequantize

if TYPE_CHECKING:
    from edge_serve.frame import Array

# What a request may ask for. The bytes are those of the file; so much memory of the board it may take, too.
MAX_SAMPLES = 100_000
MAX_BYTES = 1024 * 1024 * 1024
MAX_SECONDS = 7 * 24 * 3600
MAX_EVERY = 1_000_000_000
MAX_SEED = 2**63 - 1
# Copies that wait to be handed on may hold this much (one may always wait); a caller that reads keeps it near zero.
PENDING_BYTES = 8 * 1024 * 1024
# So may this many, however small: each has some hundred bytes of its own around the values.
PENDING_SAMPLES = 4096
# How often the end is looked for, and how often a caller hears how far it is.
TICK_S = 0.2
PROGRESS_S = 1.0


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be recorded, and how much of it."""

    samples: int
    max_bytes: int
    seconds: float
    every: int | None
    """None: spread evenly over all inputs; else every so-manyth input, until there are enough."""
    seed: int

    @classmethod
    def read(cls, request: Mapping[str, Any]) -> Order:
        """Read a request; UsageError if a number is none or beyond its limits."""
        every = request.get("every")
        return cls(
            int(_number(request, "samples", 1, MAX_SAMPLES)),
            int(_number(request, "max_bytes", 1, MAX_BYTES)),
            _number(request, "seconds", 0, MAX_SECONDS, whole=False),
            None if every is None else int(_number(request, "every", 1, MAX_EVERY)),
            int(_number(request, "seed", 0, MAX_SEED)),
        )


def _number(request: Mapping[str, Any], name: str, low: int, high: int, *, whole: bool = True) -> float:
    value = request.get(name)
    kinds = (int,) if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(
            f'"{name}" must be a {"whole " if whole else ""}number from {low} to {high}, not {value!r:.40}'
        )
    return value


@dataclass(frozen=True, slots=True)
class Part:
    """One input's share of a sample: real values, without the batch dimension."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Give its size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """What every sample of a recording looks like; the first one settles it."""

    parts: tuple[Part, ...]
    capacity: int
    """How many samples are kept: as many as were asked for and fit into the bytes."""

    @property
    def nbytes(self) -> int:
        """Give the bytes of one sample."""
        return sum(part.nbytes for part in self.parts)


def is_batched(shape: Sequence[int]) -> bool:
    """Say whether a tensor's first dimension counts samples: it is 1, or dynamic and not the only one."""
    return len(shape) > 0 and (shape[0] == 1 or (shape[0] == -1 and len(shape) > 1))


class Recorder:
    """Chooses and copies samples in the worker's thread (`offer`) and gives them to another one (`take`).

    Without `every` it is a reservoir: at any moment each input seen so far has had the same chance to be kept (Vitter,
    Random Sampling with a Reservoir, 1985, algorithm R). A kept sample has a slot; a later one may replace it.
    """

    def __init__(self, inputs: Mapping[str, TensorSpec], order: Order) -> None:
        self._specs = tuple(inputs.values())
        self._batched = frozenset(spec.name for spec in self._specs if is_batched(spec.shape))
        self._order = order
        self._random = random.Random(order.seed)  # noqa: S311  # a choice of samples, no secret
        self._changed = threading.Condition()
        self._pending: deque[tuple[int, list[Array]]] = deque()
        self._pending_bytes = 0
        self._pending_limit = min(PENDING_BYTES, order.max_bytes)
        self._dropped: Counter[str] = Counter()
        self.layout: Layout | None = None
        self.seen = 0
        """Inputs that had their chance; those that were chosen but dropped are counted apart."""
        self.kept = 0
        self.error: Exception | None = None

    @property
    def full(self) -> bool:
        """Say whether no later input can be of interest."""
        return self._order.every is not None and self.layout is not None and self.kept >= self.layout.capacity

    @property
    def dropped(self) -> dict[str, int]:
        """Reason → how many inputs were chosen, or should have been, and are not recorded."""
        with self._changed:
            return dict(self._dropped)

    def offer(self, inputs: Mapping[str, Array]) -> None:
        """Look at one run's inputs, as the model got them; a batch is as many samples. Never raises, never waits."""
        if self.error is not None:
            return
        try:
            counts = {len(inputs[name]) for name in self._batched}
            if len(counts) > 1:
                self._drop("shape")
                return
            for row in range(counts.pop() if counts else 1):
                self._look_at(inputs, row)
        except Exception as error:  # noqa: BLE001  # recording never harms what is served; told where it was asked for
            self.error = error

    def _look_at(self, inputs: Mapping[str, Array], row: int) -> None:
        if self.full:
            return
        slot = self._choose()
        if slot is None:
            self.seen += 1
            return
        arrays = [inputs[spec.name][row] if spec.name in self._batched else inputs[spec.name] for spec in self._specs]
        if self._keep(slot, [np.asarray(array) for array in arrays]):
            self.seen += 1
            self.kept = max(self.kept, slot + 1)

    def _choose(self) -> int | None:
        """Give the slot that the next input is to take; None if it is to pass by."""
        if self._order.every is not None:
            return self.kept if self.seen % self._order.every == 0 else None
        if self.layout is None or self.kept < self.layout.capacity:
            return self.kept
        slot = self._random.randrange(self.seen + 1)
        return slot if slot < self.layout.capacity else None

    def _keep(self, slot: int, arrays: list[Array]) -> bool:
        layout = self.layout or self._settle(arrays)
        if layout is None:
            return self._drop("too_large")
        if any(array.shape != part.shape for array, part in zip(arrays, layout.parts, strict=True)):
            return self._drop("shape")
        # Calibration refuses a file that holds such a value; one broken sensor reading shall not cost all the others.
        if not all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f"):
            return self._drop("not_finite")
        size = layout.nbytes
        waiting = len(self._pending)
        if waiting >= PENDING_SAMPLES or (waiting and self._pending_bytes + size > self._pending_limit):
            return self._drop("behind")
        copies = [np.array(array, order="C") for array in arrays]
        with self._changed:
            self.layout = layout
            self._pending.append((slot, copies))
            self._pending_bytes += size
            self._changed.notify()
        return True

    def _settle(self, arrays: list[Array]) -> Layout | None:
        parts = tuple(
            Part(spec.name, "float32" if _quantized(spec) else array.dtype.name, array.shape)
            for spec, array in zip(self._specs, arrays, strict=True)
        )
        size = sum(part.nbytes for part in parts)
        if size > self._order.max_bytes:
            return None
        return Layout(parts, min(self._order.samples, self._order.max_bytes // max(1, size)))

    def _drop(self, reason: str) -> bool:
        with self._changed:
            self._dropped[reason] += 1
        return False

    def take(self, timeout: float) -> tuple[int, bytes] | None:
        """Give the next sample's slot and its values, part after part; None if none came within `timeout` seconds."""
        with self._changed:
            if not self._pending:
                self._changed.wait(timeout)
            if not self._pending:
                return None
            slot, arrays = self._pending.popleft()
            assert self.layout is not None
            self._pending_bytes -= self.layout.nbytes
        real = [dequantize(array, spec) for array, spec in zip(arrays, self._specs, strict=True)]
        return slot, b"".join(array.tobytes() for array in real)


def _quantized(spec: TensorSpec) -> bool:
    return spec.scale is not None and spec.zero_point is not None and np.dtype(spec.dtype).kind != "f"


class Recordable(Protocol):
    """What is needed of a pipeline."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """The model's inputs."""
        ...

    @property
    def model(self) -> ModelInfo:
        """The model."""
        ...

    def record(self, recorder: Recorder) -> bool:
        """Show all inputs to a recorder from now on; False if another one is there."""
        ...

    def stop_recording(self) -> None:
        """Show them to nobody."""
        ...

    def join(self, timeout: float | None) -> bool:
        """Say whether it has ended."""
        ...


def serve(
    request: Mapping[str, Any], peer: Peer, pipelines: Mapping[str, Recordable], where: Mapping[str, Any]
) -> None:
    """Answer a request for a capture: `recording`, `layout`, many `sample` and `progress`, `done`.

    `where` says which service this is. UsageError if the request asks for what is not there, UnavailableError if it cannot
    be had now, OSError when the caller is gone.
    """
    order = Order.read(request)
    name = request.get("pipeline")
    pipeline = pipelines.get(name) if isinstance(name, str) else None
    if pipeline is None:
        raise UsageError(f"the running service has no pipeline {name!r:.80}; it has: {', '.join(pipelines)}")
    if pipeline.join(0):
        raise UnavailableError(f"pipeline {name!r} has ended: its source has no more inputs")
    recorder = Recorder(pipeline.inputs, order)
    if not pipeline.record(recorder):
        raise UnavailableError(f"pipeline {name!r} is being recorded already; try again when that capture has ended")
    try:
        model = pipeline.model
        about = {"name": model.name, "version": model.version, "variant": model.variant, "signature": model.signature}
        peer.send({"type": "recording", "v": 1, "pipeline": name, "model": about, **where})
        _pass_on(recorder, pipeline, peer, order)
    finally:
        pipeline.stop_recording()


def _pass_on(recorder: Recorder, pipeline: Recordable, peer: Peer, order: Order) -> None:
    end = time.monotonic() + order.seconds
    next_progress = 0.0
    ended: str | None = None
    told = False
    while True:
        now = time.monotonic()
        sample = recorder.take(0 if ended else min(TICK_S, max(0.0, end - now)))
        if sample is not None:
            if not told and recorder.layout is not None:
                told = True
                peer.send({"type": "layout", **_described(recorder.layout)})
            peer.send({"type": "sample", "slot": sample[0]}, sample[1])
        elif ended is not None:
            break
        if recorder.error is not None:
            raise UnavailableError(f"recording failed: {type(recorder.error).__name__}: {recorder.error}")
        now = time.monotonic()
        if ended is None:
            ended = _ended(recorder, pipeline, peer, now >= end)
            if ended is not None:
                pipeline.stop_recording()
        if now >= next_progress:
            next_progress = now + PROGRESS_S
            peer.send({"type": "progress", "left_s": round(max(0.0, end - now), 1), **_counts(recorder)})
    peer.send({"type": "done", "ended": ended, **_counts(recorder)})


def _ended(recorder: Recorder, pipeline: Recordable, peer: Peer, late: bool) -> str | None:
    """Say why the recording is over; None while it is not."""
    if recorder.full:
        return "full"
    if late:
        return "time"
    if peer.left():
        return "asked"
    if peer.stopping:
        return "stopped"
    return "source" if pipeline.join(0) else None


def _counts(recorder: Recorder) -> dict[str, Any]:
    return {"seen": recorder.seen, "kept": recorder.kept, "dropped": recorder.dropped}


def _described(layout: Layout) -> dict[str, Any]:
    parts = [{"name": part.name, "dtype": part.dtype, "shape": list(part.shape)} for part in layout.parts]
    return {"parts": parts, "capacity": layout.capacity}
