"""The words and tables of a report: everything that comes from a document is made harmless, short and readable here.

Names of layers, files and operators come out of model files that anybody may have made: they are hostile text.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edge_serve_converters.quality import MAX_DB

# Longer texts are cut: a page stays a page, whatever a model file has for a name.
MAX_TEXT = 400
# What is written for people to read and to copy (reasons, how-tos with commands) keeps its lines.
MAX_PROSE = 4000
MAX_PROSE_LINES = 80
MAX_ROWS = 100
MOST = 1e150
# Columns with longer cells (characters of markup) get room and may break within a word, as layer names must.
LONG_CELL = 36
ABSENT = "–"
# What people call the task metrics (task.py).
TASKS = {"accuracy": "accuracy", "auc": "AUC", "mean_iou": "mean IoU"}
_ELLIPSIS = "…"


def number(value: Any) -> float | None:
    """Give a finite number, or None for anything else (absent, null, NaN, text).

    Numbers whose squares float64 does not hold are none of ours, and would break the arithmetic of axes; tiny ones are 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        wide = float(value)
    except OverflowError:
        return None
    if not math.isfinite(wide) or abs(wide) > MOST:
        return None
    return wide if abs(wide) > 1 / MOST else 0.0


def mapping(value: Any) -> Mapping[str, Any]:
    """Give a table of the document, or an empty one where it is absent or null."""
    return value if isinstance(value, Mapping) else {}


def entries(value: Any) -> list[Mapping[str, Any]]:
    """Give a list of tables of the document, without what is none."""
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list | tuple) else []


def numbers(value: Any) -> list[float]:
    """Give a list of finite numbers; empty unless every entry is one."""
    if not isinstance(value, list | tuple):
        return []
    found = [number(entry) for entry in value]
    return [entry for entry in found if entry is not None] if None not in found else []


def interval(value: Any) -> tuple[float, float] | None:
    """Give a range [low, high] with low ≤ high; None for anything else."""
    found = numbers(value)
    return (found[0], found[1]) if len(found) == 2 and found[0] <= found[1] else None


def plain(value: Any, limit: int = MAX_TEXT) -> str:
    """Give a value as one short line of text, not escaped: control characters and directions of writing are taken out."""
    text = ABSENT if value is None else str(value)
    cleaned = "".join(character if character.isprintable() else " " for character in text[: limit * 2]).strip()
    return cleaned if len(cleaned) <= limit else cleaned[: limit - 1] + _ELLIPSIS


def escape(value: Any, limit: int = MAX_TEXT) -> str:
    """Give a value as text that is safe between tags and in quoted attributes, of HTML and of SVG."""
    return html.escape(plain(value, limit), quote=True)


def prose(value: Any, limit: int = MAX_PROSE) -> str:
    """Give a longer text, escaped, with its line breaks and indentation; shown as such where the style is pre-wrap."""
    return html.escape(plain_lines(value, limit), quote=True)


def plain_lines(value: Any, limit: int = MAX_PROSE) -> str:
    """Give a longer text with its line breaks and indentation, not escaped; all other control characters are taken out."""
    text = ABSENT if value is None else str(value)
    lines = text[: limit * 2].splitlines()
    kept = ["".join(sign if sign.isprintable() else " " for sign in line).rstrip() for line in lines[:MAX_PROSE_LINES]]
    told = "\n".join(kept).strip()
    cut = len(lines) > MAX_PROSE_LINES or len(told) > limit
    return told[: limit - 1] + _ELLIPSIS if cut else told


def sentence(text: str) -> str:
    """Begin a text with a capital letter."""
    return text[:1].upper() + text[1:]


def is_exact(value: Any) -> bool:
    """Tell whether a ratio in decibels stands for "no error at all" (quality.decibels)."""
    known = number(value)
    return known is not None and known >= MAX_DB


def decibels(value: Any) -> str:
    """Format a signal to noise ratio; without any noise it is exact."""
    return "exact" if is_exact(value) else figure(value, ".1f", " dB")


def figure(value: Any, form: str = ".3g", unit: str = "") -> str:
    """Format a number, or a dash where there is none."""
    known = number(value)
    return ABSENT if known is None else format(known, form) + unit


def percent(value: Any) -> str:
    """Format a share of 1 as per cent."""
    known = number(value)
    return ABSENT if known is None else f"{known * 100:.1f} %"


def size(value: Any) -> str:
    """Format bytes in decimal units."""
    known = number(value)
    if known is None:
        return ABSENT
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if known >= factor:
            return f"{known / factor:.3g} {unit}" if known < factor * 1000 else f"{known / factor:.0f} {unit}"
    return f"{known:.0f} B"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: frozenset[int]) -> str:
    """Draw a table of cells that are markup already; columns without any content are left out.

    `numeric` names the columns that are set to the right. The first column is each row's header. Rows beyond MAX_ROWS are
    left out with a note.
    """
    kept = list(rows)
    if not kept:
        return ""
    left_out = len(kept) - MAX_ROWS
    kept = kept[:MAX_ROWS]
    columns = [place for place in range(len(head)) if place == 0 or any(row[place] not in ("", ABSENT) for row in kept)]
    classes = {place: _class(place in numeric, max(len(row[place]) for row in kept)) for place in columns}
    lines = [f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>']
    lines.append(f"<caption>{escape(caption)}</caption><thead><tr>")
    lines += [f'<th scope="col"{classes[place]}>{escape(head[place])}</th>' for place in columns]
    lines.append("</tr></thead><tbody>")
    for row in kept:
        cells = [f'<th scope="row"{classes[0]}>{row[0]}</th>']
        cells += [f"<td{classes[place]}>{row[place]}</td>" for place in columns[1:]]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines.append("</tbody></table></div>")
    if left_out > 0:
        lines.append(note(f"{left_out} more rows are not shown; the JSON report has them all."))
    return "\n".join(lines)


def _class(numeric: bool, longest: int) -> str:
    """Choose how a column is set: figures to the right, long texts broken anywhere, short ones between words only."""
    return ' class="n"' if numeric else ' class="w"' if longest > LONG_CELL else ""


def note(text: str) -> str:
    """Give a small remark; the text is escaped."""
    return f'<p class="note">{escape(text, MAX_PROSE)}</p>'


def section(identifier: str, title: str, *parts: str) -> str:
    """Give a section with a heading, or nothing if all its parts are empty; `identifier` and `title` are our own words."""
    body = "\n".join(part for part in parts if part)
    if not body:
        return ""
    return f'<section id="{identifier}" aria-labelledby="{identifier}-h"><h2 id="{identifier}-h">{title}</h2>\n{body}\n</section>'


def counted(counts: Any, most: int = 12) -> str:
    """Give {name: count} as escaped text, the most frequent first."""
    known = sorted(
        ((name, found) for name, found in ((n, number(c)) for n, c in mapping(counts).items()) if found is not None),
        key=lambda entry: -entry[1],
    )
    shown = [f"{escape(name, 80)} × {count:.0f}" for name, count in known[:most]]
    if len(known) > most:
        shown.append(f"{len(known) - most} more kinds")
    return ", ".join(shown)
