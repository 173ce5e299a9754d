"""A model's entry points: its native SignatureDefs, else one made up from the tensor names, as TensorFlow Serving does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_serve.bundle import Signature, SignatureTensor, TensorSpec
from edge_serve.errors import ModelError

DEFAULT = "serving_default"


@dataclass(frozen=True, slots=True)
class Binding:
    """One signature bound to the tensors of an interpreter: name → (tensor index, what the tensor is)."""

    key: str
    inputs: dict[str, tuple[int, TensorSpec]]
    outputs: dict[str, tuple[int, TensorSpec]]
    runner: Any | None
    """The interpreter's own runner, for signatures that live outside the primary subgraph; None within it."""

    def describe(self) -> Signature:
        """Give the signature as the manifest writes it."""
        return Signature(
            {name: SignatureTensor(spec.shape, spec.dtype) for name, (_, spec) in self.inputs.items()},
            {name: SignatureTensor(spec.shape, spec.dtype) for name, (_, spec) in self.outputs.items()},
        )


def keys(interpreter: Any) -> list[str]:
    """Give the names of the model's signatures; `serving_default` where the file names none."""
    return sorted(interpreter.get_signature_list()) or [DEFAULT]


def choose(interpreter: Any, wanted: str | None, where: str) -> str:
    """Settle which signature is used; ModelError names the known ones."""
    known = keys(interpreter)
    if wanted is None:
        if DEFAULT in known or len(known) == 1:
            return DEFAULT if DEFAULT in known else known[0]
        raise ModelError(
            f"{where}: has the signatures {', '.join(known)} and none is {DEFAULT}; say which with `signature`"
        )
    if wanted not in known:
        raise ModelError(f"{where}: has no signature {wanted!r}; it has: {', '.join(known)}")
    return wanted


def bind(interpreter: Any, key: str, where: str) -> Binding:
    """Bind a signature to tensor indices."""
    if key not in interpreter.get_signature_list():
        return Binding(key, _made_up(interpreter.get_input_details()), _made_up(interpreter.get_output_details()), None)
    try:
        runner = interpreter.get_signature_runner(key)
    except ValueError as error:
        raise ModelError(f"{where}: signature {key!r} cannot be used ({error})") from error
    primary = getattr(runner, "_subgraph_index", None) == 0
    return Binding(
        key, _named(runner.get_input_details()), _named(runner.get_output_details()), None if primary else runner
    )


def _named(details: Mapping[str, Any]) -> dict[str, tuple[int, TensorSpec]]:
    return {name: (int(detail["index"]), tensor_spec(name, detail)) for name, detail in details.items()}


def _made_up(details: list[dict[str, Any]]) -> dict[str, tuple[int, TensorSpec]]:
    named = {str(detail["name"]).removesuffix(":0"): detail for detail in details}
    return _named(named)


def tensor_spec(name: str, detail: Mapping[str, Any]) -> TensorSpec:
    """Turn one of the interpreter's tensor details into a TensorSpec."""
    shape = detail.get("shape_signature")
    if shape is None or len(shape) == 0:
        shape = detail["shape"]
    parameters = detail["quantization_parameters"]
    scales = parameters["scales"]
    quantized = len(scales) == 1
    dtype = detail["dtype"]
    return TensorSpec(
        name,
        "string" if dtype in (bytes, np.bytes_, np.object_) else np.dtype(dtype).name,
        tuple(int(size) for size in shape),
        float(scales[0]) if quantized else None,
        int(parameters["zero_points"][0]) if quantized else None,
    )
