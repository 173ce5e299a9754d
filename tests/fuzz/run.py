"""Fuzzes one target for a time: coverage-guided where atheris is installed, else with hypothesis. See scripts/fuzz."""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
import tempfile
import time
from pathlib import Path

# What a target may take of memory, in MiB: libFuzzer ends the run at more.
MAX_MIB = 2048
# One input may take this many seconds.
MAX_SECONDS = 10


def main(arguments: list[str]) -> int:
    """Run `TARGET SECONDS`; 0: nothing was found, 1: something was (what, is on standard error), 2: wrong use."""
    if len(arguments) != 2 or not arguments[1].isdecimal():
        sys.stderr.write(
            "usage: scripts/fuzz TARGET SECONDS (TARGET: one of the names in tests/fuzz/targets.py, or all)\n"
        )
        return 2
    name, seconds = arguments[0], int(arguments[1])
    guided = importlib.util.find_spec("atheris") is not None
    if guided:
        atheris = importlib.import_module("atheris")
        # Imported here and not above: what is imported inside is followed branch by branch.
        with atheris.instrument_imports(include=["edge_serve", "json", "zipfile", "tomllib", "csv", "numpy.lib"]):
            from tests.fuzz import targets
    else:
        from tests.fuzz import targets
    if name not in targets.TARGETS:
        sys.stderr.write(f"unknown target {name!r}; known: {', '.join(targets.TARGETS)}\n")
        return 2
    from tests.fuzz.seeds import CHOOSING, SEEDS

    seeds = [bytes([number]) * (name in CHOOSING) + seed for number, seed in enumerate(SEEDS[name])]
    return _guided(name, seeds, seconds) if guided else _unguided(name, seconds)


def _guided(name: str, seeds: list[bytes], seconds: int) -> int:
    from tests.fuzz.targets import check

    atheris = importlib.import_module("atheris")  # without types, and not everywhere
    corpus = Path(tempfile.mkdtemp(prefix=f"edge-serve-fuzz-{name}-"))
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [f"-max_total_time={seconds}", f"-rss_limit_mb={MAX_MIB}", f"-timeout={MAX_SECONDS}", "-max_len=65536"]
    sys.stderr.write(f"{name}: {seconds} s, corpus in {corpus}\n")

    def attempt(data: bytes) -> None:
        check(name, data)

    # It does not come back: libFuzzer ends the process, with 0 when the time is over.
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={corpus}/found-", str(corpus)], attempt)
    atheris.Fuzz()
    return 0


def _unguided(name: str, seconds: int) -> int:
    from hypothesis import HealthCheck, given, seed, settings

    from tests.fuzz.targets import check
    from tests.fuzz.test_targets import inputs

    sys.stderr.write(f"{name}: {seconds} s with hypothesis; install atheris to be guided by coverage\n")
    end = time.monotonic() + seconds
    tried = 0
    while time.monotonic() < end:

        @seed(random.getrandbits(64))
        @settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(inputs(name))
        def attempt(data: bytes) -> None:
            nonlocal tried
            tried += 1
            assert check(name, data) == check(name, data), "another answer for the same bytes"

        attempt()
    sys.stderr.write(f"{name}: {tried} inputs, nothing found\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
