"""The configuration: every mistake at once, each with file, key and remedy, and what a right one means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from edge_serve import config as configuration
from edge_serve import plugins
from edge_serve.config import NAME, Config, default_device, load, password_of
from edge_serve.errors import EXIT_USAGE, ConfigError
from edge_serve.sources.file import FileSourceOptions
from edge_serve.spec import DelegateSpec, InputSpec
from tests.unit.material import bundle, configured, model, problems, sound


def keys(text: str, folder: Path) -> set[str]:
    return {problem.key for problem in problems(text, folder)}


def only(text: str, folder: Path) -> str:
    found = problems(text, folder)
    assert len(found) == 1, found
    return str(found[0])


def test_a_sound_configuration_means_what_it_says(tmp_path: Path) -> None:
    config = configured(
        sound() + '\n[pipeline.input]\nkind = "tensor"\n[mqtt]\nurl = "mqtt://h"\n[mqtt.plant]\nurl = "mqtts://p:1"\n',
        tmp_path,
    )
    (pipeline,) = config.pipelines
    assert (config.device, config.runtime, config.grace_s) == ("bench", "auto", 10.0)
    assert (pipeline.name, pipeline.model.model, pipeline.key) == ("one", str(model("linear")), "pipeline")
    assert pipeline.source.options == FileSourceOptions("-")
    assert [sink.type for sink in pipeline.sinks] == ["stdout"]
    assert pipeline.input == InputSpec(kind="tensor")
    assert set(config.brokers) == {"", "plant"}
    assert config.brokers[""].version == "5"


def test_one_pipeline_may_stand_as_a_single_table_with_a_single_sink(tmp_path: Path) -> None:
    text = sound().replace("[[pipeline]]", "[pipeline]").replace("[[pipeline.sink]]", "[pipeline.sink]")
    assert configured(text, tmp_path).pipelines == configured(sound(), tmp_path).pipelines


def test_every_mistake_is_reported_at_once_with_key_and_remedy(tmp_path: Path) -> None:
    text = """
schema = 1
devise = "x"
grace_s = "long"

[mqtt]
url = "http://host"
keepalive_s = 1

[[pipeline]]
name = "a b"
model = "nowhere"
thread = 3
[pipeline.source]
type = "file"
pth = "-"
[pipeline.input]
kind = "sound"
[pipeline.output]
top_k = 0
[[pipeline.sink]]
type = "sdout"
"""
    with pytest.raises(ConfigError) as caught:
        configured(text, tmp_path)
    found = {problem.key: problem for problem in caught.value.problems}
    assert set(found) == {
        "devise",
        "grace_s",
        "mqtt.url",
        "mqtt.keepalive_s",
        "pipeline.name",
        "pipeline.model",
        "pipeline.thread",
        "pipeline.source.pth",
        "pipeline.source.path",
        "pipeline.input.kind",
        "pipeline.output.top_k",
        "pipeline.sink.type",
    }
    assert found["devise"].remedy == "Did you mean 'device'?"
    assert found["pipeline.thread"].remedy == "Did you mean 'threads'?"
    assert found["pipeline.source.pth"].remedy == "Did you mean 'path'?"
    assert "stdout" in found["pipeline.sink.type"].what
    assert str(caught.value).startswith(f"{tmp_path}/edge-serve.toml: 12 problems\n")
    assert caught.value.exit_code == EXIT_USAGE


def test_an_empty_file_says_what_belongs_into_it(tmp_path: Path) -> None:
    assert keys("", tmp_path) == {"schema", "pipeline"}


def test_another_schema_is_refused(tmp_path: Path) -> None:
    assert only(sound().replace("schema = 1", "schema = 2"), tmp_path) == "schema: must be 1, not 2"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("schema = ", "is not TOML: Invalid value"),
        ("schema = 1\nschema = 1", "is not TOML: Cannot overwrite a value"),
        ("x = " + "[" * 50_000, "is nested too deeply"),
        ("x = 1" + "0" * 5000, "is not TOML: Exceeds the limit"),
    ],
    ids=["half", "twice", "deep", "digits"],
)
def test_what_is_not_toml_is_refused_in_one_message(text: str, says: str, tmp_path: Path) -> None:
    assert only(text, tmp_path).startswith(says)


def test_a_file_that_is_not_there_says_how_to_begin(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"cannot be read \(No such file or directory\). `edge-serve config --sample`"
    ):
        load(tmp_path / "none.toml", plugins.load)


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b'device = "\xe4"')
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load(tmp_path / "c.toml", plugins.load)


def test_a_file_that_an_editor_marked_as_utf_8_is_read(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(sound(), encoding="utf-8-sig")
    assert load(tmp_path / "c.toml", plugins.load).device == "bench"


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "c.toml").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(ConfigError, match="a configuration has at most 1048576"):
        load(tmp_path / "c.toml", plugins.load)


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "ä", "a" * 65, "+", "#"])
def test_names_that_do_not_fit_into_topics_are_refused(name: str, tmp_path: Path) -> None:
    assert keys(sound(**{'"bench"': f'"{name}"'}), tmp_path) == {"device"}
    assert keys(sound(**{'"one"': f'"{name}"'}), tmp_path) == {"pipeline.name"}


def test_two_pipelines_need_two_names_and_are_told_apart_in_keys(tmp_path: Path) -> None:
    second = sound().split("[[pipeline]]", 1)[1].replace('path = "-"', 'path = "none"')
    found = keys(sound() + "\n[[pipeline]]" + second, tmp_path)
    assert found == {"pipeline[1].name", "pipeline[1].source.path"}


@pytest.mark.parametrize("raw", ["pipeline = 1", 'pipeline = "x"', "pipeline = [1]"])
def test_a_pipeline_that_is_no_table_is_refused(raw: str, tmp_path: Path) -> None:
    assert only(f"schema = 1\n{raw}", tmp_path).startswith("pipeline: must be a table")


def test_a_pipeline_without_a_source_is_refused(tmp_path: Path) -> None:
    text = sound().replace('[pipeline.source]\ntype = "file"\npath = "-"\n', "")
    assert only(text, tmp_path) == "pipeline.source: is missing. Add [pipeline.source] with type = …"


def test_a_pipeline_without_a_sink_is_refused_unless_its_source_answers(tmp_path: Path) -> None:
    text = sound().split("[[pipeline.sink]]")[0]
    assert only(text, tmp_path).startswith("pipeline.sink: is missing, so results would go nowhere")
    answering = text.replace('type = "file"\npath = "-"', f'type = "socket"\nlisten = "unix://{tmp_path}/s"')
    assert problems(answering, tmp_path) == []


def test_an_unknown_source_type_lists_the_known_ones(tmp_path: Path) -> None:
    text = only(sound(**{'type = "file"': 'type = "flie"'}), tmp_path)
    assert text.startswith("pipeline.source.type: unknown type 'flie'; known: file, mqtt, socket")


@pytest.mark.parametrize("source", ['"file"', "[]", "{}", "{ type = 5 }"])
def test_a_source_without_a_type_is_refused(source: str, tmp_path: Path) -> None:
    text = sound().replace('[pipeline.source]\ntype = "file"\npath = "-"\n', f"source = {source}\n")
    assert keys(text, tmp_path) == {"pipeline.source.type"}


# Models.


def test_a_model_that_is_not_there_is_named_with_its_full_path(tmp_path: Path) -> None:
    text = only(sound(**{str(model("linear")): "models/none"}), tmp_path)
    assert text.startswith(f"pipeline.model: {tmp_path}/models/none does not exist. Give a bundle")


def test_a_path_that_the_system_refuses_to_look_at_is_a_mistake_like_any_other(tmp_path: Path) -> None:
    """A folder that may not be entered does the same, but not to root."""
    long = "x" * 300
    assert keys(sound(**{str(model("linear")): long}), tmp_path) == {"pipeline.model"}
    assert keys(sound(**{'path = "-"': f'path = "{long}"'}), tmp_path) == {"pipeline.source.path"}
    assert keys(sound(**{'"stdout"': f'"file"\npath = "{long}"'}), tmp_path) == {"pipeline.sink.path"}
    assert keys(sound() + f'[pipeline.output]\nlabels_file = "{long}"', tmp_path) == {"pipeline.output.labels_file"}


def test_models_are_relative_to_the_configurations_folder(tmp_path: Path) -> None:
    bundle(tmp_path / "models" / "m")
    config = configured(sound(**{str(model("linear")): "models/m"}), tmp_path)
    assert config.resolve(config.pipelines[0].model.model) == tmp_path / "models" / "m"


def test_a_named_model_is_used_with_what_the_pipeline_says_over_it(tmp_path: Path) -> None:
    text = sound(**{f'"{model("linear")}"': '"shared"\nthreads = 2'})
    text += f'[models.shared]\nmodel = "{model("int8")}"\nthreads = 4\ndelegate = "none"\nversion_labels = {{ stable = 3 }}\n'
    chosen = configured(text, tmp_path).pipelines[0].model
    assert (chosen.model, chosen.threads, chosen.delegate) == (str(model("int8")), 2, "none")
    assert chosen.version_labels == {"stable": 3}


def test_mistakes_of_a_named_model_stand_at_its_table(tmp_path: Path) -> None:
    assert keys(sound() + "[models.a]\nthreads = 65\n[models.b]\nmodel = 1\nx = 1\n", tmp_path) == {
        "models.a.model",
        "models.a.threads",
        "models.b.model",
        "models.b.x",
    }
    assert keys(sound() + "[models]\na = 1\n", tmp_path) == {"models.a"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('delegate = "vulkan"', "delegate: unknown delegate 'vulkan'; known: edgetpu, external, gpu, none, xnnpack"),
        ('delegate = ":0"', "delegate: ':0' names no delegate"),
        ('delegate = "external"', "delegate: an external delegate is named by the path of its library"),
        ("delegate = {}", "delegate: a delegate table names a library, or a delegate by its name"),
        ("delegate = { library = 1 }", "delegate: delegate: library must be text"),
        ('delegate = { library = "x.so", device = 1 }', "delegate: unknown keys device in delegate"),
        ('delegate = { library = "x.so", options = 1 }', "delegate: delegate: options is a table"),
        ('delegate = { library = "x.so", options = { a = [] } }', "delegate: delegate: option 'a' must be text"),
        ('delegate = "none"\nfallback = ["cuda"]', "fallback[0]: unknown delegate 'cuda'"),
        ('fallback = ["none"]', "fallback: goes with an explicit delegate. Take it out"),
        ('delegate = "auto"\nfallback = ["none"]', "fallback: goes with an explicit delegate. Take it out"),
    ],
)
def test_a_delegate_that_cannot_be_is_refused(tmp_path: Path, line: str, problem: str) -> None:
    text = only(sound(**{'name = "one"': f'name = "one"\n{line}'}), tmp_path)
    assert text.startswith(f"pipeline.{problem}")


@pytest.mark.parametrize(
    ("value", "spec", "label"),
    [
        ("xnnpack", DelegateSpec("xnnpack"), "xnnpack"),
        ("edgetpu:usb:1", DelegateSpec("edgetpu", "usb:1"), "edgetpu:usb:1"),
        (
            "/usr/lib/libvx_delegate.so",
            DelegateSpec("external", "", "/usr/lib/libvx_delegate.so"),
            "external:libvx_delegate",
        ),
        ({"library": "libx.so"}, DelegateSpec("external", "", "libx.so"), "external:libx"),
        (
            {"name": "edgetpu", "index": "pci:0", "options": {"a": 1, "b": True, "c": "text"}},
            DelegateSpec("edgetpu", "pci:0", "", (("a", "1"), ("b", "true"), ("c", "text"))),
            "edgetpu:pci:0",
        ),
    ],
)
def test_a_delegate_is_named_in_a_word_or_a_table(value: Any, spec: DelegateSpec, label: str) -> None:
    assert DelegateSpec.parse(value) == spec
    assert spec.label == label


# Inputs and outputs.


def test_a_key_from_a_field_needs_the_fields_name(tmp_path: Path) -> None:
    assert keys(sound() + '[pipeline.input]\nkey = "field"', tmp_path) == {"pipeline.input.key_field"}


def test_labels_are_given_once_and_their_file_exists(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("a\n", encoding="utf-8")
    assert problems(sound() + '[pipeline.output]\nlabels_file = "l.txt"', tmp_path) == []
    twice = sound() + '[pipeline.output]\nlabels = ["a"]\nlabels_file = "l.txt"'
    assert only(twice, tmp_path).startswith("pipeline.output.labels_file: labels are given twice")
    assert keys(sound() + '[pipeline.output]\nlabels_file = "none.txt"', tmp_path) == {"pipeline.output.labels_file"}


# Brokers.


@pytest.mark.parametrize(
    "url", ["mqtt://h", "mqtt://h:1883", "mqtts://[::1]:8883", "mqtt://127.0.0.1", "unix:///run/broker.sock"]
)
def test_addresses_of_brokers_are_taken(url: str, tmp_path: Path) -> None:
    assert problems(sound() + f'[mqtt]\nurl = "{url}"', tmp_path) == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h",
        "h:1883",
        "http://h",
        "mqtt://",
        "mqtt://:1883",
        "mqtt://h:0",
        "mqtt://h:99999",
        "mqtt://h:x",
        "mqtt://[::1",
        "unix://x",
    ],
)
def test_what_is_no_address_of_a_broker_is_refused(url: str, tmp_path: Path) -> None:
    assert keys(sound() + f'[mqtt]\nurl = "{url}"', tmp_path) == {"mqtt.url"}


def test_secrets_in_an_address_are_refused_and_never_shown(tmp_path: Path) -> None:
    for url in (
        "mqtt://me:pa55word@h",
        "mqttx://me:pa55word@h",
        "x://me:pa55word/with@slashes@h",
        "mqtt://me:x@pa55word@h:x",
    ):
        text = only(sound() + f'[mqtt]\nurl = "{url}"', tmp_path)
        assert text.startswith("mqtt.url")
        assert "pa55word" not in text


def test_tls_options_without_tls_are_refused(tmp_path: Path) -> None:
    text = sound() + '[mqtt]\nurl = "mqtt://h"\ninsecure = true\nca_file = "none"\ncert_file = "none"'
    found = problems(text, tmp_path)
    assert {"mqtt.insecure", "mqtt.ca_file", "mqtt.cert_file"} <= {problem.key for problem in found}
    assert any("cert_file and key_file go together" in problem.what for problem in found)


def test_files_of_a_broker_are_looked_for(tmp_path: Path) -> None:
    text = sound() + '[mqtt.plant]\nurl = "mqtts://h"\nca_file = "ca.pem"\nusername = "u"\npassword_file = "pw"\n'
    assert keys(text, tmp_path) == {"mqtt.plant.ca_file", "mqtt.plant.password_file"}
    (tmp_path / "ca.pem").touch()
    (tmp_path / "pw").touch()
    assert problems(text, tmp_path) == []


def test_a_password_without_a_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pw").touch()
    assert keys(sound() + '[mqtt]\nurl = "mqtt://h"\npassword_file = "pw"', tmp_path) == {"mqtt.password_file"}


def test_a_broker_that_is_no_table_is_refused(tmp_path: Path) -> None:
    assert only("mqtt = 5\n" + sound(), tmp_path).startswith("mqtt: must be a table")


def with_password(tmp_path: Path, extra: str = "", name: str = "") -> Config:
    table = f"mqtt.{name}" if name else "mqtt"
    return configured(sound() + f'[{table}]\nurl = "mqtt://h"\nusername = "u"\n{extra}', tmp_path)


def test_the_password_comes_from_its_file_before_a_credential_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.delenv("EDGE_SERVE_MQTT_PASSWORD", raising=False)
    assert password_of(with_password(tmp_path), "") is None
    monkeypatch.setenv("EDGE_SERVE_MQTT_PASSWORD", "from the environment")
    assert password_of(with_password(tmp_path), "") == "from the environment"
    (tmp_path / "mqtt-password").write_text("from the credential\n", encoding="utf-8")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert password_of(with_password(tmp_path), "") == "from the credential"
    (tmp_path / "pw").write_text(" from the file \r\n", encoding="utf-8")
    assert password_of(with_password(tmp_path, 'password_file = "pw"'), "") == " from the file "


def test_each_named_broker_has_its_own_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_password(tmp_path, name="north-hall")
    monkeypatch.setenv("EDGE_SERVE_MQTT_PASSWORD", "another")
    monkeypatch.setenv("EDGE_SERVE_MQTT_PASSWORD_NORTH_HALL", "mine")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert password_of(config, "north-hall") == "mine"
    (tmp_path / "mqtt-password-north-hall").write_text("credential", encoding="utf-8")
    assert password_of(config, "north-hall") == "credential"


# This machine.


def test_a_device_without_a_name_gets_one_that_fits_into_topics(tmp_path: Path) -> None:
    device = configured(sound().replace('device = "bench"\n', ""), tmp_path).device
    assert NAME.fullmatch(device)
    assert device == default_device()


def test_cloned_cards_are_told_apart_by_the_boards_serial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serial = tmp_path / "serial-number"
    serial.write_bytes(b"10000000ABCD1234\0")
    monkeypatch.setattr(configuration, "SERIAL_FILES", (str(tmp_path / "none"), str(serial)))
    assert re.fullmatch(r".+-cd1234", default_device())
    assert NAME.fullmatch(default_device())


def test_state_lives_where_the_configuration_or_the_service_manager_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    assert configured(sound(), tmp_path).state_dir == Path("/x/edge-serve")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/a:/var/lib/b")
    assert configured(sound(), tmp_path).state_dir == Path("/var/lib/a")
    assert configured('state_dir = "s"\n' + sound(), tmp_path).state_dir == tmp_path / "s"
    monkeypatch.delenv("STATE_DIRECTORY")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert configured(sound(), tmp_path).state_dir == Path("/home/me/.local/state/edge-serve")
