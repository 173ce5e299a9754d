"""`edge-serve status`: how the running service is, as it says itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edge_serve.commands.tables import table
from edge_serve.config import DEFAULT_FILE
from edge_serve.errors import EXIT_GATE, EXIT_OK, ProtocolError, UnavailableError

ANSWER_TIMEOUT_S = 10.0
MAX_DOCUMENT = 16 * 1024 * 1024
COLUMNS = ("pipeline", "model", "delegate", "connected", "in", "out", "errors", "dropped", "p50 ms", "p99 ms")


@click.command(
    epilog="""\b
Examples:
  edge-serve status -c edge-serve.toml
  edge-serve status --json | jq .problems"""
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
@click.option("--json", "as_json", is_flag=True, help="Print the document of the status topic.")
def status(file: Path, as_json: bool) -> int:
    """Show how the running service is: its state, its pipelines with their counts, and what is wrong.

    Exits with 0 if it is online, 1 if it is degraded, 3 if no service runs.
    """
    from edge_serve.app import load
    from edge_serve.commands.calling import call

    with call(file, load(file), MAX_DOCUMENT) as caller:
        caller.ask("status")
        message = caller.receive(ANSWER_TIMEOUT_S)
    if message is None:
        raise UnavailableError(f"the service does not answer within {ANSWER_TIMEOUT_S:g} s")
    if message.header["type"] != "status" or message.body is None:
        raise ProtocolError(f"the service answers with {message.header['type']!r:.60}")
    document: dict[str, Any] = json.loads(message.body)
    if as_json:
        click.echo(json.dumps({**document, "pid": message.header.get("pid"), "config": message.header.get("config")}))
    else:
        click.echo(render(document, message.header.get("pid")))
    return EXIT_OK if document["state"] == "online" else EXIT_GATE


def render(document: dict[str, Any], process: object) -> str:
    """Give the document as text for people."""
    up = f"up {duration(document['uptime_s'])}"
    lines = [
        f"{document['device']}: {document['state']} since {document['since']}",
        f"edge-serve {document['version']} (process {process}), {up}, {document['runtime']} on {document['board']}",
        "",
    ]
    lines += table(COLUMNS, [_row(name, numbers) for name, numbers in document["pipelines"].items()])
    spool = document["spool"]
    if spool["items"] or spool["dropped"]:
        lines += ["", f"spool: {spool['items']} results, {spool['bytes']} bytes; dropped: {_sum(spool['dropped'])}"]
    if document["problems"]:
        lines += ["", *(f"! {text}" for text in document["problems"])]
    return "\n".join(lines)


def _row(name: str, numbers: dict[str, Any]) -> tuple[str, ...]:
    version = f" {numbers['version']}" if numbers["version"] is not None else ""
    ages = [numbers["age_ms"][percent] for percent in ("p50", "p99")]
    return (
        name,
        f"{numbers['model']}{version} ({numbers['variant']})",
        numbers["delegate"],
        "yes" if numbers["connected"] else "no",
        str(numbers["in"]),
        str(numbers["out"]),
        _sum(numbers["errors"]),
        _sum(numbers["dropped"]),
        *("-" if age is None else f"{age:.1f}" for age in ages),
    )


def _sum(counts: Any) -> str:
    """Give a count with its reasons: 3 (latest), or 5 (3 latest, 2 rejected)."""
    if not isinstance(counts, dict):
        return str(counts)
    if len(counts) == 1:
        ((reason, number),) = counts.items()
        return f"{number} ({reason})"
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts.items())
    return f"{sum(counts.values())} ({reasons})" if counts else "0"


def duration(seconds: float) -> str:
    """Write seconds as 3 d 4 h, 5 h 12 min, 6 min 2 s or 7 s."""
    whole = int(seconds)
    for unit, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // part} {part_name}"
    return f"{whole} s"
