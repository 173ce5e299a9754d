"""Runs the demo's models on their golden samples and prints what comes out, as JSON; the same on a board, under QEMU, and here.

usage: python probe.py [DELEGATE]
"""

from __future__ import annotations

import json
import platform
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve.model.engine import Engine
from edge_serve.model.interpreter import load_runtime
from edge_serve.model.repository import find
from edge_serve.processing.tensor import dequantize, fit


def outputs(folder: Path, delegate: str) -> dict[str, Any]:
    """Give a model's outputs on all of its samples, real numbers, by name."""
    version = find(folder)
    assert version.bundle is not None
    engine = Engine.open(version.file, runtime=load_runtime(), delegate=delegate)
    found: dict[str, list[Any]] = {name: [] for name in engine.outputs}
    with np.load(version.bundle.path / "samples.npz") as samples:
        runs = len(samples[f"input/{next(iter(engine.inputs))}"])
        for run in range(runs):
            given = {name: fit(samples[f"input/{name}"][run], spec) for name, spec in engine.inputs.items()}
            for name, array in engine.run(given).items():
                found[name].append(dequantize(array, engine.outputs[name]).reshape(-1).tolist())
    steps = {name: spec.scale or 0.0 for name, spec in engine.outputs.items()}
    return {"values": found, "steps": steps, "claimed": engine.claims.taken, "operators": engine.claims.total}


def main() -> None:
    """Print one document."""
    delegate = sys.argv[1] if len(sys.argv) > 1 else "xnnpack"
    models = Path(str(resources.files("edge_serve"))) / "demo/models"
    runtime = load_runtime()
    document = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "runtime": f"{runtime.name} {runtime.version}",
        "numpy": np.__version__,
        "models": {folder.name: outputs(folder, delegate) for folder in sorted(models.iterdir()) if folder.is_dir()},
    }
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
