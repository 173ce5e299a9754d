"""The delegates of the CPU: `none`, the interpreter's own kernels, and `xnnpack`, which every runtime carries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_serve.errors import DelegateError
from edge_serve.model.delegate import DelegateSpec, Found
from edge_serve.model.engine import Engine

if TYPE_CHECKING:
    from edge_serve.model.interpreter import Runtime


class Cpu:
    """The interpreter in this process, with or without XNNPACK. Neither takes options: their threads are the model's."""

    isolated = False
    threaded = True
    name = "none"

    def __init__(self, spec: DelegateSpec) -> None:
        """Take its specification; DelegateError if that says more than the name."""
        if spec.index or spec.library or spec.options:
            raise DelegateError(f"the delegate {self.name} takes no index, library or options")

    def open(self, path: Path, runtime: Runtime, *, threads: int, signature: str | None) -> Engine:
        """Load and warm a .tflite file; ModelError says why it cannot be used."""
        return Engine.open(path, runtime=runtime, delegate=self.name, threads=threads, signature=signature)

    @classmethod
    def find(cls, root: Path) -> Sequence[Found]:
        """Give the one that is always there."""
        return (Found(DelegateSpec(cls.name)),)


class Xnnpack(Cpu):
    """XNNPACK: faster kernels for most float and int8 operators."""

    name = "xnnpack"
