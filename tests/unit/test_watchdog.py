"""Signs of life: who ticks is fresh, who is silent is found with its stack, and nobody is blamed for a stopped process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from edge_serve import watchdog
from edge_serve.watchdog import Heartbeat, Watch
from tests.support import wait_for


@contextmanager
def watched(name: str, allowed: float, work: Callable[[Heartbeat, threading.Event], None]) -> Iterator[threading.Event]:
    """Run a watched thread until the end of the block; gives the event by which it is told to end."""
    over, began = threading.Event(), threading.Event()

    def run() -> None:
        beat = watchdog.begin(name, allowed)
        began.set()
        try:
            work(beat, over)
        finally:
            beat.end()

    thread = threading.Thread(target=run, name=f"thread of {name}")
    thread.start()
    assert began.wait(5)
    try:
        yield over
    finally:
        over.set()
        thread.join(5)


def hang(_beat: Heartbeat, over: threading.Event) -> None:
    """Wait for ever, as a call into a broken driver does."""
    over.wait()


def names(beats: list[Heartbeat]) -> list[str]:
    """Name heartbeats, without those that other tests' services may have left to their end."""
    return [beat.name for beat in beats if beat.name.startswith("test.")]


def test_a_thread_that_ticks_is_never_silent() -> None:
    def work(beat: Heartbeat, over: threading.Event) -> None:
        while not over.wait(0.01):
            beat.tick()

    with watched("test.busy", 0.2, work):
        for _ in range(30):
            assert names(watchdog.silent()) == []
            time.sleep(0.01)


def test_a_thread_that_hangs_is_found_by_name_and_stack() -> None:
    with watched("test.stuck", 0.05, hang):
        (beat,) = wait_for(lambda: [b for b in watchdog.silent() if b.name == "test.stuck"], "it is silent")
        assert beat.silence() > 0.05
        assert "in hang" in watchdog.stack(beat.thread)
    assert watchdog.stack(beat.thread) == ""


def test_a_share_of_the_time_finds_it_earlier() -> None:
    with watched("test.stuck", 3600, hang):
        assert names(watchdog.silent()) == []
        assert names(watchdog.silent(0.0)) == ["test.stuck"]


def test_what_may_take_longer_is_allowed_more_only_while_it_lasts() -> None:
    def work(beat: Heartbeat, over: threading.Event) -> None:
        with beat.allowing(3600):
            connecting.wait(5)
        over.wait()

    connecting = threading.Event()
    with watched("test.connecting", 0.05, work):
        time.sleep(0.1)
        assert names(watchdog.silent()) == []
        connecting.set()
        wait_for(lambda: names(watchdog.silent()) == ["test.connecting"], "it is silent after that")


def test_an_allowance_never_shortens_the_usual_time() -> None:
    beat = Heartbeat("x", 30.0)
    with beat.allowing(1.0):
        assert beat.allowed == 30.0


def test_a_thread_that_ended_is_watched_no_longer() -> None:
    def die(_beat: Heartbeat, _over: threading.Event) -> None:
        """End at once."""

    with watched("test.short", 0.0, die):
        wait_for(lambda: names(watchdog.beats()) == [], "it is gone")


def test_a_thread_that_died_without_a_word_is_watched_no_longer() -> None:
    thread = threading.Thread(target=lambda: watchdog.begin("test.dead", 0.0))
    thread.start()
    thread.join()
    assert names(watchdog.beats()) == []


def test_the_calling_threads_own_heart_beats() -> None:
    def work(beat: Heartbeat, over: threading.Event) -> None:
        while not over.wait(0.01):
            watchdog.tick()

    with watched("test.waiting", 0.2, work):
        time.sleep(0.4)
        assert names(watchdog.silent()) == []
    watchdog.tick()  # of a thread that nobody watches


def test_a_heart_without_a_name_has_its_threads() -> None:
    with watched("", 10.0, hang):
        assert "thread of " in [beat.name for beat in watchdog.beats()]


def test_a_watch_tells_each_silence_once_and_again_when_it_comes_back() -> None:
    watch = Watch()
    again = threading.Event()

    def work(beat: Heartbeat, over: threading.Event) -> None:
        again.wait(5)
        beat.tick()
        over.wait()

    with watched("test.stuck", 0.05, work):
        time.sleep(0.1)
        found, new = watch.look()
        assert names(found) == names(new) == ["test.stuck"]
        found, new = watch.look()
        assert (names(found), names(new)) == (["test.stuck"], [])
        again.set()
        wait_for(lambda: names(watch.look()[0]) == [], "it goes on")
        time.sleep(0.1)
        assert names(watch.look()[1]) == ["test.stuck"]


def test_nobody_is_blamed_for_a_process_that_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PAUSE_S", 0.1)
    watch = Watch()
    with watched("test.paused", 0.05, hang):
        time.sleep(0.2)  # longer than whoever looks ever takes: as if the process had been stopped
        assert names(watch.look()[0]) == []
        time.sleep(0.08)
        assert names(watch.look()[0]) == ["test.paused"], "but for the silence after that"
