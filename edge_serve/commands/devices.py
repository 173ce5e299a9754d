"""`edge-serve devices`: which board this is, its accelerators and cameras, and how a configuration names them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from edge_serve.commands.tables import table


@click.command(
    epilog="""\b
Examples:
  edge-serve devices
  edge-serve devices --json"""
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option(
    "--root", type=click.Path(path_type=Path), default="/", hidden=True, help="A recorded tree of a board's files."
)
def devices(as_json: bool, root: Path) -> None:
    """List accelerators and cameras: how a configuration names them, and what keeps them from being used."""
    from edge_serve_devices import boards, hardware

    board = boards.recognise(root)
    accelerators, cameras = hardware.accelerators(root), hardware.cameras(root)
    problems = board.problems([each.delegate or f"npu:{each.path.rpartition('/')[2]}" for each in accelerators])
    if as_json:
        document = {
            "v": 1,
            "board": boards.describe(board),
            "accelerators": [dataclasses.asdict(each) for each in accelerators],
            "cameras": [dataclasses.asdict(each) for each in cameras],
            "problems": [{"id": each.id, "problem": each.problem, "remedy": each.remedy} for each in problems],
        }
        click.echo(json.dumps(document))
        return
    click.echo(
        f"{board.model}: {board.machine}, {board.bits} bit, {board.cores} cores, {board.memory_bytes / 2**30:.1f} GiB, {board.os_name}"
    )
    rows: list[Any] = [(each.name, each.path, each.delegate or "-", _state(each)) for each in accelerators]
    _print("accelerators", ("accelerator", "where", "delegate", ""), rows)
    _print(
        "cameras", ("camera", "where", "driver", ""), [(c.name, c.path, c.driver or "-", _state(c)) for c in cameras]
    )
    for each in problems:
        click.echo(f"\n! {each.problem}\n  {each.remedy}")


def _print(what: str, header: tuple[str, ...], rows: list[Any]) -> None:
    click.echo("")
    if not rows:
        click.echo(f"no {what}")
    for line in table(header, rows) if rows else ():
        click.echo(line)


def _state(found: Any) -> str:
    return "ok" if found.usable else f"{found.why_not}; {found.remedy}"
