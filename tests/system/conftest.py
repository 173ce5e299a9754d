"""Fixtures of the system tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edge_serve import app, runner


@pytest.fixture(autouse=True, scope="session")
def quick_ends() -> Iterator[None]:
    """Services inside the test's process look more often whether they shall stop; there are many of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "TICK_S", 0.02)
        patch.setattr(app, "POLL_S", 0.02)
        yield
