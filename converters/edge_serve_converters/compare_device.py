"""The child that runs the files of a comparison as a device does, and times them; no tensorflow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from edge_serve.errors import ModelError
from edge_serve.model.engine import Engine
from edge_serve.model.interpreter import load_runtime
from edge_serve_converters import channel, store
from edge_serve_converters.engine_run import ends, fed, run_folders, runtime_name

# Different inputs in turn, so that no cache holds all of one; more would only take memory.
TIMED_INPUTS = 8


def _open(command: dict[str, Any]) -> Engine:
    try:
        return Engine.open(
            Path(command["model"]),
            runtime=load_runtime(),
            delegate=command["delegate"],
            threads=command["threads"],
            signature=command["signature"],
        )
    except ModelError as error:  # it speaks of a configuration's key; here that is an option
        raise ModelError(str(error).replace("`signature`", "--signature")) from error


def describe(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Say what a file takes and gives: {"model", "signature" or None, "delegate", "threads"}; ModelError if it cannot run."""
    report("load", 0, 0)
    engine = _open(command)
    answer = {
        "signature": engine.signature,
        **ends(engine),
        "delegate": engine.delegate,
        "claimed": engine.claims.taken,
        "operators": engine.claims.operators,
        "runtime": runtime_name(load_runtime()),
    }
    engine.close()
    return answer


def run(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Run a file over a folder of inputs and write its outputs as real numbers: describe's command, "data" and "answers"."""
    engine = _open(command)
    run_folders(engine, [(command["data"], command["answers"])], report)
    engine.close()
    return {}


def latency(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Time single runs, input copy to output copy: describe's command, "data", "seconds" (at most) and "most" (runs)."""
    report("latency", 0, 0)
    engine = _open(command)
    inputs = store.load(Path(command["data"]))
    given = [fed(inputs, number, engine.inputs) for number in range(min(TIMED_INPUTS, store.runs(inputs)))]
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
