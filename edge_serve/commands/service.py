"""`edge-serve service`: the systemd service of a configuration. What it does is in the hardware room (edge_serve_devices)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_serve import plugins
from edge_serve.config import Config, Wiring
from edge_serve.config import load as load_config
from edge_serve.errors import EXIT_GATE, EXIT_OK, ConfigError, Problem, UnavailableError, UsageError

if TYPE_CHECKING:
    from edge_serve_devices.service import Outcome, Wish

DEFAULT_CONFIG = "/etc/edge-serve/edge-serve.toml"
DEFAULT_NAME = "edge-serve"


@click.group(
    epilog="""\b
Examples:
  sudo edge-serve service install -c /etc/edge-serve/edge-serve.toml
  sudo edge-serve service install --allow camera,edgetpu --credential mqtt-password=/etc/edge-serve/mqtt-password
  edge-serve service status"""
)
def service() -> None:
    """Install, remove or look at the systemd service of a configuration."""


_name = click.option(
    "--name",
    default=DEFAULT_NAME,
    show_default=True,
    help="Name of the service; NAME@INSTANCE is the instance of its template for /etc/edge-serve/INSTANCE.toml.",
)
_prefix = click.option(
    "--prefix",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="Write below this folder, as for an image, and leave this system's systemd alone.",
)
_dry_run = click.option("--dry-run", is_flag=True, help="Print the units and what would be done; change nothing.")


@service.command(
    epilog="""\b
--allow opens hardware by name:
  camera   cameras, USB and CSI          edgetpu  Coral Edge TPU, USB and PCIe
  gpio     GPIO lines                    gpu      GPUs
  i2c      I2C sensors                   iio      industrial I/O buffers
  serial   UART and USB serial ports     spi      SPI sensors
  usb      other USB devices"""
)
@click.option(
    "-c",
    "--config",
    "file",
    type=click.Path(path_type=Path),
    default=DEFAULT_CONFIG,
    show_default=True,
    help="The configuration that the service serves.",
)
@_name
@click.option("--user", help="Run as this user (default: one of its own, made at each start).")
@click.option("--group", "groups", multiple=True, help="Join this group, for files that it may read. Can be repeated.")
@click.option("--allow", multiple=True, help="Open hardware: see below. Names with commas, or repeated.")
@click.option(
    "--credential",
    "credentials",
    multiple=True,
    metavar="NAME=FILE",
    help="A secret, which systemd reads for the service: mqtt-password, socket-token. Can be repeated.",
)
@click.option(
    "--write",
    "writable",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="A folder that a plug-in writes to. Can be repeated.",
)
@click.option(
    "--watchdog",
    type=click.FloatRange(0, 86400),
    default=30.0,
    show_default=True,
    help="Seconds without a sign of life after which systemd restarts it; 0: never.",
)
@click.option(
    "--program",
    "choice",
    type=click.Choice(["auto", "build", "here"]),
    default="auto",
    show_default=True,
    help="build: make /opt/edge-serve from what is installed here; here: use this environment; auto: here if the service "
    "may read it, else build.",
)
@click.option("--now/--no-start", "start", default=True, help="Start it, or only have it started at boot.")
@_prefix
@_dry_run
def install(
    file: Path,
    name: str,
    user: str | None,
    groups: tuple[str, ...],
    allow: tuple[str, ...],
    credentials: tuple[str, ...],
    writable: tuple[Path, ...],
    watchdog: float,
    choice: str,
    start: bool,
    prefix: Path | None,
    dry_run: bool,
) -> int:
    """Write a hardened systemd unit for a configuration, and start it now and at boot.

    First everything is checked that could go wrong: the configuration and its models, each file that the service could not
    read, the unit; at last the configuration again, by the service's program inside its sandbox. Installing again replaces
    unit and program; the program before is kept.

    Exits with 2 if something has to be put right (nothing is changed then), 3 if there is no systemd here, or the service does
    not come up.
    """
    from edge_serve_devices import service as room
    from edge_serve_devices.systemd import hardware, manager
    from edge_serve_devices.systemd.unit import Name

    if not (dry_run or prefix) and os.geteuid() != 0:
        raise UsageError("installing a service needs root: run this with sudo, or look at it first with --dry-run")
    wish = room.Wish(
        Name.read(name),
        file.absolute(),
        prefix,
        user,
        groups,
        hardware.named(allow),
        tuple(room.credential(each) for each in credentials),
        writable,
        watchdog,
        choice,  # type: ignore[arg-type]  # one of click's choices
        start,
    )
    if not (dry_run or prefix) and start and not manager.booted():
        raise UnavailableError(
            "systemd does not run here (a container?): use --no-start, or run `edge-serve run` as it starts things"
        )
    room.require_place(wish.name, wish.config)
    with room.surroundings(wish.name, wish.credentials):
        config = _load(wish)
        outcome = room.prepare(wish, config)
    if dry_run:
        _show(wish, outcome)
    else:
        room.install(wish, outcome, _say)
    for note in outcome.notes:
        _say(f"note: {note}")
    return EXIT_OK


def _load(wish: Wish) -> Config:
    """Check a configuration as `edge-serve check` does, as the service will see it."""
    from edge_serve.commands.check import check_models
    from edge_serve_devices.grants import managed

    folders = managed(wish.name.folder)

    class AsService:
        """A part whose folders systemd will have made."""

        def __init__(self, part: Any) -> None:
            self._part = part

        def __getattr__(self, name: str) -> Any:
            return getattr(self._part, name)

        def check(self, options: Any, key: str, wiring: Wiring) -> list[Problem]:
            found: list[Problem] = self._part.check(options, key, wiring)
            return [problem for problem in found if not self._comes(problem, options, wiring)]

        def _comes(self, problem: Problem, options: Any, wiring: Wiring) -> bool:
            value = getattr(options, problem.key.rpartition(".")[2], None)
            if not isinstance(value, str):
                return False
            path = wiring.config.resolve(value)
            return any(folder in path.parents for folder in folders) and not path.parent.exists()

    def resolver(kind: plugins.Kind, name: str) -> Any:
        return AsService(plugins.load(kind, name))

    config = load_config(wish.config, resolver)
    _, problems = check_models(config)
    if problems:
        raise ConfigError(str(wish.config), problems)
    return config


def _show(wish: Wish, outcome: Outcome) -> None:
    from edge_serve_devices import program

    if outcome.builds:
        click.echo(f"# would make {program.DEFAULT} from what is installed in the environment that runs now")
    for path, text in outcome.files.items():
        click.echo(f"# would write {path}:\n{text}")
    click.echo(f"# would have {wish.name.unit} started at boot{' and now' if wish.start and not wish.prefix else ''}")


def _say(text: str) -> None:
    click.echo(text, err=True)


@service.command()
@_name
@click.option("--purge", is_flag=True, help="Remove its state, too: what waits in the spool is lost.")
@_prefix
@_dry_run
def uninstall(name: str, purge: bool, prefix: Path | None, dry_run: bool) -> int:
    """Stop a service and remove its units, and /opt/edge-serve when no other service needs it. Its state is kept.

    Exits with 2 if there is no such service.
    """
    from edge_serve_devices import removal
    from edge_serve_devices.systemd.unit import Name

    if not (dry_run or prefix) and os.geteuid() != 0:
        raise UsageError("removing a service needs root: run this with sudo, or look at it first with --dry-run")
    removal.uninstall(Name.read(name), prefix, purge=purge, dry_run=dry_run, say=_say)
    return EXIT_OK


@service.command()
@_name
@click.option(
    "-n", "--lines", type=click.IntRange(0, 1000), default=10, show_default=True, help="Last lines of its log."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def status(name: str, lines: int, as_json: bool) -> int:
    """Say how a service is: what systemd knows of it, what it says itself, and the end of its log.

    Exits with 0 if it serves, 1 if it does not, 3 if there is no systemd here.
    """
    from edge_serve_devices import condition
    from edge_serve_devices.systemd.unit import Name

    found = condition.status(Name.read(name), lines)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
    else:
        _print(found)
    return EXIT_OK if found["state"] == "active" else EXIT_GATE


def _print(found: dict[str, Any]) -> None:
    if not found["installed"]:
        click.echo(f"{found['name']}: not installed (`edge-serve service install`)")
        return
    since = f" since {found['since']}" if found["since"] else ""
    click.echo(f"{found['name']}: {found['state']} ({found['detail']}){since}")
    watchdog = found["watchdog"] or "off"
    click.echo(
        f"  restarts {found['restarts']}, watchdog {watchdog}, at boot: {found['at_boot']}, process {found['pid'] or 'none'}"
    )
    if found["state"] != "active" and found["result"] != "success":
        click.echo(f"  ended with {found['result']}, exit code {found['exit_code']}")
    if found["says"]:
        click.echo(f"  says: {found['says']}")
    for line in _answer(found["service"]):
        click.echo(f"  {line}")
    for line in found["log"]:
        click.echo(f"  | {line}")


def _answer(document: dict[str, Any] | None) -> list[str]:
    """Give what the service says of itself in a few lines."""
    if document is None:
        return []
    if "error" in document:
        return [f"does not answer: {document['error']}"]
    lines = [f"answers: {document.get('state')}"]
    for name, line in dict(document.get("pipelines") or {}).items():
        errors, dropped = (sum(dict(line.get(key) or {}).values()) for key in ("errors", "dropped"))
        lines.append(f"{name}: {line.get('in')} in, {line.get('out')} out, {errors} errors, {dropped} dropped")
    waiting = dict(document.get("spool") or {}).get("items")
    lines += [f"{waiting} results wait on disk"] if waiting else []
    return lines + [f"problem: {problem}" for problem in document.get("problems") or []]
