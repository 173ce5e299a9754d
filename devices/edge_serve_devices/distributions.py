"""Which installed distributions make up the program of a service, and which files each has.

What counts is what is installed: a requirement whose marker left it out is not there and is not missed, so that no markers
have to be evaluated (PyPA's "Dependency specifiers" and "Recording installed projects").
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from edge_serve.errors import UsageError

OURS = "edge-serve"
PACKAGES = ("edge_serve", "edge_serve_converters", "edge_serve_devices")
# Runtimes that are extras of ours: whoever has one means to use it.
RUNTIMES = ("tflite-runtime",)
PLUGIN_GROUPS = ("edge_serve.sources", "edge_serve.sinks", "edge_serve.delegates", "edge_serve.decoders")


class ProgramError(UsageError):
    """The program cannot be made, or could not be run by the service's user."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One distribution to copy: its name, version, and files as (where it is, where it goes below site-packages)."""

    name: str
    version: str
    files: tuple[tuple[Path, Path], ...]


def pieces(shared: bool) -> list[Piece]:
    """Give edge-serve and all it needs, as they are installed here.

    `shared`: the copy will see the system's own packages, too, as this environment does; those are left where they are.
    ProgramError names what is missing or cannot be copied.
    """
    ours = find(OURS)
    found: dict[str, Piece] = {OURS: _our_piece(ours)}
    wanted = [*_requirements(ours, ()), *((name, ()) for name in (*RUNTIMES, *_plugins()) if _installed(name))]
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while wanted:
        name, extras = wanted.pop()
        if (name, extras) in seen or name == OURS:
            continue
        seen.add((name, extras))
        distribution = find(name)
        if not (shared and _is_systems(distribution)):
            found.setdefault(name, _piece(distribution))
        wanted += _requirements(distribution, extras)
    return [found[name] for name in sorted(found)]


def _plugins() -> list[str]:
    names = set()
    for group in PLUGIN_GROUPS:
        for entry in metadata.entry_points(group=group):
            if entry.dist is not None:
                names.add(_normal(entry.dist.name))
    return sorted(names - {OURS})


def _requirements(distribution: metadata.Distribution, extras: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """Give the requirements that were met when it was installed. What a marker left out is not there, and is not needed."""
    found = []
    for text in distribution.requires or []:
        head, _, marker = text.partition(";")
        match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^\]]*)\])?", head)
        if match is None:
            raise ProgramError(f"{distribution.name}: requires {text!r:.100}, which cannot be read")
        asked = re.findall(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        if asked and not set(map(_normal, asked)) & set(extras):
            continue
        name = _normal(match[1])
        if not _installed(name):
            if marker:
                continue
            raise ProgramError(f"{distribution.name} needs {name}, which is not installed; mend that with `pip check`")
        found.append(
            (name, tuple(sorted(_normal(each.strip()) for each in (match[2] or "").split(",") if each.strip())))
        )
    return found


def _normal(name: str) -> str:
    """Give a distribution's name in its one spelling (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def find(name: str) -> metadata.Distribution:
    """Find an installed distribution; ProgramError if there is none of that name."""
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise ProgramError(
            f"{name} is not installed as a package in {sys.prefix}; install it there with pip, then install the service"
        ) from error


def _is_systems(distribution: metadata.Distribution) -> bool:
    """Say whether an environment with system-site-packages sees this: it is the base Python's, not one's own or a user's."""
    place = Path(str(distribution.locate_file(""))).resolve()
    base, own = Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve()
    return place.is_relative_to(base) and (own == base or not place.is_relative_to(own))


def _piece(distribution: metadata.Distribution) -> Piece:
    """Take a distribution's files from its RECORD; what lies outside site-packages (commands, manuals) is not needed."""
    listed = distribution.files if distribution.read_text("RECORD") is not None else None
    editable = '"editable"' in (distribution.read_text("direct_url.json") or "")
    if not listed or editable:
        raise ProgramError(
            f"{distribution.name} {distribution.version} has no list of its files (an editable installation, or one of the "
            "system's package manager); install it with pip into this environment"
        )
    files = [(Path(str(distribution.locate_file(file))), Path(str(file))) for file in listed]
    return Piece(
        _normal(distribution.name),
        distribution.version,
        tuple((place, to) for place, to in files if not to.is_absolute() and ".." not in to.parts),
    )


def _our_piece(distribution: metadata.Distribution) -> Piece:
    """Take our own packages from where they are imported: that is what runs, be it editable or not."""
    files: list[tuple[Path, Path]] = []
    for name in PACKAGES:
        folder = package(name)
        files += [(path, Path(name, path.relative_to(folder))) for path in files_below(folder)]
    return Piece(OURS, distribution.version, tuple(files))


def package(name: str) -> Path:
    """Give the folder that a package of ours is imported from."""
    spec = util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ProgramError(f"package {name} cannot be found; install edge-serve anew")
    return Path(spec.origin).resolve().parent


def files_below(folder: Path) -> Iterator[Path]:
    """Give all files below a folder, without byte code."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        yield from (Path(place, name) for name in sorted(names))
