"""What a model runs on: the fastest that is right, kept for the next start, and never what was not asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve import line
from edge_serve.bundle import TensorSpec
from edge_serve.errors import BundleError, DelegateAwayError, ModelError
from edge_serve.model import choice as choices
from edge_serve.model import selection, trial
from edge_serve.model.choice import FILE, choose
from edge_serve.model.delegate import DelegateSpec
from edge_serve.model.engine import Engine
from edge_serve.model.interpreter import Runtime, load_runtime
from edge_serve.model.repository import find
from edge_serve.model.selection import duration
from edge_serve.model.wish import Choice
from edge_serve.schema import compact
from tests.boards import tree
from tests.delegates import add_model, external
from tests.unit.material import assert_close, bundle, configured, model, rewrite, sound

Choose = Callable[..., Choice]
NONE, XNNPACK = DelegateSpec("none"), DelegateSpec("xnnpack")


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins as a process does."""
    monkeypatch.setattr(choices, "_memory", {})


@pytest.fixture
def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Choose in a folder of the test's own; `tries` counts the trials."""
    tried: list[int] = []
    whole = trial.try_all

    def counted(candidates: Any, *rest: Any, **more: Any) -> Any:
        tried.append(len(candidates))
        return whole(candidates, *rest, **more)

    monkeypatch.setattr(selection, "try_all", counted)

    def call(path: Path, delegate: DelegateSpec | None = None, **given: Any) -> Choice:
        version = find(path, variant=given.get("variant"))
        options = {"folder": tmp_path / "state", "board": "a board", "runtime": load_runtime(), **given}
        return choose(version, delegate=delegate, **options)

    call.tried = tried  # type: ignore[attr-defined]
    return call


def tries(chosen: Choose) -> int:
    return len(chosen.tried)  # type: ignore[attr-defined]


def test_auto_takes_the_fastest_that_is_right_and_says_why(chosen: Choose) -> None:
    found = chosen(model("linear"))
    assert {each.spec.name for each in found.line} == {"none", "xnnpack"}
    assert found.reasons[0].startswith(f"file on {found.winner.spec.label}")
    assert sum("; chosen" in reason for reason in found.reasons) == 1
    assert any(reason.startswith("edgetpu") for reason in found.reasons)
    assert any(reason.startswith("gpu") for reason in found.reasons)
    assert not found.cached


def test_auto_leaves_out_what_the_board_is_known_to_be_bad_at(chosen: Choose, tmp_path: Path) -> None:
    libraries = ["usr/lib/aarch64-linux-gnu/libvulkan.so.1"]
    root = tree(tmp_path, "pi-5", libraries=libraries, icd=["broadcom_icd.json"])
    found = chosen(model("linear"), root=root)
    assert all(each.spec.name != "gpu" for each in found.line)
    assert any(reason.startswith("gpu: not worth a try on Raspberry Pi 5") for reason in found.reasons)


def test_a_choice_for_which_something_was_not_free_is_not_kept(
    chosen: Choose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trial.try_all

    def one_away(*given: Any, **more: Any) -> Any:
        first, *others = whole(*given, **more)
        return [trial.Trial(first.candidate, "in use", away=True), *others]

    monkeypatch.setattr(selection, "try_all", one_away)
    assert chosen(model("linear")).away
    monkeypatch.setattr(selection, "try_all", whole)
    found = chosen(model("linear"))
    assert not found.away
    assert not found.cached
    assert chosen(model("linear")).cached


def test_where_only_what_is_not_free_could_run_it_may_be_later(chosen: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_away(candidates: Any, *_: Any, **__: Any) -> Any:
        return [trial.Trial(each, "in use", away=True) for each in candidates]

    monkeypatch.setattr(selection, "try_all", all_away)
    with pytest.raises(DelegateAwayError, match="in use"):
        chosen(model("linear"))


def test_what_takes_nothing_is_not_chosen(chosen: Choose) -> None:
    found = chosen(model("lookup"))
    assert [each.spec.label for each in found.line] == ["none"]
    assert "file on xnnpack: xnnpack takes no operator of this model" in found.reasons


def test_a_choice_is_kept_and_tried_again_only_for_what_it_depends_on(
    chosen: Choose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = chosen(model("linear"))
    monkeypatch.setattr(choices, "_memory", {})
    again = chosen(model("linear"))
    assert (again.line, again.reasons, again.cached, tries(chosen)) == (first.line, first.reasons, True, 1)
    others: list[dict[str, Any]] = [
        {"board": "another"},
        {"threads": 1},
        {"signature": "total"},
        {"folder": tmp_path / "elsewhere"},
    ]
    for number, other in enumerate(others, start=2):
        monkeypatch.setattr(choices, "_memory", {})
        chosen(model("linear"), **other)
        assert tries(chosen) == number
    chosen(model("int8"))
    assert tries(chosen) == 6


def test_a_process_does_not_try_a_model_twice(chosen: Choose, tmp_path: Path) -> None:
    first = chosen(model("linear"))
    again = chosen(model("linear"), folder=tmp_path / "other")
    assert (again.line, tries(chosen)) == (first.line, 1)
    assert (tmp_path / "other" / FILE).exists(), "and it is kept there, too"


def test_a_file_that_changes_is_tried_again(chosen: Choose, tmp_path: Path) -> None:
    file = tmp_path / "model.tflite"
    file.write_bytes(model("linear").read_bytes())
    chosen(file)
    file.write_bytes(model("int8").read_bytes())
    chosen(file)
    assert tries(chosen) == 2


def test_an_accelerator_that_comes_is_tried_and_one_that_goes_is_waited_for(
    chosen: Choose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    (root / "dev").mkdir(parents=True)
    chosen(model("linear"), root=root)
    (root / "dev/apex_0").touch()
    monkeypatch.setattr(choices, "_memory", {})
    chosen(model("linear"), root=root)
    assert tries(chosen) == 2
    (root / "dev/apex_0").unlink()
    monkeypatch.setattr(choices, "_memory", {})
    assert chosen(model("linear"), root=root).cached
    assert tries(chosen) == 2


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format": 2}', '{"format": 1, "choices": [], "files": {}}', "[" * 100_000, "\x00" * 50],
)
def test_a_damaged_file_costs_a_new_choice_and_nothing_else(chosen: Choose, tmp_path: Path, content: str) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / FILE).write_text(content)
    assert chosen(model("linear")).line
    assert json.loads((tmp_path / "state" / FILE).read_text())["choices"]


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(line=[]),
        lambda entry: entry["line"][0].update(threads=1000),
        lambda entry: entry["line"][0].update(delegate="none"),
        lambda entry: entry["line"][0].pop("threads"),
        lambda entry: entry.pop("devices"),
        lambda entry: entry["line"][0]["delegate"].update(options=[1]),
    ],
)
def test_a_damaged_entry_costs_a_new_choice(
    chosen: Choose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]
) -> None:
    first = chosen(model("linear"))
    file = tmp_path / "state" / FILE
    known = json.loads(file.read_text())
    (entry,) = known["choices"].values()
    change(entry)
    file.write_text(json.dumps(known))
    monkeypatch.setattr(choices, "_memory", {})
    again = chosen(model("linear"))
    assert (again.cached, {each.spec for each in again.line}) == (False, {each.spec for each in first.line})


def test_the_kept_file_runs_the_model_of_now_and_no_other(
    chosen: Choose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(model("linear"))
    file = tmp_path / "state" / FILE
    file.write_text(file.read_text().replace("linear.tflite", "int8.tflite"))
    monkeypatch.setattr(choices, "_memory", {})
    assert {each.file for each in chosen(model("linear")).line} == {model("linear")}


def test_a_folder_that_cannot_be_written_is_no_failure(chosen: Choose, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert chosen(model("linear"), folder=tmp_path / "file").line


# What is asked for.


def test_an_explicit_delegate_is_the_one_that_runs(chosen: Choose) -> None:
    found = chosen(model("linear"), NONE)
    assert (found.winner.spec, found.strict) == (NONE, True)
    assert chosen(model("linear"), XNNPACK).line[1].spec == NONE, "what goes on if it fails in service"


def test_an_explicit_delegate_that_takes_nothing_runs_and_says_so(chosen: Choose) -> None:
    found = chosen(model("lookup"), XNNPACK)
    assert found.winner.spec == XNNPACK
    assert "takes no operator" in found.reasons[0]


def test_an_explicit_delegate_that_cannot_be_had_is_an_error(chosen: Choose, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"refuses: the test delegate refuses"):
        chosen(add_model(tmp_path), external(create="refuse"))
    with pytest.raises(ModelError, match=r"is wrong: output 'y'"):
        chosen(add_model(tmp_path), external(invoke="wrong"))


def test_unless_something_may_take_its_place(chosen: Choose, tmp_path: Path) -> None:
    found = chosen(add_model(tmp_path), external(create="refuse"), fallback=[XNNPACK])
    assert (found.winner.spec, found.strict) == (XNNPACK, False)
    assert "refuses" in found.reasons[0]
    assert "; chosen" in found.reasons[1]


def test_a_delegate_by_its_library_runs_and_the_cpu_stands_by(chosen: Choose, tmp_path: Path) -> None:
    found = chosen(add_model(tmp_path), external())
    assert [each.spec.name for each in found.line] == ["external", "xnnpack", "none"]


def test_nothing_that_runs_is_an_error_with_all_reasons(chosen: Choose) -> None:
    with pytest.raises(
        ModelError, match=r"(?s)nothing here can run this model as asked:.*on xnnpack.*on none.*edgetpu"
    ):
        chosen(model("edgetpu"))


def test_threads_that_are_said_are_kept(chosen: Choose) -> None:
    assert {each.threads for each in chosen(model("linear"), threads=3).line} == {3}


# Bundles.


@pytest.fixture
def digits() -> Path:
    return Path(choices.__file__).parents[1] / "demo/models/digits"


def test_a_bundle_is_held_against_its_golden_samples(chosen: Choose, digits: Path) -> None:
    found = chosen(digits)
    assert {each.variant for each in found.line} == {"int8"}
    assert found.winner.file.parent == digits / "1"


def test_a_bundle_with_nothing_to_choose_is_not_tried(chosen: Choose, digits: Path) -> None:
    found = chosen(digits, XNNPACK, threads=2)
    assert (found.winner.threads, found.strict, tries(chosen)) == (2, True, 0)


def test_a_variant_that_was_changed_is_refused(chosen: Choose, digits: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "digits"
    shutil.copytree(digits, copy)
    with (copy / "1/samples.npz").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(BundleError, match=r"samples.npz: SHA-256"):
        chosen(copy)


def two_variants(folder: Path, runtime: Runtime) -> Path:
    """A bundle of a float and an int8 file of one model, whose manifest tells their tensors as a converter does."""
    found = bundle(folder / "model", variants={"float32": "linear", "int8": "int8"})

    def tell(manifest: dict[str, Any]) -> None:
        for variant in manifest["variants"]:
            engine = Engine.open(found / variant["file"], runtime=runtime)
            variant["inputs"] = [compact(spec) for spec in engine.inputs.values()]
            variant["outputs"] = [compact(spec) for spec in engine.outputs.values()]

    rewrite(found, tell)
    return found


def test_variants_of_other_types_stand_in_and_show_the_same_tensors(
    chosen: Choose, runtime: Runtime, tmp_path: Path
) -> None:
    found = two_variants(tmp_path, runtime)
    made = chosen(found, runtime=runtime)
    variants = {each.variant: each for each in made.line}
    assert set(variants) == {"float32", "int8"}
    assert {each.variant for each in chosen(found, runtime=runtime, variant="int8").line} == {"int8"}
    text = sound(**{str(model("linear")): str(found)})
    pipeline = configured(text, tmp_path).pipelines[0]
    opener = line._Opener(find(found), pipeline, runtime)
    x: dict[str, Any] = {"x": np.array([[0.1, -0.2, 0.3, 0.1]], np.float32)}
    engines = [opener(variants[name]) for name in ("int8", "float32")]
    assert engines[0].inputs == engines[1].inputs == {"x": TensorSpec("x", "float32", (1, 4))}
    one, other = (engine.run(x)["scores"] for engine in engines)
    assert one.dtype == other.dtype == np.float32
    assert_close(one, other, atol=0.5)


def test_variants_whose_tensors_nobody_tells_stand_in_for_nobody(chosen: Choose, tmp_path: Path) -> None:
    found = bundle(tmp_path / "model", variants={"float32": "linear", "int8": "int8"})
    assert {each.variant for each in chosen(found).line} == {"float32"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.0, "2 s"), (0.00194, "1.94 ms"), (0.000027, "27 µs"), (1e-7, "0.1 µs")]
)
def test_a_latency_is_written_as_people_read_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text
