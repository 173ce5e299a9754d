"""Builds everything from a Config, starts it and stops it; the only place that wires."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from edge_serve import plugins
from edge_serve.config import Config, PipelineConfig
from edge_serve.config import load as load_config
from edge_serve.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_UNAVAILABLE,
    ConfigError,
    GoneError,
    Problem,
    UnavailableError,
    UsageError,
)
from edge_serve.health import Counters
from edge_serve.mailbox import Mailbox
from edge_serve.model import threads
from edge_serve.model.engine import Engine, with_best_threads
from edge_serve.model.interpreter import Runtime, load_runtime
from edge_serve.model.repository import ModelVersion, find
from edge_serve.pipeline import Pipeline
from edge_serve.processing.setup import Meaning, model_info, settle
from edge_serve.runner import SinkRunner, SourceRunner
from edge_serve.sinks import SinkContext
from edge_serve.sources import SourceContext

if TYPE_CHECKING:
    from edge_serve.control import Control, Peer

log = logging.getLogger(__name__)

# How long the start waits for connections before it says that it goes on without them.
CONNECT_NOTICE_S = 5.0
POLL_S = 0.2


def load(path: Path) -> Config:
    """Read a configuration with the options of all known parts."""
    return load_config(path, plugins.load)


def find_model(config: Config, pipeline: PipelineConfig) -> ModelVersion:
    """Find and check the model version that a pipeline names."""
    model = pipeline.model
    return find(
        config.resolve(model.model),
        "latest" if model.version is None else model.version,
        version_labels=model.version_labels,
        variant=model.variant,
    )


def open_engine(
    config: Config, pipeline: PipelineConfig, version: ModelVersion, runtime: Runtime, number: int = 1
) -> tuple[Engine, Meaning]:
    """Load a pipeline's model on a number of threads and settle what its tensors mean."""
    model = pipeline.model
    delegate = model.delegate or "auto"
    engine = Engine.open(version.file, runtime=runtime, delegate=delegate, threads=number, signature=model.signature)
    return engine, settle(version, engine, pipeline.input, pipeline.output, config.path.parent)


def choose_threads(
    config: Config, pipeline: PipelineConfig, version: ModelVersion, runtime: Runtime
) -> tuple[int, Callable[[Engine], Engine] | None]:
    """Give the threads to begin with: as configured, else as measured before, else 1 and what measures them.

    Measuring waits until the pipeline is ready: it is done once for each model and board, and no start waits for it.
    """
    model, delegate = pipeline.model, pipeline.model.delegate or "auto"
    if model.threads:
        return model.threads, None
    name = threads.key(version.file, runtime, delegate, model.signature)
    known = threads.recall(config.state_dir, name)
    if known:
        return known, None

    def measure(engine: Engine) -> Engine:
        best = with_best_threads(engine, runtime, delegate)
        threads.remember(config.state_dir, name, best.threads)
        log.info("%s: measured: runs best on %d thread%s", pipeline.name, best.threads, "s"[: best.threads != 1])
        return best

    return 1, measure


@dataclass(slots=True)
class Line:
    """One pipeline with all its parts."""

    name: str
    pipeline: Pipeline
    mailbox: Mailbox
    source: SourceRunner
    sinks: list[SinkRunner]
    counters: Counters
    summary: str


def build(config: Config, pipeline: PipelineConfig, runtime: Runtime, fatal: Callable[[BaseException], None]) -> Line:
    """Make the parts of a pipeline, nothing of it started. UsageError names the pipeline and what is wrong."""
    try:
        version = find_model(config, pipeline)
        number, tune = choose_threads(config, pipeline, version, runtime)
        engine, meaning = open_engine(config, pipeline, version, runtime, number)
        counters = Counters()
        info = model_info(version, engine)
        decoder = meaning.decoder(engine)

        def describe() -> dict[str, Any]:
            return {
                "device": config.device,
                "pipeline": pipeline.name,
                "model": {
                    "name": info.name,
                    "version": info.version,
                    "variant": info.variant,
                    "delegate": info.delegate,
                },
                "signature": info.signature,
                "inputs": {
                    name: {"dtype": spec.dtype, "shape": list(spec.shape)} for name, spec in engine.inputs.items()
                },
                "outputs": {
                    name: {"dtype": spec.dtype, "shape": list(spec.shape)} for name, spec in engine.outputs.items()
                },
                "input": {"kind": meaning.input.kind},
                "output": {"type": meaning.output.type},
            }

        window = 0
        if meaning.input.kind == "window":
            window = int(getattr(meaning.intake(engine, counters, None), "length", 0))
        source_context = SourceContext(config, pipeline.name, counters, describe, window)
        source = plugins.load("sources", pipeline.source.type)(pipeline.source.options, source_context)
        intake = meaning.intake(engine, counters, source.hold_limit)
        mailbox = Mailbox(source.policy, counters)
        sinks = [
            SinkRunner(
                f"{pipeline.name}.{part.type}" if len(pipeline.sinks) > 1 else pipeline.name,
                plugins.load("sinks", part.type)(part.options, SinkContext(config, pipeline.name, counters, number)),
                counters,
                fatal,
            )
            for number, part in enumerate(pipeline.sinks)
        ]
        worker = Pipeline(
            pipeline.name,
            config.device,
            info,
            meaning.output.type or "tensor",
            engine,
            intake,
            decoder,
            mailbox,
            sinks,
            counters,
            fatal,
            tune,
        )
    except UsageError as error:
        raise ConfigError(str(config.path), [Problem(pipeline.key, f"pipeline {pipeline.name!r}: {error}")]) from error
    cores = "1 thread" if engine.threads == 1 else f"{engine.threads} threads"
    which = f" version {info.version}" if info.version is not None else ""
    summary = (
        f"model {info.name}{which} ({info.variant}) on {info.delegate} "
        f"({engine.claims.taken} of {engine.claims.total} operators), {cores}, {runtime.name}"
    )
    return Line(
        pipeline.name,
        worker,
        mailbox,
        SourceRunner(pipeline.name, source, mailbox, counters, fatal),
        sinks,
        counters,
        summary,
    )


class App:
    """A running configuration."""

    def __init__(self, config: Config, on_ready: Callable[[], None] | None = None) -> None:
        self.config = config
        self.lines: list[Line] = []
        self._wake = threading.Event()
        self._signal: int | None = None
        self._failure: BaseException | None = None
        self._on_ready = on_ready
        self._control: Control | None = None

    def _fatal(self, error: BaseException) -> None:
        if isinstance(error, GoneError):
            log.error("stopping: %s", error)
        else:
            log.critical("a thread failed: %s: %s", type(error).__name__, error, exc_info=error)
        self._failure = error
        self._wake.set()

    def stop(self, number: int = signal.SIGTERM, _frame: FrameType | None = None) -> None:
        """Ask for the end, as a signal does; a second time ends the process at once."""
        if self._signal is not None and threading.current_thread() is threading.main_thread():
            raise SystemExit(128 + number)
        self._signal = number
        self._wake.set()

    def run(self) -> int:
        """Load all models, start all pipelines and serve until a signal, or until all finite sources have ended.

        Gives the exit code. Raises UsageError if a model cannot be used; nothing is started then.
        """
        begun = time.monotonic()
        # Starting makes many objects and no garbage worth looking for.
        gc.disable()
        runtime = load_runtime(self.config.runtime)
        self.lines = [build(self.config, pipeline, runtime, self._fatal) for pipeline in self.config.pipelines]
        for line in self.lines:
            line.pipeline.start()
            for sink in line.sinks:
                sink.start()
            line.source.start()
        self._await_connections()
        for line in self.lines:
            state = "ready" if self._connected(line) else "ready, but not connected yet"
            log.info("%s: %s: %s", line.name, state, line.summary)
        if self._on_ready is not None:
            self._on_ready()
        log.info(
            "started in %.2f s: %d pipeline%s", time.monotonic() - begun, len(self.lines), "s"[: len(self.lines) != 1]
        )
        for line in self.lines:
            line.pipeline.warm()
            line.pipeline.tune()
        self._listen_to_commands()
        # What the start has made stays; the collector need not look at it again.
        gc.collect()
        gc.freeze()
        gc.enable()
        while not self._wake.wait(POLL_S):
            if all(line.pipeline.join(0) for line in self.lines):
                break
        return self._end()

    def _listen_to_commands(self) -> None:
        """Let local commands reach this service; nothing that is served depends on it."""
        from edge_serve.control import Control  # no start waits for it

        try:
            self._control = Control(self.config.state_dir, {"capture": self._capture})
        except UnavailableError as error:
            log.warning("no local commands (`edge-serve capture`): %s", error)

    def _capture(self, request: dict[str, Any], peer: Peer) -> None:
        from edge_serve import capture  # only where somebody records

        where = {"device": self.config.device, "config": str(self.config.path), "pid": os.getpid()}
        capture.serve(request, peer, {line.name: line.pipeline for line in self.lines}, where)

    def _connected(self, line: Line) -> bool:
        # A finite source may have come and gone already.
        source = line.source.connected.is_set() or line.pipeline.join(0)
        return source and all(sink.connected.is_set() for sink in line.sinks)

    def _await_connections(self) -> None:
        deadline = time.monotonic() + CONNECT_NOTICE_S
        for line in self.lines:
            for each in (line.source.connected, *(sink.connected for sink in line.sinks)):
                while time.monotonic() < deadline and not self._wake.is_set() and not each.wait(0.01):
                    pass

    def _end(self) -> int:
        """Stop in order: sources stop reading, workers drain, sinks flush, sources close."""
        finished = self._signal is None and self._failure is None
        # After a failure nothing can be finished; what was not acknowledged comes again.
        grace = self.config.grace_s if self._failure is None else 0.0
        deadline = time.monotonic() + grace
        if not finished and self._failure is None:
            log.info("stopping: frames in work get %g s to finish", grace)
        if self._control is not None:
            self._control.close()
        for line in self.lines:
            if not finished:
                # Nothing more comes in; what was taken is worked off.
                line.source.stop_reading(deadline)
                line.mailbox.end()
        for line in self.lines:
            if not line.pipeline.join(None if finished else max(0.0, deadline - time.monotonic())):
                log.warning("%s: frames in work were not finished within %g s", line.name, grace)
                line.mailbox.close()
        lost = self._flush(finished, deadline)
        for line in self.lines:
            line.pipeline.release(finished=finished)
            line.source.close()
            log.info("%s: %s", line.name, _account(line.counters.snapshot()))
        if self._failure is not None or lost:
            return EXIT_UNAVAILABLE
        return EXIT_INTERRUPTED if self._signal == signal.SIGINT else EXIT_OK

    def _flush(self, finished: bool, deadline: float) -> int:
        """Send what is left; gives how many results stay unsent whose inputs do not come again."""
        lost = 0
        for line in self.lines:
            for sink in line.sinks:
                # Inputs from files do not come again: their results wait for upstream, or for a signal.
                while finished and not self._wake.is_set() and not sink.idle(POLL_S):
                    pass
                limit = (
                    deadline if not finished else time.monotonic() + (self.config.grace_s if self._wake.is_set() else 0)
                )
                left = sink.stop(limit)
                if left:
                    log.warning("%s: %d results are not upstream; their inputs were not acknowledged", line.name, left)
                lost += left if line.source.exhausted.is_set() else 0
        return lost


def _account(counts: dict[str, Any]) -> str:
    parts = [f"{counts['in']} in", f"{counts['out']} out"]
    parts += [f"{number} {code}" for code, number in counts["errors"].items()]
    parts += [f"{number} dropped ({reason})" for reason, number in counts["dropped"].items()]
    parts += [f"{counts[key]} {key.replace('_', ' ')}" for key in ("settled_early", "retried") if counts[key]]
    return ", ".join(parts)
