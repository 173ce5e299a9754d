"""Where units lie: in this system, or below a folder that will be one (an image)."""

from __future__ import annotations

from pathlib import Path

from edge_serve_devices.systemd.manager import UNITS
from edge_serve_devices.systemd.unit import Name

# Where systemd looks for what is started at boot.
WANTS = "multi-user.target.wants"
DROP_IN = "edge-serve.conf"


def own(name: Name) -> Path:
    """Give what is a service's alone: its unit, or the drop-in of an instance."""
    return UNITS / name.unit if name.instance is None else UNITS / f"{name.unit}.d" / DROP_IN


def at(prefix: Path | None, path: Path) -> Path:
    """Give where a path of the service's system lies in this one."""
    return path if prefix is None else prefix / path.relative_to("/")


def wanted(prefix: Path | None, name: Name) -> Path:
    """Give the link by which the service is started at boot."""
    return at(prefix, UNITS / WANTS / name.unit)
