"""What the unit tests are made of: models, bundles, pictures, and deliveries that remember how they were settled."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edge_serve import plugins
from edge_serve.bundle import TensorSpec
from edge_serve.config import Config
from edge_serve.config import parse as parse_config
from edge_serve.errors import ConfigError, Problem
from edge_serve.frame import Capture, Delivery, Frame, ModelInfo, Reply, Result, ResultError, Window

MODELS = Path(__file__).parents[1] / "data" / "models"
# tests/data/make_models.py: scores = x @ WEIGHTS + BIAS
WEIGHTS = np.array([[1, 0, -1], [0, 1, 0], [2, -1, 0.5], [-0.5, 0.25, 1]], np.float32)
BIAS = np.array([0.1, -0.2, 0.3], np.float32)


def model(name: str) -> Path:
    """Give the path of a test model."""
    return MODELS / f"{name}.tflite"


def tensor(
    shape: tuple[int, ...],
    dtype: str = "float32",
    scale: float | None = None,
    zero_point: int | None = None,
    name: str = "x",
) -> TensorSpec:
    """Describe a tensor."""
    return TensorSpec(name, dtype, shape, scale, zero_point)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """Give a picture's bytes as JPEG or PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(width: int, height: int, color: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    """Give a picture of one colour."""
    return Image.new("RGB", (width, height), color)


def noise(width: int, height: int, seed: int = 1) -> Image.Image:
    """Give a picture that packs badly and whose pixels all differ."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def frame(payload: Any, content_type: str | None = None, **fields: Any) -> Frame:
    """Give a frame."""
    given: dict[str, Any] = {"id": "f1", "source": "test", "captured": Capture.now(), **fields}
    return Frame(content_type=content_type, payload=payload, **given)


class Settled:
    """Deliveries with numbers from 0 on, and how each was settled: in which order, and with what."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.outcomes: dict[int, Exception | None] = {}
        self._made = 0

    def delivery(
        self, payload: Any, content_type: str | None = None, reply: Reply | None = None, **fields: Any
    ) -> Delivery:
        """Give the next delivery; its frame's id is its number."""
        number = self._made
        self._made += 1

        def settle(error: Exception | None) -> None:
            assert number not in self.outcomes, f"delivery {number} was settled twice"
            self.order.append(number)
            self.outcomes[number] = error

        return Delivery(frame(payload, content_type, **{"id": str(number), **fields}), settle, reply)


@contextlib.contextmanager
def allocating_at_most(limit: int) -> Iterator[None]:
    """Check that no more than so many bytes are allocated at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] <= limit
    finally:
        tracemalloc.stop()


def assert_close(found: Any, expected: Any, rtol: float = 1e-7, atol: float = 0.0) -> None:
    """Compare numbers; a difference is shown element by element."""
    np.testing.assert_allclose(found, expected, rtol, atol)


def sha256(path: Path) -> str:
    """Give a file's hash."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def bundle(
    base: Path,
    number: int = 1,
    variants: dict[str, str] | None = None,
    files: dict[str, str] | None = None,
    **keys: Any,
) -> Path:
    """Write a version folder BASE/NUMBER with a manifest; `variants` maps names to test models, `files` names to text."""
    folder = base / str(number)
    folder.mkdir(parents=True)
    variants = variants or {"float32": "linear"}
    listed: dict[str, dict[str, Any]] = {}
    hashes: dict[str, str] = {}
    for variant, name in variants.items():
        file = "model.tflite" if not listed else f"model.{variant}.tflite"
        shutil.copyfile(model(name), folder / file)
        hashes[file] = sha256(folder / file)
        listed[variant] = {
            "name": variant,
            "file": file,
            "sha256": hashes[file],
            "bytes": (folder / file).stat().st_size,
        }
    for file, text in (files or {}).items():
        (folder / file).write_text(text, encoding="utf-8")
        hashes[file] = sha256(folder / file)
    manifest = {
        "format": 1,
        "name": base.name,
        "version": number,
        "default": next(iter(variants)),
        "variants": list(listed.values()),
        "files": hashes,
        **keys,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a bundle's manifest by hand."""
    file = folder / "manifest.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")


SOUND = """
schema = 1
device = "bench"

[[pipeline]]
name = "one"
model = "{linear}"

[pipeline.source]
type = "file"
path = "-"

[[pipeline.sink]]
type = "stdout"
"""


def sound(**replaced: str) -> str:
    """Give a configuration without mistakes; each argument's name is a word of it that is replaced."""
    text, place = SOUND, str(model("linear"))
    for old, new in replaced.items():
        if old not in text:
            # Only now: the words of a checkout's own path are nobody's to replace.
            text = text.replace("{linear}", place)
        assert old in text
        text = text.replace(old, new)
    return text.replace("{linear}", place)


def configured(text: str, folder: Path) -> Config:
    """Read a configuration as if it stood in `folder`."""
    return parse_config(text, folder / "edge-serve.toml", plugins.load)


def problems(text: str, folder: Path) -> list[Problem]:
    """Give the mistakes of a configuration."""
    try:
        configured(text, folder)
    except ConfigError as error:
        return error.problems
    return []


def result(**fields: Any) -> Result:
    """Give a result; any of its fields may be replaced."""
    return Result(
        **{
            "frame_id": "f1",
            "device": "bench",
            "pipeline": "one",
            "source": "test",
            "captured": Capture.now(),
            "model": ModelInfo("linear", 3, "float32", "xnnpack", "serving_default"),
            "type": "classification",
            "decoded": {"classes": [{"index": 2, "label": "worn", "score": 0.93}]},
            **fields,
        }
    )


__all__ = [
    "BIAS",
    "MODELS",
    "WEIGHTS",
    "ResultError",
    "Settled",
    "Window",
    "allocating_at_most",
    "assert_close",
    "bundle",
    "configured",
    "encoded",
    "frame",
    "model",
    "noise",
    "plain",
    "problems",
    "result",
    "rewrite",
    "sha256",
    "sound",
    "tensor",
]
