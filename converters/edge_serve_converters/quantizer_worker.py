"""The child process that converts a .tflite file, without tensorflow: describes, runs and quantizes it. Started as `python -m`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.errors import ModelError, UsageError
from edge_serve.model.engine import Engine
from edge_serve.model.interpreter import load_runtime
from edge_serve_converters import channel, store, tflite_source
from edge_serve_converters.errors import ConversionError
from edge_serve_converters.flatbuffer import read_contents
from edge_serve_converters.litert import FloatFile

_files: dict[str, FloatFile] = {}


def describe(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Describe the signatures, as worker.describe does, and how the file keeps its weights."""
    report("load", 0, 0)
    path = Path(command["model"])
    data = tflite_source.read(path)
    target = Path(command["work"]) / "source.tflite"
    target.write_bytes(tflite_source.normalise(data, {}))
    found = {}
    for key in _signature_keys(target, path):
        engine = _open(target, path, key)
        found[key] = {
            "inputs": {name: _tensor(spec) for name, spec in engine.inputs.items()},
            "outputs": {name: _tensor(spec) for name, spec in engine.outputs.items()},
        }
        engine.close()
    from importlib.metadata import version

    return {
        "litert_quantizer": version("litert-quantizer"),
        "signatures": found,
        "weights": tflite_source.weights_of(read_contents(data)),
    }


def _signature_keys(file: Path, path: Path) -> list[str]:
    try:
        interpreter = load_runtime().open(file, threads=1, xnnpack=False)
    except ModelError as error:
        raise UsageError(f"{path}: {_reason(error, file)}") from error
    return sorted(interpreter.get_signature_list())


def _open(file: Path, path: Path, key: str) -> Engine:
    """Open the float model on the built-in kernels, which compute as exactly as floats do."""
    try:
        return Engine.open(file, runtime=load_runtime(), delegate="none", signature=key)
    except ModelError as error:
        raise UsageError(f"{path}: {_reason(error, file)}") from error


def _reason(error: Exception, file: Path) -> str:
    return str(error).removeprefix(f"{file}: ").replace(f"{file.name}: ", "")


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    # Quantized tensors are real numbers to callers, as in every bundle.
    return {"shape": list(spec.shape), "dtype": spec.dtype if spec.scale is None else "float32"}


def _float_file(command: dict[str, Any]) -> FloatFile:
    path = command["model"]
    if path not in _files:
        shapes = {
            tensor["name"]: tuple(tensor["shape"]) for entry in command["signatures"] for tensor in entry["inputs"]
        }
        _files[path] = FloatFile(tflite_source.normalise(tflite_source.read(Path(path)), shapes))
    return _files[path]


def reference(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Write what the source gives: {…, "signatures": [{"key", "inputs", "data": [[inputs, outputs], …]}]}."""
    from edge_serve_converters.engine_run import run_engine

    target = Path(command["work"]) / "reference.tflite"
    target.write_bytes(_float_file(command).data)
    jobs = [(entry["key"], Path(source), Path(out)) for entry in command["signatures"] for source, out in entry["data"]]
    total = sum(store.runs(store.load(source)) for _, source, _ in jobs)
    done = 0
    for key, source, out in jobs:
        engine = _open(target, Path(command["model"]), key)
        inputs = store.load(source)
        try:

            def step(number: int, before: int = done) -> None:
                report("reference", before + number, total)

            outputs, _ = run_engine(engine, inputs, step)
        except ConversionError as error:
            raise UsageError(
                f"the model itself fails on an input of this shape ({error}); check --input-shape"
            ) from error
        store.save(out, outputs)
        done += store.runs(inputs)
        engine.close()
    return {}


def convert(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Make one variant: {…, "signatures", "job": {"mode", "io", "keep_float", "per_channel_dense"}, "target": file}."""
    job = command["job"]
    source = _float_file(command)
    if job["mode"] == "none":
        data = _as_it_is(command, source)
    else:
        samples = {entry["key"]: Path(entry["calibration"]) for entry in command["signatures"] if entry["calibration"]}
        data = source.make(
            job["mode"], job["io"], job["keep_float"], samples, report, per_channel_dense=job["per_channel_dense"]
        )
    Path(command["target"]).write_bytes(data)
    return {}


def _as_it_is(command: dict[str, Any], source: FloatFile) -> bytes:
    """Give the file byte for byte if its shapes are fixed already."""
    data = Path(command["model"]).read_bytes()
    Path(command["work"], "as-it-is.tflite").write_bytes(data)
    interpreter = load_runtime().open(Path(command["work"], "as-it-is.tflite"), threads=1, xnnpack=False)
    open_ended = any(np.any(np.asarray(detail["shape_signature"]) < 0) for detail in interpreter.get_input_details())
    return source.data if open_ended else data


def float_file(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Write the float file that layers are compared with."""
    report("load", 0, 0)
    Path(command["target"]).write_bytes(_float_file(command).data)
    return {}


if __name__ == "__main__":
    channel.serve({"describe": describe, "reference": reference, "convert": convert, "float_file": float_file})
