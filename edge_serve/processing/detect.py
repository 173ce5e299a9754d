"""Detection: the four tensors of TFLite_Detection_PostProcess become objects with boxes in input pixels.

Which output is which is never guessed: the configuration or the manifest names them, or the operator itself, whose
outputs have a fixed order (boxes, classes, scores, count; tensorflow/lite/kernels/detection_postprocess.cc), says it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from edge_serve.bundle import TensorSpec
from edge_serve.errors import ModelError
from edge_serve.processing.classify import finite
from edge_serve.processing.tensor import dequantize
from edge_serve.spec import OutputSpec

if TYPE_CHECKING:
    from edge_serve.frame import Array
    from edge_serve.processing.image import Geometry

ROLES = ("boxes", "classes", "scores", "count")
DEFAULT_THRESHOLD = 0.5
DEFAULT_MAX_OBJECTS = 100


def assign_roles(
    spec: OutputSpec, outputs: Mapping[str, TensorSpec], operator_order: tuple[str, ...] | None
) -> dict[str, str]:
    """Settle role → output name; `operator_order` are the output names in the operator's own order, where it has one."""
    said = {role: getattr(spec, role) for role in ROLES if getattr(spec, role) is not None}
    for role, name in said.items():
        if name not in outputs:
            raise ModelError(f"{role} = {name!r}: the model has no such output; it has: {', '.join(outputs)}")
    roles = dict(zip(ROLES, operator_order, strict=True)) if operator_order is not None else {}
    roles.update(said)
    missing = [role for role in ROLES[:3] if role not in roles]
    if missing:
        raise ModelError(
            f"detection needs to know which outputs hold {', '.join(missing)}; name them under [pipeline.output]: {', '.join(outputs)}"
        )
    boxes = outputs[roles["boxes"]].shape
    if boxes[-1:] not in ((4,), (-1,)):
        raise ModelError(f"output {roles['boxes']!r} has shape {list(boxes)}, which are no boxes [1, N, 4]")
    return roles


def make_detector(
    spec: OutputSpec,
    outputs: Mapping[str, TensorSpec],
    labels: tuple[str, ...] | None,
    operator_order: tuple[str, ...] | None,
) -> Callable[[Mapping[str, Array], Geometry], dict[str, Any]]:
    """Give the function from output tensors to {"objects": [{"index", "label", "score", "box"}, …], "image": {…}}."""
    roles = assign_roles(spec, outputs, operator_order)
    threshold = DEFAULT_THRESHOLD if spec.threshold is None else spec.threshold
    most = spec.max_objects or DEFAULT_MAX_OBJECTS

    def detect(tensors: Mapping[str, Array], geometry: Geometry) -> dict[str, Any]:
        real = {role: dequantize(tensors[name], outputs[name]) for role, name in roles.items()}
        boxes = real["boxes"].reshape(-1, 4)
        classes, scores = real["classes"].reshape(-1), real["scores"].reshape(-1)
        count = min(len(boxes), len(classes), len(scores))
        if "count" in real:
            stated = float(real["count"].reshape(-1)[0])
            count = max(0, min(count, round(stated))) if math.isfinite(stated) else 0
        objects: list[dict[str, Any]] = []
        for position in sorted(range(count), key=lambda at: -float(scores[at])):
            score = float(scores[position])
            if not score >= threshold or len(objects) >= most:
                continue
            y0, x0, y1, x1 = (float(value) for value in boxes[position])
            if not all(map(math.isfinite, (y0, x0, y1, x1, float(classes[position])))):
                continue
            index = round(float(classes[position]))  # dequantized, a whole number may fall short of itself
            label = labels[index] if labels is not None and 0 <= index < len(labels) else None
            objects.append(
                {"index": index, "label": label, "score": finite(score), "box": geometry.box(x0, y0, x1, y1)}
            )
        return {"objects": objects, "image": {"width": geometry.width, "height": geometry.height}}

    return detect
