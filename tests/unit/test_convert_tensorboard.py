"""--tensorboard: event files that TensorBoard's own reader takes, written without tensorflow."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from edge_serve.errors import UsageError
from edge_serve_converters import tensorboard
from tests.unit.record_files import records

REFUSED: dict[str, Any] = {"name": "int16x8", "reason": "cosine is low", "quality": {"cosine": 0.5}, "layers": []}
REPORT: dict[str, Any] = {
    "name": "digits",
    "version": 3,
    "variants": [
        {
            "name": "int8",
            "quantization": "int8",
            "io": "float32",
            "bytes": 57_032,
            "quality": {
                "cosine": 0.999,
                "sqnr_db": None,
                "top1_agreement": 0.975,
                "task": {"metric": "accuracy", "float": 0.95, "variant": 0.925, "drop": 0.025},
                "outputs": {"y": {"max_error": 0.5}},
            },
            "latency_ms": {"p50": 0.25},
            "layers": [
                {"index": 0, "name": "a", "sqnr_db": 40.5, "range": [-1.0, 3.0], "histogram": [1, 2, 3, 4]},
                {"index": 7, "name": "b", "sqnr_db": 20.25, "saturated": 0.5},
            ],
        }
    ],
    "failed": [REFUSED],
    "calibration": {"inputs": {"image": {"histogram": {"edges": [0.0, 0.5, 2.0], "counts": [30, 10]}}}},
    "warnings": ["a | b"],
}


def events(run: Path) -> list[bytes]:
    """Read a run's records."""
    (file,) = run.iterdir()
    assert file.name.startswith("events.out.tfevents.")
    return records(file.read_bytes())


def test_every_variant_is_a_run_and_begins_with_the_file_version(tmp_path: Path) -> None:
    base = tensorboard.write(tmp_path / "logs", REPORT)
    assert base == tmp_path / "logs" / "digits-3"
    assert sorted(run.name for run in base.iterdir()) == ["int16x8", "int8", "report"]
    for run in base.iterdir():
        assert events(run)[0].endswith(b"\x1a\x0dbrain.Event:2")


def test_a_second_report_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    assert tensorboard.write(tmp_path, REPORT) != tensorboard.write(tmp_path, REPORT)


@pytest.mark.parametrize("name", ["../../etc/x", "/abs", ".hidden", "a" * 500, "", "\x00", "report", "int8"])
def test_names_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    logs = tmp_path / "logs"
    base = tensorboard.write(logs, {"name": name, "variants": [{"name": name}, {"name": name}]})
    assert base.parent == logs
    assert [entry.name for entry in tmp_path.iterdir()] == ["logs"]
    assert len([run for run in base.iterdir() if run.is_dir()]) == 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--tensorboard .*file: cannot be written"):
        tensorboard.write(tmp_path / "file", REPORT)


@pytest.mark.parametrize("value", [None, "text", float("nan"), [], pytest.param(10**400, id="huge"), -1])
def test_what_is_nonsense_is_left_out(tmp_path: Path, value: Any) -> None:
    for key in REPORT:
        tensorboard.write(tmp_path, {**REPORT, key: value})
    for key in REPORT["variants"][0]:
        tensorboard.write(tmp_path, {**REPORT, "variants": [{**REPORT["variants"][0], key: value}]})
    for key in ("index", "name", "sqnr_db", "range", "histogram"):
        layer = {**REPORT["variants"][0]["layers"][0], key: value}
        tensorboard.write(tmp_path, {**REPORT, "variants": [{"name": "v", "layers": [layer]}]})


def accumulated(run: Path) -> Any:
    """Read a run as TensorBoard does where tensorflow is not installed: importing that takes long, and proves less."""
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.plugin_event_accumulator", reason="tensorboard is not installed"
    )
    found = reader.EventAccumulator(str(run), tensor_size_guidance={"scalars": 0, "histograms": 0, "text": 0})
    found.Reload()
    return found


@pytest.mark.filterwarnings("ignore")
def test_texts_keep_their_lines_and_no_error_is_exact(tmp_path: Path) -> None:
    exact = {**REPORT["variants"][0], "quality": {"sqnr_db": 200.0}}
    commands = "no compiler:\n  sudo apt-get update\nThen: again"
    base = tensorboard.write(tmp_path, {**REPORT, "variants": [exact], "warnings": [commands, "w" * 3000]})
    make_ndarray = importlib.import_module("tensorboard.util.tensor_util").make_ndarray
    run = accumulated(base / "report")
    (warnings,) = run.Tensors("warnings")
    text = make_ndarray(warnings.tensor_proto).item().decode()
    assert "- no compiler:  \n    sudo apt-get update  \n  Then: again\n- " in text
    assert "w" * 3000 in text
    (table,) = run.Tensors("variants")
    assert b"|  | exact |" in make_ndarray(table.tensor_proto).item()


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_scalars_histograms_and_texts(tmp_path: Path) -> None:
    base = tensorboard.write(tmp_path, REPORT)
    run = accumulated(base / "int8")
    make_ndarray = importlib.import_module("tensorboard.util.tensor_util").make_ndarray

    def values(tag: str) -> list[tuple[int, Any]]:
        return [(event.step, make_ndarray(event.tensor_proto).tolist()) for event in run.Tensors(tag)]

    assert values("size/bytes") == [(0, 57_032.0)]
    assert values("task/accuracy_drop")[0][1] == pytest.approx(0.025)
    assert values("outputs/y/max_error") == [(0, 0.5)]
    assert values("layers/sqnr_db") == [(0, 40.5), (7, 20.25)]
    assert values("layers/saturated") == [(7, 0.5)]
    assert "quality/sqnr_db" not in run.Tags()["tensors"]
    assert values("layers/00000 a") == [(0, [[-1, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]])]
    assert run.SummaryMetadata("layers/sqnr_db").plugin_data.plugin_name == "scalars"
    assert run.SummaryMetadata("layers/00000 a").plugin_data.plugin_name == "histograms"
    whole = accumulated(base / "report")
    (table,) = whole.Tensors("variants")
    assert b"| int8 | int8 | 57032 |" in make_ndarray(table.tensor_proto).item()
    assert b"- a \\| b" in make_ndarray(whole.Tensors("warnings")[0].tensor_proto).item()
    assert make_ndarray(whole.Tensors("calibration/image")[0].tensor_proto).tolist() == [[0, 0.5, 30], [0.5, 2, 10]]
    refused = accumulated(base / "int16x8")
    assert make_ndarray(refused.Tensors("refused")[0].tensor_proto).item() == b"cosine is low"


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_compares_variants_by_their_hyperparameters(tmp_path: Path) -> None:
    run = accumulated(tensorboard.write(tmp_path, REPORT) / "int8")
    metadata = importlib.import_module("tensorboard.plugins.hparams.metadata")

    content = run.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = metadata.parse_session_start_info_plugin_data(content)
    assert started.hparams["quantization"].string_value == "int8"
    assert started.group_name == "int8"
    content = run.SummaryMetadata("_hparams_/session_end_info").plugin_data.content
    assert metadata.parse_session_end_info_plugin_data(content).status == 1
