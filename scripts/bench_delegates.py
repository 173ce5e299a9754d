"""The bars of delegates: what the loop costs above the bare interpreter, who sleeps meanwhile, and how good and how quick `auto` is.

usage: python scripts/bench_delegates.py FOLDER      FOLDER: build/bench, with MobileNetV2's variants in models/variants
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


from edge_serve.demo.broker import EmbeddedBroker  # noqa: E402
from edge_serve.model import choice as choices  # noqa: E402
from edge_serve.model import selection  # noqa: E402
from edge_serve.model.delegate import Candidate, DelegateSpec, Runnable  # noqa: E402
from edge_serve.model.interpreter import load_runtime  # noqa: E402
from edge_serve.model.isolated import IsolatedEngine  # noqa: E402
from edge_serve.model.opening import open_model  # noqa: E402
from edge_serve.model.repository import find  # noqa: E402
from edge_serve.model.resilient import ResilientEngine  # noqa: E402
from scripts.benchmarks import CONFIG, Bar, start  # noqa: E402
from tests.delegates import external  # noqa: E402

ROUNDS = 7
ROUND_S = 0.15
PAIRS_S = 6.0
STARTS = 5
DEMO = ROOT / "edge_serve/demo/models"
TINY = ROOT / "tests/data/models/linear.tflite"


def zeros(engine: Runnable) -> dict[str, Any]:
    """Give inputs of an engine."""
    import numpy as np

    return {name: np.zeros(tuple(abs(n) for n in spec.shape), spec.dtype) for name, spec in engine.inputs.items()}


def rounds(ways: Sequence[Callable[[], object]], seconds: float = ROUND_S) -> list[float]:
    """Time each in turn, for some rounds; gives the median of each one's rounds, which are medians themselves."""
    found: list[list[float]] = [[] for _ in ways]
    now = time.perf_counter
    for turn in range(ROUNDS + 1):
        for nth, way in enumerate(ways):
            times: list[float] = []
            end = now() + seconds
            while now() < end or len(times) < 3:
                begun = now()
                way()
                times.append(now() - begun)
            if turn:
                found[nth].append(statistics.median(times))
    return [statistics.median(each) for each in found]


def loop_cost(file: Path, title: str, limit: Callable[[float], float]) -> list[Bar]:
    """Hold the engine that pipelines run against the three calls of the very interpreter that it runs, on one thread.

    Two interpreters of one file differ by more than the loop costs: their memory lies elsewhere.
    """
    runtime = load_runtime()
    line = [Candidate("file", file, "", DelegateSpec(name), 1) for name in ("xnnpack", "none")]
    engine = ResilientEngine("bench", line, lambda each: open_model(each.file, each.spec, runtime))
    given = zeros(engine)
    interpreter: Any = engine._engine._interpreter  # type: ignore[attr-defined]  # an engine of this process
    (source,) = (each["index"] for each in interpreter.get_input_details())
    (target,) = (each["index"] for each in interpreter.get_output_details())
    (array,) = given.values()

    def bare() -> object:
        interpreter.set_tensor(source, array)
        interpreter.invoke()
        return interpreter.get_tensor(target)

    # One run of each in turn, in random order: what else the machine does, and what the last run left in the caches, hits both alike.
    now, dice = time.perf_counter, random.Random(1)
    times: tuple[list[float], list[float]] = ([], [])
    ways: list[tuple[Callable[[], object], list[float]]] = [(lambda: engine.run(given), times[0]), (bare, times[1])]
    end = now() + PAIRS_S
    while now() < end:
        dice.shuffle(ways)
        for way, found in ways:
            begun = now()
            way()
            found.append(now() - begun)
    engine.close()
    ours, theirs = map(statistics.median, times)
    note = f"{ours * 1e6:.1f} µs, and {theirs * 1e6:.1f} µs for set_tensor + invoke + get_tensor"
    return [Bar(f"loop: above the bare interpreter, {title}", (ours - theirs) * 1e6, limit(theirs) * 1e6, "µs", note)]


def wakes(file: Path) -> list[Bar]:
    """Measure how late other threads are woken while a model runs, in this process and in a child."""
    runtime, bars = load_runtime(), []
    for title, engine in (
        ("xnnpack", open_model(file, DelegateSpec("xnnpack"), runtime)),
        ("none", open_model(file, DelegateSpec("none"), runtime)),
        ("a child process", IsolatedEngine.open(file, DelegateSpec("xnnpack"), runtime, load_limit_s=60)),
    ):
        late: list[float] = []
        over = threading.Event()

        def tick(late: list[float] = late, over: threading.Event = over) -> None:
            while not over.is_set():
                begun = time.perf_counter()
                time.sleep(0.0005)
                late.append(time.perf_counter() - begun - 0.0005)

        thread = threading.Thread(target=tick)
        thread.start()
        given, end = zeros(engine), time.perf_counter() + 1.5
        while time.perf_counter() < end:
            engine.run(given)
        over.set()
        thread.join()
        engine.close()
        late.sort()
        note = f"median of {len(late)}; 99 % within {late[int(len(late) * 0.99)] * 1e3:.2f} ms"
        bars.append(Bar(f"other threads woken during a run on {title}", statistics.median(late) * 1e3, 1.0, "ms", note))
    return bars


def isolation(file: Path, title: str) -> None:
    """Print what a child process costs: the packets, and the copies of tensors."""
    runtime = load_runtime()
    here = open_model(file, DelegateSpec("xnnpack"), runtime)
    there = IsolatedEngine.open(file, DelegateSpec("xnnpack"), runtime, load_limit_s=60)
    given = zeros(here)
    one, other = rounds([lambda: here.run(given), lambda: there.run(given)])
    size = sum(array.nbytes for array in given.values())
    print(f"info    a child process costs {(other - one) * 1e6:.0f} µs a run ({title}, {size / 1024:.0f} KiB of input)")
    here.close()
    there.close()


def leaving(file: Path, title: str) -> list[Bar]:
    """Measure how long an input waits when its delegate fails: until the next in line, opened for it, has given the result."""
    runtime, bars = load_runtime(), []
    for how in ("hang", "crash", "nan"):
        waited = []
        for _ in range(STARTS):
            with tempfile.TemporaryDirectory() as folder:
                when = Path(folder) / "when"
                line = [
                    Candidate("file", file, "", external(claims="add", invoke=how, when=when), 1),
                    Candidate("file", file, "", DelegateSpec("xnnpack"), 1),
                ]
                engine = ResilientEngine("bench", line, lambda each: open_model(each.file, each.spec, runtime))
                given = zeros(engine)
                engine.run(given)
                assert engine.candidate is line[0]
                when.touch()
                begun = time.perf_counter()
                engine.run(given)
                waited.append(time.perf_counter() - begun)
                assert engine.candidate is line[1]
                engine.close()
        name = f"left when the delegate fails ({how}), {title}"
        bars.append(Bar(name, max(waited), 1.0, "s", f"the longest of {len(waited)}"))
    return bars


def auto(model: Path, title: str, variants: list[str]) -> list[Bar]:
    """Hold what `auto` takes against every fixed choice, opened and timed here in turn."""
    runtime = load_runtime()
    version = find(model, variant=variants[0] if len(variants) == 1 else None)
    with tempfile.TemporaryDirectory() as folder:
        made = choices.choose(
            version,
            delegate=None,
            runtime=runtime,
            folder=Path(folder),
            board="bench",
            variant=variants[0] if len(variants) == 1 else None,
        )
    fixed, _, _ = selection.everything(version, variants, [DelegateSpec("xnnpack"), DelegateSpec("none")], [], None)
    engines = [open_model(each.file, each.spec, runtime, threads=each.threads) for each in (made.winner, *fixed)]
    inputs = [zeros(engine) for engine in engines]
    ways = [functools.partial(engine.run, given) for engine, given in zip(engines, inputs, strict=True)]
    taken, *others = rounds(ways, 0.1)
    best = min(others)
    for engine in engines:
        engine.close()
    note = (
        f"{made.winner.label}: {taken * 1e6:.1f} µs; best fixed: {fixed[others.index(best)].label}, {best * 1e6:.1f} µs"
    )
    allowed = max(0.05 * best, 2e-6)
    return [Bar(f"auto: slower than the best fixed choice, {title}", (taken - best) * 1e6, allowed * 1e6, "µs", note)]


def starts(folder: Path, binaries: Path) -> list[Bar]:
    """Measure a first start with `auto` on three variants and two delegates, one from the cache, and one of an explicit choice."""
    seconds: dict[str, list[float]] = {"first": [], "cached": [], "explicit": []}
    with tempfile.TemporaryDirectory() as name, EmbeddedBroker(Path(name)) as broker:
        text = CONFIG.format(url=broker.url, model=(folder / "models/variants").absolute())
        plain, explicit = Path(name, "auto.toml"), Path(name, "explicit.toml")
        plain.write_text(text, encoding="utf-8")
        more = '[pipeline]\ndelegate = "xnnpack"\nthreads = 1\nvariant = "int8"\n'
        explicit.write_text(text.replace("[pipeline]\n", more, 1), encoding="utf-8")
        state = Path(name, "state")
        for _ in range(STARTS):
            shutil.rmtree(state, ignore_errors=True)
            for which, config in (("first", plain), ("cached", plain), ("explicit", explicit)):
                elapsed, _memory = start([str(binaries / "edge-serve"), "run", "-c", str(config)], "started in", state)
                seconds[which].append(elapsed)
    found = {which: statistics.median(each) for which, each in seconds.items()}
    return [
        Bar("auto: first start, three variants and two delegates", found["first"], 10.0, "s"),
        Bar(
            "auto: start from the cache, above an explicit choice",
            found["cached"] - found["explicit"],
            0.2,
            "s",
            f"{found['cached']:.2f} s and {found['explicit']:.2f} s",
        ),
    ]


def main() -> int:
    """Measure, print and write the figures; gives 1 if a bar is not met."""
    folder = Path(sys.argv[1])
    variants = folder / "models/variants"
    mobilenet = find(variants, variant="float32").file
    bars = [
        *loop_cost(TINY, "a tiny model", lambda _bare: 5e-6),
        *loop_cost(mobilenet, "MobileNetV2", lambda bare: 0.01 * bare),
        *wakes(mobilenet),
    ]
    bars += leaving(mobilenet, "MobileNetV2")
    isolation(TINY, "a tiny model")
    isolation(mobilenet, "MobileNetV2")
    for name in ("digits", "motion"):
        bars += auto(DEMO / name, name, ["int8"])
    for name in ("float32", "float16", "int8"):
        bars += auto(variants, f"MobileNetV2 {name}", [name])
    bars += auto(variants, "MobileNetV2, all three", ["float32", "float16", "int8"])
    bars += starts(folder, Path(sys.executable).parent)
    (folder / "bench_delegates.json").write_text(
        json.dumps({"v": 1, "bars": [{**asdict(bar), "met": bar.met} for bar in bars]}, indent=2) + "\n",
        encoding="utf-8",
    )
    width = max(len(bar.name) for bar in bars)
    for bar in bars:
        met = "met   " if bar.met else "MISSED"
        print(f"{met}  {bar.name:<{width}}  {bar.figure:8.3f} {bar.unit:<3} (at most {bar.limit:.3g})  {bar.note}")
    return 0 if all(bar.met for bar in bars) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.SubprocessError as error:
        sys.exit(f"bench_delegates: {error}")
