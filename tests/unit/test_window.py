"""Sliding windows: which samples are in which window, and when each delivery is settled — once, and not before its time."""

from __future__ import annotations

import io
import json
import random
import time
from collections import deque
from typing import Any

import numpy as np
import pytest

from edge_serve.bundle import TensorSpec
from edge_serve.errors import InferenceError, InputError, ModelError, StoppedError
from edge_serve.frame import Capture
from edge_serve.health import Counters
from edge_serve.processing.intake import Job
from edge_serve.processing.window import FEWEST_HELD, MAX_KEY_LENGTH, WindowIntake
from edge_serve.spec import InputSpec
from tests.unit.material import Settled, tensor


class Windows:
    """An intake with its counters and its deliveries; samples of one channel are plain numbers."""

    def __init__(
        self,
        size: int = 3,
        hop: int | None = None,
        spec: TensorSpec | None = None,
        hold: int | None = None,
        **options: Any,
    ) -> None:
        self.counters = Counters()
        self.settled = Settled()
        self.intake = WindowIntake(
            InputSpec(kind="window", hop=hop, **options),
            {"x": spec or tensor((1, size, 1))},
            self.counters,
            hold,
        )

    def feed(self, payload: Any, key: str | None = None, content_type: str | None = None, **fields: Any) -> list[Job]:
        if not isinstance(payload, (bytes, np.ndarray)):
            payload = json.dumps(payload).encode()
        meta = {} if key is None else {"key": key}
        return self.intake.feed(self.settled.delivery(payload, content_type, meta=meta, **fields))

    @property
    def order(self) -> list[int]:
        return self.settled.order

    @property
    def snapshot(self) -> dict[str, Any]:
        return self.counters.snapshot()


def values(job: Job) -> list[Any]:
    found: list[Any] = job.inputs["x"].reshape(-1).tolist()
    return found


# Which samples.


def test_windows_without_overlap_follow_each_other() -> None:
    windows = Windows(size=3)
    found = [values(job) for number in range(7) for job in windows.feed(number)]
    assert found == [[0, 1, 2], [3, 4, 5]]


def test_windows_overlap_where_the_hop_is_shorter() -> None:
    windows = Windows(size=4, hop=1)
    found = [values(job) for number in range(7) for job in windows.feed(number)]
    assert found == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]


def test_samples_are_passed_over_where_the_hop_is_longer_and_settled_at_once() -> None:
    windows = Windows(size=2, hop=5)
    found = [values(job) for number in range(12) for job in windows.feed(number)]
    assert found == [[0, 1], [5, 6], [10, 11]]
    assert windows.order == [2, 3, 4, 7, 8, 9]


def test_one_payload_may_complete_several_windows_each_with_an_id_of_its_own() -> None:
    windows = Windows(size=3, hop=2)
    jobs = windows.feed(list(range(8)), id="batch")
    assert [values(job) for job in jobs] == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert [job.frame.id for job in jobs] == ["batch", "batch#1", "batch#2"]


def test_a_window_is_not_changed_by_the_samples_that_follow() -> None:
    windows = Windows(size=3, hop=1)
    (job,) = windows.feed([1, 2, 3])
    windows.feed([4, 5])
    assert values(job) == [1, 2, 3]


def test_a_window_says_its_span_its_key_and_its_last_frame() -> None:
    windows = Windows(size=2)
    windows.feed(1, "press", captured=Capture(100.0, 5.0))
    (job,) = windows.feed(2, "press", captured=Capture(101.5, 6.0))
    assert job.window is not None
    assert (job.window.start, job.window.end, job.window.samples) == (100.0, 101.5, 2)
    assert (job.key, job.frame.id, job.frame.captured.utc) == ("press", "1", 101.5)


def test_each_key_has_windows_of_its_own() -> None:
    windows = Windows(size=2)
    assert windows.feed(1, "a") == []
    assert windows.feed(10, "b") == []
    (first,) = windows.feed(2, "a")
    (second,) = windows.feed(20, "b")
    assert (values(first), values(second)) == ([1, 2], [10, 20])


def test_without_a_key_the_source_is_the_key_and_none_is_one_for_all() -> None:
    windows = Windows(size=2)
    assert windows.feed(1, source="topic/a") == []
    assert windows.feed(1, source="topic/b") == []
    assert [job.key for job in windows.feed(2, source="topic/a")] == ["topic/a"]
    together = Windows(size=2, key="none")
    assert together.feed(1, "a") == []
    assert [job.key for job in together.feed(2, "b")] == [None]


# Settling.


def test_a_sample_is_settled_when_the_last_window_that_contains_it_is() -> None:
    windows = Windows(size=3, hop=1)
    jobs = [job for number in range(5) for job in windows.feed(number)]
    first, second, third = jobs
    assert windows.order == []
    first.settle(None)
    assert windows.order == [0]
    second.settle(None)
    assert windows.order == [0, 1]
    third.settle(None)
    # 3 and 4 wait for the windows that are still to come.
    assert windows.order == [0, 1, 2]


def test_windows_may_be_settled_in_any_order() -> None:
    windows = Windows(size=3, hop=1)
    first, second, third = (job for number in range(5) for job in windows.feed(number))
    third.settle(None)
    assert windows.order == []
    second.settle(None)
    assert windows.order == []
    first.settle(None)
    assert sorted(windows.order) == [0, 1, 2]


def test_a_failure_of_any_window_is_the_failure_of_its_samples() -> None:
    windows = Windows(size=2, hop=1)
    first, second = (job for number in range(3) for job in windows.feed(number))
    failure = InferenceError("no")
    first.settle(failure)
    second.settle(None)
    assert windows.settled.outcomes == {0: failure, 1: failure}


def test_a_payload_with_samples_in_several_windows_is_settled_with_the_last_of_them() -> None:
    windows = Windows(size=2)
    jobs = windows.feed([1, 2, 3, 4, 5])
    assert len(jobs) == 2
    for job in jobs:
        job.settle(None)
    assert windows.order == []
    (last,) = windows.feed(6)
    last.settle(None)
    assert sorted(windows.order) == [0, 1]


def test_a_payload_that_is_no_sample_is_refused_before_it_is_taken_over() -> None:
    windows = Windows(size=2)
    windows.feed(1)
    with pytest.raises(InputError):
        windows.feed("x")
    (job,) = windows.feed(2)
    assert values(job) == [1, 2]
    job.settle(None)
    assert windows.order == [0, 2]


@pytest.mark.parametrize("seed", range(60))
def test_every_delivery_is_settled_once_and_exactly_when_its_last_window_is(seed: int) -> None:
    """Against a plain reckoning of which samples are in which windows, with any lengths, hops, chunks, keys and orders."""
    rng = random.Random(seed)
    length, hop = rng.randint(1, 6), rng.randint(1, 9)
    windows = Windows(length, hop)
    samples: dict[str, list[tuple[float, int]]] = {"a": [], "b": [], "c": []}
    open_jobs: list[tuple[str, int, Job]] = []
    windows_made = dict.fromkeys(samples, 0)
    settled_windows: set[tuple[str, int]] = set()
    number = 0

    def due(delivery: int) -> bool:
        for key, series in samples.items():
            for position, (_, owner) in enumerate(series):
                if owner != delivery:
                    continue
                containing = [w for w in range(position // hop + 1) if w * hop <= position < w * hop + length]
                if not all((key, w) in settled_windows for w in containing):
                    return False
        return True

    def check() -> None:
        assert set(windows.order) == {delivery for delivery in range(number) if due(delivery)}

    for _ in range(40):
        if open_jobs and rng.random() < 0.5:
            key, index, job = open_jobs.pop(rng.randrange(len(open_jobs)))
            settled_windows.add((key, index))
            job.settle(None)
        else:
            key = rng.choice(list(samples))
            chunk = [rng.randint(0, 99) for _ in range(rng.choice((1, 1, 1, 2, 5, 13)))]
            samples[key] += [(value, number) for value in chunk]
            number += 1
            for job in windows.feed(chunk if len(chunk) > 1 else chunk[0], key):
                start = windows_made[key] * hop
                assert values(job) == [value for value, _ in samples[key][start : start + length]]
                open_jobs.append((key, windows_made[key], job))
                windows_made[key] += 1
        check()
    stopped = StoppedError("stop")
    windows.intake.close(stopped)
    for _, _, job in open_jobs:
        job.settle(None)
    assert sorted(windows.order) == list(range(number))


def test_closing_settles_what_waits_and_leaves_what_is_upstream_to_its_result() -> None:
    windows = Windows(size=2, hop=1)
    (job,) = (job for number in range(2) for job in windows.feed(number))
    windows.feed(9, "other")
    stopped = StoppedError("stop")
    windows.intake.close(stopped)
    assert windows.settled.outcomes == {2: stopped}
    job.settle(None)
    # 0 was in that window only and is safe; 1 would have been in another one.
    assert windows.settled.outcomes == {2: stopped, 0: None, 1: stopped}
    windows.intake.close(stopped)


def test_a_finished_source_leaves_no_failures_behind() -> None:
    windows = Windows(size=5)
    windows.feed([1, 2])
    windows.intake.close(None)
    assert windows.settled.outcomes == {0: None}


# Keys and silence are bounded.


def test_the_key_that_was_silent_longest_makes_room_for_a_new_one() -> None:
    windows = Windows(size=3, max_keys=2)
    windows.feed(1, "a")
    windows.feed(1, "b")
    windows.feed(2, "a")
    windows.feed(1, "c")
    assert windows.order == [1]
    assert windows.snapshot["dropped"] == {"max_keys": 1}
    (job,) = windows.feed(3, "a")
    assert values(job) == [1, 2, 3]


def test_a_silent_keys_unfinished_window_is_dropped_counted_and_settled() -> None:
    windows = Windows(size=3, timeout_s=10.0)
    now = time.monotonic()
    windows.feed([1, 2], "a")
    windows.intake.tick(now + 9)
    assert windows.order == []
    windows.intake.tick(now + 11)
    assert windows.settled.outcomes == {0: None}
    assert windows.snapshot["dropped"] == {"window_timeout": 2}
    assert windows.feed(3, "a") == []


def test_samples_that_were_in_a_window_do_not_count_as_dropped() -> None:
    windows = Windows(size=3, hop=1, timeout_s=10.0)
    (job,) = windows.feed([1, 2, 3], "a")
    job.settle(None)
    windows.feed([1, 2, 3], "b")
    windows.feed(4, "c")
    windows.intake.tick(time.monotonic() + 11)
    assert windows.snapshot["dropped"] == {"window_timeout": 1}


def test_an_old_producers_time_is_no_silence() -> None:
    windows = Windows(size=3, timeout_s=10.0)
    windows.feed(1, captured=Capture.at(time.time() - 3600))
    windows.intake.tick(time.monotonic() + 1)
    assert windows.order == []


# Never a stall.


def test_the_oldest_sample_is_settled_early_and_counted_when_the_source_may_hold_no_more() -> None:
    windows = Windows(size=10, hold=4)
    for number in range(6):
        windows.feed(number)
    assert windows.order == [0, 1, 2]
    assert windows.snapshot["settled_early"] == 3


def test_nothing_is_settled_early_while_a_window_with_it_is_on_its_way_upstream() -> None:
    windows = Windows(size=3, hop=1, hold=4)
    jobs = [job for number in range(6) for job in windows.feed(number)]
    assert windows.order == []
    jobs[0].settle(None)
    assert windows.order == [0]
    assert windows.snapshot["settled_early"] == 0


def test_a_sample_whose_window_failed_is_not_called_safe_by_an_early_settling() -> None:
    windows = Windows(size=3, hop=1, hold=4)
    (job,) = (job for number in range(3) for job in windows.feed(number))
    failure = InferenceError("no")
    job.settle(failure)
    assert windows.order == [0]
    windows.feed(3, "other")
    windows.feed(4, "other")
    assert windows.settled.outcomes[1] is failure


def test_without_a_limit_nothing_is_settled_early() -> None:
    windows = Windows(size=100)
    for number in range(99):
        windows.feed(number)
    windows.intake.tick(time.monotonic() + 100)
    assert windows.order == []


@pytest.mark.parametrize(
    ("length", "hop", "limit", "keys"),
    [
        (10, 10, 4, 1),
        (10, 1, 4, 1),
        (10, 3, 1, 1),
        (50, 10, 16, 1),
        (20, 5, 16, 5),
        (3, 7, 2, 3),
        (16, 16, 16, 1),
        (17, 1, 16, 2),
    ],
)
def test_a_source_that_waits_for_acknowledgements_is_never_kept_waiting(
    length: int, hop: int, limit: int, keys: int
) -> None:
    """The source gives nothing while `limit` deliveries are not acknowledged, and acknowledgements leave in order."""
    windows = Windows(length, hop, hold=limit)
    upstream: deque[Job] = deque()
    sent, acknowledged, made = 0, 0, 0
    for _ in range(20_000):
        if sent == 600:
            break
        while acknowledged in windows.settled.outcomes:
            acknowledged += 1
        if sent - acknowledged < limit:
            jobs = windows.feed(sent, f"key-{sent % keys}")
            sent += 1
            made += len(jobs)
            upstream.extend(jobs)
        else:
            assert upstream, "the source waits for the windows, and the windows wait for the source"
            upstream.popleft().settle(None)
    assert sent == 600
    expected = sum(max(0, (600 // keys - length) // hop + 1) for _ in range(keys))
    assert made == expected


def test_a_source_that_holds_back_sooner_than_it_says_is_found_out() -> None:
    windows = Windows(size=1000, hold=500)
    for number in range(FEWEST_HELD + 2):
        windows.feed(number)
    windows.intake.tick(time.monotonic() + 0.1)
    assert windows.order == []
    windows.intake.tick(time.monotonic() + 2)
    assert windows.order == [0]
    # At once another one comes: that was what it waited for, and this many are its limit from now on.
    windows.feed(1)
    assert windows.order == [0, 1]
    windows.feed(1)
    assert windows.order == [0, 1, 2]


# What a payload holds.

THREE = tensor((1, 2, 3))
ROWS = [[1, 2, 3], [4, 5, 6]]


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "payload",
    [
        ROWS,
        [ROWS],
        {"samples": ROWS, "id": 5},
        {"x": 1, "samples": ROWS},
        {"ax": [1, 4], "ay": [2, 5], "az": [3, 6], "more": "ignored"},
        npy(ROWS),
        npy([ROWS]),
        np.array(ROWS, "<f4").tobytes(),
        np.array(ROWS, np.float64),
        np.array([ROWS], np.int16),
        b"1,2,3\n4,5,6\n",
        b"\r\n 1.0 , 2, 3\r\n\r\n4,5,6",
    ],
)
def test_every_form_gives_the_same_samples(payload: Any) -> None:
    windows = Windows(spec=THREE, channels=("ax", "ay", "az"))
    kind = "text/csv" if isinstance(payload, bytes) and b"," in payload[:8] else None
    (job,) = windows.feed(payload, content_type=kind)
    assert job.inputs["x"].tolist() == [ROWS]
    assert job.inputs["x"].dtype == np.float32


def test_single_samples_come_as_a_list_as_channels_or_as_a_line_of_csv() -> None:
    windows = Windows(spec=THREE, channels=("ax", "ay", "az"))
    assert windows.feed([1, 2, 3]) == []
    (job,) = windows.feed({"az": 6, "ax": 4, "ay": 5})
    assert job.inputs["x"].tolist() == [ROWS]
    assert windows.feed(b"az,ax,ay\n3,1,2\n", content_type="text/csv") == []
    (job,) = windows.feed(b"4,5,6", content_type="text/csv")
    assert job.inputs["x"].tolist() == [ROWS]


def test_the_columns_of_csv_without_channel_names_are_taken_as_they_stand() -> None:
    windows = Windows(spec=THREE, key="field", key_field="m", time_field="t")
    (job,) = windows.feed(b"t,a,b,c,m\n2026-01-01T00:00:00Z,1,2,3,7\n1000.5,4,5,6,7\n", content_type="text/csv")
    assert job.inputs["x"].tolist() == [ROWS]
    assert (job.key, job.frame.captured.utc, job.frame.captured.by) == ("7", 1000.5, "producer")


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "float32, little-endian"),
        (bytes(13), "a multiple of 12 bytes; the payload has 13"),
        ([1, 2], r"a sample is 3 numbers, .* the payload has shape \[2\]"),
        ([[1, 2]], r"the payload has shape \[1, 2\]"),
        ([[[1, 2, 3]], [[1, 2, 3]]], r"the payload has shape \[2, 1, 3\]"),
        ([], r"the payload has shape \[0\]"),
        ([[]], r"the payload has shape"),
        ([[1, 2, 3], [4, 5]], "samples of unequal length"),
        (5, r"the payload has shape \[\]"),
        ([["1", "2", "3"]], "the payload holds something else"),
        ([[None, 1, 2]], "the payload holds something else"),
        (b"[NaN, 1, 2]", "holds NaN, infinite or far too large values"),
        (b"[1e39, 1, 2]", "holds NaN, infinite or far too large values"),
        (b"[1e300, 1, 2]", "holds NaN, infinite or far too large values"),
        (b"[-Infinity, 1, 2]", "holds NaN, infinite or far too large values"),
        (b"{", "payload is not JSON"),
        ({"ax": 1, "ay": 2}, "sample lacks the channel 'az'; channels: ax, ay, az"),
        ({"ax": [1, 2], "ay": [1], "az": [1, 2]}, "channels of unequal length"),
        ({"ax": [1, 2], "ay": 1, "az": [1, 2]}, "channels of unequal length"),
        ({"ax": {}, "ay": 1, "az": 2}, "the payload holds something else"),
        ({"samples": "abc"}, "the payload holds something else"),
        ({"samples": {"ax": 1}}, "the payload holds something else"),
        (npy(np.array([[1, 2, 3j]])), "not supported; send numbers"),
        (npy(np.zeros((0, 3))), r"the payload has shape \[0, 3\]"),
        (b"\xff\xd8\xff\xe0", "image/jpeg does not fit this pipeline: it gathers samples of 3 numbers"),
    ],
)
def test_what_is_no_sample_is_refused(payload: Any, says: str) -> None:
    windows = Windows(spec=THREE, channels=("ax", "ay", "az"))
    with pytest.raises(InputError, match=says):
        windows.feed(payload)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "CSV without samples"),
        (b"\n\n", "CSV without samples"),
        (b"ax,ay,az\n", "CSV without samples"),
        (b"ax,ay\n1,2\n", "CSV lacks the column 'az'; it has: ax, ay"),
        (b"ax,ay,az\n1,2\n", "payload is not CSV of numbers"),
        (b"ax,ay,az\n1,2,three\n", "payload is not CSV of numbers: could not convert"),
        (b"1,2\n", r"the payload has shape \[1, 2\]"),
        (b"1,2,3\n1,2\n", "samples of unequal length"),
        (b"1,2,nan\n", "holds NaN"),
        (b"\xff,1,2\n", "payload is not CSV of numbers: 'utf-8' codec"),
        (b'"' + b"x" * 200_000 + b"\n1", "payload is not CSV of numbers: field larger than"),
    ],
)
def test_what_is_no_csv_of_samples_is_refused(payload: bytes, says: str) -> None:
    windows = Windows(spec=THREE, channels=("ax", "ay", "az"))
    with pytest.raises(InputError, match=says):
        windows.feed(payload, content_type="text/csv")


@pytest.mark.parametrize("moment", ["²", "1.2.3", "nan", "inf", "-1", "yesterday", "1e300", ""])
def test_a_time_in_csv_that_is_none_is_refused(moment: str) -> None:
    windows = Windows(spec=THREE, time_field="t")
    with pytest.raises(InputError, match="'t'"):
        windows.feed(f"t,a,b,c\n{moment},1,2,3\n".encode(), content_type="text/csv")


def test_channels_by_name_need_the_names() -> None:
    with pytest.raises(InputError, match=r"need the channels' names: channels = \[…\] under \[pipeline.input\]"):
        Windows(spec=THREE).feed({"ax": 1})


def test_a_document_may_say_its_id_and_time() -> None:
    windows = Windows(size=1, id_field="n", time_field="at")
    (job,) = windows.feed({"samples": [5], "n": "s-1", "at": "2026-01-01T00:00:00Z"})
    assert (job.frame.id, job.frame.captured.by) == ("s-1", "producer")


# Keys from the payload.


def test_the_key_may_be_a_field_of_the_document() -> None:
    windows = Windows(size=2, key="field", key_field="machine")
    windows.feed({"machine": "a", "samples": [1]})
    windows.feed({"machine": 7, "samples": [1]})
    assert [job.key for job in windows.feed({"machine": "a", "samples": [2]})] == ["a"]
    assert [job.key for job in windows.feed({"machine": 7, "samples": [2]})] == ["7"]


@pytest.mark.parametrize("key", [None, True, 1.5, [], {}, "x" * (MAX_KEY_LENGTH + 1)])
def test_a_key_that_is_none_is_refused(key: Any) -> None:
    with pytest.raises(InputError, match=r"'machine' \(the key\) must be text or a whole number"):
        Windows(size=2, key="field", key_field="machine").feed({"machine": key, "samples": [1]})


@pytest.mark.parametrize("payload", [{"samples": [1]}, [1], npy([1.0]), np.array([1.0])])
def test_a_sample_without_its_key_is_refused(payload: Any) -> None:
    with pytest.raises(InputError, match="sample lacks the field 'machine' that holds its key"):
        Windows(size=2, key="field", key_field="machine").feed(payload)


# Values.


def test_samples_are_normalized_by_channel() -> None:
    windows = Windows(spec=THREE, mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 0.5))
    (job,) = windows.feed([[3, 6, 3], [1, 2, 4]])
    assert job.inputs["x"].tolist() == [[[1, 1, 0], [0, 0, 2]]]


def test_one_mean_is_for_all_channels() -> None:
    (job,) = Windows(spec=THREE, mean=(1.0,)).feed(ROWS)
    assert job.inputs["x"].tolist() == [[[0, 1, 2], [3, 4, 5]]]


def test_samples_are_quantized_where_the_input_is() -> None:
    windows = Windows(spec=tensor((1, 2, 3), "int8", 0.5, 10), hop=1)
    (job,) = windows.feed([[0, 1, -1], [1000, -1000, 0.2]])
    assert job.inputs["x"].dtype == np.int8
    assert job.inputs["x"].tolist() == [[[10, 12, 8], [127, -128, 10]]]
    (job,) = windows.feed([3e38, 0, 0])
    assert job.inputs["x"].tolist() == [[[127, -128, 10], [127, 10, 10]]]


def test_a_sample_that_an_integer_input_cannot_hold_is_refused_alone() -> None:
    """Once, the refusal came with the whole window, after its samples were taken over, and the key was broken for good."""
    windows = Windows(spec=tensor((1, 2, 1), "int32"))
    assert windows.feed(1) == []
    with pytest.raises(InputError, match="takes int32; the values have fractions"):
        windows.feed(2.5)
    (job,) = windows.feed(3)
    assert values(job) == [1, 3]
    job.settle(None)
    assert windows.order == [0, 2]


# Layouts.


@pytest.mark.parametrize(
    ("shape", "options", "length", "channels"),
    [
        ((1, 10, 3), {}, 10, 3),
        ((-1, 10, 3), {}, 10, 3),
        ((1, 10), {}, 10, 1),
        ((1, 30), {"channels": ("a", "b", "c")}, 10, 3),
        ((1, 10, 3, 1), {}, 10, 3),
        ((1, 1, 10, 3), {}, 10, 3),
        ((1, 10, 3), {"length": 10, "channels": ("a", "b", "c")}, 10, 3),
    ],
)
def test_the_tensor_says_length_and_channels(
    shape: tuple[int, ...], options: dict[str, Any], length: int, channels: int
) -> None:
    windows = Windows(spec=tensor(shape), **options)
    assert (windows.intake.length, windows.intake.channels, windows.intake.hop) == (length, channels, length)
    (job,) = windows.feed(np.ones((length, channels)))
    assert job.inputs["x"].shape == tuple(abs(size) for size in shape)


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((10,), {}, "is no window"),
        ((2, 10, 3), {}, "is no window"),
        ((1, 4, 5, 6), {}, "is no window"),
        ((1, 10, 3), {"length": 20}, r"length = 20 does not fit the input 'x' of shape \[1, 10, 3\]"),
        ((1, 10, 3), {"channels": ("a", "b")}, "2 channels are named, the input 'x' has 3"),
        ((1, 10), {"channels": ("a", "b", "c")}, "say length and channels"),
        ((1, -1, 3), {}, "has a dynamic length"),
        ((1, -1, 3), {"length": 10}, "has a dynamic length .*; convert it with a fixed --input-shape"),
        ((1, 10, -1), {"channels": ("a", "b")}, "has a dynamic length"),
        ((1, 10, 3), {"mean": (1.0, 2.0)}, "mean has 2 numbers, a sample has 3"),
        ((1, 10, 3), {"std": (1.0, 0.0, 1.0)}, "std holds a zero"),
    ],
)
def test_a_model_or_options_that_do_not_fit_are_refused(
    shape: tuple[int, ...], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        Windows(spec=tensor(shape), **options)


def test_a_model_with_two_inputs_takes_no_windows() -> None:
    with pytest.raises(ModelError, match="kind = window takes a model with one input; this one has a, b"):
        WindowIntake(InputSpec(kind="window"), {"a": THREE, "b": THREE}, Counters())


def test_long_windows_with_a_short_hop_stay_fast() -> None:
    windows = Windows(size=1000, hop=10)
    start = time.perf_counter()
    for number in range(5000):
        for job in windows.feed(np.array([float(number)])):
            job.settle(None)
    assert time.perf_counter() - start < 5
