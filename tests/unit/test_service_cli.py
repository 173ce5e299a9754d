"""`edge-serve service` without a systemd: what it refuses, what it would do, and what it writes for an image."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_serve import cli
from edge_serve_devices import access, program
from edge_serve_devices.systemd import manager
from tests.support import MODELS


@dataclass
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run `edge-serve service` in this process, on a machine that no systemd runs, and whose /tmp is no other for services."""
    monkeypatch.setattr(manager, "BOOTED", tmp_path / "no-systemd")
    monkeypatch.setattr(access, "HIDDEN", {Path("/home/pi"): "a service sees no home folders"})
    # The environment that runs the tests serves as it is: to copy it is another test's matter.
    monkeypatch.setattr(program, "obstacle_here", lambda who: "")
    monkeypatch.setattr(program, "here", lambda: Path("/bin/true"))

    def run(*arguments: str | Path) -> Outcome:
        with pytest.raises(SystemExit) as caught:
            cli.main(["service", *map(str, arguments)])
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Outcome(caught.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration that all may read."""
    folder = tmp_path / "etc"
    folder.mkdir()
    folder.chmod(0o755)
    for each in folder.parents:
        if each.stat().st_uid == os.getuid() and not each.stat().st_mode & 0o001:
            each.chmod(each.stat().st_mode | 0o011)
    (folder / "digits.tflite").write_bytes((MODELS / "digits.tflite").read_bytes())
    path = folder / "edge-serve.toml"
    path.write_text(
        'schema = 1\ndevice = "box"\n[mqtt]\nurl = "mqtt://127.0.0.1"\nusername = "edge"\n'
        '[pipeline]\nname = "digits"\nmodel = "digits.tflite"\n'
        '[pipeline.output]\ntype = "classification"\n'
        '[pipeline.source]\ntype = "socket"\nlisten = "unix:///run/edge-serve/digits.sock"\n'
        '[pipeline.sink]\ntype = "file"\npath = "/var/lib/edge-serve/results.jsonl"\n',
        encoding="utf-8",
    )
    for each in folder.iterdir():
        each.chmod(0o644)
    return path


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "etc/password"
    path.parent.mkdir(exist_ok=True)
    path.write_text("hush-hush\n", encoding="utf-8")
    path.chmod(0o600)
    return path


# Looking first.


def test_a_dry_run_prints_the_units_and_changes_nothing(run: Run, config: Path, tmp_path: Path) -> None:
    done = run("install", "-c", config, "--dry-run", "--prefix", tmp_path / "root")
    assert done.code == 0, done.err
    assert (
        "# would write /etc/systemd/system/edge-serve.service:\n# Written by `edge-serve service install`" in done.out
    )
    assert f"ExecStart=/bin/true run -c {config}\n" in done.out
    assert "# would write /etc/systemd/system/edge-serve@.service:\n" in done.out
    assert not (tmp_path / "root").exists()


def test_a_dry_run_says_that_a_program_would_be_made(run: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "obstacle_here", lambda who: "/home/pi/venv: a service sees no home folders")
    monkeypatch.setattr(program, "interpreter", lambda who: program.Interpreter(Path("/usr/bin/python3"), shared=False))
    done = run("install", "-c", config, "--dry-run")
    assert done.code == 0, done.err
    assert done.out.startswith("# would make /opt/edge-serve from what is installed")
    assert "ExecStart=/opt/edge-serve/bin/edge-serve run" in done.out
    done = run("install", "-c", config, "--dry-run", "--program", "here")
    assert done.code == 2
    assert "the service could not run this environment: /home/pi/venv: a service sees no home folders" in done.err


def test_a_missing_password_is_noticed_and_a_secret_is_never_shown(run: Run, config: Path, secret: Path) -> None:
    done = run("install", "-c", config, "--dry-run")
    assert "user 'edge' has no password; give one with --credential mqtt-password=FILE" in done.err
    done = run("install", "-c", config, "--dry-run", "--credential", f"mqtt-password={secret}")
    assert f"LoadCredential=mqtt-password:{secret}\n" in done.out
    assert "no password" not in done.err
    assert "hush" not in done.out + done.err


def test_a_secret_that_all_may_read_is_noticed(run: Run, config: Path, secret: Path) -> None:
    secret.chmod(0o644)
    done = run("install", "-c", config, "--dry-run", "--credential", f"mqtt-password={secret}")
    assert f"{secret} can be read by others than root; chmod 0600 {secret}" in done.err


# Refusals; nothing is written.


def test_without_root_it_says_so(run: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for command in (("install", "-c", config), ("uninstall",)):
        done = run(*command)
        assert done.code == 2
        assert "needs root: run this with sudo" in done.err


def test_without_systemd_it_says_so(run: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    done = run("install", "-c", config)
    assert done.code == 3
    assert "systemd does not run here" in done.err
    assert "--no-start" in done.err
    assert run("status").code == 3


def test_every_mistake_of_the_configuration_comes_first(run: Run, config: Path, tmp_path: Path) -> None:
    config.write_text(config.read_text(encoding="utf-8").replace("type = ", "tipe = "), encoding="utf-8")
    done = run("install", "-c", config, "--prefix", tmp_path / "root")
    assert done.code == 2
    assert "pipeline.output.tipe" in done.err
    assert not (tmp_path / "root").exists()


def test_a_model_that_does_not_load_comes_first(run: Run, config: Path, tmp_path: Path) -> None:
    (config.parent / "digits.tflite").write_bytes(b"no model at all")
    done = run("install", "-c", config, "--prefix", tmp_path / "root")
    assert done.code == 2
    assert "pipeline.model" in done.err
    assert not (tmp_path / "root").exists()


def test_a_file_that_the_service_could_not_read_is_named_with_its_key(run: Run, config: Path, tmp_path: Path) -> None:
    (config.parent / "digits.tflite").chmod(0o600)
    done = run("install", "-c", config, "--prefix", tmp_path / "root")
    assert done.code == 2
    assert f"pipeline.model: the service could not read {config.parent}/digits.tflite" in done.err
    assert "chmod -R a+rX" in done.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--allow", "camrea"), "there is no such hardware"),
        (("--name", "Edge Serve"), "is no name for a service"),
        (("--name", "edge-serve@press"), "the configuration of this instance is /etc/edge-serve/press.toml"),
        (("--user", "nobody-of-this-name"), "there is no such user"),
        (("--user", "root"), "does not run as root"),
        (("--group", "no-group-of-this-name"), "groupadd --system no-group-of-this-name"),
        (("--credential", "mqtt-password"), "write NAME=/path/of/file"),
        (("--credential", "mqtt-password=/nowhere/x"), "/nowhere/x cannot be read"),
        (("--credential", "mqtt-password=relative"), "cannot name this path"),
    ],
)
def test_wrong_wishes(run: Run, config: Path, arguments: tuple[str, str], says: str) -> None:
    done = run("install", "-c", config, "--dry-run", *arguments)
    assert done.code == 2
    assert says in done.err


def test_a_unit_of_somebody_else_is_not_replaced(run: Run, config: Path, tmp_path: Path) -> None:
    unit = tmp_path / "root/etc/systemd/system/edge-serve.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\nExecStart=/usr/bin/theirs\n", encoding="utf-8")
    done = run("install", "-c", config, "--prefix", tmp_path / "root")
    assert done.code == 2
    assert f"{unit}: is in the way, and was not written by `edge-serve service install`" in done.err
    assert run("uninstall", "--prefix", tmp_path / "root").code == 2
    assert "theirs" in unit.read_text(encoding="utf-8")


# An image.


def test_an_image_is_given_units_that_start_at_boot_and_loses_them_again(
    run: Run, config: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    units = root / "etc/systemd/system"
    for _ in range(2):  # the second time changes nothing
        assert run("install", "-c", config, "--prefix", root).code == 0
        assert sorted(path.name for path in units.iterdir()) == [
            "edge-serve.service",
            "edge-serve@.service",
            "multi-user.target.wants",
        ]
        wanted = units / "multi-user.target.wants/edge-serve.service"
        assert wanted.readlink() == Path("/etc/systemd/system/edge-serve.service")
    (root / "var/lib/private/edge-serve").mkdir(parents=True)
    (root / "var/lib/edge-serve").symlink_to("private/edge-serve")
    done = run("uninstall", "--prefix", root, "--dry-run", "--purge")
    assert f"would remove {units}/edge-serve.service" in done.err
    assert (units / "edge-serve.service").exists()
    done = run("uninstall", "--prefix", root)
    assert f"kept {root}/var/lib/edge-serve (--purge removes it)" in done.err
    assert [path.name for path in units.iterdir()] == ["multi-user.target.wants"]
    assert (root / "var/lib/private/edge-serve").exists()


def test_a_purge_takes_the_state(run: Run, config: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    run("install", "-c", config, "--prefix", root)
    (root / "var/lib/private/edge-serve").mkdir(parents=True)
    (root / "var/lib/edge-serve").symlink_to("private/edge-serve")
    assert run("uninstall", "--prefix", root, "--purge").code == 0
    assert not list((root / "var/lib").rglob("edge-serve"))


def test_the_program_stays_for_as_long_as_a_service_needs_it(run: Run, config: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "opt/edge-serve.1").mkdir(parents=True)
    (root / "opt/edge-serve").symlink_to("edge-serve.1")
    run("install", "-c", config, "--prefix", root)
    text = config.read_text(encoding="utf-8").replace("/edge-serve/", "/press/")
    config.write_text(text, encoding="utf-8")
    done = run("install", "-c", config, "--prefix", root, "--name", "press")
    assert done.code == 0, done.err
    done = run("uninstall", "--prefix", root)
    assert f"kept {root}/opt/edge-serve, which press may use" in done.err
    run("uninstall", "--prefix", root, "--name", "press")
    assert list((root / "opt").iterdir()) == []


def test_status_is_one_json_document(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "LoadState": "loaded",
        "ActiveState": "failed",
        "SubState": "failed",
        "Result": "exit-code",
        "NRestarts": "4",
    }
    monkeypatch.setattr(manager, "booted", lambda: True)
    monkeypatch.setattr(manager, "show", lambda unit, *names: {**said, "ExecMainStatus": "2", "WatchdogUSec": "30s"})
    monkeypatch.setattr(manager, "journal", lambda unit, lines: ["edge-serve: /etc/x: 1 problem"])
    done = run("status", "--json")
    assert done.code == 1
    document = json.loads(done.out)
    assert (document["state"], document["restarts"], document["exit_code"], document["service"]) == (
        "failed",
        4,
        2,
        None,
    )
    done = run("status")
    assert "ended with exit-code, exit code 2" in done.out
    assert "| edge-serve: /etc/x: 1 problem" in done.out
