"""The child that runs converted files as a device does: our Engine on the TFLite runtime, no tensorflow.

It is a process of its own because a damaged file may take the runtime, and the process with it, down.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_serve.errors import ModelError
from edge_serve.model.engine import Engine
from edge_serve.model.interpreter import load_runtime
from edge_serve_converters import channel, store
from edge_serve_converters.engine_run import ends, run_folders, runtime_name
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
    seconds = run_folders(engine, command["data"], report)
    answer = {
        **ends(engine),
        "claimed": engine.claims.claimed,
        "operators": engine.claims.total,
        "latency_ms": {**summary(seconds), "threads": engine.threads, "delegate": engine.delegate},
        "runtime": runtime_name(runtime),
    }
    engine.close()
    return answer


def compare_layers(command: dict[str, Any], report: channel.Report) -> dict[str, Any]:
    """Compare a file's layers with the float file's: {"reference", "model", "signature", "inputs": folder, "runs"}."""
    from edge_serve_converters import layers  # and what reads files, which running them does not need

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
