"""Makes the small SavedModels that the converter's tests need; run as a program, because tests never import tensorflow.

usage: python converter_models.py FOLDER
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import numpy as np
import tensorflow as tf

keras = tf.keras
FEATURES = 16


class Holder(tf.Module):  # type: ignore[misc]  # tensorflow has no types
    """A module whose attributes are saved with it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def weights(*shape: int) -> Any:
    """Make a variable of seeded normal values."""
    rng = np.random.default_rng(sum(shape))
    return tf.Variable((rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32))


def save(folder: Path, function: Callable[..., Any], holder: Any, *specs: Any) -> None:
    """Save one function as `serving_default`."""
    tf.saved_model.save(
        holder, str(folder), signatures=tf.function(function, autograph=False).get_concrete_function(*specs)
    )


def vector(batch: int | None = None, name: str = "x", dtype: Any = tf.float32) -> Any:
    """Give the specification of an input [batch, FEATURES]."""
    return tf.TensorSpec([batch, FEATURES], dtype, name=name)


def make_dense(folder: Path) -> None:
    """A classifier of vectors, as Keras exports it: the batch is dynamic, the signatures are serve and serving_default."""
    model = keras.Sequential(
        [
            keras.Input((FEATURES,), name="x"),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model.export(str(folder), verbose=False)


def make_wrapped_keras(folder: Path) -> None:
    """A Keras 3 model inside a tf.Module with two signatures: from_saved_model() alone loses its weights."""
    model = keras.Sequential(
        [keras.Input((FEATURES,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)]
    )

    class Module(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        @tf.function(input_signature=[vector()])  # type: ignore[untyped-decorator]
        def score(self, x: Any) -> Any:
            return {"scores": self.model(x)}

        @tf.function(input_signature=[vector(name="y")])  # type: ignore[untyped-decorator]
        def double(self, y: Any) -> Any:
            return {"twice": self.model(y) * 2, "once": self.model(y)}

    module = Module()
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.score, "double": module.double})
    # What TensorFlow itself makes of it, with exit status 0.
    (folder.parent / "weightless.tflite").write_bytes(tf.lite.TFLiteConverter.from_saved_model(str(folder)).convert())


def make_lstm(folder: Path) -> None:
    """A recurrent classifier: int8 calibration of it crashes TensorFlow when all shapes are fixed."""
    model = keras.Sequential(
        [keras.Input((10, 4), name="window"), keras.layers.LSTM(8), keras.layers.Dense(3, activation="softmax")]
    )
    model.export(str(folder), verbose=False)


def make_sine(folder: Path) -> None:
    """SIN has no int8 kernel: it stays float in a model that is otherwise quantized."""
    holder = Holder(w=weights(FEATURES, FEATURES), v=weights(FEATURES, 3))
    save(folder, lambda x: {"y": tf.sin(x @ holder.w) @ holder.v}, holder, vector())


def make_only_sine(folder: Path) -> None:
    """Nothing in it can be quantized."""
    save(folder, lambda x: {"y": tf.sin(x)}, Holder(), vector())


def make_silence(folder: Path) -> None:
    """A log of the energy, as audio models begin: 1e-10 is 0 in float16, so zeros give NaN."""
    holder = Holder(w=weights(FEATURES, 3))
    save(folder, lambda x: {"y": tf.math.log(tf.square(x) + 1e-10) @ holder.w}, holder, vector())


def make_flex(folder: Path) -> None:
    """Operators that only TensorFlow has: one of its kernels, and one that would be a custom operator."""
    holder = Holder(w=weights(FEATURES, FEATURES))
    save(folder, lambda x: {"y": tf.math.erf(x @ holder.w), "z": tf.math.erfinv(tf.tanh(x))}, holder, vector())


def make_detector(folder: Path) -> None:
    """A detector that ends in TFLite_Detection_PostProcess, as the object detection API exports it."""
    attributes = {
        "max_detections": "i: 5", "max_classes_per_detection": "i: 1", "use_regular_nms": "b: false", "num_classes": "i: 2",
        "nms_score_threshold": "f: 0.1", "nms_iou_threshold": "f: 0.5",
        "y_scale": "f: 10", "x_scale": "f: 10", "h_scale": "f: 5", "w_scale": "f: 5",
    }  # fmt: skip
    implements = 'name: "TFLite_Detection_PostProcess" ' + " ".join(
        f'attr {{ key: "{key}" value {{ {value} }} }}' for key, value in attributes.items()
    )
    holder = Holder(w=weights(FEATURES, 40), v=weights(FEATURES, 30))
    anchors = np.random.default_rng(0).random((10, 4), np.float32)

    @tf.function(experimental_implements=implements)  # type: ignore[untyped-decorator]
    def postprocess(boxes: Any, scores: Any, anchors: Any) -> Any:
        return tf.zeros((1, 5, 4)), tf.zeros((1, 5)), tf.zeros((1, 5)), tf.zeros((1,))

    def detect(x: Any) -> Any:
        boxes = tf.reshape(x @ holder.w, (1, 10, 4))
        scores = tf.sigmoid(tf.reshape(x @ holder.v, (1, 10, 3)))
        found = postprocess(boxes, scores, tf.constant(anchors))
        return dict(zip(("boxes", "classes", "scores", "count"), found, strict=True))

    save(folder, detect, holder, vector(1))


def make_stateful(folder: Path) -> None:
    """Adds up its inputs in a variable."""
    holder = Holder(w=weights(FEATURES, 3), total=tf.Variable(tf.zeros((1, FEATURES))))

    def add(x: Any) -> Any:
        holder.total.assign_add(x)
        return {"y": holder.total @ holder.w}

    save(folder, add, holder, vector(1))


def make_text(folder: Path) -> None:
    """Takes text."""
    holder = Holder(w=weights(1, 3))
    spec = tf.TensorSpec([None], tf.string, name="sentence")
    save(folder, lambda s: {"y": tf.cast(tf.strings.length(s), tf.float32)[:, None] @ holder.w}, holder, spec)


def make_unsigned(folder: Path) -> None:
    """Has no signature."""
    tf.saved_model.save(Holder(w=weights(2, 2)), str(folder))


def make_two_inputs(folder: Path) -> None:
    """Takes an index (int32) and a vector, and has two outputs."""
    holder = Holder(table=weights(10, FEATURES), w=weights(FEATURES, 3))

    def look_up(index: Any, x: Any) -> Any:
        summed = tf.gather(holder.table, index) + x
        return {"score": summed @ holder.w, "sum": summed}

    save(folder, look_up, holder, tf.TensorSpec([None], tf.int32, name="index"), vector())


def make_photo(folder: Path) -> None:
    """An image classifier of any size with a raw uint8 twin of the signature."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((None, None, 3), name="photo"),
            layers.Conv2D(8, 3, strides=2, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2, activation="softmax"),
        ]
    )
    holder = Holder(model=model)
    photo = tf.TensorSpec([None, None, None, 3], tf.float32, name="photo")
    raw = tf.TensorSpec([None, 24, 32, 3], tf.uint8, name="photo")
    tf.saved_model.save(
        holder,
        str(folder),
        signatures={
            "serving_default": tf.function(lambda photo: {"probabilities": model(photo)}).get_concrete_function(photo),
            "raw": tf.function(
                lambda photo: {"probabilities": model(tf.cast(photo, tf.float32) / 255)}
            ).get_concrete_function(raw),
        },
    )


def make_reciprocal(folder: Path) -> None:
    """Gives infinity itself where the input is zero; the int8 kernel refuses to divide there."""
    holder = Holder(w=weights(FEATURES, FEATURES))
    save(folder, lambda x: {"y": 1.0 / (x @ holder.w)}, holder, vector())


def make_finder(folder: Path) -> None:
    """Gives as many rows as there are positive values."""
    holder = Holder(w=weights(1, 3))
    save(folder, lambda x: {"found": tf.boolean_mask(x[0], x[0] > 0)[:, None] @ holder.w}, holder, vector(1))


def make_wide(folder: Path) -> None:
    """A dense layer with enough weights for dynamic-range quantization."""
    holder = Holder(w=weights(FEATURES, 256), v=weights(256, 4))
    save(folder, lambda x: {"y": tf.nn.relu(x @ holder.w) @ holder.v}, holder, vector())


def main() -> None:
    """Make every model whose function is called make_*."""
    target = Path(sys.argv[1])
    for name, make in list(globals().items()):
        if name.startswith("make_"):
            keras.utils.set_random_seed(1)
            make(target / name.removeprefix("make_"))


if __name__ == "__main__":
    main()
