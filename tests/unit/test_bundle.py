"""Bundles on disk: what is refused, and that every refusal names file, key and remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from edge_serve.bundle import FORMAT, MANIFEST, MAX_LABELS_BYTES, Bundle, parse_manifest, read_labels, sha256_of
from edge_serve.errors import BundleError
from edge_serve.schema import compact
from edge_serve.spec import InputSpec, OutputSpec
from tests.unit.material import bundle, model, rewrite, sha256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bundle(
        tmp_path / "bearing",
        3,
        {"float32": "linear", "int8": "int8"},
        {"labels.txt": "idle\nworn\nbroken\n"},
        input={"kind": "tensor"},
        output={"type": "classification", "labels_file": "labels.txt"},
    )


def test_a_bundle_gives_its_variants_its_specs_and_its_labels(folder: Path) -> None:
    opened = Bundle.open(folder)
    manifest = opened.manifest
    assert (manifest.name, manifest.version, manifest.default) == ("bearing", 3, "float32")
    assert manifest.variant("int8").file == "model.int8.tflite"
    assert manifest.input == InputSpec(kind="tensor")
    assert manifest.output == OutputSpec(type="classification", labels_file="labels.txt")
    assert opened.labels() == ("idle", "worn", "broken")
    assert opened.verify("model.tflite") == folder / "model.tflite"


def test_labels_may_stand_in_the_manifest_itself(tmp_path: Path) -> None:
    assert Bundle.open(bundle(tmp_path / "m", output={"labels": ["a", "b"]})).labels() == ("a", "b")


def test_a_bundle_without_labels_has_none(tmp_path: Path) -> None:
    assert Bundle.open(bundle(tmp_path / "m")).labels() is None


def test_what_is_written_reads_back_as_it_was(folder: Path) -> None:
    manifest = Bundle.open(folder).manifest
    assert parse_manifest(json.loads(manifest.to_json()), "m") == manifest
    assert list(compact(manifest))[:3] == ["format", "name", "version"]


def test_unknown_keys_of_a_newer_writer_are_ignored(folder: Path) -> None:
    rewrite(folder, lambda data: data.update(later=1))
    rewrite(folder, lambda data: data["input"].update(later=[1]))
    rewrite(folder, lambda data: data["variants"][0].update(later={}))
    assert Bundle.open(folder).manifest.input.kind == "tensor"


def test_a_higher_format_is_refused_before_anything_else_is_judged(folder: Path) -> None:
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT + 1}), encoding="utf-8")
    with pytest.raises(BundleError, match="has format 2, this edge-serve reads up to 1; update edge-serve"):
        Bundle.open(folder)


def test_an_unknown_variant_is_answered_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(BundleError, match=r"bearing version 3 has no variant 'int4'; it has: float32, int8"):
        Bundle.open(folder).manifest.variant("int4")


def test_a_file_that_was_changed_is_refused(folder: Path) -> None:
    data = bytearray((folder / "model.tflite").read_bytes())
    data[-1] ^= 1
    (folder / "model.tflite").write_bytes(data)
    opened = Bundle.open(folder)
    with pytest.raises(
        BundleError, match=r"model.tflite: SHA-256 is .* it was changed or damaged; copy the bundle again"
    ):
        opened.verify("model.tflite")


def test_changed_labels_are_refused(folder: Path) -> None:
    (folder / "labels.txt").write_text("idle\nbroken\nworn\n", encoding="utf-8")
    with pytest.raises(BundleError, match=r"labels.txt: SHA-256"):
        Bundle.open(folder).labels()


def test_a_file_without_a_hash_is_not_trusted(folder: Path) -> None:
    (folder / "stray.txt").write_text("x", encoding="utf-8")
    with pytest.raises(BundleError, match=r"has no hash for 'stray.txt'"):
        Bundle.open(folder).verify("stray.txt")


def test_a_file_that_is_not_there_is_named(folder: Path) -> None:
    (folder / "model.int8.tflite").unlink()
    with pytest.raises(BundleError, match=r"model.int8.tflite: is named by the manifest but is not there"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    "name",
    ["../secret", "a/../../secret", "/etc/passwd", "..\\secret", "", "..", "sub/.."],
)
def test_a_path_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("x", encoding="utf-8")
    with pytest.raises(BundleError, match="is outside the bundle; paths stay inside the folder"):
        Bundle.open(folder).file(name)
    rewrite(folder, lambda data: data["files"].update({name: "0" * 64}))
    with pytest.raises(BundleError, match="is outside the bundle"):
        Bundle.open(folder)


@pytest.mark.parametrize("name", [".", "a\0b", "\ud800", "x" * 5000])
def test_a_name_that_no_file_can_have_is_refused(folder: Path, name: str) -> None:
    rewrite(folder, lambda data: data["files"].update({name: "0" * 64}))
    with pytest.raises(BundleError):
        Bundle.open(folder)


def test_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_text("x", encoding="utf-8")
    (folder / "link").symlink_to(secret)
    with pytest.raises(BundleError, match="is a link that leads out of the bundle"):
        Bundle.open(folder).file("link")


def test_a_file_below_a_linked_folder_is_refused(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "x").write_text("x", encoding="utf-8")
    (folder / "sub").symlink_to(outside)
    with pytest.raises(BundleError, match="is a link that leads out of the bundle"):
        Bundle.open(folder).file("sub/x")


def test_links_in_a_circle_are_refused(folder: Path) -> None:
    (folder / "round").symlink_to(folder / "and_round")
    (folder / "and_round").symlink_to(folder / "round")
    with pytest.raises(BundleError):
        Bundle.open(folder).file("round")


def test_a_link_inside_the_folder_and_a_linked_folder_are_fine(folder: Path, tmp_path: Path) -> None:
    (folder / "alias.tflite").symlink_to("model.tflite")
    current = tmp_path / "current"
    current.symlink_to(folder)
    assert Bundle.open(current).file("alias.tflite").read_bytes() == model("linear").read_bytes()


def test_a_missing_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match=r"manifest.json: cannot be read \(No such file or directory\); make the bundle"
    ):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "\xff", "[" * 100_000, '{"format": ' + "1" * 5000 + "}"],
    ids=["empty", "half", "latin-1", "deep", "digits"],
)
def test_a_manifest_that_is_not_json_is_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(BundleError, match=r"manifest.json: is not JSON .* copy the bundle again"):
        Bundle.open(folder)


def test_a_manifest_that_is_far_too_large_is_not_even_read(folder: Path) -> None:
    with (folder / MANIFEST).open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(BundleError, match="this is no manifest"):
        Bundle.open(folder)


def mistakes(change: dict[str, Any]) -> str:
    sound = {
        "format": 1,
        "name": "m",
        "version": 1,
        "default": "a",
        "variants": [{"name": "a", "file": "model.tflite", "sha256": "0", "bytes": 1}],
    }
    with pytest.raises(BundleError) as caught:
        parse_manifest({**sound, **change}, "here/manifest.json")
    return str(caught.value)


def test_all_mistakes_of_a_manifest_are_named_at_once() -> None:
    text = mistakes({"name": 5, "version": -1, "input": {"kind": "sound"}, "variants": [{"name": "a"}]})
    assert text.startswith("here/manifest.json: not a valid manifest; make the bundle again")
    for key in (
        "name: must be text",
        "version: must be at least 0",
        "input.kind: must be",
        "variants[0].file: is missing",
    ):
        assert key in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"variants": []}, "variants: is empty"),
        ({"default": "b"}, "default: names no variant: 'b'. Variants: a"),
        ({"variants": [{"name": "a", "file": "m", "sha256": "0", "bytes": 1}] * 2}, "variants: two have the same name"),
    ],
)
def test_variants_that_contradict_are_refused(change: dict[str, Any], says: str) -> None:
    assert says in mistakes(change)


@pytest.mark.parametrize("data", [[], "x", None, 5])
def test_a_manifest_that_is_no_object_is_refused(data: Any) -> None:
    with pytest.raises(BundleError, match="must be a table"):
        parse_manifest(data, "m")


def test_labels_are_one_a_line_and_the_empty_lines_at_the_end_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes("\ufeffüben\r\n\r\n two words \n\n\n".encode())
    assert read_labels(file) == ("üben", "", "two words")


def test_labels_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"none.txt: labels cannot be read"):
        read_labels(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xe4\n")
    with pytest.raises(BundleError, match=r"latin.txt: labels cannot be read"):
        read_labels(tmp_path / "latin.txt")
    (tmp_path / "huge.txt").touch()
    os.truncate(tmp_path / "huge.txt", MAX_LABELS_BYTES + 1)
    with pytest.raises(BundleError, match="this is no list of labels"):
        read_labels(tmp_path / "huge.txt")


def test_the_hash_is_the_files_sha_256(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(os.urandom(3 * 1024 * 1024 + 1))
    assert sha256_of(file) == sha256(file)
