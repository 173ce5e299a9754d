"""An interpreter on a delegate, warmed, owned by one thread: tensors in, tensors out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_serve.bundle import TensorSpec
from edge_serve.errors import DelegateError, InferenceError, InputError, ModelError, TooLargeError
from edge_serve.model import delegate as delegates
from edge_serve.model import signatures
from edge_serve.model.interpreter import Runtime, reading

if TYPE_CHECKING:
    from edge_serve.frame import Array

DETECTION_OPERATOR = "TFLite_Detection_PostProcess"
# The interpreter's memory grows with a dynamic batch and is kept: one input shall not take all of a small board's.
MAX_BATCH = 1024
WARM_UP_RUNS = 2


class Engine:
    """One signature of one model on one delegate. Not thread-safe: the thread that runs it owns it."""

    def __init__(self, path: Path, interpreter: Any, binding: signatures.Binding, delegate: str, threads: int) -> None:
        self.path = path
        self.signature = binding.key
        self.threads = threads
        self.inputs: dict[str, TensorSpec] = {name: spec for name, (_, spec) in binding.inputs.items()}
        self.outputs: dict[str, TensorSpec] = {name: spec for name, (_, spec) in binding.outputs.items()}
        self.claims = delegates.claims(interpreter)
        # The name says what runs, not what was wished for: a delegate that claims no operator is none.
        self.delegate = delegate if self.claims.taken else "none"
        self.detection_outputs = _detection_outputs(interpreter, binding)
        self._interpreter = interpreter
        self._runner = binding.runner
        self._input_index = {name: index for name, (index, _) in binding.inputs.items()}
        self._output_index = [(name, index) for name, (index, _) in binding.outputs.items()]
        self._shapes = {name: tuple(abs(size) for size in spec.shape) for name, spec in self.inputs.items()}
        self._dtypes = {name: np.dtype(spec.dtype) for name, spec in self.inputs.items()}

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        runtime: Runtime,
        delegate: str = "auto",
        threads: int = 1,
        signature: str | None = None,
    ) -> Engine:
        """Load and warm a .tflite file on the CPU: on XNNPACK (also for "auto") or `none`.

        `threads` = 0, for which nothing was measured, is one. ModelError says why the file cannot be used.
        """
        if delegate == delegates.AUTO:
            delegate = "xnnpack"
        if delegate not in delegates.CPU:
            raise DelegateError(f"{delegate!r} is no delegate of the CPU; known: auto, {', '.join(delegates.CPU)}")
        threads = threads or 1
        interpreter = runtime.open(path, threads=threads, xnnpack=delegate == "xnnpack")
        return cls.over(path, interpreter, delegate, threads=threads, signature=signature)

    @classmethod
    def over(cls, path: Path, interpreter: Any, delegate: str, *, threads: int, signature: str | None) -> Engine:
        """Take an interpreter of a .tflite file whose tensors are allocated, with its delegate applied, and warm it."""
        with reading(path):
            key = signatures.choose(interpreter, signature, str(path))
            binding = signatures.bind(interpreter, key, str(path))
            for name, (_, spec) in (*binding.inputs.items(), *binding.outputs.items()):
                if spec.dtype == "string":
                    raise ModelError(f"{path}: tensor {name!r} holds text; text models are not supported, feed numbers")
            engine = cls(path, interpreter, binding, delegate, threads)
        engine.warm()
        return engine

    @property
    def operators(self) -> dict[str, int]:
        """Operator name → how many of them the model has."""
        return self.claims.operators

    def warm(self) -> None:
        """Run on zeros until the first-run costs (memory, packed weights) are paid; ModelError if that fails."""
        zeros: dict[str, Array] = {name: np.zeros(shape, self._dtypes[name]) for name, shape in self._shapes.items()}
        try:
            for _ in range(WARM_UP_RUNS):
                self.run(zeros)
        except InferenceError as error:
            raise ModelError(f"{self.path}: fails on its first run: {error}") from error

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Arrays have the tensors' own dtypes (quantized ones stay quantized) and contiguous memory.

        Raises InputError if an array does not fit its tensor, InferenceError if the interpreter fails.
        """
        interpreter = self._interpreter
        for name, array in inputs.items():
            if array.shape != self._shapes[name]:
                self._resize(name, array.shape)
        try:
            if self._runner is not None:
                return dict(self._runner(**inputs))
            for name, array in inputs.items():
                interpreter.set_tensor(self._input_index[name], array)
            interpreter.invoke()
            return {name: interpreter.get_tensor(index) for name, index in self._output_index}
        except (RuntimeError, ValueError) as error:
            raise InferenceError(f"{self.path.name}: {error}") from error

    def _resize(self, name: str, shape: tuple[int, ...]) -> None:
        declared = self.inputs[name].shape
        fits = len(shape) == len(declared) and all(
            want in (-1, have) for want, have in zip(declared, shape, strict=True)
        )
        if fits and len(shape) > 1 and declared[0] == -1 and shape[0] > MAX_BATCH:
            raise TooLargeError(f"input {name!r} is a batch of {shape[0]}; {MAX_BATCH} at most are run at a time")
        if not fits or self._runner is not None:
            raise InputError(f"input {name!r} has shape {list(shape)}, the model takes {list(declared)}")
        try:
            self._interpreter.resize_tensor_input(self._input_index[name], list(shape))
            self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            # A failed allocation leaves the interpreter unusable for the next frame, so it goes back to what worked.
            self._interpreter.resize_tensor_input(self._input_index[name], list(self._shapes[name]))
            self._interpreter.allocate_tensors()
            raise InputError(f"input {name!r} cannot have shape {list(shape)}: {error}") from error
        self._shapes[name] = shape

    def close(self) -> None:
        """Free the interpreter's memory."""
        self._interpreter = None
        self._runner = None


def _detection_outputs(interpreter: Any, binding: signatures.Binding) -> tuple[str, ...] | None:
    """Give the outputs of a TFLite_Detection_PostProcess in the operator's own order; None if there is no such one."""
    names = {index: name for name, (index, _) in binding.outputs.items()}
    for node in interpreter._get_ops_details():
        tensors = [int(tensor) for tensor in node["outputs"]]
        if node["op_name"] == DETECTION_OPERATOR and len(tensors) == 4 and all(tensor in names for tensor in tensors):
            return tuple(names[tensor] for tensor in tensors)
    return None


def available_cores() -> int:
    """Count the cores that this process may run on (an affinity mask is less than what the board has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
