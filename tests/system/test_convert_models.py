"""`edge-serve convert` on models as people have them: recurrent layers, sensor windows, segmentation, attention, layers kept float.

The models come from tests/real_models.py, trained for seconds on the demo's real recordings and pictures.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve_converters.flatbuffer import read_contents
from tests.converting import convert, make_models, modes, package
from tests.system.test_convert import Done, answers

pytestmark = [
    pytest.mark.convert,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow: the [convert] extra"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the models, one folder for each kind."""
    kinds = ("recurrent", "sensors", "segmentation", "attention", "fake_quantized")
    return make_models(tmp_path_factory.mktemp("real-models"), *kinds)


@pytest.fixture(scope="module")
def keras2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of Keras 2."""
    package("tf_keras")
    return make_models(tmp_path_factory.mktemp("keras2-models"), "keras2") / "keras2"


def kept(done: Done, variant: str = "int8") -> list[str]:
    """The layers that a variant keeps float, as the manifest says."""
    manifest = json.loads((done.bundle.path / "manifest.json").read_text(encoding="utf-8"))
    entry: dict[str, Any] = next(entry for entry in manifest["variants"] if entry["name"] == variant)
    return list(entry.get("kept_float", []))


def figures(done: Done, variant: str = "int8") -> dict[str, Any]:
    """The quality of a variant."""
    return dict(done.bundle.manifest.variant(variant).quality)


def float_operators(done: Done, variant: str = "int8") -> dict[str, int]:
    """The operators of a variant's file that compute in float."""
    file = done.bundle.manifest.variant(variant).file
    return dict(read_contents(done.bundle.file(file).read_bytes()).float_operators)


def within_a_point(done: Done, variant: str, metric: str) -> bool:
    """Whether a variant loses at most a point, or one sample where that is more."""
    task = figures(done, variant)["task"]
    assert task["metric"] == metric
    return bool(task["variant"] >= task["float"] - max(0.01, task["resolution"]) - 1e-9)


def test_a_recurrent_model_becomes_all_that_the_runtime_can_run_and_the_rest_is_explained(
    models: Path, tmp_path: Path
) -> None:
    data = models / "recurrent" / "windows.npz"
    asked = modes("none", "float16", "dynamic", "int8", "int16x8")
    done = convert(tmp_path / "m", models / "recurrent" / "gru", *asked, "--calibration", data, "--labels-for", "data")
    assert done.status == 1
    assert set(done.failed) == {"int16x8"}
    assert "16-bit quantizer cannot take a loop (recurrent layer)" in done.failed["int16x8"]
    assert float_operators(done) == {}
    for variant in ("float32", "float16", "dynamic", "int8"):
        assert figures(done, variant)["task"]["float"] > 0.8
        assert within_a_point(done, variant, "accuracy")


@pytest.mark.parametrize("kind", ["bidirectional", "steps", "fixed"])
def test_every_kind_of_recurrent_model_becomes_int8_without_float_operators(
    models: Path, tmp_path: Path, kind: str
) -> None:
    data = models / "recurrent" / "unlabelled.npz"
    done = convert(tmp_path / "m", models / "recurrent" / kind, *modes("int8"), "--calibration", data)
    assert (done.status, done.failed) == (0, {})
    assert float_operators(done) == {}
    assert figures(done)["sqnr_db"] > 15


def test_a_bidirectional_layer_computes_the_same_as_with_its_moves_in_float(models: Path, tmp_path: Path) -> None:
    arguments = (*modes("int8"), "--calibration", models / "recurrent" / "unlabelled.npz", "--samples", "40")
    model = models / "recurrent" / "bidirectional"
    done = convert(tmp_path / "a", model, *arguments)
    named = convert(tmp_path / "b", model, *arguments, "--keep-float", "STRIDED_SLICE")
    assert float_operators(done) == {}
    assert "STRIDED_SLICE" in float_operators(named)
    assert figures(done)["outputs"] == figures(named)["outputs"]


@pytest.mark.parametrize("form", ["lstm", "bidirectional.h5"])
def test_a_recurrent_model_of_keras_2_forgets_one_sample_before_the_next(
    models: Path, keras2: Path, tmp_path: Path, form: str
) -> None:
    data = models / "recurrent" / "windows.npz"
    done = convert(tmp_path / "m", keras2 / form, *modes("none"), "--calibration", data, "--labels-for", "data")
    assert (done.status, done.failed) == (0, {})
    assert within_a_point(done, "float32", "accuracy")
    assert figures(done, "float32")["sqnr_db"] > 80
    with np.load(data) as arrays:
        window, others = arrays["window"][:1], arrays["window"][1:4]
    from edge_serve.model.engine import Engine
    from edge_serve.model.interpreter import load_runtime

    file = done.bundle.verify(done.bundle.manifest.variant("float32").file)
    engine = Engine.open(file, runtime=load_runtime(), delegate="xnnpack")
    (name,) = engine.inputs
    first = {key: np.array(value) for key, value in engine.run({name: window}).items()}
    for other in others:
        engine.run({name: other[np.newaxis]})
    again = engine.run({name: window})
    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key])
    engine.close()


def test_an_lstm_of_keras_2_becomes_every_mode(models: Path, keras2: Path, tmp_path: Path) -> None:
    asked = (*modes("float16", "dynamic", "int8"), "--calibration", models / "recurrent" / "unlabelled.npz")
    done = convert(tmp_path / "m", keras2 / "lstm", *asked)
    assert (done.status, done.failed) == (0, {})
    assert float_operators(done) == {}
    for variant in ("float16", "dynamic", "int8"):
        assert figures(done, variant)["sqnr_db"] > 15


def test_depthwise_layers_of_keras_2_are_read(keras2: Path, tmp_path: Path) -> None:
    assert convert(tmp_path / "m", keras2 / "depthwise.h5", *modes("none")).status == 0


@pytest.mark.parametrize(
    ("form", "words"),
    [("lstm.keras", "was saved by Keras 2"), ("only_weights.h5", "model.save, not save_weights")],
)
def test_files_of_keras_2_that_cannot_be_read_say_what_to_do(
    keras2: Path, tmp_path: Path, form: str, words: str
) -> None:
    done = convert(tmp_path / "m", keras2 / form, *modes("none"))
    assert done.status == 2
    assert words in done.error
    assert done.error.count(f"{form}: ") == 1


def test_a_classifier_of_sensor_windows_loses_less_than_a_point_in_every_mode(models: Path, tmp_path: Path) -> None:
    data = models / "sensors" / "windows.npz"
    asked = (*modes("int8", "none", "float16", "dynamic", "int16x8"), "--target", "edgetpu")
    done = convert(tmp_path / "m", models / "sensors" / "cnn", *asked, "--calibration", data, "--labels-for", "data")
    assert (done.status, done.failed) == (0, {})
    for variant in ("int8", "float32", "float16", "dynamic", "int16x8", "edgetpu"):
        assert figures(done, variant)["task"]["float"] > 0.95
        assert within_a_point(done, variant, "accuracy")


def test_an_autoencoder_is_measured_by_how_well_it_tells_anomalies(models: Path, tmp_path: Path) -> None:
    folder = models / "sensors"
    done = convert(
        tmp_path / "m",
        folder / "autoencoder",
        *modes("int8", "dynamic"),
        *("--calibration", folder / "windows.npz", "--labels-for", folder / "anomalous.csv"),
    )
    assert (done.status, done.failed) == (0, {})
    assert figures(done)["task"]["float"] > 0.95
    assert within_a_point(done, "int8", "auc")
    assert within_a_point(done, "dynamic", "auc")


def test_a_segmentation_is_measured_by_mean_iou(models: Path, tmp_path: Path) -> None:
    folder = models / "segmentation"
    labelled = ("--calibration", folder / "images.npz", "--labels-for", folder / "masks.npy")
    done = convert(tmp_path / "m", folder / "unet", *modes("int8", "int16x8"), *labelled, "--io", "int8")
    assert (done.status, done.failed) == (0, {})
    assert float_operators(done) == {}
    assert figures(done)["task"]["float"] > 0.6
    assert within_a_point(done, "int8", "mean_iou")


def test_an_outlier_channel_that_int8_ruins_is_refused_and_the_layer_named(models: Path, tmp_path: Path) -> None:
    data = models / "sensors" / "windows.npz"
    done = convert(
        tmp_path / "m", models / "sensors" / "outlier", *modes("int8"), "--calibration", data, "--labels-for", "data"
    )
    assert (done.status, done.nothing_is_left()) == (1, True)
    assert "accuracy falls from 1.0000" in done.failed["int8"]
    assert "the error begins at layer 1 (CONV_2D)" in done.failed["int8"]
    assert "a few channels fill its range" in done.failed["int8"]


def test_auto_keeps_the_few_layers_float_that_the_outlier_needs(models: Path, tmp_path: Path) -> None:
    data = models / "sensors" / "windows.npz"
    arguments = (*modes("int8"), "--calibration", data, "--labels-for", "data", "--auto")
    done = convert(tmp_path / "m", models / "sensors" / "outlier", *arguments)
    assert (done.status, done.failed) == (0, {})
    assert within_a_point(done, "int8", "accuracy")
    assert 1 <= len(kept(done)) <= 3
    assert sum(float_operators(done).values()) == len(kept(done))
    assert done.bundle.manifest.variant("int8").quantization == "selective"
    report = json.loads((done.bundle.path / "report.json").read_text(encoding="utf-8"))
    assert report["variants"][0]["kept_float"] == kept(done)


def test_auto_keeps_nothing_float_where_int8_passes_at_once(models: Path, tmp_path: Path) -> None:
    data = models / "sensors" / "windows.npz"
    done = convert(
        tmp_path / "m",
        models / "sensors" / "cnn",
        *modes("int8"),
        *("--calibration", data, "--labels-for", "data", "--auto"),
    )
    assert (done.status, kept(done), float_operators(done)) == (0, [], {})


def test_auto_says_so_where_no_choice_of_layers_is_enough(models: Path, tmp_path: Path) -> None:
    data = models / "sensors" / "windows.npz"
    arguments = (*modes("int8"), "--calibration", data, "--auto", "--min-cosine", "1")
    done = convert(tmp_path / "m", models / "sensors" / "outlier", *arguments)
    assert (done.status, done.nothing_is_left()) == (1, True)
    assert "Not even with every layer that helps left float does it pass" in done.failed["int8"]


@pytest.mark.parametrize("pattern", ["conv_2d", "*conv1d*Relu"])
def test_layers_are_kept_float_by_operator_by_name_and_by_pattern(models: Path, tmp_path: Path, pattern: str) -> None:
    data = models / "sensors" / "windows.npz"
    arguments = (*modes("int8"), "--calibration", data, "--samples", "40", "--keep-float", pattern)
    done = convert(tmp_path / "m", models / "sensors" / "cnn", *arguments)
    assert (done.status, float_operators(done)["CONV_2D"]) == (0, 2)
    assert len(kept(done)) == sum(float_operators(done).values())


def test_layers_inside_a_loop_are_kept_float_too(models: Path, tmp_path: Path) -> None:
    data = models / "recurrent" / "unlabelled.npz"
    arguments = (*modes("int8"), "--calibration", data, "--samples", "40")
    one = convert(tmp_path / "a", models / "recurrent" / "steps", *arguments, "--keep-float", "TANH")
    assert (one.status, float_operators(one)) == (0, {"TANH": 2})
    whole = convert(tmp_path / "b", models / "recurrent" / "steps", *arguments, "--keep-float", "WHILE")
    assert whole.status == 0
    assert {"TANH", "LOGISTIC", "FULLY_CONNECTED"} <= set(float_operators(whole))
    assert "SOFTMAX" not in float_operators(whole)


def test_an_operator_without_an_int8_form_must_be_kept_by_name_or_by_auto(models: Path, tmp_path: Path) -> None:
    folder = models / "attention"
    arguments = (*modes("int8"), "--calibration", folder / "tokens.npz", "--samples", "40")
    plain = convert(tmp_path / "a", folder / "attention", *arguments)
    assert (plain.status, plain.nothing_is_left()) == (1, True)
    assert "NEG" in plain.failed["int8"]
    another = convert(tmp_path / "b", folder / "attention", *arguments, "--keep-float", "SOFTMAX")
    assert another.status == 1
    assert "besides the layers of --keep-float these operators stay float" in another.failed["int8"]
    assert "NEG ×1" in another.failed["int8"]
    for number, option in enumerate((("--keep-float", "NEG"), ("--auto",))):
        done = convert(tmp_path / f"c{number}", folder / "attention", *arguments, *option)
        assert (done.status, float_operators(done)) == (0, {"NEG": 1})
        assert [name.rpartition("/")[2].lower() for name in kept(done)] == ["neg"]


def test_sixteen_bits_refuse_what_they_cannot_take_in_words(models: Path, tmp_path: Path) -> None:
    folder = models / "fake_quantized"
    done = convert(tmp_path / "a", folder / "fake", *modes("int16x8", "int8"), "--calibration", folder / "x.npz")
    assert set(done.failed) == {"int16x8"}
    assert "was trained for 8 bits" in done.failed["int16x8"]
    assert figures(done)["sqnr_db"] > 60
    folder = models / "attention"
    tokens = convert(tmp_path / "b", folder / "attention", *modes("int16x8"), "--calibration", folder / "tokens.npz")
    assert tokens.status == 2
    assert "finds no range for tensor serving_default_tokens" in tokens.failed["int16x8"]


def test_equal_conversions_give_equal_bytes_in_any_environment(models: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-c", "from edge_serve.cli import main; main()", "convert"),
        str(models / "recurrent" / "bidirectional"),
        *("--calibration", str(models / "recurrent" / "windows.npz"), "--samples", "30", "-q"),
        *modes("int8", "float16"),
    ]
    paths = os.pathsep.join(entry for entry in sys.path if entry)
    bundles = []
    for name, extra in (
        ("a", {"PYTHONHASHSEED": "1"}),
        ("b", {"PYTHONHASHSEED": "77", "LANG": "C", "OMP_NUM_THREADS": "2"}),
    ):
        environment = {**os.environ, "PYTHONPATH": paths, **extra}
        (tmp_path / name).mkdir()
        base = tmp_path / name / "model"
        subprocess.run(
            [*command, "-o", str(base)], check=True, env=environment, cwd=tmp_path / name, capture_output=True
        )
        bundles.append(base / "1")
    first, second = bundles
    found = [{path.relative_to(base) for path in base.rglob("*") if path.is_file()} for base in bundles]
    assert found[0] == found[1]
    for file in found[0]:
        if file.name not in ("report.json", "report.html"):
            assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_golden_answers_of_a_recurrent_variant_are_those_of_the_file(models: Path, tmp_path: Path) -> None:
    data = models / "recurrent" / "unlabelled.npz"
    done = convert(tmp_path / "m", models / "recurrent" / "bidirectional", *modes("int8"), "--calibration", data)
    with np.load(done.bundle.verify("samples.npz")) as samples:
        given = answers(done.bundle, "int8", {"window": samples["input/window"][0]})
        for name, array in given.items():
            allowed = done.bundle.manifest.variant("int8").quality["tolerance"][name]
            np.testing.assert_allclose(array, samples[f"variant/int8/{name}"][0], rtol=0, atol=allowed)
