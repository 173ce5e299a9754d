"""The system's own systemd: started, asked and told by its commands (systemctl, systemd-analyze, journalctl)."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edge_serve.errors import UnavailableError

# Present where systemd is the first process (sd_booted(3)).
BOOTED = Path("/run/systemd/system")
UNITS = Path("/etc/systemd/system")
# systemctl waits for a start as long as the unit allows; this is for one that says nothing at all.
COMMAND_S = 60
JOB_S = 660
# What a check says is a few lines for each mistake.
MAX_SAID = 64 * 1024


def booted() -> bool:
    """Say whether systemd runs this system."""
    return BOOTED.is_dir() and shutil.which("systemctl") is not None


def run(*command: str, timeout: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
    """Run a command of systemd to its end, whatever that is; UnavailableError if it hangs or is not there."""
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{' '.join(command)}: has not come to an end within {timeout:g} s") from error
    except OSError as error:
        raise UnavailableError(f"{command[0]}: cannot be started: {error.strerror}") from error


def tell(*arguments: str) -> None:
    """Run systemctl; UnavailableError with what it says if it fails."""
    done = run("systemctl", "--no-ask-password", *arguments, timeout=JOB_S)
    if done.returncode:
        raise UnavailableError(f"systemctl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")


def show(unit: str, *properties: str) -> dict[str, str]:
    """Give properties of a unit as systemd prints them."""
    done = run("systemctl", "show", "--no-pager", "--timestamp=utc", "-p", ",".join(properties), "--", unit)
    if done.returncode:
        raise UnavailableError(f"systemctl show {unit}: {done.stderr.strip()}")
    pairs = (line.partition("=") for line in done.stdout.splitlines())
    return {key: value for key, _, value in pairs}


def journal(unit: str, lines: int, *, invocation: str = "") -> list[str]:
    """Give the last lines that a unit has logged, those of one run if `invocation` names it; none if they may not be read."""
    which = [f"_SYSTEMD_INVOCATION_ID={invocation}"] if invocation else ["-u", unit]
    try:
        done = run("journalctl", "--no-pager", "-q", "-n", str(lines), "-o", "short-iso", "--no-hostname", *which)
    except UnavailableError:
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def verify(texts: dict[str, str]) -> list[str]:
    """Give what `systemd-analyze verify` finds wrong with units, by file name; nothing where there is no such command.

    A value that it does not know is only a warning to it, and ignored at the start: here it counts.
    """
    if shutil.which("systemd-analyze") is None:
        return []
    with tempfile.TemporaryDirectory(prefix="edge-serve-units-") as folder:
        paths = []
        for name, text in texts.items():
            # A template is verified as one of its instances.
            path = Path(folder, name.replace("@.", "@verify."))
            path.write_text(text, encoding="utf-8")
            paths.append(path)
        done = run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *map(str, paths))
        if done.returncode and "unrecognized option" in done.stderr:  # before systemd 250
            done = run("systemd-analyze", "verify", "--man=no", *map(str, paths))
        names = tuple(path.name for path in paths)
        said = [
            line.replace(f"{folder}/", "") for line in done.stderr.splitlines() if any(name in line for name in names)
        ]
        return said or ([done.stderr.strip()] if done.returncode else [])


@contextlib.contextmanager
def transient(name: str, text: str) -> Iterator[str]:
    """Let systemd know a unit for as long as this lasts; gives its name."""
    path = BOOTED / name
    path.write_text(text, encoding="utf-8")
    try:
        tell("daemon-reload")
        yield name
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(UnavailableError):
            tell("daemon-reload")
            run("systemctl", "reset-failed", name)


def run_once(name: str, text: str, output: Path) -> tuple[bool, str]:
    """Run a one-shot unit; says whether it succeeded, and what it wrote to `output`."""
    with transient(name, text) as unit:
        done = run("systemctl", "--no-ask-password", "start", unit, timeout=JOB_S)
        said = ""
        with contextlib.suppress(OSError), output.open("rb") as stream:
            said = stream.read(MAX_SAID).decode(errors="replace").strip()
        if done.returncode and not said:
            said = "\n".join(journal(unit, 10)) or done.stderr.strip()
        return done.returncode == 0, said
