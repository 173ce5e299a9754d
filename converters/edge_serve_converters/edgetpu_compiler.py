"""Runs Coral's `edgetpu_compiler`, where there is one, and reads what it says: the only word on what an Edge TPU really takes.

The log's format is that of versions 2 to 16, as people post it. The compiler ends with status 0 on some failures too, so
the proof of success is the file that it writes.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edge_serve_converters import graph
from edge_serve_converters.runtimes import EDGETPU_OPERATOR

NAME = "edgetpu_compiler"
# Names another program than the one on PATH.
VARIABLE = "EDGETPU_COMPILER"
# Of a log, which has a line for each kind of operator, this much is read.
MAX_LOG_BYTES = 256 * 1024
_CHUNK_BYTES = 4096
_LAST_WORDS_S = 2.0
MAPPED = "Mapped to Edge TPU"
_LAST_LINES = 6
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_ROW = re.compile(r"^([A-Z][A-Za-z0-9_]*|[\w.-]+-op)\s+(\d{1,9})\s{2,}(\S.*)$")
_SIZE = r"\s*([\d.]{1,20})(B|KiB|MiB|GiB)\b"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the log: so many operators of that name have that status."""

    operator: str
    count: int
    status: str


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one run of the compiler came to."""

    file: Path | None
    """The compiled file; None if there is none, or none of its operators runs on an Edge TPU."""
    reason: str | None
    """Why there is no file."""
    version: str | None
    """The compiler's."""
    mapped: int
    """Operators on the Edge TPU."""
    total: int
    rows: tuple[Row, ...]
    on_chip_bytes: int | None
    """Memory on the Edge TPU that its parameters take."""
    off_chip_bytes: int | None
    """Parameters that do not fit and are sent for each inference."""
    subgraphs: int | None
    log: str

    def to_json(self) -> dict[str, Any]:
        """Give it for the report; the log and the file's path, which name a temporary folder, are left out."""
        return {
            "version": self.version,
            "reason": self.reason,
            "mapped": self.mapped,
            "total": self.total,
            "subgraphs": self.subgraphs,
            "on_chip_bytes": self.on_chip_bytes,
            "off_chip_bytes": self.off_chip_bytes,
            "operators": [{"operator": row.operator, "count": row.count, "status": row.status} for row in self.rows],
        }


def find() -> Path | None:
    """Give the compiler: what $EDGETPU_COMPILER names, else what is on PATH; None if there is none."""
    found = shutil.which(os.environ.get(VARIABLE) or NAME)
    return Path(found) if found else None


def compile_file(file: Path, out_folder: Path, timeout_s: float) -> Compiled | None:
    """Compile a fully quantized .tflite file into `out_folder`, which exists; None if there is no compiler.

    Whatever the compiler does (a refusal, a crash, no end, no output), the answer says so in `reason`.
    """
    compiler = find()
    if compiler is None:
        named = os.environ.get(VARIABLE)
        return _failure(f"${VARIABLE} names {named}, which is no program") if named else None
    try:
        process = subprocess.Popen(
            [str(compiler), "-s", "-o", str(out_folder), str(file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # It starts a child of its own, which must not outlive it.
            start_new_session=True,
        )
    except OSError as error:
        return _failure(f"{compiler} cannot be run ({error.strerror})")
    text, failed = _watch(process, timeout_s)
    return _read(text, failed, out_folder / f"{file.stem}_edgetpu.tflite")


def _watch(process: subprocess.Popen[bytes], timeout_s: float) -> tuple[str, str | None]:
    """Wait for the end; give the log, and what is wrong with the end if something is."""
    kept = bytearray()
    reader = threading.Thread(target=_drain, args=(process.stdout, kept), name=NAME, daemon=True)
    reader.start()
    failed = None
    try:
        status = process.wait(timeout_s)
        if status < 0:
            failed = f"the compiler crashed ({signal.Signals(-status).name})"
        elif status > 0:
            failed = f"the compiler ended with status {status}"
    except subprocess.TimeoutExpired:
        failed = f"the compiler did not end within {timeout_s:g} s and was stopped"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    # A child that it left behind may hold the line open; what was said so far is what counts.
    reader.join(_LAST_WORDS_S)
    return bytes(kept).decode("utf-8", "replace"), failed


def _drain(stream: IO[bytes], kept: bytearray) -> None:
    """Read to the end, so that the compiler never waits for us, and keep the beginning."""
    with stream:
        while chunk := stream.read(_CHUNK_BYTES):
            kept += chunk[: MAX_LOG_BYTES - len(kept)]


def _read(text: str, failed: str | None, made: Path) -> Compiled:
    version = re.search(r"^Edge TPU Compiler version (\S{1,40})", text, re.MULTILINE)
    rows = parse_rows(text)
    mapped = _number(r"will run on Edge TPU:", text)
    total = _number(r"Total number of operations:", text)
    mapped_rows = sum(row.count for row in rows if row.status == MAPPED)
    all_rows = sum(row.count for row in rows)
    reason = _reason(text, failed, made)
    return Compiled(
        file=None if reason else made,
        reason=reason,
        version=version.group(1) if version else None,
        # A model that maps as a whole has no such line; older versions print no total.
        mapped=mapped if mapped is not None else mapped_rows,
        total=total if total is not None else all_rows,
        rows=rows,
        on_chip_bytes=_size(r"^On-chip memory used for caching model parameters:", text),
        off_chip_bytes=_size(r"^Off-chip memory used for streaming uncached model parameters:", text),
        subgraphs=_number(r"Number of Edge TPU subgraphs:", text),
        log=text,
    )


def parse_rows(text: str) -> tuple[Row, ...]:
    """Read the table `Operator  Count  Status` of a log."""
    return tuple(
        Row(match.group(1), int(match.group(2)), match.group(3).strip())
        for match in map(_ROW.match, text.splitlines())
        if match
    )


def _reason(text: str, failed: str | None, made: Path) -> str | None:
    if "not quantized" in text:
        return "the compiler says that the model is not quantized: it takes int8 and uint8 all through"
    old = re.search(r"Didn't find op for builtin opcode '(\w{1,80})' version '(\d{1,4})'", text)
    if old:
        return f"the compiler is too old for {old.group(1)} version {old.group(2)}"
    if "dynamic-sized tensors" in text:
        return "the compiler takes fixed shapes only; convert with --input-shape"
    if "Internal compiler error" in text:
        return "the compiler failed in itself (internal error), often over tensors that are too large for it"
    if failed is None:
        failed = _refused_file(made)
    if failed is None:
        return None
    last = [line.strip() for line in text.splitlines() if line.strip()][-_LAST_LINES:]
    return failed + (f"; its last words: {' / '.join(last)}" if last else "")


def _refused_file(made: Path) -> str | None:
    """Look at what was written: a file without a single operator for the Edge TPU is no compiled file."""
    try:
        found = graph.read(made.read_bytes())
    except FileNotFoundError:
        return "the compiler wrote no file"
    except (OSError, ValueError) as error:
        return f"the compiler wrote a file that cannot be read ({error})"
    if not any(operator.name == EDGETPU_OPERATOR for operator in found.operators):
        return "the compiler mapped no operator to the Edge TPU"
    return None


def _failure(reason: str) -> Compiled:
    return Compiled(None, reason, None, 0, 0, (), None, None, None, "")


def _number(label: str, text: str) -> int | None:
    found = re.search(label + r"\s*(\d{1,9})\b", text)
    return int(found.group(1)) if found else None


def _size(label: str, text: str) -> int | None:
    found = re.search(label + _SIZE, text, re.MULTILINE)
    if not found:
        return None
    try:
        return round(float(found.group(1)) * _UNITS[found.group(2)])
    except ValueError:
        return None


def how_to_compile(file: str) -> str:
    """Say how to get the compiler and what to run it on; `file` is the name of the int8 variant."""
    return (
        f"{file} was not compiled for the Edge TPU: {NAME} is not on PATH. It comes from Coral's own packages and runs on x86-64 "
        "Debian and Ubuntu only:\n"
        "  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo gpg --dearmor -o /usr/share/keyrings/coral.gpg\n"
        '  echo "deb [signed-by=/usr/share/keyrings/coral.gpg] https://packages.cloud.google.com/apt coral-edgetpu-stable main" '
        "| sudo tee /etc/apt/sources.list.d/coral-edgetpu.list\n"
        f"  sudo apt-get update && sudo apt-get install edgetpu-compiler\n"
        'Elsewhere, run the same lines in a container: docker run --rm -it --platform linux/amd64 -v "$PWD":/work -w /work '
        "debian:12 bash (first: apt-get update && apt-get install -y curl gpg sudo)\n"
        f"Then: {NAME} -s {file}, which writes {Path(file).stem}_edgetpu.tflite; or convert again with {NAME} on PATH "
        f"(or ${VARIABLE} naming it), and the compiled variant goes into the bundle"
    )
