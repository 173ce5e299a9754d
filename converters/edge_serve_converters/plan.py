"""Which signatures are converted, and the fixed shape that each of their inputs gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_serve.errors import UsageError
from edge_serve_converters.request import Request
from edge_serve_converters.store import Array

DEFAULT_SIGNATURE = "serving_default"

Shape = tuple[int, ...]
Hint = Callable[[str, str], "Shape | None"]
"""(signature, input) → the shape that one sample of the calibration data has, if it says one."""


@dataclass(frozen=True, slots=True)
class InputPlan:
    """One input with its fixed shape. Where `batched`, the first dimension counts samples."""

    name: str
    dtype: str
    shape: Shape
    batched: bool

    @property
    def sample_shape(self) -> Shape:
        """Give the shape of one sample."""
        return self.shape[1:] if self.batched else self.shape


@dataclass(frozen=True, slots=True)
class SignaturePlan:
    """One signature that is converted; inputs in the SavedModel's order, outputs name → dtype."""

    key: str
    inputs: tuple[InputPlan, ...]
    outputs: dict[str, str]

    def to_command(self) -> dict[str, Any]:
        """Give what a child needs to know of it."""
        return {
            "key": self.key,
            "inputs": [{"name": i.name, "dtype": i.dtype, "shape": i.shape, "batched": i.batched} for i in self.inputs],
        }


def make_plan(described: Mapping[str, Any], request: Request, hint: Hint) -> tuple[SignaturePlan, ...]:
    """Settle signatures and shapes. `described` is what the worker's `describe` says of the SavedModel.

    The first of the result is the default signature. UsageError names the signature or input that cannot be settled.
    """
    keys = _choose(sorted(described), request)
    plans = tuple(_plan_signature(key, described[key], request, hint) for key in keys)
    known = {entry.name for plan in plans for entry in plan.inputs}
    unknown = [name for name in request.input_shapes if name not in known]
    if unknown:
        raise UsageError(f"--input-shape {unknown[0]}: the model has no such input; it has: {', '.join(sorted(known))}")
    return plans


def _choose(known: list[str], request: Request) -> list[str]:
    if not known:
        raise UsageError(
            f"{request.model}: has no signatures; save it again with tf.saved_model.save(…, signatures=…) or Keras' model.export()"
        )
    if request.signatures:
        for key in request.signatures:
            if key not in known:
                raise UsageError(f"{request.model}: has no signature {key!r}; it has: {', '.join(known)}")
        chosen = list(dict.fromkeys(request.signatures))
        return sorted(chosen, key=lambda key: key != DEFAULT_SIGNATURE)
    if DEFAULT_SIGNATURE in known:
        return [DEFAULT_SIGNATURE]
    if len(known) == 1:
        return known
    raise UsageError(
        f"{request.model}: has the signatures {', '.join(known)}; choose with --signature (it may be given several times)"
    )


def _plan_signature(key: str, described: Mapping[str, Any], request: Request, hint: Hint) -> SignaturePlan:
    for role in ("inputs", "outputs"):
        for name, tensor in described[role].items():
            if tensor["dtype"] in ("string", "resource", "variant"):
                raise UsageError(
                    f"signature {key}: {role[:-1]} {name!r} has dtype {tensor['dtype']}; device models take and give numbers. "
                    "Export a signature that works on the decoded tensor (parsing and look-ups belong before and after the model)"
                )
    if not described["inputs"]:
        raise UsageError(f"signature {key} takes no inputs; choose another with --signature")
    if not described["outputs"]:
        raise UsageError(f"signature {key} gives no outputs; choose another with --signature")
    inputs = tuple(_plan_input(key, name, tensor, request, hint) for name, tensor in described["inputs"].items())
    return SignaturePlan(key, inputs, {name: tensor["dtype"] for name, tensor in described["outputs"].items()})


def _plan_input(key: str, name: str, tensor: Mapping[str, Any], request: Request, hint: Hint) -> InputPlan:
    declared = tensor["shape"]
    wanted = request.input_shapes.get(name)
    if wanted is not None:
        if declared is not None and not _fits(wanted, declared):
            raise UsageError(
                f"--input-shape {name}={_text(wanted)}: the signature {key} takes [{_text(declared)}] there"
            )
        # One lone dynamic dimension is a batch of numbers, or one signal of any length: then its length is not the batch.
        signal = len(wanted) == 1 and wanted[0] != request.batch
        return InputPlan(name, tensor["dtype"], wanted, not signal and _is_batched(declared or wanted))
    if declared is None:
        raise UsageError(f"input {name!r} of signature {key} has no shape at all; say it: --input-shape {name}=1,…")
    shape = list(declared)
    sample = hint(key, name)
    signal = len(shape) == 1 and sample is not None and len(sample) == 1
    batched = not signal and _is_batched(declared)
    if batched:
        if declared[0] not in (-1, request.batch):
            raise UsageError(f"input {name!r} has the fixed batch {declared[0]}, --batch {request.batch} does not fit")
        shape[0] = request.batch
    _fill(shape, sample, request, batched)
    if -1 in shape:
        example = ",".join(str(size) if size != -1 else "N" for size in shape)
        raise UsageError(
            f"input {name!r} of signature {key} has the dynamic shape [{_text(declared)}]; device models have fixed shapes: "
            f"--input-shape {name}={example} with numbers for N"
        )
    return InputPlan(name, tensor["dtype"], tuple(shape), batched)


def _fill(shape: list[int], sample: Shape | None, request: Request, batched: bool) -> None:
    """Fill dynamic dimensions from --size (pictures), --length (windows) or the calibration data."""
    size, length = request.input.size, request.input.length
    if size is not None and len(size) == 2 and len(shape) == 4:
        shape[1:3] = [have if have != -1 else want for have, want in zip(shape[1:3], size, strict=True)]
    if length is not None and len(shape) == 3 and shape[1] == -1:
        shape[1] = length
    offset = 1 if batched else 0
    if sample is not None and len(sample) == len(shape) - offset:
        shape[offset:] = [have if have != -1 else want for have, want in zip(shape[offset:], sample, strict=True)]


def _is_batched(shape: Shape | list[int]) -> bool:
    """Tell whether the first dimension counts samples: it is dynamic or 1. A lone static dimension is the sample itself."""
    return len(shape) > 0 and shape[0] in (-1, 1)


def _fits(wanted: Shape, declared: list[int]) -> bool:
    return len(wanted) == len(declared) and all(have in (-1, want) for want, have in zip(wanted, declared, strict=True))


def _text(shape: Shape | list[int]) -> str:
    return ",".join("?" if size == -1 else str(size) for size in shape)


def as_input(values: Array, entry: InputPlan, where: str) -> Array:
    """Give samples the input's dtype and shape; UsageError if a value does not survive that."""
    shaped = values.reshape(len(values), *entry.sample_shape)
    dtype = np.dtype(entry.dtype)
    if shaped.dtype == dtype:
        return np.ascontiguousarray(shaped)
    with np.errstate(over="ignore", invalid="ignore"):  # both are found in the result
        cast = shaped.astype(dtype)
    kept = np.array_equal(cast, shaped) if dtype.kind in "iub" else bool(np.isfinite(cast).all())
    if not kept:
        raise UsageError(
            f"{where}: input {entry.name!r} takes {entry.dtype}; the data have fractions or values out of its range"
        )
    return cast
