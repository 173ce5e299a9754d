"""An engine run over folders of inputs: what the children that run files as a device does have in common."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.errors import InferenceError, InputError
from edge_serve.model.engine import Engine
from edge_serve.model.interpreter import Runtime
from edge_serve.processing.tensor import dequantize, quantize
from edge_serve_converters import store
from edge_serve_converters.channel import Report
from edge_serve_converters.errors import ConversionError


def run_folders(engine: Engine, folders: Iterable[tuple[str, str]], report: Report) -> list[float]:
    """Run an engine over folders of inputs and write a new folder of outputs for each; gives the seconds of each run."""
    loaded = [(store.load(Path(source)), Path(target)) for source, target in folders]
    total = sum(store.runs(inputs) for inputs, _ in loaded)
    seconds: list[float] = []
    for inputs, target in loaded:
        outputs, took = run_engine(engine, inputs, partial(_count_on, report, len(seconds), total))
        store.save(target, outputs)
        seconds += took
    return seconds


def _count_on(report: Report, before: int, total: int, number: int) -> None:
    report("run", before + number, total)


def run_engine(engine: Engine, inputs: store.Arrays, step: Callable[[int], None]) -> tuple[store.Arrays, list[float]]:
    """Run an engine on every run of the inputs; gives outputs (name → [runs, *shape], float32 where quantized) and seconds.

    ConversionError if the runtime fails on one of them, or the outputs' shapes depend on the values.
    """
    results: dict[str, list[Any]] = {name: [] for name in engine.outputs}
    seconds = []
    for number in range(store.runs(inputs)):
        given = fed(inputs, number, engine.inputs)
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


def fed(inputs: Mapping[str, store.Array], number: int, specs: Mapping[str, TensorSpec]) -> store.Arrays:
    """Give one run of the inputs, which are real numbers, as a file's tensors take it: quantized where they are."""
    return {
        name: np.ascontiguousarray(quantize(np.asarray(inputs[name][number]), spec)) for name, spec in specs.items()
    }


def ends(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    """Describe an engine's inputs and outputs, for an answer to the parent."""
    return {
        "inputs": [dataclasses.asdict(spec) for spec in engine.inputs.values()],
        "outputs": [dataclasses.asdict(spec) for spec in engine.outputs.values()],
    }


def runtime_name(runtime: Runtime) -> str:
    """Name a runtime as its package is named, with its version: "ai-edge-litert 2.3.0"."""
    return f"{runtime.module.replace('_', '-')} {runtime.version}"
