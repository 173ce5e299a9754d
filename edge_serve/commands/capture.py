"""`edge-serve capture`: record what a running pipeline's model really sees, as calibration data."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from edge_serve.config import DEFAULT_FILE
from edge_serve.errors import EXIT_INTERRUPTED, EXIT_OK, EdgeServeError, ProtocolError, UnavailableError, UsageError

if TYPE_CHECKING:
    from edge_serve.config import Config
    from edge_serve.control import Caller
    from edge_serve.recording import Draft, Recording

DEFAULT_SAMPLES = 200
DEFAULT_BYTES = "64MiB"
DEFAULT_SECONDS = 600.0
# Fewer say little about the ranges of activations; `edge-serve convert` warns of them, too.
FEW_SAMPLES = 20
# The service says every second how far it is; so long a silence means that it hangs.
SILENCE_S = 15.0
# After Ctrl-C: how long the last samples and counts may take to come.
FAREWELL_S = 3.0
POLL_S = 0.2
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
ENDS = {
    "full": "all samples are there",
    "time": "the time is over",
    "asked": "stopped as asked",
    "stopped": "the service stopped",
    "source": "the pipeline's source has no more inputs",
}
DROPS = {
    "not_finite": "held NaN or infinite values",
    "shape": "had another shape than the first one",
    "too_large": "were larger than --max-bytes",
    "behind": "came faster than they were taken",
}


def _size(_context: click.Context, _parameter: click.Parameter, value: str) -> int:
    """Read a number of bytes: 1000, 64MiB, 1.5 GB."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([kKMG]?i?B?)\s*", value)
    unit = found[2].upper() if found is not None else "-"
    unit = unit + "B" if unit in ("K", "M", "G", "KI", "MI", "GI") else unit
    if found is None or unit not in UNITS:
        raise click.BadParameter(f"{value!r} is no size; write it as 64MiB, 500kB or 1GB")
    size = int(float(found[1]) * UNITS[unit])
    if not 1 <= size <= UNITS["GIB"]:
        raise click.BadParameter(f"{value!r} is not between 1 byte and 1GiB")
    return size


@click.command(
    epilog="""\b
Examples:
  edge-serve capture -c edge-serve.toml -o calibration.npz
  edge-serve capture -c edge-serve.toml -o day.npz --pipeline vibration --samples 500 --seconds 86400
  edge-serve capture -c edge-serve.toml -o burst.npz --every 10 --samples 50
  edge-serve convert saved_model -o models/bearing --quantize int8 --calibration calibration.npz"""
)
@click.option(
    "-c",
    "--config",
    "file",
    type=click.Path(path_type=Path),
    default=DEFAULT_FILE,
    show_default=True,
    help="The configuration that `edge-serve run` serves.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The .npz file that is to be written."
)
@click.option("--pipeline", help="Which pipeline (default: the only one).")
@click.option(
    "--samples",
    type=click.IntRange(1, 100_000),
    default=DEFAULT_SAMPLES,
    show_default=True,
    help="Most samples that are kept.",
)
@click.option(
    "--max-bytes",
    metavar="SIZE",
    callback=_size,
    default=DEFAULT_BYTES,
    show_default=True,
    help="Most bytes of samples, in the file and in memory.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 7 * 24 * 3600),
    default=DEFAULT_SECONDS,
    show_default=True,
    help="How long it records.",
)
@click.option(
    "--every",
    type=click.IntRange(1, 1_000_000_000),
    help="Take every N-th input and end when there are enough, instead of a choice over the whole time.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Seed of the choice over the whole time (default: 0).")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress and no notes.")
def capture(
    file: Path,
    output: Path,
    pipeline: str | None,
    samples: int,
    max_bytes: int,
    seconds: float,
    every: int | None,
    seed: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Record what the model of a running pipeline really sees, for `edge-serve convert --calibration`.

    Asks the `edge-serve run` of this configuration for its model's input tensors after all processing: windows are
    assembled, pictures resized and normalized, quantized values made real ones again.

    The samples are spread over the whole of --seconds: each input has the same chance to be among them. With --every N it
    is each N-th input instead, until --samples are there. Ctrl-C or SIGTERM ends it earlier; what was recorded is kept.

    Exits with 2 for wrong use, 3 if no service runs, nothing arrived or another capture is at it, 130 if Ctrl-C came
    before the first sample.
    """
    if every is not None and seed is not None:
        raise click.UsageError("--every takes inputs in order; leave --seed out")
    from edge_serve.app import load
    from edge_serve.control import Caller
    from edge_serve.recording import Draft, Recording

    config = load(file)
    name = _pipeline(config, pipeline)
    recording = Recording(max_bytes)
    with Draft(output, force=force) as draft, _Signals() as signals:
        try:
            caller = Caller(config.state_dir, max_payload=max_bytes)
        except UnavailableError as error:
            raise UnavailableError(
                f"{error}. Start it with `edge-serve run -c {file}`; if it runs as a service with a state folder of its "
                "own, name that folder as it does, with state_dir in the configuration or STATE_DIRECTORY"
            ) from error
        with caller:
            caller.ask(
                "capture",
                pipeline=name,
                samples=samples,
                max_bytes=max_bytes,
                seconds=seconds,
                every=every,
                seed=seed or 0,
            )
            session = _Session(caller, draft, recording, signals, _Line(name, samples, not quiet), config.path)
            session.run()
        if not recording:
            return session.nothing(name)
        size = draft.keep(recording)
    document = session.document(name, output, size)
    if not quiet:
        for note in session.notes(samples):
            click.echo(f"note: {note}", err=True)
    click.echo(json.dumps(document) if as_json else _summary(document))
    return EXIT_OK


def _pipeline(config: Config, wanted: str | None) -> str:
    names = [each.name for each in config.pipelines]
    if wanted is None:
        if len(names) > 1:
            raise UsageError(f"{config.path}: has the pipelines {', '.join(names)}; say which with --pipeline")
        return names[0]
    if wanted not in names:
        raise UsageError(f"{config.path}: has no pipeline {wanted!r}; it has: {', '.join(names)}")
    return wanted


class _Signals:
    """Takes the first SIGINT or SIGTERM as the wish to end well; the second ends at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Line:
    """The line on a terminal that says how far it is; nothing where standard error is no terminal."""

    def __init__(self, pipeline: str, samples: int, enabled: bool) -> None:
        self._pipeline = pipeline
        self.wanted = samples
        self._enabled = enabled and sys.stderr.isatty()
        self._width = 0
        self._drawn = 0.0

    def draw(self, recording: Recording, seen: int, left: float) -> None:
        """Draw it anew, unless that was done just now."""
        now = time.monotonic()
        if not self._enabled or now - self._drawn < POLL_S:
            return
        self._drawn = now
        minutes, seconds = divmod(int(left), 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        self._write(
            f"{self._pipeline}: {len(recording)} of {self.wanted} samples, {_bytes(recording.nbytes)}, "
            f"of {seen} inputs, {clock} left (Ctrl-C ends and keeps them)"
        )

    def clear(self) -> None:
        """Take it away before other text is written."""
        if self._width:
            self._write("")
            sys.stderr.write("\r")
            sys.stderr.flush()

    def _write(self, text: str) -> None:
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()
        self._width = len(text)


class _Session:
    """One capture, from the request to its end."""

    def __init__(
        self, caller: Caller, draft: Draft, recording: Recording, signals: _Signals, line: _Line, config: Path
    ) -> None:
        self._caller = caller
        self._draft = draft
        self._recording = recording
        self._signals = signals
        self._line = line
        self._config = config
        self._began = time.monotonic()
        self._until: float | None = None
        self._started: dict[str, Any] = {}
        self._counts: dict[str, Any] = {"seen": 0, "dropped": {}}
        self._ended = ""
        self._lost: EdgeServeError | None = None
        self._seconds = 0.0

    def run(self) -> None:
        """Take what comes until the end, whichever it is; raises what ended it before anything was recorded."""
        try:
            self._listen()
        except (UnavailableError, ProtocolError) as error:
            self._ended, self._lost = "lost" if self._signals.number is None else "asked", error
            if not self._recording and self._signals.number is None:
                raise
        finally:
            self._seconds = time.monotonic() - self._began
            self._line.clear()

    def _listen(self) -> None:
        heard = time.monotonic()
        stopped_at: float | None = None
        while not self._ended:
            now = time.monotonic()
            if self._signals.number is not None and stopped_at is None:
                stopped_at = now
                self._caller.finish()
            message = self._caller.receive(POLL_S)
            if message is not None:
                heard = now
                self._take(message.header, message.body)
            elif now - heard > SILENCE_S:
                raise UnavailableError(f"the service has said nothing for {SILENCE_S:g} s; is it hanging?")
            if stopped_at is not None and now - stopped_at > FAREWELL_S:
                self._ended = "asked"
            if self._until is not None:
                self._line.draw(self._recording, self._counts["seen"], max(0.0, self._until - now))

    def _take(self, header: dict[str, Any], body: bytes | None) -> None:
        kind = header["type"]
        if kind == "recording":
            self._started = header
        elif kind == "layout":
            layout = self._recording.begin(header)
            self._line.wanted = layout.capacity
            self._draft.reserve(layout.capacity * layout.nbytes)
        elif kind == "sample":
            self._recording.put(header, body)
        elif kind in ("progress", "done"):
            seen, dropped, left = header.get("seen"), header.get("dropped"), header.get("left_s", 0)
            if not isinstance(seen, int) or not isinstance(dropped, dict) or not isinstance(left, (int, float)):
                raise ProtocolError("the service counts in no way that is known here")
            self._counts = {"seen": seen, "dropped": {str(why): n for why, n in dropped.items() if type(n) is int}}
            self._until = time.monotonic() + left
            if kind == "done":
                self._ended = str(header.get("ended"))
        else:
            raise ProtocolError(f"the service answered with {kind!r:.40}, which is unknown here")

    def nothing(self, name: str) -> int:
        """Say why there is not a single sample, with the exit code that it means."""
        if self._signals.number == signal.SIGINT:
            click.echo("edge-serve: stopped before the first sample; nothing was written", err=True)
            return EXIT_INTERRUPTED
        dropped = _drops(self._counts["dropped"])
        after = f"in {self._seconds:.0f} s"
        if dropped:
            raise UnavailableError(f"pipeline {name!r}: no input could be recorded {after}: {dropped}")
        why = ENDS[self._ended] if self._ended in ("stopped", "source") else ""
        raise UnavailableError(
            f"pipeline {name!r}: no input arrived {after}{f' ({why})' if why else ''}; "
            "check that its source delivers, or record longer (--seconds)"
        )

    def document(self, name: str, output: Path, size: int) -> dict[str, Any]:
        """Say what was recorded, JSON-ready."""
        layout = self._recording.layout
        assert layout is not None
        count = len(self._recording)
        return {
            "v": 1,
            "file": str(output),
            "pipeline": name,
            "model": self._started.get("model"),
            "samples": count,
            "bytes": size,
            "arrays": {part.name: {"dtype": part.dtype, "shape": [count, *part.shape]} for part in layout.parts},
            **self._counts,
            "seconds": round(self._seconds, 3),
            "ended": "interrupted" if self._ended == "asked" else self._ended,
        }

    def notes(self, wanted: int) -> list[str]:
        """Give what a person should know about the result."""
        found = []
        layout = self._recording.layout
        if self._lost is not None and self._signals.number is None:
            found.append(f"the connection to the service was lost ({self._lost}); what had come is kept")
        elif self._ended in ("stopped", "source"):
            found.append(f"{ENDS[self._ended]}; what had come is kept")
        if layout is not None and layout.capacity < wanted:
            found.append(
                f"--max-bytes has room for {layout.capacity} of {wanted} samples of {_bytes(layout.nbytes)} each"
            )
        if self._counts["dropped"]:
            found.append(f"not recorded: {_drops(self._counts['dropped'])}")
        said = self._started.get("config")
        if said is not None and said != str(self._config):
            found.append(f"the service that answered serves {said}, not {self._config}")
        if len(self._recording) < FEW_SAMPLES:
            found.append(
                f"only {len(self._recording)} samples; {FEW_SAMPLES} or more, better 100, make good calibration data"
            )
        return found


def _drops(dropped: dict[str, int]) -> str:
    return ", ".join(f"{number} inputs {DROPS.get(reason, reason)}" for reason, number in dropped.items())


def _summary(document: dict[str, Any]) -> str:
    arrays = ", ".join(f"{name} {each['dtype']} {each['shape']}" for name, each in document["arrays"].items())
    plural = "s"[: document["samples"] != 1]
    return (
        f"{document['file']}: {document['samples']} sample{plural} of {document['seen']} inputs in "
        f"{document['seconds']:.0f} s, {_bytes(document['bytes'])}: {arrays}"
    )


def _bytes(number: int) -> str:
    for unit, size in (("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"
