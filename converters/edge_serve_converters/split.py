"""Which samples calibrate and which are held back to measure on: by seed, without replacement, no datum in both.

Samples that share data (overlapping windows, windows of one recording) stay together. Where classes are known, both parts
hold them in proportion, and every class that has two samples at least one of them held back.
"""

from __future__ import annotations

import numpy as np

from edge_serve_converters.request import HELD_BACK
from edge_serve_converters.source import Layout
from edge_serve_converters.store import Array

# Fewer held-back samples than this say little; half of a very small set is the most that is taken for it.
MIN_HELD_BACK = 4
# Labels are held back in larger number: a point of accuracy shows only on some hundreds of samples.
LABELLED_HELD_BACK = 1000
# Whole files are held back until the share is reached; one that would exceed it by more than this is passed over.
_EXCESS = 1.5


def split(
    layout: Layout, classes: Array | None, *, samples: int, batch: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Give the indices of samples that calibrate, at most `samples` batches, and of those held back, a quarter as many.

    `classes` are [layout.count] integers, or None; with them up to LABELLED_HELD_BACK batches are held back of what does
    not calibrate. Either part may be empty where there is too little data.
    """
    most = _share(samples) if classes is None else max(_share(samples), LABELLED_HELD_BACK)
    pools = _pools(layout, classes, rng)
    if pools is not None:
        used = _choose(pools[0], classes, samples * batch, rng)
        held = _choose(pools[1], classes, most * batch, rng)
        return used, held
    runs = layout.count // batch
    used_count = min(samples, runs - _held_back(runs)) * batch
    held_count = min(most, runs - used_count // batch) * batch
    total = used_count + held_count
    if classes is None:
        order = rng.permutation(layout.count)[:total]
        return order[held_count:], order[:held_count]
    everything = np.arange(layout.count)
    held = _choose(everything, classes, held_count, rng, spare=1)
    used = _choose(np.setdiff1d(everything, held), classes, total - held_count, rng)
    return used, held


def _share(samples: int) -> int:
    """Give how many are held back beside that many that calibrate."""
    return max(MIN_HELD_BACK, round(samples * HELD_BACK / (1 - HELD_BACK)))


def _held_back(runs: int) -> int:
    """Give how many of few runs are held back."""
    return max(round(runs * HELD_BACK), min(MIN_HELD_BACK, runs // 2))


def _pools(layout: Layout, classes: Array | None, rng: np.random.Generator) -> tuple[Array, Array] | None:
    """Give the samples that may calibrate and those that may be held back; None where any sample may be either."""
    if layout.files is not None:
        return _whole_files(layout.files, classes, rng)
    if layout.starts is None:
        return None
    if classes is None:
        return _at_border(layout.starts, layout.length)
    return _at_end_of_each_class(layout.starts, layout.length, classes)


def _at_border(starts: Array, length: int) -> tuple[Array, Array]:
    """Hold back the end of a recording; windows across the border belong to neither part."""
    border = starts[round(len(starts) * (1 - HELD_BACK))] if len(starts) > 1 else 0
    return np.flatnonzero(starts + length <= border), np.flatnonzero(starts >= border)


def _at_end_of_each_class(starts: Array, length: int, classes: Array) -> tuple[Array, Array]:
    """Hold back the last windows of each class: recordings often hold one class after the other."""
    held = np.zeros(len(starts), bool)
    for value in np.unique(classes):
        members = np.flatnonzero(classes == value)
        if len(members) > 1:
            held[members[-max(1, round(len(members) * HELD_BACK)) :]] = True
    rows = np.zeros(int(starts[-1]) + length + 1, np.int64)
    np.add.at(rows, starts[held], 1)
    np.add.at(rows, starts[held] + length, -1)
    taken = np.concatenate([[0], np.cumsum(np.cumsum(rows) > 0)])
    shares = taken[starts + length] > taken[starts]
    return np.flatnonzero(~shares), np.flatnonzero(held)


def _whole_files(files: Array, classes: Array | None, rng: np.random.Generator) -> tuple[Array, Array]:
    """Hold back whole files, of each class where it has several; of classes with one file that file calibrates."""
    numbers, first, sizes = np.unique(files, return_index=True, return_counts=True)
    kinds = classes[first] if classes is not None else np.zeros(len(numbers), np.int64)
    held = _held_files(numbers, sizes, kinds, rng)
    if not held:
        held = _held_files(numbers, sizes, np.zeros(len(numbers), np.int64), rng)
    apart = np.isin(files, held)
    return np.flatnonzero(~apart), np.flatnonzero(apart)


def _held_files(numbers: Array, sizes: Array, kinds: Array, rng: np.random.Generator) -> list[int]:
    held: list[int] = []
    for kind in np.unique(kinds):
        members = np.flatnonzero(kinds == kind)
        if len(members) < 2:
            continue
        wanted, taken = int(sizes[members].sum()) * HELD_BACK, 0
        chosen = []
        for member in rng.permutation(members).tolist():
            if taken < wanted and taken + sizes[member] <= wanted * _EXCESS:
                chosen.append(member)
                taken += int(sizes[member])
        held += numbers[chosen or [members[sizes[members].argmin()]]].tolist()
    return held


def _choose(pool: Array, classes: Array | None, number: int, rng: np.random.Generator, spare: int = 0) -> Array:
    """Draw from a pool, in proportion to the classes in it; of each class `spare` samples stay behind."""
    if classes is None:
        return pool[rng.permutation(len(pool))[:number]]
    kinds, sizes = np.unique(classes[pool], return_counts=True)
    quotas = allocate(np.maximum(sizes - spare, 0), number)
    drawn = [
        rng.permutation(pool[classes[pool] == kind])[:quota] for kind, quota in zip(kinds, quotas, strict=True) if quota
    ]
    return rng.permutation(np.concatenate(drawn)) if drawn else pool[:0]


def allocate(sizes: Array, total: int) -> Array:
    """Divide `total` places among classes of these sizes, [classes] → [classes]: in proportion, at least one each if there
    are as many places as classes, never more than a class has."""
    total = min(total, int(sizes.sum()))
    quotas = np.minimum(sizes, 1) if total >= np.count_nonzero(sizes) else np.zeros_like(sizes)
    ideal = sizes * (total / max(1, int(sizes.sum())))
    for _ in range(total - int(quotas.sum())):
        quotas[int(np.where(quotas < sizes, ideal - quotas, -np.inf).argmax())] += 1
    return quotas
