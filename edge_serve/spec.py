"""What a model's inputs and outputs mean, and what it runs on: the words that manifest, configuration and converter share.

A bundle's manifest says it once; `[pipeline.input]` and `[pipeline.output]` may replace single fields. None means "not
said": then the model's tensors decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from edge_serve.errors import DelegateError
from edge_serve.schema import option

AUTO = "auto"
# Options go to a library from elsewhere; no delegate known has more than a handful.
MAX_OPTIONS = 64
MAX_OPTION_LENGTH = 4096

InputKind = Literal["image", "window", "tensor"]
OutputType = Literal["classification", "detection", "tensor"]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """How a payload becomes the model's input tensor."""

    kind: InputKind | None = option(
        None,
        "image: pictures; window: sensor samples gathered into sliding windows; tensor: the payload is the tensor",
        example="image",
    )
    content_type: str | None = option(
        None, "content type of payloads that do not name their own (MQTT 3.1.1, files)", example="application/json"
    )
    size: tuple[int, ...] | None = option(
        None,
        "image: [height, width] in pixels; default: the model's input tensor",
        example=[224, 224],
        low=1,
        high=16384,
    )
    color: Literal["rgb", "bgr", "gray"] | None = option(
        None, "image: channel order; default: gray for one channel, else rgb", example="rgb"
    )
    resize: Literal["stretch", "fit", "crop"] | None = option(
        None,
        "image: stretch to size; fit: keep the aspect ratio and pad with gray; crop: keep it and cut the edges",
        example="stretch",
    )
    scale: float | None = option(
        None,
        "image: pixels 0..255 are multiplied by this, before mean and std; default 1/255 for float and quantized-float inputs",
        example=0.00392156862745098,
    )
    mean: tuple[float, ...] | None = option(
        None, "image and window: subtracted after scale; one number, or one for each channel", example=[0.0]
    )
    std: tuple[float, ...] | None = option(
        None, "image and window: divided by after mean; one number, or one for each channel", example=[1.0]
    )
    length: int | None = option(
        None, "window: samples in a window; default: the model's input tensor", example=50, low=1, high=1_000_000
    )
    hop: int | None = option(
        None,
        "window: samples from the start of one window to the next; default: length",
        example=10,
        low=1,
        high=1_000_000,
    )
    channels: tuple[str, ...] | None = option(
        None,
        "window: names of the channels in the tensor's order, for samples that are {channel: number}",
        example=["ax", "ay", "az"],
    )
    rate_hz: float | None = option(
        None, "window: nominal sampling rate, for people; nothing is resampled", example=10.0, low=0
    )
    key: Literal["topic", "field", "none"] | None = option(
        None,
        "window: one window for each topic (or socket connection), for each value of key_field, or one for all",
        example="topic",
    )
    key_field: str | None = option(None, "window: the JSON field (or CSV column) that holds the key", example="machine")
    max_keys: int | None = option(
        None,
        "window: most keys at a time; the one that was silent longest makes room (default 1024)",
        example=1024,
        low=1,
        high=1_000_000,
    )
    timeout_s: float | None = option(
        None,
        "window: seconds of silence after which a key's unfinished window is dropped (default 300)",
        example=300.0,
        low=0.001,
    )
    id_field: str | None = option(None, "JSON field that holds the frame's id", example="id")
    time_field: str | None = option(
        None, "JSON field that holds the time of capture (RFC 3339, or seconds since 1970)", example="time"
    )
    max_pixels: int | None = option(
        None,
        "image: most pixels that are decoded (default 50 million); larger pictures get an error result",
        example=50_000_000,
        low=1,
    )


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """How the model's output tensors become a result."""

    type: OutputType | None = option(
        None,
        "classification, detection or tensor; default: what the bundle says, else tensor",
        example="classification",
    )
    tensor: str | None = option(
        None, "classification: name of the output that holds the scores; default: the only one", example="probabilities"
    )
    labels: tuple[str, ...] | None = option(
        None, "names of the classes, by index; default: the bundle's", example=["idle", "running"]
    )
    labels_file: str | None = option(None, "file with one label a line, instead of labels", example="labels.txt")
    top_k: int | None = option(
        None, "classification: most classes in a result (default 5)", example=5, low=1, high=100_000
    )
    threshold: float | None = option(None, "lowest score that is reported (default: none; detection 0.5)", example=0.5)
    activation: Literal["none", "softmax", "sigmoid"] | None = option(
        None, "applied to the scores first, for models that give logits (default none)", example="none"
    )
    boxes: str | None = option(
        None, "detection: output with boxes [1, N, 4], ymin xmin ymax xmax in 0..1", example="boxes"
    )
    classes: str | None = option(None, "detection: output with class indices [1, N]", example="classes")
    scores: str | None = option(None, "detection: output with scores [1, N]", example="scores")
    count: str | None = option(None, "detection: output with the number of objects [1]", example="count")
    max_objects: int | None = option(
        None, "detection: most objects in a result (default 100)", example=100, low=1, high=10_000
    )


@dataclass(frozen=True, slots=True)
class DelegateSpec:
    """Which delegate, as it is asked for: by name, by index where there may be several, or by a library's path."""

    name: str
    """The part's name in the table of plug-ins: none, xnnpack, edgetpu, gpu, external, or a third party's."""
    index: str = ""
    """Which one of several, as `edge-serve devices` names it: "usb:0", "pci:1"; empty: the first that is free."""
    library: str = ""
    """The path or soname of the delegate's library; empty: the delegate's own default."""
    options: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """Name it for people and in results: "edgetpu:usb:0", "external:libvx_delegate"."""
        if self.name == "external":
            return f"external:{PurePath(self.library).name.removesuffix('.so')}"
        return f"{self.name}:{self.index}" if self.index else self.name

    @classmethod
    def parse(cls, value: str | Mapping[str, Any]) -> DelegateSpec:
        """Read a configuration's `delegate`: "edgetpu:usb:0", a library's path, or a table of library, name, index and options.

        DelegateError says what is wrong with it. Whether there is such a delegate shows when it is loaded.
        """
        if isinstance(value, str):
            if "/" in value or value.endswith(".so"):
                return cls("external", "", value)
            name, _, index = value.partition(":")
            if name == "external":
                raise DelegateError("an external delegate is named by the path of its library")
            if not name or name == AUTO:
                raise DelegateError(f"{value!r} names no delegate")
            return cls(name, index)
        unknown = sorted(set(value) - {"name", "index", "library", "options"})
        if unknown:
            raise DelegateError(f"unknown keys {', '.join(unknown)} in delegate; known: library, name, index, options")
        words = {key: value.get(key, "") for key in ("name", "index", "library")}
        for key, word in words.items():
            if not isinstance(word, str):
                raise DelegateError(f"delegate: {key} must be text")
        if not words["name"] and not words["library"]:
            raise DelegateError("a delegate table names a library, or a delegate by its name")
        options = value.get("options", {})
        if not isinstance(options, Mapping) or len(options) > MAX_OPTIONS:
            raise DelegateError(f"delegate: options is a table of at most {MAX_OPTIONS} entries")
        return cls(
            words["name"] or "external",
            words["index"],
            words["library"],
            tuple((str(key), _option(str(key), each)) for key, each in options.items()),
        )


def _option(key: str, value: object) -> str:
    """Give an option as the text that delegates' libraries take; booleans as they read them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, (str, int, float)):
        raise DelegateError(f"delegate: option {key!r} must be text, a number, true or false")
    text = str(value)
    if len(text) > MAX_OPTION_LENGTH or len(key) > MAX_OPTION_LENGTH or "\0" in text + key:
        raise DelegateError(
            f"delegate: option {key[:40]!r} is longer than {MAX_OPTION_LENGTH} characters, or holds a NUL"
        )
    return text
