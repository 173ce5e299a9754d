"""Every reader of foreign bytes under some hundreds of hostile inputs: no crash, no hang, bounded memory, the same answer again."""

from __future__ import annotations

import gc
import io
import json
import resource
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edge_serve.bundle import TensorSpec
from edge_serve.errors import InputError
from edge_serve.processing import tensor as tensors
from tests.fuzz.seeds import CHOOSING, SEEDS
from tests.fuzz.targets import TARGETS, check

# Processor time for one input of some kilobytes, twenty times what the slowest takes on a slow machine.
MAX_SECONDS = 2.0
# The process may not grow by more over all inputs of a target: interpreters, Pillow and caches, but no payload's wish.
MAX_GROWTH = 256 * 1024 * 1024
EXAMPLES = {
    "configuration": 150,
    "manifest": 150,
    "whole_pipeline": 250,
    "marks": 60,
    "spool_files": 60,
    "image": 300,
    "streams": 150,
}
DEFAULT_EXAMPLES = 300

# Found by seed, so that CI does not fail by chance; scripts/fuzz looks elsewhere each time.
same_each_time = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

words = st.sampled_from(
    [
        *(bytes([byte]) for byte in b'\0\xff\n\r\t "[]{},:-#+=.'),
        *(b"\xff" * 8, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0", b"\0\0\0\1"),
        *(b"1e999", b"-1", b"NaN", b"null", b"true", b"9" * 5000, b"1_0", b"0x7f"),
        *(b"\\ud800", b"\xed\xa0\x80", b"../", b"{}", b"[]", b'""'),
    ]
)


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Give one of the seeds with a few pieces of it replaced, taken away, doubled or put elsewhere."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 4) | st.integers(0, 64)))
        piece = draw(words | st.binary(max_size=4) | st.just(data[start:stop] * 2) | st.just(b""))
        at, to = draw(st.sampled_from([(start, stop), (start, start), (len(data), len(data))]))
        data = data[:at] + piece + data[to:]
    return data


values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(["x", "a", "b", "id", "time", "key"]), inner)
    ),
    max_leaves=12,
)
documents = values.map(lambda value: json.dumps(value).encode(errors="replace"))


def inputs(name: str) -> st.SearchStrategy[bytes]:
    """Give bytes for a target: damaged seeds, JSON documents, and noise."""
    found = damaged(SEEDS[name]) | damaged(SEEDS[name]) | documents | st.binary(max_size=200)
    if name in CHOOSING:
        return st.builds(lambda choice, data: bytes([choice]) + data, st.integers(0, 255), found)
    return found


def test_every_target_has_seeds() -> None:
    assert set(SEEDS) == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_that_comes_from_outside_breaks_its_reader(name: str) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(same_each_time, max_examples=EXAMPLES.get(name, DEFAULT_EXAMPLES))
    @given(inputs(name))
    def attempt(data: bytes) -> None:
        begun = time.process_time()
        first = check(name, data)
        assert time.process_time() - begun < MAX_SECONDS, "it takes too long"
        assert check(name, data) == first, "another answer for the same bytes"

    attempt()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MAX_GROWTH


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_is_read_whatever_is_chosen(name: str) -> None:
    for choice in range(256) if name in CHOOSING else (None,):
        for number, seed in enumerate(SEEDS[name]):
            if choice is None:
                check(name, seed)
            elif (choice + number) % (89 if name == "spool_files" else 5) == 0:
                check(name, bytes([choice]) + seed)


# Memory: what hostile payloads ask for, against what they are.


def bomb(count: int, size: int) -> bytes:
    """Give an .npz whose members pack a thousandfold."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(count):
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
            archive.writestr(f"x{number}.npy", header.getvalue() + bytes(size))
    return buffer.getvalue()


def npy(shape: tuple[int, ...], descr: str = "<f8") -> bytes:
    """Give a .npy file that promises more than it holds."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue()


GREEDY: dict[str, Callable[[], tuple[str, bytes]]] = {
    "an archive that packs a thousandfold": lambda: ("npz", bomb(1, 50_000_000)),
    "an archive of many": lambda: ("npz", bomb(200, 200_000)),
    "an array of more than it holds": lambda: ("npy", npy((2**40,))),
    "an array with sizes whose product overflows": lambda: ("npy", npy((2**32, 2**32, 2**32))),
    "one long text among many": lambda: (
        "tensor_payload",
        b"\x04" + json.dumps(["x" * 100_000] + ["y"] * 20_000).encode(),
    ),
    "a list of a million zeros": lambda: ("tensor_payload", b"\x00[" + b"0," * 500_000 + b"0]"),
    "deep lists": lambda: ("tensor_payload", b"\x00" + b"[" * 500_000),
    "deep tables": lambda: ("manifest", b'{"a":' * 200_000),
    "deep TOML": lambda: ("configuration", b"x = " + b"[" * 100_000),
    "a dotted TOML key of many parts": lambda: ("configuration", b".".join([b"a"] * 2000) + b" = 1"),
    "a header without end": lambda: ("socket_framing", b'{"type": "' + b"a" * 1_000_000),
    "a picture of more pixels than are allowed": lambda: ("image", b"\x00" + huge_png()),
    "a CSV of one long line": lambda: ("window", b"\x3f" + b"1," * 400_000),
}


def huge_png() -> bytes:
    """Give a PNG whose header says 60,000 × 60,000."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("what", GREEDY)
def test_a_payload_takes_no_more_memory_than_its_bound(what: str) -> None:
    name, data = GREEDY[what]()
    # JSON numbers are objects: forty times their text is what Python itself takes.
    limit = (
        4 * 1024 * 1024 + 60 * len(data) if name != "npz" else 4 * 1024 * 1024 + (tensors.MAX_NPZ_RATIO + 2) * len(data)
    )
    gc.collect()
    tracemalloc.start()
    try:
        begun = time.process_time()
        check(name, data)
        assert time.process_time() - begun < 3 * MAX_SECONDS
        assert tracemalloc.get_traced_memory()[1] <= limit
    finally:
        tracemalloc.stop()


# Round trips.


@settings(same_each_time, max_examples=150)
@given(
    st.sampled_from(["<f4", "<f8", ">i2", "|u1", "|b1", "<f2", ">u8"]),
    st.lists(st.integers(0, 4), max_size=4),
    st.booleans(),
)
@example("<f4", [], False)
def test_every_array_that_numpy_writes_is_read_back(dtype: str, shape: list[int], fortran: bool) -> None:
    count = int(np.prod(shape)) if shape else 1
    array = np.arange(count).astype(dtype).reshape(shape)
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(array) if fortran else array)
    np.testing.assert_array_equal(tensors.read_npy(buffer.getvalue()), array)


@settings(same_each_time, max_examples=150)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4))
def test_every_float_comes_through_json_unchanged(numbers: list[float]) -> None:
    spec = TensorSpec("x", "float32", (1, 4))
    array = tensors.TensorDecoder({"x": spec}).decode(json.dumps(numbers).encode(), tensors.JSON)["x"]
    assert array.tolist() == [numbers]


@settings(same_each_time, max_examples=150)
@given(st.binary(min_size=0, max_size=40))
def test_raw_bytes_are_a_tensor_by_their_length_alone(payload: bytes) -> None:
    decoder = tensors.TensorDecoder({"x": TensorSpec("x", "int16", (-1, 3))})
    try:
        array = decoder.decode(payload, tensors.OCTETS)["x"]
    except InputError:
        assert not payload or len(payload) % 6
    else:
        assert array.tobytes() == payload
