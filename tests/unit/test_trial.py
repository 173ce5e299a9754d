"""Trials: what opens, what is right, how fast it is; a candidate that crashes or hangs costs itself and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve.errors import StoppedError, UnavailableError
from edge_serve.model.delegate import Candidate, DelegateSpec
from edge_serve.model.trial import Golden, Plan, Trial, try_all
from tests.delegates import add_model, edge_tpu, external, tpu_model
from tests.unit.material import BIAS, WEIGHTS, model

PLAN = Plan("litert", limit_s=20.0)
NONE, XNNPACK = DelegateSpec("none"), DelegateSpec("xnnpack")


def candidate(file: Path, spec: DelegateSpec, threads: int = 1, variant: str = "file") -> Candidate:
    return Candidate(variant, file, "", spec, threads)


def tried(
    *candidates: Candidate, golden: dict[str, Golden] | None = None, plan: Plan = PLAN, **options: Any
) -> list[Trial]:
    return try_all(candidates, golden or {}, plan, **options)


def test_what_is_right_is_timed() -> None:
    seen: list[Candidate] = []
    candidates = [candidate(model("linear"), XNNPACK), candidate(model("linear"), NONE)]
    trials = tried(*candidates, progress=seen.append)
    assert [trial.candidate for trial in trials] == candidates
    for trial in trials:
        assert trial.right
        assert trial.latency_s is not None
        assert 0 < trial.latency_s < 0.1
        assert trial.percentiles["p50"] <= trial.percentiles["p90"] <= trial.percentiles["p99"]
    assert [(trial.taken, trial.total) for trial in trials] == [(1, 1), (0, 1)]
    assert set(seen) == set(candidates)


def test_a_benchmark_times_each_for_as_long_as_it_is_told() -> None:
    (trial,) = tried(candidate(model("linear"), XNNPACK, threads=2), plan=dataclasses.replace(PLAN, seconds=0.05))
    assert trial.right
    assert trial.runs > 10


@pytest.mark.parametrize(
    ("wishes", "why"),
    [
        ({"create": "refuse"}, "refuses: the test delegate refuses"),
        ({"create": "crash"}, r"crashed (SIGSEGV) while it loaded the model"),
        ({"prepare": "fail"}, "does not take this model"),
        ({"claims": "nothing"}, "takes no operator"),
        ({"invoke": "wrong", "off": 0.5}, "is wrong: output 'y' is off by 0.5"),
        ({"invoke": "nan"}, "gives NaN or infinity at output 'y', where the model gives numbers"),
        ({"invoke": "fail", "from": 3}, "fails: "),
        ({"invoke": "crash", "from": 3}, "fails: external:libmisbehave crashed (SIGSEGV)"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_is_not_right_is_told(tmp_path: Path, wishes: dict[str, Any], why: str) -> None:
    file = add_model(tmp_path)
    trials = tried(candidate(file, external(**wishes)), candidate(file, NONE))
    assert why in trials[0].reason
    assert trials[1].right


def test_half_precision_is_right_on_a_delegate(tmp_path: Path) -> None:
    (trial,) = tried(candidate(add_model(tmp_path), external(invoke="wrong", off=1e-3)))
    assert trial.right


def test_a_file_that_crashes_the_process_costs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a damaged file does that the runtime loads without a word: here the child is made to die at that file."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if sys.argv[:1] == ['-m'] and 'edge_serve.model.trial_child' in sys.orig_argv:\n"
        "    from edge_serve.model import cpu\n"
        "    whole = cpu.Cpu.open\n"
        "    def open(self, path, *rest, **more):\n"
        "        if path.name == 'int8.tflite':\n"
        "            os.kill(os.getpid(), signal.SIGSEGV)\n"
        "        return whole(self, path, *rest, **more)\n"
        "    cpu.Cpu.open = open\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    trials = tried(*(candidate(model(name), NONE, variant=name) for name in ("linear", "int8", "dynamic")))
    assert [trial.right for trial in trials] == [True, False, True]
    assert trials[1].crashed
    assert "crashes the process (SIGSEGV)" in trials[1].reason


def test_a_candidate_that_hangs_is_given_up(tmp_path: Path) -> None:
    file = add_model(tmp_path)
    plan = dataclasses.replace(PLAN, limit_s=5.0)
    trials = tried(candidate(file, external(create="hang")), candidate(file, NONE), plan=plan)
    assert "did not answer within 5 s" in trials[0].reason
    assert trials[1].right


def test_what_only_one_delegate_can_run_has_to_be_finite(tmp_path: Path) -> None:
    file = tpu_model(tmp_path)
    right, wrong = tried(candidate(file, edge_tpu()), candidate(file, edge_tpu(invoke="nan")))
    assert right.right
    assert wrong.reason == "gives NaN or infinity at output 'y'"


def golden(folder: Path, off: float = 0.0, tolerance: float = 1e-4) -> dict[str, Golden]:
    """Write samples of the linear model, as a bundle has them."""
    x = np.random.default_rng(3).uniform(-1, 1, (4, 1, 4)).astype(np.float32)
    y = (x @ WEIGHTS + BIAS).astype(np.float32) + np.float32(off)
    arrays: dict[str, Any] = {"input/x": x, "variant/float/scores": y, "output/scores": y}
    np.savez(folder / "samples.npz", **arrays)
    return {"float": Golden(folder / "samples.npz", "float", {"scores": tolerance})}


@pytest.mark.parametrize(("off", "right"), [(0.0, True), (0.5, False)])
def test_results_are_held_against_the_bundles_golden_samples(tmp_path: Path, off: float, right: bool) -> None:
    (trial,) = tried(candidate(model("linear"), XNNPACK, variant="float"), golden=golden(tmp_path, off))
    assert trial.right == right
    assert right or "is wrong: output 'scores' is off by 0.5" in trial.reason


def test_a_variant_without_its_own_results_is_held_against_the_models(tmp_path: Path) -> None:
    samples = golden(tmp_path)["float"]
    near = {"int8": dataclasses.replace(samples, variant="int8", tolerance={})}
    (trial,) = tried(candidate(model("linear"), XNNPACK, variant="int8"), golden=near)
    assert trial.right
    far = {"int8": dataclasses.replace(golden(tmp_path, 3.0)["float"], variant="int8", tolerance={})}
    (trial,) = tried(candidate(model("linear"), XNNPACK, variant="int8"), golden=far)
    assert not trial.right


@pytest.mark.parametrize("name", ["two_by_two", "detector", "window", "lookup", "counts", "votes", "pixels", "gray"])
def test_any_model_can_be_tried_without_samples(name: str) -> None:
    xnnpack, none = tried(candidate(model(name), XNNPACK), candidate(model(name), NONE))
    assert none.right, none.reason
    assert xnnpack.right or "takes no operator" in xnnpack.reason


def test_a_stop_ends_it_at_once(tmp_path: Path) -> None:
    with pytest.raises(StoppedError, match="while its models were tried"):
        tried(candidate(add_model(tmp_path), external(create="hang")), stop=lambda: True)


def test_a_runtime_that_is_not_there_is_told() -> None:
    with pytest.raises(UnavailableError, match=r"the process that does it ends the process with 1: unknown runtime"):
        tried(candidate(model("linear"), NONE), plan=Plan("none-such"))


def slow(folder: Path, run_s: float) -> dict[str, str]:
    """Make every run of the trials' child take so long on the CPU, as a large model's does."""
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys, time\n"
        "if sys.argv[:1] == ['-m'] and 'edge_serve.model.trial_child' in sys.orig_argv:\n"
        "    from edge_serve.model.engine import Engine\n"
        "    whole = Engine.run\n"
        "    def run(self, inputs):\n"
        f"        time.sleep({run_s} / self.threads)\n"
        "        return whole(self, inputs)\n"
        "    Engine.run = run\n"
    )
    return {"PYTHONPATH": str(site)}


def test_a_large_model_gets_the_time_that_its_runs_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slow(tmp_path, 0.1).items():
        monkeypatch.setenv(name, value)
    ways = [candidate(model("linear"), spec, threads) for spec in (XNNPACK, NONE) for threads in (1, 2)]
    trials = tried(*ways, plan=dataclasses.replace(PLAN, total_s=0.5))
    assert [trial.reason for trial in trials] == [""] * 4
    assert trials[1].latency_s is not None
    assert trials[0].latency_s is not None
    assert trials[1].latency_s < trials[0].latency_s


def test_an_accelerator_that_takes_long_to_load_leaves_the_cpu_its_time(tmp_path: Path) -> None:
    file = add_model(tmp_path)
    plan = dataclasses.replace(PLAN, total_s=1.0, limit_s=3.0)
    trials = tried(candidate(file, external(create="hang")), candidate(file, XNNPACK), candidate(file, NONE), plan=plan)
    assert not trials[0].right
    assert [trial.right for trial in trials[1:]] == [True, True]
    assert all(trial.latency_s is not None for trial in trials[1:])
