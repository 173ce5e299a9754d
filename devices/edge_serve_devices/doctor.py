"""What is wrong with this machine, as far as it concerns edge-serve: findings, each with what to do.

Facts come from files below one root. Whatever may hang or crash (a runtime's import, a delegate's library) is tried in a child
process with a time limit. Nothing here needs a configuration, a runtime or rights.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edge_serve import plugins
from edge_serve.errors import EdgeServeError, UsageError
from edge_serve.frame import CLOCK_PLAUSIBLE_AFTER
from edge_serve.spool.clock import kernel_synced
from edge_serve_devices import boards, hardware
from edge_serve_devices.boards import Board

if TYPE_CHECKING:
    from edge_serve.model.delegate import DelegateSpec

State = Literal["ok", "note", "warning", "error"]
CHILD_LIMIT_S = 20.0
MODULES = ("ai_edge_litert", "tflite_runtime")
LEAST_PYTHON = (3, 10)
LEAST_FREE_BYTES = 256 * 2**20
LEAST_MEMORY_SHARE = 0.1
# Bits of the Raspberry Pi's firmware (vcgencmd get_throttled): now, and since the start.
THROTTLED_FILE = "sys/devices/platform/soc/soc:firmware/get_throttled"
THROTTLED = {
    0: ("error", "the voltage is too low", "use the board's own power supply and a short cable"),
    1: ("warning", "the processor is slowed down", "cool the board, or give it a better power supply"),
    2: ("warning", "the board is too hot and slowed down", "add a heat sink or a fan"),
    3: ("note", "the soft temperature limit is reached", "add a heat sink or a fan"),
    16: ("warning", "the voltage was too low since the start", "use the board's own power supply and a short cable"),
    18: ("note", "the board was slowed down for heat since the start", "add a heat sink or a fan"),
}
WARM_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    area: str
    id: str
    state: State
    what: str
    remedy: str = ""


def examine(root: Path = Path("/"), state_dir: Path | None = None) -> Iterator[Finding]:
    """Look at everything that needs no configuration; gives findings as they are made."""
    board = boards.recognise(root)
    accelerators = hardware.accelerators(root)
    named = [each.delegate or f"npu:{each.path.rpartition('/')[2]}" for each in accelerators]
    yield from _board(board, named)
    yield from _python()
    yield from _runtimes()
    yield from _delegates(root)
    yield from _accelerators(accelerators)
    yield from _cameras(root)
    yield from _disk(state_dir)
    yield from _clock()
    yield from _heat(root, board)
    yield from _memory(root, board)


def _board(board: Board, accelerators: Sequence[str]) -> Iterator[Finding]:
    pages = f"{board.page_size // 1024} KB pages"
    yield Finding(
        "board",
        "board",
        "ok",
        f"{board.model} ({board.profile.title}): {board.machine}, {board.bits} bit, {board.cores} cores, "
        f"{board.memory_bytes / 2**30:.1f} GiB, {pages}; {board.os_name}, kernel {board.kernel}",
    )
    for each in board.problems(accelerators):
        yield Finding("board", each.id, "warning", each.problem, each.remedy)


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    isolated = "in an environment of its own" if sys.prefix != sys.base_prefix else "the system's own"
    if sys.version_info < LEAST_PYTHON:
        yield Finding("python", "python", "error", f"Python {version} is too old", "install Python 3.10 or later")
        return
    yield Finding("python", "python", "ok", f"Python {version} ({platform.python_implementation()}), {isolated}")


IMPORT = """
import json, sys
from edge_serve.model.interpreter import MODULES, load_runtime
name = next(name for name, module in MODULES.items() if module == sys.argv[1])
runtime = load_runtime(name)
import numpy
print(json.dumps([runtime.version, numpy.__version__]))
"""


def _runtimes() -> Iterator[Finding]:
    import importlib.util

    from edge_serve.errors import RuntimeMissingError
    from edge_serve.model.interpreter import load_runtime

    installed = [module for module in MODULES if importlib.util.find_spec(module) is not None]
    if not installed:
        try:
            load_runtime()
        except RuntimeMissingError as error:
            text, _, remedy = str(error).partition(". ")
            yield Finding("runtime", "runtime", "error", text, remedy)
        return
    for module in installed:
        code, out, wrong = _child(IMPORT, module)
        if code == 0:
            version, numpy = json.loads(out)
            yield Finding("runtime", module, "ok", f"{module.replace('_', '-')} {version} with numpy {numpy}")
            continue
        remedy = "install it again for this Python, with the numpy that it was built for"
        yield Finding("runtime", module, "error" if len(installed) == 1 else "warning", f"{module}: {wrong}", remedy)


def _child(code: str, *arguments: str) -> tuple[int, str, str]:
    """Run Python code in a child; gives the exit code, what it prints, and what was wrong in one line."""
    command = [sys.executable, "-c", code, *arguments]
    try:
        run = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=CHILD_LIMIT_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return 1, "", f"does not answer within {CHILD_LIMIT_S:g} s"
    if run.returncode < 0:
        return run.returncode, "", f"crashes with signal {-run.returncode}"
    lines = run.stderr.strip().splitlines()
    return run.returncode, run.stdout.strip(), lines[-1] if lines else "fails without a word"


def _delegates(root: Path) -> Iterator[Finding]:
    """Open a small model on each delegate that can take one; of the others say whether their library loads."""
    model = _small_model()
    for name in plugins.names("delegates"):
        try:
            found = plugins.load("delegates", name).find(root)
        except UsageError as error:
            yield Finding(
                "delegates", name, "warning", f"{name}: {error}", "install what registers it again, or remove it"
            )
            continue
        for each in found:
            label = each.spec.label
            if each.why_not:
                absent = each.why_not.startswith("no ")
                yield Finding(
                    "delegates", label, "note" if absent else "warning", f"{label}: {each.why_not}", each.remedy
                )
            elif name == "edgetpu":
                code, _, wrong = _child(LOAD, each.spec.library or "libedgetpu.so.1", each.spec.index)
                what = f"{label}: opens" if code == 0 else f"{label}: {wrong}"
                remedy = "" if code == 0 else "is another process using it, and is libedgetpu made for this system?"
                yield Finding("delegates", label, "ok" if code == 0 else "warning", what, remedy)
            elif model is not None:
                yield _opened(label, model, each.spec)


LOAD = """
import sys
from edge_serve.model.interpreter import load_runtime
load_runtime().load_delegate(sys.argv[1], {"device": sys.argv[2]} if sys.argv[2] else {})
"""


def _small_model() -> Path | None:
    from importlib import resources

    model = Path(str(resources.files("edge_serve"))) / "demo/models/digits/1/model.tflite"
    return model if model.is_file() else None


def _opened(label: str, model: Path, spec: DelegateSpec) -> Finding:
    from edge_serve.model.delegate import Candidate
    from edge_serve.model.interpreter import load_runtime
    from edge_serve.model.trial import Plan, try_all

    try:
        runtime = load_runtime()
        (trial,) = try_all([Candidate("digits", model, "", spec, 1)], {}, Plan(runtime.name, limit_s=CHILD_LIMIT_S))
    except EdgeServeError as error:
        return Finding("delegates", label, "warning", f"{label}: cannot be tried: {error}", "install a runtime first")
    if trial.right:
        return Finding(
            "delegates", label, "ok", f"{label}: works ({trial.taken} of {trial.total} operators of a small model)"
        )
    if trial.total and not trial.taken:
        # An older XNNPACK has no int8 kernels; it may serve float models.
        return Finding("delegates", label, "note", f"{label}: takes no operator of a small int8 model")
    return Finding("delegates", label, "warning", f"{label}: {trial.reason}", 'delegate = "auto" leaves it out')


def _accelerators(found: Sequence[hardware.Accelerator]) -> Iterator[Finding]:
    for each in found:
        if each.kind == "npu":
            yield Finding("accelerators", each.path, "note", f"{each.name} ({each.path}): {each.why_not}", each.remedy)


def _cameras(root: Path) -> Iterator[Finding]:
    found = hardware.cameras(root)
    if not found:
        yield Finding(
            "cameras", "cameras", "note", "no camera is there", "plug one in, or hand /dev/video0 on to the container"
        )
    for each in found:
        state: State = "ok" if each.usable else "note" if "libcamera" in each.remedy else "warning"
        what = f"{each.name} ({each.path})" + (f": {each.why_not}" if each.why_not else "")
        yield Finding("cameras", each.path, state, what, each.remedy)


def _disk(state_dir: Path | None) -> Iterator[Finding]:
    if state_dir is None:
        return
    folder = state_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if not os.access(folder, os.W_OK | os.X_OK) or disk.f_flag & os.ST_RDONLY:
        yield Finding(
            "disk",
            "state_dir",
            "warning",
            f"{state_dir} cannot be written by this user: nothing would outlast a restart",
            "run this as the service's user, or give a state_dir that can be written",
        )
    state: State = "ok" if free >= min(LEAST_FREE_BYTES, disk.f_blocks * disk.f_frsize // 10) else "warning"
    yield Finding(
        "disk", "free", state, f"{free / 2**30:.1f} GiB are free for {state_dir}", "" if state == "ok" else "make room"
    )


def _clock() -> Iterator[Finding]:
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if time.time() < CLOCK_PLAUSIBLE_AFTER:
        yield Finding(
            "clock",
            "clock",
            "error",
            f"it is {now}, which cannot be",
            "give this device the network's time (NTP), or a clock",
        )
    elif not kernel_synced():
        remedy = "timedatectl set-ntp true; in a container the host does it"
        yield Finding("clock", "clock", "note", f"it is {now}; nothing keeps the clock right", remedy)
    else:
        yield Finding("clock", "clock", "ok", f"it is {now}, kept right from the network")


def _heat(root: Path, board: Board) -> Iterator[Finding]:
    hottest = temperature(root)
    if hottest is not None:
        limit = board.profile.throttle_c
        state: State = "ok"
        if limit is not None and hottest >= limit * WARM_SHARE:
            state = "warning"
        said = f"{hottest:.0f} °C" + (f"; it slows down from {limit:.0f} °C on" if limit is not None else "")
        yield Finding("temperature", "temperature", state, said, "" if state == "ok" else "add a heat sink or a fan")
    text = _text(root / THROTTLED_FILE)
    try:
        bits = int(text, 16) if text else 0
    except ValueError:
        bits = 0
    for bit, (state_, what, remedy) in THROTTLED.items():
        if bits >> bit & 1:
            yield Finding("temperature", f"throttled-{bit}", state_, what, remedy)  # type: ignore[arg-type]  # one of four
    governor = _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor == "powersave":
        yield Finding(
            "temperature",
            "governor",
            "note",
            "the processor saves power: it stays slow",
            "echo schedutil | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
        )


def temperature(root: Path = Path("/")) -> float | None:
    """Give the hottest of the thermal zones in °C; None where there is none that makes sense."""
    found = []
    for zone in (root / "sys/class/thermal").glob("thermal_zone*/temp"):
        text = _text(zone).lstrip("-")
        if text.isdecimal() and 0 < int(text) < 150_000:
            found.append(int(text) / 1000)
    return max(found, default=None)


def _memory(root: Path, board: Board) -> Iterator[Finding]:
    known = boards.memory(root)
    total, free = known.get("MemTotal", 0), known.get("MemAvailable", 0)
    if not total:
        return
    state: State = "ok" if free >= LEAST_MEMORY_SHARE * total else "warning"
    budget = board.profile.memory_share * total
    yield Finding(
        "memory",
        "memory",
        state,
        f"{free / 2**20:.0f} of {total / 2**20:.0f} MiB are available; about {budget / 2**20:.0f} MiB are for edge-serve",
        "" if state == "ok" else "end what else takes memory, or use int8 variants",
    )


def _text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return stream.read(256).decode("utf-8", "replace").strip()
    except (OSError, ValueError):
        return ""


def service(name: str) -> Iterator[Finding]:
    """Say how the installed service is, where systemd runs."""
    from edge_serve_devices import condition
    from edge_serve_devices.systemd.unit import Name

    try:
        found = condition.status(Name.read(name), 0)
    except EdgeServeError:
        return  # no systemd here, or no right to ask it
    if not found["installed"]:
        yield Finding(
            "service", "service", "note", f"no service {name} is installed", "edge-serve service install -c FILE"
        )
        return
    restarts = found["restarts"] or 0
    state: State = "ok" if found["state"] == "active" and restarts == 0 else "warning"
    what = f"{name} is {found['state']}; restarted {restarts} times since it was started"
    yield Finding(
        "service", "service", state, what, "" if state == "ok" else f"edge-serve service status; journalctl -u {name}"
    )
