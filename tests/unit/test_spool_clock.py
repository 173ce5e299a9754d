"""Ages: monotonic within a boot, and across boots only as far as the clocks are known to be right."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edge_serve.frame import CLOCK_PLAUSIBLE_AFTER
from edge_serve.spool import spooler
from edge_serve.spool.clock import Clock, Moment, age, kernel_synced
from tests.support import wait_for
from tests.unit.spool_files import FakeClock, Opened, many


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spooler, "TICK_S", 0.02)


def expired(made: Opened) -> int:
    """Give how many rows were too old, after a look of the spool's thread."""
    time.sleep(0.15)
    return int(made.counters.snapshot()["dropped"].get(spooler.EXPIRED, 0))


def test_a_result_that_waited_too_long_is_dropped_and_counted(tmp_path: Path) -> None:
    clock = FakeClock()
    with Opened(tmp_path, clock, max_age_s=60) as made:
        made.fill(*many(5))
        clock.forward(40)
        made.fill(*many(5, first=5))
        assert expired(made) == 0
        clock.forward(30)
        wait_for(lambda: expired(made) == 5, "the first five are too old")
        assert made.ids() == many(5, first=5)


def test_a_clock_that_is_stepped_expires_nothing(tmp_path: Path) -> None:
    clock = FakeClock(utc=0.0, synced=False)
    with Opened(tmp_path, clock, max_age_s=60) as made:
        made.fill(*many(5))
        clock.moment = Moment("boot-a", 1001.0, 1.8e9, True)  # the network is back, and with it the time
        assert expired(made) == 0
        clock.moment = Moment("boot-a", 1002.0, 1.8e9 - 86400, True)  # stepped back a day
        assert expired(made) == 0
        assert made.ids() == many(5)


@pytest.mark.parametrize(("then", "now"), [(False, False), (True, False), (False, True)])
def test_nothing_expires_across_boots_whose_clocks_are_not_known(tmp_path: Path, then: bool, now: bool) -> None:
    with Opened(tmp_path, FakeClock("boot-a", 5000.0, 1.8e9, synced=then), max_age_s=60) as made:
        made.fill(*many(5))
    clock = FakeClock("boot-b", 10.0, 1.8e9 + 10 * 86400, synced=now)
    with Opened(tmp_path, clock, max_age_s=60) as again:
        assert expired(again) == 0
        clock.forward(50)
        assert expired(again) == 0
    # Their age counts from the moment at which this boot first saw them, through a restart of the service.
    clock.forward(20)
    with Opened(tmp_path, clock, max_age_s=60) as again:
        wait_for(lambda: expired(again) == 5, "they are too old now")


def test_what_is_known_of_both_clocks_counts_across_boots(tmp_path: Path) -> None:
    with Opened(tmp_path, FakeClock("boot-a", 5000.0, 1.8e9), max_age_s=60) as made:
        made.fill(*many(3))
    with Opened(tmp_path, FakeClock("boot-b", 10.0, 1.8e9 + 61), max_age_s=60) as again:
        wait_for(lambda: expired(again) == 3, "they are too old")


def test_the_oldest_is_told_in_its_own_boots_time(tmp_path: Path) -> None:
    clock = FakeClock()
    with Opened(tmp_path, clock) as made:
        made.fill("a")
        clock.forward(100)
        wait_for(lambda: (made.spool.status()["oldest_s"] or 0) >= 100, "its age")
        assert made.spool.status()["oldest_s"] < 110


def test_an_age_is_never_negative() -> None:
    now = Moment("b", 10.0, 1000.0, True)
    assert age(now, "b", 20.0, 0.0, True, 0.0) == 0.0
    assert age(now, "a", 20.0, 5000.0, True, 30.0) == 0.0
    assert age(now, "a", 20.0, 400.0, True, 5.0) == 600.0
    assert age(now, "a", 20.0, 400.0, False, 5.0) == 5.0


def test_this_machines_clock_goes_forward() -> None:
    clock = Clock()
    first, second = clock.now(), clock.now()
    assert first.boot == second.boot == Clock().now().boot
    assert second.seconds >= first.seconds > 0
    assert isinstance(kernel_synced(), bool)
    assert not first.synced or first.utc >= CLOCK_PLAUSIBLE_AFTER
