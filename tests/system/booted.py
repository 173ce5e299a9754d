"""A real systemd for tests: this machine's own root under a throw-away overlay, booted by systemd-nspawn in a few seconds.

Needs root, systemd-nspawn (Debian: systemd-container) and a kernel that lets overlays and namespaces be made. Nothing that
happens inside reaches the machine; what a test sees inside is this checkout and this environment, read-only but for the
overlay. The options are those with which nspawn enforces what units ask for: without bpf, DeviceAllow does nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support import ROOT

NEEDED = ("systemd-nspawn", "unshare", "nsenter", "mount", "systemctl")
BOOT_S = 30.0
END_S = 5.0
# Two builds of the program and a journal.
SIZE = "1500m"
OWN = ("/tmp", "/run")
MASKED = (
    "systemd-networkd-wait-online.service",
    "systemd-networkd.service",
    "systemd-resolved.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "mosquitto.service",
)
MOUNT = """
set -e
mount -t tmpfs -o size={size} tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o lowerdir=/,upperdir="$1/upper",workdir="$1/work" overlay "$1/root"
rm -f "$1/root/etc/resolv.conf"
: > "$1/root/etc/fstab"
for unit in {masked}; do ln -sf /dev/null "$1/root/etc/systemd/system/$unit"; done
rm -rf "$1/root/etc/edge-serve" "$1/root/opt/edge-serve"* "$1/root/etc/systemd/system/edge-serve"*
folder=$1
shift
exec "$@" -D "$folder/root"
"""
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


class CannotBootError(Exception):
    """This machine cannot do it; says why."""


def why_not() -> str:
    """Say why no systemd can be booted here; empty if it is worth a try."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "booting a systemd needs root"
    missing = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    return f"booting a systemd needs {', '.join(missing)} (apt-get install systemd-container)" if missing else ""


class Booted:
    """A booted system; `run` runs a shell script in it, as root."""

    def __init__(self, folder: Path) -> None:
        """Boot it. `folder` is for the overlay and must be empty; CannotBootError if the machine does not allow it."""
        self._log = folder.with_name(f"{folder.name}.log")
        binds = {ROOT, Path(sys.prefix), Path(sys.base_prefix)}
        # An overlay shows what lies on the root's own file system, and the system inside has folders of its own over some.
        hidden = [path for path in binds if any(path.is_relative_to(own) for own in OWN)]
        elsewhere = sorted(
            {str(path) for path in binds if path.stat().st_dev != Path("/").stat().st_dev or path in hidden}
        )
        command = [
            "systemd-nspawn",
            "--quiet",
            "--boot",
            "--register=no",
            "--keep-unit",
            "--private-network",
            "--console=pipe",
            f"--machine=edge{os.getpid()}",
            "--system-call-filter=bpf",
            "--capability=CAP_BPF,CAP_NET_ADMIN",
            *(f"--bind-ro={path}" for path in elsewhere),
        ]
        script = MOUNT.format(size=SIZE, masked=" ".join(MASKED))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", "-m", "--propagation", "private", "bash", "-c", script, "bash", str(folder), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": PATH, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            )
        self._leader = ""
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            found = subprocess.run(["pgrep", "-P", str(self._process.pid)], capture_output=True, text=True)
            self._leader = next(iter(found.stdout.split()), "")
            if self._leader:
                state = self.run("systemctl is-system-running", check=False).stdout.strip()
                if state in ("running", "degraded"):
                    return
            time.sleep(0.1)
        raise CannotBootError(f"no systemd came up: {self._log.read_text(errors='replace')[-500:]}")

    def run(self, script: str, *, check: bool = True, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a script of bash; unless `check` is False, it has to succeed."""
        enter = [
            "nsenter",
            "-t",
            self._leader,
            *["-m", "-u", "-i", "-n", "-p", "-C", "env", "-i"],
            f"PATH={PATH}",
            "LC_ALL=C.UTF-8",
        ]
        done = subprocess.run(
            [*enter, "bash", "-c", f"cd /\n{script}"],
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, f"{script}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def close(self) -> None:
        """End it; nothing is left."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                if self._leader:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(self._leader), signal.SIGKILL)
                self._process.kill()
                self._process.wait(END_S)
        # nspawn leaves its own groups behind where it may not ask a systemd outside to remove them.
        for kind in ("systemd", "unified"):
            for name in ("payload", "supervisor"):
                folder = Path("/sys/fs/cgroup", kind, name)
                for each in sorted(folder.rglob("*"), reverse=True) if folder.is_dir() else []:
                    if each.is_dir():
                        with contextlib.suppress(OSError):
                            each.rmdir()
