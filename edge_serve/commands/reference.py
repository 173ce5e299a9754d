"""Writes the README's reference tables from the code: `python -m edge_serve.commands.reference --write | --check`."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import click

from edge_serve import bundle, config, plugins, schema, spec
from edge_serve.commands import COMMANDS

BEGIN, END = "<!-- begin: {} (made from the code) -->", "<!-- end: {} -->"


def sections() -> dict[str, str]:
    """Give the generated sections by name."""
    return {
        "configuration": _configuration(),
        "commands": _commands(),
        "convert": _options("edge_serve_converters.cli", "convert"),
        "recipe": _recipe(),
        "manifest": _manifest(),
    }


def _configuration() -> str:
    parts = [
        _table("Top level", config._TopKeys),
        _table("`[mqtt]` and `[mqtt.NAME]`", config.MqttBroker),
        _table("`[status]`", config.StatusConfig),
        _table("`[spool]`", config.SpoolConfig),
        _table("`[[pipeline]]`", config._PipelineKeys, config.ModelConfig),
        '`[models.NAME]` takes the keys from `model` on, for models that several pipelines use: `model = "NAME"`.',
        _table("`[pipeline.input]`", spec.InputSpec),
        _table("`[pipeline.output]`", spec.OutputSpec),
    ]
    parts.append(_table("`[[pipeline.sink]]` of any type", config._SinkKeys))
    for kind, header in (("sources", "[pipeline.source]"), ("sinks", "[[pipeline.sink]]")):
        for name in plugins.BUILTIN[kind]:
            options = plugins.load(kind, name).Options  # type: ignore[arg-type]  # one of the two kinds
            parts.append(_table(f'`{header}` with `type = "{name}"`', options))
    return "\n\n".join(parts)


def _table(title: str, *classes: Any) -> str:
    rows = [row for cls in classes for row in _rows(cls)]
    if not rows:
        return f"#### {title}\n\nNo keys of its own."
    return "\n".join([f"#### {title}", "", "| key | takes | default | |", "|---|---|---|---|", *rows])


def _rows(cls: Any) -> list[str]:
    rows = []
    kinds = schema.hints(cls)
    for field in dataclasses.fields(cls):
        default = "" if field.default is None else "required"
        if field.default not in (None, dataclasses.MISSING):
            default = f"`{json.dumps(field.default, ensure_ascii=False)}`"
        takes = schema.describe(kinds[field.name]).replace("|", "\\|")
        low, high = field.metadata.get("low"), field.metadata.get("high")
        if low is not None or high is not None:
            takes += f", {'' if low is None else low} … {'' if high is None else high}".rstrip()
        doc = str(field.metadata.get("doc", "")).replace("|", "\\|")
        rows.append(f"| `{field.name}` | {takes} | {default} | {doc} |")
    return rows


def _commands() -> str:
    rows = ["| command | |", "|---|---|"]
    rows += [f"| `edge-serve {name}` | {text} |" for name, (_, text) in COMMANDS.items()]
    return "\n".join(rows)


def _options(module: str, name: str) -> str:
    """List a command's options as its --help says them."""
    command: click.Command = getattr(importlib.import_module(module), name)
    context = click.Context(command)
    rows = ["| option | |", "|---|---|"]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            option, text = (part.replace("|", "\\|").replace("<", "&lt;") for part in record)
            rows.append(f"| `{option}` | {text} |")
    return "\n".join(rows)


def _recipe() -> str:
    from edge_serve_converters.recipe import Recipe

    rows = _rows(Recipe)
    return "\n".join(["| key | takes | default | |", "|---|---|---|---|", *rows])


def _manifest() -> str:
    rows = ["| key | takes |", "|---|---|"]
    for cls, prefix in (
        (bundle.Manifest, ""),
        (bundle.Variant, "variants[]."),
        (bundle.TensorSpec, "variants[].inputs[]."),
    ):
        kinds = schema.hints(cls)
        rows += [
            f"| `{prefix}{field.name}` | {schema.describe(kinds[field.name])} |".replace(" | {", " | ")
            for field in dataclasses.fields(cls)
        ]
    return "\n".join(rows)


def rendered(text: str) -> str:
    """Give the README's text with all generated sections as the code has them now."""
    for name, body in sections().items():
        begin, end = BEGIN.format(name), END.format(name)
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            raise click.ClickException(f"README.md has no section {begin}")
        text = pattern.sub(lambda _match, b=begin, c=body, e=end: f"{b}\n\n{c}\n\n{e}", text)  # type: ignore[misc]
    return text


@click.command()
@click.option("--write", is_flag=True, help="Write the sections.")
@click.option("--check", is_flag=True, help="Fail if they are not current.")
@click.option("--readme", type=click.Path(path_type=Path), default=Path("README.md"), show_default=True)
def main(write: bool, check: bool, readme: Path) -> None:
    """Keep the README's generated sections as the code has them."""
    old = readme.read_text(encoding="utf-8")
    new = rendered(old)
    if write:
        readme.write_text(new, encoding="utf-8")
    elif check and old != new:
        click.echo("README.md is not current: run `python -m edge_serve.commands.reference --write`", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
