"""The loop: take a frame, process it, run the model, decode, hand the result on, settle the frame. Nothing else."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_serve import watchdog
from edge_serve.bundle import TensorSpec
from edge_serve.errors import EdgeServeError, InferenceError, InputError, StoppedError
from edge_serve.frame import Capture, Delivery, Frame, ModelInfo, Result, ResultError, Settle
from edge_serve.health import Counters
from edge_serve.mailbox import Mailbox
from edge_serve.model.resilient import ResilientEngine
from edge_serve.processing.intake import Intake, Job
from edge_serve.quarantine import Guard
from edge_serve.runner import SinkRunner

if TYPE_CHECKING:
    from edge_serve.capture import Recorder
    from edge_serve.processing.decode import Decoder

log = logging.getLogger(__name__)

TICK_S = 0.5
# An input that takes no longer is worked on in the thread that it came by, if that does not wait for anything: handing it to
# another thread would cost more. A thread that serves a network must not be away for longer.
QUICK_S = 0.0005
# So many quick inputs in a row are believed; one slow one is enough for the opposite.
QUICK_RUNS = 16


@dataclass(slots=True, eq=False)
class Worker:
    """What one thread needs to work on inputs. An engine runs in one thread at a time."""

    engine: ResilientEngine
    intake: Intake
    decode: Decoder
    guard: Guard
    model: ModelInfo
    """Which model its results are of; says what runs now."""
    beat: watchdog.Heartbeat | None = None
    thread: int = 0
    """The thread (threading.get_ident) that the guard knows as working here."""


class Pipeline:
    """The workers of one pipeline: each owns an engine and runs it in one thread, its own or a quick source's."""

    def __init__(
        self,
        name: str,
        device: str,
        output_type: str,
        workers: Sequence[Worker],
        mailbox: Mailbox,
        sinks: Sequence[SinkRunner],
        counters: Counters,
        fatal: Callable[[BaseException], None],
        error_payload_bytes: int = 0,
    ) -> None:
        """With several workers inputs are worked on side by side, and results leave as they are done."""
        self.name = name
        self.counters = counters
        self._device = device
        self._type = output_type
        self._first = workers[0]
        self._workers = workers
        self._mailbox = mailbox
        self._sinks = sinks
        self._fatal = fatal
        self._excerpt = error_payload_bytes
        self.silence_s = watchdog.SILENCE_S
        """How long one run of the model may take before the worker counts as stuck."""
        self._quick = 0
        """How many inputs in a row were quick."""
        if len(self._workers) == 1:
            mailbox.helper = self._help
        self._recorder: Recorder | None = None
        self._recorder_lock = threading.Lock()
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(worker,),
                name=f"worker.{name}.{number}" if number else f"worker.{name}",
                daemon=True,
            )
            for number, worker in enumerate(self._workers)
        ]

    def start(self) -> None:
        """Start the workers."""
        for thread in self._threads:
            thread.start()

    def warm(self) -> None:
        """Pay what only the first frame would cost otherwise; may run beside the worker."""
        for worker in self._workers:
            worker.intake.warm()

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Give the model's inputs by name."""
        return self._first.engine.inputs

    @property
    def model(self) -> ModelInfo:
        """Say which model it runs, and what it runs on now."""
        return self._first.model

    @property
    def troubles(self) -> list[str]:
        """Say of each worker that does not run on what it should why it does not."""
        return list(dict.fromkeys(said for worker in self._workers if (said := worker.engine.trouble) is not None))

    @property
    def accelerators(self) -> set[str]:
        """Name the delegates that nobody else may have while its workers run on them."""
        return {held for worker in self._workers if (held := worker.engine.holds) is not None}

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
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, worker: Worker) -> None:
        beat = worker.beat = watchdog.begin(threading.current_thread().name, self.silence_s)
        mailbox = self._mailbox
        try:
            next_tick = 0.0
            while True:
                delivery = mailbox.take(TICK_S)
                beat.tick()
                if delivery is not None:
                    self._work(worker, delivery)
                    mailbox.worked()
                elif mailbox.drained:
                    break
                now = time.monotonic()
                if now >= next_tick:
                    worker.intake.tick(now)
                    next_tick = now + TICK_S
        except BaseException as error:  # noqa: BLE001  # a worker that dies in silence would look like a quiet source
            self._fatal(error)
        finally:
            beat.end()

    def _help(self, deliveries: Sequence[Delivery]) -> int:
        """Work in the calling thread, which serves a source, as long as it is quick and nothing has to be waited for."""
        if not self._may_help() or not self._mailbox.claim():
            return 0
        self.counters.came_in(len(deliveries))
        done = 0
        try:
            for delivery in deliveries:
                if done and not self._may_help():
                    break
                done += 1
                self._work(self._first, delivery, wait=False)
        except BaseException as error:
            self._fatal(error)
            raise
        finally:
            self._mailbox.release()
        if done < len(deliveries):
            self.counters.came_in(done - len(deliveries))  # the others come in by the mailbox
        return done

    def _may_help(self) -> bool:
        # A delegate in a process of its own may hang, and a thread that serves a network must not.
        if self._quick < QUICK_RUNS or self._first.guard.wary or not self._first.engine.in_process:
            return False
        return all([sink.ready for sink in self._sinks])  # noqa: C419  # mostly one, for which a generator costs more

    def release(self, *, finished: bool) -> None:
        """Let go of unfinished windows (their samples come again, unless the source has `finished`) and of the model."""
        for worker in self._workers:
            worker.intake.close(None if finished else StoppedError("the service stopped inside a window"))
            worker.engine.close()
            worker.guard.close()

    def _work(self, worker: Worker, delivery: Delivery, *, wait: bool = True) -> None:
        if worker.thread != (thread := threading.get_ident()):
            worker.thread = thread
            worker.guard.attach()
        frame = delivery.frame
        taken = time.monotonic()
        start = time.perf_counter()
        try:
            if frame.error is not None:
                raise frame.error
            worker.guard.enter(frame.id, frame.payload)
            jobs = worker.intake.feed(delivery)
        except Exception as error:  # noqa: BLE001  # whatever one input does, the next one has nothing to do with it
            results = [self._failure(worker, frame, error)]
            settles: list[Settle] = [delivery.settle]
        else:
            processed = (time.perf_counter() - start) * 1e3
            waited = max(0.0, (taken - frame.captured.monotonic) * 1e3) if frame.captured.by == "arrival" else 0.0
            results = []
            for nth, job in enumerate(jobs):
                results.append(self._result(worker, job, waited, processed))
                if job.error is None and job.window is not None and results[nth].quarantined:
                    worker.intake.spoil(jobs, nth)
            settles = [job.settle for job in jobs]
        worker.guard.leave()
        if delivery.reply is not None:
            delivery.reply(results)
        for result, settle in zip(results, settles, strict=True):
            self._send(result, settle, wait)
        self._quick = self._quick + 1 if time.perf_counter() - start < QUICK_S else 0

    def _result(self, worker: Worker, job: Job, waited: float, processed: float) -> Result:
        if worker.beat is not None:
            worker.beat.tick()  # one payload may complete many windows
        try:
            if job.error is not None:
                raise job.error
            if job.window is not None:
                # Until here the last sample was marked; from here on all of the window is to blame.
                worker.guard.enter(job.frame.id, next(iter(job.inputs.values())))
            start = time.perf_counter()
            outputs = worker.engine.run(job.inputs)
            invoked = time.perf_counter()
            decoded = worker.decode(outputs, job.geometry)
            done = time.perf_counter()
        except Exception as error:  # noqa: BLE001  # as above
            return self._failure(worker, job.frame, error, job)
        if (recorder := self._recorder) is not None:
            recorder.offer(job.inputs)
        timings = {
            "wait": waited,
            "process": processed,
            "invoke": (invoked - start) * 1e3,
            "decode": (done - invoked) * 1e3,
        }
        frame = job.frame
        return Result(
            frame.id,
            self._device,
            self.name,
            frame.source,
            frame.captured,
            worker.model,
            self._type,
            decoded,
            outputs,
            timings,
            job.key,
            job.window,
        )

    def _failure(self, worker: Worker, frame: Frame, error: Exception, job: Job | None = None) -> Result:
        if isinstance(error, (InputError, InferenceError)):
            reason = ResultError(error.code, str(error), self._beginning(frame))
        else:
            code = error.code if isinstance(error, EdgeServeError) else "internal"
            reason = ResultError(code, f"{type(error).__name__}: {error}", self._beginning(frame))
            log.error("%s: frame %s: unexpected error", self.name, frame.id, exc_info=error)
        self.counters.failed(reason.code)
        log.debug("%s: frame %s: %s", self.name, frame.id, reason.message)
        return Result(
            frame.id,
            self._device,
            self.name,
            frame.source,
            frame.captured,
            worker.model,
            self._type,
            None,
            key=job.key if job is not None else None,
            window=job.window if job is not None else None,
            error=reason,
        )

    def _beginning(self, frame: Frame) -> bytes | None:
        """Give as much of the payload as error results shall carry."""
        if not self._excerpt or frame.error is not None:
            return None
        payload = frame.payload
        if hasattr(payload, "reshape"):  # an array, of which no more than that is copied
            payload = payload.reshape(-1)[: self._excerpt].tobytes()
        return bytes(payload[: self._excerpt])

    def _send(self, result: Result, settle: Settle, wait: bool) -> None:
        whole = _Outcome(len(self._sinks), settle, result.captured, self.counters)
        if not self._sinks:
            whole.finish()
        for sink in self._sinks:
            sink.submit(result, whole.one, wait=wait)


class _Outcome:
    """Joins the outcomes of one result at several sinks: it is safe when all have it."""

    __slots__ = ("_captured", "_counters", "_error", "_left", "_lock", "_settle")

    def __init__(self, sinks: int, settle: Settle, captured: Capture, counters: Counters) -> None:
        self._left = sinks
        self._settle = settle
        self._captured = captured
        self._counters = counters
        self._error: Exception | None = None
        self._lock = threading.Lock() if sinks > 1 else None

    def one(self, error: Exception | None) -> None:
        """Note the outcome at one sink."""
        if self._lock is None:
            self._error = error
        else:
            with self._lock:
                self._left -= 1
                self._error = self._error or error
                if self._left:
                    return
        self.finish()

    def finish(self) -> None:
        """Settle the input."""
        if self._error is None:
            self._counters.went_out((time.monotonic() - self._captured.monotonic) * 1e3)
        self._settle(self._error)
