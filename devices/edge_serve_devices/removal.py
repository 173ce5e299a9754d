"""The systemd service, removed: its units, its program if nobody else needs that, and its state if that is wished."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_serve.errors import UsageError
from edge_serve_devices import grants, program
from edge_serve_devices.systemd import manager, places
from edge_serve_devices.systemd.unit import MARK, Name

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Installed:
    """A unit that `edge-serve service install` wrote."""

    path: Path
    text: str

    def folders(self) -> list[Path]:
        """Give the state, log and cache folders that it names; those of a template are its instances'."""
        found = []
        for key, base in (
            ("StateDirectory", grants.STATE),
            ("LogsDirectory", grants.LOGS),
            ("CacheDirectory", grants.CACHE),
        ):
            for line in re.findall(rf"^{key}=(.*)$", self.text, re.MULTILINE):
                found += [base / word for word in line.split() if "%" not in word and ".." not in Path(word).parts]
        return found


def installed(prefix: Path | None, path: Path) -> Installed | None:
    """Read a unit if it is ours."""
    try:
        text = places.at(prefix, path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return Installed(places.at(prefix, path), text) if text.startswith(MARK) else None


def uninstall(name: Name, prefix: Path | None, *, purge: bool, dry_run: bool, say: Say) -> None:
    """Stop it and remove its units, and the program when no other service of ours needs it; `purge`: its state, too.

    UsageError if no such service of ours is installed.
    """
    verb = "would remove" if dry_run else "removed"
    live = prefix is None and manager.booted() and not dry_run
    own, other_names = _own(prefix, name), others(prefix, name)
    enabled = places.wanted(prefix, name)
    if not own and not enabled.is_symlink():
        raise UsageError(f"{name}: no service of that name was installed by `edge-serve service install`")
    template = installed(prefix, manager.UNITS / name.template)
    if template is not None and not any(re.fullmatch(rf"{re.escape(name.base)}(@.*)?", other) for other in other_names):
        own.append(template)
    state = [grants.STATE / name.folder, *(path for each in own for path in each.folders())]
    if live:
        manager.tell("stop", name.unit)
        say(f"stopped {name.unit}")
    for path in [enabled, *(each.path for each in own)]:
        if path.is_symlink() or path.exists():
            if not dry_run:
                path.unlink()
            say(f"{verb} {path}")
    if not dry_run:
        with contextlib.suppress(OSError):  # not there, or it holds drop-ins of the owner's own
            places.at(prefix, manager.UNITS / f"{name.unit}.d").rmdir()
    if live:
        manager.tell("daemon-reload")
        manager.run("systemctl", "reset-failed", name.unit)
    link = places.at(prefix, program.DEFAULT)
    if other_names:
        say(f"kept {link}, which {', '.join(other_names)} may use")
    elif link.is_symlink() or program.builds(link):
        if not dry_run:
            program.remove(link)
        say(f"{verb} {link}")
    for path in (grants.RUNTIME / name.folder, grants.RUNTIME / f"{name.folder}.kept"):
        if not dry_run:
            _remove(places.at(prefix, path))
    for path in dict.fromkeys(state):
        _purge(places.at(prefix, path), purge=purge, dry_run=dry_run, say=say)


def _own(prefix: Path | None, name: Name) -> list[Installed]:
    """Give what is this service's alone: its unit, or the drop-in of an instance."""
    found = installed(prefix, places.own(name))
    return [] if found is None else [found]


def others(prefix: Path | None, name: Name) -> list[str]:
    """Give the names of other services of ours: units, and instances that are started at boot or have a drop-in."""
    folder = places.at(prefix, manager.UNITS)
    found = set()
    for path in [
        *folder.glob("*.service"),
        *folder.glob("*@*.service.d"),
        *(folder / places.WANTS).glob("*@*.service"),
    ]:
        other = path.name.removesuffix(".d").removesuffix(".service")
        defines = re.sub(r"@.*", "@.service", path.name)
        if not other.endswith("@") and other != str(name) and installed(prefix, manager.UNITS / defines) is not None:
            found.add(other)
    return sorted(found)


def _purge(path: Path, *, purge: bool, dry_run: bool, say: Say) -> None:
    private = path.parent / "private" / path.name  # where a dynamic user's folder is; `path` is a link to it
    there = [each for each in (path, private) if each.is_symlink() or each.exists()]
    if not there:
        return
    if not purge:
        say(f"kept {path} (--purge removes it)")
        return
    for each in there:
        if not dry_run:
            _remove(each)
    say(f"{'would remove' if dry_run else 'removed'} {path}")


def _remove(path: Path) -> None:
    """Remove a link or a folder, if it is there."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
