"""A delegate library for tests, built with gcc, that does what its options say; and models that it takes operators of.

Options of the library: `claims` (add, tpu, all, nothing), `create` (refuse, crash, hang), `prepare` (fail, crash, hang), `invoke` (fail,
crash, hang, nan, wrong), `from` (the first run that misbehaves, counted from 0; opening takes OPENING_RUNS of them), `when` (a file:
it misbehaves only while that is there), `off` (how wrong), `sleep_us`, `unplugged` (a file: while it is there, nothing opens and every
run fails), `lock` (a file: one process at a time), `device` (anything).
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve.model.delegate import DelegateSpec
from tests.unit.tflite_files import Op, T, build, options

SOURCE = Path(__file__).with_name("misbehave.c")
# Runs that opening takes: warm-up, and one whose time is taken.
OPENING_RUNS = 3


@functools.cache
def library() -> Path:
    """Build the library, once; the test is skipped where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("a delegate for tests takes a C compiler, and there is none")
    target = Path(tempfile.mkdtemp(prefix="edge-serve-delegate-")) / "libmisbehave.so"
    command = [compiler, "-O2", "-fPIC", "-shared", "-Wall", "-Werror", "-o", str(target), str(SOURCE), "-lm"]
    subprocess.run(command, check=True)
    return target


def external(**wishes: Any) -> DelegateSpec:
    """Name the library as an external delegate, with options."""
    return DelegateSpec("external", "", str(library()), tuple((key, str(value)) for key, value in wishes.items()))


def edge_tpu(index: str = "", **wishes: Any) -> DelegateSpec:
    """Name it as a stand-in Edge TPU: the same interface as libedgetpu's."""
    spec = {"claims": "tpu", **wishes}
    return DelegateSpec("edgetpu", index, str(library()), tuple((key, str(value)) for key, value in spec.items()))


def add_model(folder: Path, size: int = 4, name: str = "add.tflite") -> Path:
    """Write y = -(x + x), float32 [1, size]: ADD is the delegate's, NEG stays with the interpreter."""
    x, twice, y = (T(each, (1, size), "float32", scales=0) for each in ("x", "twice", "y"))
    file = folder / name
    add = Op("ADD", [x, x], [twice], options=options("AddOptions"))
    file.write_bytes(build([add, Op("NEG", [twice], [y], options=options("NegOptions"))]))
    return file


def tpu_model(folder: Path, size: int = 4, name: str = "compiled.tflite") -> Path:
    """Write y = 2 x as an Edge TPU's compiler would: one custom operator, which nothing but its delegate can run."""
    x, y = (T(each, (1, size), "float32", scales=0) for each in ("x", "y"))
    file = folder / name
    file.write_bytes(build([Op("edgetpu-custom-op", [x], [y], custom=True)]))
    return file


def values(size: int = 4, seed: int = 0) -> Any:
    """Give float32 [1, size]."""
    return np.random.default_rng(seed).uniform(-1, 1, (1, size)).astype(np.float32)
