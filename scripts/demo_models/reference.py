"""Runs the float SavedModels on the demo's test data and keeps their answers: what the quantized files are held against.

usage: python scripts/demo_models/reference.py FOLDER      writes FOLDER/{motion,digits}.npz

Each file holds `probabilities`, float32 [inputs, classes], in the order of the test windows or pictures.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from edge_serve.demo import data  # noqa: E402  # from this checkout, installed or not


def main() -> int:
    """Write the reference answers of both models."""
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    tf: Any = importlib.import_module("tensorflow")
    inputs = {"motion": data.motion().windows, "digits": data.digits().images[..., np.newaxis].astype(np.float32) / 255}
    for name, values in inputs.items():
        signature = tf.saved_model.load(str(HERE / name / "saved_model")).signatures["serving_default"]
        key = next(iter(signature.structured_input_signature[1]))
        probabilities = signature(**{key: tf.constant(values)})["probabilities"].numpy()
        np.savez_compressed(target / f"{name}.npz", probabilities=probabilities)
    return 0


if __name__ == "__main__":
    sys.exit(main())
