"""What `edge-serve spool` reads and deletes, beside a running service or without one: SQLite keeps the two apart."""

from __future__ import annotations

import base64
import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_serve.errors import UnavailableError, UsageError
from edge_serve.frame import EARLIEST, LATEST, format_time
from edge_serve.spool.clock import Clock, age
from edge_serve.spool.rescue import ASIDE
from edge_serve.spool.row import JSON
from edge_serve.spool.segments import FOLDER, Segments
from edge_serve.spool.store import (
    APPLICATION_ID,
    BUSY_S,
    CONTENT,
    FILE,
    SCHEMA,
    SpoolDamagedError,
    Store,
    check_header,
    translated,
)

VERSION = 1
# Rows are read in pieces of this size, so that a long export keeps nobody from writing.
CHUNK = 200


@dataclass(frozen=True, slots=True)
class LaneLook:
    """A lane as it is now. `kind` is queue, or dead for what upstream refuses for ever."""

    id: int
    key: str
    pipeline: str
    kind: str
    items: int
    bytes: int
    oldest_s: float | None
    dropped: dict[str, int] = field(default_factory=dict)


class Reader:
    """An open spool that is only read."""

    def __init__(self, folder: Path) -> None:
        """Open the spool of a folder. UnavailableError if it cannot be read now, or is damaged."""
        self._folder = folder
        path = folder / FILE
        self._db: sqlite3.Connection | None = None
        if not path.exists():
            return  # nothing has ever had to wait
        try:
            check_header(path)
            self._db = self._opened(path)
            application, version = self._one("PRAGMA application_id"), self._one("PRAGMA user_version")
        except (sqlite3.Error, OSError, SpoolDamagedError) as error:
            self.close()
            raise _told(error, path) from error
        if (application, version) != (APPLICATION_ID, SCHEMA):
            self.close()
            raise UsageError(f"{path}: is no spool of this edge-serve (schema {version}); the service sets it aside")

    def _opened(self, path: Path) -> sqlite3.Connection:
        # Where nobody has it open there is no log, and none has to be made (nor a folder be writable) to look at it.
        way = "mode=ro" if Path(f"{path}-wal").exists() else "mode=ro&immutable=1"
        db = sqlite3.connect(f"{path.absolute().as_uri()}?{way}", uri=True, timeout=BUSY_S, isolation_level=None)
        try:
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _one(self, query: str, *values: Any) -> Any:
        assert self._db is not None
        return self._db.execute(query, values).fetchone()[0]

    def lanes(self) -> list[LaneLook]:
        """Give all lanes, and what was ever dropped from each."""
        if self._db is None:
            return []
        now = Clock().now()
        try:
            boots = dict(self._db.execute("SELECT id, boot FROM boots"))
            seen = dict(self._db.execute("SELECT boot, seen FROM boots")).get(now.boot, now.seconds)
            found = []
            for number, *named in self._db.execute(
                "SELECT id, key, pipeline, kind, items, bytes FROM lanes"
            ).fetchall():
                oldest = self._db.execute(
                    "SELECT boot, seconds, utc, synced FROM rows WHERE lane = ? ORDER BY id LIMIT 1", (number,)
                ).fetchone()
                waited = None
                if oldest is not None:
                    waited = round(age(now, boots.get(oldest[0], ""), oldest[1], oldest[2], bool(oldest[3]), seen), 3)
                dropped = dict(
                    self._db.execute("SELECT reason, number FROM dropped WHERE lane = ? ORDER BY reason", (number,))
                )
                key, pipeline, kind, items, size = named
                found.append(LaneLook(number, key, pipeline, kind, items, size, waited, dropped))
        except sqlite3.Error as error:
            raise _told(error, self._folder / FILE) from error
        return sorted(found, key=lambda lane: (lane.key, lane.kind))

    def rows(self, lanes: Sequence[LaneLook]) -> Iterator[dict[str, Any]]:
        """Give the rows of lanes as JSON-ready documents, in the order in which they came; damaged ones are marked."""
        read = Segments(self._folder / FOLDER, durable=False).read
        by_id = {lane.id: lane for lane in lanes}
        among = ",".join(map(str, by_id))
        query = f"SELECT {CONTENT}, lane FROM rows WHERE lane IN ({among}) AND id > ? ORDER BY id LIMIT {CHUNK}"  # noqa: S608  # numbers
        last = 0
        while self._db is not None and lanes:
            try:
                chunk = self._db.execute(query, (last,)).fetchall()
            except sqlite3.Error as error:
                raise _told(error, self._folder / FILE) from error
            if not chunk:
                break
            for values in chunk:
                yield _document(by_id[values[-1]], values[:-1], read)
            last = chunk[-1][0]

    def close(self) -> None:
        """Close it."""
        if self._db is not None:
            self._db.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _document(lane: LaneLook, values: Sequence[Any], read: Any) -> dict[str, Any]:
    document: dict[str, Any] = {"v": VERSION, "pipeline": lane.pipeline, "sink": lane.key}
    row = Store.decode(values, read)
    if row is None:
        return {**document, "error": "the row is damaged"}
    document["id"] = row.content.frame_id.encode(errors="replace").decode()
    if EARLIEST <= row.captured < LATEST:
        document["captured_at"] = format_time(row.captured)
    if row.reason is not None:
        document["reason"] = row.reason
    document["content_type"] = row.content.content_type
    if row.content.properties:
        document["properties"] = [list(pair) for pair in row.content.properties]
    if row.content.content_type == JSON:
        with contextlib.suppress(ValueError, RecursionError):
            return {**document, "result": json.loads(row.content.body)}
    return {**document, "body_base64": base64.b64encode(row.content.body).decode()}


def set_aside(folder: Path) -> list[str]:
    """Give the damaged databases that were set aside, oldest first."""
    if not folder.is_dir():
        return []
    names = [each.name for each in folder.glob(f"{ASIDE}*") if each.name.removeprefix(ASIDE).isdecimal()]
    return sorted(names, key=lambda name: int(name.removeprefix(ASIDE)))


def purge(folder: Path, lanes: Sequence[LaneLook]) -> int:
    """Delete all rows of lanes; gives how many. A running service notices, and deletes the files of large bodies."""
    path = folder / FILE
    if not lanes or not path.exists():
        return 0
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            gone = 0
            for lane in lanes:
                gone += db.execute("DELETE FROM rows WHERE lane = ?", (lane.id,)).rowcount
                db.execute("UPDATE lanes SET items = 0, bytes = 0 WHERE id = ?", (lane.id,))
            db.execute("COMMIT")
            return gone
    except sqlite3.Error as error:
        raise _told(error, path) from error


def tidy(folder: Path) -> None:
    """Give back the space of what was purged; only while no service uses the spool."""
    store = Store(folder, durable=False, clock=Clock())
    store.tidy(everything=True)
    store.close()


def _told(error: Exception, path: Path) -> Exception:
    meaning = translated(error, path)
    if isinstance(meaning, UnavailableError):
        return meaning
    return UnavailableError(f"{path}: is damaged ({meaning}); the service sets it aside when it opens it")
