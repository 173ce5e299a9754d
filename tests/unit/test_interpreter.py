"""The runtimes: which one is taken, and what is said when a file cannot be used."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from edge_serve.errors import ModelError, RuntimeMissingError
from edge_serve.model.interpreter import ENVIRONMENT, MODULES, Runtime, check_file, load_runtime
from tests.unit.material import MODELS, model

INSTALLED = [name for name, module in MODULES.items() if importlib.util.find_spec(module) is not None]
MISSING = [name for name in MODULES if name not in INSTALLED]


def test_a_model_runs(runtime: Runtime) -> None:
    interpreter = runtime.open(model("linear"), threads=1, xnnpack=True)
    (detail,) = interpreter.get_input_details()
    interpreter.set_tensor(detail["index"], np.ones((1, 4), np.float32))
    interpreter.invoke()


def test_a_runtime_knows_its_version(runtime: Runtime) -> None:
    assert runtime.version[0].isdigit()
    assert runtime.installed > 0


def test_xnnpack_can_be_left_out(runtime: Runtime) -> None:
    def delegated(xnnpack: bool) -> bool:
        nodes = runtime.open(model("linear"), threads=1, xnnpack=xnnpack)._get_ops_details()
        return any(node["op_name"] == "DELEGATE" for node in nodes)

    assert delegated(True)
    assert not delegated(False)


def test_the_first_installed_runtime_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert load_runtime().name == INSTALLED[0]


def test_the_environment_names_a_runtime_and_the_configuration_overrules_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "onnx")
    with pytest.raises(RuntimeMissingError, match="unknown runtime 'onnx'; known: auto, litert, tflite-runtime"):
        load_runtime()
    assert load_runtime(INSTALLED[0]).name == INSTALLED[0]


@pytest.mark.skipif(not MISSING, reason="all runtimes are installed")
def test_a_runtime_that_is_not_installed_says_how_to_get_one() -> None:
    with pytest.raises(
        RuntimeMissingError, match=rf"the runtime {MISSING[0]} was asked for but is not installed. .*pip install"
    ):
        load_runtime(MISSING[0])


def test_a_file_that_is_not_there_is_named(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none.tflite: cannot be read \(No such file or directory\); check the path"):
        runtime.open(tmp_path / "none.tflite", threads=1, xnnpack=True)


@pytest.mark.parametrize("content", [b"", b"TFL3", b"PK\x03\x04 a zip", b"\0" * 1000, b"\x18\0\0\0TFL2" + bytes(100)])
def test_a_file_that_is_no_model_is_refused_before_the_runtime_sees_it(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.tflite"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"x.tflite: is not a TFLite model \(no TFL3 mark\); convert one"):
        check_file(file)


def test_every_test_model_has_the_mark() -> None:
    for file in MODELS.glob("*.tflite"):
        check_file(file)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("custom", r"unresolved custom op: Mystery. It holds a custom operator that this runtime does not have"),
        ("edgetpu", r"edgetpu-custom-op. It was compiled for an Edge TPU; use the bundle's CPU variant"),
        ("flex", r"It holds TensorFlow \(Flex\) operators, which device runtimes do not have; convert it again"),
    ],
)
def test_a_model_with_foreign_operators_says_what_it_needs(runtime: Runtime, name: str, says: str) -> None:
    with pytest.raises(ModelError, match=rf"{name}.tflite: {runtime.name} cannot load this model: .*{says}") as caught:
        runtime.open(model(name), threads=1, xnnpack=True)
    assert ".." not in str(caught.value).replace("../", "")
    assert "\n" not in str(caught.value)
