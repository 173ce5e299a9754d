"""Which layer is to blame: where a variant's error begins, and which layers would gain most from staying float."""

from __future__ import annotations

from collections.abc import Sequence

from edge_serve_converters.layers import Layer

# Below this a layer's noise has more than a tenth of the power of what it should say; good 8-bit layers have 15 to 45 dB.
BAD_DB = 10.0
# A layer is where the error begins if it adds at least this part of the noise of the first bad layer. Less, on every layer
# of the way, is drift: nothing that one layer could be blamed for.
SHARE = 1 / 2
# A variant whose layers all reach this computes what the float file computes.
FINE_DB = 40.0
# Layers that are named where the error has drifted together.
NAMED = 3
# A tensor has lost its channels if it leaves this part of them as noise.
LOST = 0.3


def first_bad(layers: Sequence[Layer]) -> Layer | None:
    """Give the layer where the error begins, None if no layer is bad or the error has only drifted together.

    In the order in which they run: the first with NaN or infinity where the float file has numbers; or, of the first layer
    under BAD_DB and those that it computes from, the one that adds the most noise if that is a SHARE of all of it. If the
    tensor that this one reads keeps its strongest channels alone, the layer before, which gave that tensor, is named.
    """
    for number, layer in enumerate(layers):
        if layer.broken:
            return layer
        if layer.sqnr_db < BAD_DB:
            origin = _origin(layers, number)
            if origin is not None:
                return origin
    return None


def _origin(layers: Sequence[Layer], number: int) -> Layer | None:
    chain = _chain(layers, number)
    culprit = max(chain, key=lambda place: layers[place].local_error)
    if layers[culprit].local_error < SHARE * _ratio(layers[number]):
        return None
    lossy = max(layers[culprit].inputs, key=lambda place: layers[place].channel_error, default=None)
    if lossy is not None and _ratio_of_channels(layers[lossy]) >= LOST:
        before = _chain(layers, lossy)
        return layers[max(before, key=lambda place: layers[place].channel_error)]
    return layers[culprit]


def _chain(layers: Sequence[Layer], number: int) -> list[int]:
    """Give a layer and those before it, each time the noisiest of the inputs."""
    chain = [number]
    while layers[chain[-1]].inputs:
        chain.append(min(layers[chain[-1]].inputs, key=lambda place: layers[place].sqnr_db))
    return chain


def _ratio(layer: Layer) -> float:
    return float(10 ** (-layer.sqnr_db / 10))


def _ratio_of_channels(layer: Layer) -> float:
    return float(10 ** (-layer.channel_sqnr_db / 10))


def explain(layers: Sequence[Layer]) -> str | None:
    """Say in a sentence where the error begins, or which layers add most of what has drifted together; None without layers."""
    bad = first_bad(layers)
    if bad is not None:
        where = "the model's input" if bad.index < 0 else f"layer {bad.index} ({bad.operator})"
        return f"the error begins at {where}, {_short(bad.name)}: {_reason(bad)}"
    lowest = min((layer.sqnr_db for layer in layers), default=None)
    if lowest is None:
        return None
    worst = sensitivity(layers)[:NAMED]
    if lowest >= FINE_DB or not worst:
        return (
            f"no layer differs much from the float file (lowest SQNR {lowest:.1f} dB): "
            "what differs from the source model does so in float32 too"
        )
    listed = ", ".join(f"{layer.index} ({layer.operator}) {_short(layer.name)}" for layer in worst)
    return f"no single layer is to blame, the error adds up over the layers; most of it comes from {listed}"


def _reason(layer: Layer) -> str:
    if layer.broken:
        return f"{layer.broken} values are NaN or infinite that are numbers in the float file"
    low, high = layer.range
    said = f"its SQNR is {layer.sqnr_db:.1f} dB"
    if layer.quantized_range is not None and layer.saturated > 0.01:
        can = f"{layer.quantized_range[0]:.3g} to {layer.quantized_range[1]:.3g}"
        return f"{said}; {layer.saturated:.1%} of its values ({low:.3g} to {high:.3g}) lie outside what its integers express ({can})"
    if _ratio_of_channels(layer) >= LOST and layer.sqnr_db >= BAD_DB:
        return (
            f"a few channels fill its range ({low:.3g} to {high:.3g}), and of the others little is left "
            f"(SQNR {layer.sqnr_db:.1f} dB, of its channels {layer.channel_sqnr_db:.1f} dB)"
        )
    return said


def _short(name: str) -> str:
    """Shorten a tensor's name that joins those of all operators that were fused: the first is what it computes last."""
    return name.split(";", 1)[0]


def sensitivity(layers: Sequence[Layer]) -> list[Layer]:
    """Give the layers that harm the variant, the most harmful first: what to keep float if some may be.

    Harm is the noise that a layer adds itself, and what the layers that read it add because of channels that it lost. Note
    that a tensor is quantized unless the layer that gives it and those that read it are float. Inputs are left out.
    """
    harm = [layer.local_error + float(layer.broken > 0) * 1e6 for layer in layers]
    for layer in layers:
        for place in layer.inputs:
            harm[place] += layer.local_error * layers[place].channel_error
    ranked = sorted(range(len(layers)), key=lambda place: (-harm[place], place))
    return [layers[place] for place in ranked if harm[place] > 0 and layers[place].index >= 0]
