"""`edge-serve check`: every mistake of a configuration at once, without opening a connection."""

from __future__ import annotations

import json
from dataclasses import dataclass
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
            checked, problems = check_models(config)
            lines = [str(each) for each in checked]
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


@dataclass(frozen=True, slots=True)
class Checked:
    """A pipeline whose model loads."""

    name: str
    text: str
    """What it takes, gives and runs on."""
    instead: str
    """Why it runs on a `fallback`; empty where it does not."""

    def __str__(self) -> str:
        return f"{self.name}: {self.text}{f', in place of what was asked for: {self.instead}' if self.instead else ''}"


def check_models(config: Config) -> tuple[list[Checked], list[Problem]]:
    """Load all models and hold them against the configuration; gives the pipelines that can run, and what is wrong."""
    from edge_serve.app import find_model, open_engine
    from edge_serve.health import Counters
    from edge_serve.model.interpreter import load_runtime

    checked: list[Checked] = []
    problems: list[Problem] = []
    try:
        runtime = load_runtime(config.runtime)
    except UsageError as error:
        return [], [Problem("runtime", str(error))]
    for pipeline in config.pipelines:
        try:
            version = find_model(config, pipeline)
            engine, meaning, instead = open_engine(config, pipeline, version, runtime)
            meaning.decoder(engine)
            meaning.intake(engine, Counters(), None)
            what = f"{meaning.input.kind} in, {meaning.output.type} out, on {engine.delegate}"
            checked.append(Checked(pipeline.name, f"{version.name} ({version.variant}), {what}", instead))
            engine.close()
        except UsageError as error:
            problems.append(Problem(f"{pipeline.key}.model", str(error)))
    return checked, problems
