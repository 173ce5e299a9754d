"""The hardware that a service may open, by name: what `edge-serve service install --allow` grants.

A unit grants nothing of /dev by itself. Each name opens one class of device nodes to it (DeviceAllow), joins the group
that Debian, Raspberry Pi OS or JetPack give these nodes to (SupplementaryGroups), and names the kernel module that
registers the class, because systemd finds a class only when it is registered at the start of the service: a camera that
is plugged in later is then within reach, too. Device numbers by class: the kernel's Documentation/admin-guide/devices.txt.
"""

from __future__ import annotations

import grp
from collections.abc import Iterable
from dataclasses import dataclass

from edge_serve.errors import UsageError
from edge_serve.schema import closest


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind of hardware."""

    what: str
    """What it opens, for people."""
    devices: tuple[str, ...] = ()
    """Device nodes or classes, as DeviceAllow takes them; all are opened for reading and writing."""
    groups: tuple[str, ...] = ()
    """Groups that own such nodes; those that this system has are joined."""
    modules: tuple[str, ...] = ()
    """Kernel modules without which the class is not there; a kernel without such a module is no error. Names have "_":
    systemd would take a "-" for an escaped "/".
    """
    netlink: bool = False
    """Whether its library listens to the kernel's device events (udev, libusb)."""
    writes_code: bool = False
    """Whether its library compiles programs into memory at run time."""


HARDWARE: dict[str, Hardware] = {
    "camera": Hardware(
        "cameras: USB (V4L2) and CSI (libcamera: media controller, DMA heaps)",
        ("char-video4linux", "char-media", "char-dma_heap"),
        ("video",),
        ("videodev", "mc"),
        netlink=True,
    ),
    "edgetpu": Hardware(
        "Coral Edge TPU: USB (it changes its USB identity when it starts, so all of USB) and PCIe",
        ("char-usb_device", "char-apex"),
        ("plugdev", "apex"),
        ("apex",),
        netlink=True,
    ),
    "gpio": Hardware("GPIO lines (/dev/gpiochip*)", ("char-gpiochip",), ("gpio",)),
    "gpu": Hardware(
        "GPUs: DRM render nodes, NVIDIA Jetson",
        ("char-drm", "char-nvidia*", "char-nvhost*", "char-nvmap"),
        ("render", "video"),
        writes_code=True,
    ),
    "i2c": Hardware("I2C sensors (/dev/i2c-*)", ("char-i2c",), ("i2c",), ("i2c_dev",)),
    "iio": Hardware(
        "industrial I/O buffers (/dev/iio:device*); readings in /sys need no grant", ("char-iio",), ("iio",)
    ),
    "serial": Hardware(
        "serial ports: UART, USB adapters", ("char-ttyS", "char-ttyAMA", "char-ttyUSB", "char-ttyACM"), ("dialout",)
    ),
    "spi": Hardware("SPI sensors (/dev/spidev*)", ("char-spi",), ("spi",), ("spidev",)),
    "usb": Hardware("USB devices that a library drives by itself", ("char-usb_device",), ("plugdev",), netlink=True),
}


def named(text: Iterable[str]) -> tuple[str, ...]:
    """Give the names in `text` (each may be a list with commas), sorted and once each; UsageError knows the right ones."""
    names = {name.strip() for each in text for name in each.split(",") if name.strip()}
    for name in sorted(names - HARDWARE.keys()):
        raise UsageError(f"--allow {name}: there is no such hardware. {closest(name, HARDWARE)}")
    return tuple(sorted(names))


def groups_here(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Give the groups to join for this hardware, and a note on each name of which no group exists on this system."""
    there: list[str] = []
    notes = []
    for name in names:
        found = [group for group in HARDWARE[name].groups if exists(group)]
        there += [group for group in found if group not in there]
        if not found:
            wanted = " or ".join(HARDWARE[name].groups)
            notes.append(
                f"--allow {name}: this system has no group {wanted}; the service may open only those nodes that everybody may"
            )
    return there, notes


def exists(group: str) -> bool:
    """Say whether this system has a group of that name."""
    try:
        grp.getgrnam(group)
    except KeyError:
        return False
    return True
