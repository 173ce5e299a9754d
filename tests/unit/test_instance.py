"""One service for each state folder: the second is refused by name, and a killed one leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_serve.errors import EXIT_UNAVAILABLE, UnavailableError
from edge_serve.instance import FILE, Instance
from tests.support import environment

HOLDER = """
import sys, time
from pathlib import Path
from edge_serve.instance import Instance
instance = Instance(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_the_second_one_is_refused_and_told_who_is_the_first(tmp_path: Path) -> None:
    first = Instance(tmp_path)
    with pytest.raises(UnavailableError, match=rf"{tmp_path}: another edge-serve \(process {os.getpid()}\)") as refused:
        Instance(tmp_path)
    assert refused.value.exit_code == EXIT_UNAVAILABLE
    first.close()


def test_the_end_gives_the_folder_back(tmp_path: Path) -> None:
    for _ in range(3):
        instance = Instance(tmp_path)
        instance.close()
        instance.close()


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    instance = Instance(tmp_path / "var" / "lib")
    assert (tmp_path / "var" / "lib" / FILE).read_text() == f"{os.getpid()}\n"
    instance.close()


def test_a_killed_process_has_given_it_back(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, env=environment(), text=True
    )
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UnavailableError, match=rf"process {holder.pid}"):
            Instance(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
    instance = Instance(tmp_path)
    assert (tmp_path / FILE).read_text() == f"{os.getpid()}\n", "not the killed one's"
    instance.close()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\xfe" * 100])
def test_what_stands_in_the_file_counts_for_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    first = Instance(tmp_path)
    (tmp_path / FILE).write_bytes(content)  # as somebody's editor might
    with pytest.raises(UnavailableError, match=r"another edge-serve uses this state folder"):
        Instance(tmp_path)
    first.close()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"):
        Instance(tmp_path)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_folder_that_cannot_be_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Instance(tmp_path / "file" / "state")
