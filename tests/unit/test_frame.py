"""Frames and results: times, and the JSON document that other people's programs read."""

from __future__ import annotations

import json
import time

import pytest

from edge_serve.frame import Capture, ModelInfo, Result, ResultError, Window, format_time, parse_time
from tests.unit.material import frame, result


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:00:00Z", 0.0),
        ("2026-11-22T15:04:05Z", 1795359845.0),
        ("2026-11-22t15:04:05z", 1795359845.0),
        ("2026-11-22 15:04:05+00:00", 1795359845.0),
        ("2026-11-22T17:04:05+02:00", 1795359845.0),
        ("2026-11-22T15:04:05.5Z", 1795359845.5),
        ("2026-11-22T15:04:05.123456Z", 1795359845.123456),
        ("2026-11-22T15:04:05.123456789Z", 1795359845.123456),
        ("1969-12-31T23:59:59Z", -1.0),
    ],
)
def test_rfc_3339_times_are_read_with_any_number_of_digits(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yesterday",
        "2026-11-22",
        "2026-11-22T15:04:05",
        "2026-11-22T15:04Z",
        "20261122T150405Z",
        "2026-11-22T15:04:05+0200",
        "2026-11-22T15:04:05+25:00",
        "2026-13-22T15:04:05Z",
        "2026-11-22T15:04:60Z",
        "2026-11-22T15:04:05.Z",
        "\uff12026-11-22T15:04:05Z",
        "2026-11-22T15:04:05Z\n",
    ],
)
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_time(text)


@pytest.mark.parametrize(
    "text", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "9999-12-31T23:59:59.9999999Z"]
)
def test_a_time_that_could_not_be_written_again_is_refused(text: str) -> None:
    """Else one payload with it would stop every sink."""
    try:
        seconds = parse_time(text)
    except ValueError:
        return
    format_time(seconds)


def test_times_are_written_in_utc_with_microseconds() -> None:
    assert format_time(1795359845.123456) == "2026-11-22T15:04:05.123456Z"
    assert format_time(-62135596800.0) == "0001-01-01T00:00:00.000000Z"
    assert parse_time(format_time(1795359845.25)) == 1795359845.25


def test_a_producers_time_is_placed_on_this_machines_monotonic_clock() -> None:
    captured = Capture.at(time.time() - 10)
    assert captured.by == "producer"
    assert 9.9 < time.monotonic() - captured.monotonic < 10.5


def test_a_producers_clock_that_goes_ahead_makes_no_negative_age() -> None:
    captured = Capture.at(time.time() + 3600)
    assert time.monotonic() - captured.monotonic >= 0
    assert captured.utc > time.time() + 3000


def test_a_result_is_the_documented_document() -> None:
    document = json.loads(
        result(
            captured=Capture(1795359845.123456, time.monotonic() - 0.0124, "producer"),
            timings={"wait": 0.1, "process": 0.40004, "invoke": 3.6, "decode": 0.1},
        ).to_json()
    )
    assert 12.4 <= document.pop("age_ms") < 1000
    assert document == {
        "v": 1,
        "id": "f1",
        "device": "bench",
        "pipeline": "one",
        "source": "test",
        "key": None,
        "captured_at": "2026-11-22T15:04:05.123456Z",
        "captured_by": "producer",
        "clock": "ok",
        "model": {
            "name": "linear",
            "version": 3,
            "variant": "float32",
            "delegate": "xnnpack",
            "signature": "serving_default",
        },
        "timings_ms": {"wait": 0.1, "process": 0.4, "invoke": 3.6, "decode": 0.1},
        "type": "classification",
        "result": {"classes": [{"index": 2, "label": "worn", "score": 0.93}]},
    }


def test_a_window_adds_its_span_and_its_key() -> None:
    document = result(key="press-3", window=Window(0.0, 1.5, 16)).to_dict()
    assert document["key"] == "press-3"
    assert document["window"] == {"from": format_time(0.0), "to": format_time(1.5), "samples": 16}


def test_a_failure_has_an_error_in_the_place_of_the_result() -> None:
    document = result(decoded=None, error=ResultError("bad_input", "no picture")).to_dict()
    assert document["error"] == {"code": "bad_input", "message": "no picture"}
    assert "result" not in document


def test_a_clock_that_was_never_set_is_said_to_be_unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert result().to_dict()["clock"] == "ok"
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    assert result().to_dict()["clock"] == "unsynced"


def test_text_is_utf_8_without_white_space_and_other_alphabets_stay_readable() -> None:
    data = result(frame_id="größe-読").to_json()
    assert '"id":"größe-読"'.encode() in data


def test_half_characters_of_file_names_and_json_escapes_never_stop_a_sink() -> None:
    text = result(frame_id="photo-\udcff.jpg", key="\ud800", source="\udfff").to_json().decode()
    assert json.loads(text)["id"] == "photo-?.jpg"


def test_a_frame_cannot_be_changed_on_its_way() -> None:
    with pytest.raises(AttributeError):
        frame(b"").payload = b"x"  # type: ignore[misc]


@pytest.mark.parametrize("identity", ["1389-05e8", 'quo"te\\\n\x00\x7f', "ünï ☃", "half \ud800"])
@pytest.mark.parametrize("key", [None, 'ke"y'])
@pytest.mark.parametrize(
    "timings", [{}, {"wait": 0.12345, "process": 12.0, "invoke": 3.6, "decode": 0.0004}, {"own": 1.0, "wait": 2.0}]
)
def test_the_written_document_says_what_the_table_says(
    identity: str, key: str | None, timings: dict[str, float]
) -> None:
    result = Result(
        identity, "press-3", 'pipe"line', "plant/ä", Capture(1_767_225_600.123456, time.monotonic(), "producer"),
        ModelInfo('mo"del', 3, "int8", "xnnpack", "serving_default"), "tensor",
        {"tensors": {"y": {"dtype": "float32", "shape": [1, 2], "data": [[0.1, None]]}}}, {}, timings, key,
    )  # fmt: skip
    written = json.loads(result.to_json())
    table = json.loads(json.dumps(result.to_dict(), ensure_ascii=False).encode(errors="replace"))
    assert list(written) == list(table), "the same names in the same order"
    assert written.pop("age_ms") == pytest.approx(table.pop("age_ms"), abs=50)
    assert written == table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "1970-01-01T00:00:00.000000Z"),
        (1_767_225_599.9999996, "2026-01-01T00:00:00.000000Z"),
        (-1.5, "1969-12-31T23:59:58.500000Z"),
        (1_767_225_600.000001, "2026-01-01T00:00:00.000001Z"),
    ],
)
def test_times_are_written_with_microseconds(seconds: float, text: str) -> None:
    assert format_time(seconds) == text
    assert format_time(seconds) == text, "again, from what was kept"
