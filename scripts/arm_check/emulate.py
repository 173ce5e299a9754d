"""Runs a command in a root of another architecture, or one that makes such a root, under QEMU's user mode; changes nothing outside.

Linux 6.7 and later has a binfmt_misc for each user namespace: the interpreters are registered in a namespace of the command's own,
and are gone with its last process. Needs root (a mount of proc and dev into the new root).

usage: python emulate.py [--root DIR] [--qemu DIR] [--bind SOURCE:TARGET]... COMMAND...
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x0002_0000, 0x1000_0000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x4_0000
# The first bytes of programs (elf.h): class, byte order, version, ABI; type executable or shared object; machine.
HEAD = r"\x7fELF\x{bits:02x}\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x{machine:02x}\x00"
MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
MACHINES = {"aarch64": (2, 0xB7), "arm": (1, 0x28)}

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> None:
    """Raise OSError with the reason if a call of the C library failed."""
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str | None, target: str, kind: str | None = None, flags: int = 0) -> None:
    """Mount something somewhere."""
    words = [None if each is None else each.encode() for each in (source, target, kind)]
    checked(libc.mount(*words, ctypes.c_ulong(flags), None), f"mount {source} on {target}")


def namespaces() -> None:
    """Put this process into namespaces of its own, with all users as they are outside."""
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child:
        os.close(ready[1])
        os.read(ready[0], 1)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{child}/{name}").write_text("0 0 4294967295\n", encoding="ascii")
        os.write(go[1], b"x")
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status) % 256)
    checked(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS), "unshare")
    os.write(ready[1], b"x")
    os.read(go[0], 1)


def enter(root: Path, binds: list[str]) -> None:
    """Make a folder this process's root, with the machine's own proc, dev and sys, and what else is to be seen in it."""
    mount(str(root), str(root), None, MS_BIND | MS_REC)
    for each in (*(f"/{name}:/{name}" for name in ("proc", "dev", "sys")), *binds):
        source, _, inside = each.partition(":")
        target = root / inside.lstrip("/")
        if Path(source).is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        mount(source, str(target), None, MS_BIND | MS_REC)
    os.chroot(root)
    os.chdir("/")


def main() -> None:
    """Register the interpreters, enter the root, become the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--qemu", type=Path, default=Path("/usr/bin"))
    parser.add_argument("--bind", action="append", default=[])
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    namespaces()
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("binfmt_misc", "/proc/sys/fs/binfmt_misc", "binfmt_misc")
    for name, (bits, machine) in MACHINES.items():
        head = HEAD.format(bits=bits, machine=machine)
        # F: the interpreter is opened now, so none has to lie in the new root.
        line = f":edge-serve-{name}:M::{head}:{MASK}:{given.qemu}/qemu-{name}-static:FPOC"
        Path("/proc/sys/fs/binfmt_misc/register").write_text(line, encoding="ascii")
    if given.root:
        enter(given.root.resolve(), given.bind)
    os.execvp(given.command[0], given.command)


if __name__ == "__main__":
    main()
