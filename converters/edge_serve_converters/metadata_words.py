"""Says a model's specification in the words of TFLite Metadata: the flatbuffer that goes into the .tflite file.

Schema: metadata_schema.fbs 1.5, root ModelMetadata, identifier M001; field numbers are in edge_serve/model/metadata.py.
A fact that has no word there stands in the custom entry EDGE_SERVE, which holds everything that the manifest says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.model import metadata as words
from edge_serve.spec import InputSpec, OutputSpec

# The version of the schema that first has custom metadata.
MIN_PARSER = "1.5.0"
GROUP = "detection_result"
COLORS = {"rgb": 1, "gray": 2}
# Tables are made with as many fields as the schema gives them.
MODEL_FIELDS, SUBGRAPH_FIELDS, TENSOR_FIELDS = 8, 10, 7
CONTENT_FEATURES, CONTENT_IMAGE, CONTENT_BOXES = 1, 2, 3
# CustomMetadata.data (force_align).
CUSTOM_ALIGNMENT = 16

Kind = Literal["offset", "int8", "uint8", "uint32", "float32"]
Field = tuple[int, Kind, Any]


@dataclass(frozen=True, slots=True)
class Words:
    """All that the flatbuffer is made of; inputs and outputs are the first subgraph's, in its order."""

    name: str
    description: str
    version: str
    input: InputSpec
    output: OutputSpec
    labels_file: str | None
    custom: bytes
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]

    def build(self) -> bytes:
        """Give the flatbuffer; the same words give the same bytes."""
        import flatbuffers  # comes with ai_edge_litert; only conversion needs it

        builder = flatbuffers.Builder(1024)
        subgraph = self._subgraph(builder)
        fields: list[Field] = [
            (slot, "offset", builder.CreateString(text))
            for slot, text in (
                (words.MODEL_NAME, self.name),
                (words.MODEL_DESCRIPTION, self.description),
                (words.MODEL_VERSION, self.version),
                (words.MODEL_MIN_PARSER, MIN_PARSER),
            )
            if text
        ]
        fields.append((words.MODEL_SUBGRAPHS, "offset", _offsets(builder, [subgraph])))
        builder.Finish(_table(builder, MODEL_FIELDS, fields), words.IDENTIFIER)
        return bytes(builder.Output())

    def _subgraph(self, builder: Any) -> int:
        builder.StartVector(1, len(self.custom), CUSTOM_ALIGNMENT)
        builder.head -= len(self.custom)
        builder.Bytes[builder.head : builder.head + len(self.custom)] = self.custom
        content = builder.EndVector()
        title = builder.CreateString(words.CUSTOM)
        custom = _table(builder, 2, [(words.CUSTOM_NAME, "offset", title), (words.CUSTOM_DATA, "offset", content)])
        inputs = [self._input(builder, tensor) for tensor in self.inputs]
        outputs = [self._output(builder, tensor) for tensor in self.outputs]
        fields: list[Field] = [
            (words.SUBGRAPH_INPUTS, "offset", _offsets(builder, inputs)),
            (words.SUBGRAPH_OUTPUTS, "offset", _offsets(builder, outputs)),
            (words.SUBGRAPH_CUSTOM, "offset", _offsets(builder, [custom])),
        ]
        roles = [self._role(tensor) for tensor in self.outputs]
        group = [name for name in words.DETECTION_NAMES if name in roles and name != "number of detections"]
        if group:
            names = _offsets(builder, [builder.CreateString(name) for name in group])
            title = builder.CreateString(GROUP)
            table = _table(builder, 2, [(words.GROUP_NAME, "offset", title), (words.GROUP_TENSORS, "offset", names)])
            fields.append((words.SUBGRAPH_OUTPUT_GROUPS, "offset", _offsets(builder, [table])))
        return _table(builder, SUBGRAPH_FIELDS, fields)

    def _input(self, builder: Any, tensor: TensorSpec) -> int:
        if self.input.kind != "image" or len(self.inputs) != 1 or len(tensor.shape) not in (3, 4):
            return self._tensor(builder, tensor.name, _text(tensor), (CONTENT_FEATURES, []))
        height, width = self.input.size or tensor.shape[1:3]
        properties: list[Field] = [(words.IMAGE_COLOR, "int8", COLORS.get(_color(self.input, tensor), 0))]
        if height > 0 and width > 0:
            size = _table(builder, 2, [(words.SIZE_WIDTH, "uint32", width), (words.SIZE_HEIGHT, "uint32", height)])
            properties.append((words.IMAGE_SIZE, "offset", size))
        normalization = pixel_normalization(self.input, tensor)
        extra: list[Field] = []
        if normalization is not None:
            mean, std = normalization
            options = _table(
                builder,
                2,
                [
                    (words.NORMALIZATION_MEAN, "offset", _floats(builder, mean)),
                    (words.NORMALIZATION_STD, "offset", _floats(builder, std)),
                ],
            )
            ends = np.stack([(0 - mean) / std, (255 - mean) / std])
            stats = _table(
                builder,
                2,
                [
                    (words.STATS_MAX, "offset", _floats(builder, ends.max(axis=0))),
                    (words.STATS_MIN, "offset", _floats(builder, ends.min(axis=0))),
                ],
            )
            extra = [
                (words.TENSOR_UNITS, "offset", _unit(builder, words.UNIT_NORMALIZATION, options)),
                (words.TENSOR_STATS, "offset", stats),
            ]
        return self._tensor(builder, tensor.name, f"picture, {_text(tensor)}", (CONTENT_IMAGE, properties), extra)

    def _output(self, builder: Any, tensor: TensorSpec) -> int:
        role = self._role(tensor)
        extra: list[Field] = []
        scores = role == "score" or (self.output.type == "classification" and self._holds_scores(tensor))
        if scores and self.output.threshold is not None:
            options = _table(builder, 1, [(words.THRESHOLD, "float32", self.output.threshold)])
            extra.append((words.TENSOR_UNITS, "offset", _unit(builder, words.UNIT_THRESHOLDING, options)))
        if self.labels_file is not None and (role == "category" or (role is None and self._holds_scores(tensor))):
            title = builder.CreateString(self.labels_file)
            kind = words.VALUE_LABELS if role == "category" else words.AXIS_LABELS
            file = _table(builder, 5, [(words.FILE_NAME, "offset", title), (words.FILE_TYPE, "int8", kind)])
            extra.append((words.TENSOR_FILES, "offset", _offsets(builder, [file])))
        content: tuple[int, list[Field]] = (CONTENT_FEATURES, [])
        if role == "location":
            builder.StartVector(4, len(words.BOX_ORDER), 4)
            for place in reversed(words.BOX_ORDER):
                builder.PrependUint32(place)
            index = builder.EndVector()
            content = (
                CONTENT_BOXES,
                [(words.BOX_INDEX, "offset", index), (words.BOX_TYPE, "int8", words.BOX_BOUNDARIES)],
            )
        return self._tensor(builder, role or tensor.name, _text(tensor), content, extra)

    def _role(self, tensor: TensorSpec) -> str | None:
        """Give the name by which readers find this output of a detector."""
        if self.output.type != "detection":
            return None
        for name, field in words.DETECTION_NAMES.items():
            if getattr(self.output, field) == tensor.name:
                return name
        return None

    def _holds_scores(self, tensor: TensorSpec) -> bool:
        return self.output.type in (None, "classification") and (
            tensor.name == self.output.tensor or (self.output.tensor is None and len(self.outputs) == 1)
        )

    def _tensor(
        self, builder: Any, name: str, text: str, content: tuple[int, list[Field]], extra: Sequence[Field] = ()
    ) -> int:
        kind, properties = content
        inner = _table(builder, 3, properties)
        outer = _table(builder, 3, [(words.CONTENT_TYPE, "uint8", kind), (words.CONTENT_PROPERTIES, "offset", inner)])
        fields: list[Field] = [
            (words.TENSOR_NAME, "offset", builder.CreateString(name)),
            (words.TENSOR_DESCRIPTION, "offset", builder.CreateString(text)),
            (words.TENSOR_CONTENT, "offset", outer),
            *extra,
        ]
        return _table(builder, TENSOR_FIELDS, fields)


def pixel_normalization(spec: InputSpec, tensor: TensorSpec) -> tuple[Any, Any] | None:
    """Give mean and std, float32, in units of the pixels 0..255, as processing/image.py makes values of them.

    One number each, or one for each channel. None if the specification has none that can be divided by.
    """
    said = spec.scale is not None or spec.mean is not None or spec.std is not None
    if not said and tensor.dtype in ("uint8", "int8"):
        # Pixels pass as they are (int8: less 128); what values those are the quantization says.
        offset = 128.0 if tensor.dtype == "int8" else 0.0
        if tensor.scale is None or tensor.zero_point is None:
            mean, std = np.array([offset]), np.array([1.0])
        else:
            mean, std = np.array([tensor.zero_point + offset]), 1 / np.array([tensor.scale])
    else:
        scale = 1 / 255 if spec.scale is None else spec.scale
        mean, std = np.array(spec.mean or (0.0,)), np.array(spec.std or (1.0,))
        if scale == 0 or (len(mean) != len(std) and 1 not in (len(mean), len(std))):
            return None
        mean, std = np.broadcast_arrays(mean / scale, std / scale)
    with np.errstate(over="ignore"):  # what float32 cannot hold is found below
        mean, std = mean.astype(np.float32), std.astype(np.float32)
    usable = np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()
    return (mean, std) if usable else None


def _color(spec: InputSpec, tensor: TensorSpec) -> str:
    return spec.color or ("gray" if len(tensor.shape) == 3 or tensor.shape[-1:] == (1,) else "rgb")


def _text(tensor: TensorSpec) -> str:
    return f"{tensor.dtype} [{', '.join(str(size) if size != -1 else 'any' for size in tensor.shape)}]"


def _table(builder: Any, size: int, fields: Sequence[Field]) -> int:
    prepend = {
        "offset": builder.PrependUOffsetTRelativeSlot,
        "int8": builder.PrependInt8Slot,
        "uint8": builder.PrependUint8Slot,
        "uint32": builder.PrependUint32Slot,
        "float32": builder.PrependFloat32Slot,
    }
    builder.StartObject(size)
    for slot, kind, value in fields:
        prepend[kind](slot, value, 0)
    return int(builder.EndObject())


def _unit(builder: Any, kind: int, options: int) -> int:
    unit = _table(builder, 2, [(words.UNIT_TYPE, "uint8", kind), (words.UNIT_OPTIONS, "offset", options)])
    return _offsets(builder, [unit])


def _offsets(builder: Any, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())


def _floats(builder: Any, values: Any) -> int:
    return int(builder.CreateNumpyVector(np.asarray(values, np.float32)))
