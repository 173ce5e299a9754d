"""Delegates that are libraries: Edge TPU, GPU, and whatever a board's vendor ships. All of them run in a child process.

A library of a vendor may hang, crash, or print; the child (edge_serve/model/isolated.py) keeps that from the service. XNNPACK is
off beside them, so that what they claim can be told from what it would.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_serve.errors import DelegateAwayError, DelegateError, ModelError
from edge_serve.model.delegate import DelegateSpec, Found
from edge_serve.model.engine import Engine
from edge_serve_devices import boards

if TYPE_CHECKING:
    from edge_serve.model.delegate import Runnable
    from edge_serve.model.interpreter import Runtime

EDGE_TPU_LIBRARY = "libedgetpu.so.1"
EDGE_TPU_OPERATOR = b"edgetpu-custom-op"
# A stick before and after its firmware is loaded, and the M.2 and Mini PCIe modules (coral.ai, Get started).
EDGE_TPU_USB = {("1a6e", "089a"), ("18d1", "9302")}
EDGE_TPU_PCI = ("0x1ac1", "0x089a")
GPU_LIBRARY = "libtensorflowlite_gpu_delegate.so"
LIBRARY_FOLDERS = ("usr/lib", "usr/lib/*-linux-gnu*", "usr/local/lib", "lib", "lib/*-linux-gnu*", "opt/*/lib")
VULKAN_DRIVERS = ("usr/share/vulkan/icd.d", "etc/vulkan/icd.d", "usr/local/share/vulkan/icd.d")
# Mesa's lavapipe and Google's SwiftShader compute on the CPU.
SOFTWARE_DRIVERS = ("lvp_", "vk_swiftshader")
# Drivers that Mesa installs for every machine; without a GPU's device node none of them has anything to drive.
GPU_NODES = ("dri/renderD*", "nvidia0", "nvhost-gpu", "nvgpu", "mali*", "kgsl-3d0")


class External:
    """Any external TFLite delegate by its library's path, with options as the library takes them."""

    isolated = True
    threaded = False
    hint = "check the path, and that the library is one for this machine"

    def __init__(self, spec: DelegateSpec) -> None:
        """Take its specification; DelegateError without a library, or with an index, which no library here knows."""
        if not spec.library:
            raise DelegateError("an external delegate takes the path of its library")
        if spec.index:
            raise DelegateError("an external delegate takes no index; give it as an option, as its library names it")
        self.spec = spec

    @property
    def library(self) -> str:
        """Give the library to load."""
        return self.spec.library

    def options(self) -> dict[str, str]:
        """Give the options that the library gets."""
        return dict(self.spec.options)

    def open(self, path: Path, runtime: Runtime, *, threads: int, signature: str | None) -> Runnable:
        """Load a .tflite file on it and warm it.

        DelegateError if the library is none, refuses its options or the model, or takes no operator; DelegateAwayError if its
        hardware is not there; ModelError for the model's own faults.
        """
        label = self.spec.label
        delegate = self._load(runtime)
        try:
            interpreter = runtime.open(path, threads=threads, xnnpack=False, delegates=[delegate])
            engine = Engine.over(path, interpreter, label, threads=threads, signature=signature)
        except DelegateError:
            raise
        except ModelError as error:
            raise DelegateError(f"{label} does not take this model: {error}") from error
        if not engine.claims.taken:
            engine.close()
            raise DelegateError(f"{label} takes no operator of {path}, so it would run on the CPU")
        return engine

    def _load(self, runtime: Runtime) -> Any:
        try:
            return runtime.load_delegate(self.library, self.options())
        except OSError as error:
            raise DelegateError(f"{self.spec.label}: {self.library} cannot be loaded ({error}); {self.hint}") from error
        except AttributeError as error:
            raise DelegateError(f"{self.spec.label}: {self.library} is no TFLite delegate ({error})") from error
        except (ValueError, RuntimeError) as error:
            # The runtime's own line comes first, what the library says after it.
            said = str(error).strip().splitlines()[1:]
            raise self.refusal(" ".join(said) or "it gives no reason") from error

    def refusal(self, text: str) -> Exception:
        """Say what it means that the library made no delegate."""
        return DelegateError(f"{self.spec.label}: {self.library} refuses: {text}; check its options")

    @classmethod
    def find(cls, root: Path) -> Sequence[Found]:
        """Nothing: which libraries of a machine are delegates is known to its owner only."""
        return ()


class EdgeTpu(External):
    """Google's Edge TPU, by USB or PCI, one of several by its index: edgetpu, edgetpu:usb:0, edgetpu:pci:1."""

    hint = "install libedgetpu1-std from Coral's packages (coral.ai, Get started), or give `library`"

    def __init__(self, spec: DelegateSpec) -> None:
        """Take its specification; DelegateError for an index that no TPU can have."""
        bus, _, number = spec.index.partition(":")
        if spec.index and (bus not in ("usb", "pci") or (number and not number.isdecimal())):
            raise DelegateError(
                f"edgetpu:{spec.index}: an Edge TPU is usb, pci, usb:0, pci:1 …; `edge-serve devices` lists them"
            )
        self.spec = spec

    @property
    def library(self) -> str:
        """Give the library to load."""
        return self.spec.library or EDGE_TPU_LIBRARY

    def options(self) -> dict[str, str]:
        """Give the options that the library gets: which TPU, as libedgetpu names it."""
        device = {"device": self.spec.index} if self.spec.index else {}
        return {**device, **dict(self.spec.options)}

    def open(self, path: Path, runtime: Runtime, *, threads: int, signature: str | None) -> Runnable:
        """Load a compiled .tflite file on it; DelegateError for one that is not, and all that External raises."""
        if not _holds(path, EDGE_TPU_OPERATOR):
            raise DelegateError(
                f"{path}: is not compiled for an Edge TPU; make an int8 file with `edge-serve convert --target edgetpu` "
                "where edgetpu_compiler is"
            )
        return super().open(path, runtime, threads=threads, signature=signature)

    def refusal(self, text: str) -> Exception:
        """Say what it means that libedgetpu made no delegate: it does so when there is no TPU that is free."""
        return DelegateAwayError(
            f"{self.spec.label}: no Edge TPU could be opened ({text}); is it plugged in, may this user open it (group plugdev), "
            "and does no other process have it?"
        )

    @classmethod
    def find(cls, root: Path) -> Sequence[Found]:
        """Give every Edge TPU that the system shows, in libedgetpu's order; one entry that says so if there is none."""
        sticks = [_usb_trouble(root, folder) for folder in sorted(_usb_tpus(root), key=lambda folder: folder.name)]
        cards = [_pci_trouble(root, number) for number, _ in enumerate(_pci_tpus(root))]
        library = _library(root, EDGE_TPU_LIBRARY)
        missing = ("", "") if library else (f"{EDGE_TPU_LIBRARY} is missing", cls.hint)
        found = [
            Found(DelegateSpec("edgetpu", f"{bus}:{number}"), *(trouble if trouble[0] else missing))
            for bus, troubles in (("usb", sticks), ("pci", cards))
            for number, trouble in enumerate(troubles)
        ]
        return found or (Found(DelegateSpec("edgetpu"), "no Edge TPU is plugged in"),)


class Gpu(External):
    """A GPU: LiteRT's WebGPU accelerator on a real adapter, or a vendor's classic TFLite GPU library where one is given."""

    hint = "install the board vendor's TFLite GPU library, or leave `library` out for LiteRT's own accelerator"

    def __init__(self, spec: DelegateSpec) -> None:
        """Take its specification; DelegateError for an index: there is no way to ask for one of several."""
        if spec.index:
            raise DelegateError("gpu takes no index; VK_DRIVER_FILES or the vendor's options choose an adapter")
        self.spec = spec

    def open(self, path: Path, runtime: Runtime, *, threads: int, signature: str | None) -> Runnable:
        """Load a .tflite file on it and warm it; raises what External raises."""
        if self.spec.library:
            return super().open(path, runtime, threads=threads, signature=signature)
        from edge_serve_devices import webgpu  # with ctypes, and the larger half of LiteRT

        return webgpu.open_model(path, runtime, self.options(), signature=signature)

    @classmethod
    def find(cls, root: Path) -> Sequence[Found]:
        """Say whether there is a GPU and a driver for it."""
        library = _library(root, GPU_LIBRARY)
        if library is not None:
            return (Found(DelegateSpec("gpu", "", str(library))),)
        spec = DelegateSpec("gpu")
        if not any(any((root / "dev").glob(pattern)) for pattern in GPU_NODES):
            return (Found(spec, "no GPU is there (no /dev/dri/renderD* nor a vendor's node)"),)
        drivers = [file.name for folder in VULKAN_DRIVERS for file in sorted((root / folder).glob("*.json"))]
        remedy = "install its Vulkan driver (mesa-vulkan-drivers and libvulkan1, or the vendor's)"
        if not drivers or _library(root, "libvulkan.so.1") is None:
            return (Found(spec, "the GPU has no Vulkan driver", remedy),)
        if all(name.startswith(SOFTWARE_DRIVERS) for name in drivers):
            return (Found(spec, "the only Vulkan driver computes on the CPU", remedy),)
        board = boards.recognise(root)
        if "gpu" not in board.profile.delegates:
            return (Found(spec, untried=f'not worth a try on {board.model}; delegate = "gpu" takes it all the same'),)
        return (Found(spec),)


def _holds(path: Path, words: bytes) -> bool:
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data.find(words) >= 0
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from error


def _library(root: Path, name: str) -> Path | None:
    """Find a library where the linker looks for it."""
    for folder in LIBRARY_FOLDERS:
        for file in sorted(root.glob(f"{folder}/{name}")):
            return file
    return None


def _text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return stream.read(256).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _usb_tpus(root: Path) -> Iterator[Path]:
    for folder in (root / "sys/bus/usb/devices").glob("*"):
        if (_text(folder / "idVendor"), _text(folder / "idProduct")) in EDGE_TPU_USB:
            yield folder


def _pci_tpus(root: Path) -> Iterator[Path]:
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        if (_text(folder / "vendor"), _text(folder / "device")) == EDGE_TPU_PCI:
            yield folder


def _usb_trouble(root: Path, folder: Path) -> tuple[str, str]:
    bus, device = _text(folder / "busnum"), _text(folder / "devnum")
    if not (bus.isdecimal() and device.isdecimal()):
        return "", ""
    return _access(root / f"dev/bus/usb/{int(bus):03d}/{int(device):03d}")


def _pci_trouble(root: Path, number: int) -> tuple[str, str]:
    node = root / f"dev/apex_{number}"
    if not node.exists():
        return (
            "the driver of the PCI Edge TPU is not loaded (no /dev/apex_*)",
            "install gasket-dkms from Coral's packages; on a Raspberry Pi 5 boot the kernel with 4 KB pages (kernel=kernel8.img)",
        )
    return _access(node)


def _access(node: Path) -> tuple[str, str]:
    import os

    if not node.exists() or os.access(node, os.R_OK | os.W_OK):
        return "", ""
    return (
        f"this user may not open /{node.relative_to(node.anchor)}",
        "add the user to the group plugdev (apex for PCI) and install Coral's udev rules (60-libedgetpu1-std.rules)",
    )
