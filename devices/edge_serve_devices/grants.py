"""What a configuration needs of the system: network, folders, groups; and what of it a service cannot be given.

Paths that are only read need no grant in the unit: the file system is read-only but visible (ProtectSystem=strict), and
binding single files into view would pin them, so that a new model or configuration would never be seen. They are held
against who the service is instead, and each that it cannot read is named with the remedy.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from edge_serve.config import PASSWORD_CREDENTIAL, Config, PartConfig, PipelineConfig
from edge_serve.errors import Problem
from edge_serve.schema import join
from edge_serve.sources.listening import TOKEN_CREDENTIAL
from edge_serve_devices import access
from edge_serve_devices.access import READ, WRITE, Reader

Network = Literal["none", "loopback", "any"]
BUILTIN = frozenset({"mqtt", "socket", "file", "stdout"})
STDIN = "-"
# The folders that systemd makes for a service and gives to its user, below which it may have some of its own name.
STATE, RUNTIME, LOGS, CACHE = Path("/var/lib"), Path("/run"), Path("/var/log"), Path("/var/cache")


@dataclass(frozen=True, slots=True)
class Grants:
    """What the unit has to give beyond the service's own folders in /var/lib and /run.

    Folders are relative to STATE, LOGS and CACHE, as systemd takes them.
    """

    state: tuple[str, ...] = ()
    logs: tuple[str, ...] = ()
    cache: tuple[str, ...] = ()
    writable: tuple[Path, ...] = ()
    """Other folders that are written to."""
    network: Network = "any"
    groups: tuple[str, ...] = ()
    """Groups that sockets are given to."""
    ends: bool = False
    """Whether all inputs are finite: the service is done when they are read."""
    grace_s: float = 10.0


@dataclass(slots=True)
class _Found:
    state: list[str] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    cache: list[str] = field(default_factory=list)
    writable: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def managed(name: str) -> tuple[Path, ...]:
    """Give the folders that systemd makes for a service of this name."""
    return (STATE / name, RUNTIME / name, LOGS / name, CACHE / name)


def derive(
    config: Config, name: str, who: Reader, extra_writable: tuple[Path, ...] = ()
) -> tuple[Grants, list[Problem]]:
    """Find what the service `name` needs for `config`, and every problem that no grant solves.

    `name` is that of its folders; `extra_writable` are folders that a plug-in is said to write to.
    """
    found = _Found()
    _readable(config.path, "", who, found.problems)
    for key, path, secret in _brokers_files(config):
        _readable(path, key, who, found.problems, secret)
    for pipeline in config.pipelines:
        _pipeline(config, pipeline, name, who, found)
    _state_dir(config, name, who, found)
    for path in extra_writable:
        _writable_folder(path, "", name, who, found)
    grants = Grants(
        tuple(dict.fromkeys(found.state)),
        tuple(dict.fromkeys(found.logs)),
        tuple(dict.fromkeys(found.cache)),
        tuple(dict.fromkeys(found.writable)),
        _network(config),
        tuple(dict.fromkeys(socket_groups(config))),
        all(_is_finite(config, pipeline) for pipeline in config.pipelines),
        config.grace_s,
    )
    return grants, found.problems


def _pipeline(config: Config, pipeline: PipelineConfig, name: str, who: Reader, found: _Found) -> None:
    model = config.resolve(pipeline.model.model)
    _readable(model, join(pipeline.key, "model"), who, found.problems)
    if pipeline.output.labels_file is not None:
        key = join(pipeline.key, "output.labels_file")
        _readable(config.resolve(pipeline.output.labels_file), key, who, found.problems)
    source = pipeline.source
    for key, value in _paths(source):
        if value == STDIN:
            remedy = "Name a pipe (mkfifo) that the camera's program writes to, or run that program and edge-serve in a unit of your own"
            found.problems.append(Problem(key, "is standard input, which a service does not have", remedy))
        else:
            secret = TOKEN_CREDENTIAL if key.endswith("token_file") else ""
            _readable(config.resolve(value), key, who, found.problems, secret)
    listen = getattr(source.options, "listen", None)
    if isinstance(listen, str) and listen.startswith("unix:"):
        _writable_folder(Path(urlsplit(listen).path).parent, join(source.key, "listen"), name, who, found)
    for sink in pipeline.sinks:
        for key, value in _paths(sink):
            path = config.resolve(value)
            if key.endswith("_file"):
                _readable(path, key, who, found.problems)
            else:
                _writable_folder(path.parent, key, name, who, found)


def _paths(part: PartConfig) -> Iterator[tuple[str, str]]:
    """Give the options of a part that are paths: ours, and those of plug-ins that are named likewise."""
    for each in fields(part.options):
        value = getattr(part.options, each.name)
        if isinstance(value, str) and (each.name == "path" or each.name.endswith("_file")):
            yield join(part.key, each.name), value


def _brokers_files(config: Config) -> Iterator[tuple[str, Path, str]]:
    for name, broker in config.brokers.items():
        key = f"mqtt.{name}" if name else "mqtt"
        password = ("password_file", password_credential(name))
        for option, secret in (("ca_file", ""), ("cert_file", ""), ("key_file", ""), password):
            value = getattr(broker, option)
            if value is not None:
                yield join(key, option), config.resolve(value), secret


def _readable(path: Path, key: str, who: Reader, problems: list[Problem], credential: str = "") -> None:
    """Note what keeps the service from reading `path`; `credential` is the one that may take its place."""
    found = access.obstacle_below(path, who)
    if not found:
        return
    if credential:
        remedy = f"Leave this key out and give the file to systemd: --credential {credential}={path}"
    elif key.endswith("key_file"):
        remedy = (
            f"Let a group read it: groupadd --system edge-serve; chgrp edge-serve {path}; chmod 0640 {path}; "
            "and join that group with --group edge-serve"
        )
    elif access.hidden(path) or access.hidden(Path(found.split(":", 1)[0])):
        remedy = "Move it to /etc/edge-serve or /srv, readable for all (chmod -R a+rX), and name that path"
    else:
        remedy = f"Let all read it (chmod -R a+rX {path}, a+x on the folders above) or a group that --group names"
    problems.append(Problem(key, f"the service could not read {path}: {found}", remedy))


def _state_dir(config: Config, name: str, who: Reader, found: _Found) -> None:
    if config.state_dir == STATE / name:
        return
    if STATE in config.state_dir.parents:
        found.state.append(str(config.state_dir.relative_to(STATE)))
    else:
        _writable_folder(config.state_dir, "state_dir", name, who, found)


def _writable_folder(folder: Path, key: str, name: str, who: Reader, found: _Found) -> None:
    """Grant a folder of this service's own, or one that exists and that its user may write to; else name the problem."""
    if folder in (STATE / name, RUNTIME / name):
        return
    for base, taken in ((STATE, found.state), (LOGS, found.logs), (CACHE, found.cache)):
        if folder == base / name or base / name in folder.parents:
            taken.append(str(folder.relative_to(base)))
            return
    obstacle = access.obstacle(folder, who, READ | WRITE)
    if not obstacle:
        found.writable.append(folder)
        return
    place = RUNTIME if key.endswith("listen") else STATE
    problem = f"the service could not write to {folder}: {obstacle}"
    found.problems.append(Problem(key, problem, f"Use {place / name}, which systemd makes for it"))


def socket_groups(config: Config) -> Iterator[str]:
    """Give the groups that sockets are given to, which the service has to be in."""
    for pipeline in config.pipelines:
        group = getattr(pipeline.source.options, "group", None)
        if isinstance(group, str) and pipeline.source.type == "socket":
            yield group


def _network(config: Config) -> Network:
    """Say how far the configuration reaches: nowhere, to this machine, or anywhere (plug-ins, too, may)."""
    hosts = [urlsplit(broker.url) for broker in config.brokers.values()]
    for pipeline in config.pipelines:
        if any(part.type not in BUILTIN for part in (pipeline.source, *pipeline.sinks)):
            return "any"
        if pipeline.source.type == "socket":
            hosts.append(urlsplit(pipeline.source.options.listen))
    names = [url.hostname or "" for url in hosts if url.scheme != "unix"]
    if not names:
        return "none"
    return "loopback" if all(is_loopback(each) for each in names) else "any"


def password_credential(broker: str) -> str:
    """Give the name of the credential that holds a broker's password, as edge_serve.config.password_of looks for it."""
    return PASSWORD_CREDENTIAL + (f"-{broker}" if broker else "")


def has_local_broker(config: Config) -> bool:
    """Say whether a broker runs on this machine: it has to outlast the service, which gives it the last results."""
    urls = [urlsplit(broker.url) for broker in config.brokers.values()]
    return any(url.scheme == "unix" or is_loopback(url.hostname or "") for url in urls)


def is_loopback(host: str) -> bool:
    """Say whether a host is this machine, by what its name says alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_finite(config: Config, pipeline: PipelineConfig) -> bool:
    """Say whether a source is a folder or a file: to begin anew at its end would only repeat it. A pipe has no such end."""
    options: Any = pipeline.source.options
    if pipeline.source.type != "file":
        return False
    path = config.resolve(options.path)
    return path.is_dir() or path.is_file()
