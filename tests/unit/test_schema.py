"""The reader of typed tables: right values pass, and every wrong one is named with its key and a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from edge_serve.errors import Problem
from edge_serve.schema import closest, compact, describe, merge, option, read


@dataclass(frozen=True)
class Inner:
    size: int = option(1, "how large", low=1, high=10)
    word: str | None = None


@dataclass(frozen=True)
class Table:
    name: str = option(doc="what it is called")
    number: int = option(5, low=0, high=9)
    ratio: float = 0.5
    on: bool = False
    mode: Literal["slow", "fast"] = "slow"
    protocol: Literal[5, "5", "3.1.1"] = 5
    words: tuple[str, ...] = ()
    sizes: tuple[int, ...] | None = option(None, low=1)
    either: str | tuple[str, ...] = ""
    labels: dict[str, int] | None = option(None, low=0)
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    anything: dict[str, Any] = option(factory=dict)


def take(table: Any, *, strict: bool = True, skip: frozenset[str] = frozenset()) -> tuple[Table | None, list[Problem]]:
    problems: list[Problem] = []
    return read(Table, table, "t", problems, strict=strict, skip=skip), problems


def wrong(**table: Any) -> Problem:
    _, problems = take({"name": "n", **table})
    assert len(problems) == 1, problems
    return problems[0]


def test_a_right_table_becomes_the_dataclass() -> None:
    table, problems = take(
        {
            "name": "n",
            "number": 3,
            "ratio": 1,
            "on": True,
            "mode": "fast",
            "protocol": "3.1.1",
            "words": ["a", "b"],
            "sizes": [1, 2],
            "either": ["x"],
            "labels": {"stable": 3},
            "inner": {"size": 2},
            "inners": [{"size": 3}, {"word": "w"}],
            "anything": {"a": [1, None]},
        }
    )
    assert problems == []
    assert table == Table(
        "n",
        3,
        1.0,
        True,
        "fast",
        "3.1.1",
        ("a", "b"),
        (1, 2),
        ("x",),
        {"stable": 3},
        Inner(2),
        (Inner(3), Inner(1, "w")),
        {"a": [1, None]},
    )
    assert type(table.ratio) is float


def test_what_is_left_out_has_its_default() -> None:
    table, problems = take({"name": "n"})
    assert (table, problems) == (Table("n"), [])


def test_a_missing_key_says_what_was_expected() -> None:
    table, problems = take({})
    assert table is None
    assert problems == [Problem("t.name", "is missing", "Expected text: what it is called")]


def test_an_unknown_key_is_named_with_the_nearest_known_one() -> None:
    problem = wrong(numbr=3)
    assert (problem.key, problem.what, problem.remedy) == ("t.numbr", "unknown key", "Did you mean 'number'?")


def test_an_unknown_key_that_is_near_to_none_lists_the_known_ones() -> None:
    assert "inner" in wrong(xyzzy=1).remedy
    assert wrong(xyzzy=1).remedy.startswith("Known here: ")


def test_unknown_keys_are_no_mistakes_where_newer_writers_are_to_be_read() -> None:
    assert take({"name": "n", "later": 1, "inner": {"later": 2}}, strict=False) == (Table("n"), [])


def test_a_skipped_key_is_somebody_elses() -> None:
    assert take({"name": "n", "number": "x", "extra": 1}, skip=frozenset({"number", "extra"})) == (Table("n"), [])


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("name", 5, "must be text, not 5"),
        ("number", "5", "must be whole number, not '5'"),
        ("number", 5.0, "must be whole number, not 5.0"),
        ("number", True, "must be whole number, not True"),
        ("number", -1, "must be from 0 to 9, not -1"),
        ("number", 10, "must be from 0 to 9, not 10"),
        ("ratio", "half", "must be number, not 'half'"),
        ("ratio", True, "must be number, not True"),
        ("ratio", float("nan"), "must be a finite number, not nan"),
        ("ratio", float("inf"), "must be a finite number, not inf"),
        ("ratio", 10**400, "must be a finite number, not inf"),
        ("on", 1, "must be true or false, not 1"),
        ("mode", "quick", 'must be "slow" | "fast", not \'quick\''),
        ("protocol", 5.0, 'must be 5 | "5" | "3.1.1", not 5.0'),
        ("protocol", True, 'must be 5 | "5" | "3.1.1", not True'),
        ("words", "ab", "must be list of text, not 'ab'"),
        ("sizes", 3, "must be list of whole number, not 3"),
        ("either", 3, "must be text or list of text, not 3"),
        ("labels", 3, "must be table, not 3"),
        ("inner", 3, "must be a table, not 3"),
        ("name", "a\0b", "holds a character that no file or topic can have: 'a\\x00b'"),
        ("name", "\ud800", "holds a character that no file or topic can have: '\\ud800'"),
    ],
)
def test_a_wrong_value_says_what_it_must_be(key: str, value: Any, says: str) -> None:
    problem = wrong(**{key: value})
    assert (problem.key, problem.what) == (f"t.{key}", says)


def test_a_mistake_inside_a_list_or_table_is_named_with_its_place() -> None:
    assert wrong(words=["a", 2]).key == "t.words[1]"
    assert wrong(sizes=[1, 0]).key == "t.sizes[1]"
    assert wrong(labels={"a": 1, "b": -1}).key == "t.labels.b"
    assert wrong(inner={"size": 11}).key == "t.inner.size"
    assert wrong(inners=[{}, {"siz": 1}]).key == "t.inners[1].siz"


def test_a_mistyped_choice_is_corrected() -> None:
    assert wrong(mode="fsat").remedy == "Did you mean 'fast'?"


def test_all_mistakes_are_reported_at_once() -> None:
    _, problems = take({"number": "x", "ratio": "y", "nme": "z", "inner": {"size": 0, "wrd": 1}, "words": [1, 2]})
    assert {problem.key for problem in problems} == {
        "t.name",
        "t.nme",
        "t.number",
        "t.ratio",
        "t.inner.size",
        "t.inner.wrd",
        "t.words[0]",
        "t.words[1]",
    }


def test_a_wrong_value_leaves_its_default_so_that_the_rest_can_be_checked() -> None:
    table, problems = take({"name": "n", "number": "x", "on": True})
    assert table == Table("n", on=True)
    assert len(problems) == 1


def test_what_is_no_table_is_named() -> None:
    table, problems = take([1])
    assert table is None
    assert problems == [Problem("t", "must be a table, not [1]")]


def test_a_long_wrong_value_is_shown_in_part() -> None:
    assert len(wrong(number="x" * 10_000).what) < 120


def test_types_are_described_in_words() -> None:
    assert describe(tuple[int, ...] | None) == "list of whole number"
    assert describe(dict[str, int]) == describe(Inner) == "table"
    assert describe(Literal["a", 5]) == '"a" | 5'


def test_the_nearest_word_is_suggested() -> None:
    assert closest("mtqt", ["mqtt", "file"]) == "Did you mean 'mqtt'?"
    assert closest("zzz", ["b", "a"]) == "Known here: a, b"


def test_merge_lays_only_what_is_said_over_the_base() -> None:
    assert merge(Inner(3, "base"), Inner(4)) == Inner(4, "base")


def test_compact_leaves_out_what_is_none_and_what_is_inside_too() -> None:
    table = Table("n", inner=Inner(2), inners=(Inner(3, "w"),))
    data = compact(table)
    assert data["inner"] == {"size": 2}
    assert data["inners"] == [{"size": 3, "word": "w"}]
    assert "sizes" not in data
    assert take(data) == (table, [])
