"""Options that say what a model's inputs and outputs mean, and how the command line's texts become specifications."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from edge_serve.errors import Problem, UsageError
from edge_serve.schema import read
from edge_serve.spec import InputSpec, OutputSpec
from edge_serve_converters.recipe import range_to_spec

T = TypeVar("T")
_Command = TypeVar("_Command", bound=Callable[..., Any])


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} {text}: give one number, or one for each channel with commas between") from error


def _size(text: str) -> list[int]:
    parts = text.lower().replace("x", ",").split(",")
    if not all(part.strip().isdecimal() for part in parts) or len(parts) > 2:
        raise UsageError(f"--size {text}: give HEIGHTxWIDTH in pixels, for example 224x224")
    return [int(parts[0]), int(parts[-1])]


def input_shapes(texts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for text in texts:
        name, equals, sizes = text.rpartition("=")
        parts = sizes.split(",")
        if not equals or not name or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise UsageError(f"--input-shape {text}: give NAME=1,224,224,3 with whole numbers above 0")
        shapes[name] = tuple(int(part) for part in parts)
    return shapes


def _table(cls: type[T], values: dict[str, Any]) -> T:
    """Check options as the configuration's fields are checked, with the option's name in the message."""
    problems: list[Problem] = []
    made = read(cls, {name: value for name, value in values.items() if value is not None}, "", problems)
    if made is None or problems:
        raise UsageError(
            "\n".join(f"--{str(problem).replace('_', '-', problem.key.count('_'))}" for problem in problems)
        )
    return made


def _choices(field: str, cls: type) -> click.Choice[str]:
    """Offer the words that a field of the specification takes."""
    from edge_serve.schema import hints

    words = [word for part in get_args(hints(cls)[field]) for word in get_args(part)]
    return click.Choice(words)


def meaning_options(command: _Command) -> _Command:
    """Add the options that say what the model's inputs and outputs mean; they go into the manifest."""
    for option in reversed(
        (
            click.option(
                "--kind", type=_choices("kind", InputSpec), help="What the input is [default: told from the options]."
            ),
            click.option("--size", metavar="HxW", help="image: size in pixels [default: the model's input]."),
            click.option("--color", type=_choices("color", InputSpec), help="image: channel order."),
            click.option(
                "--resize",
                type=_choices("resize", InputSpec),
                help="image: how it becomes that size [default: stretch].",
            ),
            click.option("--scale", type=float, help="image: pixels 0..255 are multiplied by this [default: 1/255]."),
            click.option(
                "--range",
                "pixel_range",
                metavar="LOW,HIGH",
                help="image: what pixels 0..255 become, for --scale, --mean and --std.",
            ),
            click.option(
                "--mean", metavar="N,…", help="image, window: subtracted; one number, or one for each channel."
            ),
            click.option("--std", metavar="N,…", help="image, window: divided by."),
            click.option("--length", type=int, help="window: samples in a window [default: the model's input]."),
            click.option("--hop", type=int, help="window: samples from one window to the next [default: length]."),
            click.option(
                "--channels", metavar="A,B,…", help="window: channel names; in CSV data the columns that are used."
            ),
            click.option("--rate-hz", type=float, help="window: nominal sampling rate."),
            click.option(
                "--output-type",
                type=_choices("type", OutputSpec),
                help="What the outputs are [default: classification with labels, else tensor].",
            ),
            click.option(
                "--scores-output",
                metavar="NAME",
                help="classification: the output with the scores, if there are several.",
            ),
            click.option("--top-k", type=int, help="classification: most classes in a result."),
            click.option("--threshold", type=float, help="Lowest score in a result."),
            click.option(
                "--activation", type=_choices("activation", OutputSpec), help="classification: applied to logits."
            ),
            *(
                click.option(f"--{role}", metavar="NAME", help=f"detection: the output with the {role}.")
                for role in ("boxes", "classes", "scores", "count")
            ),
        )
    ):
        command = option(command)
    return command


def input_spec(options: dict[str, Any]) -> InputSpec:
    values = {name: options[name] for name in ("kind", "color", "resize", "scale", "length", "hop", "rate_hz")}
    values["size"] = _size(options["size"]) if options["size"] is not None else None
    for name in ("mean", "std"):
        values[name] = _numbers(options[name], f"--{name}") if options[name] is not None else None
    if options["pixel_range"] is not None:
        if any(values[name] is not None for name in ("scale", "mean", "std")):
            raise UsageError("--range says the same as --scale, --mean and --std; give one or the others")
        ends = _numbers(options["pixel_range"], "--range")
        if len(ends) != 2:
            raise UsageError(f"--range {options['pixel_range']}: give two numbers, for example --range=-1,1")
        values["scale"], values["mean"], values["std"] = range_to_spec(*ends)
    if options["channels"] is not None:
        values["channels"] = [part.strip() for part in options["channels"].split(",")]
    return _table(InputSpec, values)


def output_spec(options: dict[str, Any]) -> OutputSpec:
    values = {
        name: options[name] for name in ("top_k", "threshold", "activation", "boxes", "classes", "scores", "count")
    }
    return _table(OutputSpec, {**values, "type": options["output_type"], "tensor": options["scores_output"]})
