"""What a person sees while it works and when it is done: a bar on a terminal, the closing table, warnings and reasons."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from edge_serve_converters.outcome import Outcome
    from edge_serve_converters.variants import Made

_STAGES = {
    "start": "starting tensorflow",
    "load": "loading",
    "reference": "running the float model",
    "trace": "fixing shapes",
    "convert": "converting",
    "calibrate": "calibrating",
    "quantize": "quantizing",
    "run": "checking in the device runtime",
    "layers": "comparing layer by layer",
    "compile": "compiling for the Edge TPU",
    "latency": "measuring latency",
}
_BAR = 24
# A terminal need not be redrawn more often than people see.
_REDRAW_S = 0.1


class Bar:
    """One line that is drawn over again: work, stage, and how far it is, with the time left where it can be told."""

    def __init__(self, stream: TextIO, enabled: bool) -> None:
        self._stream = stream
        self._enabled = enabled
        self._current = ("", "")
        self._since = 0.0
        self._drawn = 0.0
        self._width = 0

    def stage(self, work: str, stage: str, done: int, total: int) -> None:
        """Draw how far the work is."""
        if not self._enabled:
            return
        now = time.monotonic()
        if (work, stage) != self._current:
            self._current, self._since = (work, stage), now
        elif now - self._drawn < _REDRAW_S and done < total:
            return
        self._drawn = now
        self._draw(f"{work}: {_STAGES.get(stage, stage)}{_part(done, total, now - self._since)}")

    def _draw(self, text: str) -> None:
        self._stream.write("\r" + text.ljust(self._width))
        self._stream.flush()
        self._width = len(text)

    def clear(self) -> None:
        """Take the line away before other text is written."""
        if self._enabled and self._width:
            self._draw("")
            self._stream.write("\r")
            self._stream.flush()


def _part(done: int, total: int, elapsed: float) -> str:
    if total <= 0:
        return " …"
    filled = _BAR * done // total
    left = f", {elapsed / done * (total - done):.0f} s left" if done and elapsed > 1 else ""
    return f" [{'#' * filled}{'.' * (_BAR - filled)}] {done}/{total}{left}"


_HEAD = (
    "variant",
    "bytes",
    "operators",
    "on XNNPACK",
    "max error",
    "SQNR",
    "cosine",
    "same class",
    "float",
    "variant's",
)
_METRICS = {"accuracy": "accuracy", "auc": "AUC", "mean_iou": "mean IoU"}


def table(outcome: Outcome) -> str:
    """Draw the closing table of the variants that were made; columns that nobody has a figure for are left out."""
    tasks = [made.quality["task"] for made in outcome.made if "task" in made.quality]
    head = list(_HEAD)
    if tasks:
        name = _METRICS[tasks[0]["metric"]]
        head[-2:] = [f"{name}: float", "variant"]
    head += ["ms here", "needs TFLite"]
    rows = [head, *(_row(made) for made in outcome.made)]
    rows = [list(cells) for cells in zip(*(c for c in zip(*rows, strict=True) if set(c[1:]) != {"-"}), strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(_pad(cell, width, column) for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _row(made: Made) -> list[str]:
    task = made.quality.get("task", {})
    name = made.name if made.io == "float32" else f"{made.name} ({made.io} I/O)"
    if made.kept_float:
        name += f" ({len(made.kept_float)} layer{'s'[: len(made.kept_float) != 1]} float)"
    return [
        name,
        f"{made.bytes:,}",
        str(sum(made.contents.operators.values())),
        str(sum(made.default.claimed.values())),
        _figure(made.quality.get("max_error"), ".3g"),
        _figure(made.quality.get("sqnr_db"), ".1f", " dB"),
        _figure(made.quality.get("cosine"), ".5f"),
        _figure(made.quality.get("top1_agreement"), ".1%"),
        _figure(task.get("float"), ".4f"),
        _figure(task.get("variant"), ".4f"),
        _figure(made.default.latency_ms.get("p50"), ".3g"),
        made.min_runtime or "?",
    ]


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else format(value, form) + unit


def closing(outcome: Outcome) -> list[str]:
    """Give the lines after the table: what the figures were measured on, where targets stand, and warnings."""
    from edge_serve_converters import compatibility  # the bar alone needs no flatbuffers

    lines = []
    if outcome.made:
        count = outcome.made[0].quality["samples"]
        lines.append(_measured(outcome.measured_on, count))
        for made in outcome.made:
            if made.wanted.target is not None:
                lines += compatibility.lines(made.compatibility, made.name)
    lines.extend(f"warning: {text}" for text in outcome.warnings)
    return lines


def _measured(on: str, count: int) -> str:
    if on == "random inputs":
        return (
            f"errors against the source model on {count} random inputs: they say that the file computes the same function, "
            "not how it does on real inputs; give --calibration DATA to measure that"
        )
    return f"errors against the source model on {count} held-back samples, which did not calibrate"


def failed(outcome: Outcome) -> str:
    """Say which variants are missing, why, and what was written all the same."""
    asked = len(outcome.made) + len(outcome.failures)
    missing = "it" if len(outcome.failures) == 1 else "them"
    written = (
        f"the bundle {outcome.bundle} was written without {missing}, its default variant is {outcome.made[0].name}"
        if outcome.bundle is not None
        else "nothing was written (--report FILE.html shows it layer by layer)"
    )
    reasons = "\n".join(f"  {failure.reason}" for failure in outcome.failures)
    return f"{len(outcome.failures)} of {asked} variants failed, {written}:\n{reasons}"


def failure_logs(outcome: Outcome) -> Sequence[str]:
    """Give the ends of the children's logs of variants that failed."""
    return [f"--- log of {failure.name} (all of it: -v)\n{failure.log}" for failure in outcome.failures if failure.log]
