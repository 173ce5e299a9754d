"""What is wrong with calibration data that has the right shape: constant, scaled otherwise than on the device, stretched by
outliers, unlike what is held back, or the same samples twice."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping

import numpy as np

from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec
from edge_serve_converters.plan import InputPlan, SignaturePlan
from edge_serve_converters.source import Source, listed
from edge_serve_converters.store import Array
from edge_serve_converters.windows import window_layout

# Of a vector, this many columns are looked at one by one; more are pixels, of which the border's are often constant.
MAX_COLUMNS = 64
# int8 has 256 steps: where one value lies this far out, the others share five of them.
OUTLIER_RATIO = 50.0
OUTLIER_PERCENTILE = 99.9
# Percentiles of more values than this are those of a drawn part.
MAX_VALUES = 1_000_000
# Held-back values beyond the calibrated range by more than this part of it: int8 would cut them off.
FAR_OUTSIDE = 0.5
# A picture's values beyond what pixels can become: by rounding or augmentation, or by a wrong scale.
_SLIGHTLY, _WRONGLY = 0.05, 1.0
# All values within this part of what pixels can become: five of 256 gray levels.
_NARROW = 1 / 50
# A smaller "picture" is rather a matrix of something else.
_SMALLEST_PICTURE = 8
# Normalized channels have mean 0 and deviation 1; what is this far from it was normalized with other numbers, or not at all.
_MEAN_OFF, _STD_LOW, _STD_HIGH = 5.0, 0.05, 10.0


def look(
    signature: SignaturePlan, source: Source, calibration: Mapping[str, Array], held_back: Mapping[str, Array]
) -> list[str]:
    """Give warnings on the samples of a signature, input name → [samples, *sample_shape]; UsageError where they cannot be right."""
    texts = []
    for entry in signature.inputs:
        used, held = calibration[entry.name], held_back[entry.name]
        constant = list(_constant(entry, source.spec, used))
        texts += constant
        if np.dtype(entry.dtype).kind != "f":
            continue
        if len(signature.inputs) == 1 and not constant:
            texts += _scale(entry, source, used)
        texts += _outliers(entry, used)
        texts += _outside(entry, used, held)
    return [*texts, *_duplicates(calibration, held_back)]


def _constant(entry: InputPlan, spec: InputSpec, used: Array) -> Iterator[str]:
    lead = f"calibration data for input {entry.name!r}"
    if used.min() == used.max():
        yield f"{lead} are constant ({float(used.flat[0]):g}): the ranges will fit nothing else"
        return
    if len(used) > 1 and all((sample == used[0]).all() for sample in used[1:]):
        yield f"all calibration samples for input {entry.name!r} are equal: the ranges will fit nothing else"
        return
    rows = _by_channel(entry, spec, used)
    if rows is None or len(rows) < 2:
        return
    flat = np.flatnonzero(rows.min(axis=0) == rows.max(axis=0))
    if len(flat):
        names = [f"{_channel(spec, rows.shape[1], int(number))} ({float(rows[0, number]):g})" for number in flat]
        yield f"{lead} are constant in {listed(names)}: is something not connected, or left out of the data?"


def _by_channel(entry: InputPlan, spec: InputSpec, used: Array) -> Array | None:
    """Give the values by channel, [values, channels], where the input has any that mean something of their own."""
    sizes = [size for size in entry.sample_shape if size != 1]
    if spec.kind == "image":
        channels = entry.sample_shape[-1] if len(entry.sample_shape) == 3 else 1
    elif spec.kind == "window":
        channels = window_layout(entry, spec)[1]
    elif len(sizes) == 1:
        channels = sizes[0] if sizes[0] <= MAX_COLUMNS else 1
    else:
        # Time before channels, rows before columns: a square is no series.
        channels = sizes[-1] if len(sizes) > 1 and sizes[-1] < min(sizes[0], MAX_COLUMNS + 1) else 1
    return used.reshape(-1, channels) if channels > 1 and math.prod(entry.sample_shape) % channels == 0 else None


def _channel(spec: InputSpec, count: int, number: int) -> str:
    if spec.channels is not None and len(spec.channels) == count:
        return f"channel {spec.channels[number]!r}"
    return f"channel {number} of {count}"


def _scale(entry: InputPlan, source: Source, used: Array) -> Iterator[str]:
    spec = source.spec
    if spec.kind == "image" and source.as_is:
        yield from _scale_of_pictures(entry, source, float(used.min()), float(used.max()))
    if spec.kind == "tensor" and source.as_is and _like_pictures(entry) and used.min() >= 0 and 2 < used.max() <= 255:
        yield (
            f"calibration data for input {entry.name!r} look like pixels, from {float(used.min()):.4g} to "
            f"{float(used.max()):.4g}: was the model trained on 0..255? If it takes 0..1 or -1..1, bring {source.path.name} to that "
            "range, or the ranges will be wrong"
        )
    if spec.kind == "window" and (spec.mean is not None or spec.std is not None):
        rows = _by_channel(entry, spec, used)
        yield from _normalization(entry, source, rows if rows is not None else used.reshape(-1, 1))


def _like_pictures(entry: InputPlan) -> bool:
    """Tell whether a sample has the shape of a picture [height, width, 1 or 3]."""
    shape = entry.sample_shape
    return len(shape) == 3 and shape[2] in (1, 3) and min(shape[:2]) >= _SMALLEST_PICTURE


def pixel_range(spec: InputSpec) -> tuple[float, float]:
    """Give the least and the largest value that pixels 0..255 become on the device, over all channels."""
    scale = 1 / 255 if spec.scale is None else spec.scale
    means, stds = spec.mean or (0.0,), spec.std or (1.0,)
    channels = max(len(means), len(stds))
    ends = [
        (pixel * scale - means[number % len(means)]) / stds[number % len(stds)]
        for number in range(channels)
        for pixel in (0, 255)
    ]
    return min(ends), max(ends)


def _scale_of_pictures(entry: InputPlan, source: Source, low: float, high: float) -> Iterator[str]:
    least, largest = pixel_range(source.spec)
    width = largest - least
    beyond = max(high - largest, least - low)
    what = (
        f"calibration data for input {entry.name!r} go from {low:.4g} to {high:.4g}; with this scale, mean and std "
        f"pixels become {least:.4g} to {largest:.4g} on the device"
    )
    remedy = (
        f"bring {source.path.name} to that range, (pixel · scale − mean) / std, or say with --scale, --mean and --std "
        f"what the model takes{_likely(low, high)}; a folder of pictures needs neither"
    )
    if beyond > _WRONGLY * width:
        raise UsageError(f"{what}: they are scaled otherwise, and the ranges would be wrong; {remedy}")
    if high - low < _NARROW * width:
        raise UsageError(f"{what}: they fill next to nothing of it, so they are scaled otherwise; {remedy}")
    if beyond > _SLIGHTLY * width:
        yield f"{what}: are they scaled otherwise? If so {remedy}"
    elif least < -_SLIGHTLY * width and low >= 0 and high <= 1 < width:
        yield f"{what}, and none is below 0: are they 0..1? If so {remedy}"


def _likely(low: float, high: float) -> str:
    """Guess the scale that the data have."""
    if low >= 0 and high > 2:
        return " (for 0..255: --scale 1)"
    if low >= 0:
        return " (for 0..1: no --scale, --mean and --std)"
    return " (for -1..1: --mean 0.5 --std 0.5)" if low >= -1 and high <= 1 else ""


def _normalization(entry: InputPlan, source: Source, rows: Array) -> Iterator[str]:
    spec = source.spec
    off = []
    for number in range(rows.shape[1]):
        mean, std = float(rows[:, number].mean(dtype=np.float64)), float(rows[:, number].std(dtype=np.float64))
        if std and (abs(mean) > _MEAN_OFF or not _STD_LOW <= std <= _STD_HIGH):
            name = _channel(spec, rows.shape[1], number) if rows.shape[1] > 1 else "all"
            off.append(f"{name} mean {mean:.3g}, deviation {std:.3g}")
    if off:
        question = (
            f"are they normalized already, as the model takes them? Else store (x − mean) / std in {source.path.name}"
            if source.as_is
            else "do --mean and --std belong to these data?"
        )
        yield f"calibration data for input {entry.name!r}, normalized, should be about 0 ± 1, and are: {listed(off)}; {question}"


def _outliers(entry: InputPlan, used: Array) -> Iterator[str]:
    values = drawn_values(used)
    sizes = np.abs(values[values != 0])
    if not len(sizes):
        return
    usual = float(np.percentile(sizes, OUTLIER_PERCENTILE, method="lower"))
    largest = max(float(used.max()), -float(used.min()))
    if largest <= OUTLIER_RATIO * usual:
        return
    place = np.unravel_index(int(np.argmax(used) if float(used.max()) == largest else np.argmin(used)), used.shape)
    yield (
        f"calibration data for input {entry.name!r} hold {used[place]:.4g} (at {[int(index) for index in place[1:]]} of a sample), "
        f"{largest / usual:.0f} times what 99.9 % of the values stay below ({usual:.4g}): int8 would have almost no steps left "
        "for the others; leave such samples out, or clip them here and on the device"
    )


def drawn_values(array: Array) -> Array:
    """Give the values of an array, or MAX_VALUES of more, always the same ones."""
    flat = array.reshape(-1)
    if flat.size <= MAX_VALUES:
        return flat
    # At random: a fixed step would see one channel only.
    chosen: Array = flat[np.sort(np.random.default_rng(0).integers(0, flat.size, MAX_VALUES))]
    return chosen


def _outside(entry: InputPlan, used: Array, held: Array) -> Iterator[str]:
    low, high = float(used.min()), float(used.max())
    least, largest = float(held.min()), float(held.max())
    beyond = max(largest - high, low - least)
    if high > low and beyond > FAR_OUTSIDE * (high - low):
        yield (
            f"held-back data for input {entry.name!r} go from {least:.4g} to {largest:.4g}, those that calibrate from {low:.4g} "
            f"to {high:.4g}: int8 cuts off what lies outside; use more --samples, or look for outliers and changes in the data"
        )


def _duplicates(calibration: Mapping[str, Array], held_back: Mapping[str, Array]) -> Iterator[str]:
    known = set(_hashes(calibration))
    held = _hashes(held_back)
    double = sum(digest in known for digest in held)
    if double:
        yield (
            f"{double} of {len(held)} held-back samples are equal to samples that calibrate: the figures look better than "
            "they are; remove duplicates from the data"
        )


def _hashes(samples: Mapping[str, Array]) -> list[bytes]:
    digests = []
    for number in range(len(next(iter(samples.values())))):
        digest = hashlib.sha256()
        for array in samples.values():
            digest.update(np.ascontiguousarray(array[number]).data)
        digests.append(digest.digest())
    return digests
