"""What came of a conversion, and how it is put on record: the report (with times) and the manifest's recipe (without)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_serve import __version__
from edge_serve_converters import store
from edge_serve_converters.calibration import Source
from edge_serve_converters.request import Request
from edge_serve_converters.trial import Prepared
from edge_serve_converters.variants import Made


@dataclass(frozen=True, slots=True)
class Failure:
    """A variant that was asked for and is not in the bundle."""

    name: str
    reason: str
    log: str


@dataclass(slots=True)
class Outcome:
    """What came of a conversion."""

    bundle: Path | None = None
    version: int = 0
    made: list[Made] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    measured_on: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


def report(outcome: Outcome) -> dict[str, Any]:
    """Give the outcome as a JSON document (report.json and --json); unlike the manifest it holds times."""
    return {
        "version": outcome.version if outcome.made else None,
        "default": outcome.made[0].name if outcome.made else None,
        "measured_on": outcome.measured_on,
        "variants": [
            {
                "name": made.name,
                "quantization": made.mode,
                "io": made.io,
                "bytes": made.bytes,
                "operators": made.contents.operators,
                "float_operators": made.contents.float_operators if made.mode == "int8" else {},
                "xnnpack_operators": made.default.claimed,
                "min_runtime": made.contents.min_runtime,
                "quality": made.quality,
            }
            for made in outcome.made
        ],
        "failed": [{"name": failure.name, "reason": failure.reason} for failure in outcome.failures],
        "warnings": outcome.warnings,
        "seconds": {name: round(value, 3) for name, value in outcome.seconds.items()},
    }


def recipe(request: Request, prepared: Sequence[Prepared], tensorflow: str, source: Source | None) -> dict[str, Any]:
    """Say what the bundle was made of and how, so that it can be made again; no path, no time."""
    made_of: dict[str, Any] = {
        "source": {"format": "SavedModel", "sha256": _hash_folder(request.saved_model)},
        "converter": {"edge_serve": __version__, "tensorflow": tensorflow},
        "quantize": list(request.modes),
        "io": request.io,
        "batch": request.batch,
        "signatures": {
            entry.plan.key: {tensor.name: list(tensor.shape) for tensor in entry.plan.inputs} for entry in prepared
        },
        "seed": request.seed,
        "allow_float_operators": request.allow_float_operators,
    }
    if source is not None:
        first = prepared[0]
        made_of["calibration"] = {
            "sha256": source.fingerprint(),
            "samples": store.runs(store.load(first.calibration)) if first.calibration is not None else 0,
            "held_back": store.runs(store.load(first.measured)),
        }
    return made_of


def _hash_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()
