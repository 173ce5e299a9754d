"""What the tests of real conversions share: models made once, conversions in this process, pictures to calibrate with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edge_serve.errors import EdgeServeError
from edge_serve_converters import cli
from tests.system.test_convert import Done

ROOT = Path(__file__).parents[1]
# Packages that carry models, as scripts/test fetches and unpacks them.
PACKAGES = Path(os.environ.get("EDGE_SERVE_TEST_MODELS", ROOT / ".cache" / "models"))


def package(*names: str) -> Path:
    """Give the folder of an unpacked package; skip the test if one of them could not be had."""
    missing = [name for name in names if not (PACKAGES / name).is_dir()]
    if missing:
        pytest.skip(
            f"{', '.join(missing)} is not in {PACKAGES}: scripts/test fetches it where the package index is in reach"
        )
    return PACKAGES / names[0]


def make_models(folder: Path, *names: str) -> Path:
    """Make models of tests/real_models.py in a process of its own: this one never imports tensorflow."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    made = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "real_models.py"), str(folder), *names],
        capture_output=True,
        env=environment,
    )
    assert made.returncode == 0, made.stderr.decode()[-2000:]
    return folder


def convert(base: Path, model: Path, *arguments: object) -> Done:
    """Convert in this process; errors are caught as `edge-serve` catches them."""
    result = CliRunner().invoke(cli.convert, [str(model), "-o", str(base), "--json", *map(str, arguments)])
    error = result.exception
    if error is not None and not isinstance(error, EdgeServeError):
        raise error
    document = json.loads(result.stdout) if result.stdout else {}
    return Done(error.exit_code if error is not None else 0, str(error or ""), document, base)


def modes(*names: str) -> list[str]:
    """Give the options that ask for these modes."""
    return [part for name in names for part in ("--quantize", name)]


def save_pictures(folder: Path, count: int = 30) -> Path:
    """Save smooth coloured pictures, 128×128."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        coarse.resize((128, 128), Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")
    return folder
