"""`edge-serve run`: serve the pipelines of a configuration."""

from __future__ import annotations

from pathlib import Path

import click

from edge_serve.commands.serve import LOG_FORMATS, serve
from edge_serve.config import DEFAULT_FILE


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
    type=click.Choice(LOG_FORMATS),
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
    return serve(file, log_format, verbose=verbose > 0, quiet=quiet)
