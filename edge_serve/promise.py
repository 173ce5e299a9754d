"""What a pipeline's settings promise about its messages, in words, and where that ends: for `edge-serve check`.

Looks at the options that sources and sinks have in common by name (`policy`, `qos`, `broker`, `answer`, `sync`); what a
plug-in does beyond its policy is its own to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edge_serve.config import Config, PartConfig, PipelineConfig
from edge_serve.sources.mqtt import DEFAULT_IN_FLIGHT_311


@dataclass(frozen=True, slots=True)
class Promise:
    """What holds, in a sentence, and what a person may not expect, each in a sentence with a remedy."""

    text: str
    notes: tuple[str, ...]


def promise(config: Config, pipeline: PipelineConfig) -> Promise:
    """Give what a pipeline promises."""
    notes = [*_of_source(config, pipeline), *_of_spool(config, pipeline)]
    for number, sink in enumerate(pipeline.sinks):
        which = f"sink {number + 1} ({sink.type})" if len(pipeline.sinks) > 1 else f"sink ({sink.type})"
        notes += (f"{which}: {note}" for note in _of_sink(sink, pipeline))
    return Promise(_text(config, pipeline), tuple(notes))


def _text(config: Config, pipeline: PipelineConfig) -> str:
    if pipeline.policy == "latest":
        return "the newest input wins; what it replaces is dropped and counted"
    if not pipeline.sinks:
        return "every input is answered on its connection"
    source = pipeline.source
    if source.type == "mqtt":
        text = "at least once: an input is acknowledged when its results are safe"
    elif pipeline.write_through:
        text = "no result is lost: each is on disk before it is sent"
    else:
        text = (
            "every input is worked through, and its results are sent until they are taken, as long as the process lives"
        )
    if config.spools(pipeline):
        bound = f"{config.spool.max_bytes} bytes" if config.spool.max_bytes else "256 MiB or a tenth of the free disk"
        return f"{text}; while an upstream is away they wait on disk, up to {bound}"
    return f"{text}; while an upstream is away they wait in memory, a few, and inputs are held back"


def _of_source(config: Config, pipeline: PipelineConfig) -> Iterator[str]:
    source = pipeline.source
    options: Any = source.options
    if pipeline.policy == "latest":
        return
    if source.type == "mqtt":
        broker = config.brokers[options.broker]
        if broker.version == "3.1.1":
            yield (
                "source (mqtt): MQTT 3.1.1 cannot tell the broker how much may be unacknowledged; the promise holds, but "
                f"windows of more than {options.receive_maximum or DEFAULT_IN_FLIGHT_311} samples are settled early, and how "
                "long the broker keeps a session is its own setting; use protocol = 5 where the broker can, or receive_maximum "
                "= the broker's limit"
            )
        elif broker.session_expiry_s == 0:
            yield (
                "source (mqtt): session_expiry_s = 0: what is sent while this device is away, or was not acknowledged when it "
                "left, is lost; raise it"
            )
        return
    if pipeline.write_through:
        return
    if getattr(options, "answer", "") == "at_once" and pipeline.sinks:
        yield (
            f"source ({source.type}): a client has its answer before the sinks have the result, and a crash may cost that "
            'result; set answer = "when_safe", or write_through = true'
        )
    elif source.type != "socket":
        yield (
            f"source ({source.type}): it cannot send an input again, and a crash costs what was in memory; set "
            "write_through = true"
        )


def _of_spool(config: Config, pipeline: PipelineConfig) -> Iterator[str]:
    if not config.spools(pipeline):
        return
    if config.spool.policy != "block":
        which = "oldest" if config.spool.policy == "drop_oldest" else "newest"
        yield f'spool: when it is full the {which} results are dropped and counted; policy = "block" holds inputs back instead'
    if config.spool.max_age_s:
        yield f"spool: results that wait for longer than max_age_s = {config.spool.max_age_s:g} are dropped and counted"
    if config.spool.durability == "process":
        yield (
            "spool: a power cut may cost the results that were spooled in its last moments, though their inputs were "
            'acknowledged; durability = "power" does not, and writes more'
        )


def _of_sink(sink: PartConfig, pipeline: PipelineConfig) -> Iterator[str]:
    options: Any = sink.options
    if not sink.required:
        yield "required = false: no input waits for it, and its results are dropped where they find no room"
    elif sink.type == "mqtt" and options.qos == 0 and pipeline.policy != "latest":
        yield "qos = 0: a result counts as safe when it is written to the connection, and may be lost behind it; use qos = 1"
    elif sink.type == "file" and not options.sync and pipeline.policy != "latest":
        yield "a power cut may cost the last lines; sync = true does not, and wears out SD cards"
