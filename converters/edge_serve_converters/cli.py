"""`edge-serve convert`: the options and what is printed. Importing this module imports no numpy and no tensorflow."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec, OutputSpec
from edge_serve_converters import recipe as recipes
from edge_serve_converters.interrupt import terminated_as_interrupt
from edge_serve_converters.options import input_shapes, input_spec, meaning_options, output_spec
from edge_serve_converters.recipe import Recipe
from edge_serve_converters.request import (
    COMPAT,
    DEFAULT_SAMPLES,
    DEFAULT_TIMEOUT_S,
    IO,
    MODES,
    TARGETS,
    Compat,
    Io,
    Mode,
    Request,
    Target,
)

EPILOG = """\b
Examples:
  edge-serve convert saved_model -o models/bearing --quantize int8 --calibration windows.npz --labels labels.txt
  edge-serve convert photo.keras -o models/photo --target xnnpack --target edgetpu --calibration photos/ --kind image
  edge-serve convert saved_model -o models/motion --quantize int8 --auto --calibration log.csv --kind window --hop 10
  edge-serve convert float.tflite -o models/faces --quantize none --quantize int8 --calibration faces.npz

\b
Exit codes: 0 all variants were written; 1 a variant failed (those that passed were written); 2 wrong use or input, or a
model that cannot be converted at all; 130 interrupted. Nothing half-written is ever left.
"""


class _List(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """Words that may be given one by one or with commas between."""

    name = "list"

    def __init__(self, words: tuple[str, ...]) -> None:
        self._choice = click.Choice(words)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self._choice.choices)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self._choice.convert(part.strip(), param, ctx) for part in str(value).split(","))


@click.command(epilog=EPILOG, context_settings={"max_content_width": 120})
@click.argument("model", type=click.Path(path_type=Path))
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
    type=_List(MODES),
    help="Repeatable; each makes a variant, the first is the default one.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    type=_List(TARGETS),
    help="Repeatable; makes the variant that serves the delegate best: int8, an int8 file as Edge TPUs take it, float16.",
)
@click.option(
    "--compat",
    type=click.Choice(COMPAT),
    help="Make only files that this runtime loads, too (32-bit ARM has no other).",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Real inputs: .npz (arrays named after the inputs), .npy, .csv, .tfrecord, a folder of pictures or of WAV files. "
    "Needed for int8; quality is measured on the part of it that is held back.",
)
@click.option(
    "--labels-for",
    metavar="FILE|folders|data",
    help="What the calibration samples truly are, to measure accuracy, AUC or mean IoU: a file with one label a sample, "
    "the folders that they lie in, or an array named label in the data.",
)
@click.option(
    "--metric",
    type=click.Choice(["accuracy", "auc", "mean_iou"]),
    help="What is measured with labels [default: what fits them].",
)
@click.option(
    "--io",
    type=click.Choice(IO),
    help="int8: dtype of the file's own inputs and outputs. Clients of edge-serve send real values either way; "
    "int8 and uint8 save a step on pictures, and accelerators need them.  [default: float]",
)
@click.option(
    "--keep-float",
    multiple=True,
    metavar="PATTERN",
    help="int8: operators or layers that stay float, by name, with * and ?; repeatable.",
)
@click.option("--auto", is_flag=True, default=None, help="int8: keep the fewest layers float that pass the gates.")
@click.option(
    "--allow-float-operators",
    is_flag=True,
    default=None,
    help="int8: accept operators that stay float for want of an int8 form.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 1),
    help="Refuse a variant that loses more accuracy (AUC, mean IoU); 0.01 is one point [default: 0.01].",
)
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    help="Refuse one that chooses the model's class less often [default: by mode].",
)
@click.option(
    "--min-cosine",
    type=click.FloatRange(-1, 1),
    help="Refuse one with a lower cosine on any sample [default: by mode].",
)
@click.option(
    "--min-sqnr",
    type=float,
    metavar="DB",
    help="Refuse one with more noise in an output: signal to quantization noise ratio in dB [default: by mode].",
)
@click.option("--recipe", type=click.Path(path_type=Path), help="TOML file with these options; the command line wins.")
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
@click.option("--batch", type=click.IntRange(1), help="Fixed batch of all inputs.  [default: 1]")
@click.option("--labels", type=click.Path(path_type=Path), help="File with one class label a line.")
@click.option(
    "--samples",
    type=click.IntRange(2),
    help="Most calibration samples; a quarter as many more are held back, with --labels-for up to 1,000 of the rest.  "
    f"[default: {DEFAULT_SAMPLES}]",
)
@click.option("--seed", type=click.IntRange(0), help="For drawing samples.  [default: 0]")
@click.option("--version", type=click.IntRange(0), help="Version number [default: the next free one].")
@click.option("--force", is_flag=True, help="Replace an existing --version.")
@click.option("--name", help="The model's name in the manifest [default: OUTPUT's name].")
@click.option(
    "--report",
    metavar="FILE.html",
    type=click.Path(path_type=Path),
    help="Write the report here, too: also if no variant passes and there is no bundle.",
)
@click.option(
    "--tensorboard", metavar="LOGDIR", type=click.Path(path_type=Path), help="Write the report for TensorBoard, too."
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
@meaning_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the bundle's folder.")
@click.option("-v", "--verbose", is_flag=True, help="Show everything that tensorflow logs.")
def convert(
    model: Path,
    output: Path,
    modes: tuple[tuple[Mode, ...], ...],
    targets: tuple[tuple[Target, ...], ...],
    compat: Compat | None,
    calibration: Path | None,
    labels_for: str | None,
    metric: Any,
    io: Io | None,
    keep_float: tuple[str, ...],
    auto: bool | None,
    allow_float_operators: bool | None,
    max_drop: float | None,
    min_agreement: float | None,
    min_cosine: float | None,
    min_sqnr: float | None,
    recipe: Path | None,
    signatures: tuple[str, ...],
    shapes: tuple[str, ...],
    batch: int | None,
    labels: Path | None,
    samples: int | None,
    seed: int | None,
    version: int | None,
    force: bool,
    name: str | None,
    report: Path | None,
    tensorboard: Path | None,
    timeout: float,
    memory_limit: int | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **meaning: Any,
) -> None:
    """Convert MODEL to a bundle for devices: a SavedModel folder, a .keras or .h5 file, or a float .tflite file.

    Every variant is checked before it is written: the operators it needs, its weights, its tensor types, and its outputs in
    the device runtime against the float model's, on held-back samples, zeros and extremes. One that is too far from the
    float model is not written; the report says where its error begins.
    """
    said = Recipe(
        schema=recipes.SCHEMA,
        quantize=_joined(modes),
        io=io,
        signatures=signatures or None,
        input_shapes=input_shapes(shapes) or None,
        batch=batch,
        labels=str(labels) if labels is not None else None,
        samples=samples,
        seed=seed,
        keep_float=keep_float or None,
        auto=auto,
        allow_float_operators=allow_float_operators,
        target=_joined(targets),
        compat=compat,
        metric=metric,
        max_drop=max_drop,
        min_agreement=min_agreement,
        min_cosine=min_cosine,
        min_sqnr=min_sqnr,
        input=input_spec(meaning),
        output=output_spec(meaning),
    )
    if recipe is not None:
        said = recipes.combine(recipes.load(recipe), said)
    request = Request(
        model=model,
        output=output,
        modes=said.quantize or (),
        targets=said.target or (),
        compat=said.compat,
        calibration=calibration,
        labels_for=labels_for,
        io=said.io or "float",
        signatures=said.signatures or (),
        input_shapes=said.input_shapes or {},
        batch=said.batch or 1,
        labels=Path(said.labels) if said.labels is not None else None,
        samples=said.samples or DEFAULT_SAMPLES,
        seed=said.seed or 0,
        version=version,
        force=force,
        name=name,
        allow_float_operators=said.allow_float_operators or False,
        keep_float=said.keep_float or (),
        auto=said.auto or False,
        metric=said.metric,
        max_drop=said.max_drop,
        min_agreement=said.min_agreement,
        min_cosine=said.min_cosine,
        min_sqnr_db=said.min_sqnr,
        input=said.input or InputSpec(),
        output_spec=said.output or OutputSpec(),
        report=report,
        tensorboard=tensorboard,
        timeout_s=timeout,
        memory_limit_mb=memory_limit,
        verbose=verbose,
    )
    run(request, as_json=as_json, quiet=quiet)


def _joined(parts: tuple[tuple[Any, ...], ...]) -> tuple[Any, ...] | None:
    return tuple(dict.fromkeys(word for part in parts for word in part)) or None


def run(request: Request, *, as_json: bool, quiet: bool) -> None:
    """Convert and print; ConversionError (exit 1) at the end if a variant is missing from the bundle."""
    from edge_serve_converters import progress  # numpy and Pillow only for real work
    from edge_serve_converters.channel import NO_ROOM, disk_full
    from edge_serve_converters.convert import convert as convert_model
    from edge_serve_converters.errors import ConversionError, InconvertibleError
    from edge_serve_converters.outcome import report

    bar = progress.Bar(sys.stderr, enabled=sys.stderr.isatty() and not (as_json or quiet or request.verbose))
    try:
        with terminated_as_interrupt():
            outcome = convert_model(request, bar)
    except OSError as error:
        if not disk_full(error):
            raise
        raise UsageError(NO_ROOM.format(tempfile.gettempdir())) from error
    finally:
        bar.clear()
    if not as_json and not quiet:
        for log in progress.failure_logs(outcome):
            click.echo(log, err=True)
    if as_json:
        document = {"bundle": str(outcome.bundle) if outcome.bundle is not None else None, **report(outcome)}
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        if outcome.made and not quiet:
            click.echo(progress.table(outcome))
        if not quiet:
            sys.stdout.flush()  # the table comes before what is said of it, whoever reads both
            for line in progress.closing(outcome):
                click.echo(line, err=True)
        if outcome.bundle is not None:
            click.echo(str(outcome.bundle))
    if outcome.failures:
        nothing = not outcome.made and all(failure.inconvertible for failure in outcome.failures)
        raise (InconvertibleError if nothing else ConversionError)(progress.failed(outcome))
