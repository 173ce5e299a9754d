"""Output tensors become results: the best classes, objects in input pixels, or the tensors themselves."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import numpy as np
import pytest

from edge_serve.bundle import TensorSpec
from edge_serve.errors import InputError, ModelError
from edge_serve.model.engine import Engine
from edge_serve.model.interpreter import Runtime
from edge_serve.processing.decode import make_decoder, render_tensors
from edge_serve.processing.image import Geometry, ImageProcessor
from edge_serve.spec import InputSpec, OutputSpec
from tests.unit.material import encoded, model, plain, tensor

SCORES = {"scores": tensor((1, 4), name="scores")}
LABELS = ("idle", "run", "worn", "broken")


def classes(
    scores: Any, outputs: dict[str, TensorSpec] | None = None, labels: tuple[str, ...] | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Decode scores; gives the classes."""
    decode = make_decoder(OutputSpec(type="classification", **options), outputs or SCORES, labels)
    body = decode({"scores": np.asarray(scores)}, None)
    json.dumps(body, allow_nan=False)
    found: list[dict[str, Any]] = body["classes"]
    return found


def ranking(scores: Any, **options: Any) -> list[int]:
    return [each["index"] for each in classes(scores, **options)]


# Classification.


def test_the_best_classes_come_first_with_their_labels() -> None:
    assert classes(np.array([[0.1, 0.6, 0.05, 0.25]], np.float32), labels=LABELS, top_k=2) == [
        {"index": 1, "label": "run", "score": 0.6},
        {"index": 3, "label": "broken", "score": 0.25},
    ]


def test_without_labels_there_are_five_classes_by_index() -> None:
    found = classes(np.arange(10, dtype=np.float32)[None], {"scores": tensor((1, 10), name="scores")})
    assert [(each["index"], each["label"]) for each in found] == [(9, None), (8, None), (7, None), (6, None), (5, None)]


def test_equal_scores_keep_their_order() -> None:
    assert ranking([[0.5, 0.5, 0.5, 0.5]]) == [0, 1, 2, 3]


def test_the_lowest_score_is_a_threshold_that_itself_passes() -> None:
    assert ranking(np.array([[0.5, 0.49999, 0.51, 0.0]]), threshold=0.5) == [2, 0]
    assert ranking([[0.1] * 4], threshold=0.5) == []


def test_quantized_scores_are_real_numbers() -> None:
    outputs = {"scores": tensor((1, 4), "int8", 1 / 256, -128, "scores")}
    found = classes(np.array([[-128, 0, 127, 64]], np.int8), outputs)
    assert [(each["index"], each["score"]) for each in found] == [(2, 0.996094), (3, 0.75), (1, 0.5), (0, 0.0)]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int64"])
def test_whole_numbers_rank_by_their_value(dtype: str) -> None:
    """An unsigned zero has no negative, and −(−128) is no int8."""
    lowest = int(np.iinfo(dtype).min)
    outputs = {"scores": tensor((1, 4), dtype, name="scores")}
    assert ranking(np.array([[lowest, 5, 100, 1]], dtype), outputs=outputs) == [2, 1, 3, 0]


def test_truth_values_rank_too() -> None:
    assert ranking(np.array([[False, True, False, True]]), outputs={"scores": tensor((1, 4), "bool", name="scores")})[
        :2
    ] == [1, 3]


def test_softmax_and_sigmoid_are_their_formulas() -> None:
    logits = np.array([[1.0, 2.0, -3.0, 0.5]], np.float32)
    powers = [math.exp(value) for value in logits[0].tolist()]
    soft = {each["index"]: each["score"] for each in classes(logits, activation="softmax")}
    assert soft == {index: pytest.approx(power / sum(powers), abs=1e-6) for index, power in enumerate(powers)}
    sigmoid = {each["index"]: each["score"] for each in classes(logits, activation="sigmoid")}
    assert sigmoid == {index: pytest.approx(power / (1 + power), abs=1e-6) for index, power in enumerate(powers)}


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_extreme_logits_overflow_nowhere(activation: str) -> None:
    found = {each["index"]: each["score"] for each in classes([[1e30, -1e30, 0.0, 700.0]], activation=activation)}
    assert found[0] == 1.0
    assert found[1] == 0.0


@pytest.mark.parametrize("activation", ["none", "softmax", "sigmoid"])
@pytest.mark.parametrize("scores", [[math.nan] * 4, [math.inf, -math.inf, math.nan, 0.0], [-math.inf] * 4])
def test_scores_that_are_not_finite_are_null(scores: list[float], activation: str) -> None:
    found = classes(np.array([scores], np.float32), activation=activation)
    assert len(found) == 4
    assert all(each["score"] is None or 0 <= each["score"] <= 1 for each in found)
    assert classes(np.array([[math.nan] * 4]), threshold=0.5) == []


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 1, 1, 4), (-1, 4), (1, -1)])
def test_scores_of_any_number_of_ones(shape: tuple[int, ...]) -> None:
    scores = np.array([0.1, 0.2, 0.3, 0.4]).reshape([abs(size) if size != -1 else 1 for size in shape[:-1]] + [4])
    assert ranking(scores, outputs={"scores": tensor(shape, name="scores")}) == [3, 2, 1, 0]


def test_one_score_is_a_class_too() -> None:
    for shape in ((), (1,), (1, 1)):
        assert ranking(np.float32(0.5).reshape(shape), outputs={"scores": tensor(shape, name="scores")}) == [0]


def test_a_batch_is_refused_instead_of_being_taken_for_more_classes() -> None:
    with pytest.raises(InputError, match="a batch of 3 inputs; classification takes one at a time"):
        classes(np.zeros((3, 4)), {"scores": tensor((-1, 4), name="scores")})


@pytest.mark.parametrize("number", [0, 3, 5])
def test_labels_are_as_many_as_classes(number: int) -> None:
    with pytest.raises(ModelError, match=rf"{number} labels for the 4 classes of output 'scores'; give exactly one"):
        classes([[0.0] * 4], labels=("x",) * number)


def test_the_tensor_with_the_scores_is_named_where_there_are_several() -> None:
    outputs = {"a": tensor((1, 3), name="a"), "b": tensor((1, 2), name="b")}
    with pytest.raises(
        ModelError, match=r"the model has several outputs; say which holds the scores with tensor = .*: a, b"
    ):
        make_decoder(OutputSpec(type="classification"), outputs, None)
    with pytest.raises(ModelError, match=r"the model has no output 'c'; say which holds the scores"):
        make_decoder(OutputSpec(type="classification", tensor="c"), outputs, None)
    decode = make_decoder(OutputSpec(type="classification", tensor="b"), outputs, ("x", "y"))
    assert decode({"a": np.zeros((1, 3)), "b": np.array([[0.0, 1.0]])}, None)["classes"][0]["label"] == "y"


def test_a_tensor_that_is_no_list_of_scores_is_refused() -> None:
    with pytest.raises(ModelError, match=r"output 'scores' has shape \[1, 8, 8, 4\], which is no list of scores"):
        classes(np.zeros((1, 8, 8, 4)), {"scores": tensor((1, 8, 8, 4), name="scores")})


def test_a_models_votes_are_classified(runtime: Runtime) -> None:
    engine = Engine.open(model("votes"), runtime=runtime)
    decode = make_decoder(OutputSpec(type="classification"), engine.outputs, ("a", "b", "c"))
    body = decode(engine.run({"x": np.array([[0, 200, 3]], np.float32)}), None)
    assert [(each["label"], each["score"]) for each in body["classes"]] == [("b", 200), ("c", 3), ("a", 0)]


# Detection.

ROLES: dict[str, Any] = {"boxes": "b", "classes": "c", "scores": "s", "count": "n"}
OUTPUTS = {
    "b": tensor((1, 3, 4), name="b"),
    "c": tensor((1, 3), name="c"),
    "s": tensor((1, 3), name="s"),
    "n": tensor((1,), name="n"),
}
FRAME = Geometry(200, 100, 200, 100, 0, 0)


def objects(
    boxes: Any,
    kinds: Any,
    scores: Any,
    number: float | None = 3,
    geometry: Geometry | None = FRAME,
    labels: Any = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Decode detections; gives the objects."""
    named = {role: name for role, name in ROLES.items() if number is not None or role != "count"}
    decode = make_decoder(OutputSpec(type="detection", **{**named, **options}), OUTPUTS, labels)
    arrays = {
        "b": np.asarray(boxes),
        "c": np.asarray(kinds),
        "s": np.asarray(scores),
        "n": np.array([number], np.float64),
    }
    body = decode(arrays, geometry)
    json.dumps(body, allow_nan=False)
    found: list[dict[str, Any]] = body["objects"]
    return found


BOXES = [[[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 1.0, 1.0], [0, 0, 1, 1]]]


def test_objects_come_best_first_with_boxes_in_input_pixels() -> None:
    assert objects(BOXES, [[1, 0, 2]], [[0.6, 0.9, 0.4]], labels=("cat", "dog")) == [
        {"index": 0, "label": "cat", "score": 0.9, "box": [100, 50, 200, 100]},
        {"index": 1, "label": "dog", "score": 0.6, "box": [40, 10, 80, 30]},
    ]


def test_the_count_bounds_the_objects_where_there_is_one() -> None:
    assert len(objects(BOXES, [[0, 0, 0]], [[0.9, 0.9, 0.9]], 2)) == 2
    assert len(objects(BOXES, [[0, 0, 0]], [[0.9, 0.9, 0.9]], 1.9999999)) == 2
    assert len(objects(BOXES, [[0, 0, 0]], [[0.9, 0.9, 0.9]], None)) == 3


@pytest.mark.parametrize("number", [0, -5, math.nan, math.inf, -math.inf])
def test_a_count_that_is_none_gives_no_objects(number: float) -> None:
    assert objects(BOXES, [[0, 0, 0]], [[0.9, 0.9, 0.9]], number) == []


def test_a_count_beyond_the_tensors_is_cut() -> None:
    assert len(objects(BOXES, [[0, 0, 0]], [[0.9, 0.9, 0.9]], 1e9)) == 3


def test_the_threshold_and_the_greatest_number_bound_the_objects() -> None:
    assert len(objects(BOXES, [[0, 0, 0]], [[0.9, 0.8, 0.2]], threshold=0.1)) == 3
    assert len(objects(BOXES, [[0, 0, 0]], [[0.9, 0.8, 0.7]], max_objects=2)) == 2
    assert [each["score"] for each in objects(BOXES, [[0, 0, 0]], [[0.1, 0.5, 0.3]])] == [0.5]


def test_values_that_are_not_finite_make_no_object_and_disturb_no_other() -> None:
    boxes = [[[math.nan, 0, 1, 1], [0, 0, 1, 1], [0, 0, math.inf, 1]]]
    assert [each["index"] for each in objects(boxes, [[0, 1, 2]], [[0.9, 0.8, 0.7]])] == [1]
    assert objects(BOXES, [[math.nan] * 3], [[0.9] * 3]) == []
    assert objects(BOXES, [[0, 0, 0]], [[math.nan] * 3]) == []


def test_a_class_without_label_has_none() -> None:
    found = objects(BOXES, [[5, -1, 1]], [[0.9, 0.8, 0.7]], labels=("cat", "dog"))
    assert [(each["index"], each["label"]) for each in found] == [(5, None), (-1, None), (1, "dog")]


def test_a_class_that_falls_short_of_a_whole_number_is_that_number() -> None:
    assert [each["index"] for each in objects(BOXES, [[2.9999998, 1.0000001, 0]], [[0.9, 0.8, 0.7]])] == [3, 1, 0]


def test_boxes_beyond_the_picture_are_cut_and_without_a_picture_they_stay_fractions() -> None:
    assert objects([[[-0.1, -0.2, 1.1, 1.2]] * 3], [[0] * 3], [[0.9] * 3])[0]["box"] == [0, 0, 200, 100]
    assert objects(BOXES, [[0] * 3], [[0.9] * 3], geometry=None)[0]["box"] == [0.2, 0.1, 0.4, 0.3]


def test_the_picture_is_named_with_its_size() -> None:
    decode = make_decoder(OutputSpec(type="detection", **ROLES), OUTPUTS, None)
    arrays = {"b": np.zeros((1, 3, 4)), "c": np.zeros((1, 3)), "s": np.zeros((1, 3)), "n": np.zeros(1)}
    assert decode(arrays, FRAME) == {"objects": [], "image": {"width": 200, "height": 100}}


def test_outputs_are_never_guessed() -> None:
    with pytest.raises(
        ModelError, match=r"needs to know which outputs hold boxes, classes, scores; name them .*: b, c, s, n"
    ):
        make_decoder(OutputSpec(type="detection"), OUTPUTS, None)
    with pytest.raises(ModelError, match=r"which outputs hold scores"):
        make_decoder(OutputSpec(type="detection", boxes="b", classes="c"), OUTPUTS, None)
    with pytest.raises(ModelError, match=r"boxes = 'x': the model has no such output; it has: b, c, s, n"):
        make_decoder(OutputSpec(type="detection", boxes="x"), OUTPUTS, None)
    with pytest.raises(ModelError, match=r"output 's' has shape \[1, 3\], which are no boxes \[1, N, 4\]"):
        make_decoder(OutputSpec(type="detection", boxes="s", classes="c", scores="b"), OUTPUTS, None)
    with pytest.raises(ModelError, match=r"which are no boxes"):
        make_decoder(OutputSpec(type="detection", **ROLES), {**OUTPUTS, "b": tensor((), name="b")}, None)


def test_words_stand_over_the_operators_own_order() -> None:
    decode = make_decoder(OutputSpec(type="detection", scores="c", classes="s"), OUTPUTS, None, ("b", "c", "s", "n"))
    arrays = {"b": np.zeros((1, 3, 4)), "c": np.full((1, 3), 0.9), "s": np.full((1, 3), 7.0), "n": np.array([1.0])}
    assert [(each["index"], each["score"]) for each in decode(arrays, FRAME)["objects"]] == [(7, 0.9)]


@pytest.mark.parametrize("resize", ["stretch", "fit", "crop"])
@pytest.mark.parametrize(
    ("kind", "size"), [("PNG", (96, 64)), ("JPEG", (960, 640)), ("JPEG", (700, 500)), ("PNG", (200, 400))]
)
def test_a_real_detector_finds_marked_objects_in_input_pixels(
    runtime: Runtime, resize: str, kind: str, size: tuple[int, int]
) -> None:
    """The whole way: picture, tensor, interpreter, TFLite_Detection_PostProcess, and back to pixels of the picture."""
    width, height = size
    red = (int(width * 0.35), int(height * 0.4), int(width * 0.5), int(height * 0.55))
    blue = (int(width * 0.6), int(height * 0.45), int(width * 0.7), int(height * 0.6))
    picture = plain(width, height)
    picture.paste((255, 0, 0), red)
    picture.paste((0, 0, 255), blue)
    engine = Engine.open(model("detector"), runtime=runtime)
    array, geometry = ImageProcessor(InputSpec(resize=resize), engine.inputs["image"]).decode(  # type: ignore[arg-type]
        encoded(picture, kind, **({"quality": 95} if kind == "JPEG" else {}))
    )
    decode = make_decoder(OutputSpec(type="detection"), engine.outputs, ("red", "blue"), engine.detection_outputs)
    body = decode(engine.run({"image": array}), geometry)
    assert body["image"] == {"width": width, "height": height}
    assert [(each["label"], each["score"]) for each in body["objects"]] == [("red", 0.9), ("blue", 0.8)]
    for found, box in zip(body["objects"], (red, blue), strict=True):
        # The model sees 24×16 cells: an edge may be off by one of them.
        for at, (value, expected) in enumerate(zip(found["box"], box, strict=True)):
            cell = geometry.scale_y / 16 if at % 2 else geometry.scale_x / 24
            assert abs(value - expected) <= cell + 1, (found, box)


def test_a_picture_without_objects_has_none(runtime: Runtime) -> None:
    engine = Engine.open(model("detector"), runtime=runtime)
    decode = make_decoder(OutputSpec(type="detection"), engine.outputs, None, engine.detection_outputs)
    assert decode(engine.run({"image": np.zeros((1, 16, 24, 3), np.float32)}), FRAME)["objects"] == []


# Tensors.


def test_tensors_are_rendered_with_dtype_shape_and_data() -> None:
    outputs = {"a": tensor((1, 2), name="a"), "n": tensor((2,), "int64", name="n"), "t": tensor((1,), "bool", name="t")}
    rendered = render_tensors(
        {"a": np.array([[0.1, 2]], np.float32), "n": np.array([2**62, -1]), "t": np.array([True])}, outputs
    )
    assert rendered == {
        "tensors": {
            "a": {"dtype": "float32", "shape": [1, 2], "data": [[0.1, 2.0]]},
            "n": {"dtype": "int64", "shape": [2], "data": [2**62, -1]},
            "t": {"dtype": "bool", "shape": [1], "data": [True]},
        }
    }


def test_quantized_tensors_are_rendered_as_real_numbers() -> None:
    outputs = {"q": tensor((2,), "int8", 0.5, -1, "q")}
    assert render_tensors({"q": np.array([-1, 3], np.int8)}, outputs)["tensors"]["q"] == {
        "dtype": "float32",
        "shape": [2],
        "data": [0.0, 2.0],
    }


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_have_no_digits_that_the_tensor_never_had_and_read_back_the_same(dtype: str) -> None:
    values = np.random.default_rng(1).standard_normal(500).astype(dtype)
    data = render_tensors({"x": values}, {"x": tensor((500,), dtype)})["tensors"]["x"]["data"]
    np.testing.assert_array_equal(np.array(data).astype(dtype), values)
    if dtype == "float32":
        assert max(len(str(value)) for value in data) <= 16


def test_non_finite_numbers_are_null_at_any_depth() -> None:
    values = np.array([[[1.5, math.nan], [math.inf, -math.inf]]], np.float32)
    body = make_decoder(OutputSpec(), {"x": tensor((1, 2, 2))}, None)({"x": values}, None)
    assert body["tensors"]["x"]["data"] == [[[1.5, None], [None, None]]]
    json.dumps(body, allow_nan=False)


def test_a_scalar_and_an_empty_tensor_are_rendered() -> None:
    cases: list[tuple[Any, Any]] = [(np.full((), math.nan, np.float32), None), (np.zeros((0, 3), np.float32), [])]
    for array, data in cases:
        assert render_tensors({"x": array}, {"x": tensor(array.shape)})["tensors"]["x"]["data"] == data


def test_a_large_tensor_is_rendered_in_reasonable_time() -> None:
    values = np.random.default_rng(1).standard_normal((1, 300_000)).astype(np.float32)
    start = time.perf_counter()
    render_tensors({"x": values}, {"x": tensor((1, 300_000))})
    assert time.perf_counter() - start < 5
