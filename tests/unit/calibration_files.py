"""Calibration data as people have them: writers of the files that the converter reads, and drawing from them."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec
from edge_serve_converters.calibration import Drawn, Warnings, draw, open_source
from edge_serve_converters.plan import InputPlan, SignaturePlan
from edge_serve_converters.record_framing import framed
from edge_serve_converters.truth import open_truth

VECTOR = SignaturePlan("serving_default", (InputPlan("x", "float32", (1, 4), True),), {"y": "float32"})
WINDOW = SignaturePlan("serving_default", (InputPlan("w", "float32", (1, 5, 2), True),), {"y": "float32"})
SIGNAL = SignaturePlan("serving_default", (InputPlan("s", "float32", (1, 50), True),), {"y": "float32"})
PHOTO = SignaturePlan("serving_default", (InputPlan("photo", "float32", (1, 6, 8, 3), True),), {"y": "float32"})
PAIR = SignaturePlan(
    "serving_default",
    (InputPlan("index", "int32", (1,), True), InputPlan("x", "float32", (1, 4), True)),
    {"y": "float32"},
)


def numbered(count: int, *shape: int) -> Any:
    """Samples of which each is recognized by its first value, its number."""
    array = np.random.default_rng(0).random((count, *shape), np.float32)
    array.reshape(count, -1)[:, 0] = np.arange(count)
    return array


def drawn(
    path: Path,
    signature: SignaturePlan,
    spec: InputSpec | None = None,
    labels_for: str | Path | None = None,
    labels: tuple[str, ...] | None = None,
    **options: Any,
) -> Drawn:
    """Draw from a file with the defaults of the command line."""
    settings = {"samples": 200, "seed": 0, "warnings": Warnings(), **options}
    source = open_source(path, spec or InputSpec())
    truth = open_truth(labels_for, source, labels) if labels_for is not None else None
    return draw(source, signature, truth=truth, **settings)


def refused(path: Path, signature: SignaturePlan, spec: InputSpec | None = None, **options: Any) -> str:
    """Draw and give the words of the refusal."""
    with pytest.raises(UsageError) as caught:
        drawn(path, signature, spec, **options)
    return str(caught.value)


def warned(path: Path, signature: SignaturePlan, spec: InputSpec | None = None, **options: Any) -> str:
    """Draw and give all warnings."""
    warnings = Warnings()
    drawn(path, signature, spec, warnings=warnings, **options)
    return "\n".join(warnings.texts)


def npz(folder: Path, **arrays: Any) -> Path:
    """Write arrays to a file."""
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def csv(folder: Path, text: str) -> Path:
    """Write a table to a file."""
    path = folder / "data.csv"
    path.write_text(text, encoding="utf-8")
    return path


def _length_prefixed(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def example(**features: Any) -> bytes:
    """Serialize a tf.train.Example: bytes and text as a bytes_list, whole numbers as an int64_list, others as a float_list."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes | str):
            value = value.encode() if isinstance(value, str) else value
            feature = _length_prefixed(1, _length_prefixed(1, value))
        else:
            array = np.ravel(value)
            if array.dtype.kind == "f":
                feature = _length_prefixed(2, _length_prefixed(1, array.astype("<f4").tobytes()))
            else:
                feature = _length_prefixed(3, _length_prefixed(1, b"".join(map(_varint, array.tolist()))))
        entries += _length_prefixed(1, _length_prefixed(1, name.encode()) + _length_prefixed(2, feature))
    return _length_prefixed(1, entries)


def tfrecord(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write records to a file, gzip'd if its name says so."""
    content = b"".join(framed(example(**record)) for record in records)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# Format tag and bits, and how -1..1 is stored.
ENCODINGS: dict[str, tuple[int, int]] = {
    "pcm8": (1, 8),
    "pcm16": (1, 16),
    "pcm24": (1, 24),
    "pcm32": (1, 32),
    "float32": (3, 32),
    "float64": (3, 64),
}


def wav(path: Path, signal: Any, encoding: str = "pcm16", rate: int = 16000, extensible: bool = False) -> Path:
    """Write a signal [frames] or [frames, channels] of -1..1."""
    kind, bits = ENCODINGS[encoding]
    signal = np.asarray(signal, np.float64)
    channels = 1 if signal.ndim == 1 else signal.shape[1]
    flat = signal.reshape(-1)
    if kind == 3:
        data = flat.astype(f"<f{bits // 8}").tobytes()
    elif bits == 8:
        data = np.clip(np.rint(flat * 128 + 128), 0, 255).astype(np.uint8).tobytes()
    else:
        top = 2.0 ** (bits - 1)
        data = b"".join(
            int(value).to_bytes(bits // 8, "little", signed=True)
            for value in np.clip(np.rint(flat * top), -top, top - 1).tolist()
        )
    tag = 0xFFFE if extensible else kind
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", tag, channels, rate, rate * frame, frame, bits)
    if extensible:
        form += (
            struct.pack("<HHI", 22, bits, 0) + struct.pack("<H", kind) + bytes.fromhex("000000001000800000aa00389b71")
        )
    # A chunk that no reader of samples needs, of an odd length, as many programs write them.
    chunks = b"LIST" + struct.pack("<I", 3) + b"abc\0"
    chunks += b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WAVE" + chunks)
    return path
