"""What a model is for, measured with the truth: accuracy, area under the ROC curve, or mean IoU of float model and variant.

Which of them fits is told from the shapes of truth and outputs; where several fit, the person must say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from edge_serve.errors import UsageError
from edge_serve_converters.quality import are_scores, rounded
from edge_serve_converters.store import Array

Metric = Literal["accuracy", "auc", "mean_iou"]
METRICS: tuple[Metric, ...] = get_args(Metric)
# In masks of 8 bits this value says "do not count", as in PASCAL VOC and most data sets since.
VOID = 255
# Confusion matrices are [classes, classes] of 64-bit counts: 2048 classes are 32 MB. No segmentation comes near it.
MAX_SEGMENT_CLASSES = 2048


def task_figures(
    truth: Array,
    inputs: Mapping[str, Array],
    reference: Mapping[str, Array],
    variant: Mapping[str, Array],
    output: str | None = None,
    metric: Metric | None = None,
) -> dict[str, Any]:
    """Measure the float model and a variant against the truth on the same inputs.

    All arrays begin with [runs, batch]; a batch of 1 may be missing in the truth. What fits what:

    - truth [runs, batch], whole numbers, one class for each sample: *accuracy* of an output [runs, batch, classes]
      (highest score), of one [runs, batch, 1] or [runs, batch] of probabilities (true from 0.5 on) or, if `metric` asks for
      accuracy, logits (true from 0 on), or of whole
      numbers [runs, batch] (classes).
    - truth [runs, batch] of zeros and ones: *auc* of an output [runs, batch, 1] or [runs, batch] that is no probability,
      of the second of two classes if `metric` asks for it, or of the reconstruction error mean((output - input)²) of an
      autoencoder, whose output has the shape of its input.
    - truth [runs, batch, height, width]: *mean_iou* of an output [runs, batch, height, width, classes], of one
      [..., 1] or [runs, batch, height, width] of probabilities, or of a map of classes. VOID (255) is left out.

    `output` and `metric` narrow the choice. Gives metric, output, samples (pixels for mean_iou), float, variant, drop
    (float - variant), resolution (what the smallest countable change is worth) and chance (what knowing nothing gives).
    UsageError if nothing fits, if several outputs do, or the truth is not what it should be.
    """
    labels = _check_truth(truth)
    if output is not None and output not in reference:
        raise UsageError(f"the model has no output {output!r} to compare with the truth; it has {', '.join(reference)}")
    candidates = [output] if output is not None else list(reference)
    fitting = [
        (name, kind) for name in candidates if (kind := _fits(labels, inputs, reference[name], metric)) is not None
    ]
    if not fitting:
        raise _nothing_fits(labels, reference, candidates, metric)
    if len(fitting) > 1:
        names = ", ".join(name for name, _ in fitting)
        raise UsageError(
            f"labels of shape {list(truth.shape)} fit several outputs ({names}); say which one answers the question"
        )
    ((name, kind),) = fitting
    if kind == "mean_iou":
        labels = labels.reshape(reference[name].shape[:4])
    # Told from the reference for both: a variant's outputs may look like something else.
    source = _reconstructed(inputs, reference[name]) if kind == "auc" else None
    before, samples, resolution, chance = _measure(kind, labels, source, reference[name])
    after, *_ = _measure(kind, labels, source, variant[name])
    figures = {
        "metric": kind,
        "output": name,
        "samples": samples,
        "float": rounded(before),
        "variant": rounded(after),
        "drop": rounded(before - after),
        "resolution": rounded(resolution),
    }
    return figures if chance is None else {**figures, "chance": rounded(chance)}


def doubt(figures: Mapping[str, Any]) -> str | None:
    """Say so if the float model itself does no better than chance: then the labels, not the variant, are in question."""
    chance = figures.get("chance")
    if chance is None or figures["float"] == 1:
        return None
    # Two standard errors of a coin with that chance: so far luck alone reaches on so many samples.
    luck = 2 * math.sqrt(chance * (1 - chance) / figures["samples"])
    if figures["float"] > chance + luck:
        return None
    figure = f"{figures['metric']} of {figures['float']:.3f} on output {figures['output']!r}"
    return (
        f"the source model itself has an {figure}, no better than luck on {figures['samples']} samples (chance is {chance:.3f}): "
        "the labels may not belong to these samples, or be in another order than the model's classes, or the samples may be "
        "scaled otherwise than in training"
    )


def _check_truth(truth: Array) -> Array:
    """Give the truth as whole numbers; masks stay in their own small type."""
    if not truth.size:
        raise UsageError("there are no labels for the held-back samples; give one for each sample")
    labels = truth
    if truth.dtype.kind == "f":
        if not np.isfinite(truth).all() or (truth != np.rint(truth)).any():
            raise UsageError("labels are class numbers, from 0 up; some are fractions or no numbers")
        labels = truth.astype(np.int64)
    elif truth.dtype.kind == "b":
        labels = truth.view(np.uint8)
    elif truth.dtype.kind not in "iu":
        raise UsageError(f"labels have dtype {truth.dtype}; give class numbers, from 0 up")
    if labels.min() < 0:
        raise UsageError(f"labels are class numbers, from 0 up; the smallest is {int(labels.min())}")
    return labels


def _fits(labels: Array, inputs: Mapping[str, Array], output: Array, metric: Metric | None) -> Metric | None:
    """Give the metric by which this output answers the truth; None if it does not."""
    found: Metric | None = None
    if output.ndim < 2:
        return None
    if labels.shape in (output.shape[:2], (*output.shape[:2], 1), _without_batch(output.shape[:2])):
        largest = int(labels.max())
        classes = math.prod(output.shape[2:]) if output.ndim <= 3 else 0
        if largest <= 1 and _reconstructed(inputs, output) is not None:
            found = "auc"
        elif output.dtype.kind in "iu" and classes == 1:
            found = "accuracy"
        elif largest < classes and classes > 1:
            found = "auc" if metric == "auc" and classes == 2 else "accuracy"
        elif classes == 1 and largest <= 1:
            found = metric if metric in ("auc", "accuracy") else "accuracy" if _probabilities(output) else "auc"
    elif output.ndim in (4, 5) and labels.shape in (output.shape[:4], _without_batch(output.shape[:4])):
        classes = output.shape[4] if output.ndim == 5 else 1
        whole = output.dtype.kind in "iu" and output.ndim == 4
        if whole or (_largest_class(labels) < max(2, classes) and classes <= MAX_SEGMENT_CLASSES):
            found = "mean_iou"
    return found if metric in (None, found) else None


def _largest_class(masks: Array) -> int:
    """Give the largest class number of masks; UsageError if they are black and white."""
    present = np.unique(np.concatenate([np.unique(mask) for mask in masks]))
    if present.tolist() == [0, VOID]:
        raise UsageError(
            f"the masks hold nothing but 0 and {VOID}, and {VOID} means that a pixel does not count: write the object as 1"
        )
    return int(present[present != VOID].max(initial=0))


def _without_batch(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    return (shape[0], *shape[2:]) if shape[1] == 1 else None


def _reconstructed(inputs: Mapping[str, Array], output: Array) -> Array | None:
    """Give the input that an output may be a copy of: the same shape, more than a number; probabilities are none."""
    if output.dtype.kind != "f" or math.prod(output.shape[2:]) < 2 or are_scores(output):
        return None
    return next((array for array in inputs.values() if array.shape == output.shape and array.dtype.kind == "f"), None)


def _probabilities(output: Array) -> bool:
    return output.dtype.kind == "f" and bool(((output >= 0) & (output <= 1)).all())


def _nothing_fits(
    labels: Array, reference: Mapping[str, Array], candidates: list[str], metric: Metric | None
) -> UsageError:
    shapes = ", ".join(f"{name} {list(reference[name].shape[1:])}" for name in candidates)
    asked = f"{metric} " if metric else "accuracy, AUC or mean IoU "
    return UsageError(
        f"{asked}cannot be measured: labels of shape {list(labels.shape)} with classes up to {int(labels.max())} fit none of the "
        f"outputs ({shapes}); labels are one class number for each sample (0 and 1 for an autoencoder) or one for each pixel"
    )


Measured = tuple[float, int, float, "float | None"]
"""The figure, samples, resolution, chance."""


def _measure(kind: Metric, labels: Array, source: Array | None, output: Array) -> Measured:
    if kind == "auc":
        return _auc(labels, source, output)
    return _accuracy(labels, output) if kind == "accuracy" else _mean_iou(labels, output)


def _accuracy(labels: Array, output: Array) -> Measured:
    """Top-1 accuracy: the part of the samples whose highest score is the true class. Chance: always the commonest class."""
    truth = labels.ravel()
    if output.dtype.kind in "iu" and output.size == len(truth):
        chosen = output.ravel()
    elif output.size == len(truth):
        chosen = (output.ravel() >= (0.5 if _probabilities(output) else 0.0)).astype(np.int64)
    else:
        chosen = output.argmax(axis=-1).ravel()
    commonest = np.unique(truth, return_counts=True)[1].max()
    return float((chosen == truth).mean()), len(truth), 1 / len(truth), float(commonest / len(truth))


def _auc(labels: Array, source: Array | None, output: Array) -> Measured:
    truth = labels.ravel() == 1
    # One number for each sample, or two of which the second speaks for the positive class.
    plain = output.reshape(len(truth), -1)[:, -1]
    scores = plain if source is None else reconstruction_errors(source, output).ravel()
    positive = int(truth.sum())
    negative = len(truth) - positive
    if not positive or not negative:
        raise UsageError(
            "AUC needs samples of both kinds among the held-back ones; all labels are equal: give more data"
        )
    return area_under_curve(truth, scores), len(truth), 1 / (positive * negative), 0.5


def area_under_curve(truth: Array, scores: Array) -> float:
    """Give the area under the ROC curve: how often a positive sample scores higher than a negative one, ties counting half.

    From the sum of ranks (Mann-Whitney U; Hanley and McNeil, Radiology 143, 1982): both arrays are [samples], truth is
    bool with both values present. NaN ranks below everything.
    """
    finite = np.where(np.isnan(scores), -np.inf, scores.astype(np.float64))
    _, place, counts = np.unique(finite, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place.ravel()]
    positive = int(truth.sum())
    above = float(ranks[truth].sum()) - positive * (positive + 1) / 2
    return above / (positive * (len(truth) - positive))


def reconstruction_errors(given: Array, output: Array) -> Array:
    """Give mean((output - input)²) of each sample of [runs, batch, …], as [runs, batch] in float64."""
    errors = np.empty(output.shape[:2])
    for run in range(len(output)):
        for sample in range(output.shape[1]):  # one at a time: a batch of pictures need not fit twice
            difference = output[run, sample].astype(np.float64) - given[run, sample]
            errors[run, sample] = np.mean(difference * difference)
    return errors


def _mean_iou(labels: Array, output: Array) -> Measured:
    """Mean over the classes of intersection / union, over all pixels together (Everingham et al., PASCAL VOC).

    A class that neither truth nor answer has is left out; pixels of truth VOID do not count.
    """
    whole = output.dtype.kind in "iu" and output.ndim == 4
    classes = output.shape[4] if output.ndim == 5 else 2
    if whole:
        classes = max(int(output.max(initial=0)), _largest_class(labels)) + 1
        if int(output.min(initial=0)) < 0 or classes > MAX_SEGMENT_CLASSES:
            raise UsageError(f"the map of classes holds numbers outside 0..{MAX_SEGMENT_CLASSES - 1}; is it one?")
    classes = max(2, classes)
    confusion = np.zeros((classes, classes), np.int64)
    for run in range(len(output)):
        for sample in range(output.shape[1]):
            scores = output[run, sample]
            if whole:
                chosen = scores
            elif output.ndim == 5 and scores.shape[-1] > 1:
                chosen = scores.argmax(axis=-1)
            else:
                chosen = scores.reshape(scores.shape[:2]) >= 0.5
            truth = labels[run, sample]
            counted = truth != VOID
            pairs = truth[counted].astype(np.int64) * classes + chosen[counted].astype(np.int64)
            confusion += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    both = np.diag(confusion)
    either = confusion.sum(axis=0) + confusion.sum(axis=1) - both
    present = either > 0
    pixels = int(confusion.sum())
    return float((both[present] / either[present]).mean()), pixels, 1 / max(1, pixels), None
