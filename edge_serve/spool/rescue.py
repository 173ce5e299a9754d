"""What is done about a damaged spool: everything that can still be read goes into a new one, the old one is set aside.

At every moment one of the two is whole: the new database is written beside the damaged one, under another name, and takes its
place only when it is complete. Whoever is killed in between begins again.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_serve.spool.row import Row
from edge_serve.spool.segments import FOLDER, Segments, sync_folder
from edge_serve.spool.store import (
    APPLICATION_ID,
    CONTENT,
    FILE,
    INSERT,
    SCHEMA,
    TABLES,
    Store,
    connect,
    translated,
)

log = logging.getLogger(__name__)

NEW = FILE + ".new"
ASIDE = FILE + ".damaged-"
LOGS = ("-wal", "-shm")
# A disk that damages one file after the other shall not be filled with them: the latest are kept.
KEPT = 5
# Each attempt finds one more spot that cannot be read; a file with more of them than this has little left.
MAX_ATTEMPTS = 2000
LAST_ID = 2**63 - 1
# What SQLite expects at the beginning of every file that we write (https://www.sqlite.org/fileformat.html, 1.3): magic,
# pages of 4096 bytes, write-ahead log, no reserved bytes, the fixed fractions.
HEADER = b"SQLite format 3\0\x10\x00\x02\x02\x00\x40\x20\x20"
APPLICATION_ID_AT = 68
# What is copied besides the content.
REST = "lane, boot, seconds, utc, synced"


@dataclass(frozen=True, slots=True)
class Rescue:
    """What became of a damaged spool."""

    aside: Path
    rescued: int
    expected: int | None
    """How many rows it said it had; None if that cannot be read."""


def adopt(folder: Path) -> None:
    """Finish a rescue that was interrupted after the old database was set aside."""
    path, new = folder / FILE, folder / NEW
    if new.exists() and not path.exists():
        for suffix in LOGS:  # of the old one; SQLite would play them into the new one
            with contextlib.suppress(FileNotFoundError):
                (folder / (FILE + suffix)).rename(folder / f"{ASIDE}{_next_number(folder) - 1}{suffix}")
        new.rename(path)


def rescue(folder: Path) -> Rescue:
    """Set a damaged database aside and put a new one with all that could be read in its place.

    SpoolUnavailableError if the disk does not allow that now; then nothing has changed.
    """
    path, new = folder / FILE, folder / NEW
    try:
        for each in folder.glob(f"{NEW}*"):
            each.unlink()
        _mend_header(path)
        rescued, expected, segments = _copy(path, new)
        number = _next_number(folder)
        aside = folder / f"{ASIDE}{number}"
        _move_segments(folder, segments, folder / f"{aside.name}.{FOLDER}")
        path.rename(aside)
        for suffix in LOGS:
            with contextlib.suppress(FileNotFoundError):
                (folder / (FILE + suffix)).rename(folder / f"{aside.name}{suffix}")
        new.rename(path)
        sync_folder(folder)
        _forget_oldest(folder)
    except (OSError, sqlite3.Error) as error:
        raise translated(error if isinstance(error, OSError) else OSError(0, str(error)), path) from error
    return Rescue(aside, rescued, expected)


def _next_number(folder: Path) -> int:
    return 1 + max(_numbers(folder), default=0)


def _numbers(folder: Path) -> list[int]:
    pattern = re.compile(re.escape(ASIDE) + r"(\d{1,9})")
    return sorted(int(match[1]) for each in folder.iterdir() if (match := pattern.fullmatch(each.name)))


def _forget_oldest(folder: Path) -> None:
    for number in _numbers(folder)[:-KEPT]:
        log.error("spool: %s%d is deleted: %d newer ones are kept", folder / ASIDE, number, KEPT)
        for name in (f"{ASIDE}{number}", *(f"{ASIDE}{number}{suffix}" for suffix in LOGS)):
            with contextlib.suppress(OSError):
                (folder / name).unlink()
        shutil.rmtree(folder / f"{ASIDE}{number}.{FOLDER}", ignore_errors=True)


def _mend_header(path: Path) -> None:
    """Write what the first bytes of the file must have been, if it is ours: SQLite reads nothing behind a wrong one."""
    with contextlib.suppress(OSError), path.open("r+b") as file:
        head = file.read(100)
        said = int.from_bytes(head[APPLICATION_ID_AT : APPLICATION_ID_AT + 4], "big")
        if len(head) == 100 and said == APPLICATION_ID and head[: len(HEADER)] != HEADER:
            file.seek(0)
            file.write(HEADER)


def _copy(path: Path, new: Path) -> tuple[int, int | None, set[int]]:
    """Write all that can be read of `path` to `new`; gives how many rows, how many there were, and their segments."""
    segments = Segments(path.parent / FOLDER, durable=False)
    used: set[int] = set()
    rescued = 0
    expected: int | None = None
    with contextlib.closing(connect(new)) as target:
        target.execute("PRAGMA auto_vacuum = INCREMENTAL")
        target.execute("PRAGMA synchronous = FULL")
        target.execute("BEGIN IMMEDIATE")
        for statement in TABLES.split(";"):
            target.execute(statement)
        target.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        target.execute(f"PRAGMA user_version = {SCHEMA}")
        with contextlib.closing(_open_damaged(path)) as source:
            expected = _table(source, target, "lanes", "id, key, pipeline, kind, required, items, bytes")
            _table(source, target, "boots", "id, boot, seen")
            _table(source, target, "dropped", "lane, reason, number")
            for values in _walk(source):
                row = Store.decode(values[: CONTENT.count(",") + 1], segments.read)
                if row is not None and _insert(target, values, row):
                    rescued += 1
                    used |= {row.segment} - {None}  # type: ignore[arg-type]  # without None
        target.execute("COMMIT")
    return rescued, expected, used


def _open_damaged(path: Path) -> sqlite3.Connection:
    """Open what may be no database at all; an empty one in memory stands for what cannot be opened."""
    if path.is_file():
        for mode in ("rw", "ro&immutable=1"):
            try:
                db = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None)
            except sqlite3.Error:
                continue
            try:
                db.text_factory = lambda data: data.decode("utf-8", "replace")
                db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            except sqlite3.Error:
                db.close()
            else:
                return db
    return sqlite3.connect(":memory:")


def _table(source: sqlite3.Connection, target: sqlite3.Connection, name: str, columns: str) -> int | None:
    """Copy what can be read of a small table; gives the sum of its column `items`, None if that cannot be read."""
    total: int | None = None
    places = ", ".join("?" * (columns.count(",") + 1))
    with contextlib.suppress(sqlite3.Error):
        for values in source.execute(f"SELECT {columns} FROM {name}"):  # noqa: S608  # constants
            with contextlib.suppress(sqlite3.Error, OverflowError):
                target.execute(f"INSERT OR IGNORE INTO {name} ({columns}) VALUES ({places})", values)  # noqa: S608
            if name == "lanes" and isinstance(values[5], int):
                total = (total or 0) + values[5]
    return total


def _walk(source: sqlite3.Connection) -> Iterator[tuple[Any, ...]]:
    """Give all rows that can be read: forward up to what cannot, backward down to it, and the halves of what is between."""
    spans = [(0, LAST_ID)]
    attempts = 0
    query = f"SELECT {CONTENT}, {REST} FROM rows NOT INDEXED WHERE id BETWEEN ? AND ? ORDER BY id"  # noqa: S608
    while spans and attempts < MAX_ATTEMPTS:
        low, high = spans.pop()
        for direction in ("", " DESC"):
            attempts += 1
            try:
                for values in source.execute(query + direction, (low, high)):
                    number = values[0]
                    if not isinstance(number, int) or not low <= number <= high:
                        break  # the tree leads in a circle
                    yield values
                    low, high = (low, number - 1) if direction else (number + 1, high)
                else:
                    low = high + 1
                    break
            except (sqlite3.Error, OverflowError) as error:
                if "no such" in str(error):
                    return
        if low < high:
            middle = (low + high) // 2
            spans += [(middle + 1, high), (low, middle)]


def _insert(target: sqlite3.Connection, values: tuple[Any, ...], row: Row) -> bool:
    number, frame, meta, captured, size, crc, segment, offset, _, body = values[: CONTENT.count(",") + 1]
    lane, boot, seconds, utc, synced = values[CONTENT.count(",") + 1 :]
    # Ages and places that cannot be right are as good as unknown; the content is what counts.
    boot, seconds, utc, synced = (
        (boot, seconds, utc, synced)
        if isinstance(boot, int) and isinstance(seconds, float) and isinstance(utc, float)
        else (0, 0.0, 0.0, 0)
    )
    lane = lane if isinstance(lane, int) else 0
    try:
        target.execute(
            INSERT,
            (
                number, lane, frame, meta, captured, boot, seconds, utc, bool(synced), size, crc, segment, offset,
                row.reason, body if segment is None else None,
            ),
        )  # fmt: skip
    except (sqlite3.IntegrityError, sqlite3.InterfaceError, OverflowError):
        return False
    return True


def _move_segments(folder: Path, used: set[int], aside: Path) -> None:
    """Keep the bodies whose rows are lost beside the database that is set aside."""
    segments = Segments(folder / FOLDER, durable=False)
    for number in segments.numbers():
        if number not in used:
            aside.mkdir(mode=0o700, exist_ok=True)
            segments.path(number).replace(aside / segments.path(number).name)
