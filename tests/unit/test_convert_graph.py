"""Files are read into typed values, and whatever the bytes are, the answer is a graph or ValueError."""

from __future__ import annotations

import random
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from edge_serve_converters import graph
from tests.unit.tflite_files import Op, T, build, ints, options, weights, x

MODELS = Path(__file__).parents[1] / "data" / "models"


def convolution() -> bytes:
    """Write a quantized convolution with one scale for each of its eight outputs, and a mean."""
    middle = T("conv/Relu6", (1, 8, 8, 8))
    bias = T("bias", (8,), "int32", np.zeros(8, np.int32), scales=8)
    first = Op(
        "CONV_2D",
        [x((1, 8, 8, 3), signature=(-1, 8, 8, 3), zero_point=-128), weights((8, 3, 3, 3), scales=8), bias],
        [middle],
        version=3,
        options=options(
            "Conv2DOptions", fusedActivationFunction=3, strideH=1, strideW=2, dilationHFactor=4, dilationWFactor=4
        ),
    )
    return build([first, Op("MEAN", [middle, ints(1, 2)], [T("y", (1, 8))])])


def test_operators_come_with_their_tensors_and_options() -> None:
    (main,) = graph.read(convolution()).subgraphs
    conv, mean = main.operators
    assert (conv.index, conv.name, conv.version, conv.custom, conv.layer) == (0, "CONV_2D", 3, False, "conv/Relu6")
    assert conv.activation == "RELU6"
    assert {key: conv.options[key] for key in ("stride_w", "dilation_h_factor")} == {
        "stride_w": 2,
        "dilation_h_factor": 4,
    }
    given, kernel, bias = conv.present
    assert (given.dtype, given.shape, given.signature, given.zero_points) == (
        "int8",
        (1, 8, 8, 3),
        (-1, 8, 8, 3),
        (-128,),
    )
    assert not given.constant
    assert not given.open, "a batch of 1 that is declared open is a batch of 1"
    assert (kernel.constant, kernel.scales, len(kernel.data), bias.dtype) == (True, 8, 8 * 27, "int32")
    assert mean.present[1].integers() == (1, 2)
    assert conv.values == (given, mean.present[0])
    assert [tensor.name for tensor in (*main.inputs, *main.outputs)] == ["x", "y"]


def test_optional_inputs_and_bodies_are_told_apart() -> None:
    dense = Op("FULLY_CONNECTED", [x((1, 4)), weights((2, 4)), None], [T("y", (1, 2))])
    body = Op("ADD", [x((1, 2)), x((1, 2))], [T("z", (1, 2))])
    found = graph.read(build([dense], [body]))
    assert found.subgraphs[0].operators[0].inputs[2] is None
    assert [subgraph.entry for subgraph in found.subgraphs] == [True, False]
    assert [operator.name for operator in found.operators] == ["FULLY_CONNECTED", "ADD"]


def test_weights_behind_dequantize_are_constants() -> None:
    packed, unpacked = weights((2, 4), "float16", scales=0), T("w32", (2, 4), "float32", scales=0)
    given = x((1, 4), "float32", scales=0)
    dense = Op("FULLY_CONNECTED", [given, unpacked, None], [T("y", (1, 2), "float32", scales=0)])
    found = list(graph.read(build([Op("DEQUANTIZE", [packed], [unpacked]), dense], inputs=[given])).operators)
    assert found[0].values == ()
    assert [tensor.name for tensor in found[1].values] == ["x", "y"]


def test_open_dimensions_are_found() -> None:
    relu = Op("RELU", [x((1, 8, 4), signature=(1, -1, 4))], [T("y", (2, 4), signature=(-1, 4))])
    given, made = next(graph.read(build([relu])).operators).values
    assert given.open
    assert made.open, "a batch of 2 that may be another"


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.tflite")), ids=lambda path: path.stem)
def test_every_model_of_the_tests_is_read(path: Path) -> None:
    assert any(True for _ in graph.read(path.read_bytes()).operators)


def test_a_custom_operator_has_its_own_name() -> None:
    assert "edgetpu-custom-op" in {
        operator.name for operator in graph.read((MODELS / "edgetpu.tflite").read_bytes()).operators
    }


def test_signatures_name_their_inputs() -> None:
    found = graph.read((MODELS / "linear.tflite").read_bytes())
    assert set(found.signatures) == {"serving_default", "total"}
    total = found.signatures["total"]
    subgraph = found.subgraphs[total.subgraph]
    assert [operator.name for operator in subgraph.operators] == ["SUM"]
    assert {name: subgraph.tensors[index] for name, index in total.inputs.items()} == {"x": subgraph.inputs[0]}
    assert graph.read((MODELS / "bare.tflite").read_bytes()).signatures == {}


def test_one_scale_for_all_values_is_told_from_one_for_each_channel() -> None:
    dense = Op("FULLY_CONNECTED", [x((1, 3)), weights((8, 3), scales=8), None], [T("y", (1, 8), "float32", scales=0)])
    found = next(graph.read(build([dense])).operators)
    assert [tensor.scale for tensor in found.present + found.outputs] == [pytest.approx(0.1), None, None]


def test_a_file_is_mapped_and_not_copied(tmp_path: Path) -> None:
    size = 64 * 2**20
    dense = Op("FULLY_CONNECTED", [x((1, 1024)), weights((size // 1024, 1024)), None], [T("y", (1, size // 1024))])
    path = tmp_path / "large.tflite"
    path.write_bytes(build([dense]))
    tracemalloc.start()
    found = graph.read_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    held = next(found.operators).present[1]
    assert (len(held.data), int(held.data[-1])) == (size, 1)
    assert peak < 2**20
    (tmp_path / "empty.tflite").touch()
    with pytest.raises(ValueError, match="empty"):
        graph.read_file(tmp_path / "empty.tflite")


def test_a_signature_of_a_graph_that_is_not_there_is_refused() -> None:
    from ai_edge_litert import schema_py_generated as schema

    data = bytearray((MODELS / "linear.tflite").read_bytes())
    model = schema.Model.GetRootAs(data, 0)
    second = next(entry for entry in map(model.SignatureDefs, range(2)) if entry.SubgraphIndex() == 1)._tab
    field = second.Pos + second.Offset(12)  # subgraph_index
    data[field : field + 4] = (7).to_bytes(4, "little")
    with pytest.raises(ValueError, match="it refers to graph 7 of 2"):
        graph.read(bytes(data))


def test_what_is_no_file_is_refused() -> None:
    for data in (b"", b"TFL3", b"PK\x03\x04" * 30, b"\x00\x00\x00\x00TFL3"):
        with pytest.raises(ValueError, match="TFLite"):
            graph.read(data)


def test_damaged_files_give_a_graph_or_value_error_in_little_time() -> None:
    honest = convolution()
    chance = random.Random(7)
    refused = 0
    for _ in range(600):
        data = bytearray(honest)
        for _ in range(chance.choice((1, 4, 20))):
            data[chance.randrange(8, len(data))] = chance.randrange(256)
        started = time.monotonic()
        try:
            graph.read(bytes(data))
        except ValueError:
            refused += 1
        assert time.monotonic() - started < 1
    for length in range(8, len(honest), 7):
        with pytest.raises(ValueError, match="damaged"):
            graph.read(honest[:length])
    assert 50 < refused < 600


def test_a_file_whose_graphs_are_all_the_same_bytes_costs_no_more_than_its_size() -> None:
    operators = [Op("RELU", [T(f"tensor{i}", (1, 4))], [T(f"made{i}", (1, 4))]) for i in range(200)]
    data = bytearray(build(operators, *([Op("RELU", [x((1,))], [T("y", (1,))])] for _ in range(80))))
    model = graph_table(data)
    # Every entry of the vector of subgraphs leads to the first, large one.
    start, count = model
    target = start + int.from_bytes(data[start : start + 4], "little")
    for entry in range(1, count):
        place = start + 4 * entry
        data[place : place + 4] = ((target - place) % 2**32).to_bytes(4, "little")
    with pytest.raises(ValueError, match=r"more .* than its .* bytes can hold"):
        graph.read(bytes(data))


def graph_table(data: bytearray) -> tuple[int, int]:
    """Find the vector of subgraphs: where its entries begin, and how many there are."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(data, 0)
    field = model._tab.Offset(8)
    return model._tab.Vector(field), model._tab.VectorLen(field)
