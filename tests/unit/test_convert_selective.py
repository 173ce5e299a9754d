"""Which layers stay float, and what the converter says of what TensorFlow only hints at."""

from __future__ import annotations

import errno

import pytest

from edge_serve.errors import UsageError
from edge_serve_converters import saved_model, selective, tflite, wanted
from edge_serve_converters.channel import disk_full
from edge_serve_converters.request import Wanted

LAYERS = [f"layer{number}" for number in range(60)]


def search(needed: set[str], ranked: list[str], fixed: tuple[str, ...] = ()) -> tuple[tuple[str, ...] | None, int]:
    """Search for the layers in `needed`; gives what was found and how many trials it took."""
    trials: list[tuple[str, ...]] = []

    def passes(kept: tuple[str, ...]) -> bool:
        trials.append(kept)
        return needed <= set(kept)

    return selective.fewest(ranked, passes, fixed), len(trials)


@pytest.mark.parametrize("needed", [{"layer0"}, {"layer3", "layer40"}, {"layer59"}, {"layer7", "layer8", "layer31"}])
def test_the_layers_that_are_needed_are_found_and_no_others(needed: set[str]) -> None:
    found, trials = search(needed, LAYERS)
    assert found is not None
    assert set(found) == needed
    assert trials <= selective.MAX_TRIALS


def test_nothing_is_kept_where_nothing_is_needed() -> None:
    assert search(set(), LAYERS) == ((), 1)


def test_what_the_person_named_stays() -> None:
    found, _ = search({"layer2"}, LAYERS, ("named",))
    assert found == ("named", "layer2")


def test_where_all_layers_are_not_enough_there_is_no_answer() -> None:
    assert search({"another"}, LAYERS)[0] is None


def test_patterns_fit_operators_and_the_parts_of_fused_names() -> None:
    layers = [("CONV_2D", "a/Relu;a/BiasAdd"), ("SOFTMAX", "scores"), ("CONV_2D", "b/Relu")]
    assert selective.match(["conv_2d"], layers) == ("a/Relu;a/BiasAdd", "b/Relu")
    assert selective.match(["a/BiasAdd", "sco*"], layers) == ("a/Relu;a/BiasAdd", "scores")
    with pytest.raises(UsageError, match="no operator or layer of the model is named so"):
        selective.match(["dense"], layers)


def test_a_source_with_float16_weights_is_one_variant_under_either_name() -> None:
    asked = (Wanted("float32", "none"), Wanted("float16", "float16"), Wanted("dynamic", "dynamic"))
    assert [(one.name, one.mode) for one in wanted.for_source(asked, "float16")] == [
        ("float16", "none"),
        ("dynamic", "dynamic"),
    ]
    assert wanted.for_source(asked, "float32") == asked


def test_a_quantized_source_is_not_quantized_again() -> None:
    with pytest.raises(UsageError, match="quantizing twice"):
        wanted.for_source((Wanted("float16", "float16"),), "int8")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            "Max and min for dynamic tensors should be recorded during calibration: Failed for tensor model/lstm/while_cond_arg0",
            "cannot take a loop",
        ),
        (
            "Max and min for dynamic tensors should be recorded during calibration: Failed for tensor tokens:0",
            "no range for tensor tokens:0",
        ),
        ("Quantization to 16x8-bit not yet supported for op: 'PRELU'.", "no 16-bit form of PRELU"),
        ("Quantization to 16x8-bit not yet supported for op: 'DEQUANTIZE'.", "was trained for 8 bits"),
    ],
)
def test_what_sixteen_bits_cannot_do_is_said_in_words(message: str, words: str) -> None:
    error = tflite.explain(RuntimeError(message))
    assert words in str(error)
    assert "convert to int8" in str(error)


def test_arguments_of_keras_2_that_mean_nothing_are_dropped_in_layers_inside_layers_too() -> None:
    inner = {"class_name": "LSTM", "config": {"units": 3, "time_major": False}}
    model = {
        "class_name": "Functional",
        "config": {"layers": [{"class_name": "Bidirectional", "config": {"layer": inner}}]},
    }
    assert saved_model.drop_keras_2_arguments(model)
    assert inner["config"] == {"units": 3}
    assert not saved_model.drop_keras_2_arguments(model)
    meant = {"class_name": "LSTM", "config": {"time_major": True}}
    assert not saved_model.drop_keras_2_arguments(meant)
    assert meant["config"] == {"time_major": True}


def test_a_full_disk_is_recognised_however_it_is_reported() -> None:
    assert disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert disk_full(RuntimeError("part-00000.tempstate1; No space left on device [Op:SaveV2]"))
    assert disk_full(OSError("110592 requested and 9184 written"))
    assert not disk_full(OSError(errno.EACCES, "Permission denied"))
