"""What came of a conversion, and how it is put on record: the report (with times) and the manifest's recipe (without)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_serve import __version__
from edge_serve.schema import compact
from edge_serve_converters import store
from edge_serve_converters.model_file import Format
from edge_serve_converters.prepare import Preparation
from edge_serve_converters.request import Request, Wanted
from edge_serve_converters.variants import Made

# Version of report.json.
REPORT_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Failure:
    """A variant that was asked for and is not in the bundle."""

    name: str
    reason: str
    log: str
    inconvertible: bool = False
    """Whether no file came out at all; else it was refused."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Of one that ran and was refused: quality, gates, layers, first_bad_layer."""


@dataclass(slots=True)
class Outcome:
    """What came of a conversion."""

    format: Format
    measured_on: str
    bundle: Path | None = None
    name: str = ""
    version: int = 0
    made: list[Made] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    statistics: dict[str, Any] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def report(outcome: Outcome) -> dict[str, Any]:
    """Give the outcome as a JSON document (report.json and --json); unlike the manifest it holds times.

    Its keys are a format (`report`: 1): plots, TensorBoard files and other people's scripts are made from it.
    """
    calibration = outcome.recipe.get("calibration")
    if calibration is not None:
        calibration = {**calibration, "inputs": outcome.statistics or {}}
    runtimes = [made.default.runtime for made in outcome.made]
    return {
        "report": REPORT_FORMAT,
        "kind": "conversion",
        "name": outcome.name,
        "version": outcome.version if outcome.made else None,
        "default": outcome.made[0].name if outcome.made else None,
        "measured_on": outcome.measured_on,
        "source": outcome.recipe.get("source"),
        "converter": {**outcome.recipe.get("converter", {}), "runtime": runtimes[0] if runtimes else None},
        "variants": [_variant(made) for made in outcome.made],
        "failed": [{"name": failure.name, "reason": failure.reason, **failure.details} for failure in outcome.failures],
        "calibration": calibration,
        "recipe": outcome.recipe,
        "warnings": outcome.warnings,
        "seconds": {name: round(value, 3) for name, value in outcome.seconds.items()},
    }


def _variant(made: Made) -> dict[str, Any]:
    return {
        "name": made.name,
        "quantization": made.quantization,
        "io": made.io,
        "bytes": made.bytes,
        "operators": made.contents.operators,
        "float_operators": made.contents.float_operators if made.wanted.mode not in ("none", "float16") else {},
        "xnnpack_operators": sum(made.default.claimed.values()),
        "min_runtime": made.min_runtime,
        "target": made.wanted.target,
        "quality": made.quality,
        "latency_ms": made.default.latency_ms,
        "compatibility": made.compatibility,
        "layers": [layer.to_json() for layer in made.layers],
        "layers_on": made.layers_on,
        "first_bad_layer": None,
        "kept_float": list(made.kept_float),
    }


def recipe(
    request: Request, wanted: Sequence[Wanted], prepared: Preparation, fingerprint: str | None
) -> dict[str, Any]:
    """Say what the bundle was made of and how, so that it can be made again; no path, no time."""
    made_of: dict[str, Any] = {
        "source": {"format": prepared.format, "sha256": _hash(request.model)},
        "converter": {"edge_serve": __version__, **prepared.made_with},
        "variants": {variant.name: _recipe_of(variant) for variant in wanted},
        "quantize": list(request.modes),
        "target": list(request.targets),
        "compat": request.compat,
        "io": request.io,
        "batch": request.batch,
        "signatures": {
            entry.plan.key: {tensor.name: list(tensor.shape) for tensor in entry.plan.inputs}
            for entry in prepared.signatures
        },
        "seed": request.seed,
        "samples": request.samples,
        "allow_float_operators": request.allow_float_operators,
        "gates": {
            name: value
            for name in ("max_drop", "min_agreement", "min_cosine", "min_sqnr_db")
            if (value := getattr(request, name)) is not None
        },
        "input": compact(request.input),
    }
    if fingerprint is not None:
        first = prepared.signatures[0]
        made_of["calibration"] = {
            "sha256": fingerprint,
            "samples": store.runs(store.load(first.calibration)) if first.calibration is not None else 0,
            "held_back": store.runs(store.load(first.measured)),
            "labels": first.truth,
        }
    return made_of


def _recipe_of(variant: Wanted) -> dict[str, Any]:
    said: dict[str, Any] = {"mode": variant.mode, "io": variant.io}
    if variant.calibrated:
        said["per_channel_dense"] = variant.per_channel_dense
    if variant.mode == "selective":
        said.update(keep_float=list(variant.keep_float), auto=variant.auto)
    return said


def _hash(path: Path) -> str:
    """Give the SHA-256 of a file, or of all files of a folder with their names."""
    digest = hashlib.sha256()
    if path.is_file():
        _feed(digest, path)
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else ():
        digest.update(f"{file.relative_to(path).as_posix()}\n".encode())
        _feed(digest, file)
    return digest.hexdigest()


def _feed(digest: Any, file: Path) -> None:
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
