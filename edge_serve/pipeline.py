"""The loop: take a frame, process it, run the model, decode, hand the result on, settle the frame. Nothing else."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from edge_serve.bundle import TensorSpec
from edge_serve.errors import EdgeServeError, InferenceError, InputError, StoppedError
from edge_serve.frame import Capture, Delivery, Frame, ModelInfo, Result, ResultError, Settle
from edge_serve.health import Counters
from edge_serve.mailbox import Mailbox
from edge_serve.model.engine import Engine
from edge_serve.processing.intake import Intake, Job
from edge_serve.runner import SinkRunner

if TYPE_CHECKING:
    from edge_serve.capture import Recorder
    from edge_serve.processing.decode import Decoder

log = logging.getLogger(__name__)

TICK_S = 0.5


class Pipeline:
    """The worker of one pipeline: owns the engine and runs it in one thread."""

    def __init__(
        self,
        name: str,
        device: str,
        model: ModelInfo,
        output_type: str,
        engine: Engine,
        intake: Intake,
        decode: Decoder,
        mailbox: Mailbox,
        sinks: Sequence[SinkRunner],
        counters: Counters,
        fatal: Callable[[BaseException], None],
        tune: Callable[[Engine], Engine] | None = None,
    ) -> None:
        self.name = name
        self.counters = counters
        self._device = device
        self._model = model
        self._type = output_type
        self._engine = engine
        self._intake = intake
        self._decode = decode
        self._mailbox = mailbox
        self._sinks = sinks
        self._fatal = fatal
        self._tune = tune
        self._tune_now = False
        self._recorder: Recorder | None = None
        self._recorder_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"worker.{name}", daemon=True)

    def start(self) -> None:
        """Start the worker."""
        self._thread.start()

    def warm(self) -> None:
        """Pay what only the first frame would cost otherwise; may run beside the worker."""
        self._intake.warm()

    def tune(self) -> None:
        """Let the worker measure how its model runs best, before its next frame."""
        self._tune_now = True

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Give the model's inputs by name."""
        return self._engine.inputs

    @property
    def model(self) -> ModelInfo:
        """Say which model it runs."""
        return self._model

    def record(self, recorder: Recorder) -> bool:
        """Show a recorder all inputs that the model runs on, from now on; False if another one is there."""
        with self._recorder_lock:
            if self._recorder is not None:
                return False
            self._recorder = recorder
            return True

    def stop_recording(self) -> None:
        """Show inputs to nobody any more."""
        with self._recorder_lock:
            self._recorder = None

    def join(self, timeout: float | None) -> bool:
        """Wait until the mailbox has ended and is worked off; False if `timeout` seconds were not enough."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            next_tick = 0.0
            while True:
                delivery = self._mailbox.take(TICK_S)
                if self._tune_now and self._tune is not None:
                    self._engine, self._tune = self._tune(self._engine), None
                if delivery is not None:
                    self._work(delivery)
                elif self._mailbox.drained:
                    break
                now = time.monotonic()
                if now >= next_tick:
                    self._intake.tick(now)
                    next_tick = now + TICK_S
        except BaseException as error:  # noqa: BLE001  # a worker that dies in silence would look like a quiet source
            self._fatal(error)

    def release(self, *, finished: bool) -> None:
        """Let go of unfinished windows (their samples come again, unless the source has `finished`) and of the model."""
        self._intake.close(None if finished else StoppedError("the service stopped inside a window"))
        self._engine.close()

    def _work(self, delivery: Delivery) -> None:
        frame = delivery.frame
        taken = time.monotonic()
        start = time.perf_counter()
        try:
            if frame.error is not None:
                raise frame.error
            jobs = self._intake.feed(delivery)
        except Exception as error:  # noqa: BLE001  # whatever one input does, the next one has nothing to do with it
            results = [self._failure(frame, error)]
            settles: list[Settle] = [delivery.settle]
        else:
            processed = (time.perf_counter() - start) * 1e3
            wait = max(0.0, (taken - frame.captured.monotonic) * 1e3) if frame.captured.by == "arrival" else 0.0
            results = [self._result(job, wait, processed) for job in jobs]
            settles = [job.settle for job in jobs]
        if delivery.reply is not None:
            delivery.reply(results)
        for result, settle in zip(results, settles, strict=True):
            self._send(result, settle)

    def _result(self, job: Job, wait: float, processed: float) -> Result:
        try:
            start = time.perf_counter()
            outputs = self._engine.run(job.inputs)
            invoked = time.perf_counter()
            decoded = self._decode(outputs, job.geometry)
            done = time.perf_counter()
        except Exception as error:  # noqa: BLE001  # as above
            return self._failure(job.frame, error, job)
        if (recorder := self._recorder) is not None:
            recorder.offer(job.inputs)
        timings = {
            "wait": wait,
            "process": processed,
            "invoke": (invoked - start) * 1e3,
            "decode": (done - invoked) * 1e3,
        }
        return self._make(job.frame, job, decoded=decoded, outputs=outputs, timings=timings)

    def _failure(self, frame: Frame, error: Exception, job: Job | None = None) -> Result:
        if isinstance(error, (InputError, InferenceError)):
            reason = ResultError(error.code, str(error))
        else:
            code = error.code if isinstance(error, EdgeServeError) else "internal"
            reason = ResultError(code, f"{type(error).__name__}: {error}")
            log.error("%s: frame %s: unexpected error", self.name, frame.id, exc_info=error)
        self.counters.failed(reason.code)
        log.debug("%s: frame %s: %s", self.name, frame.id, reason.message)
        return self._make(frame, job, error=reason)

    def _make(self, frame: Frame, job: Job | None, **fields: object) -> Result:
        return Result(
            frame_id=frame.id,
            device=self._device,
            pipeline=self.name,
            source=frame.source,
            captured=frame.captured,
            model=self._model,
            type=self._type,
            key=job.key if job is not None else None,
            window=job.window if job is not None else None,
            **{"decoded": None, **fields},  # type: ignore[arg-type]  # exactly Result's remaining fields
        )

    def _send(self, result: Result, settle: Settle) -> None:
        whole = _Outcome(len(self._sinks), settle, result.captured, self.counters)
        if not self._sinks:
            whole.finish()
        for sink in self._sinks:
            sink.submit(result, whole.one)


class _Outcome:
    """Joins the outcomes of one result at several sinks: it is safe when all have it."""

    __slots__ = ("_captured", "_counters", "_error", "_left", "_lock", "_settle")

    def __init__(self, sinks: int, settle: Settle, captured: Capture, counters: Counters) -> None:
        self._left = sinks
        self._settle = settle
        self._captured = captured
        self._counters = counters
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def one(self, error: Exception | None) -> None:
        """Note the outcome at one sink."""
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            last = self._left == 0
        if last:
            self.finish()

    def finish(self) -> None:
        """Settle the input."""
        if self._error is None:
            self._counters.went_out((time.monotonic() - self._captured.monotonic) * 1e3)
        self._settle(self._error)
