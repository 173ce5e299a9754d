"""`edge-serve convert` on real SavedModels: what it writes is right, and what TensorFlow gets wrong is never written.

The models come from tests/converter_models.py, in a process of its own: this one never imports tensorflow.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edge_serve.bundle import Bundle
from edge_serve.errors import EdgeServeError
from edge_serve.model.engine import Engine
from edge_serve.model.interpreter import load_runtime
from edge_serve.processing.tensor import dequantize, quantize
from edge_serve_converters import cli
from edge_serve_converters.flatbuffer import read_contents

ROOT = Path(__file__).parents[2]
DEMO_MODELS = ROOT / "scripts" / "demo_models"
DEMO_DATA = ROOT / "edge_serve" / "demo" / "data"
FEATURES = 16

pytestmark = [
    pytest.mark.convert,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow: the [convert] extra"),
]


@dataclasses.dataclass(frozen=True)
class Done:
    """One run of the command."""

    status: int
    error: str
    document: dict[str, Any]
    base: Path

    @property
    def bundle(self) -> Bundle:
        """The bundle that was written, opened, with all hashes checked."""
        bundle = Bundle.open(Path(self.document["bundle"]))
        for name in bundle.manifest.files:
            bundle.verify(name)
        return bundle

    @property
    def failed(self) -> dict[str, str]:
        """Variant that failed → reason."""
        return {entry["name"]: entry["reason"] for entry in self.document["failed"]}

    def nothing_is_left(self) -> bool:
        """The output folder is as it was before: not there."""
        return not self.base.exists()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the test models, and data for them."""
    folder = tmp_path_factory.mktemp("saved-models")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    made = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "converter_models.py"), str(folder)], capture_output=True, env=environment
    )
    assert made.returncode == 0, made.stderr.decode()[-2000:]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((120, FEATURES), np.float32)
    np.savez(folder / "x.npz", x=x)
    np.savez(folder / "xy.npz", x=x, y=x)
    np.savez(folder / "index.npz", index=rng.integers(0, 10, 120), x=x)
    np.savez(folder / "window.npz", window=rng.standard_normal((60, 10, 4), np.float32))
    return folder


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Done]:
    """Convert in this process; errors are caught as `edge-serve` catches them."""

    def run(model: Path, *arguments: str | Path, into: str = "model") -> Done:
        base = tmp_path / "models" / into
        command = [str(model), "-o", str(base), "--json", *map(str, arguments)]
        result = CliRunner().invoke(cli.convert, command)
        error = result.exception
        if error is not None and not isinstance(error, EdgeServeError):
            raise error
        document = json.loads(result.stdout) if result.stdout else {}
        return Done(error.exit_code if error is not None else 0, str(error or ""), document, base)

    return run


Convert = Callable[..., Done]


def answers(bundle: Bundle, variant: str, inputs: dict[str, Any], signature: str | None = None) -> dict[str, Any]:
    """Run a variant on single inputs (real values), as the device does, and give real values."""
    path = bundle.verify(bundle.manifest.variant(variant).file)
    engine = Engine.open(path, runtime=load_runtime(), delegate="xnnpack", signature=signature)
    given = {
        name: np.ascontiguousarray(quantize(np.asarray(value), engine.inputs[name])) for name, value in inputs.items()
    }
    results = {name: dequantize(np.array(array), engine.outputs[name]) for name, array in engine.run(given).items()}
    engine.close()
    return results


def weights(*shape: int) -> Any:
    """The values of converter_models.weights()."""
    return (np.random.default_rng(sum(shape)).standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


def quality(done: Done, variant: str) -> dict[str, Any]:
    """The figures of a variant."""
    return dict(done.bundle.manifest.variant(variant).quality)


def test_a_bundle_holds_all_that_a_device_needs(models: Path, convert: Convert, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("one\ntwo\nthree\n", encoding="utf-8")
    done = convert(
        models / "dense",
        *("--quantize", "int8", "--quantize", "none", "--quantize", "float16", "--io", "int8"),
        *("--calibration", models / "x.npz", "--labels", labels, "--top-k", "2"),
    )
    assert (done.status, done.failed) == (0, {})
    bundle = done.bundle
    manifest = bundle.manifest
    assert (bundle.path, manifest.name, manifest.version) == (done.base / "1", "model", 1)
    assert [variant.name for variant in manifest.variants] == ["int8", "float32", "float16"]
    assert (manifest.default, manifest.variant("int8").file) == ("int8", "model.tflite")
    assert bundle.labels() == ("one", "two", "three")
    assert (manifest.output.type, manifest.output.top_k) == ("classification", 2)
    signature = manifest.signatures["serving_default"]
    assert signature.inputs["x"].shape == (1, FEATURES)
    assert signature.inputs["x"].dtype == "float32"
    int8 = manifest.variant("int8")
    assert (int8.io, int8.inputs[0].name, int8.inputs[0].dtype) == ("int8", "x", "int8")
    assert int8.inputs[0].scale is not None
    assert read_contents(bundle.file("model.tflite").read_bytes()).float_operators == {}
    found = {path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*") if path.is_file()}
    assert found == {*manifest.files, "manifest.json", "report.json", "report.html"}
    figures = quality(done, "int8")
    assert (figures["samples"], figures["measured_on"]) == (24, "held-back")
    assert 0 < figures["max_error"] < 0.1
    assert figures["top1_agreement"] >= 0.9
    assert quality(done, "float32")["max_error"] < 1e-5
    _check_golden(bundle)


def _check_golden(bundle: Bundle) -> None:
    """Every variant gives its expected outputs on the golden inputs, within its tolerance, and not on other inputs."""
    with np.load(bundle.verify("samples.npz")) as samples:
        for variant in bundle.manifest.variants:
            for number in range(len(samples["input/x"])):
                given = answers(bundle, variant.name, {"x": samples["input/x"][number]})
                for name, array in given.items():
                    allowed = variant.quality["tolerance"][name]
                    np.testing.assert_allclose(
                        array, samples[f"variant/{variant.name}/{name}"][number], rtol=0, atol=allowed
                    )
                    error = np.abs(array - samples[f"output/{name}"][number]).max()
                    assert error <= variant.quality["max_error"] + allowed
            wrong = answers(bundle, variant.name, {"x": -samples["input/x"][0]})
            assert any(
                np.abs(array - samples[f"variant/{variant.name}/{name}"][0]).max() > variant.quality["tolerance"][name]
                for name, array in wrong.items()
            )


def test_equal_conversions_give_equal_bytes_and_new_versions(models: Path, convert: Convert) -> None:
    arguments = (models / "dense", "--quantize", "int8", "--calibration", models / "x.npz", "--samples", "30")
    first, again = convert(*arguments, into="a/name"), convert(*arguments, into="b/name")
    for name in ("manifest.json", "model.tflite", "samples.npz"):
        assert (first.bundle.path / name).read_bytes() == (again.bundle.path / name).read_bytes(), name
    third = convert(*arguments, "--seed", "5", into="a/name")
    assert third.bundle.path == first.base / "2"
    assert third.bundle.manifest.variant("int8").sha256 != first.bundle.manifest.variant("int8").sha256


def test_trap_1_weights_survive_and_so_do_the_names_of_several_signatures(models: Path, convert: Convert) -> None:
    assert read_contents((models / "weightless.tflite").read_bytes()).weightless
    done = convert(
        models / "wrapped_keras",
        *("--quantize", "none", "--quantize", "int8", "--calibration", models / "xy.npz"),
        *("--signature", "double", "--signature", "serving_default"),
    )
    assert done.status == 0
    manifest = done.bundle.manifest
    assert set(manifest.signatures) == {"serving_default", "double"}
    assert set(manifest.signatures["double"].outputs) == {"once", "twice"}
    x = np.linspace(-1, 1, FEATURES, dtype=np.float32)[np.newaxis]
    score = answers(done.bundle, "float32", {"x": x}, "serving_default")["scores"]
    double = answers(done.bundle, "float32", {"y": x}, "double")
    assert np.abs(score).max() > 1e-3
    np.testing.assert_allclose(double["twice"], 2 * score, rtol=1e-5)
    np.testing.assert_allclose(double["once"], score, rtol=1e-5)
    assert not any("logits" in text for text in done.document["warnings"])
    assert set(quality(done, "int8")["outputs"]) == {"serving_default/scores", "double/once", "double/twice"}


FREEZE = """
import sys
from pathlib import Path
import tensorflow as tf
from edge_serve_converters import saved_model
source, target = sys.argv[1:]
signatures = [
    {"key": "double", "inputs": [{"name": "y", "shape": [1, 16], "dtype": "float32", "batched": True}]},
    {"key": "serving_default", "inputs": [{"name": "x", "shape": [1, 16], "dtype": "float32", "batched": True}]},
]
loaded = saved_model.load(tf, source, source)
traced = saved_model.trace(tf, loaded, signatures, Path(target + ".traced"), freeze=True, dynamic_batch=False)
Path(target).write_bytes(tf.lite.TFLiteConverter.from_saved_model(traced, signature_keys=["double", "serving_default"]).convert())
"""


def test_the_second_choice_freezes_weights_and_keeps_names_and_values(models: Path, tmp_path: Path) -> None:
    target = tmp_path / "frozen.tflite"
    paths = os.pathsep.join(entry for entry in sys.path if entry)
    subprocess.run(
        [sys.executable, "-c", FREEZE, str(models / "wrapped_keras"), str(target)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert not read_contents(target.read_bytes()).weightless
    x = np.linspace(-1, 1, FEATURES, dtype=np.float32)[np.newaxis]
    given: dict[str, Any] = {}
    for key, name in (("double", "y"), ("serving_default", "x")):
        engine = Engine.open(target, runtime=load_runtime(), delegate="xnnpack", signature=key)
        given[key] = {output: np.array(array) for output, array in engine.run({name: x}).items()}
        engine.close()
    assert np.abs(given["serving_default"]["scores"]).max() > 1e-3
    np.testing.assert_allclose(given["double"]["twice"], 2 * given["serving_default"]["scores"], rtol=1e-5)
    np.testing.assert_allclose(given["double"]["once"], given["serving_default"]["scores"], rtol=1e-5)


def test_trap_3_float_operators_in_an_int8_file_are_named_and_need_consent(models: Path, convert: Convert) -> None:
    arguments = (models / "sine", "--quantize", "int8", "--calibration", models / "x.npz")
    done = convert(*arguments)
    assert done.status == 1
    assert "stay float" in done.failed["int8"]
    assert "SIN ×1" in done.failed["int8"]
    assert done.nothing_is_left()
    allowed = convert(*arguments, "--allow-float-operators")
    assert allowed.status == 0
    assert allowed.document["variants"][0]["float_operators"] == {"SIN": 1}


def test_trap_2_a_file_in_which_nothing_was_quantized_is_no_int8_file(models: Path, convert: Convert) -> None:
    done = convert(
        models / "only_sine", "--quantize", "int8", "--allow-float-operators", "--calibration", models / "x.npz"
    )
    assert done.status == 1
    assert "nothing in the file was quantized" in done.failed["int8"]
    assert done.nothing_is_left()


def test_traps_4_and_6_recurrent_layers_convert_in_spite_of_the_calibrators_crash(
    models: Path, convert: Convert
) -> None:
    done = convert(models / "lstm", "--quantize", "int8", "--quantize", "none", "--calibration", models / "window.npz")
    assert (done.status, done.failed) == (0, {})
    assert read_contents(done.bundle.file("model.tflite").read_bytes()).float_operators == {}
    assert quality(done, "int8")["max_error"] < 0.1
    assert quality(done, "float32")["max_error"] < 1e-5
    assert [variant.inputs[0].shape for variant in done.bundle.manifest.variants] == [(1, 10, 4)] * 2
    assert answers(done.bundle, "int8", {"window": np.zeros((1, 10, 4), np.float32)})["output_0"].shape == (1, 3)


def test_trap_5_dynamic_files_load_on_the_oldest_runtime_that_boards_have(models: Path, convert: Convert) -> None:
    done = convert(models / "wide", "--quantize", "dynamic")
    assert done.status == 0
    variant = done.bundle.manifest.variant("dynamic")
    assert variant.min_runtime is not None
    assert tuple(map(int, variant.min_runtime.split("."))) <= (2, 14, 0)
    assert "INT8" in read_contents(done.bundle.file("model.tflite").read_bytes()).constants
    assert quality(done, "dynamic")["measured_on"] == "random"


def test_trap_7_a_float16_file_that_gives_nan_on_silence_is_not_written_but_the_others_are(
    models: Path, convert: Convert
) -> None:
    done = convert(models / "silence", "--quantize", "float16", "--quantize", "none", "--calibration", models / "x.npz")
    assert done.status == 1
    assert "output 'y' is nan on zeros" in done.failed["float16"]
    assert "1 of 2 variants failed" in done.error
    manifest = done.bundle.manifest
    assert ([variant.name for variant in manifest.variants], manifest.default) == (["float32"], "float32")
    assert sorted(path.name for path in done.bundle.path.glob("*.tflite")) == ["model.tflite"]


def test_trap_9_operators_that_devices_lack_are_named(models: Path, convert: Convert) -> None:
    done = convert(models / "flex", "--quantize", "none")
    assert done.status == 2
    assert "tf.Erf would need TensorFlow's own kernels (Flex)" in done.failed["float32"]
    assert "tf.Erfinv would need custom operators" in done.failed["float32"]
    assert done.nothing_is_left()


def test_the_one_custom_operator_that_devices_have_is_kept(models: Path, convert: Convert) -> None:
    roles = [part for role in ("boxes", "classes", "scores", "count") for part in (f"--{role}", role)]
    done = convert(
        models / "detector",
        *(
            "--quantize",
            "int8",
            "--io",
            "uint8",
            "--output-type",
            "detection",
            *roles,
            "--calibration",
            models / "x.npz",
        ),
    )
    assert done.status == 0
    variant = done.bundle.manifest.variant("int8")
    assert variant.operators["TFLite_Detection_PostProcess"] == 1
    assert (variant.inputs[0].dtype, variant.outputs[0].dtype) == ("uint8", "float32")
    assert done.bundle.manifest.output.boxes == "boxes"
    assert "stand-in" in done.document["warnings"][0]


def test_a_file_that_the_device_runtime_fails_on_is_not_written(models: Path, convert: Convert) -> None:
    done = convert(models / "reciprocal", "--quantize", "none", "--quantize", "int8", "--calibration", models / "x.npz")
    assert done.status == 1
    assert "in the device runtime" in done.failed["int8"]
    assert [variant.name for variant in done.bundle.manifest.variants] == ["float32"]
    assert any(
        "the source model itself gives NaN or infinity in output 'y' on zeros" in text
        for text in done.document["warnings"]
    )


def test_a_model_that_keeps_state_is_refused(models: Path, convert: Convert) -> None:
    done = convert(models / "stateful", "--quantize", "none")
    assert done.status == 2
    assert "writes variables" in done.failed["float32"]
    assert done.nothing_is_left()


def test_a_dynamic_file_that_would_be_the_float_one_is_refused(models: Path, convert: Convert) -> None:
    done = convert(models / "dense", "--quantize", "dynamic")
    assert done.status == 1
    assert "it would be the float32 file" in done.failed["dynamic"]


def test_several_inputs_of_several_types_keep_their_names(models: Path, convert: Convert) -> None:
    done = convert(
        models / "two_inputs", "--quantize", "none", "--quantize", "int8", "--calibration", models / "index.npz"
    )
    assert done.status == 0
    x = np.linspace(-1, 1, FEATURES, dtype=np.float32)[np.newaxis]
    summed = weights(10, FEATURES)[[3]] + x
    for variant, allowed in (("float32", 1e-5), ("int8", 0.1)):
        given = answers(done.bundle, variant, {"index": np.array([3], np.int32), "x": x})
        np.testing.assert_allclose(given["sum"], summed, atol=allowed)
        np.testing.assert_allclose(given["score"], summed @ weights(FEATURES, 3), atol=allowed)


def test_a_folder_of_pictures_calibrates_an_image_model_of_any_size(
    models: Path, convert: Convert, tmp_path: Path
) -> None:
    photos = tmp_path / "photos" / "deeper"
    photos.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(30):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(photos / f"{number}.png")
    done = convert(
        models / "photo",
        *("--quantize", "int8", "--io", "uint8", "--size", "24x32", "--calibration", tmp_path / "photos"),
    )
    assert done.status == 0
    manifest = done.bundle.manifest
    assert (manifest.input.kind, manifest.input.size) == ("image", (24, 32))
    assert (manifest.variants[0].inputs[0].dtype, manifest.variants[0].inputs[0].shape) == ("uint8", (1, 24, 32, 3))
    assert quality(done, "int8")["top1_agreement"] is not None


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        ("text", [], "input 'sentence' has dtype string"),
        ("unsigned", [], "has no signatures"),
        ("photo", [], "--input-shape photo=1,N,N,3"),
        ("dense", ["--signature", "nope"], "has no signature 'nope'; it has: serve, serving_default"),
        ("dense", ["--labels", "labels.txt"], "2 labels for the 3 classes"),
        ("dense", ["--scores-output", "nope"], "the model has no such output"),
        ("finder", [], "output 'found' has a shape that depends on the values of the input"),
        ("broken", [], "cannot load this SavedModel"),
    ],
)
def test_what_only_a_person_can_change_is_exit_2(
    models: Path,
    convert: Convert,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.txt").write_text("one\ntwo\n", encoding="utf-8")
    if model == "broken":
        (models / "broken").mkdir()
        (models / "broken" / "saved_model.pb").write_bytes(b"this is no protocol buffer")
    done = convert(models / model, "--quantize", "none", *arguments)
    assert done.status == 2
    assert words in done.error
    assert done.nothing_is_left()


def test_a_step_that_takes_too_long_is_stopped(models: Path, convert: Convert) -> None:
    done = convert(models / "dense", "--quantize", "none", "--timeout", "1")
    assert (done.status, done.nothing_is_left()) == (2, True)
    assert "took longer than 1 s" in done.error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing_behind(models: Path, tmp_path: Path, number: signal.Signals) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    code = (
        "import sys\nfrom edge_serve_converters.cli import convert\n"
        "try: convert.main(standalone_mode=False)\n"
        "except (KeyboardInterrupt, __import__('click').Abort): sys.exit(130)"
    )
    paths = os.pathsep.join(entry for entry in sys.path if entry)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(models / "dense"), "-o", str(tmp_path / "models" / "m"), "--quantize", "none"],
        env={**os.environ, "PYTHONPATH": paths, "TMPDIR": str(scratch)},
    )
    deadline = time.monotonic() + 60
    while not list(scratch.glob("edge-serve-convert-*/worker-*.log")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    born = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
    assert born
    process.send_signal(number)
    assert process.wait(20) == 130
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "models").exists()
    # One that was just being born when the signal came ends itself, because nobody is at the other end of its line.
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in born):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("name", "key"), [("motion", "window"), ("digits", "image")])
def test_the_demo_models_lose_less_than_a_point(convert: Convert, name: str, key: str) -> None:
    folder = DEMO_MODELS / name
    if not (folder / "saved_model").is_dir():
        pytest.skip("the demo models are not trained yet")
    done = convert(
        folder / "saved_model",
        *("--quantize", "int8", "--quantize", "none", "--calibration", folder / "calibration.npz"),
        *("--labels", folder / "labels.txt"),
    )
    assert done.status == 0
    inputs, expected = _test_data(name)
    right = {}
    for variant in ("int8", "float32"):
        file = done.bundle.verify(done.bundle.manifest.variant(variant).file)
        engine = Engine.open(file, runtime=load_runtime(), delegate="xnnpack")
        chosen = [int(np.argmax(engine.run({key: sample[np.newaxis]})["probabilities"])) for sample in inputs]
        right[variant] = float(np.mean(np.array(chosen) == expected))
        engine.close()
    assert right["float32"] > 0.9
    assert right["int8"] >= right["float32"] - 0.01


def _test_data(name: str) -> tuple[Any, Any]:
    """Give inputs of the model and their classes, from data that training never saw."""
    with np.load(DEMO_DATA / f"{name}.npz") as data:
        if name == "digits":
            return (data["images"].astype(np.float32) / 255)[..., np.newaxis], data["labels"]
        series, labels = data["series"].astype(np.float32), data["labels"]
    starts = range(0, series.shape[1] - 49, 10)
    return np.concatenate([series[:, start : start + 50] for start in starts]), np.tile(labels, len(starts))
