"""Finding a model: files, version folders, versions by number and label, and what is said when there is none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from edge_serve.errors import BundleError, ModelError
from edge_serve.model.repository import find
from edge_serve.spec import InputSpec, OutputSpec
from tests.unit.material import bundle, model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Versions 1, 2 and 10, and things that are no versions."""
    folder = tmp_path / "bearing"
    for number in (2, 10, 1):
        bundle(folder, number, {"float32": "linear", "int8": "int8"}, output={"labels": ["a", "b", "c"]})
    (folder / "latest").mkdir()
    (folder / "3").touch()
    (folder / "1.5").mkdir()
    (folder / "notes.txt").touch()
    return folder


def test_a_bare_file_is_a_model_without_a_version() -> None:
    found = find(model("linear"))
    assert (found.name, found.version, found.variant, found.file) == ("linear", None, "file", model("linear"))
    assert (found.bundle, found.labels) == (None, None)
    assert (found.input, found.output) == (InputSpec(), OutputSpec())


def test_the_latest_version_is_the_greatest_number_not_the_last_word(base: Path) -> None:
    found = find(base)
    assert (found.name, found.version, found.variant) == ("bearing", 10, "float32")
    assert found.file == base / "10" / "model.tflite"
    assert found.labels == ("a", "b", "c")


@pytest.mark.parametrize("version", [2, "2", "02"])
def test_a_version_is_asked_for_by_its_number(base: Path, version: int | str) -> None:
    assert find(base, version).version == 2


def test_a_version_is_asked_for_by_its_label(base: Path) -> None:
    assert find(base, "stable", version_labels={"stable": 1, "canary": 10}).version == 1


def test_an_unknown_version_or_label_is_answered_with_what_is_there(base: Path) -> None:
    with pytest.raises(ModelError, match=r"bearing: has no version 7; it has: 1, 2, 10"):
        find(base, 7)
    with pytest.raises(ModelError, match=r"no version label 'stabel'; labels: canary, stable; versions: 1, 2, 10"):
        find(base, "stabel", version_labels={"stable": 1, "canary": 10})
    with pytest.raises(ModelError, match=r"labels: none"):
        find(base, "stable")
    with pytest.raises(ModelError, match=r"has no version 9; it has"):
        find(base, "stable", version_labels={"stable": 9})


def test_a_variant_is_asked_for_by_its_name(base: Path) -> None:
    assert find(base, variant="int8").file == base / "10" / "model.int8.tflite"
    with pytest.raises(BundleError, match="has no variant 'int4'; it has: float32, int8"):
        find(base, variant="int4")


def test_one_version_folder_is_a_model_too(base: Path) -> None:
    assert find(base / "2").version == 2
    assert find(base / "2", 2).version == 2
    assert find(base / "2", "stable", version_labels={"stable": 2}).version == 2


def test_a_copy_of_a_version_under_another_name_knows_its_version(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "2", tmp_path / "copied")
    found = find(tmp_path / "copied")
    assert (found.name, found.version) == ("bearing", 2)


def test_a_version_that_contradicts_the_folder_or_file_is_refused(base: Path) -> None:
    with pytest.raises(ModelError, match=r"has no version 1; it has: 2"):
        find(base / "2", 1)
    with pytest.raises(ModelError, match=r"linear.tflite: has no version 1; it has: none"):
        find(model("linear"), 1)


def test_a_variant_of_a_single_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"linear.tflite: has no variant 'int8': it is a single file; leave variant out"
    ):
        find(model("linear"), variant="int8")


def test_a_tensorflow_serving_folder_without_a_manifest_works(tmp_path: Path) -> None:
    folder = tmp_path / "plain" / "4"
    folder.mkdir(parents=True)
    shutil.copyfile(model("linear"), folder / "model.tflite")
    for found in (find(tmp_path / "plain"), find(folder)):
        assert (found.name, found.version, found.variant, found.bundle) == ("plain", 4, "file", None)
    with pytest.raises(ModelError, match="has no variant 'int8'"):
        find(folder, variant="int8")


def test_a_folder_with_one_file_and_no_number_takes_its_own_name(tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copyfile(model("linear"), folder / "model.tflite")
    assert (find(folder).name, find(folder).version) == ("alone", None)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none: no such model; give a .tflite file, a version folder or a folder"):
        find(tmp_path / "none")


def test_an_empty_folder_and_an_empty_version_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds neither manifest.json nor version folders \(1, 2, …\); make one"):
        find(tmp_path)
    (tmp_path / "1").mkdir()
    with pytest.raises(ModelError, match=r"/1: holds neither manifest.json nor model.tflite"):
        find(tmp_path)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tflite").write_bytes(b"something else")
    with pytest.raises(ModelError, match="is not a TFLite model"):
        find(tmp_path / "x.tflite")


def test_a_changed_file_is_never_handed_to_a_runtime(base: Path) -> None:
    with (base / "10" / "model.tflite").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xff")
    with pytest.raises(BundleError, match="SHA-256"):
        find(base)
    assert find(base, 2).version == 2


def test_a_linked_model_folder_is_followed(base: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(base)
    assert find(tmp_path / "current").version == 10
