"""Which signatures are converted and which fixed shapes their inputs get, from what the SavedModel says of itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec
from edge_serve_converters.meaning import check_input, settle_input
from edge_serve_converters.plan import InputPlan, SignaturePlan, make_plan
from edge_serve_converters.request import Request

REQUEST = Request(Path("model"), Path("out"), ("none",))


def described(*keys: str, shape: list[int] | None, dtype: str = "float32") -> dict[str, Any]:
    """Describe signatures with one input and one output."""
    tensor = {"shape": shape, "dtype": dtype}
    return {key: {"inputs": {"x": tensor}, "outputs": {"y": {"shape": [1], "dtype": "float32"}}} for key in keys}


def planned(model: dict[str, Any], hint: tuple[int, ...] | None = None, **options: Any) -> tuple[SignaturePlan, ...]:
    """Make a plan with the defaults of the command line."""
    return make_plan(model, dataclasses.replace(REQUEST, **options), lambda *_: hint)


def shape_of(model: dict[str, Any], hint: tuple[int, ...] | None = None, **options: Any) -> tuple[int, ...]:
    """Give the shape that the only input gets."""
    return planned(model, hint, **options)[0].inputs[0].shape


def refused(model: dict[str, Any], **options: Any) -> str:
    """Make a plan and give the words of the refusal."""
    with pytest.raises(UsageError) as caught:
        planned(model, **options)
    return str(caught.value)


def test_the_batch_is_fixed_at_one_unless_asked_otherwise() -> None:
    model = described("serving_default", shape=[-1, 50, 6])
    assert shape_of(model) == (1, 50, 6)
    assert shape_of(model, batch=8) == (8, 50, 6)
    assert shape_of(model, input_shapes={"x": (2, 50, 6)}) == (2, 50, 6)


def test_dynamic_dimensions_are_filled_from_size_length_or_data() -> None:
    photo = described("serving_default", shape=[-1, -1, -1, 3])
    assert shape_of(photo, input=InputSpec(kind="image", size=(24, 32))) == (1, 24, 32, 3)
    assert shape_of(photo, (20, 30, 3)) == (1, 20, 30, 3)
    assert shape_of(described("serving_default", shape=[-1, -1, 6]), input=InputSpec(length=50)) == (1, 50, 6)
    assert "--input-shape x=1,N,N,3" in refused(photo)


def test_a_lone_dynamic_dimension_may_be_a_signal() -> None:
    signal = described("serving_default", shape=[-1])
    plan = planned(signal, (16000,))[0].inputs[0]
    assert (plan.shape, plan.batched, plan.sample_shape) == ((16000,), False, (16000,))
    plan = planned(signal, input_shapes={"x": (400,)})[0].inputs[0]
    assert (plan.shape, plan.batched) == ((400,), False)
    plan = planned(signal)[0].inputs[0]
    assert (plan.shape, plan.batched, plan.sample_shape) == ((1,), True, ())


def test_unknown_ranks_need_a_shape() -> None:
    model = described("serving_default", shape=None)
    assert "--input-shape x=1,…" in refused(model)
    assert shape_of(model, input_shapes={"x": (1, 5)}) == (1, 5)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"x": (1, 9)}, "takes [?,6] there"),
        ({"x": (1, 6, 1)}, "takes [?,6] there"),
        ({"z": (1, 6)}, "no such input; it has: x"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    assert words in refused(described("serving_default", shape=[-1, 6]), input_shapes=shapes)


def test_a_fixed_batch_cannot_become_another() -> None:
    assert "fixed batch 1" in refused(described("serving_default", shape=[1, 6]), batch=2)


def test_the_default_signature_is_chosen_and_comes_first() -> None:
    model = described("another", "serving_default", shape=[-1, 6])
    assert [plan.key for plan in planned(model)] == ["serving_default"]
    assert [plan.key for plan in planned(model, signatures=("another",))] == ["another"]
    assert [plan.key for plan in planned(model, signatures=("another", "serving_default"))] == [
        "serving_default",
        "another",
    ]
    assert [plan.key for plan in planned(described("only", shape=[-1, 6]))] == ["only"]


def test_signatures_that_cannot_be_chosen_are_named() -> None:
    model = described("one", "two", shape=[-1, 6])
    assert "one, two; choose with --signature" in refused(model)
    assert "no signature 'three'; it has: one, two" in refused(model, signatures=("three",))
    assert "has no signatures" in refused({})


def test_text_is_refused_with_the_inputs_name() -> None:
    assert "input 'x' has dtype string" in refused(described("serving_default", shape=[-1], dtype="string"))


@pytest.mark.parametrize(
    ("spec", "calibration", "kind"),
    [
        (InputSpec(), None, "tensor"),
        (InputSpec(), Path("data.npz"), "tensor"),
        (InputSpec(), Path("/"), "image"),
        (InputSpec(size=(2, 2)), None, "image"),
        (InputSpec(hop=2), None, "window"),
        (InputSpec(kind="tensor"), Path("/"), "tensor"),
    ],
)
def test_the_kind_of_input_is_told_from_the_options(spec: InputSpec, calibration: Path | None, kind: str) -> None:
    assert settle_input(spec, calibration).kind == kind


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (InputSpec(hop=2, size=(2, 2)), "--hop: has no meaning for inputs of kind image"),
        (InputSpec(kind="window", color="rgb"), "--color: has no meaning for inputs of kind window"),
        (InputSpec(kind="tensor", rate_hz=5.0), "--rate-hz"),
        (InputSpec(mean=(1.0,)), "--mean and --std belong to"),
    ],
)
def test_options_of_another_kind_are_refused(spec: InputSpec, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        settle_input(spec, None)


@pytest.mark.parametrize(
    ("spec", "shape", "words"),
    [
        (InputSpec(kind="image"), (1, 50, 6, 2), "no image tensor"),
        (InputSpec(kind="image", color="gray"), (1, 8, 8, 3), "does not fit color"),
        (InputSpec(kind="image", mean=(0.1, 0.2)), (1, 8, 8, 3), "mean has 2 numbers"),
        (InputSpec(kind="window", length=7), (1, 50, 6), "--length 7 does not fit"),
        (InputSpec(kind="window", channels=("a", "b")), (1, 5, 3), "--channels names 2"),
    ],
)
def test_what_the_inputs_mean_must_fit_their_shape(spec: InputSpec, shape: tuple[int, ...], words: str) -> None:
    plan = SignaturePlan("serving_default", (InputPlan("x", "float32", shape, True),), {})
    with pytest.raises(UsageError, match=words):
        check_input(spec, plan)
