"""Time per operator: each operator of a model as a model of its own, timed alone.

The runtimes' wheels have no profiler. An operator by itself is not what it is in its graph (delegates fuse neighbours, caches are
cold or warm), so the times are a guide to where a model's time goes, and their sum is not the model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_serve.errors import ModelError, RuntimeMissingError
from edge_serve.model.interpreter import check_file

MOST_OPERATORS = 2000
# These are about other graphs of the file, or about state between operators: alone they mean nothing.
NEVER_ALONE = frozenset({"WHILE", "IF", "CALL", "CALL_ONCE", "VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE"})


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator of a model, in order."""

    number: int
    name: str
    output: str
    """The name and shape of its first output."""
    file: Path | None
    """A model of this operator alone; None where it cannot be alone."""


def split(file: Path, folder: Path) -> list[Operator]:
    """Write a .tflite file for each operator of a model's first graph into a folder.

    ModelError if the file cannot be read, RuntimeMissingError without ai-edge-litert, which knows the format.
    """
    check_file(file)
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as error:
        raise RuntimeMissingError("--profile needs ai-edge-litert, which knows the format of model files") from error
    try:
        model = schema.ModelT.InitFromPackedBuf(file.read_bytes(), 0)
        return list(_operators(schema, model, folder))
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: is damaged ({error}); copy or convert the model again") from error


def _operators(schema: Any, model: Any, folder: Path) -> Iterator[Operator]:
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    graph = model.subgraphs[0]
    for number, operator in enumerate(graph.operators[:MOST_OPERATORS]):
        code = model.operatorCodes[operator.opcodeIndex]
        builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
        name = code.customCode.decode() if code.customCode else names.get(builtin, str(builtin))
        first = graph.tensors[operator.outputs[0]]
        output = f"{first.name.decode(errors='replace')} {[int(size) for size in first.shape]}"
        alone = None
        if name not in NEVER_ALONE and not operator.intermediates:
            alone = folder / f"{number:04d}.tflite"
            alone.write_bytes(_alone(schema, model, graph, operator, code))
        yield Operator(number, name, output, alone)


def _alone(schema: Any, model: Any, graph: Any, operator: Any, code: Any) -> bytes:
    """Write one operator as a model: its constants stay constant, its other inputs become the model's."""
    import flatbuffers

    single = schema.ModelT()
    single.version, single.operatorCodes, single.buffers = model.version, [code], [schema.BufferT()]
    part = schema.SubGraphT()
    part.tensors, places = [], {}
    for index in (*operator.inputs, *operator.outputs):
        if index < 0 or int(index) in places:
            continue
        places[int(index)] = len(part.tensors)
        tensor = graph.tensors[index]
        copy = schema.TensorT()
        copy.__dict__.update(tensor.__dict__)
        data = model.buffers[tensor.buffer]
        copy.buffer = 0
        if data.data is not None and len(data.data):
            copy.buffer = len(single.buffers)
            single.buffers.append(data)
        part.tensors.append(copy)
    moved = schema.OperatorT()
    moved.__dict__.update(operator.__dict__)
    moved.opcodeIndex = 0
    moved.inputs = [places[int(index)] if index >= 0 else -1 for index in operator.inputs]
    moved.outputs = [places[int(index)] for index in operator.outputs]
    part.operators = [moved]
    part.inputs = [each for each in dict.fromkeys(moved.inputs) if each >= 0 and not part.tensors[each].buffer]
    part.outputs = list(moved.outputs)
    single.subgraphs = [part]
    builder = flatbuffers.Builder(1024)
    builder.Finish(single.Pack(builder), b"TFL3")
    return bytes(builder.Output())
