"""LiteRT's WebGPU accelerator, for real: on Mesa's lavapipe, where a new enough one is, and refused there without consent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_serve.errors import DelegateAwayError, DelegateError, InputError
from edge_serve.model.delegate import DelegateSpec, Runnable
from edge_serve.model.engine import Engine
from edge_serve.model.interpreter import Runtime, load_runtime
from edge_serve.model.opening import open_model
from tests.support import MODELS
from tests.unit.material import assert_close

pytestmark = pytest.mark.slow

SOFTWARE = DelegateSpec("gpu", "", "", (("allow_software", "true"),))


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    found = load_runtime()
    if found.name != "litert":
        pytest.skip(f"{found.name} has no GPU accelerator")
    return found


@pytest.fixture(scope="module")
def gpu(runtime: Runtime) -> Iterator[Runnable]:
    try:
        engine = open_model(MODELS / "linear.tflite", SOFTWARE, runtime)
    except DelegateAwayError as error:
        pytest.skip(f"no Vulkan here (libvulkan1 and mesa-vulkan-drivers 24 or later would do): {error}")
    except DelegateError as error:
        pytest.skip(f"Vulkan here is too old for LiteRT: {error}")
    yield engine
    engine.close()


def test_results_are_those_of_the_cpu(gpu: Runnable, runtime: Runtime) -> None:
    assert (gpu.delegate, gpu.claims.taken, gpu.claims.total) == ("gpu", 1, 1)
    cpu = Engine.open(MODELS / "linear.tflite", runtime=runtime)
    rng = np.random.default_rng(5)
    for _ in range(20):
        inputs = {"x": rng.uniform(-1, 1, (1, 4)).astype(np.float32)}
        assert_close(gpu.run(inputs)["scores"], cpu.run(inputs)["scores"], rtol=1e-2, atol=1e-2)


def test_whole_floats_are_more_precise(gpu: Runnable, runtime: Runtime) -> None:
    spec = DelegateSpec("gpu", "", "", (("allow_software", "true"), ("precision", "float32")))
    engine = open_model(MODELS / "linear.tflite", spec, runtime)
    cpu = Engine.open(MODELS / "linear.tflite", runtime=runtime)
    inputs = {"x": np.array([[0.1, -0.7, 0.3, 0.9]], np.float32)}
    assert_close(engine.run(inputs)["scores"], cpu.run(inputs)["scores"], rtol=1e-5, atol=1e-5)
    engine.close()


def test_an_input_that_does_not_fit_leaves_the_next_one_alone(gpu: Runnable) -> None:
    with pytest.raises(InputError, match="has shape"):
        gpu.run({"x": np.zeros((1, 5), np.float32)})
    assert gpu.run({"x": np.zeros((1, 4), np.float32)})


def test_an_adapter_that_computes_on_the_cpu_counts_as_no_gpu(gpu: Runnable, runtime: Runtime) -> None:
    with pytest.raises(
        DelegateError, match=r"the only adapters compute on the CPU \(llvmpipe.*install the GPU's Vulkan driver"
    ):
        open_model(MODELS / "linear.tflite", DelegateSpec("gpu"), runtime)


@pytest.mark.parametrize(
    ("options", "file", "says"),
    [
        ({"allow_software": "true", "speed": "high"}, "linear", "unknown options speed"),
        ({"allow_software": "true", "precision": "int4"}, "linear", "precision is float16 or float32"),
        ({"allow_software": "true"}, "digits", "the GPU takes fixed shapes of float32"),
        ({"allow_software": "true"}, "dynamic", "the GPU takes fixed shapes"),
    ],
)
def test_what_it_does_not_take_is_told(
    gpu: Runnable, runtime: Runtime, options: dict[str, str], file: str, says: str
) -> None:
    with pytest.raises(DelegateError, match=says):
        open_model(MODELS / f"{file}.tflite", DelegateSpec("gpu", "", "", tuple(options.items())), runtime)


def test_without_a_driver_it_says_what_to_install(
    gpu: Runnable, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VK_DRIVER_FILES", str(tmp_path / "none.json"))
    begun = time.monotonic()
    with pytest.raises(DelegateAwayError, match="install the GPU's"):
        open_model(MODELS / "linear.tflite", SOFTWARE, runtime)
    assert time.monotonic() - begun < 20
