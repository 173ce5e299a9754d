"""What was asked for: the options of one conversion, without tensorflow and without anything read from disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edge_serve.spec import InputSpec, OutputSpec

Mode = Literal["none", "float16", "dynamic", "int8", "int16x8", "selective"]
Io = Literal["float", "int8", "uint8"]
Target = Literal["xnnpack", "edgetpu", "gpu"]
Compat = Literal["tflite-runtime"]

MODES: tuple[Mode, ...] = ("none", "float16", "dynamic", "int8", "int16x8", "selective")
# These take the ranges of all tensors from samples.
CALIBRATED: frozenset[Mode] = frozenset({"int8", "int16x8", "selective"})
IO: tuple[Io, ...] = ("float", "int8", "uint8")
TARGETS: tuple[Target, ...] = ("xnnpack", "edgetpu", "gpu")
COMPAT: tuple[Compat, ...] = ("tflite-runtime",)
# The variant's name says what the file is: "none" would read as if nothing were in it.
VARIANT_NAMES: dict[Mode, str] = {"none": "float32"}

DEFAULT_SAMPLES = 200
DEFAULT_TIMEOUT_S = 1800.0
# Of all samples drawn, this part never calibrates: quality is measured on it.
HELD_BACK = 0.2


@dataclass(frozen=True, slots=True)
class Request:
    """One run of `edge-serve convert`."""

    model: Path
    output: Path
    modes: tuple[Mode, ...] = ()
    targets: tuple[Target, ...] = ()
    compat: Compat | None = None
    calibration: Path | None = None
    labels_for: str | None = None
    """Where the truth of each calibration sample stands: a file, or one of the words `folders` and `data`."""
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
    keep_float: tuple[str, ...] = ()
    """Patterns of operators and layers that stay float in int8 variants."""
    auto: bool = False
    """Keep the fewest layers float with which an int8 variant passes the gates."""
    metric: Literal["accuracy", "auc", "mean_iou"] | None = None
    """What is measured with labels; None: what fits them."""
    max_drop: float | None = None
    min_agreement: float | None = None
    min_cosine: float | None = None
    min_sqnr_db: float | None = None
    input: InputSpec = InputSpec()
    output_spec: OutputSpec = OutputSpec()
    tensorboard: Path | None = None
    report: Path | None = None
    """Where the report goes as HTML besides the bundle: also when nothing is written."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    memory_limit_mb: int | None = None
    verbose: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """One variant that shall be made."""

    name: str
    mode: Mode
    io: Io = "float"
    keep_float: tuple[str, ...] = ()
    auto: bool = False
    per_channel_dense: bool = True
    """Whether dense layers may have one scale for each output: Edge TPUs refuse such files."""
    target: Target | None = None

    @property
    def calibrated(self) -> bool:
        """Tell whether it takes calibration data to make it."""
        return self.mode in CALIBRATED
