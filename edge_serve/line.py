"""One pipeline with all its parts: made from its configuration, told apart from what it was before, started.

Everything that differs between two configurations of a pipeline shows in its `traits`: a reload leaves alone what has the
same ones, and says of the others what has changed.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_serve import plugins, watchdog
from edge_serve.bundle import MANIFEST, TensorSpec
from edge_serve.config import Config, PartConfig, PipelineConfig
from edge_serve.errors import ConfigError, DelegateAwayError, EdgeServeError, ModelError, Problem, UsageError
from edge_serve.health import Counters, board
from edge_serve.mailbox import Mailbox
from edge_serve.model import delegate as delegates
from edge_serve.model.choice import choose
from edge_serve.model.delegate import Candidate, DelegateSpec, Runnable
from edge_serve.model.interpreter import Runtime
from edge_serve.model.opening import open_model
from edge_serve.model.repository import ModelVersion, find
from edge_serve.model.resilient import ResilientEngine
from edge_serve.model.wish import Choice
from edge_serve.pipeline import Pipeline, Worker
from edge_serve.processing.setup import Meaning, model_info, settle
from edge_serve.quarantine import Guard, Quarantine
from edge_serve.runner import SinkRunner, SourceRunner
from edge_serve.sources import SourceContext
from edge_serve.spill import sink_runner
from edge_serve.spool.spooler import Spool

if TYPE_CHECKING:
    from edge_serve.processing.decode import Decoder
    from edge_serve.processing.intake import Intake

log = logging.getLogger(__name__)

# Options that name files whose contents count as much as their names: certificates, passwords, labels.
FILE_SUFFIX = "_file"
# How long a source that was told to stop may take to come back from its last wait.
READ_END_S = 1.0
# How long a worker may take to end when nothing holds it up any more.
WORKER_END_S = 0.5
# What of a configuration belongs to no pipeline, or is compared by itself.
APART = frozenset({"path", "device", "state_dir", "runtime", "grace_s", "brokers", "pipelines", "status"})
# What of a pipeline's configuration is looked at more closely, or counts for nothing: where it stands in the file.
PARTS = frozenset({"name", "key", "model", "input", "output", "source", "sinks"})


def find_model(config: Config, pipeline: PipelineConfig) -> ModelVersion:
    """Find and check the model version that a pipeline names."""
    model = pipeline.model
    return find(
        config.resolve(model.model),
        "latest" if model.version is None else model.version,
        version_labels=model.version_labels,
        variant=model.variant,
    )


def delegate_of(pipeline: PipelineConfig) -> DelegateSpec | None:
    """Give the delegate that a pipeline asks for; None for the best that is there."""
    wished = pipeline.model.delegate
    return None if wished is None or wished == delegates.AUTO else DelegateSpec.parse(wished)


def fallback_of(pipeline: PipelineConfig) -> list[DelegateSpec]:
    """Give what a pipeline allows in place of its delegate, in order."""
    return [DelegateSpec.parse(each) for each in pipeline.model.fallback or ()]


def open_engine(
    config: Config, pipeline: PipelineConfig, version: ModelVersion, runtime: Runtime
) -> tuple[Runnable, Meaning, str]:
    """Load a pipeline's model on the delegate that it asks for (XNNPACK for auto), and settle what its tensors mean.

    Where that cannot be had, on the first of its `fallback` that can; the text says why then, and is empty otherwise.
    """
    model = pipeline.model
    failure: ModelError | DelegateAwayError | None = None
    for spec in (delegate_of(pipeline) or DelegateSpec("xnnpack"), *fallback_of(pipeline)):
        try:
            engine = open_model(version.file, spec, runtime, threads=model.threads or 1, signature=model.signature)
        except (ModelError, DelegateAwayError) as error:
            failure = failure or error
            continue
        meaning = settle(version, engine, pipeline.input, pipeline.output, config.path.parent)
        return engine, meaning, str(failure or "")
    assert failure is not None, "the delegate itself was tried at least"
    raise failure


def choose_model(
    config: Config,
    pipeline: PipelineConfig,
    version: ModelVersion,
    runtime: Runtime,
    stop: Callable[[], bool] | None = None,
) -> Choice:
    """Settle which variant runs on which delegate with how many threads, and who is next in line; see model/choice.py.

    What was measured before on this board is kept; what was not is tried now, in a child process. StoppedError if `stop` says so
    meanwhile.
    """
    model = pipeline.model
    return choose(
        version,
        delegate=delegate_of(pipeline),
        fallback=fallback_of(pipeline),
        variant=model.variant,
        threads=model.threads or (1 if pipeline.workers > 1 else 0),  # several workers share the cores
        runtime=runtime,
        signature=model.signature,
        board=board(),
        folder=config.state_dir,
        stop=stop,
    )


class _Opener:
    """Opens candidates so that all of them show the same tensors: those of the variant that was asked for."""

    def __init__(self, version: ModelVersion, pipeline: PipelineConfig, runtime: Runtime) -> None:
        self._runtime = runtime
        self._signature = pipeline.model.signature
        self._run_limit_s = pipeline.model.run_limit_s
        self._face: tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]] | None = None
        if version.bundle is not None and self._signature is None:
            variant = version.bundle.manifest.variant(version.variant)
            if variant.inputs and variant.outputs:
                self._face = ({x.name: x for x in variant.inputs}, {x.name: x for x in variant.outputs})

    def __call__(self, candidate: Candidate) -> Runnable:
        """Open a candidate; ModelError or DelegateAwayError."""
        engine = open_model(
            candidate.file,
            candidate.spec,
            self._runtime,
            threads=candidate.threads,
            signature=self._signature,
            run_limit_s=self._run_limit_s,
        )
        if self._face is None or engine.inputs.keys() != self._face[0].keys():
            # A bare file, or a manifest that knows its tensors by other names: there is one variant, and this is its face.
            self._face = (engine.inputs, engine.outputs)
        if (engine.inputs, engine.outputs) == self._face:
            return engine
        from edge_serve.model.adapted import adapt  # only where another variant stands in

        try:
            return adapt(engine, *self._face)
        except ModelError:
            engine.close()
            raise


@dataclass(slots=True, eq=False)
class Line:
    """One pipeline with all its parts."""

    name: str
    config: PipelineConfig
    traits: Mapping[str, object]
    """All that it is made of, by the name of the aspect: see `traits`."""
    pipeline: Pipeline
    mailbox: Mailbox
    source: SourceRunner
    sinks: list[SinkRunner]
    counters: Counters
    summary: str
    version: ModelVersion
    choice: Choice
    """What it was to run on when it was made, and why."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Say why it runs on what it runs on: what was tried, and what came of it."""
        return self.choice.reasons

    @property
    def wanting(self) -> bool:
        """Say whether something better may be there that was not free, or is not what runs now."""
        return self.choice.away or bool(self.pipeline.troubles)

    def start(self) -> None:
        """Start its threads: they connect, read and work."""
        self.pipeline.start()
        for sink in self.sinks:
            sink.start()
        self.source.start()

    def settle_in(self) -> None:
        """Pay what only the first frames would cost otherwise; once it has started."""
        self.pipeline.warm()

    @property
    def ended(self) -> bool:
        """Say whether all inputs that there will ever be are worked off."""
        return self.pipeline.join(0)

    @property
    def connected(self) -> bool:
        """Say whether source and sinks are connected; a finite source may have come and gone already."""
        return (self.source.connected.is_set() or self.ended) and all(sink.connected.is_set() for sink in self.sinks)


def traits(config: Config, pipeline: PipelineConfig, version: ModelVersion) -> dict[str, object]:
    """Give all that a pipeline is made of, by aspect; equal values mean that nothing has to be made anew.

    Files that are only named (models, certificates, passwords, labels) count with their size and time of change.
    """
    manifest = version.bundle.path / MANIFEST if version.bundle is not None else None
    found: dict[str, object] = {
        "model": (
            dataclasses.replace(pipeline.model, version=None, version_labels=None),
            pipeline.workers,
            _stamp(version.file),
            _stamp(manifest) if manifest is not None else None,
        ),
        "input": (pipeline.input, stamps(config, pipeline.input)),
        "output": (pipeline.output, stamps(config, pipeline.output)),
        "source": _part(config, pipeline.source),
        "sinks": tuple(_part(config, sink) for sink in pipeline.sinks),
    }
    for field in dataclasses.fields(pipeline):
        if field.name not in PARTS:
            found[field.name] = getattr(pipeline, field.name)
    for name in sorted({part.options.broker for part in (pipeline.source, *pipeline.sinks) if _broker(config, part)}):
        found[f"broker {name}" if name else "broker"] = (config.brokers[name], stamps(config, config.brokers[name]))
    for field in dataclasses.fields(config):
        if field.name not in APART:
            found[field.name] = getattr(config, field.name)
    return found


def _broker(config: Config, part: PartConfig) -> bool:
    return getattr(part.options, "broker", None) in config.brokers


def _part(config: Config, part: PartConfig) -> tuple[object, ...]:
    return dataclasses.replace(part, key=""), stamps(config, part.options)


def stamps(config: Config, options: Any) -> tuple[object, ...]:
    """Give the size and time of change of each file that options name, so that a new certificate is seen."""
    if not dataclasses.is_dataclass(options):
        return ()
    named = [getattr(options, field.name) for field in dataclasses.fields(options) if field.name.endswith(FILE_SUFFIX)]
    return tuple(_stamp(config.resolve(name)) for name in named if isinstance(name, str))


def _stamp(path: Path) -> tuple[object, ...]:
    try:
        status = path.stat()
    except OSError:
        return (str(path), None)
    return (str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns)


def build(
    config: Config,
    pipeline: PipelineConfig,
    runtime: Runtime,
    fatal: Callable[[BaseException], None],
    counters: Counters | None = None,
    quarantine: Quarantine | None = None,
    spool: Spool | None = None,
    stop: Callable[[], bool] | None = None,
    again: Line | None = None,
) -> Line:
    """Make the parts of a pipeline, nothing of it started; `counters` go on with what another one has counted.

    With `again` it is made as that one was, which ended without need: of the same model, chosen as then, and on the next in line
    where the first cannot be had. UsageError names the pipeline and what is wrong, DelegateAwayError the hardware that is not there.
    StoppedError if `stop` said so while it was measured what the model runs best on.
    """
    opened: list[tuple[ResilientEngine, Guard]] = []
    made: list[Worker] = []
    try:
        version = find_model(config, pipeline) if again is None else again.version
        made_of = traits(config, pipeline, version)
        if again is None:
            choice = choose_model(config, pipeline, version, runtime, stop)
        else:
            choice = dataclasses.replace(again.choice, cached=True, strict=False)
        if not choice.cached:
            for reason in choice.reasons:
                log.info("%s: %s", pipeline.name, reason)
        opener = _Opener(version, pipeline, runtime)

        def open_worker() -> tuple[ResilientEngine, Guard]:
            guard, line = Guard.unmarked(), choice.line
            if quarantine is not None:
                # An input that crashed this process on one delegate makes it run on the next in line.
                labels = list(dict.fromkeys(each.spec.label for each in line))
                guard = quarantine.guard(pipeline.name, version.file, labels)
                line = line[next(place for place, each in enumerate(line) if each.spec.label == guard.delegate) :]
            try:
                engine = ResilientEngine(pipeline.name, line, opener, strict=choice.strict)
            except BaseException:
                guard.close()
                raise
            opened.append((engine, guard))
            return engine, guard

        begun = time.monotonic()
        engine, guard = open_worker()
        opened_s = time.monotonic() - begun
        meaning = settle(version, engine, pipeline.input, pipeline.output, config.path.parent)
        counters = counters or Counters()
        info = model_info(version, engine, engine.candidate.variant)
        decoder = meaning.decoder(engine)

        def describe() -> dict[str, Any]:
            return {
                "device": config.device,
                "pipeline": pipeline.name,
                "model": {
                    "name": info.name,
                    "version": info.version,
                    "variant": made[0].model.variant,
                    "delegate": made[0].model.delegate,
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
        mailbox = Mailbox(source.policy, counters)
        workers = pipeline.workers
        if workers > 1 and meaning.input.kind == "window":
            log.info("%s: windows are gathered by one worker; workers = %d is not used", pipeline.name, workers)
            workers = 1
        while True:
            made.append(_worker(version, engine, meaning.intake(engine, counters, source.hold_limit), decoder, guard))
            if len(made) == workers:
                break
            engine, guard = open_worker()
        sinks = [sink_runner(config, pipeline, number, counters, fatal, spool) for number in range(len(pipeline.sinks))]
        worker = Pipeline(
            pipeline.name,
            config.device,
            meaning.output.type or "tensor",
            made,
            mailbox,
            sinks,
            counters,
            fatal,
            pipeline.error_payload_bytes,
        )
        # Loading has run the model twice; no later run takes longer than ten times all of that.
        worker.silence_s = max(watchdog.SILENCE_S, 10 * opened_s)
    except EdgeServeError as error:
        for engine, guard in opened:
            engine.close()
            guard.close()
        if isinstance(error, DelegateAwayError):
            # A stick that is plugged in later: a restart may help.
            raise DelegateAwayError(f"pipeline {pipeline.name!r}: {error}") from error
        if not isinstance(error, UsageError):
            raise
        raise ConfigError(str(config.path), [Problem(pipeline.key, f"pipeline {pipeline.name!r}: {error}")]) from error
    cores = "1 thread" if engine.threads == 1 else f"{engine.threads} threads"
    which = f" version {info.version}" if info.version is not None else ""
    summary = (
        f"model {info.name}{which} ({info.variant}) on {info.delegate} "
        f"({engine.claims.taken} of {engine.claims.total} operators), {cores}, "
        + (f"{len(made)} workers, " if len(made) > 1 else "")
        + runtime.name
    )
    return Line(
        pipeline.name,
        pipeline,
        made_of,
        worker,
        mailbox,
        SourceRunner(pipeline.name, source, mailbox, counters, fatal),
        sinks,
        counters,
        summary,
        version,
        choice,
    )


def _worker(version: ModelVersion, engine: ResilientEngine, intake: Intake, decoder: Decoder, guard: Guard) -> Worker:
    """Make a worker whose results say what they were made on, also when that changes."""
    worker = Worker(engine, intake, decoder, guard, model_info(version, engine, engine.candidate.variant))

    def changed(_engine: ResilientEngine) -> None:
        worker.model = model_info(version, engine, engine.candidate.variant)

    engine.changed = changed
    return worker


def drain(lines: Sequence[Line], deadline: float) -> int:
    """Stop lines in order: sources stop reading, workers finish, sinks flush, sources close.

    Takes until `deadline` (monotonic seconds) at most; what is not safe by then is not acknowledged. Gives how many results
    stay unsent whose inputs do not come again.
    """
    for line in lines:
        # All at once: one source's last wait shall not be another one's loss.
        line.source.halt()
    # A source that reads ends within its wait. One that is just connecting has nothing that could be waited for.
    settled = min(deadline, time.monotonic() + READ_END_S)
    for line in lines:
        line.source.stop_reading(settled)
        line.mailbox.end()
    for line in lines:
        if not line.pipeline.join(max(0.0, deadline - time.monotonic())):
            log.warning("%s: frames in work were not finished in time", line.name)
            line.mailbox.close()
    lost = sum(flush(line, deadline) for line in lines)
    for line in lines:
        release(line, finished=False)
    return lost


def flush(line: Line, deadline: float) -> int:
    """Stop a line's sinks when they have sent what they have, or at the deadline.

    Gives how many results stay unsent whose inputs do not come again.
    """
    lost = 0
    for sink in line.sinks:
        left = sink.stop(deadline)
        if left:
            log.warning("%s: %d results are not upstream; their inputs were not acknowledged", line.name, left)
        lost += left if line.source.exhausted.is_set() else 0
    return lost


def release(line: Line, *, finished: bool) -> None:
    """Let go of a line's model and of its source's connection."""
    # A worker that waited for a sink goes on when that is stopped, and is done at once.
    line.pipeline.join(WORKER_END_S)
    line.pipeline.release(finished=finished)
    line.source.close()
    log.info("%s: %s", line.name, _account(line.counters.snapshot()))


def _account(counts: dict[str, Any]) -> str:
    parts = [f"{counts['in']} in", f"{counts['out']} out"]
    parts += [f"{number} {code}" for code, number in counts["errors"].items()]
    parts += [f"{number} dropped ({reason})" for reason, number in counts["dropped"].items()]
    parts += [f"{counts[key]} {key.replace('_', ' ')}" for key in ("settled_early", "retried") if counts[key]]
    return ", ".join(parts)
