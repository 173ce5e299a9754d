"""A long and bad line: two network namespaces, joined by two tun devices and a relay that delays, drops and swallows packets.

Packets are real IP packets between two kernels' TCP stacks, so retransmission and back-off are real. Needs root and /dev/net/tun;
the namespaces vanish with the object. Addresses are of the range for documentation (RFC 5737) and exist only in there.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from types import TracebackType

# linux/sched.h and linux/if_tun.h
CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
MTU = 1400
NEAR, FAR = "near", "far"
ADDRESS = {NEAR: "192.0.2.1", FAR: "192.0.2.2"}
# More than this is more than a router's queue holds.
LONGEST_QUEUE = 2000

_libc = ctypes.CDLL(None, use_errno=True)


class NoNamespaceError(Exception):
    """This machine makes no network namespaces, or no tun devices, for this user."""


class LossyLink:
    """Two network namespaces and the line between them."""

    def __init__(self, *, delay_s: float, jitter_s: float, loss: float, seed: int) -> None:
        self.delay_s, self.jitter_s, self.loss = delay_s, jitter_s, loss
        self._rng = random.Random(seed)
        self.passed = self.dropped = 0
        self._namespaces: dict[str, int] = {}
        self._devices: dict[str, int] = {}
        self._wake_in, self._wake_out = os.pipe()
        self._thread = threading.Thread(target=self._relay, name="test.link", daemon=True)

    def __enter__(self) -> LossyLink:
        problems: list[Exception] = []
        for side in (NEAR, FAR):
            # A thread has a network namespace of its own: none of the others' changes.
            maker = threading.Thread(target=self._make, args=(side, problems))
            maker.start()
            maker.join()
        if problems:
            self._release()
            raise NoNamespaceError(str(problems[0])) from problems[0]
        self._thread.start()
        return self

    def _make(self, side: str, problems: list[Exception]) -> None:
        try:
            if _libc.unshare(CLONE_NEWNET):
                number = ctypes.get_errno()
                raise OSError(number, f"unshare: {os.strerror(number)}")
            self._namespaces[side] = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            self._devices[side] = device
            fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"line", IFF_TUN | IFF_NO_PI))
            other = ADDRESS[FAR if side == NEAR else NEAR]
            for command in (
                "link set lo up",
                f"link set line mtu {MTU} txqueuelen 1000 up",
                f"addr add {ADDRESS[side]} peer {other} dev line",
            ):
                subprocess.run(["ip", *command.split()], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            problems.append(error)

    @contextlib.contextmanager
    def side(self, name: str) -> Iterator[None]:
        """Be in one of the namespaces: sockets, threads and processes that are made in here live there."""
        with open("/proc/thread-self/ns/net", "rb") as home:  # noqa: PTH123  # a handle, not a file
            self._enter(self._namespaces[name])
            try:
                yield
            finally:
                self._enter(home.fileno())

    @staticmethod
    def _enter(namespace: int) -> None:
        if _libc.setns(namespace, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")

    def _relay(self) -> None:
        devices = [self._devices[NEAR], self._devices[FAR]]
        queue: list[tuple[float, int, int, bytes]] = []
        number = 0
        while True:
            while queue and queue[0][0] <= time.monotonic():
                _, _, device, packet = heapq.heappop(queue)
                with contextlib.suppress(OSError):
                    os.write(device, packet)
            wait = max(0.0, queue[0][0] - time.monotonic()) if queue else None
            ready = select.select([*devices, self._wake_in], [], [], wait)[0]
            if self._wake_in in ready:
                return
            for device in ready:
                try:
                    packet = os.read(device, 65536)
                except OSError:
                    continue
                if self._rng.random() < self.loss or len(queue) > LONGEST_QUEUE:
                    self.dropped += 1
                    continue
                self.passed += 1
                number += 1
                due = time.monotonic() + self.delay_s + self._rng.uniform(-1, 1) * self.jitter_s
                heapq.heappush(queue, (due, number, devices[1 - devices.index(device)], packet))

    def _release(self) -> None:
        for handle in (*self._devices.values(), *self._namespaces.values(), self._wake_in, self._wake_out):
            os.close(handle)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.write(self._wake_out, b"\0")
        self._thread.join()
        self._release()
