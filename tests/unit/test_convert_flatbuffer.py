"""What a file holds is told from its operators and tensors, and damaged files are refused and not half read."""

from __future__ import annotations

import pytest

from edge_serve_converters.flatbuffer import read_contents
from tests.unit.tflite_files import Op, T, build, weights, x


def value(name: str, dtype: str = "float32") -> T:
    """Give a tensor that is no constant."""
    return T(name, (1, 4), dtype, scales=0)


def test_only_weights_that_the_file_holds_are_constants() -> None:
    packed, unpacked = weights((2, 4), "float16", scales=0), T("w32", (2, 4), "float32", scales=0)
    given = x((1, 4), "float32", scales=0)
    dense = Op("FULLY_CONNECTED", [given, unpacked, None], [value("y")])
    contents = read_contents(build([Op("DEQUANTIZE", [packed], [unpacked]), dense], inputs=[given]))
    assert contents.constants == {"FLOAT16"}
    assert contents.operators == {"DEQUANTIZE": 1, "FULLY_CONNECTED": 1}
    assert contents.float_operators == {"FULLY_CONNECTED": 1}


def test_operators_in_the_bodies_of_loops_count() -> None:
    relu = Op("RELU", [x((1, 4))], [T("y", (1, 4))])
    add = Op("ADD", [value("a"), value("b")], [value("c")])
    contents = read_contents(build([relu], [add, add]))
    assert contents.operators == {"ADD": 2, "RELU": 1}
    assert (contents.float_operators, contents.integer_operators) == ({"ADD": 2}, 1)


@pytest.mark.parametrize(
    ("name", "lacking", "in_float"),
    [
        ("TFLite_Detection_PostProcess", False, False),
        ("AudioSpectrogram", False, True),
        ("Mfcc", False, True),
        ("FlexErf", True, True),
        ("edgetpu-custom-op", True, True),
    ],
)
def test_custom_operators_are_lacking_unless_all_runtimes_have_them(name: str, lacking: bool, in_float: bool) -> None:
    contents = read_contents(build([Op(name, [value("x")], [value("y")], custom=True)]))
    assert contents.custom == ((name,) if lacking else ())
    assert (name in contents.float_operators) == in_float, "only what detectors end in counts as no fallback"


def test_variables_that_nobody_sets_are_lost_weights_and_those_that_are_set_are_state() -> None:
    handle, read = value("handle", "resource"), value("read")
    operators = [Op("VAR_HANDLE", [], [handle]), Op("READ_VARIABLE", [handle], [read])]
    lost = read_contents(build([*operators, Op("ADD", [value("x"), read], [value("y")])]))
    assert (lost.weightless, lost.stateful) == (True, False)
    kept = read_contents(build([*operators, Op("ASSIGN_VARIABLE", [handle, read], [])]))
    assert (kept.weightless, kept.stateful) == (False, True)


def test_a_damaged_file_is_refused_with_a_reason() -> None:
    data = build([Op("RELU", [x((1, 4))], [T("y", (1, 4))])])
    with pytest.raises(ValueError, match="a damaged TFLite file"):
        read_contents(data[: len(data) // 2])
