"""Lays out what a board shows of itself (data/boards/*.toml) as the files by which Linux shows it."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BOARDS = Path(__file__).with_name("data") / "boards"
NAMES = sorted(file.stem for file in BOARDS.glob("*.toml"))
# ELF: class and machine (elf.h).
ELF = {"armv7l": (1, 40), "aarch64": (2, 183), "x86_64": (2, 62)}
AT_PAGESZ, AT_NULL, AT_PHDR = 6, 0, 3


def recorded(name: str) -> dict[str, Any]:
    """Read what is recorded of a board."""
    return tomllib.loads((BOARDS / f"{name}.toml").read_text(encoding="utf-8"))


def tree(folder: Path, name: str, **changes: Any) -> Path:
    """Lay a board out below a folder, with some of what was recorded changed; gives the root."""
    board = {**recorded(name), **changes}
    root = folder / name
    kind, machine = ELF[board["elf"]]
    _write(root / "bin/sh", b"\x7fELF" + bytes([kind]) + bytes(13) + struct.pack("<H", machine))
    width = "<Q" if kind == 2 else "<I"
    auxv = (AT_PHDR, 4198464, AT_PAGESZ, board["page_size"], AT_NULL, 0)
    _write(root / "proc/self/auxv", b"".join(struct.pack(width, word) for word in auxv))
    _write(root / "proc/cpuinfo", "\n".join([board["cpuinfo"].strip() + "\n"] * board["cores"]))
    _write(
        root / "proc/meminfo",
        f"MemTotal:       {board['memory_kb']} kB\nMemAvailable:   {board['memory_kb'] // 2} kB\n",
    )
    _write(root / "proc/sys/kernel/osrelease", board["kernel"] + "\n")
    _write(root / "etc/os-release", board["os_release"].lstrip())
    if board["model"]:
        _write(root / "proc/device-tree/model", board["model"] + "\0")
        _write(root / "proc/device-tree/compatible", "".join(f"{each}\0" for each in board["compatible"]))
    for node in board.get("dev", ()):
        _write(root / "dev" / node, "")
    for place, vendor, product, bus, device in board.get("usb", ()):
        base = root / "sys/bus/usb/devices" / place
        for file, value in (("idVendor", vendor), ("idProduct", product), ("busnum", bus), ("devnum", device)):
            _write(base / file, f"{value}\n")
    for place, vendor, device, driver in board.get("pci", ()):
        base = root / "sys/bus/pci/devices" / place
        _write(base / "vendor", f"{vendor}\n")
        _write(base / "device", f"{device}\n")
        (base / "driver").symlink_to(f"../../drivers/{driver}")
    for node, driver in board.get("drm", {}).items():
        base = root / "sys/class/drm" / node / "device"
        base.mkdir(parents=True)
        (base / "driver").symlink_to(f"../../drivers/{driver}")
    for node, (title, driver, index) in board.get("video", {}).items():
        base = root / "sys/class/video4linux" / node
        _write(base / "name", f"{title}\n")
        _write(base / "index", f"{index}\n")
        (base / "device").mkdir()
        (base / "device/driver").symlink_to(f"../../drivers/{driver}")
    for file in board.get("icd", ()):
        _write(root / "usr/share/vulkan/icd.d" / file, "{}")
    for file in board.get("libraries", ()):
        _write(root / file, "")
    return root


def _write(file: Path, content: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
