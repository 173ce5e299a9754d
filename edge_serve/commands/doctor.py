"""`edge-serve doctor`: what is wrong with this machine and this configuration, and what to do about it."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_serve.commands.tables import table
from edge_serve.errors import EXIT_GATE, EXIT_OK, ConfigError, EdgeServeError

if TYPE_CHECKING:
    from edge_serve.config import Config
    from edge_serve_devices.doctor import Finding

MARKS = {"ok": "ok", "note": "note", "warning": "WARN", "error": "ERROR"}


@click.command(
    epilog="""\b
Examples:
  edge-serve doctor
  edge-serve doctor -c edge-serve.toml --json"""
)
@click.option(
    "-c",
    "--config",
    "file",
    type=click.Path(path_type=Path),
    help="Look at this configuration's models and brokers, too.",
)
@click.option("--name", default="edge-serve", show_default=True, help="The service to ask for, where systemd runs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option(
    "--root", type=click.Path(path_type=Path), default="/", hidden=True, help="A recorded tree of a board's files."
)
def doctor(file: Path | None, name: str, as_json: bool, root: Path) -> int:
    """Look at board, system, runtimes, delegates, cameras, brokers, disk, clock, heat and memory; say what is wrong.

    Exits with 1 if anything is an error.
    """
    from edge_serve_devices.doctor import examine, service

    findings: list[Finding] = []
    config, said = _config(file)
    findings += said
    folder = config.state_dir if config is not None else None
    for each in (*examine(root, folder), *service(name), *(_of_config(config) if config is not None else ())):
        if sys.stderr.isatty():
            click.echo(f"\r\x1b[K{each.area} …", nl=False, err=True)
        findings.append(each)
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", nl=False, err=True)
    failed = any(each.state == "error" for each in findings)
    if as_json:
        click.echo(json.dumps({"v": 1, "ok": not failed, "findings": [dataclasses.asdict(each) for each in findings]}))
    else:
        _print(findings)
        if file is None:
            click.echo("\nwith -c FILE models and brokers are looked at, too")
    return EXIT_GATE if failed else EXIT_OK


def _config(file: Path | None) -> tuple[Config | None, list[Finding]]:
    from edge_serve_devices.doctor import Finding

    if file is None:
        return None, []
    from edge_serve.app import load

    try:
        return load(file), []
    except ConfigError as error:
        return None, [Finding("configuration", each.key, "error", each.what, each.remedy) for each in error.problems]


def _of_config(config: Config) -> Iterator[Finding]:
    """Look at the models and brokers of a configuration."""
    from edge_serve.commands.check import check_models
    from edge_serve_devices.doctor import Finding

    checked, problems = check_models(config)
    for each in checked:
        remedy = "mend that, or ask for what is here" if each.instead else ""
        yield Finding("models", each.name, "warning" if each.instead else "ok", str(each), remedy)
    for problem in problems:
        yield Finding("models", problem.key, "error", problem.what, problem.remedy)
    used = {
        part.options.broker
        for pipeline in config.pipelines
        for part in (pipeline.source, *pipeline.sinks)
        if getattr(part.options, "broker", None) in config.brokers
    }
    if config.has_status and config.status.enabled and config.status.broker in config.brokers:
        used.add(config.status.broker)
    for name in sorted(used):
        yield _broker(config, name)


def _broker(config: Config, name: str) -> Finding:
    """Connect to a broker, as the service does but under a name of our own, and leave again."""
    from edge_serve.mqtt import Connection
    from edge_serve_devices.doctor import Finding

    connection = Connection(config, name, f"{config.device}.doctor.{os.getpid()}", clean=True)
    title = f"[mqtt.{name}]" if name else "[mqtt]"
    try:
        connection.open()
    except EdgeServeError as error:
        return Finding(
            "brokers", title, "error", f"{title} {error}", "check url, network, name and password, and certificates"
        )
    finally:
        connection.close()
    return Finding("brokers", title, "ok", f"{title} {connection.address} answers")


def _print(findings: list[Finding]) -> None:
    rows = [(each.area, MARKS[each.state], each.what) for each in findings]
    header, *lines = table(("area", "", "finding"), rows)
    click.echo(header)
    for line, each in zip(lines, findings, strict=True):
        click.echo(line)
        if each.remedy and each.state != "ok":
            click.echo(f"{'':{line.index(each.what)}}→ {each.remedy}")
    bad = [each for each in findings if each.state in ("warning", "error")]
    click.echo(f"\n{len(bad)} of {len(findings)} findings need a look" if bad else "\nall is well")
