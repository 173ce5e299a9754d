"""The table of parts: built-in ones, ones of other distributions, and imports only on use."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from edge_serve import plugins
from edge_serve.errors import UsageError
from edge_serve.model.choice import choose
from edge_serve.model.delegate import DelegateSpec
from edge_serve.model.interpreter import load_runtime
from edge_serve.model.opening import open_model
from edge_serve.model.repository import find
from edge_serve.plugins import BUILTIN, Kind
from edge_serve.sources.file import FileSource
from tests.unit.material import configured, model, problems, sound


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution on the path that registers parts: a good source, one that cannot be imported, and a usurper."""
    folder = tmp_path / "site"
    info = folder / "acme_parts-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-parts\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        textwrap.dedent("""\
            [edge_serve.sources]
            acme = acme_parts:Acme
            broken = acme_missing:Nothing
            half = acme_parts:NotThere
            file = acme_parts:Usurper
            """),
        encoding="utf-8",
    )
    (folder / "acme_parts.py").write_text(
        textwrap.dedent("""\
            from dataclasses import dataclass
            from edge_serve.errors import Problem

            @dataclass(frozen=True)
            class Options:
                port: int

            class Acme:
                Options = Options
                answers = True

                @classmethod
                def check(cls, options, key, wiring):
                    return [Problem(f"{key}.port", f"{wiring.pipeline.name} must not use it")] if options.port == 13 else []

            class Usurper(Acme):
                pass
            """),
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "acme_parts", raising=False)
    return folder


def test_a_delegate_of_a_third_party_is_opened_and_tried_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "acme_delegate-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-delegate\nVersion: 1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[edge_serve.delegates]\nacme = acme_delegate:Acme\n", encoding="utf-8")
    (tmp_path / "acme_delegate.py").write_text(
        textwrap.dedent("""\
            from edge_serve.model.cpu import Xnnpack
            from edge_serve.model.delegate import DelegateSpec, Found

            class Acme(Xnnpack):
                isolated = True

                def __init__(self, spec):
                    self.speed = dict(spec.options).get("speed", "slow")

                def open(self, path, runtime, *, threads, signature):
                    engine = super().open(path, runtime, threads=threads, signature=signature)
                    engine.delegate = f"acme {self.speed}"
                    return engine

                @classmethod
                def find(cls, root):
                    return [Found(DelegateSpec("acme"))]
            """),
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    engine = open_model(model("linear"), DelegateSpec("acme", options=(("speed", "high"),)), load_runtime())
    assert engine.delegate == "acme high"
    engine.close()
    made = choose(find(model("linear")), delegate=None, runtime=load_runtime(), folder=tmp_path / "state", board="acme")
    assert any("acme" in reason for reason in made.reasons)
    assert "acme" in {each.spec.name for each in made.line}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, parts in BUILTIN.items() for name in parts])
def test_every_built_in_part_loads_and_has_what_a_part_needs(kind: Kind, name: str) -> None:
    part = plugins.load(kind, name)
    needs = (
        {"isolated", "threaded", "open", "find"} if kind == "delegates" else {"Options", "check", "connect", "close"}
    )
    assert needs <= set(dir(part))
    assert ("read" in dir(part)) == (kind == "sources")
    assert ("send" in dir(part)) == (kind == "sinks")


def test_an_unknown_part_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown type 'amqp'; known: .*file, .*mqtt, .*socket"):
        plugins.load("sources", "amqp")
    with pytest.raises(UsageError, match=r"unknown type 'socket'; known: file, mqtt, stdout"):
        plugins.load("sinks", "socket")


def test_other_distributions_parts_are_found_by_their_names(installed: Path) -> None:
    assert {"acme", "file", "mqtt"} <= set(plugins.names("sources"))
    assert "acme" not in plugins.names("sinks")
    assert plugins.load("sources", "acme").__module__ == "acme_parts"


@pytest.mark.parametrize("name", ["broken", "half"])
def test_a_part_that_cannot_be_imported_is_named_with_its_entry_point(installed: Path, name: str) -> None:
    with pytest.raises(UsageError, match=rf"type '{name}' is registered as acme_.* but cannot be imported"):
        plugins.load("sources", name)


def test_nobody_takes_over_a_built_in_name(installed: Path) -> None:
    assert plugins.load("sources", "file") is FileSource


def test_a_plug_ins_keys_are_checked_as_strictly_as_our_own(installed: Path, tmp_path: Path) -> None:
    text = sound(**{'type = "file"\npath = "-"': 'type = "acme"\nport = 5'}).split("[[pipeline.sink]]")[0]
    assert configured(text, tmp_path).pipelines[0].source.options.port == 5
    assert [str(each) for each in problems(text.replace("port = 5", "prt = 5"), tmp_path)] == [
        "pipeline.source.prt: unknown key. Did you mean 'port'?",
        "pipeline.source.port: is missing. Expected whole number",
    ]
    assert [str(each) for each in problems(text.replace("port = 5", "port = 13"), tmp_path)] == [
        "pipeline.source.port: one must not use it"
    ]


def test_a_part_that_is_not_used_is_not_imported() -> None:
    """In a process of its own: here, other tests have imported everything."""
    code = (
        "import sys; from edge_serve import plugins; plugins.load('sources', 'file'); plugins.load('sinks', 'stdout');"
        "print([name for name in sys.modules if name.split('.')[0] in ('paho', 'PIL', 'importlib_metadata', 'ssl')])"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.strip() == "[]"
