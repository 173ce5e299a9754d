"""The report's sections about layers: where the error begins, and how each layer's values lie in its integers' range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_serve_converters import plots
from edge_serve_converters.report_markup import (
    ABSENT,
    decibels,
    entries,
    escape,
    figure,
    interval,
    is_exact,
    mapping,
    note,
    number,
    numbers,
    percent,
    plain,
    table,
)

# Strips are some kilobytes each: of a large model the layers are shown that matter, and a note says so.
MOST_STRIPS = 40
MOST_STRIPS_IN_ALL = 240
MOST_LINES = 12
# A layer is called saturated when more than this share of its values lies beyond what its integers can express.
SATURATED = 0.001


def errors(document: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> str:
    """Draw SQNR over the layers' order, a line for each variant, with the first bad layer of each marked.

    What has no line is named: variants without layers, and layers without any error.
    """
    series: list[plots.Line] = []
    float_files: list[str] = []
    others: list[str] = []
    exact = 0
    for colour, entry in enumerate(variants):
        name = plain(entry.get("name"), 60)
        points, mark, same = _points(entry)
        exact += same
        if points and len(series) < MOST_LINES:
            series.append(plots.Line(name, points, colour, mark))
        elif not points and not same and entry.get("quality"):  # what was never run has no layers to speak of
            (float_files if entry.get("quantization") == "none" else others).append(name)
    if not series:
        return ""
    drawn = plots.lines(
        "sqnr",
        "Signal to quantization noise of each layer's output",
        series,
        "layer, in the order of execution",
        "SQNR in dB",
        mark_text="first bad layer",
    )
    longest = max(len(line.points) for line in series)
    cut = (
        note(f"Of {longest} layers the worst of each stretch is drawn; the JSON report has them all.")
        if longest > plots.MOST_POINTS
        else ""
    )
    explained = note(
        "Higher is better: 20 dB is a noise of a tenth of the signal, 40 dB of a hundredth. A ring marks the first bad layer."
    )
    left_out = []
    if float_files:
        left_out.append(f"{', '.join(float_files)} has no line: it is what the others' layers are held against.")
    if others:
        left_out.append(f"{', '.join(others)}: layer by layer not compared.")
    if exact:
        left_out.append(f"{'1 layer has' if exact == 1 else f'{exact} layers have'} no error at all, and so no point.")
    return f"{_measured(document, variants)}{explained}{drawn}{cut}{note(' '.join(left_out)) if left_out else ''}"


def _measured(document: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> str:
    """Say on how many samples layers were compared (`layers_on`): fewer than the figures of whole variants are of."""
    compared = [entry for entry in variants if entries(entry.get("layers"))]
    counts = {count for entry in compared if (count := _samples(document, entry)) is not None}
    if not counts:
        return ""
    told = f"{min(counts):.0f}" if len(counts) == 1 else f"{min(counts):.0f} to {max(counts):.0f}"
    totals = (number(mapping(entry.get("quality")).get("samples")) for entry in compared)
    whole = next((f" {total:.0f}" for total in totals if total is not None), "")
    return note(
        f"Layers were compared on {told} sample{'' if counts == {1} else 's'} only, because keeping every layer's values takes "
        f"memory: their figures differ from those of whole variants above, which are of all{whole} samples."
    )


def _samples(document: Mapping[str, Any], entry: Mapping[str, Any]) -> float | None:
    """Give how many samples a variant's layers were compared on: one number for all, or one for each by name."""
    found = document.get("layers_on")
    return number(found.get(entry.get("name")) if isinstance(found, Mapping) else found)


def _points(entry: Mapping[str, Any]) -> tuple[list[tuple[float, float, str]], float | None, int]:
    """Give the points of a line, the index of the first bad layer, and how many layers are exact, which no axis shows."""
    points = []
    mark = None
    exact = 0
    for place, layer in enumerate(entries(entry.get("layers"))):
        value = number(layer.get("sqnr_db"))
        index = number(layer.get("index"))
        index = float(place) if index is None else index
        if value is None or index < 0:  # an input: the file takes what it is given
            continue
        if is_exact(value):
            exact += 1
            continue
        told = f"{index:.0f} {plain(layer.get('operator'), 40)} {plain(layer.get('name'), 120)}: {value:.1f} dB"
        points.append((index, value, told))
        if mark is None and layer.get("name") is not None and layer.get("name") == entry.get("first_bad_layer"):
            mark = index
    points.sort(key=lambda point: point[0])
    return points, mark, exact


def ranges(variants: Sequence[Mapping[str, Any]]) -> str:
    """Draw for each variant a table of layers with a strip: values as a histogram, the quantized range under it."""
    parts: list[str] = []
    left = MOST_STRIPS_IN_ALL
    for entry in variants:
        layers = [layer for layer in entries(entry.get("layers")) if interval(layer.get("range")) is not None]
        if not layers or left <= 0:
            continue
        chosen = _chosen(layers, min(MOST_STRIPS, left))
        left -= len(chosen)
        name = escape(entry.get("name"), 80)
        head = (
            "layer",
            "SQNR",
            "by channel",
            "cosine",
            "max error",
            "values and quantized range",
            "saturated",
        )
        drawn = table(
            f"Layers of {plain(entry.get('name'), 80)}",
            head,
            [_row(layer) for layer in chosen],
            numeric=frozenset({1, 2, 3, 4}),
        )
        saturated = sum(_is_saturated(layer) for layer in layers)
        told = f"{len(layers)} layers, {saturated} saturated"
        cut = (
            note(
                f"{len(chosen)} of {len(layers)} layers are shown: those that saturate most, then those with the lowest SQNR."
            )
            if len(chosen) < len(layers)
            else ""
        )
        is_open = " open" if not parts else ""
        parts.append(f"<details{is_open}><summary>{name}: {told}</summary>{cut}{drawn}</details>")
    if not parts:
        return ""
    explained = note(
        "Bars: how often the float model's layer gives a value (square root of the count). The bracket under them is what the layer's "
        "integers can express: values beyond it are cut off (saturated), a bracket much wider than the bars wastes steps. "
        "SQNR by channel counts every channel the same: it is low where a few large channels take the range from all others."
    )
    return explained + "\n".join(parts)


def _share(layer: Mapping[str, Any]) -> float:
    return number(layer.get("saturated")) or 0.0


def _is_saturated(layer: Mapping[str, Any]) -> bool:
    return _share(layer) > SATURATED


def _chosen(layers: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Choose the layers that matter most and give them in the order of the model."""

    def matters(place: int) -> tuple[float, float]:
        sqnr = number(layers[place].get("sqnr_db"))
        share = _share(layers[place])
        return -share if share > SATURATED else 0.0, sqnr if sqnr is not None else float("inf")

    return [layers[place] for place in sorted(sorted(range(len(layers)), key=matters)[:most])]


def _row(layer: Mapping[str, Any]) -> tuple[str, ...]:
    index = number(layer.get("index"))
    values = interval(layer.get("range"))
    drawn = ABSENT
    if values is not None:
        counts = numbers(mapping(layer).get("histogram"))
        drawn = plots.strip(values, counts, interval(layer.get("quantized_range")), _is_saturated(layer))
    share = number(layer.get("saturated"))
    if share is None:
        saturated = ABSENT
    elif _is_saturated(layer):
        saturated = f'<span class="no">▲ {share:.2%}</span>'
    else:
        saturated = percent(share) if share else "none"
    name = plain(layer.get("name"))
    # A name lists all operators that were fused into the layer, with semicolons; the first says where in the model it is.
    shown = name.split(";", 1)[0]
    place = "" if index is None else "input " if index < 0 else f"{index:.0f} "
    named = f'<span title="{escape(name)}">{escape(shown, 100)}{" …" if shown != name else ""}</span>'
    return (
        f"{place}{named}<small>{escape(layer.get('operator'), 60)}</small>",
        decibels(layer.get("sqnr_db")),
        decibels(layer.get("channel_sqnr_db")),
        figure(layer.get("cosine"), ".5f"),
        figure(layer.get("max_error")),
        drawn,
        saturated,
    )
