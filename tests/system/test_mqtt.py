"""Inputs and results over MQTT: protocols, authentication, TLS, topics, ids, replies, limits. The broker is mosquitto."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_serve.app import load
from edge_serve.errors import UnavailableError
from edge_serve.model.delegate import CPU
from edge_serve.mqtt import Connection
from tests.support import (
    Client,
    InProcess,
    Mosquitto,
    Proxy,
    Service,
    digit_arrays,
    digit_png,
    resident_bytes,
    wait_for,
    write_config,
)

pytestmark = pytest.mark.broker

CONFIG = """
    schema = 1
    device = "{device}"
    grace_s = 5
    [mqtt]
    url = "{url}"
    {broker}
    [pipeline]
    name = "digits"
    model = "{digits}"
    threads = 1
    [pipeline.output]
    type = "classification"
    top_k = 2
    labels = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    [pipeline.source]
    type = "mqtt"
    topic = {topic}
    {source}
    [pipeline.sink]
    type = "mqtt"
    topic = "{results}"
    {sink}
"""
LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass
class Site:
    """A broker, a configuration's words and the folder it is written to."""

    folder: Path
    name: str
    broker: Mosquitto

    @property
    def results(self) -> str:
        """The topic of the results."""
        return f"{self.name}/results"

    def config(self, **words: Any) -> Path:
        """Write the configuration."""
        defaults: dict[str, Any] = {
            "device": self.name,
            "url": self.broker.url,
            "broker": "",
            "topic": f'"{self.name}/in/#"',
            "source": "",
            "sink": "",
            "results": self.results,
        }
        return write_config(self.folder, CONFIG, **{**defaults, **words})

    def serve(self, **words: Any) -> InProcess:
        """Give the service, not started."""
        return InProcess(self.config(**words))

    def client(self, *topics: str, **options: Any) -> Client:
        """Give a client that listens to the results, and to further topics."""
        return Client(self.broker.port, *(topics or (self.results,)), **options)


@pytest.fixture
def site(tmp_path: Path, name: str, shared_broker: Mosquitto) -> Site:
    """A place on the shared broker."""
    return Site(tmp_path, name, shared_broker)


def test_a_result_is_as_the_interfaces_say(site: Site) -> None:
    with site.serve(), site.client() as client:
        before = time.time()
        client.publish(f"{site.name}/in/camera", digit_png(0), ContentType="image/png", user={"id": "press-3/17"})
        (message,) = client.wait(1)
    assert message.topic == site.results
    assert message.qos == 1
    assert not message.retain
    assert message.content_type == "application/json"
    assert message.user["edge-serve"] == "1"
    document = message.document
    assert list(document) == [
        "v", "id", "device", "pipeline", "source", "key", "captured_at", "captured_by", "clock", "age_ms", "model",
        "timings_ms", "type", "result",
    ]  # fmt: skip
    assert document["v"] == 1
    assert document["id"] == "press-3/17"
    assert document["device"] == site.name
    assert document["pipeline"] == "digits"
    assert document["source"] == f"{site.name}/in/camera"
    assert document["key"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", document["captured_at"])
    assert document["captured_by"] == "arrival"
    assert document["clock"] in ("ok", "unsynced")
    assert 0 < document["age_ms"] < (time.time() - before) * 1e3
    model = document["model"]
    assert model.pop("delegate") in CPU, "what auto found fastest"
    assert model == {"name": "digits", "version": None, "variant": "file", "signature": "serving_default"}
    assert list(document["timings_ms"]) == ["wait", "process", "invoke", "decode"]
    assert all(value >= 0 for value in document["timings_ms"].values())
    assert document["type"] == "classification"
    label = int(digit_arrays()[1][0])
    classes = document["result"]["classes"]
    assert len(classes) <= 2
    assert classes[0]["index"] == label
    assert classes[0]["label"] == LABELS[label]
    assert 0.5 < classes[0]["score"] <= 1


@pytest.mark.parametrize("protocol", [5, "3.1.1"])
def test_both_protocols_bring_right_results(site: Site, protocol: int | str) -> None:
    number = 30
    with site.serve(broker=f"protocol = {json.dumps(protocol)}"), site.client() as client:
        for each in range(number):
            client.publish(f"{site.name}/in/{each}", digit_png(each), wait=False)
        found = client.wait(number)
    by_source = {each.document["source"]: each.document["result"]["classes"][0]["index"] for each in found}
    right = sum(by_source[f"{site.name}/in/{each}"] == digit_arrays()[1][each] for each in range(number))
    assert right >= number - 2, "the model is right in 97.8 %"
    assert [each.document["source"] for each in found] == [f"{site.name}/in/{each}" for each in range(number)]
    for got in found:
        # MQTT 3.1.1 has no properties.
        assert got.content_type == ("application/json" if protocol == 5 else None)


@pytest.mark.parametrize("protocol", [5, "3.1.1"])
def test_user_and_password_come_from_a_file_or_the_environment(
    site: Site, make_broker: Callable[..., Mosquitto], monkeypatch: pytest.MonkeyPatch, protocol: int | str
) -> None:
    passwords = site.folder / "passwords"
    passwords.touch(0o600)
    subprocess.run(["mosquitto_passwd", "-b", passwords, "edge", "geheim ß"], check=True, capture_output=True)
    site.broker = make_broker("allow_anonymous false", f"password_file {passwords}").start()
    (site.folder / "secret").write_text("geheim ß\n", encoding="utf-8")
    own = f'protocol = {json.dumps(protocol)}\nusername = "edge"\n'
    with site.serve(broker=own + 'password_file = "secret"') as service:
        assert service.app.lines[0].source.connected.is_set()
        assert service.app.lines[0].sinks[0].connected.is_set()
    monkeypatch.setenv("EDGE_SERVE_MQTT_PASSWORD", "geheim ß")
    with site.serve(broker=own) as service:
        assert service.app.lines[0].source.connected.is_set()
    folder = site.folder / "credentials"
    folder.mkdir()
    (folder / "mqtt-password").write_text("geheim ß\n", encoding="utf-8")
    monkeypatch.setenv("EDGE_SERVE_MQTT_PASSWORD", "wrong")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    with site.serve(broker=own) as service:
        assert service.app.lines[0].source.connected.is_set()
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    for broker in (own, f"protocol = {json.dumps(protocol)}"):
        with pytest.raises(UnavailableError) as caught:
            open_connection(site.config(broker=broker))
        assert "check username and password" in str(caught.value)
        assert site.broker.url in str(caught.value)
        assert "wrong" not in str(caught.value), "a password never stands in a message"


def open_connection(config: Path) -> None:
    """Connect as the sink does, and disconnect."""
    connection = Connection(load(config), "", "test", clean=True)
    try:
        connection.open()
    finally:
        connection.close()


@dataclass(frozen=True)
class Certificates:
    """Two authorities; one has signed a server's and a client's certificate."""

    folder: Path

    def make(self) -> Certificates:
        """Let openssl make them."""

        def run(*arguments: str) -> None:
            subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)

        for authority in ("ca", "other"):
            run(
                "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                "-subj", f"/CN={authority}", "-keyout", f"{authority}.key", "-out", f"{authority}.pem",
                "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign",
            )  # fmt: skip
        for party in ("server", "client"):
            (self.folder / "extensions").write_text("subjectAltName=IP:127.0.0.1\n", encoding="ascii")
            run(
                "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={party}",
                "-keyout", f"{party}.key", "-out", f"{party}.csr",
            )  # fmt: skip
            run(
                "x509", "-req", "-in", f"{party}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-days", "2", "-extfile", "extensions", "-out", f"{party}.pem",
            )  # fmt: skip
        return self


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """The certificates of all tests here."""
    return Certificates(tmp_path_factory.mktemp("certificates")).make()


@pytest.fixture
def tls_site(
    site: Site, make_broker: Callable[..., Mosquitto], certificates: Certificates, request: pytest.FixtureRequest
) -> Site:
    """A broker with TLS, and a plain listener for the test's own client."""
    folder = certificates.folder
    plain = Mosquitto("", site.folder).port
    demands = ("require_certificate true",) if getattr(request, "param", False) else ()
    site.broker = make_broker(
        f"cafile {folder}/ca.pem",
        f"certfile {folder}/server.pem",
        f"keyfile {folder}/server.key",
        *demands,
        "allow_anonymous true",
        f"listener {plain} 127.0.0.1",
        "per_listener_settings false",
        "allow_anonymous true",
    ).start()
    return Site(site.folder, site.name, PlainPort(site.broker, plain))  # type: ignore[arg-type]  # what clients need of it


@dataclass
class PlainPort:
    """A broker of which clients use the plain port, and edge-serve the one with TLS."""

    broker: Mosquitto
    port: int

    @property
    def url(self) -> str:
        """The address with TLS."""
        return f"mqtts://127.0.0.1:{self.broker.port}"


@pytest.mark.parametrize("protocol", [5, "3.1.1"])
def test_tls_with_a_trusted_authority_works(tls_site: Site, certificates: Certificates, protocol: int | str) -> None:
    own = f'protocol = {json.dumps(protocol)}\nca_file = "{certificates.folder}/ca.pem"'
    with tls_site.serve(broker=own), tls_site.client() as client:
        for number in range(5):
            client.publish(f"{tls_site.name}/in/x", digit_png(number))
        client.wait(5)
        # More than one TLS record, more than one read.
        client.publish(f"{tls_site.name}/in/x", b"x" * 3_000_000)
        assert client.wait(6)[-1].document["error"]["code"] == "bad_input"


def test_tls_with_a_wrong_authority_is_refused_with_the_reason(tls_site: Site, certificates: Certificates) -> None:
    for own in (f'ca_file = "{certificates.folder}/other.pem"', ""):
        with pytest.raises(UnavailableError) as caught:
            open_connection(tls_site.config(broker=own))
        message = str(caught.value)
        assert tls_site.broker.url in message
        assert "certificate" in message
        assert "ca_file" in message


def test_insecure_tls_works_without_an_authority(tls_site: Site) -> None:
    with tls_site.serve(broker="insecure = true"), tls_site.client() as client:
        client.publish(f"{tls_site.name}/in/x", digit_png(0))
        client.wait(1)


@pytest.mark.parametrize("tls_site", [True], indirect=True)
def test_a_client_certificate_is_shown_where_it_is_demanded(tls_site: Site, certificates: Certificates) -> None:
    folder = certificates.folder
    own = f'ca_file = "{folder}/ca.pem"'
    with pytest.raises(UnavailableError) as caught:
        open_connection(tls_site.config(broker=own))
    assert tls_site.broker.url in str(caught.value)
    own += f'\ncert_file = "{folder}/client.pem"\nkey_file = "{folder}/client.key"'
    with tls_site.serve(broker=own), tls_site.client() as client:
        client.publish(f"{tls_site.name}/in/x", digit_png(0))
        client.wait(1)


def test_tls_files_that_are_none_are_told(tls_site: Site) -> None:
    (tls_site.folder / "ca.pem").write_text("no certificate\n", encoding="ascii")
    with pytest.raises(UnavailableError) as caught:
        open_connection(tls_site.config(broker='ca_file = "ca.pem"'))
    assert "ca.pem" in str(caught.value)


@pytest.mark.parametrize("protocol", [5, "3.1.1"])
def test_a_unix_sockets_listener_works(
    site: Site, make_broker: Callable[..., Mosquitto], short_path: Path, protocol: int | str
) -> None:
    path = short_path / "broker.sock"
    site.broker = make_broker("allow_anonymous true", f"listener 0 {path}", "allow_anonymous true").start()
    wait_for(path.exists, "the broker's socket")
    service = site.serve(url=f"unix://{path}", broker=f"protocol = {json.dumps(protocol)}")
    with service, site.client() as client:
        client.publish(f"{site.name}/in/x", digit_png(0))
        client.wait(1)


def test_several_filters_and_wildcards_bring_what_matches_and_no_more(site: Site) -> None:
    filters = [f"{site.name}/+/left", f"{site.name}/deep/#"]
    with site.serve(topic=json.dumps(filters)), site.client() as client:
        for topic in ("a/left", "a/right", "deep", "deep/er/still", "a/b/left", "deeper"):
            client.publish(f"{site.name}/{topic}", digit_png(0))
        client.publish(f"{site.name}/last/left", digit_png(0))
        found = [each.document["source"].removeprefix(f"{site.name}/") for each in client.wait(4)]
    assert found == ["a/left", "deep", "deep/er/still", "last/left"]


@pytest.mark.parametrize("protocol", [5, "3.1.1"])
def test_retained_messages_are_old_and_not_taken_unless_wanted(site: Site, protocol: int | str) -> None:
    own = f"protocol = {json.dumps(protocol)}"
    with site.client() as client:
        client.publish(f"{site.name}/in/old", digit_png(0), retain=True)
        with site.serve(broker=own):
            client.publish(f"{site.name}/in/new", digit_png(0))
            client.wait(1)
        with site.serve(broker=own, source=f'client_id = "{site.name}"\nretained = true'):
            client.publish(f"{site.name}/in/new", digit_png(0))
            client.wait(3)
    sources = [each.document["source"].rpartition("/")[2] for each in client.messages]
    assert sources == ["new", "old", "new"]


def test_the_publishers_time_of_capture_is_the_results(site: Site) -> None:
    with site.serve(), site.client() as client:
        for said in ("2026-01-02T03:04:05.678901+01:00", "yesterday", "0001-01-01T00:00:00+14:00"):
            client.publish(f"{site.name}/in/x", digit_png(0), user={"captured_at": said})
        first, second, third = (each.document for each in client.wait(3))
    assert first["captured_at"] == "2026-01-02T02:04:05.678901Z"
    assert first["captured_by"] == "producer"
    assert first["age_ms"] > 1000
    for other in (second, third):
        assert other["captured_by"] == "arrival", "a time that is none is no reason to lose the input"


def test_ids_without_a_publishers_are_derived_and_differ(site: Site) -> None:
    with site.serve(), site.client() as client:
        for _ in range(3):
            client.publish(f"{site.name}/in/x", digit_png(0))
        client.publish(f"{site.name}/in/x", digit_png(0), user={"id": "x" * 300})
        client.publish(f"{site.name}/in/x", digit_png(0), user={"id": ""})
        found = [each.document["id"] for each in client.wait(5)]
    assert len(set(found)) == 5
    assert all(0 < len(each) <= 256 for each in found)


def test_a_json_field_can_name_the_id(site: Site) -> None:
    config = site.config()
    text = config.read_text().replace("[pipeline.output]", '[pipeline.input]\nid_field = "id"\n[pipeline.output]')
    config.write_text(text)
    pixels = (digit_arrays()[0][0] / 255.0)[None, :, :, None].tolist()
    with InProcess(config), site.client() as client:
        client.publish(f"{site.name}/in/x", json.dumps({"id": "abc", "inputs": pixels}))
        client.publish(f"{site.name}/in/x", json.dumps({"id": {"no": "id"}, "inputs": pixels}))
        first, second = (each.document for each in client.wait(2))
    assert second["error"]["code"] == "bad_input"
    assert "id" in second["error"]["message"]
    assert first["id"] == "abc", first


def test_a_request_is_answered_on_its_response_topic(site: Site) -> None:
    reply = f"{site.name}/reply"
    with site.serve() as service, site.client(site.results, f"{reply}/#") as client:
        client.publish(
            f"{site.name}/in/x", digit_png(0), ResponseTopic=reply, CorrelationData=b"\0\xff17", user={"id": "asked"}
        )
        found = {each.topic: each for each in client.wait(2)}
        assert found[reply].correlation == b"\0\xff17"
        assert found[reply].content_type == "application/json"
        assert found[reply].user["edge-serve"] == "1"
        answer, result = found[reply].document, found[site.results].document
        assert answer["id"] == result["id"] == "asked"
        assert answer["result"] == result["result"]
        # Who asks for the impossible is told, too.
        client.publish(f"{site.name}/in/x", b"nonsense", ResponseTopic=reply, CorrelationData=b"18")
        client.wait(4)
        (failure,) = (each for each in client.messages if each.correlation == b"18")
        assert failure.document["error"]["code"] == "bad_input"
        assert service.counts()["dropped"] == {}


def test_a_response_topic_that_would_come_back_as_an_input_is_ignored_and_counted(site: Site) -> None:
    with site.serve() as service, site.client() as client:
        for topic in (f"{site.name}/in/loop", f"{site.name}/in"):
            client.publish(f"{site.name}/in/x", digit_png(0), ResponseTopic=topic, CorrelationData=b"1")
        client.publish(f"{site.name}/in/x", digit_png(0))
        client.wait(3)
        wait_for(lambda: service.counts()["out"] == 3, "three results")
        assert service.counts()["dropped"] == {"response_topic": 2}
        assert service.counts()["in"] == 3


def test_replies_stay_below_what_the_broker_allows(site: Site, make_broker: Callable[..., Mosquitto]) -> None:
    # The results go to a file at once; the broker's acknowledgements of the replies are late.
    site.broker = make_broker("allow_anonymous true", "max_inflight_messages 5").start()
    config = site.config(source="receive_maximum = 200")
    text = config.read_text()
    config.write_text(text[: text.index("[pipeline.sink]")] + '[pipeline.sink]\ntype = "file"\npath = "results"\n')
    with Proxy(site.broker.port) as proxy, site.client(f"{site.name}/reply") as client:
        config.write_text(config.read_text().replace(site.broker.url, proxy.url))
        with InProcess(config) as service:
            proxy.delay = 0.5
            for _ in range(60):
                client.publish(f"{site.name}/in/x", digit_png(0), ResponseTopic=f"{site.name}/reply", wait=False)
            client.wait(60)
            log = site.broker.log_text()
            sent = [log.count(f"Received PUBLISH from {site.name}.digits.in (d0, q{qos}") for qos in (0, 1)]
            assert sum(sent) == 60
            assert sent[1] <= 10, "more were unacknowledged than the broker allows"
            assert proxy.accepted == 2, "the broker has thrown it out"  # it, and the status
            wait_for(lambda: service.counts()["out"] == 60, "all results")


@pytest.mark.parametrize(
    ("payload", "kind", "said"),
    [
        (b"nonsense", None, "784 bytes"),
        (b"\x89PNG\r\n\x1a\nbroken", "image/png", "PNG"),
        (b"[1, 2", "application/json", "JSON"),
        (b"[1, 2]", "application/json", "shape"),
        (b"\0" * 783, "application/octet-stream", "784"),
        (b"", None, "784 bytes"),
        (b"1,2,3\n", "text/csv", "text/csv"),
        (digit_png(0), "video/mp4", "video/mp4"),
    ],
    ids=["nonsense", "png", "json", "shape", "raw", "empty", "csv", "type"],
)
def test_a_bad_input_gets_an_error_result_and_harms_no_other(
    site: Site, payload: bytes, kind: str | None, said: str
) -> None:
    with site.serve() as service, site.client() as client:
        properties: dict[str, Any] = {"ContentType": kind} if kind is not None else {}
        client.publish(f"{site.name}/in/x", payload, user={"id": "bad"}, **properties)
        client.publish(f"{site.name}/in/x", digit_png(0), user={"id": "good"})
        bad, good = (each.document for each in client.wait(2))
        assert bad["id"] == "bad"
        assert bad["error"]["code"] == "bad_input"
        assert said in bad["error"]["message"]
        assert bad["type"] == "classification"
        assert "result" not in bad
        assert good["id"] == "good"
        assert "error" not in good
        wait_for(lambda: service.counts()["out"] == 2, "both are settled")
        assert service.counts()["errors"] == {"bad_input": 1}


@pytest.mark.parametrize("protocol", [5, "3.1.1"])
def test_a_payload_over_the_cap_is_skipped_without_costing_memory_or_the_connection(
    tmp_path: Path, name: str, broker: Mosquitto, protocol: int | str
) -> None:
    site = Site(tmp_path, name, broker)
    with Proxy(broker.port) as proxy, site.client() as client:
        config = site.config(url=proxy.url, broker=f"protocol = {json.dumps(protocol)}\nmax_payload = 1000000")
        with Service(config) as service:
            service.ready()
            client.publish(f"{name}/in/x", digit_png(0))
            client.wait(1)
            before = resident_bytes(service.pid)
            named: dict[str, Any] = {"user": {"id": "big"}} if protocol == 5 else {}
            client.publish(f"{name}/in/big", b"x" * 100_000_000, **named)
            highest = before
            while len(client.messages) < 2:
                highest = max(highest, resident_bytes(service.pid))
            client.publish(f"{name}/in/x", digit_png(0))
            found = [each.document for each in client.wait(3)]
            # The message is read to its end before the next one comes.
            highest = max(highest, resident_bytes(service.pid))
            assert found[1]["error"]["code"] == "too_large"
            assert "100000" in found[1]["error"]["message"]
            assert "1000000" in found[1]["error"]["message"]
            assert "max_payload" in found[1]["error"]["message"]
            if protocol == 5:
                assert found[1]["id"] == "big"
            assert "error" not in found[2]
            assert highest - before < 16_000_000
            assert proxy.accepted == 3, "source, sink and status have connected once"


def test_a_payload_of_just_the_limit_is_taken(site: Site) -> None:
    limit = len(digit_png(0))
    with site.serve(broker=f"max_payload = {limit}"), site.client() as client:
        client.publish(f"{site.name}/in/x", digit_png(0))
        client.publish(f"{site.name}/in/x", digit_png(0) + b"\0")
        first, second = (each.document for each in client.wait(2))
    assert "error" not in first
    assert second["error"]["code"] == "too_large"


def test_large_properties_count_as_little_as_they_should(site: Site) -> None:
    with site.serve(broker="max_payload = 1000"), site.client() as client:
        user = {"id": "first", **{f"key{number}": "v" * 60_000 for number in range(3)}}
        client.publish(f"{site.name}/in/x", b"x" * 900, user=user)
        client.publish(f"{site.name}/in/x", b"x" * 1200, user=user)
        client.publish(f"{site.name}/in/x", b"x" * 1_000_000, user=user)
        found = [each.document for each in client.wait(3)]
    assert [each["error"]["code"] for each in found] == ["bad_input", "too_large", "too_large"]
    assert {each["id"] for each in found} == {"first"}


def test_properties_that_nobody_sends_get_an_error_result_and_hold_up_nothing(site: Site) -> None:
    with site.serve() as service, site.client() as client:
        many = {"id": "many", **{f"k{number}": "" for number in range(40_000)}}
        client.publish(f"{site.name}/in/x", digit_png(0), user=many)
        client.publish(f"{site.name}/in/x", digit_png(0), user={"id": "next"})
        first, second = (each.document for each in client.wait(2))
        assert first["error"]["code"] == "too_large"
        assert "properties" in first["error"]["message"]
        assert (first["id"], second["id"]) == ("many", "next")
        assert "error" not in second
        wait_for(lambda: service.counts()["out"] == 2, "both are settled")


def test_a_retained_result_waits_for_who_comes_later(site: Site) -> None:
    with site.serve(sink="retain = true") as service, site.client() as client:
        client.publish(f"{site.name}/in/x", digit_png(0))
        wait_for(lambda: service.counts()["out"] == 1, "the result")
        with site.client() as late:
            assert late.wait(1)[0].retain


def test_a_result_that_the_broker_never_takes_is_counted_and_blocks_no_other(
    site: Site, make_broker: Callable[..., Mosquitto]
) -> None:
    site.broker = make_broker("allow_anonymous true", "max_packet_size 2000").start()
    config = site.config()
    # The error's message repeats a part of the id.
    with InProcess(config) as service, site.client() as client:
        line = service.app.lines[0]
        from tests.contract.cases import make_result

        outcomes: list[Exception | None] = []
        for identity, padding in (("before", 1), ("poison", 5000), ("after", 1)):
            decoded = {"classes": [], "padding": "x" * padding}
            line.sinks[0].submit(make_result(identity, decoded=decoded), outcomes.append)
        found = [each.document["id"] for each in client.wait(2)]
        wait_for(lambda: len(outcomes) == 3, "three outcomes")
        assert found == ["before", "after"]
        assert outcomes == [None, None, None]
        assert service.counts()["dropped"] == {"rejected": 1}


def test_a_refused_publish_is_tried_again_without_haste(site: Site, make_broker: Callable[..., Mosquitto]) -> None:
    rules = site.folder / "acl"
    rules.write_text(f"topic readwrite {site.name}/in/#\ntopic read {site.results}\n", encoding="ascii")
    site.broker = make_broker("allow_anonymous true", f"acl_file {rules}").start()
    # Without the spool, which would make the result safe: then nothing is acknowledged before the broker takes it.
    with site.serve(sink="\n[spool]\nenabled = false") as service, site.client() as client:
        client.publish(f"{site.name}/in/x", digit_png(0))
        wait_for(lambda: service.counts()["retried"] >= 1, "the first refusal")
        began = time.monotonic()
        wait_for(lambda: service.counts()["retried"] >= 3, "more refusals")
        assert time.monotonic() - began > 0.5, "it tries again and again without a pause"
        assert service.counts()["out"] == 0, "what is not upstream is not acknowledged"
        # Rights can be given; the broker reads its rules again.
        rules.write_text("topic readwrite #\n", encoding="ascii")
        assert site.broker.process is not None
        site.broker.process.send_signal(1)
        client.wait(1)
        wait_for(lambda: service.counts()["out"] == 1, "the acknowledgement")


def test_a_subscription_that_the_broker_cuts_down_is_refused(site: Site, make_broker: Callable[..., Mosquitto]) -> None:
    # max_qos below what a lossless pipeline needs: going on would lose messages in silence.
    site.broker = make_broker("allow_anonymous true", "max_qos 0").start()
    connection = Connection(load(site.config()), "", f"{site.name}.test", clean=True)
    connection.open()
    try:
        with pytest.raises(UnavailableError) as caught:
            connection.subscribe([f"{site.name}/in/#"], 1, retained=False)
        assert site.broker.url in str(caught.value)
        assert "QoS 0" in str(caught.value)
    finally:
        connection.close()


def test_closing_waits_for_no_dead_network(site: Site) -> None:
    with Proxy(site.broker.port) as proxy:
        connection = Connection(load(site.config(url=proxy.url)), "", f"{site.name}.test", clean=True)
        connection.open()
        proxy.freeze()
        connection.publish(site.results, b"x" * 20_000_000, 1)
        began = time.monotonic()
        connection.close()
        assert time.monotonic() - began < 4


def test_the_same_client_id_twice_does_not_become_a_war(site: Site) -> None:
    with site.serve() as first, site.serve() as second:
        accepted = site.broker.log_text().count(f"as {site.name}.digits.in ")
        time.sleep(2)
        again = site.broker.log_text().count(f"as {site.name}.digits.in ") - accepted
        assert again < 12, "both take the connection from each other without a pause"
        first.stop()
        wait_for(second.app.lines[0].source.connected.is_set, "the other has won")
