"""`edge-serve reload`: let the running service read its configuration again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from edge_serve.config import DEFAULT_FILE
from edge_serve.errors import EXIT_OK, ProtocolError, UnavailableError

# A large model on a slow board takes a while to load, and what is in work gets its grace.
OUTCOME_TIMEOUT_S = 900.0


@click.command(
    epilog="""\b
Examples:
  edge-serve check -c edge-serve.toml && edge-serve reload -c edge-serve.toml
  edge-serve convert saved_model -o models/bearing && edge-serve reload"""
)
@click.option(
    "-c",
    "--config",
    "file",
    type=click.Path(path_type=Path),
    default=DEFAULT_FILE,
    show_default=True,
    help="The configuration that `edge-serve run` serves.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def reload(file: Path, as_json: bool) -> int:
    """Let the running service read its configuration again, and wait until it has done so; no message is lost.

    Pipelines that did not change go on untouched. Of the others the new model is loaded first; then the old pipeline
    finishes what it has, and the new one goes on where it stopped. A newer version of a model counts as a change where the
    configuration says version = "latest". SIGHUP does the same.

    A configuration that cannot be used changes nothing. Exits with 2 then, and for changes that need a restart (device,
    state_dir, runtime); with 3 if no service runs, or it is stopping or reloading.
    """
    from edge_serve.app import load
    from edge_serve.commands.calling import call

    with call(file, load(file)) as caller:
        caller.ask("reload", config=os.path.realpath(file))
        message = caller.receive(OUTCOME_TIMEOUT_S)
    if message is None:
        raise UnavailableError(f"no outcome within {OUTCOME_TIMEOUT_S:g} s; its log says how far it is")
    if message.header["type"] != "reload":
        raise ProtocolError(f"the service answers with {message.header['type']!r:.60}")
    done = {key: value for key, value in message.header.items() if key not in ("type", "length")}
    if as_json:
        click.echo(json.dumps({"v": 1, **done}))
    else:
        click.echo(f"reloaded: {done['summary']}")
    return EXIT_OK
