"""Makes models as people have them, trained on the demo's real recordings and pictures; run as a program, like converter_models.

usage: python real_models.py FOLDER [NAME…]      NAME: of a function make_NAME; all but those that need packages by default
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import numpy as np
import tensorflow as tf

ROOT = Path(__file__).parents[1]
PACKAGES = Path(os.environ.get("EDGE_SERVE_TEST_MODELS", ROOT / ".cache" / "models"))
keras = tf.keras
layers = keras.layers
WINDOW, HOP = 20, 10
CLASSES = 4


def windows(which: str, length: int = WINDOW) -> tuple[Any, Any]:
    """Give windows [n, length, 6] of the recordings that training may see ("train") or not ("test"), and their classes."""
    place = ROOT / ("scripts/demo_models/motion/train.npz" if which == "train" else "edge_serve/demo/data/motion.npz")
    with np.load(place) as data:
        series, classes = data["series"], data["labels"]
    # Scaled as the training recordings are, whichever are asked for.
    with np.load(ROOT / "scripts/demo_models/motion/train.npz") as data:
        mean, std = data["series"].mean((0, 1)), data["series"].std((0, 1))
    series = ((series - mean) / std).astype(np.float32)
    starts = range(0, series.shape[1] - length + 1, HOP)
    return np.concatenate([series[:, start : start + length] for start in starts]), np.tile(classes, len(starts))


def train(model: Any, x: Any, y: Any, *, epochs: int, loss: str = "sparse_categorical_crossentropy") -> None:
    """Train with seeded weights and order."""
    model.compile("adam", loss)
    model.fit(x, y, epochs=epochs, batch_size=32, verbose=0)


def recurrent(library: Any, kind: str) -> Any:
    """Build a classifier of windows around recurrent layers, with Keras 3 or Keras 2."""
    made = library.layers
    given = library.Input((WINDOW, 6), name="window")
    if kind == "bidirectional":
        inner = made.Bidirectional(made.GRU(12))(made.Bidirectional(made.LSTM(12, return_sequences=True))(given))
    elif kind == "gru":
        inner = made.GRU(24)(made.Conv1D(12, 3, activation="relu")(given))
    else:
        inner = made.LSTM(24, return_sequences=kind == "steps")(given)
    return library.Model(given, made.Dense(CLASSES, activation="softmax", name="scores")(inner))


RECURRENT = ("gru", "bidirectional", "steps")


def trained_recurrent(library: Any, kind: str) -> Any:
    """Give a trained one; only the accuracy of the GRU is asked about."""
    library.utils.set_random_seed(1)
    model = recurrent(library, kind)
    x, y = windows("train")
    train(model, x, np.repeat(y[:, np.newaxis], WINDOW, 1) if kind == "steps" else y, epochs=12 if kind == "gru" else 1)
    return model


def make_recurrent(folder: Path) -> None:
    """Keras 3: exported, as an archive, and inside a tf.Module with all shapes fixed."""
    for kind in RECURRENT:
        model = trained_recurrent(keras, kind)
        model.export(str(folder / kind), verbose=False)
        if kind == "gru":
            model.save(str(folder / "gru.keras"))
            module = tf.Module()
            module.model = model
            spec = tf.TensorSpec([1, WINDOW, 6], tf.float32, name="window")
            function = tf.function(lambda window, model=model: {"scores": model(window)})
            tf.saved_model.save(module, str(folder / "fixed"), signatures=function.get_concrete_function(spec))
    x, y = windows("test")
    np.savez(folder / "windows.npz", window=x, label=y)
    np.savez(folder / "unlabelled.npz", window=x)


def make_keras2(folder: Path) -> None:
    """Keras 2 (the package tf_keras): SavedModels and HDF5 files; their LSTMs become one operator that keeps its state."""
    sys.path.insert(0, str(PACKAGES / "tf_keras"))
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    library: Any = importlib.import_module("tf_keras")
    folder.mkdir(parents=True)
    for kind in ("lstm", "bidirectional"):
        model = trained_recurrent(library, kind)
        model.save(str(folder / kind), save_format="tf")
        model.save(str(folder / f"{kind}.h5"))
        if kind == "lstm":
            model.save(str(folder / "lstm.keras"))
            model.save_weights(str(folder / "only_weights.h5"))
    given = library.Input((24, 24, 3), name="image")
    inner = library.layers.DepthwiseConv2D(3)(library.layers.Conv2D(8, 3, strides=2)(given))
    library.Model(given, library.layers.GlobalAveragePooling2D()(inner)).save(str(folder / "depthwise.h5"))


def make_sensors(folder: Path) -> None:
    """A 1-D CNN, the same with one channel that a later layer scales back by 3000, and an autoencoder of quiet motion."""
    keras.utils.set_random_seed(1)
    x, y = windows("train", 50)
    test, classes = windows("test", 50)
    first, second = layers.Conv1D(16, 5, activation="relu"), layers.Conv1D(32, 3, activation="relu")
    given = keras.Input((50, 6), name="window")
    inner = layers.GlobalAveragePooling1D()(second(layers.MaxPooling1D(2)(first(given))))
    model = keras.Model(given, layers.Dense(CLASSES, activation="softmax", name="scores")(inner))
    train(model, x, y, epochs=15)
    model.export(str(folder / "cnn"), verbose=False)
    (kernel, bias), (after, other) = first.get_weights(), second.get_weights()
    kernel[..., 3] *= 3000
    bias[3] *= 3000
    after[:, 3] /= 3000
    first.set_weights([kernel, bias])
    second.set_weights([after, other])
    model.export(str(folder / "outlier"), verbose=False)
    np.savez(folder / "windows.npz", window=test, label=classes)
    quiet = np.isin(y, (0, 2))
    given = keras.Input((50, 6), name="window")
    inner = layers.Flatten()(given)
    for units in (64, 12, 64):
        inner = layers.Dense(units, activation="relu")(inner)
    coder = keras.Model(given, layers.Reshape((50, 6), name="again")(layers.Dense(300)(inner)))
    train(coder, x[quiet], x[quiet], epochs=40, loss="mse")
    coder.export(str(folder / "autoencoder"), verbose=False)
    np.savetxt(folder / "anomalous.csv", np.isin(classes, (1, 3)), fmt="%d")


def make_segmentation(folder: Path) -> None:
    """A small U-Net that finds the ink of digits under noise."""
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(0)
    with np.load(ROOT / "scripts/demo_models/digits/train.npz") as data:
        digits = data["images"][:500].astype(np.float32) / 255
    ink = (digits > 0.5).astype(np.uint8)
    noisy = (digits * 0.7 + rng.normal(0, 0.2, digits.shape)).astype(np.float32)[..., np.newaxis]
    given = keras.Input((28, 28, 1), name="image")
    wide = layers.Conv2D(8, 3, padding="same", activation="relu")(given)
    deep = layers.SeparableConv2D(16, 3, padding="same", activation="relu")(layers.MaxPooling2D()(wide))
    up = layers.Conv2DTranspose(8, 3, strides=2, padding="same", activation="relu")(deep)
    joined = layers.Concatenate()([up, wide, layers.UpSampling2D(interpolation="bilinear")(deep)])
    model = keras.Model(given, layers.Conv2D(2, 1, activation="softmax", name="mask")(joined))
    train(model, noisy[:400], ink[:400], epochs=20)
    model.export(str(folder / "unet"), verbose=False)
    np.savez(folder / "images.npz", image=noisy[400:])
    np.save(folder / "masks.npy", ink[400:])


def make_attention(folder: Path) -> None:
    """A transformer block over tokens: look-up, attention, LayerNorm (whose NEG has no int8 form), GELU."""
    keras.utils.set_random_seed(1)
    given = keras.Input((16,), name="tokens", dtype="int32")
    inner = layers.Embedding(100, 32)(given)
    inner = layers.LayerNormalization()(inner + layers.MultiHeadAttention(2, 16)(inner, inner))
    inner = layers.Dense(32)(layers.Dense(64, activation="gelu")(inner))
    model = keras.Model(given, layers.Dense(3, activation="softmax", name="scores")(inner[:, 0]))
    model.export(str(folder / "attention"), verbose=False)
    np.savez(folder / "tokens.npz", tokens=np.random.default_rng(0).integers(0, 100, (120, 16)).astype(np.int32))


def make_fake_quantized(folder: Path) -> None:
    """A model as training for 8 bits leaves it."""
    rng = np.random.default_rng(0)
    first, second = (tf.Variable(rng.normal(0, 0.3, shape).astype(np.float32)) for shape in ((16, 16), (16, 3)))
    holder = tf.Module()
    holder.variables_used = [first, second]

    def call(x: Any) -> Any:
        round_to = tf.quantization.fake_quant_with_min_max_args
        inner = round_to(tf.nn.relu(round_to(x, -4, 4) @ round_to(first, -1, 1)), 0, 6)
        return {"y": round_to(inner @ round_to(second, -1, 1), -8, 8)}

    spec = tf.TensorSpec([None, 16], tf.float32, name="x")
    tf.saved_model.save(holder, str(folder / "fake"), signatures=tf.function(call).get_concrete_function(spec))
    np.savez(folder / "x.npz", x=rng.standard_normal((120, 16)).astype(np.float32))


def make_graph(folder: Path) -> None:
    """SavedModels of TensorFlow 1: two signatures over two inputs, a uint8 picture, and serialized examples."""
    one = tf.compat.v1
    describe = one.saved_model.signature_def_utils.predict_signature_def
    rng = np.random.default_rng(0)
    with tf.Graph().as_default(), one.Session() as session:
        x, side = one.placeholder(tf.float32, [None, 16]), one.placeholder(tf.float32, [None, 8])
        first = one.get_variable("first", initializer=rng.normal(0, 0.3, (16, 8)).astype(np.float32))
        second = one.get_variable("second", initializer=rng.normal(0, 0.5, (8, 3)).astype(np.float32))
        hidden = tf.nn.relu(x @ first + side)
        session.run(one.global_variables_initializer())
        builder = one.saved_model.Builder(str(folder / "two"))
        signatures = {
            "serving_default": describe({"x": x, "side": side}, {"scores": tf.nn.softmax(hidden @ second)}),
            "hidden": describe({"x": x, "side": side}, {"hidden": hidden}),
        }
        builder.add_meta_graph_and_variables(session, ["serve"], signature_def_map=signatures)
        builder.save()
    with tf.Graph().as_default(), one.Session() as session:
        picture = one.placeholder(tf.uint8, [None, 24, 24, 3])
        kernel = one.get_variable("kernel", initializer=rng.normal(0, 0.3, (3, 3, 3, 8)).astype(np.float32))
        session.run(one.global_variables_initializer())
        found = tf.nn.relu(tf.nn.conv2d(tf.cast(picture, tf.float32) / 255.0, kernel, 2, "SAME"))
        one.saved_model.simple_save(
            session, str(folder / "picture"), {"picture": picture}, {"y": tf.reduce_mean(found, [1, 2])}
        )
    with tf.Graph().as_default(), one.Session() as session:
        text = one.placeholder(tf.string, [None])
        parsed = one.parse_example(text, {"x": tf.io.FixedLenFeature([4], tf.float32)})
        one.saved_model.simple_save(session, str(folder / "examples"), {"examples": text}, {"y": parsed["x"] * 2.0})
    rng = np.random.default_rng(1)
    x, side = rng.standard_normal((100, 16)), rng.standard_normal((100, 8))
    np.savez(folder / "two.npz", x=x.astype(np.float32), side=side.astype(np.float32))
    np.savez(folder / "picture.npz", picture=rng.integers(0, 256, (60, 24, 24, 3)).astype(np.uint8))


def make_odd(folder: Path) -> None:
    """Files that cannot be taken: a layer with code in it, weights alone, cut off, and with damaged variables."""
    folder.mkdir(parents=True)
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), layers.Lambda(lambda x: x * 2), layers.Dense(2)])
    model.save(str(folder / "code.keras"))
    model = keras.Sequential([keras.Input((4,)), layers.Dense(64), layers.Dense(2)])
    model.save(str(folder / "cut.keras"))
    model.save_weights(str(folder / "only.weights.h5"))
    data = (folder / "cut.keras").read_bytes()
    (folder / "cut.keras").write_bytes(data[: len(data) // 2])
    model.export(str(folder / "damaged"), verbose=False)
    variables = folder / "damaged" / "variables" / "variables.data-00000-of-00001"
    variables.write_bytes(bytes(300) + variables.read_bytes()[300:])


def make_mtcnn(folder: Path) -> None:
    """The three networks of the face detector in the package mtcnn, with its weights; the first takes any size."""
    sys.path[:0] = [str(PACKAGES / name) for name in ("joblib", "lz4")]
    joblib: Any = importlib.import_module("joblib")
    package = PACKAGES / "mtcnn" / "mtcnn"
    for name, size in (("PNet", None), ("RNet", 24), ("ONet", 48)):
        spec = importlib.util.spec_from_file_location(name, package / "network" / f"{name.lower()}.py")
        assert spec is not None
        assert spec.loader is not None
        code: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(code)
        network = getattr(code, name)()
        network.build()
        network.set_weights(joblib.load(package / "assets" / "weights" / f"{name.lower()}.lz4"))

        def call(image: Any, network: Any = network) -> Any:
            return {f"output_{number}": value for number, value in enumerate(network(image))}

        image = tf.TensorSpec([None, size, size, 3], tf.float32, name="image")
        tf.saved_model.save(
            network, str(folder / name.lower()), signatures=tf.function(call).get_concrete_function(image)
        )


NEED_PACKAGES = ("keras2", "mtcnn")


def main() -> None:
    """Make the models that are named."""
    target, *names = sys.argv[1:]
    known = [name.removeprefix("make_") for name in globals() if name.startswith("make_")]
    for name in names or [name for name in known if name not in NEED_PACKAGES]:
        globals()[f"make_{name}"](Path(target) / name)


if __name__ == "__main__":
    main()
