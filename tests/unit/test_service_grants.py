"""What a configuration needs of the system, and what a service could not be given: named, with the remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_serve import plugins
from edge_serve.config import Config, parse
from edge_serve_devices import access, grants
from edge_serve_devices.access import ENTER, READ, WRITE, Reader
from tests.support import MODELS

DYNAMIC = Reader(None, frozenset())


@pytest.fixture
def open_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that all may enter, in a system whose /tmp is the service's /tmp, too."""
    monkeypatch.setattr(access, "HIDDEN", {Path("/home/pi"): "a service sees no home folders"})
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    for each in folder.parents:
        if each.stat().st_uid == os.getuid() and not each.stat().st_mode & 0o001:
            each.chmod(each.stat().st_mode | 0o011)
    return folder


def configured(folder: Path, source: str, sink: str = 'type = "stdout"', top: str = "", mqtt: str = "") -> Config:
    """Read a configuration of one pipeline that lies in `folder`."""
    model = folder / "model.tflite"
    model.write_bytes((MODELS / "digits.tflite").read_bytes())
    model.chmod(0o644)
    path = folder / "edge-serve.toml"
    text = f'schema = 1\ndevice = "box"\n{top}\n{mqtt}\n[pipeline]\nname = "p"\nmodel = "model.tflite"\n'
    path.write_text(f"{text}[pipeline.source]\n{source}\n[pipeline.sink]\n{sink}\n", encoding="utf-8")
    path.chmod(0o644)
    return parse(path.read_text(encoding="utf-8"), path, plugins.load)


@pytest.fixture(autouse=True)
def as_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/edge-serve")


UNIX = 'type = "socket"\nlisten = "unix:///run/edge-serve/p.sock"'


def wanted(config: Config, who: Reader = DYNAMIC) -> tuple[grants.Grants, list[str]]:
    """Give the grants, and the problems as text."""
    found, problems = grants.derive(config, "edge-serve", who)
    return found, [str(problem) for problem in problems]


def test_a_socket_in_the_services_own_folder_needs_nothing(open_folder: Path) -> None:
    found, problems = wanted(configured(open_folder, UNIX))
    assert problems == []
    assert found == grants.Grants(network="none")


@pytest.mark.parametrize(
    ("source", "mqtt", "network"),
    [
        (UNIX, "", "none"),
        (UNIX, '[mqtt]\nurl = "unix:///run/mosquitto/s"', "none"),
        ('type = "socket"\nlisten = "tcp://127.0.0.1:9750"', "", "loopback"),
        ('type = "mqtt"\ntopic = "x"', '[mqtt]\nurl = "mqtt://localhost"', "loopback"),
        ('type = "mqtt"\ntopic = "x"', '[mqtt]\nurl = "mqtt://[::1]:1883"', "loopback"),
        ('type = "mqtt"\ntopic = "x"', '[mqtt]\nurl = "mqtt://broker.local"', "any"),
        (
            'type = "mqtt"\ntopic = "x"\nbroker = "b"',
            '[mqtt]\nurl = "mqtt://localhost"\n[mqtt.b]\nurl = "mqtt://b"',
            "any",
        ),
    ],
)
def test_the_network_reaches_as_far_as_the_configuration(
    open_folder: Path, source: str, mqtt: str, network: str
) -> None:
    assert wanted(configured(open_folder, source, mqtt=mqtt))[0].network == network


def test_the_group_of_a_socket_is_joined(open_folder: Path) -> None:
    assert wanted(configured(open_folder, f'{UNIX}\ngroup = "daemon"'))[0].groups == ("daemon",)


@pytest.mark.parametrize(
    ("state_dir", "state"), [("/var/lib/edge-serve", ()), ("/var/lib/press", ("press",)), ("/var/lib/a/b", ("a/b",))]
)
def test_a_state_folder_in_var_lib_is_made_by_systemd(
    open_folder: Path, state_dir: str, state: tuple[str, ...]
) -> None:
    found, problems = wanted(configured(open_folder, UNIX, top=f'state_dir = "{state_dir}"'))
    assert (found.state, problems) == (state, [])


def test_a_state_folder_elsewhere_has_to_be_writable(open_folder: Path) -> None:
    folder = open_folder / "state"
    folder.mkdir(mode=0o755)
    _, problems = wanted(configured(open_folder, UNIX, top='state_dir = "state"'))
    assert len(problems) == 1
    assert problems[0].startswith(
        f"state_dir: the service could not write to {folder}: {folder}: the service's user may not"
    )
    assert problems[0].endswith("write to it (drwxr-xr-x). Use /var/lib/edge-serve, which systemd makes for it")
    folder.chmod(0o777)
    assert wanted(configured(open_folder, UNIX, top='state_dir = "state"'))[0].writable == (folder,)


def test_a_socket_elsewhere_gets_the_place_where_it_can_be(open_folder: Path) -> None:
    _, problems = wanted(configured(open_folder, UNIX.replace("/run/edge-serve", "/run")))
    assert len(problems) == 1
    assert "the service could not write to /run" in problems[0]
    assert problems[0].endswith("Use /run/edge-serve, which systemd makes for it")


def test_a_file_that_only_its_owner_reads_is_named_with_the_folder_at_fault(open_folder: Path) -> None:
    config = configured(open_folder, UNIX)
    open_folder.chmod(0o700)
    _, problems = wanted(config)
    assert any(
        each.startswith(
            f"pipeline.model: the service could not read {open_folder}/model.tflite: {open_folder}: the service's"
        )
        and "may not enter it (drwx------)" in each
        for each in problems
    )


def test_a_home_folder_is_named_and_where_to_move_what_is_in_it(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(open_folder, UNIX)
    monkeypatch.setattr(access, "HIDDEN", {open_folder: "a service sees no home folders"})
    _, problems = wanted(config)
    assert all("a service sees no home folders" in each for each in problems)
    assert all("Move it to /etc/edge-serve or /srv" in each for each in problems)
    assert len(problems) == 2  # the configuration itself, and its model


def test_a_link_into_a_home_folder_is_followed(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(open_folder, UNIX)
    home = open_folder / "home"
    home.mkdir()
    (open_folder / "model.tflite").rename(home / "model.tflite")
    (open_folder / "model.tflite").symlink_to(home / "model.tflite")
    monkeypatch.setattr(access, "HIDDEN", {home: "a service sees no home folders"})
    _, problems = wanted(config)
    assert len(problems) == 1
    assert f"{home}/model.tflite: a service sees no home folders" in problems[0]


def test_a_secret_that_cannot_be_read_becomes_a_credential(open_folder: Path) -> None:
    secret = open_folder / "secret"
    secret.write_text("hush", encoding="utf-8")
    secret.chmod(0o600)
    mqtt = '[mqtt]\nurl = "mqtt://b"\nusername = "edge"\npassword_file = "secret"'
    _, problems = wanted(configured(open_folder, UNIX, mqtt=mqtt))
    assert len(problems) == 1
    assert problems[0].endswith(f"Leave this key out and give the file to systemd: --credential mqtt-password={secret}")


def test_standard_input_is_nothing_for_a_service(open_folder: Path) -> None:
    _, problems = wanted(configured(open_folder, 'type = "file"\npath = "-"'))
    assert len(problems) == 1
    assert problems[0].startswith("pipeline.source.path: is standard input, which a service does not have")


def test_a_folder_of_pictures_ends_and_a_pipe_does_not(open_folder: Path) -> None:
    pictures = open_folder / "pictures"
    pictures.mkdir(mode=0o755)
    assert wanted(configured(open_folder, 'type = "file"\npath = "pictures"'))[0].ends
    os.mkfifo(open_folder / "pipe", 0o644)
    assert not wanted(configured(open_folder, 'type = "file"\npath = "pipe"'))[0].ends


def test_results_may_go_where_the_services_user_may_write(open_folder: Path) -> None:
    out = open_folder / "out"
    out.mkdir(mode=0o755)
    out.chmod(0o777)
    found, problems = wanted(configured(open_folder, UNIX, f'type = "file"\npath = "{out}/results.jsonl"'))
    assert (found.writable, problems) == ((out,), [])


# Who may do what.


def test_rights_are_the_owners_the_groups_or_everybodys(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(0o640)
    status = path.stat()
    assert Reader(status.st_uid or 12345, frozenset()).may(status, READ) is bool(status.st_uid)
    assert Reader(12345, frozenset({status.st_gid})).may(status, READ)
    assert not Reader(12345, frozenset({status.st_gid})).may(status, WRITE)
    assert not Reader(None, frozenset()).may(status, READ)
    assert Reader(0, frozenset()).may(status, READ | WRITE | ENTER)


def test_what_is_not_there_is_an_obstacle(open_folder: Path) -> None:
    assert access.obstacle(open_folder / "nothing", DYNAMIC) == f"{open_folder}/nothing: No such file or directory"


def test_one_closed_file_in_a_model_folder_is_found(open_folder: Path) -> None:
    folder = open_folder / "model"
    (folder / "1").mkdir(parents=True)
    (folder / "1/model.tflite").touch()
    (folder / "1/model.tflite").chmod(0o600)
    assert access.obstacle_below(folder, DYNAMIC).startswith(
        f"{folder}/1/model.tflite: the service's user may not read it"
    )
