"""The configuration: typed dataclasses, one strict TOML loader, and every mistake reported at once.

Paths in a configuration are relative to its own folder. What a source or sink takes is told by its part: the loader is
given a resolver, so that the keys of plug-ins are checked as strictly as our own.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from edge_serve.errors import ConfigError, EdgeServeError, Problem, UsageError
from edge_serve.schema import join, option, read
from edge_serve.spec import AUTO, DelegateSpec, InputSpec, OutputSpec

SCHEMA = 1
DEFAULT_FILE = "edge-serve.toml"
# A configuration is read whole; a larger file is not one.
MAX_CONFIG_BYTES = 1024 * 1024
# The TOML parser's time and memory grow with the square of a dotted key's parts: half a megabyte of them would take all.
MAX_KEY_PARTS = 64
_KEY_PART = re.compile(r"""[\w"'-][ \t]*\.""")
_BETWEEN_KEYS = re.compile(r"[=,{\n]")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SERIAL_FILES = ("/proc/device-tree/serial-number", "/sys/firmware/devicetree/base/serial-number")
PASSWORD_CREDENTIAL = "mqtt-password"  # noqa: S105  # the name of a credential, not one
PASSWORD_VARIABLE = "EDGE_SERVE_MQTT_PASSWORD"  # noqa: S105  # likewise


@dataclass(frozen=True, slots=True)
class MqttBroker:
    """One broker; sources and sinks use [mqtt] unless their `broker` names a table [mqtt.NAME]."""

    url: str = option(
        doc="mqtt://host:1883, mqtts://host:8883 (TLS) or unix:///path/of/socket", example="mqtt://127.0.0.1:1883"
    )
    protocol: Literal[5, "5", "3.1.1"] = option(5, 'MQTT version, 5 or "3.1.1"', example=5)
    username: str | None = option(None, "user name; without one the broker sees an anonymous client", example="edge")
    password_file: str | None = option(
        None,
        "file that holds the password; else the systemd credential mqtt-password, else EDGE_SERVE_MQTT_PASSWORD "
        "(with -NAME or _NAME behind it for [mqtt.NAME])",
        example="/etc/edge-serve/mqtt-password",
    )
    ca_file: str | None = option(
        None, "TLS: certificates that are trusted; default: the system's", example="/etc/edge-serve/ca.pem"
    )
    cert_file: str | None = option(None, "TLS: client certificate, PEM", example="/etc/edge-serve/client.pem")
    key_file: str | None = option(None, "TLS: key of the client certificate, PEM", example="/etc/edge-serve/client.key")
    alpn: tuple[str, ...] = option(
        (), "TLS: application protocols to offer, for brokers that share their port", example=["mqtt"]
    )
    insecure: bool = option(False, "TLS without verification of the broker's certificate; for tests only")
    keepalive_s: int = option(30, "seconds of silence after which a ping is sent", low=5, high=3600)
    connect_timeout_s: float = option(10.0, "seconds that one attempt to connect may take", low=0.1, high=300)
    session_expiry_s: int = option(
        86400, "seconds that the broker keeps what arrives while this device is away (MQTT 5)", low=0, high=4294967295
    )
    max_payload: int = option(
        16 * 1024 * 1024,
        "bytes; a larger payload is skipped and answered with an error result (too_large)",
        low=1,
        high=256 * 1024 * 1024,
    )

    @property
    def version(self) -> Literal["5", "3.1.1"]:
        """Give the protocol version as text."""
        return "3.1.1" if self.protocol == "3.1.1" else "5"


@dataclass(frozen=True, slots=True)
class StatusConfig:
    """What this device says of itself: a retained message with a last will, so that everybody knows who is offline."""

    enabled: bool = option(True, "publish the status; without a broker there is none in any case")
    broker: str = option("", "name of the [mqtt.NAME] table; default: [mqtt]", example="plant")
    topic: str = option("edge-serve/{device}/status", "topic of the status; {device} is filled in")
    interval_s: float = option(60.0, "seconds between two messages while the state does not change", low=1, high=86400)
    client_id: str | None = option(None, "client id; default {device}.status", example="press-3.status")

    def topic_of(self, device: str) -> str:
        """Give the topic of a device's status."""
        return self.topic.replace("{device}", device)


@dataclass(frozen=True, slots=True)
class SpoolConfig:
    """Where results wait while their upstream is away: on disk, below state_dir, for the pipelines that ask for it."""

    enabled: bool = option(
        True, "false: while upstream is away results wait in memory (a few) and inputs are held back"
    )
    max_bytes: int = option(
        0, "bytes that may wait; 0: 256 MiB, or a tenth of the free disk if that is less", low=0, example=268435456
    )
    max_items: int = option(0, "results that may wait; 0: no limit but max_bytes", low=0)
    max_age_s: float = option(
        0.0, "seconds after which a result is too old to be sent, and dropped; 0: none is ever too old", low=0
    )
    policy: Literal["block", "drop_oldest", "drop_newest"] = option(
        "block",
        "when it is full: block: inputs are not acknowledged until there is room; else what is dropped, and counted",
    )
    durability: Literal["process", "power"] = option(
        "process",
        "process: safe when the process is killed; power: on the disk (fsync) before an input is acknowledged",
    )
    drain: Literal["oldest_first", "newest_first"] = option(
        "oldest_first",
        "order in which results leave when upstream is back; newest_first: the present first, then the past",
    )
    drain_rate: float = option(
        0.0, "most waiting results a second, for each sink, when upstream is back; 0: as fast as it takes them", low=0
    )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which model, which version of it, and how it runs. A pipeline may say these itself or name a [models.NAME]."""

    model: str = option(
        doc="a base folder with versions, one version folder, or a .tflite file", example="models/bearing"
    )
    version: str | int | None = option(
        None, 'latest, a number, or a label of version_labels (default "latest")', example="latest"
    )
    version_labels: dict[str, int] | None = option(
        None, "names for versions, as { stable = 3 }", example={"stable": 3}, low=0
    )
    variant: str | None = option(None, "which variant of the bundle (default: the bundle's)", example="int8")
    signature: str | None = option(
        None, "which signature of the model (default: serving_default)", example="serving_default"
    )
    delegate: str | dict[str, Any] | None = option(
        None,
        "auto (the default) measures what is there; or none, xnnpack, edgetpu, gpu, one of several by its index "
        '("edgetpu:usb:0"), or any library: { library = "/path/x.so", options = {} }',
        example="auto",
    )
    fallback: tuple[str, ...] | None = option(
        None,
        "delegates that may run, in this order, where an explicit `delegate` cannot be had; default: none may, and the "
        "start fails",
        example=["xnnpack"],
    )
    run_limit_s: float | None = option(
        None,
        "seconds that one run may take on a delegate in a process of its own (edgetpu, gpu, libraries) before it counts as "
        "hung; default: five times what its first runs took, and at least 0.6",
        example=0.6,
        low=0.001,
        high=3600,
    )
    threads: int | None = option(
        None, "threads of the interpreter; 0 (the default) chooses by measurement", example=0, low=0, high=64
    )


@dataclass(frozen=True, slots=True)
class PartConfig:
    """A source or sink: its type, and the options that its part declares."""

    type: str
    options: Any
    key: str
    required: bool = True
    """Of a sink: whether an input is acknowledged only when this sink's result is safe."""


@dataclass(frozen=True, slots=True)
class PipelineConfig:
    """One line from a source through a model to its sinks."""

    name: str
    model: ModelConfig
    source: PartConfig
    sinks: tuple[PartConfig, ...]
    input: InputSpec = field(default_factory=InputSpec)
    output: OutputSpec = field(default_factory=OutputSpec)
    key: str = "pipeline"
    error_payload_bytes: int = 0
    spool: bool | None = None
    write_through: bool = False
    workers: int = 1

    @property
    def policy(self) -> str:
        """Give what the source does with more than the model can take: lossless, or latest."""
        return str(getattr(self.source.options, "policy", "lossless"))


@dataclass(frozen=True, slots=True)
class _PipelineKeys:
    name: str = option("default", "letters, digits, - and _; part of topics and client ids", example="vibration")
    workers: int = option(
        1,
        "inputs that are worked on side by side, each with the model loaded once more; results leave as they are done, "
        "inputs are acknowledged in order; always 1 with windows",
        low=1,
        high=64,
    )
    error_payload_bytes: int = option(
        0, "error results carry this many bytes of the payload's beginning, in base64; 0: none", low=0, high=65536
    )
    spool: bool | None = option(
        None, "let results wait on disk while an upstream is away (default: where the source is lossless)", example=True
    )
    write_through: bool = option(
        False, "commit every result to the spool before it is sent: for sources that cannot send an input again"
    )


@dataclass(frozen=True, slots=True)
class _SinkKeys:
    required: bool = option(
        True, "false: no input waits for this sink; its results are dropped, and counted, where they find no room"
    )


@dataclass(frozen=True, slots=True)
class _TopKeys:
    schema: Literal[1] = option(doc="the version of this format: 1", example=1)
    device: str | None = option(
        None,
        "name of this device in topics and results; default: host name and the last six of the board's serial",
        example="press-3",
    )
    state_dir: str | None = option(
        None,
        "folder for what must outlast a restart; default: $STATE_DIRECTORY, else the XDG state folder",
        example="/var/lib/edge-serve",
    )
    runtime: Literal["auto", "litert", "tflite-runtime"] = option("auto", "which TFLite runtime is used")
    grace_s: float = option(10.0, "seconds that frames in work get to finish when the service stops", low=0, high=3600)


@dataclass(frozen=True, slots=True)
class Config:
    """A configuration in which no mistake was found."""

    path: Path
    device: str
    state_dir: Path
    runtime: str
    grace_s: float
    brokers: Mapping[str, MqttBroker]
    """By name; the one of [mqtt] itself has the name ""."""
    pipelines: tuple[PipelineConfig, ...]
    status: StatusConfig = field(default_factory=StatusConfig)
    spool: SpoolConfig = field(default_factory=SpoolConfig)

    def spools(self, pipeline: PipelineConfig) -> bool:
        """Say whether a pipeline's results wait on disk while an upstream is away."""
        asked = pipeline.write_through or pipeline.policy == "lossless" if pipeline.spool is None else pipeline.spool
        return self.spool.enabled and asked

    @property
    def has_status(self) -> bool:
        """Say whether a status is published."""
        return self.status.enabled and self.status.broker in self.brokers

    def resolve(self, path: str) -> Path:
        """Give a path of the configuration, relative to its folder."""
        return self.path.parent / path


@dataclass(frozen=True, slots=True)
class Wiring:
    """What a part may look at when its options are checked: the rest of its pipeline and of the configuration."""

    config: Config
    pipeline: PipelineConfig


class Part(Protocol):
    """What the loader needs of a source or sink class."""

    Options: type
    # A source whose senders get the results as answers may also say `answers = True`: it needs no sink.

    @classmethod
    def check(cls, options: Any, key: str, wiring: Wiring) -> list[Problem]:
        """Find what is wrong with the options beyond their types."""
        ...


Resolver = Callable[[Literal["sources", "sinks", "delegates"], str], Part]


def load(path: Path, resolver: Resolver) -> Config:
    """Read a configuration; ConfigError lists every mistake with its key and remedy."""
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ConfigError(
                str(path), [Problem("", f"is {size} bytes; a configuration has at most {MAX_CONFIG_BYTES}")]
            )
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            str(path),
            [
                Problem(
                    "", f"cannot be read ({error.strerror})", "`edge-serve config --sample` writes one to begin with"
                )
            ],
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [Problem("", f"is not UTF-8 text ({error})")]) from error
    return parse(text, path, resolver)


def parse(text: str, path: Path, resolver: Resolver) -> Config:
    """Read a configuration's text as if it stood in `path`."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    if any(len(_KEY_PART.findall(piece)) > MAX_KEY_PARTS for piece in _BETWEEN_KEYS.split(text)):
        raise ConfigError(
            str(path), [Problem("", f"is not TOML that anybody wrote: a key has over {MAX_KEY_PARTS} parts")]
        )
    try:
        table = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, and a number with too many digits
        raise ConfigError(str(path), [Problem("", f"is not TOML: {error}")]) from error
    except RecursionError as error:
        raise ConfigError(str(path), [Problem("", "is nested too deeply")]) from error
    problems: list[Problem] = []
    config = _build(table, path, resolver, problems)
    if problems or config is None:
        raise ConfigError(str(path), problems)
    return config


def _build(table: dict[str, Any], path: Path, resolver: Resolver, problems: list[Problem]) -> Config | None:
    tables = frozenset({"mqtt", "models", "pipeline", "status", "spool"})
    top = read(_TopKeys, table, "", problems, skip=tables)
    brokers = _brokers(table.get("mqtt", {}), problems)
    models = _models(table.get("models", {}), problems)
    status = read(StatusConfig, table.get("status", {}), "status", problems) or StatusConfig()
    spool = read(SpoolConfig, table.get("spool", {}), "spool", problems) or SpoolConfig()
    raw = table.get("pipeline", [])
    raws = raw if isinstance(raw, list) else [raw]
    if not raws:
        problems.append(Problem("pipeline", "is missing", "Add a [[pipeline]] table with model, source and sink"))
    pipelines = []
    for index, entry in enumerate(raws):
        key = f"pipeline[{index}]" if isinstance(raw, list) and len(raws) > 1 else "pipeline"
        pipeline = _pipeline(entry, key, models, resolver, problems)
        if pipeline is not None:
            pipelines.append(pipeline)
    names = [pipeline.name for pipeline in pipelines]
    problems.extend(
        Problem(join(pipeline.key, "name"), f"{pipeline.name!r} is taken by another pipeline", "Give each its own name")
        for position, pipeline in enumerate(pipelines)
        if pipeline.name in names[:position]
    )
    device = top.device if top is not None and top.device is not None else default_device()
    if not NAME.fullmatch(device):
        problems.append(
            Problem("device", f"{device!r} is no name", "Use letters, digits, '.', '-' and '_', at most 64")
        )
    config = Config(
        path=path.absolute(),
        device=device,
        state_dir=_state_dir(top, path),
        runtime=top.runtime if top is not None else "auto",
        grace_s=top.grace_s if top is not None else 10.0,
        brokers=brokers,
        pipelines=tuple(pipelines),
        status=status,
        spool=spool,
    )
    if table.get("status"):
        _check_status(config, problems)
    for name, broker in brokers.items():
        _check_broker(config, name, broker, problems)
    for pipeline in pipelines:
        wiring = Wiring(config, pipeline)
        for kind, part in (("sources", pipeline.source), *(("sinks", sink) for sink in pipeline.sinks)):
            if part.options is None:
                continue
            problems.extend(resolver(kind, part.type).check(part.options, part.key, wiring))  # type: ignore[arg-type]
        _check_pipeline(config, pipeline, problems)
        _check_delegates(pipeline, resolver, problems)
        _check_delivery(config, pipeline, resolver, problems)
    return config


def _brokers(table: Any, problems: list[Problem]) -> dict[str, MqttBroker]:
    if not isinstance(table, Mapping):
        problems.append(Problem("mqtt", "must be a table", "Write [mqtt] and its keys below it"))
        return {}
    named = {name: entry for name, entry in table.items() if isinstance(entry, Mapping)}
    own = {name: entry for name, entry in table.items() if name not in named}
    brokers = {}
    for name, entry, key in [("", own, "mqtt")] * bool(own) + [(n, e, f"mqtt.{n}") for n, e in named.items()]:
        # One without an address is named above; it still is the broker that others mean.
        brokers[name] = read(MqttBroker, entry, key, problems) or MqttBroker(url="mqtt://missing")
    return brokers


def _check_status(config: Config, problems: list[Problem]) -> None:
    status = config.status
    if status.enabled and status.broker not in config.brokers:
        name = f"[mqtt.{status.broker}]" if status.broker else "[mqtt]"
        problems.append(Problem("status.broker", f"there is no table {name}", f"Add {name} with url = …"))
    topic = status.topic_of(config.device)
    if not topic or any(wild in topic for wild in "+#{}\0"):
        problems.append(
            Problem("status.topic", f"{topic!r} is no topic", "A topic to publish to has no wildcards; known: {device}")
        )


def _models(table: Any, problems: list[Problem]) -> dict[str, ModelConfig]:
    if not isinstance(table, Mapping):
        problems.append(Problem("models", "must be a table of tables", "Write [models.NAME] and its keys below it"))
        return {}
    models = {}
    for name, entry in table.items():
        model = read(ModelConfig, entry, f"models.{name}", problems)
        if model is not None:
            models[name] = model
    return models


def _pipeline(
    entry: Any, key: str, models: Mapping[str, ModelConfig], resolver: Resolver, problems: list[Problem]
) -> PipelineConfig | None:
    if not isinstance(entry, Mapping):
        problems.append(Problem(key, "must be a table", "Write [[pipeline]] and its keys below it"))
        return None
    parts = frozenset({"source", "sink", "input", "output"})
    model_keys = frozenset(ModelConfig.__dataclass_fields__)
    own = read(_PipelineKeys, entry, key, problems, skip=parts | model_keys)
    if own is not None and not NAME.fullmatch(own.name):
        problems.append(
            Problem(join(key, "name"), f"{own.name!r} is no name", "Use letters, digits, '.', '-' and '_', at most 64")
        )
    model = read(ModelConfig, {name: entry[name] for name in entry if name in model_keys}, key, problems)
    if model is not None and model.model in models:
        base = models[model.model]
        said = {name: entry[name] for name in entry if name in model_keys and name != "model"}
        model = ModelConfig(**{**{n: getattr(base, n) for n in ModelConfig.__dataclass_fields__}, **said})
    inputs = read(InputSpec, entry.get("input", {}), join(key, "input"), problems)
    outputs = read(OutputSpec, entry.get("output", {}), join(key, "output"), problems)
    source = None
    if "source" not in entry:
        problems.append(
            Problem(join(key, "source"), "is missing", f"Add [{key.split('[', maxsplit=1)[0]}.source] with type = …")
        )
    else:
        source = _part("sources", entry["source"], join(key, "source"), resolver, problems)
    raw_sinks = entry.get("sink", [])
    if not isinstance(raw_sinks, list):
        raw_sinks = [raw_sinks]
    sinks = []
    for index, raw in enumerate(raw_sinks):
        sink_key = join(key, f"sink[{index}]" if len(raw_sinks) > 1 else "sink")
        sinks.append(_part("sinks", raw, sink_key, resolver, problems))
    if source is not None and not raw_sinks and not getattr(resolver("sources", source.type), "answers", False):
        problems.append(
            Problem(
                join(key, "sink"), "is missing, so results would go nowhere", 'Add one, as type = "mqtt" or "stdout"'
            )
        )
    # With problems this is never served; it is there so that all the rest of it is looked at, too.
    return PipelineConfig(
        own.name if own is not None else key,
        model or ModelConfig(model=""),
        source or PartConfig("", None, key),
        tuple(sink for sink in sinks if sink is not None),
        inputs or InputSpec(),
        outputs or OutputSpec(),
        key,
        own.error_payload_bytes if own is not None else 0,
        own.spool if own is not None else None,
        own.write_through if own is not None else False,
        own.workers if own is not None else 1,
    )


def _part(
    kind: Literal["sources", "sinks"], table: Any, key: str, resolver: Resolver, problems: list[Problem]
) -> PartConfig | None:
    if not isinstance(table, Mapping) or not isinstance(table.get("type"), str):
        problems.append(Problem(join(key, "type"), "is missing or no text", 'Say which part this is, as type = "mqtt"'))
        return None
    try:
        part = resolver(kind, table["type"])
    except EdgeServeError as error:
        problems.append(Problem(join(key, "type"), str(error)))
        return None
    common = frozenset(_SinkKeys.__dataclass_fields__) if kind == "sinks" else frozenset()
    options: Any = read(
        part.Options, {k: v for k, v in table.items() if k != "type" and k not in common}, key, problems
    )
    own = read(_SinkKeys, {k: v for k, v in table.items() if k in common}, key, problems)
    return (
        None if options is None else PartConfig(table["type"], options, key, own.required if own is not None else True)
    )


def _check_broker(config: Config, name: str, broker: MqttBroker, problems: list[Problem]) -> None:
    key = f"mqtt.{name}" if name else "mqtt"
    url, port_wrong = urlsplit(""), True
    with contextlib.suppress(ValueError):  # what urlsplit cannot read is no address
        url = urlsplit(broker.url)
        port_wrong = url.port == 0
    right = url.path.startswith("/") if url.scheme == "unix" else url.scheme in ("mqtt", "mqtts") and bool(url.hostname)
    if not right or port_wrong:
        problems.append(
            Problem(
                join(key, "url"),
                f"{_without_password(broker.url)!r} is no broker's address",
                "Write mqtt://host:port, mqtts://host:port or unix:///path",
            )
        )
    elif url.username is not None or url.password is not None:
        problems.append(
            Problem(
                join(key, "url"),
                "holds a user or password",
                "Use username and password_file; secrets do not belong into this file",
            )
        )
    if url.scheme != "mqtts":
        problems.extend(
            Problem(join(key, option_name), "needs TLS", "Use mqtts:// in url, or leave this out")
            for option_name in ("ca_file", "cert_file", "key_file", "alpn", "insecure")
            if getattr(broker, option_name)
        )
    if (broker.cert_file is None) != (broker.key_file is None):
        problems.append(Problem(join(key, "cert_file"), "cert_file and key_file go together", "Give both or neither"))
    for option_name in ("ca_file", "cert_file", "key_file", "password_file"):
        value = getattr(broker, option_name)
        if value is not None and not os.access(config.resolve(value), os.R_OK):
            problems.append(
                Problem(
                    join(key, option_name),
                    f"{config.resolve(value)} is not there or cannot be read",
                    "Check path and permissions",
                )
            )
    if broker.username is None and broker.password_file is not None:
        problems.append(Problem(join(key, "password_file"), "stands without a username", "Add username"))


def _without_password(url: str) -> str:
    return re.sub(r"//.*@", "//…@", url)


def _check_pipeline(config: Config, pipeline: PipelineConfig, problems: list[Problem]) -> None:
    model = pipeline.model
    path = config.resolve(model.model)
    if model.model and not exists(path):
        problems.append(
            Problem(
                join(pipeline.key, "model"),
                f"{path} does not exist",
                "Give a bundle (`edge-serve convert` makes one), a .tflite file or the name of a [models.NAME]",
            )
        )
    if pipeline.input.key == "field" and pipeline.input.key_field is None:
        problems.append(
            Problem(
                join(pipeline.key, "input.key_field"), 'is missing, and key = "field" needs it', "Name the JSON field"
            )
        )
    if pipeline.output.labels is not None and pipeline.output.labels_file is not None:
        problems.append(
            Problem(join(pipeline.key, "output.labels_file"), "labels are given twice", "Give labels or labels_file")
        )
    if pipeline.output.labels_file is not None and not exists(config.resolve(pipeline.output.labels_file)):
        problems.append(
            Problem(
                join(pipeline.key, "output.labels_file"),
                f"{config.resolve(pipeline.output.labels_file)} does not exist",
                "Check the path",
            )
        )


def _check_delegates(pipeline: PipelineConfig, resolver: Resolver, problems: list[Problem]) -> None:
    model = pipeline.model
    wished: dict[str, str | dict[str, Any]] = {}
    if model.delegate is not None and model.delegate != AUTO:
        wished["delegate"] = model.delegate
    wished.update({f"fallback[{number}]": name for number, name in enumerate(model.fallback or ())})
    for key, value in wished.items():
        try:
            resolver("delegates", DelegateSpec.parse(value).name)
        except UsageError as error:
            text = str(error).replace("unknown type", "unknown delegate")
            problems.append(Problem(join(pipeline.key, key), text, ""))
    if model.fallback and model.delegate in (None, AUTO):
        problems.append(
            Problem(
                join(pipeline.key, "fallback"),
                "goes with an explicit delegate",
                "Take it out: auto goes on with the next best by itself",
            )
        )


def _check_delivery(config: Config, pipeline: PipelineConfig, resolver: Resolver, problems: list[Problem]) -> None:
    """Find pairs of settings that promise what cannot be kept."""
    if pipeline.source.options is None:
        return
    answers = getattr(resolver("sources", pipeline.source.type), "answers", False)
    if pipeline.policy == "lossless" and pipeline.sinks and not answers and not any(s.required for s in pipeline.sinks):
        problems.append(
            Problem(
                join(pipeline.key, "sink"),
                "required = false for every sink of a lossless source: inputs would be acknowledged before anybody has "
                "their results",
                'Let one be required, or set policy = "latest" for the source',
            )
        )
    key = "write_through" if pipeline.write_through else "spool"
    if not (pipeline.write_through or pipeline.spool):
        return
    if not config.spool.enabled:
        problems.append(
            Problem(
                join(pipeline.key, key), "needs the spool, and [spool] says enabled = false", "Take one of them out"
            )
        )
    if pipeline.write_through and pipeline.spool is False:
        problems.append(Problem(join(pipeline.key, key), "needs the spool, and spool = false", "Take one of them out"))
    if pipeline.write_through and config.spool.policy == "drop_newest":
        problems.append(
            Problem(
                join(pipeline.key, key),
                'cannot be kept with policy = "drop_newest": a full spool would drop what it is to keep',
                'Set policy = "block" or "drop_oldest" under [spool]',
            )
        )
    able = [sink for sink in pipeline.sinks if hasattr(resolver("sinks", sink.type), "send_encoded")]
    unable = [sink for sink in pipeline.sinks if sink not in able and sink.required]
    if not able:
        problems.append(
            Problem(join(pipeline.key, key), "needs a sink whose results can wait on disk, as mqtt or file", "Add one")
        )
    elif pipeline.write_through and unable:
        problems.append(
            Problem(
                unable[0].key,
                f"results for a sink of type {unable[0].type!r} cannot be written through",
                "Set required = false for it",
            )
        )


def exists(path: Path) -> bool:
    """Say whether there is something that this process can see: a folder that may not be entered hides what is in it."""
    try:
        return path.exists()
    except OSError:
        return False


def default_device() -> str:
    """Name this device: its host name, and the last six of the board's serial, because cloned cards share host names."""
    host = re.sub(r"[^A-Za-z0-9._-]", "-", os.uname().nodename.split(".", 1)[0])[:48].lstrip("._-") or "device"
    for file in SERIAL_FILES:
        try:
            serial = re.sub(r"[^A-Za-z0-9]", "", Path(file).read_text(encoding="ascii", errors="ignore"))
        except OSError:
            continue
        if serial:
            return f"{host}-{serial[-6:].lower()}"
    return host


def _state_dir(top: _TopKeys | None, path: Path) -> Path:
    if top is not None and top.state_dir is not None:
        return path.parent / top.state_dir
    for variable, below in (("STATE_DIRECTORY", ""), ("XDG_STATE_HOME", "edge-serve")):
        if os.environ.get(variable):
            return Path(os.environ[variable].split(":", 1)[0]) / below
    try:
        return Path.home() / ".local/state/edge-serve"
    except RuntimeError:  # a user without a home, as services have
        return Path("/var/lib/edge-serve")


def password_of(config: Config, name: str) -> str | None:
    """Give a broker's password from its file, a systemd credential or the environment; None if there is none.

    UnavailableError is left to the connection: a file that cannot be read raises OSError here.
    """
    broker = config.brokers[name]
    if broker.password_file is not None:
        return config.resolve(broker.password_file).read_text(encoding="utf-8").rstrip("\r\n")
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    credential = Path(folder, PASSWORD_CREDENTIAL + (f"-{name}" if name else "")) if folder else None
    if credential is not None and credential.is_file():
        return credential.read_text(encoding="utf-8").rstrip("\r\n")
    return os.environ.get(PASSWORD_VARIABLE + (f"_{name.upper().replace('-', '_')}" if name else ""))
