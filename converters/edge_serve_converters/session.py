"""Children that live as long as a conversion: one holds the source model, one the device runtime; started anew if they die."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_serve_converters.channel import Report
from edge_serve_converters.child import Child
from edge_serve_converters.errors import ConversionError
from edge_serve_converters.model_file import Format
from edge_serve_converters.request import Request

DEVICE = "edge_serve_converters.device"
_WORKERS: dict[Format, str] = {
    "SavedModel": "edge_serve_converters.worker",
    "Keras": "edge_serve_converters.worker",
    # No tensorflow: the float file is run and quantized as it is.
    "TFLite": "edge_serve_converters.quantizer_worker",
}


class Session:
    """A child that keeps what it has loaded (tensorflow and a model take seconds); use it as a context manager."""

    def __init__(self, request: Request, module: str, work: Path, common: Mapping[str, Any]) -> None:
        self._request = request
        self._module = module
        self._work = work
        self._common = common
        self._child: Child | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.close()

    def call(self, what: str, do: str, report: Report, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; errors as of Child.call.

        Every command says all that it needs, so that a new child can go on where the last one died.
        """
        if self._child is None:
            self._child = Child(
                self._module,
                self._work,
                timeout_s=self._request.timeout_s,
                memory_limit_mb=self._request.memory_limit_mb,
                verbose=self._request.verbose,
            )
        try:
            return self._child.call(what, {"do": do, **self._common, **command}, report)
        except ConversionError:
            if not self._child.alive:
                self._child.close()
                self._child = None
            raise


def source_session(request: Request, form: Format, work: Path) -> Session:
    """Give the child that holds the source model."""
    common = {"model": str(request.model.resolve()), "format": form, "work": str(work)}
    return Session(request, _WORKERS[form], work, common)


def device_session(request: Request, work: Path) -> Session:
    """Give the child that runs converted files."""
    return Session(request, DEVICE, work, {})
