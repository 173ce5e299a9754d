"""MQTT over TLS with what goes wrong there, and secrets: where they come from, and that nothing shows them."""

from __future__ import annotations

import dataclasses
import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_serve import mqtt
from edge_serve.app import load
from edge_serve.errors import ConfigError, UnavailableError
from edge_serve.mqtt import Connection
from tests.support import (
    PATIENCE_S,
    Client,
    Mosquitto,
    Service,
    digit_png,
    environment,
    free_port,
    wait_for,
    write_config,
)

pytestmark = pytest.mark.broker

CONFIG = """
    schema = 1
    device = "dev"
    grace_s = 1
    [status]
    enabled = false
    [mqtt]
    url = "{url}"
    connect_timeout_s = 3
    {broker}
    [pipeline]
    name = "digits"
    model = "{digits}"
    threads = 1
    [pipeline.source]
    type = "mqtt"
    topic = "in/#"
    [pipeline.sink]
    type = "mqtt"
    topic = "results"
"""
SECRET = "Kuckucksuhr#17"
AUTHORITY = """
[ca]
default_ca = own
[own]
database = index
serial = serial
new_certs_dir = .
default_md = sha256
policy = any
copy_extensions = copy
unique_subject = no
[any]
commonName = supplied
"""


def openssl(folder: Path, *arguments: str) -> None:
    """Run openssl."""
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority, ca.pem, and certificates that it has signed: good.pem, and one from the future."""
    folder = tmp_path_factory.mktemp("authority")
    (folder / "openssl.cnf").write_text(AUTHORITY, encoding="ascii")
    (folder / "index").touch()
    (folder / "serial").write_text("01\n", encoding="ascii")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(
        folder, "req", "-x509", *key, "-days", "30", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem",
        "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign",
    )  # fmt: skip
    for name, start, end in (
        ("good", "20200101000000Z", "20990101000000Z"),
        ("future", "20980101000000Z", "20990101000000Z"),
    ):
        openssl(
            folder, "req", *key, "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
            "-keyout", f"{name}.key", "-out", f"{name}.csr",
        )  # fmt: skip
        openssl(
            folder, "ca", "-batch", "-config", "openssl.cnf", "-cert", "ca.pem", "-keyfile", "ca.key",
            "-in", f"{name}.csr", "-out", f"{name}.pem", "-startdate", start, "-enddate", end, "-notext",
        )  # fmt: skip
    return folder


def tls_lines(folder: Path, name: str, *more: str) -> tuple[str, ...]:
    """Give mosquitto's configuration with a certificate."""
    return (
        f"cafile {folder}/ca.pem", f"certfile {folder}/{name}.pem", f"keyfile {folder}/{name}.key",
        *(more or ("allow_anonymous true",)),
    )  # fmt: skip


def test_a_certificate_that_is_not_valid_yet_is_tried_until_the_clock_is_set(
    tmp_path: Path, authority: Path, make_broker: Callable[..., Mosquitto]
) -> None:
    port = free_port()
    before = make_broker(*tls_lines(authority, "future"), port=port).start()
    url = f"mqtts://127.0.0.1:{port}"
    path = write_config(tmp_path, CONFIG, url=url, broker=f'ca_file = "{authority}/ca.pem"')
    with Service(path) as service:
        service.said(r"digits: source: .*not yet valid: is this device's clock set\?.*trying again")
        service.said(r"digits: sink: .*not yet valid")
        # A clock cannot be set here: for this device, it is the same if the certificate becomes valid.
        before.stop()
        make_broker(*tls_lines(authority, "good"), port=port).start()
        service.said("digits: source: connected again")
        service.said("digits: sink: connected again")
        assert service.terminate() == 0


class TlsServer:
    """A server that shakes hands, notes what was agreed on, and says nothing."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(folder / "good.pem", folder / "good.key")
        for name, value in limits.items():
            setattr(self.context, name, value)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.agreed: list[tuple[str | None, str | None]] = []
        self._thread = threading.Thread(target=self._run, name="test.tls", daemon=True)

    def _run(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(PATIENCE_S)
            try:
                with self.context.wrap_socket(connection, server_side=True) as secured:
                    self.agreed.append((secured.version(), secured.selected_alpn_protocol()))
            except OSError:
                self.agreed.append((None, None))

    def __enter__(self) -> TlsServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(PATIENCE_S)
        self._listener.close()


@pytest.mark.parametrize(
    ("offered", "known", "agreed"),
    [('["x-amzn-mqtt-ca", "mqtt"]', ["mqtt"], "mqtt"), ('["mqtt"]', ["http/1.1"], None), ("[]", ["mqtt"], None)],
)
def test_application_protocols_are_offered_where_they_are_said(
    tmp_path: Path, authority: Path, offered: str, known: list[str], agreed: str | None
) -> None:
    server = TlsServer(authority)
    server.context.set_alpn_protocols(known)
    broker = f'ca_file = "{authority}/ca.pem"\nalpn = {offered}'
    path = write_config(tmp_path, CONFIG, url=f"mqtts://127.0.0.1:{server.port}", broker=broker)
    with server, pytest.raises(UnavailableError):
        Connection(load(path), "", "test", clean=True).open()
    assert server.agreed == [("TLSv1.3", agreed)]


def test_nothing_older_than_tls_1_2_is_spoken(tmp_path: Path, authority: Path) -> None:
    path = write_config(
        tmp_path, CONFIG, url="mqtts://127.0.0.1:1", broker=f'ca_file = "{authority}/ca.pem"\ninsecure = true'
    )
    config = load(path)
    assert mqtt._tls(config, config.brokers[""]).minimum_version == ssl.TLSVersion.TLSv1_2
    with TlsServer(authority, maximum_version=ssl.TLSVersion.TLSv1_2) as server:
        named = dataclasses.replace(config.brokers[""], url=f"mqtts://127.0.0.1:{server.port}")
        with pytest.raises(UnavailableError):
            Connection(dataclasses.replace(config, brokers={"": named}), "", "test", clean=True).open()
    assert server.agreed[0][0] == "TLSv1.2"


def test_tls_options_without_tls_are_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path, CONFIG, url="mqtt://127.0.0.1", broker='alpn = ["mqtt"]')
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert [problem.key for problem in caught.value.problems] == ["mqtt.alpn"]


def test_going_without_verification_is_said_loudly(
    tmp_path: Path, authority: Path, make_broker: Callable[..., Mosquitto]
) -> None:
    broker = make_broker(*tls_lines(authority, "good")).start()
    path = write_config(tmp_path, CONFIG, url=f"mqtts://127.0.0.1:{broker.port}", broker="insecure = true")
    with Service(path, "-q") as service:
        service.said(r"warning: mqtts://127.0.0.1:\d+: the broker's certificate is not verified \(insecure = true\)")
        assert service.terminate() == 0
        assert service.text.count("is not verified") == 1


@pytest.fixture
def guarded(tmp_path: Path, make_broker: Callable[..., Mosquitto]) -> Mosquitto:
    """A broker that wants the secret."""
    passwords = tmp_path / "passwords"
    passwords.touch(0o600)
    subprocess.run(["mosquitto_passwd", "-b", passwords, "edge", SECRET], check=True, capture_output=True)
    return make_broker("allow_anonymous false", f"password_file {passwords}").start()


def test_a_password_is_read_again_for_every_attempt(tmp_path: Path, guarded: Mosquitto) -> None:
    (tmp_path / "secret").write_text("old\n", encoding="utf-8")
    path = write_config(tmp_path, CONFIG, url=guarded.url, broker='username = "edge"\npassword_file = "secret"')
    with Service(path) as service:
        service.said("refuses the connection.*check username and password")
        (tmp_path / "secret").write_text(f"{SECRET}\n", encoding="utf-8")
        service.said("digits: source: connected again")
        service.said("digits: sink: connected again")
        assert service.terminate() == 0


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("where", ["file", "environment", "credential"])
def test_nothing_shows_a_password(tmp_path: Path, guarded: Mosquitto, where: str, right: bool) -> None:
    secret = SECRET if right else f"{SECRET}-wrong"
    own, env = 'username = "edge"', {}
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    if where == "file":
        (tmp_path / "secret").write_text(secret, encoding="utf-8")
        own += '\npassword_file = "secret"'
    elif where == "credential":
        (credentials / "mqtt-password").write_text(secret, encoding="utf-8")
        env["CREDENTIALS_DIRECTORY"] = str(credentials)
    else:
        env["EDGE_SERVE_MQTT_PASSWORD"] = secret
    path = write_config(tmp_path, CONFIG, url=guarded.url, broker=own)
    with Service(path, "-v", env=env) as service:
        service.said("started in" if right else "check username and password")
        if right:
            wait_for(lambda: "SUBSCRIBE from dev.digits.in" in guarded.log_text(), "the subscription")
        assert secret not in Path(f"/proc/{service.pid}/cmdline").read_text(encoding="utf-8")
        service.terminate()
        said = service.text
    for command in (["check"], ["check", "--json"], ["config", "--sample"], ["check", "--no-models"]):
        arguments = [*command, *(["-c", str(path)] if command[0] == "check" else [])]
        done = subprocess.run(
            [sys.executable, "-m", "edge_serve", *arguments], capture_output=True, text=True, env=environment(**env)
        )
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    assert SECRET not in said


@pytest.mark.parametrize("protocol", [5, "3.1.1"])
def test_a_burst_over_tls_comes_through_in_order(
    tmp_path: Path, authority: Path, make_broker: Callable[..., Mosquitto], protocol: int | str
) -> None:
    # OpenSSL hands out decrypted bytes that no poll shows, and takes large ones in parts.
    plain = free_port()
    broker = make_broker(
        *tls_lines(authority, "good"), f"listener {plain} 127.0.0.1", "allow_anonymous true", "max_queued_messages 0"
    ).start()
    own = f'ca_file = "{authority}/ca.pem"\nprotocol = {json.dumps(protocol)}'
    path = write_config(tmp_path, CONFIG, url=f"mqtts://127.0.0.1:{broker.port}", broker=own)
    number = 300
    with Service(path) as service, Client(plain, "results") as client:
        service.ready()
        for each in range(number):
            payload = digit_png(each) + b"\0" * (200_000 if each % 50 == 0 else 0)
            client.publish(f"in/{each}", payload, wait=False)
        found = client.wait(number)
        assert [each.document["source"] for each in found] == [f"in/{each}" for each in range(number)]
        assert service.terminate() == 0
        service.said_at_last(rf"digits: {number} in, {number} out")
