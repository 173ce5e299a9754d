"""Payloads that are tensors (raw bytes, .npy, .npz, JSON), and the step between real numbers and quantized ones.

The rule for values: an array of the tensor's own dtype is taken as it is; all other numbers are real values, which are
quantized where the tensor is.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.errors import InputError, TooLargeError

if TYPE_CHECKING:
    from edge_serve.frame import Array

OCTETS = "application/octet-stream"
NPY = "application/x-npy"
NPZ = "application/x-npz"
JSON = "application/json"
CSV = "text/csv"
JPEG = "image/jpeg"
PNG = "image/png"
KNOWN_TYPES = (JPEG, PNG, JSON, OCTETS, NPY, NPZ, CSV)

_MAGIC = ((b"\xff\xd8\xff", JPEG), (b"\x89PNG\r\n\x1a\n", PNG), (b"\x93NUMPY", NPY), (b"PK\x03\x04", NPZ))
_JSON_STARTS = frozenset(b"[{-0123456789 \t\r\n")
# Whatever begins otherwise is none of them.
_TELLING = _JSON_STARTS | {magic[0] for magic, _ in _MAGIC}
# Unpacked .npz members may be this many times as large as the payload; real sensor data packs far less well.
MAX_NPZ_RATIO = 100
# And never more than the largest payload that can be configured.
MAX_NPZ_BYTES = 256 * 1024 * 1024


def content_type(payload: bytes | bytearray | memoryview, declared: str | None, configured: str | None) -> str:
    """Settle what a payload is: what it was declared as, else the configuration, else its first bytes.

    Raises InputError for a type that edge-serve does not read.
    """
    for said in (declared, configured):
        if said:
            kind = said.split(";", 1)[0].strip().lower()
            if kind not in KNOWN_TYPES:
                raise InputError(f"content type {kind!r} is not supported; send one of {', '.join(KNOWN_TYPES)}")
            return kind
    if payload and must_be_raw(payload):
        return OCTETS
    head = bytes(payload[:8])
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    return JSON if head and head[0] in _JSON_STARTS and _is_text(payload) else OCTETS


def must_be_raw(payload: bytes | bytearray | memoryview) -> bool:
    """Say whether the first byte of a payload already rules out all but a raw tensor."""
    return payload[0] not in _TELLING


def _is_text(payload: bytes | bytearray | memoryview) -> bool:
    """Tell text from a raw tensor by its first bytes: JSON has no control characters outside white space."""
    return all(byte >= 0x20 or byte in b"\t\r\n" for byte in bytes(payload[:64]))


def parse_json(payload: bytes | bytearray | memoryview) -> Any:
    """Decode JSON text; InputError says where it breaks."""
    try:
        return json.loads(bytes(payload))
    except UnicodeDecodeError as error:
        raise InputError(f"payload is not JSON: it is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise InputError("payload is JSON that is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"payload is not JSON: {error}") from error


def read_npy(payload: bytes | bytearray | memoryview) -> Array:
    """Read one .npy array without copying it; InputError if it is not one, holds objects, or its length is wrong."""
    stream = io.BytesIO(payload)
    try:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(stream)
    except Exception as error:  # numpy evaluates the header as Python and raises whatever hostile bytes lead it to
        raise InputError(f"payload is not a .npy array: {error}") from error
    if any(type(size) is not int or size < 0 for size in shape):
        raise InputError(f"payload is not a .npy array: its header says the shape {list(shape)}")
    if dtype.hasobject or dtype.kind not in "biuf":
        raise InputError(f".npy array of dtype {dtype} is not supported; send numbers")
    count = math.prod(shape)
    present = len(payload) - stream.tell()
    if count * dtype.itemsize != present:
        raise InputError(
            f".npy array of shape {list(shape)} and dtype {dtype} needs {count * dtype.itemsize} bytes, {present} are there"
        )
    array = np.frombuffer(payload, dtype, count, stream.tell())
    try:
        return array.reshape(shape, order="F" if fortran else "C")
    except ValueError as error:  # more dimensions than numpy has, or an empty array of an impossible size
        raise InputError(f".npy array of {len(shape)} dimensions is not supported: {error}") from error


def read_npz(payload: bytes | bytearray | memoryview) -> dict[str, Array]:
    """Read the arrays of an .npz file; InputError if it is not one, TooLargeError if it unpacks to far more than it is."""
    import zipfile  # with what it imports the slowest of the formats, and the rarest

    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            if unpacked > min(MAX_NPZ_RATIO * len(payload), MAX_NPZ_BYTES):
                raise TooLargeError(f".npz of {len(payload)} bytes would unpack to {unpacked} bytes")
            # What numpy writes; of other methods zipfile unpacks everything at once, and the stated size may be a lie.
            if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
                raise InputError(".npz file is packed in an unusual way; write it with numpy.savez_compressed")
            arrays = {}
            for member in members:
                with archive.open(member) as stream:
                    arrays[member.filename.removesuffix(".npy")] = read_npy(stream.read(member.file_size))
            return arrays
    except InputError:
        raise
    except Exception as error:  # zipfile and the decompressors raise whatever hostile bytes lead them to
        raise InputError(f"payload is not an .npz file: {error}") from error


def quantize(values: Array, spec: TensorSpec) -> Array:
    """Turn real values into the tensor's integers, q = round(x / scale) + zero_point, saturated; shape is kept.

    Affine quantization as in the TFLite 8-bit specification; halves round to even. InputError if a value is not finite.
    """
    if spec.scale is None or spec.zero_point is None:
        return values.astype(spec.dtype)
    if not np.isfinite(values).all():
        raise InputError(f"input {spec.name!r} holds NaN or infinite values, which a quantized model cannot take")
    with np.errstate(over="ignore"):  # what is too large for float32 is saturated below
        scaled = values.astype(np.float32) / np.float32(spec.scale)
    limits = np.iinfo(spec.dtype)
    np.rint(scaled, out=scaled)
    scaled += spec.zero_point
    return np.clip(scaled, limits.min, limits.max, out=scaled).astype(spec.dtype)


def dequantize(array: Array, spec: TensorSpec) -> Array:
    """Turn a tensor's integers into real values, float32, (q - zero_point) * scale; other tensors pass as they are."""
    if spec.scale is None or spec.zero_point is None or array.dtype.kind == "f":
        return array
    return (array.astype(np.float32) - np.float32(spec.zero_point)) * np.float32(spec.scale)


def fit(array: Array, spec: TensorSpec) -> Array:
    """Give an array the tensor's shape and dtype: contiguous, quantized if need be.

    Dimensions of 1 may be missing or added, and a flat list of the right length is taken; anything else is an
    InputError with the shape that was expected and the one that came.
    """
    shaped = _reshape(array, spec)
    if shaped.dtype == np.dtype(spec.dtype):
        return np.asarray(shaped, order="C")
    if spec.scale is not None:
        return quantize(shaped, spec)
    if shaped.dtype.kind == "f" and spec.dtype != "bool" and np.dtype(spec.dtype).kind in "iu":
        with np.errstate(invalid="ignore"):
            whole = shaped.astype(spec.dtype)
            same = np.array_equal(whole, shaped)
        if not same:
            raise InputError(
                f"input {spec.name!r} takes {spec.dtype}; the values have fractions or are out of its range"
            )
        return np.asarray(whole, order="C")
    if np.dtype(spec.dtype).kind in "iu" and shaped.size:
        limits = np.iinfo(spec.dtype)
        if int(shaped.min()) < limits.min or int(shaped.max()) > limits.max:
            raise InputError(
                f"input {spec.name!r} takes {spec.dtype} ({limits.min}..{limits.max}); a value is out of that range"
            )
    with np.errstate(over="ignore", invalid="ignore"):  # a signalling NaN stays one
        cast = shaped.astype(spec.dtype, order="C")
    if cast.dtype.kind == "f" and not np.isfinite(cast).all() and np.isfinite(shaped).all():
        raise InputError(f"input {spec.name!r} takes {spec.dtype}; a value is too large for that")
    return cast


def _reshape(array: Array, spec: TensorSpec) -> Array:
    wanted = spec.shape
    if not array.size:
        raise InputError(f"input {spec.name!r}: the payload has shape {list(array.shape)}, which holds no values")
    if len(array.shape) == len(wanted) and all(
        want in (-1, have) for want, have in zip(wanted, array.shape, strict=True)
    ):
        return array
    concrete = tuple(1 if size == -1 else size for size in wanted)
    if len(array.shape) == len(wanted) - 1 and wanted[0] in (1, -1):
        batched = array[np.newaxis]
        if all(want in (-1, have) for want, have in zip(wanted, batched.shape, strict=True)):
            return batched
    same_apart_from_ones = [size for size in array.shape if size != 1] == [size for size in concrete if size != 1]
    if same_apart_from_ones or (array.ndim == 1 and array.size == math.prod(concrete)):
        return array.reshape(concrete)
    expected = [size if size != -1 else "any" for size in wanted]
    raise InputError(
        f"input {spec.name!r} takes shape {expected} and dtype {spec.dtype}; the payload has shape {list(array.shape)}"
    )


def from_bytes(payload: bytes | bytearray | memoryview, spec: TensorSpec) -> Array:
    """Read a raw little-endian tensor of exactly the input's size; a dynamic batch may be any whole number."""
    dtype, fixed, dynamic = _layout(spec.dtype, spec.shape)
    if dynamic > 1 or len(payload) == 0 or (len(payload) != fixed if dynamic == 0 else len(payload) % fixed):
        size = f"{fixed} bytes" if dynamic == 0 else f"a multiple of {fixed} bytes"
        raise InputError(
            f"input {spec.name!r} takes {size} (shape {list(spec.shape)}, {spec.dtype}, little-endian); the payload has {len(payload)}"
        )
    return np.frombuffer(payload, dtype).reshape(spec.shape).astype(spec.dtype, copy=False)


@lru_cache
def _layout(name: str, shape: tuple[int, ...]) -> tuple[np.dtype[Any], int, int]:
    """Give an input's dtype as little-endian, its bytes (of one step of the dynamic dimension) and its dynamic dimensions."""
    dtype = np.dtype(name).newbyteorder("<")
    return dtype, math.prod(size for size in shape if size != -1) * dtype.itemsize, shape.count(-1)


def from_numbers(value: Any, spec: TensorSpec) -> Array:
    """Turn nested JSON lists into an array; InputError if they are ragged or hold anything but numbers."""
    try:
        array = np.array(value) if holds_numbers(value) else None
    except ValueError as error:
        raise InputError(
            f"input {spec.name!r}: lists of unequal length; the model takes shape {list(spec.shape)}"
        ) from error
    if array is None or array.dtype.kind not in "biuf":
        raise InputError(
            f"input {spec.name!r} takes numbers of shape {list(spec.shape)}; the payload holds something else"
        )
    return fit(array, spec)


def holds_numbers(value: Any) -> bool:
    """Say whether nested lists hold numbers only.

    numpy must not be asked: of one long text and many short ones it makes an array with room for the longest in each
    place, gigabytes from a payload of megabytes.
    """
    level: Sequence[Any] = [value]
    while (kinds := set(map(type, level))) <= {list, tuple}:
        if not level:
            return True
        level = list(chain.from_iterable(level))
    return kinds <= {int, float, bool}


class TensorDecoder:
    """Turns tensor payloads into the model's inputs."""

    def __init__(self, inputs: Mapping[str, TensorSpec]) -> None:
        self.inputs = dict(inputs)
        self._only = next(iter(self.inputs)) if len(self.inputs) == 1 else None

    def decode(self, payload: bytes | bytearray | memoryview, kind: str) -> dict[str, Array]:
        """Decode bytes of a content type; InputError if it is no tensor or fits no input."""
        if kind == JSON:
            return self.from_json(parse_json(payload))
        if kind == NPZ:
            return self.from_named(read_npz(payload))
        if kind not in (OCTETS, NPY):
            raise InputError(f"{kind} does not fit this pipeline: its model takes tensors ({self.describe()})")
        if self._only is None:
            raise InputError(
                f'the model has several inputs ({self.describe()}): send .npz or JSON {{"inputs": {{name: …}}}}'
            )
        spec = self.inputs[self._only]
        return {self._only: from_bytes(payload, spec) if kind == OCTETS else fit(read_npy(payload), spec)}

    def from_array(self, array: Array) -> dict[str, Array]:
        """Take an array that is already in memory."""
        if self._only is None:
            raise InputError(f"the model has several inputs: {self.describe()}")
        return {self._only: fit(array, self.inputs[self._only])}

    def from_json(self, document: Any) -> dict[str, Array]:
        """Read a nested list, {name: list} or {"inputs": …}."""
        if isinstance(document, dict) and "inputs" in document and "inputs" not in self.inputs:
            document = document["inputs"]
        if isinstance(document, dict):
            return self.from_named({name: value for name, value in document.items() if name in self.inputs})
        if self._only is None:
            raise InputError(f'the model has several inputs; send {{"inputs": {{name: …}}}} with {self.describe()}')
        return {self._only: from_numbers(document, self.inputs[self._only])}

    def from_named(self, values: Mapping[str, Any]) -> dict[str, Array]:
        """Read values by input name; every input must be there."""
        missing = [name for name in self.inputs if name not in values]
        if missing:
            raise InputError(
                f"payload lacks the input {', '.join(map(repr, missing))}; the model takes {self.describe()}"
            )
        return {
            name: fit(values[name], spec) if isinstance(values[name], np.ndarray) else from_numbers(values[name], spec)
            for name, spec in self.inputs.items()
        }

    def describe(self) -> str:
        """Say what the model takes, in one line."""
        return ", ".join(f"{name}: {spec.dtype} {list(spec.shape)}" for name, spec in self.inputs.items())
