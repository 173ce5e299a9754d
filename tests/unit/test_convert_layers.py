"""Error layer by layer, on real files in the real runtime: what is compared, what it counts, and which layer is blamed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve_converters.alignment import match
from edge_serve_converters.blame import explain, first_bad, sensitivity
from edge_serve_converters.errors import ConversionError
from edge_serve_converters.graph import Tensor
from edge_serve_converters.layers import Comparison, Layer, compare_layers
from edge_serve_converters.signature_graph import Operator, SignatureGraph, read_graph

MODELS = Path(__file__).parents[1] / "data" / "models"
KEY = "serving_default"


def compare(reference: str, variant: str, inputs: dict[str, Any], runs: int = 8, signature: str = KEY) -> Comparison:
    """Compare two of the test models."""
    return compare_layers(MODELS / f"{reference}.tflite", MODELS / f"{variant}.tflite", signature, inputs, runs)


def pictures(count: int = 8, high: float = 1.0) -> dict[str, Any]:
    """Inputs of the ruined model."""
    return {"x": np.random.default_rng(0).uniform(0, high, (count, 1, 8, 8, 2)).astype(np.float32)}


@pytest.fixture(scope="module")
def ruined() -> Comparison:
    """The int8 model whose second layer lost its channels."""
    return compare("ruined", "ruined_int8", pictures())


def test_every_layer_and_the_quantized_input_have_figures(ruined: Comparison) -> None:
    assert (ruined.operators, ruined.matched) == (4, 4)
    assert [(layer.index, layer.operator) for layer in ruined.layers] == [
        (-1, "INPUT"),
        (0, "CONV_2D"),
        (1, "CONV_2D"),
        (2, "CONV_2D"),
        (3, "MEAN"),
    ]
    assert [layer.inputs for layer in ruined.layers] == [(), (0,), (1,), (2,), (3,)]
    before = ruined.layers[1]
    assert before.sqnr_db > 40
    assert before.cosine == pytest.approx(1, abs=1e-4)
    assert before.quantized_range is not None
    assert before.quantized_range[0] <= before.range[0] < before.range[1] <= before.quantized_range[1]
    assert sum(before.histogram) == 8 * 8 * 8 * 4
    assert before.saturated == 0


def test_the_layer_that_lost_its_channels_is_named_although_its_own_sqnr_is_high(ruined: Comparison) -> None:
    bad = first_bad(ruined.layers)
    assert bad is not None
    assert bad.name.startswith("ruined/")
    assert bad.sqnr_db > 40
    assert bad.channel_sqnr_db < 3
    assert "a few channels fill its range" in str(explain(ruined.layers))
    assert {layer.index for layer in sensitivity(ruined.layers)[:2]} == {1, 2}


def test_the_same_file_has_no_error_and_no_bad_layer() -> None:
    same = compare("ruined", "ruined", pictures())
    assert [layer.sqnr_db for layer in same.layers] == [200.0] * 4
    assert first_bad(same.layers) is None
    assert sensitivity(same.layers) == []
    assert "in float32 too" in str(explain(same.layers))
    assert explain([]) is None


def test_the_logarithm_of_silence_is_where_float16_breaks() -> None:
    rng = np.random.default_rng(0)
    sound = rng.standard_normal((3, 1, 16))
    assert first_bad(compare("energy", "energy_float16", {"x": sound}).layers) is None
    sound[1] = 0
    bad = first_bad(compare("energy", "energy_float16", {"x": sound}).layers)
    assert bad is not None
    assert (bad.operator, bad.broken) == ("LOG", 16)
    assert np.isfinite([bad.sqnr_db, bad.cosine, bad.max_error, *bad.range]).all()


def test_data_beyond_the_calibrated_range_saturate_the_input() -> None:
    layers = compare("ruined", "ruined_int8", pictures(high=255.0)).layers
    assert layers[0].saturated > 0.9
    assert first_bad(layers) == layers[0]
    assert "the model's input" in str(explain(layers))


def test_only_so_many_runs_are_made_as_were_asked_for_and_are_there() -> None:
    assert sum(compare("linear", "linear", {"x": np.ones((5, 1, 4))}, runs=2).layers[0].histogram) == 6
    assert sum(compare("linear", "linear", {"x": np.ones((5, 1, 4))}, runs=9).layers[0].histogram) == 15


def test_signatures_outside_the_first_subgraph_and_files_without_any_are_compared_too() -> None:
    given = {"x": np.arange(8.0).reshape(2, 1, 4)}
    (total,) = compare("linear", "linear", given, signature="total").layers
    assert (total.operator, total.range) == ("SUM", (6.0, 22.0))
    (bare,) = compare("bare", "bare", {"serving_default_x": given["x"]}).layers
    assert bare.operator == "FULLY_CONNECTED"


def test_open_dimensions_take_the_shape_of_the_inputs() -> None:
    (layer,) = compare("any_size", "any_size", {"image": np.ones((2, 1, 5, 6, 3))}).layers
    assert layer.range == (1.0, 1.0)
    assert sum(layer.histogram) == 6


def test_layers_travel_as_json(ruined: Comparison) -> None:
    for layer in ruined.layers:
        assert Layer.from_json(json.loads(json.dumps(layer.to_json(), allow_nan=False))) == layer


def test_what_cannot_be_compared_is_said() -> None:
    with pytest.raises(ConversionError, match="no signature 'other'"):
        compare("linear", "linear", {"x": np.ones((1, 1, 4))}, signature="other")
    with pytest.raises(ConversionError, match="without inputs"):
        compare("linear", "linear", {})
    with pytest.raises(ConversionError, match="fails"):
        compare("never", "never", {"index": np.zeros((1, 1))})


def layer(place: int, sqnr_db: float, *inputs: int, added: float | None = None) -> Layer:
    """A layer of a chain that adds the difference of the ratios."""
    ratio = 10 ** (-sqnr_db / 10)
    return Layer(
        index=place,
        operator="CONV_2D",
        name=f"layer{place}",
        sqnr_db=sqnr_db,
        channel_sqnr_db=sqnr_db,
        cosine=1.0,
        max_error=0.0,
        range=(0.0, 1.0),
        quantized_range=None,
        saturated=0.0,
        broken=0,
        local_error=ratio if added is None else added,
        channel_error=0.0,
        histogram=(1,),
        inputs=inputs,
    )


def chain(*decibels: float) -> list[Layer]:
    """Layers one after the other with these SQNRs."""
    ratios = [0.0, *(10 ** (-value / 10) for value in decibels)]
    return [
        layer(place, value, *([place - 1] if place else []), added=max(0.0, ratios[place + 1] - ratios[place]))
        for place, value in enumerate(decibels)
    ]


def test_a_step_is_blamed_and_drift_is_not() -> None:
    assert first_bad(chain(45, 40, 5, 4.8)) == chain(45, 40, 5, 4.8)[2]
    assert first_bad(chain(40, 12, 9.5)) == chain(40, 12, 9.5)[1]
    assert first_bad(chain(20, 16, 14, 12.5, 11.5, 10.7, 10, 9.4)) is None
    assert "adds up over the layers" in str(explain(chain(20, 16, 14, 12.5, 11.5, 10.7, 10, 9.4)))
    assert first_bad(chain(45, 40, 30, 20)) is None


def test_the_noisier_branch_is_followed() -> None:
    layers = [layer(0, 40), layer(1, 6, 0), layer(2, 35, 0), layer(3, 5.5, 2, 1, added=0.03)]
    assert first_bad(layers) == layers[1]
    assert [entry.index for entry in sensitivity(layers)] == [1, 3, 2, 0]


def test_the_most_harmful_layers_come_first_and_inputs_not_at_all() -> None:
    layers = chain(40, 20, 10, 30)
    layers[0] = dataclasses.replace(layers[0], index=-1, local_error=1.0)
    assert [entry.index for entry in sensitivity(layers)] == [2, 1]


def graph(*operators: tuple[str, str, list[str]], weights: tuple[str, ...] = ("w",)) -> SignatureGraph:
    """A graph of operators (kind, name of the output, names of the inputs) on [1, 4]; "x" is its input."""
    names = ["x", *weights, *(name for _, name, _ in operators)]
    tensors = tuple(
        Tensor(index, name, "float32", (1, 4), (1, 4), 0, None, (), 0, False, name in weights, None)
        for index, name in enumerate(names)
    )
    made = tuple(
        Operator(index, kind, tuple(names.index(entry) for entry in inputs), (names.index(output),))
        for index, (kind, output, inputs) in enumerate(operators)
    )
    return SignatureGraph(0, tensors, made, {"x": 0}, frozenset({len(names) - 1}))


def matched(reference: SignatureGraph, variant: SignatureGraph) -> list[tuple[str, str]]:
    """Give the names of what belongs together."""
    return [
        (reference.tensors[ours.outputs[0]].name, variant.tensors[theirs.outputs[0]].name)
        for ours, theirs in match(reference, variant)
    ]


def test_a_name_that_a_dequantized_weight_took_over_is_not_followed() -> None:
    reference = graph(
        ("FULLY_CONNECTED", "dense/MatMul", ["x", "w"]), ("FULLY_CONNECTED", "dense/MatMul1", ["dense/MatMul", "w"])
    )
    variant = graph(
        ("DEQUANTIZE", "dense/MatMul", ["w"]),
        ("FULLY_CONNECTED", "dense/MatMul1", ["x", "dense/MatMul"]),
        ("FULLY_CONNECTED", "dense/MatMul2", ["dense/MatMul1", "dense/MatMul"]),
    )
    assert matched(reference, variant) == [("dense/MatMul", "dense/MatMul1"), ("dense/MatMul1", "dense/MatMul2")]


def test_inserted_conversions_and_renamed_layers_are_seen_through() -> None:
    reference = graph(("CONV_2D", "a", ["x", "w"]), ("WHILE", "loop", ["a"]), ("SOFTMAX", "Call:0", ["loop"]))
    variant = graph(
        ("QUANTIZE", "tfl.quantize", ["x"]),
        ("CONV_2D", "a", ["tfl.quantize", "w"]),
        ("DEQUANTIZE", "tfl.dequantize", ["a"]),
        ("WHILE", "loop;loop1;loop2", ["tfl.dequantize"]),
        ("QUANTIZE", "tfl.quantize1", ["loop;loop1;loop2"]),
        ("SOFTMAX", "Call:0_int16", ["tfl.quantize1"]),
        ("DEQUANTIZE", "Call:0", ["Call:0_int16"]),
    )
    assert matched(reference, variant) == [("a", "a"), ("loop", "loop;loop1;loop2"), ("Call:0", "Call:0_int16")]


def test_what_has_no_counterpart_is_left_out_and_not_guessed() -> None:
    reference = graph(("ADD", "a", ["x", "w"]), ("ADD", "b", ["a", "w"]), ("TANH", "c", ["b"]))
    variant = graph(("ADD", "other", ["x", "w"]), ("TANH", "c", ["other"]))
    assert matched(reference, variant) == [("c", "c")]


def test_real_files_are_matched_whole() -> None:
    for reference, variant in (("ruined", "ruined_int8"), ("energy", "energy_float16")):
        graphs = [read_graph(MODELS / f"{name}.tflite", KEY) for name in (reference, variant)]
        assert len(match(*graphs)) == len(graphs[0].operators)
