"""LiteRT's WebGPU accelerator behind the face of an engine; only ever in a child process: a run holds the interpreter's lock.

The wheels of ai-edge-litert carry it (Dawn on Vulkan), and `CompiledModel` is the only way to it. On an adapter that computes on
the CPU it would be slower than the CPU itself, so such a one counts as no GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_serve.errors import DelegateAwayError, DelegateError, InferenceError, InputError, ModelError
from edge_serve.model import signatures
from edge_serve.model.delegate import Claims, claims
from edge_serve.model.engine import WARM_UP_RUNS
from edge_serve.model.interpreter import reading

if TYPE_CHECKING:
    from edge_serve.frame import Array
    from edge_serve.model.interpreter import Runtime

LABEL = "gpu"
ALLOW_SOFTWARE = "allow_software"
PRECISION = "precision"
# VkPhysicalDeviceType (Vulkan specification, 5.1).
CPU_ADAPTER = 4
# VkPhysicalDeviceProperties: five 32-bit words, of which the last is the type, then the name; 824 bytes with all that follows.
TYPE_AT, NAME_AT, NAME_BYTES, PROPERTIES_BYTES = 16, 20, 256, 4096
MOST_ADAPTERS = 16
# What the tensor buffers of LiteRT take.
DTYPES = ("float32", "int32", "int8")
# Where not all operators are on the GPU LiteRT does not say which are.
SOME = "(some)"


class Adapter:
    """What Vulkan shows as one device."""

    def __init__(self, name: str, kind: int) -> None:
        self.name = name
        self.software = kind == CPU_ADAPTER


class _InstanceInfo(ctypes.Structure):
    """VkInstanceCreateInfo, of which only the type is said (1: instance create info)."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("next", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("application", ctypes.c_void_p),
        ("layer_count", ctypes.c_uint32),
        ("layers", ctypes.c_void_p),
        ("extension_count", ctypes.c_uint32),
        ("extensions", ctypes.c_void_p),
    )


def adapters() -> list[Adapter]:
    """Ask Vulkan for its devices; DelegateAwayError if there is no loader or no driver."""
    try:
        vulkan = ctypes.CDLL("libvulkan.so.1")
    except OSError as error:
        raise DelegateAwayError(
            f"gpu: there is no Vulkan ({error}); install libvulkan1 and the GPU's driver"
        ) from error
    info, instance = _InstanceInfo(1), ctypes.c_void_p()
    if vulkan.vkCreateInstance(ctypes.byref(info), None, ctypes.byref(instance)):
        raise DelegateAwayError("gpu: Vulkan does not start; install the GPU's Vulkan driver")
    try:
        count = ctypes.c_uint32(MOST_ADAPTERS)
        devices = (ctypes.c_void_p * MOST_ADAPTERS)()
        vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), devices)
        found = []
        for device in devices[: count.value]:
            properties = ctypes.create_string_buffer(PROPERTIES_BYTES)
            vulkan.vkGetPhysicalDeviceProperties(ctypes.c_void_p(device), properties)
            name = properties.raw[NAME_AT : NAME_AT + NAME_BYTES].split(b"\0")[0].decode("utf-8", "replace")
            found.append(Adapter(name, int.from_bytes(properties.raw[TYPE_AT : TYPE_AT + 4], "little")))
    finally:
        vulkan.vkDestroyInstance(instance, None)
    return found


def open_model(path: Path, runtime: Runtime, options: Mapping[str, str], *, signature: str | None) -> WebGpuEngine:
    """Load a .tflite file on the GPU and warm it.

    Options: `allow_software` = true takes an adapter that computes on the CPU, too (for tests); `precision` = float32 keeps
    floats whole. DelegateError, DelegateAwayError or ModelError.
    """
    unknown = sorted(set(options) - {ALLOW_SOFTWARE, PRECISION})
    if unknown:
        raise DelegateError(f"gpu: unknown options {', '.join(unknown)}; known: {ALLOW_SOFTWARE}, {PRECISION}")
    if options.get(PRECISION, "float16") not in ("float16", "float32"):
        raise DelegateError(f"gpu: {PRECISION} is float16 or float32")
    if runtime.name != "litert":
        raise DelegateError(
            f"gpu: {runtime.name} has no GPU accelerator; install ai-edge-litert, or give a vendor's library"
        )
    there = adapters()
    if not there:
        raise DelegateAwayError(
            "gpu: Vulkan shows no adapter; install the GPU's driver, and let this user open /dev/dri"
        )
    if all(each.software for each in there) and options.get(ALLOW_SOFTWARE) != "true":
        names = ", ".join(each.name for each in there)
        raise DelegateError(f"gpu: the only adapters compute on the CPU ({names}); install the GPU's Vulkan driver")
    return WebGpuEngine(path, runtime, signature, whole_floats=options.get(PRECISION) == "float32")


class WebGpuEngine:
    """One signature of one model on the GPU, with the face of `Runnable`."""

    def __init__(self, path: Path, runtime: Runtime, signature: str | None, *, whole_floats: bool) -> None:
        """Load and warm it; DelegateError if the GPU does not take this model."""
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.hardware_accelerator import HardwareAccelerator
        from ai_edge_litert.options import Options

        self.path = path
        self.delegate = LABEL
        self.threads = 1
        self.detection_outputs = None
        interpreter = runtime.open(path, threads=1, xnnpack=False)
        with reading(path):
            binding = signatures.bind(interpreter, signatures.choose(interpreter, signature, str(path)), str(path))
            operators = claims(interpreter).operators
        self.signature = binding.key
        self.inputs = {name: spec for name, (_, spec) in binding.inputs.items()}
        self.outputs = {name: spec for name, (_, spec) in binding.outputs.items()}
        for spec in (*self.inputs.values(), *self.outputs.values()):
            if spec.dtype not in DTYPES or -1 in spec.shape:
                raise DelegateError(
                    f"gpu: tensor {spec.name!r} is {spec.dtype} {list(spec.shape)}; the GPU takes fixed shapes of "
                    f"{', '.join(DTYPES)}; use the float16 variant"
                )
        try:
            wanted = Options(hardware_accelerators=HardwareAccelerator.GPU)
            wanted.gpu_options.enforce_f32 = whole_floats
            self._model: Any = CompiledModel.from_file(str(path), options=wanted)
            known = self._model.get_signature_list()
            # A model without signatures has one, under a name that LiteRT makes up.
            key = self.signature if self.signature in known else next(iter(known))
            names = known[key]
            self._in = dict(zip(self.inputs, self._in_order(names["inputs"], self.inputs), strict=True))
            self._out = dict(zip(self.outputs, self._in_order(names["outputs"], self.outputs), strict=True))
            self._buffers_in = {name: self._model.create_input_buffer_by_name(key, name) for name in self._in.values()}
            self._buffers_out = {
                name: self._model.create_output_buffer_by_name(key, name) for name in self._out.values()
            }
        except (RuntimeError, ValueError) as error:
            raise DelegateError(f"gpu: does not take this model: {_first_line(error)}") from error
        self._key = key
        self.claims = Claims(operators, operators if self._model.is_fully_accelerated() else {SOME: 1})
        zeros = {name: np.zeros(spec.shape, spec.dtype) for name, spec in self.inputs.items()}
        try:
            for _ in range(WARM_UP_RUNS):
                self.run(zeros)
        except InferenceError as error:
            raise ModelError(f"{path}: fails on its first run: {error}") from error

    @staticmethod
    def _in_order(names: list[str], ours: Mapping[str, object]) -> list[str]:
        """Give LiteRT's names for our tensors: the signature's own, or those of a model without one, in its order."""
        return list(ours) if set(ours) == set(names) else list(names)

    @property
    def operators(self) -> dict[str, int]:
        """Operator name → how many of them the model has."""
        return self.claims.operators

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; InputError for another shape than the model's, InferenceError if the GPU fails."""
        for name, array in inputs.items():
            if array.shape != self.inputs[name].shape:
                raise InputError(
                    f"input {name!r} has shape {list(array.shape)}, the model takes {list(self.inputs[name].shape)}"
                )
        try:
            for name, array in inputs.items():
                self._buffers_in[self._in[name]].write(np.ascontiguousarray(array))
            self._model.run_by_name(self._key, self._buffers_in, self._buffers_out)
            return {
                name: self._buffers_out[theirs]
                .read(int(np.prod(self.outputs[name].shape)), np.dtype(self.outputs[name].dtype).type)
                .reshape(self.outputs[name].shape)
                for name, theirs in self._out.items()
            }
        except (RuntimeError, ValueError) as error:
            raise InferenceError(f"{self.path.name}: {_first_line(error)}") from error

    def close(self) -> None:
        """Free the GPU's memory."""
        self._buffers_in = self._buffers_out = {}
        self._model = None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
