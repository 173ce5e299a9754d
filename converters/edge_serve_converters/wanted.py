"""Which variants a request asks for: modes as they are named, targets as what serves them best."""

from __future__ import annotations

from dataclasses import replace

from edge_serve.errors import UsageError
from edge_serve_converters.request import CALIBRATED, VARIANT_NAMES, Request, Target, Wanted


def settle(request: Request) -> tuple[Wanted, ...]:
    """List the variants, the default one first; UsageError if options contradict each other."""
    if not request.modes and not request.targets:
        raise UsageError("say what to make: --quantize MODE, or --target DELEGATE; both may be given several times")
    wanted = [_of_mode(mode, request) for mode in request.modes]
    wanted += [_of_target(target, request) for target in request.targets]
    unique: dict[str, Wanted] = {}
    for variant in wanted:
        # A target that asks for what a mode makes already is served by that variant.
        unique.setdefault(variant.name, variant)
    result = tuple(unique.values())
    _check(request, result)
    return result


def _of_mode(mode: str, request: Request) -> Wanted:
    name = VARIANT_NAMES.get(mode, mode)  # type: ignore[call-overload]  # a mode without a name of its own
    if mode not in ("int8", "selective"):
        return Wanted(name, mode)  # type: ignore[arg-type]  # checked by the command line
    selective = mode == "selective" or bool(request.keep_float) or request.auto
    return Wanted(
        name,
        "selective" if selective else "int8",
        io=request.io,
        keep_float=request.keep_float,
        auto=request.auto or (mode == "selective" and not request.keep_float),
    )


def _of_target(target: Target, request: Request) -> Wanted:
    """XNNPACK runs int8 fastest and smallest on ARM cores; GPUs compute in float16; an Edge TPU takes full integers only."""
    if target == "gpu":
        return Wanted("float16", "float16", target="gpu")
    if target == "xnnpack":
        return replace(_of_mode("int8", request), target="xnnpack")
    return Wanted(
        "edgetpu",
        "int8",
        io="uint8" if request.io == "uint8" else "int8",
        per_channel_dense=False,
        target="edgetpu",
    )


def _check(request: Request, wanted: tuple[Wanted, ...]) -> None:
    calibrated = [variant.name for variant in wanted if variant.mode in CALIBRATED]
    if calibrated and request.calibration is None:
        raise UsageError(
            f"{calibrated[0]} needs --calibration DATA: samples of real inputs, from which the ranges of all tensors are taken"
        )
    int8 = any(variant.mode in ("int8", "selective") for variant in wanted)
    if request.io != "float" and not int8:
        raise UsageError(f"--io {request.io} goes with --quantize int8; the other modes take and give floats")
    for option, given in (("--keep-float", bool(request.keep_float)), ("--auto", request.auto)):
        if given and not any(variant.mode == "selective" for variant in wanted):
            raise UsageError(
                f"{option} goes with --quantize int8 (or selective): the other modes have no layers to choose"
            )


def for_source(wanted: tuple[Wanted, ...], weights: str) -> tuple[Wanted, ...]:
    """Fit the list to a source whose weights are kept so: a .tflite file as it is goes by what it is, not by float32."""
    if weights == "float32":
        return wanted
    named = tuple(replace(variant, name=weights) if variant.mode == "none" else variant for variant in wanted)
    if weights in ("int8", "dynamic") and any(variant.mode != "none" for variant in named):
        raise UsageError(
            f"the file is quantized already ({weights}), and quantizing twice adds the errors up: take it as it is with "
            "--quantize none, or give the float model"
        )
    # Of a file with float16 weights, none and float16 are one variant: the file as it is.
    as_it_is = {variant.name for variant in named if variant.mode == "none"}
    return tuple(variant for variant in named if variant.mode == "none" or variant.name not in as_it_is)
