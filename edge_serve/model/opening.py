"""Opens a model on any delegate: in this process, or in a child where the delegate's native code is not to be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edge_serve import plugins
from edge_serve.errors import DelegateError

if TYPE_CHECKING:
    from edge_serve.model.delegate import Delegate, DelegateSpec, Runnable
    from edge_serve.model.interpreter import Runtime

# A GPU compiles its shaders when a model is loaded for the first time: 20 to 25 s on a slow one.
LOAD_LIMIT_S = 60.0


def load_part(spec: DelegateSpec) -> Delegate:
    """Give the delegate of a specification; DelegateError names the known ones, or says what it does not take."""
    try:
        part: Delegate = plugins.load("delegates", spec.name)(spec)
    except plugins.UnknownPartError as error:
        raise DelegateError(str(error).replace("type", "delegate", 1)) from error
    return part


def open_model(
    path: Path,
    spec: DelegateSpec,
    runtime: Runtime,
    *,
    threads: int = 1,
    signature: str | None = None,
    run_limit_s: float | None = None,
) -> Runnable:
    """Open a .tflite file on a delegate and warm it.

    `run_limit_s` is what one run may take on an isolated delegate before it counts as hung; None settles it by the warm-up.
    Raises ModelError (DelegateError where the delegate is to blame) or DelegateAwayError.
    """
    part = load_part(spec)
    if not part.isolated:
        return part.open(path, runtime, threads=threads, signature=signature)
    from edge_serve.model.isolated import IsolatedEngine  # only where there is such a delegate

    return IsolatedEngine.open(
        path, spec, runtime, threads=threads, signature=signature, load_limit_s=LOAD_LIMIT_S, run_limit_s=run_limit_s
    )
