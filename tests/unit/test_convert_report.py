"""report.html: what it says, that nothing from a document can break out of it, and that plots put things where they belong."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from edge_serve_converters import plots, report_layers, report_markup
from edge_serve_converters.report_html import render

VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})
HOSTILE = "</svg><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;\u202e\x00\x1b[31m"


class Outline(HTMLParser):
    """Checks that every element is closed in order, and keeps elements, identifiers, links and words."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        """Give all words with single spaces."""
        return " ".join(" ".join(self.words).split())


def read(page: str) -> Outline:
    """Parse a page; every element must be closed, every SVG well-formed, and nothing may come from elsewhere."""
    outline = Outline()
    outline.feed(page)
    outline.close()
    assert outline.open == []
    for drawing in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ET.fromstring(drawing)
    names = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(names) == len(set(names))
    for tag, attributes in outline.tags:
        assert tag not in ("script", "link", "img", "iframe", "object")
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        assert str(attributes.get("href", "#")).startswith("#")
        for role in str(attributes.get("aria-labelledby") or "").split():
            assert role in names
    return outline


def variant(name: str, **changes: Any) -> dict[str, Any]:
    """Give a variant with everything that a report may say of it."""
    layers = [
        {
            "index": index,
            "operator": "CONV_2D",
            "name": f"block/conv_{index}",
            "sqnr_db": 40.0 - 5 * index,
            "cosine": 0.999,
            "max_error": 0.01,
            "range": [-1.0, 3.0],
            "quantized_range": [-1.0, 2.0],
            "saturated": 0.05 if index == 2 else 0.0,
            "histogram": [1, 5, 9, 5, 1, 0, 0, 2],
        }
        for index in range(4)
    ]
    return {
        "name": name,
        "quantization": "int8",
        "io": "float32",
        "bytes": 50_000,
        "file": f"model.{name}.tflite",
        "operators": {"CONV_2D": 4},
        "float_operators": {},
        "xnnpack_operators": 3,
        "min_runtime": "2.3.0",
        "quality": {
            "measured_on": "held-back",
            "samples": 40,
            "max_error": 0.0125,
            "mean_error": 0.001,
            "cosine": 0.9991,
            "sqnr_db": 31.5,
            "top1_agreement": 0.975,
            "task": {"metric": "accuracy", "samples": 40, "float": 0.95, "variant": 0.925, "drop": 0.025},
            "outputs": {"y": {"max_error": 0.0125, "range": [0.0, 1.0]}, "z": {"max_error": 0.001}},
        },
        "latency_ms": {"p50": 0.25, "p90": 0.5, "min": 0.2, "runs": 100, "threads": 1, "delegate": "xnnpack"},
        "compatibility": {
            "operators": [{"name": "CONV_2D", "version": 3, "count": 4}],
            "runtimes": [
                {"name": "ai-edge-litert 2.3.0", "loads": True, "reasons": []},
                {"name": "tflite-runtime 2.14.0", "loads": False, "reasons": ["FULLY_CONNECTED version 12"]},
            ],
            "xnnpack": {"claimed": 3, "total": 4, "left": {"MEAN": 1}},
            "edgetpu": {
                "expected": 3,
                "total": 4,
                "prefix": 2,
                "stopped_by": "MEAN",
                "operators": [
                    {"index": 2, "operator": "MEAN", "name": "pool", "expected": False, "rule": "only over space"}
                ],
                "compiler": {"version": "16.0", "log": "4 operators"},
            },
            "gpu": {"expected": 4, "total": 4, "operators": []},
        },
        "layers": layers,
        "first_bad_layer": "block/conv_3",
        "kept_float": [],
        **changes,
    }


def document(**changes: Any) -> dict[str, Any]:
    """Give a whole report."""
    return {
        "report": 1,
        "kind": "conversion",
        "name": "digits",
        "version": 3,
        "default": "int8",
        "measured_on": "held-back samples",
        "source": {"format": "SavedModel", "sha256": "ab" * 32},
        "converter": {"edge_serve": "0.2.0", "tensorflow": "2.21.0"},
        "variants": [variant("int8"), variant("float16", bytes=100_000)],
        "failed": [
            {
                "name": "int16x8",
                "reason": "accuracy drops by 9 points",
                "gates": [{"gate": "max_drop", "limit": 0.01, "value": 0.09}],
                "quality": {"cosine": 0.9},
                "layers": variant("x")["layers"],
                "first_bad_layer": "block/conv_1",
            }
        ],
        "calibration": {
            "samples": 160,
            "held_back": 40,
            "sha256": "cd" * 32,
            "inputs": {
                "image": {
                    "min": 0.0,
                    "max": 1.0,
                    "mean": 0.25,
                    "std": 0.3,
                    "p01": 0.0,
                    "p99": 0.97,
                    "histogram": {"edges": [0.0, 0.5, 1.0], "counts": [30, 10]},
                }
            },
        },
        "warnings": ["only 16 samples"],
        "seconds": {"prepare": 1.25},
        **changes,
    }


def test_a_report_says_what_was_shipped_what_was_refused_and_why() -> None:
    text = read(render(document())).text
    for words in (
        "Conversion: digits, version 3",
        "Quality was measured on 40 held-back samples",
        "✓ Shipped int8 , float16 ; the default is int8",
        "✕ Refused int16x8 : accuracy drops by 9 points",
        "! Warning only 16 samples",
        "max_drop 0.01 0.09",
        "The error begins at layer block/conv_1",
        "50 kB 0.9250 (−2.5 points)",
        "float32 50.0 % 0.25 ms",
        "xnnpack, 1 thread, 100 runs",
        "✕ tflite-runtime 2.14.0 : FULLY_CONNECTED version 12",
        "3 of 4; the first 2 in one piece, then MEAN",
        "only over space",
        "160 samples calibrated, 40 more were held back",
        "ab" * 32,
    ):
        assert words in text


HOW_TO = (
    "there is no compiler here:\n  curl -fsSL key | sudo gpg\n  sudo apt-get update\nThen: convert again" + " x" * 1500
)


def test_a_warning_with_commands_keeps_its_lines_and_is_whole() -> None:
    page = render(document(warnings=[HOW_TO]))
    assert HOW_TO in page
    assert ".prose{white-space:pre-wrap" in page
    assert '<li class="warn prose"><b>! Warning</b> there is no compiler' in page
    assert render(document(warnings=["line\n" * 10_000])).count("line\n") <= report_markup.MAX_PROSE_LINES
    assert len(report_markup.prose("w" * 100_000)) == report_markup.MAX_PROSE
    assert report_markup.prose("a\x1b[31m\u202eb\n<i>") == "a [31m b\n&lt;i&gt;"


def test_a_refused_file_is_named_once_and_where_its_error_begins_is_said_once() -> None:
    gate = {"gate": "min_cosine", "limit": 0.95, "value": 0.1, "text": "output 'y' points another way"}
    refused = {
        **document()["failed"][0],
        "name": "int8",
        "reason": "int8: output 'y' points another way. the error begins at layer 1 (CONV_2D), block/conv_1: noise",
        "gates": [gate],
    }
    text = read(render(document(variants=[], failed=[refused], warnings=[]))).text
    assert "✕ Refused int8 : output 'y' points another way Refused" in text
    assert "✕ int8 Output 'y' points another way. The error begins at layer 1 (CONV_2D), block/conv_1: noise." in text
    assert text.count("error begins at") == 1
    refused["reason"] = "int8: the converter refuses the model"
    refused["gates"] = []
    text = read(render(document(variants=[], failed=[refused]))).text
    assert "✕ Refused int8 : the converter refuses the model" in text
    assert "✕ int8 The converter refuses the model." in text


def test_no_table_of_variants_is_wider_than_a_page() -> None:
    page = render(document(variants=[variant("dynamic", float_operators={f"OPERATOR_{n}": n for n in range(9)})]))
    tables = re.findall(r"<table>.*?</table>", page.split('id="plots"')[0], flags=re.DOTALL)
    assert len([table for table in tables if "<caption>Quality" in table or "<caption>Cost" in table]) == 2
    assert max(table.count('scope="col"') for table in tables) <= 9
    assert "OPERATOR_8 × 8" in page


def test_no_error_at_all_is_exact_and_no_number() -> None:
    layers = [{**variant("x")["layers"][n], "sqnr_db": value} for n, value in enumerate((200.0, 35.0, 30.0))]
    exact = {**variant("x")["quality"], "sqnr_db": 200.0, "task": None, "top1_agreement": None}
    lossy = {**exact, "sqnr_db": 31.5}
    page = render(document(variants=[variant("same", quality=exact), variant("int8", quality=lossy, layers=layers)]))
    assert "200.0 dB" not in page
    assert '<td class="n">exact</td>' in page
    assert "No point: same, which is exact (no error)." in page
    assert "1 layer has no error at all, and so no point." in page


def test_the_layers_say_what_they_are_measured_on_and_which_variants_have_none() -> None:
    bare = variant("float32", quantization="none", layers=[])
    other = variant("int16x8", quantization="int16x8", layers=[])
    variants = [bare, variant("int8"), other]
    text = read(render(document(variants=variants, failed=[], layers_on=8))).text
    assert "Layers were compared on 8 samples only" in text
    assert "which are of all 40 samples" in text
    assert "float32 has no line: it is what the others' layers are held against." in text
    assert "int16x8: layer by layer not compared." in text
    assert "Layers were compared" not in read(render(document())).text
    by_name = read(render(document(failed=[], layers_on={"int8": 1, "float16": 4}))).text
    assert "Layers were compared on 1 to 4 samples only" in by_name


def test_a_report_says_where_its_figures_are_as_json() -> None:
    assert "in the bundle's report.json" in read(render(document())).text
    for nothing in (document(version=None, variants=[]), document(kind="comparison", version=None)):
        text = read(render(nothing)).text
        assert "report.json" not in text
        assert "the same command with --json prints these figures" in text


def test_the_headings_are_linked_and_only_those_that_are_there() -> None:
    page = read(render(document()))
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    sections = [f"#{attributes['id']}" for tag, attributes in page.tags if tag == "section"]
    assert links == sections
    assert "#layers" in links
    bare = read(render({"kind": "conversion", "variants": [], "failed": []}))
    assert [tag for tag, _ in bare.tags if tag == "section"] == []
    assert "Nothing was shipped" in bare.text


def test_random_inputs_are_said_to_say_little() -> None:
    assert "not how it does on real inputs" in read(render(document(measured_on="random inputs"))).text


def test_a_comparison_is_no_conversion() -> None:
    text = read(render(document(kind="comparison", name="A int8 and B int8", version=None, default="A int8"))).text
    assert "Comparison: A int8 and B int8" in text
    assert "may include samples that calibrated one of the models" in text
    assert "✓ Compared" in text
    assert "Shipped" not in text


def test_a_comparison_s_reference_is_a_point_in_the_plots_too() -> None:
    variants = [variant("A", quality={}), variant("B", quality={"top1_agreement": 0.9})]
    page = render(document(kind="comparison", default="A", variants=variants, failed=[]))
    assert "A: same class as the reference in % 100, 50 kB" in page
    assert "B: same class as the reference in % 90, 50 kB" in page
    assert "A (reference)" in read(page).text


def test_the_plots_show_the_first_figure_that_tells_the_variants_apart() -> None:
    def titles(*figures: dict[str, Any]) -> list[str]:
        variants = [variant(f"v{place}", quality=quality) for place, quality in enumerate(figures)]
        page = read(render(document(variants=variants, failed=[], calibration=None)))
        return re.findall(r"(\w[\w ]*) against size", page.text)

    task = {"task": {"metric": "auc", "variant": 0.9}, "top1_agreement": 1.0, "sqnr_db": 40.0}
    worse = {"task": {"metric": "auc", "variant": 0.8}, "top1_agreement": 1.0, "sqnr_db": 30.0}
    assert "AUC" in titles(task, worse)[0]
    same = {**worse, "task": task["task"]}
    assert "SQNR in dB" in titles(task, same)[0]
    assert "AUC" in titles(task, task)[0]


def hostile(value: Any) -> Any:
    """Replace every text and name in a document by text that tries to break out."""
    if isinstance(value, dict):
        return {key: hostile(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [hostile(inner) for inner in value]
    return HOSTILE if isinstance(value, str) else value


def test_text_from_model_files_stays_text() -> None:
    bad = hostile(document())
    bad["kind"] = "conversion"
    for entry in bad["variants"]:
        entry["operators"] = {HOSTILE: 3}
        entry["quality"]["outputs"] = {HOSTILE: {"max_error": 1.0}, HOSTILE + "2": {}}
    bad["calibration"]["inputs"] = {HOSTILE: bad["calibration"]["inputs"]["image"]}
    bad["seconds"] = {HOSTILE: 1.0}
    page = render(bad)
    read(page)  # refuses scripts, handlers, and SVG that is not well-formed
    assert "<script" not in page
    assert "\u202e" not in page
    assert "\x1b" not in page


@pytest.mark.parametrize(
    "missing", [None, "text", [], {}, float("nan"), -1, 1e308, 5e-324, pytest.param(10**400, id="huge"), True]
)
def test_what_is_absent_null_or_nonsense_is_left_out(missing: Any) -> None:
    for key in document():
        read(render({**document(), key: missing}))
    for part in ("quality", "latency_ms", "compatibility", "layers", "operators", "kept_float", "bytes", "name"):
        read(render(document(variants=[{**variant("int8"), part: missing}])))
    for key in variant("x")["compatibility"]:
        found = {**variant("x")["compatibility"], key: missing}
        read(render(document(variants=[variant("int8", compatibility=found)])))
    for key in variant("x")["layers"][0]:
        layers = [{**layer, key: missing} for layer in variant("x")["layers"]]
        read(render(document(variants=[variant("int8", layers=layers)])))
    for key in ("histogram", "min"):
        inputs = {"image": {**document()["calibration"]["inputs"]["image"], key: missing}}
        read(render(document(calibration={"inputs": inputs})))


def test_a_large_model_makes_no_large_page() -> None:
    def layer(index: int) -> dict[str, Any]:
        return {
            **variant("x")["layers"][0],
            "index": index,
            "name": f"{'deep/' * 40}{index}",
            "sqnr_db": 60 - index % 50 + (-30 if index == 3333 else 0),
            "saturated": 0.5 if index == 1234 else 0.0,
            "histogram": list(range(512)),
        }

    variants = [variant(f"v{n}", layers=[layer(index) for index in range(5000)]) for n in range(8)]
    for entry in variants:
        entry["compatibility"]["edgetpu"]["operators"] *= 5000
    page = render(document(variants=variants, warnings=["w" * 2000] * 1000))
    assert len(page.encode()) < 2_000_000
    text = read(page).text
    assert "40 of 5000 layers are shown" in text
    assert "5000 layers, 1 saturated" in text
    assert "3333 CONV_2D" in page  # the worst of its stretch is still drawn
    assert "940 more warnings" in text


def test_layers_that_saturate_are_shown_first_of_all() -> None:
    layers = [
        {**variant("x")["layers"][0], "index": index, "name": f"layer{index}", "saturated": 0.2 if index == 90 else 0.0}
        for index in range(100)
    ]
    text = read(report_layers.ranges([{"name": "v", "layers": layers}])).text
    assert "90 layer90" in text
    assert "▲ 20.00%" in text


def numbers_of(drawing: str, pattern: str) -> list[tuple[float, ...]]:
    """Give the numbers of all matches."""
    return [tuple(float(part) for part in match) for match in re.findall(pattern, drawing)]


def test_points_lie_where_the_axes_say() -> None:
    points = [plots.Point("a", 50, 90, "a", 0), plots.Point("b", 100, 96, "b", 0)]
    drawing = plots.scatter("p", "title", points, "size in kB", "accuracy in %", top=100)
    (x_a, y_a), (x_b, y_b) = numbers_of(drawing, r'<circle cx="([\d.]+)" cy="([\d.]+)"')
    ticks = {
        text: float(x)
        for x, text in re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">([\d.]+)</text>', drawing)
    }
    assert ticks["0"] == plots.LEFT
    assert x_a == pytest.approx((ticks["0"] + ticks["100"]) / 2, abs=0.1)
    assert x_b == pytest.approx(ticks["100"], abs=0.1)
    heights = {
        text: float(y) - 4
        for y, text in re.findall(r'<text x="[\d.]+" y="([\d.]+)" text-anchor="end">([\d.]+)</text>', drawing)
    }
    assert y_a == pytest.approx(heights["90"], abs=0.1)
    assert y_b == pytest.approx(heights["96"], abs=0.1)
    assert y_b < y_a


def test_labels_of_equal_points_do_not_cover_each_other() -> None:
    points = [plots.Point(f"variant{n}", 50, 1.0, "", n) for n in range(6)]
    drawing = plots.scatter("p", "t", points, "x", "y")
    places = numbers_of(drawing, r'<text class="label" x="([\d.]+)" y="([\d.]+)"')
    assert len(places) == 6
    assert all(abs(one[1] - two[1]) >= 13 or one[0] != two[0] for one in places for two in places if one is not two)


def test_labels_keep_off_markers_and_far_ones_are_tied_to_their_point() -> None:
    crowd = [(57.3, 57.1), (60.4, 57.7), (58.1, 48.4), (57.5, 48.4), (193.0, 142.0)]
    points = [plots.Point(f"variant{n}", x, y, "", n) for n, (x, y) in enumerate(crowd)]
    drawing = plots.scatter("p", "t", points, "x", "y")
    across, upward = zip(*crowd, strict=True)
    x = plots.Scale(*plots.domain(across, zero=True), plots.LEFT, plots.WIDTH - plots.RIGHT)
    y = plots.Scale(*plots.domain(upward), plots.HEIGHT - plots.BOTTOM, plots.TOP)
    found = re.findall(r'<text class="label" x="([\d.]+)" y="([\d.]+)"(?: text-anchor="(\w+)")?>(\w+)<', drawing)
    assert len(found) == 5
    for at, base, anchor, text in found:
        width = 8 * len(text)  # no wider in the widest fonts of browsers
        left = float(at) - {"": 0, "middle": width / 2, "end": width}[anchor]
        for a, b in crowd:
            assert not (left < x(a) + 6 and x(a) - 6 < left + width and abs(float(base) - 4 - y(b)) < 10)
    crowded = plots.scatter("p", "t", [plots.Point(f"v{n}", 5, 5, "", n) for n in range(6)], "x", "y")
    assert crowded.count('class="leader"') == 2


def test_layers_are_counted_in_whole_numbers() -> None:
    series = [plots.Line("int8", [(0, 40, "a"), (1, 20, "b"), (2, 10, "c")], 0)]
    drawing = plots.lines("p", "t", series, "layer", "dB")
    assert re.findall(r'text-anchor="middle">([\d.]+)</text>', drawing) == ["0", "1", "2"]
    assert plots.ticks(0, 2, 8, whole=True) == [0, 1, 2]


def test_the_first_bad_layer_has_a_ring_around_its_point() -> None:
    series = [plots.Line("int8", [(0, 40, "a"), (1, 20, "b"), (2, 10, "c")], 0, mark=1)]
    drawing = plots.lines("p", "t", series, "layer", "dB", mark_text="first bad layer")
    ((x, y),) = numbers_of(drawing, r'<circle class="ring" cx="([\d.]+)" cy="([\d.]+)"')
    assert (x, y) in numbers_of(drawing, r'<circle cx="([\d.]+)" cy="([\d.]+)" r="3.2"')
    assert x == pytest.approx((plots.LEFT + plots.WIDTH - plots.RIGHT) / 2)
    assert "first bad layer: b" in drawing


def test_a_long_line_keeps_its_worst_points() -> None:
    points = [(float(n), 50.0 - (40 if n == 7777 else 0), str(n)) for n in range(10_000)]
    kept = plots.thinned(points, mark=4321)
    assert len(kept) <= plots.MOST_POINTS + 1
    assert points[7777] in kept
    assert points[4321] in kept
    assert list(kept) == sorted(kept)


def test_a_strip_draws_values_and_quantized_range_on_one_axis() -> None:
    drawing = plots.strip((0.0, 4.0), [1, 0, 0, 1], (0.0, 2.0), True)
    ET.fromstring(drawing)
    ((left, right),) = numbers_of(drawing, r'class="range saturated" d="M([\d.]+) 25v8M[\d.]+ 29H([\d.]+)')
    assert [left, right] == pytest.approx([4, 130])  # half of 4..256
    assert "quantized range from 0 to 2" in drawing
    ET.fromstring(plots.strip((1.0, 1.0), [], None, False))


def test_histograms_keep_their_counts_when_bins_are_merged() -> None:
    counts = [float(n) for n in range(1000)]
    assert sum(plots.merged(counts)) == sum(counts)
    assert len(plots.merged(counts)) <= plots.MOST_BARS
    drawing = plots.histogram("h", "t", [float(n) for n in range(1001)], counts, "value")
    assert sum(float(c) for c in re.findall(r"<title>[^<]*: (\d+)</title>", drawing)) == sum(counts)
    assert plots.histogram("h", "t", [0.0, 1.0], [0.0], "value") == ""
    assert plots.histogram("h", "t", [0.0], [1.0], "value") == ""


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (0.95, 1.0, [0.95, 0.96, 0.97, 0.98, 0.99, 1.0]), (-3, 4, [-2, 0, 2, 4])],
)
def test_ticks_are_round_numbers(low: float, high: float, wanted: list[float]) -> None:
    assert plots.ticks(low, high) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [
        (100_000, 20_000, "100k"),
        (2_500_000, 500_000, "2500k"),
        (3e6, 1e6, "3M"),
        (0, 20_000, "0"),
        (0.15, 0.05, "0.15"),
        (-20, 5, "−20"),
        (2e-7, 1e-7, "2e−07"),
    ],
)
def test_ticks_are_short(value: float, step: float, text: str) -> None:
    assert plots.tick_text(value, step) == text


@pytest.mark.parametrize("values", [[1.0], [0.0], [-200.0, 200.0], [1e-12, 2e-12], [1e12, 1e12], [0.999999, 1.0]])
def test_an_axis_holds_its_values(values: list[float]) -> None:
    low, high = plots.domain(values)
    assert low <= min(values)
    assert max(values) <= high
    assert high > low
    found = plots.ticks(low, high)
    assert 1 <= len(found) <= 8
    texts = [plots.tick_text(tick, plots.step_of(low, high, 6)) for tick in found]
    assert len(set(texts)) == len(texts) or math.isclose(low, high, rel_tol=1e-2)


def test_sizes_are_read_as_people_say_them() -> None:
    assert [report_markup.size(n) for n in (0, 999, 1000, 57_032, 13_900_000, 2_000_000_000, None)] == [
        *("0 B", "999 B", "1 kB", "57 kB", "13.9 MB", "2 GB", "–"),
    ]


def test_the_document_need_not_have_come_through_json() -> None:
    assert render(document()) == render(json.loads(json.dumps(document())))
