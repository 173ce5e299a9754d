"""Which operator of a variant does what an operator of the float file does, told from names, types, shapes and order.

Quantizers insert conversions, dequantize weights on the spot and count names on ("add1" for "add"), so that an equal
name may even belong to a weight. But what computes keeps its kind, its shape and its order.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterator

from edge_serve_converters.signature_graph import Operator, SignatureGraph

_CONVERSIONS = frozenset({"QUANTIZE", "DEQUANTIZE"})
# What makes a tensor's name unique or says its type: digits at the end, and words that quantizers add.
_ADDED = re.compile(r"\d*(?:_(?:u?int8|int16|quantized|dequantized|quant|dequant|requant(?:ized)?)\d*)?$")

Groups = dict[Hashable, list[Operator]]


class _Side:
    """The computing operators of one file, and which of them have a partner already."""

    def __init__(self, graph: SignatureGraph) -> None:
        self.graph = graph
        self.operators = computing(graph)
        self.partner: dict[int, int] = {}
        """Operator → the operator of the float file that it is, or is paired with."""

    def name(self, operator: Operator) -> str:
        return self.graph.tensors[operator.outputs[0]].name

    def stem(self, operator: Operator) -> str:
        return _ADDED.sub("", self.name(operator), count=1)

    def shapes(self, operator: Operator) -> tuple[tuple[int, ...], ...]:
        return tuple(self.graph.tensors[index].shape for index in operator.outputs)

    def by_name(self) -> Groups:
        return self._grouped((operator.name, self.stem(operator), self.shapes(operator)) for operator in self.operators)

    def by_order(self) -> Groups:
        return self._grouped(self._places(self.operators))

    def by_order_from_the_end(self) -> Groups:
        return self._grouped(reversed(list(self._places(self.operators[::-1]))))

    def by_name_alone(self) -> Groups:
        return self._grouped((self.stem(operator), self.shapes(operator)) for operator in self.operators)

    def _places(self, operators: list[Operator]) -> Iterator[Hashable]:
        before = -1
        for operator in operators:
            before = self.partner.get(operator.index, before)
            yield before, operator.name, self.shapes(operator)

    def _grouped(self, keys: Iterator[Hashable]) -> Groups:
        groups: Groups = defaultdict(list)
        for operator, key in zip(self.operators, keys, strict=True):
            if operator.index not in self.partner:
                groups[key].append(operator)
        return groups


def match(reference: SignatureGraph, variant: SignatureGraph) -> list[tuple[Operator, Operator]]:
    """Give the operators of both files that belong together, in the float file's order.

    By kind, shapes and the name without what quantizers add to it; what is left by kind, shapes and the last (then the
    next) operator that is settled; then by name and shapes alone. Where the counts differ nothing is guessed.
    """
    ours, theirs = _Side(reference), _Side(variant)
    pairs: dict[int, Operator] = {}
    for ways in (_Side.by_name, _Side.by_order, _Side.by_order_from_the_end, _Side.by_name_alone):
        groups = ways(theirs)
        for key, mine in ways(ours).items():
            others = groups.get(key, [])
            if len(others) != len(mine):
                continue
            named = {theirs.name(operator): operator for operator in others}
            if len(named) == len(others) and named.keys() == {ours.name(operator) for operator in mine}:
                others = [named[ours.name(operator)] for operator in mine]
            for operator, other in zip(mine, others, strict=True):
                pairs[operator.index] = other
                ours.partner[operator.index] = theirs.partner[other.index] = operator.index
    return [(operator, pairs[operator.index]) for operator in ours.operators if operator.index in pairs]


def computing(graph: SignatureGraph) -> list[Operator]:
    """Give the operators that compute something from the inputs: no conversions of type, nothing made of constants alone."""
    fixed = {tensor.index for tensor in graph.tensors if tensor.constant}
    found = []
    for operator in graph.operators:
        if operator.inputs and fixed.issuperset(operator.inputs):
            fixed.update(operator.outputs)
        elif operator.name not in _CONVERSIONS and operator.outputs:
            found.append(operator)
    return found
