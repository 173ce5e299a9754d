"""`edge-serve spool`: what waits on disk for an upstream that is away; with the service running or not."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_serve.config import DEFAULT_FILE
from edge_serve.errors import EXIT_OK, UnavailableError, UsageError

if TYPE_CHECKING:
    from edge_serve.spool.look import LaneLook

FOLDER = "spool"


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which spool, and what of it."""
    for option in (
        click.option("--dead", is_flag=True, help="Dead letters: results that upstream refuses for ever."),
        click.option("--pipeline", help="Only results of this pipeline."),
        click.option("--sink", help="Only results for this sink, as `spool status` names it."),
        click.option(
            "--state-dir", type=click.Path(path_type=Path), help="The state folder, in place of a configuration."
        ),
        click.option(
            "-c",
            "--config",
            "file",
            type=click.Path(path_type=Path),
            default=DEFAULT_FILE,
            show_default=True,
            help="The configuration that `edge-serve run` serves.",
        ),
    ):
        command = option(command)
    return command


@click.group(
    epilog="""\b
Examples:
  edge-serve spool status
  edge-serve spool export --pipeline vibration -o waiting.jsonl
  edge-serve spool purge --sink vibration/mqtt/:old/topic --yes"""
)
def spool() -> None:
    """Show, export or delete the results that wait on disk while an upstream is away."""


@spool.command()
@_common
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def status(
    file: Path, state_dir: Path | None, sink: str | None, pipeline: str | None, dead: bool, as_json: bool
) -> int:
    """Show what waits, for whom, for how long, and what was ever dropped."""
    from edge_serve.spool.look import VERSION, Reader, set_aside

    folder, named = _folder(file, state_dir)
    with Reader(folder) as reader:
        lanes = [lane for lane in reader.lanes() if _wanted(lane, sink, pipeline, dead=dead or None)]
    aside = set_aside(folder)
    rows = [{**asdict(lane), "orphaned": named is not None and lane.key not in named} for lane in lanes]
    if as_json:
        click.echo(json.dumps({"v": VERSION, "folder": str(folder), "sinks": rows, "set_aside": aside}))
        return EXIT_OK
    for row in rows:
        _describe(row)
    if not any(row["items"] for row in rows):
        click.echo("nothing waits")
    for name in aside:
        click.echo(f"set aside as damaged: {folder / name}")
    return EXIT_OK


def _describe(row: dict[str, Any]) -> None:
    what = "dead letters" if row["kind"] == "dead" else "results"
    waited = f", the oldest for {row['oldest_s']:.0f} s" if row["oldest_s"] is not None else ""
    dropped = "".join(f", {number} dropped ({reason})" for reason, number in row["dropped"].items())
    orphaned = "; the configuration does not name this sink" if row["orphaned"] and row["items"] else ""
    click.echo(f"{row['key']}: {row['items']} {what}, {row['bytes']} bytes{waited}{dropped}{orphaned}")


@spool.command()
@_common
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file; default: standard output.")
def export(
    file: Path, state_dir: Path | None, sink: str | None, pipeline: str | None, dead: bool, output: Path | None
) -> int:
    """Write what waits as JSON lines, in order; nothing is deleted."""
    from edge_serve.spool.look import Reader

    folder, _ = _folder(file, state_dir)
    number = 0
    with Reader(folder) as reader, _writer(output) as write:
        lanes = [lane for lane in reader.lanes() if _wanted(lane, sink, pipeline, dead=dead)]
        for document in reader.rows(lanes):
            write(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n")
            number += 1
    click.echo(f"{number} results", err=True)
    return EXIT_OK


@contextlib.contextmanager
def _writer(output: Path | None) -> Iterator[Callable[[str], Any]]:
    if output is None:
        yield lambda text: click.echo(text, nl=False)
        return
    try:
        with output.open("w", encoding="utf-8", errors="replace") as stream:
            yield stream.write
    except OSError as error:
        raise UnavailableError(f"{output}: cannot be written: {error.strerror}") from error


@spool.command()
@_common
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def purge(
    file: Path, state_dir: Path | None, sink: str | None, pipeline: str | None, dead: bool, yes: bool, as_json: bool
) -> int:
    """Delete what waits; it is never sent then. A running service may send the few that it has already read."""
    from edge_serve.instance import Instance
    from edge_serve.spool.look import VERSION, Reader, tidy
    from edge_serve.spool.look import purge as delete

    folder, _ = _folder(file, state_dir)
    with Reader(folder) as reader:
        lanes = [lane for lane in reader.lanes() if lane.items and _wanted(lane, sink, pipeline, dead=dead)]
    number = sum(lane.items for lane in lanes)
    if number and not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"{number} results would be deleted; say --yes, or `edge-serve spool export` them first")
        for lane in lanes:
            click.echo(f"{lane.key}: {lane.items}", err=True)
        click.confirm(f"Delete {number} results for good?", abort=True, err=True)
    gone = delete(folder, lanes)
    if gone:
        with contextlib.suppress(UnavailableError, OSError), contextlib.closing(Instance(folder.parent)):
            tidy(folder)  # no service runs: its files are nobody else's now
    click.echo(json.dumps({"v": VERSION, "purged": gone}) if as_json else f"{gone} results deleted")
    return EXIT_OK


def _folder(file: Path, state_dir: Path | None) -> tuple[Path, set[str] | None]:
    """Give the spool's folder, and the sinks that the configuration names (None without one)."""
    if state_dir is not None:
        return state_dir / FOLDER, None
    from edge_serve.app import load
    from edge_serve.spill import keys

    config = load(file)
    return config.state_dir / FOLDER, keys(config)


def _wanted(lane: LaneLook, sink: str | None, pipeline: str | None, *, dead: bool | None) -> bool:
    kind = dead is None or dead == (lane.kind == "dead")
    return kind and sink in (None, lane.key) and pipeline in (None, lane.pipeline)
