"""Which board this is, what is known of it, and which of its known problems apply here.

All reading goes through one root, so that a recorded tree of a board's files is as good as the board. What a board is known by and
known for stands in profiles/*.toml, facts with their sources; a board that none of them knows is generic, never an error.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

from edge_serve.errors import Problem, UsageError
from edge_serve.schema import read

# The files that are read are a few kilobytes; whatever is larger is none of them.
MAX_BYTES = 256 * 1024
AT_PAGESZ = 6  # getauxval(3)
GENERIC = "generic"
COMMON = "common"
MEMINFO = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)
# Flags that change which kernels are fast, by the names of Linux on ARM and x86.
FEATURES = (
    "neon", "asimd", "asimddp", "asimdhp", "fphp", "i8mm", "bf16", "sve", "sve2",
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Match:
    """What a board is known by: one of these in the device tree's `compatible`, or a pattern in its model."""

    compatible: tuple[str, ...] = ()
    model: str | None = None


@dataclass(frozen=True, slots=True)
class When:
    """When a known problem applies: all that is said must hold."""

    page_size_above: int | None = None
    bits: int | None = None
    os: str | None = None
    """A pattern in "ID VERSION" of /etc/os-release."""
    python_below: str | None = None
    python_from: str | None = None
    accelerator: str | None = None
    """How the index or name of one that is there begins: "edgetpu:pci"."""
    memory_below_mib: int | None = None


@dataclass(frozen=True, slots=True)
class KnownProblem:
    """One known problem and its remedy."""

    id: str
    problem: str
    remedy: str
    when: When = When()


@dataclass(frozen=True, slots=True)
class Profile:
    """Facts and defaults of one kind of board."""

    name: str
    title: str
    family: str
    match: Match = Match()
    threads: int | None = None
    """Threads that are worth a try, as far as is known; None: as many as there are cores."""
    memory_share: float = 0.5
    """How much of the memory the service may take before the rest of the system suffers."""
    throttle_c: float | None = None
    """From this temperature on, in °C, the board slows down."""
    stop_c: float | None = None
    """At this one it stops, or slows down to almost nothing."""
    delegates: tuple[str, ...] = ("xnnpack", "none")
    """What "auto" tries, the most promising first; a GPU that is not named is left out and the reasons say so."""
    problem: tuple[KnownProblem, ...] = ()


@dataclass(frozen=True, slots=True)
class Board:
    """This machine, as far as its files tell."""

    model: str
    profile: Profile
    machine: str
    bits: int
    """Of programs here, not of the kernel: they decide which wheels fit."""
    cores: int
    features: frozenset[str]
    memory_bytes: int
    page_size: int
    kernel: str
    os: str
    """ID and VERSION_ID of /etc/os-release, as "debian 12"."""
    os_name: str
    known: tuple[KnownProblem, ...] = field(default=(), repr=False)

    @property
    def key(self) -> str:
        """Name it for what depends on the hardware and not on the system's updates."""
        features = sha256(" ".join(sorted(self.features)).encode()).hexdigest()[:8]
        return f"{self.model}|{self.machine}|{self.bits}|{self.cores}|{features}"

    def problems(self, accelerators: Sequence[str] = (), python: tuple[int, int] | None = None) -> list[KnownProblem]:
        """Give the known problems that apply; `accelerators` as a configuration names them ("edgetpu:pci:0")."""
        version = python or (sys.version_info.major, sys.version_info.minor)
        return [
            each for each in (*self.profile.problem, *self.known) if self._applies(each.when, accelerators, version)
        ]

    def _applies(self, when: When, accelerators: Sequence[str], python: tuple[int, int]) -> bool:
        return all(
            (
                when.page_size_above is None or self.page_size > when.page_size_above,
                when.bits is None or self.bits == when.bits,
                when.os is None or re.search(when.os, self.os) is not None,
                when.python_below is None or python < _version(when.python_below),
                when.python_from is None or python >= _version(when.python_from),
                when.accelerator is None or any(each.startswith(when.accelerator) for each in accelerators),
                when.memory_below_mib is None or 0 < self.memory_bytes < when.memory_below_mib * 2**20,
            )
        )


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)


@cache
def profiles() -> dict[str, Profile]:
    """Read all profiles; UsageError names the file and the key of a mistake (ours, which tests find)."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    found = {}
    for file in sorted(
        resources.files("edge_serve_devices").joinpath("profiles").iterdir(), key=lambda each: each.name
    ):
        if not file.name.endswith(".toml"):
            continue
        mistakes: list[Problem] = []
        profile = read(Profile, tomllib.loads(file.read_text(encoding="utf-8")), "", mistakes)
        if profile is None or mistakes:
            raise UsageError(f"{file.name}: {'; '.join(map(str, mistakes))}")
        found[profile.name] = profile
    return found


def recognise(root: Path = Path("/")) -> Board:
    """Say which board's files lie below a root; whatever cannot be read is left open, and nothing is an error."""
    tree = root / "proc/device-tree"
    if not (tree / "model").exists():
        tree = root / "sys/firmware/devicetree/base"
    model = _text(tree / "model").split("\0")[0].strip()
    compatible = [each for each in _text(tree / "compatible").split("\0") if each]
    cpus = _text(root / "proc/cpuinfo")
    release = _release(root)
    all_profiles = profiles()
    machine = _machine(root, cpus)
    return Board(
        model or _first(cpus, "model name") or machine,
        _profile(all_profiles, model, compatible),
        machine,
        _bits(root),
        len(re.findall(r"^processor\s*:", cpus, re.MULTILINE)) or 1,
        frozenset(re.split(r"[ \t]+", _first(cpus, "Features") or _first(cpus, "flags"))) & frozenset(FEATURES),
        _memory(root).get("MemTotal", 0),
        _page_size(root),
        _text(root / "proc/sys/kernel/osrelease").strip(),
        f"{release.get('ID', 'unknown')} {release.get('VERSION_ID', '')}".strip(),
        release.get("PRETTY_NAME", "unknown"),
        all_profiles[COMMON].problem,
    )


def memory(root: Path = Path("/")) -> dict[str, int]:
    """Give /proc/meminfo in bytes, by name."""
    return _memory(root)


def _profile(known: dict[str, Profile], model: str, compatible: Sequence[str]) -> Profile:
    """Find the profile whose name for the board is the most special: `compatible` lists those first."""
    for name in compatible:
        for profile in known.values():
            if name in profile.match.compatible:
                return profile
    for profile in known.values():
        if model and profile.match.model is not None and re.search(profile.match.model, model):
            return profile
    return known[GENERIC]


def _text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return stream.read(MAX_BYTES).decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""


def _first(text: str, name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _memory(root: Path) -> dict[str, int]:
    return {name: int(number) * 1024 for name, number in MEMINFO.findall(_text(root / "proc/meminfo"))}


def _release(root: Path) -> dict[str, str]:
    text = _text(root / "etc/os-release") or _text(root / "usr/lib/os-release")
    pairs = (line.partition("=") for line in text.splitlines() if not line.startswith("#"))
    return {name.strip(): value.strip().strip("\"'") for name, _, value in pairs}


def _elf(root: Path) -> tuple[int, int]:
    """Give the class (1: 32 bits, 2: 64) and the machine of a program that every system has (elf.h)."""
    for name in ("bin/sh", "usr/bin/sh", "bin/busybox", "usr/bin/env"):
        try:
            # Links are followed below the root only: those of a recorded tree lead to its own files.
            file = root / name
            if file.is_symlink() and file.readlink().is_absolute():
                file = root / str(file.readlink()).lstrip("/")
            with file.open("rb") as stream:
                head = stream.read(20)
        except OSError:
            continue
        if head[:4] == b"\x7fELF" and len(head) == 20:
            return head[4], int.from_bytes(head[18:20], "little")
    return 0, 0


def _bits(root: Path) -> int:
    kind, _ = _elf(root)
    return {1: 32, 2: 64}.get(kind, 8 * (sys.maxsize.bit_length() + 1) // 8)


def _machine(root: Path, cpus: str) -> str:
    """Name the architecture of programs, as `uname -m` does on a system of that kind."""
    _, number = _elf(root)
    known = {3: "i686", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
    if number in known:
        return known[number]
    if "CPU implementer" in cpus:
        return "aarch64" if "asimd" in cpus else "armv7l"
    return "x86_64" if "GenuineIntel" in cpus or "AuthenticAMD" in cpus else os.uname().machine


def _page_size(root: Path) -> int:
    """Read it from the auxiliary vector that the kernel gives a process; words are as wide as that process's are."""
    try:
        with (root / "proc/self/auxv").open("rb") as stream:
            data = stream.read(4096)
    except OSError:
        data = b""
    for width in (8, 4):
        words = [int.from_bytes(data[at : at + width], "little") for at in range(0, len(data) - width + 1, width)]
        pairs = dict(zip(words[::2], words[1::2], strict=False))
        size = pairs.get(AT_PAGESZ, 0)
        if size in (4096, 16384, 65536):
            return size
    return os.sysconf("SC_PAGE_SIZE")


def describe(board: Board) -> dict[str, Any]:
    """Give a board JSON-ready."""
    return {
        "model": board.model,
        "profile": board.profile.name,
        "family": board.profile.family,
        "machine": board.machine,
        "bits": board.bits,
        "cores": board.cores,
        "features": sorted(board.features),
        "memory_bytes": board.memory_bytes,
        "page_size": board.page_size,
        "kernel": board.kernel,
        "os": board.os_name,
        "defaults": {
            "threads": board.profile.threads or board.cores,
            "memory_bytes": int(board.profile.memory_share * board.memory_bytes),
            "throttle_c": board.profile.throttle_c,
            "stop_c": board.profile.stop_c,
            "delegates": list(board.profile.delegates),
        },
    }
