"""The wheels: each has the dependencies that its platform has wheels for, the right tag and nothing else."""

from __future__ import annotations

import email.message
import email.parser
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

import edge_serve

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "edge_serve": ROOT / "edge_serve",
    "edge_serve_converters": ROOT / "converters" / "edge_serve_converters",
    "edge_serve_devices": ROOT / "devices" / "edge_serve_devices",
}
TARGETS = ["x86_64", "aarch64", "armv7l"]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1], {options!r})"


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    """setup.py as a module: it calls setup() only when a build runs it."""
    spec = importlib.util.spec_from_file_location("edge_serve_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Wheel:
    """A wheel that was built: what its file name, its metadata and its list of files say."""

    file: Path
    metadata: email.message.Message
    tags: set[str]
    names: set[str]
    entry_points: str

    @property
    def requirements(self) -> list[str]:
        """What a plain `pip install` takes, without the extras."""
        requirements = [Requirement(text) for text in self.metadata.get_all("Requires-Dist", [])]
        return [str(each) for each in requirements if "extra ==" not in str(each.marker)]


def build(source: Path, out: Path, environ: Mapping[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """Builds as pip would, but with the setuptools of this environment: without a network."""
    code = BUILD.format(options={"--build-option": list(options)})
    return subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=source,
        env={**{key: value for key, value in os.environ.items() if key != "EDGE_SERVE_BUILD_TARGET"}, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def opened(file: Path) -> Wheel:
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        info = next(name.split("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
        parse = email.parser.Parser().parsestr
        return Wheel(
            file=file,
            metadata=parse(archive.read(f"{info}/METADATA").decode()),
            tags=set(parse(archive.read(f"{info}/WHEEL").decode()).get_all("Tag", [])),
            names=names,
            entry_points=archive.read(f"{info}/entry_points.txt").decode(),
        )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, with the folders that must stay out of it, and one that nobody told it about."""
    copy = tmp_path_factory.mktemp("packaging") / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("edge_serve", "converters", "devices", "tests", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("stray", "tests", "scripts"):
        (copy / name).mkdir(exist_ok=True)
        (copy / name / "__init__.py").touch()
    return copy


@pytest.fixture(scope="module")
def wheels(source: Path) -> dict[str, Wheel]:
    """One wheel per target, and "local", which is what `pip install .` makes."""
    built = {}
    for target in [*TARGETS, "local"]:
        out = source.parent / target
        result = build(source, out, {} if target == "local" else {"EDGE_SERVE_BUILD_TARGET": target})
        assert result.returncode == 0, result.stderr
        built[target] = opened(next(out.glob("*.whl")))
    return built


@pytest.mark.parametrize(
    ("system", "machine", "pointer_bytes", "target"),
    [
        pytest.param("linux", "x86_64", 8, "x86_64", id="PC"),
        pytest.param("linux", "aarch64", 8, "aarch64", id="64-bit Pi OS"),
        pytest.param("linux", "armv7l", 4, "armv7l", id="32-bit Pi OS"),
        pytest.param("linux", "aarch64", 4, "armv7l", id="32-bit Pi OS on a 64-bit kernel"),
        pytest.param("linux", "armv8l", 4, "armv7l", id="32-bit process that asked for a 32-bit uname"),
        pytest.param("linux", "x86_64", 4, "", id="32-bit Python on a 64-bit PC"),
        pytest.param("linux", "i686", 4, "", id="32-bit PC"),
        pytest.param("linux", "armv6l", 4, "", id="Pi Zero W"),
        pytest.param("linux", "riscv64", 8, "", id="RISC-V"),
        pytest.param("linux", "ppc64le", 8, "", id="POWER"),
        pytest.param("darwin", "arm64", 8, "aarch64", id="Mac"),
        pytest.param("darwin", "x86_64", 8, "", id="Intel Mac"),
        pytest.param("win32", "AMD64", 8, "x86_64", id="Windows"),
        pytest.param("win32", "ARM64", 8, "", id="Windows on ARM"),
        pytest.param("win32", "x86", 4, "", id="32-bit Windows"),
    ],
)
def test_the_interpreter_not_the_kernel_decides_on_the_runtime(
    setup_py: ModuleType, system: str, machine: str, pointer_bytes: int, target: str
) -> None:
    assert setup_py.runtime_target(system, machine, pointer_bytes) == target


def test_musl_gets_no_runtime_because_there_is_no_wheel_for_it(setup_py: ModuleType) -> None:
    assert setup_py.runtime_target("linux", "x86_64", 8, musl=True) == ""


@pytest.mark.parametrize(
    ("target", "python", "runtime", "numpy_2"),
    [
        ("x86_64", "3.10", "ai-edge-litert", True),
        ("x86_64", "3.14", "ai-edge-litert", True),
        ("aarch64", "3.10", "ai-edge-litert", True),
        ("armv7l", "3.11", "tflite-runtime", False),
        ("armv7l", "3.13", None, True),
        ("", "3.13", None, True),
    ],
)
def test_each_target_gets_one_runtime_and_a_numpy_that_fits_it(
    setup_py: ModuleType, target: str, python: str, runtime: str | None, numpy_2: bool
) -> None:
    requirements = [Requirement(text) for text in setup_py.dependencies(target)]
    taken = [each for each in requirements if each.marker is None or each.marker.evaluate({"python_version": python})]
    names = [each.name for each in taken]

    assert len(names) == len(set(names))
    assert {"numpy", "paho-mqtt", "pillow", "click"} <= set(names)
    assert ("tomli" in names) is (python == "3.10")
    assert [name for name in names if name in ("ai-edge-litert", "tflite-runtime")] == ([runtime] if runtime else [])
    assert ("2.1.0" in next(each.specifier for each in taken if each.name == "numpy")) is numpy_2


@pytest.mark.parametrize("target", [*TARGETS, ""])
def test_no_dependency_asks_an_environment_marker_for_the_machine(setup_py: ModuleType, target: str) -> None:
    assert not [text for text in setup_py.dependencies(target) if "platform" in text or "machine" in text]


def test_a_forced_target_that_does_not_exist_is_refused(setup_py: ModuleType) -> None:
    assert setup_py.forced_target({}) is None
    assert setup_py.forced_target({"EDGE_SERVE_BUILD_TARGET": "armv7l"}) == "armv7l"
    with pytest.raises(SystemExit, match=r"EDGE_SERVE_BUILD_TARGET=sparc: no such target; choose one of x86_64, "):
        setup_py.forced_target({"EDGE_SERVE_BUILD_TARGET": "sparc"})


def test_a_plat_name_is_refused_because_it_would_leave_the_dependencies_as_they_are(source: Path) -> None:
    result = build(source, source.parent / "refused", {}, "--plat-name=linux_armv7l")

    assert result.returncode != 0
    assert "set EDGE_SERVE_BUILD_TARGET instead" in result.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_a_wheel_carries_the_dependencies_of_its_target(
    setup_py: ModuleType, wheels: dict[str, Wheel], target: str
) -> None:
    expected = [str(Requirement(text)) for text in setup_py.dependencies(target)]

    assert sorted(wheels[target].requirements) == sorted(expected)


def test_a_source_build_carries_the_dependencies_of_this_machine(
    setup_py: ModuleType, wheels: dict[str, Wheel]
) -> None:
    expected = [str(Requirement(text)) for text in setup_py.dependencies(setup_py.local_target())]

    assert sorted(wheels["local"].requirements) == sorted(expected)


@pytest.mark.parametrize(
    ("target", "tags"),
    [
        ("x86_64", {"py3-none-manylinux_2_17_x86_64"}),
        ("aarch64", {"py3-none-manylinux_2_17_aarch64"}),
        ("armv7l", {"py3-none-linux_armv7l", "py3-none-manylinux_2_17_armv7l"}),
    ],
)
def test_a_wheel_is_tagged_for_its_target(wheels: dict[str, Wheel], target: str, tags: set[str]) -> None:
    assert wheels[target].tags == tags


def test_a_source_build_is_tagged_for_this_machine_so_that_no_cache_carries_it_to_another(
    wheels: dict[str, Wheel],
) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")

    assert wheels["local"].tags == {f"py3-none-{platform}"}


@pytest.mark.parametrize(
    ("platform", "target"),
    [
        ("manylinux_2_17_x86_64", "x86_64"),
        ("manylinux_2_17_aarch64", "aarch64"),
        ("manylinux_2_17_armv7l", "armv7l"),
        ("linux_armv7l", "armv7l"),
        ("linux_riscv64", None),
    ],
)
def test_pip_chooses_the_wheel_of_the_platform(
    wheels: dict[str, Wheel], tmp_path: Path, platform: str, target: str | None
) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for each in TARGETS:
        shutil.copy(wheels[each].file, shelf)
    chosen = tmp_path / "chosen"
    command = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "download"]
    where = ["--no-index", f"--find-links={shelf}", f"--dest={chosen}"]
    what = ["--no-deps", "--only-binary=:all:", "--python-version=3.11", f"--platform={platform}", "edge-serve"]
    result = subprocess.run([*command, *where, *what], capture_output=True, text=True, timeout=60)

    if target is None:
        assert "No matching distribution found for edge-serve" in result.stderr
    else:
        assert [file.name for file in chosen.iterdir()] == [wheels[target].file.name], result.stderr


def test_a_wheel_holds_the_three_packages_whole_and_nothing_else(wheels: dict[str, Wheel]) -> None:
    wanted = {
        f"{name}/{file.relative_to(folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for pattern in ("**/*.py", "py.typed", "demo/data/**/*.npz", "demo/models/**/*", "profiles/*.toml")
        for file in folder.glob(pattern)
        if file.is_file()
    }
    info = f"edge_serve-{edge_serve.__version__}.dist-info/"

    assert {f"{name}/{file}" for name in PACKAGES for file in ("__init__.py", "py.typed")} <= wanted
    for wheel in wheels.values():
        assert {name for name in wheel.names if not name.startswith(info)} == wanted
        assert f"{info}licenses/LICENSE" in wheel.names


def test_the_metadata_says_what_people_and_tools_ask(wheels: dict[str, Wheel]) -> None:
    for wheel in wheels.values():
        assert wheel.metadata["Name"] == "edge-serve"
        assert wheel.metadata["Version"] == edge_serve.__version__
        assert wheel.metadata["License-Expression"] == "Apache-2.0"
        assert wheel.metadata["Requires-Python"] == ">=3.10"
        assert set(wheel.metadata.get_all("Provides-Extra", [])) == {"broker", "convert", "dev", "tflite-runtime"}
        assert "edge-serve = edge_serve.__main__:main" in wheel.entry_points
        assert not [
            key for key in ("Author", "Author-email", "Maintainer", "Maintainer-email") if key in wheel.metadata
        ]


@pytest.mark.parametrize(
    ("python", "system", "machine", "distribution"),
    [
        ("3.10", "linux", "x86_64", "tensorflow-cpu"),
        ("3.13", "linux", "x86_64", "tensorflow-cpu"),
        ("3.11", "linux", "aarch64", "tensorflow"),
        ("3.12", "darwin", "arm64", "tensorflow"),
        ("3.12", "win32", "AMD64", "tensorflow"),
        ("3.14", "linux", "x86_64", None),
        ("3.14", "darwin", "arm64", None),
    ],
)
def test_the_convert_extra_takes_the_lightest_tensorflow_that_has_wheels(
    wheels: dict[str, Wheel], python: str, system: str, machine: str, distribution: str | None
) -> None:
    asked = {"python_version": python, "sys_platform": system, "platform_machine": machine, "extra": "convert"}
    requirements = [Requirement(text) for text in wheels["x86_64"].metadata.get_all("Requires-Dist", [])]
    taken = [
        each.name
        for each in requirements
        if each.marker and "convert" in str(each.marker) and each.marker.evaluate(asked)
    ]

    assert taken == ([distribution, "litert-quantizer"] if distribution else [])
