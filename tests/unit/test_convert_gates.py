"""The gates: what they refuse by default and on demand, and what they let through."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from edge_serve_converters import quality
from edge_serve_converters.gates import Gates, check, unmeasurable

NONE = Gates()


def figures(reference: Any, actual: Any, **more: Any) -> dict[str, Any]:
    """The manifest's quality for one output [runs, 1, values]."""
    return {
        "measured_on": "held-back",
        "outputs": quality.compare({"y": np.asarray(reference)}, {"y": np.asarray(actual)}),
        **more,
    }


def accuracy(samples: int, lost: int, before: float = 0.95) -> dict[str, Any]:
    """The figures of a classifier that lost that many samples."""
    drop = lost / samples
    task = {"metric": "accuracy", "output": "y", "samples": samples, "float": before, "variant": before - drop}
    return {"outputs": {}, "task": {**task, "drop": drop, "resolution": 1 / samples}}


def gates_of(refused: Any) -> list[str]:
    """Give the names of the gates that said no."""
    return [entry.gate for entry in refused]


def probabilities(classes: list[int], count: int = 4, top: float = 0.9) -> Any:
    """Scores [runs, 1, classes] that choose these classes clearly."""
    rows = np.full((len(classes), 1, count), (1 - top) / (count - 1), np.float32)
    rows[np.arange(len(classes)), 0, classes] = top
    return rows


@pytest.mark.parametrize(
    ("samples", "lost", "refused"),
    [
        (300, 9, True),
        (300, 3, False),
        (300, 4, True),
        (100, 1, False),
        (100, 2, True),
        (50, 1, False),
        (50, 2, True),
        (1000, 11, True),
        (300, -5, False),
    ],
)
def test_one_point_of_accuracy_is_allowed_and_one_sample_of_few(samples: int, lost: int, refused: bool) -> None:
    for mode in ("none", "float16", "dynamic", "int16x8", "int8"):
        assert bool(check(accuracy(samples, lost), NONE, mode)) is refused


def test_a_limit_that_a_person_gives_is_taken_as_it_is() -> None:
    assert check(accuracy(50, 1), Gates(max_drop=0.0), "int8")
    assert not check(accuracy(50, 10), Gates(max_drop=0.2), "int8")
    assert not check(accuracy(50, 0), Gates(max_drop=0.0), "int8")


def test_a_refusal_says_what_was_measured_what_it_means_and_what_to_try() -> None:
    (refused,) = check(accuracy(300, 9), NONE, "int8")
    assert "accuracy falls from 0.9500 to 0.9200 on 300 held-back samples" in refused.text
    assert "3.00 points where 1.00 are allowed" in refused.text
    for remedy in ("another mode", "--auto", "--keep-float", "calibration data", "--max-drop"):
        assert remedy in refused.text
    assert json.loads(json.dumps(refused.to_json()))["value"] == pytest.approx(0.03)


def test_without_labels_a_classifier_must_agree() -> None:
    classes = [number % 4 for number in range(40)]
    changed = [(number + (number % 5 == 0)) % 4 for number in range(40)]
    assert gates_of(check(figures(probabilities(classes), probabilities(changed)), NONE, "int8")) == ["min_agreement"]
    one_off = [*classes[:-1], (classes[-1] + 1) % 4]
    assert check(figures(probabilities(classes), probabilities(one_off)), NONE, "int8") == []
    assert check(figures(probabilities(classes), probabilities(classes, top=0.6)), NONE, "int8") == []


def test_one_of_four_samples_says_nothing_and_two_do() -> None:
    wanted = probabilities([0, 1, 2, 3])
    assert not check(figures(wanted, probabilities([0, 1, 2, 2])), NONE, "int8")
    assert check(figures(wanted, probabilities([0, 1, 0, 2])), NONE, "int8")


def test_ties_are_forgiven_by_default_but_not_to_a_person_who_asks() -> None:
    wanted = np.tile(np.array([0.501, 0.499], np.float32), (20, 1, 1))
    other = wanted[..., ::-1].copy()
    assert check(figures(wanted, other), NONE, "int8") == []
    assert gates_of(check(figures(wanted, other), Gates(min_agreement=0.9), "int8")) == ["min_agreement"]


def test_with_labels_the_truth_decides_not_the_agreement() -> None:
    wanted, other = probabilities([0, 1, 2, 3] * 5), probabilities([0, 1, 2, 2] * 5)
    assert check(figures(wanted, other), NONE, "int8")
    assert not check(figures(wanted, other, task=accuracy(20, 0)["task"]), NONE, "int8")


def test_scores_that_stay_the_same_whatever_comes_are_refused_even_if_the_choice_is_right() -> None:
    rng = np.random.default_rng(0)
    first = 0.8 + 0.01 * rng.standard_normal((30, 1))
    wanted = np.stack([first, 1 - first], axis=2).astype(np.float32)
    lost = np.tile(np.array([0.6, 0.4], np.float32), (30, 1, 1))
    assert gates_of(check(figures(wanted, lost), NONE, "int8")) == ["min_sqnr_db"]
    assert not check(figures(wanted, np.round(wanted * 256) / 256), NONE, "int8")


def test_float32_must_give_the_same_scores_not_only_the_same_choice() -> None:
    sure, unsure = probabilities([0, 1, 2, 3] * 5), probabilities([0, 1, 2, 3] * 5, top=0.5)
    assert check(figures(sure, unsure), NONE, "int8") == []
    assert gates_of(check(figures(sure, unsure), NONE, "none")) == ["min_sqnr_db"]
    assert check(figures(sure, sure + np.float32(1e-6)), NONE, "none") == []


def signal(count: int = 32) -> Any:
    """Reconstructions [runs, 1, 64] of different size, one of them near silence."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((count, 1, 64)) * np.linspace(0.5, 2, count)[:, np.newaxis, np.newaxis]
    rows[0] *= 0.01
    return rows.astype(np.float32)


def test_an_8_bit_output_passes_and_noise_does_not() -> None:
    wanted = signal()
    step = np.ptp(wanted) / 255
    quantized = np.round(wanted / step) * step
    for mode in ("int8", "dynamic", "int16x8"):
        assert check(figures(wanted, quantized), NONE, mode) == []
    rng = np.random.default_rng(2)
    noisy = wanted + rng.standard_normal(wanted.shape).astype(np.float32)
    assert gates_of(check(figures(wanted, noisy), NONE, "int8")) == ["min_cosine"]


def test_float_modes_are_held_to_more_than_8_bit_ones() -> None:
    wanted = signal()
    near = wanted + 0.02 * wanted[:, :, ::-1]
    assert not check(figures(wanted, near), NONE, "int8")
    assert check(figures(wanted, near), NONE, "none")


def test_one_number_may_change_its_sign_near_zero() -> None:
    wanted = np.linspace(-1, 1, 41).reshape(41, 1, 1)
    given = wanted + 0.13
    assert figures(wanted, given)["outputs"]["y"]["cosine"] < 0
    assert check(figures(wanted, given), NONE, "int8") == []


def test_a_regression_that_has_become_a_constant_is_refused_whatever_its_offset() -> None:
    wanted = 300 + np.linspace(-1, 1, 41).reshape(41, 1, 1)
    (refused,) = check(figures(wanted, np.full_like(wanted, 300.2)), NONE, "int8")
    assert refused.gate == "min_sqnr_db"
    assert "than a constant would" in refused.text


def test_a_stricter_cosine_does_not_switch_the_other_gates_off() -> None:
    wanted = np.random.default_rng(0).uniform(2.6, 4.4, (40, 1, 1)).astype(np.float32)
    constant = np.full_like(wanted, wanted.mean())
    for gates in (Gates(), Gates(min_cosine=0.99999)):
        refused = check(figures(wanted, constant), gates, "int8")
        assert gates_of(refused) == ["min_sqnr_db"]
        assert "--min-sqnr" in refused[0].text
    assert not check(figures(wanted, constant), Gates(min_sqnr_db=-10.0), "int8")


def test_a_persons_cosine_replaces_the_defaults_for_outputs() -> None:
    wanted = signal()
    noisy = wanted + np.random.default_rng(2).standard_normal(wanted.shape).astype(np.float32)
    assert not check(figures(wanted, noisy), Gates(min_cosine=-1.0), "int8")
    assert gates_of(check(figures(wanted, noisy), Gates(min_cosine=0.99), "int8")) == ["min_cosine"]
    assert gates_of(check(figures(wanted, noisy), Gates(min_sqnr_db=20.0), "int8")) == ["min_sqnr_db", "min_cosine"]


def test_maps_of_classes_are_equal_or_not_and_pictures_are_near() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 20, (4, 1, 30, 30))
    few = classes.copy()
    few[0, 0, :2] = 19 - few[0, 0, :2]
    assert check(figures(classes, few), NONE, "int8") == []
    assert check(figures(classes, rng.permutation(classes.ravel()).reshape(classes.shape)), NONE, "int8")
    picture = rng.integers(0, 255, (4, 1, 30, 30))
    assert check(figures(picture, picture + 1), NONE, "int8") == []


def test_random_inputs_show_another_function_and_nothing_finer() -> None:
    wanted = signal()
    poor = wanted + np.random.default_rng(2).standard_normal(wanted.shape).astype(np.float32)
    assert check(figures(wanted, poor, measured_on="random"), NONE, "int8") == []
    assert gates_of(check(figures(wanted, -wanted, measured_on="random"), NONE, "int8")) == ["min_sqnr_db"]
    assert check(figures(wanted, poor, measured_on="random"), NONE, "none")
    other = figures(probabilities([0, 1, 2, 3] * 5), probabilities([1, 2, 3, 0] * 5), measured_on="random")
    assert "min_agreement" not in gates_of(check(other, NONE, "int8"))


def test_values_that_are_no_numbers_are_refused_whatever_was_asked() -> None:
    wanted = signal()
    broken = wanted.copy()
    broken[3, 0, 5] = np.nan
    for mode, where in (("float16", "held-back"), ("none", "random")):
        refused = check(figures(wanted, broken, measured_on=where), Gates(min_cosine=-1.0), mode)
        assert gates_of(refused) == ["numbers"]


def test_a_gate_that_cannot_be_measured_is_named() -> None:
    regression = figures(signal(), signal())
    classifier = figures(probabilities([0, 1]), probabilities([0, 1]))
    assert unmeasurable(NONE, regression) is None
    assert "--max-drop: without labels" in str(unmeasurable(Gates(max_drop=0.01), classifier))
    assert "--min-agreement: no output" in str(unmeasurable(Gates(min_agreement=0.9), regression))
    assert unmeasurable(Gates(min_agreement=0.9), classifier) is None
    assert unmeasurable(Gates(max_drop=0.01, min_cosine=0.9), {**classifier, "task": {}}) is None
    assert "--min-cosine" in str(unmeasurable(Gates(min_cosine=0.9), {"tolerance": {}}))


def test_a_file_of_which_nothing_could_be_measured_is_not_refused() -> None:
    assert check({"measured_on": "held-back", "samples": 16}, NONE, "int8") == []
