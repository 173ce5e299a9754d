"""Starting and running the service, without the command-line library: what a board does at every boot."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from edge_serve.config import DEFAULT_FILE
from edge_serve.errors import EXIT_INTERRUPTED, EXIT_UNAVAILABLE, EdgeServeError
from edge_serve.frame import format_time

LOG_FORMATS = ("text", "json")
ENVIRONMENT = "EDGE_SERVE_RUN_"


class _JsonFormatter(logging.Formatter):
    """One JSON document a line."""

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": format_time(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, ensure_ascii=False)


class _TextFormatter(logging.Formatter):
    """One line an event; the journal adds the time by itself, so that is written only for people at a terminal."""

    def __init__(self, *, with_time: bool) -> None:
        super().__init__()
        self._with_time = with_time

    def format(self, record: logging.LogRecord) -> str:
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        if self._with_time:
            text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {text}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def set_up_logging(style: str, *, verbose: bool, quiet: bool) -> None:
    """Log to standard error in the chosen style."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if style == "json" else _TextFormatter(with_time=sys.stderr.isatty()))
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Nobody reads where a log call stands, and asking for it costs on small boards.
    logging.logProcesses = logging.logThreads = logging.logMultiprocessing = False
    logging.raiseExceptions = False


def serve(file: Path, log_format: str = "text", *, verbose: bool = False, quiet: bool = False) -> int:
    """Serve a configuration until a signal or the end of all inputs; gives the exit code. Raises EdgeServeError."""
    gc.disable()  # App.run enables it when everything is imported and built
    set_up_logging(log_format, verbose=verbose, quiet=quiet)
    from edge_serve.app import App, load

    app = App(load(file))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, app.stop)
    # A service reads its configuration again; who runs it in a terminal that is closed wants its end; nohup wants neither.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, app.stop if sys.stderr.isatty() else app.hang_up)
    return app.run()


def plain_call(arguments: list[str]) -> Path | None:
    """Give the configuration's path if the command line is no more than `run` or `run -c FILE`; None for all others.

    That is how services are started. The command-line library takes as long to import as all of the runtime; it is left
    to the calls that need it.
    """
    if any(name.startswith(ENVIRONMENT) for name in os.environ):
        return None
    if arguments == ["run"]:
        return Path(DEFAULT_FILE)
    if len(arguments) == 3 and arguments[0] == "run" and arguments[1] in ("-c", "--config"):
        return Path(arguments[2])
    return None


def run_plainly(file: Path) -> int:
    """Serve a configuration and answer errors as the command line does."""
    try:
        return serve(file)
    except EdgeServeError as error:
        sys.stderr.write(f"edge-serve: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"edge-serve: {error}\n")
        return EXIT_UNAVAILABLE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
