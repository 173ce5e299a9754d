"""What a .tflite file says of itself: read from files of others, written into ours, and never trusted."""

from __future__ import annotations

import io
import json
import logging
import os
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve.bundle import TensorSpec
from edge_serve.errors import ModelError
from edge_serve.model import layout
from edge_serve.model.engine import Engine
from edge_serve.model.flatbuffer import ByteSource
from edge_serve.model.interpreter import Runtime
from edge_serve.model.metadata import Found, TensorFacts, read_metadata
from edge_serve.model.repository import find
from edge_serve.processing.image import ImageProcessor
from edge_serve.processing.setup import settle
from edge_serve.spec import InputSpec, OutputSpec
from edge_serve_converters.errors import ConversionError
from edge_serve_converters.metadata import write_metadata
from edge_serve_converters.metadata_words import Words
from tests.unit.material import model

DIGITS = tuple(f"digit {number}" for number in range(10))
PICTURE = InputSpec(kind="image", color="rgb", scale=1.0, mean=(127.5,), std=(127.5,))
DETECTION = OutputSpec(
    type="detection", boxes="c_boxes", classes="d_classes", scores="b_scores", count="a_number", threshold=0.25
)


def ends(data: bytes) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Give a file's inputs and outputs."""
    return layout.ends(layout.open_model(ByteSource(data)))


def written(data: bytes, **changes: Any) -> bytes:
    """Write metadata into a file."""
    inputs, outputs = ends(data)
    values: dict[str, Any] = {
        "name": "thing",
        "description": "finds things",
        "version": "3",
        "input": InputSpec(),
        "output": OutputSpec(),
        "labels": None,
        "inputs": inputs,
        "outputs": outputs,
    }
    return write_metadata(data, **{**values, **changes})


def said(data: bytes) -> Found:
    """Read a file that has metadata."""
    found = read_metadata(data)
    assert found is not None
    return found


def by_others(data: bytes) -> bytes:
    """Give a file as if another tool had written it: without our own entry, only in the words of TFLite Metadata."""
    assert data.count(b"EDGE_SERVE\0") == 1
    return data.replace(b"EDGE_SERVE\0", b"OTHER_TOOL\0")


def pixels_with(name: str, spec: InputSpec, **changes: Any) -> Found:
    """Give what another reader finds of a picture's specification."""
    return said(by_others(written(model(name).read_bytes(), input=spec, **changes)))


def table_of_pixels(spec: InputSpec, tensor: TensorSpec) -> Any:
    """Give the tensor's values for all pixels 0..255."""
    wide = replace(tensor, shape=(1, 1, 256, tensor.shape[3]))
    processor = ImageProcessor(replace(spec, size=None), wide)
    pixels = np.repeat(np.arange(256, dtype=np.uint8)[np.newaxis, :, np.newaxis], 3, axis=2)
    return processor.from_pixels(pixels)[0].astype(np.float64)


def run(runtime: Runtime, file: Path) -> dict[str, Any]:
    """Run a model on fixed inputs."""
    engine = Engine.open(file, runtime=runtime)
    rng = np.random.default_rng(0)
    inputs = {}
    for name, spec in engine.inputs.items():
        shape = tuple(abs(size) for size in spec.shape)
        integers = spec.dtype in ("int8", "uint8")
        inputs[name] = rng.integers(0, 100, shape).astype(spec.dtype) if integers else rng.random(shape).astype("f4")
    return engine.run(inputs)


# Files of others


def test_a_file_without_metadata_says_nothing() -> None:
    assert read_metadata(model("linear")) is None


def test_what_is_no_model_says_nothing() -> None:
    for data in (b"", b"TFL3", b"\x1c\0\0\0TFL3", b"something else entirely", bytes(100)):
        assert read_metadata(data) is None


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none.tflite: cannot be read \(No such file"):
        read_metadata(tmp_path / "none.tflite")


def test_mean_and_std_count_in_pixels() -> None:
    found = pixels_with("any_size", InputSpec(kind="image", size=(32, 48), scale=1 / 255, mean=(0.5,), std=(0.25,)))
    assert (found.input.kind, found.input.color, found.input.size, found.input.scale) == ("image", "rgb", (32, 48), 1.0)
    assert found.input.mean == (127.5,)
    assert found.input.std == (63.75,)
    assert found.inputs[0].minimum == (-2.0,)
    assert found.inputs[0].maximum == (2.0,)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("pixels", InputSpec(kind="image")),
        ("digits", InputSpec(kind="image")),
        ("digits", InputSpec(kind="image", scale=1 / 255)),
        ("gray", InputSpec(kind="image")),
        ("gray", InputSpec(kind="image", scale=1.0, mean=(127.5,), std=(127.5,))),
        ("any_size", InputSpec(kind="image", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=(8, 8))),
    ],
)
def test_other_readers_words_lead_to_the_same_tensor(name: str, spec: InputSpec) -> None:
    # A quantized model has the float model's mean and std; its quantization comes after them.
    tensor = ends(model(name).read_bytes())[0][0]
    found = pixels_with(name, spec)
    assert found.input.mean is not None
    ours, theirs = table_of_pixels(spec, tensor), table_of_pixels(found.input, tensor)
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mean", "std", "reason"),
    [(0.0, 1.0, "0..255 and the tensor holds 0..1"), (500.0, 255.0, "-1.96078..-0.960784 and the tensor holds 0..1")],
)
def test_numbers_that_do_not_belong_to_the_integers_are_left_out(mean: float, std: float, reason: str) -> None:
    found = pixels_with("pixels", InputSpec(kind="image", scale=1.0, mean=(mean,), std=(std,)))
    assert found.input == InputSpec(kind="image", color="rgb")
    assert reason in found.notes[0]
    tensor = ends(model("pixels").read_bytes())[0][0]
    np.testing.assert_array_equal(table_of_pixels(found.input, tensor)[0, 0, :, 0], np.arange(256))


def test_a_classifier_brings_its_labels_and_threshold() -> None:
    spec = OutputSpec(type="classification", threshold=0.5)
    found = said(by_others(written(model("digits").read_bytes(), output=spec, labels=DIGITS)))
    assert (found.output, found.labels) == (spec, DIGITS)
    assert (found.name, found.description, found.version, found.author) == ("thing", "finds things", "3", None)
    assert (found.outputs[0].name, found.outputs[0].axis_labels) == ("probabilities", "labels.txt")


def test_of_several_outputs_the_one_with_labels_holds_the_scores() -> None:
    data = written(
        model("two_by_two").read_bytes(), output=OutputSpec(type="classification", tensor="joined"), labels=DIGITS[:5]
    )
    found = said(by_others(data))
    assert (found.output.type, found.output.tensor, found.labels) == ("classification", "joined", DIGITS[:5])


@pytest.mark.parametrize("labels", [DIGITS[:9], (*DIGITS, "one more")])
def test_labels_that_do_not_fit_are_left_out_and_named(labels: tuple[str, ...]) -> None:
    found = said(by_others(written(model("digits").read_bytes(), labels=labels)))
    assert (found.output, found.labels) == (OutputSpec(), None)
    assert f"{len(labels)} labels of output 'probabilities' do not fit" in found.notes[0]


def test_a_detectors_outputs_are_known_by_name_in_whatever_order_they_come() -> None:
    found = said(
        by_others(written(model("detector").read_bytes(), input=PICTURE, output=DETECTION, labels=("cat", "dog")))
    )
    assert (found.input, found.output, found.labels) == (PICTURE, DETECTION, ("cat", "dog"))
    assert [facts.name for facts in found.outputs] == ["number of detections", "category", "location", "score"]


def test_boxes_in_another_order_are_not_taken_for_ours() -> None:
    data = by_others(written(model("detector").read_bytes(), output=DETECTION))
    order = struct.pack("<5I", 4, 1, 0, 3, 2)
    assert data.count(order) == 1
    found = said(data.replace(order, struct.pack("<5I", 4, 0, 1, 2, 3)))
    assert found.output == OutputSpec()
    assert "boxes are not said to be ymin" in found.notes[0]


def test_a_picture_that_is_no_picture_is_a_tensor() -> None:
    # The words are of a picture, the model takes [1, 4].
    picture = TensorSpec("x", "float32", (1, 8, 8, 3))
    scores = TensorSpec("scores", "float32", (1, 3))
    blob = Words("n", "d", "1", PICTURE, OutputSpec(), None, b"{}", (picture,), (scores,)).build()
    found = said(with_blob(written(model("linear").read_bytes()), by_others(blob)))
    assert (found.input, found.inputs[0].content) == (InputSpec(), "image")
    assert "said to be a picture, and is taken as a tensor" in found.notes[0]


def with_blob(data: bytes, blob: bytes) -> bytes:
    """Put other metadata into a file that has some at its end, without a ZIP."""
    start = data.rindex(b"M001") - 8
    assert len(data) == start + 4 + struct.unpack_from("<I", data, start)[0]
    return data[:start] + struct.pack("<I", len(blob)) + blob


def test_metadata_of_another_format_are_not_read() -> None:
    data = written(model("linear").read_bytes())
    assert read_metadata(data.replace(b"M001", b"M002")) is None


# The ZIP


def rezipped(data: bytes, build: Callable[[zipfile.ZipFile], None], relative: bool = False) -> bytes:
    """Replace the ZIP behind a file by another one."""
    bare = data[: data.index(b"PK\3\4")]
    stream = io.BytesIO()
    if not relative:
        stream.write(bare)
    with zipfile.ZipFile(stream, "a") as archive:
        build(archive)
    return bare + stream.getvalue() if relative else stream.getvalue()


LABELLED = OutputSpec(type="classification")


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_labels_are_read_however_the_archive_was_made(method: int, relative: bool) -> None:
    def build(archive: zipfile.ZipFile) -> None:
        archive.writestr("other.txt", "x" * 1000)
        archive.writestr("labels.txt", "\ufeff" + "\r\n".join(DIGITS) + "\r\n\r\n", method)
        archive.comment = b"a comment with PK\5\6 in it"

    data = by_others(written(model("digits").read_bytes(), output=LABELLED, labels=DIGITS))
    assert said(rezipped(data, build, relative)).labels == DIGITS


def test_labels_that_are_not_there_are_named() -> None:
    data = by_others(written(model("digits").read_bytes(), output=LABELLED, labels=DIGITS))
    found = said(data[: data.index(b"PK\3\4")])
    assert (found.labels, found.output) == (None, OutputSpec())
    assert "the model carries no files" in found.notes[0]
    found = said(rezipped(data, lambda archive: archive.writestr("other.txt", "x")))
    assert "'labels.txt' is not among the files" in found.notes[0]


@pytest.mark.parametrize(
    ("content", "method", "reason"),
    [
        (b"\xff\xfe\0\0", zipfile.ZIP_STORED, "codec can't decode"),
        (b"a\0b\n", zipfile.ZIP_STORED, "a character that no label has"),
        (b"a" * (4 * 1024 * 1024 + 1), zipfile.ZIP_DEFLATED, "4194304 at most are read"),
        (b"\n".join([b"a"] * 10), zipfile.ZIP_BZIP2, "is packed by method 12"),
    ],
)
def test_labels_that_are_none_are_left_out(content: bytes, method: int, reason: str) -> None:
    data = by_others(written(model("digits").read_bytes(), output=LABELLED, labels=DIGITS))
    found = said(rezipped(data, lambda archive: archive.writestr("labels.txt", content, method)))
    assert found.labels is None
    assert reason in found.notes[0]


def test_an_archive_that_lies_about_a_size_costs_no_more_than_it_says() -> None:
    data = by_others(written(model("digits").read_bytes(), output=LABELLED, labels=DIGITS))
    bomb = rezipped(data, lambda archive: archive.writestr("labels.txt", bytes(50_000_000), zipfile.ZIP_DEFLATED))
    # The directory says 100 bytes.
    at = bomb.rindex(b"PK\1\2") + 24
    bomb = bomb[:at] + struct.pack("<I", 100) + bomb[at + 4 :]
    tracemalloc.start()
    try:
        assert said(bomb).labels is None
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


# Writing


@pytest.mark.parametrize("name", ["digits", "detector", "two_by_two", "int8", "linear", "bare", "window", "any_size"])
def test_everything_that_the_manifest_says_comes_back(name: str) -> None:
    spec = InputSpec(
        kind="window",
        length=50,
        hop=10,
        channels=("ax", "größe"),
        rate_hz=10.0,
        mean=(0.1, 0.2),
        std=(1.5, 3.0),
        key="field",
        key_field="machine",
        timeout_s=1.5,
    )
    output = OutputSpec(type="classification", tensor="y", top_k=3, threshold=0.1, activation="softmax")
    labels = ("naïve", "", "three")
    found = said(written(model(name).read_bytes(), input=spec, output=output, labels=labels))
    assert (found.input, found.output, found.labels, found.notes) == (spec, output, labels, ())


def test_labels_that_no_file_can_hold_come_back_all_the_same() -> None:
    labels = ("two\nlines", "", " spaces ", "")
    found = said(written(model("linear").read_bytes(), labels=labels))
    assert (found.labels, found.output) == (labels, OutputSpec())


def test_a_list_of_labels_in_the_output_is_taken_too() -> None:
    found = said(written(model("digits").read_bytes(), output=OutputSpec(labels=DIGITS)))
    assert (found.labels, found.output.labels) == (DIGITS, None)


@pytest.mark.parametrize("name", ["linear", "int8", "detector", "digits", "pixels", "two_by_two", "motion"])
def test_the_model_computes_bit_for_bit_what_it_did(runtime: Runtime, tmp_path: Path, name: str) -> None:
    (tmp_path / "m.tflite").write_bytes(written(model(name).read_bytes(), input=PICTURE, labels=DIGITS))
    before, after = run(runtime, model(name)), run(runtime, tmp_path / "m.tflite")
    assert {key: array.tobytes() for key, array in before.items()} == {k: a.tobytes() for k, a in after.items()}


@pytest.mark.parametrize("name", ["linear", "digits", "detector", "bare"])
def test_nothing_else_in_the_file_changes(name: str) -> None:
    from ai_edge_litert import schema_py_generated as schema

    original = model(name).read_bytes()
    data = written(original, labels=DIGITS)
    before, after = schema.Model.GetRootAs(original, 0), schema.Model.GetRootAs(data, 0)
    count = before.BuffersLength()
    assert after.BuffersLength() == count + 1
    for number in range(count):
        old, new = before.Buffers(number), after.Buffers(number)
        assert old.DataLength() == new.DataLength()
        if old.DataLength():
            assert old.DataAsNumpy().tobytes() == new.DataAsNumpy().tobytes()
            assert address(new) % 16 == address(old) % 16
    assert address(after.Buffers(count)) % 16 == 0
    entries = [(after.Metadata(at).Name(), after.Metadata(at).Buffer()) for at in range(after.MetadataLength())]
    old_entries = [(before.Metadata(at).Name(), before.Metadata(at).Buffer()) for at in range(before.MetadataLength())]
    assert entries == [*old_entries, (b"TFLITE_METADATA", count)]
    for part in ("Version", "Description", "SubgraphsLength", "OperatorCodesLength", "SignatureDefsLength"):
        assert getattr(before, part)() == getattr(after, part)()
    # The old bytes are in the new file as they were.
    assert data.count(original[8:]) == 1


def address(buffer: Any) -> int:
    """Give the position of a buffer's first byte in its file."""
    table = buffer._tab
    return int(table.Vector(table.Offset(4)))


def test_the_archive_is_one_that_others_open(tmp_path: Path) -> None:
    data = written(model("digits").read_bytes(), labels=DIGITS)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert archive.read("labels.txt").decode() == "".join(f"{label}\n" for label in DIGITS)
        (member,) = archive.infolist()
        # Offsets count from the beginning of the whole file, as readers without a ZIP library want it.
        assert data[member.header_offset :].startswith(b"PK\3\4")
        assert (member.date_time, member.compress_type) == ((1980, 1, 1, 0, 0, 0), zipfile.ZIP_STORED)


def test_the_same_words_give_the_same_bytes_also_over_older_ones() -> None:
    original = model("digits").read_bytes()
    first = written(original, output=LABELLED, labels=DIGITS)
    assert written(original, output=LABELLED, labels=DIGITS) == first
    assert written(first, output=LABELLED, labels=DIGITS) == first
    other = written(first, name="another", input=PICTURE, labels=("a",) * 10)
    assert other == written(original, name="another", input=PICTURE, labels=("a",) * 10)
    assert written(other, labels=None) == written(original, labels=None)


def test_metadata_that_share_their_buffer_with_others_are_replaced_beside_it() -> None:
    # Both entries lead to one buffer: it stays for the other one.
    data = bytearray(written(model("linear").read_bytes(), name="first"))
    parsed = layout.open_model(ByteSource(bytes(data)))
    entry = parsed.tables(layout.MODEL_METADATA, 10)[0]
    place = entry.place(layout.METADATA_BUFFER)
    assert place is not None
    shared = layout.entries(parsed, "TFLITE_METADATA")[0][1]
    struct.pack_into("<I", data, place, shared)
    again = written(bytes(data), name="second")
    assert said(again).name == "second"
    renewed = layout.open_model(ByteSource(again))
    numbers = [table.whole(layout.METADATA_BUFFER, "I") for table in renewed.tables(layout.MODEL_METADATA, 10)]
    assert shared in numbers
    assert len(set(numbers)) == len(numbers)
    old = layout.buffer(renewed, shared).data(layout.BUFFER_DATA, 10**6)
    assert b"first" in old


def test_a_file_with_weights_behind_the_flatbuffer_is_left_as_it_is() -> None:
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    parsed = schema.ModelT.InitFromObj(schema.Model.GetRootAs(model("linear").read_bytes(), 0))
    parsed.buffers[-1].offset = 4096
    parsed.buffers[-1].size = 16
    builder = flatbuffers.Builder(1024)
    builder.Finish(parsed.Pack(builder), b"TFL3")
    data = bytes(builder.Output())
    assert written(data) is data


@pytest.mark.parametrize("data", [b"", b"no model", b"\xff\xff\xff\x7fTFL3" + bytes(50)])
def test_what_is_no_model_gets_no_metadata(data: bytes) -> None:
    with pytest.raises(ConversionError, match=r"no sound .tflite file"):
        write_metadata(
            data,
            name="",
            description="",
            input=InputSpec(),
            output=OutputSpec(),
            labels=None,
            inputs=(),
            outputs=(),
            version="",
        )


def test_a_pixel_scale_that_nothing_can_be_divided_by_is_left_to_our_own_entry() -> None:
    for spec in (
        InputSpec(kind="image", scale=0.0, size=(8, 8)),
        InputSpec(kind="image", scale=1e-300, size=(8, 8)),
        InputSpec(kind="image", std=(0.0,), size=(8, 8)),
        InputSpec(kind="image", mean=(1.0, 2.0, 3.0), std=(1.0, 2.0), size=(8, 8)),
    ):
        found = said(written(model("any_size").read_bytes(), input=spec))
        assert found.input == spec
        assert found.inputs[0] == TensorFacts(
            name="image",
            description="picture, float32 [1, any, any, 3]",
            content="image",
            color="rgb",
            size=(8, 8),
        )


# On the device


def test_a_bare_file_with_metadata_needs_no_configuration(runtime: Runtime, tmp_path: Path) -> None:
    file = tmp_path / "finder.tflite"
    file.write_bytes(
        by_others(written(model("detector").read_bytes(), input=PICTURE, output=DETECTION, labels=("cat", "dog")))
    )
    version = find(file)
    assert (version.name, version.version, version.variant, version.bundle) == ("finder", None, "file", None)
    engine = Engine.open(file, runtime=runtime)
    meaning = settle(version, engine, InputSpec(), OutputSpec(), tmp_path)
    assert (meaning.input, meaning.output, meaning.labels) == (PICTURE, DETECTION, ("cat", "dog"))
    meaning.decoder(engine)
    over = settle(version, engine, InputSpec(mean=(0.0,)), OutputSpec(labels=("x",), threshold=0.9), tmp_path)
    assert (over.input.mean, over.input.std, over.output.threshold, over.labels) == ((0.0,), (127.5,), 0.9, ("x",))


def test_a_serving_folder_without_a_manifest_has_metadata_too(tmp_path: Path) -> None:
    (tmp_path / "digits" / "4").mkdir(parents=True)
    data = written(model("digits").read_bytes(), output=LABELLED, labels=DIGITS)
    (tmp_path / "digits" / "4" / "model.tflite").write_bytes(data)
    assert find(tmp_path / "digits").labels == DIGITS


def test_what_was_left_out_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "m.tflite"
    file.write_bytes(by_others(written(model("digits").read_bytes(), labels=DIGITS[:3])))
    with caplog.at_level(logging.WARNING):
        find(file)
    assert f"{file}: 3 labels of output 'probabilities' do not fit its shape" in caplog.text


def test_damaged_metadata_stop_the_start_with_a_remedy(tmp_path: Path) -> None:
    data = bytearray(written(model("linear").read_bytes()))
    at = data.index(b"M001")
    struct.pack_into("<I", data, at - 4, 0x7FFFFFFF)
    (tmp_path / "m.tflite").write_bytes(data)
    with pytest.raises(ModelError, match=r"m.tflite: its metadata are damaged .*; copy the model again"):
        find(tmp_path / "m.tflite")


def with_entry(entry: bytes) -> bytes:
    """Give a file with these bytes as our own entry."""
    blob = Words("n", "d", "1", InputSpec(), OutputSpec(), None, entry, (), ()).build()
    return with_blob(written(model("linear").read_bytes()), blob)


@pytest.mark.parametrize(
    "entry", [b"{not json", b'{"format":1,"input":{"kind":7}}', b'{"format":1,"output":3}', b"[" * 9000]
)
def test_an_entry_of_ours_that_is_damaged_is_an_error(entry: bytes) -> None:
    with pytest.raises(ModelError, match="the entry EDGE_SERVE"):
        read_metadata(with_entry(entry))


@pytest.mark.parametrize("entry", [b"[1]", b'{"format":2}'])
def test_an_entry_of_a_later_format_is_left_out(entry: bytes) -> None:
    found = said(with_entry(entry))
    assert found.input == InputSpec()
    assert "has a format that this version does not read" in found.notes[0]


def test_an_entry_with_keys_of_a_later_version_is_read() -> None:
    found = said(with_entry(b'{"format":1,"input":{"kind":"image","sharpen":2}}'))
    assert found.input == InputSpec(kind="image")


def test_no_path_is_taken_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x\n")
    document = {"format": 1, "output": {"labels_file": str(tmp_path / "secret")}}
    blob = Words("n", "d", "1", InputSpec(), OutputSpec(), None, json.dumps(document).encode(), (), ()).build()
    found = said(with_blob(written(model("linear").read_bytes()), blob))
    assert (found.labels, found.output) == (None, OutputSpec())


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "large.tflite"
    file.write_bytes(written(model("linear").read_bytes()))
    os.truncate(file, 2_000_000_000)
    tracemalloc.start()
    try:
        assert read_metadata(file) is not None
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# Hostile files


def outcome(data: bytes) -> None:
    """Read, and let nothing through but an answer or the one kind of error."""
    try:
        found = read_metadata(data)
    except ModelError:
        return
    assert isinstance(found, Found | None)


def hostile() -> Sequence[bytes]:
    """Give the files that are spoilt below, with and without our own entry."""
    detector = written(model("detector").read_bytes(), input=PICTURE, output=DETECTION, labels=("cat", "dog"))
    linear = written(model("linear").read_bytes(), output=LABELLED, labels=("a", "b", "c"))
    return detector, by_others(detector), by_others(linear)


def interesting(data: bytes) -> range:
    """Give the places that are the writer's: the metadata and the archive."""
    return range(data.rindex(b"M001") - 12, len(data))


def with_numbers(data: bytes, values: Callable[[int], Sequence[int]]) -> Iterator[bytes]:
    """Give copies of a file in each of which one of the numbers of its head, metadata or archive is another."""
    for place in (*range(0, 400, 4), *range(interesting(data).start & ~3, len(data) - 4, 4)):
        for value in values(place):
            spoilt = bytearray(data)
            struct.pack_into("<I", spoilt, place, value)
            yield bytes(spoilt)


@pytest.mark.parametrize("number", [1, 2])
def test_any_number_in_the_wrong_place_is_survived(number: int) -> None:
    data = hostile()[number]
    for spoilt in with_numbers(data, lambda place: (0, 0xFF, 0xFFFF, 0x80000000, len(data) - place - 4)):
        outcome(spoilt)


def test_lengths_beyond_all_measure_cost_no_memory() -> None:
    tracemalloc.start()
    try:
        for spoilt in with_numbers(hostile()[2], lambda _: (0x7FFFFFFF, 0xFFFFFFFF)):
            outcome(spoilt)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("number", range(3))
def test_flipped_and_missing_bytes_are_survived(number: int) -> None:
    data = hostile()[number]
    rng = np.random.default_rng(number)
    places = np.array([*range(400), *interesting(data)])
    for _ in range(300):
        spoilt = bytearray(data)
        for place in rng.choice(places, rng.integers(1, 6)):
            spoilt[place] ^= 1 << int(rng.integers(8))
        outcome(bytes(spoilt))
        outcome(data[: int(rng.integers(len(data)))])
        outcome(rng.bytes(8) + bytes(spoilt)[8:])


def test_a_thousand_tables_that_share_one_long_text_cost_little() -> None:
    # Two hundred outputs whose names are one text of a megabyte.
    import flatbuffers

    builder = flatbuffers.Builder(1024)
    text = builder.CreateString("x" * 900_000)
    tensors = []
    for _ in range(200):
        builder.StartObject(7)
        builder.PrependUOffsetTRelativeSlot(0, text, 0)
        builder.PrependUOffsetTRelativeSlot(1, text, 0)
        tensors.append(builder.EndObject())
    builder.StartVector(4, len(tensors), 4)
    for tensor in tensors:
        builder.PrependUOffsetTRelative(tensor)
    vector = builder.EndVector()
    builder.StartObject(10)
    builder.PrependUOffsetTRelativeSlot(3, vector, 0)
    subgraph = builder.EndObject()
    builder.StartVector(4, 1, 4)
    builder.PrependUOffsetTRelative(subgraph)
    subgraphs = builder.EndVector()
    builder.StartObject(8)
    builder.PrependUOffsetTRelativeSlot(3, subgraphs, 0)
    builder.Finish(builder.EndObject(), b"M001")
    data = with_blob(written(model("linear").read_bytes()), bytes(builder.Output()))
    tracemalloc.start()
    try:
        assert len(said(data).outputs) == 200
        assert tracemalloc.get_traced_memory()[1] < 16_000_000
    finally:
        tracemalloc.stop()


def test_a_checksum_that_is_wrong_is_noticed() -> None:
    data = by_others(written(model("digits").read_bytes(), output=LABELLED, labels=DIGITS))
    wrong = data.replace(b"digit 7\n", b"digit 8\n")
    assert zlib.crc32(wrong) != zlib.crc32(data)
    assert "its length or checksum is wrong" in said(wrong).notes[0]
