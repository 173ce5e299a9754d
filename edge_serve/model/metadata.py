"""What a .tflite file says of itself: TFLite Metadata becomes the specification of its inputs and outputs, and labels.

Schema: TFLite Metadata's metadata_schema.fbs 1.5 (file identifier M001), a buffer that the model's metadata entry
TFLITE_METADATA names; its associated files are a ZIP at the file's end. What that schema has no word for (windows,
resizing, top_k, …) stands in its list of custom metadata under EDGE_SERVE: JSON, {"format": 1, "input": …, "output": …},
with the fields of InputSpec and OutputSpec; labels_file is one of the associated files. Where that is present it is
preferred.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from edge_serve.bundle import MAX_LABELS_BYTES, TensorSpec
from edge_serve.errors import ModelError, Problem
from edge_serve.model import layout
from edge_serve.model.associated import Archive, open_archive
from edge_serve.model.flatbuffer import ByteSource, FileSource, Source, Table
from edge_serve.schema import is_text, read
from edge_serve.spec import InputSpec, OutputSpec

T = TypeVar("T")
Content = Literal["features", "image", "boxes", "audio"]

ENTRY = "TFLITE_METADATA"
IDENTIFIER = b"M001"
CUSTOM = "EDGE_SERVE"
CUSTOM_FORMAT = 1

# Field numbers of metadata_schema.fbs.
MODEL_NAME, MODEL_DESCRIPTION, MODEL_VERSION, MODEL_SUBGRAPHS, MODEL_AUTHOR, MODEL_MIN_PARSER = 0, 1, 2, 3, 4, 7
SUBGRAPH_INPUTS, SUBGRAPH_OUTPUTS, SUBGRAPH_OUTPUT_GROUPS, SUBGRAPH_CUSTOM = 2, 3, 8, 9
TENSOR_NAME, TENSOR_DESCRIPTION, TENSOR_CONTENT, TENSOR_UNITS, TENSOR_STATS, TENSOR_FILES = 0, 1, 3, 4, 5, 6
CONTENT_TYPE, CONTENT_PROPERTIES, CONTENT_RANGE = 0, 1, 2
IMAGE_COLOR, IMAGE_SIZE = 0, 1
SIZE_WIDTH, SIZE_HEIGHT = 0, 1
BOX_INDEX, BOX_TYPE, BOX_COORDINATES = 0, 1, 2
UNIT_TYPE, UNIT_OPTIONS = 0, 1
NORMALIZATION_MEAN, NORMALIZATION_STD = 0, 1
THRESHOLD = 0
STATS_MAX, STATS_MIN = 0, 1
FILE_NAME, FILE_DESCRIPTION, FILE_TYPE = 0, 1, 2
GROUP_NAME, GROUP_TENSORS = 0, 1
CUSTOM_NAME, CUSTOM_DATA = 0, 1

# Union members and enumerations.
CONTENTS: dict[int, Content] = {1: "features", 2: "image", 3: "boxes", 4: "audio"}
COLORS: dict[int, Literal["rgb", "gray"]] = {1: "rgb", 2: "gray"}
UNIT_NORMALIZATION, UNIT_CALIBRATION, UNIT_THRESHOLDING = 1, 2, 3
AXIS_LABELS, VALUE_LABELS = 2, 3
BOX_BOUNDARIES, COORDINATES_RATIO = 1, 0
# Where left, top, right and bottom stand in ymin, xmin, ymax, xmax, which is what our detector reads.
BOX_ORDER = (1, 0, 3, 2)

# The names by which readers of TFLite Metadata find a detector's outputs.
DETECTION_NAMES = {"location": "boxes", "category": "classes", "score": "scores", "number of detections": "count"}

# A few kilobytes are usual.
MAX_METADATA_BYTES = 1024 * 1024
MAX_TENSORS = layout.MAX_ENDS
MAX_UNITS = 16
MAX_FILES = 16
MAX_CUSTOM = 16
MAX_VALUES = 1024
MAX_SIDE = 16384
# Normalized pixels and the tensor's own range must have this part of each in common, or they do not belong together.
COMMON_RANGE = 0.5


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What the metadata says of one input or output."""

    name: str | None = None
    description: str | None = None
    content: Content | None = None
    color: Literal["rgb", "gray"] | None = None
    size: tuple[int, int] | None = None
    """Height and width of a picture whose tensor does not fix them."""
    mean: tuple[float, ...] = ()
    """In units of the pixels 0..255: a value is (pixel - mean) / std."""
    std: tuple[float, ...] = ()
    minimum: tuple[float, ...] = ()
    maximum: tuple[float, ...] = ()
    threshold: float | None = None
    calibrated: bool = False
    """Scores would have to be calibrated, which edge-serve does not do."""
    axis_labels: str | None = None
    """File with a label for each place of the last axis."""
    value_labels: str | None = None
    """File with a label for each value of the tensor."""
    our_boxes: bool = False
    """Boxes are ymin, xmin, ymax, xmax in 0..1."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a file says: the facts, and what they mean for a pipeline."""

    name: str | None = None
    description: str | None = None
    version: str | None = None
    author: str | None = None
    inputs: tuple[TensorFacts, ...] = ()
    outputs: tuple[TensorFacts, ...] = ()
    input: InputSpec = field(default_factory=InputSpec)
    output: OutputSpec = field(default_factory=OutputSpec)
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    """What was left out and why, for the log."""


def read_metadata(source: Path | bytes) -> Found | None:
    """Read the metadata of a .tflite file; None if it has none, or is no model (the runtime is who says that).

    Reads a few small pieces of the file. ModelError if the metadata are there and damaged, or the file cannot be read.
    """
    if isinstance(source, bytes):
        return _read(ByteSource(source), "the model")
    try:
        with source.open("rb", buffering=0) as stream:
            return _read(FileSource(stream), str(source))
    except OSError as error:
        raise ModelError(
            f"{source}: cannot be read ({error.strerror or error}); check the path and the permissions"
        ) from error


def _read(source: Source, where: str) -> Found | None:
    try:
        model = layout.open_model(source)
        found = layout.entries(model, ENTRY)
        if not found:
            return None
        inputs, outputs = layout.ends(model)
    except ValueError:
        return None
    try:
        data = layout.buffer(model, found[0][1]).data(layout.BUFFER_DATA, MAX_METADATA_BYTES)
        if len(data) < 8 or data[4:8] != IDENTIFIER:
            return None
        return _interpret(Table.root(ByteSource(data)), inputs, outputs, open_archive(source))
    except ValueError as error:
        raise ModelError(
            f"{where}: its metadata are damaged ({error}); copy the model again, or convert it again with `edge-serve convert`"
        ) from error


def _interpret(root: Table, inputs: list[TensorSpec], outputs: list[TensorSpec], archive: Archive | None) -> Found:
    subgraphs = root.tables(MODEL_SUBGRAPHS, MAX_TENSORS)
    facts: list[tuple[TensorFacts, ...]] = [(), ()]
    notes: list[str] = []
    specs = None
    if subgraphs:
        facts = [
            tuple(_facts(tensor) for tensor in subgraphs[0].tables(slot, MAX_TENSORS))
            for slot in (SUBGRAPH_INPUTS, SUBGRAPH_OUTPUTS)
        ]
        specs = _custom(subgraphs[0], notes)
    if specs is not None:
        spec_in, spec_out = specs
        labels = spec_out.labels if spec_out.labels is not None else _labels(archive, spec_out.labels_file, notes)
        spec_out = replace(spec_out, labels=None, labels_file=None)
    else:
        spec_in = _input(facts[0], inputs, notes)
        spec_out, labels = _output(facts[1], outputs, archive, notes)
    return Found(
        root.text(MODEL_NAME),
        root.text(MODEL_DESCRIPTION),
        root.text(MODEL_VERSION),
        root.text(MODEL_AUTHOR),
        facts[0],
        facts[1],
        spec_in,
        spec_out,
        labels,
        tuple(notes),
    )


def _facts(tensor: Table) -> TensorFacts:
    values: dict[str, Any] = {"name": tensor.text(TENSOR_NAME), "description": tensor.text(TENSOR_DESCRIPTION)}
    content = tensor.table(TENSOR_CONTENT)
    properties = None if content is None else content.table(CONTENT_PROPERTIES)
    if content is not None and properties is not None:
        values["content"] = CONTENTS.get(content.whole(CONTENT_TYPE, "B"))
        if values["content"] == "image":
            values.update(_image(properties))
        elif values["content"] == "boxes":
            values["our_boxes"] = (
                properties.numbers(BOX_INDEX, "I", 4) == BOX_ORDER
                and properties.whole(BOX_TYPE, "b") == BOX_BOUNDARIES
                and properties.whole(BOX_COORDINATES, "b") == COORDINATES_RATIO
            )
    for unit in tensor.tables(TENSOR_UNITS, MAX_UNITS):
        kind, options = unit.whole(UNIT_TYPE, "B"), unit.table(UNIT_OPTIONS)
        if options is None:
            continue
        if kind == UNIT_NORMALIZATION:
            values["mean"] = _floats(options, NORMALIZATION_MEAN)
            values["std"] = _floats(options, NORMALIZATION_STD)
        elif kind == UNIT_THRESHOLDING:
            threshold = float(options.scalar(THRESHOLD, "f"))
            values["threshold"] = threshold if math.isfinite(threshold) else None
        elif kind == UNIT_CALIBRATION:
            values["calibrated"] = True
    stats = tensor.table(TENSOR_STATS)
    if stats is not None:
        values["minimum"], values["maximum"] = _floats(stats, STATS_MIN), _floats(stats, STATS_MAX)
    files = {AXIS_LABELS: "axis_labels", VALUE_LABELS: "value_labels"}
    for file in tensor.tables(TENSOR_FILES, MAX_FILES):
        role = files.get(file.whole(FILE_TYPE, "b"))
        # Of several the first is the default; the others are translations.
        if role is not None and role not in values:
            values[role] = file.text(FILE_NAME)
    return TensorFacts(**values)


def _image(properties: Table) -> dict[str, Any]:
    size = properties.table(IMAGE_SIZE)
    sides = None if size is None else (size.whole(SIZE_HEIGHT, "I"), size.whole(SIZE_WIDTH, "I"))
    return {
        "color": COLORS.get(properties.whole(IMAGE_COLOR, "b")),
        "size": sides if sides is not None and all(0 < side <= MAX_SIDE for side in sides) else None,
    }


def _floats(table: Table, slot: int) -> tuple[float, ...]:
    return tuple(float(value) for value in table.numbers(slot, "f", MAX_VALUES))


def _input(facts: tuple[TensorFacts, ...], tensors: list[TensorSpec], notes: list[str]) -> InputSpec:
    """Give the input's specification. Only pictures have one: other tensors are taken as they come."""
    if len(facts) != 1 or len(tensors) != 1 or facts[0].content != "image":
        return InputSpec()
    said, tensor = facts[0], tensors[0]
    shape = tensor.shape
    if len(shape) != 4 or shape[0] not in (1, -1) or shape[3] not in (1, 3):
        notes.append(f"input {tensor.name!r} of shape {list(shape)} is said to be a picture, and is taken as a tensor")
        return InputSpec()
    channels = shape[3]
    spec = InputSpec(
        kind="image",
        color=said.color if said.color is not None and (said.color == "gray") == (channels == 1) else None,
        size=said.size if -1 in shape[1:3] else None,
    )
    reason = _unfit(said, tensor, channels)
    if reason is not None:
        notes.append(f"mean and std of input {tensor.name!r} are left out: {reason}")
        return spec
    return replace(spec, scale=1.0, mean=said.mean, std=said.std) if said.mean else spec


def _unfit(said: TensorFacts, tensor: TensorSpec, channels: int) -> str | None:
    """Say why a normalization cannot be used; None if it can, or there is none.

    Quantized models share the normalization of the float model that they were made of: the tensor's quantization is applied
    to the normalized values, as the schema says and as processing/image.py does. Some files carry numbers that do not
    belong to their integers, because readers that copy 8-bit pixels unchanged never looked at them.
    """
    if not said.mean and not said.std:
        return None
    if len(said.mean) not in (1, channels) or len(said.std) not in (1, channels):
        return f"they have {len(said.mean)} and {len(said.std)} numbers for {channels} channels"
    if not all(map(math.isfinite, said.mean + said.std)) or not all(std > 0 for std in said.std):
        return "they hold a number that nothing can be divided by, or none at all"
    if tensor.dtype not in ("uint8", "int8"):
        return None
    if tensor.scale is None or tensor.zero_point is None:
        return f"the tensor is {tensor.dtype} without a quantization, so it takes the pixels"
    lowest, highest = (0, 255) if tensor.dtype == "uint8" else (-128, 127)
    first, last = ((end - tensor.zero_point) * tensor.scale for end in (lowest, highest))
    for channel in range(channels):
        mean, std = said.mean[channel % len(said.mean)], said.std[channel % len(said.std)]
        low, high = (0 - mean) / std, (255 - mean) / std
        common = min(high, last) - max(low, first)
        if not common >= COMMON_RANGE * max(high - low, last - first):
            return f"they lead to {low:g}..{high:g} and the tensor holds {first:g}..{last:g}, so it takes the pixels themselves"
    return None


def _output(
    facts: tuple[TensorFacts, ...], tensors: list[TensorSpec], archive: Archive | None, notes: list[str]
) -> tuple[OutputSpec, tuple[str, ...] | None]:
    """Give the output's specification and the labels; both are empty where nothing is said that a decoder can use."""
    if len(facts) != len(tensors):
        return OutputSpec(), None
    notes.extend(
        f"scores of output {tensor.name!r} come as the model gives them: calibration is not supported"
        for said, tensor in zip(facts, tensors, strict=True)
        if said.calibrated
    )
    by_name = {said.name: place for place, said in enumerate(facts)}
    if {"location", "category", "score"} <= by_name.keys():
        return _detection(facts, tensors, by_name, archive, notes)
    for said, tensor in zip(facts, tensors, strict=True):
        labels = _labels(archive, said.axis_labels, notes)
        if labels is None:
            continue
        shape = tensor.shape
        # Other axes: a label for each place of a picture; another number: which label belongs to which class nobody knows.
        if not shape or any(size not in (1, -1) for size in shape[:-1]) or shape[-1] not in (-1, len(labels)):
            notes.append(f"{len(labels)} labels of output {tensor.name!r} do not fit its shape {list(shape)}; left out")
            continue
        name = tensor.name if len(tensors) > 1 else None
        return OutputSpec(type="classification", tensor=name, threshold=said.threshold), labels
    return OutputSpec(), None


def _detection(
    facts: tuple[TensorFacts, ...],
    tensors: list[TensorSpec],
    by_name: dict[str | None, int],
    archive: Archive | None,
    notes: list[str],
) -> tuple[OutputSpec, tuple[str, ...] | None]:
    if not facts[by_name["location"]].our_boxes:
        notes.append("detections are left as tensors: their boxes are not said to be ymin, xmin, ymax, xmax in 0..1")
        return OutputSpec(), None
    roles: dict[str, Any] = {
        role: tensors[by_name[name]].name for name, role in DETECTION_NAMES.items() if name in by_name
    }
    threshold = facts[by_name["score"]].threshold
    labels = _labels(archive, facts[by_name["category"]].value_labels, notes)
    return OutputSpec(type="detection", threshold=threshold, **roles), labels


def decode_labels(data: bytes) -> tuple[str, ...]:
    """Read one label a line, UTF-8, as bundles have them; the empty lines at the end do not count. ValueError if it is no text."""
    text = data.decode("utf-8-sig")
    if not is_text(text):
        raise ValueError("it holds a character that no label has")
    return tuple(line.strip() for line in text.rstrip().splitlines())


def _labels(archive: Archive | None, name: str | None, notes: list[str]) -> tuple[str, ...] | None:
    if name is None:
        return None
    try:
        if archive is None:
            raise ValueError("the model carries no files")
        return decode_labels(archive.read(name, MAX_LABELS_BYTES)) or None
    except ValueError as error:
        notes.append(f"labels {name!r} cannot be read: {error}")
        return None


def _custom(subgraph: Table, notes: list[str]) -> tuple[InputSpec, OutputSpec] | None:
    """Read what edge-serve wrote itself; None if there is nothing, or nothing that this version understands."""
    for entry in subgraph.tables(SUBGRAPH_CUSTOM, MAX_CUSTOM):
        if entry.text(CUSTOM_NAME) != CUSTOM:
            continue
        try:
            document = json.loads(entry.data(CUSTOM_DATA, MAX_METADATA_BYTES))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the entry {CUSTOM} is not JSON: {error}") from error
        if not isinstance(document, dict) or document.get("format") != CUSTOM_FORMAT:
            notes.append(f"the entry {CUSTOM} has a format that this version does not read; the rest is used")
            return None
        problems: list[Problem] = []
        specs = _table(InputSpec, document, "input", problems), _table(OutputSpec, document, "output", problems)
        if problems:
            raise ValueError(f"the entry {CUSTOM}: {problems[0]}")
        return specs
    return None


def _table(cls: type[T], document: dict[str, Any], key: str, problems: list[Problem]) -> T:
    return read(cls, document.get(key, {}), key, problems, strict=False) or cls()
