"""The command's options: what is understood, what is refused with exit code 2, and that nothing heavy is imported."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge_serve.errors import EdgeServeError, UsageError
from edge_serve_converters import cli, writer
from edge_serve_converters.request import Request


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Requests that the command line made instead of converting."""
    made: list[Request] = []
    monkeypatch.setattr(cli, "run", lambda request, **_: made.append(request))
    return made


def invoke(*arguments: str) -> None:
    """Call the command; its error comes out as it is."""
    result = CliRunner().invoke(cli.convert, ["model", "-o", "out", *arguments])
    if result.exception is not None:
        raise result.exception


def refused(*arguments: str, status: int = 2) -> str:
    """Call the command and give the words of the refusal."""
    with pytest.raises(EdgeServeError) as caught:
        invoke(*arguments)
    assert caught.value.exit_code == status
    return str(caught.value)


def test_options_become_a_request(asked: list[Request]) -> None:
    invoke(
        *("--quantize", "int8", "--quantize", "none", "--quantize", "int8", "--calibration", "data", "--io", "uint8"),
        *("--size", "24x32", "--mean", "0.5,0.4,0.3", "--std", "0.2", "--color", "bgr", "--input-shape", "a:0=1,2,3"),
        *("--top-k", "3", "--output-type", "classification", "--signature", "one", "--signature", "two"),
    )
    request = asked[0]
    assert request.modes == ("int8", "none")
    assert request.input_shapes == {"a:0": (1, 2, 3)}
    assert (request.input.size, request.input.mean, request.input.std) == ((24, 32), (0.5, 0.4, 0.3), (0.2,))
    assert (request.output_spec.top_k, request.output_spec.type) == (3, "classification")
    assert (request.io, request.signatures) == ("uint8", ("one", "two"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "large"], "--size large: give HEIGHTxWIDTH"),
        (["--size", "0x5"], "--size"),
        (["--mean", "a,b"], "--mean a,b: give one number"),
        (["--mean", "nan"], "--mean"),
        (["--input-shape", "1,2,3"], "give NAME=1,224,224,3"),
        (["--input-shape", "x=1,0"], "whole numbers above 0"),
        (["--hop", "0"], "--hop: must be from 1 to"),
        (["--top-k", "0"], "--top-k: must be from 1"),
    ],
)
def test_values_that_are_none_are_refused_by_option(asked: list[Request], arguments: list[str], words: str) -> None:
    assert words in refused("--quantize", "none", *arguments)
    assert not asked


@pytest.mark.parametrize("arguments", [["--quantize", "int4"], ["--quantize", "none", "--batch", "0"]])
def test_click_refuses_what_it_can(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli.convert, ["model", "-o", "out", *arguments]).exit_code == 2


def saved_model(folder: Path) -> Path:
    """Make a folder that passes for a SavedModel until somebody loads it."""
    folder.mkdir()
    (folder / "saved_model.pb").write_bytes(b"")
    return folder


def test_paths_that_are_no_savedmodel_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.keras").write_bytes(b"")
    for path, words in (
        (tmp_path / "missing", "no such model"),
        (tmp_path / "model.keras", "neither a Keras archive nor HDF5"),
        (tmp_path, "holds no saved_model.pb"),
    ):
        with pytest.raises(UsageError) as caught:
            CliRunner().invoke(
                cli.convert, [str(path), "-o", str(tmp_path / "out"), "--quantize", "none"], catch_exceptions=False
            )
        assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_int8_needs_calibration_and_io_needs_int8(tmp_path: Path) -> None:
    model = str(saved_model(tmp_path / "model"))
    for arguments, words in (
        (["--quantize", "int8"], "needs --calibration"),
        (["--quantize", "float16", "--io", "int8"], "--io int8 goes with --quantize int8"),
    ):
        with pytest.raises(UsageError) as caught:
            CliRunner().invoke(cli.convert, [model, "-o", str(tmp_path / "out"), *arguments], catch_exceptions=False)
        assert words in str(caught.value)


def test_a_missing_tensorflow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec

    def without_tensorflow(name: str, *rest: Any) -> Any:
        return None if name == "tensorflow" else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without_tensorflow)
    with pytest.raises(UsageError, match=r"pip install 'edge-serve\[convert\]'"):
        CliRunner().invoke(
            cli.convert,
            [str(saved_model(tmp_path / "model")), "-o", str(tmp_path / "out"), "--quantize", "none"],
            catch_exceptions=False,
        )


def test_importing_the_command_imports_nothing_heavy() -> None:
    code = (
        "import sys, edge_serve_converters.cli; print(*(n for n in ('tensorflow', 'numpy', 'PIL') if n in sys.modules))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment()
    )
    assert loaded.stdout.strip() == ""


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}


def test_a_bundle_never_takes_a_taken_number(tmp_path: Path) -> None:
    for name in ("1", "7", "latest", ".8.tmp"):
        (tmp_path / name).mkdir()
    assert writer.choose_version(tmp_path, None, force=False) == 8
    assert writer.choose_version(tmp_path, 5, force=False) == 5
    assert writer.choose_version(tmp_path, 7, force=True) == 7
    with pytest.raises(UsageError, match="exists; leave --version out"):
        writer.choose_version(tmp_path, 7, force=False)


def test_output_folders_are_tried_before_the_work_and_removed_if_unused(tmp_path: Path) -> None:
    base = tmp_path / "models" / "new"
    with writer.reserved(base):
        assert base.is_dir()
    assert not (tmp_path / "models").exists()
    with writer.reserved(base):
        (base / "1").mkdir()
    assert (base / "1").is_dir()
    (tmp_path / "file").write_bytes(b"")
    for path, words in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "below", "cannot be written to")):
        with pytest.raises(UsageError, match=words), writer.reserved(path):
            pass
