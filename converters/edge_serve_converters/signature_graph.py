"""One signature of a .tflite file as numbered tensors and operators, in the order in which they run.

What comparing layers needs of `graph`: both files' layers are told apart and followed by number. The subgraphs of loops and
branches are not entered.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_serve_converters import graph
from edge_serve_converters.errors import ConversionError
from edge_serve_converters.graph import Tensor


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator: indices of its tensors, those that it leaves out not counted."""

    index: int
    name: str
    """As the schema writes it (CONV_2D); a custom operator's own name."""
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SignatureGraph:
    """The subgraph of one signature."""

    subgraph: int
    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: dict[str, int]
    """The signature's name of an input → its tensor; in a file without signatures, tensor names without ":0"."""
    outputs: frozenset[int]
    """The tensors that the subgraph gives."""


def read_graph(file: Path, signature: str) -> SignatureGraph:
    """Read the subgraph of a signature; ConversionError if the file is damaged, or has signatures without this one."""
    try:
        found = graph.read_file(file)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file.name} is no .tflite file, or a damaged one ({error})") from error
    if found.signatures and signature not in found.signatures:
        raise ConversionError(f"{file.name} has no signature {signature!r}; it has {', '.join(found.signatures)}")
    entry = found.signatures.get(signature)
    subgraph = found.subgraphs[entry.subgraph if entry is not None else 0]
    return SignatureGraph(
        subgraph.index,
        subgraph.tensors,
        tuple(
            Operator(operator.index, operator.name, _indices(operator.present), _indices(operator.outputs))
            for operator in subgraph.operators
        ),
        dict(entry.inputs)
        if entry is not None
        else {tensor.name.removesuffix(":0"): tensor.index for tensor in subgraph.inputs},
        frozenset(_indices(subgraph.outputs)),
    )


def _indices(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(tensor.index for tensor in tensors)
