"""Recipes: what they say, how the command line goes above it, and that all mistakes come at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve.bundle import TensorSpec
from edge_serve.errors import ConfigError, UsageError
from edge_serve.processing.image import ImageProcessor
from edge_serve.spec import InputSpec, OutputSpec
from edge_serve_converters.recipe import Recipe, combine, load, range_to_spec

FULL = """
schema = 1
quantize = ["int8", "float16"]
io = "uint8"
signatures = ["serving_default", "embed"]
batch = 2
labels = "classes/labels.txt"
samples = 50
seed = 7
keep_float = ["SOFTMAX", "head/*"]
auto = true
allow_float_operators = false
target = ["edgetpu", "gpu"]
compat = "tflite-runtime"
metric = "accuracy"
max_drop = 0.01
min_agreement = 0.98
min_cosine = 0.99

[input_shapes]
x = [1, 96, 96, 3]

[input]
kind = "image"
size = [96, 96]
resize = "fit"
range = [-1, 1]

[output]
type = "classification"
top_k = 3
"""


def recipe(folder: Path, text: str) -> Recipe:
    """Load a recipe from a file."""
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
    return load(folder / "recipe.toml")


def mistakes(folder: Path, text: str) -> list[str]:
    """Give the keys that a recipe's error names."""
    with pytest.raises(ConfigError) as caught:
        recipe(folder, text)
    assert str(caught.value).startswith(str(folder / "recipe.toml"))
    return [problem.key for problem in caught.value.problems]


def test_everything_that_a_conversion_takes_can_be_said(tmp_path: Path) -> None:
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / "labels.txt").write_text("a\nb\n")
    assert recipe(tmp_path, FULL) == Recipe(
        schema=1,
        quantize=("int8", "float16"),
        io="uint8",
        signatures=("serving_default", "embed"),
        input_shapes={"x": (1, 96, 96, 3)},
        batch=2,
        labels=str(tmp_path / "classes" / "labels.txt"),
        samples=50,
        seed=7,
        keep_float=("SOFTMAX", "head/*"),
        auto=True,
        allow_float_operators=False,
        target=("edgetpu", "gpu"),
        compat="tflite-runtime",
        metric="accuracy",
        max_drop=0.01,
        min_agreement=0.98,
        min_cosine=0.99,
        input=InputSpec(kind="image", size=(96, 96), resize="fit", scale=1.0, mean=(127.5,), std=(127.5,)),
        output=OutputSpec(type="classification", top_k=3),
    )


def test_what_is_not_said_stays_open(tmp_path: Path) -> None:
    assert recipe(tmp_path, "schema = 1") == Recipe(schema=1)


def test_all_mistakes_come_at_once_with_their_keys(tmp_path: Path) -> None:
    text = """
        quantise = ["int8"]
        quantize = ["int9"]
        batch = 0
        max_drop = 2
        min_cosine = "high"
        labels = "nowhere.txt"
        auto = 1
        target = "edgetpu"
        input_shapes = { x = [1, 0] }
        [input]
        kind = "imagge"
        range = [1, -1]
        [output]
        top_k = 0
    """
    assert sorted(mistakes(tmp_path, text)) == [
        "auto",
        "batch",
        "input.kind",
        "input.range",
        "input_shapes.x[1]",
        "labels",
        "max_drop",
        "min_cosine",
        "output.top_k",
        "quantise",
        "quantize[0]",
        "schema",
        "target",
    ]


def test_a_mistyped_key_is_answered_with_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keep_flaot: unknown key. Did you mean 'keep_float'\?"):
        recipe(tmp_path, 'schema = 1\nkeep_flaot = ["SOFTMAX"]')
    with pytest.raises(ConfigError, match=r"input.rage: unknown key. Did you mean 'range'\?"):
        recipe(tmp_path, "schema = 1\n[input]\nrage = [0, 1]")


def test_a_recipe_of_a_later_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"schema: is 2. This edge-serve reads 1"):
        recipe(tmp_path, "schema = 2")


@pytest.mark.parametrize("rival", ["scale = 1.0", "mean = [0.0]", "std = [1.0]"])
def test_a_range_and_numbers_that_say_the_same_are_refused_together(tmp_path: Path, rival: str) -> None:
    assert mistakes(tmp_path, f"schema = 1\n[input]\nrange = [0, 1]\n{rival}") == ["input.range"]


@pytest.mark.parametrize("wrong", ["[0]", "[0, 1, 2]", "[1, 1]", "[0, inf]", "7", '["a", "b"]'])
def test_what_is_no_range_is_refused(tmp_path: Path, wrong: str) -> None:
    keys = mistakes(tmp_path, f"schema = 1\n[input]\nrange = {wrong}")
    assert keys[0].partition("[")[0] == "input.range"


def test_labels_may_stand_in_one_place_only(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a\nb\n")
    file = str(tmp_path / "labels.txt")
    assert recipe(tmp_path, 'schema = 1\n[output]\nlabels_file = "labels.txt"').labels == file
    listed = recipe(tmp_path, 'schema = 1\n[output]\nlabels = ["a", "b"]')
    assert (listed.labels, listed.output) == (None, OutputSpec(labels=("a", "b")))
    both = 'schema = 1\nlabels = "labels.txt"\n[output]\nlabels = ["a", "b"]'
    assert mistakes(tmp_path, both) == ["output.labels"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"schema = ", "is not TOML"),
        (b"schema = \xff", "is not UTF-8"),
        (b"a = " + b"[" * 5000, "is nested too deeply|is not TOML"),
        (b"#" * (1024 * 1024 + 1), "larger than"),
        (b"input = 1\nschema = 1", "input: must be a table"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "recipe.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        load(tmp_path / "recipe.toml")


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml: 1 problem\n  cannot be read \(No such file or directory\)"):
        load(tmp_path / "none.toml")


def test_the_command_line_goes_above_the_recipe_field_by_field() -> None:
    base = Recipe(
        1,
        quantize=("int8",),
        seed=3,
        input=InputSpec(kind="image", size=(8, 8)),
        output=OutputSpec(top_k=3, threshold=0.5),
    )
    over = Recipe(1, quantize=("float16",), input=InputSpec(size=(16, 16)), output=OutputSpec(top_k=1))
    assert combine(base, over) == Recipe(
        1,
        quantize=("float16",),
        seed=3,
        input=InputSpec(kind="image", size=(16, 16)),
        output=OutputSpec(top_k=1, threshold=0.5),
    )
    assert combine(base, Recipe(1)) == base
    assert combine(Recipe(1), over) == over


def test_labels_of_the_command_line_replace_those_of_the_recipe_wherever_they_stand() -> None:
    in_list = Recipe(1, output=OutputSpec(labels=("a",), top_k=2))
    in_file = Recipe(1, labels="labels.txt")
    assert combine(in_list, in_file) == Recipe(1, labels="labels.txt", output=OutputSpec(top_k=2))
    assert combine(in_file, in_list) == in_list


@pytest.mark.parametrize("ends", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (-0.5, 0.5)])
def test_a_range_is_met_exactly_at_both_ends(ends: tuple[float, float]) -> None:
    scale, mean, std = range_to_spec(*ends)
    spec = InputSpec(kind="image", color="gray", scale=scale, mean=mean, std=std)
    processor = ImageProcessor(spec, TensorSpec("x", "float32", (1, 1, 256, 1)))
    values: Any = processor.from_pixels(np.arange(256, dtype=np.uint8)[np.newaxis])[0].reshape(-1)
    assert (float(values[0]), float(values[-1])) == ends
    exact: Any = ends[0] + np.arange(256, dtype=np.float64) * (ends[1] - ends[0]) / 255
    np.testing.assert_allclose(values, exact, rtol=0, atol=np.spacing(np.float32(max(ends))))


def test_a_range_that_is_none_is_refused() -> None:
    for low, high in ((1.0, 1.0), (2.0, 1.0), (0.0, float("nan")), (-1e308, 1e308)):
        with pytest.raises(UsageError, match="is no range"):
            range_to_spec(low, high)
