"""Starts a configuration, looks after it while it runs, reads it again when asked, and ends it; the only place that wires."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from edge_serve import plugins, watchdog
from edge_serve.config import Config, PipelineConfig
from edge_serve.config import load as load_config
from edge_serve.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_UNAVAILABLE,
    DelegateAwayError,
    EdgeServeError,
    GoneError,
    StoppedError,
    UnavailableError,
    UsageError,
)
from edge_serve.health import Counters
from edge_serve.instance import Instance
from edge_serve.line import Line, build, delegate_of, drain, find_model, flush, open_engine, release
from edge_serve.model.interpreter import Runtime, load_runtime
from edge_serve.notify import Notifier
from edge_serve.quarantine import Quarantine, runtime_folder
from edge_serve.spool.spooler import Spool

if TYPE_CHECKING:
    from edge_serve.control import Control, Peer
    from edge_serve.health import Trouble
    from edge_serve.reload import Plan
    from edge_serve.status import Publisher, Reporter

__all__ = ["App", "find_model", "load", "open_engine"]

log = logging.getLogger(__name__)

# How long the start waits for connections before it says that it goes on without them.
CONNECT_NOTICE_S = 5.0
# Connections that come at all mostly come at once; what else there is to start can wait for so long.
QUICK_S = 0.5
CONNECT_POLL_S = 0.01
POLL_S = 0.2
# How often the main thread looks at all others, and at how the service is.
LOOK_S = 1.0
# How long the end waits at least for a reload that is under way.
RELOAD_END_S = 2.0


def load(path: Path) -> Config:
    """Read a configuration with the options of all known parts."""
    return load_config(path, plugins.load)


class App:
    """A running configuration."""

    def __init__(self, config: Config, on_ready: Callable[[], None] | None = None) -> None:
        self.config = config
        self.lines: list[Line] = []
        self._wake = threading.Event()
        self._signal: int | None = None
        self._failure: BaseException | None = None
        self._on_ready = on_ready
        self._runtime: Runtime | None = None
        self._instance: Instance | None = None
        self._quarantine = Quarantine()
        self._spool = Spool(config.state_dir, config.spool)
        self._control: Control | None = None
        self._reporter: Reporter | None = None
        self._publisher: Publisher | None = None
        self._notifier = Notifier()
        self._watch = watchdog.Watch()
        self._next_look = 0.0
        self._next_ping = 0.0
        self._said: tuple[str, ...] = ()
        self._hangup = False
        # Why the last reload was refused.
        self._refused: str | None = None
        self._reloading = threading.Lock()
        self._told: tuple[object, ...] = ()

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

    def hang_up(self, _number: int = signal.SIGHUP, _frame: FrameType | None = None) -> None:
        """Ask for a reload, as a signal does."""
        self._hangup = True

    def run(self) -> int:
        """Load all models, start all pipelines and serve until a signal, or until all finite sources have ended.

        Gives the exit code. Raises UsageError if a model cannot be used, UnavailableError if another service has the state
        folder; nothing is started then.
        """
        begun = time.monotonic()
        # Starting makes many objects and no garbage worth looking for.
        gc.disable()
        self._claim()
        try:
            self._start(begun)
            while not self._wake.wait(POLL_S):
                self._tend()
                # While a reload is under way, pipelines end and others have not begun.
                if not self._reloading.locked() and all(line.ended for line in self.lines):
                    break
            return self._end()
        except StoppedError as error:
            # Nothing serves yet: there is nothing to drain.
            log.info("stopped before the start was done: %s", error)
            for line in self.lines:
                line.pipeline.release(finished=False)
            return EXIT_INTERRUPTED if self._signal == signal.SIGINT else EXIT_OK
        finally:
            self._quarantine.close()
            self._spool.close()
            if self._instance is not None:
                self._instance.close()

    def _claim(self) -> None:
        """Refuse to run beside another service with the same state folder."""
        try:
            self._instance = Instance(self.config.state_dir)
        except OSError as error:
            log.warning(
                "%s: cannot be written (%s): no local commands (`edge-serve status`, reload, capture), and nothing "
                "outlasts a restart; give a state_dir that can",
                self.config.state_dir,
                error.strerror or error,
            )

    def _start(self, begun: float) -> None:
        self._runtime = load_runtime(self.config.runtime)
        self._quarantine = Quarantine.open(runtime_folder(self.config.state_dir))
        for pipeline in self.config.pipelines:
            self._notifier.loading(pipeline.name, watchdog.LOAD_SILENCE_S)
            self.lines.append(self._build(self.config, pipeline))
        if self.config.spool.enabled:
            self._spool.start(self._fatal)
        for line in self.lines:
            line.start()
        self._notifier.ready(self._summary())
        if not self._await_connections(begun, QUICK_S):
            # Whoever is away may stay so for long: nobody else waits for that.
            self._open_up()
            self._await_connections(begun, CONNECT_NOTICE_S)
        for line in self.lines:
            state = "ready" if line.connected else "ready, but not connected yet"
            log.info("%s: %s: %s", line.name, state, line.summary)
        if self._on_ready is not None:
            self._on_ready()
        log.info("started in %.2f s: %s", time.monotonic() - begun, self._summary())
        for line in self.lines:
            line.settle_in()
        self._open_up()
        # What the start has made stays; the collector need not look at it again.
        gc.collect()
        gc.freeze()
        gc.enable()

    def _summary(self) -> str:
        return f"{len(self.lines)} pipeline{'s'[: len(self.lines) != 1]}"

    def _await_connections(self, begun: float, seconds: float) -> bool:
        """Wait until all is connected, but not longer than until `seconds` after the begin; says whether it is."""
        waiting = [line.source.connected for line in self.lines]
        waiting += [sink.connected for line in self.lines for sink in line.sinks]
        for each in waiting:
            while not each.is_set() and not self._wake.is_set():
                if time.monotonic() >= begun + seconds:
                    return False
                each.wait(CONNECT_POLL_S)
                self._tend()
        return True

    def _open_up(self) -> None:
        """Let local commands and the status topic reach this service; nothing that is served depends on them."""
        if self._reporter is not None:
            return
        from edge_serve.diagnosis import Diagnosis  # no start waits for these
        from edge_serve.health import Health
        from edge_serve.status import Reporter

        assert self._runtime is not None
        spool, lines = self._spool, lambda: self.lines
        diagnosis = Diagnosis(self.config.state_dir, lines, spool.status, self._own_troubles)
        self._reporter = Reporter(self.config.device, self._runtime.name, Health(diagnosis), lines, spool.status)
        self._publish_status()
        if self._instance is None:
            return
        from edge_serve.control import Control

        commands = {"capture": self._capture, "status": self._tell_status, "reload": self._reload_as_asked}
        try:
            self._control = Control(self.config.state_dir, commands)
        except UnavailableError as error:
            log.warning("no local commands (`edge-serve status`, reload, capture): %s", error)

    def _publish_status(self) -> None:
        from edge_serve.reload import told

        self._told = told(self.config)
        if self.config.has_status and self._reporter is not None:
            from edge_serve.status import Publisher

            self._publisher = Publisher(self.config, self._reporter)
            self._publisher.start()

    def _capture(self, request: dict[str, Any], peer: Peer) -> None:
        from edge_serve import capture  # only where somebody records

        where = {"device": self.config.device, "config": str(self.config.path), "pid": os.getpid()}
        capture.serve(request, peer, {line.name: line.pipeline for line in self.lines}, where)

    def _tell_status(self, _request: dict[str, Any], peer: Peer) -> None:
        assert self._reporter is not None  # it was there before the control socket
        document = self._reporter.document()
        peer.send(
            {"type": "status", "pid": os.getpid(), "config": str(self.config.path)}, json.dumps(document).encode()
        )

    # What the main thread does while others serve.

    def _tend(self) -> None:
        """Look after the threads, tell the supervisor, and begin the reload that a signal has asked for."""
        now = time.monotonic()
        if self._hangup and self._reporter is not None:
            self._hangup = False
            threading.Thread(target=self._reload_for_signal, name="reload", daemon=True).start()
        ping_s = self._notifier.ping_s
        ping = ping_s is not None and now >= self._next_ping
        if not ping and now < self._next_look:
            return
        self._next_look = now + LOOK_S
        silent, new = self._watch.look()
        for beat in new:
            log.critical(
                "thread %s has given no sign of life for %.0f s (%g are usual); it stands here:\n%s",
                beat.name,
                beat.silence(),
                beat.allowed,
                watchdog.stack(beat.thread),
            )
        if ping and not silent:
            # Only here, only now: this thread and all others have been seen to go on.
            self._notifier.ping()
            self._next_ping = now + (ping_s or 0.0)
        self._look_at_health()

    def _look_at_health(self) -> None:
        if self._reporter is None:
            return
        troubles = self._reporter.health.look()
        keys = tuple(each.key for each in troubles)
        if keys == self._said:
            return
        for each in troubles:
            if each.key not in self._said and not each.logged:
                log.warning("%s", each.text)
        self._said = keys
        state = self._reporter.health.state[0]
        self._notifier.status(f"{state}: {troubles[0].text if troubles else self._summary()}")

    def _own_troubles(self) -> list[Trouble]:
        """Give what only the whole service knows: inputs that crash, results that nothing sends, a reload that failed."""
        from edge_serve.health import Trouble

        troubles = list(self._quarantine.troubles())
        for key, items in self._left_behind().items():
            text = (
                f"{items} results wait in the spool for {key}, which the configuration does not name: name it again to send "
                "them, or take them out with `edge-serve spool export` and `purge`"
            )
            troubles.append(Trouble(f"spool.left.{key}", text))
        if self._refused is not None:
            text = f"the configuration on disk is not what runs, and the next start may fail: {self._refused}; mend it and reload"
            troubles.append(Trouble("reload.refused", text, degrades=False, logged=True))
        return troubles

    def _left_behind(self) -> dict[str, int]:
        """Count what waits for sinks that are not named any more."""
        from edge_serve.spill import keys

        return self._spool.left_behind(keys(self.config)) if self._spool.left_behind(()) else {}

    # Reading the configuration again.

    def _reload_for_signal(self) -> None:
        try:
            self.reload()
        except EdgeServeError as error:
            self._refused = str(error)
            log.error("the configuration is not reloaded, the old one goes on: %s", error)
        except BaseException as error:  # noqa: BLE001  # half of a reload would go on in silence
            self._fatal(error)

    def _reload_as_asked(self, request: dict[str, Any], peer: Peer) -> None:
        asked = request.get("config")
        if asked is not None and asked != os.path.realpath(self.config.path):
            raise UsageError(f"this service runs with {self.config.path}, not with {asked!s:.500}")
        try:
            done = self.reload()
        except EdgeServeError as error:
            self._refused = str(error)
            log.error("the configuration is not reloaded, the old one goes on: %s", error)
            raise
        except BaseException as error:
            self._fatal(error)
            raise
        peer.send({"type": "reload", "pid": os.getpid(), "summary": str(done), **done.document()})

    def reload(self) -> Plan:
        """Read the configuration again and make of the service what it says; gives what was done.

        Models of new and changed pipelines are loaded before anything stops. A changed pipeline then finishes what it has,
        and the new one goes on in the same session, so nothing is lost and nothing overtakes. Raises an EdgeServeError, and
        has changed nothing, if the configuration or a model cannot be used, or if something is asked for that needs a
        restart. An accelerator that only one process may have goes from the old pipeline to the new one, so that its model is
        loaded when the old one has ended; if it cannot be, the old one is made again.
        """
        if not self._reloading.acquire(blocking=False):
            raise UnavailableError("a reload is under way already; try again when it is done")
        beat = watchdog.begin("reload", watchdog.LOAD_SILENCE_S)
        try:
            self._notifier.reloading()
            done = self._reload(beat)
            self._refused = None
            return done
        finally:
            beat.end()
            self._reloading.release()
            self._notifier.ready(self._summary())

    def _reload(self, beat: watchdog.Heartbeat) -> Plan:
        from edge_serve import reload

        config = load(self.config.path)
        plan = reload.plan(self.config, config, self.lines, self._told)
        counted = {line.name: line.counters for line in self.lines}
        made: dict[str, Line] = {}
        leaving = [*plan.removed, *(line for line in self.lines if line.name in plan.changed)]
        late: list[PipelineConfig] = []
        drained = False
        try:
            for pipeline in config.pipelines:
                if pipeline.name in plan.made:
                    beat.tick()
                    line = self._build_early(config, pipeline, counted.get(pipeline.name), leaving)
                    if line is None:
                        late.append(pipeline)
                    else:
                        made[line.name] = line
            self._go_on()
            log.info("reload: %s", plan)
            drain(leaving, time.monotonic() + self.config.grace_s)
            drained = True
            for pipeline in late:
                beat.tick()
                made[pipeline.name] = self._build(config, pipeline, counted.get(pipeline.name))
            self._go_on()
        except EdgeServeError:
            for line in made.values():
                line.pipeline.release(finished=False)
            if drained:
                self._take_back(plan.kept, leaving, beat)
            raise
        self._spool.reconfigure(config.spool)
        if config.spool.enabled:
            self._spool.start(self._fatal)
        for line in made.values():
            line.start()
        staying = {line.name: line for line in plan.kept} | made
        self.config = config
        self.lines = [staying[pipeline.name] for pipeline in config.pipelines]
        for line in made.values():
            line.settle_in()
            log.info("%s: %s", line.name, line.summary)
        if plan.told:
            if self._publisher is not None:
                self._publisher.stop("the configuration has changed")
                self._publisher = None
            self._publish_status()
        return plan

    def _build(
        self, config: Config, pipeline: PipelineConfig, counters: Counters | None = None, again: Line | None = None
    ) -> Line:
        assert self._runtime is not None
        return build(
            config,
            pipeline,
            self._runtime,
            self._fatal,
            counters,
            self._quarantine,
            self._spool,
            self._wake.is_set,
            again,
        )

    def _build_early(
        self, config: Config, pipeline: PipelineConfig, counters: Counters | None, leaving: Sequence[Line]
    ) -> Line | None:
        """Build a pipeline while others still serve; None if one of those that leave has the accelerator that it wants."""
        wanted = delegate_of(pipeline)
        held = {name for line in leaving for name in line.pipeline.accelerators}
        may_wait = bool(held) if wanted is None else wanted.name in held
        try:
            line = self._build(config, pipeline, counters)
        except DelegateAwayError as error:
            if not may_wait:
                raise
            log.info("reload: %s; tried again when the old pipeline has ended", error)
            return None
        if may_wait and line.wanting:
            log.info("reload: %s: made again when the old pipeline has ended and its accelerator is free", line.name)
            line.pipeline.release(finished=False)
            return None
        return line

    def _take_back(self, kept: Sequence[Line], ended: Sequence[Line], beat: watchdog.Heartbeat) -> None:
        """Make again, after a reload that failed, the pipelines that had ended for it; the service ends if that fails."""
        self.lines = list(kept)
        staying = {line.name: line for line in kept}
        again: list[Line] = []
        try:
            for old in ended:
                beat.tick()
                if old.source.exhausted.is_set():
                    staying[old.name] = old  # its inputs are all worked off, and would be read again
                else:
                    again.append(self._build(self.config, old.config, old.counters, old))
            self._go_on()
        except EdgeServeError as error:
            for line in again:
                line.pipeline.release(finished=False)
            if not self._wake.is_set():
                self._fatal(error)
            return
        for line in again:
            line.start()
            staying[line.name] = line
        self.lines = [staying[pipeline.name] for pipeline in self.config.pipelines]
        for line in again:
            line.settle_in()

    def _go_on(self) -> None:
        if self._wake.is_set():
            raise UnavailableError("the service is stopping")

    # The end.

    def _end(self) -> int:
        """Stop in order: sources stop reading, workers drain, sinks flush, sources close."""
        finished = self._signal is None and self._failure is None
        # After a failure nothing can be finished; what was not acknowledged comes again.
        grace = self.config.grace_s if self._failure is None else 0.0
        deadline = time.monotonic() + grace
        why = "all inputs are worked through" if finished else f"signal {self._signal}" if self._signal else "a failure"
        self._notifier.stopping(why)
        if not finished and self._failure is None:
            log.info("stopping: frames in work get %g s to finish", grace)
        for line in self.lines if not finished else ():
            line.source.halt()
        # A reload that is under way comes to its end, or is seen no more; it stops its pipelines as this does.
        self._reloading.acquire(timeout=max(RELOAD_END_S, grace))
        if self._control is not None:
            self._control.close()
        lost = self._finish() if finished else drain(self.lines, deadline)
        if self._publisher is not None:
            self._publisher.stop(why)
        if self._failure is not None or lost:
            return EXIT_UNAVAILABLE
        return EXIT_INTERRUPTED if self._signal == signal.SIGINT else EXIT_OK

    def _finish(self) -> int:
        """Send the last results of inputs that have an end; gives how many stay unsent whose inputs do not come again."""
        lost = 0
        for line in self.lines:
            for sink in line.sinks:
                # Inputs from files do not come again: their results wait for upstream, or for a signal.
                while not self._wake.is_set() and not sink.idle(POLL_S):
                    self._tend()
            lost += flush(line, time.monotonic() + (self.config.grace_s if self._wake.is_set() else 0))
        for line in self.lines:
            release(line, finished=True)
        return lost
