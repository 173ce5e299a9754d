"""What the demo-model scripts share: file places, windowing, export, int8 conversion and measuring.

TensorFlow and the LiteRT interpreter are imported only inside the functions that need them, so that
``prepare_data.py`` runs with numpy alone.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

HERE = Path(__file__).resolve().parent
DEMO_DATA = HERE.parents[1] / "edge_serve" / "demo" / "data"

MOTION_DIR = HERE / "motion"
MOTION_TEST = DEMO_DATA / "motion.npz"
MOTION_INPUT = "window"
MOTION_WINDOW = 50
MOTION_HOP = 10
MOTION_CHANNELS = ("acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z")

DIGITS_DIR = HERE / "digits"
DIGITS_TEST = DEMO_DATA / "digits.npz"
DIGITS_INPUT = "image"
DIGITS_SIDE = 28

OUTPUT = "probabilities"


def cut_windows(
    series: Floats, labels: Labels, length: int = MOTION_WINDOW, hop: int = MOTION_HOP
) -> tuple[Floats, Labels]:
    """Cut each series [n, samples, channels] into windows [m, length, channels], series by series."""
    starts = range(0, series.shape[1] - length + 1, hop)
    windows = np.stack([series[:, start : start + length] for start in starts], axis=1)
    flat = windows.reshape(-1, length, series.shape[2]).astype(np.float32)
    return flat, np.repeat(labels, len(starts)).astype(np.int64)


def as_model_images(images: npt.NDArray[np.uint8]) -> Floats:
    """Turn grey images [n, side, side] of 0..255 into the model's input [n, side, side, 1] of 0..1."""
    return (images.astype(np.float32) / np.float32(255.0))[..., np.newaxis]


def load_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read every array of an .npz file."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def load_tensorflow(seed: int) -> Any:
    """Import TensorFlow with one thread, deterministic operators and every generator seeded."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    tf: Any = importlib.import_module("tensorflow")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.experimental.enable_op_determinism()
    tf.keras.utils.set_random_seed(seed)
    return tf


def train(
    tf: Any,
    model: Any,
    inputs: Floats,
    labels: Labels,
    augment: Callable[[Floats, np.random.Generator], Floats],
    *,
    epochs: int,
    batch: int,
    peak_rate: float,
    seed: int,
) -> None:
    """Train in place with Adam on a cosine-decayed rate; every epoch sees freshly augmented inputs."""
    keras = tf.keras
    rng = np.random.default_rng(seed)
    steps = epochs * -(-len(inputs) // batch)
    model.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(peak_rate, steps)),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    for epoch in range(epochs):
        order = rng.permutation(len(inputs))
        history = model.fit(
            augment(inputs[order], rng), labels[order], batch_size=batch, epochs=1, shuffle=False, verbose=0
        ).history
        if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
            print(f"epoch {epoch + 1}: loss {history['loss'][0]:.4f}, accuracy {history['accuracy'][0]:.4f}")


def export_saved_model(tf: Any, model: Any, target: Path, input_name: str) -> None:
    """Write the inference part of a Keras model as a SavedModel with one named input and output."""
    module = tf.Module()

    def serve(value: Any) -> dict[str, Any]:
        return {OUTPUT: model(value, training=False)}

    spec = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, name=input_name)
    function = tf.function(serve, autograph=False).get_concrete_function(spec)
    # Only what inference reads (no optimizer state, no dropout generator), in the model's order.
    read = {id(variable) for variable in function.graph.variables}
    module.weights = [variable.value for variable in model.variables if id(variable.value) in read]
    shutil.rmtree(target, ignore_errors=True)
    tf.saved_model.save(module, str(target), signatures={"serving_default": function})
    assets = target / "assets"
    if assets.is_dir() and not any(assets.iterdir()):
        assets.rmdir()


def saved_model_probabilities(tf: Any, saved_model: Path, input_name: str, inputs: Floats) -> Floats:
    """Run the exported float model on all inputs through its serving signature."""
    loaded = tf.saved_model.load(str(saved_model))
    result = loaded.signatures["serving_default"](**{input_name: tf.constant(inputs)})
    return np.asarray(result[OUTPUT].numpy(), dtype=np.float32)


def convert_int8(tf: Any, saved_model: Path, calibration: Floats) -> bytes:
    """Convert a SavedModel to a TFLite model whose operators, input and output are all int8."""
    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved_model))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([sample[np.newaxis]] for sample in calibration)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = tf.int8
    converter.inference_output_type = tf.int8
    return bytes(converter.convert())


def litert_interpreter(model: bytes, item_shape: tuple[int, ...]) -> Any:
    """Open a TFLite model in the LiteRT interpreter with the batch fixed to one item."""
    interpreter = importlib.import_module("ai_edge_litert.interpreter").Interpreter(model_content=model, num_threads=1)
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], [1, *item_shape])
    interpreter.allocate_tensors()
    return interpreter


def litert_probabilities(interpreter: Any, inputs: Floats) -> Floats:
    """Run the inputs one by one through an int8 model and give the outputs back as floats."""
    source = interpreter.get_input_details()[0]
    sink = interpreter.get_output_details()[0]
    in_scale, in_zero = source["quantization"]
    out_scale, out_zero = sink["quantization"]
    outputs = []
    for item in inputs:
        stored = np.clip(np.round(item / in_scale + in_zero), -128, 127).astype(np.int8)
        interpreter.set_tensor(source["index"], stored[np.newaxis])
        interpreter.invoke()
        raw = interpreter.get_tensor(sink["index"])[0].astype(np.float32)
        outputs.append((raw - out_zero) * out_scale)
    return np.asarray(outputs, dtype=np.float32)


def accuracy(probabilities: Floats, labels: Labels) -> float:
    """Share of items whose most probable class is the labelled one."""
    return float((probabilities.argmax(axis=1) == labels).mean())


def report(tf: Any, folder: Path, input_name: str, inputs: Floats, labels: Labels) -> tuple[float, float]:
    """Print and return the float and int8 test accuracy of the SavedModel in ``folder``."""
    saved_model = folder / "saved_model"
    names = (folder / "labels.txt").read_text(encoding="utf-8").split()
    floats = saved_model_probabilities(tf, saved_model, input_name, inputs)
    model = convert_int8(tf, saved_model, load_npz(folder / "calibration.npz")[input_name])
    interpreter = litert_interpreter(model, inputs.shape[1:])
    integers = litert_probabilities(interpreter, inputs)
    agree = float((floats.argmax(axis=1) == integers.argmax(axis=1)).mean())
    operators = [op["op_name"] for op in interpreter._get_ops_details()]
    print(f"int8 model: {len(model)} bytes, operators {operators}")
    for kind, probabilities in (("float", floats), ("int8", integers)):
        print(f"{kind} test accuracy {accuracy(probabilities, labels):.4f} on {len(labels)} items")
        table = np.zeros((len(names), len(names)), dtype=np.int64)
        np.add.at(table, (labels, probabilities.argmax(axis=1)), 1)
        for name, row in zip(names, table, strict=True):
            print(f"  {name:>10}: {' '.join(f'{count:4d}' for count in row)}")
    print(f"float and int8 choose the same class on {agree:.4f} of the items")
    return accuracy(floats, labels), accuracy(integers, labels)
