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
from edge_serve_converters.compare_cli import compare
from tests.unit.material import model

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
