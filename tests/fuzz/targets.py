"""What is fuzzed: each target takes any bytes, runs one reader of ours on them and checks what it promises.

A target raises nothing but AssertionError, and gives an answer that is the same each time for the same bytes. The tests feed
it with hypothesis (test_targets.py), scripts/fuzz with a coverage-guided fuzzer.
"""

from __future__ import annotations

import atexit
import functools
import json
import math
import os
import shutil
import socket
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import edge_serve.marks as mark_file
from edge_serve import bundle, capture, crash, framing, mqtt_packets, plugins, recording, topics
from edge_serve.bundle import Bundle, TensorSpec
from edge_serve.config import parse as parse_config
from edge_serve.control import Peer
from edge_serve.errors import BundleError, ConfigError, InputError, ModelError, ProtocolError, UsageError
from edge_serve.frame import Capture, Delivery, Frame, ModelInfo, Result, format_time, parse_time
from edge_serve.health import Counters
from edge_serve.mailbox import Mailbox
from edge_serve.model import choice
from edge_serve.model.engine import Engine
from edge_serve.model.interpreter import load_runtime
from edge_serve.model.metadata import read_metadata
from edge_serve.model.repository import find
from edge_serve.model.wish import Wish
from edge_serve.pipeline import Pipeline, Worker
from edge_serve.processing import tensor as tensors
from edge_serve.processing.decode import make_decoder
from edge_serve.processing.image import ImageProcessor
from edge_serve.processing.intake import SingleIntake
from edge_serve.processing.window import WindowIntake
from edge_serve.quarantine import Guard, Quarantine
from edge_serve.schema import compact
from edge_serve.sources.streams import JpegSplitter, LineSplitter
from edge_serve.spec import InputSpec, OutputSpec
from edge_serve.spool.segments import INLINE_LIMIT
from tests.unit.spool_files import Opened

Target = Callable[[bytes], object]
TARGETS: dict[str, Target] = {}

MODELS = Path(__file__).parents[1] / "data" / "models"
SMALL = 4096
MAX_PIXELS = 256 * 1024
WISH = Wish(find(MODELS / "linear.tflite"), None, (), None, 0, None)
CAPTURED = Capture(1_800_000_000.0, 1.0)
TYPES = (None, *tensors.KNOWN_TYPES, "application/json; charset=utf-8", "text/html")
INPUTS: tuple[dict[str, TensorSpec], ...] = (
    {"x": TensorSpec("x", "float32", (1, 4))},
    {"x": TensorSpec("x", "int8", (1, 2, 2, 1), 0.5, -3)},
    {"x": TensorSpec("x", "uint8", (1, 4), 0.1, 128)},
    {"x": TensorSpec("x", "float32", (-1, 3))},
    {"x": TensorSpec("x", "int32", (1, 2))},
    {"x": TensorSpec("x", "float16", (2, 2))},
    {"x": TensorSpec("x", "bool", (3,))},
    {"x": TensorSpec("x", "int64", ())},
    {"a": TensorSpec("a", "float32", (1, 2)), "b": TensorSpec("b", "int8", (1, 3), 1.0, 0)},
)


def target(function: Target) -> Target:
    """Add a target under its own name."""
    TARGETS[function.__name__] = function
    return function


def check(name: str, data: bytes) -> object:
    """Run a target; a warning is as bad as an exception: it would fill the log of a device."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return TARGETS[name](data)


def cut(data: bytes) -> tuple[int, bytes]:
    """Take the first byte as a choice, and give the rest."""
    return (data[0], data[1:]) if data else (0, b"")


def frame(payload: Any, content_type: str | None = None, **fields: Any) -> Frame:
    return Frame(
        **{"id": "f", "source": "s", "captured": CAPTURED, **fields}, content_type=content_type, payload=payload
    )


def shown(arrays: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in arrays.items()}


def fits(array: Any, spec: TensorSpec) -> bool:
    """Say whether an array is what the interpreter takes for a tensor."""
    shape = len(array.shape) == len(spec.shape) and all(
        want in (-1, have) for want, have in zip(spec.shape, array.shape, strict=True)
    )
    return shape and array.dtype == spec.dtype and array.flags.c_contiguous and array.size > 0


# Streams.


@target
def socket_framing(data: bytes) -> object:
    """The same bytes in any pieces are the same messages, or the same end; what is held is bounded."""

    def messages(step: int) -> tuple[list[Any], str]:
        reader = framing.Reader(max_payload=64, max_header=256)
        found: list[Any] = []
        try:
            for at in range(0, len(data), step):
                reader.feed(data[at : at + step])
                while (message := reader.next()) is not None:
                    found.append((json.dumps(message.header), message.body))
                    assert message.body is None or len(message.body) == message.header.get("length", 0) <= 64
                assert reader.buffered <= 256 + 64 + step
            reader.finish()
        except ProtocolError as error:
            return found, str(error)
        return found, ""

    whole, why = messages(max(1, len(data)))
    for step in (1, 7):
        pieces, also = messages(step)
        assert pieces == whole
        assert bool(also) == bool(why)
    for header, body in whole:
        if body is not None and len(header) < 200:
            # What was read can be said again.
            reader = framing.Reader()
            reader.feed(framing.encode(json.loads(header), body))
            again = reader.next()
            assert again is not None
            assert again.body == body
    return whole, why


@target
def streams(data: bytes) -> object:
    """Lines and pictures are the same in whatever pieces they come, and none is over the limit."""
    found = []
    for splitter in (LineSplitter, JpegSplitter):
        outcomes: list[list[bytes | str]] = []
        for step in (max(1, len(data)), 1, 5):
            part = splitter(SMALL)
            items = [item for at in range(0, len(data), step) for item in part.feed(data[at : at + step])]
            items += part.finish()
            assert all(
                0 < len(item) <= SMALL if isinstance(item, bytes) else isinstance(item, InputError) for item in items
            )
            outcomes.append([item if isinstance(item, bytes) else type(item).__name__ for item in items])
        assert outcomes[0] == outcomes[1] == outcomes[2]
        found.append(outcomes[0])
    return found


@target
def mqtt_packet(data: bytes) -> object:
    """A PUBLISH that was cut off at any place, in both versions, is a message or no packet."""
    flags, body = cut(data)
    found: list[str | None] = []
    for five in (False, True):
        try:
            message = mqtt_packets.read_publish(flags, body, 0, len(body), five=five, skipped=0)
        except mqtt_packets.MalformedError:
            found.append(None)
            continue
        assert message.size <= len(body)
        assert message.payload == b"" or body.endswith(message.payload)
        message.topic.encode()
        found.append(repr(message))
    return found


# Payloads.


@target
def tensor_payload(data: bytes) -> object:
    """Any payload of any content type gives arrays that fit the model's inputs, or an InputError."""
    which, payload = cut(data)
    inputs = INPUTS[which % len(INPUTS)]
    content_type = TYPES[which // len(INPUTS) % len(TYPES)]
    intake = SingleIntake(InputSpec(kind="tensor", id_field="id", time_field="time"), inputs)
    try:
        named, arrays, _ = intake.decode(frame(payload, content_type))
    except InputError as error:
        return str(error)
    assert set(arrays) == set(inputs)
    assert all(fits(arrays[name], spec) for name, spec in inputs.items())
    format_time(named.captured.utc)
    return shown(arrays)


@target
def npy(data: bytes) -> object:
    """A .npy array is as large as its bytes."""
    try:
        array = tensors.read_npy(data)
    except InputError as error:
        return type(error).__name__
    assert array.nbytes <= len(data)
    return array.dtype.str, array.shape, array.tobytes()


@target
def npz(data: bytes) -> object:
    """An .npz file unpacks to no more than its bound."""
    try:
        arrays = tensors.read_npz(data)
    except InputError as error:
        return type(error).__name__
    assert sum(array.nbytes for array in arrays.values()) <= tensors.MAX_NPZ_RATIO * len(data)
    return shown(arrays)


@functools.cache
def image_processors() -> tuple[ImageProcessor, ...]:
    """Give processors of every kind that there is."""
    made = []
    for resize in ("stretch", "fit", "crop"):
        for color, channels in (("rgb", 3), ("bgr", 3), ("gray", 1)):
            for dtype, scale, zero in (("uint8", None, None), ("float32", None, None), ("int8", 0.02, 3)):
                spec = InputSpec(kind="image", resize=resize, color=color, max_pixels=MAX_PIXELS)  # type: ignore[arg-type]
                made.append(ImageProcessor(spec, TensorSpec("x", dtype, (1, 8, 12, channels), scale, zero)))
    return tuple(made)


@target
def image(data: bytes) -> object:
    """Any bytes are a picture, which then fills the tensor, or an InputError; boxes stay inside the picture."""
    which, payload = cut(data)
    processor = image_processors()[which % len(image_processors())]
    try:
        array, geometry = processor.decode(payload)
    except InputError as error:
        return type(error).__name__
    assert fits(array, processor.tensor)
    assert geometry.width * geometry.height <= MAX_PIXELS
    x0, y0, x1, y1 = geometry.box(-1.0, 0.0, 0.5, 2.0)
    assert 0 <= x0 <= x1 <= geometry.width
    assert 0 <= y0 <= y1 <= geometry.height
    return shown({"x": array})


WINDOWS = (
    InputSpec(kind="window", hop=1, channels=("a", "b"), key_field="key", key="field", time_field="time"),
    InputSpec(kind="window", hop=2, mean=(1.0,), std=(2.0,), id_field="id"),
    InputSpec(kind="window", hop=5, key="none", max_keys=2),
    InputSpec(kind="window"),
)


@target
def window(data: bytes) -> object:
    """Samples of any kind are gathered or refused, each delivery is settled exactly once, each window is full."""
    which, rest = cut(data)
    spec = WINDOWS[which % len(WINDOWS)]
    tensor = TensorSpec("x", "int8", (1, 3, 2), 0.5, 1) if which & 4 else TensorSpec("x", "float32", (1, 3, 2))
    content_type = TYPES[which // 8 % len(TYPES)]
    counters = Counters()
    intake = WindowIntake(spec, {"x": tensor}, counters, 4 if which & 128 else None)
    settled: dict[int, int] = {}
    outcome: list[object] = []
    payloads = rest.split(b"\0\0")[:32]
    for number, payload in enumerate(payloads):
        settled[number] = 0

        def settle(_error: Exception | None, number: int = number) -> None:
            settled[number] += 1

        delivery = Delivery(frame(payload, content_type, meta={"key": f"k{number % 3}"}), settle)
        try:
            jobs = intake.feed(delivery)
        except InputError as error:
            settle(None)
            outcome.append(type(error).__name__)
            continue
        for job in jobs:
            assert fits(job.inputs["x"], tensor)
            assert job.window is not None
            format_time(job.window.start)
            outcome.append((job.frame.id, job.key, job.inputs["x"].tobytes()))
            job.settle(None)
    intake.tick(math.inf)
    intake.close(None)
    assert set(settled.values()) == {1}, settled
    return outcome


@functools.cache
def engine(name: str) -> Engine:
    """Give a model, open."""
    return Engine.open(MODELS / f"{name}.tflite", runtime=load_runtime(), delegate="none")


PIPELINES = (
    ("linear", OutputSpec(type="tensor"), InputSpec(kind="tensor", id_field="id", time_field="time")),
    ("linear", OutputSpec(type="classification", activation="softmax"), InputSpec(kind="tensor")),
    ("int8", OutputSpec(type="classification", activation="sigmoid", threshold=0.1), InputSpec(kind="tensor")),
    ("lookup", OutputSpec(type="tensor"), InputSpec(kind="tensor")),
    ("detector", OutputSpec(type="detection", threshold=0.0), InputSpec(kind="image", max_pixels=MAX_PIXELS)),
    ("dynamic", OutputSpec(type="tensor"), InputSpec(kind="tensor")),
)


class Collected:
    """A sink's runner as far as the worker sees it: it keeps what it is given, rendered."""

    def __init__(self) -> None:
        self.results: list[Result] = []

    def submit(self, result: Result, done: Callable[[Exception | None], None], *, wait: bool = True) -> None:
        json.loads(result.to_json(), parse_constant=_no_constant)
        self.results.append(result)
        done(None)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@target
def whole_pipeline(data: bytes) -> object:
    """Whatever a payload is, there is one result that JSON can hold, and the input is settled once as safe."""
    which, payload = cut(data)
    name, output, spec = PIPELINES[which % len(PIPELINES)]
    opened = engine(name)
    decode = make_decoder(output, opened.outputs, None, opened.detection_outputs)
    settled: list[Exception | None] = []
    sink = Collected()
    worker = Pipeline(
        "p",
        "d",
        output.type or "tensor",
        [
            Worker(
                opened,  # type: ignore[arg-type]  # a pipeline has one that may change its delegate
                SingleIntake(spec, opened.inputs),
                decode,
                Guard.unmarked(),
                ModelInfo(name, None, "file", "none", "serving_default"),
            )
        ],
        Mailbox("lossless", Counters()),
        [sink],  # type: ignore[list-item]  # all that the worker uses of a runner
        Counters(),
        _raise,
        error_payload_bytes=which,
    )
    delivery = Delivery(frame(payload, TYPES[which // len(PIPELINES) % len(TYPES)]), settled.append)
    worker._work(worker._first, delivery)
    assert settled == [None]
    (result,) = sink.results
    code = result.error.code if result.error is not None else None
    assert code in (None, "bad_input", "too_large", "inference_failed"), result.error
    return code, result.frame_id, repr(result.decoded)


def _raise(error: BaseException) -> None:
    raise AssertionError("the worker would end the service") from error


# Files and requests.


@functools.cache
def folder() -> Path:
    """Give a folder for files that targets need; it is empty between two runs."""
    made = tempfile.mkdtemp(prefix="edge-serve-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


@target
def configuration(data: bytes) -> object:
    """A configuration can be used, or every mistake of it is told with its key."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    try:
        config = parse_config(text, folder() / "edge-serve.toml", plugins.load)
    except ConfigError as error:
        problems = error.problems
    else:
        return repr(config.pipelines)
    assert problems
    return [str(problem).encode() for problem in problems]


@target
def manifest(data: bytes) -> object:
    """A manifest is a bundle whose files are inside its folder, or a BundleError; what was read can be written again."""
    place = folder() / "bundle"
    place.mkdir(exist_ok=True)
    (place / "manifest.json").write_bytes(data)
    (place / "model.tflite").write_bytes(b"model")
    try:
        opened = Bundle.open(place)
        opened.labels()
    except BundleError as error:
        str(error).encode(errors="surrogateescape")
        return str(error)
    for variant in opened.manifest.variants:
        assert opened.file(variant.file).resolve().is_relative_to(place.resolve())
    written = json.loads(opened.manifest.to_json())
    assert compact(bundle.parse_manifest(written, "again")) == compact(opened.manifest)
    return opened.manifest.to_json()


@target
def labels(data: bytes) -> object:
    """A list of labels has no line ends in it."""
    file = folder() / "labels.txt"
    file.write_bytes(data)
    try:
        found = bundle.read_labels(file)
    except BundleError as error:
        return type(error).__name__
    assert all("\n" not in label for label in found)
    return found


@target
def model_metadata(data: bytes) -> object:
    """What a .tflite file says of itself is read, or damaged; nothing of it is believed without a look."""
    try:
        found = read_metadata(data)
    except ModelError as error:
        return str(error)
    return repr(found)


@target
def control_request(data: bytes) -> object:
    """What comes to the control socket is a request with its numbers in bounds, or refused."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data[: 64 * 1024])
        theirs.shutdown(socket.SHUT_WR)
        try:
            request = Peer(ours, threading.Event()).request()
            order = capture.Order.read(request)
        except (ProtocolError, UsageError) as error:
            return type(error).__name__
    assert 1 <= order.samples <= capture.MAX_SAMPLES
    assert 1 <= order.max_bytes <= capture.MAX_BYTES
    return repr(order)


@target
def recorded_samples(data: bytes) -> object:
    """What a service tells a recorder is taken within the bounds that were asked for, or refused."""
    kept = recording.Recording(SMALL)
    reader = framing.Reader(SMALL)
    reader.feed(data)
    try:
        while (message := reader.next()) is not None:
            if kept.layout is None:
                kept.begin(message.header)
            else:
                kept.put(message.header, message.body)
            assert kept.nbytes <= SMALL
    except ProtocolError as error:
        return type(error).__name__
    return len(kept)


@target
def marks(data: bytes) -> object:
    """Whatever the file of marks holds, a worker goes on, and nobody is quarantined by chance."""
    place = folder() / "marks"
    place.mkdir(exist_ok=True)
    which, rest = cut(data)
    if which % 2:
        fresh = Quarantine.open(place)
        whole = bytearray((place / mark_file.FILE).read_bytes())
        fresh.close()
        at = mark_file.STRIKES_AT + int.from_bytes(rest[:2], "little") % (mark_file.SIZE - mark_file.STRIKES_AT)
        whole[at : at + len(rest)] = rest
        rest = bytes(whole[: mark_file.SIZE])
    (place / mark_file.FILE).write_bytes(rest)
    (place / crash.FILE).write_bytes(data)
    opened = Quarantine.open(place)
    guard = opened.guard("p", place, ("xnnpack", "none"))
    guard.attach()
    guard.enter("id", data)
    guard.leave()
    opened.close()
    return len(opened.strikes) <= mark_file.STRIKES


LARGE = "large"
SPOOLED = {f"f{number}": b'{"id": "f%d"}' % number for number in range(60)} | {LARGE: b"x" * (INLINE_LIMIT + 1)}


@functools.cache
def spooled() -> dict[str, bytes]:
    """Give the files of a spool that was open when its process was killed: its database, its log, a segment."""
    place = folder() / "filled"
    with Opened(place) as made:
        for identity, body in SPOOLED.items():
            made.put(identity, body)
        made.settled(*SPOOLED)
        return {str(each.relative_to(place)): each.read_bytes() for each in sorted(place.rglob("*")) if each.is_file()}


@target
def spool_files(data: bytes) -> object:
    """Whatever a disk made of the spool's files, what comes out is what went in, and the spool goes on."""
    which, rest = cut(data)
    place = folder() / "damaged"
    files = dict(spooled())
    name = sorted(files)[which % len(files)]
    found = bytearray(files[name])
    if which & 0x40:
        found = bytearray(rest)
    for at in range(0, len(rest) - 3 if found else 0, 4):
        found[int.from_bytes(rest[at : at + 3], "little") % len(found)] = rest[at + 3]
    if which & 0x80:
        del found[int.from_bytes(rest[:3], "little") % (len(found) + 1) :]
    files[name] = bytes(found)
    try:
        for path, content in files.items():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_bytes(content)
        with Opened(place) as made:
            rows = [row.content for row in made.drain()]
            assert all(SPOOLED.get(row.frame_id) == row.body for row in rows)
            assert len({row.frame_id for row in rows}) == len(rows)
            made.fill("new")
            assert made.ids() == ["new"]
        return sorted(row.frame_id for row in rows)
    finally:
        shutil.rmtree(place, ignore_errors=True)


@target
def remembered_choice(data: bytes) -> object:
    """A file of choices that is damaged gives none, or one that runs this model's own file."""
    (folder() / choice.FILE).write_bytes(data)
    kept = choice._recall(folder(), "key", WISH, [])
    assert kept is None or {each.file for each in kept.line} == {WISH.version.file}
    told = choice.reasons(folder(), WISH.version.file)
    assert all(isinstance(each, str) for lines in told for each in lines)
    return kept, told


@target
def texts(data: bytes) -> object:
    """Times, topics and topic filters from outside are read or refused."""
    text = data.decode(errors="replace")
    try:
        when: float | None = parse_time(text)
    except (ValueError, OverflowError):
        when = None
    if when is not None:
        assert abs(parse_time(format_time(when)) - when) < 1e-4  # as far as a float goes in the year 9999
    problem = topics.filter_problem(text)
    if problem is None and not any(wild in text for wild in "+#"):
        assert text.startswith("$share/") or topics.topic_matches(text, text)
    return when, problem, topics.topic_matches(text, "a/b")


@target
def numbers(data: bytes) -> object:
    """Arrays of any numbers are quantized without a warning, into the tensor's range."""
    which, rest = cut(data)
    spec = INPUTS[which % len(INPUTS)]
    name, tensor = next(iter(spec.items()))
    dtype = np.dtype(("float32", "float64", "int16", "uint64", "float16", "bool", ">i4")[which // len(INPUTS) % 7])
    usable = len(rest) // dtype.itemsize * dtype.itemsize
    values = np.frombuffer(rest[:usable], dtype)
    try:
        array = tensors.fit(values, tensor)
    except InputError as error:
        return type(error).__name__
    assert fits(array, tensor), name
    return shown({name: array})
