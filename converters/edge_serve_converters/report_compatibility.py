"""The report's section on where each variant runs: runtimes, XNNPACK (measured), Edge TPU and GPU (expected)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_serve_converters.report_markup import (
    ABSENT,
    counted,
    entries,
    escape,
    mapping,
    note,
    number,
    plain,
    table,
)

# Operators that stay behind are listed with their rule; the rest is a number.
MOST_REFUSED = 25


def render(variants: Sequence[Mapping[str, Any]]) -> str:
    """Draw an overview of all variants, then the details of each."""
    known = [(entry, mapping(entry.get("compatibility"))) for entry in variants]
    rows = [_overview(entry, found) for entry, found in known if found]
    if not rows:
        return ""
    parts = [
        note(
            "What XNNPACK takes was measured; runtimes are told from operator versions, Edge TPU and GPU from rules: "
            "expected, never promised."
        ),
        table(
            "Where each variant runs",
            (
                "variant",
                "XNNPACK takes",
                "left to other kernels",
                "expected on the Edge TPU",
                "expected on the GPU",
                "runtimes",
            ),
            rows,
            numeric=frozenset(),
        ),
    ]
    for entry, found in known:
        details = "\n".join(
            part
            for part in (
                _left("Edge TPU", found.get("edgetpu")),
                _left("GPU", found.get("gpu")),
                _compiler(found),
                _versions(found),
            )
            if part
        )
        if details:
            parts.append(
                f"<details><summary>{escape(entry.get('name'), 80)}: operators one by one</summary>{details}</details>"
            )
    return "\n".join(parts)


def _of(part: Any, total: Any) -> str:
    first, second = number(part), number(total)
    if first is None:
        return ABSENT
    return f"{first:.0f}" + (f" of {second:.0f}" if second is not None else "")


def _overview(entry: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, ...]:
    xnnpack, edgetpu, gpu = (mapping(found.get(key)) for key in ("xnnpack", "edgetpu", "gpu"))
    tpu = _of(edgetpu.get("expected"), edgetpu.get("total"))
    prefix = number(edgetpu.get("prefix"))
    if prefix and tpu != ABSENT:
        tpu += f"; the first {prefix:.0f} in one piece"
    if edgetpu.get("stopped_by") is not None:
        tpu += f"{', then' if prefix else '; stopped by'} {_stopped(edgetpu['stopped_by'])}"
    runtimes = []
    for runtime in entries(found.get("runtimes")):
        name = escape(runtime.get("name"), 80)
        if runtime.get("loads"):
            runtimes.append(f'<span class="yes">✓ {name}</span>')
        else:
            reasons = runtime.get("reasons")
            why = "; ".join(escape(reason, 160) for reason in reasons[:4]) if isinstance(reasons, list | tuple) else ""
            runtimes.append(f'<span class="no">✕ {name}</span>' + (f": {why}" if why else ""))
    return (
        escape(entry.get("name"), 80),
        _of(xnnpack.get("claimed"), xnnpack.get("total")),
        counted(xnnpack.get("left")) or ABSENT,
        tpu,
        _of(gpu.get("expected"), gpu.get("total")),
        "<br>".join(runtimes) or ABSENT,
    )


def _stopped(value: Any) -> str:
    """Say which operator ends the piece that a compiler would map: text, or the operator's own table."""
    known = mapping(value)
    if not known:
        return escape(value, 160)
    told = " ".join(plain(known[key], 100) for key in ("operator", "name") if known.get(key) is not None)
    return escape(f"{told}: {plain(known['rule'], 160)}" if known.get("rule") is not None else told)


def _left(target: str, value: Any) -> str:
    operators = entries(mapping(value).get("operators"))
    refused = [entry for entry in operators if not entry.get("expected", True)]
    if not refused:
        return ""
    rows = [
        (
            f"{_index(entry)}{escape(entry.get('operator'), 60)}",
            escape(entry.get("name"), 120),
            escape(entry.get("rule"), 240),
        )
        for entry in refused[:MOST_REFUSED]
    ]
    drawn = table(f"Not expected on the {target}", ("operator", "layer", "rule that fails"), rows, numeric=frozenset())
    more = len(refused) - MOST_REFUSED
    return drawn + (note(f"{more} more operators are in the JSON report.") if more > 0 else "")


def _index(entry: Mapping[str, Any]) -> str:
    index = number(entry.get("index"))
    return "" if index is None else f"{index:.0f} "


def _compiler(found: Mapping[str, Any]) -> str:
    compiler = mapping(mapping(found.get("edgetpu")).get("compiler"))
    rows = [
        (escape(key, 80), counted(value) if isinstance(value, Mapping) else escape(value, 400))
        for key, value in compiler.items()
        if value not in (None, [], {})
    ]
    return table("What edgetpu_compiler said", ("what", "value"), rows, numeric=frozenset())


def _versions(found: Mapping[str, Any]) -> str:
    rows = [
        (escape(entry.get("name"), 80), escape(entry.get("version"), 20), escape(entry.get("count"), 20))
        for entry in entries(found.get("operators"))
    ]
    return table("Operators and their versions", ("operator", "version", "how many"), rows, numeric=frozenset({1, 2}))
