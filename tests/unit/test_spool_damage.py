"""Damaged spools: whatever the file is, what can be read goes on, the rest is set aside and told, and nothing crashes."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_serve.spool import rescue, segments, store
from edge_serve.spool.row import Row
from edge_serve.spool.store import SpoolDamagedError, Store
from tests.support import wait_for
from tests.unit.spool_files import KEY, FakeClock, Opened, filled, many

ROWS = 120


def body_of(identity: str) -> bytes:
    """Give a body that tells its id; each tenth is a large one."""
    size = segments.INLINE_LIMIT + 100 if identity.endswith("0") else 400
    return (identity.encode() + b" ") * (size // (len(identity) + 1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound spool of 120 rows of one sink and 3 of another."""
    folder = tmp_path_factory.mktemp("whole")
    filled(folder, ROWS, body_of)
    filled(folder, 3, key="another")
    return folder


def copied(whole: Path, folder: Path) -> Path:
    """Give a copy of a spool."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    return folder / "spool"


def recovered(folder: Path) -> tuple[list[Row], bool]:
    """Open a spool as the service does; gives the rows of the first sink, and whether something was set aside."""
    aside = False
    for _ in range(2):
        try:
            opened = Store(folder, durable=False, clock=FakeClock())  # type: ignore[arg-type]
        except SpoolDamagedError:
            rescue.rescue(folder)
            aside = True
            continue
        try:
            record = next((lane for lane in opened.lanes.values() if lane.key in (KEY, "lost:1")), None)
            if record is None:
                return [], aside
            rows, _ = opened.fetch(record, 0, 10**6, 10**9, newest=False, held=frozenset())
            return rows, aside
        finally:
            opened.close()
    raise AssertionError("the rescued spool is damaged, too")


def sound(rows: list[Row]) -> list[str]:
    """Check that rows are what was written, in order; gives their frame ids."""
    ids = [row.content.frame_id for row in rows]
    assert ids == sorted(set(ids), key=lambda each: int(each[1:])), "in order, none twice"
    for row in rows:
        assert row.content.body == body_of(row.content.frame_id)
    return ids


@pytest.mark.slow
def test_a_flipped_bit_anywhere_costs_little_and_lies_never(whole: Path, tmp_path: Path) -> None:
    rng = random.Random(7)
    data = (whole / "spool/spool.db").read_bytes()
    places = [*range(100), *rng.sample(range(100, 4096), 40), *rng.sample(range(4096, len(data)), 100)]
    lost = []
    for place in places:
        folder = copied(whole, tmp_path / "copy")
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        (folder / "spool.db").write_bytes(damaged)
        rows, aside = recovered(folder)
        lost.append(ROWS - len(sound(rows)))
        if aside:
            assert (folder / "spool.db.damaged-1").exists()
    # A leaf page holds about ten rows; the schema's page and the lanes' have no copy.
    assert sorted(lost)[len(lost) * 3 // 4] <= 10, sorted(lost)
    assert lost.count(ROWS) < len(lost) / 10


def test_a_file_that_was_cut_anywhere_is_read_as_far_as_it_goes(whole: Path, tmp_path: Path) -> None:
    data = (whole / "spool/spool.db").read_bytes()
    found = []
    for length in [0, 1, 15, 16, 50, 99, 100, 4095, 4096, 4097, *range(8192, len(data), 4096 * 2 + 77)]:
        folder = copied(whole, tmp_path / "copy")
        (folder / "spool.db").write_bytes(data[:length])
        rows, aside = recovered(folder)
        found.append(len(sound(rows)))
        assert aside or length == 0
    assert max(found) > ROWS / 2


def test_pages_of_noise_cost_what_was_in_them(whole: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    data = (whole / "spool/spool.db").read_bytes()
    for page in range(1, len(data) // 4096):
        folder = copied(whole, tmp_path / "copy")
        noise = data[: page * 4096] + rng.randbytes(4096) + data[(page + 1) * 4096 :]
        (folder / "spool.db").write_bytes(noise)
        sound(recovered(folder)[0])


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 10_000, b"hello", b"SQLite format 3\0", b"SQLite format 3\0" + b"\xff" * 8176, os.urandom(50_000)],
    ids=["empty", "zeros", "text", "magic", "magic-and-ones", "noise"],
)
def test_a_foreign_file_is_set_aside(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool/spool.db").write_bytes(content)
    with Opened(tmp_path) as made:
        made.fill(*many(3))
        assert made.ids() == many(3)
    if content:
        assert (tmp_path / "spool/spool.db.damaged-1").read_bytes() == content
        told = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert len(told) == 1
        assert "is damaged" in told[0].getMessage()
        assert "0 results in it could be rescued" in told[0].getMessage()


def test_a_database_of_something_else_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "spool").mkdir()
    db = sqlite3.connect(tmp_path / "spool/spool.db")
    db.execute("CREATE TABLE rows (a, b)")
    db.execute("INSERT INTO rows VALUES (1, 2)")
    db.commit()
    db.close()
    with Opened(tmp_path) as made:
        made.fill("a")
        assert made.ids() == ["a"]
    assert "it is a database of something else" in caplog.text
    kept = sqlite3.connect(tmp_path / "spool/spool.db.damaged-1")
    assert kept.execute("SELECT * FROM rows").fetchall() == [(1, 2)]
    kept.close()


@pytest.mark.parametrize("schema", [0, 7])
def test_rows_of_another_schema_go_on_as_far_as_they_can_be_read(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, schema: int
) -> None:
    folder = copied(whole, tmp_path / "copy")
    db = sqlite3.connect(folder / "spool.db")
    db.execute(f"PRAGMA user_version = {schema}")
    db.close()
    with Opened(tmp_path / "copy") as made:
        assert made.ids() == many(ROWS)
    assert f"its schema is {schema}" in caplog.text
    assert f"{ROWS + 3} of {ROWS + 3} results in it could be rescued" in caplog.text


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("/nowhere/at/all")], ids=["folder", "link"])
def test_what_is_no_file_is_set_aside(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "spool").mkdir()
    make(tmp_path / "spool/spool.db")
    with Opened(tmp_path) as made:
        made.put("a")
        wait_for(lambda: made.outcomes["a"] or "problem" in made.spool.status(), "it is settled or told")
        made.lane.withdraw()


def test_damage_while_the_service_runs_costs_no_restart(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copied(whole, tmp_path / "copy")
    with Opened(tmp_path / "copy") as made:
        held = made.drain(3, acknowledge=False)
        with (tmp_path / "copy/spool/spool.db").open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(4096 * 6))
        made.lane.rewind()
        made.put("new", b"new")
        made.settled("new")
        rows = made.drain()
        assert rows[-1].content.frame_id == "new"
        assert len(rows) >= 1
        assert held
    assert not [record for record in caplog.records if record.levelno == logging.CRITICAL]


def test_an_index_that_hides_rows_is_found_out(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "copy")
    db = sqlite3.connect(folder / "spool.db")
    db.execute("PRAGMA writable_schema = ON")
    # The index keeps its entries and loses its table: as if they had never been written.
    db.execute("DELETE FROM sqlite_master WHERE name = 'rows_by_lane'")
    db.commit()
    db.close()
    with Opened(tmp_path / "copy") as made:
        assert made.ids() == many(ROWS)


def test_a_rescue_that_was_cut_off_is_finished_or_begun_again(whole: Path, tmp_path: Path) -> None:
    # Killed while the new database was written: the old one is still in its place.
    folder = copied(whole, tmp_path / "copy")
    (folder / "spool.db.new").write_bytes(b"half of a new one")
    with Opened(tmp_path / "copy") as made:
        assert made.ids(5) == many(5)
    # Killed after the old one was set aside: its log lies about, and would be played into the new one.
    folder = copied(whole, tmp_path / "copy")
    shutil.copy(folder / "spool.db", folder / "spool.db.damaged-1")
    (folder / "spool.db").rename(folder / "spool.db.new")
    (folder / "spool.db-wal").write_bytes(b"of the old one")
    with Opened(tmp_path / "copy") as made:
        assert made.ids() == many(ROWS)
    assert (folder / "spool.db.damaged-1-wal").read_bytes() == b"of the old one"


def test_bodies_whose_rows_are_lost_are_kept_beside_the_damaged_database(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "copy")
    before = {each.name for each in (folder / "segments").iterdir()}
    (folder / "spool.db").write_bytes(b"nothing is left of it" * 1000)
    with Opened(tmp_path / "copy") as made:
        assert made.ids() == []
    assert {each.name for each in (folder / "spool.db.damaged-1.segments").iterdir()} == before


def test_no_more_than_a_few_are_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    for number in range(8):
        (folder / "spool.db").write_bytes(f"damaged {number}".encode())
        rescue.rescue(folder)
    kept = sorted(each.name for each in folder.iterdir() if ".damaged-" in each.name)
    assert kept == [f"spool.db.damaged-{number}" for number in range(4, 9)]
    assert (folder / "spool.db.damaged-8").read_bytes() == b"damaged 7"


def test_a_flipped_bit_in_a_log_that_a_kill_left_behind(whole: Path, tmp_path: Path) -> None:
    """What SQLite finds damaged in its log it leaves out, from there on; nothing else may happen."""
    with log_left_behind(tmp_path / "source") as source:
        log = (source / "spool/spool.db-wal").read_bytes()
        assert len(log) > 10_000
        rng = random.Random(5)
        for place in [*range(32), *rng.sample(range(32, len(log)), 40)]:
            folder = copied(source, tmp_path / "copy")
            (folder / "spool.db-shm").unlink(missing_ok=True)
            damaged = bytearray(log)
            damaged[place] ^= 1 << rng.randrange(8)
            (folder / "spool.db-wal").write_bytes(damaged)
            rows, _ = recovered(folder)
            assert [row.content.frame_id for row in rows] == many(len(rows))


@contextlib.contextmanager
def log_left_behind(folder: Path) -> Iterator[Path]:
    """Give the folder of a spool that is open, so that its log is there."""
    with Opened(folder) as made:
        for each in many(40):
            made.fill(each)
        yield folder


def test_deep_damage_is_left_after_a_bounded_number_of_attempts(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = 0

    class Source:
        def execute(self, query: str, values: tuple[int, int]) -> Iterator[tuple[int]]:
            nonlocal tried
            tried += 1
            raise sqlite3.DatabaseError("database disk image is malformed")

    assert list(rescue._walk(Source())) == []  # type: ignore[arg-type]
    assert tried <= rescue.MAX_ATTEMPTS + 2


def test_store_constants_agree_with_sqlite(whole: Path) -> None:
    head = (whole / "spool/spool.db").read_bytes()[:100]
    assert head[: len(rescue.HEADER)] == rescue.HEADER
    assert int.from_bytes(head[rescue.APPLICATION_ID_AT :][:4], "big") == store.APPLICATION_ID
