"""The installed service under a real systemd: made, killed, stopped, hung, reloaded, replaced and removed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_serve.errors import UsageError
from edge_serve_devices import access, program
from tests.support import MODELS, ROOT, wait_for
from tests.system.booted import Booted, CannotBootError, why_not

pytestmark = pytest.mark.slow

PHOTO_HERE = ROOT / "tests/data/photos/digit-7.png"
PHOTO = "/srv/digit-7.png"
FILE = "/etc/edge-serve/edge-serve.toml"
SOCKET = "/run/edge-serve/digits.sock"
SECRET = "s3cr3t-of-the-broker"
EDGE_SERVE = f"PYTHONPATH={ROOT}:{ROOT}/converters:{ROOT}/devices {sys.executable} -m edge_serve"
OURS = "/opt/edge-serve/bin/edge-serve"
INSTALL = f"{EDGE_SERVE} service install --watchdog 2 --credential mqtt-password=/etc/edge-serve/mqtt-password"
CONFIG = f"""
schema = 1
device = "box"
grace_s = 3

[mqtt]
url = "mqtt://127.0.0.1:1883"
username = "edge"

[[pipeline]]
name = "digits"
model = "/srv/models/digits.tflite"
threads = 1
[pipeline.output]
type = "classification"
top_k = 1
[pipeline.source]
type = "socket"
listen = "unix://{SOCKET}"
group = "users"
[[pipeline.sink]]
type = "file"
path = "/var/lib/edge-serve/results.jsonl"
[[pipeline.sink]]
type = "mqtt"
retain = true

[[pipeline]]
name = "energy"
model = "/srv/models/energy.tflite"
threads = 1
[pipeline.source]
type = "mqtt"
topic = "energy"
[pipeline.sink]
type = "mqtt"
"""
# The service has to know the password; the tests come in by the other door.
BROKER = """
per_listener_settings true
user root
listener 1883 127.0.0.1
allow_anonymous false
password_file /etc/broker/passwords
listener 1884 127.0.0.1
allow_anonymous true
"""


class Box:
    """The booted system with the service in it."""

    def __init__(self, system: Booted) -> None:
        self.run = system.run

    def show(self, name: str, unit: str = "edge-serve") -> str:
        """Give a property of the unit."""
        return self.run(f"systemctl show -p {name} --value {unit}").stdout.strip()

    @property
    def pid(self) -> str:
        """Give the service's process id inside the system."""
        return self.show("MainPID")

    @property
    def restarts(self) -> int:
        """Give how often systemd has restarted it."""
        return int(self.show("NRestarts"))

    def active(self) -> bool:
        """Say whether the service is ready."""
        return self.show("ActiveState") == "active"

    def came_back(self, restarts: int) -> None:
        """Wait until it was restarted and is ready again."""
        wait_for(
            lambda: self.restarts > restarts and self.active(),
            f"a restart; now: {self.run('systemctl status edge-serve', check=False).stdout}",
            30,
        )

    def answer(self) -> dict[str, Any]:
        """Send it a picture; gives the answer."""
        said = self.run(f"{OURS} send unix://{SOCKET} {PHOTO}").stdout
        answer: dict[str, Any] = json.loads(said)
        return answer

    def sees_seven(self) -> bool:
        """Say whether it sees what the picture shows."""
        return bool(self.answer()["result"]["classes"][0]["index"] == 7)

    def journal(self) -> str:
        """Give all that the unit has logged."""
        return self.run("journalctl --no-pager -o cat -u edge-serve -u edge-serve-check").stdout

    def write(self, path: str, text: str) -> None:
        """Write a file."""
        self.run(f"mkdir -p {Path(path).parent}; cat > {path} <<'END'\n{text}\nEND")

    def client(self, code: str) -> str:
        """Run Python in which `client` is a client of the broker that takes all results; gives what it prints."""
        lines = [
            "import json",
            "from tests.support import Client",
            "with Client(1884, 'edge-serve/+/+/result') as client:",
        ]
        text = "\n".join([*lines, *(f"    {line}" for line in code.splitlines())])
        return self.run(f"PYTHONPATH={ROOT} {sys.executable} - <<'END'\n{text}\nEND").stdout


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A booted system without the service."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    try:
        program.interpreter(access.reader(None, []))
    except UsageError as error:
        pytest.skip(f"the service needs a Python for all: {error}")
    try:
        system = Booted(tmp_path_factory.mktemp("overlay"))
    except CannotBootError as error:
        pytest.skip(str(error))
    try:
        yield Box(system)
    finally:
        system.close()


@pytest.fixture(scope="module")
def box(bare: Box, mosquitto: str) -> Box:
    """A booted system with a broker and the service, which was installed with a watchdog of two seconds."""
    bare.write("/etc/broker/broker.conf", BROKER)
    bare.run("touch /etc/broker/passwords; chmod 0600 /etc/broker/passwords")
    bare.run(f"mosquitto_passwd -b /etc/broker/passwords edge {SECRET}")
    unit = f"[Service]\nExecStart={mosquitto} -c /etc/broker/broker.conf"
    bare.write("/etc/systemd/system/broker.service", unit)
    bare.run("systemctl daemon-reload; systemctl start broker")
    bare.run(
        f"mkdir -p /srv/models; cp {MODELS}/digits.tflite {MODELS}/energy.tflite /srv/models; cp {PHOTO_HERE} {PHOTO}"
    )
    bare.write(FILE, CONFIG)
    bare.write("/etc/edge-serve/mqtt-password", SECRET)
    bare.run("chmod 0600 /etc/edge-serve/mqtt-password")
    bare.run(INSTALL)
    return bare


@pytest.fixture(autouse=True)
def serving(box: Box) -> None:
    """Each test begins with a service that is ready, whatever the one before has done to it."""
    if not box.active():
        box.write(FILE, CONFIG)
        box.run("systemctl reset-failed edge-serve; systemctl restart edge-serve")


# What an installation makes.


def test_the_service_is_ready_and_answers(box: Box) -> None:
    assert box.show("Type") == "notify"
    assert box.show("UnitFileState") == "enabled"
    assert box.sees_seven()
    status = box.run(f"{OURS} service status").stdout
    assert status.startswith("edge-serve: active (running) since ")
    assert "  digits: 1 in, 1 out, 0 errors, 0 dropped\n" in status
    assert "watchdog 2s" in status


def test_the_program_was_built_from_what_is_installed_and_belongs_to_root(box: Box) -> None:
    assert box.run(f"cat /proc/{box.pid}/cmdline | tr '\\0' '\\n' | head -1").stdout.startswith("/opt/edge-serve.")
    assert box.run("find -L /opt/edge-serve/bin /opt/edge-serve/lib -perm /022 ! -type l | wc -l").stdout == "0\n"
    assert box.run(f"setpriv --reuid 65534 --regid 65534 --clear-groups {OURS} --version").stdout


def test_nothing_warns_in_the_journal(box: Box) -> None:
    box.run("systemctl restart edge-serve")
    box.answer()
    invocation = box.show("InvocationID")
    said = box.run(
        f"journalctl --no-pager -o cat _SYSTEMD_INVOCATION_ID={invocation} + INVOCATION_ID={invocation}"
    ).stdout
    assert "started in" in said
    assert "warning" not in said.lower(), said
    assert "error" not in said.lower(), said


def test_systemd_rates_what_it_has_loaded_at_two_or_better(box: Box) -> None:
    box.run("systemd-analyze security --no-pager --threshold=20 edge-serve")


def test_local_programs_of_the_sockets_group_reach_it_and_others_do_not(box: Box) -> None:
    send = f"{OURS} send unix://{SOCKET} {PHOTO}"
    box.run(f"setpriv --reuid 65534 --regid 65534 --groups 100 {send}")
    assert box.run(f"setpriv --reuid 65534 --regid 65534 --clear-groups {send}", check=False).returncode == 3


# The sandbox, looked at from where the service is.


def test_the_service_sees_a_read_only_system_without_homes(box: Box) -> None:
    inside = f"nsenter -t {box.pid} -m"
    for path in ("/etc/x", "/usr/x", "/opt/edge-serve/x", "/srv/models/x"):
        assert "Read-only file system" in box.run(f"{inside} touch {path}", check=False).stderr
    assert "Permission denied" in box.run(f"{inside} setpriv --reuid 65534 ls /root", check=False).stderr
    box.run("touch /tmp/of-the-machine")
    assert "of-the-machine" not in box.run(f"{inside} ls /tmp").stdout
    box.run(f"{inside} touch /var/lib/edge-serve/x && rm /var/lib/private/edge-serve/x")


def test_the_service_has_no_rights(box: Box) -> None:
    status = dict(
        line.split(":\t", 1) for line in box.run(f"cat /proc/{box.pid}/status").stdout.splitlines() if ":\t" in line
    )
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert int(status["CapBnd"], 16) == int(status["CapEff"], 16) == 0
    assert int(status["Uid"].split()[0]) >= 61184  # systemd's range for dynamic users
    nodes = box.run(f"nsenter -t {box.pid} -m find /dev -xdev -type b -o -type c").stdout.split()
    assert set(nodes) <= {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty")}


# Secrets.


def test_the_secret_arrives_and_can_be_read_nowhere(box: Box) -> None:
    said = box.client(
        "client.publish('energy', json.dumps([0.5] * 16), user={'id': 'e1'})\nprint(client.wait_ids({'e1'}))"
    )
    assert "'e1'" in said
    assert "error" not in said
    check = box.run(f"{OURS} check -c {FILE}; systemctl cat edge-serve; systemctl show edge-serve")
    places = [check.stdout + check.stderr, box.journal()]
    places.append(box.run(f"tr '\\0' '\\n' < /proc/{box.pid}/cmdline; tr '\\0' '\\n' < /proc/{box.pid}/environ").stdout)
    places.append(box.run(f"{OURS} service status --json").stdout)
    assert not [place for place in places if SECRET in place]
    assert box.run("grep -rl s3cr3t /etc/systemd /opt/edge-serve/.edge-serve-build.json", check=False).stdout == ""
    path = f"/proc/{box.pid}/root/run/credentials/edge-serve.service/mqtt-password"
    assert box.run(f"cat {path}").stdout.strip() == SECRET
    assert box.run(f"setpriv --reuid 65534 --clear-groups --regid 65534 cat {path}", check=False).returncode


# Faults.


def test_a_killed_service_comes_back_with_its_state(box: Box) -> None:
    box.answer()
    before = box.run("wc -l < /var/lib/edge-serve/results.jsonl").stdout
    restarts = box.restarts
    box.run(f"kill -9 {box.pid}")
    box.came_back(restarts)
    assert box.sees_seven()
    assert int(box.run("wc -l < /var/lib/edge-serve/results.jsonl").stdout) == int(before) + 1


def test_a_result_waits_on_disk_for_a_broker_that_is_away_and_outlasts_a_kill(box: Box) -> None:
    box.run("systemctl stop broker")
    for _ in range(3):
        number = box.answer()["captured_at"]
    restarts = box.restarts
    box.run(f"sleep 0.5; kill -9 {box.pid}")
    box.came_back(restarts)
    box.run("systemctl start broker")
    said = box.client(
        "import time\nfrom tests.support import wait_for\n"
        f"wait_for(lambda: [m for m in client.messages if b'{number}' in m.payload], 'the result of before')\nprint('there')"
    )
    assert said == "there\n"


def test_a_hanging_service_is_ended_by_the_watchdog_and_comes_back(box: Box) -> None:
    restarts = box.restarts
    box.run(f"kill -STOP {box.pid}")
    box.came_back(restarts)
    assert "Watchdog timeout" in box.journal()
    assert box.sees_seven()


def test_a_stop_drains(box: Box) -> None:
    said = box.client(
        "for n in range(200): client.publish('energy', json.dumps([n / 200] * 16), user={'id': f'd{n}'}, wait=n == 199)\n"
        "import subprocess\n"
        "subprocess.run(['systemctl', 'stop', 'edge-serve'], check=True)\n"
        "subprocess.run(['systemctl', 'start', 'edge-serve'], check=True)\n"
        "print(len(client.wait_ids({f'd{n}' for n in range(200)})))"
    )
    assert int(said) >= 200
    assert "Failed with result" not in box.run("journalctl --no-pager -o cat -u edge-serve -n 30").stdout
    assert box.show("Result") == "success"


def test_a_bad_configuration_ends_it_once_and_for_all(box: Box) -> None:
    box.write(FILE, CONFIG.replace("top_k", "top_q"))
    box.run("systemctl restart edge-serve", check=False)
    wait_for(lambda: box.show("ActiveState") == "failed", "the unit has failed")
    assert box.show("ExecMainStatus") == "2"
    assert box.restarts == 0
    done = box.run(f"{OURS} service status", check=False)
    assert done.returncode == 1
    assert "exit code 2" in done.stdout
    assert "top_q" in done.stdout


def test_a_reload_reads_the_configuration_again_without_an_end(box: Box) -> None:
    pid, restarts = box.pid, box.restarts
    box.write(FILE, CONFIG.replace("top_k = 1", "top_k = 3"))
    box.run("systemctl reload edge-serve")
    # A pipeline that changes closes its connections: who asks in that moment gets exit 3, and asks again.
    ask = f"{OURS} send unix://{SOCKET} {PHOTO}"
    wait_for(lambda: box.run(ask, check=False).stdout.count('"score"') == 3, "answers of the new configuration")
    assert box.pid == pid
    assert box.restarts == restarts


# Installing again, and removing.


def test_an_installation_that_would_not_serve_changes_nothing(box: Box) -> None:
    before = box.run("cat /etc/systemd/system/edge-serve.service; readlink /opt/edge-serve; ls /opt").stdout
    pid = box.pid
    box.write("/etc/edge-serve/bad.toml", CONFIG.replace("/srv/models", "/srv/closed"))
    box.run("cp -r /srv/models /srv/closed; chmod 0700 /srv/closed")
    done = box.run(f"{EDGE_SERVE} service install -c /etc/edge-serve/bad.toml", check=False)
    assert done.returncode == 2
    assert "/srv/closed: the service's user may not enter it (drwx------)" in done.stderr
    assert box.run("cat /etc/systemd/system/edge-serve.service; readlink /opt/edge-serve; ls /opt").stdout == before
    assert box.pid == pid


def test_installing_again_replaces_the_program_and_opens_hardware_by_name(box: Box) -> None:
    first = box.run("readlink /opt/edge-serve").stdout.strip()
    pid = box.pid
    box.run(f"{INSTALL} --allow camera,edgetpu,gpio --allow i2c,spi")
    second = box.run("readlink /opt/edge-serve").stdout.strip()
    assert first != second
    assert {first, second} <= set(box.run("ls /opt").stdout.split())
    assert box.pid != pid
    assert box.sees_seven()
    video = box.run("getent group video | cut -d: -f3").stdout.strip()
    assert video in box.run(f"grep Groups /proc/{box.pid}/status").stdout.split()
    assert "char-video4linux rw" in box.show("DeviceAllow")
    assert box.show("DevicePolicy") == "closed"
    box.run("systemd-analyze security --no-pager --threshold=20 edge-serve")
    # An older build that installs itself is gone back to.
    box.run(f"/opt/{first}/bin/edge-serve {INSTALL.partition('edge_serve ')[2]}")
    assert box.run("readlink /opt/edge-serve").stdout.strip() == first
    assert "video4linux" not in box.show("DeviceAllow")
    assert box.sees_seven()


def test_an_instance_of_the_template_serves_its_own_configuration_as_a_user_of_its_own(box: Box) -> None:
    box.run("useradd --system press")
    text = CONFIG[: CONFIG.index('[[pipeline]]\nname = "energy')].replace("/edge-serve/", "/edge-serve-press/")
    box.write("/etc/edge-serve/press.toml", text)
    arguments = "--name edge-serve@press -c /etc/edge-serve/press.toml --user press"
    box.run(f"{OURS} service install {arguments} --credential mqtt-password=/etc/edge-serve/mqtt-password")
    socket = "/run/edge-serve-press/digits.sock"
    box.run(f"{OURS} send unix://{socket} {PHOTO}")
    status = json.loads(box.run(f"{OURS} service status --name edge-serve@press --json").stdout)
    assert status["state"] == "active"
    assert status["service"]["state"] == "online"
    assert box.run(f"stat -c %U /proc/{status['pid']} {socket}").stdout == "press\npress\n"
    assert box.sees_seven()
    done = box.run(f"{OURS} service uninstall --purge --name edge-serve@press")
    assert "which edge-serve may use" in done.stderr
    assert box.run("ls -d /var/lib/edge-serve-press /run/edge-serve-press*", check=False).stdout == ""
    assert box.sees_seven()


def test_uninstalling_keeps_the_state_until_that_shall_go_too(box: Box) -> None:
    box.run(f"{OURS} service uninstall")
    left = "ls -d /etc/systemd/system/edge-serve* /opt/edge-serve* /run/edge-serve*"
    assert box.run(left, check=False).stdout == ""
    assert box.run("cat /var/lib/edge-serve/results.jsonl").stdout
    assert box.run(f"{EDGE_SERVE} service uninstall", check=False).returncode == 2
    box.run(INSTALL)
    assert box.run("wc -l < /var/lib/edge-serve/results.jsonl").stdout != "0\n"
    box.run(f"{EDGE_SERVE} service uninstall --purge")
    assert box.run("ls -d /var/lib/edge-serve /var/lib/private/edge-serve", check=False).stdout == ""
