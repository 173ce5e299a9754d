"""`edge-serve bench`: every way to run a model is measured, what is not right is told, and each operator has its time."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_serve.errors import EXIT_GATE, EXIT_OK, EXIT_USAGE
from edge_serve.model.interpreter import load_runtime
from edge_serve.model.profile import split
from tests.delegates import add_model, library
from tests.unit.commands import Run
from tests.unit.material import model

DIGITS = Path(__file__).parents[2] / "edge_serve/demo/models/digits"
needs_int8 = pytest.mark.skipif(
    load_runtime().name == "tflite-runtime", reason="tflite-runtime's XNNPACK takes no int8 operators"
)
SHORT = ("--seconds", "0.02")


@needs_int8
def test_all_delegates_and_threads_of_all_variants_are_measured(run: Run) -> None:
    outcome = run("bench", DIGITS, "--threads", "1,2", *SHORT, "--json")
    assert outcome.code == EXIT_OK
    rows = {(row["variant"], row["delegate"], row["threads"]): row for row in outcome.document["results"]}
    assert set(rows) == {("int8", name, threads) for name in ("none", "xnnpack") for threads in (1, 2)}
    for row in rows.values():
        assert row["right"]
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p90"] <= row["latency_ms"]["p99"]
        assert row["runs_per_s"] == pytest.approx(1e3 / row["latency_ms"]["p50"])
    assert rows["int8", "xnnpack", 1]["claimed"] > rows["int8", "none", 1]["claimed"] == 0
    assert any("edgetpu" in reason for reason in outcome.document["left_out"])


def test_people_get_a_table_with_the_fastest_named(run: Run) -> None:
    outcome = run("bench", model("linear"), "--delegate", "xnnpack", "--threads", "1", *SHORT)
    header = outcome.out.splitlines()[0].split()
    assert header == ["variant", "delegate", "threads", "p50", "p90", "p99", "runs/s", "MiB", "operators", "p50"]
    assert "fastest: file on xnnpack" in outcome.out
    assert "█" in outcome.out


def test_what_is_not_right_is_told_and_a_library_is_measured_with_its_copy(run: Run, tmp_path: Path) -> None:
    file = add_model(tmp_path)
    outcome = run("bench", file, "--delegate", str(library()), "--delegate", "/none/x.so", *SHORT)
    assert outcome.code == EXIT_OK
    assert "external:libmisbehave" in outcome.out
    assert "not right: file on external:x: external:x: /none/x.so cannot be loaded" in outcome.out
    assert run("bench", file, "--delegate", "/none/x.so", *SHORT).code == EXIT_GATE


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.tflite"], "no such model"),
        ([model("linear"), "--threads", "0"], "--threads '0': give numbers"),
        ([model("linear"), "--threads", "a,b"], "--threads 'a,b': give numbers"),
        ([model("linear"), "--delegate", "cuda"], "unknown delegate 'cuda'"),
        ([model("linear"), "--variant", "int8"], "has no variant 'int8'"),
        ([DIGITS, "--variant", "float64"], "has no variant 'float64'; it has: int8"),
    ],
)
def test_what_cannot_be_measured_is_refused(run: Run, arguments: list[str | Path], says: str) -> None:
    outcome = run("bench", *arguments, *SHORT)
    assert outcome.code == EXIT_USAGE
    assert says in outcome.err


def test_every_operator_has_its_time(run: Run) -> None:
    document = run("bench", DIGITS, "--profile", "--json").document
    names = [row["operator"] for row in document["operators"]]
    assert names.count("CONV_2D") == 4
    timed = [row for row in document["operators"] if "none" in row["us"]]
    assert len(timed) >= len(names) - 1
    assert all(row["us"]["none"] > 0 for row in timed)
    text = run("bench", model("linear"), "--profile").out
    assert "FULLY_CONNECTED" in text
    assert "100.0%" in text


def test_a_damaged_file_is_refused_by_the_profile(run: Run, tmp_path: Path) -> None:
    data = bytearray(model("linear").read_bytes())
    data[60:400] = b"\xff" * 340
    (tmp_path / "damaged.tflite").write_bytes(data)
    assert run("bench", tmp_path / "damaged.tflite", "--profile").code == EXIT_USAGE


def test_an_operator_alone_is_a_model_that_runs(tmp_path: Path) -> None:
    operators = split(model("detector"), tmp_path)
    assert [each.number for each in operators] == list(range(len(operators)))
    assert all(each.file is not None and each.file.stat().st_size > 100 for each in operators)
