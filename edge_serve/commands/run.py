"""`edge-serve run`: serve the pipelines of a configuration."""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from pathlib import Path

import click

from edge_serve.config import DEFAULT_FILE
from edge_serve.frame import format_time


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


def set_up_logging(style: str, verbose: int, quiet: bool) -> None:
    """Log to standard error in the chosen style."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if style == "json" else _TextFormatter(with_time=sys.stderr.isatty()))
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Nobody reads where a log call stands, and asking for it costs on small boards.
    logging.logProcesses = logging.logThreads = logging.logMultiprocessing = False
    logging.raiseExceptions = False


@click.command(
    epilog="""\b
Examples:
  edge-serve run -c edge-serve.toml
  rpicam-vid -t 0 --codec mjpeg -o - | edge-serve run -c camera.toml"""
)
@click.option(
    "-c",
    "--config",
    "file",
    type=click.Path(path_type=Path),
    default=DEFAULT_FILE,
    show_default=True,
    help="The configuration.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="One line an event, or one JSON document a line.",
)
@click.option("-v", "--verbose", count=True, help="Log every frame that fails, and more.")
@click.option("-q", "--quiet", is_flag=True, help="Log warnings and errors only.")
def run(file: Path, log_format: str, verbose: int, quiet: bool) -> int:
    """Serve the pipelines of a configuration until a signal, or until all files and streams are read.

    Exits with 0 (also after SIGTERM), 2 if the configuration or a model cannot be used, 3 if something failed that a
    restart may mend, 130 after Ctrl-C.
    """
    set_up_logging(log_format, verbose, quiet)
    from edge_serve.app import App, load

    app = App(load(file))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, app.stop)
    return app.run()
