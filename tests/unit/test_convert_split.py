"""Splitting: in proportion, nothing twice, nothing shared, and the same for the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_serve_converters.source import Layout
from edge_serve_converters.split import allocate, split


def halves(layout: Layout, classes: Any = None, seed: int = 0, samples: int = 200, batch: int = 1) -> tuple[Any, Any]:
    """Split with a seed."""
    return split(layout, classes, samples=samples, batch=batch, rng=np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("sizes", "total", "expected"),
    [
        ([50, 50], 10, [5, 5]),
        ([90, 10], 10, [9, 1]),
        ([1000, 1, 1], 10, [8, 1, 1]),
        ([2, 100], 50, [1, 49]),
        ([0, 5], 3, [0, 3]),
        ([3, 3], 100, [3, 3]),
        ([5, 4, 3], 2, [1, 1, 0]),
        ([0, 0], 5, [0, 0]),
    ],
)
def test_places_are_shared_in_proportion_and_nobody_is_left_out(
    sizes: list[int], total: int, expected: list[int]
) -> None:
    assert allocate(np.array(sizes), total).tolist() == expected


@pytest.mark.parametrize("classes", [None, np.arange(1000) % 7, np.repeat([0, 1, 2], [900, 90, 10])])
@pytest.mark.parametrize(("samples", "batch"), [(200, 1), (5, 1), (10, 8), (5000, 1), (5000, 3)])
def test_no_sample_is_in_both_parts_or_twice_in_one(classes: Any, samples: int, batch: int) -> None:
    used, held = halves(Layout(1000), classes, samples=samples, batch=batch)
    assert len({*used.tolist(), *held.tolist()}) == len(used) + len(held)
    assert len(used) <= samples * batch
    assert len(held) % batch == 0
    assert len(held) >= min(4, samples // 4) * batch
    if classes is not None and len(held) >= 7:
        assert set(classes[held].tolist()) == set(classes.tolist())


@pytest.mark.parametrize("classes", [None, np.arange(100) % 2])
def test_the_seed_decides(classes: Any) -> None:
    first, again, other = (halves(Layout(100), classes, seed)[1].tolist() for seed in (3, 3, 4))
    assert first == again != other


def test_one_long_recording_among_short_ones_calibrates() -> None:
    files = np.repeat(np.arange(11), [900, *[10] * 10])
    for seed in range(10):
        used, held = halves(Layout(1000, files=files), seed=seed)
        assert set(files[used].tolist()) >= {0}
        assert 0 not in files[held]


def test_of_two_recordings_one_is_held_back() -> None:
    used, held = halves(Layout(20, files=np.repeat([4, 9], 10)))
    assert len(used) == len(held) == 10


def test_classes_that_have_one_recording_each_still_leave_something_to_measure() -> None:
    files = np.repeat(np.arange(3), 10)
    used, held = halves(Layout(30, files=files), files)
    assert len(used) == 20
    assert len(held) == 10


@pytest.mark.parametrize("hop", [1, 3, 7])
def test_overlapping_windows_share_no_row_whatever_the_classes(hop: int) -> None:
    starts = np.arange(0, 500, hop)
    classes = np.random.default_rng(hop).integers(0, 3, len(starts) // 20 + 1).repeat(20)[: len(starts)]
    used, held = halves(Layout(len(starts), starts, 10), classes, samples=1000)
    distances = np.abs(starts[used][:, np.newaxis] - starts[held][np.newaxis, :])
    assert distances.min() >= 10
    assert len(used) > len(starts) / 4
