"""Where a socket source listens: its options, its address, its token, and the listening socket itself."""

from __future__ import annotations

import logging
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from edge_serve import framing
from edge_serve.config import Config, Wiring
from edge_serve.errors import Problem, UnavailableError
from edge_serve.schema import join, option

log = logging.getLogger(__name__)

TOKEN_CREDENTIAL = "socket-token"  # noqa: S105  # the name of a credential, not one
TOKEN_VARIABLE = "EDGE_SERVE_SOCKET_TOKEN"  # noqa: S105  # likewise
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class SocketSourceOptions:
    """Inputs from local programs (and, where allowed, remote ones), which get the results as answers."""

    listen: str = option(
        doc="unix:///path/of/socket or tcp://127.0.0.1:9750", example="unix:///run/edge-serve/digits.sock"
    )
    policy: Literal["lossless", "latest"] = option(
        "lossless",
        "lossless: a client that sends faster than the model runs has to wait; latest: the newest frame wins",
    )
    answer: Literal["at_once", "when_safe"] = option(
        "at_once", "at_once: a client gets its result as soon as it is there; when_safe: when all sinks have it, too"
    )
    mode: str = option("0660", "unix: permissions of the socket, octal", example="0660")
    group: str | None = option(None, "unix: group of the socket", example="edge")
    allow_remote: bool = option(False, "tcp: listen on addresses that are not loopback; needs a token")
    token_file: str | None = option(
        None,
        "file with the token that clients must send first; else the credential socket-token, else EDGE_SERVE_SOCKET_TOKEN",
        example="/etc/edge-serve/token",
    )
    max_payload: int = option(
        framing.DEFAULT_MAX_PAYLOAD,
        "bytes; a larger frame is skipped and answered with an error",
        low=1,
        high=256 * 1024 * 1024,
    )
    max_connections: int = option(64, "most connections at a time", low=1, high=10_000)
    max_inflight: int = option(
        32, "most frames of one connection that may be unsettled; then it is not read", low=1, high=65535
    )
    max_bytes: int = option(
        64 * 1024 * 1024, "bytes of all connections' frames in memory; then only one goes on", low=1024
    )
    frame_timeout_s: float = option(
        30.0, "seconds without a byte inside a frame after which the connection is closed", low=0.1, high=3600
    )


def problems(options: SocketSourceOptions, key: str, wiring: Wiring) -> list[Problem]:
    """Find addresses that are none, remote access without a token, and two pipelines on one address."""
    found = []
    try:
        parse_address(options.listen)
    except ValueError as error:
        return [Problem(join(key, "listen"), str(error), "Write unix:///path or tcp://127.0.0.1:port")]
    url = urlsplit(options.listen)
    if url.scheme == "tcp" and url.hostname not in LOOPBACK:
        if not options.allow_remote:
            found.append(
                Problem(
                    join(key, "listen"),
                    f"{url.hostname} is not loopback",
                    "Use 127.0.0.1, or set allow_remote = true and a token",
                )
            )
        elif not _has_token(wiring.config, options):
            found.append(
                Problem(
                    join(key, "token_file"),
                    "is missing or empty, and allow_remote needs a token",
                    "Name a file that holds one",
                )
            )
    if options.token_file is not None and not os.access(wiring.config.resolve(options.token_file), os.R_OK):
        found.append(
            Problem(
                join(key, "token_file"),
                f"{wiring.config.resolve(options.token_file)} is not there or cannot be read",
                "Check path and permissions",
            )
        )
    try:
        if not 0 <= int(options.mode, 8) <= 0o777:
            raise ValueError
    except ValueError:
        found.append(Problem(join(key, "mode"), f"{options.mode!r} is no octal mode", 'Write it as "0660"'))
    if options.max_bytes < options.max_payload:
        found.append(
            Problem(
                join(key, "max_bytes"),
                "is less than max_payload, so the largest frame would never fit",
                "Raise max_bytes or lower max_payload",
            )
        )
    sharing = [
        pipeline.name
        for pipeline in wiring.config.pipelines
        if isinstance(pipeline.source.options, SocketSourceOptions) and pipeline.source.options.listen == options.listen
    ]
    if sharing and sharing[0] != wiring.pipeline.name:
        found.append(
            Problem(join(key, "listen"), f"pipeline {sharing[0]!r} already listens there", "Give each its own address")
        )
    return found


class Listening:
    """A listening socket, not blocking, and the path that it may have in the file system.

    Raises UnavailableError if it cannot listen there now.
    """

    def __init__(self, options: SocketSourceOptions) -> None:
        self._options = options
        self._path: Path | None = None
        self._inode = (0, 0, 0)
        try:
            self.socket = self._listen_unix() if options.listen.startswith("unix:") else self._listen_tcp()
        except OSError as error:
            raise UnavailableError(f"{options.listen}: cannot listen: {error.strerror or error}") from error
        self.socket.setblocking(False)

    def _listen_unix(self) -> socket.socket:
        path = Path(parse_address(self._options.listen)[1])
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except FileNotFoundError:
                pass
            except ConnectionRefusedError:
                # Left by a process that was killed: nobody listens there.
                if stat.S_ISSOCK(path.lstat().st_mode):
                    path.unlink()
            except BlockingIOError as error:  # as many wait there as may
                raise UnavailableError(
                    f"{self._options.listen}: a process that does not answer listens there; stop it or use another path"
                ) from error
            else:
                raise UnavailableError(
                    f"{self._options.listen}: another process listens there; stop it or use another path"
                )
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(path))
            self._path = path
            status = path.stat()
            self._inode = (status.st_dev, status.st_ino, status.st_mtime_ns)
            if self._options.group is not None:
                import shutil  # rarely needed

                try:
                    shutil.chown(path, group=self._options.group)
                except LookupError as error:
                    raise UnavailableError(
                        f"{self._options.listen}: there is no group {self._options.group!r}"
                    ) from error
            path.chmod(int(self._options.mode, 8))
            # Not earlier: until now whoever tries to connect is refused, whatever the mode was.
            listener.listen(128)
        except BaseException:
            listener.close()
            self.remove_path()
            raise
        return listener

    def _listen_tcp(self) -> socket.socket:
        _, host, port = parse_address(self._options.listen)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
        return listener

    def remove_path(self) -> None:
        """Remove a Unix socket's path, if it still is ours."""
        path, self._path = self._path, None
        if path is None:
            return
        try:
            status = path.lstat()
            # Another process may have taken the path over in the meantime.
            if (status.st_dev, status.st_ino, status.st_mtime_ns) == self._inode:
                path.unlink()
        except OSError as error:
            log.debug("cannot remove %s: %s", path, error)


def parse_address(listen: str) -> tuple[str, str, int]:
    """Give the scheme, the path or host, and the port; ValueError says what is wrong with an address."""
    url = urlsplit(listen)
    if url.scheme == "unix" and url.path.startswith("/") and not url.netloc:
        # sun_path has 108 bytes, with its end.
        if len(url.path.encode()) > 107:
            raise ValueError(f"the path {url.path!r} is longer than the 107 bytes that a Unix socket's may have")
        return "unix", url.path, 0
    if url.scheme == "tcp" and url.hostname and url.port is not None:
        return "tcp", url.hostname, url.port
    raise ValueError(f"{listen!r} is no address to listen on")


def _has_token(config: Config, options: SocketSourceOptions) -> bool:
    try:
        return token(config, options) is not None
    except UnavailableError:
        return False


def token(config: Config, options: SocketSourceOptions) -> bytes | None:
    """Give the token that clients have to send; None if none is asked for."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    credential = Path(folder, TOKEN_CREDENTIAL) if folder else None
    try:
        if options.token_file is not None:
            said = config.resolve(options.token_file).read_bytes().strip()
        elif credential is not None and credential.is_file():
            said = credential.read_bytes().strip()
        else:
            said = os.environ.get(TOKEN_VARIABLE, "").encode()
    except OSError as error:
        raise UnavailableError(f"{options.listen}: the token cannot be read: {error}") from error
    return said or None
