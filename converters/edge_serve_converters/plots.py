"""Plots as inline SVG: points, lines over an index, and histograms, with axes whose ticks are round numbers.

Colours are CSS classes (c0 … c7) of the page, so that light and dark both work; every series also has a shape or a dash
of its own, for people who cannot tell the colours apart. Hovering shows what a point is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edge_serve_converters.report_markup import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 66, 20, 18, 52
# Advance of a character of the page's 13 px sans-serif in bold, in a wide font: what label placement reckons with.
CHARACTER = 8.6
LINE = 16.0
COLOURS = 8
# More points than this along one line are drawn as the worst of each stretch; no screen shows more.
MOST_POINTS = 400
# Longer lines are drawn without their dashes, which would hide small steps, and with a marker now and then.
MOST_DASHED = 80
MOST_MARKERS = 14
MOST_BARS = 64
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "1 4", "12 4", "5 2 1 2", "3 6")


@dataclass(frozen=True, slots=True)
class Point:
    """A named place; `note` is what hovering shows."""

    label: str
    x: float
    y: float
    note: str
    colour: int


@dataclass(frozen=True, slots=True)
class Line:
    """A series over an index: (index, value, what hovering shows). `mark` is the index of the point to point out."""

    label: str
    points: Sequence[tuple[float, float, str]]
    colour: int
    mark: float | None = None


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear axis: values from low to high lie on pixels from start to end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Give the pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def step_of(low: float, high: float, most: int, *, whole: bool = False) -> float:
    """Give the smallest of 1, 2, 5 × 10^n that cuts the range into at most `most` parts; `whole`: at least 1."""
    exponent = math.floor(math.log10((high - low) / most))
    steps = (factor * 10.0**exponent for factor in (1, 2, 5, 10, 20))
    step = next((step for step in steps if (high - low) / step <= most + 1e-9), 50 * 10.0**exponent)
    return max(1.0, step) if whole else step


def ticks(low: float, high: float, most: int = 6, *, whole: bool = False) -> list[float]:
    """Give round numbers from low to high, at most most + 1 of them; `whole` keeps fractions out."""
    step = step_of(low, high, most, whole=whole)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def domain(values: Sequence[float], *, zero: bool = False, top: float | None = None) -> tuple[float, float]:
    """Give the range of an axis, ended at round numbers; `zero` makes it begin at 0, `top` is never exceeded."""
    zero = zero and min(values) >= 0
    low, high = (0.0 if zero else min(values)), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        spread = abs(high) * 0.02 or 1.0
        low, high = (low if zero else low - spread), high + spread
    pad = (high - low) * 0.06
    step = step_of(low, high + pad, 6)
    low = low if zero else math.floor((low - pad) / step) * step
    high = math.ceil((high + pad) / step) * step
    if top is not None and high > top > low:
        high = top
    return low, high


def tick_text(value: float, step: float) -> str:
    """Write a tick with the decimals that its step has; thousands and millions are short, or they run into the axis title."""
    if not 1e-4 <= step < 1e9:
        return f"{value:.3g}".replace("-", "−")
    factor, unit = (1e6, "M") if step >= 1e6 else (1e3, "k") if step >= 1e3 else (1.0, "")
    decimals = max(0, -math.floor(math.log10(step / factor) + 1e-9))
    rounded = round(value / factor, decimals)
    return f"{rounded:.{decimals}f}{unit}".replace("-", "−") if rounded else "0"


def scatter(
    identifier: str, title: str, points: Sequence[Point], x_label: str, y_label: str, *, top: float | None = None
) -> str:
    """Draw named points; x begins at 0. Labels are put where they cover nothing."""
    if not points:
        return ""
    x = Scale(*domain([point.x for point in points], zero=True), LEFT, WIDTH - RIGHT)
    y = Scale(*domain([point.y for point in points], top=top), HEIGHT - BOTTOM, TOP)
    places = [(x(point.x), y(point.y)) for point in points]
    parts = _frame(x, y, x_label, y_label)
    parts += [
        f'<g class="c{point.colour % COLOURS}"><title>{escape(point.note)}</title>{_marker(point.colour, *place)}</g>'
        for point, place in zip(points, places, strict=True)
    ]
    parts += _labels([point.label for point in points], places)
    described = "; ".join(point.note for point in points)
    return _svg(identifier, title, described, parts)


def lines(
    identifier: str, title: str, series: Sequence[Line], x_label: str, y_label: str, *, mark_text: str = ""
) -> str:
    """Draw lines over an index; long ones are drawn as the lowest value of each stretch."""
    drawn = [(line, thinned(line.points, line.mark)) for line in series if line.points]
    if not drawn:
        return ""
    indices = [point[0] for _, points in drawn for point in points]
    low, high = min(indices), max(indices)
    x = Scale(low, high if high > low else low + 1, LEFT, WIDTH - RIGHT)
    legend = math.ceil(len(drawn) / 2) * LINE + 6
    height = HEIGHT + legend
    y = Scale(*domain([point[1] for _, points in drawn for point in points]), height - BOTTOM, TOP + legend)
    parts = _legend([(line.label, line.colour) for line, _ in drawn])
    parts += _frame(x, y, x_label, y_label, whole=True)
    for line, points in drawn:
        place = [(x(index), y(value)) for index, value, _ in points]
        colour = line.colour % COLOURS
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in place)
        parts.append(
            f'<g class="c{colour}"><path class="line" d="{path}"{_dash(line.colour) if len(points) <= MOST_DASHED else ""}/>'
        )
        # Few points are seen one by one; of many, each has a spot to hover over, and some have the shape.
        every = 1 if len(points) <= MOST_DASHED else len(points) // MOST_MARKERS
        for number, ((a, b), (index, _, note)) in enumerate(zip(place, points, strict=True)):
            shown = number % every == 0
            marked = index == line.mark
            shape = (
                _marker(line.colour, a, b, 3.2) if shown else f'<circle class="spot" cx="{a:.1f}" cy="{b:.1f}" r="4"/>'
            )
            ring = f'<circle class="ring" cx="{a:.1f}" cy="{b:.1f}" r="9"/>' if marked else ""
            hover = f"{mark_text}: {note}" if marked else note
            parts.append(f"<g><title>{escape(hover)}</title>{shape}{ring}</g>")
        parts.append("</g>")
    described = ", ".join(f"{line.label}: {len(line.points)} points" for line, _ in drawn)
    return _svg(identifier, title, described, parts, height)


def thinned(
    points: Sequence[tuple[float, float, str]], mark: float | None = None
) -> Sequence[tuple[float, float, str]]:
    """Give about MOST_POINTS points: of each stretch the lowest value, which is the one that matters, and the marked one."""
    if len(points) <= MOST_POINTS:
        return points
    kept: list[tuple[float, float, str]] = []
    for place in range(MOST_POINTS):
        start, end = (round(edge * len(points) / MOST_POINTS) for edge in (place, place + 1))
        stretch = points[start:end]
        worst = min(stretch, key=lambda point: point[1])
        kept += [point for point in stretch if point is worst or point[0] == mark]
    return kept


def merged(counts: Sequence[float], most: int = MOST_BARS) -> list[float]:
    """Give at most `most` bars: neighbouring bins are added up; every bar stands for the same number of bins but the last."""
    width = math.ceil(len(counts) / most) if counts else 1
    return [sum(counts[start : start + width]) for start in range(0, len(counts), width)]


def histogram(identifier: str, title: str, edges: Sequence[float], counts: Sequence[float], x_label: str) -> str:
    """Draw a histogram with axes; edges has one entry more than counts."""
    if len(counts) < 1 or len(edges) != len(counts) + 1 or edges[-1] <= edges[0] or max(counts) <= 0:
        return ""
    width = math.ceil(len(counts) / MOST_BARS)
    bars = merged(counts)
    borders = [*edges[:-1:width], edges[-1]]
    height = 240
    x = Scale(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    y = Scale(*domain(bars, zero=True), height - BOTTOM, TOP)
    parts = _frame(x, y, x_label, "count")
    for count, left, right in zip(bars, borders, borders[1:], strict=False):
        if count > 0:
            note = f"{left:.4g} to {right:.4g}: {count:.0f}"
            a, b, c = x(left), x(right), y(count)
            parts.append(
                f'<rect class="bar" x="{a:.1f}" y="{c:.1f}" width="{max(b - a - 0.6, 0.6):.1f}" '
                f'height="{y.start - c:.1f}"><title>{escape(note)}</title></rect>'
            )
    return _svg(identifier, title, f"from {edges[0]:.4g} to {edges[-1]:.4g}", parts, height)


STRIP_WIDTH, STRIP_HEIGHT = 260, 46
_STRIP_LEFT, _STRIP_RIGHT, _STRIP_BASE = 4, 256, 24


def strip(
    values: tuple[float, float], counts: Sequence[float], quantized: tuple[float, float] | None, saturated: bool
) -> str:
    """Draw one layer's values as a small histogram, and under it the range that its integers can express.

    Both share one axis, from the least to the largest of the four ends, whose numbers stand below.
    """
    ends = [*values, *(quantized or ())]
    low, high = min(ends), max(ends)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    x = Scale(low, high, _STRIP_LEFT, _STRIP_RIGHT)
    bars = merged(counts)
    tallest = max(bars, default=0.0)
    path = ""
    if tallest > 0 and values[1] > values[0]:
        width = (values[1] - values[0]) / len(counts) * math.ceil(len(counts) / MOST_BARS)
        for place, count in enumerate(bars):
            # Square roots: activations pile up at 0, and what matters lies in the tails.
            height = math.sqrt(max(count, 0.0) / tallest) * (_STRIP_BASE - 2)
            if height > 0:
                left = x(values[0] + place * width)
                right = max(x(min(values[0] + (place + 1) * width, values[1])), left + 0.5)
                path += f"M{left:.1f} {_STRIP_BASE}V{_STRIP_BASE - max(height, 0.8):.1f}H{right:.1f}V{_STRIP_BASE}Z"
    else:
        path = f"M{x(values[0]) - 1:.1f} {_STRIP_BASE}V2H{x(values[1]) + 1:.1f}V{_STRIP_BASE}Z"
    described = f"values from {values[0]:.4g} to {values[1]:.4g}"
    parts = [f'<path class="bar" d="{path}"/>']
    if quantized is not None:
        described += f", quantized range from {quantized[0]:.4g} to {quantized[1]:.4g}"
        a, b, line = x(quantized[0]), x(quantized[1]), _STRIP_BASE + 5
        kind = "range saturated" if saturated else "range"
        parts.append(f'<path class="{kind}" d="M{a:.1f} {line - 4}v8M{a:.1f} {line}H{b:.1f}M{b:.1f} {line - 4}v8"/>')
    parts.append(f'<text x="{_STRIP_LEFT}" y="44">{escape(f"{low:.3g}")}</text>')
    parts.append(f'<text x="{_STRIP_RIGHT}" y="44" text-anchor="end">{escape(f"{high:.3g}")}</text>')
    return (
        f'<svg class="strip" role="img" aria-label="{escape(described)}" '
        f'viewBox="0 0 {STRIP_WIDTH} {STRIP_HEIGHT}" width="{STRIP_WIDTH}" height="{STRIP_HEIGHT}">'
        f"<title>{escape(described)}</title>{''.join(parts)}</svg>"
    )


def _svg(identifier: str, title: str, description: str, parts: Sequence[str], height: float = HEIGHT) -> str:
    return (
        f'<figure class="plot" tabindex="0"><svg role="img" aria-labelledby="{identifier}-t {identifier}-d" '
        f'viewBox="0 0 {WIDTH} {height:.0f}">'
        f'<title id="{identifier}-t">{escape(title)}</title>'
        f'<desc id="{identifier}-d">{escape(description, 2000)}</desc>\n' + "\n".join(parts) + "\n</svg>"
        f"<figcaption>{escape(title)}</figcaption></figure>"
    )


def _frame(x: Scale, y: Scale, x_label: str, y_label: str, *, whole: bool = False) -> list[str]:
    """Draw grid, ticks and axis titles; `whole` keeps fractions off an axis of indices."""
    bottom, top = y.start, y.end
    parts = []
    y_step = step_of(y.low, y.high, 6)
    for value in ticks(y.low, y.high):
        at = y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{tick_text(value, y_step)}</text>')
    x_step = step_of(x.low, x.high, 8, whole=whole)
    for value in ticks(x.low, x.high, 8, whole=whole):
        at = x(value)
        parts.append(f'<path class="axis" d="M{at:.1f} {bottom:.1f}v5"/>')
        text = tick_text(value, x_step)
        middle = min(at, WIDTH - len(text) * CHARACTER / 2)  # the last one may be wider than the margin
        parts.append(f'<text x="{middle:.1f}" y="{bottom + 19:.1f}" text-anchor="middle">{text}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {top:.1f}V{bottom:.1f}H{WIDTH - RIGHT}"/>')
    parts.append(
        f'<text class="title" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{bottom + 42:.1f}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = (top + bottom) / 2
    parts.append(
        f'<text class="title" transform="translate(15 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return parts


def _marker(colour: int, x: float, y: float, r: float = 6.0) -> str:
    """Draw the shape that belongs to a colour: circle, square, triangle, diamond, and their hollow forms."""
    hollow = ' class="hollow"' if colour % COLOURS >= 4 else ""
    shape = colour % 4
    if shape == 0:
        return f'<circle{hollow} cx="{x:.1f}" cy="{y:.1f}" r="{r:g}"/>'
    outline = {
        1: ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        2: ((0.0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
        3: ((0.0, -1.25), (1.25, 0.0), (0.0, 1.25), (-1.25, 0.0)),
    }[shape]
    corners = "L".join(f"{x + dx * r:.1f} {y + dy * r:.1f}" for dx, dy in outline)
    return f'<path{hollow} d="M{corners}Z"/>'


def _dash(colour: int) -> str:
    dash = _DASHES[colour % COLOURS]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _legend(series: Sequence[tuple[str, int]]) -> list[str]:
    parts = []
    for place, (label, colour) in enumerate(series):
        x = LEFT + (place % 2) * (WIDTH - LEFT - RIGHT) / 2
        y = TOP + (place // 2) * LINE
        parts.append(
            f'<g class="c{colour % COLOURS}"><path class="line" d="M{x:.0f} {y:.0f}h34"{_dash(colour)}/>'
            f'{_marker(colour, x + 17, y, 3.2)}</g><text x="{x + 42:.0f}" y="{y + 4:.0f}">{escape(label, 32)}</text>'
        )
    return parts


_Box = tuple[float, float, float, float]


def _labels(labels: Sequence[str], places: Sequence[tuple[float, float]]) -> list[str]:
    """Put each label right, left, above or below its point, where it covers no point and no other label.

    The width of a text is only known to the browser: each is anchored at the end that lies at its point, so that what is
    reckoned wrong grows away from it.
    """
    taken: list[_Box] = [(x - 10, y - 10, x + 10, y + 10) for x, y in places]
    parts = []
    for label, (x, y) in zip(labels, places, strict=True):
        text = label if len(label) <= 28 else label[:27] + "…"
        width = len(text) * CHARACTER
        candidates = [(x + 13, y + 4, "start"), (x - 13, y + 4, "end"), (x, y - 14, "middle"), (x, y + 24, "middle")]
        near = len(candidates)
        # A crowd of equal points: further down and up, one line after another.
        for anchor, at in (("start", x + 13), ("end", x - 13)):
            candidates += [(at, y + 4 + sign * LINE * turn, anchor) for turn in range(1, 12) for sign in (1, -1)]
        for place, (at, base, anchor) in enumerate(candidates):
            left = at - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            box = (left - 2, base - 11, left + width + 2, base + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= 2 and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                if place >= near:
                    edge = at - 2 if anchor == "start" else at + 2
                    parts.append(f'<path class="leader" d="M{x:.1f} {y:.1f}L{edge:.1f} {base - 4:.1f}"/>')
                end = "" if anchor == "start" else f' text-anchor="{anchor}"'
                parts.append(f'<text class="label" x="{at:.1f}" y="{base:.1f}"{end}>{escape(text)}</text>')
                break
    return parts


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
