"""The program of a service: /opt/edge-serve, an environment of its own, made from what is installed here, without a network.

Distributions of Python are copied by their own lists of files (RECORD, PyPA's "Recording installed projects"), so that a
device without a package index, or with a system-wide pip that refuses (PEP 668), can do it. Each build is a folder of its
own beside the last one, and /opt/edge-serve is a symbolic link to it: it changes in one step, a process that runs keeps
the files that it began with, and the build before stays for going back.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from edge_serve import __version__
from edge_serve_devices import access, distributions
from edge_serve_devices.access import ENTER, READ, Reader
from edge_serve_devices.distributions import OURS, PACKAGES, Piece, ProgramError

DEFAULT = Path("/opt/edge-serve")
# Starting an interpreter and importing, on the slowest of boards.
START_S = 120
# Compiling all modules that have no byte code yet.
COMPILE_S = 1200
NOBODY = 65534
BUILD_MARK = ".edge-serve-build.json"


def here() -> Path | None:
    """Give the `edge-serve` command of the environment that runs now; None if it has none."""
    path = Path(sysconfig.get_path("scripts"), OURS)
    return path if path.is_file() else None


def own_build() -> Path | None:
    """Give the build that runs now, if this process runs from one: an older one that installs is gone back to."""
    place = Path(sys.prefix)
    return place if place in builds(DEFAULT) else None


def obstacle_here(who: Reader) -> str:
    """Say what keeps `who` from running the environment that runs now, naming the path at fault; empty if nothing."""
    command = here()
    if command is None:
        return f"{sysconfig.get_path('scripts')}: has no command {OURS}"
    for path in (Path(sys.executable), Path(sys.base_prefix), command, Path(sysconfig.get_path("stdlib"), "os.py")):
        found = access.obstacle(path, who, READ | ENTER if path.suffix != ".py" else READ)
        if found:
            return found
    for name in PACKAGES:
        folder = distributions.package(name)
        found = access.obstacle_below(folder, who)
        if found:
            return found
        if not folder.is_relative_to(Path(sys.prefix).resolve()):
            return f"{folder}: is an editable installation, which changes under a service that runs"
    return ""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python that the copied packages fit."""

    path: Path
    shared: bool
    """Whether the new environment sees its system-wide packages."""


def interpreter(who: Reader) -> Interpreter:
    """Find a Python of this version and ABI that the service may run; ProgramError names the one that it may not."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shared = _sees_system_packages()
    base = Path(getattr(sys, "_base_executable", None) or sys.executable)
    first = ""
    for candidate in dict.fromkeys(
        [base, *(Path(folder, f"python{version}") for folder in ("/usr/bin", "/usr/local/bin"))]
    ):
        if not candidate.exists():
            continue
        found = access.obstacle(candidate, who, READ | ENTER)
        found = found or _unlike(candidate)
        if not found:
            if shared and candidate != base and not _same_prefix(candidate):
                found = f"{candidate}: has other system-wide packages than the Python that runs now"
            else:
                return Interpreter(candidate, shared)
        first = first or found
    raise ProgramError(
        f"no Python {version} that the service could run: {first or f'{base} is not there'}. Install Python {version} for "
        "all (apt-get install python3), or install edge-serve into an environment made with the system's own python3, and "
        "run `edge-serve service install` from there"
    )


def _sees_system_packages() -> bool:
    try:
        text = Path(sys.prefix, "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        return True  # no environment at all: the system's own Python
    return re.search(r"^include-system-site-packages\s*=\s*true\s*$", text, re.MULTILINE | re.IGNORECASE) is not None


def _ask(python: Path, code: str) -> str:
    done = subprocess.run(
        [str(python), "-I", "-c", code],
        capture_output=True,
        text=True,
        timeout=START_S,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def _unlike(python: Path) -> str:
    """Say why packages of this environment would not work with `python`; empty if they do."""
    code = "import sys, sysconfig, venv; print(sys.version_info[:2], sysconfig.get_config_var('EXT_SUFFIX'))"
    said = _ask(python, code)
    wanted = f"{sys.version_info[:2]} {sysconfig.get_config_var('EXT_SUFFIX')}"
    return (
        ""
        if said == wanted
        else f"{python}: is another Python or lacks the venv module ({said or 'it does not start'})"
    )


def _same_prefix(python: Path) -> bool:
    return _ask(python, "import sys; print(sys.base_prefix)") == sys.base_prefix


def next_folder(link: Path) -> Path:
    """Give where the next build goes: beside the link, with the lowest number that is higher than all there."""
    numbers = [int(path.name.rpartition(".")[2]) for path in builds(link)]
    return link.with_name(f"{link.name}.{max(numbers, default=0) + 1}")


def builds(link: Path) -> list[Path]:
    """Give the builds beside a link, oldest first."""
    pattern = re.compile(rf"{re.escape(link.name)}\.(\d{{1,9}})")
    try:
        found = [path for path in link.parent.iterdir() if pattern.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(found, key=lambda path: int(path.name.rpartition(".")[2]))


def current(link: Path) -> Path | None:
    """Give the build that a link points to; None if there is none. ProgramError if something else is in its place."""
    if not link.is_symlink():
        if link.exists():
            raise ProgramError(
                f"{link}: is in the way, and was not made by `edge-serve service install`; move it elsewhere"
            )
        return None
    target = link.parent / link.readlink()
    if not re.fullmatch(rf"{re.escape(link.name)}\.\d{{1,9}}", target.name) or target.parent != link.parent:
        raise ProgramError(
            f"{link}: points to {target}, which `edge-serve service install` did not make; remove that link"
        )
    return target if target.is_dir() else None


def build(folder: Path, python: Interpreter, link: Path) -> list[Piece]:
    """Make the environment in `folder`, which must not exist, for being run by way of `link`. Gives what is in it.

    Nothing is left of it if that fails.
    """
    found = distributions.pieces(python.shared)
    before = os.umask(0o022)
    try:
        _make(folder, python)
        site = Path(_ask(folder / "bin/python3", "import sysconfig; print(sysconfig.get_path('purelib'))"))
        if not site.is_relative_to(folder):
            raise ProgramError(f"{folder}: the new environment's own Python does not start")
        for piece in found:
            _copy(piece, site)
        _describe(site)
        _command(folder, link)
        _compile(folder, site)
        made = {piece.name: piece.version for piece in found}
        (folder / BUILD_MARK).write_text(json.dumps({"v": 1, "packages": made}) + "\n", encoding="utf-8")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.umask(before)
    return found


def _make(folder: Path, python: Interpreter) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Without pip: Debian keeps ensurepip in python3-venv, and nothing will be installed there by pip.
    command = [
        str(python.path),
        "-I",
        "-m",
        "venv",
        "--without-pip",
        *(["--system-site-packages"] if python.shared else []),
    ]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=START_S, check=False)
    if done.returncode:
        raise ProgramError(f"{folder}: cannot be made an environment: {(done.stdout + done.stderr).strip()[-500:]}")


def _copy(piece: Piece, site: Path) -> None:
    for place, to in piece.files:
        goal = site / to
        goal.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(place, goal)
            status = place.stat()
        except FileNotFoundError as error:
            if "__pycache__" in to.parts:
                continue
            raise ProgramError(f"{piece.name} {piece.version}: {place} is missing; install it anew with pip") from error
        goal.chmod(0o755 if status.st_mode & stat.S_IXUSR else 0o644)
        # Byte code is valid for the time of its source.
        os.utime(goal, ns=(status.st_atime_ns, status.st_mtime_ns))


def _describe(site: Path) -> None:
    """Write what importlib.metadata finds of us: name, version, entry points."""
    ours = distributions.find(OURS)
    folder = site / f"edge_serve-{ours.version}.dist-info"
    folder.mkdir()
    text = (
        ours.read_text("METADATA")
        or ours.read_text("PKG-INFO")
        or f"Metadata-Version: 2.1\nName: {OURS}\nVersion: {ours.version}\n"
    )
    (folder / "METADATA").write_text(text, encoding="utf-8")
    (folder / "entry_points.txt").write_text(ours.read_text("entry_points.txt") or "", encoding="utf-8")
    (folder / "INSTALLER").write_text("edge-serve service install\n", encoding="utf-8")
    listed = [path.relative_to(site).as_posix() for name in PACKAGES for path in distributions.files_below(site / name)]
    listed += [f"{folder.name}/{name}" for name in ("METADATA", "entry_points.txt", "INSTALLER", "RECORD")]
    (folder / "RECORD").write_text("".join(f"{name},,\n" for name in listed), encoding="utf-8")


def _command(folder: Path, link: Path) -> None:
    """Write the command. It starts this build's own Python by its number: a process keeps its build when the link moves."""
    place = link.with_name(folder.name) / "bin/python3"
    path = folder / "bin" / OURS
    path.write_text(
        f"#!{place}\nimport sys\n\nfrom edge_serve.__main__ import main\n\nsys.exit(main())\n", encoding="utf-8"
    )
    path.chmod(0o755)


def _compile(folder: Path, site: Path) -> None:
    """Make the byte code that a service may not write; a module that does not compile is only slow to import, or never is."""
    command = [str(folder / "bin/python3"), "-I", "-m", "compileall", "-q", "-j", "0", str(site)]
    subprocess.run(command, capture_output=True, timeout=COMPILE_S, check=False)


def verify(folder: Path, *, as_nobody: bool) -> None:
    """Start the program as a user that owns nothing; ProgramError says what it said."""
    options = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if as_nobody else {}
    try:
        done = subprocess.run(
            [str(folder / "bin/python3"), "-m", "edge_serve", "--version"],
            capture_output=True,
            text=True,
            timeout=START_S,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
            check=False,
            **options,  # type: ignore[call-overload]  # user and group, or nothing
        )
    except OSError as error:
        raise ProgramError(f"{folder}/bin/python3 cannot be started: {error.strerror}") from error
    if done.returncode or done.stdout.strip() != f"{OURS} {__version__}":
        said = (done.stdout + done.stderr).strip()[-500:]
        raise ProgramError(f"{folder}/bin/{OURS} --version fails for a user without rights: {said}")


def switch(link: Path, folder: Path) -> None:
    """Let `link` point to `folder`, beside it, in one step."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.name)
    fresh.replace(link)


def prune(link: Path, keep: int = 2) -> list[Path]:
    """Remove all builds but the current one, the newest others, `keep` in all, and those that run; gives what is gone."""
    now = current(link)
    others = [path for path in builds(link) if path != now]
    gone = [path for path in others[: max(0, len(others) - (keep - 1))] if not _runs(path)]
    for path in gone:
        shutil.rmtree(path)
    return gone


def _runs(folder: Path) -> bool:
    """Say whether a process was started from a build: a service that was not restarted yet still imports from it."""
    start = os.fsencode(folder / "bin") + b"/"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(start):
                return True
        except OSError:  # it has ended, or is somebody else's
            continue
    return False


def remove(link: Path) -> list[Path]:
    """Remove the link and all builds; gives what is gone. ProgramError if the link is not ours."""
    gone = builds(link)
    if link.is_symlink():
        current(link)
        link.unlink()
    for path in gone:
        shutil.rmtree(path)
    return gone
