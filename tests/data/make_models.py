"""Makes the small .tflite models that the tests run: python tests/data/make_models.py (needs TensorFlow, `[convert]`).

The files lie in tests/data/models and are committed, so that the tests need no TensorFlow. Every model computes something
that a test can compute by hand; its function below says what. `digits.tflite` and `motion.tflite` are not from here.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import flatbuffers
import numpy as np
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema

FOLDER = Path(__file__).parent / "models"
# scores = x @ WEIGHTS + BIAS; tests/unit has the same numbers.
WEIGHTS = np.array([[1, 0, -1], [0, 1, 0], [2, -1, 0.5], [-0.5, 0.25, 1]], np.float32)
BIAS = np.array([0.1, -0.2, 0.3], np.float32)


def tensor(shape: list[int | None], name: str, dtype: Any = tf.float32) -> Any:
    """Describe an input."""
    return tf.TensorSpec(shape, dtype, name=name)


def convert(
    *inputs: Any,
    quantize: Callable[[], Iterator[list[Any]]] | None = None,
    io: Any = tf.float32,
    foreign: str = "",
    half: bool = False,
    **signatures: Callable[..., Any],
) -> bytes:
    """Give the .tflite bytes of functions of these inputs; `foreign` = "custom" or "flex" lets such operators in.

    `half`: weights in float16.
    """
    traced = {
        key: tf.function(body, autograph=False).get_concrete_function(*inputs) for key, body in signatures.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(tf.Module(), folder, signatures=traced)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=list(traced))
        if quantize is not None:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = quantize
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = converter.inference_output_type = io
        if half:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.target_spec.supported_types = [tf.float16]
        if foreign == "flex":
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
        converter.allow_custom_ops = foreign == "custom"
        made: bytes = converter.convert()
    return made


def linear() -> bytes:
    """x [1, 4] float. serving_default: scores = x @ WEIGHTS + BIAS; total: total = the sum of x, [1, 1]."""
    return convert(
        tensor([1, 4], "x"),
        serving_default=lambda x: {"scores": tf.linalg.matmul(x, WEIGHTS) + BIAS},
        total=lambda x: {"total": tf.reduce_sum(x, axis=1, keepdims=True)},
    )


def named() -> bytes:
    """Two signatures, mean and total of x [1, 4] float, and none of them is serving_default."""
    return convert(
        tensor([1, 4], "x"),
        mean=lambda x: {"mean": tf.reduce_mean(x, axis=1, keepdims=True)},
        total=lambda x: {"total": tf.reduce_sum(x, axis=1, keepdims=True)},
    )


def bare() -> bytes:
    """The linear model's serving_default without any signature: tensors have only names."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(linear(), 0))
    model.signatureDefs = None
    return packed(model)


def int8() -> bytes:
    """x [1, 4] in -2..2 → scores = x @ WEIGHTS + BIAS, int8 inside and out."""

    def samples() -> Iterator[list[Any]]:
        rng = np.random.default_rng(1)
        yield [np.full((1, 4), -2, np.float32)]
        yield [np.full((1, 4), 2, np.float32)]
        for _ in range(50):
            yield [rng.uniform(-2, 2, (1, 4)).astype(np.float32)]

    return convert(
        tensor([1, 4], "x"),
        quantize=samples,
        io=tf.int8,
        serving_default=lambda x: {"scores": tf.linalg.matmul(x, WEIGHTS) + BIAS},
    )


def pixels() -> bytes:
    """image [1, 8, 8, 3], uint8 for 0..1 → mean of each channel [1, 3], uint8."""

    def samples() -> Iterator[list[Any]]:
        for level in np.linspace(0, 1, 20):
            yield [np.full((1, 8, 8, 3), level, np.float32)]

    return convert(
        tensor([1, 8, 8, 3], "image"),
        quantize=samples,
        io=tf.uint8,
        serving_default=lambda image: {"means": tf.reduce_mean(image, axis=[1, 2])},
    )


def gray() -> bytes:
    """image [1, 8, 16, 1] float → left and right half's means [1, 2]: tells width from height, and mirrored pictures."""

    def halves(image: Any) -> dict[str, Any]:
        flat = tf.reshape(image, [1, 8, 16])
        return {"means": tf.reduce_mean(tf.reshape(tf.reduce_mean(flat, axis=1), [1, 2, 8]), axis=2)}

    return convert(tensor([1, 8, 16, 1], "image"), serving_default=halves)


def any_size() -> bytes:
    """image [1, ?, ?, 3] float → mean of each channel [1, 3]."""
    return convert(
        tensor([1, None, None, 3], "image"),
        serving_default=lambda image: {"means": tf.reduce_mean(image, axis=[1, 2])},
    )


def two_by_two() -> bytes:
    """a [1, 2] and b [1, 3] float → joined = a then b [1, 5], total = the sum of both [1, 1]."""

    def both(a: Any, b: Any) -> dict[str, Any]:
        joined = tf.concat([a, b], axis=1)
        return {"joined": joined, "total": tf.reduce_sum(joined, axis=1, keepdims=True)}

    return convert(tensor([1, 2], "a"), tensor([1, 3], "b"), serving_default=both)


def dynamic() -> bytes:
    """x [?, 3] float → logs = log(x) [?, 3]: any batch; NaN below zero, minus infinity at zero."""
    return convert(tensor([None, 3], "x"), serving_default=lambda x: {"logs": tf.math.log(x)})


def strict() -> bytes:
    """x [?, 3] float → joined = x and [7, 8, 9] side by side [?, 6]: says any batch, but only 1 can be had."""
    return convert(
        tensor([None, 3], "x"),
        serving_default=lambda x: {"joined": tf.concat([x, tf.constant([[7.0, 8.0, 9.0]])], axis=1)},
    )


def window() -> bytes:
    """samples [1, 10, 3] float → scores [1, 2] = softmax of the mean of channel 0 and of channel 1."""
    return convert(
        tensor([1, 10, 3], "samples"),
        serving_default=lambda samples: {"scores": tf.nn.softmax(tf.reduce_mean(samples, axis=1)[:, :2])},
    )


def counts() -> bytes:
    """events [1, 4, 2] int32, not quantized → sums over time [1, 2] int32: takes whole numbers only."""
    return convert(
        tensor([1, 4, 2], "events", tf.int32),
        serving_default=lambda events: {"sums": tf.reduce_sum(events, axis=1)},
    )


def lookup() -> bytes:
    """index [1] int32 → value = [10, 20, 30][index]: an index out of range fails inside the interpreter."""
    return convert(
        tensor([1], "index", tf.int32),
        serving_default=lambda index: {"value": tf.gather(tf.constant([10.0, 20.0, 30.0]), index)},
    )


def never() -> bytes:
    """index [1] int32 → looks up index + 100 among three: fails at every run, the first one included."""
    return convert(
        tensor([1], "index", tf.int32),
        serving_default=lambda index: {"value": tf.gather(tf.constant([10.0, 20.0, 30.0]), index + 100)},
    )


def votes() -> bytes:
    """x [1, 3] float → votes = x as uint8 [1, 3], not quantized: whole numbers as scores."""
    return convert(tensor([1, 3], "x"), serving_default=lambda x: {"votes": tf.cast(x, tf.uint8)})


def null() -> bytes:
    """x [1, 25] float (100 bytes) → first [1, 1] = x[0, 0]: as little work as a model can do, for measurements of all else."""
    return convert(tensor([1, 25], "x"), serving_default=lambda x: {"first": x[:, :1]})


def remainder() -> bytes:
    """x [1, 2] int32 → rest = x0 mod (x1 - 1). It fails where x1 is 1; the smallest x0 and x1 = 0 kill an x86 process (SIGFPE)."""
    return convert(
        tensor([1, 2], "x", tf.int32),
        serving_default=lambda x: {"rest": tf.math.floormod(x[:, :1], x[:, 1:] - 1)},
    )


def remainders() -> bytes:
    """events [1, 4, 2] int32 → rest [1, 4], of each sample what `remainder` gives: a window with the same trap."""
    return convert(
        tensor([1, 4, 2], "events", tf.int32),
        serving_default=lambda events: {"rest": tf.math.floormod(events[:, :, 0], events[:, :, 1] - 1)},
    )


def text() -> bytes:
    """words [2] text → the second, then the first."""
    return convert(
        tensor([2], "words", tf.string),
        serving_default=lambda words: {"turned": tf.gather(words, tf.constant([1, 0]))},
    )


def flex() -> bytes:
    """x [1, 2, 2] float through a TensorFlow operator that no device runtime has."""
    return convert(tensor([1, 2, 2], "x"), foreign="flex", serving_default=lambda x: {"y": tf.linalg.det(x)})


def custom() -> bytes:
    """Like votes, but its operator is a custom one that exists nowhere."""
    return with_custom_operator(b"Mystery")


def edgetpu() -> bytes:
    """Like votes, but its operator is the one that the Edge TPU's compiler writes."""
    return with_custom_operator(b"edgetpu-custom-op")


def with_custom_operator(name: bytes) -> bytes:
    """Give the votes model with its only operator replaced."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(votes(), 0))
    (code,) = model.operatorCodes
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM
    code.customCode = name
    (operator,) = model.subgraphs[0].operators
    operator.builtinOptions, operator.builtinOptionsType = None, schema.BuiltinOptions.NONE
    return packed(model)


def packed(model: Any) -> bytes:
    """Write a model that was changed."""
    builder = flatbuffers.Builder(4096)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def ruined(quantize: Callable[[], Iterator[list[Any]]] | None = None) -> bytes:
    """x [1, 8, 8, 2] in 0..1 → y [1, 4]: before, ruined, after (convolutions), mean. One channel of ruined is 5000 times the others.

    The layer after it reads that channel with weights that make it as small as the others, so that all four count.
    """
    rng = np.random.default_rng(5)
    kernels = [
        np.abs(rng.normal(0, 0.3, shape)).astype(np.float32) for shape in ((3, 3, 2, 4), (3, 3, 4, 4), (1, 1, 4, 4))
    ]
    kernels[1][..., 0] *= 5000
    kernels[2][:, :, 0] /= 1e8

    def layers(x: Any) -> dict[str, Any]:
        for name, kernel in zip(("before", "ruined", "after"), kernels, strict=True):
            x = tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME", name=f"{name}/convolution"), name=f"{name}/relu")
        return {"y": tf.reduce_mean(x, axis=[1, 2], name="mean")}

    return convert(tensor([1, 8, 8, 2], "x"), quantize=quantize, serving_default=layers)


def ruined_int8() -> bytes:
    """The ruined model in int8 (float inside and out): three channels of four are lost in its second layer."""

    def samples() -> Iterator[list[Any]]:
        rng = np.random.default_rng(6)
        for _ in range(20):
            yield [rng.uniform(0, 1, (1, 8, 8, 2)).astype(np.float32)]

    return ruined(samples)


def energy(*, half: bool = False) -> bytes:
    """x [1, 16] float → y [1, 3] = log(x² + 1e-10) @ w."""
    w = np.random.default_rng(7).normal(0, 1, (16, 3)).astype(np.float32)
    return convert(
        tensor([1, 16], "x"),
        half=half,
        serving_default=lambda x: {"y": tf.linalg.matmul(tf.math.log(tf.square(x) + 1e-10), w)},
    )


def energy_float16() -> bytes:
    """The energy model with weights in float16, where 1e-10 is 0: the logarithm of silence is minus infinity."""
    return energy(half=True)


def detector(*, regular: bool = True) -> bytes:
    """image [1, 16, 24, 3] in 0..1 → the box around all red pixels (class 0) and around all blue ones (class 1).

    Ends in a real TFLite_Detection_PostProcess with outputs in another order than the operator's own. Scores are 0.9 for
    red, 0.8 for blue, 0 where there is none.
    """
    height, width, anchors = 16, 24, np.array([[0.5, 0.5, 1, 1]] * 2, np.float32)
    options = (
        'name: "TFLite_Detection_PostProcess" '
        'attr { key: "max_detections" value { i: 5 } } '
        'attr { key: "max_classes_per_detection" value { i: 1 } } '
        'attr { key: "detections_per_class" value { i: 5 } } '
        f'attr {{ key: "use_regular_nms" value {{ b: {str(regular).lower()} }} }} '
        'attr { key: "nms_score_threshold" value { f: 0.1 } } '
        'attr { key: "nms_iou_threshold" value { f: 0.5 } } '
        'attr { key: "y_scale" value { f: 1.0 } } attr { key: "x_scale" value { f: 1.0 } } '
        'attr { key: "h_scale" value { f: 1.0 } } attr { key: "w_scale" value { f: 1.0 } } '
        'attr { key: "num_classes" value { i: 2 } }'
    )

    @tf.function(experimental_implements=options, autograph=False)  # type: ignore[untyped-decorator]
    def post_process(encodings: Any, scores: Any, anchors: Any) -> Any:
        # Only the names and the number of the outputs count: the runtime's operator does the work.
        return tuple(tf.constant(0.0, name=name) for name in ("boxes", "classes", "scores", "number"))

    def extent(mask: Any, steps: int, axis: int) -> tuple[Any, Any]:
        """Give the lowest and highest edge of the mask along an axis, in 0..1."""
        line = tf.reduce_max(mask, axis=1 - axis)
        edges = tf.constant(np.arange(steps) / steps, tf.float32)
        low = 1 - tf.reduce_max(line * (1 - edges))
        high = tf.reduce_max(line * (edges + 1 / steps))
        return low, high

    def detect(image: Any) -> dict[str, Any]:
        encodings, found = [], []
        for hot, cold in ((0, 2), (2, 0)):
            mask = tf.cast(image[0, :, :, hot] - image[0, :, :, cold] > 0.5, tf.float32)
            top, bottom = extent(mask, height, 0)
            left, right = extent(mask, width, 1)
            # Centre and size relative to an anchor that is the whole picture (detection_postprocess.cc).
            encodings.append(
                tf.stack(
                    [
                        (top + bottom) / 2 - 0.5,
                        (left + right) / 2 - 0.5,
                        tf.math.log(tf.maximum(bottom - top, 1e-3)),
                        tf.math.log(tf.maximum(right - left, 1e-3)),
                    ]
                )
            )
            found.append(tf.reduce_max(mask))
        zero = tf.constant(0.0)
        scores = tf.stack([tf.stack([zero, found[0] * 0.9, zero]), tf.stack([zero, zero, found[1] * 0.8])])
        boxes, classes, values, number = post_process(tf.stack(encodings)[tf.newaxis], scores[tf.newaxis], anchors)
        # Named so that their alphabetical order is none that anybody would guess.
        return {"a_number": number, "b_scores": values, "c_boxes": boxes, "d_classes": classes}

    return convert(tensor([1, height, width, 3], "image"), foreign="custom", serving_default=detect)


MODELS: dict[str, Callable[[], bytes]] = {
    "linear": linear,
    "named": named,
    "bare": bare,
    "int8": int8,
    "pixels": pixels,
    "gray": gray,
    "any_size": any_size,
    "two_by_two": two_by_two,
    "dynamic": dynamic,
    "strict": strict,
    "window": window,
    "counts": counts,
    "lookup": lookup,
    "never": never,
    "votes": votes,
    "null": null,
    "remainder": remainder,
    "remainders": remainders,
    "text": text,
    "flex": flex,
    "custom": custom,
    "edgetpu": edgetpu,
    "detector": detector,
    "ruined": ruined,
    "ruined_int8": ruined_int8,
    "energy": energy,
    "energy_float16": energy_float16,
}


def main(names: list[str]) -> None:
    """Write the named models, or all."""
    FOLDER.mkdir(exist_ok=True)
    for name in names or MODELS:
        data = MODELS[name]()
        (FOLDER / f"{name}.tflite").write_bytes(data)
        print(f"{name}.tflite  {len(data)} bytes  {(MODELS[name].__doc__ or '').splitlines()[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
