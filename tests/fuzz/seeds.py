"""Well-formed bytes for each target, from which fuzzing starts: what is nearly right goes deeper than noise."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edge_serve import framing
from edge_serve.model import layout
from edge_serve.model.flatbuffer import ByteSource
from edge_serve.spec import InputSpec, OutputSpec
from edge_serve_converters.metadata import write_metadata
from tests.unit.material import sound

MODELS = Path(__file__).parents[1] / "data" / "models"


def _picture(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    channels = {"RGB": (6, 9, 3), "L": (6, 9), "RGBA": (6, 9, 4)}
    pixels = np.random.default_rng(1).integers(0, 256, channels.get(mode, (6, 9)), np.uint8)
    picture = Image.fromarray(pixels)
    if mode not in channels:
        picture = picture.convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _oriented() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _picture("JPEG", exif=exif.tobytes())


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _npz(compressed: bool, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def _zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(1_000_000))
    return buffer.getvalue()


PICTURES = [
    _picture("JPEG"),
    _picture("JPEG", "L", progressive=True),
    _picture("JPEG", "CMYK"),
    _oriented(),
    _picture("PNG"),
    _picture("PNG", "RGBA"),
    _picture("PNG", "P", transparency=0),
    _picture("PNG", "I;16"),
    _picture("PNG", "1"),
]
ARRAYS = [
    _npy(np.arange(4, dtype=np.float32)),
    _npy(np.arange(4, dtype=">f8").reshape(2, 2)),
    _npy(np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3))),
    _npy(np.array(7, np.uint64)),
]
ARCHIVES = [
    _npz(False, x=np.arange(4.0)),
    _npz(True, a=np.ones((1, 2), np.float32), b=np.zeros(3, np.int8)),
    _zip_bomb(),
]
DOCUMENTS = [
    b"[[1, 2.5, -3e2, 4]]",
    b'{"x": [1, 2, 3, 4], "id": "frame-7", "time": "2026-11-22T15:04:05.123456Z"}',
    b'{"inputs": {"a": [1, 2], "b": [3, 4, 5]}}',
    b'{"samples": [[1, 2], [3, 4]], "key": "m1", "time": 1795654953.5}',
    b'{"a": 1, "b": [2, 3], "key": 7}',
    b'{"a": [1, 2], "b": [3, 4], "key": "k", "id": 12}',
    b"[NaN, Infinity, -Infinity, 1e999, 123456789012345678901234567890]",
    b'"text \\ud800"',
    b"[" * 2000,
]
TABLES = [b"a,b,key,time\n1,2,m,2026-11-22T15:04:05Z\n3,4,m,5\n", b"1,2\r\n3,4\r\n", b'"1","2"\n']
RAW = [struct.pack("<4f", 1, 2, 3, 4), struct.pack("<6f", *range(6)), bytes(range(8)), b"\x7f\xc0\x00\x00" * 4]
PAYLOADS = [*DOCUMENTS, *ARRAYS, *ARCHIVES, *TABLES, *RAW, PICTURES[0], PICTURES[4]]

FRAMES = [
    framing.encode({"type": "frame", "id": "a", "meta": {"key": 1}}, b"12345"),
    framing.encode({"type": "describe"}),
    framing.encode({"type": "frame"}, bytes(80)),
    b'{"type": "frame", "length": 3}\nabc{"type": "frame", "length": 0}\n',
    b'{"type": "x", "length": -1}\n',
    b'{"type": "\\ud83d", "length": 1e3}\n',
]
REQUESTS = [
    framing.encode(
        {"type": "capture", "v": 1, "samples": 10, "max_bytes": 1000, "seconds": 1, "every": None, "seed": 0}
    ),
    framing.encode({"type": "status", "v": 1}),
]
RECORDED = [
    framing.encode({"type": "begin", "capacity": 3, "parts": [{"name": "x", "dtype": "fl,,oat32", "shape": [2]}]}),
    framing.encode({"type": "begin", "capacity": 3, "parts": [{"name": "x", "dtype": "float32", "shape": [2]}]})
    + framing.encode({"type": "sample", "slot": 0}, bytes(8))
    + framing.encode({"type": "sample", "slot": 2}, bytes(8)),
]
MANIFESTS = [
    json.dumps(
        {
            "format": 1,
            "name": "m",
            "version": 3,
            "default": "int8",
            "signatures": {"serving_default": {"inputs": {"x": {"shape": [1, 4], "dtype": "float32"}}, "outputs": {}}},
            "variants": [
                {
                    "name": "int8",
                    "file": "model.tflite",
                    "sha256": "00",
                    "bytes": 5,
                    "inputs": [{"name": "x", "dtype": "int8", "shape": [1, 4], "scale": 0.5, "zero_point": 1}],
                }
            ],
            "input": {"kind": "window", "length": 4, "channels": ["a", "b"], "mean": [0.0]},
            "output": {"type": "classification", "labels": ["idle", "running"], "top_k": 2},
            "files": {"model.tflite": "00"},
        }
    ).encode()
]
CONFIGURATIONS = [
    sound().encode(),
    b"""schema = 1
device = "press-3"
grace_s = 3
[mqtt]
url = "mqtts://broker:8883"
username = "u"
[mqtt.up]
url = "mqtt://[::1]:1883"
protocol = "3.1.1"
[models.m]
model = "models/m"
version_labels = { stable = 3 }
[[pipeline]]
name = "vibration"
model = "m"
error_payload_bytes = 64
[pipeline.source]
type = "mqtt"
topic = ["plant/+/vibration", "$share/g/x/#"]
qos = 1
[pipeline.input]
kind = "window"
channels = ["a", "b"]
mean = [0.0, 1]
[pipeline.output]
labels = ["x"]
[[pipeline.sink]]
type = "mqtt"
broker = "up"
topic = "edge-serve/{device}/{pipeline}/result"
[[pipeline.sink]]
type = "file"
path = "results.jsonl"
[[pipeline]]
name = "camera"
model = "x.tflite"
source = { type = "socket", listen = "unix:///run/x.sock" }
""",
]
PUBLISHES = [
    b"\x32" + b"\0\x04in/x" + b"\0\x07" + b"\x0d" + b"\x03\0\x01j" + b"\x26\0\x02id\0\x01a" + b"payload",
    b"\x30" + b"\0\x01t" + b"\0" + b"x",
]
TEXTS = [
    b"2026-11-22T15:04:05.123456+01:00",
    b"9999-12-31T23:59:59.999999Z",
    b"$share/group/plant/+/x/#",
    b"a/b",
]


def _with_metadata(name: str, spec: InputSpec, output: OutputSpec, labels: tuple[str, ...] | None) -> bytes:
    """Give a model that says of itself what it takes and gives."""
    data = (MODELS / f"{name}.tflite").read_bytes()
    inputs, outputs = layout.ends(layout.open_model(ByteSource(data)))
    words = {"name": "thing", "description": "finds things", "version": "3"}
    return write_metadata(data, **words, input=spec, output=output, labels=labels, inputs=inputs, outputs=outputs)


_PICTURE = InputSpec(kind="image", color="rgb", scale=1.0, mean=(127.5,), std=(127.5,))
_DIGITS = _with_metadata("linear", InputSpec(kind="tensor"), OutputSpec(type="classification"), ("a", "b", "c"))
MODEL_FILES = [
    (MODELS / "null.tflite").read_bytes(),
    _DIGITS,
    _DIGITS.replace(b"EDGE_SERVE\0", b"OTHER_TOOL\0"),
    _with_metadata("pixels", _PICTURE, OutputSpec(type="tensor"), None),
    _with_metadata("window", InputSpec(kind="window", hop=2), OutputSpec(), None),
]

SEEDS: dict[str, list[bytes]] = {
    "socket_framing": FRAMES,
    "streams": [PICTURES[0] + PICTURES[3], b"one\ntwo\r\n\nthree"],
    "mqtt_packet": PUBLISHES,
    "tensor_payload": PAYLOADS,
    "npy": ARRAYS,
    "npz": ARCHIVES,
    "image": PICTURES,
    "window": [*DOCUMENTS, *TABLES, *RAW, *ARRAYS, b"\0\0".join(DOCUMENTS), b"\0\0".join(TABLES)],
    "whole_pipeline": PAYLOADS,
    "configuration": CONFIGURATIONS,
    "manifest": MANIFESTS,
    "labels": [b"idle\nrunning\n", b"\xef\xbb\xbfa\r\nb\x0bc"],
    "model_metadata": MODEL_FILES,
    "control_request": REQUESTS,
    "recorded_samples": RECORDED,
    "marks": RAW,
    "spool_files": [
        *RAW,
        b"SQLite format 3\0",
        bytes(100),
        *(struct.pack("<I", number * 613) * 3 for number in range(40)),
    ],
    "remembered_choice": [
        (
            b'{"format": 1, "files": {}, "choices": {"key": {"devices": [], "strict": false, "reasons": [], "line": [{"file": "m",'
            b' "variant": "file", "threads": 1, "delegate": {"name": "none", "index": "", "library": "", "options": []}}]}}}'
        ),
        b'{"format": 1, "files": {"m": [[1, 2, 3], "00"]}, "choices": {"key": {}}}',
    ],
    "texts": TEXTS,
    "numbers": [*RAW, b"\xaa\xaa\xaa\xff" + b"\xff" * 6 + b"\xaa\x07", bytes.fromhex("a946a9ff26")],
}
# Targets whose first byte chooses a variant of what is read.
CHOOSING = frozenset({"tensor_payload", "image", "window", "whole_pipeline", "marks", "numbers", "spool_files"})
