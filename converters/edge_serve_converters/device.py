"""The child that runs converted files as a device does: our Engine on the TFLite runtime, no tensorflow.

It is a process of its own because a damaged file may take the runtime, and the process with it, down.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve.errors import ModelError
from edge_serve.model.engine import Engine
from edge_serve.model.interpreter import load_runtime
from edge_serve.processing.tensor import dequantize, quantize
from edge_serve_converters import channel, store
from edge_serve_converters.errors import ConversionError


def run(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Run one signature of a file over folders of inputs and write its outputs as real numbers (float32).

    The command: model, signature, delegate, inputs and outputs (the names that the signature must have), and data, pairs
    of folders (inputs, outputs). Answers with the tensors as the runtime sees them and what the delegate claimed.
    """
    model = Path(command["model"])
    try:
        engine = Engine.open(
            model, runtime=load_runtime(), delegate=command["delegate"], signature=command["signature"]
        )
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
                f"the SavedModel has {', '.join(sorted(wanted))}"
            )
    loaded = [(store.load(Path(source)), Path(target)) for source, target in command["data"]]
    total = sum(store.runs(inputs) for inputs, _ in loaded)
    done = 0
    for inputs, target in loaded:
        results: dict[str, list[Any]] = {name: [] for name in engine.outputs}
        for number in range(store.runs(inputs)):
            given = {
                name: np.ascontiguousarray(quantize(np.asarray(inputs[name][number]), spec))
                for name, spec in engine.inputs.items()
            }
            for name, array in engine.run(given).items():
                results[name].append(dequantize(np.array(array), engine.outputs[name]))
            done += 1
            report("run", done, total)
        store.save(target, {name: np.stack(arrays) for name, arrays in results.items()})
    answer = {
        "inputs": [dataclasses.asdict(spec) for spec in engine.inputs.values()],
        "outputs": [dataclasses.asdict(spec) for spec in engine.outputs.values()],
        "claimed": engine.claims.taken,
        "operators": engine.claims.total,
    }
    engine.close()
    return answer


if __name__ == "__main__":
    channel.serve({"run": run})
