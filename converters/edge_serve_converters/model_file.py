"""What kind of model a path holds: a SavedModel folder, a Keras file, or a float .tflite file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

from edge_serve.errors import UsageError
from edge_serve.model.interpreter import FILE_IDENTIFIER

Format = Literal["SavedModel", "Keras", "TFLite"]

KERAS_SUFFIXES = (".keras", ".h5", ".hdf5")
_SAVED_MODEL_FILES = ("saved_model.pb", "saved_model.pbtxt")
_ZIP = b"PK\x03\x04"
_HDF5 = b"\x89HDF\r\n\x1a\n"


def recognise(path: Path) -> Format:
    """Tell the format by what is there, not by the name; UsageError says what a path that is no model looks like."""
    if not path.exists():
        raise UsageError(f"{path}: no such model; give a SavedModel folder, a .keras or .h5 file, or a .tflite file")
    if path.is_dir():
        if any((path / name).is_file() for name in _SAVED_MODEL_FILES):
            return "SavedModel"
        raise UsageError(
            f"{path}: is no SavedModel, it holds no saved_model.pb; save one with model.export(FOLDER) or tf.saved_model.save"
        )
    try:
        with path.open("rb") as stream:
            head = stream.read(8)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the permissions") from error
    if head[4:8] == FILE_IDENTIFIER:
        return "TFLite"
    if head == _HDF5 or (head[:4] == _ZIP and path.suffix.lower() in KERAS_SUFFIXES):
        return "Keras"
    wrong = {
        ".tflite": "it does not begin as a TFLite file does; copy it again",
        **dict.fromkeys(KERAS_SUFFIXES, "it is neither a Keras archive nor HDF5; save it again with model.save(FILE)"),
        ".pb": "a SavedModel is the folder that holds saved_model.pb and variables/: give the folder",
    }
    raise UsageError(
        f"{path}: is no model: "
        + wrong.get(path.suffix.lower(), "give a SavedModel folder, a .keras or .h5 file, or a .tflite file")
    )


def check_packages(form: Format) -> None:
    """Raise UsageError unless what converts this format is installed."""
    needed = {"tensorflow": "tensorflow"} if form != "TFLite" else {"litert_quantizer": "litert-quantizer"}
    for module, package in needed.items():
        if importlib.util.find_spec(module) is None:
            raise UsageError(
                f"edge-serve convert needs {package} for a {form} model, which is not installed: pip install 'edge-serve[convert]'"
            )
    if importlib.util.find_spec("ai_edge_litert") is None:
        raise UsageError(
            "edge-serve convert checks its files with ai-edge-litert, which is not installed: pip install ai-edge-litert"
        )
