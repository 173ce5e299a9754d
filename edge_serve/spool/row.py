"""A result as a sink sends it, and its row in the spool."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

Done = Callable[["Exception | None"], None]

JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A result in the bytes that a sink sends: what it needs to send the same again after a restart.

    `properties` are for the sink alone (MQTT user properties, a partition, a file); they are kept as they are.
    """

    frame_id: str
    body: bytes
    content_type: str = JSON
    properties: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True, eq=False)
class Row:
    """One result that waits for one sink. The flags belong to its lane, and change under the spool's lock."""

    content: Encoded
    captured: float
    """UTC seconds of the capture."""
    done: Done | None = None
    """Called once when the row is committed, or dropped as the policy says."""
    id: int = 0
    """Its place in the database; 0 before it is there."""
    segment: int | None = None
    held: bool = False
    """On the way to upstream, or ready to be sent: neither read again nor dropped."""
    unwanted: bool = False
    """Upstream has it before it was committed."""
    reason: str | None = None
    """Why upstream refuses it for ever; a row with a reason goes to the dead letters."""

    size: int = field(init=False)
    """The bytes that the bounds of the spool count."""

    def __post_init__(self) -> None:
        self.size = len(self.content.body)


def pack_id(frame_id: str) -> bytes:
    """Give a frame id as bytes; ids come from outside and may hold halves of characters."""
    return frame_id.encode("utf-8", "surrogatepass")


def unpack_id(data: bytes) -> str:
    """Read a frame id back; ValueError if it is none."""
    return data.decode("utf-8", "surrogatepass")


def pack_meta(content: Encoded) -> bytes | None:
    """Give content type and properties as bytes, None for plain JSON without any, as most rows are."""
    if content.content_type == JSON and not content.properties:
        return None
    return json.dumps([content.content_type, content.properties]).encode()


def unpack_meta(data: bytes | None) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Read content type and properties back; ValueError if they are none."""
    if data is None:
        return JSON, ()
    try:
        content_type, properties = json.loads(data)
        pairs = tuple((str(name), str(value)) for name, value in properties)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"no content type and properties: {data[:40]!r}") from error
    return str(content_type), pairs


def checksum(frame_id: bytes, meta: bytes | None, body: bytes) -> int:
    """Give the CRC-32 of all that is sent. SQLite would hand out a flipped bit inside a row as if nothing were wrong."""
    return zlib.crc32(body, zlib.crc32(meta or b"", zlib.crc32(frame_id)))
