"""Intake: any payload to the model's inputs, ids and times from documents, and what a pipeline's words mean together."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve.errors import InputError, ModelError
from edge_serve.frame import Frame
from edge_serve.health import Counters
from edge_serve.model.engine import Engine
from edge_serve.model.interpreter import Runtime
from edge_serve.model.repository import find
from edge_serve.processing.intake import MAX_ID_LENGTH, SingleIntake, labelled, read_time
from edge_serve.processing.setup import Meaning, model_info, settle
from edge_serve.processing.window import WindowIntake
from edge_serve.spec import InputSpec, OutputSpec
from tests.unit.material import Settled, bundle, encoded, frame, model, plain, tensor

IMAGE = {"image": tensor((1, 8, 8, 3), "uint8", 1 / 255, 0, "image")}
VECTOR = {"x": tensor((1, 4))}
PNG = encoded(plain(20, 10, (9, 9, 9)), "PNG")
JPEG = encoded(plain(20, 10, (9, 9, 9)), "JPEG")


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def intake(inputs: Any = None, **options: Any) -> SingleIntake:
    return SingleIntake(InputSpec(**options), VECTOR if inputs is None else inputs)


def test_one_payload_is_one_job_that_settles_its_delivery() -> None:
    settled = Settled()
    (job,) = intake().feed(settled.delivery(b"[1, 2, 3, 4]"))
    assert job.inputs["x"].tolist() == [[1, 2, 3, 4]]
    assert (job.geometry, job.window, job.key, job.frame.id) == (None, None, None, "0")
    job.settle(None)
    assert settled.outcomes == {0: None}


def test_a_bad_payload_is_refused_and_left_to_the_caller_to_settle() -> None:
    settled = Settled()
    with pytest.raises(InputError):
        intake().feed(settled.delivery(b"[1]"))
    assert settled.outcomes == {}


def test_an_image_pipeline_takes_pictures_arrays_of_pixels_and_whole_tensors() -> None:
    pictures = intake(IMAGE, kind="image")
    pixels = np.full((10, 20, 3), 9, np.uint8)
    for payload in (PNG, JPEG, npy(pixels), pixels):
        (job,) = pictures.feed(Settled().delivery(payload))
        assert job.inputs["image"].tolist() == np.full((1, 8, 8, 3), 9).tolist()
        assert job.geometry is not None
        assert (job.geometry.width, job.geometry.height) == (20, 10)
    whole = np.full((1, 8, 8, 3), 7, np.uint8)
    for form in (whole, npy(whole), whole.tobytes()):
        (job,) = pictures.feed(Settled().delivery(form))
        assert job.inputs["image"].tolist() == whole.tolist()


def test_json_in_an_image_pipeline_is_a_tensor_of_real_values() -> None:
    (job,) = intake(IMAGE, kind="image").feed(Settled().delivery(json.dumps(np.ones((8, 8, 3)).tolist()).encode()))
    assert (job.inputs["image"] == 255).all()


@pytest.mark.parametrize("kind", [None, "image/png", "image/jpeg"])
def test_a_picture_is_known_by_its_bytes_whatever_kind_of_picture_it_is_called(kind: str | None) -> None:
    (job,) = intake(IMAGE, kind="image").feed(Settled().delivery(PNG, kind))
    assert job.geometry is not None


@pytest.mark.parametrize(
    ("payload", "kind", "says"),
    [
        (
            b"not a picture",
            None,
            "payload is no JPEG or PNG image, and no raw tensor either: input 'image' takes 192 bytes",
        ),
        (b"", None, "payload is no JPEG or PNG image"),
        (b"GIF89a", "image/gif", "content type 'image/gif' is not supported"),
        (b"[1]", None, "input 'image' takes shape"),
        (b"1,2", "text/csv", "text/csv does not fit this pipeline"),
        (PNG[:50], None, "image is damaged"),
        (b"text", "image/png", "payload is not a JPEG or PNG image"),
    ],
)
def test_what_an_image_pipeline_cannot_take_is_named(payload: bytes, kind: str | None, says: str) -> None:
    with pytest.raises(InputError, match=says):
        intake(IMAGE, kind="image").feed(Settled().delivery(payload, kind))


def test_a_picture_for_a_model_of_tensors_is_refused() -> None:
    with pytest.raises(InputError, match=r"image/png does not fit this pipeline: its model takes tensors \(x: float32"):
        intake().feed(Settled().delivery(PNG))


def test_payloads_without_a_type_are_what_the_configuration_says() -> None:
    (job,) = intake(content_type="application/octet-stream").feed(Settled().delivery(b"[1234567 " + bytes(7)))
    assert job.inputs["x"].shape == (1, 4)


def test_an_image_pipeline_needs_a_model_with_one_input() -> None:
    with pytest.raises(ModelError, match="kind = image takes a model with one input; this one has image, x"):
        intake({**IMAGE, **VECTOR}, kind="image")


def test_nothing_waits_in_a_pipeline_without_windows() -> None:
    single = intake(IMAGE, kind="image")
    single.warm()
    single.tick(1e9)
    single.close(None)


# Ids and times in documents.


def named(document: Any, **fields: Any) -> Frame:
    return labelled(frame(b"", id="outer"), document, InputSpec(**fields))


def test_a_document_may_say_its_id() -> None:
    assert named({"n": "a-1"}, id_field="n").id == "a-1"
    assert named({"n": 17}, id_field="n").id == "17"
    assert named({"n": "größe 読"}, id_field="n").id == "größe 読"


@pytest.mark.parametrize("document", [[], 5, {"m": 1}, {}])
def test_a_document_without_the_field_keeps_the_frames_own_id(document: Any) -> None:
    assert named(document, id_field="n", time_field="t").id == "outer"


@pytest.mark.parametrize("value", [None, True, 1.5, [], {}, "x" * (MAX_ID_LENGTH + 1), "a\0b", "\ud800"])
def test_an_id_that_could_not_travel_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"'n' \(the frame's id\) must be text or a whole number of at most 256"):
        named({"n": value}, id_field="n")


@pytest.mark.parametrize("value", ["1970-01-01T00:01:40Z", 100, 100.0])
def test_a_document_may_say_its_time(value: Any) -> None:
    captured = named({"t": value}, time_field="t").captured
    assert (captured.utc, captured.by) == (100.0, "producer")


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        [],
        "",
        "now",
        "2026-01-01",
        "0001-01-01T00:00:00+23:59",
        -1,
        -0.001,
        253402300800,
        float("nan"),
        float("inf"),
        10**400,
    ],
)
def test_a_time_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="'t'"):
        read_time(value, "t")


# What it all means together.


def meaning(
    runtime: Runtime, path: Path, over_input: InputSpec | None = None, over_output: OutputSpec | None = None
) -> tuple[Engine, Meaning]:
    version = find(path)
    engine = Engine.open(version.file, runtime=runtime)
    return engine, settle(version, engine, over_input or InputSpec(), over_output or OutputSpec(), path.parent)


def test_the_tensors_say_whether_a_model_sees_pictures(runtime: Runtime) -> None:
    kinds = {
        name: meaning(runtime, model(name))[1].input.kind
        for name in ("pixels", "gray", "linear", "window", "two_by_two")
    }
    assert kinds == {"pixels": "image", "gray": "image", "linear": "tensor", "window": "tensor", "two_by_two": "tensor"}


def test_labels_make_a_classifier_and_the_operator_a_detector(runtime: Runtime, tmp_path: Path) -> None:
    assert meaning(runtime, model("linear"))[1].output.type == "tensor"
    labels = OutputSpec(labels=("a", "b", "c"))
    assert meaning(runtime, model("linear"), over_output=labels)[1].output.type == "classification"
    assert meaning(runtime, model("detector"))[1].output.type == "detection"
    assert (
        meaning(runtime, bundle(tmp_path / "m", output={"labels": ["a", "b", "c"]}))[1].output.type == "classification"
    )


def test_the_configurations_words_stand_over_the_bundles_and_leave_the_others(runtime: Runtime, tmp_path: Path) -> None:
    path = bundle(
        tmp_path / "m",
        input={"kind": "tensor", "content_type": "application/json"},
        output={"type": "classification", "labels": ["a", "b", "c"], "top_k": 2},
    )
    _, found = meaning(runtime, path, InputSpec(content_type="text/csv"), OutputSpec(labels=("x", "y", "z")))
    assert (found.input.kind, found.input.content_type) == ("tensor", "text/csv")
    assert (found.output.type, found.output.top_k, found.labels) == ("classification", 2, ("x", "y", "z"))


def test_a_labels_file_is_relative_to_the_configuration(runtime: Runtime, tmp_path: Path) -> None:
    version = find(model("linear"))
    engine = Engine.open(version.file, runtime=runtime)
    (tmp_path / "l.txt").write_text("a\nb\nc\n", encoding="utf-8")
    found = settle(version, engine, InputSpec(), OutputSpec(labels_file="l.txt"), tmp_path)
    assert found.labels == ("a", "b", "c")
    with pytest.raises(ModelError, match=r"none.txt: labels cannot be read"):
        settle(version, engine, InputSpec(), OutputSpec(labels_file="none.txt"), tmp_path)


def test_labels_that_are_too_few_are_refused_when_the_decoder_is_made(runtime: Runtime) -> None:
    engine, found = meaning(runtime, model("linear"), over_output=OutputSpec(labels=("a", "b")))
    with pytest.raises(ModelError, match="2 labels for the 3 classes of output 'scores'"):
        found.decoder(engine)


def test_windows_get_their_own_intake(runtime: Runtime) -> None:
    engine, found = meaning(runtime, model("window"), InputSpec(kind="window", hop=5))
    windows = found.intake(engine, Counters(), None)
    assert isinstance(windows, WindowIntake)
    assert (windows.length, windows.channels, windows.hop) == (10, 3, 5)


def test_a_batch_is_refused_before_the_model_runs_unless_tensors_are_what_is_asked_for(runtime: Runtime) -> None:
    batch = npy(np.ones((5, 3), np.float32))
    engine, found = meaning(runtime, model("dynamic"), over_output=OutputSpec(type="classification"))
    with pytest.raises(InputError, match=r"takes shape \[1, 3\]"):
        found.intake(engine, Counters(), None).feed(Settled().delivery(batch))
    engine, found = meaning(runtime, model("dynamic"))
    (job,) = found.intake(engine, Counters(), None).feed(Settled().delivery(batch))
    assert engine.run(job.inputs)["logs"].shape == (5, 3)


def test_a_result_names_the_model_that_made_it(runtime: Runtime, tmp_path: Path) -> None:
    version = find(bundle(tmp_path / "bearing", 7))
    info = model_info(version, Engine.open(version.file, runtime=runtime, delegate="none"))
    assert (info.name, info.version, info.variant, info.delegate, info.signature) == (
        "bearing",
        7,
        "float32",
        "none",
        "serving_default",
    )


@pytest.mark.parametrize("name", ["linear", "int8", "two_by_two", "counts", "votes"])
def test_the_whole_way_from_payload_to_result(runtime: Runtime, name: str) -> None:
    engine, found = meaning(runtime, model(name))
    decode, single = found.decoder(engine), found.intake(engine, Counters(), None)
    payload = json.dumps({key: np.ones(spec.shape).tolist() for key, spec in engine.inputs.items()}).encode()
    (job,) = single.feed(Settled().delivery(payload))
    body = decode(engine.run(job.inputs), job.geometry)
    assert set(body["tensors"]) == set(engine.outputs)
    json.dumps(body, allow_nan=False)
