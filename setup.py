"""What the wheel of each target needs and how it is tagged; everything else stands in pyproject.toml.

A 32-bit userland on a 64-bit kernel (common on Raspberry Pis) reports ``platform_machine == "aarch64"`` while its pip
takes armv7l wheels, so no environment marker can choose the TFLite runtime rightly. Wheel tags can: every wheel is pure
Python but tagged for one platform, and carries only the dependencies that this platform has wheels for. A source build
decides for the interpreter that runs it; EDGE_SERVE_BUILD_TARGET=x86_64|aarch64|armv7l builds for another machine
(scripts/wheels).
"""

from __future__ import annotations

import os
import platform
import struct
import sys
import sysconfig
from collections.abc import Mapping

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel, get_platform

TARGET_VARIABLE = "EDGE_SERVE_BUILD_TARGET"

# Floors that Debian 12's own packages meet: 32-bit boards take Pillow and numpy from apt (PyPI has no armv7l wheels of
# them), and a higher floor would make pip build them from source.
COMMON = (
    "paho-mqtt>=2.1,<3",
    "pillow>=9.1",
    "click>=8.1",
    'tomli>=2; python_version < "3.11"',
)

# 2.1.5 is the first release with wheels for Python 3.14; numpy's floor is ai-edge-litert's own.
LITERT = ("numpy>=1.23.2", "ai-edge-litert>=2.1.5")

# tflite-runtime 2.14 was built for numpy 1 (with numpy 2 every Interpreter() raises SystemError) and has no wheel for
# Python 3.12 and later. There numpy is left alone, so that the system's own one serves and the first start can say what
# is missing, in place of a numpy 1 that pip would compile for an hour.
TFLITE = (
    'tflite-runtime>=2.14; python_version < "3.12"',
    'numpy>=1.21,<2; python_version < "3.12"',
    'numpy>=1.21; python_version >= "3.12"',
)

NO_RUNTIME = ("numpy>=1.21",)  # no wheel of any runtime: the program says at its first start what to do

# Platforms with wheels of their own. Indexes and tools differ in which armv7l tag they know, so that wheel has both.
WHEEL_PLATFORMS: Mapping[str, str] = {
    "x86_64": "manylinux_2_17_x86_64",
    "aarch64": "manylinux_2_17_aarch64",
    "armv7l": "linux_armv7l.manylinux_2_17_armv7l",
}


def runtime_target(system: str, machine: str, pointer_bytes: int, *, musl: bool = False) -> str:
    """Whose runtime fits this interpreter: "x86_64", "aarch64", "armv7l", or "" where no runtime has wheels.

    `system` is sys.platform, `machine` is platform.machine() (the kernel's word), `pointer_bytes` is
    struct.calcsize("P") (the interpreter's word, which decides on 32 or 64 bits). Wheels of ai-edge-litert exist for
    glibc Linux on x86-64 and aarch64, Windows on x86-64 and macOS on arm64; those of tflite-runtime that matter for
    32-bit ARM on glibc Linux.
    """
    machine = {"amd64": "x86_64", "arm64": "aarch64", "armv8l": "armv7l"}.get(machine.lower(), machine.lower())
    if musl:
        return ""
    if pointer_bytes == 4:
        return "armv7l" if system == "linux" and machine in ("aarch64", "armv7l") else ""
    has_wheels = {"linux": ("x86_64", "aarch64"), "win32": ("x86_64",), "darwin": ("aarch64",)}
    return machine if machine in has_wheels.get(system, ()) else ""


def dependencies(target: str) -> list[str]:
    """The requirements of a wheel for this target, one of runtime_target()'s answers."""
    runtime = {"x86_64": LITERT, "aarch64": LITERT, "armv7l": TFLITE, "": NO_RUNTIME}[target]
    return [*COMMON, *runtime]


def forced_target(environ: Mapping[str, str]) -> str | None:
    """The target that EDGE_SERVE_BUILD_TARGET names, None where it is not set; SystemExit where there is no such."""
    target = environ.get(TARGET_VARIABLE)
    if target and target not in WHEEL_PLATFORMS:
        sys.exit(f"{TARGET_VARIABLE}={target}: no such target; choose one of {', '.join(WHEEL_PLATFORMS)}")
    return target or None


def local_target() -> str:
    """The target of the interpreter that runs this build."""
    musl = "musl" in (sysconfig.get_config_var("SOABI") or "")
    return runtime_target(sys.platform, platform.machine(), struct.calcsize("P"), musl=musl)


class PlatformWheel(bdist_wheel):
    """A pure wheel tagged py3-none-PLATFORM.

    A local build is tagged too: pip keeps wheels built from source in a cache that a home directory may share between
    machines, and py3-none-any there would carry one machine's dependencies to another.
    """

    def finalize_options(self) -> None:
        if self.plat_name:
            sys.exit(f"--plat-name changes the tag but not the dependencies; set {TARGET_VARIABLE} instead")
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        target = forced_target(os.environ)
        local = get_platform(None).lower().replace("-", "_").replace(".", "_")
        return "py3", "none", WHEEL_PLATFORMS[target] if target else local


if __name__ == "__main__":
    setup(
        install_requires=dependencies(forced_target(os.environ) or local_target()),
        cmdclass={"bdist_wheel": PlatformWheel},
    )
