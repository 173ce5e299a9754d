"""Fixtures of the unit tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from edge_serve import cli
from edge_serve.model.interpreter import MODULES, Runtime, load_runtime
from tests.unit.commands import Outcome, Run


@pytest.fixture(scope="session", params=list(MODULES))
def runtime(request: pytest.FixtureRequest) -> Runtime:
    """Each TFLite runtime that is installed: what is written over one face has to work with both."""
    if importlib.util.find_spec(MODULES[request.param]) is None:
        pytest.skip(f"{request.param} is not installed")
    return load_runtime(request.param)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Outcome:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(each) for each in arguments])
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        assert "\x1b" not in captured.out + captured.err
        return Outcome(caught.value.code, captured.out, captured.err)

    return run
