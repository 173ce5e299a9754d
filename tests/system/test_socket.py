"""The socket source in a running service: frames and answers, bad clients, limits, Unix and TCP, tokens."""

from __future__ import annotations

import json
import os
import resource
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_serve.app import load
from edge_serve.errors import ConfigError
from tests.support import (
    PATIENCE_S,
    InProcess,
    Proxy,
    Raw,
    Service,
    clients,
    cpu_seconds,
    digit_arrays,
    digit_png,
    free_port,
    motion_label,
    motion_series,
    resident_bytes,
    stays,
    wait_for,
    write_config,
)

CONFIG = """
    schema = 1
    device = "dev"
    grace_s = {grace}
    [pipeline]
    name = "digits"
    model = "{digits}"
    threads = 1
    [pipeline.output]
    type = "classification"
    top_k = 1
    [pipeline.source]
    type = "socket"
    listen = "{listen}"
    {source}
    {sink}
"""
WINDOW = """
    schema = 1
    device = "dev"
    grace_s = {grace}
    [pipeline]
    name = "motion"
    model = "{motion}"
    threads = 1
    [pipeline.input]
    kind = "window"
    hop = 10
    {input}
    [pipeline.output]
    type = "classification"
    top_k = 1
    labels = ["Standing", "Running", "Walking", "Badminton"]
    [pipeline.source]
    type = "socket"
    listen = "{listen}"
    {source}
    {sink}
"""
FILE = '[[pipeline.sink]]\ntype = "file"\npath = "results.jsonl"'


class Place:
    """A socket's path, and the configurations that listen there."""

    def __init__(self, folder: Path, short: Path) -> None:
        self.folder = folder
        self.path = short / "in.sock"

    def config(self, text: str = CONFIG, **words: Any) -> Path:
        """Write a configuration."""
        defaults: dict[str, Any] = {"listen": f"unix://{self.path}", "source": "", "sink": "", "input": "", "grace": 2}
        return write_config(self.folder, text, **{**defaults, **words})

    def serve(self, text: str = CONFIG, **words: Any) -> InProcess:
        """Give the service, not started."""
        return InProcess(self.config(text, **words))

    def client(self) -> Raw:
        """Connect."""
        return Raw.connect(self.path)

    @property
    def results(self) -> list[dict[str, Any]]:
        """What the file sink has."""
        path = self.folder / "results.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def place(tmp_path: Path, short_path: Path) -> Place:
    """A place of the test's own."""
    return Place(tmp_path, short_path)


def test_a_frame_is_answered_with_its_result(place: Place) -> None:
    with place.serve(), place.client() as client:
        client.frame(digit_png(0), id="press-3/17", content_type="image/png", captured_at="2026-01-02T03:04:05Z")
        answer = client.answer()
        assert answer is not None
        assert answer["type"] == "result"
        assert answer["length"] == 0
        assert answer["v"] == 1
        assert answer["id"] == "press-3/17"
        assert answer["device"] == "dev"
        assert answer["pipeline"] == "digits"
        assert answer["captured_at"] == "2026-01-02T03:04:05.000000Z"
        assert answer["captured_by"] == "producer"
        assert answer["result_type"] == "classification"
        assert answer["result"]["classes"][0]["index"] == digit_arrays()[1][0]


def test_many_frames_on_one_connection_are_answered_in_order(place: Place) -> None:
    with place.serve() as service, place.client() as client:
        for number in range(200):
            client.frame(digit_png(number), id=f"f{number}")
        client.finish()
        answers = client.answers(200)
        assert [each["id"] for each in answers] == [f"f{number}" for number in range(200)]
        right = sum(
            each["result"]["classes"][0]["index"] == digit_arrays()[1][number] for number, each in enumerate(answers)
        )
        assert right >= 190
        assert client.ended()
        assert service.counts()["in"] == 200


def test_an_id_comes_back_as_it_was_written(place: Place) -> None:
    with place.serve(), place.client() as client:
        for identity in (17, "17", "ß\n🙂", ""):
            client.frame(digit_png(0), id=identity)
            assert client.answers(1)[0]["id"] == identity
            client.frame(b"nonsense", id=identity)
            assert client.answers(1)[0]["id"] == identity
        client.frame(digit_png(0))
        client.frame(digit_png(0))
        first, second = client.answers(2)
        assert first["id"]
        assert first["id"] != second["id"]


def test_describe_says_what_the_pipeline_takes(place: Place) -> None:
    with place.serve(source="max_payload = 12345"), place.client() as client:
        client.send(b'{"type": "describe"}\n')
        answer = client.answer()
        assert answer is not None
        assert answer["type"] == "info"
        assert answer["model"]["name"] == "digits"
        assert answer["inputs"]["image"]["dtype"] == "int8"
        assert answer["inputs"]["image"]["shape"][1:] == [28, 28, 1]
        assert answer["outputs"]["probabilities"]["shape"][1:] == [10]
        assert answer["limits"] == {"max_payload": 12345, "max_header": 65536, "max_inflight": 32}
        client.frame(digit_png(0))
        assert client.answers(1)[0]["type"] == "result"


def test_a_frame_that_wants_no_reply_gets_none(place: Place) -> None:
    with place.serve(sink=FILE) as service, place.client() as client:
        client.frame(digit_png(0), id="quiet", reply=False)
        client.frame(b"nonsense", id="quiet and bad", reply=False)
        client.frame(digit_png(0), id="loud")
        assert client.answers(1)[0]["id"] == "loud"
        client.finish()
        assert client.ended()
        wait_for(lambda: service.counts()["out"] == 3, "all are upstream")
        assert [each["id"] for each in place.results] == ["quiet", "quiet and bad", "loud"]


@pytest.mark.parametrize(
    ("body", "header", "said"),
    [
        (b"nonsense", {}, "784 bytes"),
        (b"\x89PNG\r\n\x1a\n", {}, "PNG"),
        (b"[1, 2", {"content_type": "application/json"}, "JSON"),
        (b"", {}, "784 bytes"),
        (digit_png(0), {"content_type": "video/mp4"}, "video/mp4"),
        (digit_png(0), {"content_type": "\x00\n"}, ""),
    ],
    ids=["nonsense", "png", "json", "empty", "type", "control"],
)
def test_a_bad_input_is_answered_with_an_error_and_the_connection_goes_on(
    place: Place, body: bytes, header: dict[str, Any], said: str
) -> None:
    with place.serve() as service, place.client() as client:
        client.frame(body, id="bad", **header)
        client.frame(digit_png(0), id="good")
        bad, good = client.answers(2)
        assert (bad["type"], bad["id"], bad["code"]) == ("error", "bad", "bad_input")
        assert said in bad["message"]
        assert (good["type"], good["id"]) == ("result", "good")
        assert service.counts()["errors"] == {"bad_input": 1}


def test_a_body_over_the_limit_is_skipped_and_answered(place: Place) -> None:
    with Service(place.config(source="max_payload = 100000")) as service:
        service.ready()
        with place.client() as client:
            client.frame(digit_png(0))
            client.answers(1)
            before = resident_bytes(service.pid)
            client.send(b'{"type": "frame", "id": "big", "length": 200000000}\n')
            highest = before
            for _ in range(200):
                client.send(b"\n" * 1_000_000)  # as bytes of a body they are no headers
                highest = max(highest, resident_bytes(service.pid))
            client.frame(digit_png(0), id="next")
            big, following = client.answers(2)
            assert (big["type"], big["id"], big["code"]) == ("error", "big", "too_large")
            assert "200000000" in big["message"]
            assert "max_payload" in big["message"]
            assert following["id"] == "next"
            assert following["type"] == "result"
            assert highest - before < 10_000_000


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"hello\n", "JSON"),
        (b"[1, 2]\n", "type"),
        (b'{"length": 5}\n', "type"),
        (b'{"type": "frame", "length": -1}\n', "length"),
        (b'{"type": "frame", "length": 1.5}\n', "length"),
        (b'{"type": "frame", "length": "5"}\n', "length"),
        (b'{"type": "frame", "length": 1e400}\n', "length"),
        (b'{"type": "launch"}\n', "launch"),
        (b'{"type": "frame", "id": [1]}\n', "id"),
        (b'{"type": "frame", "id": "' + b"x" * 300 + b'"}\n', "id"),
        (b'{"type": "frame", "captured_at": "noon"}\n', "captured_at"),
        (b'{"type": "frame", "captured_at": 5}\n', "captured_at"),
        (b'{"type": "frame", "content_type": 5}\n', "content_type"),
        (b'{"type": "frame", "reply": "no"}\n', "reply"),
        (b'{"type": "frame", "meta": []}\n', "meta"),
        (b'{"type": "frame", "id": "\\ud800"}\n', "JSON"),
        (b"\xff\xfe\n", "JSON"),
        (b"[" * 60_000 + b"\n", "JSON"),
        (b"x" * 70_000, "header"),
        (b'{"type": "frame", "pad": "' + b"x" * 66_000 + b'"}\n', "header"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "JSON"),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value[:28]),
)
def test_a_malformed_header_gets_an_error_and_the_connection_is_closed(place: Place, data: bytes, said: str) -> None:
    with place.serve() as service, place.client() as other, place.client() as client:
        client.send(data)
        answer = client.answer()
        assert answer is not None
        assert answer["type"] == "error"
        assert answer["code"] == "protocol"
        assert said in answer["message"]
        assert client.ended()
        # Nobody else has noticed.
        other.frame(digit_png(0), id="other")
        assert other.answers(1)[0]["type"] == "result"
        assert service.counts()["in"] == 1


def test_half_a_frame_at_the_end_is_an_error_and_no_input(place: Place) -> None:
    with place.serve() as service:
        for part in (b'{"type": "frame", "length": 100}\nhalf', b'{"type": "fra'):
            with place.client() as client:
                client.frame(digit_png(0), id="whole")
                client.send(part).finish()
                first, second = client.answers(2)
                assert first["id"] == "whole"
                assert second["type"] == "error"
                assert second["code"] == "protocol"
                assert "ended inside" in second["message"]
                assert client.ended()
        assert service.counts()["in"] == 2


def test_what_was_sent_before_a_mistake_is_answered_before_it(place: Place) -> None:
    with place.serve(), place.client() as client:
        for number in range(20):
            client.frame(digit_png(number), id=number)
        client.send(b"nonsense\n")
        answers = client.answers(21)
        assert [each["id"] for each in answers] == [*range(20), None]
        assert answers[20]["code"] == "protocol"
        assert client.ended()


def test_a_client_that_vanishes_harms_nobody(place: Place) -> None:
    with place.serve() as service, place.client() as other:
        for number in range(20):
            with place.client() as client:
                client.frame(digit_png(0), id="gone")
                client.send(b'{"type": "frame", "length": 100}\nhalf')
                if number % 2:  # with a reset instead of an end
                    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        other.frame(digit_png(0), id="other")
        assert other.answers(1)[0]["id"] == "other"
        wait_for(lambda: service.counts()["in"] == 21, "the whole frames")
        assert service.counts()["errors"] == {}


def test_a_slow_client_holds_up_nobody(place: Place) -> None:
    with place.serve(), place.client() as slow, place.client() as quick:
        data = b'{"type": "frame", "id": "slow", "length": %d}\n' % len(digit_png(0)) + digit_png(0)
        for position in range(len(data)):
            slow.send(data[position : position + 1])
            if position % 20 == 0:
                quick.frame(digit_png(0), id=position)
                assert quick.answers(1)[0]["id"] == position
        assert slow.answers(1)[0]["id"] == "slow"


def test_a_frame_that_does_not_go_on_is_given_up(place: Place) -> None:
    with place.serve(source="frame_timeout_s = 0.3"), place.client() as client, place.client() as idle:
        idle.frame(digit_png(0), id="first")
        assert idle.answers(1)[0]["id"] == "first"
        client.send(b'{"type": "frame", "length": 100}\nhalf')
        answer = client.answer()
        assert answer is not None
        assert "frame_timeout_s" in answer["message"]
        assert client.ended()
        # Who is between two frames may be as quiet as it likes.
        stays(lambda: True, "", 0.5)
        idle.frame(digit_png(0), id="second")
        assert idle.answers(1)[0]["id"] == "second"


def test_a_client_that_never_reads_its_answers_fills_no_memory(place: Place) -> None:
    with Service(place.config()) as service:
        service.ready()
        with place.client() as greedy, place.client() as other:
            other.frame(digit_png(0), id=0)
            other.answers(1)
            before = resident_bytes(service.pid)
            greedy.sock.settimeout(0.5)
            data = b""
            for number in range(100):
                body = digit_png(number)
                data += b'{"type": "frame", "id": %d, "length": %d}\n' % (number, len(body)) + body
            sent = 0
            try:
                while sent < 100_000_000:
                    sent += greedy.sock.send(data)
            except TimeoutError:
                pass
            assert sent < 50_000_000, "it is never held back"
            assert resident_bytes(service.pid) - before < 12_000_000
            used = cpu_seconds(service.pid)
            other.frame(digit_png(0), id=1)
            assert other.answers(1)[0]["id"] == 1
            time.sleep(0.5)
            assert cpu_seconds(service.pid) - used < 0.3, "it spins"
            # When it reads at last, everything is there, in order.
            greedy.sock.settimeout(PATIENCE_S)
            assert [each["id"] % 100 for each in greedy.answers(300)] == list(range(100)) * 3


def test_a_client_is_held_back_while_upstream_is_away(place: Place) -> None:
    # /dev/full takes nothing: what comes in waits, and is not read without end.
    sink = '[[pipeline.sink]]\ntype = "file"\npath = "/dev/full"\nmax_bytes = 0\n[spool]\nenabled = false'
    with Service(place.config(sink=sink, source="max_inflight = 10")) as service:
        service.ready()
        with place.client() as client:
            client.sock.settimeout(0.5)
            sent = 0
            frame = b'{"type": "frame", "id": 1, "length": 100000}\n' + b"x" * 100_000
            try:
                while sent < 50_000_000:
                    sent += client.sock.send(frame)
            except TimeoutError:
                pass
            assert sent < 5_000_000


def test_many_clients_at_a_time_get_their_own_answers(place: Place) -> None:
    with place.serve(), clients(40, place.path) as everybody:
        failures: list[BaseException] = []

        def talk(which: int, client: Raw) -> None:
            try:
                for number in range(20):
                    client.frame(digit_png(which), id=f"{which}-{number}")
                    answer = client.answers(1)[0]
                    assert answer["id"] == f"{which}-{number}"
                    assert answer["type"] == "result"
            except BaseException as error:  # noqa: BLE001  # told to the test
                failures.append(error)

        threads = [threading.Thread(target=talk, args=pair) for pair in enumerate(everybody)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert not failures


def test_many_clients_may_come_at_once(place: Place) -> None:
    with place.serve(source="max_connections = 500"), clients(300, place.path) as everybody:
        for number, client in enumerate(everybody):
            client.frame(digit_png(0), id=number)
        assert [client.answers(1)[0]["id"] for client in everybody] == list(range(300))


def test_too_many_connections_are_refused_with_the_reason(place: Place) -> None:
    with place.serve(source="max_connections = 3"), clients(3, place.path) as everybody:
        for client in everybody:
            client.frame(digit_png(0), id="in")
            client.answers(1)
        with place.client() as refused:
            answer = refused.answer()
            assert answer is not None
            assert answer["type"] == "error"
            assert "max_connections" in answer["message"]
            assert refused.ended()
        lingering = place.client()  # refused, and does not even look
        everybody[0].finish()
        assert everybody[0].ended()
        # There is room for one more now, whatever those do that were refused.
        with lingering, place.client() as welcome:
            welcome.frame(digit_png(0), id="next")
            assert welcome.answers(1)[0]["id"] == "next"


def test_a_process_without_file_descriptors_serves_those_who_are_there(place: Place) -> None:
    with Service(place.config(source="max_connections = 1000")) as service:
        service.ready()
        with place.client() as first:
            first.frame(digit_png(0), id="first")
            assert first.answers(1)[0]["id"] == "first"
            wait_until_idle(service.pid)
            resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (64, 64))
            with clients(100, place.path):
                service.said("cannot accept a connection")
                first.frame(digit_png(0), id="second")
                assert first.answers(1)[0]["id"] == "second"
                used = cpu_seconds(service.pid)
                time.sleep(1.0)
                assert cpu_seconds(service.pid) - used < 0.5, "it spins"
                assert service.text.count("cannot accept") < 10, "one line an event"
        with place.client() as late:
            late.frame(digit_png(0), id="late")
            assert late.answers(1)[0]["id"] == "late"


def wait_until_idle(pid: int) -> None:
    """Wait until a process has done what it does once after its start."""

    def idle() -> bool:
        before = cpu_seconds(pid)
        time.sleep(0.3)
        return cpu_seconds(pid) == before

    wait_for(idle, "the process is idle")


# The socket itself.


def test_the_unix_socket_has_the_configured_mode_and_goes_with_the_service(place: Place) -> None:
    with place.serve() as service:
        status = place.path.stat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o660
        assert service.stop() == 0
    assert not place.path.exists()
    with place.serve(source='mode = "0600"'):
        assert stat.S_IMODE(place.path.stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to any group")
def test_the_unix_socket_has_the_configured_group(place: Place) -> None:
    import grp

    group = next(each for each in grp.getgrall() if each.gr_gid not in (0, os.getegid()))
    with place.serve(source=f'group = "{group.gr_name}"'):
        assert place.path.stat().st_gid == group.gr_gid


def test_a_group_that_does_not_exist_is_told_and_leaves_nothing(place: Place) -> None:
    with Service(place.config(source='group = "no-such-group"')) as service:
        service.said("there is no group 'no-such-group'")
        assert not place.path.exists()
        assert service.terminate() == 0


def test_a_socket_left_by_a_killed_process_is_replaced(place: Place) -> None:
    with Service(place.config()) as service:
        service.ready()
        service.kill()
    assert place.path.exists()
    with place.serve(), place.client() as client:
        client.frame(digit_png(0), id="again")
        assert client.answers(1)[0]["id"] == "again"


def test_a_path_on_which_another_process_listens_is_left_alone(place: Place) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(place.path))
        other.listen(1)
        with Service(place.config()) as service:
            service.said(r"another process listens there")
            other.settimeout(PATIENCE_S)
            other.accept()[0].close()  # it has looked
            other.close()
            # When the other one has gone, ours takes over without a restart.
            service.said("source: connected again")
            with place.client() as client:
                client.frame(digit_png(0), id="at last")
                assert client.answers(1)[0]["id"] == "at last"
            assert service.terminate() == 0


def test_a_process_that_hangs_on_the_path_is_told(place: Place) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(place.path))
        other.listen(0)
        waiting = []
        for _ in range(5):  # until nobody more may wait to be accepted
            each = socket.socket(socket.AF_UNIX)
            each.setblocking(False)
            waiting.append(each)
            try:
                each.connect(str(place.path))
            except BlockingIOError:
                break
        with Service(place.config()) as service:
            service.said("does not answer listens there")
            assert service.terminate() == 0
        for each in waiting:
            each.close()


def test_a_path_that_is_a_file_is_left_alone(place: Place) -> None:
    place.path.write_text("precious")
    with Service(place.config()) as service:
        service.said("cannot listen: Address already in use")
        assert service.terminate() == 0
    assert place.path.read_text() == "precious"


def test_a_socket_that_another_service_took_over_is_not_removed(place: Place) -> None:
    with place.serve() as first:
        place.path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(place.path))
            first.stop()
            assert place.path.exists()


def test_tcp_listens_on_loopback(place: Place) -> None:
    port = free_port()
    with place.serve(listen=f"tcp://127.0.0.1:{port}"), Raw.connect(("127.0.0.1", port)) as client:
        for number in range(20):
            client.frame(digit_png(number), id=number)
        assert [each["id"] for each in client.answers(20)] == list(range(20))


def test_tcp_on_ipv6_loopback_works(place: Place) -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as probe:
            port = probe.getsockname()[1]
    except OSError:
        pytest.skip("this machine has no IPv6")
    with place.serve(listen=f"tcp://[::1]:{port}"), Raw.connect(("::1", port)) as client:
        client.frame(digit_png(0), id="six")
        assert client.answers(1)[0]["id"] == "six"


def test_a_token_is_asked_for_before_anything_else(place: Place) -> None:
    (place.folder / "token").write_text("sésame\n", encoding="utf-8")
    with place.serve(source='token_file = "token"\nframe_timeout_s = 0.5'):
        for first in (
            b'{"type": "describe"}\n',
            b'{"type": "frame", "length": 0}\n',
            b'{"type": "auth"}\n',
            b'{"type": "auth", "token": "wrong"}\n',
            b'{"type": "auth", "token": ["s\xc3\xa9same"]}\n',
            b'{"type": "auth", "token": ""}\n',
        ):
            with place.client() as client:
                client.send(first)
                answer = client.answer()
                assert answer is not None
                assert answer["type"] == "error"
                assert "token" in answer["message"]
                assert "same" not in answer["message"]
                assert client.ended()
        with place.client() as client:
            client.send('{"type": "auth", "token": "sésame"}\n'.encode())
            client.frame(digit_png(0), id="in")
            assert client.answers(1)[0]["id"] == "in"
            # Who has shown the token may be quiet; who has not may not, or it would hold a place for ever.
            with place.client() as silent:
                answer = silent.answer()
                assert answer is not None
                assert "token" in answer["message"]
            client.frame(digit_png(0), id="still in")
            assert client.answers(1)[0]["id"] == "still in"


def test_a_token_from_the_environment_or_a_credential_works(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_SERVE_SOCKET_TOKEN", "from-environment")
    credentials = place.folder / "credentials"
    credentials.mkdir()
    for token in ("from-environment", "from-credential"):
        with place.serve(), place.client() as client:
            client.send(json.dumps({"type": "auth", "token": token}).encode() + b"\n")
            client.frame(digit_png(0), id="in")
            assert client.answers(1)[0]["id"] == "in"
        (credentials / "socket-token").write_text("from-credential\n")
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "not loopback"),
        ("allow_remote = true", "needs a token"),
        ('allow_remote = true\ntoken_file = "gone"', "gone"),
        ('allow_remote = true\ntoken_file = "empty"', "needs a token"),
    ],
)
def test_remote_access_without_a_token_is_refused_by_the_check(place: Place, source: str, said: str) -> None:
    (place.folder / "empty").touch()
    with pytest.raises(ConfigError) as caught:
        load(place.config(listen="tcp://0.0.0.0:9750", source=source))
    assert said in str(caught.value)
    assert "pipeline.source." in str(caught.value)


def test_remote_access_with_a_token_is_open_to_who_has_it(place: Place) -> None:
    (place.folder / "token").write_text("sesame\n")
    port = free_port()
    source = 'allow_remote = true\ntoken_file = "token"'
    with place.serve(listen=f"tcp://0.0.0.0:{port}", source=source), Raw.connect(("127.0.0.1", port)) as client:
        client.send(b'{"type": "auth", "token": "sesame"}\n').frame(digit_png(0), id="in")
        assert client.answers(1)[0]["id"] == "in"


# When answers come.


def test_at_once_answers_before_the_result_is_upstream(place: Place) -> None:
    sink = '[[pipeline.sink]]\ntype = "file"\npath = "/dev/full"\nmax_bytes = 0'
    with place.serve(sink=sink, grace=0.1) as service, place.client() as client:
        client.frame(digit_png(0), id="quick")
        assert client.answers(1)[0]["id"] == "quick"
        assert service.counts()["out"] == 0


@pytest.mark.broker
def test_when_safe_answers_when_the_result_is_upstream(
    place: Place, make_broker: Callable[..., Any], tmp_path: Path
) -> None:
    broker = make_broker().start()
    with Proxy(broker.port) as proxy:
        sink = '[[pipeline.sink]]\ntype = "mqtt"\ntopic = "results"'
        path = place.config(source='answer = "when_safe"', sink=sink, grace=0.5)
        path.write_text(path.read_text() + f'\n[mqtt]\nurl = "{proxy.url}"\n[spool]\nenabled = false\n')
        with InProcess(path) as service, place.client() as client:
            client.frame(digit_png(0), id="first")
            assert client.answers(1)[0]["id"] == "first"
            proxy.freeze()
            client.frame(digit_png(0), id="second")
            wait_for(lambda: service.counts()["in"] == 2, "it is in work")
            client.sock.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.answer()
            client.sock.settimeout(PATIENCE_S)
            proxy.restore()
            assert client.answers(1)[0]["id"] == "second"
            # What cannot be upstream when the service ends is told.
            proxy.freeze()
            client.frame(digit_png(0), id="third")
            wait_for(lambda: service.counts()["in"] == 3, "it is in work")
            service.stop()
            third = client.answers(1)[0]
            assert (third["type"], third["id"], third["code"]) == ("error", "third", "stopped")


def test_latest_tells_which_frames_were_dropped(place: Place) -> None:
    with place.serve(source='policy = "latest"') as service, place.client() as client:
        for number in range(100):
            client.frame(digit_png(0), id=number)
        answers = client.answers(100)
        dropped = [each for each in answers if each["type"] == "error"]
        assert {each["code"] for each in dropped} <= {"dropped"}
        assert service.counts()["dropped"].get("latest", 0) == len(dropped)
        last = [each for each in answers if each["id"] == 99]
        assert last[0]["type"] == "result", "the newest wins"


# Windows.


def test_samples_are_accepted_and_windows_answered(place: Place) -> None:
    with place.serve(WINDOW), place.client() as client:
        for number, sample in enumerate(motion_series(10)):
            client.frame(json.dumps(sample).encode(), id=number)
        answers = client.answers(100)
        assert [each["id"] for each in answers] == list(range(100))
        results = {each["id"]: each for each in answers if each["type"] == "result"}
        assert sorted(results) == [49, 59, 69, 79, 89, 99]
        assert {each["type"] for each in answers} == {"result", "accepted"}
        for each in results.values():
            assert each["result"]["classes"][0]["label"] == motion_label(10)
            assert each["window"]["samples"] == 50


def test_one_payload_with_many_samples_gets_all_its_windows(place: Place) -> None:
    with place.serve(WINDOW), place.client() as client:
        client.frame(json.dumps(motion_series(10)).encode(), id="all")
        client.frame(b"[1, 2]", id="bad")
        answers = client.answers(7)
        assert [each["id"] for each in answers] == ["all", *(f"all#{number}" for number in range(1, 6)), "bad"]


def test_connections_have_windows_of_their_own_unless_they_name_a_key(place: Place) -> None:
    with place.serve(WINDOW), place.client() as left, place.client() as right:
        for sample in motion_series(10)[:25]:
            for client in (left, right):
                client.frame(json.dumps(sample).encode(), id=0)
                assert client.answers(1)[0]["type"] == "accepted"
        kinds = []
        for sample in motion_series(10)[:50]:
            for client in (left, right):
                client.frame(json.dumps(sample).encode(), id=0, meta={"key": "both"})
                kinds.append(client.answers(1)[0]["type"])
        # Together they have filled a window after 25 samples each, and every ten samples after that.
        assert [number for number, kind in enumerate(kinds) if kind == "result"] == [49, 59, 69, 79, 89, 99]


def test_a_key_may_be_a_number_but_nothing_without_bounds(place: Place) -> None:
    with place.serve(WINDOW), place.client() as client:
        for key in (7, "seven", "x" * 1024):
            client.frame(json.dumps(motion_series(10)[:50]).encode(), id=0, meta={"key": key})
            assert client.answers(1)[0]["key"] == str(key)
        for wrong in ({"a": 1}, [1], True, 1.5, "x" * 1025):
            with place.client() as other:
                other.frame(b"[0, 0, 0, 0, 0, 0]", id=0, meta={"key": wrong})
                answer = other.answers(1)[0]
                assert answer["type"] == "error"
                assert "key" in answer["message"]


def test_when_safe_accepts_a_sample_when_its_last_window_is_safe(place: Place) -> None:
    source = 'answer = "when_safe"\nmax_inflight = 200'
    with place.serve(WINDOW, source=source, sink=FILE), place.client() as client:
        series = motion_series(10)
        for number in range(49):
            client.frame(json.dumps(series[number]).encode(), id=number)
        client.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.answer()
        client.sock.settimeout(PATIENCE_S)
        client.frame(json.dumps(series[49]).encode(), id=49)
        # The first ten are in no later window.
        assert {each["id"] for each in client.answers(10)} == set(range(10))
        assert [each["id"] for each in place.results] == ["49"]


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token from outside the tests."""
    monkeypatch.delenv("EDGE_SERVE_SOCKET_TOKEN", raising=False)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
