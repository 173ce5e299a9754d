"""`edge-serve send`: the client of the socket protocol."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from edge_serve.client import Client
from edge_serve.errors import EXIT_GATE, UnavailableError, UsageError
from edge_serve.processing.tensor import CSV, JSON

# A server that hangs up says why; its last answer gets this long to come.
LAST_WORDS_S = 2.0


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
    try:
        token = token_file.read_text(encoding="utf-8").strip() if token_file is not None else None
    except (OSError, ValueError) as error:
        raise UsageError(f"{token_file}: the token cannot be read: {error}") from error
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
        return _exchange(client, header, _frames(inputs, lines, content_type), timeout)


def _exchange(
    client: Client, header: dict[str, Any], frames: Iterator[tuple[str, str | None, bytes]], timeout: float
) -> int:
    answers = _Answers(client, timeout)
    answers.start()
    try:
        for identity, kind, body in frames:
            client.send({**header, "id": identity, **({"content_type": kind} if kind else {})}, body)
            answers.expected += bool(header.get("reply", True))
        client.finish()
    except UnavailableError:
        answers.join(LAST_WORDS_S)
        if answers.failed:
            return EXIT_GATE
        raise
    answers.ending = True
    answers.join()
    if answers.error is not None:
        raise answers.error
    if answers.received < answers.expected and not answers.failed:
        missing = answers.expected - answers.received
        raise UnavailableError(f"the server closed the connection before {missing} more answers were there")
    return EXIT_GATE if answers.failed else 0


class _Answers(threading.Thread):
    """Prints answers as they come, whatever the sending does: a server may hold back whoever does not read."""

    def __init__(self, client: Client, timeout: float) -> None:
        super().__init__(name="answers", daemon=True)
        self._client = client
        self._timeout = timeout
        self.expected = self.received = self.failed = 0
        self.ending = False
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while True:
                while not self._client.wait(self._timeout):
                    if self.received < self.expected or self.ending:
                        raise UnavailableError("no answer in time (--timeout)")
                answer = self._client.receive()
                if answer is None:
                    break
                self.received += 1
                self.failed += answer["type"] == "error"
                if answer["type"] != "accepted":
                    click.echo(json.dumps(answer, ensure_ascii=False))
        except Exception as error:  # noqa: BLE001  # raised again where the exit code is made
            self.error = error


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
