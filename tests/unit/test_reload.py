"""What a new configuration changes: which pipelines stay untouched, which are made anew and why, and what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from edge_serve.app import load
from edge_serve.config import Config
from edge_serve.errors import ConfigError, UsageError
from edge_serve.line import Line, build
from edge_serve.model.interpreter import load_runtime
from edge_serve.reload import Plan, plan, told
from tests.support import DIGITS, write_config

TEXT = """
    schema = 1
    device = "dev"
    state_dir = "state"
    grace_s = 1.0

    [mqtt]
    url = "mqtts://127.0.0.1"
    ca_file = "ca.pem"

    [mqtt.plant]
    url = "mqtt://127.0.0.1:1884"

    [[pipeline]]
    name = "a"
    model = "models"
    threads = 1
    [pipeline.output]
    labels_file = "labels.txt"
    type = "classification"
    [pipeline.source]
    type = "mqtt"
    topic = "a/in"
    [[pipeline.sink]]
    type = "mqtt"
    topic = "a/out"

    [[pipeline]]
    name = "b"
    model = "{digits}"
    threads = 1
    [pipeline.source]
    type = "mqtt"
    topic = "b/in"
    broker = "plant"
    [[pipeline.sink]]
    type = "file"
    path = "b.jsonl"
"""

QOS_0 = ('"b/in"', '"b/in"\nqos = 0\npolicy = "latest"')


def failed(error: BaseException) -> None:
    """Take note of what no part of a line that was never started may do."""
    pytest.fail(str(error))


class Site:
    """A configuration with all its files, and the pipelines that were made from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "models" / "1").mkdir(parents=True)
        shutil.copy(DIGITS, folder / "models" / "1" / "model.tflite")
        (folder / "ca.pem").write_text("certificates")
        (folder / "labels.txt").write_text("\n".join("0123456789"))
        self.path = write_config(folder, TEXT)
        self.old = load(self.path)
        runtime = load_runtime("auto")
        self.lines: list[Line] = [build(self.old, each, runtime, failed) for each in self.old.pipelines]
        self.told = told(self.old)

    def edit(self, *changes: tuple[str, str]) -> Site:
        """Replace text in the configuration."""
        text = self.path.read_text()
        for before, after in changes:
            assert text.count(before) >= 1, before
            text = text.replace(before, after, 1)
        self.path.write_text(text)
        return self

    def plan(self) -> Plan:
        """Compare what the file says now."""
        return plan(self.old, self.new, self.lines, self.told)

    @property
    def new(self) -> Config:
        """Read the file again."""
        return load(self.path)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site of the test's own."""
    return Site(tmp_path)


def test_an_unchanged_configuration_changes_nothing(site: Site) -> None:
    found = site.plan()
    assert found.empty
    assert [line.name for line in found.kept] == ["a", "b"]
    assert str(found) == "nothing has changed"


def test_where_things_stand_in_the_file_counts_for_nothing(site: Site) -> None:
    text = site.path.read_text()
    head, a, b = text.split("[[pipeline]]")
    site.path.write_text("# A comment.\n" + head + "[[pipeline]]" + b + "[[pipeline]]" + a)
    assert site.plan().empty
    assert [line.name for line in site.plan().kept] == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "pipeline", "aspects"),
    [
        ([('topic = "a/in"', 'topic = "a/new"')], "a", ["source"]),
        ([('topic = "a/out"', 'topic = "a/new"')], "a", ["sinks"]),
        ([('path = "b.jsonl"', 'path = "b.jsonl"\nrequired = false'), QOS_0], "b", ["source", "sinks"]),
        ([('name = "b"', 'name = "b"\nerror_payload_bytes = 100')], "b", ["error_payload_bytes"]),
        ([('threads = 1', 'threads = 2')], "a", ["model"]),
        ([('type = "classification"', 'type = "classification"\ntop_k = 3')], "a", ["output"]),
        ([(":1884", ":1885")], "b", ["broker plant"]),
    ],
)  # fmt: skip
def test_a_change_touches_the_pipelines_that_it_concerns(
    site: Site, changes: list[tuple[str, str]], pipeline: str, aspects: list[str]
) -> None:
    found = site.edit(*changes).plan()
    assert found.changed == {pipeline: aspects}
    assert [line.name for line in found.kept] == ["b" if pipeline == "a" else "a"]
    assert str(found) == f"{pipeline} changed ({', '.join(aspects)})"


def test_what_all_share_concerns_all(site: Site) -> None:
    text = site.path.read_text()
    site.path.write_text(text.replace("[mqtt]", "[spool]\nmax_items = 10\n[mqtt]", 1))
    assert list(site.plan().changed) == ["a", "b"]


def test_the_grace_is_taken_over_without_touching_anybody(site: Site) -> None:
    assert site.edit(("grace_s = 1.0", "grace_s = 2.0")).plan().empty


def test_pipelines_come_and_go(site: Site) -> None:
    found = site.edit(('name = "b"', 'name = "c"')).plan()
    assert (found.added, [line.name for line in found.removed]) == (["c"], ["b"])
    assert found.made == ["c"]
    assert found.document() == {"kept": ["a"], "changed": {}, "added": ["c"], "removed": ["b"], "status": False}


@pytest.mark.parametrize(
    ("file", "pipeline", "aspects", "status"),
    [
        ("ca.pem", "a", ["broker"], True),
        ("labels.txt", "a", ["output"], False),
        ("models/1/model.tflite", "a", ["model"], False),
    ],
)
def test_a_file_with_other_contents_is_a_change(
    site: Site, file: str, pipeline: str, aspects: list[str], status: bool
) -> None:
    path = site.folder / file
    draft = path.with_suffix(".new")
    draft.write_bytes(path.read_bytes())
    draft.replace(path)  # as renewed certificates come: another file under the same name
    os.utime(path, ns=(1, 1))
    found = site.plan()
    assert found.changed == {pipeline: aspects}
    assert found.told == status


def test_the_latest_version_is_a_change_and_an_older_one_is_none(site: Site) -> None:
    for version in ("0", "2"):
        (site.folder / "models" / version).mkdir()
        shutil.copy(DIGITS, site.folder / "models" / version / "model.tflite")
        assert site.plan().changed == ({"a": ["model"]} if version == "2" else {})


def test_the_same_version_by_its_number_is_no_change(site: Site) -> None:
    assert site.edit(('model = "models"', 'model = "models"\nversion = 1')).plan().empty


@pytest.mark.parametrize(
    "change", [("[mqtt]", "[status]\ninterval_s = 5\n[mqtt]"), ("[mqtt]", "[status]\nenabled = false\n[mqtt]")]
)
def test_the_status_can_change_alone(site: Site, change: tuple[str, str]) -> None:
    found = site.edit(change).plan()
    assert found.told
    assert not found.empty
    assert not found.made
    assert str(found) == "status changed"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('device = "dev"', 'device = "other"'), r"device \(dev → other\)"),
        (('state_dir = "state"', 'state_dir = "elsewhere"'), r"state_dir \(.*state → .*elsewhere\)"),
        (('device = "dev"', 'device = "dev"\nruntime = "litert"'), r"runtime \(auto → litert\)"),
    ],
)
def test_what_needs_a_restart_is_refused_with_the_reason(site: Site, change: tuple[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        site.edit(change).plan()
    assert "restart it" in str(refused.value)


def test_a_model_that_is_gone_or_broken_is_refused_by_its_key(site: Site) -> None:
    (site.folder / "models" / "2").mkdir()
    (site.folder / "models" / "2" / "model.tflite").write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"pipeline\[0\]\.model: .*model\.tflite"):
        site.plan()
