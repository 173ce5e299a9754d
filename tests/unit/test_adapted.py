"""One variant stands in for another: its tensors look like the other's, and its results are as good as quantization allows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve.bundle import TensorSpec
from edge_serve.errors import InferenceError, InputError, ModelError
from edge_serve.model.adapted import AdaptedEngine, adapt
from edge_serve.model.delegate import Claims
from edge_serve.model.engine import Engine
from edge_serve.model.interpreter import Runtime
from tests.unit.material import BIAS, WEIGHTS, assert_close, model


def opened(runtime: Runtime, name: str) -> Engine:
    return Engine.open(model(name), runtime=runtime)


def test_an_engine_with_the_same_tensors_is_left_alone(runtime: Runtime) -> None:
    engine = opened(runtime, "linear")
    assert adapt(engine, dict(engine.inputs), dict(engine.outputs)) is engine


def test_an_int8_file_stands_in_for_a_float_one(runtime: Runtime) -> None:
    real, engine = opened(runtime, "linear"), opened(runtime, "int8")
    adapted = adapt(engine, real.inputs, real.outputs)
    assert (adapted.inputs, adapted.outputs) == (real.inputs, real.outputs)
    spec = engine.inputs["x"]
    assert spec.scale is not None
    x = np.array([[10, -20, 30, 5]], np.float32) * np.float32(spec.scale)
    found = adapted.run({"x": x})["scores"]
    assert found.dtype == np.float32
    out = engine.outputs["scores"]
    assert out.scale is not None
    assert_close(found, x @ WEIGHTS + BIAS, atol=4 * out.scale)


def test_a_float_file_stands_in_for_an_int8_one(runtime: Runtime) -> None:
    quantized, engine = opened(runtime, "int8"), opened(runtime, "linear")
    adapted = adapt(engine, quantized.inputs, quantized.outputs)
    x = np.array([[10, -20, 30, 40]], np.int8)
    found, expected = adapted.run({"x": x})["scores"], quantized.run({"x": x})["scores"]
    assert found.dtype == np.int8
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 2


def test_input_that_no_integer_can_hold_is_a_bad_input(runtime: Runtime) -> None:
    adapted = adapt(opened(runtime, "int8"), opened(runtime, "linear").inputs, opened(runtime, "linear").outputs)
    with pytest.raises(InputError, match="NaN or infinite"):
        adapted.run({"x": np.full((1, 4), np.nan, np.float32)})


class Plain:
    """An engine with tensors as they are given, which gives what it is told to."""

    path, signature, threads, delegate, detection_outputs = Path("m.tflite"), "serving_default", 1, "none", None
    claims = Claims({}, {})
    operators: Mapping[str, int] = claims.operators

    def __init__(self, inputs: dict[str, TensorSpec], outputs: dict[str, TensorSpec], gives: Any = None) -> None:
        self.inputs, self.outputs, self.gives = inputs, outputs, gives

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(self.outputs, self.gives)

    def close(self) -> None:
        pass


def spec(dtype: str = "float32", shape: tuple[int, ...] = (1, 2), **fields: Any) -> dict[str, TensorSpec]:
    return {"t": TensorSpec("t", dtype, shape, **fields)}


def plain(*arguments: Any) -> Any:
    return Plain(*arguments)


def test_nan_that_no_integer_can_hold_is_a_failure_of_the_model() -> None:
    engine = plain(spec(), spec(), np.array([[np.nan, 1]], np.float32))
    adapted = adapt(engine, spec(), spec("int8", scale=0.1, zero_point=0))
    with pytest.raises(InferenceError, match="NaN"):
        adapted.run({"t": np.zeros((1, 2), np.float32)})


def test_whole_numbers_are_widened() -> None:
    adapted = adapt(plain(spec(), spec("int32"), np.array([[1, 2]], np.int32)), spec(), spec("int64"))
    assert adapted.run({"t": np.zeros((1, 2), np.float32)})["t"].dtype == np.int64


@pytest.mark.parametrize(
    ("have", "want", "why"),
    [
        (spec(), spec(shape=(1, 3)), r"shape \[1, 3\]"),
        (spec(), {"other": TensorSpec("other", "float32", (1, 2))}, "other inputs or outputs"),
        (spec("int32"), spec("float32"), "is float32, and int32"),
        (spec("bool"), spec("float32"), "is float32, and bool"),
    ],
)
def test_what_cannot_stand_in_is_refused(have: Any, want: Any, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        AdaptedEngine(plain(have, spec()), want, spec())
