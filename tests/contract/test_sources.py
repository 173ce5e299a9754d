"""What every source keeps: the Source protocol's promises and the delivery contract's part of it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator

import pytest

from edge_serve.errors import SourceExhausted, TooLargeError, UnavailableError
from edge_serve.frame import Delivery
from edge_serve.health import Counters
from edge_serve.mailbox import Mailbox
from edge_serve.runner import SourceRunner
from edge_serve.sources import Source
from tests.contract.cases import SourceCase, sources_that
from tests.support import PATIENCE_S, wait_for


@contextlib.contextmanager
def connected(case: SourceCase, *payloads: bytes) -> Iterator[Source]:
    """Make and connect a source that is fed these payloads."""
    if case.finite:
        for payload in payloads:
            case.feed(payload)
    source = case.make()
    source.connect()
    try:
        with fed(case, *([] if case.finite else payloads)):
            yield source
    finally:
        source.close()


@contextlib.contextmanager
def fed(case: SourceCase, *payloads: bytes) -> Iterator[None]:
    """Feed these payloads from another thread, because a source may hold its writer back."""

    def feed() -> None:
        for payload in payloads:
            case.feed(payload)

    feeding = threading.Thread(target=feed, name="test.feeding")
    feeding.start()
    yield
    feeding.join(10)
    assert not feeding.is_alive(), "the writer is held back although everything was read"


def take(source: Source, number: int = 1, *, settle: bool = False) -> list[Delivery]:
    """Read that many deliveries."""
    found: list[Delivery] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < number:
        assert time.monotonic() < deadline, f"{len(found)} of {number} deliveries"
        delivery = source.read(0.1)
        if delivery is not None:
            found.append(delivery)
            if settle:
                delivery.settle(None)
    return found


def nothing_more(source: Source, seconds: float = 0.3) -> None:
    """Check that no further delivery comes."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            assert source.read(0.02) is None
        except SourceExhausted:
            return


def payload(number: int) -> bytes:
    """Give a payload that can be told from others."""
    return b"[%d]" % number


def test_its_options_are_a_documented_dataclass(source_case: SourceCase) -> None:
    source = source_case.make()
    assert dataclasses.is_dataclass(source.Options)
    for field in dataclasses.fields(source.Options):
        assert field.metadata.get("doc"), f"{field.name} says nowhere what it does"


def test_good_options_are_no_problem(source_case: SourceCase) -> None:
    if source_case.finite:
        source_case.feed(payload(1))
    assert source_case.check() == []


def test_it_declares_its_back_pressure(source_case: SourceCase) -> None:
    source = source_case.make()
    assert source.policy in ("latest", "lossless")
    limit = source.hold_limit
    assert limit is None or limit > 0


def test_an_input_arrives_as_a_frame(source_case: SourceCase) -> None:
    before = time.time()
    with connected(source_case, payload(7)) as source:
        (delivery,) = take(source)
        frame = delivery.frame
        assert bytes(frame.payload) == payload(7)
        assert frame.error is None
        assert frame.content_type in (None, source_case.content_type)
        assert isinstance(frame.id, str)
        assert 0 < len(frame.id) <= 256
        assert frame.source
        assert before - 1 <= frame.captured.utc <= time.time() + 1
        assert frame.captured.monotonic <= time.monotonic()
        delivery.settle(None)


@sources_that(lambda case: not case.finite)
def test_nothing_to_read_is_none_within_the_time_out(source_case: SourceCase) -> None:
    with connected(source_case) as source:
        start = time.monotonic()
        assert source.read(0.2) is None
        assert 0.1 <= time.monotonic() - start < 2


def test_inputs_keep_their_order(source_case: SourceCase) -> None:
    number = 200
    with connected(source_case, *(payload(n) for n in range(number))) as source:
        found = take(source, number, settle=True)
        assert [bytes(each.frame.payload) for each in found] == [payload(n) for n in range(number)]


def test_two_equal_readings_are_two_frames(source_case: SourceCase) -> None:
    with connected(source_case, b"[1]", b"[1]") as source:
        first, second = take(source, 2)
        assert first.frame.id != second.frame.id


@sources_that(lambda case: case.names_ids)
def test_the_producers_id_is_the_frames(source_case: SourceCase) -> None:
    with connected(source_case) as source:
        source_case.feed(payload(1), "press-3/ß🙂/17")
        assert take(source)[0].frame.id == "press-3/ß🙂/17"


def test_an_input_over_the_limit_is_told_and_harms_no_other(source_case: SourceCase) -> None:
    big = b'"' + b"x" * (300 * 1024) + b'"'
    with connected(source_case, payload(1), big, payload(2)) as source:
        first, over, second = take(source, 3, settle=True)
        assert isinstance(over.frame.error, TooLargeError)
        assert str(source_case.limit) in str(over.frame.error)
        assert len(over.frame.payload) == 0, "what is over the limit is not kept"
        assert over.frame.id
        assert [bytes(each.frame.payload) for each in (first, second)] == [payload(1), payload(2)]
        assert first.frame.error is None
        assert second.frame.error is None


def test_an_empty_input_is_an_input_or_none_but_no_end(source_case: SourceCase) -> None:
    with connected(source_case, b"", payload(2)) as source:
        found = take(source)
        if bytes(found[0].frame.payload) == b"":
            found = take(source)
        assert bytes(found[0].frame.payload) == payload(2)


def test_it_waits_for_nobody_who_settles_late(source_case: SourceCase) -> None:
    limit = source_case.make().hold_limit
    number = 5 if limit is None else min(5, limit)
    with connected(source_case, *(payload(n) for n in range(number))) as source:
        found = take(source, number)
        for delivery in reversed(found):
            delivery.settle(None)


@sources_that(lambda case: case.bounded)
def test_no_more_is_unsettled_than_it_says(source_case: SourceCase) -> None:
    limit = source_case.make().hold_limit
    assert limit is not None
    with connected(source_case, *(payload(n) for n in range(4 * limit))) as source:
        held = take(source, limit)
        nothing_more(source)
        for _ in range(limit if source_case.counts_unsettled else 0):
            held.pop(0).settle(None)
            held += take(source)
            nothing_more(source, 0.05)
        for delivery in held:
            delivery.settle(None)
        take(source, (2 if source_case.counts_unsettled else 3) * limit, settle=True)


def test_deliveries_may_be_settled_from_any_thread(source_case: SourceCase) -> None:
    number = 60
    with connected(source_case, *(payload(n) for n in range(number))) as source:
        threads = []
        for _ in range(number):
            (delivery,) = take(source)
            thread = threading.Thread(target=delivery.settle, args=(None,))
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join()


def test_a_failed_settlement_stops_nothing(source_case: SourceCase) -> None:
    with connected(source_case, payload(1), payload(2)) as source:
        first, second = take(source, 2)
        first.settle(UnavailableError("upstream is away"))
        assert bytes(second.frame.payload) == payload(2)
        second.settle(None)


def test_it_closes_twice_and_settling_afterwards_does_nothing(source_case: SourceCase) -> None:
    with connected(source_case, payload(1), payload(2)) as source:
        first, second = take(source, 2)
        source.close()
        source.close()
        first.settle(None)
        second.settle(UnavailableError("upstream is away"))
        if first.reply is not None:
            first.reply([])


def test_it_closes_without_having_been_connected(source_case: SourceCase) -> None:
    source_case.make().close()


def test_it_connects_again_after_a_close(source_case: SourceCase) -> None:
    with connected(source_case, payload(1)) as source:
        take(source, settle=True)
        source.close()
        source_case.close_client()
        source.connect()
        if not source_case.finite:
            source_case.feed(payload(2))
        take(source, settle=True)


def test_a_start_that_cannot_work_says_so(source_case: SourceCase) -> None:
    source_case.break_start()
    source = source_case.make()
    with pytest.raises(UnavailableError) as caught:
        source.connect()
    assert len(str(caught.value)) > 20, "a message says what, where and why"
    source.close()


@sources_that(lambda case: case.survives_loss)
def test_a_lost_connection_is_told_and_comes_back(source_case: SourceCase) -> None:
    with connected(source_case, payload(1)) as source:
        take(source, settle=True)
        source_case.lose()
        with pytest.raises(UnavailableError):
            wait_for(lambda: source.read(0.05) and False, "the loss")
        with pytest.raises(UnavailableError):
            source.connect()
        source_case.restore()
        source.connect()
        source_case.feed(payload(2))
        # The first may come again: its acknowledgement was perhaps still on its way.
        while bytes((found := take(source, settle=True)[0]).frame.payload) != payload(2):
            assert bytes(found.frame.payload) == payload(1)


@sources_that(lambda case: case.redelivers)
def test_what_was_not_settled_comes_again_with_the_same_id(source_case: SourceCase) -> None:
    with connected(source_case, payload(1), payload(2), payload(3)) as source:
        first, second, third = take(source, 3)
        first.settle(None)
        third.settle(UnavailableError("upstream is away"))
        time.sleep(0.1)  # the acknowledgement is on its way
        source.close()
    # A new process knows nothing of the old one's deliveries.
    with contextlib.closing(source_case.make()) as anew:
        anew.connect()
        again = take(anew, 2, settle=True)
        assert [bytes(each.frame.payload) for each in again] == [payload(2), payload(3)]
        assert [each.frame.id for each in again] == [second.frame.id, third.frame.id]
        nothing_more(anew)


@sources_that(lambda case: case.redelivers)
def test_what_came_while_it_was_away_is_not_lost(source_case: SourceCase) -> None:
    with connected(source_case, payload(1)) as source:
        take(source, settle=True)
        source.close()
        for number in range(2, 12):
            source_case.feed(payload(number))
        source.connect()
        found = take(source, 10, settle=True)
        assert [bytes(each.frame.payload) for each in found] == [payload(number) for number in range(2, 12)]


@sources_that(lambda case: case.finite)
def test_a_finite_source_says_that_it_has_ended_and_stays_so(source_case: SourceCase) -> None:
    with connected(source_case, payload(1)) as source:
        take(source)
        for _ in range(3):
            with pytest.raises(SourceExhausted):
                source.read(0.05)


def test_its_threads_have_names_and_end_with_it(source_case: SourceCase) -> None:
    before = set(threading.enumerate())
    with connected(source_case, payload(1)) as source:
        take(source, settle=True)
        for thread in set(threading.enumerate()) - before:
            assert not thread.name.startswith(("Thread-", "paho")), f"{thread.name} says nothing to who looks at it"
    wait_for(
        lambda: not [t for t in threading.enumerate() if t not in before and not t.name.startswith("test.")],
        "its threads have ended",
    )


def test_the_runner_hands_on_every_input(source_case: SourceCase) -> None:
    number = 50
    failures: list[BaseException] = []
    if source_case.finite:
        for each in range(number):
            source_case.feed(payload(each))
    counters = Counters()
    source = source_case.make()
    mailbox = Mailbox("lossless", counters, items=4)
    runner = SourceRunner("line", source, mailbox, counters, failures.append)
    runner.start()
    assert runner.connected.wait(10)
    found: list[bytes] = []
    deadline = time.monotonic() + PATIENCE_S
    with fed(source_case, *([] if source_case.finite else [payload(each) for each in range(number)])):
        while len(found) < number:
            assert time.monotonic() < deadline, f"{len(found)} of {number} deliveries"
            delivery = mailbox.take(0.1)
            if delivery is not None:
                found.append(bytes(delivery.frame.payload))
                delivery.settle(None)
    runner.stop_reading(time.monotonic() + 5)
    runner.close()
    assert found == [payload(each) for each in range(number)]
    assert counters.snapshot()["in"] == number
    assert not failures
