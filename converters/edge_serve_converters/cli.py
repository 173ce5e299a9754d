"""`edge-serve convert`: the options and what is printed. Importing this module imports no tensorflow."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from edge_serve.errors import Problem, UsageError
from edge_serve.schema import read
from edge_serve.spec import InputSpec, OutputSpec
from edge_serve_converters.request import DEFAULT_SAMPLES, DEFAULT_TIMEOUT_S, IO, MODES, Io, Mode, Request

T = TypeVar("T")
_Command = TypeVar("_Command", bound=Callable[..., Any])

EPILOG = """\b
Examples:
  edge-serve convert saved_model -o models/bearing --quantize int8 --calibration windows.npz --labels labels.txt
  edge-serve convert saved_model -o models/photo --quantize int8 --quantize float16 --calibration photos/ --kind image
  edge-serve convert saved_model -o models/motion --quantize int8 --calibration log.csv --kind window --hop 10 --channels ax,ay,az

\b
Exit codes: 0 all variants were written; 1 a variant failed its checks (the others were written);
2 wrong use or input; 130 interrupted. Nothing half-written is ever left.
"""


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} {text}: give one number, or one for each channel with commas between") from error


def _size(text: str) -> list[int]:
    parts = text.lower().replace("x", ",").split(",")
    if not all(part.strip().isdecimal() for part in parts) or len(parts) > 2:
        raise UsageError(f"--size {text}: give HEIGHTxWIDTH in pixels, for example 224x224")
    return [int(parts[0]), int(parts[-1])]


def _input_shapes(texts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for text in texts:
        name, equals, sizes = text.rpartition("=")
        parts = sizes.split(",")
        if not equals or not name or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise UsageError(f"--input-shape {text}: give NAME=1,224,224,3 with whole numbers above 0")
        shapes[name] = tuple(int(part) for part in parts)
    return shapes


def _table(cls: type[T], values: dict[str, Any]) -> T:
    """Check options as the configuration's fields are checked, with the option's name in the message."""
    problems: list[Problem] = []
    made = read(cls, {name: value for name, value in values.items() if value is not None}, "", problems)
    if made is None or problems:
        raise UsageError(
            "\n".join(f"--{str(problem).replace('_', '-', problem.key.count('_'))}" for problem in problems)
        )
    return made


def _choices(field: str, cls: type) -> click.Choice[str]:
    """Offer the words that a field of the specification takes."""
    from edge_serve.schema import hints

    words = [word for part in get_args(hints(cls)[field]) for word in get_args(part)]
    return click.Choice(words)


def _meaning_options(command: _Command) -> _Command:
    """Add the options that say what the model's inputs and outputs mean; they go into the manifest."""
    for option in reversed(
        (
            click.option(
                "--kind", type=_choices("kind", InputSpec), help="What the input is [default: told from the options]."
            ),
            click.option("--size", metavar="HxW", help="image: size in pixels [default: the model's input]."),
            click.option("--color", type=_choices("color", InputSpec), help="image: channel order."),
            click.option(
                "--resize",
                type=_choices("resize", InputSpec),
                help="image: how it becomes that size [default: stretch].",
            ),
            click.option("--scale", type=float, help="image: pixels 0..255 are multiplied by this [default: 1/255]."),
            click.option(
                "--mean", metavar="N,…", help="image, window: subtracted; one number, or one for each channel."
            ),
            click.option("--std", metavar="N,…", help="image, window: divided by."),
            click.option("--length", type=int, help="window: samples in a window [default: the model's input]."),
            click.option("--hop", type=int, help="window: samples from one window to the next [default: length]."),
            click.option(
                "--channels", metavar="A,B,…", help="window: channel names; in CSV data the columns that are used."
            ),
            click.option("--rate-hz", type=float, help="window: nominal sampling rate."),
            click.option(
                "--output-type",
                type=_choices("type", OutputSpec),
                help="What the outputs are [default: classification with labels, else tensor].",
            ),
            click.option(
                "--scores-output",
                metavar="NAME",
                help="classification: the output with the scores, if there are several.",
            ),
            click.option("--top-k", type=int, help="classification: most classes in a result."),
            click.option("--threshold", type=float, help="Lowest score in a result."),
            click.option(
                "--activation", type=_choices("activation", OutputSpec), help="classification: applied to logits."
            ),
            *(
                click.option(f"--{role}", metavar="NAME", help=f"detection: the output with the {role}.")
                for role in ("boxes", "classes", "scores", "count")
            ),
        )
    ):
        command = option(command)
    return command


@click.command(epilog=EPILOG, context_settings={"max_content_width": 120})
@click.argument("saved_model", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The model's folder; the bundle becomes OUTPUT/VERSION.",
)
@click.option(
    "--quantize",
    "modes",
    multiple=True,
    required=True,
    type=click.Choice(MODES),
    help="Repeatable; each makes a variant, the first is the default one.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Real inputs: .npz (arrays named after the inputs), .npy, .csv, or a folder of pictures. Needed for int8; "
    "quality is measured on the part of it that is held back.",
)
@click.option(
    "--io",
    type=click.Choice(IO),
    default="float",
    show_default=True,
    help="int8: dtype of the file's own inputs and outputs. Clients of edge-serve send real values either way; "
    "int8 and uint8 save a step on pictures, and accelerators need them.",
)
@click.option(
    "--signature",
    "signatures",
    multiple=True,
    metavar="KEY",
    help="Repeatable [default: serving_default, or the only one].",
)
@click.option(
    "--input-shape", "shapes", multiple=True, metavar="NAME=1,H,W,C", help="Fixed shape of an input, repeatable."
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Fixed batch of all inputs.")
@click.option("--labels", type=click.Path(path_type=Path), help="File with one class label a line.")
@click.option(
    "--samples",
    type=click.IntRange(2),
    default=DEFAULT_SAMPLES,
    show_default=True,
    help="Most calibration samples; a quarter as many more are held back.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="For drawing samples.")
@click.option("--version", type=click.IntRange(0), help="Version number [default: the next free one].")
@click.option("--force", is_flag=True, help="Replace an existing --version.")
@click.option("--name", help="The model's name in the manifest [default: OUTPUT's name].")
@click.option(
    "--allow-float-operators", is_flag=True, help="int8: accept operators that stay float for want of an int8 form."
)
@click.option(
    "--timeout",
    type=click.FloatRange(1),
    default=DEFAULT_TIMEOUT_S,
    show_default=True,
    help="Seconds after which a step is stopped.",
)
@click.option(
    "--memory-limit",
    type=click.IntRange(100),
    metavar="MIB",
    help="Memory at which a step is stopped [default: 90 % of the machine's].",
)
@_meaning_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the bundle's folder.")
@click.option("-v", "--verbose", is_flag=True, help="Show everything that tensorflow logs.")
def convert(
    saved_model: Path,
    output: Path,
    modes: tuple[Mode, ...],
    calibration: Path | None,
    io: Io,
    signatures: tuple[str, ...],
    shapes: tuple[str, ...],
    batch: int,
    labels: Path | None,
    samples: int,
    seed: int,
    version: int | None,
    force: bool,
    name: str | None,
    allow_float_operators: bool,
    timeout: float,
    memory_limit: int | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **meaning: Any,
) -> None:
    """Convert a TensorFlow SavedModel to a bundle for devices.

    Every variant is checked before it is written: the operators it needs, its weights, its tensor types, and its outputs in
    the device runtime against the SavedModel's, on held-back samples, zeros and extremes.
    """
    request = Request(
        saved_model=saved_model,
        output=output,
        modes=tuple(dict.fromkeys(modes)),
        calibration=calibration,
        io=io,
        signatures=signatures,
        input_shapes=_input_shapes(shapes),
        batch=batch,
        labels=labels,
        samples=samples,
        seed=seed,
        version=version,
        force=force,
        name=name,
        allow_float_operators=allow_float_operators,
        input=_input_spec(meaning),
        output_spec=_output_spec(meaning),
        timeout_s=timeout,
        memory_limit_mb=memory_limit,
        verbose=verbose,
    )
    run(request, as_json=as_json, quiet=quiet)


def _input_spec(options: dict[str, Any]) -> InputSpec:
    values = {name: options[name] for name in ("kind", "color", "resize", "scale", "length", "hop", "rate_hz")}
    values["size"] = _size(options["size"]) if options["size"] is not None else None
    for name in ("mean", "std"):
        values[name] = _numbers(options[name], f"--{name}") if options[name] is not None else None
    if options["channels"] is not None:
        values["channels"] = [part.strip() for part in options["channels"].split(",")]
    return _table(InputSpec, values)


def _output_spec(options: dict[str, Any]) -> OutputSpec:
    values = {
        name: options[name] for name in ("top_k", "threshold", "activation", "boxes", "classes", "scores", "count")
    }
    return _table(OutputSpec, {**values, "type": options["output_type"], "tensor": options["scores_output"]})


def run(request: Request, *, as_json: bool, quiet: bool) -> None:
    """Convert and print; ConversionError (exit 1) at the end if a variant is missing from the bundle."""
    from edge_serve_converters import progress  # numpy and Pillow only for real work
    from edge_serve_converters.convert import convert as convert_model
    from edge_serve_converters.errors import ConversionError
    from edge_serve_converters.outcome import report

    bar = progress.Bar(sys.stderr, enabled=sys.stderr.isatty() and not (as_json or quiet or request.verbose))
    try:
        with _terminated_as_interrupt():
            outcome = convert_model(request, bar)
    finally:
        bar.clear()
    if not as_json and not quiet:
        for log in progress.failure_logs(outcome):
            click.echo(log, err=True)
    if as_json:
        document = {"bundle": str(outcome.bundle) if outcome.bundle is not None else None, **report(outcome)}
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    elif outcome.bundle is not None:
        if not quiet:
            click.echo(progress.table(outcome))
            for line in progress.closing(outcome):
                click.echo(line, err=True)
        click.echo(str(outcome.bundle))
    if outcome.failures:
        raise ConversionError(progress.failed(outcome))


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, so that children and temporary folders go away too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: whoever called owns the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
