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


def test_errors_and_cosine_are_those_of_the_definition() -> None:
    figures = quality.compare(one([3.0, 4.0], [1.0, 0.0]), one([3.0, 4.5], [0.0, 1.0]))["y"]
    assert figures == {"max_error": 1.0, "mean_error": 0.625, "cosine": 0.0, "range": [0.0, 4.0]}


def test_vectors_of_zeros_are_equal_to_each_other_only() -> None:
    assert quality.compare(one([0.0, 0.0]), one([0.0, 0.0]))["y"]["cosine"] == 1.0
    assert quality.compare(one([0.0, 0.0]), one([1.0, 0.0]))["y"]["cosine"] == 0.0


def test_what_is_no_number_in_the_savedmodel_is_not_compared() -> None:
    figures = quality.compare(one([np.nan, 1.0]), one([7.0, 1.5]))["y"]
    assert (figures["max_error"], figures["mean_error"]) == (0.5, 0.5)


def test_nan_where_the_savedmodel_gives_a_number_is_found() -> None:
    names = ("zeros", "small", "large")
    found = quality.broken_values(one([1.0], [2.0], [np.inf]), one([1.0], [np.nan], [np.inf]), names)
    assert found == ["output 'y' is nan on small, where the SavedModel gives numbers"]
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


def test_an_int8_file_shows_its_types_and_its_runtime() -> None:
    contents = read_contents((MODELS / "motion.tflite").read_bytes())
    assert contents.float_operators == {}
    assert contents.integer_operators == sum(contents.operators.values()) - contents.operators.get("QUANTIZE", 0)
    assert "INT8" in contents.constants
    assert contents.min_runtime is not None
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
