"""A .tflite file as the source of a conversion: brought into the form that the quantizer takes, without tensorflow.

Files in the wild keep their weights in float16 or sparse behind DEQUANTIZE and DENSIFY operators, name no signature, and leave
dimensions open. `normalise` computes what is constant once, names a signature, and fixes the shapes. Format: TensorFlow
Lite's schema.fbs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve.errors import UsageError
from edge_serve_converters.flatbuffer import Contents, read_contents
from edge_serve_converters.plan import DEFAULT_SIGNATURE
from edge_serve_converters.store import Array

# These only unpack weights; what they give is as constant as what they take.
_UNPACKING = frozenset({"DEQUANTIZE", "DENSIFY"})


def read(path: Path) -> bytes:
    """Read a .tflite file; UsageError if it cannot be read, or a device could not run it whatever is made of it."""
    try:
        data = path.read_bytes()
        contents = read_contents(data)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UsageError(f"{path}: cannot be used: {error}; copy it again") from error
    if contents.custom:
        raise UsageError(
            f"{path}: needs the custom operators {', '.join(contents.custom)}, which device runtimes do not have"
        )
    return data


def weights_of(contents: Contents) -> str:
    """Say how the weights are kept: float32, float16, dynamic (8-bit weights, float operators) or int8."""
    eight_bit = not contents.constants.isdisjoint({"INT8", "UINT8", "INT4", "INT2"})
    if contents.integer_operators and not contents.float_operators:
        return "int8"
    if eight_bit:
        return "dynamic" if contents.float_operators else "int8"
    return "float16" if "FLOAT16" in contents.constants else "float32"


def normalise(data: bytes, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """Give the file with float32 weights, a signature and fixed input shapes (input name → shape)."""
    from ai_edge_litert.tools import flatbuffer_utils as buffers

    model = buffers.read_model_from_bytearray(bytearray(data))
    for code in model.operatorCodes:
        # Files of before 2020 have the operator in the older 8-bit field only, where the quantizer does not look.
        code.builtinCode = max(code.builtinCode, code.deprecatedBuiltinCode)
    if not model.signatureDefs:
        _name_signature(model)
    _fix_shapes(model, shapes)
    values = _constants(bytes(buffers.convert_object_to_bytearray(model)), model)
    if values:
        _fold(model, values)
    return bytes(buffers.convert_object_to_bytearray(model))


def _name_signature(model: Any) -> None:
    """Make up `serving_default` from the tensors' names, as the runtime does for files without signatures."""
    from ai_edge_litert import schema_py_generated as schema

    graph = model.subgraphs[0]
    signature = schema.SignatureDefT()
    signature.signatureKey = DEFAULT_SIGNATURE
    signature.subgraphIndex = 0
    signature.inputs = [_tensor_map(schema, graph, index) for index in graph.inputs]
    signature.outputs = [_tensor_map(schema, graph, index) for index in graph.outputs]
    model.signatureDefs = [signature]


def _tensor_map(schema: Any, graph: Any, index: int) -> Any:
    entry = schema.TensorMapT()
    entry.name = graph.tensors[index].name.decode("utf-8", "replace").removesuffix(":0")
    entry.tensorIndex = int(index)
    return entry


def _fix_shapes(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for signature in model.signatureDefs:
        graph = model.subgraphs[signature.subgraphIndex]
        for entry in signature.inputs:
            name = entry.name.decode() if isinstance(entry.name, bytes) else entry.name
            if name in shapes:
                tensor = graph.tensors[entry.tensorIndex]
                tensor.shape = np.array(shapes[name], np.int32)
                tensor.shapeSignature = None


def _constants(data: bytes, model: Any) -> dict[int, Array]:
    """Give what unpacking operators of constants give, tensor index of the primary graph → float32 values."""
    graph = model.subgraphs[0]
    constant = {index for index, tensor in enumerate(graph.tensors) if model.buffers[tensor.buffer].data is not None}
    unpacked = []
    for operator in graph.operators:
        if _name(model, operator) in _UNPACKING and set(operator.inputs) <= constant:
            constant.update(int(index) for index in operator.outputs)
            unpacked += [int(index) for index in operator.outputs]
    if not unpacked:
        return {}
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_content=data,
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    interpreter.invoke()
    return {index: interpreter.get_tensor(index) for index in unpacked}


def _name(model: Any, operator: Any) -> str:
    from ai_edge_litert.tools import flatbuffer_utils as buffers

    return str(buffers.opcode_to_name(model, operator.opcodeIndex))


def _fold(model: Any, values: Mapping[int, Array]) -> None:
    from ai_edge_litert import schema_py_generated as schema

    graph = model.subgraphs[0]
    graph.operators = [operator for operator in graph.operators if int(operator.outputs[0]) not in values]
    used = {int(index) for operator in graph.operators for index in operator.inputs} | set(map(int, graph.outputs))
    for index, array in values.items():
        tensor = graph.tensors[index]
        if array.dtype != np.float32 or index not in used:
            continue  # halfway between two unpacking operators: nobody reads it any more
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(array.tobytes(), np.uint8)
        model.buffers.append(buffer)
        tensor.buffer = len(model.buffers) - 1
        tensor.shape = np.array(array.shape, np.int32)
    _drop_unused(model, graph, used)


def _drop_unused(model: Any, graph: Any, used: set[int]) -> None:
    """Leave the packed weights out: nobody reads them any more, and they would double the file."""
    kept = sorted(used | set(map(int, graph.inputs)) | {int(i) for op in graph.operators for i in op.outputs})
    kept = [index for index in kept if index >= 0]
    place = {old: new for new, old in enumerate(kept)}
    place[-1] = -1
    graph.tensors = [graph.tensors[index] for index in kept]
    for operator in graph.operators:
        operator.inputs = np.array([place[int(i)] for i in operator.inputs], np.int32)
        operator.outputs = np.array([place[int(i)] for i in operator.outputs], np.int32)
        if operator.intermediates is not None:
            operator.intermediates = np.array([place[int(i)] for i in operator.intermediates], np.int32)
    graph.inputs = np.array([place[int(i)] for i in graph.inputs], np.int32)
    graph.outputs = np.array([place[int(i)] for i in graph.outputs], np.int32)
    for signature in model.signatureDefs:
        for entry in (*signature.inputs, *signature.outputs):
            entry.tensorIndex = place[int(entry.tensorIndex)]
    referenced = {tensor.buffer for other in model.subgraphs for tensor in other.tensors}
    referenced |= {entry.buffer for entry in model.metadata or []}
    for number, buffer in enumerate(model.buffers):
        if number not in referenced:
            buffer.data = None
