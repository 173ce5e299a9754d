"""`edge-serve bench`: how fast a model is here, on every delegate, with every number of threads, in every variant."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_serve.commands.tables import table
from edge_serve.errors import EXIT_GATE, EXIT_OK, UsageError

if TYPE_CHECKING:
    from edge_serve.model.delegate import Candidate
    from edge_serve.model.repository import ModelVersion
    from edge_serve.model.trial import Trial

MAX_SECONDS = 600.0
PROFILE_SECONDS = 0.03
BAR = 24
WIDEST = 48


@click.command(
    epilog="""\b
Examples:
  edge-serve bench models/digits
  edge-serve bench mobilenet.tflite --delegate xnnpack --delegate none --threads 1,2,4 --seconds 3
  edge-serve bench mobilenet.tflite --profile"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--version", "number", default="latest", show_default=True, help="Version of the model.")
@click.option(
    "--variant", "variants", multiple=True, help="Repeatable; only these variants (default: all of the bundle)."
)
@click.option(
    "--delegate",
    "delegates",
    multiple=True,
    help="Repeatable; only these delegates: none, xnnpack, edgetpu, gpu, edgetpu:usb:0, or a library's path (default: all there are).",
)
@click.option("--threads", help="Numbers of threads with commas between them (default: 1, 2, 4 … up to the cores).")
@click.option(
    "--seconds", type=click.FloatRange(0.01, MAX_SECONDS), default=1.0, show_default=True, help="How long each is run."
)
@click.option("--signature", help="Which signature of the model (default: serving_default).")
@click.option("--runtime", type=click.Choice(["auto", "litert", "tflite-runtime"]), default="auto", show_default=True)
@click.option("--profile", is_flag=True, help="Time per operator, each run alone.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def bench(
    model: Path,
    number: str,
    variants: tuple[str, ...],
    delegates: tuple[str, ...],
    threads: str | None,
    seconds: float,
    signature: str | None,
    runtime: str,
    profile: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure MODEL (a bundle, one version of it, or a .tflite file): latency, throughput, memory and operators taken.

    Each way to run it is opened and measured in a child process, on the bundle's golden samples or on random inputs, and its
    results are held against what is right. Delegates in a process of their own are measured with the copy to and from it.
    Exits with 1 if nothing is right.
    """
    from edge_serve.model.interpreter import load_runtime
    from edge_serve.model.repository import find
    from edge_serve_devices.doctor import temperature

    loaded = load_runtime(runtime)
    version = find(model, number)
    show = _progress(quiet or as_json)
    if profile:
        return _profile(version, variants, delegates or ("none", "xnnpack"), loaded.name, as_json, show)
    before = temperature()
    candidates, golden, left_out = _candidates(version, variants, delegates, _threads(threads), signature)
    trials = _measure(candidates, golden, loaded.name, signature, seconds, show)
    after = temperature()
    if as_json:
        document = {
            "v": 1,
            "model": version.name,
            "version": version.version,
            "runtime": {"name": loaded.name, "version": loaded.version},
            "temperature_c": {"before": before, "after": after},
            "results": [_document(trial) for trial in trials],
            "left_out": left_out,
        }
        click.echo(json.dumps(document))
    else:
        _print(trials)
        for reason in left_out:
            click.echo(f"left out: {reason}")
        if before is not None and after is not None:
            click.echo(f"temperature: {before:.0f} °C before, {after:.0f} °C after")
    return EXIT_OK if any(trial.right for trial in trials) else EXIT_GATE


def _threads(text: str | None) -> list[int]:
    """Read numbers of threads; an empty list: all that make sense."""
    if text is None:
        return []
    try:
        found = [int(each) for each in text.split(",")]
    except ValueError:
        found = [0]
    if not all(1 <= each <= 64 for each in found):
        raise UsageError(f"--threads {text!r}: give numbers from 1 to 64 with commas between them")
    return found


def _candidates(
    version: ModelVersion,
    variants: Sequence[str],
    delegates: Sequence[str],
    threads: Sequence[int],
    signature: str | None,
) -> tuple[list[Candidate], dict[str, Any], list[str]]:
    from edge_serve.model import selection
    from edge_serve.model.delegate import DelegateSpec

    specs = [DelegateSpec.parse(each) for each in delegates] or None
    return selection.everything(version, variants, specs, threads, signature)


def _measure(
    candidates: Sequence[Candidate],
    golden: dict[str, Any],
    runtime: str,
    signature: str | None,
    seconds: float,
    show: Callable[[str], None],
) -> list[Trial]:
    from edge_serve.model.trial import Plan, try_all

    at = [0]

    def progress(candidate: Candidate) -> None:
        at[0] += 1
        left = (len(candidates) - at[0] + 1) * seconds
        show(f"{at[0]} of {len(candidates)}: {candidate.label}; about {left:.0f} s left")

    plan = Plan(runtime, signature, total_s=float("inf"), seconds=seconds, limit_s=60.0 + 2 * seconds)
    try:
        return try_all(candidates, golden, plan, progress=progress)
    finally:
        show("")


def _progress(quiet: bool) -> Callable[[str], None]:
    if quiet or not sys.stderr.isatty():
        return lambda _text: None
    return lambda text: click.echo(f"\r\x1b[K{text}", nl=False, err=True)


def _document(trial: Trial) -> dict[str, Any]:
    latency = trial.percentiles.get("p50")
    return {
        "variant": trial.candidate.variant,
        "delegate": trial.candidate.spec.label,
        "threads": trial.candidate.threads,
        "right": trial.right,
        "reason": trial.reason,
        "latency_ms": {name: 1e3 * value for name, value in trial.percentiles.items()} or None,
        "runs": trial.runs,
        "runs_per_s": 1 / latency if latency else None,
        "memory_bytes": trial.memory_bytes,
        "operators": trial.total,
        "claimed": trial.taken,
        "claimed_by_name": trial.claimed,
    }


def _print(trials: Sequence[Trial]) -> None:
    from edge_serve.model.selection import duration

    right = sorted((trial for trial in trials if trial.right), key=lambda trial: trial.percentiles["p50"])
    slowest = right[-1].percentiles["p50"] if right else 0.0
    rows = []
    for trial in right:
        p50, p90, p99 = (trial.percentiles[name] for name in ("p50", "p90", "p99"))
        rows.append(
            (
                trial.candidate.variant,
                trial.candidate.spec.label,
                str(trial.candidate.threads),
                duration(p50),
                duration(p90),
                duration(p99),
                f"{1 / p50:.0f}",
                f"{trial.memory_bytes / 2**20:.1f}",
                f"{trial.taken} of {trial.total}",
                "█" * max(1, round(BAR * p50 / slowest)),
            )
        )
    if rows:
        header = ("variant", "delegate", "threads", "p50", "p90", "p99", "runs/s", "MiB", "operators", "p50")
        for line in table(header, rows):
            click.echo(line)
        best = right[0].candidate
        click.echo(f"\nfastest: {best.label}")
    for trial in trials:
        if trial.reason:
            click.echo(f"not right: {trial.candidate.label}: {trial.reason}")


# Time per operator.


def _profile(
    version: ModelVersion,
    variants: Sequence[str],
    delegates: Sequence[str],
    runtime: str,
    as_json: bool,
    show: Callable[[str], None],
) -> int:
    from edge_serve.model import selection
    from edge_serve.model.delegate import Candidate, DelegateSpec
    from edge_serve.model.profile import split

    (candidate, *_), _, _ = selection.everything(
        version, variants[:1] or [version.variant], [DelegateSpec("none")], [1], None
    )
    with tempfile.TemporaryDirectory(prefix="edge-serve-profile-") as folder:
        operators = split(candidate.file, Path(folder))
        specs = [DelegateSpec.parse(each) for each in delegates]
        ways = [
            Candidate(f"{each.number} {each.name}", each.file, "", spec, 1)
            for each in operators
            if each.file is not None
            for spec in specs
        ]
        trials = _measure(ways, {}, runtime, None, PROFILE_SECONDS, show)
    times: dict[int, dict[str, float]] = defaultdict(dict)
    for way, trial in zip(ways, trials, strict=True):
        if trial.right:
            times[int(way.variant.split()[0])][way.spec.label] = trial.percentiles["p50"]
    labels = [spec.label for spec in specs]
    if as_json:
        rows = [
            {
                "number": each.number,
                "operator": each.name,
                "output": each.output,
                "us": {k: 1e6 * v for k, v in times[each.number].items()},
            }
            for each in operators
        ]
        click.echo(json.dumps({"v": 1, "model": version.name, "variant": candidate.variant, "operators": rows}))
        return EXIT_OK
    total = sum(each.get(labels[0], 0.0) for each in times.values()) or 1.0
    shown = [
        (
            str(each.number),
            each.name,
            *(
                selection.duration(times[each.number][label]) if label in times[each.number] else "-"
                for label in labels
            ),
            f"{times[each.number].get(labels[0], 0.0) / total:.1%}",
            each.output if len(each.output) <= WIDEST else f"…{each.output[1 - WIDEST :]}",
        )
        for each in operators
    ]
    for line in table(("", "operator", *labels, "share", "output"), shown):
        click.echo(line)
    click.echo(
        "\nEach operator was timed alone, as a model of its own: delegates fuse neighbours, so the sum is not the model's time."
    )
    return EXIT_OK
