"""Payloads that are tensors: what is taken, what is refused and with which words, and the arithmetic of quantization."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import numpy as np
import pytest

from edge_serve.bundle import TensorSpec
from edge_serve.errors import InputError, TooLargeError
from edge_serve.processing.tensor import (
    CSV,
    JPEG,
    JSON,
    NPY,
    NPZ,
    OCTETS,
    PNG,
    TensorDecoder,
    content_type,
    dequantize,
    fit,
    from_bytes,
    from_numbers,
    parse_json,
    quantize,
    read_npy,
    read_npz,
)
from tests.unit.material import allocating_at_most, assert_close, encoded, plain, tensor

F14 = tensor((1, 4))
Q14 = tensor((1, 4), "int8", 0.1, -3)


def npy(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), **options)
    return buffer.getvalue()


def npy_with_header(header: str, body: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """Write a .npy file whose header says anything."""
    text = header.encode() + b" " * 20 + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + body


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


# What a payload is.


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (b"\xff\xd8\xff\xe0", JPEG),
        (b"\x89PNG\r\n\x1a\n\0", PNG),
        (npy([1.0]), NPY),
        (npz(a=[1.0]), NPZ),
        (b"[1, 2]", JSON),
        (b' \r\n{"a": 1}', JSON),
        (b"-1.5", JSON),
        (b"7", JSON),
        (b"", OCTETS),
        (b"\0\0\x80?", OCTETS),
        (b"[\0\x80?", OCTETS),
        (b"1,2,3\n\0", OCTETS),
    ],
)
def test_a_payload_without_a_type_is_known_by_its_first_bytes(payload: bytes, kind: str) -> None:
    assert content_type(payload, None, None) == kind
    assert content_type(bytearray(payload), None, None) == kind
    assert content_type(memoryview(payload), "", None) == kind


def test_the_senders_word_stands_over_the_configurations_and_that_over_the_bytes() -> None:
    assert content_type(b"[1]", "text/csv", "application/json") == CSV
    assert content_type(b"[1]", None, "text/csv") == CSV
    assert content_type(b"[1]", "Application/JSON; charset=utf-8", None) == JSON


def test_a_type_that_is_not_read_is_answered_with_those_that_are() -> None:
    with pytest.raises(
        InputError, match=r"content type 'image/gif' is not supported; send one of image/jpeg, image/png"
    ):
        content_type(b"GIF89a", "image/gif", None)


def test_looking_at_a_large_payload_copies_nothing_of_it() -> None:
    payload = memoryview(bytes(64 * 1024 * 1024))
    with allocating_at_most(100_000):
        content_type(payload, None, None)


# JSON.


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "payload is not JSON: Expecting value"),
        (b"{", "payload is not JSON: Expecting property name"),
        (b"[1,]", "payload is not JSON"),
        (b"[1] [2]", "payload is not JSON: Extra data"),
        (b'"\xff"', "payload is not JSON: it is not UTF-8 text"),
        (b"[" * 200_000, "payload is JSON that is nested too deeply"),
        (b'{"a":' * 200_000, "payload is JSON that is nested too deeply"),
        (b"1" * 5000, "payload is not JSON: Exceeds the limit"),
    ],
    ids=["empty", "half", "comma", "two", "latin-1", "deep lists", "deep objects", "digits"],
)
def test_what_is_not_json_is_refused(payload: bytes, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_json(payload)


@pytest.mark.parametrize(
    "value",
    [
        [1, 2, 3],
        [1, 2, 3, 4, 5],
        [[1, 2], [3, 4]],
        [[[1, 2, 3, 4], [1, 2, 3, 4]]],
        [],
        [[]],
        [[], [], [], []],
        5,
    ],
)
def test_numbers_of_another_shape_are_refused_with_both_shapes(value: Any) -> None:
    with pytest.raises(InputError, match=r"input 'x'.*shape"):
        from_numbers(value, F14)


@pytest.mark.parametrize("value", [[[1, 2], [3]], [[1, 2, 3, 4], [1]], [[[1]], [[1, 2]]]])
def test_ragged_lists_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"input 'x': lists of unequal length; the model takes shape \[1, 4\]"):
        from_numbers(value, F14)


@pytest.mark.parametrize(
    "value",
    ["1234", ["1", "2", "3", "4"], [None] * 4, [1, 2, 3, "4"], [{}], {}, None, [1, [2, 3, 4]], [10**30, 1, 2, 3]],
)
def test_anything_but_numbers_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"takes numbers of shape \[1, 4\]; the payload holds something else"):
        from_numbers(value, F14)


def test_one_long_text_among_many_short_ones_takes_no_memory() -> None:
    """numpy would make room for the longest in each place: 8 GB for these 2 MB of JSON."""
    value = json.loads(json.dumps(["x" * 1_000_000] + ["a"] * 2000))
    with allocating_at_most(1_000_000), pytest.raises(InputError):
        from_numbers(value, F14)


def test_lists_nested_to_any_depth_are_refused() -> None:
    value: Any = 1
    for _ in range(500):
        value = [value]
    with pytest.raises(InputError):
        from_numbers(value, F14)


@pytest.mark.parametrize(
    "value", [[1, 2.5, -3, 4], [[1, 2.5, -3, 4]], [[[1], [2.5], [-3], [4]]], [[1], [2.5], [-3], [4]]]
)
def test_dimensions_of_one_may_be_missing_or_added(value: Any) -> None:
    array = from_numbers(value, F14)
    assert (array.dtype.name, array.tolist()) == ("float32", [[1, 2.5, -3, 4]])


def test_truth_values_are_numbers() -> None:
    assert from_numbers([True, False, True, False], F14).tolist() == [[1, 0, 1, 0]]
    assert from_numbers([True, False], tensor((1, 2), "bool")).tolist() == [[True, False]]


def test_a_scalar_input_takes_one_number() -> None:
    for value in (3, [3], [[3]]):
        array = from_numbers(value, tensor(()))
        assert (array.shape, float(array)) == ((), 3.0)


# .npy


def test_a_npy_array_is_read_without_a_copy() -> None:
    payload = npy(np.arange(1_000_000, dtype=np.float32))
    with allocating_at_most(1_000_000):
        array = read_npy(payload)
    assert array[-1] == 999_999


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i8", ">i2", "|u1", "|b1"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_arrays_of_any_number_type_and_version(dtype: str, version: tuple[int, int]) -> None:
    values = np.array([[0, 1], [1, 0]], dtype)
    np.testing.assert_array_equal(read_npy(npy(values, version=version)), values)
    np.testing.assert_array_equal(read_npy(npy(np.asfortranarray(values), version=version)), values)


def header(descr: str = "'<f4'", shape: str = "(2,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff",
        npy([1.0, 2.0])[:-1],
        npy([1.0, 2.0]) + b"x",
        npy_with_header("", bytes(8)),
        npy_with_header("[]", bytes(8)),
        npy_with_header("{}", bytes(8)),
        npy_with_header("(" * 5000, bytes(8)),
        npy_with_header("{'descr': '''", bytes(8)),
        npy_with_header("  x\n y\n", bytes(8)),
        npy_with_header("__import__('os')", bytes(8)),
        npy_with_header("-" * 9000 + "1", bytes(8)),
        npy_with_header(header(shape="(-2, -1)"), bytes(8)),
        npy_with_header(header(shape="(-2,)"), bytes(8)),
        npy_with_header(header(shape="(True, 2)"), bytes(8)),
        npy_with_header(header(shape="(2.0,)"), bytes(8)),
        npy_with_header(header(shape="(99999999999999999999999, 0)")),
        npy_with_header(header(shape=repr((1,) * 100)), bytes(4)),
        npy_with_header(header(shape="(10**9,)"), bytes(8)),
        npy_with_header(header("'<f0'"), bytes(8)),
        npy_with_header(header("'<U2'"), bytes(16)),
        npy_with_header(header("'<M8[s]'"), bytes(16)),
        npy_with_header(header("'<c8'"), bytes(16)),
        npy_with_header(header("[('a', '<f4')]"), bytes(8)),
        npy_with_header(header("('<f4', (2,))"), bytes(16)),
        npy_with_header(header("{}"), bytes(8)),
        npy_with_header(header(), bytes(8), b"\x09\x09"),
    ],
)
def test_what_is_no_npy_array_of_numbers_is_refused(payload: bytes) -> None:
    with pytest.raises(InputError, match=r"^(payload is not a .npy array|.npy array of )"):
        read_npy(payload)


def test_an_array_of_objects_is_refused_before_anything_is_unpickled() -> None:
    with pytest.raises(InputError, match=r".npy array of dtype object is not supported; send numbers"):
        read_npy(npy(np.array([print, 1], object), allow_pickle=True))


def test_a_huge_shape_is_refused_by_its_arithmetic() -> None:
    payload = npy_with_header(header(shape="(99999999999, 99999999999)"), bytes(8))
    with pytest.raises(InputError, match=r"needs 39999999999200000000004 bytes, 8 are there"):
        read_npy(payload)


def test_an_empty_array_fits_no_input() -> None:
    with pytest.raises(InputError, match=r"input 'x': the payload has shape \[0, 3\], which holds no values"):
        fit(read_npy(npy(np.zeros((0, 3), np.float32))), tensor((-1, 3)))


# .npz


def archive(method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as packed:
        for name, content in members.items():
            packed.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def test_npz_arrays_are_read_by_name_packed_or_not() -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        arrays = read_npz(archive(method, a=npy([1.0]), b=npy([[2, 3]])))
        assert {name: array.tolist() for name, array in arrays.items()} == {"a": [1], "b": [[2, 3]]}


def test_an_npz_that_unpacks_to_far_more_than_it_is_is_refused_before_it_is_unpacked() -> None:
    payload = archive(a=npy(np.zeros(10_000_000, np.float32)))
    with allocating_at_most(1_000_000), pytest.raises(TooLargeError, match=r"would unpack to 400\d+ bytes"):
        read_npz(payload)


def test_an_npz_that_lies_about_its_size_is_refused_without_being_unpacked() -> None:
    honest = archive(a=npy(np.zeros(10_000_000, np.float32)))
    size = (40_000_128).to_bytes(4, "little")
    assert honest.count(size) == 2
    lying = honest.replace(size, (1000).to_bytes(4, "little"))
    with allocating_at_most(1_000_000), pytest.raises(InputError, match=r"payload is not an .npz file"):
        read_npz(lying)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packing_methods_that_unpack_without_bounds_are_refused(method: int) -> None:
    with pytest.raises(InputError, match=r"packed in an unusual way; write it with numpy.savez_compressed"):
        read_npz(archive(method, a=npy(np.arange(100.0))))


@pytest.mark.parametrize("at", range(0, 400, 7))
def test_a_damaged_npz_is_refused_or_read(at: int) -> None:
    payload = bytearray(npz(a=np.random.default_rng(1).random(30), b=[1, 2, 3]))
    payload[at % len(payload) :][:5] = b"\xff" * 5
    for damaged in (bytes(payload[: at + 1]), bytes(payload[:at]) + b"\xff\xff\xff" + bytes(payload[at + 3 :])):
        try:
            read_npz(damaged)
        except InputError:
            continue


def test_an_encrypted_or_foreign_zip_is_refused() -> None:
    payload = bytearray(archive(zipfile.ZIP_STORED, a=npy([1.0])))
    for at in (6, payload.index(b"PK\x01\x02") + 8):
        payload[at] |= 1
    with pytest.raises(InputError, match=r"payload is not an .npz file: .*encrypted"):
        read_npz(bytes(payload))
    with pytest.raises(InputError, match=r"payload is not a .npy array"):
        read_npz(archive(a=b"a text"))


# Raw tensors.


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8", "int32", "int64", "bool"])
def test_a_raw_tensor_is_little_endian_and_exactly_as_long_as_the_input(dtype: str) -> None:
    values = np.array([[0, 1], [1, 1]], np.dtype(dtype).newbyteorder("<"))
    spec = tensor((1, 2, 2), dtype)
    array = from_bytes(values.tobytes(), spec)
    assert (array.shape, array.dtype.name) == ((1, 2, 2), dtype)
    np.testing.assert_array_equal(array[0], values)
    for wrong in (b"", values.tobytes()[:-1], values.tobytes() + b"x", values.tobytes() * 2):
        with pytest.raises(
            InputError,
            match=rf"takes {values.nbytes} bytes \(shape \[1, 2, 2\], {dtype}, little-endian\); the payload has {len(wrong)}",
        ):
            from_bytes(wrong, spec)


def test_a_raw_tensor_with_a_dynamic_batch_is_any_whole_number_of_inputs() -> None:
    assert from_bytes(bytes(24), tensor((-1, 3))).shape == (2, 3)
    for wrong in (b"", bytes(13)):
        with pytest.raises(InputError, match="takes a multiple of 12 bytes"):
            from_bytes(wrong, tensor((-1, 3)))


def test_a_raw_tensor_of_two_dynamic_sizes_cannot_be_known() -> None:
    with pytest.raises(InputError):
        from_bytes(bytes(24), tensor((-1, -1, 3)))


def test_a_raw_tensor_is_not_copied() -> None:
    payload = bytes(4 * 1_000_000)
    with allocating_at_most(100_000):
        from_bytes(payload, tensor((1, 1_000_000)))


# Shapes and dtypes.


@pytest.mark.parametrize(
    ("shape", "spec", "fits"),
    [
        ((1, 4), (1, 4), (1, 4)),
        ((4,), (1, 4), (1, 4)),
        ((4, 1), (1, 4), (1, 4)),
        ((2, 2, 1), (1, 2, 2), (1, 2, 2)),
        ((8,), (1, 2, 2, 2), (1, 2, 2, 2)),
        ((7, 3), (-1, 3), (7, 3)),
        ((3,), (-1, 3), (1, 3)),
        ((5, 6, 3), (1, -1, -1, 3), (1, 5, 6, 3)),
        ((1,), (), ()),
    ],
)
def test_shapes_that_fit(shape: tuple[int, ...], spec: tuple[int, ...], fits: tuple[int, ...]) -> None:
    assert fit(np.ones(shape, np.float32), tensor(spec)).shape == fits


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((2, 4), (1, 4)), ((2, 2), (1, 4)), ((4, 2), (1, 2, 4)), ((6,), (-1, 3)), ((7, 4), (-1, 3)), ((2,), ())],
)
def test_shapes_that_do_not_fit_are_named_with_what_is_wanted(shape: tuple[int, ...], spec: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"input 'x' takes shape \[.*\] and dtype float32; the payload has shape \["):
        fit(np.ones(shape, np.float32), tensor(spec))


def test_an_array_of_the_right_kind_is_passed_on_as_it_is() -> None:
    array = np.ones((1, 4), np.float32)
    assert fit(array, F14) is array


def test_what_is_passed_on_is_contiguous() -> None:
    assert fit(np.ones((8, 1), np.float32)[::2], F14).flags.c_contiguous
    assert fit(np.asfortranarray(np.ones((3, 4), np.float32)), tensor((3, 4))).flags.c_contiguous


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([300.0, 0.0], "uint8"),
        ([-1.0, 0.0], "uint8"),
        ([0.5, 0.0], "int32"),
        ([float("nan"), 0.0], "int32"),
        ([float("inf"), 0.0], "int32"),
        ([1e30, 0.0], "int32"),
        ([300, 0], "uint8"),
        ([-1, 0], "uint8"),
        ([2**31, 0], "int32"),
        ([2**63, 0], "int64"),
    ],
)
def test_a_number_that_an_integer_input_cannot_hold_is_refused(values: list[float], dtype: str) -> None:
    with pytest.raises(InputError, match=rf"input 'x' takes {dtype}"):
        from_numbers(values, tensor((1, 2), dtype))


def test_whole_numbers_may_come_as_decimals() -> None:
    assert from_numbers([3.0, -4.0], tensor((1, 2), "int32")).tolist() == [[3, -4]]


def test_a_number_that_is_too_large_for_float32_is_refused() -> None:
    with pytest.raises(InputError, match="input 'x' takes float32; a value is too large for that"):
        from_numbers([1e300, 0, 0, 0], F14)
    assert np.isinf(from_numbers([float("inf"), 0, 0, 0], F14)).any()


# Quantization.


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
@pytest.mark.parametrize(("scale", "zero_point"), [(0.1, 0), (0.0039215689, 5), (1.7, -3), (1e-6, 1)])
def test_quantization_is_the_formula_rounded_and_saturated(dtype: str, scale: float, zero_point: int) -> None:
    spec = tensor((1, 1000), dtype, scale, zero_point)
    values = np.random.default_rng(5).uniform(-400 * scale, 400 * scale, (1, 1000)).astype(np.float32)
    limits = np.iinfo(dtype)
    scaled = (values / np.float32(scale)).astype(np.float64)
    expected = np.clip(np.round(scaled) + zero_point, limits.min, limits.max)
    found = quantize(values, spec)
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, expected)


def test_halves_round_to_even_and_far_values_saturate() -> None:
    spec = tensor((7,), "int8", 1.0, 0)
    values = np.array([0.5, 1.5, 2.5, -0.5, 1000, -1000, 127.4])
    assert quantize(values, spec).tolist() == [0, 2, 2, 0, 127, -128, 127]


@pytest.mark.parametrize("value", [1e300, 3e38, 1e30])
def test_a_finite_value_of_any_size_saturates(value: float) -> None:
    spec = tensor((2,), "int8", 1e-9, 0)
    assert quantize(np.array([value, -value]), spec).tolist() == [127, -128]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_by_a_quantized_input(value: float) -> None:
    with pytest.raises(InputError, match="input 'x' holds NaN or infinite values"):
        from_numbers([value, 0, 0, 0], Q14)


def test_what_was_quantized_comes_back_within_half_a_step() -> None:
    values = np.linspace(-12, 12, 101, dtype=np.float32)
    spec = tensor((101,), "int8", 0.1, -3)
    found: Any = dequantize(quantize(values, spec), spec)
    assert_close(found, values, atol=0.05001)


def test_an_array_of_the_tensors_own_dtype_is_already_quantized() -> None:
    raw = np.array([[1, 2, 3, 4]], np.int8)
    assert fit(raw, Q14) is raw
    assert fit(raw.astype(np.int16), Q14).tolist() == quantize(raw.astype(np.float32), Q14).tolist()


def test_tensors_that_are_not_quantized_pass_dequantization_as_they_are() -> None:
    for array, spec in ((np.ones(3, np.float32), tensor((3,))), (np.ones(3, np.int32), tensor((3,), "int32"))):
        assert dequantize(array, spec) is array


# Whole payloads.

ONE = TensorDecoder({"x": F14})
TWO = TensorDecoder({"a": tensor((1, 2), name="a"), "b": tensor((1, 3), name="b")})
VALUES = {"a": [1, 2], "b": [3, 4, 5]}


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (np.array([1, 2, 3, 4], "<f4").tobytes(), OCTETS),
        (npy([[1, 2, 3, 4]]), NPY),
        (npz(x=[1, 2, 3, 4]), NPZ),
        (b"[1, 2, 3, 4]", JSON),
        (b'{"x": [[1, 2, 3, 4]]}', JSON),
        (b'{"inputs": [1, 2, 3, 4], "id": 5}', JSON),
        (b'{"inputs": {"x": [1, 2, 3, 4]}}', JSON),
        (b'{"x": [1, 2, 3, 4], "time": "2026"}', JSON),
    ],
)
def test_every_form_gives_the_same_tensor(payload: bytes, kind: str) -> None:
    for form in (payload, bytearray(payload), memoryview(payload)):
        (array,) = ONE.decode(form, kind).values()
        assert (array.dtype.name, array.tolist()) == ("float32", [[1, 2, 3, 4]])


@pytest.mark.parametrize("payload", [json.dumps(VALUES).encode(), json.dumps({"inputs": VALUES, "id": 1}).encode()])
def test_several_inputs_go_by_name(payload: bytes) -> None:
    for decoded in (TWO.decode(payload, JSON), TWO.decode(npz(**VALUES), NPZ)):
        assert {name: array.tolist() for name, array in decoded.items()} == {"a": [[1, 2]], "b": [[3, 4, 5]]}


def test_an_input_may_be_called_inputs() -> None:
    decoder = TensorDecoder({"inputs": F14})
    assert decoder.decode(b'{"inputs": [1, 2, 3, 4]}', JSON)["inputs"].tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("payload", "kind", "says"),
    [
        (b"[1, 2]", JSON, r'the model has several inputs; send \{"inputs": \{name: …\}\} with a: float32 \[1, 2\], b'),
        (
            b'{"a": [1, 2]}',
            JSON,
            r"payload lacks the input 'b'; the model takes a: float32 \[1, 2\], b: float32 \[1, 3\]",
        ),
        (b"{}", JSON, r"payload lacks the input 'a', 'b'"),
        (bytes(8), OCTETS, r"the model has several inputs"),
        (npy([1.0]), NPY, r"the model has several inputs"),
        (npz(a=[1, 2]), NPZ, r"payload lacks the input 'b'"),
        (b"1,2", CSV, r"text/csv does not fit this pipeline: its model takes tensors"),
        (encoded(plain(8, 8), "PNG"), PNG, r"image/png does not fit this pipeline: its model takes tensors"),
    ],
)
def test_payloads_that_do_not_fit_say_what_the_model_takes(payload: bytes, kind: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        TWO.decode(payload, kind)


def test_an_array_in_memory_needs_no_name_where_there_is_one_input() -> None:
    assert ONE.from_array(np.ones((1, 4), np.float32))["x"].shape == (1, 4)
    with pytest.raises(InputError, match="several inputs"):
        TWO.from_array(np.ones((1, 2), np.float32))


def test_the_description_names_every_input() -> None:
    spec = TensorSpec("x", "int8", (-1, 3))
    assert TensorDecoder({"x": spec}).describe() == "x: int8 [-1, 3]"
