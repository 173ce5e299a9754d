"""Intake: a delivery becomes jobs for the interpreter, with the duty to settle handed on.

One payload is one job (pictures, tensors), or a sample that completes a window now and then (window.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.errors import InputError, ModelError
from edge_serve.frame import LATEST, Capture, Delivery, Frame, Settle, Window, parse_time
from edge_serve.processing import tensor as tensors
from edge_serve.schema import is_text
from edge_serve.spec import InputSpec

if TYPE_CHECKING:
    from edge_serve.frame import Array
    from edge_serve.processing.image import Geometry, ImageProcessor

# Ids come from outside and go into every result; longer ones are cut off from the start.
MAX_ID_LENGTH = 256


@dataclass(slots=True)
class Job:
    """One run of the model: its inputs, and what its result has to say and to settle."""

    frame: Frame
    inputs: Mapping[str, Array]
    settle: Settle
    geometry: Geometry | None = None
    window: Window | None = None
    key: str | None = None
    error: Exception | None = None
    """Set where it shall not be run, but answered with this."""


class Intake(Protocol):
    """What turns deliveries into jobs. `feed` raises InputError before it takes over the delivery, never after."""

    def feed(self, delivery: Delivery) -> list[Job]:
        """Take a delivery; whoever gets the jobs settles them, the intake settles what is in none."""
        ...

    def spoil(self, jobs: Sequence[Job], nth: int) -> None:
        """Take note that a job is quarantined: what shares samples with it would kill the process as well."""
        ...

    def warm(self) -> None:
        """Pay what only the first payload would cost otherwise."""
        ...

    def tick(self, now: float) -> None:
        """Do what time demands; `now` is monotonic seconds."""
        ...

    def close(self, error: Exception | None) -> None:
        """Let go of everything that is still held and settle it with `error`."""
        ...


class SingleIntake:
    """One payload, one job: pictures and tensors."""

    def __init__(self, spec: InputSpec, inputs: Mapping[str, TensorSpec]) -> None:
        self._spec = spec
        self._tensors = tensors.TensorDecoder(inputs)
        self._image: ImageProcessor | None = None
        self._image_input = ""
        self._raw_bytes = -1
        """The size of a raw tensor that is taken as it is, without a look at all that else it might be; -1: none is."""
        if len(inputs) == 1:
            self._raw_input, raw = next(iter(inputs.items()))
            self._raw_dtype, self._raw_shape = np.dtype(raw.dtype).newbyteorder("<"), raw.shape
            if -1 not in raw.shape and self._raw_dtype.isnative:
                self._raw_bytes = math.prod(raw.shape) * self._raw_dtype.itemsize
        if spec.kind == "image":
            from edge_serve.processing.image import ImageProcessor  # Pillow only where there are pictures

            self._image_input, tensor = next(iter(inputs.items()))
            if len(inputs) != 1:
                raise ModelError(f"kind = image takes a model with one input; this one has {', '.join(inputs)}")
            self._image = ImageProcessor(spec, tensor)

    def feed(self, delivery: Delivery) -> list[Job]:
        """Decode the payload; InputError if it is not what the pipeline takes."""
        frame = delivery.frame
        payload = frame.payload
        if type(payload) is bytes and len(payload) == self._raw_bytes and self._is_raw(payload, frame.content_type):
            array = np.frombuffer(payload, self._raw_dtype).reshape(self._raw_shape)
            return [Job(frame, {self._raw_input: array}, delivery.settle)]
        frame, inputs, geometry = self.decode(delivery.frame)
        return [Job(frame, inputs, delivery.settle, geometry)]

    def _is_raw(self, payload: bytes, declared: str | None) -> bool:
        declared = declared or self._spec.content_type
        return declared == tensors.OCTETS or (not declared and tensors.must_be_raw(payload))

    def decode(self, frame: Frame) -> tuple[Frame, dict[str, Array], Geometry | None]:
        """Give the frame (with the id and time that its payload may say), the model's inputs and the picture's geometry."""
        payload = frame.payload
        if isinstance(payload, np.ndarray):
            if self._image is not None and payload.dtype == np.uint8 and not self._is_input(payload):
                return frame, *self._pixels(payload)
            return frame, self._tensors.from_array(payload), None
        kind = tensors.content_type(payload, frame.content_type, self._spec.content_type)
        if kind in (tensors.JPEG, tensors.PNG):
            if self._image is None:
                raise InputError(
                    f"{kind} does not fit this pipeline: its model takes tensors ({self._tensors.describe()})"
                )
            array, geometry = self._image.decode(payload)
            return frame, {self._image_input: array}, geometry
        if kind == tensors.JSON:
            document = tensors.parse_json(payload)
            frame = labelled(frame, document, self._spec)
            return frame, self._tensors.from_json(document), None
        if kind == tensors.NPY and self._image is not None:
            return self.decode(dataclasses.replace(frame, payload=tensors.read_npy(payload)))
        try:
            return frame, self._tensors.decode(payload, kind), None
        except InputError as error:
            if self._image is None or kind != tensors.OCTETS:
                raise
            raise InputError(f"payload is no JPEG or PNG image, and no raw tensor either: {error}") from error

    def _is_input(self, array: Array) -> bool:
        spec = self._tensors.inputs[self._image_input]
        return spec.dtype == "uint8" and array.shape == spec.shape

    def _pixels(self, array: Array) -> tuple[dict[str, Array], Geometry]:
        assert self._image is not None
        pixels, geometry = self._image.from_pixels(array)
        return {self._image_input: pixels}, geometry

    def spoil(self, jobs: Sequence[Job], nth: int) -> None:
        """No two jobs have anything in common."""

    def warm(self) -> None:
        """Import the decoders of pictures."""
        if self._image is not None:
            from edge_serve.processing.image import pillow

            pillow()

    def tick(self, now: float) -> None:
        """Nothing waits here."""

    def close(self, error: Exception | None) -> None:
        """Nothing is held here."""


def labelled(frame: Frame, document: Any, spec: InputSpec) -> Frame:
    """Give the frame the id and the time of capture that a JSON document says, where the configuration names the fields."""
    if not isinstance(document, Mapping):
        return frame
    if spec.id_field is not None and spec.id_field in document:
        value = document[spec.id_field]
        if (
            not isinstance(value, (str, int))
            or isinstance(value, bool)
            or len(str(value)) > MAX_ID_LENGTH
            or not is_text(str(value))
        ):
            raise InputError(
                f"{spec.id_field!r} (the frame's id) must be text or a whole number of at most {MAX_ID_LENGTH} characters"
            )
        frame = dataclasses.replace(frame, id=str(value))
    if spec.time_field is not None and spec.time_field in document:
        frame = dataclasses.replace(frame, captured=Capture.at(read_time(document[spec.time_field], spec.time_field)))
    return frame


def read_time(value: Any, name: str) -> float:
    """Read a time of capture, RFC 3339 text or seconds since 1970; InputError if it is neither."""
    if isinstance(value, str):
        try:
            return parse_time(value)
        except (ValueError, OverflowError) as error:
            raise InputError(f"{name!r} is no RFC 3339 time with a zone: {value[:40]!r}") from error
    # NaN is not in there, either.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < LATEST:
        return float(value)
    raise InputError(f"{name!r} must be RFC 3339 text or seconds since 1970")
