"""The compare command: what is printed and written, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edge_serve.cli import main
from edge_serve_converters.compare_cli import compare, table
from tests.unit.material import BIAS, WEIGHTS, model

SAMPLES = np.random.default_rng(5).uniform(-1.5, 1.5, (12, 4)).astype(np.float32)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Samples for the linear model."""
    np.save(tmp_path / "samples.npy", SAMPLES)
    return tmp_path / "samples.npy"


def exit_code(*arguments: object) -> int:
    """Run the whole command line in this process."""
    with pytest.raises(SystemExit) as caught:
        main(["compare", *map(str, arguments)])
    return int(caught.value.code or 0)


def called(*arguments: object) -> Result:
    """Call the command alone."""
    return CliRunner().invoke(compare, [str(argument) for argument in arguments], catch_exceptions=False)


def test_a_table_goes_to_stdout_and_what_to_know_to_stderr(samples: Path) -> None:
    result = called(model("linear"), model("bare"), "--data", samples)
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ["file", "bytes"]
    assert [line.split()[:2] for line in lines[1:]] == [["A", "linear"], ["B", "bare"]]
    assert "errors against A linear on 12 samples of samples.npy" in result.stderr
    assert "note: B bare: inputs were matched by position" in result.stderr


def labelled(folder: Path, wrong: int) -> Path:
    """Write samples whose labels are the linear model's own choices, but for the first few."""
    truth = (SAMPLES @ WEIGHTS + BIAS).argmax(1)
    truth[:wrong] = (truth[:wrong] + 1) % 3
    np.savez(folder / "labelled.npz", x=SAMPLES, label=truth)
    return folder / "labelled.npz"


def test_both_models_have_their_accuracy_and_the_change_is_in_points(tmp_path: Path) -> None:
    data, page = labelled(tmp_path, 3), tmp_path / "page.html"
    result = called(model("linear"), model("int8"), "--data", data, "--labels-for", "data", "-o", page)
    head, first, second = result.stdout.splitlines()
    assert "accuracy" in head
    assert "change" in head
    assert "  0.7500       -  " in first
    assert "  0.7500      ±0  " in second
    assert "accuracy is of output 'scores' against the labels" in result.stderr
    assert "12 samples of labelled.npz, which may include samples that calibrated one of the models" in result.stderr
    text = page.read_text(encoding="utf-8")
    assert text.count("0.7500") >= 2
    assert "report.json" not in text
    assert "--json prints these figures" in text


@pytest.mark.parametrize(("drop", "told"), [(-0.0167, "+1.7 points"), (0.0167, "-1.7 points"), (0.0, "±0")])
def test_a_change_has_the_sign_of_what_it_does_to_the_metric(drop: float, told: str) -> None:
    task = {"metric": "auc", "output": "y", "float": 0.7222, "variant": 0.7222 - drop, "drop": drop}
    quality = {"max_error": 0.0, "mean_error": 0.0, "cosine": 1.0, "sqnr_db": 200.0, "task": task}
    entry = {"name": "B", "bytes": 1, "quality": quality, "latency_ms": {"p50": 1.0}, "xnnpack_operators": 1}
    lines = table({"variants": [{**entry, "operators": {"ADD": 1}}]}).splitlines()
    assert "AUC" in lines[0]
    assert told in lines[1]
    assert "exact" in lines[1]


def test_json_is_one_document_and_quiet_is_quiet(samples: Path) -> None:
    document = json.loads(called(model("linear"), model("int8"), "--data", samples, "--json").stdout)
    assert document["kind"] == "comparison"
    assert called(model("linear"), model("int8"), "--data", samples, "-q").output == ""


def test_reports_are_written(samples: Path, tmp_path: Path) -> None:
    page, logs = tmp_path / "compared.html", tmp_path / "logs"
    called(model("linear"), model("int8"), "--data", samples, "-q", "-o", page, "--tensorboard", logs)
    text = page.read_text(encoding="utf-8")
    assert "Comparison: A: linear and B: int8" in text
    assert text.rstrip().endswith("</html>")
    assert sorted(run.name for run in next(logs.iterdir()).iterdir()) == ["A_linear", "B_int8", "report"]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_exit_codes(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = (model("linear"), model("int8"), "--data", samples)
    assert exit_code(*same) == 0
    page = tmp_path / "failed.html"
    assert exit_code(*same, "--min-cosine", "0.9999999", "-o", page) == 1
    assert "1 of 1 compared files failed:\n  B int8: lowest cosine is" in capsys.readouterr().err
    assert "✕ Failed B int8" in page.read_text(encoding="utf-8")
    assert exit_code(model("linear"), model("votes"), "--data", samples) == 2
    assert exit_code(model("linear"), tmp_path / "none", "--data", samples) == 2
    assert exit_code(*same, "--max-drop", "0.01") == 2
    assert "--max-drop needs --labels-for" in capsys.readouterr().err
    table = tmp_path / "table.csv"
    table.write_text("a,b,c,d,e\n" + "1,2,3,4,5\n" * 9, encoding="utf-8")
    assert exit_code(model("linear"), model("int8"), "--data", table) == 2
    assert exit_code(model("linear"), model("int8"), "--data", table, "--channels", "a,b, c,d") == 0
    assert exit_code(*same, "-o", tmp_path) == 2
    assert exit_code(*same, "-o", tmp_path / "no" / "report.html") == 2
    assert exit_code(*same, "--min-cosine", "2") == 2


def test_a_terminated_comparison_leaves_nothing_behind(samples: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "edge_serve", "compare", model("linear"), model("int8"), "--data", samples]
    process = subprocess.Popen(
        [str(part) for part in command],
        env={"PATH": "", "TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not list(scratch.glob("edge-serve-compare-*/*.log")) and process.poll() is None:
            time.sleep(0.002)
        process.terminate()
        assert process.wait(timeout=20) in (130, 0)  # 0: it was done before
    finally:
        process.kill()
    assert list(scratch.iterdir()) == []
