"""What was asked for: the options of one conversion, without tensorflow and without anything read from disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edge_serve.spec import InputSpec, OutputSpec

Mode = Literal["none", "float16", "dynamic", "int8"]
Io = Literal["float", "int8", "uint8"]

MODES: tuple[Mode, ...] = ("none", "float16", "dynamic", "int8")
IO: tuple[Io, ...] = ("float", "int8", "uint8")
# The variant's name says what the file is: "none" would read as if nothing were in it.
VARIANT_NAMES: dict[Mode, str] = {"none": "float32", "float16": "float16", "dynamic": "dynamic", "int8": "int8"}

DEFAULT_SAMPLES = 200
DEFAULT_TIMEOUT_S = 1800.0
# Of all samples drawn, this part never calibrates: quality is measured on it.
HELD_BACK = 0.2


@dataclass(frozen=True, slots=True)
class Request:
    """One run of `edge-serve convert`."""

    saved_model: Path
    output: Path
    modes: tuple[Mode, ...]
    calibration: Path | None = None
    io: Io = "float"
    signatures: tuple[str, ...] = ()
    """Empty: `serving_default`, or the only one."""
    input_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    batch: int = 1
    labels: Path | None = None
    samples: int = DEFAULT_SAMPLES
    seed: int = 0
    version: int | None = None
    """None: the next free number."""
    force: bool = False
    name: str | None = None
    allow_float_operators: bool = False
    input: InputSpec = InputSpec()
    output_spec: OutputSpec = OutputSpec()
    timeout_s: float = DEFAULT_TIMEOUT_S
    memory_limit_mb: int | None = None
    verbose: bool = False
