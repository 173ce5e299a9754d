"""Sliding windows: sensor samples are gathered by key, and every `hop` samples the last `length` become a job.

A sample's delivery is settled when the last window that contains it is. When as many deliveries are held as the source
may have unsettled, and no window is on its way upstream, the oldest are settled early and counted: a crash may cost that
window, but the source never waits for samples that it is itself kept from sending.
"""

from __future__ import annotations

import dataclasses
import io
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.errors import InputError, ModelError, QuarantinedError, TooLargeError
from edge_serve.frame import Capture, Delivery, Frame, Settle, Window
from edge_serve.health import Counters
from edge_serve.processing import tensor as tensors
from edge_serve.processing.intake import Job, labelled, read_time
from edge_serve.spec import InputSpec

if TYPE_CHECKING:
    from edge_serve.frame import Array

DEFAULT_MAX_KEYS = 1024
DEFAULT_TIMEOUT_S = 300.0
MAX_KEY_LENGTH = 1024
# What all windows of one payload may hold together: 64 MiB of float32. A small hop multiplies what was sent.
MAX_VALUES = 16 * 1024 * 1024
# A source may hold back samples sooner than it says (a broker has limits of its own). When nothing has come for a while,
# the oldest sample is settled: if another comes at once, that was it, and the number held is the limit from now on.
FEWEST_HELD = 8
PROBE_ANSWER_S = 1.0
FIRST_PROBE_S = 1.0
LONGEST_PROBE_S = 300.0


class _Held:
    """A delivery whose samples are in windows; `waiting` counts its places in series, `in_flight` its windows upstream."""

    __slots__ = ("error", "in_flight", "number", "settle", "settled", "waiting")

    def __init__(self, settle: Settle, number: int) -> None:
        self.settle = settle
        self.number = number
        self.waiting = 0
        self.in_flight = 0
        self.settled = False
        self.error: Exception | None = None


class _Series:
    """The unfinished window of one key."""

    __slots__ = ("captures", "fresh", "held", "last_seen", "rows", "skip")

    def __init__(self, length: int, channels: int, dtype: str) -> None:
        # Quantized already, where the tensor is: each sample is in several windows.
        self.rows = np.empty((length, channels), dtype)
        self.held: deque[_Held] = deque()
        self.captures: deque[float] = deque()
        self.fresh = 0
        self.skip = 0
        self.last_seen = 0.0


class WindowIntake:
    """Gathers samples of `channels` numbers into windows [1, length, channels]."""

    def __init__(
        self, spec: InputSpec, inputs: Mapping[str, TensorSpec], counters: Counters, hold_limit: int | None = None
    ) -> None:
        if len(inputs) != 1:
            raise ModelError(f"kind = window takes a model with one input; this one has {', '.join(inputs)}")
        self._name, self._tensor = next(iter(inputs.items()))
        self.length, self.channels = _layout(spec, self._tensor)
        self._row = dataclasses.replace(self._tensor, shape=(-1, self.channels))
        self.hop = spec.hop or self.length
        self._spec = spec
        self._names = spec.channels
        self._counters = counters
        self._hold_limit = hold_limit
        self._max_keys = spec.max_keys or DEFAULT_MAX_KEYS
        self._timeout = spec.timeout_s or DEFAULT_TIMEOUT_S
        self._mean, self._std = _normalization(spec, self.channels)
        self._lock = threading.Lock()
        self._series: OrderedDict[str | None, _Series] = OrderedDict()
        self._last_fed = Capture.now().monotonic
        self._probe_after = FIRST_PROBE_S
        self._probe: tuple[float, int] | None = None
        self._arrived = 0
        # In order of arrival; the values are unused.
        self._unsettled: OrderedDict[_Held, None] = OrderedDict()

    def feed(self, delivery: Delivery) -> list[Job]:
        """Add the payload's samples; gives the windows that they complete. InputError if it holds no fitting samples."""
        frame = delivery.frame
        rows, key, frame = self._read(frame)
        windows = len(rows) // self.hop + 1
        if windows * self.length * self.channels > MAX_VALUES:
            raise TooLargeError(
                f"{len(rows)} samples in one payload would complete up to {windows} windows at once; send fewer at a time"
            )
        jobs: list[Job] = []
        with self._lock:
            self._judge_probe(Capture.now().monotonic)
            self._arrived += 1
            held = _Held(delivery.settle, self._arrived)
            due = self._make_room(key)
            series = self._series.get(key)
            if series is None:
                series = self._series[key] = _Series(self.length, self.channels, self._tensor.dtype)
            self._series.move_to_end(key)
            series.last_seen = frame.captured.monotonic if frame.captured.by == "arrival" else Capture.now().monotonic
            held.waiting += 1  # while its samples are being added
            self._unsettled[held] = None
            for row in rows:
                if series.skip:
                    series.skip -= 1
                    continue
                series.rows[len(series.held)] = row
                series.held.append(held)
                series.captures.append(frame.captured.utc)
                series.fresh += 1
                held.waiting += 1
                if len(series.held) == self.length:
                    jobs.append(self._emit(series, key, frame, len(jobs)))
            held.waiting -= 1
            due += self._due(held) + self._early()
        _settle_all(due)
        return jobs

    def _emit(self, series: _Series, key: str | None, frame: Frame, nth: int) -> Job:
        members = list(dict.fromkeys(series.held))
        for member in members:
            member.in_flight += 1
        shape = tuple(1 if size == -1 else size for size in self._tensor.shape)
        inputs = {self._name: series.rows.copy().reshape(shape)}
        window = Window(series.captures[0], series.captures[-1], self.length)
        # A payload with many samples may complete several windows; each needs an id of its own.
        named = frame if nth == 0 else dataclasses.replace(frame, id=f"{frame.id}#{nth}")
        kept = max(0, self.length - self.hop)
        series.rows[:kept] = series.rows[self.length - kept :].copy() if kept else series.rows[:0]
        for _ in range(self.length - kept):
            series.held.popleft().waiting -= 1
            series.captures.popleft()
        series.fresh = 0
        series.skip = max(0, self.hop - self.length)

        def settle(error: Exception | None) -> None:
            with self._lock:
                due: list[tuple[Settle, Exception | None]] = []
                for member in members:
                    member.in_flight -= 1
                    member.error = member.error or error
                    due += self._due(member)
                due += self._early()
            _settle_all(due)

        return Job(named, inputs, settle, None, window, key)

    def _due(self, held: _Held) -> list[tuple[Settle, Exception | None]]:
        if held.settled or held.waiting or held.in_flight:
            return []
        held.settled = True
        del self._unsettled[held]
        return [(held.settle, held.error)]

    def _early(self) -> list[tuple[Settle, Exception | None]]:
        """Settle the oldest samples that only wait for later ones, while the source may not deliver any later ones."""
        due: list[tuple[Settle, Exception | None]] = []
        while self._hold_limit is not None and self._span() >= self._hold_limit:
            oldest = next(iter(self._unsettled))
            if oldest.in_flight:
                break  # its settling is on the way and will free the source
            due.append(self._settle_early(oldest))
        return due

    def _span(self) -> int:
        """Count the deliveries from the oldest unsettled one on: acknowledgements leave in order, so those behind it wait."""
        return self._arrived - next(iter(self._unsettled)).number + 1 if self._unsettled else 0

    def _settle_early(self, held: _Held) -> tuple[Settle, Exception | None]:
        held.settled = True
        del self._unsettled[held]
        self._counters.early_settled()
        return held.settle, held.error

    def _make_room(self, key: str | None) -> list[tuple[Settle, Exception | None]]:
        due: list[tuple[Settle, Exception | None]] = []
        while key not in self._series and len(self._series) >= self._max_keys:
            silent, _ = next(iter(self._series.items()))
            due += self._forget(silent, "max_keys")
        return due

    def _forget(self, key: str | None, reason: str) -> list[tuple[Settle, Exception | None]]:
        series = self._series.pop(key)
        self._counters.dropped(reason, series.fresh)  # the others were in a window
        due: list[tuple[Settle, Exception | None]] = []
        for held in series.held:
            held.waiting -= 1
            due += self._due(held)
        return due

    def spoil(self, jobs: Sequence[Job], nth: int) -> None:
        """Let go of the samples of a quarantined window: every later window with one of them would be no better.

        The rest of the payload's windows are not run as far as they overlap with it, and the key begins a new window.
        """
        overlapping = (self.length - 1) // self.hop
        for later in jobs[nth + 1 : nth + 1 + overlapping]:
            later.error = later.error or QuarantinedError("this window shares samples with one that is quarantined")
        due: list[tuple[Settle, Exception | None]] = []
        with self._lock:
            key = jobs[nth].key
            if key in self._series and len(jobs) - nth <= overlapping:
                due = self._forget(key, "quarantined") + self._early()
        _settle_all(due)

    def warm(self) -> None:
        """The first sample costs no more than others."""

    def tick(self, now: float) -> None:
        """Drop the unfinished windows of keys that were silent for longer than the time-out."""
        due: list[tuple[Settle, Exception | None]] = []
        with self._lock:
            while self._series:
                key, series = next(iter(self._series.items()))
                if now - series.last_seen <= self._timeout:
                    break
                due += self._forget(key, "window_timeout")
            due += self._early() + self._probe_source(now)
        _settle_all(due)

    def _probe_source(self, now: float) -> list[tuple[Settle, Exception | None]]:
        """Settle the oldest sample early if the source may be waiting for that."""
        held = self._span()
        if self._hold_limit is None or held < FEWEST_HELD or now - self._last_fed < self._probe_after:
            return []
        oldest = next(iter(self._unsettled))
        if oldest.in_flight or (self._probe is not None and now - self._probe[0] < self._probe_after):
            return []
        self._probe = (now, held)
        return [self._settle_early(oldest)]

    def _judge_probe(self, now: float) -> None:
        """Learn from what came after a sample was settled early: at once, it was waited for; later, it was not."""
        if self._probe is not None and self._hold_limit is not None:
            probed, held = self._probe
            if now - probed < PROBE_ANSWER_S:
                self._hold_limit = min(self._hold_limit, held)
                self._probe_after = FIRST_PROBE_S
            else:
                self._probe_after = min(LONGEST_PROBE_S, 2 * self._probe_after)
            self._probe = None
        self._last_fed = now

    def close(self, error: Exception | None) -> None:
        """Let go of all unfinished windows; their samples are settled with `error` once no window upstream holds them."""
        due: list[tuple[Settle, Exception | None]] = []
        with self._lock:
            for series in self._series.values():
                for held in series.held:
                    held.waiting -= 1
                    held.error = held.error or error
                    due += self._due(held)
            self._series.clear()
        _settle_all(due)

    def _read(self, frame: Frame) -> tuple[Array, str | None, Frame]:
        payload = frame.payload
        if isinstance(payload, np.ndarray):
            return self._rows(payload), self._key(frame, None), frame
        kind = tensors.content_type(payload, frame.content_type, self._spec.content_type)
        if kind == tensors.JSON:
            document = tensors.parse_json(payload)
            frame = labelled(frame, document, self._spec)
            return self._rows(self._json(document)), self._key(frame, document), frame
        if kind == tensors.CSV:
            rows, record = self._csv(bytes(payload))
            name = self._spec.time_field
            if record is not None and name is not None and name in record:
                value = record[name]
                moment = read_time(float(value) if _is_number(value) else value, name)
                frame = dataclasses.replace(frame, captured=Capture.at(moment))
            return self._rows(rows), self._key(frame, record), frame
        if kind == tensors.NPY:
            return self._rows(tensors.read_npy(payload)), self._key(frame, None), frame
        if kind == tensors.OCTETS:
            dtype = np.dtype("<f4")
            if not len(payload) or len(payload) % (dtype.itemsize * self.channels):
                raise InputError(
                    f"raw samples are float32, little-endian, {self.channels} a sample: "
                    f"a multiple of {dtype.itemsize * self.channels} bytes; the payload has {len(payload)}"
                )
            return self._rows(np.frombuffer(payload, dtype).reshape(-1, self.channels)), self._key(frame, None), frame
        raise InputError(f"{kind} does not fit this pipeline: it gathers samples of {self.channels} numbers")

    def _rows(self, values: Any) -> Array:
        try:
            array = np.asarray(values if isinstance(values, np.ndarray) or tensors.holds_numbers(values) else "")
        except ValueError as error:
            raise InputError(f"samples of unequal length; each has {self.channels} numbers") from error
        if array.dtype.kind not in "biuf":
            raise InputError(f"a sample is {self.channels} numbers; the payload holds something else")
        if array.ndim <= 1 and (array.size == self.channels or self.channels == 1):
            array = array.reshape(-1, self.channels)
        elif array.ndim == 3 and array.shape[0] == 1:
            array = array[0]
        if array.ndim != 2 or array.shape[1] != self.channels or not array.size:
            raise InputError(
                f"a sample is {self.channels} numbers, several are a list of such lists; the payload has shape {list(array.shape)}"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            rows = array.astype(np.float32)
            if self._mean is not None:
                rows = (rows - self._mean) / self._std
        if not np.isfinite(rows).all():
            raise InputError("a sample holds NaN, infinite or far too large values; leave the sample out instead")
        return tensors.fit(rows, self._row)

    def _json(self, document: Any) -> Any:
        if isinstance(document, list) and document and all(isinstance(sample, dict) for sample in document):
            return [self._columns(sample) for sample in document]
        if not isinstance(document, dict):
            return document
        if "samples" in document and "samples" not in (self._names or ()):
            return document["samples"]
        return self._columns(document)

    def _columns(self, record: Mapping[str, Any]) -> Any:
        if self._names is None:
            raise InputError(
                "samples as {channel: number} need the channels' names: channels = […] under [pipeline.input]"
            )
        missing = [name for name in self._names if name not in record]
        if missing:
            raise InputError(
                f"sample lacks the channel {', '.join(map(repr, missing))}; channels: {', '.join(self._names)}"
            )
        columns = [record[name] for name in self._names]
        if any(isinstance(column, list) for column in columns):
            if len({len(column) if isinstance(column, list) else -1 for column in columns}) != 1:
                raise InputError("channels of unequal length")
            return list(zip(*columns, strict=True))
        return columns

    def _csv(self, payload: bytes) -> tuple[Any, Mapping[str, str] | None]:
        import csv  # few sensors send it

        try:
            lines = [line for line in csv.reader(io.StringIO(payload.decode("utf-8"))) if line]
            header = None if not lines or _is_number(lines[0][-1]) else [name.strip() for name in lines.pop(0)]
            if not lines:
                raise InputError("payload is CSV without samples")
            if header is None:
                return [[float(cell) for cell in line] for line in lines], None
            records = [dict(zip(header, line, strict=True)) for line in lines]
            names = self._names or tuple(
                name for name in header if name not in (self._spec.key_field, self._spec.time_field)
            )
            missing = [name for name in names if name not in header]
            if missing:
                raise InputError(f"CSV lacks the column {', '.join(map(repr, missing))}; it has: {', '.join(header)}")
            return [[float(record[name]) for name in names] for record in records], records[-1]
        except (UnicodeDecodeError, ValueError, csv.Error) as error:
            raise InputError(f"payload is not CSV of numbers: {error}") from error

    def _key(self, frame: Frame, document: Any) -> str | None:
        how = self._spec.key or "topic"
        if how == "none":
            return None
        if how == "topic":
            return str(frame.meta.get("key", frame.source))
        field = self._spec.key_field
        if field is None or not isinstance(document, Mapping) or field not in document:
            raise InputError(f"sample lacks the field {field!r} that holds its key")
        key = document[field]
        if not isinstance(key, (str, int)) or isinstance(key, bool) or len(str(key)) > MAX_KEY_LENGTH:
            raise InputError(
                f"{field!r} (the key) must be text or a whole number of at most {MAX_KEY_LENGTH} characters"
            )
        return str(key)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _settle_all(due: list[tuple[Settle, Exception | None]]) -> None:
    for settle, error in due:
        settle(error)


def _layout(spec: InputSpec, tensor: TensorSpec) -> tuple[int, int]:
    """Settle length and channels from the tensor and the configuration; ModelError if they contradict."""
    if len(tensor.shape) not in (2, 3, 4) or tensor.shape[0] not in (1, -1):
        raise ModelError(
            f"input {tensor.name!r} has shape {list(tensor.shape)}, which is no window [1, length, channels]"
        )
    if -1 in tensor.shape[1:]:
        raise ModelError(
            f"input {tensor.name!r} has a dynamic length {list(tensor.shape)}; convert it with a fixed --input-shape"
        )
    sizes = list(tensor.shape[1:])
    if len(sizes) == 3 and 1 in sizes:
        sizes.remove(1)
    if len(sizes) == 1:
        named = len(spec.channels) if spec.channels else 1
        length = spec.length or sizes[0] // named
        sizes = [length, named] if length * named == sizes[0] else [0, 0]
    if len(sizes) != 2:
        raise ModelError(
            f"input {tensor.name!r} has shape {list(tensor.shape)}, which is no window [1, length, channels]"
        )
    length = spec.length or sizes[0]
    channels = sizes[1]
    if length < 1 or channels < 1:
        raise ModelError(
            f"input {tensor.name!r} has shape {list(tensor.shape)}; say length and channels under [pipeline.input]"
        )
    if sizes[0] != length:
        raise ModelError(f"length = {length} does not fit the input {tensor.name!r} of shape {list(tensor.shape)}")
    if spec.channels is not None and len(spec.channels) != channels:
        raise ModelError(f"{len(spec.channels)} channels are named, the input {tensor.name!r} has {channels}")
    return length, channels


def _normalization(spec: InputSpec, channels: int) -> tuple[Any, Any]:
    if spec.mean is None and spec.std is None:
        return None, None
    mean, std = (np.array(values or (default,), np.float32) for values, default in ((spec.mean, 0.0), (spec.std, 1.0)))
    for name, values in (("mean", mean), ("std", std)):
        if values.size not in (1, channels):
            raise ModelError(
                f"{name} has {values.size} numbers, a sample has {channels}; give one number or {channels}"
            )
    if not std.all():
        raise ModelError("std holds a zero; every channel is divided by it")
    return mean, std
