"""The program of a service: which distributions belong to it, how they are copied, and how builds follow each other."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edge_serve import __version__
from edge_serve_devices import access, distributions, program
from edge_serve_devices.distributions import ProgramError
from edge_serve_devices.program import Interpreter

BASE = Path(getattr(sys, "_base_executable", None) or sys.executable)


class Site:
    """A folder of installed distributions, found before all others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.add("edge-serve", __version__, requires=("leaf",), files=())

    def add(
        self,
        name: str,
        version: str,
        *,
        requires: tuple[str, ...] = (),
        files: tuple[str, ...] | None = None,
        entry: str = "",
        editable: bool = False,
    ) -> None:
        """Install a distribution of one module."""
        package = name.replace("-", "_")
        info = self.folder / f"{package}-{version}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        needs = "".join(f"Requires-Dist: {each}\n" for each in requires)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}", encoding="utf-8"
        )
        listed = [f"{package}.py", "../../../bin/x"] if files is None else list(files)
        for file in listed:
            if not file.startswith(".."):
                (self.folder / file).write_text(f"NAME = {name!r}\n", encoding="utf-8")
        (info / "RECORD").write_text(
            "".join(f"{each},,\n" for each in [*listed, f"{info.name}/METADATA"]), encoding="utf-8"
        )
        if entry:
            (info / "entry_points.txt").write_text(entry, encoding="utf-8")
        if editable:
            (info / "direct_url.json").write_text(
                '{"dir_info": {"editable": true}, "url": "file:///x"}', encoding="utf-8"
            )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site(tmp_path / "site")
    site.add("leaf", "1.0")
    # A second runtime that this environment has is none of the tests'.
    monkeypatch.setattr(distributions, "RUNTIMES", ("other-runtime",))
    monkeypatch.syspath_prepend(str(site.folder))
    return site


def names() -> list[str]:
    return [piece.name for piece in distributions.pieces(shared=False)]


# What belongs to the program.


def test_the_program_is_edge_serve_and_what_it_needs_and_nothing_else(site: Site) -> None:
    site.add("bystander", "1")
    site.add("leaf", "1.0", requires=("deeper>=1", "edge-serve"))
    site.add("deeper", "2", requires=("leaf",))
    assert names() == ["deeper", "edge-serve", "leaf"]


def test_what_a_marker_left_out_is_not_missed(site: Site) -> None:
    site.add("leaf", "1.0", requires=('absent>=1; python_version < "3"',))
    assert names() == ["edge-serve", "leaf"]


def test_what_is_missing_is_named(site: Site) -> None:
    site.add("leaf", "1.0", requires=("absent>=1",))
    with pytest.raises(ProgramError, match="leaf needs absent, which is not installed"):
        distributions.pieces(shared=False)


def test_extras_are_followed_where_they_are_asked_for(site: Site) -> None:
    site.add("edge-serve", __version__, requires=("Leaf[Fast_Path]",), files=())
    site.add("leaf", "1.0", requires=('speed; extra == "fast-path"', 'docs; extra == "docs"'))
    site.add("speed", "1")
    site.add("docs", "1")
    assert names() == ["edge-serve", "leaf", "speed"]


def test_plug_ins_belong_to_it(site: Site) -> None:
    site.add("my-source", "3", requires=("driver",), entry="[edge_serve.sources]\nplc = my_source:Source\n")
    site.add("driver", "1")
    assert names() == ["driver", "edge-serve", "leaf", "my-source"]


def test_an_editable_plug_in_is_refused_by_name(site: Site) -> None:
    site.add("my-source", "3", entry="[edge_serve.sources]\nplc = my_source:Source\n", editable=True)
    with pytest.raises(ProgramError, match=r"my-source 3 has no list of its files \(an editable installation"):
        distributions.pieces(shared=False)


def test_what_the_systems_package_manager_installed_stays_where_it_is(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.add("leaf", "1.0", requires=("numpy-of-debian",))
    system = Site(tmp_path / "usr/dist-packages")
    system.add("numpy-of-debian", "1.24")
    (system.folder / "numpy_of_debian-1.24.dist-info/RECORD").unlink()
    sys.path.append(str(system.folder))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "usr"))
    assert [piece.name for piece in distributions.pieces(shared=True)] == ["edge-serve", "leaf"]
    with pytest.raises(ProgramError, match=r"numpy-of-debian 1\.24 has no list of its files"):
        distributions.pieces(shared=False)


def test_files_outside_of_site_packages_stay_where_they_are(site: Site) -> None:
    leaf = next(piece for piece in distributions.pieces(shared=False) if piece.name == "leaf")
    assert {str(to) for _, to in leaf.files} == {"leaf.py", "leaf-1.0.dist-info/METADATA"}


def test_our_own_packages_are_taken_from_where_they_run_without_byte_code(site: Site) -> None:
    ours = next(piece for piece in distributions.pieces(shared=False) if piece.name == "edge-serve")
    to = {str(path) for _, path in ours.files}
    assert {
        "edge_serve/__main__.py",
        "edge_serve_devices/program.py",
        "edge_serve/demo/models/digits/1/model.tflite",
    } <= to
    assert not [path for path in to if "__pycache__" in path]


# A build.


def test_a_build_runs_without_what_it_was_made_from(site: Site, tmp_path: Path) -> None:
    site.add("edge-serve", __version__, requires=("leaf", "click"), files=())
    (site.folder / "leaf.py").chmod(0o600)
    folder = tmp_path / "opt/edge-serve.1"
    before = os.umask(0o077)
    try:
        program.build(folder, Interpreter(BASE, shared=False), Path("/opt/edge-serve"))
    finally:
        os.umask(before)
    program.verify(folder, as_nobody=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    assert stat.S_IMODE((packages / "leaf.py").stat().st_mode) == 0o644
    assert not [path for path in folder.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o022]
    assert list(packages.glob("edge_serve/__pycache__/app.*.pyc"))
    command = folder / "bin/edge-serve"
    assert command.read_text(encoding="utf-8").startswith("#!/opt/edge-serve.1/bin/python3\n")
    assert stat.S_IMODE(command.stat().st_mode) == 0o755
    code = "import importlib.metadata as m; d = m.distribution('edge-serve'); print(d.version, len(d.files) > 100)"
    said = subprocess.run([folder / "bin/python3", "-I", "-c", code], capture_output=True, text=True)
    assert said.stdout == f"{__version__} True\n", said.stderr


def test_a_build_that_fails_leaves_nothing(site: Site, tmp_path: Path) -> None:
    (site.folder / "leaf.py").unlink()
    with pytest.raises(ProgramError, match=r"leaf 1\.0: .*leaf\.py is missing; install it anew with pip"):
        program.build(tmp_path / "edge-serve.1", Interpreter(BASE, shared=False), tmp_path / "edge-serve")
    assert not (tmp_path / "edge-serve.1").exists()


def test_a_program_that_does_not_start_is_found(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python3"
    python.write_text("#!/bin/sh\necho broken\nexit 1\n", encoding="utf-8")
    python.chmod(0o755)
    with pytest.raises(ProgramError, match="--version fails for a user without rights: broken"):
        program.verify(tmp_path, as_nobody=False)


def test_an_interpreter_that_the_service_may_not_enter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "HIDDEN", {Path("/"): "a service sees no home folders"})
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    with pytest.raises(
        ProgramError, match=rf"no Python {version} that the service could run: /.*a service sees no home"
    ):
        program.interpreter(access.reader(None, []))


# Builds, one after the other.


@pytest.fixture
def link(tmp_path: Path) -> Path:
    for number in (1, 2, 10):
        (tmp_path / f"edge-serve.{number}").mkdir()
    (tmp_path / "edge-serve.old").mkdir()
    return tmp_path / "edge-serve"


def test_builds_are_numbered(link: Path) -> None:
    assert [path.name for path in program.builds(link)] == ["edge-serve.1", "edge-serve.2", "edge-serve.10"]
    assert program.next_folder(link).name == "edge-serve.11"
    assert program.next_folder(link.with_name("other")).name == "other.1"


def test_the_link_moves_in_one_step_and_the_build_before_is_kept(link: Path) -> None:
    assert program.current(link) is None
    program.switch(link, link.with_name("edge-serve.2"))
    program.switch(link, link.with_name("edge-serve.10"))
    assert program.current(link) == link.with_name("edge-serve.10")
    assert [path.name for path in program.prune(link)] == ["edge-serve.1"]
    assert [path.name for path in program.builds(link)] == ["edge-serve.2", "edge-serve.10"]


def test_a_build_that_runs_is_kept(link: Path) -> None:
    python = link.with_name("edge-serve.1") / "bin/python3"
    python.parent.mkdir()
    python.symlink_to("/bin/sleep")
    program.switch(link, link.with_name("edge-serve.10"))
    with subprocess.Popen([python, "60"]) as process:
        assert program.prune(link) == []
        process.kill()
    assert [path.name for path in program.prune(link)] == ["edge-serve.1"]


def test_going_back_keeps_the_newer_build(link: Path) -> None:
    program.switch(link, link.with_name("edge-serve.2"))
    program.prune(link)
    assert [path.name for path in program.builds(link)] == ["edge-serve.2", "edge-serve.10"]


def test_removing_takes_all_builds_and_nothing_else(link: Path) -> None:
    program.switch(link, link.with_name("edge-serve.2"))
    program.remove(link)
    assert [path.name for path in link.parent.iterdir()] == ["edge-serve.old"]


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_somebody_else_has_put_there_is_left_alone(tmp_path: Path, kind: str) -> None:
    link = tmp_path / "edge-serve"
    if kind == "folder":
        link.mkdir()
    else:
        link.symlink_to("/srv/mine")
    with pytest.raises(ProgramError, match=r"edge-serve: (is in the way|points to /srv/mine)"):
        program.current(link)
