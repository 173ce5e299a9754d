"""`edge-serve compare`: the options and what is printed. Importing this module imports no numpy and no tensorflow."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from edge_serve.errors import GateError, UsageError
from edge_serve_converters.request import DEFAULT_SAMPLES, DEFAULT_TIMEOUT_S

EPILOG = """\b
Examples:
  edge-serve compare models/digits/3 models/digits/4 --data samples.npz --min-agreement 0.98
  edge-serve compare models/photo models/photo --variant-a float32 --all --data photos/ -o compared.html
  edge-serve compare old.tflite new.tflite --data windows.csv --json

\b
Exit codes: 0 compared; 1 a gate failed, or an answer is no number where the reference's is;
2 wrong use, or models that cannot be compared; 130 interrupted.
"""


@click.command(epilog=EPILOG, context_settings={"max_content_width": 120})
@click.argument("reference", metavar="A", type=click.Path(path_type=Path))
@click.argument("other", metavar="B", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Real inputs, as for convert's --calibration; arrays are named after A's inputs.",
)
@click.option("--variant-a", metavar="NAME", help="Variant of A [default: the bundle's default one].")
@click.option("--variant-b", metavar="NAME", help="Variant of B [default: the bundle's default one].")
@click.option("--all", "every", is_flag=True, help="Compare every variant of both with A's.")
@click.option("--signature", metavar="KEY", help="Signature of both [default: serving_default, or the only one].")
@click.option(
    "--samples", type=click.IntRange(1), default=DEFAULT_SAMPLES, show_default=True, help="Most samples that are used."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="For drawing samples.")
@click.option(
    "--channels",
    metavar="a,b,…",
    help="CSV data: the columns that are the samples [default: the manifest's, else all].",
)
@click.option("--threads", type=click.IntRange(1, 64), default=1, show_default=True, help="Threads when timing.")
@click.option(
    "--labels-for",
    metavar="FILE|folders|data",
    help="What the samples truly are, as for convert: measures accuracy, AUC or mean IoU of both.",
)
@click.option(
    "--max-drop", type=click.FloatRange(0, 1), help="Fail if that falls by more than this; 0.01 is one point."
)
@click.option("--min-agreement", type=click.FloatRange(0, 1), help="Fail below this part of equal classes.")
@click.option("--min-cosine", type=click.FloatRange(-1, 1), help="Fail below this cosine on any sample.")
@click.option(
    "-o", "--output", metavar="REPORT.html", type=click.Path(path_type=Path), help="Write the report as one HTML file."
)
@click.option(
    "--tensorboard",
    metavar="LOGDIR",
    type=click.Path(path_type=Path),
    help="Write the figures as TensorBoard summaries.",
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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; the exit code says it.")
@click.option("-v", "--verbose", is_flag=True, help="Show what the runtime logs.")
def compare(
    reference: Path,
    other: Path,
    data: Path,
    variant_a: str | None,
    variant_b: str | None,
    every: bool,
    signature: str | None,
    samples: int,
    seed: int,
    channels: str | None,
    threads: int,
    labels_for: str | None,
    max_drop: float | None,
    min_agreement: float | None,
    min_cosine: float | None,
    output: Path | None,
    tensorboard: Path | None,
    timeout: float,
    memory_limit: int | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Compare model B with model A, the reference, on the same data.

    A and B are bundles (a folder with versions, or one version) or .tflite files. Both run in the device runtime; each
    gets the samples processed as its manifest says. Outputs are matched by name, else by position.
    """
    from edge_serve_converters.compare import Comparison
    from edge_serve_converters.compare import compare as compare_models
    from edge_serve_converters.gates import Gates
    from edge_serve_converters.interrupt import terminated_as_interrupt
    from edge_serve_converters.progress import Bar

    if max_drop is not None and labels_for is None:
        raise UsageError("--max-drop needs --labels-for: what the samples truly are")
    if output is not None:
        _check_output(output)
    request = Comparison(
        reference=reference,
        other=other,
        data=data,
        reference_variant=variant_a,
        other_variant=variant_b,
        every_variant=every,
        signature=signature,
        samples=samples,
        seed=seed,
        channels=tuple(name.strip() for name in channels.split(",")) if channels is not None else None,
        threads=threads,
        labels_for=labels_for,
        gates=Gates(max_drop, min_agreement, min_cosine),
        timeout_s=timeout,
        memory_limit_mb=memory_limit,
        verbose=verbose,
    )
    bar = Bar(sys.stderr, enabled=sys.stderr.isatty() and not (as_json or quiet or verbose))
    try:
        with terminated_as_interrupt():
            document = compare_models(request, bar.stage)
    finally:
        bar.clear()
    if output is not None:
        write_report(output, document)
    if tensorboard is not None:
        from edge_serve_converters.tensorboard import write

        write(tensorboard, document)
    if as_json:
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    elif not quiet:
        click.echo(table(document))
        for line in closing(document):
            click.echo(line, err=True)
    failed = document["failed"]
    if failed:
        lines = "\n".join(f"  {entry['name']}: {entry['reason']}" for entry in failed)
        raise GateError(f"{len(failed)} of {len(document['variants']) - 1} compared files failed:\n{lines}")


def _check_output(output: Path) -> None:
    """Refuse a report's place before any long work."""
    if output.is_dir():
        raise UsageError(f"-o {output}: is a folder; name the HTML file")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"-o {output}: the folder {output.parent} does not exist; make it, or choose another place")


def write_report(output: Path, document: Mapping[str, Any]) -> None:
    """Write the document as HTML; at every moment the file is there whole or not at all. UsageError if it cannot be."""
    from edge_serve_converters.report_html import render

    text = render(document)
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=output.absolute().parent, prefix=f".{output.name}.", delete=False
        ) as beside:
            path = Path(beside.name)
            try:
                beside.write(text)
                beside.flush()
                path.chmod(0o644)
                path.replace(output)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise UsageError(f"-o {output}: cannot be written ({error.strerror}); choose another place") from error


_HEAD = (
    "file",
    "bytes",
    "max error",
    "mean error",
    "cosine",
    "SQNR dB",
    "same class",
    "task",
    "change",
    "p50 ms",
    "XNNPACK",
)


def table(document: Mapping[str, Any]) -> str:
    """Draw the table of all files; the reference is the first and has no errors."""
    from edge_serve_converters.report_markup import TASKS

    metric = next((TASKS[task["metric"]] for task in _tasks(document)), "task")
    head = tuple(metric if word == "task" else word for word in _HEAD)
    rows = [head, *(_row(entry) for entry in document["variants"])]
    kept = [place for place in range(len(_HEAD)) if place == 0 or any(row[place] != "-" for row in rows[1:])]
    widths = {place: max(len(row[place]) for row in rows) for place in kept}
    return "\n".join(
        "  ".join(
            row[place].ljust(widths[place]) if place == 0 else row[place].rjust(widths[place]) for place in kept
        ).rstrip()
        for row in rows
    )


def _tasks(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [entry["quality"]["task"] for entry in document["variants"] if "task" in entry["quality"]]


def _change(task: Mapping[str, Any]) -> str:
    """Say how the task metric moved from the reference, in points of a hundred."""
    drop = task.get("drop")
    return "-" if drop is None else f"{-100 * drop:+.1f} points" if abs(drop) >= 0.0005 else "±0"


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    figures = entry["quality"]
    return (
        entry["name"],
        f"{entry['bytes']:,}",
        _figure(figures.get("max_error"), ".3g"),
        _figure(figures.get("mean_error"), ".3g"),
        _figure(figures.get("cosine"), ".5f"),
        _decibels(figures.get("sqnr_db")),
        _figure(figures.get("top1_agreement"), ".1%"),
        _figure(figures.get("task", {}).get("variant"), ".4f"),
        _change(figures.get("task", {})),
        _figure(entry["latency_ms"]["p50"], ".3g"),
        f"{entry['xnnpack_operators']} of {sum(entry['operators'].values())}",
    )


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _decibels(value: float | None) -> str:
    from edge_serve_converters.report_markup import is_exact

    return "exact" if is_exact(value) else _figure(value, ".1f")


def closing(document: Mapping[str, Any]) -> Sequence[str]:
    """Give the lines after the table: what it was measured on, and what a person should know."""
    samples = document["data"]["samples"]
    from edge_serve_converters.report_markup import TASKS

    on = f"{samples} {document['measured_on']}, which may include samples that calibrated one of the models"
    return [
        *(f"{TASKS[t['metric']]} is of output {t['output']!r} against the labels" for t in _tasks(document)[:1]),
        f"errors against {document['default']} on {on}",
        *(f"note: {text}" for text in document["warnings"]),
    ]
