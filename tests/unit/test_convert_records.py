"""TFRecord files as calibration data: what is decoded, that every damaged byte is found, and which record is to blame."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec
from edge_serve_converters import example as examples
from edge_serve_converters.calibration import Warnings, draw, open_source
from edge_serve_converters.plan import InputPlan, SignaturePlan
from edge_serve_converters.record_framing import framed
from edge_serve_converters.tfrecord import RecordFile
from tests.unit.calibration_files import PAIR, PHOTO, VECTOR, drawn, example, refused, tfrecord
from tests.unit.material import encoded, noise

# Written by TensorFlow 2.21: {"label": int64 [-1, 300], "x": float [1, -2.5, 3, 0.125]}.
FROM_TENSORFLOW = bytes.fromhex(
    "3800000000000000a3797d570a360a190a056c6162656c12101a0e0a0cffffffffffffffffff01ac02"
    "0a190a0178121412120a100000803f000020c0000040400000003e7dec2a81"
)


def numbers(count: int) -> list[dict[str, Any]]:
    """Records whose first value is their number."""
    return [{"x": np.array([number, 0.5, number % 7, -1.0])} for number in range(count)]


def test_what_tensorflow_wrote_is_read(tmp_path: Path) -> None:
    (tmp_path / "one.tfrecord").write_bytes(FROM_TENSORFLOW)
    [(number, record)] = RecordFile(tmp_path / "one.tfrecord").read([0])
    features = {name: examples.decode(feature) for name, feature in examples.features(record).items()}
    assert number == 0
    np.testing.assert_array_equal(features["label"], [-1, 300])
    np.testing.assert_array_equal(features["x"], [1, -2.5, 3, 0.125])


def test_numbers_that_are_not_packed_are_read_too() -> None:
    floats = bytes((0x12, 10, 0x0D, 0, 0, 0x80, 0x3F, 0x0D, 0, 0, 0, 0x40))
    np.testing.assert_array_equal(examples.decode(memoryview(floats)), [1, 2])
    integers = bytes((0x1A, 5, 0x08, 1, 0x08, 0xAC, 0x02))
    np.testing.assert_array_equal(examples.decode(memoryview(integers)), [1, 300])


@pytest.mark.parametrize("name", ["data.tfrecord", "data.tfrecords", "data.tfrecord.gz"])
def test_samples_are_the_features_named_after_the_inputs(tmp_path: Path, name: str) -> None:
    records = [{"x": row["x"], "index": number} for number, row in enumerate(numbers(50))]
    data = drawn(tfrecord(tmp_path / name, records), PAIR)
    assert data.calibration["x"].shape == (40, 1, 4)
    np.testing.assert_array_equal(data.calibration["index"].ravel(), data.calibration["x"][:, 0, 0])
    both = np.concatenate([data.calibration["index"], data.held_back["index"]]).ravel().tolist()
    assert sorted(both) == list(range(50))


def test_a_gzipped_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    plain = tfrecord(tmp_path / "plain.tfrecord", numbers(30))
    packed = tmp_path / "packed.tfrecord"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    first, second = (drawn(path, VECTOR).calibration["x"] for path in (plain, packed))
    np.testing.assert_array_equal(first, second)


def test_the_only_list_of_numbers_serves_a_model_with_one_input(tmp_path: Path) -> None:
    records = [{"values": row["x"], "label": 1, "name": "a"} for row in numbers(20)]
    assert drawn(tfrecord(tmp_path / "a.tfrecord", records), VECTOR).calibration["x"].shape == (16, 1, 4)
    two = [{"values": row["x"], "others": row["x"]} for row in numbers(20)]
    assert "its records have the features values, others, none is named 'x'" in refused(
        tfrecord(tmp_path / "b.tfrecord", two), VECTOR
    )


def test_a_folder_of_shards_is_one_set_of_data(tmp_path: Path) -> None:
    rows = numbers(30)
    for shard in range(3):
        tfrecord(tmp_path / f"train.tfrecord-{shard:05}-of-00003", rows[shard * 10 : shard * 10 + 10])
    data = drawn(tmp_path, VECTOR)
    values = np.concatenate([data.calibration["x"], data.held_back["x"]])[:, 0, 0]
    assert sorted(values.tolist()) == list(range(30))


def test_pictures_in_records_are_processed_as_on_the_device(tmp_path: Path) -> None:
    records = []
    for number in range(20):
        picture = Image.new("RGB", (40, 30), (number, 100, 200))
        records.append({"encoded": encoded(picture, "PNG"), "file": f"{number}.png", "height": 30, "width": 40})
    path = tfrecord(tmp_path / "photos.tfrecord", records)
    assert "feature 'encoded' holds pictures, none is named 'photo': say --kind image" in refused(path, PHOTO)
    photo = drawn(path, PHOTO, InputSpec(kind="image", mean=(0.5,), std=(0.5,))).calibration["photo"][0, 0]
    assert photo.shape == (6, 8, 3)
    np.testing.assert_allclose(photo[0, 0, 1:], (np.array([100, 200]) / 255 - 0.5) / 0.5, atol=1e-6)


def test_byte_strings_are_raw_tensors_where_the_input_is_no_picture(tmp_path: Path) -> None:
    records = [{"x": np.arange(4, dtype="<f4").tobytes()} for _ in range(19)]
    data = drawn(tfrecord(tmp_path / "a.tfrecord", [*records, {"x": bytes(16)}]), VECTOR)
    np.testing.assert_array_equal(np.unique(data.calibration["x"]), np.arange(4))
    assert "holds 15 bytes; input 'x' of shape [1, 4] takes 16" in refused(
        tfrecord(tmp_path / "b.tfrecord", [{"x": bytes(15)}] * 9), VECTOR
    )
    photos = [{"x": encoded(noise(4, 4), "PNG")}] * 9
    assert "say --kind image" in refused(tfrecord(tmp_path / "c.tfrecord", photos), VECTOR)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"x": np.array([1.0, 2.0])}, "holds 2 numbers; input 'x' of shape [1, 4] takes 4"),
        ({"x": np.array([1.0, np.nan, 0, 0])}, "holds NaN or infinite values"),
        ({"y": np.zeros(4)}, "has no feature 'x'; it has: y"),
        ({"x": b"text"}, "holds 4 bytes"),
    ],
)
def test_a_record_that_does_not_fit_is_named(tmp_path: Path, bad: dict[str, Any], words: str) -> None:
    rows = numbers(10)
    rows[7] = bad
    text = refused(tfrecord(tmp_path / "data.tfrecord", rows), VECTOR)
    assert "data.tfrecord, record 7" in text
    assert words in text


def test_pictures_that_are_none_are_named(tmp_path: Path) -> None:
    records = [{"photo": encoded(noise(8, 6), "PNG")} for _ in range(9)]
    records[3] = {"photo": b"\x89PNG\r\n\x1a\n and no more"}
    text = refused(tfrecord(tmp_path / "data.tfrecord", records), PHOTO, InputSpec(kind="image"))
    assert "record 3" in text


def test_every_flipped_byte_of_a_file_is_found(tmp_path: Path) -> None:
    content = framed(example(x=np.arange(4.0))) * 3
    path = tmp_path / "data.tfrecord"
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="record"):
            list(RecordFile(path).read([0, 1, 2]))


def test_every_cut_of_a_file_is_found(tmp_path: Path) -> None:
    content = framed(example(x=np.arange(4.0))) * 2
    path = tmp_path / "data.tfrecord"
    for end in range(1, len(content)):
        path.write_bytes(content[:end])
        if end == len(content) // 2:
            assert len(RecordFile(path)) == 1
            continue
        with pytest.raises(UsageError, match="ends within it"):
            RecordFile(path)


def test_every_cut_of_a_gzipped_file_is_found(tmp_path: Path) -> None:
    content = gzip.compress(framed(example(x=np.arange(4.0))) * 2)
    path = tmp_path / "data.tfrecord.gz"
    for end in range(1, len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(UsageError, match=r"data\.tfrecord\.gz"):
            RecordFile(path)


def test_bytes_that_are_no_example_end_in_a_refusal_whatever_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    whole = example(x=np.arange(4.0), n=np.arange(300), s="text")
    for _ in range(3000):
        record = bytearray(whole)
        for place in rng.integers(0, len(record), rng.integers(1, 4)):
            record[place] = rng.integers(0, 256)
        del record[rng.integers(1, len(record) + 1) :]
        try:
            for feature in examples.features(bytes(record)).values():
                examples.decode(feature)
        except ValueError:
            continue


def test_no_records_and_no_examples_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.tfrecord"
    path.write_bytes(b"")
    assert "holds no records" in refused(path, VECTOR)
    path.write_bytes(b"this is text and no record, long enough for a header")
    assert "is no TFRecord file" in refused(path, VECTOR)
    path.write_bytes(framed(b"this is text and no example") * 9)
    assert "record 0: is no tf.train.Example" in refused(path, VECTOR)


def test_only_the_drawn_records_are_held_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    signature = SignaturePlan("s", (InputPlan("x", "float32", (1, 50_000), True),), {})
    record = framed(example(x=np.arange(50_000, dtype=np.float64)))
    path = tmp_path / "data.tfrecord"
    path.write_bytes(record * 200)  # 40 MB
    tracemalloc.start()
    draw(open_source(path, InputSpec()), signature, samples=8, seed=0, warnings=Warnings())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6


def test_the_fingerprint_is_of_the_records_that_were_drawn(tmp_path: Path) -> None:
    prints = []
    for change in (0.0, 0.0, 1.0):
        rows = numbers(20)
        rows[5]["x"][1] += change
        source = open_source(tfrecord(tmp_path / "data.tfrecord", rows), InputSpec())
        draw(source, VECTOR, samples=100, seed=0, warnings=Warnings())
        prints.append(source.fingerprint())
    assert prints[0] == prints[1] != prints[2]
