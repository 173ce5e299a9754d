"""The systemd service, installed from a configuration. The command is edge_serve.commands.service.

Whatever can be wrong is found before anything is changed: the configuration, what the service could not reach, a unit
that systemd would not take, a program that does not start, and at last the configuration again, checked by the new
program inside the sandbox itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from edge_serve.config import Config
from edge_serve.errors import ConfigError, UnavailableError, UsageError
from edge_serve_devices import access, distributions, grants, program, removal
from edge_serve_devices.distributions import OURS
from edge_serve_devices.systemd import hardware, manager, places, unit
from edge_serve_devices.systemd.unit import CONFIG_FOLDER, MARK, Name, Plan

Say = Callable[[str], None]
ProgramChoice = Literal["auto", "build", "here"]
CREDENTIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# A unit that came up and dies of what it meets at once does so within this time.
SETTLE_S = 1.0
LOG_LINES = 10


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for on the command line."""

    name: Name
    config: Path
    prefix: Path | None = None
    user: str | None = None
    groups: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    credentials: tuple[tuple[str, Path], ...] = ()
    writable: tuple[Path, ...] = ()
    watchdog_s: float = 30.0
    choice: ProgramChoice = "auto"
    start: bool = True


@dataclass(slots=True)
class Outcome:
    """What an installation comes to: files by their final path, the program, and notes for people."""

    plan: Plan
    files: dict[Path, str]
    builds: bool
    notes: list[str] = field(default_factory=list)


def credential(text: str) -> tuple[str, Path]:
    """Read NAME=/path of a secret's file; UsageError says what is wrong, and never what the file holds."""
    name, sign, place = text.partition("=")
    if not sign or not CREDENTIAL.fullmatch(name):
        raise UsageError("--credential: write NAME=/path/of/file, as mqtt-password=/etc/edge-serve/mqtt-password")
    path = Path(place)
    unit.plain(path)
    try:
        with path.open("rb") as stream:
            empty = not stream.read(1)
    except OSError as error:
        raise UsageError(
            f"--credential {name}: {path} cannot be read ({error.strerror}); give the path of a file"
        ) from error
    if empty:
        raise UsageError(f"--credential {name}: {path} is empty")
    return name, path


def require_place(name: Name, config: Path) -> None:
    """UsageError if the configuration does not lie where the unit of this name looks for it."""
    place = CONFIG_FOLDER / f"{name.instance}.toml"
    if name.instance is not None and config != place:
        raise UsageError(
            f"--name {name}: the configuration of this instance is {place}; put {config} there, or use a name without '@'"
        )


@contextlib.contextmanager
def surroundings(name: Name, credentials: tuple[tuple[str, Path], ...]) -> Iterator[None]:
    """Let this process see the environment that systemd gives to the service, for as long as this lasts."""
    with tempfile.TemporaryDirectory(prefix="edge-serve-credentials-") as folder:
        for each, path in credentials:
            Path(folder, each).symlink_to(path.absolute())
        values = {
            "STATE_DIRECTORY": str(grants.STATE / name.folder),
            "RUNTIME_DIRECTORY": str(grants.RUNTIME / name.folder),
            "CREDENTIALS_DIRECTORY": folder if credentials else None,
        }
        before = dict(os.environ)
        for key in [key for key in os.environ if key.startswith(("EDGE_SERVE_", "XDG_"))] + list(values):
            os.environ.pop(key, None)
        os.environ.update({key: value for key, value in values.items() if value is not None})
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def prepare(wish: Wish, config: Config) -> Outcome:
    """Find what is to be written, and everything that speaks against it; nothing is changed. Raises UsageError."""
    folder = wish.name.folder
    unit.plain(config.path)
    joined, notes = hardware.groups_here(wish.allow)
    sockets = list(grants.socket_groups(config))
    who = access.reader(wish.user, [*wish.groups, *joined, *sockets])
    wanted, problems = grants.derive(config, folder, who, wish.writable)
    if problems:
        raise ConfigError(str(config.path), problems)
    notes += _credential_notes(wish, config)
    command, builds = _program(wish, who)
    plan = Plan(
        wish.name,
        command,
        config.path,
        wanted,
        wish.allow,
        wish.groups,
        wish.user,
        wish.credentials,
        wish.watchdog_s,
        local_broker=grants.has_local_broker(config),
    )
    files = _files(plan)
    # The program may not be there yet; what is verified is the rest.
    there = replace(plan, program=Path("/bin/true")) if builds else plan
    wrong = manager.verify({path.name: text for path, text in _files(there).items() if path.suffix == ".service"})
    if wrong:
        raise UsageError("systemd would not take the unit:\n  " + "\n  ".join(wrong))
    for path in files:
        _refuse_foreign(places.at(wish.prefix, path))
    return Outcome(plan, files, builds, notes)


def _program(wish: Wish, who: access.Reader) -> tuple[Path, bool]:
    """Choose the program: the environment that runs now if the service may run it, else one to build."""
    why = program.obstacle_here(who)
    command = program.here()
    if wish.choice != "build" and not why and command is not None:
        ours = program.own_build() is not None
        return program.DEFAULT / "bin" / OURS if ours else command, False
    if wish.choice == "here":
        raise UsageError(
            f"the service could not run this environment: {why}. Leave --program out, and it gets one of its own"
        )
    program.current(places.at(wish.prefix, program.DEFAULT))
    python = program.interpreter(who)
    distributions.pieces(python.shared)
    return program.DEFAULT / "bin" / OURS, True


def _files(plan: Plan) -> dict[Path, str]:
    name = plan.name
    if name.instance is None:
        return {places.own(name): unit.service(plan), manager.UNITS / name.template: unit.template(plan)}
    return {
        manager.UNITS / name.template: unit.template(plan),
        places.own(name): unit.drop_in(plan),
    }


def _credential_notes(wish: Wish, config: Config) -> list[str]:
    notes = []
    given = {name for name, _ in wish.credentials}
    for name, path in wish.credentials:
        if path.stat().st_mode & 0o077:
            notes.append(f"--credential {name}: {path} can be read by others than root; chmod 0600 {path}")
    for name, broker in config.brokers.items():
        wanted = grants.password_credential(name)
        if broker.username is not None and broker.password_file is None and wanted not in given:
            notes.append(
                f"broker {broker.url}: user {broker.username!r} has no password; give one with --credential {wanted}=FILE"
            )
    return notes


def _refuse_foreign(path: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    if not text.startswith(MARK):
        raise UsageError(
            f"{path}: is in the way, and was not written by `edge-serve service install`; move it, or use another --name"
        )


def install(wish: Wish, outcome: Outcome, say: Say) -> None:
    """Carry out what was prepared: the program, the sandboxed check, the units, the start.

    UsageError if the check says no inside the sandbox: nothing is changed then. UnavailableError if the service does not
    come up: all is in place then.
    """
    link = places.at(wish.prefix, program.DEFAULT)
    live = wish.prefix is None and manager.booted()
    fresh: Path | None = None
    try:
        if outcome.builds:
            fresh = program.next_folder(link)
            say(f"making {fresh}: what is installed in the environment that runs now, without a network")
            who = access.reader(wish.user, list(wish.groups))
            made = program.build(fresh, program.interpreter(who), program.DEFAULT)
            say(f"{fresh}: {', '.join(f'{piece.name} {piece.version}' for piece in made)}")
            program.verify(fresh, as_nobody=wish.prefix is None)
        if live:
            _check_inside(outcome.plan, fresh or program.own_build())
    except BaseException:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
        raise
    build = fresh or (program.own_build() if wish.prefix is None else None)
    if build is not None:
        program.switch(link, build)
        for gone in program.prune(link):
            say(f"removed {gone}, an older build")
        others = removal.others(wish.prefix, wish.name)
        if others and live:
            say(f"{', '.join(others)}: runs the program of before until it is restarted")
    for path, text in outcome.files.items():
        _write(places.at(wish.prefix, path), text)
        say(f"wrote {places.at(wish.prefix, path)}")
    _enable(wish)
    if not live:
        return
    manager.tell("daemon-reload")
    if wish.start:
        _start(wish.name, say)


def _check_inside(plan: Plan, build: Path | None) -> None:
    """Let the program that is to serve check the configuration, as its user and in its sandbox, models loaded and all."""
    if build is not None:
        plan = replace(plan, program=build / "bin" / OURS)
    folder = Path(tempfile.mkdtemp(prefix="edge-serve-check-", dir="/run"))
    try:
        output = folder / "said"
        right, said = manager.run_once(f"{plan.name.base}-check.service", unit.checking(plan, output), output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not right:
        raise UsageError(
            f"the configuration was checked as the service would run, and that failed; nothing was changed:\n{said}"
        )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.chmod(0o644)
    fresh.replace(path)


def _enable(wish: Wish) -> None:
    """Have it started at boot: the link that `systemctl enable` makes, which needs no systemd that runs."""
    link = places.wanted(wish.prefix, wish.name)
    target = manager.UNITS / (wish.name.unit if wish.name.instance is None else wish.name.template)
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() or link.exists():
        link.unlink()
    link.symlink_to(target)


def _start(name: Name, say: Say) -> None:
    manager.run("systemctl", "reset-failed", name.unit)
    try:
        manager.tell("restart", name.unit)
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            state = manager.show(name.unit, "ActiveState", "Result")
            if state.get("ActiveState") not in ("active", "reloading"):
                break
            time.sleep(SETTLE_S / 5)
        if state.get("ActiveState") == "active" or (
            state.get("ActiveState") == "inactive" and state.get("Result") == "success"
        ):
            say(f"{name.unit}: {'serves' if state['ActiveState'] == 'active' else 'has served all its inputs'}")
            return
        why = f"it is {state.get('ActiveState')} ({state.get('Result')})"
    except UnavailableError as error:
        why = str(error)
    lines = "\n  ".join(manager.journal(name.unit, LOG_LINES))
    hint = ""
    previous = _previous()
    if previous is not None:
        hint = f"\nThe program before is kept; to go back to it: {previous}/bin/{OURS} service install …"
    raise UnavailableError(f"{name.unit} is installed but does not come up: {why}\n  {lines}{hint}")


def _previous() -> Path | None:
    try:
        now = program.current(program.DEFAULT)
    except UsageError:
        return None
    others = [path for path in program.builds(program.DEFAULT) if path != now]
    return others[-1] if now is not None and others else None
