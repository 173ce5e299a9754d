"""What belongs together in two models: inputs and outputs by name, else by position; classes by their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.errors import UsageError
from edge_serve_converters.plan import InputPlan, Shape, SignaturePlan
from edge_serve_converters.source import Source
from edge_serve_converters.store import Array

_SAME_SHAPE = (
    ": convert both to one shape (convert --input-shape NAME=1,…). Only pictures may differ in size: "
    "with a folder of them as --data each model resizes them itself"
)


def pair(
    role: str, reference: Mapping[str, TensorSpec], other: Mapping[str, TensorSpec], *, shapes: bool = True
) -> dict[str, str]:
    """Give reference name → other name; `shapes` False lets shapes differ, for pictures that each model resizes itself.

    Names that are all the same decide; else the position does, if there are as many and their shapes are equal (an open
    dimension equals any). UsageError says what differs.
    """
    if set(reference) == set(other):
        wrong = [name for name in reference if shapes and not fits(reference[name].shape, other[name].shape)]
        if wrong:
            told = "; ".join(
                f"{name!r} is {_shape(reference[name])} in A and {_shape(other[name])} in B" for name in wrong
            )
            raise UsageError(
                f"the {role} have different shapes: {told}; only models that take and give the same can be compared"
                + (_SAME_SHAPE if role == "inputs" else "")
            )
        return {name: name for name in reference}
    matched = dict(zip(reference, other, strict=False))
    if len(reference) != len(other) or not all(
        (not shapes or fits(reference[name].shape, other[partner].shape)) for name, partner in matched.items()
    ):
        raise UsageError(
            f"the {role} differ: A has {_listed(reference)}; B has {_listed(other)}. "
            "They are matched by name, or by position where all shapes are equal"
            + (_SAME_SHAPE if role == "inputs" else "")
        )
    return matched


def check_pictures(data: Path, sides: Sequence[tuple[str, Mapping[str, TensorSpec]]]) -> None:
    """Check that models take pictures, [1, height, width] or [1, height, width, 1 or 3]; `sides` has name and inputs of each.

    UsageError says which does not, and what each of them takes.
    """
    for name, inputs in sides:
        spec = next(iter(inputs.values()))
        picture = len(spec.shape) in (3, 4) and spec.shape[0] in (-1, 1) and (*spec.shape, 1)[3] in (1, 3)
        if len(inputs) != 1 or not picture:
            told = "; ".join(f"{side} takes {_listed(taken)}" for side, taken in sides)
            raise UsageError(
                f"{data}: holds pictures, and {name} takes none: {told}. Compare models that both take pictures, "
                "or give what both take as an .npz, .npy or .csv file"
            )


def fits(one: Sequence[int], other: Sequence[int]) -> bool:
    """Tell whether two shapes can be equal; -1 is any size."""
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))


def _shape(spec: TensorSpec) -> str:
    return f"[{', '.join('?' if size == -1 else str(size) for size in spec.shape)}]"


def _listed(tensors: Mapping[str, TensorSpec]) -> str:
    return ", ".join(f"{name!r} {_shape(spec)}" for name, spec in tensors.items())


def plan(
    side: str,
    key: str,
    inputs: Mapping[str, TensorSpec],
    names: Mapping[str, str],
    outputs: Mapping[str, TensorSpec],
    source: Source,
) -> SignaturePlan:
    """Settle the shapes of a file's inputs; `names` gives each input's name in the data → its name in the file.

    The plan has the data's names, in their order. Open dimensions are filled from the data, those of pictures
    from the manifest's size. UsageError if they do not say.
    """
    entries = []
    for called, name in names.items():
        spec = inputs[name]
        sample = source.hint(key, called)
        shape, batched = list(spec.shape), _is_batched(spec.shape, sample)
        if batched and shape[0] == -1:
            shape[0] = 1
        offset = 1 if batched else 0
        if sample is not None and len(sample) == len(shape) - offset:
            shape[offset:] = [have if have != -1 else want for have, want in zip(shape[offset:], sample, strict=True)]
        size = source.spec.size
        if size is not None and len(size) == 2 and len(shape) == 4:
            shape[1:3] = [have if have != -1 else want for have, want in zip(shape[1:3], size, strict=True)]
        if -1 in shape:
            raise UsageError(
                f"{side}: input {name!r} has the dynamic shape {_shape(spec)}, and the data do not say what is meant; "
                "convert the model with --input-shape, or give samples as an .npz"
            )
        # A quantized tensor is real numbers to whoever feeds it.
        dtype = spec.dtype if spec.scale is None else "float32"
        entries.append(InputPlan(called, dtype, tuple(shape), batched))
    return SignaturePlan(key, tuple(entries), {name: spec.dtype for name, spec in outputs.items()})


def _is_batched(shape: Shape, sample: Shape | None) -> bool:
    """Tell whether the first dimension counts samples: it is open or 1, or the data's samples lack just that one."""
    if not shape:
        return False
    if shape[0] in (-1, 1):
        # One lone open dimension may be a signal of any length, if that is what a sample is.
        return not (len(shape) == 1 and sample is not None and len(sample) == 1)
    return sample is not None and fits(shape[1:], sample)


def batch_of(signature: SignaturePlan) -> int:
    """Give how many samples one run takes."""
    return max((entry.shape[0] for entry in signature.inputs if entry.batched), default=1)


def grouped(samples: Mapping[str, Array], signature: SignaturePlan, names: Mapping[str, str]) -> dict[str, Array]:
    """Give samples [n, *sample_shape] as runs [n / batch, *shape] under the file's own names."""
    batch = batch_of(signature)
    runs = {}
    for entry in signature.inputs:
        array = samples[entry.name]
        whole = len(array) // batch
        runs[names[entry.name]] = (
            array[: whole * batch].reshape(whole, *entry.shape) if entry.batched else array[: whole * batch : batch]
        )
    return runs


def class_order(reference: Sequence[str] | None, other: Sequence[str] | None) -> tuple[Array | None, str | None]:
    """Give the order in which the other's classes must be taken to be the reference's, and what the person should know.

    None and None if they are in order already. Where the labels themselves differ the index decides, and the note says so.
    """
    if reference is None or other is None or tuple(reference) == tuple(other):
        return None, None
    if set(reference) == set(other) and len(set(reference)) == len(reference) == len(other):
        places = {label: place for place, label in enumerate(other)}
        order = np.array([places[label] for label in reference])
        return order, "has its classes in another order than A; they were matched by their labels"
    told = [
        f"only {side} has {', '.join(map(repr, missing[:5]))}"
        for side, one, two in (("A", reference, other), ("B", other, reference))
        if (missing := [label for label in one if label not in set(two)])
    ]
    return None, f"has other labels than A ({'; '.join(told) or 'some repeat'}); classes were matched by their index"
