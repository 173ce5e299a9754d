"""How a service is: what systemd knows of it, what it says itself, and the end of its log."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from edge_serve import control
from edge_serve.errors import EdgeServeError, UnavailableError
from edge_serve_devices import grants
from edge_serve_devices.systemd import manager
from edge_serve_devices.systemd.unit import Name

STATUS_S = 5.0
LOG_LINES = 10
PROPERTIES = (
    "LoadState",
    "UnitFileState",
    "ActiveState",
    "SubState",
    "Result",
    "ActiveEnterTimestamp",
    "InvocationID",
    "MainPID",
    "NRestarts",
    "WatchdogUSec",
    "ExecMainStatus",
    "StatusText",
    "MemoryCurrent",
)


def status(name: Name, lines: int = LOG_LINES) -> dict[str, Any]:
    """Give how a service is, JSON-ready. UnavailableError where systemd does not run."""
    if not manager.booted():
        raise UnavailableError("systemd does not run here; ask the process itself with `edge-serve status`")
    said = manager.show(name.unit, *PROPERTIES)

    def number(key: str) -> int | None:
        return int(said[key]) if said.get(key, "").isdecimal() else None

    folder = grants.STATE / name.folder
    alive = said.get("ActiveState") in ("active", "reloading")
    return {
        "v": 1,
        "name": str(name),
        "installed": said.get("LoadState") == "loaded",
        "at_boot": said.get("UnitFileState") or "no",
        "state": said.get("ActiveState"),
        "detail": said.get("SubState"),
        "result": said.get("Result"),
        "since": said.get("ActiveEnterTimestamp") or None,
        "pid": number("MainPID") or None,
        "restarts": number("NRestarts"),
        "watchdog": said.get("WatchdogUSec") if said.get("WatchdogUSec") not in ("0", "infinity") else None,
        "exit_code": number("ExecMainStatus"),
        "says": said.get("StatusText") or None,
        "memory_bytes": number("MemoryCurrent"),
        "service": _ask(folder) if alive else None,
        "log": manager.journal(name.unit, lines),
    }


def _ask(folder: Path) -> dict[str, Any]:
    """Ask the service itself; {"error": …} if it does not answer."""
    try:
        with control.Caller(folder, max_payload=1024 * 1024) as caller:
            caller.ask("status")
            deadline = time.monotonic() + STATUS_S
            message = caller.receive(max(0.0, deadline - time.monotonic()))
    except EdgeServeError as error:
        return {"error": str(error)}
    if message is None:
        return {"error": f"no answer within {STATUS_S:g} s"}
    try:
        document: dict[str, Any] = json.loads(message.body or b"{}")
    except ValueError:
        return {"error": "it answers with something that is no JSON"}
    return document
