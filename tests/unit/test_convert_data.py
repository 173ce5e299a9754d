"""Calibration data: what is read, what is refused with which words, and that no sample both calibrates and measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec
from edge_serve_converters.calibration import Drawn, Warnings, draw, open_source
from edge_serve_converters.plan import InputPlan, SignaturePlan

VECTOR = SignaturePlan("serving_default", (InputPlan("x", "float32", (1, 4), True),), {"y": "float32"})
WINDOW = SignaturePlan("serving_default", (InputPlan("w", "float32", (1, 5, 2), True),), {"y": "float32"})
PHOTO = SignaturePlan("serving_default", (InputPlan("photo", "float32", (1, 6, 8, 3), True),), {"y": "float32"})
PAIR = SignaturePlan(
    "serving_default",
    (InputPlan("index", "int32", (1,), True), InputPlan("x", "float32", (1, 4), True)),
    {"y": "float32"},
)


def numbered(count: int, *shape: int) -> Any:
    """Samples of which each is recognized by its first value, its number."""
    array = np.random.default_rng(0).random((count, *shape), np.float32)
    array.reshape(count, -1)[:, 0] = np.arange(count)
    return array


def drawn(path: Path, signature: SignaturePlan, spec: InputSpec | None = None, **options: Any) -> Drawn:
    """Draw from a file with the defaults of the command line."""
    settings = {"samples": 200, "seed": 0, "warnings": Warnings(), **options}
    return draw(open_source(path, spec or InputSpec()), signature, **settings)


def refused(path: Path, signature: SignaturePlan, spec: InputSpec | None = None) -> str:
    """Draw and give the words of the refusal."""
    with pytest.raises(UsageError) as caught:
        drawn(path, signature, spec)
    return str(caught.value)


def npz(folder: Path, **arrays: Any) -> Path:
    """Write arrays to a file."""
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def csv(folder: Path, text: str) -> Path:
    """Write a table to a file."""
    path = folder / "data.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_fifth_is_held_back_and_calibrates_nothing(tmp_path: Path) -> None:
    data = drawn(npz(tmp_path, x=numbered(100, 4)), VECTOR)
    calibrating, held = data.calibration["x"], data.held_back["x"]
    assert calibrating.shape == (80, 1, 4)
    assert held.shape == (20, 1, 4)
    numbers = {float(value) for value in (*calibrating[:, 0, 0], *held[:, 0, 0])}
    assert numbers == set(range(100))


def test_few_samples_are_split_in_halves_and_one_is_not_enough(tmp_path: Path) -> None:
    warnings = Warnings()
    data = drawn(npz(tmp_path, x=numbered(6, 4)), VECTOR, warnings=warnings)
    assert (len(data.calibration["x"]), len(data.held_back["x"])) == (3, 3)
    assert "only 3 calibration samples" in warnings.texts[0]
    assert "at least 2 are needed" in refused(npz(tmp_path, x=numbered(1, 4)), VECTOR)


def test_the_seed_decides_which_samples_are_drawn(tmp_path: Path) -> None:
    path = npz(tmp_path, x=numbered(100, 4))
    first, again, other = (drawn(path, VECTOR, samples=10, seed=seed).calibration["x"] for seed in (1, 1, 2))
    assert first.shape == (10, 1, 4)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_batches_are_made_of_different_samples(tmp_path: Path) -> None:
    signature = SignaturePlan("s", (InputPlan("x", "float32", (4, 4), True),), {})
    data = drawn(npz(tmp_path, x=numbered(40, 4)), signature)
    assert data.calibration["x"].shape == (6, 4, 4)
    assert data.held_back["x"].shape == (4, 4, 4)
    assert len(set(data.calibration["x"][..., 0].ravel().tolist())) == 24


def test_several_inputs_come_by_name_and_stay_together(tmp_path: Path) -> None:
    values = numbered(50, 4)
    data = drawn(npz(tmp_path, index=np.arange(50), x=values), PAIR)
    assert data.calibration["index"].dtype == np.int32
    np.testing.assert_array_equal(data.calibration["index"].ravel(), data.calibration["x"][:, 0, 0])


def test_arrays_may_be_named_after_signature_and_input(tmp_path: Path) -> None:
    data = drawn(npz(tmp_path, **{"serving_default/x": numbered(10, 4), "other/x": numbered(10, 9)}), VECTOR)
    assert data.calibration["x"].shape[1:] == (1, 4)


def test_one_npy_file_serves_one_input_only(tmp_path: Path) -> None:
    path = tmp_path / "data.npy"
    np.save(path, numbered(10, 1, 4))
    assert drawn(path, VECTOR).calibration["x"].shape == (6, 1, 4)
    assert "several inputs (index, x)" in refused(path, PAIR)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "holds no arrays"),
        ({"x": np.zeros((0, 4))}, "is empty"),
        ({"x": np.full((9, 4), np.nan)}, "9 of 9 samples hold NaN or infinite values"),
        ({"x": np.array([[1, 2, 3, 4], [1, 2, np.inf, 4]])}, "the first is sample 1"),
        ({"x": np.full((9, 4), 1e300)}, "out of its range"),
        ({"x": np.zeros((9, 5))}, "has shape [9, 5]; input 'x' takes [samples, 4]"),
        ({"a": np.zeros((9, 4)), "b": np.zeros((9, 4))}, "has the arrays a, b, none is named 'x'"),
        ({"x": np.array(["one", "two"])}, "calibration data are numbers"),
    ],
)
def test_data_that_would_spoil_a_model_is_refused(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    assert words in refused(npz(tmp_path, **arrays), VECTOR)


def test_inputs_with_different_numbers_of_samples_are_refused(tmp_path: Path) -> None:
    assert "index: 5, x: 6" in refused(npz(tmp_path, index=np.zeros(5), x=np.zeros((6, 4))), PAIR)


def test_fractions_do_not_become_indices(tmp_path: Path) -> None:
    assert "have fractions" in refused(npz(tmp_path, index=np.full(9, 0.5), x=np.zeros((9, 4))), PAIR)


@pytest.mark.parametrize("name", ["missing.npz", "data.txt", "data.npz", "data.npy"])
def test_files_that_are_no_data_are_refused(tmp_path: Path, name: str) -> None:
    if name != "missing.npz":
        (tmp_path / name).write_bytes(b"this is text")
    assert name in refused(tmp_path / name, VECTOR)


def test_half_an_archive_is_refused(tmp_path: Path) -> None:
    path = npz(tmp_path, x=numbered(10, 4))
    path.write_bytes(path.read_bytes()[:100])
    assert "no readable .npz file" in refused(path, VECTOR)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "data.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "no readable .npy file" in refused(path, VECTOR)


@pytest.mark.parametrize(
    ("array", "words"),
    [(np.ones((30, 4)), "are constant (1)"), (np.tile(np.arange(4.0), (30, 1)), "are equal")],
)
def test_constant_data_is_warned_of(tmp_path: Path, array: Any, words: str) -> None:
    warnings = Warnings()
    drawn(npz(tmp_path, x=array), VECTOR, warnings=warnings)
    assert words in warnings.texts[0]


def test_a_table_with_a_header_gives_one_sample_a_row(tmp_path: Path) -> None:
    rows = "\n".join(f"t{n};{n};{n + 0.5};{n};{n}" for n in range(30))
    path = csv(tmp_path, f"time;a;b;c;d\n{rows}\n")
    data = drawn(path, VECTOR, InputSpec(channels=("a", "b", "c", "d")))
    first = data.calibration["x"][0, 0]
    np.testing.assert_array_equal(first, [first[0], first[0] + 0.5, first[0], first[0]])


def test_a_time_series_is_cut_into_windows_and_normalized(tmp_path: Path) -> None:
    path = csv(tmp_path, "\n".join(f"{n},{n + 100}" for n in range(100)))
    data = drawn(path, WINDOW, InputSpec(kind="window", mean=(0.0, 100.0), std=(2.0,)))
    assert data.calibration["w"].shape == (16, 1, 5, 2)
    window = data.calibration["w"][0, 0]
    assert window[0, 0] * 2 % 5 == 0
    np.testing.assert_array_equal(window[:, 0], window[0, 0] + np.arange(5) / 2)
    np.testing.assert_array_equal(window[:, 0], window[:, 1])


def test_overlapping_windows_that_are_held_back_share_no_row_with_the_others(tmp_path: Path) -> None:
    path = csv(tmp_path, "\n".join(f"{n},0" for n in range(200)))
    data = drawn(path, WINDOW, InputSpec(kind="window", hop=1))
    calibrating, held = (set(part["w"][:, 0, :, 0].ravel().tolist()) for part in (data.calibration, data.held_back))
    assert len(data.held_back["w"]) > 20
    assert not calibrating & held


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("a,b,c,d\n", "has a header and no rows"),
        ("1,2,3\n4,5,6\n", "has 3 columns of numbers; input 'x' of shape [1, 4] takes 4"),
        ("1,2,3,4\n1,2,3\n", "line 2: has 3 cells"),
        ("a,b,c,d\n1,2,3,4\n1,2,oops,4\n", "line 3, column 'c': 'oops' is no finite number"),
        ("1,2,3,4\n1,2,nan,4\n", "line 2, column '3': 'nan' is no finite number"),
        ("1,2,3,4\n1,2,1e300,4\n", "'1e300' is no finite number"),
    ],
)
def test_tables_that_are_none_are_refused_with_line_and_column(tmp_path: Path, text: str, words: str) -> None:
    assert words in refused(csv(tmp_path, text), VECTOR)


def test_a_series_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    assert "has 4 rows; one window of input 'w' takes 5" in refused(csv(tmp_path, "1,2\n" * 4), WINDOW)


def test_unknown_columns_are_refused(tmp_path: Path) -> None:
    assert "has no column 'z'; it has: a, b" in refused(
        csv(tmp_path, "a,b\n1,2\n"), WINDOW, InputSpec(channels=("a", "z"))
    )


def test_pictures_are_found_in_folders_and_processed_as_on_the_device(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (number, 100, 200)).save(folder / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    data = drawn(tmp_path, PHOTO, InputSpec(kind="image", mean=(0.5,), std=(0.5,)))
    photo = data.calibration["photo"][0, 0]
    assert photo.shape == (6, 8, 3)
    np.testing.assert_allclose(photo[0, 0, 1:], (np.array([100, 200]) / 255 - 0.5) / 0.5, atol=1e-6)


def test_folders_without_pictures_and_damaged_pictures_are_refused(tmp_path: Path) -> None:
    assert "holds no pictures" in refused(tmp_path, PHOTO)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 this is no picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "whole.png")
    assert "broken.jpg" in refused(tmp_path, PHOTO)


def test_equal_data_has_an_equal_fingerprint(tmp_path: Path) -> None:
    array = numbered(10, 4)
    fingerprints = []
    for compress in (np.savez, np.savez_compressed):
        compress(tmp_path / "data.npz", x=array)
        fingerprints.append(open_source(tmp_path / "data.npz", InputSpec()).fingerprint())
    assert fingerprints[0] == fingerprints[1]
    np.savez(tmp_path / "data.npz", x=array + 1)
    assert open_source(tmp_path / "data.npz", InputSpec()).fingerprint() != fingerprints[0]
