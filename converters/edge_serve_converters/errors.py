"""The converter's own errors: a model could not be converted, or what came out must not be shipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_serve.errors import EXIT_USAGE, GateError


class ConversionError(GateError):
    """A variant that cannot be made or that failed its checks (exit 1). `log` is the end of the child's log, for people."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class InconvertibleError(ConversionError):
    """No file came out at all: the converter refused the model, died, hung or ran out of memory (exit 2, unless others were made)."""

    exit_code = EXIT_USAGE


class UnexplainedError(ConversionError):
    """The converter's own message is all there is to say; the end of its log goes with it."""


class NothingQuantizedError(ConversionError):
    """All of a file that was to be quantized computes in float."""


class RefusedError(ConversionError):
    """A variant that runs but is too far from the float model: what was measured, and where the error begins."""

    def __init__(
        self,
        message: str,
        *,
        quality: Mapping[str, Any],
        gates: Sequence[Mapping[str, Any]],
        layers: Sequence[Mapping[str, Any]],
        first_bad_layer: str | None,
    ) -> None:
        super().__init__(message)
        self.details: dict[str, Any] = {
            "quality": dict(quality),
            "gates": list(gates),
            "layers": list(layers),
            "first_bad_layer": first_bad_layer,
        }
