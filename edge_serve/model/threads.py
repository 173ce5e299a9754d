"""What was measured about threads, kept in the state directory, so that only a model's first start on a board pays for it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from edge_serve.model.engine import MOST_THREADS, available_cores
from edge_serve.model.interpreter import Runtime

log = logging.getLogger(__name__)

FILE = "threads.json"
# Older entries make room; a board runs a handful of models.
MOST_ENTRIES = 64
MAX_BYTES = 64 * 1024


def key(file: Path, runtime: Runtime, delegate: str, signature: str | None) -> str:
    """Name a measurement by all that it depends on: the file as it is, the runtime as installed, the cores."""
    status = file.stat()
    return "|".join(
        (
            str(file.resolve()),
            f"{status.st_size}-{status.st_mtime_ns}",
            f"{runtime.name}-{runtime.installed}",
            delegate,
            signature or "",
            str(available_cores()),
        )
    )


def recall(folder: Path, name: str) -> int:
    """Give the number of threads that was measured under this key; 0 if there is none."""
    known = _read(folder).get(name, 0)
    return known if 1 <= known <= MOST_THREADS else 0


def remember(folder: Path, name: str, threads: int) -> None:
    """Keep a measurement; a folder that cannot be written costs the next start a new one, nothing else."""
    known = {**_read(folder), name: threads}
    newest = dict(list(known.items())[-MOST_ENTRIES:])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f"{FILE}.new"
        draft.write_text(json.dumps(newest), encoding="utf-8")
        draft.replace(folder / FILE)
    except OSError as error:
        log.debug("%s: cannot be written (%s); threads are measured again at the next start", folder / FILE, error)


def _read(folder: Path) -> dict[str, int]:
    file = folder / FILE
    try:
        if file.stat().st_size > MAX_BYTES:
            return {}
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # not there yet, or damaged: both are mended by measuring
    if not isinstance(known, dict):
        return {}
    return {name: value for name, value in known.items() if type(value) is int}
