"""One face over the TFLite runtimes: ai_edge_litert (LiteRT) and tflite_runtime have the same Interpreter.

Which one is used: the configuration's `runtime`, else the environment variable EDGE_SERVE_RUNTIME, else the first that
is installed, LiteRT before tflite-runtime.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve.errors import ModelError, RuntimeMissingError

ENVIRONMENT = "EDGE_SERVE_RUNTIME"
MODULES = {"litert": "ai_edge_litert", "tflite-runtime": "tflite_runtime"}
# Bytes 4 to 8 of every TFLite flatbuffer (schema.fbs, file_identifier).
FILE_IDENTIFIER = b"TFL3"


@dataclass(frozen=True, slots=True)
class Runtime:
    """A TFLite runtime that was found and imported; it opens interpreters."""

    name: str
    module: str
    interpreter_class: Any
    without_delegates: Any
    """The op resolver that applies no delegate by default: XNNPACK off."""
    load_delegate: Any

    @property
    def version(self) -> str:
        """Give the installed version of the runtime's distribution."""
        from importlib.metadata import version  # slow to import; only people ask for it

        return version(self.module.replace("_", "-"))

    @property
    def installed(self) -> int:
        """Give a number that changes when another version of the runtime is installed (cheaper than the version)."""
        file = sys.modules[f"{self.module}.interpreter"].__file__
        return int(Path(file).stat().st_mtime) if file else 0

    @property
    def folder(self) -> Path:
        """Give the folder into which the runtime, and what else belongs to this Python, is installed."""
        file = sys.modules[f"{self.module}.interpreter"].__file__
        return Path(file).parents[1] if file else Path()

    def open(self, path: Path, *, threads: int, xnnpack: bool, delegates: Sequence[Any] = ()) -> Any:
        """Open a .tflite file (mapped, not copied) and allocate its tensors; ModelError says why it cannot be used."""
        check_file(path)
        options: dict[str, Any] = {"model_path": str(path), "num_threads": threads}
        if not xnnpack:
            options["experimental_op_resolver_type"] = self.without_delegates
        if delegates:
            options["experimental_delegates"] = list(delegates)
        try:
            interpreter = self.interpreter_class(**options)
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ModelError(
                f"{path}: {self.name} cannot load this model: {_first_line(error)}{_remedy(error)}"
            ) from error
        return interpreter


def check_file(path: Path) -> None:
    """Raise ModelError unless the file is there and begins as a TFLite flatbuffer does."""
    try:
        with path.open("rb") as stream:
            head = stream.read(8)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path and the permissions") from error
    if len(head) < 8 or head[4:8] != FILE_IDENTIFIER:
        raise ModelError(
            f"{path}: is not a TFLite model (no {FILE_IDENTIFIER.decode()} mark); convert one with `edge-serve convert`"
        )


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a runtime raises over names and numbers of a damaged file, which it loads without a word, into ModelError."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{path}: is damaged ({_first_line(error)}); copy or convert the model again") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(". ") if str(error).strip() else type(error).__name__


def _remedy(error: Exception) -> str:
    text = str(error)
    if "edgetpu-custom-op" in text:
        return ". It was compiled for an Edge TPU; use the bundle's CPU variant, or convert the model without the Edge TPU's compiler"
    if "Select TensorFlow op" in text or "Flex" in text:
        return ". It holds TensorFlow (Flex) operators, which device runtimes do not have; convert it again with `edge-serve convert`"
    if "unresolved custom op" in text:
        return ". It holds a custom operator that this runtime does not have"
    if "Didn't find op for builtin opcode" in text:
        return ". The file needs a newer runtime; update it, or convert the model again for this one"
    return ""


def load_runtime(choice: str = "auto") -> Runtime:
    """Import the chosen runtime; RuntimeMissingError says what this machine could have and how to get it."""
    if choice == "auto":
        choice = os.environ.get(ENVIRONMENT, "auto")
    if choice == "auto":
        found = [name for name, module in MODULES.items() if importlib.util.find_spec(module) is not None]
        if not found:
            raise RuntimeMissingError(f"no TFLite runtime is installed. {_how_to_install()}")
        choice = found[0]
    if choice not in MODULES:
        raise RuntimeMissingError(f"unknown runtime {choice!r}; known: auto, {', '.join(MODULES)}")
    module = MODULES[choice]
    if importlib.util.find_spec(module) is None:
        raise RuntimeMissingError(f"the runtime {choice} was asked for but is not installed. {_how_to_install()}")
    if module == "tflite_runtime" and int(np.__version__.split(".", 1)[0]) >= 2:
        # Its import succeeds with numpy 2, and then every Interpreter() fails with a SystemError that explains nothing.
        raise RuntimeMissingError(
            f"tflite-runtime was built for numpy 1, and numpy {np.__version__} is installed: run `pip install 'numpy<2'`"
        )
    try:
        package = importlib.import_module(f"{module}.interpreter")
    except ImportError as error:
        raise RuntimeMissingError(
            f"the runtime {choice} is installed but cannot be imported ({error}); install it again for this Python"
        ) from error
    return Runtime(
        choice,
        module,
        package.Interpreter,
        package.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        package.load_delegate,
    )


def _how_to_install() -> str:
    machine = os.uname().machine if hasattr(os, "uname") else "unknown"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    bits = struct.calcsize("P") * 8
    here = f"For Python {python} ({bits} bit, {machine})"
    if bits == 32:
        if sys.version_info >= (3, 12):
            return (
                f"{here} none exists: on 32-bit ARM there is only tflite-runtime, up to Python 3.11; "
                "use the 64-bit Raspberry Pi OS, or the 32-bit one named Bookworm (Python 3.11)"
            )
        return f"{here}: `pip install 'tflite-runtime>=2.14' 'numpy<2'` (from apt: python3-numpy python3-pil)"
    if machine in ("x86_64", "AMD64", "aarch64", "arm64"):
        return f"{here}: `pip install ai-edge-litert`"
    return f"{here} neither ai-edge-litert nor tflite-runtime has a wheel; build one of them from source and install it"
