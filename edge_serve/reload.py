"""What a new configuration changes in a running service: which pipelines stay, change, come and go, and what needs a restart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edge_serve.config import Config, PipelineConfig
from edge_serve.errors import ConfigError, Problem, UsageError
from edge_serve.line import Line, find_model, stamps, traits

# What all parts were made with; the state folder is locked, and topics and sessions carry the device's name.
FIXED = ("device", "state_dir", "runtime")


@dataclass(frozen=True, slots=True)
class Plan:
    """What has to be done to get from one configuration to another."""

    kept: list[Line]
    changed: dict[str, list[str]]
    """Pipelines that are made anew, and what of them is different."""
    added: list[str]
    removed: list[Line]
    told: bool
    """Whether what is said of the service (the status topic) changes."""

    @property
    def made(self) -> list[str]:
        """Name the pipelines that have to be made."""
        return [*self.changed, *self.added]

    @property
    def empty(self) -> bool:
        """Say whether nothing has to be done."""
        return not (self.changed or self.added or self.removed or self.told)

    def document(self) -> dict[str, Any]:
        """Give what is done, JSON-ready."""
        return {
            "kept": [line.name for line in self.kept],
            "changed": self.changed,
            "added": self.added,
            "removed": [line.name for line in self.removed],
            "status": self.told,
        }

    def __str__(self) -> str:
        parts = [f"{name} changed ({', '.join(what)})" for name, what in self.changed.items()]
        parts += [f"{name} added" for name in self.added]
        parts += [f"{line.name} removed" for line in self.removed]
        parts += ["status changed"] if self.told else []
        return ", ".join(parts) or "nothing has changed"


def plan(old: Config, new: Config, lines: Sequence[Line], told_before: tuple[object, ...]) -> Plan:
    """Compare; nothing is touched. `told_before` is what `told` gave when the service started to say how it is.

    UsageError names what only a restart can change, ConfigError a model that is not there."""
    fixed = [
        f"{name} ({getattr(old, name)} → {getattr(new, name)})"
        for name in FIXED
        if getattr(old, name) != getattr(new, name)
    ]
    if fixed:
        raise UsageError(
            f"{new.path}: a running service cannot change {', '.join(fixed)}; restart it, or put the old value back"
        )
    running = {line.name: line for line in lines}
    wanted = {pipeline.name: pipeline for pipeline in new.pipelines}
    changed: dict[str, list[str]] = {}
    problems: list[Problem] = []
    for name in running.keys() & wanted.keys():
        try:
            different = _differences(new, wanted[name], running[name])
        except UsageError as error:
            problems.append(Problem(f"{wanted[name].key}.model", str(error)))
            continue
        if different:
            changed[name] = different
    if problems:
        raise ConfigError(str(new.path), problems)
    return Plan(
        kept=[line for line in lines if line.name in wanted and line.name not in changed],
        changed={name: changed[name] for name in wanted if name in changed},
        added=[name for name in wanted if name not in running],
        removed=[line for line in lines if line.name not in wanted],
        told=told(new) != told_before,
    )


def _differences(config: Config, pipeline: PipelineConfig, line: Line) -> list[str]:
    now = traits(config, pipeline, find_model(config, pipeline))
    return [aspect for aspect in {**line.traits, **now} if line.traits.get(aspect) != now.get(aspect)]


def told(config: Config) -> tuple[object, ...]:
    """Give all that the status topic depends on, as it is now."""
    if not config.has_status:
        return ()
    broker = config.brokers[config.status.broker]
    return config.status, broker, stamps(config, broker)
