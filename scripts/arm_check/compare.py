"""Holds the outputs of two machines (probe.py) against each other; exit code 1 if they differ by more than kernels may.

usage: python compare.py HERE.json THERE.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# Quantized kernels round differently by a step; floats by their last digits.
STEPS = 2.0
SHARE = 1e-3


def main() -> int:
    """Print a line for each model; gives 1 if one differs."""
    here, there = (json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:])
    failed = False
    for name, model in here["models"].items():
        other = there["models"][name]
        for output, rows in model["values"].items():
            values = [value for row in rows for value in row]
            others = [value for row in other["values"][output] for value in row]
            off = max(abs(one - two) for one, two in zip(values, others, strict=True))
            allowed = max(STEPS * model["steps"][output], SHARE * max(map(abs, values)))
            failed |= not off <= allowed
            sys.stdout.write(
                f"  {name}: {len(rows)} samples, output {output}: off by {off:.2g} at most ({allowed:.2g} allowed), "
                f"{other['claimed']} of {other['operators']} operators on XNNPACK\n"
            )
    sys.stdout.write(f"  {there['machine']}, Python {there['python']}, {there['runtime']}, numpy {there['numpy']}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
