"""The child process that has tensorflow: describes, runs and converts one SavedModel or Keras file. Started as `python -m`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_serve_converters import channel, saved_model
from edge_serve_converters.tflite import Converter, Job

_loaded: dict[str, Any] = {}
_converters: dict[str, Converter] = {}


def _tensorflow() -> Any:
    """Import tensorflow when the first command comes, with one thread for sums whose order must not change."""
    import tensorflow as tf

    if not _loaded:
        tf.config.threading.set_intra_op_parallelism_threads(1)
    return tf


def _model(command: dict[str, Any], report: channel.Report) -> tuple[Any, Any]:
    """Give tensorflow and the loaded model of a command: {"model": path, "format": …, "work": folder, …}."""
    path = command["model"]
    if path not in _loaded:
        report("start", 0, 0)
    tf = _tensorflow()
    if path not in _loaded:
        report("load", 0, 0)
        folder = path
        if command["format"] == "Keras":
            folder = saved_model.export_keras(tf, Path(path), Path(command["work"]) / "exported")
        _loaded[path] = saved_model.load(tf, folder, path)
    return tf, _loaded[path]


def describe(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Describe the signatures."""
    return saved_model.describe(*_model(command, report))


def reference(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Write the float outputs: {…, "signatures": [{"key", "data": [[inputs, outputs], …]}]}."""
    tf, loaded = _model(command, report)
    saved_model.reference(tf, loaded, command["signatures"], report)
    return {}


def _converter(command: dict[str, Any], report: channel.Report) -> Converter:
    tf, loaded = _model(command, report)
    path = command["model"]
    if path not in _converters:
        work = Path(command["work"]) / f"trace-{len(list(Path(command['work']).glob('trace-*')))}"
        work.mkdir()
        _converters[path] = Converter(tf, loaded, command["signatures"], work)
    return _converters[path]


def convert(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Make one variant: {…, "signatures", "job": fields of Job, "target": file}."""
    data = _converter(command, report).make(_job(command), report)
    Path(command["target"]).write_bytes(data)
    return {}


def float_file(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Write the float file that layers are compared with; the command is that of `convert`."""
    data = _converter(command, report).float_file(_job(command), report)
    Path(command["target"]).write_bytes(data)
    return {}


def _job(command: dict[str, Any]) -> Job:
    fields = command["job"]
    return Job(**{**fields, "keep_float": tuple(fields["keep_float"])})


if __name__ == "__main__":
    channel.serve({"describe": describe, "reference": reference, "convert": convert, "float_file": float_file})
