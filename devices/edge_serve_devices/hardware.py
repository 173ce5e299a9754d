"""What is attached: accelerators and cameras, found in the files by which Linux shows them, below one root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_serve_devices.delegates import EdgeTpu, Gpu

MAX_TEXT = 256
# Processors for neural networks by their device node: what they are, and how TFLite gets at them.
NPUS = {
    "hailo": ("Hailo", "HailoRT runs compiled .hef files; a TFLite delegate of the vendor's is given by its library"),
    "rknpu": ("Rockchip NPU", "RKNN runs .rknn files; there is no TFLite delegate for it"),
    "galcore": ("VeriSilicon NPU", 'delegate = "/usr/lib/libvx_delegate.so"'),
    "ethosu": ("Arm Ethos-U", 'delegate = "/usr/lib/libethosu_delegate.so"'),
}
# Drivers whose nodes give raw sensor data that only libcamera turns into pictures.
SENSOR_DRIVERS = ("unicam", "rp1-cfe", "bcm2835-isp", "pispbe", "bcm2835-codec", "rpi-hevc-dec")


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One accelerator that is there."""

    kind: str
    """edgetpu, gpu or npu."""
    name: str
    delegate: str
    """How a configuration names it; empty where nothing here can use it."""
    path: str
    usable: bool
    why_not: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Camera:
    """One video node that pictures can come from."""

    name: str
    path: str
    driver: str
    usable: bool
    why_not: str = ""
    remedy: str = ""


def accelerators(root: Path = Path("/")) -> list[Accelerator]:
    """Give what is there, usable or not, with the reason and the remedy."""
    found = []
    for each in EdgeTpu.find(root):
        if each.spec.index:
            bus, _, number = each.spec.index.partition(":")
            path = f"/dev/apex_{number}" if bus == "pci" else "USB"
            name = f"Edge TPU ({'PCI' if bus == 'pci' else 'USB'})"
            found.append(
                Accelerator("edgetpu", name, each.spec.label, path, not each.why_not, each.why_not, each.remedy)
            )
    for node in _gpus(root):
        (gpu, *_) = Gpu.find(root)
        found.append(Accelerator("gpu", node.name, "gpu", node.path, not gpu.why_not, gpu.why_not, gpu.remedy))
    found += _npus(root)
    return found


@dataclass(frozen=True, slots=True)
class _Node:
    name: str
    path: str


def _gpus(root: Path) -> Iterator[_Node]:
    for node in sorted((root / "dev/dri").glob("renderD*")):
        driver = _link(root / "sys/class/drm" / node.name / "device/driver")
        if driver not in NPUS:
            yield _Node(f"GPU ({driver or 'unknown driver'})", f"/dev/dri/{node.name}")
    for name, title in (("nvhost-gpu", "NVIDIA Tegra GPU"), ("nvidia0", "NVIDIA GPU"), ("mali0", "Arm Mali GPU")):
        if (root / "dev" / name).exists():
            yield _Node(title, f"/dev/{name}")


def _npus(root: Path) -> Iterator[Accelerator]:
    for prefix, (name, how) in NPUS.items():
        nodes = [f"/dev/{node.name}" for node in sorted((root / "dev").glob(f"{prefix}*"))]
        nodes += [
            f"/dev/dri/{node.name}"
            for node in sorted((root / "dev/dri").glob("renderD*"))
            if _link(root / "sys/class/drm" / node.name / "device/driver") == prefix
        ]
        for node in nodes:
            yield Accelerator("npu", name, "", node, False, "it is reached by the vendor's own software only", how)


def cameras(root: Path = Path("/")) -> list[Camera]:
    """Give the video nodes; of a camera with several only the first, the others carry metadata."""
    found = []
    nodes = (root / "sys/class/video4linux").glob("video*")
    for folder in sorted(nodes, key=lambda node: (len(node.name), node.name)):
        if _text(folder / "index") not in ("", "0"):
            continue
        driver, name = _link(folder / "device/driver"), _text(folder / "name") or folder.name
        node = root / "dev" / folder.name
        why, remedy = "", ""
        if any(name.startswith(each) or driver.startswith(each) for each in SENSOR_DRIVERS):
            why, remedy = (
                "it gives raw sensor data, or is no camera",
                "use libcamera (rpicam-vid, picamera2) for CSI cameras",
            )
        elif not node.exists():
            why, remedy = f"/dev/{folder.name} is not there", "in a container: hand the device on"
        elif not os.access(node, os.R_OK | os.W_OK):
            why, remedy = f"this user may not open /dev/{folder.name}", "add the user to the group video"
        found.append(Camera(name, f"/dev/{folder.name}", driver, not why, why, remedy))
    return found


def _text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return stream.read(MAX_TEXT).decode("utf-8", "replace").strip()
    except (OSError, ValueError):
        return ""


def _link(file: Path) -> str:
    """Give the name of what a link leads to, whether or not that is there."""
    try:
        return file.readlink().name
    except (OSError, ValueError):
        return ""
