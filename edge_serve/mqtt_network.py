"""The thread that reads and writes for the MQTT connections of one pipeline.

One thread for all of them, not one each: acknowledgements of results and new inputs come together at a high rate, and every
switch between Python threads costs more than the work on one message. What is to be sent is gathered while a round lasts
and leaves in one piece per connection; from other threads it leaves at once.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from typing import Protocol

from edge_serve import watchdog

log = logging.getLogger(__name__)

# Keep-alive is looked after this often, or more often where it is short, and the thread shows that it lives.
TICK_S = 1.0
TICKS_IN_A_KEEPALIVE = 4
# What is gathered in a round leaves after this long, so that no result waits for the model's next run.
GATHER_S = 0.0005
# The acknowledgements of results wait up to this long (milliseconds) while they are few: new inputs come first, and several
# acknowledgements cost no more than one. For one message at a time this halves what the thread has to do for it.
PATIENCE_MS = 1
# Whoever closes a connection waits this long for the thread to be done with it; a hung thread cannot be waited for.
LEAVE_S = 1.0
_TROUBLE = select.POLLERR | select.POLLHUP | select.POLLNVAL


class Client(Protocol):
    """What the thread needs of a connection; all but the attributes is called in the thread."""

    brings_inputs: bool
    """Whether inputs come by this connection; others only bring acknowledgements of what was sent."""

    tick_s: float
    """How often it needs its tick, in seconds."""
    few: int
    """How many acknowledgements may be to come, here or elsewhere, without anybody on this connection waiting for them."""

    def owed(self) -> int:
        """Count the acknowledgements that are to come."""
        ...

    def interest(self) -> int | None:
        """Say what is waited for, as select.POLLIN and POLLOUT; None: the connection is gone."""
        ...

    def fileno(self) -> int:
        """Give the socket's number."""
        ...

    def pending(self) -> bool:
        """Say whether there is something to handle that the socket does not show."""
        ...

    def readable(self) -> None:
        """Read and handle what is there."""
        ...

    def writable(self) -> None:
        """Send what waits."""
        ...

    def broken(self) -> None:
        """End the connection: its socket is broken, whether or not anybody reads."""
        ...

    def flush(self) -> None:
        """Send what was gathered."""
        ...

    def tick(self) -> None:
        """Do what time demands."""
        ...

    def died(self, error: Exception) -> None:
        """End the connection: handling it failed."""
        ...


_lock = threading.Lock()
_running: dict[str, Network] = {}


class Network:
    """The thread. It begins with its first connection and ends with its last one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._clients: list[Client] = []
        self._users = 0
        self._handling: Client | None = None
        self._gathered: list[Client] = []
        self._gathering_since = 0.0
        self._patient = False
        """Whether acknowledgements are to come that may wait a little."""
        self._patient_until = 0.0
        self._few = 0
        self.gathering = False
        """Whether what is to be sent may wait for the end of the round: more than one packet came at once."""
        self._woken = False
        self._ended = False
        self._every, self._inputs = select.poll(), select.poll()
        """What wakes the thread up: everything; or only what brings inputs."""
        self._watched: dict[int, tuple[Client, int]] = {}
        self._ear, self._bell = socket.socketpair()
        self._ear.setblocking(False)
        self._bell.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=f"mqtt.{name}", daemon=True)
        self.ident = -1
        """The thread's identifier (threading.get_ident)."""

    @classmethod
    def join(cls, name: str) -> Network:
        """Give the running thread of a name, begun if need be; whoever joins leaves again."""
        with _lock:
            network = _running.get(name)
            if network is None:
                network = _running[name] = cls(name)
                network._thread.start()
            network._users += 1
            return network

    def leave(self) -> None:
        """Say that one user less is there; with the last one the thread ends."""
        with _lock:
            self._users -= 1
            last = self._users == 0
            if last:
                del _running[self.name]
        if last:
            self._ended = True
            self.wake()
            if threading.get_ident() != self.ident:
                self._thread.join(LEAVE_S)

    def add(self, client: Client) -> None:
        """Serve a connection from now on."""
        with _lock:
            # Acknowledgements of results before new inputs: they make room for these.
            self._clients = sorted([*self._clients, client], key=lambda each: each.brings_inputs)
            self._few = min(each.few for each in self._clients)
        self.wake()

    def remove(self, client: Client) -> None:
        """Serve a connection no more; when this is over its callbacks are, too (unless the thread hangs in one)."""
        with _lock:
            self._clients = [each for each in self._clients if each is not client]
            self._few = min((each.few for each in self._clients), default=0)
        self.wake()
        if threading.get_ident() != self.ident:
            deadline = time.monotonic() + LEAVE_S
            while self._handling is client and time.monotonic() < deadline:
                time.sleep(0.001)

    def wake(self) -> None:
        """Make the thread look at its connections again."""
        if not self._woken and threading.get_ident() != self.ident:
            self._woken = True
            with contextlib.suppress(OSError):  # full, so it is awake; or closed
                self._bell.send(b"\0")

    def gather(self, client: Client) -> None:
        """Let what a connection has to send wait for what comes along in this round. Only in the thread itself."""
        gathered = self._gathered
        if client not in gathered:
            if not gathered:
                self._gathering_since = time.monotonic()
            gathered.append(client)
        elif time.monotonic() - self._gathering_since > GATHER_S:
            self._flush()

    def _flush(self) -> None:
        gathered = self._gathered
        while gathered:
            gathered.pop().flush()

    def _run(self) -> None:
        self.ident = threading.get_ident()
        beat = watchdog.begin(f"mqtt.{self.name}")
        next_tick = 0.0
        try:
            self._every.register(self._ear, select.POLLIN)
            self._inputs.register(self._ear, select.POLLIN)
            while not self._ended:
                pending = self._watch()
                now = time.monotonic()
                if now >= next_tick:
                    beat.tick()
                    for client in self._clients:
                        self._handle(client, client.tick)
                    next_tick = now + min((client.tick_s for client in self._clients), default=TICK_S)
                wait = (next_tick - now) * 1000
                if pending:
                    wait = 0
                elif self._patient:
                    self._patient = False
                    if now < self._patient_until and self._serve(self._inputs.poll(PATIENCE_MS)) and self._patient:
                        continue
                    self._patient_until = 0.0
                    wait = 0
                self._serve(self._every.poll(wait))
                if pending:
                    for client in pending:
                        self._handle(client, client.readable)
                    self._flush()
        except BaseException:
            log.critical("the network thread %s failed", self.name, exc_info=True)
            raise
        finally:
            beat.end()
            self._ear.close()
            self._bell.close()

    def _serve(self, events: list[tuple[int, int]]) -> bool:
        """Handle what poll has found, and send what came of it; False if that was nothing."""
        if not events:
            return False
        watched = self._watched
        if len(events) > 1:
            # Acknowledgements make room for new results; while there is enough of it they come behind new inputs.
            inputs_first = self._acknowledgements_may_wait()
            events.sort(
                key=lambda event: event[0] in watched and watched[event[0]][0].brings_inputs is not inputs_first
            )
        for number, event in events:
            if number not in watched:
                self._listen()
                continue
            client = watched[number][0]
            if event & select.POLLIN:
                self._handle(client, client.readable)
            elif event & _TROUBLE:
                self._handle(client, client.broken)
            if event & select.POLLOUT:
                self._handle(client, client.writable)
            if self._gathered:
                self._flush()
            self.gathering = False
        self._patient = self._acknowledgements_may_wait()
        if self._patient and not self._patient_until:
            self._patient_until = time.monotonic() + PATIENCE_MS / 1000
        return True

    def _acknowledgements_may_wait(self) -> bool:
        owed, few = 0, self._few
        for client in self._clients:
            if not client.brings_inputs:
                owed = max(owed, client.owed())
        return 0 < owed <= few

    def _watch(self) -> list[Client]:
        """Register what each connection waits for now; gives those that need not wait."""
        watched = self._watched
        pending: list[Client] = []
        clients = self._clients
        seen = 0
        for client in clients:
            mask = client.interest()
            if mask is None:
                continue
            number = client.fileno()
            known = watched.get(number)
            if known is None or known[0] is not client or known[1] != mask:
                self._every.register(number, mask)
                if client.brings_inputs:
                    self._inputs.register(number, mask)
                watched[number] = (client, mask)
            seen += 1
            if mask & select.POLLIN and client.pending():
                pending.append(client)
        if seen != len(watched):
            alive = {client.fileno() for client in clients if client.interest() is not None}
            for number in [number for number in watched if number not in alive]:
                del watched[number]
                for poll in (self._every, self._inputs):
                    with contextlib.suppress(KeyError, OSError, ValueError):
                        poll.unregister(number)
        return pending

    def _listen(self) -> None:
        self._woken = False
        with contextlib.suppress(BlockingIOError):
            self._ear.recv(4096)

    def _handle(self, client: Client, what: Handler) -> None:
        self._handling = client
        try:
            what()
        except Exception as error:  # noqa: BLE001  # whatever it is, somebody has to connect again
            client.died(error)
        finally:
            self._handling = None


class Handler(Protocol):
    """A method of a client."""

    def __call__(self) -> None:
        """Handle it."""
        ...
