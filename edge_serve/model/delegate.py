"""Delegates: what takes operators away from the interpreter's own kernels. Every one of them has the face that is named here.

A delegate that claims nothing raises nothing, so nobody may believe a delegate's name: `claims` counts. Built in are `none` and
`xnnpack` (cpu.py); `edgetpu`, `gpu` and `external` live with the hardware, third parties register entry points of the group
`edge_serve.delegates` (plugins.py). A delegate's class is called with its `DelegateSpec`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edge_serve.spec import AUTO, DelegateSpec

if TYPE_CHECKING:
    from edge_serve.bundle import TensorSpec
    from edge_serve.frame import Array
    from edge_serve.model.interpreter import Runtime

__all__ = ["AUTO", "CPU", "Candidate", "Claims", "Delegate", "DelegateSpec", "Found", "Runnable", "claims"]

# What runs instead where another delegate is of no use: the interpreter's own kernels come last.
CPU = ("xnnpack", "none")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a model: a variant's file on a delegate with a number of threads."""

    variant: str
    file: Path
    sha256: str
    spec: DelegateSpec
    threads: int

    @property
    def label(self) -> str:
        """Name it for people: "int8 on xnnpack, 2 threads"."""
        threads = f", {self.threads} threads" if self.threads > 1 else ""
        return f"{self.variant} on {self.spec.label}{threads}"


@dataclass(frozen=True, slots=True)
class Found:
    """A delegate that this machine may have, and what keeps it from being used."""

    spec: DelegateSpec
    why_not: str = ""
    """Empty where nothing is known to be in its way; only opening it proves that it works."""
    remedy: str = ""
    untried: str = ""
    """Why "auto" does not try it where nothing is in its way: what its kind of board is known for. Asked for by name, it is used."""


class Runnable(Protocol):
    """One signature of one model, open on a delegate and warm. Not thread-safe: the thread that runs it owns it."""

    @property
    def path(self) -> Path:
        """Give the file."""
        ...

    @property
    def signature(self) -> str:
        """Name the signature."""
        ...

    @property
    def threads(self) -> int:
        """Count the interpreter's threads."""
        ...

    @property
    def delegate(self) -> str:
        """Say what runs, not what was wished for: the delegate's label, or "none" where it claims no operator."""
        ...

    @property
    def inputs(self) -> dict[str, TensorSpec]:
        """Give the inputs by name."""
        ...

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        """Give the outputs by name."""
        ...

    @property
    def claims(self) -> Claims:
        """Say which operators the delegate took."""
        ...

    @property
    def detection_outputs(self) -> tuple[str, ...] | None:
        """Give the outputs of a TFLite_Detection_PostProcess in its own order; None if there is none."""
        ...

    @property
    def operators(self) -> dict[str, int]:
        """Operator name → how many of them the model has."""
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; InputError for what fits no tensor, InferenceError for a run that failed."""
        ...

    def close(self) -> None:
        """Free memory, device and child process."""
        ...


class Delegate(Protocol):
    """A kind of delegate. Its class is called with a DelegateSpec; DelegateError if that has what it does not take."""

    isolated: bool
    """Whether its native code may hang, crash or hold the GIL: then it runs in a child process (isolated.py)."""
    threaded: bool
    """Whether the interpreter's number of threads changes how fast it is."""

    def open(self, path: Path, runtime: Runtime, *, threads: int, signature: str | None) -> Runnable:
        """Load a .tflite file on it, in this process, and warm it.

        ModelError for the model's faults, DelegateError for the delegate's or where it takes no operator of the model, and
        DelegateAwayError where its hardware is not there or not free.
        """
        ...

    @classmethod
    def find(cls, root: Path) -> Sequence[Found]:
        """Say which delegates of this kind the machine may have, usable or not; `root` is "/" but in tests."""
        ...


@dataclass(frozen=True, slots=True)
class Claims:
    """Which operators a model has and which of them a delegate took over, counted by name."""

    operators: dict[str, int]
    claimed: dict[str, int]

    @property
    def total(self) -> int:
        """Count all operators."""
        return sum(self.operators.values())

    @property
    def taken(self) -> int:
        """Count the operators that a delegate runs."""
        return sum(self.claimed.values())


def claims(interpreter: Any) -> Claims:
    """Count the operators and those that delegates took over.

    The runtimes append a DELEGATE node for each partition and keep the replaced nodes in the list: walking back from a
    DELEGATE node's outputs to its inputs meets exactly the operators that it replaced.
    """
    nodes = interpreter._get_ops_details()
    originals = [node for node in nodes if node["op_name"] != "DELEGATE"]
    producers = {int(tensor): node for node in originals for tensor in node["outputs"]}
    claimed: dict[int, str] = {}
    for delegate in (node for node in nodes if node["op_name"] == "DELEGATE"):
        borders = {int(tensor) for tensor in delegate["inputs"]}
        waiting = [int(tensor) for tensor in delegate["outputs"]]
        while waiting:
            tensor = waiting.pop()
            producer = producers.get(tensor)
            if tensor in borders or producer is None or int(producer["index"]) in claimed:
                continue
            claimed[int(producer["index"])] = str(producer["op_name"])
            waiting.extend(int(source) for source in producer["inputs"])
    return Claims(
        dict(sorted(Counter(str(node["op_name"]) for node in originals).items())),
        dict(sorted(Counter(claimed.values()).items())),
    )
