"""Counters: what is counted is what is told."""

from __future__ import annotations

import json
import math
import threading

import pytest

from edge_serve.health import AGES_KEPT, Counters, percentile


def test_a_new_pipeline_has_counted_nothing() -> None:
    assert Counters().snapshot() == {
        "in": 0,
        "out": 0,
        "errors": {},
        "dropped": {},
        "settled_early": 0,
        "retried": 0,
        "age_ms": {"p50": None, "p99": None},
    }


def test_everything_is_counted_by_what_it_is() -> None:
    counters = Counters()
    counters.came_in()
    counters.came_in()
    counters.went_out(3.0)
    counters.failed("bad_input")
    counters.failed("bad_input")
    counters.dropped("latest")
    counters.dropped("window_timeout", 7)
    counters.dropped("max_keys", 0)
    counters.early_settled()
    counters.retried()
    snapshot = counters.snapshot()
    assert snapshot == {
        "in": 2,
        "out": 1,
        "errors": {"bad_input": 2},
        "dropped": {"latest": 1, "window_timeout": 7},
        "settled_early": 1,
        "retried": 1,
        "age_ms": {"p50": 3.0, "p99": 3.0},
    }
    json.dumps(snapshot)


def test_a_snapshot_does_not_change_any_more() -> None:
    counters = Counters()
    counters.failed("bad_input")
    before = counters.snapshot()
    counters.failed("bad_input")
    assert before["errors"] == {"bad_input": 1}


def test_the_ages_of_the_latest_results_count() -> None:
    counters = Counters()
    for age in range(AGES_KEPT + 100):
        counters.went_out(float(age))
    assert counters.snapshot()["age_ms"]["p50"] == 100 + AGES_KEPT / 2 - 1


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7, 10, 99, 100, 101, 200, 1024])
@pytest.mark.parametrize("percent", [1, 50, 95, 99, 100])
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(number: int, percent: int) -> None:
    ordered = [float(value) for value in range(number)]
    found = percentile(ordered, percent)
    assert found is not None
    assert sum(value <= found for value in ordered) >= math.ceil(number * percent / 100)
    assert sum(value < found for value in ordered) < math.ceil(number * percent / 100)


def test_threads_count_together() -> None:
    counters = Counters()

    def count() -> None:
        for _ in range(1000):
            counters.came_in()
            counters.dropped("latest")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters.snapshot()["in"] == counters.snapshot()["dropped"]["latest"] == 4000
