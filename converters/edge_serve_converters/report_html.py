"""The report as one HTML file that needs nothing else: no network, no script. What it draws is the JSON report: a bundle's
report.json, or what --json prints.

Every key of the document may be absent or null: then what it would have said is left out. Everything in it is escaped, and
whatever a large model makes long is cut with a note, so that the file stays at some hundred kilobytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_serve_converters import plots, report_compatibility, report_layers
from edge_serve_converters.report_markup import (
    ABSENT,
    TASKS,
    counted,
    decibels,
    entries,
    escape,
    figure,
    is_exact,
    mapping,
    note,
    number,
    numbers,
    percent,
    plain,
    prose,
    section,
    sentence,
    size,
    table,
)
from edge_serve_converters.report_style import CSS

MOST_VARIANTS = 40
MOST_WARNINGS = 60
MOST_INPUTS = 12
# The recipe is shown as paths and values; what is nested deeper, or goes on longer, is in the JSON report.
MOST_FACTS = 80
_FACT_DEPTH = 4

# What is drawn against size and latency: the first of these that is known of any variant; True: in per cent.
_METRICS: tuple[tuple[str, str, bool], ...] = (
    ("task", "", False),
    ("top1_agreement", "same class as the {}", True),
    ("sqnr_db", "SQNR in dB", False),
    ("cosine", "lowest cosine", False),
)
_DELEGATES = {"none": "without a delegate"}


def render(document: Mapping[str, Any]) -> str:
    """Draw a report (`kind` conversion or comparison) as a whole HTML file, UTF-8 text."""
    title = _title(document)
    variants = entries(document.get("variants"))[:MOST_VARIANTS]
    failed = entries(document.get("failed"))[:MOST_VARIANTS]
    parts = [
        ("variants", "Variants", _variants(document, variants)),
        ("plots", "Quality against cost", _plots(document, variants)),
        ("refused", "Refused", _failed(failed)),
        ("layers", "Error by layer", report_layers.errors(document, [*variants, *failed])),
        ("ranges", "Ranges by layer", report_layers.ranges([*variants, *failed])),
        ("calibration", "Calibration inputs", _calibration(mapping(document.get("calibration")))),
        ("compatibility", "Compatibility", report_compatibility.render(variants)),
        ("made", "How it was made", _made(document)),
    ]
    sections = [(name, heading, section(name, heading, body)) for name, heading, body in parts]
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, body in sections if body)
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>{escape(title)}</title><style>{CSS}</style></head><body>",
            f"<header><h1>{escape(title)}</h1>",
            _measured(document, variants),
            _verdict(document, variants, failed),
            f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main>',
            *(body for _, _, body in sections if body),
            f"</main><footer><p>Made by edge-serve; {_elsewhere(document)}.</p></footer></body></html>\n",
        )
    )


def _elsewhere(document: Mapping[str, Any]) -> str:
    """Say where the JSON report is, which has the same figures and all that is cut here."""
    if document.get("kind") != "comparison" and document.get("version") is not None:
        return "the same figures are in the bundle's report.json"
    return "the same command with --json prints these figures as a JSON report"


def _title(document: Mapping[str, Any]) -> str:
    name = plain(document.get("name") or "model", 120)
    if document.get("kind") == "comparison":
        return f"Comparison: {name}"
    version = document.get("version")
    return f"Conversion: {name}" + (f", version {plain(version, 20)}" if version is not None else "")


def _measured(document: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> str:
    on = document.get("measured_on")
    if on is None:
        return ""
    samples = next(
        (count for entry in variants if (count := number(mapping(entry.get("quality")).get("samples"))) is not None),
        None,
    )
    text = f"Quality was measured on {'' if samples is None else f'{samples:.0f} '}{plain(on)}"
    if on == "random inputs":
        text += ": that says whether a file computes the same function, not how it does on real inputs"
    elif document.get("kind") == "comparison":
        text += ", which may include samples that calibrated one of the models: on those it does better than on others"
    return f"<p>{escape(text)}.</p>"


def _verdict(
    document: Mapping[str, Any], variants: Sequence[Mapping[str, Any]], failed: Sequence[Mapping[str, Any]]
) -> str:
    comparison = document.get("kind") == "comparison"
    refused = {plain(entry.get("name")) for entry in failed}
    shipped = [entry for entry in variants if not comparison or plain(entry.get("name")) not in refused]
    items = []
    if shipped:
        names = ", ".join(f"<b>{escape(entry.get('name'), 80)}</b>" for entry in shipped)
        default = document.get("default")
        ending = f"; the default is {escape(default, 80)}" if default is not None and not comparison else ""
        items.append(f'<li class="good"><b>✓ {"Compared" if comparison else "Shipped"}</b> {names}{ending}.</li>')
    elif not comparison:
        items.append('<li class="bad"><b>✕ Nothing was shipped.</b> No variant passed its checks.</li>')
    for entry in failed:
        word = "Failed" if comparison else "Refused"
        items.append(
            f'<li class="bad prose"><b>✕ {word} {escape(entry.get("name"), 80)}</b>: {prose(_short_reason(entry))}</li>'
        )
    texts = document.get("warnings")
    texts = [text for text in texts if isinstance(text, str)] if isinstance(texts, list | tuple) else []
    items += [f'<li class="warn prose"><b>! Warning</b> {prose(text)}</li>' for text in texts[:MOST_WARNINGS]]
    if len(texts) > MOST_WARNINGS:
        items.append(
            f'<li class="warn"><b>!</b> {len(texts) - MOST_WARNINGS} more warnings are in the JSON report.</li>'
        )
    return f'<ul class="verdict" aria-label="Verdict">{"".join(items)}</ul>'


def _reason(entry: Mapping[str, Any]) -> str:
    """Give why a file was refused, without its name, which stands before it."""
    reason = entry.get("reason")
    return reason.removeprefix(f"{entry.get('name')}: ") if isinstance(reason, str) else ABSENT


def _short_reason(entry: Mapping[str, Any]) -> str:
    """Give what the gates said; the section on refused files says the rest."""
    texts = [gate["text"] for gate in entries(entry.get("gates")) if isinstance(gate.get("text"), str)]
    reason, told = _reason(entry), "; ".join(texts)
    return told if reason.startswith(told) and told else reason


def _task_name(variants: Sequence[Mapping[str, Any]]) -> str:
    """Name the task metric that the variants were measured by."""
    tasks = (mapping(mapping(entry.get("quality")).get("task")).get("metric") for entry in variants)
    return next((TASKS.get(name, plain(name, 40)) for name in tasks if isinstance(name, str)), "task metric")


def _task(quality: Mapping[str, Any]) -> str:
    """Give the task metric and, in points of a hundred, how it moved from the float model (or the reference)."""
    task = mapping(quality.get("task"))
    drop = number(task.get("drop"))
    moved = "" if drop is None else f" ({-drop * 100:+.1f} points)" if abs(drop) >= 0.0005 else " (±0)"
    return figure(task.get("variant"), ".4f") + moved.replace("-", "−")


def _variants(document: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> str:
    """Give two tables, which fit a page each: what comes out of the variants, and what they cost and need."""
    sizes = [found for entry in variants if (found := number(entry.get("bytes"))) is not None]
    against = "the reference" if document.get("kind") == "comparison" else "the float model"
    quality = table(
        f"Quality; errors are against {against}",
        ("variant", "quantization", "size", _task_name(variants), "same class", "SQNR", "cosine", "max error", "mean error"),
        [_quality(document, entry) for entry in variants],
        numeric=frozenset(range(2, 9)),
    )  # fmt: skip
    cost = table(
        "Cost, and what it takes to run",
        ("variant", "file", "I/O", "of largest", "latency p50", "p90", "XNNPACK takes", "needs TFLite", "stays float"),
        [_cost(document, entry, max(sizes, default=0.0)) for entry in variants],
        numeric=frozenset(range(3, 8)),
    )
    timed = {
        f"{_DELEGATES.get(delegate := plain(latency.get('delegate'), 20), delegate)}, {plain(latency.get('threads'), 20)} "
        f"thread{'' if latency.get('threads') == 1 else 's'}, {plain(latency.get('runs'), 20)} runs"
        for entry in variants
        if (latency := mapping(entry.get("latency_ms")))
    }
    how = f"Latency was measured on the machine that made this report: {'; '.join(sorted(timed))}." if timed else ""
    floats = ((escape(entry.get("name"), 80), _stays_float(entry)[1]) for entry in variants)
    which = "".join(f'<p class="note">Float in {name}: {told}.</p>' for name, told in floats if told)
    return quality + cost + which + (note(how) if how else "") + _outputs(variants)


def _name(document: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """Give a variant's name, and what it is besides."""
    name = escape(entry.get("name"), 80)
    if entry.get("name") is not None and entry.get("name") == document.get("default"):
        name += " (reference)" if document.get("kind") == "comparison" else " (default)"
    return name


def _quality(document: Mapping[str, Any], entry: Mapping[str, Any]) -> tuple[str, ...]:
    quality = mapping(entry.get("quality"))
    return (
        _name(document, entry),
        escape(entry.get("quantization"), 60),
        size(entry.get("bytes")),
        _task(quality),
        percent(quality.get("top1_agreement")),
        decibels(quality.get("sqnr_db")),
        figure(quality.get("cosine"), ".5f"),
        figure(quality.get("max_error")),
        figure(quality.get("mean_error")),
    )


def _cost(document: Mapping[str, Any], entry: Mapping[str, Any], largest: float) -> tuple[str, ...]:
    latency = mapping(entry.get("latency_ms"))
    claims = mapping(mapping(entry.get("compatibility")).get("xnnpack"))
    total = number(claims.get("total"))
    if total is None:
        counts = [count for value in mapping(entry.get("operators")).values() if (count := number(value)) is not None]
        total = sum(counts) if counts else None
    claimed = number(claims.get("claimed", entry.get("xnnpack_operators")))
    bytes_ = number(entry.get("bytes"))
    return (
        _name(document, entry),
        escape(entry.get("file"), 80),
        escape(entry.get("io"), 40),
        percent(bytes_ / largest) if bytes_ is not None and largest else ABSENT,
        figure(latency.get("p50"), ".3g", " ms"),
        figure(latency.get("p90"), ".3g", " ms"),
        ABSENT if claimed is None else f"{claimed:.0f}" + ("" if total is None else f" of {total:.0f}"),
        escape(entry.get("min_runtime"), 40),
        _stays_float(entry)[0],
    )


def _stays_float(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Give how much of a quantized variant stays float, short for the table, and which operators or layers that are, escaped."""
    kept = entry.get("kept_float")
    if isinstance(kept, list | tuple) and kept:
        shown = ", ".join(escape(layer, 60) for layer in kept[:6]) + (f" and {len(kept) - 6} more" * (len(kept) > 6))
        return f"{len(kept)} layer{'s' * (len(kept) > 1)}", f"on purpose {shown}"
    counts = [count for value in mapping(entry.get("float_operators")).values() if (count := number(value)) is not None]
    if not counts:
        return "", ""
    return f"{sum(counts):.0f} operator{'s' * (sum(counts) > 1)}", counted(entry.get("float_operators"))


def _outputs(variants: Sequence[Mapping[str, Any]]) -> str:
    """Give the figures of each output; they say more than the variant's only where a model has several."""
    rows = []
    for entry in variants:
        outputs = mapping(mapping(entry.get("quality")).get("outputs"))
        if len(outputs) < 2:
            continue
        for name, value in outputs.items():
            known = mapping(value)
            limits = numbers(known.get("range"))
            rows.append(
                (
                    f"{escape(entry.get('name'), 80)}: {escape(name, 80)}",
                    figure(known.get("max_error")),
                    figure(known.get("mean_error")),
                    figure(known.get("cosine"), ".5f"),
                    decibels(known.get("sqnr_db")),
                    f"{limits[0]:.3g} to {limits[1]:.3g}" if len(limits) == 2 else ABSENT,
                )
            )
    head = ("output", "max error", "mean error", "cosine", "SQNR", "range of the float model")
    drawn = table("Figures of each output", head, rows, numeric=frozenset({1, 2, 3, 4, 5}))
    return f"<details><summary>Outputs one by one</summary>{drawn}</details>" if drawn else ""


def _value(quality: Mapping[str, Any], metric: str) -> float | None:
    return number(mapping(quality.get("task")).get("variant")) if metric == "task" else number(quality.get(metric))


def _reference_value(metric: str) -> float | None:
    """Give a comparison's reference its place in the plots: it agrees with itself; against noise it has no number."""
    return 1.0 if metric in ("top1_agreement", "cosine") else None


def _plots(document: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> str:
    comparison = document.get("kind") == "comparison"
    known = [(colour, entry, mapping(entry.get("quality"))) for colour, entry in enumerate(variants)]
    measured = {
        choice: {value for _, _, quality in known if (value := _value(quality, choice[0])) is not None}
        for choice in _METRICS
    }
    there = [choice for choice, values in measured.items() if values]
    if not there:
        return ""
    # A figure that is the same for all says so in the table; the plot shows one that tells them apart.
    chosen = next((choice for choice in there if len(measured[choice]) > 1), there[0])
    metric, label, share = chosen
    label = _task_name(variants) if metric == "task" else label.format("reference" if comparison else "float model")
    factor, top = (100.0, 100.0) if share else (1.0, 1.0 if metric in ("task", "cosine") else None)
    y_label = f"{label} in %" if share else label
    sizes = [found for entry in variants if (found := number(entry.get("bytes"))) is not None]
    unit, scale = ("MB", 1e6) if max(sizes, default=0) >= 1e6 else ("kB", 1e3)
    by_size, by_latency, exact = [], [], []
    for colour, entry, quality in known:
        value, name = _value(quality, metric), plain(entry.get("name"), 60)
        if value is None and comparison and entry.get("name") == document.get("default"):
            value = _reference_value(metric)
        if value is None:
            continue
        if metric == "sqnr_db" and is_exact(value):
            exact.append(name)
            continue
        bytes_, latency = number(entry.get("bytes")), number(mapping(entry.get("latency_ms")).get("p50"))
        told = f"{name}: {y_label} {value * factor:.4g}"
        if bytes_ is not None:
            by_size.append(plots.Point(name, bytes_ / scale, value * factor, f"{told}, {size(bytes_)}", colour))
        if latency is not None:
            by_latency.append(plots.Point(name, latency, value * factor, f"{told}, {latency:.3g} ms", colour))
    title = label[:1].upper() + label[1:]
    drawn = [
        plots.scatter("size", f"{title} against size", by_size, f"size in {unit}", y_label, top=top),
        plots.scatter("latency", f"{title} against latency", by_latency, "median latency in ms", y_label, top=top),
    ]
    told = "Further up is better, further left is smaller or faster. Hover over a point for its figures."
    if exact:
        told += f" No point: {', '.join(exact)}, which is exact (no error)."
    hint = note(told)
    return f'{hint}<div class="plots">{"".join(drawn)}</div>' if any(drawn) else ""


def _failed(failed: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for entry in failed:
        quality = mapping(entry.get("quality"))
        rows = [
            (escape(gate.get("gate"), 80), figure(gate.get("limit"), ".4g"), figure(gate.get("value"), ".4g"))
            for gate in entries(entry.get("gates"))
        ]
        facts = [
            f"{label} {text}"
            for label, text in (
                ("cosine", figure(quality.get("cosine"), ".5f")),
                ("SQNR", decibels(quality.get("sqnr_db"))),
                ("same class", percent(quality.get("top1_agreement"))),
                ("largest error", figure(quality.get("max_error"))),
            )
            if text != ABSENT
        ]
        if number(mapping(quality.get("task")).get("variant")) is not None:
            facts.append(f"{escape(_task_name([entry]))} {_task(quality)}")
        first, reason, gates = entry.get("first_bad_layer"), _reason(entry), _short_reason(entry)
        parts.append(f'<h3>✕ {escape(entry.get("name"), 80)}</h3><p class="prose">{prose(sentence(gates))}.</p>')
        if rest := reason.removeprefix(gates).lstrip(". "):
            parts.append(f'<p class="prose">{prose(sentence(rest))}.</p>')
        if first is not None and "error begins at" not in reason:
            parts.append(f"<p>The error begins at layer <code>{escape(first, 200)}</code>.</p>")
        parts.append(table("Gates that said no", ("gate", "limit", "measured"), rows, numeric=frozenset({1, 2})))
        if facts:
            parts.append(f"<p>Measured: {', '.join(facts)}.</p>")
    return "\n".join(part for part in parts if part)


def _calibration(calibration: Mapping[str, Any]) -> str:
    samples, held = number(calibration.get("samples")), number(calibration.get("held_back"))
    parts = []
    if samples is not None:
        kept = "" if held is None else f", {held:.0f} more were held back to measure quality on"
        parts.append(f"<p>{samples:.0f} samples calibrated{kept}.</p>")
    inputs = mapping(calibration.get("inputs"))
    rows, drawn = [], []
    for place, (name, value) in enumerate(list(inputs.items())[:MOST_INPUTS]):
        known = mapping(value)
        rows.append(
            (escape(name, 120), *(figure(known.get(key), ".4g") for key in ("min", "p01", "mean", "p99", "max", "std")))
        )
        histogram = mapping(known.get("histogram"))
        edges, counts = numbers(histogram.get("edges")), numbers(histogram.get("counts"))
        title = f"Values of input {plain(name, 60)} in the calibration samples"
        drawn.append(plots.histogram(f"input{place}", title, edges, counts, "value"))
    parts.append(
        table("Inputs, as the model takes them", ("input", "least", "1 %", "mean", "99 %", "largest", "deviation"), rows,
              numeric=frozenset(range(1, 7)))
    )  # fmt: skip
    if any(drawn):
        parts.append(f'<div class="plots">{"".join(drawn)}</div>')
    if len(inputs) > MOST_INPUTS:
        parts.append(note(f"{len(inputs) - MOST_INPUTS} more inputs are in the JSON report."))
    return "\n".join(part for part in parts if part)


def _made(document: Mapping[str, Any]) -> str:
    facts: list[tuple[str, str]] = []
    for key in ("source", "compared", "converter", "recipe", "seed", "data", "calibration"):
        value = document.get(key)
        if key in ("calibration", "recipe"):  # the inputs have a section, and a recipe repeats what stands above it
            said = ("inputs", "source", "converter", "calibration")
            value = {name: fact for name, fact in mapping(value).items() if name not in said}
        _flatten(key, value, 0, facts)
    seconds = [
        (f"time: {name}", f"{found:.1f} s")
        for name, value in list(mapping(document.get("seconds")).items())[:MOST_VARIANTS]
        if (found := number(value)) is not None
    ]
    rows = [(escape(key, 120), f"<code>{escape(value, 200)}</code>") for key, value in (facts[:MOST_FACTS] + seconds)]
    drawn = table(
        "Versions, hashes and options: what it takes to make it again", ("what", "value"), rows, numeric=frozenset()
    )
    cut = note(f"{len(facts) - MOST_FACTS} more facts are in the JSON report.") if len(facts) > MOST_FACTS else ""
    return drawn + cut


def _flatten(key: str, value: Any, depth: int, facts: list[tuple[str, str]]) -> None:
    if isinstance(value, Mapping) and depth < _FACT_DEPTH:
        for name, inner in value.items():
            _flatten(f"{key}: {plain(name, 60)}" if depth else f"{key} {plain(name, 60)}", inner, depth + 1, facts)
    elif value not in (None, [], {}, ()):
        listed = isinstance(value, list | tuple)
        facts.append((key, ", ".join(plain(part, 60) for part in value[:20]) if listed else plain(value, 200)))
