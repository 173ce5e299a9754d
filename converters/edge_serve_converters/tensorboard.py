"""A report as TensorBoard summaries, written without tensorflow: scalars, histograms, texts and hyperparameters.

An event file is a row of TFRecords, each an `Event` protocol buffer; the first says `brain.Event:2`. Messages and field
numbers: tensorboard/compat/proto event.proto, summary.proto, tensorboard/plugins/hparams/plugin_data.proto.
Histograms are tensors [bins, 3] of left edge, right edge, count, as the histogram plugin's second version takes them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edge_serve.errors import UsageError
from edge_serve_converters.protobuf import bytes_field, double_field, integer_field, text_field
from edge_serve_converters.record_framing import framed
from edge_serve_converters.report_markup import (
    entries,
    interval,
    is_exact,
    mapping,
    number,
    numbers,
    plain,
    plain_lines,
)
from edge_serve_converters.tensor_proto import of_array, of_text

FILE_VERSION = b"brain.Event:2"
# TensorBoard keeps some hundred histograms at most; a large model's later layers are left out of them, never of the scalars.
MOST_HISTOGRAMS = 300
MOST_LAYERS = 20_000
MOST_STEPS = 2**31 - 1
MAX_TAG = 160
MAX_FOLDER = 80
# Enum tensorboard.DataClass.
_SCALARS, _TENSORS = 1, 2
_SUCCESS = 1
_OVERALL = "report"


def write(logdir: Path, document: Mapping[str, Any]) -> Path:
    """Write a report's runs, one for each variant and one for the whole, into a new folder of `logdir`; give that folder.

    UsageError if the folder cannot be written.
    """
    version = document.get("version")
    name = folder_name(f"{plain(document.get('name') or 'model')}{'' if version is None else f'-{plain(version)}'}")
    now = time.time()
    try:
        base = _new_folder(logdir, name)
        with _Run(base / _OVERALL, now) as run:
            _write_whole(run, document)
        taken = {_OVERALL}
        for group in ("variants", "failed"):
            for entry in entries(document.get(group)):
                wanted = folder_name(plain(entry.get("name") or "variant"))
                chosen = next(n for n in _numbered(wanted) if n not in taken)
                taken.add(chosen)
                with _Run(base / chosen, now) as run:
                    _write_variant(run, entry, now)
    except OSError as error:
        raise UsageError(
            f"--tensorboard {logdir}: cannot be written ({error.strerror}); choose another folder"
        ) from error
    return base


def folder_name(text: str) -> str:
    """Give a text as the name of one folder: no separators, nothing hidden, at most MAX_FOLDER characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._")[:MAX_FOLDER] or "unnamed"


def _numbered(name: str) -> Iterator[str]:
    yield name
    number_ = 2
    while True:
        yield f"{name}-{number_}"
        number_ += 1


def _new_folder(logdir: Path, name: str) -> Path:
    """Make a folder that was not there: TensorBoard would draw two reports in one folder as one zigzag."""
    logdir.mkdir(parents=True, exist_ok=True)
    for candidate in _numbered(name):
        try:
            (logdir / candidate).mkdir()
        except FileExistsError:
            continue
        return logdir / candidate
    raise AssertionError("numbers do not end")


def _write_whole(run: _Run, document: Mapping[str, Any]) -> None:
    rows = [
        "| variant | quantization | bytes | same class | SQNR dB | cosine | latency ms |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for entry in entries(document.get("variants")):
        quality = mapping(entry.get("quality"))
        figures = (
            number(entry.get("bytes")),
            number(quality.get("top1_agreement")),
            number(quality.get("sqnr_db")),
            number(quality.get("cosine")),
            number(mapping(entry.get("latency_ms")).get("p50")),
        )
        cells = [_cell(entry.get("name")), _cell(entry.get("quantization"))]
        cells += ["" if value is None else f"{value:.6g}" for value in figures]
        if is_exact(quality.get("sqnr_db")):
            cells[4] = "exact"
        rows.append(f"| {' | '.join(cells)} |")
    run.text("variants", "\n".join(rows))
    failed = [
        f"- **{_cell(entry.get('name'))}**: {_item(entry.get('reason'))}" for entry in entries(document.get("failed"))
    ]
    if failed:
        run.text("refused", "\n".join(failed))
    warnings = document.get("warnings")
    if isinstance(warnings, list | tuple) and warnings:
        run.text("warnings", "\n".join(f"- {_item(text)}" for text in warnings[:100]))
    for name, value in mapping(mapping(document.get("calibration")).get("inputs")).items():
        histogram = mapping(mapping(value).get("histogram"))
        run.histogram(f"calibration/{plain(name)}", numbers(histogram.get("edges")), numbers(histogram.get("counts")))


def _cell(value: Any) -> str:
    """Give a text that breaks no row of a Markdown table; TensorBoard itself takes the HTML out."""
    return plain(value).replace("|", "\\|").replace("`", "'")


def _item(value: Any) -> str:
    """Give a longer text within a Markdown list, its lines kept: they may be commands to copy."""
    return plain_lines(value).replace("|", "\\|").replace("`", "'").replace("\n", "  \n  ")


def _write_variant(run: _Run, entry: Mapping[str, Any], now: float) -> None:
    quality, latency = mapping(entry.get("quality")), mapping(entry.get("latency_ms"))
    run.hyperparameters(
        {key: plain(entry[key]) for key in ("quantization", "io") if entry.get(key) is not None},
        plain(entry.get("name")),
        now,
    )
    run.scalar("size/bytes", entry.get("bytes"))
    for key in ("max_error", "mean_error", "cosine", "sqnr_db", "top1_agreement"):
        run.scalar(f"quality/{key}", quality.get(key))
    task = mapping(quality.get("task"))
    metric = plain(task.get("metric") or "metric")
    for key in ("variant", "float", "drop"):
        run.scalar(f"task/{metric}{'' if key == 'variant' else f'_{key}'}", task.get(key))
    for name, figures in mapping(quality.get("outputs")).items():
        for key in ("max_error", "mean_error", "cosine", "sqnr_db"):
            run.scalar(f"outputs/{plain(name)}/{key}", mapping(figures).get(key))
    for key in ("p50", "p90", "min"):
        run.scalar(f"latency_ms/{key}", latency.get(key))
    if entry.get("reason") is not None:
        run.text("refused", _item(entry["reason"]))
    for place, layer in enumerate(entries(entry.get("layers"))[:MOST_LAYERS]):
        index = number(layer.get("index"))
        step = int(min(max(0, place if index is None else index), MOST_STEPS))
        for key in ("sqnr_db", "saturated"):
            run.scalar(f"layers/{key}", layer.get(key), step)
        limits, counts = interval(layer.get("range")), numbers(layer.get("histogram"))
        if limits is not None and counts and place < MOST_HISTOGRAMS:
            width = (limits[1] - limits[0]) / len(counts)
            edges = [limits[0] + width * number_ for number_ in range(len(counts))] + [limits[1]]
            run.histogram(f"layers/{step:05d} {plain(layer.get('name'))}", edges, counts)


class _Run:
    """One event file in a folder of its own, which TensorBoard shows as a run."""

    def __init__(self, folder: Path, now: float) -> None:
        folder.mkdir()
        self._now = now
        # TensorBoard looks for "tfevents" in the name, and orders the files of a run by the time in it.
        self._path = folder / f"events.out.tfevents.{int(now)}.edge-serve"
        self._described: set[str] = set()

    def __enter__(self) -> _Run:
        self._stream: BinaryIO = self._path.open("xb")
        self._record(double_field(1, self._now) + bytes_field(3, FILE_VERSION))
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def scalar(self, tag: str, value: Any, step: int = 0) -> None:
        """Add a number; None and what is no finite number are left out."""
        known = number(value)
        if known is not None and abs(known) <= 3.4e38:
            self._value(tag, "scalars", _SCALARS, of_array(np.array(known, np.float32)), step)

    def histogram(self, tag: str, edges: Sequence[float], counts: Sequence[float]) -> None:
        """Add a histogram; edges has one entry more than counts, else it is left out."""
        if not counts or len(edges) != len(counts) + 1:
            return
        bins = np.array([edges[:-1], edges[1:], counts], np.float64).T
        self._value(tag, "histograms", _TENSORS, of_array(bins), 0)

    def text(self, tag: str, markdown: str) -> None:
        """Add a text in Markdown."""
        self._value(tag, "text", _TENSORS, of_text(markdown), 0)

    def hyperparameters(self, values: Mapping[str, str], group: str, now: float) -> None:
        """Say what this run was made with, so that the HParams page compares the runs' scalars by it."""
        pairs = b"".join(
            bytes_field(1, text_field(1, key) + bytes_field(2, text_field(3, text))) for key, text in values.items()
        )
        started = bytes_field(3, pairs + text_field(4, group) + double_field(5, now))
        ended = bytes_field(4, integer_field(1, _SUCCESS) + double_field(2, now))
        nothing = of_array(np.array(0, np.float32))
        for tag, content in (("session_start_info", started), ("session_end_info", ended)):
            self._value(f"_hparams_/{tag}", "hparams", 0, nothing, 0, content)

    def _value(self, tag: str, plugin: str, data_class: int, tensor: bytes, step: int, content: bytes = b"") -> None:
        tag = tag[:MAX_TAG]
        value = text_field(1, tag) + bytes_field(8, tensor)
        if tag not in self._described:  # the first value of a tag says which plugin shows it
            self._described.add(tag)
            metadata = bytes_field(1, text_field(1, plugin) + (bytes_field(2, content) if content else b""))
            value += bytes_field(9, metadata + (integer_field(4, data_class) if data_class else b""))
        self._record(double_field(1, self._now) + integer_field(2, step) + bytes_field(5, bytes_field(1, value)))

    def _record(self, data: bytes) -> None:
        self._stream.write(framed(data))
