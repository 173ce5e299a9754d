"""Finds what a model runs on best: makes the candidates, has them tried, and takes one of those that are right."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from edge_serve import plugins
from edge_serve.bundle import Variant
from edge_serve.errors import DelegateAwayError, ModelError
from edge_serve.model.delegate import CPU, Candidate, DelegateSpec, Found
from edge_serve.model.engine import available_cores
from edge_serve.model.interpreter import Runtime
from edge_serve.model.opening import load_part
from edge_serve.model.repository import ModelVersion
from edge_serve.model.trial import Golden, Plan, Trial, try_all
from edge_serve.model.wish import DEFAULT_SIGNATURE, EDGE_TPU_OPERATOR, MOST_THREADS, Choice, Wish, stand_ins

log = logging.getLogger(__name__)

MOST_REASONS = 64
MAX_REASON = 300
# Of those that are nearly as fast as the fastest, the one that asks least is taken: fewer threads, the variant that was asked
# for, the CPU. Nearly is the larger of a share and of a time that no clock here tells from nothing.
NEARLY = 1.03
NEARLY_S = 1e-6


def measured(wish: Wish, runtime: Runtime, root: Path, stop: Callable[[], bool] | None) -> Choice:
    """Choose among all that is there."""
    candidates, reasons = [], []
    found = list(_found(root))
    for variant in wish.variants():
        compiled = variant is not None and EDGE_TPU_OPERATOR in variant.operators
        for each in found:
            if compiled and each.spec.name != "edgetpu":
                continue
            if each.why_not:
                reasons.append(f"{each.spec.label}: {each.why_not}{f'; {each.remedy}' if each.remedy else ''}")
                continue
            if each.untried:
                reasons.append(f"{each.spec.label}: {each.untried}")
                continue
            if each.spec.name == "edgetpu" and variant is not None and not compiled:
                reasons.append(f"{variant.name} on {each.spec.label}: is not compiled for an Edge TPU")
                continue
            candidates += [wish.candidate(each.spec, variant, threads) for threads in _threads(wish, each.spec)]
    candidates.sort(key=_promise)
    log.info("%s: measuring, once for this machine, what it runs best on (%d ways)", wish.version.name, len(candidates))
    trials = try_all(candidates, _golden(wish), Plan(runtime.name, wish.signature), stop=stop)
    right = [trial for trial in trials if trial.right]
    if not right:
        raise _nothing(wish, trials, reasons, away=any(trial.away for trial in trials))
    return _ranked(wish, trials, right, reasons)


def _promise(candidate: Candidate) -> tuple[int, int]:
    """Order what is tried by its promise, because the time may be over: accelerators, XNNPACK on few threads, on more, the rest."""
    name = candidate.spec.name
    return (CPU.index(name) if name in CPU else -1, candidate.threads)


def everything(
    version: ModelVersion,
    variants: Sequence[str],
    specs: Sequence[DelegateSpec] | None,
    threads: Sequence[int],
    signature: str | None,
    root: Path = Path("/"),
) -> tuple[list[Candidate], dict[str, Golden], list[str]]:
    """Give every way to run a model, for a benchmark, the golden samples by variant, and what is left out and why.

    Empty `variants` and `threads`, and `specs` None, mean all that there are. BundleError names the variants of a bundle.
    """
    bundle = version.bundle
    chosen: list[Variant | None] = [None]
    if bundle is not None:
        chosen = [bundle.manifest.variant(name) for name in variants] or list(bundle.manifest.variants)
    elif variants and set(variants) != {version.variant}:
        raise ModelError(f"{version.file}: has no variant {variants[0]!r}: it is a single file; leave --variant out")
    wish = Wish(version, None, (), None, 0, signature)
    candidates, left_out = [], []
    found = [Found(spec) for spec in specs] if specs is not None else list(_found(root))
    for each in found:
        if each.why_not:
            left_out.append(f"{each.spec.label}: {each.why_not}")
            continue
        numbers = list(threads) or _threads(wish, each.spec)
        candidates += [wish.candidate(each.spec, variant, number) for variant in chosen for number in numbers]
    golden = _golden(wish, [variant for variant in chosen if variant is not None])
    return candidates, golden, left_out


def _ranked(wish: Wish, trials: Sequence[Trial], right: list[Trial], reasons: list[str]) -> Choice:
    fastest = min(_latency(trial) for trial in right)
    nearly = [trial for trial in right if _latency(trial) <= max(fastest * NEARLY, fastest + NEARLY_S)]

    def modest(trial: Trial) -> tuple[int, bool, bool, float]:
        candidate = trial.candidate
        return (
            candidate.threads,
            candidate.variant != wish.version.variant,
            candidate.spec.name not in CPU,
            _latency(trial),
        )

    winner = min(nearly, key=modest)
    said = [
        _said(trial, chosen=trial is winner)
        for trial in sorted(trials, key=lambda trial: (not trial.right, _latency(trial)))
    ]
    line = [winner.candidate]
    for trial in sorted(right, key=_latency):
        if all(_kind(trial.candidate) != _kind(each) for each in line):
            line.append(trial.candidate)
    # The interpreter's own kernels are the last resort, and what one delegate fails on should not fail on the next.
    line[1:] = sorted(line[1:], key=lambda each: each.spec.name == "none")
    told = tuple([*said, *dict.fromkeys(reasons)][:MOST_REASONS])
    return Choice(tuple(line), told, away=any(trial.away for trial in trials))


def _kind(candidate: Candidate) -> tuple[str, str]:
    return candidate.variant, candidate.spec.label


def explicit(wish: Wish, delegate: DelegateSpec, runtime: Runtime, stop: Callable[[], bool] | None) -> Choice:
    """Try the delegate asked for; what may run in its place, only if it cannot be had."""
    reasons: list[str] = []
    trials: list[Trial] = []
    log.info("%s: trying it on %s, once for this machine", wish.version.name, delegate.label)
    for nth, spec in enumerate((delegate, *wish.fallback)):
        tried = [wish.candidate(spec, threads=threads) for threads in _threads(wish, spec)]
        # What was asked for is taken, fast or slow; it has to be right, as far as it takes anything.
        found = try_all(tried, _golden(wish), Plan(runtime.name, wish.signature), stop=stop)
        trials += found
        right = [trial for trial in found if trial.right]
        if spec.name == "xnnpack" and not found[0].taken and found[0].total:
            right = found[:1]  # the service says that it is none in fact
        if right:
            best = min(right, key=lambda trial: (trial.candidate.threads if len(right) == 1 else 0, _latency(trial)))
            reasons += [_said(trial, chosen=trial is best) for trial in trials]
            rest = [wish.candidate(each) for each in wish.fallback[nth:] if each.label != spec.label]
            # What is not there now is waited for; what is there and is not right is not.
            awaited = [trial.candidate for trial in trials[:1] if trial.away]
            line = [*awaited, best.candidate, *rest]
            line += [each for each in stand_ins(wish, spec) if all(each.spec.label != have.spec.label for have in line)]
            return Choice(tuple(line), tuple(reasons[:MOST_REASONS]), strict=not wish.fallback)
    raise _nothing(wish, trials, reasons, away=trials[0].away)


def _found(root: Path) -> Iterator[Found]:
    """Give what this machine may have, the CPU first."""
    names = plugins.names("delegates")
    for name in (*CPU, *(name for name in names if name not in CPU)):
        try:
            part = plugins.load("delegates", name)
        except plugins.UnknownPartError as error:
            log.warning("delegate %s: %s", name, error)
            continue
        yield from part.find(root)


def _threads(wish: Wish, spec: DelegateSpec) -> list[int]:
    if wish.threads:
        return [wish.threads]
    if not load_part(spec).threaded:
        return [1]
    most, found = min(available_cores(), MOST_THREADS), [1]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    return found


def _golden(wish: Wish, variants: Sequence[Variant] | None = None) -> dict[str, Golden]:
    """Give the golden samples by variant, and hold the variants' files against their hashes."""
    bundle = wish.version.bundle
    if bundle is None or wish.signature not in (None, DEFAULT_SIGNATURE):
        return {}
    found = {}
    for variant in variants if variants is not None else wish.variants():
        assert variant is not None
        bundle.verify(variant.file)
        name = variant.samples or bundle.manifest.samples
        tolerance = variant.quality.get("tolerance", {})
        if name is not None:
            numbers = {key: float(value) for key, value in tolerance.items() if isinstance(value, (int, float))}
            found[variant.name] = Golden(bundle.verify(name), variant.name, numbers)
    return found


def _latency(trial: Trial) -> float:
    return trial.latency_s if trial.latency_s is not None else float("inf")


def _said(trial: Trial, *, chosen: bool) -> str:
    if trial.reason:
        return f"{trial.candidate.label}: {trial.reason}"[:MAX_REASON]
    return f"{trial.candidate.label}: {duration(_latency(trial))}{'; chosen' if chosen else ''}"


def duration(seconds: float) -> str:
    """Write a latency as people read it: "27 µs", "1.94 ms"."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit or name == "µs":
            return f"{seconds / unit:.3g} {name}"
    raise AssertionError


def _nothing(wish: Wish, trials: Sequence[Trial], reasons: list[str], *, away: bool) -> ModelError | DelegateAwayError:
    """Say that nothing is right; `away`: because of hardware that may be there, or free, later."""
    # More threads are tried where one was right only.
    lines = [_said(trial, chosen=False) for trial in trials if trial.candidate.threads == 1 or wish.threads]
    lines += reasons
    said = lines[0] if len(lines) == 1 else "\n  ".join(["nothing here can run this model as asked:", *lines])
    return (DelegateAwayError if away else ModelError)(f"{wish.version.file}: {said}")
