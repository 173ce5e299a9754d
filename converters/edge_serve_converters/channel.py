"""The child's end of the line to the converter: commands come in as JSON lines, stages and one answer go out.

The real standard output is kept for the protocol; whatever TensorFlow prints goes to standard error, the child's log.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edge_serve.errors import EdgeServeError, UsageError
from edge_serve_converters.errors import UnexplainedError

Report = Callable[[str, int, int], None]
"""Stage, steps done, steps in all (0: unknown)."""
NO_ROOM = "no room is left in {} for temporary files; make room there, or name another folder with TMPDIR"
Handler = Callable[[dict[str, Any], Report], dict[str, Any]]


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answer commands until standard input ends; a parent that is gone ends the process at once, even in mid-work."""
    _forbid_core_dumps()
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()
    line = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    threading.Thread(target=_listen, args=(commands,), name="parent", daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        line.write(json.dumps(message) + "\n")

    def report(stage: str, done: int, total: int) -> None:
        send({"event": "stage", "stage": stage, "done": done, "total": total})

    while True:
        command = json.loads(commands.get())
        try:
            result = handlers[command["do"]](command, report)
        except EdgeServeError as error:
            unexplained = isinstance(error, UnexplainedError)
            send({"event": "failed", "usage": isinstance(error, UsageError), "message": str(error), "log": unexplained})
        except MemoryError:
            traceback.print_exc()
            send({"event": "failed", "usage": False, "message": "ran out of memory", "log": True})
        except Exception as error:  # noqa: BLE001  # tensorflow raises anything; the parent decides what it means
            traceback.print_exc()
            full = disk_full(error)
            message = NO_ROOM.format(Path(tempfile.gettempdir()).parent) if full else first_line(error)
            send({"event": "failed", "usage": full, "message": message, "log": True})
        else:
            send({"event": "done", "result": result})


def disk_full(error: BaseException) -> bool:
    """Say whether an exception, ours or one of tensorflow's that carries only text, means that a disk is full."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is None and text.endswith("written"):
        return True  # numpy's "N requested and M written" is a write that was cut short
    return getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in text


def _listen(commands: queue.SimpleQueue[str]) -> None:
    for command in sys.stdin:
        commands.put(command)
    os._exit(0)


def _forbid_core_dumps() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def first_line(error: BaseException) -> str:
    """Give an exception's type and the first line of its message that says something, at most 300 characters."""
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
