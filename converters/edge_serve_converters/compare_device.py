"""The child that runs the files of a comparison as a device does, and times them; no tensorflow."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve.model.engine import Engine
from edge_serve.model.interpreter import load_runtime
from edge_serve.processing.tensor import quantize
from edge_serve_converters import channel, device, store

# Different inputs in turn, so that no cache holds all of one; more would only take memory.
TIMED_INPUTS = 8


def _open(command: dict[str, Any]) -> Engine:
    return Engine.open(
        Path(command["model"]),
        runtime=load_runtime(),
        delegate=command["delegate"],
        threads=command["threads"],
        signature=command["signature"],
    )


def describe(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Say what a file takes and gives: {"model", "signature" or None, "delegate", "threads"}; ModelError if it cannot run."""
    report("load", 0, 0)
    engine = _open(command)
    answer = {
        "signature": engine.signature,
        "inputs": [dataclasses.asdict(spec) for spec in engine.inputs.values()],
        "outputs": [dataclasses.asdict(spec) for spec in engine.outputs.values()],
        "delegate": engine.delegate,
        "claimed": engine.claims.taken,
        "operators": engine.claims.operators,
    }
    engine.close()
    return answer


def run(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Run a file over a folder of inputs and write its outputs as real numbers: describe's command, "data" and "answers"."""
    engine = _open(command)
    inputs = store.load(Path(command["data"]))
    total = store.runs(inputs)
    outputs, _ = device.run_engine(engine, inputs, lambda done: report("run", done, total))
    store.save(Path(command["answers"]), outputs)
    engine.close()
    return {}


def latency(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Time single runs, input copy to output copy: describe's command, "data", "seconds" (at most) and "most" (runs)."""
    report("latency", 0, 0)
    engine = _open(command)
    inputs = store.load(Path(command["data"]))
    given = [
        {
            name: np.ascontiguousarray(quantize(np.asarray(inputs[name][number]), spec))
            for name, spec in engine.inputs.items()
        }
        for number in range(min(TIMED_INPUTS, store.runs(inputs)))
    ]
    engine.run(given[0])  # a dynamic batch takes its memory now
    times: list[float] = []
    deadline = time.perf_counter() + command["seconds"]
    while len(times) < command["most"] and (not times or time.perf_counter() < deadline):
        start = time.perf_counter()
        engine.run(given[len(times) % len(given)])
        times.append(time.perf_counter() - start)
    engine.close()
    return {"seconds": times}


if __name__ == "__main__":
    channel.serve({"describe": describe, "run": run, "latency": latency})
