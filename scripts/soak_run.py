"""The soak behind scripts/soak: a steady load, and what becomes of the service's memory and file descriptors.

usage: PYTHONPATH=. python scripts/soak_run.py [--seconds N] [--rate N] [--output FILE]

The service runs as in tests/system/test_no_loss.py, between two mosquittos, and every message is accounted for. Its resident
memory is looked at once a second; the slope is that of the least-squares line through all samples after the warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.support import Mosquitto, mosquitto_path, resident_bytes
from tests.system.no_loss import QUEUES, Account, Trial

# Caches, arenas of the allocator and counters of all sizes are filled in the first part of a run.
WARM_UP_SHARE = 0.2
# KiB a minute. 64 bytes lost with each message at 200 messages/s are 750; the allocator's own steps in ten minutes stay below
# this.
MOST_SLOPE = 256.0
# A connection that is made anew while it is looked at may have two for a moment.
MOST_DESCRIPTORS_MORE = 1
BURSTS_PER_S = 20
SAY_EVERY_S = 30


def descriptors(pid: int) -> int:
    """Count a process's open file descriptors."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def load(trial: Trial, seconds: float, rate: float) -> list[tuple[float, float, int]]:
    """Publish steadily; gives (seconds, KiB resident, descriptors) once a second."""
    samples: list[tuple[float, float, int]] = []
    began = time.monotonic()
    said = 0.0
    while (now := time.monotonic() - began) < seconds:
        trial.publisher.more(int(now * rate) - trial.publisher.sent)
        if now >= len(samples):
            samples.append((now, resident_bytes(trial.service.pid) / 1024, descriptors(trial.service.pid)))
        if now >= said:
            _, memory, open_files = samples[-1]
            behind = trial.publisher.sent - len(trial.promised)
            print(f"{now:6.0f} s  {memory:8.0f} KiB  {open_files} descriptors  {behind} in work", flush=True)
            said += SAY_EVERY_S
        time.sleep(1 / BURSTS_PER_S)
    return samples


def judge(samples: list[tuple[float, float, int]], account: Account) -> tuple[dict[str, object], list[str]]:
    """Give the figures, and what is wrong with them."""
    warm_up = samples[-1][0] * WARM_UP_SHARE
    before = [sample for sample in samples if sample[0] < warm_up]
    after = [sample for sample in samples if sample[0] >= warm_up]
    line = statistics.linear_regression([when / 60 for when, _, _ in after], [memory for _, memory, _ in after])
    most_before, most_after = (max(count for _, _, count in part) for part in (before, after))
    figures: dict[str, object] = {
        "slope_kib_per_min": round(line.slope, 1),
        "rss_kib": {"first": round(samples[0][1]), "warm": round(after[0][1]), "last": round(after[-1][1])},
        "descriptors": {"warm-up": most_before, "after": most_after, "last": after[-1][2]},
        **asdict(account),
    }
    wrong = []
    if line.slope > MOST_SLOPE:
        wrong.append(f"memory grows by {line.slope:.0f} KiB/min; {MOST_SLOPE:g} are allowed")
    if most_after > most_before + MOST_DESCRIPTORS_MORE:
        wrong.append(f"file descriptors grow: {most_before}, later {most_after}")
    return figures, wrong


def main() -> int:
    """Run the soak; gives the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description="a steady load; memory and descriptors stay flat")
    parser.add_argument("--seconds", type=float, default=600, help="how long (default 600, at least 20)")
    parser.add_argument("--rate", type=float, default=200, help="messages a second (default 200)")
    parser.add_argument("--output", type=Path, help="where the figures go, as JSON")
    options = parser.parse_args()
    if options.seconds < 20 or options.rate <= 0:
        parser.error("--seconds takes 20 or more, --rate a number above 0")
    executable = mosquitto_path()
    if executable is None:
        parser.error("mosquitto is needed: install it, or name it with EDGE_SERVE_MOSQUITTO")
    with (
        tempfile.TemporaryDirectory(prefix="edge-serve-soak-") as folder,
        Mosquitto(executable, Path(folder), *QUEUES) as near,
        Mosquitto(executable, Path(folder), *QUEUES) as far,
        Trial(Path(folder), near, far, case=f"soak at {options.rate:g}/s") as trial,
    ):
        samples = load(trial, options.seconds, options.rate)
        try:
            account = trial.finish()
        except AssertionError as error:
            print(f"scripts/soak: lost: {error}", file=sys.stderr)
            return 1
    figures, wrong = judge(samples, account)
    print(json.dumps(figures, indent=2))
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for each in wrong:
        print(f"scripts/soak: {each}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
