"""What a supervisor hears on a real datagram socket, by path and in the abstract namespace; and that none is needed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_serve.notify import Notifier


class Supervisor:
    """The other end: a datagram socket."""

    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(address)
        self.sock.settimeout(5)

    def heard(self) -> list[str]:
        """Give the lines of the next message."""
        return self.sock.recv(4096).decode().split("\n")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody supervises the tests."""
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["path", "abstract"])
def supervisor(
    request: pytest.FixtureRequest, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Supervisor]:
    """A supervisor that the environment names."""
    name = f"@edge-serve-test-{os.getpid()}" if request.param == "abstract" else str(short_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    made = Supervisor("\0" + name[1:] if request.param == "abstract" else name)
    yield made
    made.sock.close()


def test_everything_is_told(supervisor: Supervisor) -> None:
    notifier = Notifier()
    assert notifier.listening
    notifier.loading("digits", 90)
    assert supervisor.heard() == ["EXTEND_TIMEOUT_USEC=90000000", "STATUS=loading digits"]
    notifier.ready("2 pipelines")
    assert supervisor.heard() == ["READY=1", "STATUS=2 pipelines"]
    notifier.status("degraded: so it is")
    assert supervisor.heard() == ["STATUS=degraded: so it is"]
    notifier.ping()
    assert supervisor.heard() == ["WATCHDOG=1"]
    notifier.reloading()
    first, second, third = supervisor.heard()
    assert (first, third) == ("RELOADING=1", "STATUS=reloading")
    name, _, value = second.partition("=")
    assert name == "MONOTONIC_USEC"
    assert int(value) > 0
    notifier.stopping("signal 15")
    assert supervisor.heard() == ["STOPPING=1", "STATUS=signal 15"]


def test_no_text_can_become_another_line(supervisor: Supervisor) -> None:
    Notifier().status("two\nlines\r\nREADY=1 " + "x" * 1000)
    (line,) = supervisor.heard()
    assert line.startswith("STATUS=two lines READY=1 x")
    assert len(line) < 300


def test_without_a_supervisor_nothing_happens() -> None:
    notifier = Notifier()
    assert not notifier.listening
    assert notifier.ping_s is None
    notifier.ready("alone")
    notifier.ping()


@pytest.mark.parametrize("name", ["vsock:2:1234", "relative/path", ""])
def test_an_address_that_is_no_socket_of_this_machine_is_no_supervisor(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    assert not Notifier().listening
    assert Notifier().ping_s is None


def test_a_supervisor_that_is_gone_is_complained_of_once(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(short_path / "gone"))
    notifier = Notifier()
    for _ in range(3):
        notifier.ready("all the same")
    assert [record.getMessage() for record in caplog.records] == [
        "cannot tell the supervisor (NOTIFY_SOCKET) READY=1: [Errno 2] No such file or directory"
    ]


def test_a_supervisor_that_takes_nothing_holds_nobody_up(supervisor: Supervisor) -> None:
    notifier = Notifier()
    for _ in range(10_000):  # many more than a socket's queue holds
        notifier.ping()


@pytest.mark.parametrize(
    ("usec", "pid", "interval"),
    [
        ("30000000", None, 15.0),
        ("30000000", "mine", 15.0),
        ("30000000", "1", None),
        ("0", None, None),
        ("nonsense", None, None),
        ("-5", None, None),
        (None, None, None),
    ],
)
def test_pings_come_in_half_the_watchdogs_time(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str | None, interval: float | None
) -> None:
    if usec is not None:
        monkeypatch.setenv("WATCHDOG_USEC", usec)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "mine" else pid)
    assert Notifier().ping_s == interval
