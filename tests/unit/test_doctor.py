"""The doctor: each trouble is found, with what to do; nothing that hangs or is missing keeps it from its findings."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_serve.errors import EXIT_GATE, EXIT_OK
from edge_serve_devices import doctor
from edge_serve_devices.doctor import Finding, examine, temperature
from tests.boards import tree
from tests.support import Mosquitto, write_config
from tests.unit.commands import Run
from tests.unit.material import model


def found(root: Path, **options: Any) -> dict[str, Finding]:
    return {each.id: each for each in examine(root, **options)}


def put(root: Path, file: str, content: str) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(content)


def test_a_pi_5_with_a_coral_card_and_large_pages_is_told_which_kernel(tmp_path: Path) -> None:
    findings = found(tree(tmp_path, "pi-5", dev=[]))
    assert findings["pci-coral-page-size"].state == "warning"
    assert "kernel=kernel8.img" in findings["pci-coral-page-size"].remedy
    assert "driver of the PCI Edge TPU is not loaded" in findings["edgetpu:pci:0"].what
    assert findings["board"].what.startswith("Raspberry Pi 5 Model B")


@pytest.mark.parametrize(
    ("bits", "says"),
    [
        ("0x0", {}),
        (
            "50005",
            {"throttled-0": "error", "throttled-2": "warning", "throttled-16": "warning", "throttled-18": "note"},
        ),
        ("garbage", {}),
    ],
)
def test_what_a_raspberry_pi_says_of_voltage_and_heat_is_read(tmp_path: Path, bits: str, says: dict[str, str]) -> None:
    root = tree(tmp_path, "pi-4")
    put(root, doctor.THROTTLED_FILE, bits)
    assert {key: each.state for key, each in found(root).items() if key.startswith("throttled")} == says


@pytest.mark.parametrize(("millidegrees", "state"), [("45000", "ok"), ("79500", "warning")])
def test_heat_counts_by_the_boards_own_limit(tmp_path: Path, millidegrees: str, state: str) -> None:
    root = tree(tmp_path, "pi-4")
    put(root, "sys/class/thermal/thermal_zone0/temp", millidegrees)
    put(root, "sys/class/thermal/thermal_zone1/temp", "-274000")
    finding = found(root)["temperature"]
    assert (finding.state, finding.what.split("°")[0]) == (state, f"{int(millidegrees) / 1000:.0f} ")
    assert temperature(tmp_path / "nowhere") is None


def test_a_slow_governor_and_little_memory_are_told(tmp_path: Path) -> None:
    root = tree(tmp_path, "pi-4")
    put(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "powersave\n")
    put(root, "proc/meminfo", "MemTotal: 1000000 kB\nMemAvailable: 20000 kB\n")
    findings = found(root)
    assert "scaling_governor" in findings["governor"].remedy
    assert findings["memory"].state == "warning"


def test_delegates_are_tried_and_the_missing_ones_named(tmp_path: Path) -> None:
    findings = found(tree(tmp_path, "cm4", libraries=[]))
    assert findings["none"].state == "ok"
    assert findings["xnnpack"].state in ("ok", "note")
    assert "of a small" in findings["xnnpack"].what
    assert findings["edgetpu:usb:0"].state == "warning"
    assert "libedgetpu.so.1 is missing" in findings["edgetpu:usb:0"].what
    assert findings["gpu"].state == "note"


def test_a_library_that_is_none_is_told(tmp_path: Path) -> None:
    findings = found(tree(tmp_path, "coral-dev-board"))
    assert findings["edgetpu:pci:0"].state == "warning", "the tree has a name of it, and this machine no such library"


def test_a_runtime_that_does_not_fit_its_numpy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tflite_runtime of this package is empty: whatever imports it fails."""
    (tmp_path / "tflite_runtime").mkdir()
    (tmp_path / "tflite_runtime/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = found(tmp_path)["tflite_runtime"]
    assert finding.state == "warning"
    assert "tflite" in finding.what


def test_what_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHILD_LIMIT_S", 0.5)
    assert doctor._child("import time; time.sleep(60)")[2] == "does not answer within 0.5 s"
    assert doctor._child("import os; os.kill(os.getpid(), 11)")[2] == "crashes with signal 11"


def test_without_a_runtime_it_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    whole = importlib.util.find_spec
    gone: Callable[..., Any] = lambda name, *rest: None if name in doctor.MODULES else whole(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", gone)
    findings = found(tmp_path)
    assert findings["runtime"].state == "error"
    assert "pip install" in findings["runtime"].remedy
    assert findings["xnnpack"].state == "warning"


def test_a_state_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "state").mkdir(mode=0o500)
    assert found(tmp_path, state_dir=tmp_path / "state" / "x")["state_dir"].state == "warning"


CONFIG = """
    schema = 1
    device = "dev"
    [mqtt]
    url = "{url}"
    {more}
    [pipeline]
    name = "p"
    model = "{linear}"
    [pipeline.source]
    type = "mqtt"
    topic = "in/#"
    [pipeline.sink]
    type = "mqtt"
    topic = "results"
"""


@pytest.mark.broker
def test_brokers_and_models_of_a_configuration_are_looked_at(
    tmp_path: Path,
    run: Run,
    make_broker: Callable[..., Mosquitto],
) -> None:
    broker = make_broker().start()
    file = write_config(tmp_path, CONFIG, url=broker.url, more="", linear=model("linear"))
    outcome = run("doctor", "-c", str(file), "--json")
    findings = {(each["area"], each["id"]): each for each in outcome.document["findings"]}
    assert not [each for each in findings.values() if each["state"] == "error"]
    assert (outcome.code, outcome.document["ok"]) == (EXIT_OK, True)
    assert findings["brokers", "[mqtt]"]["state"] == "ok"
    assert findings["models", "p"]["state"] == "ok"
    broker.stop()
    outcome = run("doctor", "-c", str(file))
    assert outcome.code == EXIT_GATE
    assert "ERROR" in outcome.out
    assert "→ check url, network" in outcome.out


def test_what_runs_on_its_fallback_only_is_a_warning_and_no_mistake(tmp_path: Path, run: Run) -> None:
    text = CONFIG.replace(
        "[pipeline.source]", 'delegate = "/none/libx.so"\n    fallback = ["none"]\n    [pipeline.source]'
    )
    file = write_config(tmp_path, text, url="mqtt://127.0.0.1:1", more="", linear=model("linear"))
    told = run("check", "-c", str(file))
    assert told.code == EXIT_OK
    assert "on none, in place of what was asked for: external:libx: /none/libx.so cannot be loaded" in told.out
    findings = {each["id"]: each for each in run("doctor", "-c", str(file), "--json").document["findings"]}
    assert findings["p"]["state"] == "warning"
    assert "/none/libx.so cannot be loaded" in findings["p"]["what"]


def test_mistakes_of_a_configuration_are_findings(tmp_path: Path, run: Run) -> None:
    file = write_config(tmp_path, CONFIG, url="mqtt://127.0.0.1:1", more='password = "secret"', linear=model("linear"))
    outcome = run("doctor", "-c", str(file), "--json")
    assert outcome.code == EXIT_GATE
    assert any(each["area"] == "configuration" for each in outcome.document["findings"])
    assert "secret" not in outcome.out


def test_it_says_that_all_is_well(run: Run) -> None:
    outcome = run("doctor")
    assert "with -c FILE" in outcome.out
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in outcome.out
