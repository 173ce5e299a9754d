"""What the user of a service can reach in the file system, found from modes alone and named by path.

A service runs as a user that owns nothing here (DynamicUser) or as one that was named, does not see home folders
(ProtectHome) and has a /tmp of its own (PrivateTmp). Access control lists are left out: they cannot name a dynamic user.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_serve.errors import UsageError

READ, WRITE, ENTER = 4, 2, 1
# ProtectHome=yes and PrivateTmp=yes put something else there.
HIDDEN = {
    Path("/home"): "a service sees no home folders",
    Path("/root"): "a service sees no home folders",
    Path("/run/user"): "a service sees no users' run-time folders",
    Path("/tmp"): "a service has a /tmp of its own",  # noqa: S108  # named, not used
    Path("/var/tmp"): "a service has a /var/tmp of its own",  # noqa: S108  # named, not used
}
# A bundle has a few files; whoever points at a larger tree is told about its first ones.
MAX_FILES = 1000


@dataclass(frozen=True, slots=True)
class Reader:
    """Who the service is: a user id, or None for one that is made at its start, and the groups that it is in."""

    uid: int | None
    gids: frozenset[int]
    name: str = "the service's user"

    def may(self, status: os.stat_result, bits: int) -> bool:
        """Say whether it may do all of `bits` (READ | WRITE | ENTER) to something of this status."""
        if self.uid == 0:
            return True
        if self.uid is not None and status.st_uid == self.uid:
            mode = status.st_mode >> 6
        elif status.st_gid in self.gids:
            mode = status.st_mode >> 3
        else:
            mode = status.st_mode
        return mode & bits == bits


def reader(user: str | None, groups: list[str]) -> Reader:
    """Give who a service is; `user` None is a dynamic one. UsageError if the user or a group does not exist."""
    gids = set()
    for group in groups:
        try:
            gids.add(grp.getgrnam(group).gr_gid)
        except KeyError as error:
            raise UsageError(f"there is no group {group!r}; make it with `groupadd --system {group}`") from error
    if user is None:
        return Reader(None, frozenset(gids))
    try:
        entry = pwd.getpwnam(user)
    except KeyError as error:
        raise UsageError(
            f"--user {user}: there is no such user; leave --user out, and the service gets a user of its own"
        ) from error
    if entry.pw_uid == 0:
        raise UsageError("--user root: a service that takes input from a network does not run as root")
    return Reader(entry.pw_uid, frozenset(gids | set(os.getgrouplist(user, entry.pw_gid))), user)


def hidden(path: Path) -> str:
    """Say why a service does not see this path at all; empty if it does."""
    for folder, why in HIDDEN.items():
        if path == folder or folder in path.parents:
            return why
    return ""


def obstacle(path: Path, who: Reader, bits: int = READ) -> str:
    """Say what keeps `who` from doing `bits` to an absolute path, naming the folder or file at fault; empty if nothing."""
    path = Path(os.path.normpath(path))
    try:
        real = Path(os.path.realpath(path, strict=True))
    except OSError as error:
        return f"{path}: {error.strerror}"
    for each in dict.fromkeys((path, real)):
        why = hidden(each)
        if why:
            return f"{each}: {why}"
        for folder in reversed(each.parents):
            status = folder.stat()
            if not who.may(status, ENTER):
                return f"{folder}: {who.name} may not enter it ({stat.filemode(status.st_mode)})"
    status = real.stat()
    if stat.S_ISDIR(status.st_mode):
        bits |= ENTER
    if not who.may(status, bits):
        doing = "write to it" if bits & WRITE else "read it"
        return f"{real}: {who.name} may not {doing} ({stat.filemode(status.st_mode)})"
    return ""


def obstacle_below(path: Path, who: Reader) -> str:
    """Say what keeps `who` from reading a file, or a folder with all that is in it; empty if nothing."""
    found = obstacle(path, who)
    if found or not path.is_dir():
        return found
    return next(filter(None, (obstacle(each, who) for each in _entries(path))), "")


def _entries(folder: Path) -> Iterator[Path]:
    left = MAX_FILES
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if not left:
                return
            left -= 1
            yield Path(place, name)
