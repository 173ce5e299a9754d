"""Delegates: what takes operators away from the interpreter's own kernels. Built in are `none` and `xnnpack`.

A delegate that claims nothing raises nothing, so nobody may believe a delegate's name: `claims` counts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from edge_serve.errors import ModelError

BUILTIN = ("none", "xnnpack")
# What runs instead where an input crashed on a delegate: the interpreter's own kernels come last.
NEXT = {"xnnpack": "none"}


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


def choose(name: str) -> str:
    """Settle which delegate is used for the configuration's `delegate`; ModelError if there is no such one."""
    if name == "auto":
        return "xnnpack"
    if name not in BUILTIN:
        raise ModelError(f"unknown delegate {name!r}; known: auto, {', '.join(BUILTIN)}")
    return name


def after(name: str) -> str:
    """Give the delegate that is next in line when an input crashed on this one; the last one is its own next."""
    return NEXT.get(name, name)


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
