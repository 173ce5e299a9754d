"""The measurements behind scripts/bench: each bar against what a bare script does on the same machine.

usage: python scripts/benchmarks.py make-model FOLDER | measure FOLDER [--rounds N]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from edge_serve.demo.broker import EmbeddedBroker  # noqa: E402  # from this checkout, installed or not

ROUNDS = 7
READY_TIMEOUT_S = 60

CONFIG = """\
schema = 1
device = "bench"
[mqtt]
url = "{url}"
[pipeline]
name = "bench"
model = "{model}"
[pipeline.source]
type = "mqtt"
topic = "bench/in"
[pipeline.sink]
type = "mqtt"
"""

# What somebody would write by hand: import, load, warm, subscribe.
BARE = """\
import sys, threading
import numpy as np
import paho.mqtt.client as mqtt
from ai_edge_litert.interpreter import Interpreter

interpreter = Interpreter(model_path=sys.argv[1], num_threads=1)
interpreter.allocate_tensors()
detail = interpreter.get_input_details()[0]
for _ in range(2):
    interpreter.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))
    interpreter.invoke()
subscribed = threading.Event()
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, "bare", protocol=mqtt.MQTTv5)
client.on_connect = lambda *_: client.subscribe("bench/in", 1)
client.on_subscribe = lambda *_: subscribed.set()
client.connect("127.0.0.1", int(sys.argv[2]))
client.loop_start()
subscribed.wait()
print("ready", file=sys.stderr, flush=True)
threading.Event().wait()
"""

# The same variant by hand: load, run the float model, convert, run the file on the same samples.
BARE_CONVERT = """\
import sys
import numpy as np, tensorflow as tf
folder, data, mode, held = sys.argv[1], np.load(sys.argv[2])["arr_0"], sys.argv[3], int(sys.argv[4])
function = tf.saved_model.load(folder).signatures["serving_default"]
name = next(iter(function.structured_input_signature[1]))
for sample in data[:held]:
    function(**{name: tf.constant(sample[None])})
converter = tf.lite.TFLiteConverter.from_saved_model(folder)
converter.optimizations = [tf.lite.Optimize.DEFAULT]
if mode == "int8":
    converter.representative_dataset = lambda: ({name: sample[None]} for sample in data[held:])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
else:
    converter.target_spec.supported_types = [tf.float16]
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(model_content=converter.convert())
interpreter.allocate_tensors()
for sample in data[:held]:
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], sample[None])
    interpreter.invoke()
    interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
"""
CONVERT_ROUNDS = 3
POLL_S = 0.05


@dataclass
class Bar:
    """One measured bar: it is met when `figure` is at most `limit`."""

    name: str
    figure: float
    limit: float
    unit: str
    note: str = ""

    @property
    def met(self) -> bool:
        """Say whether the bar is met."""
        return self.figure <= self.limit


def make_model(folder: Path) -> None:
    """Save MobileNetV2 (224×224, 1000 classes) with batch-norm statistics as training leaves them, and calibration data."""
    tf: Any = importlib.import_module("tensorflow")
    tf.keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    model = tf.keras.applications.MobileNetV2(weights=None)
    images = random.uniform(-1, 1, (64, 224, 224, 3)).astype(np.float32)
    for layer in model.layers:
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            layer.momentum = 0.5
    # A few passes in training mode leave statistics that fit the activations, as a trained model's do.
    for start in range(0, 64, 16):
        model(images[start : start + 16], training=True)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "saved_model", ignore_errors=True)
    model.export(str(folder / "saved_model"), verbose=False)
    np.savez_compressed(folder / "calibration.npz", images[:32])


def start(command: list[str], word: str, state: Path) -> tuple[float, float]:
    """Start a program and wait for a word on its standard error; gives the seconds until then and its memory in MiB."""
    environment = {**os.environ, "XDG_STATE_HOME": str(state)}
    begun = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    deadline = begun + READY_TIMEOUT_S
    seen = []
    while time.perf_counter() < deadline:
        line = process.stderr.readline()
        seen.append(line)
        if word in line:
            break
        if not line:
            raise SystemExit(f"{command} ended before it was ready:\n{''.join(seen)}")
    elapsed = time.perf_counter() - begun
    memory = resident(process.pid)
    process.kill()
    process.wait()
    process.stderr.close()
    return elapsed, memory


def resident(pid: int) -> float:
    """Give a process's resident memory in MiB (VmRSS)."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"process {pid} has no VmRSS")


def measure_start(folder: Path, rounds: int, binaries: Path) -> list[Bar]:
    """Measure exec to ready and resident memory of the installed wheel, in turn with the bare script."""
    model = folder / "models" / "mobilenetv2"
    times: dict[str, list[float]] = {"first": [], "again": [], "bare": []}
    memory: dict[str, list[float]] = {"first": [], "again": [], "bare": []}
    with tempfile.TemporaryDirectory() as name, EmbeddedBroker(Path(name)) as broker:
        config, script, state = Path(name, "edge-serve.toml"), Path(name, "bare.py"), Path(name, "state")
        config.write_text(CONFIG.format(url=broker.url, model=model.absolute()), encoding="utf-8")
        script.write_text(BARE, encoding="utf-8")
        ours = ([str(binaries / "edge-serve"), "run", "-c", str(config)], "started in")
        bare = ([str(binaries / "python"), str(script), str(model / "1" / "model.tflite"), str(broker.port)], "ready")
        for turn in range(rounds + 1):
            shutil.rmtree(state, ignore_errors=True)
            for who, (command, word) in {"first": ours, "again": ours, "bare": bare}.items():
                elapsed, size = start(command, word, state)
                if turn:  # the first round reads the files into memory
                    times[who].append(elapsed)
                    memory[who].append(size)
    seconds = {who: statistics.median(values) for who, values in times.items()}
    sizes = {who: statistics.median(values) for who, values in memory.items()}
    spread = (
        f"{min(times['again']):.2f} … {max(times['again']):.2f}; a model's very first start: {seconds['first']:.2f}"
    )
    return [
        Bar("run: exec to ready, int8 MobileNetV2", seconds["again"], 1.0, "s", spread),
        Bar(
            "run: exec to ready, against a bare script",
            seconds["again"] / seconds["bare"],
            1.5,
            "×",
            f"bare script: {seconds['bare']:.2f} s; a model's very first start: "
            f"{seconds['first'] / seconds['bare']:.2f} ×",
        ),
        Bar(
            "run: resident memory, against a bare script",
            max(sizes["first"], sizes["again"]) / sizes["bare"],
            1.25,
            "×",
            f"{max(sizes['first'], sizes['again']):.0f} MiB and {sizes['bare']:.0f} MiB",
        ),
    ]


def measure_convert(folder: Path) -> list[Bar]:
    """Measure time and peak memory (all processes together) of a conversion, in turn with the bare script."""
    bars = []
    with tempfile.TemporaryDirectory() as name:
        script = Path(name, "bare.py")
        script.write_text(BARE_CONVERT, encoding="utf-8")
        for mode in ("int8", "float16"):
            seconds: dict[str, list[float]] = {"ours": [], "bare": []}
            peaks: dict[str, list[float]] = {"ours": [], "bare": []}
            for number in range(CONVERT_ROUNDS):
                made = Path(name, f"{mode}-{number}")
                program = str(Path(sys.executable).with_name("edge-serve"))
                ours = [program, "convert", str(folder / "saved_model"), "-o", str(made), "--quantize", mode, "--json"]
                data = str(folder / "calibration.npz")
                for who, command in {
                    "ours": [*ours, "--calibration", data],
                    "bare": [sys.executable, str(script), str(folder / "saved_model"), data, mode, "6"],
                }.items():
                    elapsed, peak = watch(command)
                    seconds[who].append(elapsed)
                    peaks[who].append(peak)
                shutil.rmtree(made)
            for what, figures, unit in (("time", seconds, "s"), ("peak memory", peaks, "MiB")):
                ours_figure, bare_figure = (statistics.median(figures[who]) for who in ("ours", "bare"))
                note = f"{ours_figure:.1f} {unit} and {bare_figure:.1f} {unit}"
                label = f"convert: {what}, MobileNetV2 to {mode}, against a bare script"
                bars.append(Bar(label, ours_figure / bare_figure, 1.3, "×", note))
    return bars


def watch(command: list[str]) -> tuple[float, float]:
    """Run a program; gives its seconds and the largest sum of its and its children's memory (Pss) in MiB."""
    begun = time.perf_counter()
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(proportional(pid) for pid in family(process.pid)))
        time.sleep(POLL_S)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return time.perf_counter() - begun, peak


def family(pid: int) -> list[int]:
    """Give a process and all below it."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [member for child in children.read_text(encoding="ascii").split() for member in family(int(child))]
        except OSError:
            pass  # ended in between
    return found


def proportional(pid: int) -> float:
    """Give a process's share of memory in MiB: its own pages, and its part of those it shares."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def install(folder: Path) -> tuple[Path, float, bool]:
    """Install this machine's wheel without extras; gives its commands' folder, its size in MB, and whether TensorFlow came along."""
    machine = {"aarch64": "aarch64", "x86_64": "x86_64"}.get(platform.machine(), "armv7l")
    wheel = next(iter((ROOT / "dist").glob(f"edge_serve-*{machine}.whl")))
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    before = tree_bytes(folder / "lib")
    quiet = ["-q", "--disable-pip-version-check"]
    subprocess.run([python, "-m", "pip", "install", *quiet, wheel], check=True)
    size = (tree_bytes(folder / "lib") - before) / 1e6
    listing = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
    )
    return folder / "bin", size, any(line.lower().startswith("tensorflow") for line in listing.stdout.splitlines())


def measure_wheel(binaries: Path, size: float, has_tensorflow: bool) -> list[Bar]:
    """Measure how fast `--help` answers on the installed wheel, and how right the demo's models are there."""
    helps = []
    for turn in range(ROUNDS + 1):
        begun = time.perf_counter()
        subprocess.run([binaries / "edge-serve", "--help"], check=True, capture_output=True)
        if turn:  # the first run reads the files into memory
            helps.append(time.perf_counter() - begun)
    demo = subprocess.run([binaries / "edge-serve", "demo", "--json"], capture_output=True, text=True)
    if demo.returncode not in (0, 1):
        raise SystemExit(f"edge-serve demo failed on the installed wheel:\n{demo.stderr}")
    losses = [each["float_accuracy"] - each["accuracy"] for each in json.loads(demo.stdout)["pipelines"]]
    return [
        Bar("wheel: installed without extras", size, 200, "MB", "numpy, pillow and the runtime counted in"),
        Bar("wheel: distributions of TensorFlow in it", float(has_tensorflow), 0, ""),
        Bar("wheel: edge-serve --help", statistics.median(helps), 0.15, "s", f"{min(helps):.3f} … {max(helps):.3f}"),
        Bar(
            "demo: points of accuracy lost by int8 (the worst)",
            100 * max(losses),
            1.0,
            "points",
            "on the installed wheel",
        ),
    ]


def tree_bytes(folder: Path) -> int:
    """Add up the sizes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def main() -> int:
    """Run the sub-command; gives 1 if a bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["make-model", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    if arguments.what == "make-model":
        make_model(arguments.folder)
        return 0
    with tempfile.TemporaryDirectory() as name:
        binaries, size, has_tensorflow = install(Path(name))
        bars = [
            *measure_start(arguments.folder, arguments.rounds, binaries),
            *measure_wheel(binaries, size, has_tensorflow),
            *measure_convert(arguments.folder),
        ]
    document = {
        "v": 1,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "bars": [{**asdict(bar), "met": bar.met} for bar in bars],
    }
    (arguments.folder / "bench.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    width = max(len(bar.name) for bar in bars)
    for bar in bars:
        print(
            f"{'met ' if bar.met else 'MISSED'}  {bar.name:<{width}}  {bar.figure:8.3f} {bar.unit:<6} (at most {bar.limit:g})  {bar.note}"
        )
    return 0 if all(bar.met for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
