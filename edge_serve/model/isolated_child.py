"""The child of isolated.py: opens a model on a delegate and runs it for its parent, until that closes the connection.

Run as `python -m edge_serve.model.isolated_child LINK INPUTS OUTPUTS`, three inherited descriptors.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.errors import EdgeServeError
from edge_serve.model.delegate import DelegateSpec, Runnable
from edge_serve.model.interpreter import load_runtime
from edge_serve.model.isolated import PACKET_BYTES, Shared
from edge_serve.model.opening import load_part

# A parent that is gone kills nobody, and a native call that hangs hears nothing: the kernel's timer ends the process then.
ORPHAN_FACTOR = 10.0
ORPHAN_S = 60.0
MAX_TEXT = 4000


class Child:
    """One model, served."""

    def __init__(self, link: socket.socket, inputs: int, outputs: int) -> None:
        self._link = link
        self._in = Shared(inputs)
        self._out = Shared(outputs)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._limit_s = ORPHAN_S

    def serve(self) -> None:
        """Open what the first packet asks for, and run it until there is nobody to run it for."""
        packet = self._link.recv(PACKET_BYTES)
        if not packet:
            return
        request = json.loads(packet[1:])
        self._limit(max(ORPHAN_S, 2 * request["load_limit_s"]))
        try:
            engine = self._open(request)
        except EdgeServeError as error:
            self._complain(error)
            return
        self._limit_s = max(ORPHAN_S, ORPHAN_FACTOR * (request["run_limit_s"] or 0))
        while packet := self._link.recv(PACKET_BYTES):
            self._limit(self._limit_s)
            try:
                answer = self._run(engine, packet)
            except EdgeServeError as error:
                self._complain(error)
            else:
                self._link.send(answer)
            self._limit(0)

    def _open(self, request: dict[str, Any]) -> Runnable:
        name, index, library, options = request["delegate"]
        spec = DelegateSpec(name, index, library, tuple((key, value) for key, value in options))
        runtime = load_runtime(request["runtime"])
        engine = load_part(spec).open(
            Path(request["path"]), runtime, threads=request["threads"], signature=request["signature"]
        )
        shapes = {name: tuple(abs(size) for size in tensor.shape) for name, tensor in engine.inputs.items()}
        self._in.lay_out({name: (engine.inputs[name].dtype, shape) for name, shape in shapes.items()}, grow=True)
        zeros: dict[str, Any] = {name: np.zeros(view.shape, view.dtype) for name, view in self._in.views.items()}
        begun = time.perf_counter()
        outputs = engine.run(zeros)
        warm_s = time.perf_counter() - begun
        self._show(outputs)
        about = {
            "signature": engine.signature,
            "threads": engine.threads,
            "delegate": engine.delegate,
            "inputs": [_described(tensor) for tensor in engine.inputs.values()],
            "outputs": [_described(tensor) for tensor in engine.outputs.values()],
            "operators": engine.claims.operators,
            "claimed": engine.claims.claimed,
            "detection_outputs": engine.detection_outputs,
            "warm_s": warm_s,
            "shapes": self._shapes,
        }
        self._link.send(b"I" + json.dumps(about).encode())
        self._limit(0)
        return engine

    def _run(self, engine: Runnable, packet: bytes) -> bytes:
        if packet[:1] == b"S":
            shapes = json.loads(packet[1:])
            self._in.lay_out({name: (engine.inputs[name].dtype, shapes[name]) for name in shapes}, grow=False)
        outputs = engine.run(self._in.views)
        if self._show(outputs):
            return b"P" + json.dumps(self._shapes).encode()
        return b"O"

    def _show(self, outputs: dict[str, Any]) -> bool:
        """Put outputs where the parent finds them; says whether their shapes are others than before."""
        shapes = {name: array.shape for name, array in outputs.items()}
        changed = shapes != self._shapes
        if changed:
            self._out.lay_out({name: (array.dtype.name, array.shape) for name, array in outputs.items()}, grow=True)
            self._shapes = shapes
        for name, view in self._out.views.items():
            view[...] = outputs[name]
        return changed

    def _complain(self, error: EdgeServeError) -> None:
        self._link.send(b"E" + json.dumps([type(error).__name__, str(error)[:MAX_TEXT]]).encode())

    def _limit(self, seconds: float) -> None:
        """Have the kernel end this process after so long; 0: no more."""
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _described(tensor: TensorSpec) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "scale": tensor.scale,
        "zero_point": tensor.zero_point,
    }


def main() -> None:
    """Serve until the parent closes the connection."""
    # A service manager ends all processes of a service at once; the parent still needs this one for what it has in work.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    link, inputs, outputs = (int(word) for word in sys.argv[1:])
    with socket.socket(fileno=link) as connection:
        Child(connection, inputs, outputs).serve()
        sys.stderr.flush()
        os._exit(0)  # a delegate's destructor may hang, and nobody waits for it


if __name__ == "__main__":
    main()
