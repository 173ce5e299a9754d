"""`edge-serve run … | head`: when whoever reads the results is gone, the run ends at once and says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MODEL = Path(__file__).parents[1] / "data" / "models" / "digits.tflite"
IMAGE = Path(__file__).parents[1] / "data" / "photos" / "digit-7.png"

CONFIG = """\
schema = 1
state_dir = "state"
[pipeline]
model = "{model}"
[pipeline.source]
type = "file"
path = "photos"
[pipeline.sink]
type = "stdout"
"""


def test_a_run_whose_reader_has_gone_ends_with_exit_code_3(tmp_path: Path) -> None:
    (tmp_path / "edge-serve.toml").write_text(CONFIG.format(model=MODEL), encoding="utf-8")
    (tmp_path / "photos").mkdir()
    for number in range(500):
        (tmp_path / "photos" / f"{number:03}.png").write_bytes(IMAGE.read_bytes())
    with subprocess.Popen(
        [sys.executable, "-m", "edge_serve", "run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith('{"v":1,')
        process.stdout.close()
        log = process.stderr.read()
        assert process.wait(timeout=5) == 3
    assert "stopping: whoever read standard output is gone" in log
    assert "Traceback" not in log
