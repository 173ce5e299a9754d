"""Pictures: JPEG and PNG bytes (or arrays of pixels) become the model's input tensor, and boxes find their way back.

Resizing is Pillow's bilinear filter, which averages when it shrinks. All arithmetic on pixels (scale, mean, std,
quantization) is one look-up of 256 entries a channel, so it costs one pass whatever it says.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.errors import InputError, ModelError, TooLargeError
from edge_serve.processing.tensor import quantize
from edge_serve.spec import InputSpec

if TYPE_CHECKING:
    from PIL import Image

    from edge_serve.frame import Array

DEFAULT_MAX_PIXELS = 50_000_000
FORMATS = ("JPEG", "PNG")
# The gray of a padded border, as detectors are usually trained with.
PAD_VALUE = 114
# Exif 2.32, 4.6.5: the tag, how each of its values is turned upright (names of PIL.Image.Transpose), and those that swap
# width and height.
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
SIDEWAYS = (5, 6, 7, 8)


@cache
def pillow() -> Any:
    """Import Pillow and its decoders: the module PIL.Image. It takes a while, which the start of a service need not wait for."""
    from PIL import Image

    # Our own limit is checked before anything is decoded; Pillow's would warn once at a size of its choosing.
    Image.MAX_IMAGE_PIXELS = None
    Image.preinit()
    return Image


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where a point of the input tensor (0..1 in both directions) lies in the upright picture, in pixels."""

    width: int
    height: int
    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float

    def box(self, x0: float, y0: float, x1: float, y1: float) -> list[float]:
        """Give a box of the tensor as [x0, y0, x1, y1] in input pixels, cut at the picture's edges."""

        def place(value: float, scale: float, offset: float, limit: int) -> float:
            return round(min(max(value * scale + offset, 0.0), float(limit)), 2)

        return [
            place(x0, self.scale_x, self.offset_x, self.width),
            place(y0, self.scale_y, self.offset_y, self.height),
            place(x1, self.scale_x, self.offset_x, self.width),
            place(y1, self.scale_y, self.offset_y, self.height),
        ]


class ImageProcessor:
    """Turns pictures into one input tensor of shape [1, height, width, channels]."""

    def __init__(self, spec: InputSpec, tensor: TensorSpec) -> None:
        self.tensor = tensor
        self.height, self.width, self.channels = _layout(spec, tensor)
        self.color = spec.color or ("gray" if self.channels == 1 else "rgb")
        if (self.color == "gray") != (self.channels == 1):
            raise ModelError(
                f"input {tensor.name!r} has {self.channels} channels, which does not fit color = {self.color!r}"
            )
        self.resize = spec.resize or "stretch"
        self.max_pixels = spec.max_pixels or DEFAULT_MAX_PIXELS
        self._mode = "L" if self.color == "gray" else "RGB"
        self._tables = _look_up_tables(spec, tensor, self.channels)

    def decode(self, payload: bytes | bytearray | memoryview) -> tuple[Array, Geometry]:
        """Decode JPEG or PNG bytes into the tensor; InputError if they are no picture, TooLargeError if it is too big."""
        try:
            picture: Image.Image = pillow().open(io.BytesIO(payload), formats=FORMATS)
        except Exception as error:  # Pillow's parsers raise whatever hostile bytes lead them to
            raise InputError(f"payload is not a JPEG or PNG image ({_reason(error)})") from error
        width, height = picture.size
        if width * height > self.max_pixels:
            raise TooLargeError(f"image of {width}×{height} pixels is over the limit of {self.max_pixels} (max_pixels)")
        try:
            sideways = _orientation(picture) in SIDEWAYS
            # Let a JPEG's decoder itself shrink by 2, 4 or 8: most of a large photo need never be computed.
            size = self._decode_size(height, width)[::-1] if sideways else self._decode_size(width, height)
            picture.draft(self._mode, size)
            picture.load()
            orientation = _orientation(picture)  # PNG may say it behind the pixels
            if orientation in UPRIGHT:
                picture = picture.transpose(pillow().Transpose[UPRIGHT[orientation]])
        except Exception as error:  # as above: a damaged body
            raise InputError(f"image is damaged ({_reason(error)})") from error
        if orientation in SIDEWAYS:
            width, height = height, width
        return self._tensor(picture, width, height)

    def from_pixels(self, array: Array) -> tuple[Array, Geometry]:
        """Take uint8 pixels [H, W], [H, W, C] or [1, H, W, C]; colours in RGB order."""
        pixels = array[0] if array.ndim == 4 and array.shape[0] == 1 else array
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        if (
            pixels.dtype != np.uint8
            or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4)))
            or not pixels.size
        ):
            raise InputError(
                f"array of shape {list(array.shape)} and dtype {array.dtype} is no picture; send uint8 [height, width, channels]"
            )
        if pixels.shape[0] * pixels.shape[1] > self.max_pixels:
            raise TooLargeError(
                f"image of {pixels.shape[1]}×{pixels.shape[0]} pixels is over the limit of {self.max_pixels} (max_pixels)"
            )
        picture = pillow().fromarray(np.ascontiguousarray(pixels))
        return self._tensor(picture, picture.width, picture.height)

    def _decode_size(self, width: int, height: int) -> tuple[int, int]:
        if self.resize == "crop":
            # The shorter side must keep enough pixels for the cut.
            ratio = max(self.width / width, self.height / height)
            return max(1, round(width * ratio)), max(1, round(height * ratio))
        return self.width, self.height

    def _tensor(self, picture: Image.Image, width: int, height: int) -> tuple[Array, Geometry]:
        if picture.mode.startswith("I;16") or picture.mode == "I":
            # Pillow would clip 16-bit gray at 255 instead of scaling it.
            picture = pillow().fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8))
        if picture.mode != self._mode:
            # Transparency plays no part, and Pillow would warn of palettes with it.
            picture.info.pop("transparency", None)
            picture = picture.convert(self._mode)
        fitted, geometry = self._fit(picture, width, height)
        pixels = np.asarray(fitted)
        if self.color == "bgr":
            pixels = pixels[:, :, ::-1]
        return self._look_up(pixels), geometry

    def _fit(self, picture: Image.Image, width: int, height: int) -> tuple[Image.Image, Geometry]:
        target = (self.width, self.height)
        bilinear = pillow().Resampling.BILINEAR
        if self.resize == "stretch":
            resized = picture if picture.size == target else picture.resize(target, bilinear)
            return resized, Geometry(width, height, width, height, 0.0, 0.0)
        pick = min if self.resize == "fit" else max
        ratio = pick(self.width / width, self.height / height)
        if self.resize == "fit":
            inner = (max(1, round(width * ratio)), max(1, round(height * ratio)))
            left, top = (self.width - inner[0]) // 2, (self.height - inner[1]) // 2
            canvas = pillow().new(self._mode, target, PAD_VALUE if self._mode == "L" else (PAD_VALUE,) * 3)
            canvas.paste(picture.resize(inner, bilinear), (left, top))
            ratio_x, ratio_y = inner[0] / width, inner[1] / height
            return canvas, Geometry(
                width, height, self.width / ratio_x, self.height / ratio_y, -left / ratio_x, -top / ratio_y
            )
        cut_width, cut_height = self.width / ratio, self.height / ratio
        left_cut, top_cut = (width - cut_width) / 2, (height - cut_height) / 2
        # A picture that the JPEG decoder shrank has fewer pixels than `width` says.
        shrunk_x, shrunk_y = picture.width / width, picture.height / height
        # Rounding may lead over the edge by a hair, which Pillow refuses.
        region = (
            max(0.0, left_cut * shrunk_x),
            max(0.0, top_cut * shrunk_y),
            min(float(picture.width), (left_cut + cut_width) * shrunk_x),
            min(float(picture.height), (top_cut + cut_height) * shrunk_y),
        )
        resized = picture.resize(target, bilinear, box=region)
        return resized, Geometry(width, height, cut_width, cut_height, left_cut, top_cut)

    def _look_up(self, pixels: Array) -> Array:
        shape = (1, self.height, self.width, self.channels)
        if self._tables is None:
            return np.ascontiguousarray(pixels).reshape(shape)
        if len(self._tables) == 1:
            table: Array = self._tables[0]
            looked_up: Array = table[pixels]
            return looked_up.reshape(shape)
        out = np.empty(shape, self.tensor.dtype)
        for channel, table in enumerate(self._tables):
            out[0, :, :, channel] = table[pixels[:, :, channel]]
        return out


def _orientation(picture: Image.Image) -> int:
    if "exif" not in picture.info:
        return 1
    try:
        said = picture.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  # damaged metadata says nothing about the picture itself
        return 1
    return said if isinstance(said, int) else 1


def _reason(error: Exception) -> str:
    text = str(error)
    return type(error).__name__ if not text or "BytesIO" in text else text


def _layout(spec: InputSpec, tensor: TensorSpec) -> tuple[int, int, int]:
    """Settle height, width and channels from the tensor and the configured size; ModelError if they contradict."""
    shape = tensor.shape
    if len(shape) == 3 and shape[0] in (1, -1):
        shape = (*shape, 1)
    if len(shape) != 4 or shape[3] not in (1, 3) or shape[0] not in (1, -1):
        raise ModelError(
            f"input {tensor.name!r} has shape {list(tensor.shape)}, which is no image tensor [1, height, width, 1 or 3]; "
            'say kind = "tensor" under [pipeline.input]'
        )
    size = spec.size
    if size is not None and len(size) != 2:
        raise ModelError(f"size = {list(size)}: give [height, width]")
    height, width = size or shape[1:3]
    if height == -1 or width == -1:
        raise ModelError(
            f"input {tensor.name!r} has a dynamic size {list(tensor.shape)}; say size = [height, width] under [pipeline.input]"
        )
    if any(have not in (-1, want) for have, want in zip(shape[1:3], (height, width), strict=True)):
        raise ModelError(
            f"size = [{height}, {width}] does not fit the input {tensor.name!r} of shape {list(tensor.shape)}"
        )
    return height, width, shape[3]


def _per_channel(values: tuple[float, ...] | None, default: float, channels: int, name: str) -> list[float]:
    if values is None:
        return [default] * channels
    if len(values) == 1:
        return list(values) * channels
    if len(values) != channels:
        raise ModelError(
            f"{name} has {len(values)} numbers, the input has {channels} channels; give one number or {channels}"
        )
    return list(values)


def _look_up_tables(spec: InputSpec, tensor: TensorSpec, channels: int) -> list[Any] | None:
    """Make the table pixel → tensor value for each channel (one if they are equal); None where pixels pass unchanged."""
    pixels = np.arange(256, dtype=np.float32)
    said = spec.scale is not None or spec.mean is not None or spec.std is not None
    if not said and tensor.dtype == "uint8":
        return None
    if not said and tensor.dtype == "int8":
        return [(np.arange(256) - 128).astype(np.int8)]
    means = _per_channel(spec.mean, 0.0, channels, "mean")
    stds = _per_channel(spec.std, 1.0, channels, "std")
    if any(std == 0 for std in stds):
        raise ModelError("std holds a zero; every channel is divided by it")
    scale = np.float32(1 / 255 if spec.scale is None else spec.scale)
    tables = [
        quantize((pixels * scale - np.float32(mean)) / np.float32(std), tensor)
        for mean, std in zip(means, stds, strict=True)
    ]
    return tables[:1] if all(np.array_equal(table, tables[0]) for table in tables) else tables
