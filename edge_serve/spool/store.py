"""The spool's database: tables, transactions, what is dropped when it is full. Used by one thread.

Row ids grow over all lanes, so their order is the order in which results came. A lane is a sink's queue; its dead letters
(what upstream refuses for ever) are a lane of their own, with the same key.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edge_serve.errors import EdgeServeError, UnavailableError
from edge_serve.spool.clock import Clock, Moment, age
from edge_serve.spool.row import Encoded, Row, checksum, pack_id, pack_meta, unpack_id, unpack_meta
from edge_serve.spool.segments import FOLDER, INLINE_LIMIT, SegmentDamagedError, Segments

FILE = "spool.db"
SCHEMA = 1
APPLICATION_ID = 0x45535350  # "ESSP"
TABLES = """
CREATE TABLE boots (id INTEGER PRIMARY KEY, boot TEXT NOT NULL UNIQUE, seen REAL NOT NULL);
CREATE TABLE lanes (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, pipeline TEXT NOT NULL, kind TEXT NOT NULL, required INTEGER NOT NULL,
    items INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0, UNIQUE (key, kind)
);
CREATE TABLE rows (
    id INTEGER PRIMARY KEY, lane INTEGER NOT NULL, frame BLOB NOT NULL, meta BLOB, captured REAL NOT NULL,
    boot INTEGER NOT NULL, seconds REAL NOT NULL, utc REAL NOT NULL, synced INTEGER NOT NULL,
    size INTEGER NOT NULL, crc INTEGER NOT NULL, segment INTEGER, offset INTEGER, reason TEXT, body BLOB
);
CREATE INDEX rows_by_lane ON rows (lane);
CREATE INDEX rows_by_segment ON rows (segment) WHERE segment IS NOT NULL;
CREATE TABLE dropped (lane INTEGER NOT NULL, reason TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (lane, reason));
"""
INSERT = "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
CONTENT = "id, frame, meta, captured, size, crc, segment, offset, reason, body"
# `edge-serve spool` reads and deletes beside a running service; a writer waits so long for it.
BUSY_S = 5.0
# The log is cut back to this after a checkpoint, or one long transaction would keep its size for ever.
LOG_LIMIT = 8 * 1024 * 1024
# Free pages are given back when nothing waits and the file is longer than this many pages (of 4 KiB).
SHRINK_PAGES = 256
# Dead letters are for people: no more than this many are kept, and no more than this share of max_bytes.
DEAD_ITEMS = 1000
DEAD_SHARE = 8
# Rows are looked at in pieces of this size where many may have to go.
CHUNK = 256

Kind = Literal["queue", "dead"]
Policy = Literal["block", "drop_oldest", "drop_newest"]


class SpoolDamagedError(EdgeServeError):
    """The database is not what was written; it has to be set aside."""


class SpoolUnavailableError(UnavailableError):
    """The spool cannot be read or written now: a full disk, a folder without permission, a device that fails."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What may wait at most, over all lanes, and what happens to more."""

    max_bytes: int
    max_items: int = 0
    """0: no limit."""
    max_age_s: float = 0.0
    """0: no limit."""
    policy: Policy = "block"


@dataclass(slots=True, eq=False)
class LaneRecord:
    """A lane as the database has it."""

    id: int
    key: str
    pipeline: str
    kind: Kind
    required: bool
    items: int
    bytes: int


def translated(error: Exception, path: Path) -> Exception:
    """Give what an error of SQLite or the disk means for the spool: damage, or not now."""
    if isinstance(error, (SpoolDamagedError, SpoolUnavailableError)):
        return error
    if isinstance(error, OSError):
        return SpoolUnavailableError(f"{path}: {error.strerror or error}")
    text = str(error)
    if isinstance(error, sqlite3.OperationalError):
        lacking = ("no such", "has no column", "unsupported file format", "could not decode", "malformed")
        if not any(word in text.lower() for word in lacking):
            return SpoolUnavailableError(f"{path}: {text}")
    return SpoolDamagedError(text)


class Store:
    """An open spool."""

    def __init__(self, folder: Path, *, durable: bool, clock: Clock) -> None:
        """Open the spool of a folder, make it if there is none.

        SpoolDamagedError if what is there is no spool of this version or not sound, SpoolUnavailableError if it cannot
        be opened now.
        """
        self.path = folder / FILE
        self._clock = clock
        self._stale = False
        self.lanes: dict[int, LaneRecord] = {}
        self._touched: set[int] = set()
        self._segments_left: set[int] = set()
        db: sqlite3.Connection | None = None
        try:
            check_header(self.path)
            db = self._db = connect(self.path)
            self._prepare(durable)
            self.segments = Segments(folder / FOLDER, durable=durable)
            with self.transaction():
                self._recount()
                self._boots()
            self.next_id = 1 + (self._one("SELECT max(id) FROM rows") or 0)
            self._version = self._one("PRAGMA data_version")
        except (sqlite3.Error, OSError, ValueError, TypeError, OverflowError, EdgeServeError) as error:
            if db is not None:
                with contextlib.suppress(sqlite3.Error):
                    db.close()
            raise translated(error, self.path) from error

    def _prepare(self, durable: bool) -> None:
        db = self._db
        version, application = self._one("PRAGMA user_version"), self._one("PRAGMA application_id")
        fresh = version == 0 and application == 0 and not self._one("SELECT count(*) FROM sqlite_master")
        if fresh:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        elif application != APPLICATION_ID:
            raise SpoolDamagedError("it is a database of something else")
        elif version != SCHEMA:
            raise SpoolDamagedError(f"its schema is {version}; this edge-serve has {SCHEMA}")
        elif (found := self._one("PRAGMA integrity_check(1)")) != "ok":
            raise SpoolDamagedError(str(found))
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        db.execute(f"PRAGMA journal_size_limit = {LOG_LIMIT}")
        self._durable = durable
        if fresh:
            db.execute("BEGIN IMMEDIATE")
            for statement in TABLES.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {SCHEMA}")
            db.execute("COMMIT")

    def _one(self, query: str, *values: Any) -> Any:
        row = self._db.execute(query, values).fetchone()
        return None if row is None else row[0]

    def _boots(self) -> None:
        """Note that this boot has seen the spool, and learn what is known of the others."""
        now = self._clock.now()
        self._db.execute("INSERT OR IGNORE INTO boots (boot, seen) VALUES (?, ?)", (now.boot, now.seconds))
        self._boot_names = dict(self._db.execute("SELECT id, boot FROM boots"))
        self._boot, self._seen = self._db.execute("SELECT id, seen FROM boots WHERE boot = ?", (now.boot,)).fetchone()
        # Boots of which no row is left are of no use, and a device starts many times in its life.
        for number in self._boot_names.keys() - {self._boot}:
            if not self._one("SELECT 1 FROM rows WHERE boot = ? LIMIT 1", number):
                self._db.execute("DELETE FROM boots WHERE id = ?", (number,))

    def _reload(self) -> None:
        """Read all lanes anew."""
        found = self._db.execute("SELECT id, key, pipeline, kind, required, items, bytes FROM lanes").fetchall()
        for number in self.lanes.keys() - {values[0] for values in found}:
            del self.lanes[number]
        for number, key, pipeline, kind, required, items, size in found:
            known = self.lanes.get(number)
            if known is not None:  # others may hold it
                known.items, known.bytes = items, size
            else:
                which: Kind = "dead" if kind == "dead" else "queue"
                self.lanes[number] = LaneRecord(number, key, pipeline, which, bool(required), items, size)

    def _recount(self) -> None:
        """Read all lanes anew, and set right what they say they hold."""
        self._reload()
        for record in self.lanes.values():
            record.items = record.bytes = 0
        held = self._db.execute("SELECT lane, count(*), sum(size) FROM rows GROUP BY lane")
        for number, items, size in held.fetchall():
            if number not in self.lanes:
                self.lanes[number] = self._insert_lane(number, f"lost:{number}", "", "queue", required=True)
            self.lanes[number].items, self.lanes[number].bytes = items, size
        self._touched |= self.lanes.keys()

    def _insert_lane(self, number: int | None, key: str, pipeline: str, kind: Kind, *, required: bool) -> LaneRecord:
        cursor = self._db.execute(
            "INSERT INTO lanes (id, key, pipeline, kind, required) VALUES (?, ?, ?, ?, ?)",
            (number, key, pipeline, kind, required),
        )
        return LaneRecord(int(cursor.lastrowid or 0), key, pipeline, kind, required, 0, 0)

    def look(self) -> bool:
        """Say whether somebody else has changed the database, and count anew if so."""
        try:
            version = self._one("PRAGMA data_version")
            if version == self._version:
                return False
            self._reload()
            self.next_id = max(self.next_id, 1 + (self._one("SELECT max(id) FROM rows") or 0))
            self._version = self._one("PRAGMA data_version")
        except (sqlite3.Error, OSError) as error:
            raise translated(error, self.path) from error
        return True

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Do several things as one; after an error none of them has been done.

        Large bodies are on the disk before the rows that name them.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
            if self._stale:
                self._reload()
                self._stale = False
            yield
            self._db.executemany(
                "UPDATE lanes SET items = ?, bytes = ? WHERE id = ?",
                [(lane.items, lane.bytes, lane.id) for lane in map(self.lanes.__getitem__, self._touched)],
            )
            self.segments.sync()
            self._db.execute("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            self.segments.rolled_back()
            self._touched.clear()
            self._stale = True
            if isinstance(error, (sqlite3.Error, OSError, OverflowError)):
                raise translated(error, self.path) from error
            raise
        self.segments.committed()
        self._touched.clear()

    # Inside a transaction:

    def lane(self, key: str, pipeline: str, kind: Kind = "queue", *, required: bool = True) -> LaneRecord:
        """Give the lane of a sink, made if there is none yet."""
        for record in self.lanes.values():
            if (record.key, record.kind) == (key, kind):
                if record.required != required and kind == "queue":
                    record.required = required
                    self._db.execute("UPDATE lanes SET required = ? WHERE id = ?", (required, record.id))
                return record
        record = self._insert_lane(None, key, pipeline, kind, required=required)
        self.lanes[record.id] = record
        return record

    def append(self, lane: LaneRecord, rows: Sequence[Row], now: Moment) -> list[tuple[int, int | None]]:
        """Add rows to a lane; gives the id and the segment of each, which hold if the transaction commits."""
        values = []
        places: list[tuple[int, int | None]] = []
        for row in rows:
            content = row.content
            frame, meta, body = pack_id(content.frame_id), pack_meta(content), content.body
            crc = checksum(frame, meta, body)
            number, segment, offset = self.next_id, None, None
            inline: bytes | None = body
            if len(body) > INLINE_LIMIT:
                segment, offset = self.segments.append(lane.id, body, crc)
                inline = None
            self.next_id += 1
            places.append((number, segment))
            lane.items += 1
            lane.bytes += len(body)
            values.append(
                (
                    number, lane.id, frame, meta, row.captured, self._boot, now.seconds, now.utc, now.synced,
                    len(body), crc, segment, offset, row.reason, inline,
                )
            )  # fmt: skip
        self._db.executemany(INSERT, values)
        self._touched.add(lane.id)
        return places

    def remove(self, lane: LaneRecord, rows: Sequence[Row]) -> None:
        """Delete rows that upstream has."""
        cursor = self._db.executemany("DELETE FROM rows WHERE id = ?", [(row.id,) for row in rows])
        if cursor.rowcount == len(rows):
            lane.items -= len(rows)
            lane.bytes -= sum(row.size for row in rows)
            self._touched.add(lane.id)
        else:
            self._recount()  # some were purged
        self._segments_left.update(row.segment for row in rows if row.segment is not None)

    def bury(self, lane: LaneRecord, row: Row, limits: Limits, now: Moment) -> int:
        """Put a row that upstream refuses to the dead letters of its lane; gives how many older ones had to go."""
        dead = self.lane(lane.key, lane.pipeline, "dead")
        if row.id == 0:
            self.append(dead, [row], now)
        else:
            query = "UPDATE rows SET lane = ?, reason = ? WHERE id = ? AND lane = ?"
            if self._db.execute(query, (dead.id, row.reason, row.id, lane.id)).rowcount == 0:
                return 0  # it was purged
            for record, sign in ((lane, -1), (dead, 1)):
                record.items += sign
                record.bytes += sign * row.size
                self._touched.add(record.id)
        gone = 0
        while dead.items > 1 and (dead.items > DEAD_ITEMS or dead.bytes > limits.max_bytes // DEAD_SHARE):
            gone += self._drop([dead.id], 1, 0, frozenset()).get(dead.id, 0)
        return gone

    def room(self, limits: Limits, rows: int, size: int) -> tuple[int, int]:
        """Give how many items and bytes are too many if that much is added; (0, 0) if it fits."""
        queues = [lane for lane in self.lanes.values() if lane.kind == "queue"]
        items, total = sum(lane.items for lane in queues), sum(lane.bytes for lane in queues)
        over = items + rows - limits.max_items if limits.max_items else 0
        return max(0, over), max(0, total + size - limits.max_bytes)

    @property
    def empty(self) -> bool:
        """Say whether nothing waits; what was refused for ever does not count."""
        return not any(lane.items for lane in self.lanes.values() if lane.kind == "queue")

    def drop_oldest(self, items: int, size: int, held: frozenset[int]) -> dict[int, int]:
        """Delete the oldest rows until so many items and bytes are gone; gives how many by lane.

        Rows of sinks that are not required go first; `held` ones stay.
        """
        queues = [lane for lane in self.lanes.values() if lane.kind == "queue" and lane.items]
        gone: dict[int, int] = {}
        for group in ([x for x in queues if not x.required], [x for x in queues if x.required]):
            before = sum(lane.items for lane in group), sum(lane.bytes for lane in group)
            for lane, number in self._drop([lane.id for lane in group], items, size, held).items():
                gone[lane] = gone.get(lane, 0) + number
            items -= before[0] - sum(lane.items for lane in group)
            size -= before[1] - sum(lane.bytes for lane in group)
        return gone

    def _drop(self, lanes: list[int], items: int, size: int, held: frozenset[int]) -> dict[int, int]:
        gone: dict[int, int] = {}
        among = ",".join(map(str, lanes))
        last = 0
        while (items > 0 or size > 0) and lanes:
            query = f"SELECT id, lane, size, segment FROM rows WHERE id > ? AND lane IN ({among}) ORDER BY id LIMIT ?"  # noqa: S608  # numbers
            found = self._db.execute(query, (last, CHUNK)).fetchall()
            if not found:
                break
            doomed = []
            for number, lane, length, segment in found:
                last = number
                if number in held:
                    continue
                if items <= 0 and size <= 0:
                    break
                doomed.append((number,))
                items, size = items - 1, size - length
                gone[lane] = gone.get(lane, 0) + 1
                self._forget(lane, length, segment)
            self._db.executemany("DELETE FROM rows WHERE id = ?", doomed)
        return gone

    def _forget(self, lane: int, size: int, segment: int | None) -> None:
        self.lanes[lane].items -= 1
        self.lanes[lane].bytes -= size
        self._touched.add(lane)
        if segment is not None:
            self._segments_left.add(segment)

    def expire(self, lane: LaneRecord, limits: Limits, now: Moment, held: frozenset[int]) -> int:
        """Delete rows of a lane that have waited longer than they may, oldest first; gives how many."""
        gone = 0
        while limits.max_age_s and lane.items:
            found = self._db.execute(
                "SELECT id, boot, seconds, utc, synced, size, segment FROM rows WHERE lane = ? ORDER BY id LIMIT ?",
                (lane.id, CHUNK),
            ).fetchall()
            old = [
                (number, size, segment)
                for number, boot, seconds, utc, synced, size, segment in found
                if self._age(now, boot, seconds, utc, synced) > limits.max_age_s and number not in held
            ]
            self._db.executemany("DELETE FROM rows WHERE id = ?", [(number,) for number, _, _ in old])
            for _, size, segment in old:
                self._forget(lane.id, size, segment)
            gone += len(old)
            if len(old) < CHUNK:
                break
        return gone

    def _age(self, now: Moment, boot: int, seconds: float, utc: float, synced: int) -> float:
        return age(now, self._boot_names.get(boot, ""), seconds, utc, bool(synced), self._seen)

    def delete_damaged(self, lane: LaneRecord, ids: Iterable[int]) -> None:
        """Delete rows that are not what was written."""
        self._db.executemany("DELETE FROM rows WHERE id = ?", [(each,) for each in ids])
        self._recount()

    def note_dropped(self, lane: int, reason: str, number: int) -> None:
        """Keep count of what was dropped, for `edge-serve spool status`."""
        self._db.execute(
            "INSERT INTO dropped VALUES (?1, ?2, ?3) ON CONFLICT (lane, reason) DO UPDATE SET number = number + ?3",
            (lane, reason, number),
        )

    # Outside of one:

    def fetch(
        self, lane: LaneRecord, after: int, items: int, size: int, *, newest: bool, held: frozenset[int]
    ) -> tuple[list[Row], list[int]]:
        """Read rows of a lane: at most `items`, and about `size` bytes; gives them, and the ids of damaged ones.

        In order and behind the id `after`, or with `newest` the newest first; `held` ones are passed over.
        """
        order = "id > ? ORDER BY id" if not newest else "id > ? ORDER BY id DESC"
        rows: list[Row] = []
        damaged: list[int] = []
        try:
            cursor = self._db.execute(
                f"SELECT {CONTENT} FROM rows WHERE lane = ? AND {order} LIMIT ?",  # noqa: S608  # constants
                (lane.id, 0 if newest else after, items + len(held)),
            )
            for values in cursor:
                if values[0] in held:
                    continue
                row = self.decode(values, self.segments.read)
                if row is None:
                    damaged.append(values[0])
                    continue
                rows.append(row)
                size -= row.size
                if size <= 0 or len(rows) >= items:
                    break
            cursor.close()
        except (sqlite3.Error, OSError) as error:
            raise translated(error, self.path) from error
        return rows, damaged

    @staticmethod
    def decode(values: Sequence[Any], read: Callable[[int, int, int, int], bytes]) -> Row | None:
        """Make a row from what the columns CONTENT hold; None if that is not what was written."""
        number, frame, meta, captured, size, crc, segment, offset, reason, body = values
        try:
            if segment is not None:
                body = read(segment, offset, size, crc)
            if len(body) != size or checksum(frame, meta, body) != crc:
                return None
            content = Encoded(unpack_id(frame), body, *unpack_meta(meta))
            return Row(content, float(captured), id=int(number), segment=segment, reason=reason)
        except (SegmentDamagedError, TypeError, ValueError, OverflowError):
            return None

    def oldest_age(self, lanes: Iterable[LaneRecord], now: Moment) -> float | None:
        """Give the seconds that the oldest row of these lanes has waited, None if there is none."""
        ages = []
        query = "SELECT boot, seconds, utc, synced FROM rows WHERE lane = ? ORDER BY id LIMIT 1"
        try:
            for lane in lanes:
                found = self._db.execute(query, (lane.id,)).fetchone() if lane.items else None
                if found is not None:
                    ages.append(self._age(now, *found))
        except sqlite3.Error as error:
            raise translated(error, self.path) from error
        return max(ages, default=None)

    def dropped(self) -> dict[tuple[int, str], int]:
        """Give how many rows were ever dropped, by lane and reason."""
        return {(lane, reason): number for lane, reason, number in self._db.execute("SELECT * FROM dropped")}

    def tidy(self, *, everything: bool = False) -> None:
        """Give back to the disk what is not needed any more: segments without rows, and free pages if nothing waits."""
        try:
            empty = not any(lane.items for lane in self.lanes.values())
            candidates = set(self.segments.numbers()) if everything or empty else self._segments_left
            if not empty:
                candidates = candidates - self.segments.in_use()
            dead = [
                number for number in candidates if not self._one("SELECT 1 FROM rows WHERE segment = ? LIMIT 1", number)
            ]
            if dead and not self._durable:
                # The deletions have to outlast a power cut before the files go, or rows would come back without bodies.
                self._db.execute("PRAGMA wal_checkpoint(FULL)")
            for number in dead:
                self.segments.delete(number)
            self._segments_left &= self.segments.in_use()
            if empty and self._one("PRAGMA page_count") > SHRINK_PAGES:
                # A statement without columns is stepped once by `execute`, and gives back one page a step.
                self._db.executescript("PRAGMA incremental_vacuum")
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except (sqlite3.Error, OSError) as error:
            raise translated(error, self.path) from error

    def holds_only(self, ids: set[int]) -> bool:
        """Say whether there are no rows but these, dead letters included."""
        try:
            return all(number in ids for (number,) in self._db.execute("SELECT id FROM rows"))
        except sqlite3.Error as error:
            raise translated(error, self.path) from error

    def discard(self) -> None:
        """Close the files and delete them, so that a kill in between loses nothing, and room is made on a full disk."""
        self.close()
        try:
            # The log first: SQLite would play it into a new database. Without it the old one is what it was before.
            for suffix in ("-wal", "-shm", ""):
                self.path.with_name(FILE + suffix).unlink(missing_ok=True)
            for number in self.segments.numbers():
                self.segments.delete(number)
        except OSError as error:
            raise translated(error, self.path) from error

    def close(self) -> None:
        """Close the files; the log goes into the database."""
        self.segments.close()
        with contextlib.suppress(sqlite3.Error):
            self._db.close()


def connect(path: Path) -> sqlite3.Connection:
    """Open a database for reading and writing."""
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    db.text_factory = lambda data: data.decode("utf-8", "replace")
    return db


def check_header(path: Path) -> None:
    """Look at what SQLite would take amiss later, and in other words; SpoolDamagedError says what it is."""
    if not path.exists():
        return
    if not path.is_file():
        raise SpoolDamagedError("it is no file")
    try:
        with path.open("rb") as file:
            head = file.read(100)
    except OSError as error:
        raise SpoolDamagedError(f"it cannot be read: {error.strerror}") from error
    # https://www.sqlite.org/fileformat.html, 1.3: from write version 3 on, SQLite opens a file for reading only.
    if head and (len(head) < 100 or head[:16] != b"SQLite format 3\0"):
        raise SpoolDamagedError("file is not a database")
    if head and max(head[18], head[19]) > 2:
        raise SpoolDamagedError("its header is damaged")


def holds_rows(folder: Path) -> bool:
    """Say whether anything waits from before, without writing anything; True if that cannot be told."""
    path = folder / FILE
    if any(path.with_name(FILE + suffix).exists() for suffix in ("-wal", ".new")):
        return True
    if not path.exists():
        return False
    try:
        check_header(path)
        with contextlib.closing(sqlite3.connect(f"file:{_quoted(path)}?immutable=1", uri=True)) as db:
            return db.execute("SELECT 1 FROM rows LIMIT 1").fetchone() is not None
    except (sqlite3.Error, EdgeServeError):
        return True


def _quoted(path: Path) -> str:
    from urllib.parse import quote

    return quote(str(path))
