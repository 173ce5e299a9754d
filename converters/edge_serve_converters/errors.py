"""The converter's own error: a model could not be converted, or what came out must not be shipped."""

from __future__ import annotations

from edge_serve.errors import GateError


class ConversionError(GateError):
    """A variant that cannot be made or that failed its checks (exit 1). `log` is the end of the child's log, for people."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class UnexplainedError(ConversionError):
    """The converter's own message is all there is to say; the end of its log goes with it."""
