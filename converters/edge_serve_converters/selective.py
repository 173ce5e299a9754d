"""Which layers stay float: by patterns that a person gives, or the fewest with which the gates are passed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from edge_serve.errors import UsageError
from edge_serve.schema import closest

# One trial quantizes and runs all held-back samples; on a large model this many take some minutes.
MAX_TRIALS = 40

Layer = tuple[str, str]
"""Operator, and the name of its output tensor in the float file."""
Passes = Callable[[tuple[str, ...]], bool]
"""Tell whether a file with these layers left float passes the gates."""


def match(patterns: Sequence[str], layers: Sequence[Layer]) -> tuple[str, ...]:
    """Give the names of the layers that patterns name: an operator (SOFTMAX), a layer, or either with * and ?.

    A fused layer goes by each of its names ("a;b;c"). UsageError names a pattern that fits nothing.
    """
    chosen: dict[str, None] = {}
    for pattern in patterns:
        wanted = pattern.lower()
        found = [name for operator, name in layers if _fits(wanted, operator, name)]
        if not found:
            known = {operator for operator, _ in layers} | {part for _, name in layers for part in name.split(";")}
            raise UsageError(
                f"--keep-float {pattern}: no operator or layer of the model is named so. {closest(pattern, known)}"
            )
        chosen.update(dict.fromkeys(found))
    return tuple(chosen)


def _fits(pattern: str, operator: str, name: str) -> bool:
    lower = name.lower()
    return any(fnmatchcase(text, pattern) for text in (operator.lower(), lower, *lower.split(";")))


def fewest(ranked: Sequence[str], passes: Passes, fixed: Sequence[str] = ()) -> tuple[str, ...] | None:
    """Give the fewest layers (besides the fixed ones) that must stay float; None if not even all of them are enough.

    `ranked` holds the most harmful layer first. The shortest beginning of it that passes is found by doubling and halving,
    then each of its layers is tried without, the least harmful first. Layers mask each other, so this is no proof of the
    minimum; that would take a trial of every subset.
    """
    trials = 0
    known: dict[frozenset[str], bool] = {}

    def good(layers: Sequence[str]) -> bool:
        nonlocal trials
        key = frozenset(layers)
        if key not in known:
            trials += 1
            known[key] = passes((*fixed, *layers))
        return known[key]

    if good(()):
        return tuple(fixed)
    low, high = 0, 1
    while high < len(ranked) and not good(ranked[:high]):
        low, high = high, high * 2
    high = min(high, len(ranked))
    if not good(ranked[:high]):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if good(ranked[:middle]):
            high = middle
        else:
            low = middle
    kept = list(ranked[:high])
    for layer in reversed(ranked[: high - 1]):
        if trials >= MAX_TRIALS:
            break
        without = [other for other in kept if other != layer]
        if good(without):
            kept = without
    return (*fixed, *kept)
