"""Gives each test of the contract suite every case in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.cases import SINKS, SOURCES, Lab, SinkCase, SourceCase, parameters
from tests.support import Mosquitto


@pytest.fixture
def lab(tmp_path: Path, short_path: Path, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A folder, and brokers for who asks."""
    made: list[Mosquitto] = []

    def make_broker(*lines: str) -> Mosquitto:
        executable: str = request.getfixturevalue("mosquitto")
        made.append(Mosquitto(executable, tmp_path, *lines))
        return made[-1]

    yield Lab(tmp_path, short_path, make_broker)
    for broker in made:
        broker.stop()


@pytest.fixture(params=parameters(SOURCES))
def source_case(request: pytest.FixtureRequest, lab: Lab) -> Iterator[SourceCase]:
    """Every source."""
    make: Callable[[Lab], SourceCase] = request.param
    case = make(lab)
    yield case
    case.close()


@pytest.fixture(params=parameters(SINKS))
def sink_case(request: pytest.FixtureRequest, lab: Lab) -> Iterator[SinkCase]:
    """Every sink."""
    make: Callable[[Lab], SinkCase] = request.param
    case = make(lab)
    yield case
    case.close()
