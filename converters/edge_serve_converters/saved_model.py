"""SavedModels (and Keras files) inside the child process: loading, describing, running in float, tracing with fixed shapes."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve.errors import UsageError
from edge_serve_converters import store
from edge_serve_converters.channel import Report, first_line

# What Keras 2 writes into its files though it says nothing, and Keras 3 refuses to read: layer → argument and the only
# value that means nothing.
_KERAS_2_ARGUMENTS: dict[str, dict[str, Any]] = {
    "GRU": {"time_major": False},
    "LSTM": {"time_major": False},
    "RNN": {"time_major": False},
    "SimpleRNN": {"time_major": False},
    "DepthwiseConv2D": {"groups": 1},
}


def _without_keras_2_arguments(file: Path, target: Path) -> Path:
    """Give an HDF5 file whose layers Keras 3 knows: the file itself, or a copy without such arguments at `target`."""
    import h5py  # comes with keras; only old files need it

    with h5py.File(file) as opened:
        text = opened.attrs.get("model_config")
    if text is None:
        return file  # weights alone; Keras says so
    config = json.loads(text)
    if not drop_keras_2_arguments(config):
        return file
    shutil.copyfile(file, target)
    with h5py.File(target, "r+") as opened:
        opened.attrs["model_config"] = json.dumps(config)
    return target


def drop_keras_2_arguments(config: Any) -> bool:
    """Drop them in place, from layers inside layers too; say whether there were any."""
    found = False
    if isinstance(config, dict):
        layer, arguments = config.get("class_name"), config.get("config")
        if isinstance(layer, str) and isinstance(arguments, dict):
            for name, value in _KERAS_2_ARGUMENTS.get(layer, {}).items():
                if name in arguments and arguments[name] == value:
                    del arguments[name]
                    found = True
        config = list(config.values())
    if isinstance(config, list):
        for entry in config:
            found |= drop_keras_2_arguments(entry)
    return found


def _keras_version(archive: Path) -> str:
    """Give the version of Keras that saved an archive, as far as it says."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return str(json.loads(opened.read("metadata.json")).get("keras_version", ""))
    except (OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile):
        return ""  # whoever loads it says what is wrong


def export_keras(tf: Any, file: Path, folder: Path) -> str:
    """Load a .keras or .h5 file and export it as a SavedModel into the folder; gives the folder. UsageError says why not.

    Nothing of the file is run as code: Keras' safe mode refuses pickled functions (Lambda layers).
    """
    archive = zipfile.is_zipfile(file)
    if archive and _keras_version(file).startswith("2."):
        raise UsageError(
            f"{file}: was saved by Keras 2, whose .keras archives keras {tf.keras.__version__} cannot read; in a program with "
            "tf_keras (or TensorFlow up to 2.15) load it and save it as FILE.h5, or give the folder that model.export(FOLDER) makes"
        )
    try:
        readable = file if archive else _without_keras_2_arguments(file, folder.with_name("model.h5"))
        model = tf.keras.models.load_model(str(readable), compile=False)
        model.export(str(folder), format="tf_saved_model", verbose=False)
    except Exception as error:  # damaged files, unknown layers and unsafe ones raise anything
        raise UsageError(
            f"{file}: keras {tf.keras.__version__} cannot load this model ({first_line(error)}); it must be undamaged "
            "and whole (model.save, not save_weights), without layers of your own or lambdas. Else load it in your program and give the "
            "folder that model.export(FOLDER) makes"
        ) from error
    return str(folder)


def load(tf: Any, folder: str, path: str) -> Any:
    """Load a SavedModel from a folder; UsageError says why `path`, which it was made of, cannot be used."""
    try:
        return tf.saved_model.load(folder)
    except Exception as error:  # damaged files and missing custom operators raise anything
        raise UsageError(
            f"{path}: tensorflow {tf.__version__} cannot load this SavedModel ({first_line(error)}); "
            "export it again, and check that it needs no custom operators"
        ) from error


def describe(tf: Any, loaded: Any) -> dict[str, Any]:
    """Give signature → inputs and outputs → name → shape (-1 dynamic, None unknown) and dtype."""
    signatures = {}
    for key, function in loaded.signatures.items():
        outputs = function.structured_outputs
        signatures[key] = {
            "inputs": {name: _tensor(spec) for name, spec in function.structured_input_signature[1].items()},
            "outputs": {name: _tensor(spec) for name, spec in outputs.items()} if isinstance(outputs, Mapping) else {},
        }
    return {"tensorflow": tf.__version__, "signatures": signatures}


def _tensor(spec: Any) -> dict[str, Any]:
    rank = spec.shape.rank
    shape = None if rank is None else [-1 if size is None else int(size) for size in spec.shape]
    return {"shape": shape, "dtype": spec.dtype.name}


def run(tf: Any, function: Any, inputs: store.Arrays, step: Callable[[], None]) -> store.Arrays:
    """Run a signature on every run of the inputs; UsageError if the SavedModel itself fails on them."""
    results: dict[str, list[Any]] = {}
    for number in range(store.runs(inputs)):
        given = {name: tf.constant(np.asarray(array[number])) for name, array in inputs.items()}
        try:
            for name, value in function(**given).items():
                results.setdefault(name, []).append(np.asarray(value))
        except Exception as error:  # any operator of the model may fail in its own way
            raise UsageError(
                f"the SavedModel itself fails on an input of this shape ({first_line(error)}); check --input-shape"
            ) from error
        step()
    for name, values in results.items():
        shapes = sorted({value.shape for value in values})
        if len(shapes) > 1:
            raise UsageError(
                f"output {name!r} has a shape that depends on the values of the input ({list(shapes[0])}, {list(shapes[-1])}); "
                "device models have fixed shapes: pad the output in the model to its largest size"
            )
    return {name: np.stack(values) for name, values in results.items()}


def reference(tf: Any, loaded: Any, signatures: Sequence[Mapping[str, Any]], report: Report) -> None:
    """Run the signatures on their data (pairs of folders: inputs, outputs) and write what the float model gives."""
    jobs = [
        (entry["key"], store.load(Path(source)), Path(target))
        for entry in signatures
        for source, target in entry["data"]
    ]
    total = sum(store.runs(inputs) for _, inputs, _ in jobs)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        report("reference", done, total)

    for key, inputs, target in jobs:
        store.save(target, run(tf, loaded.signatures[key], inputs, step))


def trace(
    tf: Any, loaded: Any, signatures: Sequence[Mapping[str, Any]], target: Path, *, freeze: bool, dynamic_batch: bool
) -> str:
    """Save the signatures again with fixed input shapes and the same names; gives the new SavedModel's path.

    With `freeze` the weights become constants of the graph. That survives every way of building a model, but it takes
    apart the composite functions (Keras 2 LSTM, detection post-processing) that the converter turns into one operator:
    so it is the second choice. With `dynamic_batch` only the batch stays open.
    """
    traced = {}
    for entry in signatures:
        function = loaded.signatures[entry["key"]]
        specs = {}
        for tensor in entry["inputs"]:
            shape = list(tensor["shape"])
            if dynamic_batch and tensor["batched"]:
                shape[0] = None
            specs[tensor["name"]] = tf.TensorSpec(shape, getattr(tf, tensor["dtype"]), name=tensor["name"])
        fixed = _concrete(tf, function, specs)
        traced[entry["key"]] = _freeze(tf, fixed, specs) if freeze else fixed
    _save(tf, loaded, traced, target)
    return str(target)


def _save(tf: Any, loaded: Any, traced: Mapping[str, Any], target: Path) -> None:
    """Save the traced functions with what they need; the rest of the model would triple the time of saving and loading."""
    holder = tf.Module()
    holder.needed = [variable for function in traced.values() for variable in function.variables]
    try:
        tf.saved_model.save(holder, str(target), signatures=traced)
    except AssertionError:
        # They read something that is no variable (a look-up table): it must be reachable from what is saved.
        holder.original = loaded
        tf.saved_model.save(holder, str(target), signatures=traced)


def _concrete(tf: Any, function: Any, specs: Mapping[str, Any]) -> Any:
    def call(**inputs: Any) -> Any:
        return function(**inputs)

    return tf.function(call, autograph=False).get_concrete_function(**specs)


def _freeze(tf: Any, function: Any, specs: Mapping[str, Any]) -> Any:
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    names = sorted(specs)  # both tf.nest and the frozen function order by name
    outputs = sorted(function.structured_outputs)
    frozen = convert_variables_to_constants_v2(function)

    def call(**inputs: Any) -> Any:
        return dict(zip(outputs, frozen(*[inputs[name] for name in names]), strict=True))

    return tf.function(call, autograph=False).get_concrete_function(**specs)
