"""Train the motion demo model: a small 1-D CNN that names the activity in a 5 s wrist-sensor window.

Run ``prepare_data.py`` first. The result is ``motion/saved_model`` with the signature ``serving_default``:
input ``window`` float32 [batch, 50, 6] in raw sensor units (the model normalises inside), output
``probabilities`` float32 [batch, 4]. With ``--holdout`` a quarter of the training recordings is held back
and scored instead, and nothing is written: that is how settings are chosen without touching the test set.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from demo_common import (
    MOTION_CHANNELS,
    MOTION_DIR,
    MOTION_INPUT,
    MOTION_TEST,
    MOTION_WINDOW,
    Floats,
    accuracy,
    cut_windows,
    export_saved_model,
    load_npz,
    load_tensorflow,
    report,
    train,
)

SEED = 7
EPOCHS = 60
BATCH = 16
PEAK_RATE = 3e-3
CLASSES = 4


def augment(windows: Floats, rng: np.random.Generator) -> Floats:
    """Scale each channel of each window by up to a tenth or so and add noise of 5 % of its spread."""
    per_channel = (len(windows), 1, windows.shape[2])
    scale = rng.normal(1.0, 0.1, per_channel)
    noise = rng.standard_normal(windows.shape) * windows.std(axis=1, keepdims=True) * 0.05
    return np.asarray(windows * scale + noise, dtype=np.float32)


def build_model(tf: Any, windows: Floats) -> Any:
    """Build the network; its normalisation constants come from the training windows.

    The 1-D convolutions are written as 2-D ones over [50, 1, channels]: that is what a converter makes of them
    anyway, and so the shape is expanded once instead of around every layer.
    """
    layers = tf.keras.layers
    channels = len(MOTION_CHANNELS)
    inputs = tf.keras.Input((MOTION_WINDOW, channels), name=MOTION_INPUT)
    x = layers.Normalization(mean=windows.mean(axis=(0, 1)), variance=windows.var(axis=(0, 1)))(inputs)
    x = tf.keras.ops.expand_dims(x, axis=2)
    for filters, kernel in ((16, 5), (24, 5), (32, 3)):
        x = layers.Conv2D(filters, (kernel, 1), padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(x)
        if filters != 32:
            x = layers.MaxPooling2D((2, 1))(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(0.2)(x)
    return tf.keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))


def main() -> None:
    """Train, export and measure the motion model."""
    parser = argparse.ArgumentParser(description="Train the motion demo model.")
    parser.add_argument("--holdout", action="store_true", help="score held-back training recordings; write nothing")
    holdout = parser.parse_args().holdout
    tf = load_tensorflow(SEED)
    data = load_npz(MOTION_DIR / "train.npz")
    held = np.arange(len(data["series"])) % 4 == 3 if holdout else np.zeros(len(data["series"]), dtype=np.bool_)
    windows, labels = cut_windows(data["series"][~held], data["labels"][~held])

    model = build_model(tf, windows)
    train(tf, model, windows, labels, augment, epochs=EPOCHS, batch=BATCH, peak_rate=PEAK_RATE, seed=SEED)
    print(f"{model.count_params()} parameters")
    if holdout:
        held_windows, held_labels = cut_windows(data["series"][held], data["labels"][held])
        score = accuracy(model.predict(held_windows, verbose=0), held_labels)
        print(f"holdout accuracy {score:.4f} on {len(held_labels)} windows of {int(held.sum())} recordings")
        return
    export_saved_model(tf, model, MOTION_DIR / "saved_model", MOTION_INPUT)
    test = load_npz(MOTION_TEST)
    report(tf, MOTION_DIR, MOTION_INPUT, *cut_windows(test["series"], test["labels"]))


if __name__ == "__main__":
    main()
