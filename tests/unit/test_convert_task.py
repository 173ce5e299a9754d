"""Accuracy, AUC and mean IoU against values worked out by hand, and which of them fits what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_serve.errors import UsageError
from edge_serve_converters import task

FLOAT = np.float32


def scores(*rows: Any) -> dict[str, Any]:
    """One output with one run of batch 1 for each row."""
    return {"y": np.array(rows, FLOAT)[:, np.newaxis]}


def measure(truth: Any, reference: dict[str, Any], variant: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Measure without looking at the inputs."""
    return task.task_figures(np.array(truth), options.pop("inputs", {}), reference, variant, **options)


def test_accuracy_is_the_part_of_right_choices() -> None:
    reference = scores([0.9, 0.1, 0], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.5, 0.3, 0.2])
    variant = scores([0.4, 0.6, 0], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.5, 0.3, 0.2])
    figures = measure([0, 1, 2, 1], reference, variant)
    assert figures == {
        "metric": "accuracy",
        "output": "y",
        "samples": 4,
        "float": 0.75,
        "variant": 0.5,
        "drop": 0.25,
        "resolution": 0.25,
        "chance": 0.5,
    }


def test_samples_of_a_batch_count_each() -> None:
    output = {"y": np.array([[[1, 0], [0, 1]], [[1, 0], [1, 0]]], FLOAT)}
    assert measure([[0, 1], [0, 1]], output, output)["float"] == 0.75


def test_one_probability_is_true_from_a_half_on() -> None:
    figures = measure([1, 0, 1, 0], scores([0.5], [0.4], [0.9], [0.1]), scores([0.49], [0.4], [0.9], [0.6]))
    assert (figures["metric"], figures["float"], figures["variant"]) == ("accuracy", 1.0, 0.5)


def test_numbers_of_classes_are_compared_as_they_are() -> None:
    figures = measure([3, 1, 2], {"class": np.array([[3], [1], [0]])}, {"class": np.array([[3], [0], [0]])})
    assert (figures["float"], figures["variant"]) == (0.666667, 0.333333)


def test_auc_counts_pairs_in_the_right_order_and_ties_half() -> None:
    figures = measure([0, 0, 1, 1], scores([1.0], [4.0], [3.5], [8.0]), scores([1.0], [3.5], [3.5], [8.0]))
    assert (figures["metric"], figures["float"], figures["variant"]) == ("auc", 0.75, 0.875)
    assert (figures["resolution"], figures["chance"]) == (0.25, 0.5)


def test_auc_equals_counting_all_pairs() -> None:
    rng = np.random.default_rng(0)
    truth, values = rng.random(60) < 0.3, rng.integers(0, 9, 60)
    pairs = [(a > b) + (a == b) / 2 for a in values[truth] for b in values[~truth]]
    assert task.area_under_curve(truth, values) == pytest.approx(np.mean(pairs))


def test_the_second_of_two_classes_gives_the_auc_if_that_is_asked() -> None:
    output = scores([0.6, 0.4], [0.7, 0.3], [0.55, 0.45], [0.9, 0.1])
    assert measure([1, 0, 1, 0], output, output)["float"] == 0.5
    assert measure([1, 0, 1, 0], output, output, metric="auc")["float"] == 1.0


def test_an_autoencoder_is_measured_by_its_reconstruction_error() -> None:
    given = np.array([[[0.0, 1.0, 2.0]], [[1.0, 1.0, 1.0]], [[5.0, 5.0, 5.0]]], FLOAT)
    good, bad = given.copy(), given.copy()
    good[2] += 1.0
    bad[0] += 2.0
    figures = measure([0, 0, 1], {"y": good}, {"y": bad}, inputs={"x": given})
    assert (figures["metric"], figures["float"], figures["variant"]) == ("auc", 1.0, 0.25)
    np.testing.assert_allclose(task.reconstruction_errors(given, good), [[0], [0], [1]])


def test_a_classifier_with_as_many_inputs_as_classes_is_no_autoencoder() -> None:
    output = scores([0.9, 0.1], [0.2, 0.8])
    assert measure([0, 1], output, output, inputs={"x": np.zeros((2, 1, 2), FLOAT)})["metric"] == "accuracy"


def test_mean_iou_is_the_mean_over_the_classes_that_occur() -> None:
    truth = np.array([[[0, 0], [1, 1]]])
    chosen = np.array([[[0, 1], [1, 1]]])
    dense = np.eye(4, dtype=FLOAT)[chosen][:, np.newaxis]
    exact = np.eye(4, dtype=FLOAT)[truth][:, np.newaxis]
    figures = measure(truth, {"y": exact}, {"y": dense})
    assert (figures["metric"], figures["samples"], figures["float"]) == ("mean_iou", 4, 1.0)
    assert figures["variant"] == pytest.approx((1 / 2 + 2 / 3) / 2, abs=1e-6)
    assert "chance" not in figures


def test_void_pixels_do_not_count() -> None:
    truth = np.array([[[0, 255], [1, 1]]], np.uint8)
    chosen = np.array([[[[0, 1], [1, 1]]]])
    assert measure(truth, {"map": chosen}, {"map": chosen}) == {
        "metric": "mean_iou",
        "output": "map",
        "samples": 3,
        "float": 1.0,
        "variant": 1.0,
        "drop": 0.0,
        "resolution": 0.333333,
    }


def test_one_probability_for_each_pixel_is_a_mask() -> None:
    output = {"y": np.array([[[[[0.9], [0.2]], [[0.7], [0.1]]]]], FLOAT)}
    assert measure(np.array([[[1, 0], [1, 0]]]), output, output)["float"] == 1.0


def test_black_and_white_masks_are_refused_with_the_remedy() -> None:
    output = {"y": np.zeros((1, 1, 2, 2, 1), FLOAT)}
    with pytest.raises(UsageError, match="write the object as 1"):
        measure(np.array([[[255, 0], [255, 0]]], np.uint8), output, output)


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ([0.5, 1.0], "fractions"),
        ([-1, 0], "smallest is -1"),
        ([0, 7], "fit none of the outputs"),
        ([0, 1, 1], "fit none of the outputs"),
        ([], "no labels"),
        (["cat", "dog"], "class numbers"),
    ],
)
def test_labels_that_do_not_fit_are_refused(truth: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measure(truth, scores([0.5, 0.5], [0.1, 0.9]), scores([0.5, 0.5], [0.1, 0.9]))


def test_several_outputs_that_fit_must_be_told_apart() -> None:
    output = {name: np.array([[[0.9, 0.1]], [[0.2, 0.8]]], FLOAT) for name in ("a", "b")}
    with pytest.raises(UsageError, match="a, b"):
        measure([0, 1], output, output)
    assert measure([0, 1], output, output, output="b")["output"] == "b"
    with pytest.raises(UsageError, match="no output 'c'"):
        measure([0, 1], output, output, output="c")


def test_auc_needs_both_kinds() -> None:
    with pytest.raises(UsageError, match="both kinds"):
        measure([1, 1], scores([3.0], [4.0]), scores([3.0], [4.0]))


def test_a_float_model_no_better_than_chance_puts_the_labels_in_doubt() -> None:
    turned = scores([0.9, 0.1], [0.1, 0.9], [0.8, 0.2])
    doubt = task.doubt(measure([1, 0, 1], turned, turned))
    assert doubt is not None
    assert "another order" in doubt
    assert task.doubt(measure([0, 1, 0], turned, turned)) is None
    assert task.doubt(measure([0, 0, 0], scores(*[[1, 0]] * 3), scores(*[[1, 0]] * 3))) is None
