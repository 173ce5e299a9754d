"""`edge-serve send`: the client of the socket protocol."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from edge_serve.client import Client
from edge_serve.errors import EXIT_GATE, ProtocolError, UsageError
from edge_serve.processing.tensor import CSV, JSON

# Frames that are sent before an answer is waited for: enough to keep the model busy, few enough for the server's window.
WINDOW = 16


@click.command(
    epilog="""\b
Examples:
  edge-serve send unix:///run/edge-serve/digits.sock photo.png
  edge-serve send tcp://127.0.0.1:9750 --lines samples.jsonl
  edge-serve send unix:///run/edge-serve/digits.sock --describe"""
)
@click.argument("address")
@click.argument("inputs", nargs=-1, type=click.Path(path_type=Path, allow_dash=True))
@click.option("--lines", is_flag=True, help="Every line of an input is a frame (JSON lines, CSV rows).")
@click.option("--content-type", help="Content type of the frames (default: by their first bytes).")
@click.option("--describe", is_flag=True, help="Ask what the pipeline takes.")
@click.option("--no-reply", is_flag=True, help="Send only, wait for no results.")
@click.option("--key", help="Key of the windows that the samples belong to.")
@click.option(
    "--timeout", type=click.FloatRange(0.1), default=30.0, show_default=True, help="Seconds to wait for an answer."
)
@click.option(
    "--token-file", type=click.Path(path_type=Path), help="File with the token that a remote pipeline asks for."
)
def send(
    address: str,
    inputs: tuple[Path, ...],
    lines: bool,
    content_type: str | None,
    describe: bool,
    no_reply: bool,
    key: str | None,
    timeout: float,
    token_file: Path | None,
) -> int:
    """Send INPUTS (files, or - for standard input) to a pipeline's socket at ADDRESS and print the answers, one a line.

    Exits with 1 if any answer is an error.
    """
    if not inputs and not describe:
        raise click.UsageError("give at least one input, or --describe")
    token = token_file.read_text().strip() if token_file is not None else None
    with Client(address, timeout, token) as client:
        if describe:
            client.send({"type": "describe"})
            answer = client.receive()
            click.echo(json.dumps(answer, indent=2))
            if not inputs or answer is None or answer["type"] == "error":
                return 0 if answer is not None and answer["type"] == "info" else EXIT_GATE
        header: dict[str, Any] = {"type": "frame"}
        if no_reply:
            header["reply"] = False
        if key is not None:
            header["meta"] = {"key": key}
        return _exchange(client, header, _frames(inputs, lines, content_type))


def _exchange(client: Client, header: dict[str, Any], frames: Iterator[tuple[str, str | None, bytes]]) -> int:
    waiting = failed = 0
    answers_wanted = header.get("reply", True)
    for identity, kind, body in frames:
        client.send({**header, "id": identity, **({"content_type": kind} if kind else {})}, body)
        if not answers_wanted:
            continue
        waiting += 1
        while waiting >= WINDOW:
            failed += _print(client.receive())
            waiting -= 1
    client.finish()
    while (answer := client.receive()) is not None:
        failed += _print(answer)
    return EXIT_GATE if failed else 0


def _print(answer: dict[str, Any] | None) -> int:
    if answer is None:
        raise ProtocolError("the server closed the connection before all answers were there")
    if answer["type"] != "accepted":
        click.echo(json.dumps(answer, ensure_ascii=False))
    return int(answer["type"] == "error")


def _frames(inputs: tuple[Path, ...], lines: bool, content_type: str | None) -> Iterator[tuple[str, str | None, bytes]]:
    for path in inputs:
        name = "stdin" if str(path) == "-" else path.name
        try:
            stream = sys.stdin.buffer if str(path) == "-" else path.open("rb")
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
        kind = content_type or {".csv": CSV, ".jsonl": JSON, ".json": JSON}.get(path.suffix.lower())
        with stream:
            if lines:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield f"{name}:{number}", kind, line.strip()
            else:
                yield name, kind, stream.read()
