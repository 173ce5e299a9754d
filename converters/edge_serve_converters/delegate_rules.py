"""What the rules of the delegates have in common: a verdict for each operator, and what shapes and parameters are asked for.

A verdict says what is expected of published rules, never what happened: only a compiler or a delegate can say that.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_serve_converters.graph import Operator, Shape, Tensor


@dataclass(frozen=True, slots=True)
class Verdict:
    """One operator against the rules of one delegate."""

    index: int
    """Its place in the execution order of its subgraph."""
    operator: str
    name: str
    """The layer: the name of its first output."""
    expected: bool
    rule: str | None
    """The rule that fails, in words; also what is good to know of an expected one."""

    @property
    def told(self) -> str:
        """Say which operator it is and why it is not expected."""
        return f"{self.operator} (operator {self.index}: {self.rule})"


def verdict(operator: Operator, rule: str | None) -> Verdict:
    """Judge an operator by the rule that it fails, if any."""
    return Verdict(operator.index, operator.name, operator.layer, rule is None, rule)


def written(shape: Shape) -> str:
    """Write a shape for people: 1×224×224×3."""
    return "×".join(map(str, shape)) if shape else "scalar"


def input_at(operator: Operator, place: int) -> Tensor | None:
    """Give an input, None if it is left out."""
    return operator.inputs[place] if place < len(operator.inputs) else None


def axes_of(operator: Operator, place: int) -> tuple[int, ...] | None:
    """Give the axes that a constant input names, counted from the front; None if they are not known."""
    named = input_at(operator, place)
    values = named.integers() if named is not None else None
    subject = input_at(operator, 0)
    if values is None or subject is None:
        return None
    return tuple(axis % len(subject.shape) if subject.shape else 0 for axis in values)


def computed(operator: Operator, parameters: tuple[int, ...]) -> str | None:
    """Fail if one of these inputs, which must be constants, is computed while the model runs."""
    for place in parameters:
        tensor = input_at(operator, place)
        if tensor is not None and not tensor.constant:
            return f"its parameter {tensor.name!r} is computed while the model runs; it must be a constant"
    return None


def dynamic(operator: Operator) -> str | None:
    """Fail if a shape is open."""
    for tensor in operator.values:
        if tensor.open:
            return f"the shape of {tensor.name!r} is open ({written(tensor.signature)}); all shapes must be fixed"
    return None
