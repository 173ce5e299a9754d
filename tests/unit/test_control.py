"""The control socket: who may listen, what is answered, and that no caller can harm a service."""

from __future__ import annotations

import json
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_serve import control
from edge_serve.control import FILE, MAX_CONNECTIONS, Caller, Control, Peer
from edge_serve.errors import ProtocolError, UnavailableError, UsageError
from tests.support import PATIENCE_S, Raw, stays, wait_for


def echo(request: dict[str, Any], peer: Peer) -> None:
    """Answer with what was asked."""
    peer.send({"type": "echo", "said": request.get("word")}, b"body")


def hold(request: dict[str, Any], peer: Peer) -> None:
    """Stay until the caller leaves or the service ends."""
    peer.send({"type": "held"})
    wait_for(lambda: peer.left() or peer.stopping, "the end of it")
    peer.send({"type": "bye"})


def fail(request: dict[str, Any], peer: Peer) -> None:
    """Fail in one of several ways."""
    raise {"usage": UsageError, "unavailable": UnavailableError, "bug": ZeroDivisionError}[request["word"]]("so it is")


COMMANDS = {"echo": echo, "hold": hold, "fail": fail}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Control]:
    """A control socket in tmp_path."""
    listening = Control(tmp_path, COMMANDS)
    yield listening
    listening.close()


def ask(folder: Path, kind: str, **fields: Any) -> Any:
    """Ask once and give the first answer."""
    with Caller(folder, 1024) as caller:
        caller.ask(kind, **fields)
        message = caller.receive(PATIENCE_S)
        assert message is not None
        return message


# Answers.


def test_a_request_is_answered(served: Control, tmp_path: Path) -> None:
    message = ask(tmp_path, "echo", word="hello")
    assert (message.header["said"], message.body) == ("hello", b"body")


@pytest.mark.parametrize(
    ("word", "error"), [("usage", UsageError), ("unavailable", UnavailableError), ("bug", UnavailableError)]
)
def test_errors_keep_their_kind_on_the_way(served: Control, tmp_path: Path, word: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="so it is"):
        ask(tmp_path, "fail", word=word)
    assert ask(tmp_path, "echo", word="still there").header["said"] == "still there"


@pytest.mark.parametrize(
    ("request_line", "why"),
    [
        (b'{"type": "nonsense", "v": 1}\n', "unknown request 'nonsense'; known: echo, hold, fail"),
        (b'{"type": "echo", "v": 2}\n', "version 2"),
        (b'{"type": "echo"}\n', "version"),
        (b'{"type": "echo", "v": 1, "length": 3}\nabc', "no body"),
        (b"nonsense\n", "not a JSON line"),
        (b"[1]\n", "type"),
        (b"x" * 10_000, "longer than"),
        (b'{"type": "echo", ', "closed before"),
        (b"", "closed before"),
    ],
)
def test_what_is_no_request_is_refused(served: Control, tmp_path: Path, request_line: bytes, why: str) -> None:
    with Raw.connect(tmp_path / FILE) as raw:
        raw.send(request_line).finish()
        answer = raw.answer()
    assert answer is not None
    assert (answer["type"], answer["code"]) == ("error", "protocol")
    assert why in answer["message"]


def test_a_caller_that_says_nothing_is_let_go(served: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "REQUEST_TIMEOUT_S", 0.1)
    with Raw.connect(tmp_path / FILE) as raw:
        answer = raw.answer()
        assert answer is not None
        assert "within 0.1 s" in answer["message"]
        assert raw.ended()


def test_a_body_without_end_is_not_waited_for(served: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "REQUEST_TIMEOUT_S", 0.2)
    with Raw.connect(tmp_path / FILE) as raw:
        raw.send(b'{"type": "echo", "v": 1, "length": 1000000000000}\n' + b"x" * 1000)
        answer = raw.answer()
    assert answer is not None
    assert answer["code"] == "protocol"


def test_only_so_many_are_answered_at_a_time(served: Control, tmp_path: Path) -> None:
    held = [Caller(tmp_path) for _ in range(MAX_CONNECTIONS)]
    for caller in held:
        caller.ask("hold")
        assert caller.receive(PATIENCE_S) is not None
    with Caller(tmp_path) as late, pytest.raises(UnavailableError, match="try later"):
        late.receive(PATIENCE_S)
    held.pop().close()

    def answered() -> bool:
        try:
            return bool(ask(tmp_path, "echo"))
        except UnavailableError:
            return False

    wait_for(answered, "there is room again")
    for caller in held:
        caller.close()


def test_who_closes_the_sending_half_still_hears_the_end(served: Control, tmp_path: Path) -> None:
    with Caller(tmp_path) as caller:
        caller.ask("hold")
        said = [caller.receive(PATIENCE_S)]
        caller.finish()
        said.append(caller.receive(PATIENCE_S))
        with pytest.raises(UnavailableError, match="closed"):
            caller.receive(PATIENCE_S)
    assert [each.header["type"] for each in said if each is not None] == ["held", "bye"]


def test_nothing_within_the_time_is_no_error(served: Control, tmp_path: Path) -> None:
    with Caller(tmp_path) as caller:
        caller.ask("hold")
        assert caller.receive(PATIENCE_S) is not None
        assert caller.receive(0.05) is None


# Listening.


def test_the_socket_is_its_owners_alone(served: Control, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    listening = Control(tmp_path / "state" / "deep", COMMANDS)
    assert ask(tmp_path / "state" / "deep", "echo").header["type"] == "echo"
    listening.close()


def test_a_long_path_is_no_hindrance(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120) / ("y" * 120)
    listening = Control(folder, COMMANDS)
    assert ask(folder, "echo").header["type"] == "echo"
    with pytest.raises(UnavailableError, match="another service"):
        Control(folder, COMMANDS)
    listening.close()
    assert not (folder / FILE).exists()


def test_the_end_removes_the_socket_and_the_next_start_has_it_again(tmp_path: Path) -> None:
    for _ in range(3):
        listening = Control(tmp_path, COMMANDS)
        assert ask(tmp_path, "echo").header["type"] == "echo"
        listening.close()
        assert not (tmp_path / FILE).exists()
        with pytest.raises(UnavailableError, match="no service answers"):
            Caller(tmp_path)


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / FILE))
        left.listen(1)
    assert (tmp_path / FILE).exists()
    listening = Control(tmp_path, COMMANDS)
    assert ask(tmp_path, "echo").header["type"] == "echo"
    listening.close()


def test_a_living_service_keeps_its_socket(served: Control, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="another service"):
        Control(tmp_path, {})
    assert ask(tmp_path, "echo").header["type"] == "echo"


def test_what_is_no_socket_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("precious")
    with pytest.raises(UnavailableError, match="no socket"):
        Control(tmp_path, {})
    assert (tmp_path / FILE).read_text() == "precious"


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="cannot listen"):
        Control(tmp_path / "file" / "state", {})


def test_the_end_is_not_kept_up_by_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "CLOSE_GRACE_S", 0.2)

    def flood(request: dict[str, Any], peer: Peer) -> None:
        while True:
            peer.send({"type": "flood"}, b"x" * 100_000)

    listening = Control(tmp_path, {**COMMANDS, "flood": flood})
    with Caller(tmp_path) as silent, Caller(tmp_path) as stuck, Caller(tmp_path) as told:
        stuck.ask("flood")
        told.ask("hold")
        assert told.receive(PATIENCE_S) is not None
        closing = threading.Thread(target=listening.close)
        closing.start()
        closing.join(PATIENCE_S)
        assert not closing.is_alive()
        message = told.receive(PATIENCE_S)
        assert message is not None
        assert message.header["type"] == "bye", "who listens hears the end"
        with pytest.raises((UnavailableError, ProtocolError)):
            silent.receive(PATIENCE_S)
    wait_for(lambda: not any(each.name == "control.peer" for each in threading.enumerate()), "no thread is left")


def test_a_service_that_waits_for_callers_uses_no_time(served: Control) -> None:
    thread = next(each for each in threading.enumerate() if each.name == "control")
    path = Path(f"/proc/self/task/{thread.native_id}/stat")
    before = path.read_text().split()[13:15]
    stays(lambda: path.read_text().split()[13:15] == before, "the thread sleeps", 0.3)


def test_a_message_is_one_json_line(served: Control, tmp_path: Path) -> None:
    with Raw.connect(tmp_path / FILE) as raw:
        raw.send(b'{"type": "echo", "v": 1, "word": "x"}\n')
        data = b""
        while len(data) < 4 or not data.endswith(b"body"):
            data += raw.sock.recv(4096)
    line, _, body = data.partition(b"\n")
    assert json.loads(line) == {"type": "echo", "said": "x", "length": 4}
    assert body == b"body"
