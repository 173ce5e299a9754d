"""Recording: which inputs are chosen, what bounds it, and the file that comes of it."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve.bundle import TensorSpec
from edge_serve.capture import PENDING_BYTES, PENDING_SAMPLES, Order, Recorder
from edge_serve.errors import ProtocolError, UnavailableError, UsageError
from edge_serve.recording import Draft, Recording
from edge_serve.spec import InputSpec
from tests.unit.material import allocating_at_most

MIB = 1024 * 1024


def tensor(
    name: str,
    shape: tuple[int, ...],
    dtype: str = "float32",
    scale: float | None = None,
    zero_point: int | None = None,
) -> TensorSpec:
    """An input of a model."""
    return TensorSpec(name, dtype, shape, scale, zero_point)


def order(samples: int = 10, max_bytes: int = MIB, every: int | None = None, seed: int = 0) -> Order:
    """What is asked for."""
    return Order.read({"samples": samples, "max_bytes": max_bytes, "seconds": 1, "every": every, "seed": seed})


def recorder(*inputs: TensorSpec, **words: Any) -> Recorder:
    """A recorder for the inputs; [1, 1] float by default."""
    return Recorder({spec.name: spec for spec in inputs or (tensor("x", (1, 1)),)}, order(**words))


def number(value: float) -> dict[str, Any]:
    """An input of one number."""
    return {"x": np.array([[value]], np.float32)}


def taken(of: Recorder) -> Iterator[tuple[int, bytes]]:
    """Give all that waits."""
    while (sample := of.take(0)) is not None:
        yield sample


def described(of: Recorder) -> dict[str, Any]:
    """The layout as it travels."""
    assert of.layout is not None
    parts = [{"name": part.name, "dtype": part.dtype, "shape": list(part.shape)} for part in of.layout.parts]
    return {"parts": parts, "capacity": of.layout.capacity}


def recorded(of: Recorder, max_bytes: int = MIB) -> Recording:
    """What the other end has after all that waits was handed over."""
    recording = Recording(max_bytes)
    samples = list(taken(of))
    recording.begin(described(of))
    for slot, body in samples:
        recording.put({"slot": slot}, body)
    return recording


def arrays(recording: Recording) -> dict[str, Any]:
    """The arrays of the file."""
    stream = io.BytesIO()
    recording.write(stream)
    stream.seek(0)
    with np.load(stream, allow_pickle=False) as loaded:
        return dict(loaded.items())


def show(to: Recorder, values: range) -> dict[int, float]:
    """Show numbers, taking what was chosen at once; gives the last value of each slot."""
    slots: dict[int, float] = {}
    for value in values:
        to.offer(number(value))
        slots.update((slot, float(np.frombuffer(body, np.float32)[0])) for slot, body in taken(to))
    return slots


# The choice.


def test_every_input_has_the_same_chance_over_the_whole_time() -> None:
    chosen: Counter[int] = Counter()
    for seed in range(400):
        slots = show(recorder(samples=10, seed=seed), range(100))
        assert len(slots) == 10
        chosen.update(int(value) // 10 for value in slots.values())
    # 4000 choices over ten tenths of the time: 400 each, with a standard deviation of 18.
    assert all(320 < chosen[tenth] < 480 for tenth in range(10)), chosen


def test_the_choice_follows_from_the_seed() -> None:
    first, again, other = (show(recorder(seed=seed), range(500)) for seed in (1, 1, 2))
    assert first == again != other


def test_every_third_input_is_taken_until_there_are_enough() -> None:
    of = recorder(samples=4, every=3)
    slots = show(of, range(100))
    assert slots == {0: 0, 1: 3, 2: 6, 3: 9}
    assert of.full
    assert of.seen == 10, "what comes later is not looked at any more"


def test_a_choice_over_the_whole_time_is_never_full() -> None:
    of = recorder(samples=2)
    show(of, range(50))
    assert not of.full
    assert (of.seen, of.kept) == (50, 2)


# What is recorded.


def test_the_copy_is_of_the_moment_when_the_model_ran() -> None:
    of = recorder()
    shown = number(1)
    of.offer(shown)
    shown["x"][:] = 2
    assert arrays(recorded(of))["x"].tolist() == [[1]]


@pytest.mark.parametrize(("dtype", "zero_point"), [("int8", -3), ("uint8", 128), ("int16", 0)])
def test_quantized_values_become_real_ones(dtype: str, zero_point: int) -> None:
    of = recorder(tensor("x", (1, 5), dtype, 0.1, zero_point))
    quantized = np.array([[0, 1, 2, 100, 127]], dtype)
    of.offer({"x": quantized})
    (found,) = arrays(recorded(of)).values()
    assert found.dtype == np.float32
    assert found.tobytes() == ((quantized.astype(np.float32) - np.float32(zero_point)) * np.float32(0.1)).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "uint8", "bool"])
def test_what_is_not_quantized_stays_as_it_is(dtype: str) -> None:
    of = recorder(tensor("x", (1, 3), dtype))
    shown = np.array([[0, 1, 1]], dtype)
    of.offer({"x": shown})
    (found,) = arrays(recorded(of)).values()
    assert found.dtype == shown.dtype
    assert found.tobytes() == shown.tobytes()


@pytest.mark.parametrize(
    ("shape", "shown", "sample"),
    [
        ((1, 4), (1, 4), (4,)),
        ((-1, 4), (1, 4), (4,)),
        ((50, 6), (50, 6), (50, 6)),
        ((1,), (1,), ()),
        ((-1,), (7,), (7,)),
        ((), (), ()),
    ],
)
def test_the_batch_dimension_is_taken_away_where_there_is_one(
    shape: tuple[int, ...], shown: tuple[int, ...], sample: tuple[int, ...]
) -> None:
    of = recorder(tensor("x", shape))
    of.offer({"x": np.ones(shown, np.float32)})
    assert arrays(recorded(of))["x"].shape == (1, *sample)


def test_a_batch_is_as_many_samples() -> None:
    of = recorder(tensor("x", (-1, 2)), tensor("gain", (3,)), samples=5)
    of.offer({"x": np.arange(8, dtype=np.float32).reshape(4, 2), "gain": np.array([7, 8, 9], np.float32)})
    found = arrays(recorded(of))
    assert found["x"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert found["gain"].tolist() == [[7, 8, 9]] * 4


# What is left out, and counted.


def test_values_that_calibration_would_refuse_are_left_out() -> None:
    of = recorder(tensor("x", (1, 2)), every=1)
    for values in ([1, 2], [np.nan, 2], [3, np.inf], [4, 5]):
        of.offer({"x": np.array([values], np.float32)})
    assert arrays(recorded(of))["x"].tolist() == [[1, 2], [4, 5]]
    assert of.dropped == {"not_finite": 2}


def test_a_first_input_that_is_left_out_settles_nothing() -> None:
    of = recorder(tensor("x", (1, -1)))
    of.offer({"x": np.full((1, 2), np.nan, np.float32)})
    of.offer({"x": np.ones((1, 3), np.float32)})
    assert arrays(recorded(of))["x"].shape == (1, 3)


def test_other_shapes_than_the_first_are_left_out() -> None:
    of = recorder(tensor("image", (1, -1, -1, 3)))
    for side in (4, 5, 4):
        of.offer({"image": np.ones((1, side, side, 3), np.float32)})
    assert arrays(recorded(of))["image"].shape == (2, 4, 4, 3)
    assert of.dropped == {"shape": 1}


def test_batches_of_different_lengths_belong_to_no_common_sample() -> None:
    of = recorder(tensor("a", (-1, 2)), tensor("b", (-1, 2)))
    of.offer({"a": np.ones((3, 2), np.float32), "b": np.ones((2, 2), np.float32)})
    assert of.dropped == {"shape": 1}
    assert of.take(0) is None


def test_an_input_larger_than_the_bound_is_left_out() -> None:
    of = recorder(tensor("x", (1, 100)), max_bytes=399)
    of.offer({"x": np.ones((1, 100), np.float32)})
    assert of.dropped == {"too_large": 1}


def test_what_cannot_be_recorded_harms_nobody() -> None:
    of = recorder()
    of.offer({"y": np.ones((1, 1), np.float32)})  # no pipeline does this
    assert isinstance(of.error, KeyError)
    of.offer(number(1))
    assert of.take(0) is None


# Bounds.


def test_bytes_bound_how_many_are_kept_as_real_values() -> None:
    of = recorder(tensor("x", (1, 100), "int8", 1.0, 0), samples=1000, max_bytes=1000)
    for value in range(100):
        of.offer({"x": np.full((1, 100), value, np.int8)})
        list(taken(of))
    assert of.layout is not None
    assert of.layout.capacity == of.kept == 2, "100 int8 values are 400 bytes in the file"
    assert of.seen == 100


def test_what_nobody_takes_is_dropped_and_memory_stays_bounded() -> None:
    shown = {"x": np.ones((1, 64 * 1024), np.float32)}
    of = recorder(tensor("x", (1, 64 * 1024)), samples=1000, max_bytes=1024 * MIB, every=1)
    with allocating_at_most(PENDING_BYTES + 2 * MIB):
        for _ in range(200):
            of.offer(shown)
    waiting = PENDING_BYTES // (256 * 1024)
    assert of.dropped == {"behind": 200 - waiting}
    assert (len(list(taken(of))), of.kept, of.seen) == (waiting, waiting, waiting)
    of.offer(shown)
    assert of.kept == waiting + 1, "as soon as somebody takes them, it goes on"


def test_small_samples_are_bounded_by_their_number() -> None:
    of = recorder(samples=100_000, every=1)
    for value in range(PENDING_SAMPLES + 10):
        of.offer(number(value))
    assert of.dropped == {"behind": 10}
    assert len(list(taken(of))) == PENDING_SAMPLES


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("samples", 0), ("samples", 10**6), ("samples", 1.5), ("samples", True), ("samples", None), ("max_bytes", 2**31),
        ("seconds", -1), ("seconds", float("nan")), ("seconds", 10**7), ("every", 0), ("seed", -1), ("seed", "x"),
    ],
)  # fmt: skip
def test_requests_have_limits(name: str, value: Any) -> None:
    request = {"samples": 1, "max_bytes": 1, "seconds": 1, "seed": 1, name: value}
    with pytest.raises(UsageError, match=name):
        Order.read(request)


PARTS = [{"name": "x", "dtype": "float32", "shape": [2]}]


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"parts": [], "capacity": 1},
        {"parts": PARTS, "capacity": 0},
        {"parts": PARTS, "capacity": 10**9},
        {"parts": PARTS * 2, "capacity": 1},
        {"parts": [{**PARTS[0], "dtype": "object"}], "capacity": 1},
        {"parts": [{**PARTS[0], "shape": [-1]}], "capacity": 1},
        {"parts": [{**PARTS[0], "shape": [10**9, 10**9]}], "capacity": 1},
        {"parts": ["x"], "capacity": 1},
    ],
)
def test_a_service_cannot_make_the_other_end_take_more(header: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        Recording(MIB).begin(header)


@pytest.mark.parametrize(
    ("slot", "body"), [(0, b"\0" * 7), (0, None), (2, b"\0" * 8), (-1, b"\0" * 8), ("0", b"\0" * 8)]
)
def test_samples_that_fit_nowhere_are_refused(slot: Any, body: bytes | None) -> None:
    recording = Recording(MIB)
    with pytest.raises(ProtocolError):
        recording.put({"slot": 0}, b"\0" * 8)  # before anything was described
    recording.begin({"parts": PARTS, "capacity": 2})
    with pytest.raises(ProtocolError):
        recording.put({"slot": slot}, body)


# The file.


def two_inputs(samples: int = 40) -> Recording:
    """A recording of a model with the inputs a [1, 2] and b [1, 3]."""
    of = recorder(tensor("a", (1, 2)), tensor("b", (1, 3)), samples=samples)
    for value in range(samples):
        of.offer({"a": np.full((1, 2), value, np.float32), "b": np.full((1, 3), -value, np.float32)})
    return recorded(of)


def keep(path: Path, recording: Recording, *, force: bool = False) -> None:
    """Write a recording's file."""
    with Draft(path, force=force) as draft:
        draft.reserve(recording.nbytes)
        draft.keep(recording)


def test_the_converter_takes_the_file_as_it_is(tmp_path: Path) -> None:
    calibration = pytest.importorskip("edge_serve_converters.calibration")
    plan = pytest.importorskip("edge_serve_converters.plan")
    keep(tmp_path / "calibration.npz", two_inputs())
    inputs = (plan.InputPlan("a", "float32", (1, 2), True), plan.InputPlan("b", "float32", (1, 3), True))
    signature = plan.SignaturePlan("serving_default", inputs, {"total": "float32"})
    source = calibration.open_source(tmp_path / "calibration.npz", InputSpec())
    source.open(signature)  # checks names, shapes and numbers
    found = source.take(signature, np.array([3, 7]))
    assert found["a"].tolist() == [[3, 3], [7, 7]]
    assert found["b"].tolist() == [[-3, -3, -3], [-7, -7, -7]]


def test_equal_samples_make_equal_files_that_are_not_compressed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        keep(tmp_path / f"{name}.npz", two_inputs())
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.npz") as archive:
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    assert sorted(each.name for each in tmp_path.iterdir()) == ["one.npz", "two.npz"]


def test_an_existing_file_is_left_alone_unless_it_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match="--force"):
        Draft(path, force=False)
    assert path.read_bytes() == b"precious"
    keep(path, two_inputs(), force=True)
    with np.load(path) as loaded:
        assert sorted(loaded.files) == ["a", "b"]


def test_a_file_that_came_in_the_meantime_is_left_alone_and_the_samples_too(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with Draft(path, force=False) as draft:
        path.write_bytes(b"precious")
        with pytest.raises(UnavailableError, match=r"the samples are in .*\.part"):
            draft.keep(two_inputs())
    assert path.read_bytes() == b"precious"
    (saved,) = tmp_path.glob(".a.npz.*.part")
    with np.load(io.BytesIO(saved.read_bytes())) as loaded:
        assert len(loaded["a"]) == 40


@pytest.mark.parametrize("name", ["gone/a.npz", "file/a.npz", "folder.npz", "a.npy", "a", "x" * 300 + ".npz"])
def test_what_cannot_be_written_is_known_before_anything_is_recorded(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UsageError):
        Draft(tmp_path / name, force=False)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder.npz"]


def test_too_little_room_is_known_when_the_size_is(tmp_path: Path) -> None:
    with Draft(tmp_path / "a.npz", force=False) as draft, pytest.raises(UnavailableError, match="make room"):
        draft.reserve(2**60)
    assert not list(tmp_path.iterdir())


def test_a_draft_that_is_not_kept_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Draft(tmp_path / "a.npz", force=False):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_the_draft_of_a_killed_process_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / f".a.npz.{os.getpid()}.part").write_bytes(b"half")
    keep(tmp_path / "a.npz", two_inputs())
    assert [each.name for each in tmp_path.iterdir()] == ["a.npz"]


def test_the_layout_survives_its_way_over_the_wire() -> None:
    of = recorder(tensor("x", (1, 2, 3), "int8", 0.5, 1))
    of.offer({"x": np.ones((1, 2, 3), np.int8)})
    recording = Recording(MIB)
    assert recording.begin(json.loads(json.dumps(described(of)))) == of.layout
