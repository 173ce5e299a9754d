"""The child process that has tensorflow: describes, runs and converts one SavedModel. Started as `python -m`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_serve_converters import channel, saved_model, tflite

_loaded: dict[str, Any] = {}


def _tensorflow() -> Any:
    """Import tensorflow when the first command comes, with one thread for sums whose order must not change."""
    import tensorflow as tf

    if not _loaded:
        tf.config.threading.set_intra_op_parallelism_threads(1)
    return tf


def _model(tf: Any, path: str) -> Any:
    if path not in _loaded:
        _loaded[path] = saved_model.load(tf, path)
    return _loaded[path]


def describe(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Describe the signatures: {"saved_model": path}."""
    report("start", 0, 0)
    tf = _tensorflow()
    report("load", 0, 0)
    return saved_model.describe(tf, _model(tf, command["saved_model"]))


def reference(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Write the float outputs: {"saved_model": path, "signatures": [{"key", "data": [[inputs, outputs], …]}]}."""
    tf = _tensorflow()
    saved_model.reference(tf, _model(tf, command["saved_model"]), command["signatures"], report)
    return {}


def convert(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Make one variant: {"saved_model", "target", "work", "mode", "io", "single_batch", "dynamic_batch", "allow_float", "signatures"}."""
    report("start", 0, 0)
    tf = _tensorflow()
    report("load", 0, 0)
    job = tflite.Job(
        command["mode"],
        command["io"],
        command["signatures"],
        command["single_batch"],
        command["dynamic_batch"],
        command["allow_float"],
    )
    data, frozen = tflite.make(tf, _model(tf, command["saved_model"]), job, Path(command["work"]), report)
    Path(command["target"]).write_bytes(data)
    return {"frozen": frozen}


if __name__ == "__main__":
    channel.serve({"describe": describe, "reference": reference, "convert": convert})
