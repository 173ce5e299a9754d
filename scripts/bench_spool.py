"""Measures the spool: commits of 1 KB rows a second, and how fast a backlog drains to a broker against sending directly.

usage: .venv/bin/python scripts/bench_spool.py [--rows N] [--folder DIR] [--mosquitto PATH]
The bars: 20,000 commits a second in "process" durability; draining at 80 % of the direct rate or more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from edge_serve import runner as runners
from edge_serve.config import Config, MqttBroker, SpoolConfig
from edge_serve.health import Counters
from edge_serve.sinks import SinkContext
from edge_serve.sinks.mqtt import MqttSink, MqttSinkOptions
from edge_serve.spill import SpillingRunner
from edge_serve.spool.row import Encoded
from edge_serve.spool.spooler import Spool
from tests.contract.cases import make_result
from tests.support import Mosquitto, mosquitto_path

COMMITS_BAR = 20_000
DRAIN_BAR = 0.80
ROW_BYTES = 1000
PATIENCE_S = 60


def ignored(_: Exception | None) -> None:
    """Take no note of an outcome."""


def failed(error: BaseException) -> None:
    """Tell of a failure in a thread."""
    print(f"FAILED: {error!r}", file=sys.stderr)


def commits(folder: Path, durability: Any, rows: int) -> tuple[float, float]:
    """Give commits a second, and rows read and deleted a second."""
    spool = Spool(folder / durability, SpoolConfig(durability=durability, max_bytes=1 << 32))
    lane = spool.lane("bench", "bench", Counters())
    content = Encoded("f" * 20, b"x" * ROW_BYTES)
    left, done = rows, threading.Event()

    def settled(_: Exception | None) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    began = time.perf_counter()
    for _ in range(rows):
        while not lane.has_room:
            time.sleep(0.0002)
        lane.put(content, 0.0, settled)
    assert done.wait(PATIENCE_S)
    written = rows / (time.perf_counter() - began)
    began = time.perf_counter()
    lane.flow(True)
    taken = 0
    while taken < rows:
        row = lane.take()
        if row is None:
            time.sleep(0.0002)
            continue
        taken += 1
        lane.sent(row, time.monotonic())
    while spool.status()["items"]:
        time.sleep(0.001)
    read = rows / (time.perf_counter() - began)
    spool.close()
    return written, read


def draining(folder: Path, mosquitto: str, rows: int) -> tuple[float, float]:
    """Give results a second that reach a broker directly, and from a backlog."""
    runners.FIRST_DELAY_S = runners.LONGEST_DELAY_S = 0.05
    broker = Mosquitto(mosquitto, folder)
    config = Config(folder / "x.toml", "bench", folder, "auto", 1.0, {"": MqttBroker(url=broker.url)}, ())
    counters = Counters()
    sink: Any = MqttSink(MqttSinkOptions(), SinkContext(config, "bench", counters))
    spool = Spool(folder, SpoolConfig(max_bytes=1 << 32))
    runner = SpillingRunner("bench", sink, counters, failed, spool.lane("bench", "bench", counters), spool)
    broker.start()
    runner.start()
    assert runner.connected.wait(PATIENCE_S)
    tensor = {"tensors": {"y": {"dtype": "float32", "shape": [60], "data": [0.123456] * 60}}}
    results = [make_result(f"frame-{number}", type="tensor", decoded=tensor) for number in range(rows)]

    def submit() -> float:
        began = time.perf_counter()
        for result in results:
            runner.submit(result, ignored)
        return began

    began = submit()
    assert runner.idle(PATIENCE_S)
    direct = rows / (time.perf_counter() - began)
    assert not spool.status()["items"]
    broker.stop()
    submit()
    broker.start()
    assert runner.connected.wait(PATIENCE_S)
    began = time.perf_counter()
    assert runner.idle(PATIENCE_S)
    drained = rows / (time.perf_counter() - began)
    runner.stop(0)
    spool.close()
    broker.stop()
    return direct, drained


def main() -> int:
    """Measure and print; exits with 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many counts")
    parser.add_argument(
        "--folder", type=Path, help="on the disk that is to be measured (default: the temporary folder)"
    )
    parser.add_argument("--mosquitto", default=mosquitto_path())
    options = parser.parse_args()
    found: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        for durability in ("process", "power"):
            rounds = [commits(folder / f"{n}", durability, options.rows) for n in range(options.rounds)]
            found[durability] = {
                "commits_s": round(max(each[0] for each in rounds)),
                "read_s": round(max(each[1] for each in rounds)),
            }
        if options.mosquitto:
            pairs = []
            for number in range(options.rounds):
                place = folder / f"drain-{number}"
                place.mkdir()
                pairs.append(draining(place, options.mosquitto, options.rows))
            direct, drained = sorted(pairs, key=lambda pair: pair[1] / pair[0])[len(pairs) // 2]
            found["drain"] = {
                "direct_s": round(direct),
                "drained_s": round(drained),
                "ratio": round(drained / direct, 2),
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found, indent=2))
    missed = found["process"]["commits_s"] < COMMITS_BAR or found.get("drain", {}).get("ratio", 1.0) < DRAIN_BAR
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
