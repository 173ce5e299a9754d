"""How commands reach the running service of a configuration: by its state folder, over the control socket."""

from __future__ import annotations

from pathlib import Path

from edge_serve.config import Config
from edge_serve.control import Caller
from edge_serve.errors import UnavailableError


def call(file: Path, config: Config, max_payload: int = 0) -> Caller:
    """Connect to the service that runs `config`, read from `file`; UnavailableError says how to find it."""
    try:
        return Caller(config.state_dir, max_payload)
    except UnavailableError as error:
        raise UnavailableError(
            f"{error}. Start it with `edge-serve run -c {file}`; if it runs as a service with a state folder of its own, "
            "name that folder as it does, with state_dir in the configuration or STATE_DIRECTORY"
        ) from error
