"""What a model runs on: chosen by measurement, once for each model, runtime and board, and kept in the state directory.

`delegate = "auto"` tries every delegate that this machine may have, with 1, 2, 4 … threads, on every variant of the bundle that can
stand in for the one asked for. Whatever is right counts (selection.py), the fastest is taken, and all that were right make the line of
those who go on when one fails (resilient.py). An explicit delegate is tried alone: as a proof that a file from nowhere does not take
the service down, and for its threads.

The choice is kept under all that it depends on: the files' hashes, the runtime as installed, the system's libraries, the
cores, the board and what was asked for. Accelerators are no part of that: one that is missing at a start is waited for on
the next best, and only one that was not there when the choice was made leads to a new choice.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from edge_serve.bundle import sha256_of
from edge_serve.model.delegate import Candidate, DelegateSpec
from edge_serve.model.engine import available_cores
from edge_serve.model.interpreter import Runtime
from edge_serve.model.repository import ModelVersion
from edge_serve.model.wish import MOST_THREADS, Choice, Wish, stand_ins

log = logging.getLogger(__name__)

FILE = "delegates.json"
FORMAT = 1
MAX_BYTES = 1024 * 1024
# Older entries make room; a board runs a handful of models.
MOST_ENTRIES = 64
# Accelerators that come and go, by what the system shows of them.
DEVICES = ("apex", "hailo", "rknpu", "galcore", "ethosu", "nvhost-ctrl-gpu", "nvidia0", "mali", "kgsl-3d0")
USB_IDS = {("1a6e", "089a"), ("18d1", "9302")}  # an Edge TPU before and after its firmware is loaded

_memory: dict[str, tuple[list[str], Choice]] = {}
"""What this process has chosen: a model that is loaded again, or by another pipeline, is not tried again."""
_lock = threading.Lock()


def choose(
    version: ModelVersion,
    *,
    delegate: DelegateSpec | None,
    runtime: Runtime,
    folder: Path,
    board: str,
    fallback: Sequence[DelegateSpec] = (),
    variant: str | None = None,
    threads: int = 0,
    signature: str | None = None,
    root: Path = Path("/"),
    stop: Callable[[], bool] | None = None,
) -> Choice:
    """Choose what a model runs on; `delegate` None is "auto", `threads` 0 chooses them, too.

    `folder` is where choices are kept, `board` names this machine's kind. Raises ModelError with all reasons if nothing is
    right, or if an explicit delegate cannot be had and no `fallback` can; DelegateAwayError if only its hardware is missing.
    """
    wish = Wish(version, delegate, tuple(fallback), variant, threads, signature)
    if delegate is not None and threads and version.bundle is not None and not fallback:
        # A file with a known hash, and nothing to choose: opening it tells all.
        return Choice((wish.candidate(delegate), *stand_ins(wish, delegate)), (), cached=True, strict=True)
    key = _key(wish, folder, runtime, board)
    devices = sorted(_devices(root))
    kept = _recall(folder, key, wish, devices)
    if kept is not None:
        return kept
    from edge_serve.model import selection  # a start with a kept choice does without child processes

    made = (
        selection.measured(wish, runtime, root, stop)
        if delegate is None
        else selection.explicit(wish, delegate, runtime, stop)
    )
    if not made.away:
        _remember(folder, key, made, devices)
    return made


# What is kept.


def _key(wish: Wish, folder: Path, runtime: Runtime, board: str) -> str:
    """Name the choice by all that it depends on, but for accelerators."""
    bundle = wish.version.bundle
    files = [
        [variant.name, variant.file, variant.sha256] if variant is not None else _hash(wish.version.file, folder)
        for variant in wish.variants()
    ]
    asked = [each for each in (wish.delegate, *wish.fallback) if each is not None]
    parts = [
        FORMAT,
        files,
        bundle.manifest.files.get("samples.npz") if bundle is not None else None,
        wish.delegate is None,
        [dataclasses.astuple(each) for each in asked],
        [_stamp(Path(each.library)) for each in asked if each.library],
        wish.threads,
        wish.signature,
        [runtime.name, runtime.installed],
        [board, os.uname().machine, available_cores()],
        # Packages and libraries that come, go or are updated: a new delegate may be among them.
        [_stamp(runtime.folder), _stamp(Path("/etc/ld.so.cache"))],
    ]
    return sha256(json.dumps(parts).encode()).hexdigest()


def reasons(folder: Path, file: Path) -> list[list[str]]:
    """Give the reasons of all choices that are kept for a model file or another variant of its bundle, newest first."""
    wanted = str(file.resolve().parent)
    entries = _read(folder)["choices"].values()
    return [
        [str(reason) for reason in entry["reasons"]]
        for entry in reversed(list(entries))
        if any(str(Path(each["file"]).resolve().parent) == wanted for each in entry["line"])
    ]


def _recall(folder: Path, key: str, wish: Wish, devices: Sequence[str]) -> Choice | None:
    entry = _read(folder)["choices"].get(key)
    if entry is None:
        with _lock:
            seen, known = _memory.get(key, ([], None))
        if known is None or not set(devices) <= set(seen):
            return None
        _keep(folder, key, known, seen)
        return known
    if not set(devices) <= set(entry["devices"]):
        return None
    try:
        line = tuple(_candidate(wish, each) for each in entry["line"])
        choice = Choice(line, tuple(map(str, entry["reasons"])), cached=True, strict=bool(entry["strict"]))
    except (KeyError, TypeError, ValueError) as error:
        log.warning("%s: an entry is damaged (%r); delegates are measured again", folder / FILE, error)
        return None
    for each in line:
        if wish.version.bundle is not None and each.variant != wish.version.variant:
            wish.version.bundle.verify(each.file.name)
    return choice if line else None


def _candidate(wish: Wish, entry: dict[str, Any]) -> Candidate:
    """Make a candidate of a kept one: its file comes from the bundle of now, never from the cache."""
    variant = None
    if wish.version.bundle is not None:
        variant = next(each for each in wish.variants() if each is not None and each.name == entry["variant"])
    spec = DelegateSpec(
        str(entry["delegate"]["name"]),
        str(entry["delegate"]["index"]),
        str(entry["delegate"]["library"]),
        tuple((str(name), str(value)) for name, value in entry["delegate"]["options"]),
    )
    threads = int(entry["threads"])
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(threads)
    return wish.candidate(spec, variant, threads)


def _remember(folder: Path, key: str, choice: Choice, devices: Sequence[str]) -> None:
    """Keep a choice, in this process and in the folder; one that cannot be written costs the next start a new choice."""
    with _lock:
        if len(_memory) >= MOST_ENTRIES:
            _memory.clear()
        _memory[key] = (list(devices), dataclasses.replace(choice, cached=True))
    _keep(folder, key, choice, devices)


def _keep(folder: Path, key: str, choice: Choice, devices: Sequence[str]) -> None:
    entry = {
        "devices": list(devices),
        "strict": choice.strict,
        "reasons": list(choice.reasons),
        "line": [
            {
                "variant": each.variant,
                "file": str(each.file),
                "threads": each.threads,
                "delegate": {
                    "name": each.spec.name,
                    "index": each.spec.index,
                    "library": each.spec.library,
                    "options": [list(option) for option in each.spec.options],
                },
            }
            for each in choice.line
        ],
    }
    known = _read(folder)
    known["choices"].pop(key, None)
    known["choices"] = dict([*known["choices"].items(), (key, entry)][-MOST_ENTRIES:])
    _write(folder, known)


def _hash(file: Path, folder: Path) -> str:
    """Give a bare file's SHA-256; one whose size, time and inode are known is not read again."""
    path, stamp = str(file.resolve()), _stamp(file)
    known = _read(folder)
    entry = known["files"].get(path)
    if isinstance(entry, list) and entry[:1] == [stamp] and len(entry) == 2:
        return str(entry[1])
    digest = sha256_of(file)
    known["files"].pop(path, None)
    known["files"] = dict([*known["files"].items(), (path, [stamp, digest])][-MOST_ENTRIES:])
    _write(folder, known)
    return digest


def _read(folder: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"format": FORMAT, "choices": {}, "files": {}}
    file = folder / FILE
    try:
        if file.stat().st_size > MAX_BYTES:
            return empty
        known = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return empty
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s: cannot be read (%s); delegates are measured again", file, error)
        return empty
    if not isinstance(known, dict) or known.get("format") != FORMAT:
        return empty
    if not all(isinstance(known.get(part), dict) for part in ("choices", "files")):
        return empty
    choices = {key: entry for key, entry in known["choices"].items() if _sound(entry)}
    return {"format": FORMAT, "choices": choices, "files": known["files"]}


def _sound(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), list) for key in ("devices", "reasons", "line"))
        and all(isinstance(each, dict) and isinstance(each.get("file"), str) for each in entry["line"])
        and all(isinstance(each, str) for each in entry["devices"])
    )


def _write(folder: Path, known: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f"{FILE}.new"
        draft.write_text(json.dumps(known), encoding="utf-8")
        draft.replace(folder / FILE)
    except OSError as error:
        log.debug("%s: cannot be written (%s); delegates are measured again at the next start", folder / FILE, error)


def _stamp(path: Path) -> list[int]:
    """Give what changes when a file does; its size, times and inode."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _devices(root: Path) -> Iterator[str]:
    """Name the accelerators that are there now, as cheaply as it can be told."""
    for folder, prefixes in (("dev", DEVICES), ("dev/dri", ("renderD",))):
        try:
            names = os.listdir(root / folder)  # noqa: PTH208  # names are all it takes
        except OSError:
            continue
        yield from (name for name in names if name.startswith(prefixes))
    base = root / "sys/bus/usb/devices"
    try:
        names = os.listdir(base)  # noqa: PTH208  # likewise
    except OSError:
        return
    number = 0
    for name in names:
        try:
            ids = tuple(
                (base / name / which).read_text(encoding="ascii").strip() for which in ("idVendor", "idProduct")
            )
        except (OSError, ValueError):
            continue  # an interface or a hub's port
        if ids in USB_IDS:
            yield f"usb-edgetpu-{number}"
            number += 1
