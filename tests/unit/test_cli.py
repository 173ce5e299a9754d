"""The command line: exit codes, what goes to which stream, and the commands that need no service."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve import __version__, cli, plugins, schema, spec
from edge_serve import config as configuration
from edge_serve.commands import COMMANDS
from edge_serve.commands.config import render
from edge_serve.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_UNAVAILABLE, EXIT_USAGE
from edge_serve.plugins import BUILTIN
from tests.unit.commands import Outcome, Run
from tests.unit.material import BIAS, WEIGHTS, assert_close, bundle, encoded, model, plain, problems, rewrite, sound

ROOT = Path(__file__).parents[2]
HERE = [name for name in COMMANDS if name not in ("convert", "demo")]


# The command itself.


def test_the_version_is_printed(run: Run) -> None:
    assert run("--version") == Outcome(EXIT_OK, f"edge-serve {__version__}\n", "")


def test_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys; sys.argv = ['edge-serve', '--help']; from edge_serve import cli\n"
        "try:\n    cli.main()\nfinally:\n    print(sorted(name for name in sys.modules if name in ('numpy', 'PIL', 'paho') "
        "or name.startswith('edge_serve.commands.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", HERE)
def test_every_command_explains_itself_with_an_example(run: Run, name: str) -> None:
    outcome = run(name, "--help")
    assert outcome.code == EXIT_OK
    assert f"edge-serve {name}" in outcome.out.split("Example", 1)[1]


@pytest.mark.parametrize("name", HERE)
def test_every_option_of_every_command_is_documented(name: str) -> None:
    command = cli.cli.get_command(cli.cli.make_context("edge-serve", ["--help"], resilient_parsing=True), name)
    assert command is not None
    undocumented = [
        parameter.name
        for parameter in command.params
        if parameter.param_type_name == "option" and not getattr(parameter, "help", None)
    ]
    assert undocumented in ([], ["runtime"])


def test_a_mistyped_command_is_corrected(run: Run) -> None:
    outcome = run("chekc")
    assert outcome.code == EXIT_USAGE
    assert "no command 'chekc'. Did you mean 'check'?" in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize(
    "arguments", [["infer"], ["check", "--what"], ["infer", "m", "x", "--threads", "99"], ["config"]]
)
def test_wrong_use_is_exit_2_on_standard_error(run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (EXIT_USAGE, "")
    assert outcome.err


def test_options_may_come_from_the_environment_by_the_names_that_users_write(
    run: Run, monkeypatch: pytest.MonkeyPatch, vector: Path
) -> None:
    monkeypatch.setenv("EDGE_SERVE_CHECK_CONFIG", "other.toml")
    assert "other.toml: 1 problem" in run("check").err
    assert "this.toml: 1 problem" in run("check", "-c", "this.toml").err
    monkeypatch.setenv("EDGE_SERVE_INFER_JSON", "1")
    monkeypatch.setenv("EDGE_SERVE_INFER_TOP_K", "1")
    monkeypatch.setenv("EDGE_SERVE_INFER_OUTPUT_TYPE", "classification")
    assert len(run("infer", model("linear"), vector).document["results"][0]["result"]["classes"]) == 1
    monkeypatch.setenv("EDGE_SERVE_INFER_VERSION", "3")
    assert "has no version 3" in run("infer", model("linear"), vector).err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), EXIT_INTERRUPTED),
        (OSError(5, "Input/output error"), EXIT_UNAVAILABLE),
        (BrokenPipeError(), EXIT_UNAVAILABLE),
    ],
)
def test_what_ends_a_command_decides_the_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(cli.cli, "main", fail)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == code


# check


def written(text: str, folder: Path) -> Path:
    path = folder / "edge-serve.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_check_says_what_each_pipeline_would_be(run: Run, tmp_path: Path) -> None:
    written(sound(), tmp_path)
    outcome = run("check")
    assert outcome.code == EXIT_OK, outcome.err
    first, promised, *notes, last = outcome.out.splitlines()
    assert first == "one: linear (file), tensor in, tensor out, on xnnpack"
    assert promised.startswith("one: delivery: every input is worked through")
    assert all(note.startswith("one: note: ") for note in notes)
    assert last == "edge-serve.toml: no mistakes"


def test_check_names_every_mistake_of_the_file(run: Run, tmp_path: Path) -> None:
    written(sound(**{'device = "bench"': 'devise = "bench"', 'path = "-"': 'path = "none"'}), tmp_path)
    outcome = run("check", "-c", "edge-serve.toml")
    assert (outcome.code, outcome.out) == (EXIT_USAGE, "")
    assert "edge-serve.toml: 2 problems" in outcome.err
    assert "devise: unknown key. Did you mean 'device'?" in outcome.err
    assert "pipeline.source.path: " in outcome.err


@pytest.mark.parametrize(
    ("extra", "key_says"),
    [
        ("signature = 'train'", "has no signature 'train'; it has: serving_default, total"),
        ("version = 7", "has no version 7; it has: none"),
        ("variant = 'int8'", "has no variant 'int8'"),
        ("input = { kind = 'image' }", "is no image tensor"),
        ("input = { kind = 'window', length = 9 }", "say length and channels"),
        ("output = { type = 'classification', labels = ['a'] }", "1 labels for the 3 classes of output 'scores'"),
        ("output = { type = 'detection' }", "detection needs to know which outputs hold boxes"),
        ("output = { type = 'classification', tensor = 'x' }", "the model has no output 'x'"),
    ],
)
def test_check_holds_the_model_against_the_configuration(run: Run, tmp_path: Path, extra: str, key_says: str) -> None:
    written(sound(**{'name = "one"': f'name = "one"\n{extra}'}), tmp_path)
    outcome = run("check", "--json")
    assert outcome.code == EXIT_USAGE
    (problem,) = outcome.document["problems"]
    assert problem["key"] == "pipeline.model"
    assert key_says in problem["what"]
    assert run("check", "--no-models").code == EXIT_OK


def test_check_finds_a_picture_pipeline_with_a_model_of_two_inputs(run: Run, tmp_path: Path) -> None:
    text = sound(
        **{str(model("linear")): str(model("two_by_two")), 'name = "one"': "name = 'one'\ninput = { kind = 'image' }"}
    )
    written(text, tmp_path)
    (problem,) = run("check", "--json").document["problems"]
    assert "kind = image takes a model with one input; this one has a, b" in problem["what"]


@pytest.mark.parametrize("name", ["text", "flex", "never", "custom"])
def test_check_finds_models_that_cannot_run(run: Run, tmp_path: Path, name: str) -> None:
    written(sound(**{str(model("linear")): str(model(name))}), tmp_path)
    (problem,) = run("check", "--json").document["problems"]
    assert f"{name}.tflite: " in problem["what"]


def test_check_finds_a_changed_bundle(run: Run, tmp_path: Path) -> None:
    folder = bundle(tmp_path / "models" / "m")
    written(sound(**{str(model("linear")): "models/m"}), tmp_path)
    assert run("check").code == EXIT_OK
    rewrite(folder, lambda data: data["files"].update({"model.tflite": "0" * 64}))
    assert "SHA-256" in run("check").err


def test_check_names_the_mistakes_of_all_models_at_once(run: Run, tmp_path: Path) -> None:
    second = (
        sound()
        .split("[[pipeline]]", 1)[1]
        .replace('"one"', '"two"')
        .replace('"file"', '"socket"')
        .replace('path = "-"', 'listen = "tcp://127.0.0.1:9750"')
    )
    text = (sound() + "[[pipeline]]" + second).replace("/linear.tflite", "/text.tflite")
    written(text, tmp_path)
    assert [each["key"] for each in run("check", "--json").document["problems"]] == [
        "pipeline[0].model",
        "pipeline[1].model",
    ]


def test_check_as_json_is_one_document(run: Run, tmp_path: Path) -> None:
    written(sound(), tmp_path)
    document = run("check", "--json").document
    assert document.pop("delivery")["one"]["promise"].startswith("every input is worked through")
    assert document == {
        "v": 1,
        "file": "edge-serve.toml",
        "ok": True,
        "problems": [],
        "pipelines": ["one: linear (file), tensor in, tensor out, on xnnpack"],
    }


def test_check_of_a_missing_file_is_wrong_use(run: Run) -> None:
    outcome = run("check", "-c", "none.toml")
    assert outcome.code == EXIT_USAGE
    assert "none.toml: 1 problem" in outcome.err


# config --sample


@pytest.fixture
def sampled(tmp_path: Path) -> Path:
    """A folder in which what the sample names exists."""
    bundle(tmp_path / "models" / "bearing")
    (tmp_path / "photos").mkdir()
    return tmp_path


def test_the_sample_is_a_sound_configuration_where_its_model_exists(run: Run, sampled: Path) -> None:
    outcome = run("config", "--sample")
    assert outcome.code == EXIT_OK
    assert problems(outcome.out, sampled) == []


@pytest.mark.parametrize("source", list(BUILTIN["sources"]))
@pytest.mark.parametrize("sink", list(BUILTIN["sinks"]))
def test_the_sample_of_any_source_and_sink_is_sound(run: Run, sampled: Path, source: str, sink: str) -> None:
    outcome = run("config", "--sample", "--source", source, "--sink", sink)
    # A socket's folder belongs to the machine.
    assert [each for each in problems(outcome.out, sampled) if "listen" not in each.key] == []
    assert f'type = "{source}"' in outcome.out
    assert f'type = "{sink}"' in outcome.out


@pytest.mark.parametrize("source", list(BUILTIN["sources"]))
@pytest.mark.parametrize("sink", list(BUILTIN["sinks"]))
def test_every_key_of_the_sample_can_be_taken_as_it_stands(sampled: Path, source: str, sink: str) -> None:
    """With all comments taken away, nothing is wrong but what names files that are not here, or says a thing twice."""
    text = re.sub(r"(?m)^# (\w+ = )", r"\1", render((source,), (sink,)))
    wrong = [
        str(each)
        for each in problems(text, sampled)
        if re.match(r"(must be|unknown key|is missing|is not TOML|must not)", each.what)
    ]
    assert wrong == []


def test_an_unknown_source_in_a_sample_is_named(run: Run) -> None:
    outcome = run("config", "--sample", "--source", "amqp")
    assert outcome.code == EXIT_USAGE
    assert "unknown type 'amqp'" in outcome.err


TABLES = [
    configuration._TopKeys,
    configuration.MqttBroker,
    configuration._PipelineKeys,
    configuration.ModelConfig,
    spec.InputSpec,
    spec.OutputSpec,
    *(plugins.load(kind, name).Options for kind in ("sources", "sinks") for name in BUILTIN[kind]),
]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_every_key_of_the_configuration_is_documented(table: Any) -> None:
    for field in dataclasses.fields(table):
        assert len(field.metadata.get("doc", "")) > 10, field.name


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_every_example_is_a_value_that_its_key_takes(table: Any) -> None:
    examples = {
        field.name: field.metadata["example"]
        for field in dataclasses.fields(table)
        if field.metadata.get("example") is not None
    }
    found: list[Any] = []
    schema.read(table, examples, "", found)
    assert [each for each in found if each.what != "is missing"] == []


# infer


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", np.array([[1, 2, 3, 4]], np.float32))
    return tmp_path / "x.npy"


EXPECTED = (np.array([[1, 2, 3, 4]], np.float32) @ WEIGHTS + BIAS)[0]


def test_infer_runs_a_model_on_a_file(run: Run, vector: Path) -> None:
    outcome = run("infer", model("linear"), vector, "--json")
    assert outcome.code == EXIT_OK, outcome.err
    (found,) = outcome.document["results"]
    assert found["input"] == str(vector)
    assert_close(found["result"]["tensors"]["scores"]["data"][0], EXPECTED, rtol=1e-5)
    assert found["model"]["name"] == "linear"
    assert found["timings_ms"]["invoke"] >= 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", b"[1, 2, 3, 4]"),
        ("x.json", b'{"x": [[1, 2, 3, 4]]}'),
        ("x.bin", np.array([1, 2, 3, 4], "<f4").tobytes()),
        ("without-a-name", b"[1, 2, 3, 4]"),
    ],
)
def test_infer_takes_every_form_of_a_tensor(run: Run, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (found,) = run("infer", model("linear"), name, "--json").document["results"]
    assert_close(found["result"]["tensors"]["scores"]["data"][0], EXPECTED, rtol=1e-5)


def test_infer_knows_a_file_by_its_name_also_where_the_bundle_speaks_of_messages(
    run: Run, tmp_path: Path, vector: Path
) -> None:
    bundle(tmp_path / "m", input={"content_type": "application/json"})
    assert run("infer", tmp_path / "m", vector).code == EXIT_OK
    assert run("infer", tmp_path / "m", vector, "--content-type", "application/json").code == EXIT_USAGE


def test_infer_prints_the_best_classes_with_their_labels(run: Run, tmp_path: Path, vector: Path) -> None:
    (tmp_path / "labels.txt").write_text("idle\nrun\nworn\n", encoding="utf-8")
    outcome = run("infer", model("linear"), vector, "--labels", "labels.txt", "--top-k", "2")
    first, best, second = outcome.out.splitlines()
    assert first.startswith(f"{vector}  (")
    order = np.argsort(-EXPECTED)
    labels = ["idle", "run", "worn"]
    assert best.split() == [f"{EXPECTED[order[0]]:.4f}", labels[order[0]]]
    assert second.split() == [f"{EXPECTED[order[1]]:.4f}", labels[order[1]]]


def test_infer_shows_objects_in_pixels(run: Run, tmp_path: Path) -> None:
    picture = plain(240, 160)
    picture.paste((255, 0, 0), (60, 40, 120, 80))
    picture.save(tmp_path / "red.png")
    plain(24, 16).save(tmp_path / "none.png")
    outcome = run("infer", model("detector"), "red.png", "none.png")
    assert outcome.out.splitlines()[1:] == [
        "    0.9000  class 0  [60.0, 40.0, 120.0, 80.0]",
        outcome.out.splitlines()[2],
        "  nothing found",
    ]


def test_infer_normalizes_pictures_as_it_is_told(run: Run, tmp_path: Path) -> None:
    plain(8, 8, (10, 20, 30)).save(tmp_path / "x.png")
    outcome = run("infer", model("any_size"), "x.png", "--kind", "tensor", "--json")
    assert outcome.code == EXIT_USAGE
    outcome = run(
        "infer", model("pixels"), "x.png", "--json", "--scale", "0.00392156862745098", "--mean", "0,0,0", "--std", "1"
    )
    (found,) = outcome.document["results"]
    assert_close(found["result"]["tensors"]["means"]["data"][0], [10 / 255, 20 / 255, 30 / 255], atol=0.005)


def test_infer_gives_a_result_for_each_window_of_a_file(run: Run, tmp_path: Path) -> None:
    rows = np.zeros((25, 3))
    rows[10:, 0] = 5
    np.savetxt(tmp_path / "run.csv", rows, delimiter=",", header="ax,ay,az", comments="")
    outcome = run("infer", model("window"), "run.csv", "--kind", "window", "--output-type", "classification", "--json")
    results = outcome.document["results"]
    assert [each["id"] for each in results] == ["run.csv", "run.csv#1"]
    assert [each["result"]["classes"][0]["score"] for each in results] == [0.5, pytest.approx(0.993307, abs=1e-4)]
    assert results[0]["window"]["samples"] == 10


def test_infer_says_that_a_file_is_too_short_for_a_window(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((9, 3)))
    outcome = run("infer", model("window"), "x.npy", "--kind", "window")
    assert outcome.code == EXIT_USAGE
    assert "x.npy: holds too few samples for one window" in outcome.err


def test_a_bad_input_leaves_the_others_alone(run: Run, tmp_path: Path, vector: Path) -> None:
    (tmp_path / "bad.json").write_text("[1,", encoding="utf-8")
    outcome = run("infer", model("linear"), "bad.json", "none.npy", vector, "--json")
    assert outcome.code == EXIT_USAGE
    bad, missing, good = outcome.document["results"]
    assert bad["error"]["code"] == "bad_input"
    assert bad["error"]["message"].startswith("bad.json: payload is not JSON")
    assert missing["error"]["message"] == "none.npy: cannot be read (No such file or directory)"
    assert "result" in good
    outcome = run("infer", model("linear"), "bad.json", vector)
    assert outcome.err.startswith("bad.json: payload is not JSON")
    assert str(vector) in outcome.out


def test_a_failure_inside_the_model_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[7]", encoding="utf-8")
    (found,) = run("infer", model("lookup"), "x.json", "--delegate", "none", "--json").document["results"]
    assert found["error"]["code"] == "inference_failed"


def test_numbers_that_are_not_finite_are_null(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1, 0, -1]", encoding="utf-8")
    outcome = run("infer", model("dynamic"), "x.json", "--json")
    assert outcome.document["results"][0]["result"]["tensors"]["logs"]["data"] == [[0.0, None, None]]
    assert "NaN" not in outcome.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.tflite"], "none.tflite: no such model"),
        ([model("text")], "text models are not supported"),
        ([model("linear"), "--signature", "x"], "has no signature 'x'"),
        ([model("linear"), "--variant", "int8"], "has no variant 'int8'"),
        ([model("linear"), "--version", "3"], "has no version 3"),
        ([model("linear"), "--delegate", "cuda"], "unknown delegate 'cuda'"),
        ([model("linear"), "--mean", "a,b"], "give numbers with commas between them"),
        ([model("linear"), "--labels", "none.txt"], "none.txt: labels cannot be read"),
        ([model("linear"), "--kind", "image"], "is no image tensor"),
    ],
)
def test_a_model_or_option_that_cannot_be_used_ends_infer(
    run: Run, vector: Path, arguments: list[Any], says: str
) -> None:
    outcome = run("infer", arguments[0], vector, *arguments[1:])
    assert (outcome.code, outcome.out) == (EXIT_USAGE, "")
    assert says in outcome.err


def test_infer_uses_the_other_signature_and_more_threads(run: Run, vector: Path) -> None:
    (found,) = run("infer", model("linear"), vector, "--signature", "total", "--threads", "2", "--json").document[
        "results"
    ]
    assert found["result"]["tensors"]["total"]["data"] == [[10.0]]


# inspect


def test_inspect_describes_a_file(run: Run) -> None:
    document = run("inspect", model("int8"), "--json").document
    assert (document["name"], document["version"], document["variants"]) == ("int8", None, [])
    (read,) = document["signatures"]["serving_default"]["inputs"]
    assert (read["name"], read["dtype"], read["shape"]) == ("x", "int8", [1, 4])
    assert 0 < read["scale"] < 0.1
    assert document["operators"] == {"FULLY_CONNECTED": 1}
    assert document["delegate"]["operators"] == 1
    assert document["bytes"] == model("int8").stat().st_size


def test_inspect_describes_every_signature_also_of_models_that_cannot_be_served(run: Run) -> None:
    assert set(run("inspect", model("linear"), "--json").document["signatures"]) == {"serving_default", "total"}
    assert set(run("inspect", model("named"), "--json").document["signatures"]) == {"mean", "total"}
    assert "words: string [2]" in run("inspect", model("text")).out


def test_inspect_counts_what_the_delegate_leaves(run: Run) -> None:
    delegate = run("inspect", model("detector"), "--json").document["delegate"]
    assert delegate["not_claimed"]["TFLite_Detection_PostProcess"] == 1
    assert delegate["claimed"] + sum(delegate["not_claimed"].values()) == delegate["operators"]
    assert run("inspect", model("detector"), "--delegate", "none", "--json").document["delegate"]["claimed"] == 0


def test_inspect_describes_a_bundle(run: Run, tmp_path: Path) -> None:
    bundle(
        tmp_path / "bearing",
        3,
        {"float32": "linear", "int8": "int8"},
        input={"kind": "tensor"},
        output={"type": "classification", "labels": ["a", "b", "c"]},
    )
    document = run("inspect", "bearing", "--variant", "int8", "--json").document
    assert (document["name"], document["version"], document["variant"], document["labels"]) == ("bearing", 3, "int8", 3)
    assert [each["name"] for each in document["variants"]] == ["float32", "int8"]
    text = run("inspect", "bearing").out
    assert text.startswith("bearing version 3, variant float32: ")
    assert "input: kind = tensor" in text
    assert "output: type = classification" in text


def test_inspect_of_what_is_no_model_is_wrong_use(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.tflite").write_bytes(b"something else")
    for name, says in (("x.tflite", "is not a TFLite model"), ("none", "no such model")):
        outcome = run("inspect", name)
        assert (outcome.code, outcome.out) == (EXIT_USAGE, "")
        assert says in outcome.err


def test_inspect_tells_a_damaged_file(run: Run, tmp_path: Path) -> None:
    data = bytearray(model("linear").read_bytes())
    data[data.index(b"PartitionedCall:0") + 3] = 0xD4
    (tmp_path / "x.tflite").write_bytes(data)
    outcome = run("inspect", "x.tflite")
    assert outcome.code == EXIT_USAGE
    assert "x.tflite: is damaged" in outcome.err


def test_a_whole_command_answers_quickly() -> None:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "edge_serve", "--help"], check=True, capture_output=True, cwd=ROOT)
    assert time.perf_counter() - start < 3


def test_a_picture_in_memory_and_on_disk_are_the_same(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(encoded(plain(16, 16, (200, 100, 50)), "PNG"))
    (found,) = run("infer", model("pixels"), "x.jpg", "--json").document["results"]
    assert_close(found["result"]["tensors"]["means"]["data"][0], [200 / 255, 100 / 255, 50 / 255], atol=0.003)
