"""Calibration data: what is read, what is refused with which words, and that no sample both calibrates and measures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec
from edge_serve_converters.calibration import Warnings, open_source
from edge_serve_converters.distribution import statistics
from edge_serve_converters.plan import InputPlan, SignaturePlan
from tests.unit.calibration_files import PAIR, PHOTO, VECTOR, WINDOW, csv, drawn, npz, numbered, refused, warned


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


def test_damaged_archives_end_in_a_refusal_or_in_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "data.npz", x=numbered(20, 4), label=np.arange(20))
    whole = (tmp_path / "data.npz").read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] = rng.integers(0, 256)
        (tmp_path / "data.npz").write_bytes(damaged)
        try:
            drawn(tmp_path / "data.npz", VECTOR, labels_for="data")
        except UsageError:
            continue


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
        ("a,b,c,d,state\n1,2,3,4,idle\n", "'idle' is text; choose the columns that are the samples"),
        ("a,b,c,d,state\n1,2,3,4,idle\n", "by their names in the header: --channels a,b,c,d"),
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


def test_pictures_of_other_formats_are_counted_and_not_silently_left_out(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / ".thumbnails").mkdir()
    for number in range(30):
        Image.new("RGB", (8, 6), (number, 100, 200)).save(tmp_path / f"{number}.png")
    assert "other picture" not in warned(tmp_path, PHOTO, InputSpec(kind="image"))
    for name in ("a.BMP", "b.bmp", "more/c.webp", ".thumbnails/d.bmp", ".e.gif"):
        (tmp_path / name).write_bytes(b"")
    told = warned(tmp_path, PHOTO, InputSpec(kind="image"))
    assert "3 other picture files were left out (2 .bmp, 1 .webp); only JPEG and PNG are read" in told


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


def normal(count: int, *shape: int) -> Any:
    """Samples that nothing is wrong with."""
    return np.random.default_rng(1).standard_normal((count, *shape), np.float32)


def test_good_data_is_not_warned_of(tmp_path: Path) -> None:
    assert warned(npz(tmp_path, x=normal(100, 4)), VECTOR) == ""
    assert warned(npz(tmp_path, w=normal(100, 5, 2)), WINDOW, InputSpec(kind="window", mean=(3.0,), std=(2.0,))) == ""
    photos = np.random.default_rng(1).random((100, 6, 8, 3), np.float32)
    assert warned(npz(tmp_path, photo=photos), PHOTO, InputSpec(kind="image")) == ""


def test_a_channel_that_never_changes_is_warned_of_by_name(tmp_path: Path) -> None:
    windows = normal(50, 5, 2)
    windows[..., 1] = 9.81
    spec = InputSpec(kind="window", channels=("ax", "az"))
    assert "input 'w' are constant in channel 'az' (9.81)" in warned(npz(tmp_path, w=windows), WINDOW, spec)
    rows = normal(50, 4)
    rows[:, 2] = 0
    assert "constant in channel 2 of 4 (0)" in warned(npz(tmp_path, x=rows), VECTOR)


def test_one_wild_value_that_would_ruin_int8_is_warned_of(tmp_path: Path) -> None:
    rows = normal(500, 4)
    rows[:, 1] *= np.where(np.arange(500) % 2, 1, 1000).astype(np.float32)
    assert "almost no steps" not in warned(npz(tmp_path, x=rows), VECTOR), "half of the samples are no outliers"
    rows = normal(500, 4)
    rows[123, 3] = -1e6
    for seed in range(8):  # it calibrates, is held back or is not drawn
        text = warned(npz(tmp_path, x=rows), VECTOR, seed=seed)
        if "almost no steps" in text:
            assert "input 'x' hold -1e+06 (at [3] of a sample)" in text
            break
    else:
        pytest.fail("no seed drew the outlier")
    held = [warned(npz(tmp_path, x=rows), VECTOR, seed=seed, samples=400) for seed in range(20)]
    assert any("held-back data for input 'x' go from -1e+06" in text for text in held)


def test_values_that_are_mostly_zero_have_no_outliers_for_that(tmp_path: Path) -> None:
    rows = np.zeros((2000, 40), np.float32)
    rows[::50, 7] = np.arange(40) % 7 + 1
    signature = SignaturePlan("s", (InputPlan("x", "float32", (1, 40), True),), {})
    assert "almost no steps" not in warned(npz(tmp_path, x=rows), signature, samples=1600)


def test_samples_that_are_in_both_parts_are_counted(tmp_path: Path) -> None:
    text = warned(npz(tmp_path, x=np.tile(normal(50, 4), (2, 1))), VECTOR, samples=80)
    assert "held-back samples are equal to samples that calibrate" in text
    assert int(text.split(" of 20 held-back")[0].split()[-1]) > 10


@pytest.mark.parametrize(
    ("low", "high", "spec", "words"),
    [
        (0, 255, InputSpec(), "pixels become 0 to 1 on the device: they are scaled otherwise"),
        (0, 255, InputSpec(mean=(0.5,), std=(0.5,)), "pixels become -1 to 1 on the device"),
        (0, 1, InputSpec(scale=1.0), "fill next to nothing of it"),
        (-1, 1, InputSpec(scale=1.0), "(for -1..1: --mean 0.5 --std 0.5)"),
        (0, 255, InputSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)), "pixels become -2.118 to 2.64"),
    ],
)
def test_pictures_as_numbers_in_another_scale_are_refused(
    tmp_path: Path, low: float, high: float, spec: InputSpec, words: str
) -> None:
    photos = np.random.default_rng(0).uniform(low, high, (40, 6, 8, 3)).astype(np.float32)
    text = refused(npz(tmp_path, photo=photos), PHOTO, dataclasses.replace(spec, kind="image"))
    assert "input 'photo'" in text
    assert words in text


def test_pictures_that_may_be_scaled_otherwise_are_warned_of(tmp_path: Path) -> None:
    photos = np.random.default_rng(0).random((40, 6, 8, 3), np.float32)
    spec = InputSpec(kind="image", mean=(0.5,), std=(0.5,))
    assert "none is below 0: are they 0..1?" in warned(npz(tmp_path, photo=photos), PHOTO, spec)
    assert "are they scaled otherwise?" in warned(npz(tmp_path, photo=photos * 1.5), PHOTO, InputSpec(kind="image"))


def test_pixels_that_are_given_as_a_plain_tensor_are_warned_of(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).uniform(0, 255, (60, 12, 16, 3)).astype(np.float32)
    signature = SignaturePlan("serving_default", (InputPlan("x", "float32", (1, 12, 16, 3), True),), {"y": "float32"})
    for factor, said in ((1.0, True), (1 / 255, False)):
        warnings = Warnings()
        drawn(npz(tmp_path, x=pixels * np.float32(factor)), signature, spec=InputSpec(kind="tensor"), warnings=warnings)
        assert any("look like pixels" in text for text in warnings.texts) == said


def test_windows_that_are_not_normalized_are_warned_of(tmp_path: Path) -> None:
    spec = InputSpec(kind="window", mean=(0.0, 1000.0), std=(1.0, 50.0))
    raw = normal(50, 5, 2) * np.array([1, 50], np.float32) + np.array([0, 1000], np.float32)
    text = warned(npz(tmp_path, w=raw), WINDOW, spec)
    assert "channel 1 of 2 mean" in text
    assert "channel 0" not in text
    assert "normalized already" in text
    table = csv(tmp_path, "\n".join(f"{a},{b}" for a, b in raw.reshape(-1, 2)))
    assert warned(table, WINDOW, spec) == ""
    wrong = InputSpec(kind="window", mean=(0.0, 0.0), std=(1.0, 1.0))
    assert "do --mean and --std belong to these data?" in warned(table, WINDOW, wrong)


def test_a_std_of_zero_is_refused(tmp_path: Path) -> None:
    table = csv(tmp_path, "1,2\n" * 50)
    assert "--std holds a zero" in refused(table, WINDOW, InputSpec(kind="window", std=(1.0, 0.0)))


def test_a_folder_of_two_kinds_of_data_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    assert "holds 1 pictures and 1 WAV files; calibration data are of one kind" in refused(tmp_path, PHOTO)


def test_hidden_files_are_no_data(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"resource fork")
    assert open_source(tmp_path, InputSpec()).units == 1


def test_statistics_describe_what_calibrates(tmp_path: Path) -> None:
    rows = np.arange(4000, dtype=np.float32).reshape(1000, 4)
    figures = statistics(drawn(npz(tmp_path, x=rows), VECTOR, samples=800))["x"]
    assert (len(figures["histogram"]["edges"]), sum(figures["histogram"]["counts"])) == (33, 3200)
    assert figures["min"] < 50
    assert figures["max"] > 3950
    assert figures["mean"] == pytest.approx(2000, rel=0.05)
    assert figures["std"] == pytest.approx(4000 / 12**0.5, rel=0.05)
    assert (figures["p01"], figures["p99"]) == (pytest.approx(40, abs=20), pytest.approx(3960, abs=20))


@pytest.mark.parametrize("value", [0.0, 7.0, -1e30, 3e38])
def test_statistics_of_constant_data_are_finite(tmp_path: Path, value: float) -> None:
    figures = statistics(drawn(npz(tmp_path, x=np.full((30, 4), value, np.float32)), VECTOR))["x"]
    assert sum(figures["histogram"]["counts"]) == 96
    assert figures["std"] == pytest.approx(0, abs=abs(value) * 1e-6)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
