"""Boards, from what was recorded of them: which one it is, what applies to it, and what is attached."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from edge_serve_devices import boards, hardware
from edge_serve_devices.boards import profiles, recognise
from edge_serve_devices.delegates import EdgeTpu, Gpu
from tests.boards import NAMES, tree
from tests.unit.commands import Run

PROFILES = {
    "pi-zero-2-w": ("raspberry-pi-zero-2-w", "armv7l", 32),
    "pi-3b-plus": ("raspberry-pi-3-plus", "aarch64", 64),
    "pi-4": ("raspberry-pi-4", "aarch64", 64),
    "pi-5": ("raspberry-pi-5", "aarch64", 64),
    "cm4": ("raspberry-pi-4", "aarch64", 64),
    "jetson-nano": ("jetson-nano", "aarch64", 64),
    "jetson-xavier-nx": ("jetson-xavier", "aarch64", 64),
    "jetson-orin-nano": ("jetson-orin", "aarch64", 64),
    "coral-dev-board": ("coral-dev-board", "aarch64", 64),
    "orange-pi-5": ("rockchip", "aarch64", 64),
    "armv7": ("generic", "armv7l", 32),
    "pc": ("generic", "x86_64", 64),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_board_is_known_by_its_files(tmp_path: Path, name: str) -> None:
    board = recognise(tree(tmp_path, name))
    assert (board.profile.name, board.machine, board.bits) == PROFILES[name]
    assert board.cores >= 4
    assert board.memory_bytes > 400 * 2**20
    assert board.page_size == (16384 if name == "pi-5" else 4096)
    assert board.features


def test_a_board_is_known_by_its_model_where_the_tree_says_no_more(tmp_path: Path) -> None:
    for model, profile in (
        ("Raspberry Pi Zero 2 W Rev 1.0", "raspberry-pi-zero-2-w"),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", "raspberry-pi-3-plus"),
        ("Raspberry Pi 3 Model B Rev 1.2", "raspberry-pi-3"),
        ("Raspberry Pi Compute Module 5 Rev 1.0", "raspberry-pi-5"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "jetson-orin"),
        ("Some board nobody knows", "generic"),
    ):
        root = tree(tmp_path / profile, "pi-4", model=model, compatible=[])
        assert recognise(root).profile.name == profile


def ids(board: boards.Board, *accelerators: str, python: tuple[int, int] = (3, 11)) -> set[str]:
    return {each.id for each in board.problems(accelerators, python)}


def test_known_problems_apply_where_they_do(tmp_path: Path) -> None:
    pi_5 = recognise(tree(tmp_path, "pi-5"))
    assert ids(pi_5, "edgetpu:pci:0") == {"pci-enable", "pci-coral-page-size"}
    assert ids(pi_5, "edgetpu:usb:0") == set()
    assert ids(recognise(tree(tmp_path / "4k", "pi-5", page_size=4096)), "edgetpu:pci:0") == {"pci-enable"}
    zero = recognise(tree(tmp_path, "pi-zero-2-w"))
    assert ids(zero) == {"runtime-32-bit", "little-memory"}
    assert ids(zero, python=(3, 13)) == {"no-runtime-32-bit", "little-memory"}
    assert ids(recognise(tree(tmp_path, "jetson-nano"))) == {"jetpack-4", "gpu-cuda"}
    assert ids(recognise(tree(tmp_path, "jetson-orin-nano"))) == set()
    assert ids(recognise(tree(tmp_path, "coral-dev-board")), "edgetpu:pci:0") == {"mendel", "little-memory"}


def test_a_32_bit_system_on_a_64_bit_kernel_counts_as_what_its_programs_are(tmp_path: Path) -> None:
    board = recognise(
        tree(tmp_path, "pi-zero-2-w", cpuinfo="processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\n")
    )
    assert (board.machine, board.bits) == ("armv7l", 32)


def test_the_key_outlives_updates_and_not_other_hardware(tmp_path: Path) -> None:
    first = recognise(tree(tmp_path / "a", "pi-4"))
    updated = recognise(tree(tmp_path / "b", "pi-4", kernel="7.0.0", os_release="ID=debian\nVERSION_ID=14\n"))
    other = recognise(tree(tmp_path / "c", "pi-4", cores=2))
    assert first.key == updated.key
    assert first.key != other.key


def test_nothing_to_read_is_no_error(tmp_path: Path) -> None:
    board = recognise(tmp_path)
    assert (board.profile.name, board.memory_bytes, board.kernel) == ("generic", 0, "")
    assert hardware.accelerators(tmp_path) == []
    assert hardware.cameras(tmp_path) == []


def test_garbage_is_no_error(tmp_path: Path) -> None:
    root = tree(tmp_path, "pi-4")
    for file in (
        "proc/cpuinfo", "proc/meminfo", "proc/self/auxv", "etc/os-release", "proc/device-tree/model",
        "proc/device-tree/compatible", "bin/sh", "sys/bus/usb/devices/1-1/idVendor", "sys/class/video4linux/video0/name",
    ):  # fmt: skip
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(os.urandom(1_000_000))
    (root / "sys/class/drm").mkdir(parents=True)
    (root / "sys/class/drm/renderD128").symlink_to("renderD128")
    (root / "dev/dri").mkdir(parents=True)
    (root / "dev/dri/renderD128").touch()
    (root / "proc/sys/kernel/osrelease").unlink()
    (root / "proc/sys/kernel/osrelease").symlink_to("osrelease")
    assert recognise(root).profile.name == "generic"
    assert [each.kind for each in hardware.accelerators(root)] == ["gpu"]
    hardware.cameras(root)


def test_this_machine_is_recognised() -> None:
    board = recognise()
    assert board.memory_bytes > 0
    assert board.machine == os.uname().machine
    assert board.page_size == os.sysconf("SC_PAGE_SIZE")


def test_every_profile_says_how_it_is_known_and_what_to_do() -> None:
    for name, profile in profiles().items():
        assert profile.match.compatible or name in ("generic", "common")
        for each in profile.problem:
            assert each.problem
            assert each.remedy
    claimed = [each for profile in profiles().values() for each in profile.match.compatible]
    assert len(claimed) == len(set(claimed))


# What is attached.


def test_edge_tpus_are_found_in_order_each_with_its_index(tmp_path: Path) -> None:
    found = EdgeTpu.find(tree(tmp_path, "cm4"))
    assert [(each.spec.label, each.why_not) for each in found] == [("edgetpu:usb:0", ""), ("edgetpu:usb:1", "")]
    (missing, _) = EdgeTpu.find(tree(tmp_path / "b", "cm4", libraries=[]))
    assert "libedgetpu.so.1 is missing" in missing.why_not
    assert "libedgetpu1-std" in missing.remedy
    (none,) = EdgeTpu.find(tree(tmp_path, "pi-4"))
    assert none.why_not == "no Edge TPU is plugged in"


def test_a_pci_edge_tpu_without_its_driver_says_what_to_do(tmp_path: Path) -> None:
    (found,) = EdgeTpu.find(tree(tmp_path, "pi-5", dev=[]))
    assert found.spec.label == "edgetpu:pci:0"
    assert "driver of the PCI Edge TPU is not loaded" in found.why_not
    assert "kernel8.img" in found.remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_a_stick_that_this_user_may_not_open_says_which_group(tmp_path: Path) -> None:
    root = tree(tmp_path, "cm4")
    (root / "dev/bus/usb/001/005").chmod(0)
    first, *_ = EdgeTpu.find(root)
    assert "plugdev" in first.remedy


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pi-4", "no GPU is there"),
        ("pi-5", "the GPU has no Vulkan driver"),
        ("pc", "the only Vulkan driver computes on the CPU"),
        ("orange-pi-5", ""),
    ],
)
def test_a_gpu_counts_with_a_driver_of_its_own(tmp_path: Path, name: str, why: str) -> None:
    (found,) = Gpu.find(tree(tmp_path, name))
    assert found.why_not.startswith(why)
    assert bool(found.why_not) == bool(why)


def test_auto_tries_a_gpu_only_where_the_board_is_known_for_a_good_one(tmp_path: Path) -> None:
    driver = {"libraries": ["usr/lib/aarch64-linux-gnu/libvulkan.so.1"], "icd": ["broadcom_icd.json"]}
    (found,) = Gpu.find(tree(tmp_path, "pi-5", **driver))
    assert (found.why_not, found.untried.partition(";")[0]) == ("", "not worth a try on Raspberry Pi 5 Model B Rev 1.0")
    (other,) = Gpu.find(tree(tmp_path, "orange-pi-5"))
    assert not other.untried


def test_a_vendors_gpu_library_is_taken(tmp_path: Path) -> None:
    library = "usr/lib/aarch64-linux-gnu/libtensorflowlite_gpu_delegate.so"
    root = tree(tmp_path, "pi-4", libraries=[library])
    (found,) = Gpu.find(root)
    assert found.spec.library == str(root / library)


def test_cameras_are_told_from_metadata_and_raw_sensors(tmp_path: Path) -> None:
    (webcam,) = hardware.cameras(tree(tmp_path, "cm4"))
    assert (webcam.path, webcam.driver, webcam.usable) == ("/dev/video0", "uvcvideo", True)
    sensor, decoder = hardware.cameras(tree(tmp_path, "pi-5"))
    assert "libcamera" in sensor.remedy
    assert not decoder.usable


def test_an_npu_is_named_with_the_way_to_it(tmp_path: Path) -> None:
    found = hardware.accelerators(tree(tmp_path, "orange-pi-5"))
    assert [(each.kind, each.usable) for each in found] == [("gpu", True), ("npu", False)]
    (tpu, npu) = hardware.accelerators(tree(tmp_path, "coral-dev-board"))
    assert (tpu.delegate, tpu.usable, npu.name) == ("edgetpu:pci:0", True, "VeriSilicon NPU")


def test_the_command_lists_them_for_people_and_machines(tmp_path: Path, run: Run) -> None:
    root = tree(tmp_path, "cm4")
    document: dict[str, Any] = run("devices", "--root", str(root), "--json").document
    assert document["board"]["profile"] == "raspberry-pi-4"
    assert document["board"]["defaults"]["threads"] == 4
    assert document["board"]["defaults"]["throttle_c"] == 80.0
    assert [each["delegate"] for each in document["accelerators"]] == ["edgetpu:usb:0", "edgetpu:usb:1"]
    assert json.dumps(document)
    text = run("devices", "--root", str(tree(tmp_path, "pi-5"))).out
    assert "16 KB" not in text
    assert "kernel=kernel8.img" in text
    assert "rp1-cfe" in text
