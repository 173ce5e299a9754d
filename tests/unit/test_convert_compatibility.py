"""Where a variant runs: each rule of tflite-runtime 2.14, the Edge TPU and the GPU by a file that keeps it and one that breaks it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve_converters import compatibility, edgetpu, gpu, graph, operator_versions, runtimes
from tests.unit.tflite_files import Op, T, build, ints, options, pairs, weights, x

DATA = Path(__file__).parents[1] / "data"
EDGE = (1, 8, 8, 4)


def y(shape: tuple[int, ...], dtype: str = "int8", **more: Any) -> T:
    """Give an output."""
    return T("y", shape, dtype, **more)


def reasons(*operators: Op) -> list[str]:
    """List why tflite-runtime 2.14 would not take a file of these operators."""
    return runtimes.loads_in_tflite_runtime_2_14(graph.read(build(operators)))


def edge_rule(operator: Op, inputs: Sequence[T] = ()) -> str | None:
    """Give the rule of the Edge TPU that the operator breaks."""
    return edgetpu.examine(graph.read(build([operator], inputs=inputs))).operators[0].rule


def gpu_rule(operator: Op) -> str | None:
    """Give the rule of the GPU that the operator breaks."""
    return gpu.examine(graph.read(build([operator])))[0].rule


def dense(values: str, kernel: T, version: int = 1, rows: int = 1, **more: Any) -> Op:
    """Give a dense layer on values of that type."""
    made = y((rows, 2), values)
    return Op(
        "FULLY_CONNECTED",
        [x((rows, 4), values), kernel, None],
        [made],
        version,
        options("FullyConnectedOptions", **more),
    )


# --- runtimes -------------------------------------------------------------------------------------------------------------


def test_the_releases_up_to_2_14_are_what_tflite_runtime_2_14_accepted_when_it_was_measured() -> None:
    measured = json.loads((DATA / "tflite_runtime_2_14.json").read_text())
    assert len(measured) > 150
    assert {name: operator_versions.highest(name, runtimes.TFLITE_RUNTIME) for name in measured} == measured
    newer = ("DILATE", "STABLEHLO_COMPOSITE", "REDUCE_WINDOW")
    assert [operator_versions.highest(name, runtimes.TFLITE_RUNTIME) for name in newer] == [None] * 3


def test_releases_are_compared_by_number_not_by_text() -> None:
    assert operator_versions.parse("2.9") < operator_versions.parse("2.14") < operator_versions.parse("2.14.4")
    assert operator_versions.release("FULLY_CONNECTED", 12) == "2.17"
    assert operator_versions.release("BROADCAST_TO", 1) is None
    assert operator_versions.release("RELU", 99) is None


def test_an_operator_version_that_came_later_is_named_with_what_the_runtime_has() -> None:
    assert reasons(dense("float32", weights((2, 4), scales=2), version=12)) == [
        "FULLY_CONNECTED version 12 (of TensorFlow 2.17): it has up to 10"
    ]
    assert reasons(Op("DILATE", [x(EDGE)], [y(EDGE)])) == ["DILATE: it does not have that operator"]
    assert reasons(Op("CONV_2D", [x(EDGE), weights((2, 1, 1, 4))], [y((1, 8, 8, 2))], version=7)) == []


def test_dense_layers_with_many_scales_are_right_on_integers_and_wrong_on_floats() -> None:
    kernel = weights((2, 4), scales=2)
    assert reasons(dense("int8", kernel, version=4)) == []
    assert "wrong values" in reasons(dense("float32", kernel))[0]
    assert reasons(dense("float32", weights((2, 4)))) == []


@pytest.mark.parametrize(
    ("operator", "word"),
    [
        (Op("RSQRT", [x(EDGE, "int16")], [y(EDGE, "int16")], version=2), "RSQRT on int16: it has no kernel"),
        (Op("GELU", [x(EDGE, "int16")], [y(EDGE, "int16")], version=2), "GELU on int16"),
        (Op("DIV", [x(EDGE), x(EDGE)], [y(EDGE)]), "DIV on int8"),
        (Op("SUM", [x(EDGE, "int16"), ints(1)], [y((1, 8, 4), "int16")], version=2), "SUM on int16: it computes wrong"),
        (Op("MUL", [x((1, 2, 2, 2, 4), "int16"), weights((4,), "int16")], [y((1, 2, 2, 2, 4), "int16")]), "it crashes"),
        (Op("TRANSPOSE_CONV", [ints(1, 8, 8, 2), weights((2, 1, 1, 4)), x(EDGE, "float32")], [y(EDGE, "float32")]), "no kernel"),
        (dense("float32", weights((2, 4), "int4")), "int4 weights"),
        (dense("float32", weights((2, 4), "int2")), "does not know that type"),
        (dense("float32", weights((2, 4), scales=0, blockwise=True)), "quantized in blocks"),
    ],
)  # fmt: skip
def test_kernels_that_it_lacks_behind_versions_that_it_has(operator: Op, word: str) -> None:
    (reason,) = reasons(operator)
    assert word in reason


def test_a_reason_is_told_once_however_often_the_operator_stands_in_the_file() -> None:
    square = weights((4, 4), scales=4)
    layers = [T(f"layer{i}", (1, 4), "float32", scales=0) for i in range(4)]
    chain = [Op("FULLY_CONNECTED", [a, square, None], [b], 12) for a, b in itertools.pairwise(layers)]
    assert len(reasons(*chain)) == 1


def test_the_first_release_is_the_newest_that_any_operator_needs() -> None:
    def first(*operators: Op) -> str | None:
        return runtimes.min_runtime(graph.read(build(operators)))

    relu = Op("RELU", [x(EDGE)], [y(EDGE)])
    assert first(relu) == "1.5"
    assert first(relu, Op("GELU", [x(EDGE)], [y(EDGE)])) == "2.9"
    assert first(Op("RELU", [x(EDGE)], [y(EDGE)], version=99)) is None
    # litert-quantizer leaves the version of the float file on such a layer.
    assert first(dense("float32", weights((2, 4), scales=2), version=1)) == "2.17"


def test_custom_operators_are_named_and_those_that_runtimes_have_are_not() -> None:
    names = ("FlexErf", "MyOperator", "TFLite_Detection_PostProcess", "edgetpu-custom-op")
    found = graph.read(build([Op(name, [x(EDGE)], [y(EDGE)], custom=True) for name in names]))
    assert runtimes.custom_operators(found) == (["FlexErf"], ["MyOperator"])


# --- Edge TPU -------------------------------------------------------------------------------------------------------------


def conv(**more: Any) -> Op:
    """Give a quantized convolution that an Edge TPU takes, unless told otherwise."""
    chosen = options("Conv2DOptions", **{"dilationHFactor": 1, "dilationWFactor": 1, **more})
    return Op("CONV_2D", [x(EDGE), weights((2, 1, 1, 4), scales=2), None], [y((1, 8, 8, 2))], 3, chosen)


TAKEN = [
    conv(),
    conv(dilationHFactor=2, dilationWFactor=2, fusedActivationFunction=3),
    dense("int8", weights((2, 4))),
    Op("SOFTMAX", [x((1, 1000))], [y((1, 1000))], 2),
    Op("MEAN", [x(EDGE), ints(1, 2)], [y((1, 4))], 2),
    Op("MEAN", [x(EDGE), ints(-1)], [y((1, 8, 8))], 2),
    Op("STRIDED_SLICE", [x(EDGE), ints(0, 0, 0, 0), ints(1, 4, 4, 4), ints(1, 1, 1, 1)], [y((1, 4, 4, 4))], 2),
    Op("PAD", [x(EDGE), pairs((0, 0), (1, 1), (1, 1), (0, 0))], [y((1, 10, 10, 4))], 2),
    Op("CONCATENATION", [x(EDGE), T("z", EDGE)], [y((1, 8, 8, 8))], 2, options("ConcatenationOptions", axis=3)),
    Op("QUANTIZE", [x(EDGE, "int8")], [y(EDGE, "uint8")], 2),
    Op("MUL", [x(EDGE), weights((4,))], [y(EDGE)], 2, options("MulOptions", fusedActivationFunction=1)),
    Op("TRANSPOSE_CONV", [ints(1, 8, 8, 2), weights((2, 1, 1, 4)), x(EDGE), None], [y((1, 8, 8, 2))], 3),
]


@pytest.mark.parametrize("operator", TAKEN, ids=lambda operator: operator.name)
def test_what_keeps_corals_rules_is_expected_on_the_edge_tpu(operator: Op) -> None:
    assert edge_rule(operator) is None


REFUSED = [
    (conv(dilationHFactor=1, dilationWFactor=2), "must be equal"),
    (Op("CONV_2D", [x(EDGE), T("w", (2, 1, 1, 4)), None], [y((1, 8, 8, 2))]), "'w' is computed while the model runs"),
    (Op("CONV_2D", [x((2, 8, 8, 4)), weights((2, 1, 1, 4))], [y((2, 8, 8, 2))]), "above 1 outside its three innermost"),
    (Op("RELU", [x(EDGE, "float32")], [y(EDGE, "float32")]), "computes in float32"),
    (Op("RELU", [x(EDGE, "int16")], [y(EDGE, "int16")]), "computes in int16"),
    (Op("ADD", [x(EDGE), weights((4,), "float32")], [y(EDGE)]), "float32 constants"),
    (Op("RELU", [x(EDGE, signature=(1, -1, -1, 4))], [y(EDGE)]), "is open (1×-1×-1×4)"),
    (Op("MAX_POOL_2D", [x(EDGE)], [y(EDGE)], 2, options("Pool2DOptions", fusedActivationFunction=1)), "fused activation RELU"),
    (
        Op("CONCATENATION", [x(EDGE), T("z", EDGE)], [y(EDGE)], 2, options("ConcatenationOptions", fusedActivationFunction=3)),
        "fused activation RELU6",
    ),
    (Op("CONCATENATION", [x(EDGE), weights(EDGE)], [y((1, 8, 8, 8))], 2), "the constant must be zeros"),
    (dense("int8", weights((2, 4), scales=2)), "a scale for each output"),
    (dense("int8", weights((2, 4)), rows=3), "the output must have one dimension; it is 3×2"),
    (dense("int8", weights((2, 4)), version=5, keepNumDims=True), "one dimension"),
    (dense("int8", weights((2, 4)), weightsFormat=1), "default format"),
    (Op("SOFTMAX", [x((1, 16_001))], [y((1, 16_001))], 2), "at most 16,000 values"),
    (Op("SOFTMAX", [x((4, 4))], [y((4, 4))], 2), "one dimension only; this is 4×4"),
    (Op("MEAN", [x(EDGE), ints(0)], [y((8, 8, 4))], 2), "must not reduce the batch"),
    (Op("MEAN", [x((1, 8, 8, 6)), ints(3)], [y((1, 8, 8))], 2), "multiple of 4 channels; these are 6"),
    (Op("STRIDED_SLICE", [x(EDGE), ints(0), ints(8), ints(2)], [y(EDGE)], 2), "strides must be 1"),
    (
        Op("STRIDED_SLICE", [x(EDGE), ints(0), ints(8), ints(1)], [y(EDGE)], 2, options("StridedSliceOptions", newAxisMask=1)),
        "new_axis_mask",
    ),
    (Op("PAD", [x(EDGE), pairs((1, 0), (0, 0), (0, 0), (0, 0))], [y((2, 8, 8, 4))], 2), "must not pad the batch"),
    (Op("PACK", [x((8, 4)), T("z", (8, 4))], [y((2, 8, 4))], 2, options("PackOptions", axis=0)), "pack along the batch"),
    (Op("SPLIT", [ints(0), x((2, 4))], [y((1, 4))], 2), "split the batch"),
    (Op("PRELU", [x(EDGE), weights((8, 8, 4))], [y(EDGE)]), "shared_axes=[1, 2]"),
    (
        Op("RESIZE_BILINEAR", [x(EDGE), ints(16, 16)], [y((1, 16, 16, 4))], 3, options("ResizeBilinearOptions", halfPixelCenters=True)),
        "half_pixel_centers",
    ),
    (Op("LEAKY_RELU", [x(EDGE)], [y(EDGE)], 2), "no such operator"),
    (Op("TRANSPOSE_CONV", [ints(1), weights((2, 1, 1, 4)), x(EDGE)], [y(EDGE)], 4), "of TensorFlow 2.13, is newer than the compiler"),
    (Op("MyOperator", [x(EDGE)], [y(EDGE)], custom=True), "no custom operators"),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "words"), REFUSED, ids=[f"{one.name}-{words[:24]}" for one, words in REFUSED])
def test_the_rule_of_the_edge_tpu_that_fails_is_told(operator: Op, words: str) -> None:
    rule = edge_rule(operator)
    assert rule is not None
    assert words in rule


def test_a_padding_of_zeros_written_as_a_concatenation_is_expected() -> None:
    zeros = T("zeros", EDGE, "int8", np.full(EDGE, -128, np.int8), zero_point=-128)
    assert edge_rule(Op("CONCATENATION", [x(EDGE), zeros], [y((1, 8, 8, 8))], 2)) is None


def chain(*names: str) -> list[Op]:
    """Give operators one after the other between float inputs and outputs."""
    values = [T(f"layer{i}", EDGE) for i in range(len(names) + 1)]
    middle = [Op(name, [a], [b], 2) for name, (a, b) in zip(names, itertools.pairwise(values), strict=True)]
    first = Op("QUANTIZE", [T("in", EDGE, "float32", scales=0)], [values[0]])
    return [first, *middle, Op("DEQUANTIZE", [values[-1]], [T("out", EDGE, "float32", scales=0)], 2)]


def test_what_comes_after_the_first_refused_operator_is_not_in_the_piece_whatever_it_is() -> None:
    found = edgetpu.examine(graph.read(build(chain("RELU", "RELU6", "LEAKY_RELU", "RELU", "RELU"))))
    assert [one.expected for one in found.operators] == [False, True, True, False, True, True, False]
    assert found.prefix == 2
    assert found.stopped_by is not None
    assert found.stopped_by.told == "LEAKY_RELU (operator 3: the Edge TPU has no such operator)"


def test_float_inputs_and_outputs_stay_on_the_cpu_and_end_nothing() -> None:
    found = edgetpu.examine(graph.read(build(chain("RELU", "TANH"))))
    assert (found.prefix, found.stopped_by) == (2, None)
    assert {found.operators[0].rule, found.operators[-1].rule} == {
        "it takes floats: it stays on the CPU",
        "it gives floats: it stays on the CPU",
    }
    back = [T("a", EDGE), T("b", EDGE, "float32", scales=0), T("c", EDGE), T("d", EDGE)]
    inner = [
        Op("DEQUANTIZE", [back[0]], [back[1]]),
        Op("QUANTIZE", [back[1]], [back[2]]),
        Op("RELU", [back[2]], [back[3]]),
    ]
    assert edgetpu.examine(graph.read(build(inner))).stopped_by is not None, "inside of a graph they end the piece"


def test_one_operator_that_is_newer_than_the_compiler_spoils_the_whole_file() -> None:
    value = [T(f"v{i}", EDGE) for i in range(3)]
    found = edgetpu.examine(graph.read(build([Op("RELU", value[:1], value[1:2]), Op("GELU", value[1:2], value[2:])])))
    assert found.prefix == 0
    assert found.stopped_by is not None
    assert "refuses a file that has it" in found.stopped_by.told


def test_bodies_of_loops_are_not_compiled() -> None:
    relu = Op("RELU", [x(EDGE)], [y(EDGE)])
    found = edgetpu.examine(graph.read(build([relu], [relu])))
    assert [one.expected for one in found.operators] == [True, False]
    assert (found.prefix, found.stopped_by) == (1, None)


# --- GPU ------------------------------------------------------------------------------------------------------------------


GPU_REFUSED = [
    (Op("RELU", [x(EDGE, "int16")], [y(EDGE, "int16")]), "it takes int16"),
    (Op("ARG_MAX", [x(EDGE), ints(3)], [y((1, 8, 8), "int32")]), "no such operator"),
    (Op("ADD", [x((4,), "int64"), T("b", (4,), "int64")], [y((4,), "int64")]), "it takes int64"),
    (Op("RELU", [x((1, 1, 8, 8, 4))], [y((1, 1, 8, 8, 4))]), "more than 4 dimensions"),
    (Op("RELU", [x((2, 8, 8, 4))], [y((2, 8, 8, 4))]), "the batch of 2×8×8×4"),
    (Op("RELU", [x((1, 8, 4), signature=(1, -1, 4))], [y((1, 8, 4))]), "is open"),
    (Op("WHILE", [x(EDGE)], [y(EDGE)]), "loops and branches"),
    (Op("MUL", [x((1, 16, 1)), T("b", (1, 1, 32))], [y((1, 16, 32))]), "only one side may be repeated"),
    (Op("MEAN", [x(EDGE), T("axes", (2,), "int32")], [y((1, 4))]), "'axes' is computed while the model runs"),
    (Op("PAD", [x((8, 4)), pairs((0, 0), (1, 1))], [y((8, 6))]), "3 or 4 dimensions"),
    (Op("SOFTMAX", [x((1, 9))], [y((1, 9))], options=options("SoftmaxOptions", beta=0.5)), "beta"),
    (Op("SLICE", [x((4, 4)), ints(0, 0), ints(2, 2)], [y((2, 2))]), "it takes 3 or 4 dimensions; this is 4×4"),
    (
        Op("STRIDED_SLICE", [x(EDGE), ints(0), ints(1), ints(1)], [y((8, 8, 4))], options=options("StridedSliceOptions", shrinkAxisMask=1)),
        "shrink_axis_mask",
    ),
    (
        Op("DEPTHWISE_CONV_2D", [x(EDGE), weights((1, 3, 3, 8))], [y(EDGE)], 2, options("DepthwiseConv2DOptions", depthMultiplier=2)),
        "one input channel only",
    ),
    (Op("CAST", [x(EDGE, "int32")], [y(EDGE, "bool")]), "does not cast int32 to bool"),
    (Op("BATCH_MATMUL", [x((1, 8, 4)), weights((1, 4, 8))], [y((1, 8, 8))]), "a constant factor must have 2 dimensions"),
    (Op("MyOperator", [x(EDGE)], [y(EDGE)], custom=True), "custom operator"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "words"), GPU_REFUSED, ids=[f"{one.name}-{words[:20]}" for one, words in GPU_REFUSED]
)
def test_the_rule_of_the_gpu_that_fails_is_told(operator: Op, words: str) -> None:
    rule = gpu_rule(operator)
    assert rule is not None
    assert words in rule


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8"])
def test_floats_and_eight_bit_integers_are_expected_on_the_gpu(dtype: str) -> None:
    kernel = weights((2, 1, 1, 4), "float32" if dtype.startswith("float") else "int8", scales=2)
    assert gpu_rule(Op("CONV_2D", [x(EDGE, dtype), kernel, None], [y((1, 8, 8, 2), dtype)])) is None


def test_comparisons_give_truth_values_on_the_gpu() -> None:
    assert gpu_rule(Op("GREATER", [x(EDGE, "float32"), weights((4,), "float32")], [y(EDGE, "bool")])) is None


def test_float16_weights_are_expected_on_the_gpu_with_what_unpacks_them() -> None:
    packed, unpacked = weights((2, 4), "float16", scales=0), T("w32", (2, 4), "float32", scales=0)
    given = x((1, 4), "float32", scales=0)
    file = build([Op("DEQUANTIZE", [packed], [unpacked]), dense_on(given, unpacked)], inputs=[given])
    assert [one.expected for one in gpu.examine(graph.read(file))] == [True, True]


def dense_on(given: T, kernel: T) -> Op:
    """Give a float dense layer on a tensor."""
    return Op("FULLY_CONNECTED", [given, kernel, None], [y((1, 2), "float32", scales=0)])


# --- the report -----------------------------------------------------------------------------------------------------------


def test_the_report_has_exactly_what_the_bundle_promises_and_is_json() -> None:
    file = build(chain("RELU", "LEAKY_RELU", "RELU"))
    report = compatibility.examine(file, claimed={"RELU": 2, "QUANTIZE": 1}, runtime_version="2.3.0")
    assert json.loads(json.dumps(report)) == report
    assert report["operators"][0] == {"name": "DEQUANTIZE", "version": 2, "count": 1}
    assert {"name": "RELU", "version": 2, "count": 2} in report["operators"]
    assert report["runtimes"] == [
        {"name": "tflite-runtime 2.14", "loads": True, "reasons": []},
        {"name": "ai-edge-litert 2.3.0", "loads": True, "reasons": []},
    ]
    assert report["min_runtime"] == "2.3"
    assert report["xnnpack"] == {"claimed": 3, "total": 5, "left": {"DEQUANTIZE": 1, "LEAKY_RELU": 1}}
    edge = report["edgetpu"]
    assert {key: edge[key] for key in ("expected", "total", "prefix", "more")} == {
        "expected": 2,
        "total": 5,
        "prefix": 1,
        "more": 0,
    }
    assert edge["operators"][2] == {
        "index": 2,
        "operator": "LEAKY_RELU",
        "name": "layer2",
        "expected": False,
        "rule": "the Edge TPU has no such operator",
    }
    assert (report["gpu"]["expected"], report["gpu"]["total"]) == (5, 5)
    assert (report["flex"], report["custom"]) == ([], [])


def test_the_sentences_say_what_is_expected_and_never_what_is_mapped() -> None:
    report = compatibility.examine(
        build(chain("RELU", "LEAKY_RELU", "RELU")), claimed={"RELU": 2}, runtime_version="2.3.0"
    )
    assert compatibility.lines(report, "int8") == [
        "int8: XNNPACK takes 2 of 5 operators; left: DEQUANTIZE ×1, LEAKY_RELU ×1, QUANTIZE ×1",
        (
            "int8: expected on the Edge TPU: 2 of 5 operators, 1 of them in the one piece that is compiled, which ends at "
            "LEAKY_RELU (operator 2: the Edge TPU has no such operator)"
        ),
        "int8: expected on a GPU: 5 of 5 operators",
    ]
    old = compatibility.examine(
        build([dense("float32", weights((2, 4), scales=2), version=12)]), claimed=None, runtime_version="2"
    )
    told = compatibility.lines(old, "dynamic")
    assert (
        "dynamic: not for tflite-runtime 2.14: FULLY_CONNECTED version 12 (of TensorFlow 2.17): it has up to 10" in told
    )
    assert not any("mapped" in line for line in told)


def test_a_giant_model_is_cut_to_what_is_refused_and_the_rest_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "MAX_VERDICTS", 3)
    report = compatibility.examine(
        build(chain("RELU", "RELU", "LEAKY_RELU", "RELU")), claimed=None, runtime_version="2.3.0"
    )
    kept = report["edgetpu"]["operators"]
    assert [(one["index"], one["expected"]) for one in kept] == [(0, False), (3, False), (5, False)]
    assert (report["edgetpu"]["more"], report["edgetpu"]["total"]) == (3, 6)


def test_a_compiled_file_needs_the_edge_tpu() -> None:
    report = compatibility.examine(
        (DATA / "models" / "edgetpu.tflite").read_bytes(), claimed=None, runtime_version="2.3.0"
    )
    assert [entry["loads"] for entry in report["runtimes"]] == [False, False]
    assert report["edgetpu"]["stopped_by"] is None
    assert report["custom"] == []
    assert "edgetpu-custom-op: runs with an Edge TPU and its delegate only" in " ".join(
        compatibility.lines(report, "edgetpu")
    )
