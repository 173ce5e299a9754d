"""Fixtures that several rooms of the tests share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import Mosquitto, Proxy, mosquitto_path


@pytest.fixture(scope="session")
def mosquitto() -> str:
    """The broker's executable."""
    path = mosquitto_path()
    if path is None:
        import os

        if os.environ.get("EDGE_SERVE_MOSQUITTO") == "":
            pytest.skip("EDGE_SERVE_MOSQUITTO is empty: tests that need a broker are not wanted")
        pytest.fail(
            "these tests need mosquitto: install it (apt-get install mosquitto), name it with EDGE_SERVE_MOSQUITTO, "
            "run them through scripts/test, which gets one, or set EDGE_SERVE_MOSQUITTO= (empty) to skip them",
            pytrace=False,
        )
    return path


@pytest.fixture(scope="session")
def shared_broker(mosquitto: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """One broker for all tests that leave it alone and use topics and device names of their own."""
    with Mosquitto(mosquitto, tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture
def make_broker(mosquitto: str, tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """Make (not start) brokers that a test may stop, kill and configure."""
    made: list[Mosquitto] = []

    def make(*lines: str, **options: object) -> Mosquitto:
        made.append(Mosquitto(mosquitto, tmp_path, *lines, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for broker in made:
        broker.stop()


@pytest.fixture
def broker(make_broker: Callable[..., Mosquitto]) -> Mosquitto:
    """A started broker of the test's own."""
    return make_broker().start()


@pytest.fixture
def proxy(broker: Mosquitto) -> Iterator[Proxy]:
    """A proxy in front of the test's own broker."""
    with Proxy(broker.port) as proxy:
        yield proxy


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose name is short: a Unix socket's path has at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="es-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name of the test's own, for topics and devices on the shared broker."""
    return f"t{abs(hash(request.node.nodeid)) % 10**9}"


# Tests that are long, and watch no clock: they may run beside others (scripts/test runs them two at a time), with all that need TensorFlow.
SIDE_BY_SIDE = (
    "fuzz/",
    "system/test_arm_check",
    "unit/test_bench",
    "unit/test_boards",
    "unit/test_choice",
    "unit/test_compare",
    "unit/test_convert_",
    "unit/test_doctor",
    "unit/test_trial",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that may run beside others."""
    for item in items:
        place = item.path.relative_to(Path(__file__).parent).as_posix()
        if place.startswith(SIDE_BY_SIDE) or item.get_closest_marker("convert") is not None:
            item.add_marker("parallel")
