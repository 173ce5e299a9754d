"""The README's examples run as they stand, one after the other, as a new user would type them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"<!-- test: (?P<name>\w+) -->\n```sh\n(?P<body>.*?)```", re.DOTALL)
BLOCKS = {match["name"]: match["body"] for match in BLOCK.finditer((ROOT / "README.md").read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what the examples take from a clone."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("scripts/demo_models", "tests/data/photos"):
        shutil.copytree(ROOT / name, folder / name)
    yield folder
    Path("/tmp/edge-serve-readme.sock").unlink(missing_ok=True)


def run(clone: Path, name: str) -> str:
    """Run one example with the environment's commands on PATH; gives its standard output."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", BLOCKS[name]],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=100,
    )
    assert done.returncode == 0, f"example {name!r}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.convert
@pytest.mark.slow
def test_the_examples_of_the_readme_run_one_after_the_other(clone: Path) -> None:
    assert list(BLOCKS) == ["convert", "recipe", "compare", "inspect", "folder", "socket", "delegates", "config"]

    assert "int8" in run(clone, "convert")
    assert {path.name for path in (clone / "models/digits/1").iterdir()} >= {
        "manifest.json",
        "model.tflite",
        "model.float16.tflite",
    }

    assert "int8" in run(clone, "recipe")
    manifest = json.loads((clone / "models/digits-small/1/manifest.json").read_text(encoding="utf-8"))
    assert (manifest["output"]["top_k"], manifest["input"]["kind"]) == (3, "image")

    assert "float16" in run(clone, "compare")
    assert (clone / "compared.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")

    inspected = run(clone, "inspect")
    assert "signature serving_default" in inspected
    last = json.loads(inspected[inspected.index("{") :])
    assert last["results"][0]["model"]["variant"] == "float16"
    assert last["results"][0]["result"]["classes"][0]["label"] == "7"

    lines = run(clone, "folder").splitlines()
    results = [json.loads(line) for line in lines if line.startswith("{")]
    assert {result["id"]: result["result"]["classes"][0]["label"] for result in results} == {
        "digit-4.png": "4",
        "digit-7.png": "7",
    }

    answer = json.loads(run(clone, "socket"))
    assert answer["type"] == "result"
    assert answer["result"]["classes"][0]["label"] == "7"

    measured = run(clone, "delegates")
    assert "fastest: " in measured
    assert "CONV_2D" in measured

    run(clone, "config")
    assert (clone / "edge-serve.toml").read_text(encoding="utf-8").startswith("# A configuration")
