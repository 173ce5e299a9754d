"""The units: what a configuration and --allow turn into, held against systemd's own tools where they are installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from edge_serve.errors import UsageError
from edge_serve_devices.grants import Grants
from edge_serve_devices.systemd import hardware, manager, unit
from edge_serve_devices.systemd.hardware import HARDWARE
from edge_serve_devices.systemd.unit import Name, Plan

PLAN = Plan(Name("edge-serve"), Path("/bin/true"), Path("/etc/edge-serve/edge-serve.toml"), Grants())
# 2.0, as systemd-analyze takes it.
THRESHOLD = "20"


def values(text: str, key: str) -> list[str]:
    """Give what a unit says for a key, line by line."""
    return re.findall(rf"^{key}=(.*)$", text, re.MULTILINE)


def analyzed(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze, where it is there and knows what is asked of it."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze cannot look at units that are not loaded (it is older than 250)")
    return done


@pytest.mark.parametrize("network", ["none", "loopback", "any"])
@pytest.mark.parametrize(
    "allow", [(), ("camera",), ("camera", "edgetpu", "gpio", "i2c", "spi"), tuple(sorted(HARDWARE))]
)
def test_systemd_rates_every_unit_at_two_or_better(tmp_path: Path, network: str, allow: tuple[str, ...]) -> None:
    grants = Grants(network=network, groups=("daemon",), writable=(Path("/srv"),), logs=("edge-serve",))  # type: ignore[arg-type]
    plan = replace(PLAN, grants=grants, allow=allow, credentials=(("mqtt-password", Path("/etc/edge-serve/p")),))
    path = tmp_path / "edge-serve.service"
    path.write_text(unit.service(plan), encoding="utf-8")
    done = analyzed("security", "--offline=true", f"--threshold={THRESHOLD}", "--no-pager", str(path))
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_the_template_is_rated_so_too(tmp_path: Path) -> None:
    path = tmp_path / "edge-serve@press.service"
    path.write_text(unit.template(PLAN), encoding="utf-8")
    done = analyzed("security", "--offline=true", f"--threshold={THRESHOLD}", "--no-pager", str(path))
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


@pytest.mark.parametrize("allow", [(), tuple(sorted(HARDWARE))])
def test_systemd_takes_the_units_without_a_warning(allow: tuple[str, ...]) -> None:
    analyzed("--version")
    plan = replace(PLAN, allow=allow)
    assert manager.verify({"edge-serve.service": unit.service(plan), "edge-serve@.service": unit.template(plan)}) == []


@pytest.mark.parametrize("line", ["WatchdogSec=soon", "ProtectSystem=very", "DynmicUser=yes", "ExecStart=/nowhere/x"])
def test_what_systemd_would_only_warn_of_is_found(line: str) -> None:
    analyzed("--version")
    text = unit.service(PLAN).replace("[Service]\n", f"[Service]\n{line}\n")
    assert manager.verify({"edge-serve.service": text})


def test_a_service_is_restarted_for_ever_but_not_for_a_mistake() -> None:
    text = unit.service(PLAN)
    assert values(text, "Type") == ["notify"]
    assert values(text, "Restart") == ["always"]
    assert values(text, "StartLimitIntervalSec") == ["0"]
    assert values(text, "RestartPreventExitStatus") == ["2"]
    assert values(text, "After") == ["network.target"]
    assert "network-online" not in "".join(values(text, "(?:After|Wants|Requires)"))


def test_a_service_of_finite_inputs_ends_with_them() -> None:
    assert values(unit.service(replace(PLAN, grants=Grants(ends=True))), "Restart") == ["on-failure"]


def test_the_stop_outlasts_the_grace_time() -> None:
    assert values(unit.service(replace(PLAN, grants=Grants(grace_s=25.5))), "TimeoutStopSec") == ["35.5"]


@pytest.mark.parametrize(("seconds", "said"), [(30.0, ["30"]), (2.5, ["2.5"]), (0.0, [])])
def test_the_watchdog_can_be_chosen(seconds: float, said: list[str]) -> None:
    assert values(unit.service(replace(PLAN, watchdog_s=seconds)), "WatchdogSec") == said


def test_a_configuration_without_a_network_gets_none() -> None:
    text = unit.service(replace(PLAN, grants=Grants(network="none")))
    assert values(text, "PrivateNetwork") == ["yes"]
    assert values(text, "RestrictAddressFamilies") == ["AF_UNIX"]


def test_a_configuration_of_this_machine_alone_reaches_no_other() -> None:
    text = unit.service(replace(PLAN, grants=Grants(network="loopback")))
    assert values(text, "IPAddressDeny") == ["any"]
    assert values(text, "IPAddressAllow") == ["localhost"]
    assert values(text, "RestrictAddressFamilies") == ["AF_UNIX AF_INET AF_INET6"]


def test_a_camera_without_a_network_still_hears_of_devices() -> None:
    text = unit.service(replace(PLAN, grants=Grants(network="none"), allow=("camera",)))
    assert values(text, "PrivateNetwork") == []
    assert values(text, "RestrictAddressFamilies") == ["AF_UNIX", "AF_NETLINK"]


def test_without_allow_no_device_is_there() -> None:
    text = unit.service(PLAN)
    assert values(text, "PrivateDevices") == ["yes"]
    assert values(text, "DeviceAllow") == []


def test_a_broker_on_this_machine_is_stopped_after_the_service() -> None:
    assert values(unit.service(replace(PLAN, local_broker=True)), "After") == ["network.target mosquitto.service"]


def test_hardware_opens_classes_of_devices_and_loads_what_registers_them() -> None:
    text = unit.service(replace(PLAN, allow=("camera", "i2c")))
    assert values(text, "PrivateDevices") == ["no"]
    assert values(text, "DevicePolicy") == ["closed"]
    assert "char-video4linux rw" in values(text, "DeviceAllow")
    assert "char-i2c rw" in values(text, "DeviceAllow")
    assert values(text, "Wants") == ["modprobe@videodev.service modprobe@mc.service modprobe@i2c_dev.service"]


def test_only_what_compiles_at_run_time_may_write_code() -> None:
    assert values(unit.service(replace(PLAN, allow=("edgetpu",))), "MemoryDenyWriteExecute") == ["yes"]
    assert values(unit.service(replace(PLAN, allow=("gpu",))), "MemoryDenyWriteExecute") == ["no"]


def test_groups_that_this_system_lacks_are_named_and_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "exists", lambda group: group == "video")
    joined, notes = hardware.groups_here(("camera", "gpio"))
    assert joined == ["video"]
    assert notes == [
        "--allow gpio: this system has no group gpio; the service may open only those nodes that everybody may"
    ]


def test_hardware_is_named_in_lists_or_one_by_one_and_a_wrong_name_gets_the_right_one() -> None:
    assert hardware.named(["camera,gpio", "camera", " i2c "]) == ("camera", "gpio", "i2c")
    with pytest.raises(UsageError, match=r"--allow camrea: there is no such hardware.*camera"):
        hardware.named(["camrea"])


def test_a_secret_is_named_by_its_file() -> None:
    plan = replace(PLAN, credentials=(("mqtt-password", Path("/etc/edge-serve/mqtt-password")),))
    assert values(unit.service(plan), "LoadCredential") == ["mqtt-password:/etc/edge-serve/mqtt-password"]


def test_a_socket_for_a_group_may_be_given_to_it() -> None:
    text = unit.service(replace(PLAN, grants=Grants(groups=("video",))))
    assert values(text, "SupplementaryGroups") == ["video"]
    assert values(text, "SystemCallFilter")[-1] == "@chown"
    assert "@chown" not in unit.service(PLAN)


def test_an_instance_adds_to_the_template_only_what_it_needs() -> None:
    plan = replace(PLAN, name=Name("edge-serve", "press"), allow=("spi",), user="press", grants=Grants(grace_s=2))
    text = unit.drop_in(plan)
    assert text.startswith(unit.MARK)
    assert values(text, "TimeoutStopSec") == ["12"]
    assert values(text, "User") == ["press"]
    assert values(text, "DynamicUser") == ["no"]
    assert values(text, "DeviceAllow") == ["char-spi rw"]
    assert values(text, "ExecStart") == []
    whole = unit.template(plan)
    assert values(whole, "ExecStart") == ["/bin/true run -c /etc/edge-serve/%i.toml"]
    assert values(whole, "StateDirectory") == ["edge-serve-%i"]


def test_the_check_runs_in_the_same_sandbox_and_takes_nothing_from_a_service_that_runs() -> None:
    plan = replace(PLAN, allow=("camera",), credentials=(("mqtt-password", Path("/etc/p")),))
    text, whole = unit.checking(plan, Path("/run/x/said")), unit.service(plan)
    assert values(text, "ExecStart") == ["/bin/true check -c /etc/edge-serve/edge-serve.toml"]
    assert values(text, "Type") == ["oneshot"]
    assert values(text, "RuntimeDirectoryPreserve") == ["yes"]
    assert not values(text, "(?:Restart|WatchdogSec|ExecStopPost|WantedBy)")
    for key in (
        "User",
        "DynamicUser",
        "StateDirectory",
        "SystemCallFilter",
        "DeviceAllow",
        "LoadCredential",
        "ProtectHome",
    ):
        assert values(text, key) == values(whole, key)


@pytest.mark.parametrize("path", ["/etc/a b.toml", "/etc/$HOME", '/etc/"x"', "/etc/x\n[Service]", "etc/x", "/etc/ü"])
def test_a_path_that_a_unit_could_misread_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="cannot name this path"):
        unit.plain(path)


def test_a_percent_sign_is_no_specifier() -> None:
    assert unit.plain("/etc/50%n.toml") == "/etc/50%%n.toml"


@pytest.mark.parametrize(
    ("text", "base", "instance", "folder"),
    [
        ("edge-serve", "edge-serve", None, "edge-serve"),
        ("edge-serve.service", "edge-serve", None, "edge-serve"),
        ("edge-serve@press.3", "edge-serve", "press.3", "edge-serve-press.3"),
    ],
)
def test_names(text: str, base: str, instance: str | None, folder: str) -> None:
    name = Name.read(text)
    assert (name.base, name.instance, name.folder) == (base, instance, folder)


@pytest.mark.parametrize(
    "text", ["", "Edge", "a/b", "../x", "edge serve", "edge@", "edge@a/b", "edge@..", "x" * 26, "-x"]
)
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is no name for a service"):
        Name.read(text)
