"""Labels: from folders, files and the data themselves, aligned with what is held back, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec
from edge_serve_converters.calibration import Warnings, draw, fingerprint, open_source
from edge_serve_converters.plan import InputPlan, SignaturePlan
from edge_serve_converters.truth import Truth, open_truth
from tests.unit.calibration_files import (
    PHOTO,
    SIGNAL,
    VECTOR,
    WINDOW,
    csv,
    drawn,
    npz,
    numbered,
    refused,
    tfrecord,
    warned,
    wav,
)

ANIMALS = ("cat", "dog", "newt")


def photos(folder: Path, classes: dict[str, int]) -> Path:
    """Write pictures into a folder for each class; their red is ten times the number of the class."""
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for picture in range(count):
            Image.new("RGB", (8, 6), (number * 10, picture, 200)).save(folder / name / f"{picture}.png")
    return folder


def text(folder: Path, name: str, content: str) -> Path:
    """Write a file of labels."""
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


def test_the_folder_of_a_picture_is_its_class(tmp_path: Path) -> None:
    photos(tmp_path, {"cat": 20, "dog": 20, "newt": 20})
    for spec in ("folders", tmp_path):
        data = drawn(tmp_path, PHOTO, InputSpec(kind="image"), labels_for=spec)
        assert data.truth is not None
        assert (data.truth_kind, data.classes, data.truth.shape) == ("classes", ANIMALS, (12, 1))
        red = np.rint(data.held_back["photo"][:, :, 0, 0, 0] * 25.5).astype(int)
        np.testing.assert_array_equal(red, data.truth)
        assert np.bincount(data.truth.ravel()).tolist() == [4, 4, 4]


def test_labels_give_the_order_of_the_classes(tmp_path: Path) -> None:
    photos(tmp_path, {"Cat": 10, "dog": 10})
    data = drawn(tmp_path, PHOTO, InputSpec(kind="image"), labels_for="folders", labels=("newt", "dog", "cat"))
    assert data.truth is not None
    assert set(data.truth.ravel().tolist()) == {1, 2}
    assert data.classes == ("newt", "dog", "cat")


def test_folders_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    photos(tmp_path, {"cat": 4, "dgo": 4})
    spec = InputSpec(kind="image")
    assert "'dgo' is no class of --labels; did you mean 'dog'?" in refused(
        tmp_path, PHOTO, spec, labels_for="folders", labels=ANIMALS
    )
    Image.new("RGB", (8, 6)).save(tmp_path / "stray.png")
    assert "1 of 9 pictures lie in no class folder" in refused(tmp_path, PHOTO, spec, labels_for="folders")
    assert "is no folder of pictures" in refused(npz(tmp_path, x=numbered(9, 4)), VECTOR, labels_for="folders")


def test_numbered_folders_need_labels_unless_they_are_the_indices(tmp_path: Path) -> None:
    photos(tmp_path / "a", {"0": 5, "1": 5})
    assert drawn(tmp_path / "a", PHOTO, InputSpec(kind="image"), labels_for="folders").truth is not None
    photos(tmp_path / "b", {str(number): 2 for number in range(11)})
    words = refused(tmp_path / "b", PHOTO, InputSpec(kind="image"), labels_for="folders")
    assert "do not say which index each class has" in words
    assert "0, 1, 10, 2" in words


def test_every_class_is_held_back_however_rare(tmp_path: Path) -> None:
    labels = np.array([0] * 900 + [1] * 98 + [2] * 2)
    path = npz(tmp_path, x=numbered(1000, 4), label=labels)
    for seed in range(5):
        data = drawn(path, VECTOR, labels_for="data", seed=seed, samples=40)
        assert data.truth is not None
        counts = np.bincount(data.truth.ravel(), minlength=3)
        assert counts.sum() == 960  # what does not calibrate measures
        assert counts.min() == 1
        np.testing.assert_array_equal(labels[data.held_back["x"][:, 0, 0].astype(int)], data.truth.ravel())
        calibrating = labels[data.calibration["x"][:, 0, 0].astype(int)]
        assert set(calibrating.tolist()) == {0, 1, 2}
        assert not set(data.calibration["x"][:, 0, 0].tolist()) & set(data.held_back["x"][:, 0, 0].tolist())


def test_a_class_that_cannot_be_held_back_is_warned_of(tmp_path: Path) -> None:
    path = npz(tmp_path, x=numbered(50, 4), label=np.array(["cat"] * 49 + ["dog"]))
    assert "no sample of class 'dog' is held back" in warned(path, VECTOR, labels_for=path)


def test_truth_has_the_batches_of_the_data(tmp_path: Path) -> None:
    signature = SignaturePlan("s", (InputPlan("x", "float32", (4, 4), True),), {})
    labels = np.arange(80) % 3
    data = drawn(npz(tmp_path, x=numbered(80, 4), labels=labels), signature, labels_for="data")
    assert data.truth is not None
    assert data.truth.shape == data.held_back["x"].shape[:2] == (4, 4)
    np.testing.assert_array_equal(labels[data.held_back["x"][..., 0].astype(int)], data.truth)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", "cat\ndog\n" * 20),
        ("labels.csv", "Label\n" + "cat\ndog\n" * 20),
        ("labels.csv", "file;label\n" + "a.png;cat\nb.png;dog\n" * 20),
        ("labels.txt", "0\n1\n" * 20),
        ("labels.csv", "class\n" + "0\n1\n" * 20),
    ],
)
def test_labels_come_one_a_line(tmp_path: Path, name: str, content: str) -> None:
    data = drawn(npz(tmp_path, x=numbered(40, 4)), VECTOR, labels_for=text(tmp_path, name, content), labels=ANIMALS)
    assert data.truth is not None
    np.testing.assert_array_equal(data.held_back["x"][:, :, 0] % 2, data.truth)


def test_names_without_a_list_of_classes_are_sorted(tmp_path: Path) -> None:
    data = drawn(npz(tmp_path, x=numbered(40, 4)), VECTOR, labels_for=text(tmp_path, "l.txt", "worn\nfine\n" * 20))
    assert data.truth is not None
    assert data.classes == ("fine", "worn")
    np.testing.assert_array_equal(1 - data.held_back["x"][:, :, 0] % 2, data.truth)


def test_digits_that_are_names_of_classes_are_names(tmp_path: Path) -> None:
    data = drawn(
        npz(tmp_path, x=numbered(40, 4)),
        VECTOR,
        labels_for=text(tmp_path, "l.txt", "7\n1\n" * 20),
        labels=("1", "7"),
    )
    assert data.truth is not None
    np.testing.assert_array_equal(1 - data.held_back["x"][:, :, 0] % 2, data.truth)


@pytest.mark.parametrize(
    "labels",
    [np.arange(40) % 2, (np.arange(40) % 2).astype(bool), (np.arange(40) % 2).reshape(40, 1), np.arange(40) % 2 * 1.0,
     np.array([b"0", b"1"] * 20), np.array(["cat", "dog"] * 20)],
)  # fmt: skip
def test_arrays_of_labels_are_numbers_or_text(tmp_path: Path, labels: Any) -> None:
    path = npz(tmp_path, x=numbered(40, 4))
    np.save(tmp_path / "labels.npy", labels)
    np.savez(tmp_path / "labels.npz", label=labels, other=np.zeros(3))
    for name in ("labels.npy", "labels.npz"):
        data = drawn(path, VECTOR, labels_for=tmp_path / name)
        assert data.truth is not None
        np.testing.assert_array_equal(data.held_back["x"][:, :, 0] % 2, data.truth)


def test_masks_go_with_their_samples(tmp_path: Path) -> None:
    masks = np.zeros((40, 6, 8), np.uint8)
    masks[:, 2:, :] = (np.arange(40) % 3)[:, np.newaxis, np.newaxis]
    masks[:, 0, 0] = 255
    np.save(tmp_path / "masks.npy", masks)
    path = npz(tmp_path, x=numbered(40, 4))
    data = drawn(path, VECTOR, labels_for=tmp_path / "masks.npy", labels=("sky", "road", "car"))
    assert data.truth is not None
    assert (data.truth_kind, data.truth.shape) == ("mask", (8, 1, 6, 8))
    np.testing.assert_array_equal(data.held_back["x"][:, 0, 0] % 3, data.truth[:, 0, 5, 5])
    masks[3, 3, 3] = 3
    np.save(tmp_path / "masks.npy", masks)
    assert "holds the class 3 with index 3; --labels names 3 classes" in refused(
        path, VECTOR, labels_for=tmp_path / "masks.npy", labels=("sky", "road", "car")
    )


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(39), "39 labels for 40 samples"),
        (np.zeros(0), "is empty"),
        (np.full(40, -1), "holds the label -1; classes are counted from 0"),
        (np.full(40, 0.5), "no whole numbers"),
        (np.full(40, np.nan), "no whole numbers"),
        (np.eye(40), "argmax(axis=1)"),
        (np.array(["cat", "bat"] * 20), "'bat' is no class of --labels; did you mean 'cat'?"),
        (np.arange(40) % 3 + 1, "they seem to be counted from 1"),
        (np.array(["1", "5"] * 20), "index 5; --labels names 3 classes, 0 to 2"),
        (np.full(40, 10**9), "holds the label 1000000000"),
        (np.zeros(40, complex), "has dtype complex128"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path: Path, labels: Any, words: str) -> None:
    np.save(tmp_path / "labels.npy", labels)
    path = npz(tmp_path, x=numbered(40, 4))
    assert words in refused(path, VECTOR, labels_for=tmp_path / "labels.npy", labels=ANIMALS)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, "no such file"),
        ("labels.json", "[]", "labels of this kind are not read"),
        ("labels.txt", "", "is empty"),
        ("labels.csv", "a,b\n1,2\n", "has 2 columns, none is named 'label'"),
        ("labels.csv", "a,label\n1,2\n3\n", "row 3: has 1 cells"),
        ("labels.txt", "cat\n" * 9, "9 labels for 40 samples; give one for each sample"),
    ],
)
def test_files_that_are_no_labels_are_refused(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    path = tmp_path / name if content is None else text(tmp_path, name, content)
    assert words in refused(npz(tmp_path, x=numbered(40, 4)), VECTOR, labels_for=path)


def test_data_without_labels_have_none_to_measure_with(tmp_path: Path) -> None:
    path = npz(tmp_path, x=numbered(40, 4))
    assert "holds no labels; name them 'label' in it" in refused(path, VECTOR, labels_for="data")
    assert drawn(path, VECTOR).truth is None


def test_an_input_called_label_is_no_label(tmp_path: Path) -> None:
    signature = SignaturePlan("s", (*VECTOR.inputs, InputPlan("label", "int32", (1,), True)), {})
    path = npz(tmp_path, x=numbered(40, 4), label=np.arange(40))
    assert drawn(path, signature).calibration["label"].shape == (32, 1)
    assert "'label' is an input of the model" in refused(path, signature, labels_for="data")


def test_records_hold_labels_of_their_own(tmp_path: Path) -> None:
    for values in ((0, 1), ("cat", "dog")):
        records: list[dict[str, Any]] = [{"x": np.array([n, 0.5, 1, 2.0]), "label": values[n % 2]} for n in range(40)]
        data = drawn(tfrecord(tmp_path / "a.tfrecord", records), VECTOR, labels_for="data", labels=ANIMALS)
        assert data.truth is not None
        np.testing.assert_array_equal(data.held_back["x"][:, :, 0] % 2, data.truth)
    records[5]["label"] = 3.5
    assert "record 5, feature 'label': 3.5 is no class" in refused(
        tfrecord(tmp_path / "a.tfrecord", records), VECTOR, labels_for="data"
    )
    del records[5]["label"]
    assert "record 5, feature 'label': holds 0 values" in refused(
        tfrecord(tmp_path / "a.tfrecord", records), VECTOR, labels_for="data"
    )


def test_a_window_has_the_label_of_most_of_its_rows(tmp_path: Path) -> None:
    # Windows of five rows: the number of rows with label 1 at their end is 0, 1, 2, 3, 4.
    lines = [f"{row},0.5,{int(row % 5 >= 5 - row // 5 % 5)}" for row in range(200)]
    data = drawn(csv(tmp_path, "a,b,label\n" + "\n".join(lines)), WINDOW, InputSpec(kind="window"), labels_for="data")
    assert data.truth is not None
    assert data.held_back["w"].shape[1:] == (1, 5, 2)
    ones = data.held_back["w"][:, 0, 0, 0] // 5 % 5
    np.testing.assert_array_equal(data.truth.ravel(), ones >= 3)


def test_of_equally_many_rows_the_last_decide(tmp_path: Path) -> None:
    signature = SignaturePlan("s", (InputPlan("w", "float32", (1, 4, 2), True),), {})
    table = csv(tmp_path, "".join(f"{row},1\n" for row in range(160)))
    labels = text(tmp_path, "l.txt", "dog\ndog\ncat\ncat\n" * 20 + "newt\ncat\ndog\nnewt\n" * 20)
    data = drawn(table, signature, InputSpec(kind="window"), labels_for=labels)
    assert data.truth is not None
    expected = np.where(data.held_back["w"][:, 0, 0, 0] < 80, 0, 2)
    np.testing.assert_array_equal(data.truth.ravel(), expected)


def test_overlapping_windows_are_held_back_from_each_class_and_share_no_row(tmp_path: Path) -> None:
    table = csv(tmp_path, "".join(f"{row},1\n" for row in range(400)))
    labels = text(tmp_path, "l.txt", "idle\n" * 200 + "running\n" * 200)
    data = drawn(table, WINDOW, InputSpec(kind="window", hop=1), labels_for=labels, samples=1000)
    calibrating, held = (set(part["w"][:, 0, :, 0].ravel().tolist()) for part in (data.calibration, data.held_back))
    assert not calibrating & held
    assert data.truth is not None
    counts = np.bincount(data.truth.ravel())
    assert counts.min() > 30
    assert any(row < 200 for row in held)


def test_recordings_are_held_back_whole_from_each_class(tmp_path: Path) -> None:
    for kind, level in (("calm", 0.0), ("loud", 0.5)):
        for number in range(6):
            wav(tmp_path / kind / f"{number}.wav", level + number / 20 + np.arange(300) / 1e5, "float32")
    wav(tmp_path / "rare" / "0.wav", 0.9 + np.arange(300) / 1e5, "float32")
    warnings = Warnings()
    data = drawn(tmp_path, SIGNAL, InputSpec(kind="window", hop=10), labels_for="folders", warnings=warnings)
    assert any("no sample of class 'rare' is held back" in warning for warning in warnings.texts)
    files = [set(np.floor(part["s"][:, 0, 0] * 20 + 1e-3).tolist()) for part in (data.calibration, data.held_back)]
    assert not files[0] & files[1]
    assert data.truth is not None
    np.testing.assert_array_equal(data.truth.ravel(), data.held_back["s"][:, 0, 0] >= 0.499)
    assert set(data.truth.ravel().tolist()) == {0, 1}


def test_a_table_may_hold_its_labels_itself(tmp_path: Path) -> None:
    table = csv(tmp_path, "a,b,c,d,label\n" + "".join(f"{n},1,2,3,{ANIMALS[n % 3]}\n" for n in range(60)))
    data = drawn(table, VECTOR, labels_for=table)
    assert data.truth is not None
    np.testing.assert_array_equal(data.held_back["x"][:, :, 0] % 3, data.truth)


def test_masks_are_not_for_windows(tmp_path: Path) -> None:
    table = csv(tmp_path, "".join(f"{row},1\n" for row in range(100)))
    np.save(tmp_path / "masks.npy", np.zeros((100, 4, 4), np.uint8))
    assert "masks are for pictures" in refused(
        table, WINDOW, InputSpec(kind="window"), labels_for=tmp_path / "masks.npy"
    )
    wav(tmp_path / "sound" / "a.wav", np.arange(500) / 1000)
    np.save(tmp_path / "masks.npy", np.zeros((1, 4, 4), np.uint8))
    assert "masks are for pictures" in refused(tmp_path / "sound", SIGNAL, labels_for=tmp_path / "masks.npy")


def test_labels_beyond_the_models_classes_are_refused() -> None:
    truth = Truth("classes", np.array([0, 4]), None, "labels.npy")
    truth.check_classes(5, "output 'scores' has")
    with pytest.raises(UsageError, match=r"class 4 with index 4; output 'scores' has 4 classes, 0 to 3"):
        truth.check_classes(4, "output 'scores' has")


def test_labels_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = npz(tmp_path, x=numbered(40, 4))
    prints = set()
    for change in (None, 0, 1):
        source = open_source(path, InputSpec())
        truth = None
        if change is not None:
            truth = open_truth(text(tmp_path, "l.txt", f"{change}\n" + "0\n" * 39), source, None)
        draw(source, VECTOR, samples=100, seed=0, warnings=Warnings(), truth=truth)
        prints.add(fingerprint(source, truth))
    assert len(prints) == 3
