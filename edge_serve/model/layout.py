"""Where things lie in a .tflite file: its tensors by the names that an engine gives them, and its metadata entries.

Field numbers are those of TensorFlow Lite's schema.fbs (file identifier TFL3). Whatever is wrong raises ValueError: the
runtime is who says so to people.
"""

from __future__ import annotations

from edge_serve.bundle import TensorSpec
from edge_serve.model.flatbuffer import Source, Table
from edge_serve.model.interpreter import FILE_IDENTIFIER
from edge_serve.model.signatures import DEFAULT

# Field numbers.
MODEL_VERSION, MODEL_SUBGRAPHS, MODEL_BUFFERS, MODEL_METADATA, MODEL_SIGNATURES = 0, 2, 4, 6, 7
SUBGRAPH_TENSORS, SUBGRAPH_INPUTS, SUBGRAPH_OUTPUTS = 0, 1, 2
TENSOR_SHAPE, TENSOR_TYPE, TENSOR_BUFFER, TENSOR_NAME, TENSOR_QUANTIZATION = 0, 1, 2, 3, 4
TENSOR_SHAPE_SIGNATURE = 7
QUANTIZATION_SCALE, QUANTIZATION_ZERO_POINT = 2, 3
METADATA_NAME, METADATA_BUFFER = 0, 1
BUFFER_DATA = 0
SIGNATURE_INPUTS, SIGNATURE_OUTPUTS, SIGNATURE_KEY, SIGNATURE_SUBGRAPH = 0, 1, 2, 4
MAP_NAME, MAP_TENSOR = 0, 1

# TensorType of the types that inputs and outputs have; others count as "other".
DTYPES = {
    0: "float32",
    1: "float16",
    2: "int32",
    3: "uint8",
    4: "int64",
    5: "string",
    6: "bool",
    7: "int16",
    9: "int8",
    10: "float64",
}
# More than any real model has; what says more is refused before anything is done with it.
MAX_ENDS = 256
MAX_ENTRIES = 1000
MAX_SIGNATURES = 1000
MAX_RANK = 64


def open_model(source: Source) -> Table:
    """Open the model of a .tflite file; ValueError if it is not one."""
    if source.read(4, 4) != FILE_IDENTIFIER:
        raise ValueError("not a TFLite flatbuffer")
    return Table.root(source)


def entries(model: Table, name: str) -> list[tuple[int, int]]:
    """Give (position in the list, buffer number) of the metadata entries of that name."""
    tables = model.tables(MODEL_METADATA, MAX_ENTRIES)
    return [
        (at, table.whole(METADATA_BUFFER, "I")) for at, table in enumerate(tables) if table.text(METADATA_NAME) == name
    ]


def buffer(model: Table, number: int) -> Table:
    """Give a buffer of the model."""
    return model.table_in(MODEL_BUFFERS, number)


def ends(model: Table) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Give the inputs and outputs of the first subgraph in its own order, named as an engine names them by default.

    That is by the signature serving_default or the only one, else by the tensors' names (model/signatures.py).
    """
    subgraph = model.table_in(MODEL_SUBGRAPHS, 0)
    names = _signature_names(model)
    inputs, outputs = (
        [
            _tensor(subgraph.table_in(SUBGRAPH_TENSORS, int(index)), names[side].get(int(index)))
            for index in subgraph.numbers(slot, "i", MAX_ENDS)
        ]
        for side, slot in enumerate((SUBGRAPH_INPUTS, SUBGRAPH_OUTPUTS))
    )
    return inputs, outputs


def _signature_names(model: Table) -> tuple[dict[int, str], dict[int, str]]:
    signatures = model.tables(MODEL_SIGNATURES, MAX_SIGNATURES)
    chosen = [signature for signature in signatures if len(signatures) == 1 or signature.text(SIGNATURE_KEY) == DEFAULT]
    if not chosen or chosen[0].whole(SIGNATURE_SUBGRAPH, "I") != 0:
        return {}, {}
    inputs, outputs = (
        {entry.whole(MAP_TENSOR, "I"): entry.text(MAP_NAME) or "" for entry in chosen[0].tables(slot, MAX_ENDS)}
        for slot in (SIGNATURE_INPUTS, SIGNATURE_OUTPUTS)
    )
    return inputs, outputs


def _tensor(table: Table, name: str | None) -> TensorSpec:
    shape = table.numbers(TENSOR_SHAPE_SIGNATURE, "i", MAX_RANK) or table.numbers(TENSOR_SHAPE, "i", MAX_RANK)
    quantization = table.table(TENSOR_QUANTIZATION)
    scale = None if quantization is None else _only(quantization, QUANTIZATION_SCALE, "f")
    zero_point = None if quantization is None else _only(quantization, QUANTIZATION_ZERO_POINT, "q")
    if scale is None or zero_point is None:
        scale = zero_point = None
    return TensorSpec(
        name if name is not None else (table.text(TENSOR_NAME) or "").removesuffix(":0"),
        DTYPES.get(table.whole(TENSOR_TYPE, "b"), "other"),
        tuple(int(size) for size in shape),
        None if scale is None else float(scale),
        None if zero_point is None else int(zero_point),
    )


def _only(table: Table, slot: int, layout: str) -> int | float | None:
    """Give the number of a list of one: more of them are a quantization per channel, which inputs and outputs do not have."""
    _, count = table.vector(slot, 4, None)
    return table.numbers(slot, layout, 1)[0] if count == 1 else None
