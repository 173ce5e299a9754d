"""The Edge TPU compiler is run and its log read; a stand-in program behaves as the real one does, in success and in failure."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from edge_serve_converters import edgetpu_compiler
from edge_serve_converters.edgetpu_compiler import Row

MODELS = Path(__file__).parents[1] / "data" / "models"

PARTLY = """\
Edge TPU Compiler version 16.0.384591198
Started a compilation timeout timer of 180 seconds.

Model compiled successfully in 1524 ms.

Input model: int8.tflite
Input size: 4.24MiB
Output model: int8_edgetpu.tflite
Output size: 5.57MiB
On-chip memory used for caching model parameters: 4.21MiB
On-chip memory remaining for caching model parameters: 3.29MiB
Off-chip memory used for streaming uncached model parameters: 1.50KiB
Number of Edge TPU subgraphs: 1
Total number of operations: 87
Operation log: int8_edgetpu.log

Model successfully compiled but not all operations are supported by the Edge TPU. A percentage of the model will instead run \
on the CPU, which is slower. If possible, consider updating your model to use only operations supported by the Edge TPU. For \
details, visit g.co/coral/model-reqs.
Number of operations that will run on Edge TPU: 83
Number of operations that will run on CPU: 4

Operator                       Count      Status

DEPTHWISE_CONV_2D              80         Mapped to Edge TPU
LOGISTIC                       1          Operation is otherwise supported, but not mapped due to some unspecified limitation
CONCATENATION                  3          Mapped to Edge TPU
CONCATENATION                  1          More than one subgraph is not supported
DEQUANTIZE                     2          Operation is working on an unsupported data type
Compilation child process completed within timeout period.
Compilation succeeded!
"""
WHOLLY = """\
Edge TPU Compiler version 15.0.340273435

Model compiled successfully in 44 ms.

Number of Edge TPU subgraphs: 1
Total number of operations: 6
Operation log: int8_edgetpu.log
See the operation log file for individual operation details.

Operator                       Count      Status

SOFTMAX                        1          Mapped to Edge TPU
CONV_2D                        5          Mapped to Edge TPU
"""


def stand_in(folder: Path, says: str, *, writes: str | None = "edgetpu.tflite", ending: str = "sys.exit(0)") -> None:
    """Put a compiler on disk: it says this, writes that model as its output, and ends so."""
    program = folder / "edgetpu_compiler"
    copy = f"shutil.copy({str(MODELS / writes)!r}, out / (source.stem + '_edgetpu.tflite'))" if writes else "pass"
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, shutil, signal, subprocess, sys, time\nfrom pathlib import Path\n"
        "assert sys.argv[1:3] == ['-s', '-o'], sys.argv\n"
        "out, source = Path(sys.argv[3]), Path(sys.argv[4])\n"
        f"print({says!r}, flush=True)\n{copy}\n{ending}\n"
    )
    program.chmod(0o755)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the folder of the compiler, first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("EDGETPU_COMPILER", raising=False)
    return folder


def run(tmp_path: Path, timeout_s: float = 30.0) -> edgetpu_compiler.Compiled:
    """Compile the int8 model of the tests."""
    source, out = tmp_path / "int8.tflite", tmp_path / "out"
    source.write_bytes((MODELS / "int8.tflite").read_bytes())
    out.mkdir()
    result = edgetpu_compiler.compile_file(source, out, timeout_s)
    assert result is not None
    return result


def test_without_a_compiler_there_is_no_answer_but_a_way(compiler: Path, tmp_path: Path) -> None:
    assert edgetpu_compiler.compile_file(MODELS / "int8.tflite", tmp_path, 5.0) is None
    text = edgetpu_compiler.how_to_compile("model.edgetpu.tflite")
    for word in (
        "x86-64",
        "edgetpu-compiler",
        "edgetpu_compiler -s model.edgetpu.tflite",
        "docker run",
        "EDGETPU_COMPILER",
    ):
        assert word in text


def test_the_log_of_a_partly_mapped_model_is_read(compiler: Path, tmp_path: Path) -> None:
    stand_in(compiler, PARTLY)
    result = run(tmp_path)
    assert result.reason is None
    assert result.file == tmp_path / "out" / "int8_edgetpu.tflite"
    assert (result.version, result.mapped, result.total, result.subgraphs) == ("16.0.384591198", 83, 87, 1)
    assert (result.on_chip_bytes, result.off_chip_bytes) == (round(4.21 * 2**20), 1536)
    assert result.rows[0] == Row("DEPTHWISE_CONV_2D", 80, "Mapped to Edge TPU")
    assert result.rows[3] == Row("CONCATENATION", 1, "More than one subgraph is not supported")
    assert len(result.rows) == 5
    told = result.to_json()
    assert json.loads(json.dumps(told)) == told
    assert str(tmp_path) not in json.dumps(told)


def test_a_wholly_mapped_model_is_counted_from_its_table(compiler: Path, tmp_path: Path) -> None:
    stand_in(compiler, WHOLLY)
    result = run(tmp_path)
    assert (result.mapped, result.total, result.reason) == (6, 6, None)
    assert (result.on_chip_bytes, result.off_chip_bytes) == (None, None)


@pytest.mark.parametrize(
    ("says", "ending", "reason"),
    [
        ("Edge TPU Compiler version 14.1\nInvalid model: int8.tflite\nModel not quantized", "sys.exit(1)", "not quantized"),
        (
            "Edge TPU Compiler version 16.0\nERROR: Didn't find op for builtin opcode 'FULLY_CONNECTED' version '12'. An older version",
            "sys.exit(1)",
            "too old for FULLY_CONNECTED version 12",
        ),
        ("ERROR: Attempting to use a delegate that only supports static-sized tensors with a graph that has dynamic-sized tensors.",
         "sys.exit(1)", "fixed shapes only"),
        ("Edge TPU Compiler version 16.0\n\nInternal compiler error. Aborting!", "sys.exit(0)", "internal error"),
        ("Compilation failed!", "sys.exit(3)", "ended with status 3; its last words: Compilation failed!"),
        ("Edge TPU Compiler version 16.0", "os.kill(os.getpid(), signal.SIGSEGV)", "crashed (SIGSEGV)"),
        ("Compilation succeeded!", "sys.exit(0)", "wrote no file"),
    ],
)  # fmt: skip
def test_every_failure_has_a_reason_and_no_file(
    compiler: Path, tmp_path: Path, says: str, ending: str, reason: str
) -> None:
    stand_in(compiler, says, writes=None, ending=ending)
    result = run(tmp_path)
    assert result.file is None
    assert result.reason is not None
    assert reason in result.reason


def test_a_file_that_nothing_was_mapped_in_is_no_compiled_file(compiler: Path, tmp_path: Path) -> None:
    stand_in(compiler, WHOLLY, writes="int8.tflite")
    result = run(tmp_path)
    assert (result.file, result.reason) == (
        None,
        "the compiler mapped no operator to the Edge TPU; its last words: " + " / ".join(WHOLLY_END),
    )


WHOLLY_END = [line.strip() for line in WHOLLY.splitlines() if line.strip()][-6:]


def test_a_compiler_that_hangs_is_stopped_with_what_it_started(compiler: Path, tmp_path: Path) -> None:
    note = tmp_path / "child"
    start = (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"Path({str(note)!r}).write_text(str(child.pid))"
    )
    stand_in(compiler, "Edge TPU Compiler version 16.0", ending=f"{start}\ntime.sleep(600)")
    began = time.monotonic()
    result = run(tmp_path, timeout_s=1.5)
    assert result.reason is not None
    assert "did not end within 1.5 s" in result.reason
    assert result.version == "16.0"
    assert time.monotonic() - began < 10
    deadline = time.monotonic() + 5
    while (
        time.monotonic() < deadline and Path(f"/proc/{note.read_text()}").exists() and not _is_zombie(note.read_text())
    ):
        time.sleep(0.02)
    assert not Path(f"/proc/{note.read_text()}").exists() or _is_zombie(note.read_text())


def _is_zombie(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_log_without_end_is_cut(compiler: Path, tmp_path: Path) -> None:
    stand_in(compiler, PARTLY, ending="sys.stdout.write('noise ' * 2_000_000)")
    result = run(tmp_path)
    assert result.reason is None
    assert len(result.log) == edgetpu_compiler.MAX_LOG_BYTES


def test_a_named_compiler_goes_before_the_one_on_path(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(compiler, WHOLLY)
    other = tmp_path / "other"
    other.mkdir()
    stand_in(other, PARTLY)
    monkeypatch.setenv("EDGETPU_COMPILER", str(other / "edgetpu_compiler"))
    assert run(tmp_path).total == 87
    monkeypatch.setenv("EDGETPU_COMPILER", str(tmp_path / "missing"))
    result = edgetpu_compiler.compile_file(MODELS / "int8.tflite", tmp_path, 5.0)
    assert result is not None
    assert result.reason == f"$EDGETPU_COMPILER names {tmp_path / 'missing'}, which is no program"


def test_a_program_that_cannot_be_run_is_told(compiler: Path, tmp_path: Path) -> None:
    program = compiler / "edgetpu_compiler"
    program.write_bytes(b"\x7fELF of another machine")
    program.chmod(0o755)
    result = run(tmp_path)
    assert result.reason is not None
    assert "cannot be run" in result.reason
