"""What running a command in the test's process gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Outcome:
    """Exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Give what it printed as JSON."""
        found: dict[str, Any] = json.loads(self.out)
        return found


Run = Callable[..., Outcome]
