"""The text of the units: a small template, and what a configuration adds to it.

`edge-serve.service` has all for one configuration. `edge-serve@.service` is the same for any number of them, the
configuration of the instance `edge-serve@NAME` being /etc/edge-serve/NAME.toml; what such a configuration needs beyond
the template stands in a drop-in of the instance. Directives: systemd.exec(5), systemd.service(5), systemd 249 and later.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_serve.errors import UsageError
from edge_serve_devices.grants import Grants
from edge_serve_devices.systemd.hardware import HARDWARE, groups_here

MARK = "# Written by `edge-serve service install`, which replaces it; changes of your own belong into a drop-in"
CONFIG_FOLDER = Path("/etc/edge-serve")
# A name of a service is one of folders and of a user, too.
BASE = re.compile(r"[a-z][a-z0-9_-]{0,24}")
INSTANCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
# What systemd's own quoting would have to protect is refused: such paths are rare, and their quoting differs by directive.
PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/@:+=,~%-]*")
# The drain takes grace_s; sinks, sources and the interpreter are closed after it.
STOP_MARGIN_S = 10
# SIGABRT is only for a process that hangs: there is nothing to wait for.
ABORT_S = 3
# Loading every model once, on the slowest of boards.
CHECK_S = 600

TEMPLATE = """\
{mark}
# (`systemctl edit {unit}`).

[Unit]
Description=edge-serve: {what}
# Not network-online.target: without a network that holds the boot up for minutes, and connections are retried for ever.
{order}# However often it fails, it comes back.
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={program} run -c {config}
ExecReload=/bin/kill -HUP $MAINPID
Restart={restart}
RestartSec=1
# Wrong use or configuration: a restart changes nothing.
RestartPreventExitStatus=2
{timing}TimeoutAbortSec={abort_s}
# No core files onto an SD card.
LimitCORE=0

StateDirectory={folder}
StateDirectoryMode=0750
# What crashed the interpreter is remembered across restarts, in memory.
RuntimeDirectory={folder}.kept
RuntimeDirectoryMode=0700
RuntimeDirectoryPreserve=restart
# Folders that are kept lie where only their service comes (/run/private). Local programs have to reach the sockets.
ExecStartPre=+/bin/mkdir -p -m 0755 /run/{folder}
ExecStartPre=+/bin/chown --no-dereference --reference=/var/lib/{folder}/ /run/{folder}
# The folder itself is a mount point for the service's last command, too, so it stays, but not with a user who is gone.
ExecStopPost=-+/usr/bin/find /run/{folder} -mindepth 1 -delete
ExecStopPost=-+/bin/chown root:root /run/{folder}
ReadWritePaths=-/run/{folder}
UMask=0027

{hardening}
{grants}
[Install]
WantedBy=multi-user.target
"""

# ProcSubset stays "all": the runtime reads /proc/cpuinfo to know what the processor can do.
HARDENING = """\
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
PrivateTmp=yes
PrivateIPC=yes
PrivateMounts=yes
KeyringMode=private
LockPersonality=yes
RemoveIPC=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources"""


@dataclass(frozen=True, slots=True)
class Name:
    """A service's name: `edge-serve`, or `edge-serve@press` for an instance of the template."""

    base: str
    instance: str | None = None

    @classmethod
    def read(cls, text: str) -> Name:
        """Read a name; UsageError says what one may look like."""
        base, at, instance = text.removesuffix(".service").partition("@")
        if not BASE.fullmatch(base) or (at and not INSTANCE.fullmatch(instance)):
            raise UsageError(
                f"--name {text!r:.60}: is no name for a service; use small letters, digits, '-' and '_' (at most 25), "
                "as edge-serve, and edge-serve@press for /etc/edge-serve/press.toml"
            )
        return cls(base, instance if at else None)

    def __str__(self) -> str:
        return self.base if self.instance is None else f"{self.base}@{self.instance}"

    @property
    def unit(self) -> str:
        """The unit's name."""
        return f"{self}.service"

    @property
    def template(self) -> str:
        """The name of the template unit."""
        return f"{self.base}@.service"

    @property
    def folder(self) -> str:
        """The name of its folders in /var/lib, /run and so on: an instance's do not lie inside another service's."""
        return self.base if self.instance is None else f"{self.base}-{self.instance}"


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a unit is made from."""

    name: Name
    program: Path
    config: Path
    grants: Grants
    allow: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    user: str | None = None
    credentials: tuple[tuple[str, Path], ...] = ()
    watchdog_s: float = 30.0
    local_broker: bool = False


def plain(path: Path | str) -> str:
    """Give a path as a unit may hold it; UsageError for one that would have to be quoted."""
    text = str(path)
    if not PLAIN_PATH.fullmatch(text):
        raise UsageError(
            f"{text!r}: a unit cannot name this path as it is; use one without blanks and special characters"
        )
    return text.replace("%", "%%")


def service(plan: Plan) -> str:
    """Give the unit of one configuration."""
    return TEMPLATE.format(
        mark=MARK,
        unit=plan.name.unit,
        what=plan.config.name,
        order=_lines(_order(plan.allow, local_broker=plan.local_broker)),
        program=plain(plan.program),
        config=plain(plan.config),
        restart="on-failure" if plan.grants.ends else "always",
        timing=_lines(_timing(plan)),
        abort_s=ABORT_S,
        folder=plan.name.folder,
        hardening=HARDENING,
        grants=_lines([*_user(plan), *_network(plan.grants, plan.allow), *_granted(plan)]),
    )


def template(plan: Plan) -> str:
    """Give the template unit: open to the network, closed to hardware; an instance's drop-in says more."""
    neutral = Plan(plan.name, plan.program, plan.config, Grants(), watchdog_s=plan.watchdog_s)
    return TEMPLATE.format(
        mark=MARK,
        unit=plan.name.template,
        what="%i",
        order=_lines(_order((), local_broker=True)),
        program=plain(plan.program),
        config=f"{CONFIG_FOLDER}/%i.toml",
        restart="always",
        timing=_lines(_timing(neutral)),
        abort_s=ABORT_S,
        folder=f"{plan.name.base}-%i",
        hardening=HARDENING,
        grants=_lines([*_user(neutral), *_network(neutral.grants, ()), *_granted(neutral)]),
    )


def drop_in(plan: Plan) -> str:
    """Give what an instance has that differs from the template."""
    user = [] if plan.user is None else ["DynamicUser=no", f"User={plan.user}"]
    restart = ["Restart=on-failure"] if plan.grants.ends else []
    order = _order(plan.allow, local_broker=False)
    unit = ["[Unit]", *order, ""] if plan.allow else []
    lines = [*restart, *_timing(plan), *user, *_granted(plan)]
    return _lines([f"{MARK}.", "", *unit, "[Service]", *lines])


def checking(plan: Plan, output: Path) -> str:
    """Give a unit that runs `edge-serve check` once, as the same user and in the same sandbox; it writes to `output`.

    Its folders are the service's own, which may be running: they outlast this unit.
    """
    changed = {
        "Type": "oneshot",
        "ExecStart": f"{plain(plan.program)} check -c {plain(plan.config)}",
        "TimeoutStartSec": str(CHECK_S),
        "RuntimeDirectoryPreserve": "yes",
        "StandardOutput": f"file:{output}",
        "StandardError": f"file:{output}",
    }
    left_out = {
        *changed,
        "Restart",
        "RestartSec",
        "RestartPreventExitStatus",
        "WatchdogSec",
        "ExecReload",
        "NotifyAccess",
        "ExecStopPost",
    }
    lines = [line for line in service(plan).splitlines() if line.partition("=")[0] not in left_out]
    start, end = lines.index("[Service]") + 1, lines.index("[Install]")
    return _lines([*lines[:start], *(f"{key}={value}" for key, value in changed.items()), *lines[start:end]])


def _granted(plan: Plan) -> list[str]:
    """Give the directives that open what the configuration and --allow ask for."""
    lines = _folders(plan.grants) + [f"ReadWritePaths={plain(path)}" for path in plan.grants.writable]
    lines += [f"LoadCredential={name}:{plain(path)}" for name, path in plan.credentials]
    groups = _unique([*plan.grants.groups, *plan.groups, *groups_here(plan.allow)[0]])
    if groups:
        lines.append(f"SupplementaryGroups={' '.join(groups)}")
    if plan.grants.groups:
        # Giving a socket to a group is a chown.
        lines.append("SystemCallFilter=@chown")
    return lines + _devices(plan.allow)


def _devices(allow: Sequence[str]) -> list[str]:
    hardware = [HARDWARE[name] for name in allow]
    devices = _unique(each for kind in hardware for each in kind.devices)
    lines = [f"MemoryDenyWriteExecute={'no' if any(kind.writes_code for kind in hardware) else 'yes'}"]
    if not devices:
        return [*lines, "PrivateDevices=yes"]
    lines += ["PrivateDevices=no", "DevicePolicy=closed", *(f"DeviceAllow={device} rw" for device in devices)]
    if any(kind.netlink for kind in hardware):
        lines.append("RestrictAddressFamilies=AF_NETLINK")
    return lines


def _order(allow: Sequence[str], *, local_broker: bool) -> list[str]:
    """Give what comes before the service, and after it when the machine goes down: a broker here takes the last results."""
    modules = [f"modprobe@{module}.service" for module in _unique(m for name in allow for m in HARDWARE[name].modules)]
    after = ["network.target", *(["mosquitto.service"] if local_broker else []), *modules]
    return [f"After={' '.join(after)}", *([f"Wants={' '.join(modules)}"] if modules else [])]


def _timing(plan: Plan) -> list[str]:
    watchdog = [f"WatchdogSec={plan.watchdog_s:g}"] if plan.watchdog_s else []
    return [*watchdog, f"TimeoutStopSec={plan.grants.grace_s + STOP_MARGIN_S:g}"]


def _network(grants: Grants, allow: Sequence[str]) -> list[str]:
    if grants.network == "none":
        # The kernel tells of devices in its own network namespace only.
        alone = [] if any(HARDWARE[name].netlink for name in allow) else ["PrivateNetwork=yes"]
        return ["RestrictAddressFamilies=AF_UNIX", "IPAddressDeny=any", *alone]
    lines = ["RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6"]
    if grants.network == "loopback":
        lines += ["IPAddressDeny=any", "IPAddressAllow=localhost"]
    return lines


def _user(plan: Plan) -> list[str]:
    # The name is given, so that the check of a new configuration runs as the same user as the service.
    return ["DynamicUser=yes", f"User={plan.name.base}"] if plan.user is None else [f"User={plan.user}"]


def _folders(grants: Grants) -> list[str]:
    kinds = (
        ("StateDirectory", grants.state),
        ("LogsDirectory", grants.logs),
        ("CacheDirectory", grants.cache),
    )
    return [f"{key}={' '.join(plain('/' + each)[1:] for each in names)}" for key, names in kinds if names]


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
