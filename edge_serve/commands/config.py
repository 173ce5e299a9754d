"""`edge-serve config --sample`: a commented configuration, made from the dataclasses that read it."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from typing import Any

import click

from edge_serve import config as configuration
from edge_serve import plugins, schema, spec

WIDTH = 110


@click.command(
    epilog="""\b
Example:
  edge-serve config --sample > edge-serve.toml"""
)
@click.option("--sample", is_flag=True, help="Write a commented configuration with every key.")
@click.option("--source", "sources", multiple=True, help="Show this source (default: all).")
@click.option("--sink", "sinks", multiple=True, help="Show this sink (default: all).")
def config(sample: bool, sources: tuple[str, ...], sinks: tuple[str, ...]) -> None:
    """Write a commented configuration to begin with, made from the code that reads it."""
    if not sample:
        raise click.UsageError("say --sample")
    click.echo(render(sources or tuple(plugins.BUILTIN["sources"]), sinks or tuple(plugins.BUILTIN["sinks"])), nl=False)


def render(sources: tuple[str, ...], sinks: tuple[str, ...]) -> str:
    """Give the sample: the first source and sink stand as they are, all else is commented out."""
    parts = [
        "# A configuration of edge-serve. Keys that are commented out show an example or the default.",
        "# `edge-serve check` finds mistakes; paths are relative to this file's folder.",
        "",
        *_keys(configuration._TopKeys, active={"schema"}),
        "",
        "# The broker that sources and sinks use unless they name another table, [mqtt.NAME].",
        "[mqtt]",
        *_keys(configuration.MqttBroker, active={"url"}),
        "",
        "# What this device says of itself, retained and with a last will; it is on where there is a broker.",
        "[status]",
        *_keys(configuration.StatusConfig, active=set()),
        "",
        "# Where results wait on disk while their upstream is away.",
        "[spool]",
        *_keys(configuration.SpoolConfig, active=set()),
        "",
        "# One [[pipeline]] for each line from a source through a model to its sinks.",
        "[[pipeline]]",
        *_keys(configuration._PipelineKeys, active={"name"}),
        *_keys(configuration.ModelConfig, active={"model"}),
        "",
        "# What the payloads are; only what the model's bundle does not say already.",
        "[pipeline.input]",
        *_keys(spec.InputSpec, active=set()),
        "",
        "# What the results are; only what the model's bundle does not say already.",
        "[pipeline.output]",
        *_keys(spec.OutputSpec, active=set()),
    ]
    for position, name in enumerate(sources):
        parts += ["", *_part("sources", name, "[pipeline.source]", commented=position > 0)]
    for position, name in enumerate(sinks):
        parts += ["", *_part("sinks", name, "[[pipeline.sink]]", commented=position > 0)]
    return "\n".join(parts) + "\n"


def _part(kind: Any, name: str, header: str, *, commented: bool) -> list[str]:
    options = plugins.load(kind, name).Options
    required = {
        field.name
        for field in dataclasses.fields(options)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    doc = (options.__doc__ or "").splitlines()[0]
    common = _keys(configuration._SinkKeys, active=set()) if kind == "sinks" else []
    lines = [header, f'type = "{name}"', *common, *_keys(options, active=required)]
    if commented:
        lines = [line if line.startswith("#") else f"# {line}" for line in lines]
    return [f"# {doc}", *lines]


def _keys(options: Any, active: set[str]) -> list[str]:
    lines: list[str] = []
    types = schema.hints(options)
    for field in dataclasses.fields(options):
        doc = str(field.metadata.get("doc", ""))
        if schema.describe(types[field.name]) not in ("text", "table") and '"' in schema.describe(types[field.name]):
            doc += f"  [{schema.describe(types[field.name])}]"
        lines += [f"# {line}" for line in textwrap.wrap(doc, WIDTH)]
        value = field.metadata.get("example")
        if value is None and field.default is not dataclasses.MISSING:
            value = field.default
        text = f"{field.name} = {_toml(value)}"
        lines.append(text if field.name in active else f"# {text}")
    return lines


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }" if value else "{}"
    if value is None:
        return '""'
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
