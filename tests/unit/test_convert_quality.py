"""The figures of a variant, against values worked out by hand, and what is read from .tflite files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve_converters import quality
from edge_serve_converters.flatbuffer import read_contents
from edge_serve_converters.plan import InputPlan, SignaturePlan
from edge_serve_converters.probes import extremes_of, guessed_extremes, make_probes, random_inputs

MODELS = Path(__file__).parents[1] / "data" / "models"


def one(*values: Any) -> dict[str, Any]:
    """One output with one run for each argument."""
    return {"y": np.array(values, np.float32)[:, np.newaxis]}


def test_the_figures_are_those_of_their_definitions() -> None:
    figures = quality.compare(one([3.0, 4.0], [1.0, 0.0]), one([3.0, 4.5], [0.0, 1.0]))["y"]
    assert figures == {
        "max_error": 1.0,
        "mean_error": 0.625,
        "sqnr_db": pytest.approx(10 * np.log10(26 / 2.25), rel=1e-5),
        "variation_db": pytest.approx(10 * np.log10((2 + 8) / 2.25), rel=1e-5),
        "cosine": 0.0,
        "mean_cosine": pytest.approx(27 / (5 * np.hypot(3, 4.5)) / 2, rel=1e-5),
        "range": [0.0, 4.0],
        "values": 2,
    }


def test_equal_outputs_have_a_finite_ratio() -> None:
    figures = quality.compare(one([1.0, 2.0], [3.0, 5.0]), one([1.0, 2.0], [3.0, 5.0]))["y"]
    assert (figures["sqnr_db"], figures["variation_db"]) == (quality.MAX_DB, quality.MAX_DB)
    assert quality.compare(one([0.0]), one([1.0]))["y"]["sqnr_db"] == -quality.MAX_DB


def test_a_constant_answer_around_a_large_offset_is_seen_through() -> None:
    wanted = one(*([100 + np.sin(number)] * 3 for number in range(50)))
    constant = one(*([100.0] * 3 for _ in range(50)))
    figures = quality.compare(wanted, constant)["y"]
    assert figures["cosine"] > 0.9999
    assert figures["sqnr_db"] > 40
    assert figures["variation_db"] == pytest.approx(0, abs=0.1)


def test_outputs_that_do_not_vary_have_no_variation() -> None:
    assert "variation_db" not in quality.compare(one([5.0], [5.0]), one([5.0], [5.1]))["y"]
    assert "variation_db" not in quality.compare(one([5.0]), one([5.1]))["y"]


def test_the_direction_of_a_near_silent_run_does_not_count() -> None:
    loud, silent = [10.0, 0.0], [0.1, 0.0]
    assert quality.compare(one(loud, silent), one(loud, [0.0, 0.1]))["y"]["cosine"] == 1.0
    assert quality.compare(one(loud, silent), one(loud, [0.0, 9.0]))["y"]["cosine"] == 0.0


def test_large_outputs_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    wanted = {"y": rng.normal(3, 1, (7, 1, 5, 11)).astype(np.float32)}
    given = {"y": wanted["y"] + rng.normal(0, 0.1, wanted["y"].shape).astype(np.float32)}
    broken = {"y": given["y"].copy()}
    broken["y"][4, 0, 2, 3] = np.nan
    whole = quality.compare(wanted, given, ["y"])["y"]
    limits = whole.pop("range")
    for piece in (1, 3, 55, 100):
        monkeypatch.setattr(quality, "PIECE", piece)
        figures = quality.compare(wanted, given, ["y"])["y"]
        assert figures.pop("range") == limits
        assert figures == pytest.approx(whole, rel=1e-5)
        assert "is nan on 1 of 7 samples" in quality.broken_values(wanted, broken)[0]


def test_outputs_of_a_hundred_megabytes_take_a_few(tmp_path: Path) -> None:
    import tracemalloc

    for name in ("wanted", "given"):
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", np.float32, (4, 1, 256, 256, 100))[:] = 0.5
    wanted, given = ({"y": np.load(tmp_path / f"{name}.npy", mmap_mode="r")} for name in ("wanted", "given"))
    tracemalloc.start()
    quality.compare(wanted, given, ["y"])
    quality.broken_values(wanted, given)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


def test_values_that_are_no_numbers_are_counted_and_leave_the_figures_finite() -> None:
    figures = quality.compare(one([1.0, 2.0], [3.0, 1.0]), one([np.nan, 2.0], [np.inf, 1.0]))["y"]
    assert figures["broken"] == 2
    assert figures["sqnr_db"] == figures["variation_db"] == -quality.MAX_DB
    assert figures["max_error"] == 3.0


def test_ties_of_the_savedmodel_are_forgiven() -> None:
    wanted = one([0.5, 0.498, 0.002], [0.7, 0.2, 0.1], [0.1, 0.1, 0.8])
    given = one([0.498, 0.5, 0.002], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8])
    figures = quality.compare(wanted, given)["y"]
    assert (figures["agreement"], figures["clear_agreement"], figures["choices"]) == (0.333333, 0.666667, 3)


def test_pixels_are_choices_too() -> None:
    wanted = np.full((2, 1, 4, 4, 2), [0.9, 0.1], np.float32)
    given = wanted.copy()
    given[0, 0, 0] = [0.1, 0.9]
    figures = quality.compare({"y": wanted}, {"y": given})["y"]
    assert (figures["agreement"], figures["choices"]) == (0.875, 32)


def test_whole_numbers_are_counted_as_equal_or_not() -> None:
    figures = quality.compare({"y": np.array([[1], [2], [3], [9]])}, {"y": np.array([[1], [2], [3], [4]])})["y"]
    assert (figures["equal"], figures["choices"]) == (0.75, 4)


def test_the_worst_figure_of_all_outputs_speaks_for_the_variant() -> None:
    figures = quality.compare(
        {"a": np.ones((2, 3)), "b": np.array([[1.0, 2], [3, 4]])},
        {"a": np.ones((2, 3)) * 1.5, "b": np.array([[1.0, 2], [3, 4.1]])},
    )
    overall = quality.overall(figures)
    assert (overall["max_error"], overall["sqnr_db"]) == (0.5, figures["a"]["sqnr_db"])
    assert overall["variation_db"] == figures["b"]["variation_db"]


def test_vectors_of_zeros_are_equal_to_each_other_only() -> None:
    assert quality.compare(one([0.0, 0.0]), one([0.0, 0.0]))["y"]["cosine"] == 1.0
    assert quality.compare(one([0.0, 0.0]), one([1.0, 0.0]))["y"]["cosine"] == 0.0


def test_what_is_no_number_in_the_savedmodel_is_not_compared() -> None:
    figures = quality.compare(one([np.nan, 1.0]), one([7.0, 1.5]))["y"]
    assert (figures["max_error"], figures["mean_error"]) == (0.5, 0.5)


def test_nan_where_the_savedmodel_gives_a_number_is_found() -> None:
    names = ("zeros", "small", "large")
    found = quality.broken_values(one([1.0], [2.0], [np.inf]), one([1.0], [np.nan], [np.inf]), names)
    assert found == ["output 'y' is nan on small, where the source model gives numbers"]
    assert quality.broken_values(one([np.nan]), one([np.nan])) == []
    assert "on 2 of 3 samples" in quality.broken_values(one([1], [1], [1]), one([np.inf], [1], [-np.inf]))[0]


def test_agreement_counts_equal_choices() -> None:
    scores = one([0.1, 0.9], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7])["y"]
    other = one([0.2, 0.8], [0.9, 0.1], [0.4, 0.6], [0.3, 0.7])["y"]
    assert quality.agreement(scores, other) == 0.75


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ([[[0.25, 0.75]]], True),
        ([[[0.25, 0.5]]], False),
        ([[[1.5, -0.5]]], False),
        ([[[1.0]]], False),
        ([[0.5, 0.5]], False),
    ],
)
def test_probabilities_are_recognized(output: Any, expected: bool) -> None:
    assert quality.is_classifier(np.array(output, np.float32)) is expected


def test_the_tolerance_covers_what_was_measured_and_two_quantization_steps() -> None:
    exact = {"y": np.array([[[10.0, 0.0]]], np.float32)}
    near = {"y": np.array([[[10.1, 0.0]]], np.float32)}
    assert quality.tolerance(exact, near, {"y": None})["y"] == pytest.approx(0.2, rel=1e-4)
    assert quality.tolerance(exact, near, {"y": 0.5})["y"] == 1.0
    assert quality.tolerance(exact, exact, {"y": None})["y"] == pytest.approx(0.010001)


def test_probes_hold_zeros_and_the_extremes_of_the_data() -> None:
    plan = SignaturePlan(
        "s",
        (
            InputPlan("x", "float32", (1, 2), True),
            InputPlan("p", "uint8", (1,), True),
            InputPlan("i", "int32", (1,), True),
        ),
        {},
    )
    guessed = make_probes(plan, guessed_extremes(plan))
    assert guessed["p"].ravel().tolist() == [0, 0, 255]
    assert guessed["i"].ravel().tolist() == [0, 0, 1]
    data = {"x": np.array([[-7.0, 5.0]]), "p": np.array([[9]]), "i": np.array([[3]])}
    other = {"x": np.array([[-1.0, 8.0]]), "p": np.array([[4]]), "i": np.array([[3]])}
    made = make_probes(plan, extremes_of(data, other))
    assert made["x"].shape == (3, 1, 2)
    assert made["x"][:, 0, 0].tolist() == [0.0, -7.0, 8.0]
    assert made["p"].ravel().tolist() == [0, 4, 9]


def test_random_inputs_depend_on_the_seed_alone() -> None:
    plan = SignaturePlan("s", (InputPlan("x", "float32", (1, 2), True), InputPlan("i", "int64", (1,), True)), {})
    first, again, other = (random_inputs(plan, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first["x"], again["x"])
    assert not np.array_equal(first["x"], other["x"])
    assert set(first["i"].ravel().tolist()) == {0, 1}


def test_an_int8_file_shows_its_types() -> None:
    contents = read_contents((MODELS / "motion.tflite").read_bytes())
    assert contents.float_operators == {}
    assert contents.integer_operators == sum(contents.operators.values()) - contents.operators.get("QUANTIZE", 0)
    assert "INT8" in contents.constants
    assert not contents.weightless


def test_a_float_file_computes_in_float() -> None:
    contents = read_contents((MODELS / "linear.tflite").read_bytes())
    assert contents.integer_operators == 0
    assert contents.float_operators.keys() <= contents.operators.keys()
    assert contents.float_operators


def test_custom_operators_are_told_from_those_that_devices_have() -> None:
    assert read_contents((MODELS / "custom.tflite").read_bytes()).custom
    detector = read_contents((MODELS / "detector.tflite").read_bytes())
    assert detector.operators["TFLite_Detection_PostProcess"] == 1
    assert detector.custom == ()


def test_what_is_no_flatbuffer_is_refused() -> None:
    with pytest.raises(ValueError, match="not a TFLite flatbuffer"):
        read_contents(b"this is text")
