"""The engine: tensors in, tensors out, on a delegate that is what it says, and errors that leave the next frame alone."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve.bundle import TensorSpec
from edge_serve.errors import DelegateError, InferenceError, InputError, ModelError
from edge_serve.model import signatures
from edge_serve.model.engine import Engine, available_cores
from edge_serve.model.interpreter import Runtime
from tests.unit.material import BIAS, WEIGHTS, assert_close, model


def opened(runtime: Runtime, name: str, **options: Any) -> Engine:
    return Engine.open(model(name), runtime=runtime, **options)


@pytest.mark.parametrize("chosen", ["auto", "none", "xnnpack"])
@pytest.mark.parametrize("cores", [0, 1, 2])
def test_a_float_model_computes_what_it_should(runtime: Runtime, chosen: str, cores: int) -> None:
    engine = opened(runtime, "linear", delegate=chosen, threads=cores)
    x = np.array([[1, -2, 3, 0.5]], np.float32)
    assert_close(engine.run({"x": x})["scores"], x @ WEIGHTS + BIAS, rtol=1e-5)
    assert engine.threads >= 1


def test_an_engine_says_what_it_takes_and_gives(runtime: Runtime) -> None:
    engine = opened(runtime, "linear")
    assert engine.signature == "serving_default"
    assert engine.inputs == {"x": TensorSpec("x", "float32", (1, 4))}
    assert engine.outputs == {"scores": TensorSpec("scores", "float32", (1, 3))}
    assert engine.operators == {"FULLY_CONNECTED": 1}


def test_a_quantized_model_keeps_its_integers(runtime: Runtime) -> None:
    engine = opened(runtime, "int8")
    spec, out = engine.inputs["x"], engine.outputs["scores"]
    assert spec.dtype == out.dtype == "int8"
    assert spec.scale is not None
    assert out.scale is not None
    assert out.zero_point is not None
    x = np.array([[10, -20, 30, 40]], np.int8)
    scores = engine.run({"x": x})["scores"]
    assert scores.dtype == np.int8
    real = (x.astype(np.float32) - (spec.zero_point or 0)) * spec.scale
    found = (scores.astype(np.float32) - out.zero_point) * out.scale
    assert_close(found, real @ WEIGHTS + BIAS, atol=2 * out.scale)


def test_several_inputs_and_outputs_go_by_name(runtime: Runtime) -> None:
    outputs = opened(runtime, "two_by_two").run(
        {"b": np.array([[3, 4, 5]], np.float32), "a": np.array([[1, 2]], np.float32)}
    )
    assert outputs["joined"].tolist() == [[1, 2, 3, 4, 5]]
    assert outputs["total"].tolist() == [[15]]


def test_results_stay_when_the_model_runs_again(runtime: Runtime) -> None:
    for signature in ("serving_default", "total"):
        engine = opened(runtime, "linear", signature=signature)
        name = next(iter(engine.outputs))
        first = engine.run({"x": np.ones((1, 4), np.float32)})[name]
        before = first.copy()
        engine.run({"x": np.full((1, 4), 9, np.float32)})
        np.testing.assert_array_equal(first, before)


# Signatures.


def test_every_signature_can_be_used_also_one_outside_of_the_primary_subgraph(runtime: Runtime) -> None:
    x = np.array([[1, 2, 3, 4]], np.float32)
    assert opened(runtime, "linear", signature="total").run({"x": x})["total"].tolist() == [[10]]
    assert opened(runtime, "named", signature="mean").run({"x": x})["mean"].tolist() == [[2.5]]
    assert opened(runtime, "named", signature="total").run({"x": x})["total"].tolist() == [[10]]


def test_a_signature_that_is_not_there_is_answered_with_the_known_ones(runtime: Runtime) -> None:
    with pytest.raises(ModelError, match=r"linear.tflite: has no signature 'train'; it has: serving_default, total"):
        opened(runtime, "linear", signature="train")


def test_a_model_with_several_signatures_and_no_default_asks_which(runtime: Runtime) -> None:
    with pytest.raises(ModelError, match=r"has the signatures mean, total and none is serving_default; say which"):
        opened(runtime, "named")


def test_a_model_without_signatures_has_one_made_from_its_tensors_names(runtime: Runtime) -> None:
    engine = opened(runtime, "bare")
    assert engine.signature == "serving_default"
    ((name, spec),) = engine.inputs.items()
    assert (spec.shape, ":" in name) == ((1, 4), False)
    x = np.array([[1, 2, 3, 4]], np.float32)
    (scores,) = engine.run({name: x}).values()
    assert_close(scores, x @ WEIGHTS + BIAS, rtol=1e-5)
    with pytest.raises(ModelError, match="has no signature 'x'; it has: serving_default"):
        opened(runtime, "bare", signature="x")


def test_a_signature_is_described_as_the_manifest_writes_it(runtime: Runtime) -> None:
    interpreter = runtime.open(model("dynamic"), threads=1, xnnpack=True)
    described = signatures.bind(interpreter, "serving_default", "x").describe()
    assert described.inputs["x"].shape == (-1, 3)
    assert described.outputs["logs"].dtype == "float32"


def test_text_models_are_refused(runtime: Runtime) -> None:
    with pytest.raises(ModelError, match=r"text.tflite: tensor 'words' holds text; text models are not supported"):
        opened(runtime, "text")


# Shapes.


def test_a_dynamic_batch_may_change_with_every_run(runtime: Runtime) -> None:
    engine = opened(runtime, "dynamic")
    assert engine.inputs["x"].shape == (-1, 3)
    for batch in (1, 5, 2, 2, 300, 1):
        x = np.arange(1, batch * 3 + 1, dtype=np.float32).reshape(batch, 3)
        assert_close(engine.run({"x": x})["logs"], np.log(x), rtol=1e-5)


def test_an_image_of_any_size(runtime: Runtime) -> None:
    engine = opened(runtime, "any_size")
    for height, width in ((4, 6), (1, 1), (50, 3)):
        image = np.full((1, height, width, 3), 0.25, np.float32)
        assert_close(engine.run({"image": image})["means"], [[0.25] * 3], rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4), (1, 5), (4,), (1, 4, 1), ()])
@pytest.mark.parametrize("signature", ["serving_default", "total"])
def test_an_array_of_another_shape_is_refused_and_the_next_one_passes(
    runtime: Runtime, shape: tuple[int, ...], signature: str
) -> None:
    engine = opened(runtime, "linear", signature=signature)
    with pytest.raises(InputError, match=r"input 'x' has shape .*, the model takes \[1, 4\]"):
        engine.run({"x": np.zeros(shape, np.float32)})
    engine.run({"x": np.zeros((1, 4), np.float32)})


def test_a_shape_that_cannot_be_had_leaves_the_interpreter_usable(runtime: Runtime) -> None:
    engine = opened(runtime, "strict")
    for _ in range(2):
        with pytest.raises(InputError, match=r"input 'x' cannot have shape \[2, 3\]: "):
            engine.run({"x": np.ones((2, 3), np.float32)})
        assert engine.run({"x": np.array([[1, 2, 3]], np.float32)})["joined"].tolist() == [[1, 2, 3, 7, 8, 9]]


# Failures.


def test_a_failure_inside_the_interpreter_concerns_one_frame(runtime: Runtime) -> None:
    engine = opened(runtime, "lookup", delegate="none")
    with pytest.raises(InferenceError, match=r"lookup.tflite: .*(gather|GATHER).*"):
        engine.run({"index": np.array([7], np.int32)})
    assert engine.run({"index": np.array([2], np.int32)})["value"].tolist() == [30]


def test_a_model_that_fails_at_its_first_run_is_refused(runtime: Runtime) -> None:
    with pytest.raises(ModelError, match=r"never.tflite: fails on its first run: "):
        opened(runtime, "never")


def test_an_array_of_another_dtype_is_told(runtime: Runtime) -> None:
    with pytest.raises(InferenceError):
        opened(runtime, "linear").run({"x": np.zeros((1, 4), np.float64)})


def test_names_that_are_no_text_are_damage(runtime: Runtime, tmp_path: Path) -> None:
    data = bytearray(model("linear").read_bytes())
    data[data.index(b"PartitionedCall:0") + 3] = 0xD4
    file = tmp_path / "damaged.tflite"
    file.write_bytes(data)
    with pytest.raises(ModelError, match=r"damaged.tflite: is damaged \(.*\); copy or convert the model again"):
        Engine.open(file, runtime=runtime)


DAMAGED = """
import sys
from pathlib import Path
from edge_serve.errors import ModelError
from edge_serve.model.engine import Engine
from edge_serve.model.interpreter import load_runtime
runtime = load_runtime("litert")
for name in sys.argv[1:]:
    try:
        Engine.open(Path(name), runtime=runtime)
    except ModelError as error:
        assert name in str(error)
print("alive")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("ai_edge_litert") is None,
    reason="litert is not installed; tflite-runtime is known to crash on damaged files",
)
def test_damaged_files_are_refused_with_their_name(tmp_path: Path) -> None:
    """In a child: the runtimes do not survive every damage (the repository compares hashes before it opens a file)."""
    rng = random.Random(3)
    whole = model("linear").read_bytes()
    files = []
    for number in range(60):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(8, len(data))] = rng.randrange(256)
        if number % 3 == 0:
            del data[rng.randrange(8, len(data)) :]
        file = tmp_path / f"{number}.tflite"
        file.write_bytes(data)
        files.append(str(file))
    run = subprocess.run(
        [sys.executable, "-c", DAMAGED, *files], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert run.stdout.strip() == "alive", run.stderr


# Delegates and threads.


def test_the_delegates_name_says_what_runs(runtime: Runtime) -> None:
    assert opened(runtime, "linear").delegate == "xnnpack"
    assert opened(runtime, "linear", delegate="none").delegate == "none"
    engine = opened(runtime, "lookup", delegate="xnnpack")
    assert (engine.delegate, engine.claims.taken, engine.claims.total) == ("none", 0, 1)


def test_claims_count_each_operator_once(runtime: Runtime) -> None:
    claims = opened(runtime, "detector").claims
    assert claims.operators["TFLite_Detection_PostProcess"] == 1
    assert "TFLite_Detection_PostProcess" not in claims.claimed
    assert 0 < claims.taken < claims.total
    assert all(claims.claimed[name] <= claims.operators[name] for name in claims.claimed)


def test_what_is_no_delegate_of_the_cpu_is_answered_with_those_that_are(runtime: Runtime) -> None:
    with pytest.raises(DelegateError, match="'gpu' is no delegate of the CPU; known: auto, xnnpack, none"):
        opened(runtime, "linear", delegate="gpu")


def test_a_detectors_outputs_are_known_in_the_operators_own_order(runtime: Runtime) -> None:
    assert opened(runtime, "detector").detection_outputs == ("c_boxes", "d_classes", "b_scores", "a_number")
    assert opened(runtime, "linear").detection_outputs is None


def test_two_engines_of_one_file_do_not_disturb_each_other(runtime: Runtime) -> None:
    engines = [opened(runtime, "linear") for _ in range(2)]
    wrong: list[object] = []

    def run(engine: Engine, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(300):
            x = rng.uniform(-1, 1, (1, 4)).astype(np.float32)
            if not np.allclose(engine.run({"x": x})["scores"], x @ WEIGHTS + BIAS, rtol=1e-4, atol=1e-5):
                wrong.append(x)

    workers = [threading.Thread(target=run, args=(engine, seed)) for seed, engine in enumerate(engines)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_at_least_one_core_is_available() -> None:
    assert available_cores() >= 1
