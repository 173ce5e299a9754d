"""Where a variant runs: runtimes, XNNPACK (measured), Edge TPU and GPU (expected), as one table for the report and as sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from edge_serve_converters import edgetpu, gpu, graph, runtimes
from edge_serve_converters.delegate_rules import Verdict

# Verdicts of one delegate in a report: what it does not take comes first, the rest is `more`, a number.
MAX_VERDICTS = 1000
# Layers' names come from the model; a converter joins all names that it fused.
MAX_NAME = 200
# Terminals get a reason or two; the report has all.
_REASONS_TOLD = 2
_NAMES_TOLD = 8
TFLITE_RUNTIME = "tflite-runtime 2.14"


def examine(data: bytes, *, claimed: Mapping[str, int] | None, runtime_version: str) -> dict[str, Any]:
    """Say of a .tflite file where it runs; ValueError if it is none.

    `claimed` is what XNNPACK took when the file was loaded, by operator (None: not measured); `runtime_version` is that of
    the ai-edge-litert that the file was tried in. The answer is made of JSON's types:

    `operators` [{name, version, count}]; `runtimes` [{name, loads, reasons}]; `min_runtime` (first TensorFlow release that
    has all operators, or None); `xnnpack` {claimed, total, left: {operator: count}} or None; `edgetpu` {expected, total,
    prefix, stopped_by, operators, more}; `gpu` {expected, total, operators, more}; `flex`, `custom` [names]. The operators of
    delegates are {index, operator, name, expected, rule}; `more` counts those that the list leaves out.
    """
    found = graph.read(data)
    counts = Counter((operator.name, operator.version) for operator in found.operators)
    flex, custom = runtimes.custom_operators(found)
    reasons = runtimes.loads_in_tflite_runtime_2_14(found)
    # The file was tried in this runtime before it came here, but for what no runtime loads without the device.
    needs = [reason for reason in reasons if reason.endswith(runtimes.NEEDS_EDGETPU)]
    return {
        "operators": [
            {"name": name, "version": version, "count": counts[name, version]} for name, version in sorted(counts)
        ],
        "runtimes": [
            {"name": TFLITE_RUNTIME, "loads": not reasons, "reasons": reasons},
            {"name": f"ai-edge-litert {runtime_version}", "loads": not needs, "reasons": needs},
        ],
        "min_runtime": runtimes.min_runtime(found),
        "xnnpack": None if claimed is None else _xnnpack(found, claimed),
        "edgetpu": _edgetpu(edgetpu.examine(found)),
        "gpu": _listed(gpu.examine(found)),
        "flex": flex,
        "custom": custom,
    }


def _xnnpack(found: graph.Graph, claimed: Mapping[str, int]) -> dict[str, Any]:
    # What a delegate claims is counted in the first graph: runtimes do not show the bodies of loops.
    left = Counter(operator.name for operator in found.subgraphs[0].operators)
    total = sum(left.values())
    left.subtract(claimed)
    return {
        "claimed": sum(claimed.values()),
        "total": total,
        "left": {name: count for name, count in sorted(left.items()) if count > 0},
    }


def _edgetpu(expectation: edgetpu.Expectation) -> dict[str, Any]:
    stopped = expectation.stopped_by
    listed = _listed(expectation.operators)
    return {
        "expected": listed.pop("expected"),
        "total": listed.pop("total"),
        "prefix": expectation.prefix,
        "stopped_by": stopped.told if stopped is not None else None,
        **listed,
    }


def _listed(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    kept = verdicts
    if len(verdicts) > MAX_VERDICTS:
        kept = sorted(sorted(verdicts, key=lambda one: one.expected)[:MAX_VERDICTS], key=lambda one: one.index)
    return {
        "expected": sum(one.expected for one in verdicts),
        "total": len(verdicts),
        "operators": [
            {
                "index": one.index,
                "operator": one.operator,
                "name": one.name[:MAX_NAME],
                "expected": one.expected,
                "rule": one.rule,
            }
            for one in kept
        ],
        "more": len(verdicts) - len(kept),
    }


def lines(report: Mapping[str, Any], name: str) -> list[str]:
    """Say the same in a few sentences for a terminal; `name` is the variant's."""
    told = []
    xnnpack = report["xnnpack"]
    if xnnpack is not None:
        left = _some([f"{operator} ×{count}" for operator, count in xnnpack["left"].items()])
        told.append(
            f"{name}: XNNPACK takes {xnnpack['claimed']} of {_operators(xnnpack['total'])}"
            + (f"; left: {left}" if left else "")
        )
    told.append(_edgetpu_line(report["edgetpu"], name))
    gpu_report = report["gpu"]
    refused = sorted({entry["operator"] for entry in gpu_report["operators"] if not entry["expected"]})
    told.append(
        f"{name}: expected on a GPU: {gpu_report['expected']} of {_operators(gpu_report['total'])}"
        + (f"; not {_some(refused)}" if refused else "")
    )
    for runtime in report["runtimes"]:
        if not runtime["loads"]:
            shown = "; ".join(runtime["reasons"][:_REASONS_TOLD])
            more = len(runtime["reasons"]) - _REASONS_TOLD
            told.append(f"{name}: not for {runtime['name']}: {shown}" + (f"; and {more} more" if more > 0 else ""))
    for kind in ("flex", "custom"):
        if report[kind]:
            what = "TensorFlow's own kernels (Flex)" if kind == "flex" else "custom operators"
            told.append(f"{name}: needs {what} that devices do not have: {', '.join(report[kind])}")
    return told


def _edgetpu_line(found: Mapping[str, Any], name: str) -> str:
    expected, prefix, stopped = found["expected"], found["prefix"], found["stopped_by"]
    line = f"{name}: expected on the Edge TPU: {expected} of {_operators(found['total'])}"
    if stopped is None:
        return line
    if expected == 0:
        return f"{line}; the first that is not: {stopped}"
    piece = f"{prefix} of them" if prefix else "none of them"
    return f"{line}, {piece} in the one piece that is compiled, which ends at {stopped}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_TOLD
    return ", ".join(names[:_NAMES_TOLD]) + (f" and {more} more" if more > 0 else "")


def _operators(count: int) -> str:
    return "1 operator" if count == 1 else f"{count} operators"
