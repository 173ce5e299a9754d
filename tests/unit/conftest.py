"""Fixtures of the unit tests."""

from __future__ import annotations

import importlib.util

import pytest

from edge_serve.model.interpreter import MODULES, Runtime, load_runtime


@pytest.fixture(scope="session", params=list(MODULES))
def runtime(request: pytest.FixtureRequest) -> Runtime:
    """Each TFLite runtime that is installed: what is written over one face has to work with both."""
    if importlib.util.find_spec(MODULES[request.param]) is None:
        pytest.skip(f"{request.param} is not installed")
    return load_runtime(request.param)
