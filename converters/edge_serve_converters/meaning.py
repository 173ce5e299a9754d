"""What the inputs mean: the input specification that the manifest gets, settled from the options and checked on the model."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from edge_serve.bundle import TensorSpec
from edge_serve.errors import ModelError, UsageError
from edge_serve.spec import InputSpec
from edge_serve_converters.calibration import kind_of
from edge_serve_converters.plan import SignaturePlan

_IMAGE_FIELDS = ("size", "color", "resize", "scale")
_WINDOW_FIELDS = ("length", "hop", "channels", "rate_hz")


def settle_input(spec: InputSpec, calibration: Path | None) -> InputSpec:
    """Settle the kind of input: as said, else from the options that only one kind has, else from a folder of pictures.

    UsageError if options of two kinds are mixed.
    """
    image = [name for name in _IMAGE_FIELDS if getattr(spec, name) is not None]
    window = [name for name in _WINDOW_FIELDS if getattr(spec, name) is not None]
    kind = spec.kind or ("image" if image else "window" if window else None)
    if kind is None:
        kind = (kind_of(calibration) if calibration is not None else None) or "tensor"
    misplaced = {"image": window, "window": image, "tensor": image + window}[kind]
    if misplaced:
        options = ", ".join("--" + name.replace("_", "-") for name in misplaced)
        raise UsageError(f"{options}: has no meaning for inputs of kind {kind}; leave it out or choose another --kind")
    if kind == "tensor" and (spec.mean is not None or spec.std is not None):
        raise UsageError("--mean and --std belong to --kind image or window; a tensor is taken as it is")
    return dataclasses.replace(spec, kind=kind)


def check_input(spec: InputSpec, plan: SignaturePlan) -> None:
    """Check the specification on the default signature; UsageError says what does not fit."""
    if spec.kind == "tensor":
        return
    if len(plan.inputs) != 1:
        names = ", ".join(entry.name for entry in plan.inputs)
        raise UsageError(f"--kind {spec.kind} takes a model with one input; signature {plan.key} has {names}")
    entry = plan.inputs[0]
    if spec.kind == "image":
        from edge_serve.processing.image import ImageProcessor  # Pillow only where there are pictures

        try:
            ImageProcessor(spec, TensorSpec(entry.name, entry.dtype, (1, *entry.sample_shape)))
        except ModelError as error:
            raise UsageError(f"--kind image: {error}") from error
        return
    elements = math.prod(entry.sample_shape)
    length = spec.length
    if length is not None and elements % length:
        raise UsageError(f"--length {length} does not fit input {entry.name!r} of shape {list(entry.shape)}")
    if spec.channels is not None and (
        elements % len(spec.channels) or (length is not None and elements != length * len(spec.channels))
    ):
        raise UsageError(
            f"--channels names {len(spec.channels)}, which does not fit input {entry.name!r} of shape {list(entry.shape)}"
        )
