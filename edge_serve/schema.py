"""Typed tables: turns parsed TOML or JSON into dataclasses and reports every mistake, and draws samples from them.

One reader serves the configuration (strict: unknown keys are mistakes) and the manifest (lenient: unknown keys are
ignored, so that newer writers stay readable). Supported field types: str, int, float, bool, Literal, X | None, unions of
those, tuple[X, ...], dict[str, X] and nested dataclasses.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from edge_serve.errors import Problem

T = TypeVar("T")
_BAD: Any = object()


def option(
    default: Any = dataclasses.MISSING,
    doc: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    example: Any = None,
    factory: Any = dataclasses.MISSING,
) -> Any:
    """Declare one documented option; `low` and `high` are inclusive bounds, `example` is what a sample shows."""
    metadata = {"doc": doc, "low": low, "high": high, "example": example}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@cache
def hints(cls: type) -> dict[str, Any]:
    """Give the resolved types of a dataclass's fields."""
    return get_type_hints(cls)


def join(prefix: str, key: str) -> str:
    """Write a key under its table, as a person would look for it."""
    return f"{prefix}.{key}" if prefix else key


def describe(kind: Any) -> str:
    """Say in words what values a type takes."""
    origin = get_origin(kind)
    if origin is Literal:
        return " | ".join(f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in get_args(kind))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part) for part in get_args(kind) if part is not type(None))
    if origin is tuple:
        return f"list of {describe(get_args(kind)[0])}"
    if origin is dict or kind is dict:
        return "table"
    if dataclasses.is_dataclass(kind):
        return "table"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def closest(word: str, known: Iterable[str]) -> str:
    """Suggest the known word that is nearest to a mistyped one, as a sentence, or list them all."""
    import difflib  # only mistakes pay for it

    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"Did you mean {near[0]!r}?" if near else f"Known here: {', '.join(known)}"


def read(
    cls: type[T],
    table: Any,
    key: str,
    problems: list[Problem],
    *,
    strict: bool = True,
    skip: frozenset[str] = frozenset(),
) -> T | None:
    """Build `cls` from a table; None if it is no table, or a required value is missing or wrong.

    Every mistake is added to `problems`, and the caller looks there: a wrong value that has a default gets that, so that
    what depends on the other values can be checked, too. `skip` names keys that somebody else reads.
    """
    if not isinstance(table, Mapping):
        problems.append(Problem(key, f"must be a table, not {_show(table)}"))
        return None
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # cls is a dataclass
    kinds = hints(cast(Any, cls))
    if strict:
        problems.extend(
            Problem(join(key, str(name)), "unknown key", closest(str(name), set(fields) | skip))
            for name in table
            if name not in fields and name not in skip
        )
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in skip:
            continue
        if name not in table:
            if _required(field):
                problems.append(Problem(join(key, name), "is missing", _expected(field, kinds[name])))
            continue
        value = _convert(kinds[name], table[name], join(key, name), problems, field, strict)
        if value is not _BAD:
            values[name] = value
    required = {name for name in fields if name not in skip and _required(fields[name])}
    return cls(**values) if required <= values.keys() else None


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _expected(field: dataclasses.Field[Any], kind: Any) -> str:
    doc = field.metadata.get("doc", "")
    return f"Expected {describe(kind)}" + (f": {doc}" if doc else "")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _convert(
    kind: Any, value: Any, key: str, problems: list[Problem], field: dataclasses.Field[Any], strict: bool
) -> Any:
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(kind), value, key, problems, field, strict)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in get_args(kind)):
            return value
        remedy = closest(value, map(str, get_args(kind))) if isinstance(value, str) else ""
        problems.append(Problem(key, f"must be {describe(kind)}, not {_show(value)}", remedy))
        return _BAD
    if origin is tuple and isinstance(value, (list, tuple)):
        before = len(problems)
        items = [_convert(get_args(kind)[0], v, f"{key}[{i}]", problems, field, strict) for i, v in enumerate(value)]
        return tuple(items) if len(problems) == before else _BAD
    if origin is dict and isinstance(value, Mapping):
        before = len(problems)
        pairs = {
            str(k): _convert(get_args(kind)[1], v, join(key, str(k)), problems, field, strict) for k, v in value.items()
        }
        return pairs if len(problems) == before else _BAD
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        nested = read(kind, value, key, problems, strict=strict)
        return _BAD if nested is None else nested
    return _convert_scalar(kind, value, key, problems, field)


def _convert_union(
    kinds: tuple[Any, ...], value: Any, key: str, problems: list[Problem], field: dataclasses.Field[Any], strict: bool
) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    attempts: list[list[Problem]] = []
    for kind in kinds:
        trial: list[Problem] = []
        result = _convert(kind, value, key, trial, field, strict)
        if result is not _BAD and not trial:
            return result
        attempts.append(trial)
    if len(kinds) == 1:
        problems.extend(attempts[0])
    else:
        expected = " or ".join(describe(kind) for kind in kinds)
        problems.append(Problem(key, f"must be {expected}, not {_show(value)}"))
    return _BAD


def _convert_scalar(kind: Any, value: Any, key: str, problems: list[Problem], field: dataclasses.Field[Any]) -> Any:
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if type(value) is not kind:
        problems.append(Problem(key, f"must be {describe(kind)}, not {_show(value)}"))
        return _BAD
    if kind is str and not is_text(value):
        problems.append(Problem(key, f"holds a character that no file or topic can have: {_show(value)}"))
        return _BAD
    if kind is float and not math.isfinite(value):
        problems.append(Problem(key, f"must be a finite number, not {value}"))
        return _BAD
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if kind in (int, float) and ((low is not None and value < low) or (high is not None and value > high)):
        bounds = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
        problems.append(Problem(key, f"must be {bounds}, not {value}"))
        return _BAD
    return value


def is_text(value: str) -> bool:
    """Tell text from what no file, topic or UTF-8 document can hold: NUL, and halves of characters (JSON can write them)."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def merge(base: T, over: T) -> T:
    """Give `base` with every field that `over` says (is not None) replaced; both are of one dataclass."""
    said = {f.name: getattr(over, f.name) for f in dataclasses.fields(over) if getattr(over, f.name) is not None}  # type: ignore[arg-type]
    return dataclasses.replace(base, **said)  # type: ignore[type-var]


def compact(instance: Any) -> dict[str, Any]:
    """Give a dataclass as a JSON-ready table without the fields that are None."""
    return {
        field.name: _plain(getattr(instance, field.name))
        for field in dataclasses.fields(instance)
        if getattr(instance, field.name) is not None
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return compact(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
