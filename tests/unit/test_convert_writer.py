"""Bundles on disk: whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve.bundle import Bundle, TensorSpec
from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec, OutputSpec
from edge_serve_converters import writer
from edge_serve_converters.flatbuffer import read_contents
from edge_serve_converters.request import Wanted
from edge_serve_converters.trial import Seen
from edge_serve_converters.variants import Made

LINEAR = Path(__file__).parents[1] / "data" / "models" / "linear.tflite"


def made(name: str) -> Made:
    """A variant that passed."""
    spec = {"x": TensorSpec("x", "int8", (1, 4), 0.5, -3)}
    return Made(
        name=name,
        wanted=Wanted(name, "int8", io="int8"),
        quantization="int8",
        io="int8",
        file=LINEAR,
        bytes=LINEAR.stat().st_size,
        contents=read_contents(LINEAR.read_bytes()),
        seen={"serving_default": Seen(spec, {"y": TensorSpec("y", "float32", (1, 3))}, {"ADD": 1}, {}, "", Path())},
        quality={"max_error": 0.5},
        golden={"y": np.ones((2, 1, 3), np.float32)},
        warnings=(),
        compatibility={"min_runtime": "2.4.0"},
    )


def content(**changes: Any) -> writer.Content:
    """A bundle of two variants."""
    values: dict[str, Any] = {
        "name": "model",
        "variants": [made("int8"), made("float16")],
        "input": InputSpec(kind="tensor"),
        "output": OutputSpec(type="classification", labels_file="labels.txt"),
        "labels": ("naïve", "two", "three"),
        "samples": {"input/x": np.zeros((2, 1, 4), np.float32)},
        "warm_up": b"requests",
        "recipe": {"seed": 0},
        "report": {"seconds": {"int8": 1.5}},
    }
    return writer.Content(**{**values, **changes})


def test_what_was_written_opens_and_verifies(tmp_path: Path) -> None:
    folder = writer.write(tmp_path, 3, False, content())
    bundle = Bundle.open(folder)
    assert folder == tmp_path / "3"
    assert sorted(bundle.manifest.files) == [
        "assets.extra/tf_serving_warmup_requests",
        "labels.txt",
        "model.float16.tflite",
        "model.tflite",
        "samples.npz",
    ]
    for name in bundle.manifest.files:
        bundle.verify(name)
    assert bundle.labels() == ("naïve", "two", "three")
    assert bundle.manifest.signatures["serving_default"].inputs["x"].dtype == "float32"
    assert bundle.manifest.variant("float16").inputs[0] == TensorSpec("x", "int8", (1, 4), 0.5, -3)
    with np.load(folder / "samples.npz") as samples:
        assert sorted(samples) == ["input/x", "variant/float16/y", "variant/int8/y"]


def test_the_manifest_holds_neither_times_nor_paths(tmp_path: Path) -> None:
    folder = writer.write(tmp_path, 1, False, content())
    text = (folder / "manifest.json").read_text(encoding="utf-8")
    assert "1.5" not in text
    assert str(tmp_path) not in text
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["seconds"] == {"int8": 1.5}


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(UsageError, match="No space left on device"):
        writer.write(tmp_path, 1, False, content())
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_while_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.write(tmp_path, 1, False, content())
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_a_version_as_a_whole(tmp_path: Path) -> None:
    writer.write(tmp_path, 1, False, content())
    (tmp_path / "1" / "stray").write_text("from before")
    writer.write(tmp_path, 1, True, content(variants=[made("int8")]))
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert not (tmp_path / "1" / "stray").exists()
    assert len(Bundle.open(tmp_path / "1").manifest.variants) == 1


def test_a_version_that_somebody_else_made_meanwhile_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "theirs").write_text("theirs")
    with pytest.raises(UsageError, match="another conversion may have made it"):
        writer.write(tmp_path, 1, False, content())
    assert [path.name for path in tmp_path.rglob("*")] == ["1", "theirs"]


def test_folders_can_be_read_by_others(tmp_path: Path) -> None:
    folder = writer.write(tmp_path, 1, False, content())
    assert folder.stat().st_mode & 0o055 == 0o055
