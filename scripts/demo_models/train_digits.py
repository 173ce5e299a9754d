"""Train the digits demo model: a small 2-D CNN that reads a handwritten digit.

Run ``prepare_data.py`` first. The result is ``digits/saved_model`` with the signature ``serving_default``:
input ``image`` float32 [batch, 28, 28, 1] in 0..1 (bright ink on black), output ``probabilities`` float32
[batch, 10]. With ``--holdout`` a tenth of the training images is held back and scored instead, and nothing
is written: that is how settings are chosen without touching the test set.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from demo_common import (
    DIGITS_DIR,
    DIGITS_INPUT,
    DIGITS_SIDE,
    DIGITS_TEST,
    Floats,
    accuracy,
    as_model_images,
    export_saved_model,
    load_npz,
    load_tensorflow,
    report,
    train,
)

SEED = 7
EPOCHS = 20
BATCH = 32
PEAK_RATE = 3e-3
CLASSES = 10
LARGEST_SHIFT = 2


def augment(images: Floats, rng: np.random.Generator) -> Floats:
    """Shift each image by up to LARGEST_SHIFT pixels in each direction, filling with black."""
    edge = LARGEST_SHIFT
    padded = np.pad(images, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    moves = rng.integers(0, 2 * edge + 1, (len(images), 2))
    return np.stack(
        [
            item[down : down + DIGITS_SIDE, right : right + DIGITS_SIDE]
            for item, (down, right) in zip(padded, moves, strict=True)
        ]
    )


def build_model(tf: Any) -> Any:
    """Build the network: four convolutions with batch normalisation and a global average."""
    layers = tf.keras.layers
    inputs = tf.keras.Input((DIGITS_SIDE, DIGITS_SIDE, 1), name=DIGITS_INPUT)
    x = inputs
    for filters, shrink in ((16, True), (32, True), (48, False), (64, False)):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(x)
        if shrink:
            x = layers.MaxPooling2D(2)(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(0.2)(x)
    return tf.keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))


def main() -> None:
    """Train, export and measure the digits model."""
    parser = argparse.ArgumentParser(description="Train the digits demo model.")
    parser.add_argument("--holdout", action="store_true", help="score held-back training images; write nothing")
    holdout = parser.parse_args().holdout
    tf = load_tensorflow(SEED)
    data = load_npz(DIGITS_DIR / "train.npz")
    images, labels = as_model_images(data["images"]), data["labels"]
    held = np.arange(len(images)) % 10 == 9 if holdout else np.zeros(len(images), dtype=np.bool_)

    model = build_model(tf)
    train(tf, model, images[~held], labels[~held], augment, epochs=EPOCHS, batch=BATCH, peak_rate=PEAK_RATE, seed=SEED)
    print(f"{model.count_params()} parameters")
    if holdout:
        score = accuracy(model.predict(images[held], verbose=0), labels[held])
        print(f"holdout accuracy {score:.4f} on {int(held.sum())} images")
        return
    export_saved_model(tf, model, DIGITS_DIR / "saved_model", DIGITS_INPUT)
    test = load_npz(DIGITS_TEST)
    report(tf, DIGITS_DIR, DIGITS_INPUT, as_model_images(test["images"]), test["labels"])


if __name__ == "__main__":
    main()
