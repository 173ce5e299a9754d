"""`--recipe FILE.toml`: what a conversion shall make, written down once and kept beside the model's source.

The keys are the options of `edge-serve convert` that say what to make (where to is never in it), with underscores. What the
command line says goes above it. All mistakes are reported at once, with file, key and remedy.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from edge_serve.errors import ConfigError, Problem, UsageError
from edge_serve.schema import merge, option, read
from edge_serve.spec import InputSpec, OutputSpec
from edge_serve_converters.request import Compat, Io, Mode, Target

T = TypeVar("T")

SCHEMA = 1
# A recipe is a page; a larger file is something else.
MAX_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is to be made. None: not said, so the command line or the default decides."""

    schema: int = option(doc="version of the recipe's format", example=SCHEMA)
    quantize: tuple[Mode, ...] | None = option(
        None, "variants to make; the first is the default one", example=["int8", "float16"]
    )
    io: Io | None = option(None, "int8: dtype of the file's own inputs and outputs", example="float")
    signatures: tuple[str, ...] | None = option(
        None, "signatures to convert; default: serving_default, or the only one", example=["serving_default"]
    )
    input_shapes: dict[str, tuple[int, ...]] | None = option(
        None, "fixed shapes by input name", low=1, example={"x": [1, 224, 224, 3]}
    )
    batch: int | None = option(None, "fixed batch of all inputs", low=1, example=1)
    labels: str | None = option(None, "file with one class label a line, relative to the recipe", example="labels.txt")
    samples: int | None = option(None, "most calibration samples", low=2, example=200)
    seed: int | None = option(None, "for drawing samples", low=0, example=0)
    keep_float: tuple[str, ...] | None = option(
        None, "patterns of operators and layers that stay float", example=["SOFTMAX"]
    )
    auto: bool | None = option(None, "keep the fewest layers float with which int8 passes the gates", example=False)
    allow_float_operators: bool | None = option(
        None, "int8: accept operators that stay float for want of an int8 form", example=False
    )
    target: tuple[Target, ...] | None = option(None, "accelerators to make variants for", example=["edgetpu"])
    compat: Compat | None = option(None, "runtime that all variants must load in", example="tflite-runtime")
    metric: Literal["accuracy", "auc", "mean_iou"] | None = option(
        None, "what is measured with labels; default: what fits them", example="accuracy"
    )
    max_drop: float | None = option(None, "most that accuracy may fall; 0.01 is one point", low=0, high=1, example=0.01)
    min_agreement: float | None = option(
        None, "lowest part of samples with the float model's choice", low=0, high=1, example=0.98
    )
    min_cosine: float | None = option(None, "lowest cosine of any output", low=-1, high=1, example=0.99)
    min_sqnr: float | None = option(None, "lowest signal to quantization noise of any output, in dB", example=20.0)
    input: InputSpec | None = option(None, "what the input is; keys as under [pipeline.input], and range")
    output: OutputSpec | None = option(None, "what the outputs are; keys as under [pipeline.output]")


@dataclass(frozen=True, slots=True)
class _Range:
    range: tuple[float, ...] | None = option(
        None, "image: [lowest, highest] value of a pixel, instead of scale, mean and std"
    )


def load(path: Path) -> Recipe:
    """Read a recipe; ConfigError lists every mistake.

    `labels` comes back as a path from here, and [output] labels_file stands in it, too; [input] range comes back as scale,
    mean and std.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            str(path), [Problem("", f"cannot be read ({error.strerror})", "Check the path given to --recipe")]
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [Problem("", f"is not UTF-8 text ({error})")]) from error
    if len(data) > MAX_BYTES:
        raise ConfigError(str(path), [Problem("", f"is larger than {MAX_BYTES} bytes; this is no recipe")])
    return parse(text, path)


def parse(text: str, path: Path) -> Recipe:
    """Read a recipe's text as if it stood in `path`."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, and a number with too many digits
        raise ConfigError(str(path), [Problem("", f"is not TOML: {error}")]) from error
    except RecursionError as error:
        raise ConfigError(str(path), [Problem("", "is nested too deeply")]) from error
    problems: list[Problem] = []
    recipe = read(Recipe, table, "", problems, skip=frozenset({"input", "output"}))
    if recipe is not None and recipe.schema != SCHEMA:
        problems.append(
            Problem(
                "schema",
                f"is {recipe.schema}",
                f"This edge-serve reads {SCHEMA}; update it, or write schema = {SCHEMA}",
            )
        )
    input_spec = _input(table["input"], problems) if "input" in table else None
    output = read(OutputSpec, table["output"], "output", problems) if "output" in table else None
    labels = _labels(table, output, path, problems)
    if recipe is None or problems:
        raise ConfigError(str(path), problems)
    if output is not None:
        output = replace(output, labels_file=None)
    return replace(recipe, input=input_spec, output=output, labels=labels)


def _input(table: Any, problems: list[Problem]) -> InputSpec | None:
    spec = read(InputSpec, table, "input", problems, skip=frozenset({"range"}))
    if not isinstance(table, Mapping) or "range" not in table or spec is None:
        return spec
    said = read(_Range, {"range": table["range"]}, "input", problems)
    if said is None or said.range is None:
        return spec
    rivals = [name for name in ("scale", "mean", "std") if name in table]
    if rivals:
        problems.append(
            Problem("input.range", f"stands beside {', '.join(rivals)}, which say the same", "Give one or the other")
        )
        return spec
    try:
        if len(said.range) != 2:
            raise UsageError("give two numbers")
        scale, mean, std = range_to_spec(*said.range)
    except UsageError as error:
        problems.append(Problem("input.range", f"{list(said.range)}: {error}", "Write it as range = [-1, 1]"))
        return spec
    return replace(spec, scale=scale, mean=mean, std=std)


def _labels(table: Mapping[str, Any], output: OutputSpec | None, path: Path, problems: list[Problem]) -> str | None:
    """Settle the file with the labels, relative to the recipe."""
    places = {
        "labels": table.get("labels"),
        "output.labels_file": output.labels_file if output is not None else None,
        "output.labels": output.labels if output is not None else None,
    }
    given = [key for key, value in places.items() if value is not None]
    if len(given) > 1:
        problems.append(Problem(given[1], f"gives labels a second time, beside {given[0]}", "Give one of them"))
    for key in ("labels", "output.labels_file"):
        value = places[key]
        if isinstance(value, str):
            file = path.parent / value
            if not _is_file(file):
                problems.append(Problem(key, f"{file} is no file", "Paths are relative to the recipe's folder"))
            return str(file)
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # behind a folder that may not be entered, or a name that is too long
        return False


def combine(base: Recipe, over: Recipe) -> Recipe:
    """Give `base` with all that `over` says replaced, field by field, within [input] and [output], too.

    Labels are one thing, wherever they stand: those of `over` replace those of `base`.
    """
    merged = merge(base, over)
    base_output = base.output
    if base_output is not None and over.labels is not None:
        base_output = replace(base_output, labels=None)
    listed = over.output is not None and over.output.labels is not None
    return replace(
        merged,
        input=_both(base.input, over.input),
        output=_both(base_output, over.output),
        labels=None if listed and over.labels is None else merged.labels,
    )


def _both(base: T | None, over: T | None) -> T | None:
    return over if base is None else base if over is None else merge(base, over)


def range_to_spec(low: float, high: float) -> tuple[float, tuple[float, ...], tuple[float, ...]]:
    """Give scale, mean and std that lead pixels 0..255 to `low`..`high`: low + pixel · (high - low) / 255.

    Said as (pixel - mean) / std, which is exact at both ends for 0..1, -1..1 and 0..255. UsageError if there is no such range.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high and math.isfinite(high - low)):
        raise UsageError(f"{low:g}..{high:g} is no range; give the lower number first, as in -1,1")
    std = 255 / (high - low)
    # Without a negative zero, which a manifest would show.
    return 1.0, (-low * std or 0.0,), (std,)
