"""`edge-serve demo`: the serving half of the demo, on an installed wheel, without TensorFlow."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import click

from edge_serve.errors import EXIT_GATE

MODELS = Path(__file__).resolve().parents[1] / "demo" / "models"


@click.command(
    epilog="""\b
Example:
  edge-serve demo"""
)
@click.option(
    "--models",
    type=click.Path(path_type=Path, exists=True),
    help="Folder with the bundles motion and digits (default: those of the wheel).",
)
@click.option(
    "--reference",
    type=click.Path(path_type=Path, exists=True),
    help="Folder with the float models' answers (default: those of the wheel).",
)
@click.option("--no-broker", is_flag=True, help="Use the Unix socket only, even if the embedded broker is installed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def demo(models: Path | None, reference: Path | None, no_broker: bool, as_json: bool) -> int:
    """Serve a motion classifier and a digit classifier, send them test data, and check what comes back.

    With the extra [broker] the motion samples travel over MQTT through an embedded broker; without it over a socket.
    Exits with 1 if results are missing, or less right than one point below the float models'.
    """
    from edge_serve.demo import scenario
    from edge_serve.demo.broker import EmbeddedBroker, available

    def say(text: str) -> None:
        click.echo(text, err=True)

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-serve-demo-")))
        broker = None
        if no_broker:
            say("no broker: samples go over the Unix socket")
        elif available():
            broker = stack.enter_context(EmbeddedBroker(folder))
            say(f"embedded broker: {broker.url}")
        else:
            say(
                "the embedded broker is not installed (pip install 'edge-serve[broker]'): samples go over the Unix socket"
            )
        outcomes = scenario.run((models or MODELS).absolute(), reference, folder, broker, say)
    documents = [outcome.to_dict() for outcome in outcomes]
    problems = [f"{outcome.name}: {problem}" for outcome in outcomes for problem in outcome.problems]
    if as_json:
        click.echo(json.dumps({"v": 1, "ok": not problems, "pipelines": documents}, indent=2))
    else:
        for outcome in outcomes:
            click.echo(f"\n{outcome.name}: the first results")
            for line in outcome.shown:
                click.echo(f"  {line}")
        click.echo()
        _print_table(documents)
    for problem in problems[:10]:
        say(f"WRONG  {problem}")
    if not problems:
        say("\nall results are there and as right as the float models'")
    return EXIT_GATE if problems else 0


def _print_table(documents: list[dict[str, Any]]) -> None:
    head = ("pipeline", "over", "model", "inputs", "results", "accuracy", "float model", "p50 ms", "p99 ms")
    rows = [
        (
            each["pipeline"],
            each["transport"],
            each["model"],
            str(each["inputs"]),
            str(each["results"]),
            f"{each['accuracy']:.1%}",
            f"{each['float_accuracy']:.1%}",
            f"{each['latency_ms']['p50'] or float('nan'):.2f}",
            f"{each['latency_ms']['p99'] or float('nan'):.2f}",
        )
        for each in documents
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
