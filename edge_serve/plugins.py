"""The table of parts by kind and name: built-in ones, and those that other distributions register by entry point.

A part is imported when it is used. A built-in name cannot be taken over by an entry point.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

from edge_serve.errors import UsageError

Kind = Literal["sources", "sinks", "delegates"]

BUILTIN: dict[str, dict[str, str]] = {
    "sources": {
        "mqtt": "edge_serve.sources.mqtt:MqttSource",
        "socket": "edge_serve.sources.socket:SocketSource",
        "file": "edge_serve.sources.file:FileSource",
    },
    "sinks": {
        "mqtt": "edge_serve.sinks.mqtt:MqttSink",
        "stdout": "edge_serve.sinks.stdout:StdoutSink",
        "file": "edge_serve.sinks.file:FileSink",
    },
    # By string: what is about hardware is imported where it is used, and may be left out of an image.
    "delegates": {
        "none": "edge_serve.model.cpu:Cpu",
        "xnnpack": "edge_serve.model.cpu:Xnnpack",
        "edgetpu": "edge_serve_devices.delegates:EdgeTpu",
        "gpu": "edge_serve_devices.delegates:Gpu",
        "external": "edge_serve_devices.delegates:External",
    },
}


class UnknownPartError(UsageError):
    """There is no part of that name."""


def names(kind: Kind) -> list[str]:
    """Give all known names of a kind, sorted."""
    return sorted({*BUILTIN[kind], *_entry_points(kind)})


def _entry_points(kind: Kind) -> dict[str, Any]:
    from importlib.metadata import entry_points  # slow to import; built-in parts do not pay for it

    return {entry.name: entry for entry in entry_points(group=f"edge_serve.{kind}")}


def load(kind: Kind, name: str) -> Any:
    """Import a part's class; UnknownPartError names the known ones."""
    if name in BUILTIN[kind]:
        module, _, attribute = BUILTIN[kind][name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    entry = _entry_points(kind).get(name)
    if entry is None:
        raise UnknownPartError(f"unknown type {name!r}; known: {', '.join(names(kind))}")
    try:
        part = entry.load()
    except (ImportError, AttributeError) as error:
        raise UnknownPartError(
            f"type {name!r} is registered as {entry.value} but cannot be imported: {error}"
        ) from error
    return part
