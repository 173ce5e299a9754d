"""Writes TFLite Metadata into a .tflite file, so that what its tensors mean travels with the file alone.

Nothing that is in the file moves within itself: a new head (the model's table, its lists of buffers and of metadata) is
put before the old bytes, which it points into, and the metadata and the ZIP with the labels go behind them. So operators,
signatures and weights stay byte for byte what the runtime was checked with, and the work is one copy of the file.
Format: FlatBuffers' binary format; metadata_schema.fbs 1.5 (edge_serve/model/metadata.py reads it).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace

from edge_serve.bundle import TensorSpec
from edge_serve.model import layout, metadata
from edge_serve.model.associated import END, END_MARK, ENTRY, ENTRY_MARK, LOCAL, LOCAL_MARK, STORED, open_archive
from edge_serve.model.flatbuffer import ByteSource, Table, follow
from edge_serve.schema import compact
from edge_serve.spec import InputSpec, OutputSpec
from edge_serve_converters.errors import ConversionError
from edge_serve_converters.metadata_words import Words

LABELS = "labels.txt"
# Weights are aligned to this in the file (schema.fbs, Buffer.data, force_align), and runtimes rely on it.
ALIGNMENT = 16
# Offsets of a flatbuffer reach no further; larger models keep their weights behind it, at places in the file.
MAX_BYTES = 2**31 - 1
# Fields of the model's table that are known, and can be carried over: version (a number), and offsets.
MODEL_FIELDS = 10
# Where buffers and operators say a place in the file: 0 and 1 stand for none.
BUFFER_OFFSET, SUBGRAPH_OPERATORS, OPERATOR_OPTIONS_OFFSET = 1, 3, 9
# 1980-01-01, the first day that a ZIP knows: two equal conversions give equal bytes.
ZIP_DATE = 1 << 5 | 1
ZIP_VERSION, ZIP_UTF8 = 20, 1 << 11


def write_metadata(
    data: bytes,
    *,
    name: str,
    description: str,
    input: InputSpec,  # noqa: A002  # as the manifest calls it
    output: OutputSpec,
    labels: tuple[str, ...] | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    version: str,
) -> bytes:
    """Give the .tflite file with metadata and labels; those that it had before are replaced.

    `inputs` and `outputs` are the tensors of the default signature, by the names that `input` and `output` use. A file that
    cannot have any is given back as it is: one with weights beyond 2 GB, or of a newer schema. The same arguments give the
    same bytes, whether or not the file had metadata of ours before. ConversionError if `data` is no .tflite file.
    """
    try:
        source = ByteSource(data)
        archive = open_archive(source)
        model = layout.open_model(source)
        end = len(data) if archive is None else archive.start
        if len(model.slots) > MODEL_FIELDS or _has_places(model):
            return data
        file_inputs, file_outputs = layout.ends(model)
        labels = labels or output.labels or None
        text = None if labels is None else _encode_labels(labels)
        labels_file = LABELS if text is not None else None
        kept = replace(output, labels=labels if text is None else None, labels_file=labels_file)
        words = Words(
            name=name,
            description=description,
            version=version,
            input=input,
            output=output,
            labels_file=labels_file,
            custom=_custom(input, kept),
            inputs=_known(file_inputs, inputs),
            outputs=_known(file_outputs, outputs),
        )
        parts = _placed(memoryview(data), model, end, words.build())
    except (ValueError, struct.error) as error:
        raise ConversionError(f"the file that came out is no sound .tflite file ({error})") from error
    size = sum(len(part) for part in parts)
    if text is not None:
        parts.append(_archived(LABELS, text, size))
        size += len(parts[-1])
    return data if size > MAX_BYTES else b"".join(parts)


def _has_places(model: Table) -> bool:
    """Tell whether something lies behind the flatbuffer at places counted from the file's beginning, which would move."""
    source = model.source
    start, count = model.vector(layout.MODEL_BUFFERS, 4, None)
    buffers = (Table.at(source, follow(source, start + 4 * at)) for at in range(count))
    if any(buffer.whole(BUFFER_OFFSET, "Q") > 1 for buffer in buffers):
        return True
    start, count = model.vector(layout.MODEL_SUBGRAPHS, 4, None)
    for at in range(count):
        subgraph = Table.at(source, follow(source, start + 4 * at))
        first, operators = subgraph.vector(SUBGRAPH_OPERATORS, 4, None)
        for number in range(operators):
            operator = Table.at(source, follow(source, first + 4 * number))
            if operator.whole(OPERATOR_OPTIONS_OFFSET, "Q") > 1:
                return True
    return False


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _placed(data: memoryview, model: Table, end: int, blob: bytes) -> list[bytes | memoryview]:
    """Give the pieces of the new flatbuffer, with the metadata's bytes at its end."""
    own = layout.entries(model, metadata.ENTRY)
    place = _replaceable(model, own)
    if place is None:
        head, field = _head(model, {at for at, _ in own})
        body = data[:end]
    else:
        # A buffer that only the metadata use: its offset is led to the new bytes, in place.
        start = follow(model.source, place)
        stop = start + 4 + struct.unpack_from("<I", data, start)[0]
        # If it was the last thing in the file, which is so where we wrote it, nothing of it stays.
        end = start if stop == end else end
        head, field, body = b"", place, data[:end]
    tail = _aligned(len(head) + end + 4) - 4
    pad = bytes(tail - len(head) - end)
    pieces: list[bytes | memoryview] = [head, body, pad, struct.pack("<I", len(blob)), blob]
    offset = struct.pack("<I", tail - field)
    if place is None:
        pieces[0] = head[:field] + offset + head[field + 4 :]
    else:
        pieces[1:2] = [body[:field], offset, body[field + 4 :]]
    return pieces


def _replaceable(model: Table, own: list[tuple[int, int]]) -> int | None:
    """Give the position of the offset to the old metadata's bytes, if that buffer is theirs alone."""
    if len(own) != 1 or own[0][1] == 0:
        return None
    number = own[0][1]
    source = model.source
    others = [
        entry.whole(layout.METADATA_BUFFER, "I") for entry in model.tables(layout.MODEL_METADATA, layout.MAX_ENTRIES)
    ]
    start, count = model.vector(layout.MODEL_BUFFERS, 4, None)
    positions = [follow(source, start + 4 * at) for at in range(count)]
    if number >= count or others.count(number) != 1 or positions.count(positions[number]) != 1:
        return None
    start, count = model.vector(layout.MODEL_SUBGRAPHS, 4, None)
    for at in range(count):
        subgraph = Table.at(source, follow(source, start + 4 * at))
        first, tensors = subgraph.vector(layout.SUBGRAPH_TENSORS, 4, None)
        if any(
            Table.at(source, follow(source, first + 4 * index)).whole(layout.TENSOR_BUFFER, "I") == number
            for index in range(tensors)
        ):
            return None
    return Table.at(source, positions[number]).place(layout.BUFFER_DATA)


def _head(model: Table, dropped: set[int]) -> tuple[bytes, int]:
    """Make what stands before the old bytes, and say where in it the offset to the metadata's bytes has to be filled in.

    In this order: the root's offset and the mark, the model's vtable and table, the lists of buffers and of metadata, the
    new entry's vtable, table and name, the new buffer's vtable and table.
    """
    source = model.source
    first_buffer, buffers = model.vector(layout.MODEL_BUFFERS, 4, None)
    first_entry, entries = model.vector(layout.MODEL_METADATA, 4, layout.MAX_ENTRIES)
    kept = [first_entry + 4 * at for at in range(entries) if at not in dropped]
    vtable, table = 8, 8 + 4 + 2 * MODEL_FIELDS
    buffer_list = table + 4 + 4 * MODEL_FIELDS
    entry_list = buffer_list + 4 + 4 * (buffers + 1)
    entry_vtable = entry_list + 4 + 4 * (len(kept) + 1)
    entry = entry_vtable + 8
    title = entry + 12
    buffer_vtable = title + 4 + len(metadata.ENTRY) + 1
    buffer_vtable += buffer_vtable % 2
    # The vtable has three numbers of 2 bytes; the table behind it begins at a multiple of 4.
    buffer = -(-(buffer_vtable + 6) // 4) * 4
    buffer_vtable = buffer - 6
    size = _aligned(buffer + 8)
    head = bytearray(size)
    struct.pack_into("<I4s", head, 0, table, b"TFL3")
    places = [4 + 4 * slot for slot in range(MODEL_FIELDS)]
    targets = {layout.MODEL_BUFFERS: buffer_list, layout.MODEL_METADATA: entry_list}
    struct.pack_into("<i", head, table, table - vtable)
    for slot, place in enumerate(places):
        at = table + place
        if slot == layout.MODEL_VERSION:
            struct.pack_into("<I", head, at, model.whole(slot, "I"))
        elif slot in targets:
            struct.pack_into("<I", head, at, targets[slot] - at)
        elif (old := model.place(slot)) is not None:
            struct.pack_into("<I", head, at, size + follow(source, old) - at)
        else:
            places[slot] = 0
    struct.pack_into(f"<2H{MODEL_FIELDS}H", head, vtable, 4 + 2 * MODEL_FIELDS, 4 + 4 * MODEL_FIELDS, *places)
    old_buffers = [first_buffer + 4 * at for at in range(buffers)]
    for start, olds, new in ((buffer_list, old_buffers, buffer), (entry_list, kept, entry)):
        struct.pack_into("<I", head, start, len(olds) + 1)
        positions = [size + follow(source, old) for old in olds]
        for number, position in enumerate([*positions, new]):
            at = start + 4 + 4 * number
            struct.pack_into("<I", head, at, position - at)
    struct.pack_into("<4H", head, entry_vtable, 8, 12, 4, 8)
    struct.pack_into("<iII", head, entry, entry - entry_vtable, title - (entry + 4), buffers)
    struct.pack_into(f"<I{len(metadata.ENTRY)}s", head, title, len(metadata.ENTRY), metadata.ENTRY.encode())
    struct.pack_into("<3H", head, buffer_vtable, 6, 8, 4)
    struct.pack_into("<i", head, buffer, buffer - buffer_vtable)
    return bytes(head), buffer + 4


def _known(ends: Sequence[TensorSpec], given: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Give the file's own inputs or outputs in its order, as the caller knows those of the same name."""
    by_name = {spec.name: spec for spec in given}
    return [by_name.get(spec.name, spec) for spec in ends]


def _custom(input_spec: InputSpec, output: OutputSpec) -> bytes:
    """Give our own entry, in the manifest's words."""
    document = {"format": metadata.CUSTOM_FORMAT, "input": compact(input_spec), "output": compact(output)}
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def _encode_labels(labels: tuple[str, ...]) -> bytes | None:
    """Give the labels as a file; None if one of them is no line (then they are listed in our own entry)."""
    data = "".join(f"{label}\n" for label in labels).encode()
    return data if metadata.decode_labels(data) == labels else None


def _archived(name: str, content: bytes, position: int) -> bytes:
    """Give a ZIP with one stored file, to stand at a position of the model's file: its offsets count from the beginning."""
    title = name.encode()
    crc, size = zlib.crc32(content), len(content)
    shared = (ZIP_VERSION, ZIP_UTF8, STORED, 0, ZIP_DATE, crc, size, size, len(title), 0)
    local = LOCAL.pack(LOCAL_MARK, *shared) + title + content
    directory = ENTRY.pack(ENTRY_MARK, ZIP_VERSION, *shared, 0, 0, 0, 0, position) + title
    return local + directory + END.pack(END_MARK, 0, 0, 1, 1, len(directory), position + len(local), 0)
