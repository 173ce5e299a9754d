"""A model in a child process: for delegates whose native code may hang, crash or hold the interpreter's lock.

A native call that hangs cannot be ended inside a thread, and GPU inference holds the lock that all Python threads share. So the
child (isolated_child.py) runs the model, tensors lie in memory that both share, and one packet each way says that they are
there. Waiting for the answer has a time limit; when it is over the child is killed. Nothing that the child says is trusted:
packets are JSON of bounded size, and shapes are held against bounds before memory is mapped.

Packets to the child: ``R`` run on what lies there; ``S`` and JSON: the same after a change of shapes. From the child: ``I`` and JSON: what
was opened; ``O`` done; ``P`` and JSON: done, outputs have new shapes; ``E`` and JSON: an error, by its class.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_serve import errors
from edge_serve.bundle import TensorSpec
from edge_serve.errors import (
    DelegateError,
    DelegateFailedError,
    EdgeServeError,
    InferenceError,
    InputError,
    TooLargeError,
)
from edge_serve.model.delegate import Claims, DelegateSpec
from edge_serve.model.engine import MAX_BATCH

if TYPE_CHECKING:
    from edge_serve.frame import Array
    from edge_serve.model.interpreter import Runtime

PACKET_BYTES = 128 * 1024
MAX_TENSORS_BYTES = 1024 * 1024 * 1024
ALIGNMENT = 64
# How long the end of a child may take that has nothing to do any more.
CLOSE_S = 1.0
# A run that takes longer counts as hung. With what it takes to go on elsewhere that stays below a second.
RUN_LIMIT_S = 0.6
# Slow models get so many times what their first runs took.
RUN_LIMIT_FACTOR = 5.0
# What an error in the child may be here; anything else is a failure of the delegate.
KNOWN_ERRORS = (
    "ModelError",
    "DelegateError",
    "DelegateAwayError",
    "RuntimeMissingError",
    "InputError",
    "TooLargeError",
    "InferenceError",
)


class Shared:
    """Tensors in memory that two processes share, one after the other, in the order of their names."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._map: mmap.mmap | None = None
        self.views: dict[str, Array] = {}

    def lay_out(self, tensors: Mapping[str, tuple[str, Sequence[int]]], *, grow: bool) -> int:
        """Lay out tensors of these dtypes and shapes; gives the bytes. `grow`: this side makes the file large enough.

        TooLargeError if they would take more than MAX_TENSORS_BYTES.
        """
        places, size = {}, 0
        for name in sorted(tensors):
            dtype, shape = np.dtype(tensors[name][0]), tuple(tensors[name][1])
            if any(length < 0 for length in shape):
                raise InputError(f"tensor {name!r} has shape {list(shape)}")
            places[name] = (size, dtype, shape)
            size += -(-dtype.itemsize * math.prod(shape) // ALIGNMENT) * ALIGNMENT
        if size > MAX_TENSORS_BYTES:
            raise TooLargeError(f"the model's tensors take {size} bytes; {MAX_TENSORS_BYTES} at most are passed on")
        size = max(size, ALIGNMENT)
        if self._map is None or len(self._map) < size:
            if grow:
                os.ftruncate(self._fd, size)
            elif os.fstat(self._fd).st_size < size:
                raise InferenceError("the shared memory is smaller than the tensors that it should hold")
            self.views = {}
            # The old map goes with its last view.
            self._map = mmap.mmap(self._fd, size)
        self.views = {
            name: np.ndarray(shape, dtype, buffer=self._map, offset=offset)
            for name, (offset, dtype, shape) in places.items()
        }
        return size

    def close(self) -> None:
        """Let go of the memory."""
        self.views = {}
        self._map = None
        os.close(self._fd)


class IsolatedEngine:
    """One signature of one model on one delegate in a child process. Not thread-safe: the thread that runs it owns it."""

    def __init__(self, path: Path, label: str, process: subprocess.Popen[bytes], link: socket.socket) -> None:
        self.path = path
        self.delegate = label
        self.signature = ""
        self.threads = 1
        self.inputs: dict[str, TensorSpec] = {}
        self.outputs: dict[str, TensorSpec] = {}
        self.claims = Claims({}, {})
        self.detection_outputs: tuple[str, ...] | None = None
        self._process: subprocess.Popen[bytes] | None = process
        self._link = link
        self._failure = ""
        self._in: Shared | None = None
        self._out: Shared | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}

    @classmethod
    def open(
        cls,
        path: Path,
        spec: DelegateSpec,
        runtime: Runtime,
        *,
        threads: int = 1,
        signature: str | None = None,
        load_limit_s: float,
        run_limit_s: float | None = None,
    ) -> IsolatedEngine:
        """Start a child that loads and warms a .tflite file on a delegate.

        Loading may take `load_limit_s`, a run `run_limit_s` (None: by what the first runs took). Raises what opening it in
        this process would raise, and DelegateError where the child hangs or dies.
        """
        fds = [_memory("inputs"), _memory("outputs")]
        link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            numbers = (theirs.fileno(), *fds)
            # A session of its own: signals of a terminal are for the parent. What the delegate prints goes where ours goes.
            process = subprocess.Popen(
                [sys.executable, "-m", "edge_serve.model.isolated_child", *map(str, numbers)],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=numbers,
                start_new_session=True,
            )
        engine = cls(path, spec.label, process, link)
        engine._in, engine._out = Shared(fds[0]), Shared(fds[1])
        request = {
            "path": str(path),
            "delegate": [spec.name, spec.index, spec.library, [list(option) for option in spec.options]],
            "runtime": runtime.name,
            "threads": threads,
            "signature": signature,
            "load_limit_s": load_limit_s,
            "run_limit_s": run_limit_s,
        }
        try:
            engine._send(b"Q" + json.dumps(request).encode())
            engine._opened(engine._answer(load_limit_s), run_limit_s)
        except DelegateFailedError as error:
            engine.close()
            raise DelegateError(f"{path}: {error} while it loaded the model") from error
        except BaseException:
            engine.close()
            raise
        return engine

    def _opened(self, answer: bytes, run_limit_s: float | None) -> None:
        if answer[:1] != b"I":
            self._fail("gave no answer that can be understood")
        try:
            about = json.loads(answer[1:])
            self.signature, self.threads, self.delegate = about["signature"], about["threads"], about["delegate"]
            self.inputs = {each["name"]: _spec(each) for each in about["inputs"]}
            self.outputs = {each["name"]: _spec(each) for each in about["outputs"]}
            self.claims = Claims(about["operators"], about["claimed"])
            named = about["detection_outputs"]
            self.detection_outputs = tuple(named) if named is not None else None
            self.run_limit_s = run_limit_s or max(RUN_LIMIT_S, RUN_LIMIT_FACTOR * float(about["warm_s"]))
            shapes = {name: tuple(map(int, shape)) for name, shape in about["shapes"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            self._fail("gave no answer that can be understood")
        assert self._in is not None
        assert self._out is not None
        self._shapes = {name: tuple(abs(size) for size in spec.shape) for name, spec in self.inputs.items()}
        self._in.lay_out({name: (self.inputs[name].dtype, shape) for name, shape in self._shapes.items()}, grow=False)
        self._lay_out_outputs(shapes)

    def _lay_out_outputs(self, shapes: Mapping[str, Sequence[int]]) -> None:
        assert self._out is not None
        self._out.lay_out({name: (spec.dtype, shapes[name]) for name, spec in self.outputs.items()}, grow=False)

    @property
    def operators(self) -> dict[str, int]:
        """Operator name → how many of them the model has."""
        return self.claims.operators

    @property
    def pid(self) -> int | None:
        """Give the child's process id; None when it has ended."""
        return self._process.pid if self._process is not None else None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; raises what the engine in the child raises, and DelegateFailedError if that hangs or dies."""
        if self._failure:
            raise DelegateFailedError(self._failure)
        assert self._in is not None
        assert self._out is not None
        packet = b"R"
        for name, array in inputs.items():
            if array.shape != self._shapes[name]:
                packet = self._reshape(inputs)
                break
        views = self._in.views
        for name, array in inputs.items():
            views[name][...] = array
        self._send(packet)
        answer = self._answer(self.run_limit_s)
        if answer[:1] == b"P":
            try:
                self._lay_out_outputs(json.loads(answer[1:]))
            except (ValueError, KeyError, TypeError, EdgeServeError) as error:
                self._fail(f"gave outputs that cannot be ({error})")
        elif answer != b"O":
            self._fail("gave no answer that can be understood")
        return {name: view.copy() for name, view in self._out.views.items()}

    def _reshape(self, inputs: Mapping[str, Array]) -> bytes:
        """Make room for arrays of other shapes; InputError for what the model does not take."""
        assert self._in is not None
        shapes = dict(self._shapes)
        for name, array in inputs.items():
            declared = self.inputs[name].shape
            fits = len(array.shape) == len(declared) and all(
                want in (-1, have) for want, have in zip(declared, array.shape, strict=True)
            )
            if not fits:
                raise InputError(f"input {name!r} has shape {list(array.shape)}, the model takes {list(declared)}")
            if len(array.shape) > 1 and declared[0] == -1 and array.shape[0] > MAX_BATCH:
                raise TooLargeError(
                    f"input {name!r} is a batch of {array.shape[0]}; {MAX_BATCH} at most are run at a time"
                )
            shapes[name] = array.shape
        self._in.lay_out({name: (self.inputs[name].dtype, shape) for name, shape in shapes.items()}, grow=True)
        self._shapes = shapes
        return b"S" + json.dumps(shapes).encode()

    def _send(self, packet: bytes) -> None:
        try:
            self._link.send(packet)
        except OSError:
            self._fail(None)

    def _answer(self, limit_s: float) -> bytes:
        """Wait for the child's packet, without the interpreter's lock."""
        self._link.settimeout(limit_s)
        try:
            answer = self._link.recv(PACKET_BYTES)
        except TimeoutError:
            self._fail(f"did not answer within {limit_s:.3g} s")
        except OSError:
            self._fail(None)
        if not answer:
            self._fail(None)
        if answer[:1] == b"E":
            self._raise(answer)
        return answer

    def _raise(self, answer: bytes) -> None:
        try:
            kind, text = json.loads(answer[1:])
        except (ValueError, TypeError):
            self._fail("gave no answer that can be understood")
        if kind in KNOWN_ERRORS:
            raise getattr(errors, kind)(str(text))
        raise InferenceError(f"{self.path.name}: {kind}: {text}")

    def _fail(self, reason: str | None) -> Any:
        """End the child, and say what was wrong with it; None: it died by itself."""
        self._failure = f"{self.delegate} {reason or self._death()}"
        self.close()
        raise DelegateFailedError(self._failure)

    def _death(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code < 0:
            return f"crashed ({signal.Signals(-code).name})"
        return f"ended its process with {code}"

    def close(self) -> None:
        """End the child and let go of all that was shared."""
        process, self._process = self._process, None
        if process is None:
            return
        self._failure = self._failure or "is closed"
        self._link.close()
        if self._failure == "is closed":
            # It ends when its connection does; one that hangs is not waited for.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(CLOSE_S)
        process.kill()
        process.wait()
        for shared in (self._in, self._out):
            if shared is not None:
                shared.close()
        self._in = self._out = None


def _spec(document: Mapping[str, Any]) -> TensorSpec:
    shape = tuple(int(size) for size in document["shape"])
    return TensorSpec(str(document["name"]), str(document["dtype"]), shape, document["scale"], document["zero_point"])


def _memory(name: str) -> int:
    """Give a file that lies in memory only."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(f"edge-serve-{name}")
    with tempfile.TemporaryFile() as stream:
        return os.dup(stream.fileno())
