"""The spool: order, bounds, policies, dead letters, what it leaves on the disk."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_serve.config import SpoolConfig
from edge_serve.errors import UnavailableError
from edge_serve.spool import segments, spooler, store
from edge_serve.spool.row import Encoded, pack_meta, unpack_meta
from edge_serve.spool.spooler import Spool
from tests.support import stays, wait_for
from tests.unit.spool_files import Opened, filled, many

LARGE = b"x" * (segments.INLINE_LIMIT + 1)


def files(folder: Path) -> list[str]:
    """Give all files below a folder."""
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())


def test_what_was_put_comes_out_in_order_and_is_gone_then(tmp_path: Path) -> None:
    with Opened(tmp_path) as made:
        made.fill(*many(3000))
        assert made.spool.status()["items"] == 3000
        assert made.ids() == many(3000)
        made.empty()
    assert files(tmp_path) == ["spool/spool.db"]


def test_nothing_is_touched_before_something_has_to_wait(tmp_path: Path) -> None:
    with Opened(tmp_path) as made:
        made.lane.flow(True)
        assert made.lane.take() is None
        assert made.spool.status() == {"items": 0, "bytes": 0, "oldest_s": None, "dropped": {}}
        stays(lambda: files(tmp_path) == [], "written without need", 0.2)
    assert files(tmp_path) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "spool"]


def test_an_empty_spool_from_before_is_not_opened(tmp_path: Path) -> None:
    with Opened(tmp_path) as made:
        made.fill("a")
        assert made.ids() == ["a"]
        made.empty()
    before = {name: (tmp_path / name).stat() for name in files(tmp_path)}
    with Opened(tmp_path) as again:
        assert not again.lane.opening
        time.sleep(0.1)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)} == {
        name: status.st_mtime_ns for name, status in before.items()
    }


def test_a_row_is_what_was_encoded(tmp_path: Path) -> None:
    contents = [
        Encoded("", b""),
        Encoded("\ud800 ß🙂\0", b"\x00\xff"),
        Encoded("large", LARGE, "text/plain", (("a", "1"), ("a", "2"), ("ß", ""))),
        Encoded("x" * 300, b"{}", "application/json", (("k", "v"),)),
    ]
    with Opened(tmp_path) as made:
        for content in contents:
            made.lane.put(content, 1.5, None)
        wait_for(lambda: made.spool.status()["items"] == len(contents), "all are committed")
    with Opened(tmp_path) as again:
        rows = again.drain()
        assert [row.content for row in rows] == contents
        assert {row.captured for row in rows} == {1.5}


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    with Opened(tmp_path) as made:
        made.fill(*many(50))
        assert made.ids(20) == many(20)
        wait_for(lambda: made.spool.status()["items"] == 30, "what was sent is deleted")
    with Opened(tmp_path) as again:
        again.fill(*many(10, first=50))
        assert again.ids() == many(40, first=20)
        again.empty()


def test_what_is_not_acknowledged_comes_again_in_order(tmp_path: Path) -> None:
    with Opened(tmp_path) as made:
        made.fill(*many(100))
        rows = made.drain(40, acknowledge=False)
        for row in rows[:30:2]:
            made.lane.sent(row, time.monotonic())
        made.lane.rewind()
        made.fill("late")
        expected = [each for number, each in enumerate(many(100)) if number >= 30 or number % 2]
        assert made.ids() == [*expected, "late"]
        made.empty()


def test_what_is_on_the_way_is_not_sent_twice_before_a_loss(tmp_path: Path) -> None:
    with Opened(tmp_path) as made:
        row = made.put("on the way", held=True)
        made.fill("behind")
        made.settled("on the way")
        assert made.ids() == ["behind"]
        made.lane.sent(row, time.monotonic())
        made.empty()


def test_a_late_acknowledgement_settles_what_was_not_committed_yet(tmp_path: Path) -> None:
    with Opened(tmp_path) as made:
        rows = [made.put(each, held=True) for each in many(200)]
        for row in rows:
            made.lane.sent(row, time.monotonic())
        made.settled(*many(200))
        made.empty()


def test_the_newest_leave_first_where_that_is_asked_for(tmp_path: Path) -> None:
    with Opened(tmp_path, drain="newest_first") as made:
        made.fill(*many(100))
        assert made.ids(10) == many(100)[:89:-1]
        made.fill("newer")
        rest = made.ids()
        assert sorted([*rest, *many(100)[90:]]) == sorted([*many(100), "newer"])
        # A few were read ahead before the newer one came.
        assert "newer" in rest[:20]
        made.empty()


def test_two_sinks_have_a_cursor_each(tmp_path: Path) -> None:
    with Opened(tmp_path, key="one") as made:
        other = made.spool.lane("two", "line", made.counters)
        made.fill(*many(20))
        for each in many(20, first=100):
            other.put(Encoded(each, LARGE), 0.0, None)
        wait_for(lambda: made.spool.status()["items"] == 40, "all are committed")
        assert made.ids() == many(20)
        wait_for(lambda: made.spool.status()["items"] == 20, "the other's stay")
    with Opened(tmp_path, key="two") as again:
        assert again.ids() == many(20, first=100)
        again.empty()


def test_rows_of_a_sink_that_is_not_there_any_more_are_kept_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, 12, key="gone")
    with Opened(tmp_path, key="other") as made:
        made.fill("new")
        assert made.ids() == ["new"]
    assert "12 results wait for gone, which the configuration does not name" in caplog.text
    with Opened(tmp_path, key="gone") as again:
        assert again.ids() == many(12)


# Large bodies.


def test_large_bodies_lie_in_segments_that_go_with_their_last_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 100_000)

    def body(identity: str) -> bytes:
        return identity.encode() * 10_000

    ids = filled(tmp_path, 40, body)
    before = [name for name in files(tmp_path) if name.endswith(".seg")]
    assert len(before) > 5
    with Opened(tmp_path) as again:
        rows = again.drain(20)
        assert [(row.content.frame_id, row.content.body) for row in rows] == [(each, body(each)) for each in ids[:20]]
        wait_for(lambda: len([n for n in files(tmp_path) if n.endswith(".seg")]) < len(before) / 2 + 2, "half is gone")
        assert again.ids() == ids[20:]
        again.empty()
        wait_for(lambda: not [n for n in files(tmp_path) if n.endswith(".seg")], "all are gone")
    database = (tmp_path / "spool/spool.db").stat().st_size
    assert database < 100_000, "large bodies do not go through the database"


def test_segments_that_no_row_names_are_deleted_at_the_start(tmp_path: Path) -> None:
    filled(tmp_path, 2, lambda identity: LARGE)
    (tmp_path / "spool/segments/00000099.seg").write_bytes(b"not committed")
    (tmp_path / "spool/segments/notes.txt").write_bytes(b"not ours")
    with Opened(tmp_path) as again:
        assert len(again.ids()) == 2
        again.empty()
        wait_for(lambda: not [n for n in files(tmp_path) if n.endswith(".seg")], "all are gone")
    assert "spool/segments/notes.txt" in files(tmp_path)


def test_a_lost_segment_costs_its_rows_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Opened(tmp_path) as made:
        made.fill("a")
        made.fill("b", body=LARGE)
        made.fill("c")
    next((tmp_path / "spool/segments").iterdir()).unlink()
    with Opened(tmp_path) as again:
        assert again.ids() == ["a", "c"]
        assert again.counters.snapshot()["dropped"] == {spooler.DAMAGED: 1}
        again.empty()
    assert "1 results in the spool are damaged and lost" in caplog.text


# Bounds.


def test_a_full_spool_blocks_until_there_is_room(tmp_path: Path) -> None:
    with Opened(tmp_path, max_items=10) as made:
        for each in many(15):
            made.put(each)
        made.settled(*many(10))
        stays(lambda: not any(made.outcomes[each] for each in many(5, first=10)), "acknowledged without a place", 0.3)
        assert "full" in made.spool.status()["problem"]
        assert made.ids(3) == many(3)
        made.settled(*many(3, first=10))
        stays(lambda: not made.outcomes["f13"], "acknowledged without a place", 0.2)
        assert made.ids() == many(12, first=3)
        made.settled(*many(15))
        made.empty()
        assert made.counters.snapshot()["dropped"] == {}


@pytest.mark.parametrize("limit", [{"max_items": 10}, {"max_bytes": 10 * 100}])
def test_the_oldest_are_dropped_where_that_is_asked_for(tmp_path: Path, limit: dict[str, Any]) -> None:
    with Opened(tmp_path, policy="drop_oldest", **limit) as made:
        made.fill(*many(35), body=b"y" * 100)
        assert made.spool.status()["items"] == 10
        assert made.counters.snapshot()["dropped"] == {spooler.FULL: 25}
        assert made.spool.status()["dropped"] == {spooler.FULL: 25}
        assert made.ids() == many(10, first=25)
        made.empty()


def test_the_newest_are_dropped_where_that_is_asked_for(tmp_path: Path) -> None:
    with Opened(tmp_path, policy="drop_newest", max_items=10) as made:
        made.fill(*many(35))
        assert made.counters.snapshot()["dropped"] == {spooler.FULL: 25}
        assert made.ids() == many(10)
        made.empty()


def test_what_is_on_the_way_is_never_dropped(tmp_path: Path) -> None:
    with Opened(tmp_path, policy="drop_oldest", max_items=10) as made:
        made.fill(*many(10))
        held = made.drain(1, acknowledge=False)
        read_ahead = len(made.lane.ready)
        made.fill(*many(20, first=10))
        assert made.counters.snapshot()["dropped"] == {spooler.FULL: 20}
        made.lane.sent(held[0], time.monotonic())
        rest = made.ids()
        assert len(rest) == 9
        assert rest[:read_ahead] == many(read_ahead, first=1)


@pytest.mark.parametrize("policy", ["block", "drop_oldest", "drop_newest"])
def test_one_result_finds_room_in_an_empty_spool_whatever_its_size(tmp_path: Path, policy: str) -> None:
    with Opened(tmp_path, policy=policy, max_bytes=1000) as made:
        made.fill("large", body=b"z" * 5000)
        assert made.ids() == ["large"]
        made.empty()
        made.fill("small")
        assert made.ids() == ["small"]


def test_results_that_nobody_waits_for_find_room_or_are_dropped(tmp_path: Path) -> None:
    with Opened(tmp_path, required=False, max_items=10) as made:
        made.fill(*many(15))
        assert made.counters.snapshot()["dropped"] == {spooler.FULL: 5}
        assert made.ids() == many(10)


def test_what_nobody_waits_for_makes_room_first(tmp_path: Path) -> None:
    with Opened(tmp_path, policy="drop_oldest", max_items=10) as made:
        optional = made.spool.lane("optional", "line", made.counters, required=False)
        made.fill(*many(5))
        for each in many(5, first=100):
            optional.put(Encoded(each, b""), 0.0, None)
        wait_for(lambda: optional.items == 5, "the optional ones are in")
        made.fill(*many(3, first=5))
        assert (made.lane.items, optional.items) == (8, 2)
        made.fill(*many(4, first=8))
        assert (made.lane.items, optional.items) == (10, 0)
        assert made.ids() == many(10, first=2)


def test_random_traffic_loses_nothing_that_is_not_counted(tmp_path: Path) -> None:
    for seed in range(8):
        rng = random.Random(seed)
        policy = rng.choice(["block", "drop_oldest", "drop_newest"])
        folder = tmp_path / str(seed)
        options: dict[str, Any] = {
            "policy": policy,
            "max_items": rng.choice([0, 7, 50]),
            "max_bytes": rng.choice([0, 3000, 10**6]),
        }
        sent: list[str] = []
        with Opened(folder, **options) as made:
            for number in range(300):
                size = rng.choice([0, 10, 500, segments.INLINE_LIMIT + 5])
                made.put(f"f{number}", b"b" * size)
                made.lane.flow(rng.random() < 0.8)
                while rng.random() < 0.6 and (row := made.lane.take()) is not None:
                    if rng.random() < 0.1:
                        made.lane.rewind()
                        break
                    sent.append(row.content.frame_id)
                    made.lane.sent(row, time.monotonic())
            sent += made.ids()
            made.empty()
            made.settled(*many(300))
            dropped = sum(made.counters.snapshot()["dropped"].values())
            assert len(sent) == len(set(sent)) == 300 - dropped, (seed, options)
            if policy == "block":
                assert sent == many(300), (seed, options)
            else:
                assert sent == sorted(sent, key=lambda each: int(each[1:])), (seed, options)


def test_the_default_bound_is_a_share_of_the_free_disk(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    share = disk.f_bavail * disk.f_frsize // 10
    assert spooler.default_bytes(tmp_path) == pytest.approx(min(256 * 1024 * 1024, share), rel=0.1)


# Dead letters.


def test_what_upstream_refuses_for_ever_is_a_dead_letter(tmp_path: Path) -> None:
    with Opened(tmp_path) as made:
        made.fill(*many(5))
        rows = made.drain(2, acknowledge=False)
        made.lane.refuse(rows[0], "too long")
        made.lane.sent(rows[1], time.monotonic())
        outcome: list[Exception | None] = []
        made.lane.bury(Encoded("direct", LARGE), 0.0, "no \ud800", outcome.append)
        wait_for(lambda: outcome == [None], "it is settled when it is committed")
        assert made.ids() == many(3, first=2)
        made.empty()
        wait_for(lambda: made.spool.status()["dead_letters"] == 2, "both are there")
        assert made.spool.status()["items"] == 0
    with sqlite3.connect(tmp_path / "spool/spool.db") as db:
        found = db.execute(
            "SELECT frame, reason FROM rows JOIN lanes ON lanes.id = rows.lane WHERE kind = 'dead' ORDER BY rows.id"
        ).fetchall()
    db.close()
    assert found == [(b"f0", "too long"), (b"direct", "no ?")]
    assert [n for n in files(tmp_path) if n.endswith(".seg")], "its body is kept"


def test_a_refused_row_that_is_not_committed_yet_is_no_row_any_more(tmp_path: Path) -> None:
    with Opened(tmp_path) as made:
        row = made.put("a", held=True)
        made.lane.refuse(row, "never")
        made.settled("a")
        wait_for(lambda: made.spool.status().get("dead_letters") == 1, "it is a dead letter")
        made.empty()
        assert made.ids() == []


def test_dead_letters_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "DEAD_ITEMS", 10)
    with Opened(tmp_path) as made:
        outcomes: list[Exception | None] = []
        for each in many(25):
            made.lane.bury(Encoded(each, b"{}"), 0.0, "never", outcomes.append)
        wait_for(lambda: len(outcomes) == 25, "all are settled")
        assert made.spool.status()["dead_letters"] == 10
        assert made.counters.snapshot()["dropped"] == {spooler.DEAD: 15}


# The disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode(errors='replace').strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill_up(ballast: Path) -> None:
    """Take all room that a disk has."""
    file = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(file, b"0" * 4096):
            pass
    os.close(file)


@pytest.mark.parametrize("size", [500, segments.INLINE_LIMIT * 3])
def test_a_full_disk_withholds_and_loses_nothing(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    monkeypatch.setattr(spooler, "RETRY_S", 0.02)
    ballast = small_disk / "ballast"
    number = 900 if size < 1000 else 20
    with Opened(small_disk, max_bytes=100_000_000) as made:
        made.fill("first", body=b"1" * size)
        fill_up(ballast)
        ids = many(number)
        for each in ids:
            made.put(each, b"b" * size)
        wait_for(lambda: "No space left" in caplog.text or "full" in caplog.text, "it is told")
        stays(lambda: not made.outcomes[ids[-1]], "acknowledged without a place", 0.3)
        told = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert len(told) <= 2, "it is told once, not at every attempt"
        assert "cannot be used" in made.spool.status()["problem"]
        ballast.unlink()
        made.settled(*ids)
        wait_for(lambda: made.spool.status().get("problem") is None, "it is over")
        assert made.ids() == ["first", *ids]
        made.empty()


def test_upstream_gets_what_a_full_disk_does_not_take(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spooler, "RETRY_S", 0.02)
    with Opened(small_disk, max_bytes=100_000_000) as made:
        made.fill("first")
        fill_up(small_disk / "ballast")
        for each in many(200):
            made.put(each, b"b" * 20_000)
        wait_for(lambda: made.spool.status().get("problem"), "the disk is full")
        assert made.ids() == ["first", *many(200)]
        made.settled(*many(200))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.chmod(0o500)
    with Opened(tmp_path) as made:
        made.put("a")
        wait_for(lambda: "Permission denied" in caplog.text, "it is told")
        made.lane.withdraw()
    tmp_path.chmod(0o700)


def test_a_file_in_place_of_the_folder_is_told_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spooler, "RETRY_S", 0.02)
    (tmp_path / "spool").write_text("not a folder")
    with Opened(tmp_path) as made:
        made.put("a")
        wait_for(lambda: "results that cannot be written are not acknowledged" in caplog.text, "it is told")
        assert made.outcomes["a"] == []
        (tmp_path / "spool").unlink()
        made.settled("a")


@pytest.mark.parametrize("durability", ["process", "power"])
def test_large_bodies_are_on_the_disk_before_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: str
) -> None:
    order: list[str] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        order.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        fsync(fd)

    committed = segments.Segments.committed

    def noted_commit(self: segments.Segments) -> None:
        order.append("commit")
        committed(self)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(segments.Segments, "committed", noted_commit)
    with Opened(tmp_path, durability=durability) as made:
        made.fill("a", body=LARGE)
        order.clear()
        made.fill("b", body=LARGE)
    expected = ["00000001.seg", "commit"] if durability == "power" else ["commit"]
    assert order[: len(expected)] == expected
    mode = sqlite3.connect(tmp_path / "spool/spool.db")
    assert mode.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    mode.close()


def test_a_stop_gives_back_what_is_not_committed(tmp_path: Path) -> None:
    with Opened(tmp_path, max_items=3) as made:
        for each in many(5):
            made.put(each)
        made.settled(*many(3))
        made.spool.flush(made.lane, time.monotonic() + 5)
        assert len(made.lane.withdraw()) == 2
    with Opened(tmp_path) as again:
        assert again.ids() == many(3)


def test_metadata_that_is_none_is_refused() -> None:
    assert unpack_meta(pack_meta(Encoded("", b"", "a/b", (("x", "y"),)))) == ("a/b", (("x", "y"),))
    for bad in (b"", b"1", b"[]", b'["a"]', b'["a", [1]]', b"\xff", b"[" * 100_000):
        with pytest.raises(ValueError, match="no content type"):
            unpack_meta(bad)


def test_a_spool_of_another_boundary_can_be_set_while_it_runs(tmp_path: Path) -> None:
    with Opened(tmp_path, max_items=2) as made:
        for each in many(4):
            made.put(each)
        made.settled("f0", "f1")
        made.spool.reconfigure(SpoolConfig(max_items=10))
        made.settled(*many(4))


def test_a_failure_of_the_thread_is_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(Spool, "_commit", broken)
    made = Opened(tmp_path)
    made.put("a")
    wait_for(lambda: made.failures, "the failure is told")
    assert isinstance(made.failures[0], ValueError)


def test_errors_say_whether_to_try_again() -> None:
    passing = [
        sqlite3.OperationalError("database or disk is full"),
        OSError(28, "No space left"),
        sqlite3.OperationalError("database is locked"),
    ]
    lasting = [sqlite3.DatabaseError("file is not a database"), sqlite3.OperationalError("no such table: rows")]
    found: Callable[[Exception], Exception] = lambda error: store.translated(error, Path("x"))  # noqa: E731
    assert all(isinstance(found(error), UnavailableError) for error in passing)
    assert all(isinstance(found(error), store.SpoolDamagedError) for error in lasting)
