"""The built wheel on ARM under emulation (scripts/arm-check), and what pip finds for boards that cannot be emulated here."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
CANNOT = 77


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_computes_the_same_on_arm() -> None:
    done = subprocess.run([ROOT / "scripts/arm-check"], capture_output=True, text=True)
    if done.returncode == CANNOT:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert "all is the same on trixie-arm64 bookworm-armhf" in done.stderr


# Python, glibc and machine of boards; JetPack 6 is an Ubuntu 22.04. numpy, Pillow and click come from Debian on 32 bits: PyPI has no
# wheels of them for armv7l.
BOARDS = {
    "JetPack 6": ("3.10", 35, "aarch64"),
    "64-bit Bookworm": ("3.11", 36, "aarch64"),
    "64-bit Trixie": ("3.13", 41, "aarch64"),
    "32-bit Bookworm": ("3.11", 36, "armv7l"),
}


@pytest.mark.parametrize("board", BOARDS)
def test_every_dependency_has_a_wheel_for_the_board(board: str, tmp_path: Path) -> None:
    python, glibc, machine = BOARDS[board]
    wanted = [Requirement(each) for each in runpy.run_path(str(ROOT / "setup.py"))["dependencies"](machine)]
    # pip holds markers against the Python that it runs on.
    fitting = [each for each in wanted if each.marker is None or each.marker.evaluate({"python_version": python})]
    from_debian = ("numpy", "pillow", "click") if machine == "armv7l" else ()
    packages = [f"{each.name}{each.specifier}" for each in fitting if each.name not in from_debian]
    assert any(each.startswith(("ai-edge-litert", "tflite-runtime")) for each in packages)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--no-input"),
            *(
                "--disable-pip-version-check",
                "--only-binary=:all:",
                "--implementation=cp",
                f"--python-version={python}",
            ),
            *(f"--platform=manylinux_2_{number}_{machine}" for number in range(glibc, 16, -1)),
            *(f"--platform=manylinux2014_{machine}", f"--target={tmp_path}"),
            *(["--no-deps"] if from_debian else []),
            *packages,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
