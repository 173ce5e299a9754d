"""`edge-serve check`: every mistake of a configuration at once, without opening a connection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_serve.config import DEFAULT_FILE, Config
from edge_serve.errors import EXIT_USAGE, ConfigError, Problem, UsageError

if TYPE_CHECKING:
    from edge_serve.promise import Promise


@click.command(
    epilog="""\b
Example:
  edge-serve check -c edge-serve.toml && systemctl restart edge-serve"""
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
@click.option("--no-models", is_flag=True, help="Do not load the models (for a machine without them).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def check(file: Path, no_models: bool, as_json: bool) -> int:
    """Find every mistake of a configuration; no connection is opened, nothing is served.

    Models are found, their hashes compared and their tensors held against what the configuration says. Without mistakes it
    says what each pipeline promises about its messages, and where that ends.
    Exits with 2 if anything is wrong.
    """
    problems: list[Problem] = []
    lines: list[str] = []
    promises: dict[str, Promise] = {}
    try:
        from edge_serve.app import load
        from edge_serve.promise import promise

        config = load(file)
        promises = {pipeline.name: promise(config, pipeline) for pipeline in config.pipelines}
        if not no_models:
            lines, problems = check_models(config)
        if config.state_dir.exists() and not config.state_dir.is_dir():
            problems.append(
                Problem("state_dir", f"{config.state_dir} is a file", "Name a folder, or a path that is free")
            )
    except ConfigError as error:
        problems = error.problems
    if as_json:
        found = [{"key": problem.key, "what": problem.what, "remedy": problem.remedy} for problem in problems]
        delivery = {name: {"promise": each.text, "notes": each.notes} for name, each in promises.items()}
        document = {"v": 1, "file": str(file), "ok": not problems, "problems": found, "pipelines": lines}
        click.echo(json.dumps({**document, "delivery": delivery}))
    elif problems:
        raise ConfigError(str(file), problems)
    else:
        for line in lines:
            click.echo(line)
        for name, each in promises.items():
            click.echo(f"{name}: delivery: {each.text}")
            for note in each.notes:
                click.echo(f"{name}: note: {note}")
        click.echo(f"{file}: no mistakes")
    return EXIT_USAGE if problems else 0


def check_models(config: Config) -> tuple[list[str], list[Problem]]:
    """Load all models and hold them against the configuration; gives a line for each pipeline, and what is wrong."""
    from edge_serve.app import find_model, open_engine
    from edge_serve.health import Counters
    from edge_serve.model.interpreter import load_runtime

    lines: list[str] = []
    problems: list[Problem] = []
    try:
        runtime = load_runtime(config.runtime)
    except UsageError as error:
        return [], [Problem("runtime", str(error))]
    for pipeline in config.pipelines:
        try:
            version = find_model(config, pipeline)
            engine, meaning = open_engine(config, pipeline, version, runtime)
            meaning.decoder(engine)
            meaning.intake(engine, Counters(), None)
            what = f"{meaning.input.kind} in, {meaning.output.type} out, on {engine.delegate}"
            lines.append(f"{pipeline.name}: {version.name} ({version.variant}), {what}")
            engine.close()
        except UsageError as error:
            problems.append(Problem(f"{pipeline.key}.model", str(error)))
    return lines, problems
