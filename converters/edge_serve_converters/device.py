"""The child that runs converted files as a device does: our Engine on the TFLite runtime, no tensorflow.

It is a process of its own because a damaged file may take the runtime, and the process with it, down.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve.errors import InferenceError, InputError, ModelError
from edge_serve.model.engine import Engine
from edge_serve.model.interpreter import load_runtime
from edge_serve.processing.tensor import dequantize, quantize
from edge_serve_converters import channel, layers, store
from edge_serve_converters.errors import ConversionError
from edge_serve_converters.latency import summary


def run(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Run one signature of a file over folders of inputs and write its outputs as real numbers (float32).

    The command: model, signature, delegate, inputs and outputs (the names that the signature must have), and data, pairs
    of folders (inputs, outputs). Answers with the tensors as the runtime sees them, what the delegate claimed, and how long
    one inference took.
    """
    model = Path(command["model"])
    runtime = load_runtime()
    try:
        engine = Engine.open(model, runtime=runtime, delegate=command["delegate"], signature=command["signature"])
    except ModelError as error:
        # The folder is a temporary one that nobody will find again.
        reason = str(error).removeprefix(f"{model}: ").replace(f"{model.name}: ", "")
        raise ConversionError(f"{reason}. This variant must not be shipped") from error
    for role, wanted, found in (
        ("inputs", command["inputs"], engine.inputs),
        ("outputs", command["outputs"], engine.outputs),
    ):
        if set(wanted) != set(found):
            raise ConversionError(
                f"signature {command['signature']} has the {role} {', '.join(sorted(found))} in the file; "
                f"the source has {', '.join(sorted(wanted))}"
            )
    loaded = [(store.load(Path(source)), Path(target)) for source, target in command["data"]]
    total = sum(store.runs(inputs) for inputs, _ in loaded)
    done = 0
    seconds: list[float] = []
    for inputs, target in loaded:
        before = done
        outputs, took = run_engine(engine, inputs, lambda number, before=before: report("run", before + number, total))  # type: ignore[misc]
        store.save(target, outputs)
        seconds += took
        done += store.runs(inputs)
    answer = {
        "inputs": [dataclasses.asdict(spec) for spec in engine.inputs.values()],
        "outputs": [dataclasses.asdict(spec) for spec in engine.outputs.values()],
        "claimed": engine.claims.claimed,
        "operators": engine.claims.total,
        "latency_ms": {**summary(seconds), "threads": engine.threads, "delegate": engine.delegate},
        "runtime": f"{runtime.module.replace('_', '-')} {runtime.version}",
    }
    engine.close()
    return answer


def run_engine(engine: Engine, inputs: store.Arrays, step: Callable[[int], None]) -> tuple[store.Arrays, list[float]]:
    """Run an engine on every run of the inputs; gives outputs (name → [runs, *shape], float32 where quantized) and seconds.

    ConversionError if the runtime fails on one of them, or the outputs' shapes depend on the values.
    """
    results: dict[str, list[Any]] = {name: [] for name in engine.outputs}
    seconds = []
    for number in range(store.runs(inputs)):
        given = {
            name: np.ascontiguousarray(quantize(np.asarray(inputs[name][number]), spec))
            for name, spec in engine.inputs.items()
        }
        start = time.perf_counter()
        try:
            answers = engine.run(given)
        except (InferenceError, InputError) as error:
            raise ConversionError(str(error)) from error
        seconds.append(time.perf_counter() - start)
        for name, array in answers.items():
            results[name].append(dequantize(np.array(array), engine.outputs[name]))
        step(number + 1)
    for name, arrays in results.items():
        shapes = sorted({array.shape for array in arrays})
        if len(shapes) > 1:
            raise ConversionError(
                f"output {name!r} has a shape that depends on the values of the input ({list(shapes[0])}, {list(shapes[-1])}); "
                "device models have fixed shapes: pad the output in the model to its largest size"
            )
    return {name: np.stack(arrays) for name, arrays in results.items()}, seconds


def compare_layers(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Compare a file's layers with the float file's: {"reference", "model", "signature", "inputs": folder, "runs"}."""
    report("layers", 0, 0)
    found = layers.compare_layers(
        Path(command["reference"]),
        Path(command["model"]),
        command["signature"],
        store.load(Path(command["inputs"])),
        command["runs"],
    )
    return {
        "layers": [layer.to_json() for layer in found.layers],
        "operators": found.operators,
        "matched": found.matched,
    }


if __name__ == "__main__":
    channel.serve({"run": run, "layers": compare_layers})
