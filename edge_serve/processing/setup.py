"""What a model's inputs and outputs mean, in the end: the manifest, what the configuration says over it, the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edge_serve.bundle import TensorSpec, read_labels
from edge_serve.errors import BundleError, ModelError
from edge_serve.frame import ModelInfo
from edge_serve.health import Counters
from edge_serve.model.delegate import Runnable
from edge_serve.model.repository import ModelVersion
from edge_serve.processing.decode import make_decoder
from edge_serve.processing.intake import Intake, SingleIntake
from edge_serve.schema import merge
from edge_serve.spec import InputSpec, OutputSpec

if TYPE_CHECKING:
    from edge_serve.processing.decode import Decoder

# Smaller "pictures" are rather matrices of something else.
SMALLEST_IMAGE = 8


@dataclass(frozen=True, slots=True)
class Meaning:
    """The settled specifications of one model in one pipeline."""

    input: InputSpec
    output: OutputSpec
    labels: tuple[str, ...] | None

    def decoder(self, engine: Runnable) -> Decoder:
        """Make the function from output tensors to the result's body."""
        return make_decoder(self.output, engine.outputs, self.labels, engine.detection_outputs)

    def intake(self, engine: Runnable, counters: Counters, hold_limit: int | None) -> Intake:
        """Make what turns deliveries into jobs."""
        # Classes and boxes are of one input: a batch is refused before the model has run (and grown) for it.
        inputs = engine.inputs if self.output.type == "tensor" else _one_each(engine.inputs)
        if self.input.kind == "window":
            from edge_serve.processing.window import WindowIntake  # csv and more, only where there are windows

            return WindowIntake(self.input, inputs, counters, hold_limit)
        return SingleIntake(self.input, inputs)


def settle(
    version: ModelVersion, engine: Runnable, over_input: InputSpec, over_output: OutputSpec, folder: Path
) -> Meaning:
    """Lay the configuration's words over the manifest's, and let the tensors say the rest.

    `folder` is what a labels_file is relative to. ModelError or BundleError if it does not fit together.
    """
    inputs = merge(version.input, over_input)
    outputs = merge(version.output, over_output)
    labels = version.labels
    if over_output.labels is not None:
        labels = over_output.labels
    elif over_output.labels_file is not None:
        try:
            labels = read_labels(folder / over_output.labels_file)
        except BundleError as error:
            raise ModelError(str(error)) from error
    if inputs.kind is None:
        inputs = replace(inputs, kind="image" if _looks_like_an_image(engine.inputs) else "tensor")
    if outputs.type is None:
        scores = labels is not None or outputs.top_k is not None or outputs.activation is not None
        kind = "detection" if engine.detection_outputs else "classification" if scores else "tensor"
        outputs = replace(outputs, type=kind)  # type: ignore[arg-type]  # one of the three
    return Meaning(inputs, outputs, labels)


def _one_each(inputs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Give the inputs with a dynamic batch fixed to 1; the only dimension of a tensor is no batch."""
    return {
        name: replace(spec, shape=(1, *spec.shape[1:])) if len(spec.shape) > 1 and spec.shape[0] == -1 else spec
        for name, spec in inputs.items()
    }


def _looks_like_an_image(inputs: Mapping[str, TensorSpec]) -> bool:
    if len(inputs) != 1:
        return False
    shape = next(iter(inputs.values())).shape
    return len(shape) == 4 and shape[3] in (1, 3) and min(shape[1:3]) >= SMALLEST_IMAGE


def model_info(version: ModelVersion, engine: Runnable, variant: str | None = None) -> ModelInfo:
    """Say which model a result is of, and what it runs on; `variant` where another one than was asked for stands in."""
    return ModelInfo(version.name, version.version, variant or version.variant, engine.delegate, engine.signature)
