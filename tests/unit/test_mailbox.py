"""The hand-off between two threads: nothing is lost, nothing overflows, nobody waits for ever."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from edge_serve.errors import DroppedError, StoppedError
from edge_serve.frame import Delivery
from edge_serve.health import Counters
from edge_serve.mailbox import Mailbox, Policy, payload_bytes
from tests.unit.material import Settled


def box(policy: Policy = "lossless", **limits: int) -> tuple[Mailbox, Counters]:
    counters = Counters()
    return Mailbox(policy, counters, **limits), counters


def identity(delivery: Delivery | None) -> int:
    assert delivery is not None
    return int(delivery.frame.id)


def test_what_is_put_comes_out_in_order() -> None:
    mailbox, _ = box()
    settled = Settled()
    for _ in range(5):
        assert mailbox.put(settled.delivery(b"x"), 0)
    assert [identity(mailbox.take(0)) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert settled.order == []


def test_taking_from_an_empty_box_waits_and_gives_nothing() -> None:
    mailbox, _ = box()
    start = time.monotonic()
    assert mailbox.take(0.05) is None
    assert time.monotonic() - start >= 0.05
    assert not mailbox.drained


def test_a_full_lossless_box_refuses_and_the_putter_still_has_the_frame() -> None:
    mailbox, counters = box(items=2)
    settled = Settled()
    assert mailbox.put(settled.delivery(b""), 0)
    assert mailbox.put(settled.delivery(b""), 0)
    third = settled.delivery(b"")
    assert not mailbox.put(third, 0.02)
    mailbox.take(0)
    assert mailbox.put(third, 0)
    assert settled.order == []
    assert counters.snapshot()["dropped"] == {}


def test_a_lossless_box_is_bounded_in_bytes_too() -> None:
    mailbox, _ = box(items=100, limit_bytes=10)
    settled = Settled()
    assert mailbox.put(settled.delivery(b"x" * 6), 0)
    assert not mailbox.put(settled.delivery(b"x" * 5), 0)
    assert mailbox.put(settled.delivery(b"x" * 4), 0)


def test_one_frame_always_fits_whatever_its_size() -> None:
    mailbox, _ = box(limit_bytes=10)
    settled = Settled()
    assert mailbox.put(settled.delivery(b"x" * 1000), 0)
    assert not mailbox.put(settled.delivery(b""), 0)


def test_the_newest_frame_wins_and_each_one_it_replaces_is_settled_and_counted() -> None:
    mailbox, counters = box("latest")
    settled = Settled()
    for _ in range(4):
        assert mailbox.put(settled.delivery(b"x"), 0)
    assert identity(mailbox.take(0)) == 3
    assert settled.order == [0, 1, 2]
    assert all(isinstance(settled.outcomes[number], DroppedError) for number in range(3))
    assert counters.snapshot()["dropped"] == {"latest": 3}


def test_settling_a_replaced_frame_may_use_the_box_again() -> None:
    """A source may hand on its next frame from inside settle: no lock is held then."""
    mailbox, _ = box("latest")
    again: list[bool] = []
    settled = Settled()
    first = settled.delivery(b"")
    first.settle = lambda _error: again.append(mailbox.take(0) is not None)
    mailbox.put(first, 0)
    mailbox.put(settled.delivery(b""), 0)
    assert again == [True]


def test_arrays_count_with_their_memory() -> None:
    settled = Settled()
    assert payload_bytes(settled.delivery(np.zeros((4, 5), np.float32))) == 80
    assert payload_bytes(settled.delivery(memoryview(b"abc"))) == 3


def test_a_waiting_putter_goes_on_when_there_is_room() -> None:
    mailbox, _ = box(items=1)
    settled = Settled()
    mailbox.put(settled.delivery(b""), 0)
    done = threading.Event()

    def put() -> None:
        assert mailbox.put(settled.delivery(b""), 10)
        done.set()

    thread = threading.Thread(target=put)
    thread.start()
    assert not done.wait(0.05)
    mailbox.take(0)
    assert done.wait(5)
    thread.join()


def test_the_end_lets_out_what_is_inside_and_then_says_so() -> None:
    mailbox, _ = box()
    mailbox.put(Settled().delivery(b""), 0)
    mailbox.end()
    states = [mailbox.drained, mailbox.take(0) is not None, mailbox.drained]
    assert states == [False, True, True]
    assert mailbox.take(10) is None


def test_the_end_wakes_who_waits_for_a_frame() -> None:
    mailbox, _ = box()
    threading.Timer(0.05, mailbox.end).start()
    start = time.monotonic()
    assert mailbox.take(10) is None
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("policy", ["lossless", "latest"])
def test_a_closed_box_settles_what_is_inside_and_what_still_comes(policy: Policy) -> None:
    mailbox, _ = box(policy)
    settled = Settled()
    mailbox.put(settled.delivery(b""), 0)
    mailbox.close()
    assert mailbox.put(settled.delivery(b""), 0)
    assert settled.order == [0, 1]
    assert all(isinstance(error, StoppedError) for error in settled.outcomes.values())
    assert mailbox.take(0) is None
    assert mailbox.drained


def test_closing_wakes_a_putter_that_waits() -> None:
    mailbox, _ = box(items=1)
    settled = Settled()
    mailbox.put(settled.delivery(b""), 0)
    threading.Timer(0.05, mailbox.close).start()
    assert mailbox.put(settled.delivery(b""), 10)
    assert set(settled.order) == {0, 1}


def test_several_threads_on_both_sides_lose_and_double_nothing() -> None:
    mailbox, _ = box(items=3, limit_bytes=50)
    settled = Settled()
    waiting = [[settled.delivery(b"x" * (number % 60)) for number in range(300)] for _ in range(3)]
    taken: list[int] = []
    lock = threading.Lock()

    def put(deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            while not mailbox.put(delivery, 0.5):
                pass

    def take() -> None:
        while not mailbox.drained:
            delivery = mailbox.take(0.5)
            if delivery is not None:
                with lock:
                    taken.append(identity(delivery))

    putters = [threading.Thread(target=put, args=(each,)) for each in waiting]
    takers = [threading.Thread(target=take) for _ in range(3)]
    for thread in putters + takers:
        thread.start()
    for thread in putters:
        thread.join()
    mailbox.end()
    for thread in takers:
        thread.join()
    assert sorted(taken) == list(range(900))


# Offering, and working in the thread that offers.


def test_what_is_offered_is_taken_as_far_as_there_is_room() -> None:
    mailbox, counters = box(items=3)
    settled = Settled()
    deliveries = [settled.delivery(b"") for _ in range(5)]
    assert mailbox.offer(deliveries) == 3
    assert mailbox.offer(deliveries[3:]) == 0
    assert counters.snapshot()["in"] == 3
    assert [identity(mailbox.take(0)) for _ in range(3)] == [0, 1, 2]
    assert mailbox.offer(deliveries[3:]) == 2
    assert settled.order == [], "what was not taken is the offerer's"


def test_of_what_is_offered_together_the_newest_wins_where_the_policy_says_so() -> None:
    mailbox, counters = box("latest")
    settled = Settled()
    assert mailbox.offer([settled.delivery(b"") for _ in range(4)]) == 4
    assert identity(mailbox.take(0)) == 3
    assert counters.snapshot()["in"] == 4
    assert counters.snapshot()["dropped"] == {"latest": 3}
    assert [type(settled.outcomes[number]) for number in range(3)] == [DroppedError] * 3


def test_an_offer_to_an_ended_box_is_not_taken() -> None:
    mailbox, _ = box()
    mailbox.end()
    assert mailbox.offer([Settled().delivery(b"")]) == 0
    assert not mailbox.claim()


def test_an_offer_wakes_up_whoever_waits() -> None:
    mailbox, _ = box()
    found: list[Delivery | None] = []
    thread = threading.Thread(target=lambda: found.append(mailbox.take(5)))
    thread.start()
    while not mailbox._readers:
        time.sleep(0.001)
    assert mailbox.offer([Settled().delivery(b"x")]) == 1
    thread.join(5)
    assert identity(found[0]) == 0


def test_a_helper_works_before_anything_is_put() -> None:
    mailbox, counters = box()
    helped: list[int] = []

    def helper(deliveries: object) -> int:
        assert mailbox.claim()
        assert not mailbox.claim(), "there is one claim at a time"
        assert mailbox.take(0) is None, "nobody else works meanwhile"
        helped.extend(identity(each) for each in list(deliveries)[:2])  # type: ignore[call-overload]
        mailbox.release()
        return 2

    mailbox.helper = helper
    settled = Settled()
    assert mailbox.offer([settled.delivery(b"") for _ in range(3)]) == 3
    assert helped == [0, 1]
    assert identity(mailbox.take(0)) == 2
    assert counters.snapshot()["in"] == 1, "a helper counts what it takes"


def test_nobody_helps_past_what_waits_or_is_in_work() -> None:
    mailbox, _ = box()
    settled = Settled()
    assert mailbox.claim()
    mailbox.release()
    mailbox.offer([settled.delivery(b""), settled.delivery(b"")])
    assert not mailbox.claim(), "two wait"
    mailbox.take(0)
    mailbox.take(0)
    assert not mailbox.claim(), "two are in work"
    mailbox.worked()
    assert not mailbox.claim()
    mailbox.worked()
    assert mailbox.claim()


def test_a_box_is_not_drained_while_somebody_has_a_claim() -> None:
    mailbox, _ = box()
    assert mailbox.claim()
    mailbox.end()
    assert not mailbox.drained
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(mailbox.take(5) is None))
    thread.start()
    time.sleep(0.02)
    assert not done
    mailbox.release()
    thread.join(5)
    assert done == [True]
    assert mailbox.drained
