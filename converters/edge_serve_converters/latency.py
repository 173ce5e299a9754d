"""How long one inference takes, as reports say it: for comparing variants on this machine, not a promise for a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Give the median, the 90th percentile and the minimum in milliseconds, and how many runs they are of."""
    if not seconds:
        return {"runs": 0}
    milliseconds = np.asarray(seconds) * 1e3
    return {
        "p50": round(float(np.median(milliseconds)), 4),
        "p90": round(float(np.percentile(milliseconds, 90)), 4),
        "min": round(float(milliseconds.min()), 4),
        "runs": len(seconds),
    }
