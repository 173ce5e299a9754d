"""What travels: a Frame comes in, a Result goes out, a Delivery carries the duty to settle the frame."""

from __future__ import annotations

import json
import re
import time
from binascii import b2a_base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal

from edge_serve.errors import QuarantinedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.generic]

# A clock before this date was never set: small boards without a battery start in 1970 or at the image's build date.
CLOCK_PLAUSIBLE_AFTER = datetime(2026, 1, 1, tzinfo=timezone.utc).timestamp()

# What datetime can write; an offset from UTC may lead out of it.
EARLIEST = datetime(1, 1, 1, tzinfo=timezone.utc).timestamp()
LATEST = 253402300800.0
_RFC_3339 = re.compile(
    r"(?P<date>\d{4}-\d\d-\d\d)[Tt ](?P<time>\d\d:\d\d:\d\d)(?:\.(?P<fraction>\d+))?(?P<zone>[Zz]|[+-]\d\d:\d\d)",
    re.ASCII,
)


_quote = json.encoder.encode_basestring
_to_text = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
_TIMINGS = ("wait", "process", "invoke", "decode")
_second_told: tuple[int, str] = (0, "1970-01-01T00:00:00")


def format_time(seconds: float) -> str:
    """Give UTC seconds since the epoch as RFC 3339 text with microseconds and a Z."""
    global _second_told  # most of the times that are told are of the same second
    whole, micros = divmod(round(seconds * 1_000_000), 1_000_000)
    told, text = _second_told
    if whole != told:
        text = datetime.fromtimestamp(whole, timezone.utc).isoformat(timespec="seconds").removesuffix("+00:00")
        _second_told = (whole, text)
    return f"{text}.{micros:06d}Z"


def _write_timings(timings: Mapping[str, float]) -> str:
    if tuple(timings) == _TIMINGS:
        # Half the time of an f-string for each: this is written for every result.
        return '"wait":%.3f,"process":%.3f,"invoke":%.3f,"decode":%.3f' % tuple(timings.values())  # noqa: UP031
    return ",".join([f"{_quote(stage)}:{value:.3f}" for stage, value in timings.items()])


def parse_time(text: str) -> float:
    """Read RFC 3339 text (an offset or Z is required) as UTC seconds since the epoch; ValueError if it is not that."""
    match = _RFC_3339.fullmatch(text)
    if match is None:
        raise ValueError(f"no RFC 3339 time with a zone: {text[:40]!r}")
    # Python 3.10 reads no other fractions than of 3 or 6 digits.
    fraction = (match["fraction"] or "0")[:6].ljust(6, "0")
    zone = "+00:00" if match["zone"] in "Zz" else match["zone"]
    seconds = datetime.fromisoformat(f"{match['date']}T{match['time']}.{fraction}{zone}").timestamp()
    if not EARLIEST <= seconds < LATEST:
        raise ValueError(f"time outside of the years 1 to 9999: {text[:40]!r}")
    return seconds


@dataclass(frozen=True, slots=True)
class Capture:
    """When an input was captured: UTC seconds, the monotonic twin that latency is measured with, and who said so."""

    utc: float
    monotonic: float
    by: Literal["producer", "arrival"] = "arrival"

    @classmethod
    def now(cls) -> Capture:
        """Take this moment as the moment of capture."""
        return cls(time.time(), time.monotonic())

    @classmethod
    def at(cls, utc: float) -> Capture:
        """Take the producer's time; its monotonic twin is placed by this machine's clock, never in the future."""
        age = max(0.0, time.time() - utc)
        return cls(utc, time.monotonic() - age, "producer")


@dataclass(frozen=True, slots=True)
class Frame:
    """One input as it arrived. `payload` is never copied without need; `meta` holds what only some sources know.

    Keys of `meta` in use: "topic" (MQTT), "key" (the window's key, where the source knows it).
    """

    id: str
    source: str
    captured: Capture
    content_type: str | None
    payload: Any
    meta: Mapping[str, Any] = field(default_factory=dict)
    error: Exception | None = None
    """Set where the source already knows that this input cannot be used (for example: over its size limit)."""


Settle = Callable[["Exception | None"], None]
Reply = Callable[["Sequence[Result]"], None]


@dataclass(slots=True)
class Delivery:
    """A frame and two duties: `settle` is called exactly once; `reply`, where there is one, answers the requester.

    `settle(None)` says that the input is safe (its result is upstream); `settle(error)` says that it is not, and leaves
    a source that can redeliver free to do so. `reply` is called at most once, as soon as the frame is processed, with
    all results that it led to (none for a sample that completed no window). Both may be called from any thread.
    """

    frame: Frame
    settle: Settle
    reply: Reply | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which model made a result."""

    name: str
    version: int | None
    variant: str
    delegate: str
    signature: str
    json: str = field(init=False, repr=False, compare=False)
    """The same as a JSON object, written once: it is part of every result."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "json", _to_text(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Give the part of a result's document that names the model."""
        return {
            "name": self.name,
            "version": self.version,
            "variant": self.variant,
            "delegate": self.delegate,
            "signature": self.signature,
        }


@dataclass(frozen=True, slots=True)
class ResultError:
    """Why an input has no result: a code of the closed list in the README, and a sentence."""

    code: str
    message: str
    payload: bytes | None = None
    """The beginning of the payload, where the configuration asks for it (error_payload_bytes)."""


@dataclass(frozen=True, slots=True)
class Window:
    """The span that a window's result speaks of: UTC seconds of its first and last sample, and their number."""

    start: float
    end: float
    samples: int


@dataclass(frozen=True, slots=True)
class Result:
    """What a pipeline says of one frame (or window); every sink renders it in its own way.

    `outputs` are the model's output tensors by name, as the interpreter gave them; `decoded` is the JSON-ready body of
    `type`. Where `error` is set, both are empty.
    """

    frame_id: str
    device: str
    pipeline: str
    source: str
    captured: Capture
    model: ModelInfo
    type: str
    decoded: Mapping[str, Any] | None
    outputs: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds per stage: wait, process, invoke, decode."""
    key: str | None = None
    window: Window | None = None
    error: ResultError | None = None

    @property
    def quarantined(self) -> bool:
        """Say whether the input was not run, because it had killed the process before."""
        return self.error is not None and self.error.code == QuarantinedError.code

    def to_json(self) -> bytes:
        """Give the document as UTF-8 JSON without white space."""
        if self.window is not None or self.error is not None:
            text = _to_text(self.to_dict())
        else:
            # What `to_dict` says, written down without making it first: that takes a third of the time.
            captured = self.captured
            timings = _write_timings(self.timings)
            text = (
                f'{{"v":1,"id":{_quote(self.frame_id)},"device":{_quote(self.device)},"pipeline":{_quote(self.pipeline)},'
                f'"source":{_quote(self.source)},"key":{"null" if self.key is None else _quote(self.key)},'
                f'"captured_at":"{format_time(captured.utc)}","captured_by":"{captured.by}",'
                f'"clock":"{"ok" if time.time() >= CLOCK_PLAUSIBLE_AFTER else "unsynced"}",'
                f'"age_ms":{(time.monotonic() - captured.monotonic) * 1e3:.3f},"model":{self.model.json},'
                f'"timings_ms":{{{timings}}},"type":"{self.type}","result":{_to_text(self.decoded)}}}'
            )
        # File names and JSON escapes may bring in halves of characters, which UTF-8 does not have.
        return text.encode(errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """Give the result's JSON document, version 1 (README, Results)."""
        now_utc = time.time()
        synced = now_utc >= CLOCK_PLAUSIBLE_AFTER
        document: dict[str, Any] = {
            "v": 1,
            "id": self.frame_id,
            "device": self.device,
            "pipeline": self.pipeline,
            "source": self.source,
            "key": self.key,
            "captured_at": format_time(self.captured.utc),
            "captured_by": self.captured.by,
            "clock": "ok" if synced else "unsynced",
            "age_ms": round((time.monotonic() - self.captured.monotonic) * 1e3, 3),
            "model": self.model.to_dict(),
            "timings_ms": {stage: round(value, 3) for stage, value in self.timings.items()},
        }
        if self.window is not None:
            document["window"] = {
                "from": format_time(self.window.start),
                "to": format_time(self.window.end),
                "samples": self.window.samples,
            }
        document["type"] = self.type
        if self.error is not None:
            document["error"] = {"code": self.error.code, "message": self.error.message}
            if self.error.payload is not None:
                document["error"]["payload"] = b2a_base64(self.error.payload, newline=False).decode()
        else:
            document["result"] = self.decoded
        return document
