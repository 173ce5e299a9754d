"""The measurements behind scripts/bench-delivery: a message's way through edge-serve, against an echo in C.

usage: python scripts/delivery_bench/measure.py FOLDER [--rounds N]        (FOLDER holds the compiled `echo` and `load`)

All contestants run at the same time on one mosquitto (set_tcp_nodelay, MQTT 5, QoS 1, 100 bytes) and get the load in turn, so
that what else the machine does meets them alike; a figure is the median of its rounds. The model is tests/data/models/null.tflite:
25 float32 in (100 bytes), the first of them out. What edge-serve publishes is its whole JSON result, about 500 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "data" / "models" / "null.tflite"
ROUNDS = 9
READY_TIMEOUT_S = 30.0
PAYLOAD_BYTES = 100
# Messages of a round: one at a time, and 20 on the way.
ONE_COUNT, MANY_COUNT, MANY = 2000, 10000, 20

CONFIG = """\
schema = 1
device = "{name}"
state_dir = "{state}"
[status]
enabled = false
[spool]
enabled = {spool}
[mqtt]
url = "mqtt://127.0.0.1:{port}"
[pipeline]
name = "null"
model = "{model}"
threads = 1
[pipeline.source]
type = "mqtt"
topic = "bench/{name}/in"
[pipeline.sink]
type = "mqtt"
topic = "bench/{name}/out"
"""


@dataclass
class Bar:
    """One measured bar: met when `figure` is at most `limit`, or at least where `at_least` says so."""

    name: str
    figure: float
    limit: float
    unit: str
    note: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Say whether the bar is met."""
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit


@dataclass
class Contestant:
    """Somebody who answers messages, and what was measured of it."""

    name: str
    process: subprocess.Popen[str]
    p50_us: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    """Processor time of a message at 20 on the way."""
    cpu_one_us: list[float] = field(default_factory=list)
    written: int = 0
    """Bytes that went to a disk in all rounds."""

    def summary(self) -> dict[str, float]:
        """Give the medians."""
        return {
            "p50_us": statistics.median(self.p50_us),
            "rate": statistics.median(self.rate),
            "cpu_us": statistics.median(self.cpu_us),
            "cpu_one_us": statistics.median(self.cpu_one_us),
            "written_bytes": self.written,
        }


def free_port() -> int:
    """Give a TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_broker(folder: Path, stack: ExitStack) -> int:
    """Start mosquitto; gives its port."""
    port = free_port()
    lines = [f"listener {port} 127.0.0.1", "allow_anonymous true", "set_tcp_nodelay true"]
    if os.geteuid() == 0:
        lines.append("user root")
    file = folder / "mosquitto.conf"
    file.write_text("\n".join(lines) + "\n", encoding="ascii")
    executable = os.environ.get("EDGE_SERVE_MOSQUITTO") or "mosquitto"
    process = subprocess.Popen([executable, "-c", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(end, process)
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return port
        if time.monotonic() > deadline or process.poll() is not None:
            raise SystemExit(f"{executable} does not start")
        time.sleep(0.02)


def end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """End a process."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(READY_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def start(name: str, command: list[str], word: str, stack: ExitStack) -> Contestant:
    """Start a contestant and wait until it says a word on its standard error."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT)
    stack.callback(end, process)
    assert process.stderr is not None
    seen = []
    while word not in (line := process.stderr.readline()):
        seen.append(line)
        if not line:
            raise SystemExit(f"{name} ended before it was ready:\n{''.join(seen)}")
    return Contestant(name, process)


def edge_serve(name: str, folder: Path, port: int, stack: ExitStack, *, late: bool) -> Contestant:
    """Start edge-serve; not `late`: without a spool, and acknowledging on arrival."""
    config = folder / f"{name}.toml"
    words = {"name": name, "state": folder / name, "port": port, "model": MODEL, "spool": str(late).lower()}
    config.write_text(CONFIG.format(**words), encoding="utf-8")
    program = ["-m", "edge_serve"] if late else [str(Path(__file__).with_name("auto_acknowledge.py"))]
    return start(name, [sys.executable, *program, "run", "-c", str(config)], "started in", stack)


def processor_time(pid: int) -> float:
    """Give the seconds of processor time that all threads of a process have used, to a nanosecond."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text(encoding="ascii").split()[0])
    return total / 1e9


def disk_bytes(pid: int) -> int:
    """Give the bytes that a process has caused to be written to a disk."""
    for line in Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines():
        if line.startswith("write_bytes:"):
            return int(line.split()[1])
    return 0


def load(program: Path, port: int, name: str, window: int, number: int) -> dict[str, float]:
    """Put a load on a contestant; gives what the load generator has measured."""
    topics = [f"bench/{name}/in", f"bench/{name}/out"]
    warm_up = number // 10
    numbers = [window, number, warm_up, PAYLOAD_BYTES]
    command = [str(program), "127.0.0.1", str(port), *topics, *map(str, numbers), "5"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the load on {name} failed: {done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def measure(contestants: list[Contestant], put: Callable[[str, int, int], dict[str, float]], rounds: int) -> None:
    """Put the loads on all in turn; the first round warms up and does not count."""
    for turn in range(rounds + 1):
        # Not always in the same order: whoever comes after somebody else finds the caches as that one left them.
        shift = turn % len(contestants)
        for each in contestants[shift:] + contestants[:shift]:
            pid = each.process.pid
            written, begun = disk_bytes(pid), processor_time(pid)
            one = put(each.name, 1, ONE_COUNT)
            between = processor_time(pid)
            many = put(each.name, MANY, MANY_COUNT)
            ended = processor_time(pid)
            if turn:
                each.p50_us.append(one["p50_us"])
                each.rate.append(many["rate"])
                each.cpu_one_us.append((between - begun) / (ONE_COUNT * 1.1) * 1e6)
                each.cpu_us.append((ended - between) / (MANY_COUNT * 1.1) * 1e6)
                each.written += disk_bytes(pid) - written


def spread(contestant: Contestant) -> str:
    """Give the median latency with the lowest and highest of all rounds."""
    found = contestant.p50_us
    return f"{statistics.median(found):.0f} ({min(found):.0f} … {max(found):.0f})"


def bars(echo: Contestant, late: Contestant, auto: Contestant) -> list[Bar]:
    """Compare the medians."""
    c, ours, plain = echo.summary(), late.summary(), auto.summary()
    return [
        Bar(
            "delivery: p50 of one message at a time, against an echo in C",
            ours["p50_us"] / c["p50_us"],
            2.5,
            "×",
            # Where nothing else runs, each wake-up of an idle processor counts for both, and the echo's own figure varies most.
            f"{spread(late)} and {spread(echo)} µs",
        ),
        Bar(
            "delivery: rate with 20 on the way, against an echo in C",
            ours["rate"] / c["rate"],
            0.30,
            "×",
            f"{ours['rate']:.0f}/s and {c['rate']:.0f}/s; {ours['cpu_us']:.0f} µs and {c['cpu_us']:.0f} µs of processor time",
            at_least=True,
        ),
        Bar(
            "delivery: p50 with no loss, against acknowledging on arrival",
            ours["p50_us"] / plain["p50_us"],
            1.1,
            "×",
            f"{ours['p50_us']:.0f} µs and {plain['p50_us']:.0f} µs; rates {ours['rate']:.0f}/s and {plain['rate']:.0f}/s",
        ),
        Bar("delivery: bytes to disk while upstream is healthy", ours["written_bytes"], 0, "bytes"),
    ]


def main() -> int:
    """Measure and print; gives 1 if a bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    built: Path = arguments.folder
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port = start_broker(folder, stack)
        address = ["127.0.0.1", str(port)]
        echo = start("echo", [str(built / "echo"), *address, "bench/echo/in", "bench/echo/out", "5"], "ready", stack)
        late = edge_serve("late", folder, port, stack, late=True)
        auto = edge_serve("auto", folder, port, stack, late=False)
        contestants = [echo, late, auto]
        measure(
            contestants,
            lambda name, window, number: load(built / "load", port, name, window, number),
            arguments.rounds,
        )
        found = bars(echo, late, auto)
    document = {
        "v": 1,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "rounds": arguments.rounds,
        "contestants": {
            each.name: {**each.summary(), "p50_us_all": each.p50_us, "rate_all": each.rate} for each in contestants
        },
        "bars": [{**asdict(bar), "met": bar.met} for bar in found],
    }
    (built.parent / "delivery.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    width = max(len(bar.name) for bar in found)
    for bar in found:
        bound = "at least" if bar.at_least else "at most"
        print(
            f"{'met ' if bar.met else 'MISSED'}  {bar.name:<{width}}  {bar.figure:8.3f} {bar.unit:<6} ({bound} {bar.limit:g})  {bar.note}"
        )
    return 0 if all(bar.met for bar in found) else 1


if __name__ == "__main__":
    sys.exit(main())
