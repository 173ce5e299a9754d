"""Classification: one tensor of scores becomes the best classes with their labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.errors import InputError, ModelError
from edge_serve.processing.tensor import dequantize
from edge_serve.spec import OutputSpec

if TYPE_CHECKING:
    from edge_serve.frame import Array

DEFAULT_TOP_K = 5


def finite(value: float) -> float | None:
    """Give a number as JSON can hold it: six decimals are more than any score has, NaN and infinity are null."""
    return round(value, 6) if np.isfinite(value) else None


def make_classifier(
    spec: OutputSpec, outputs: Mapping[str, TensorSpec], labels: tuple[str, ...] | None
) -> Callable[[Mapping[str, Array]], dict[str, Any]]:
    """Give the function from output tensors to {"classes": [{"index", "label", "score"}, …]}, best first.

    ModelError if the scores' tensor is not there, or the labels are fewer than the classes.
    """
    name = spec.tensor or (next(iter(outputs)) if len(outputs) == 1 else None)
    if name is None or name not in outputs:
        wrong = "the model has several outputs" if spec.tensor is None else f"the model has no output {spec.tensor!r}"
        raise ModelError(
            f"{wrong}; say which holds the scores with tensor = under [pipeline.output]: {', '.join(outputs)}"
        )
    tensor = outputs[name]
    classes = tensor.shape[-1] if tensor.shape else 1
    if any(size not in (1, -1) for size in tensor.shape[:-1]):
        raise ModelError(f"output {name!r} has shape {list(tensor.shape)}, which is no list of scores [1, classes]")
    if labels is not None and classes not in (-1, len(labels)):
        raise ModelError(
            f"{len(labels)} labels for the {classes} classes of output {name!r}; give exactly one for each class"
        )
    top_k = spec.top_k or DEFAULT_TOP_K
    threshold = spec.threshold
    activation = spec.activation or "none"

    def classify(tensors: Mapping[str, Array]) -> dict[str, Any]:
        scores = _activate(dequantize(tensors[name], tensor).reshape(-1), activation)
        if classes not in (-1, scores.size):
            raise InputError(f"a batch of {scores.size // classes} inputs; classification takes one at a time")
        ranked = np.argsort(-scores, kind="stable")[:top_k]
        found = []
        for index in ranked.tolist():
            score = float(scores[index])
            if threshold is not None and not score >= threshold:
                continue
            label = labels[index] if labels is not None and index < len(labels) else None
            found.append({"index": index, "label": label, "score": finite(score)})
        return {"classes": found}

    return classify


def _activate(scores: Array, activation: str) -> Any:
    # Whole numbers, too: an unsigned one has no negative to be ranked by.
    wide = scores.astype(np.float64)
    if activation == "none":
        return wide
    if activation == "sigmoid":
        # The form that overflows on neither side.
        return np.where(wide >= 0, 1 / (1 + np.exp(-np.abs(wide))), 1 - 1 / (1 + np.exp(-np.abs(wide))))
    with np.errstate(invalid="ignore"):  # infinite logits become NaN, and null
        powers = np.exp(wide - wide.max())
        return powers / powers.sum()
