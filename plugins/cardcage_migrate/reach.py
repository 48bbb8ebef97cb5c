"""Where a machine moves: ``unix:PATH``, ``tcp:HOST:PORT``, ``exec:COMMAND``, ``fd:NUMBER``, ``file:PATH``; TLS."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import stat
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen
from cardcage.errors import ConfigError, HostError, UsageError
from cardcage.security import Act
from cardcage_fleet.roster import connected
from cardcage_jail import is_inside, is_ours, listen_at

from cardcage_migrate.wire import Pipe

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from cardcage.security import Mediator
    from typing_extensions import Buffer

    from cardcage_migrate.wire import Peer

__all__ = ["Place", "Program", "Waiting", "adopted", "connect", "hang_up", "parse", "tls_context"]

DIAL = 10.0
"""Seconds that a connection may take, and the first word on it."""
SCHEMES = {
    "unix": "unix:PATH",
    "tcp": "tcp:HOST:PORT, tcp:[ADDRESS]:PORT for IPv6",
    "exec": "exec:COMMAND",
    "fd": "fd:NUMBER",
    "file": "file:PATH",
}
LAST = 10.0
"""Seconds that a program may take to end once its connection is closed."""
STEP = 0.5
"""Seconds after which whoever waits for a program looks whether there is still something to wait for."""


@frozen
class Place:
    """Where to, or from.

    Attributes:
        scheme: one of :data:`SCHEMES`. rest: path, command or number. host, port: of ``tcp``; no host for all
            addresses that this one has.
    """

    scheme: str
    rest: str
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"{self.scheme}:{self.rest}"

    def ask(self, mediator: Mediator, label: str, machine: str, *, listen: bool) -> None:
        """Ask for what is about to be opened. Raises Denied."""
        asked = {
            "unix": ("socket", ("listen" if listen else "connect",)),
            "tcp": ("socket", ("listen" if listen else "connect",)),
            "exec": ("program", ("start",)),
            "file": ("image", ("open", "read") if listen else ("create", "write")),
        }
        if self.scheme in asked:
            tclass, permissions = asked[self.scheme]
            facts = {"machine": machine, **({"readonly": listen} if tclass == "image" else {})}
            mediator.ask(Act(label, label, tclass, permissions, facts), self.rest)


def parse(uri: str) -> Place:
    """Raises UsageError for what is no place."""
    scheme, colon, rest = uri.partition(":")
    if scheme not in SCHEMES or not colon or not rest or "\0" in uri:
        raise UsageError(f'"{uri}": expected {", ".join(SCHEMES.values())}')
    if scheme == "tcp":
        found = re.fullmatch(r"(?:\[([^]]+)\]|([^:\[\]]*)):([0-9]{1,5})", rest)
        if not found or int(found[3]) > 65535:
            raise UsageError(f'"{uri}": expected {SCHEMES[scheme]}')
        return Place(scheme, rest, found[1] or found[2], int(found[3]))
    if scheme == "fd" and not (rest.isascii() and rest.isdigit() and len(rest) < 10):
        raise UsageError(f'"{uri}": expected {SCHEMES[scheme]}')
    return Place(scheme, rest)


def connect(
    place: Place,
    tls_dir: str | os.PathLike[str] | None = None,
    tls_hostname: str = "",
    *,
    tls: ssl.SSLContext | None = None,
) -> tuple[Peer, bool]:
    """A connection to who waits there, and whether nothing can come back on it.

    Args:
        tls_dir: directory with ``ca-cert.pem``, ``client-cert.pem`` and ``client-key.pem``; the other side has to show
            a certificate that this authority signed for *tls_hostname*, by default the host of ``tcp:``.
        tls: what :func:`tls_context` made of such a directory, instead.

    Raises HostError, ConfigError that names the file.
    """
    if place.scheme == "tcp" and not place.host:
        raise UsageError(f'"{place}": expected {SCHEMES["tcp"]}')
    context = tls if tls_dir is None else tls_context(tls_dir, server=False)
    name = tls_hostname or place.host
    if context is not None:
        _may_tls(place)
        if not name:
            raise UsageError("TLS needs the name in the destination's certificate here (tls_hostname, --tls-hostname)")
    with _told(place):
        if place.scheme == "unix":
            peer = connected(Path(os.path.abspath(place.rest)), DIAL)
        elif place.scheme == "tcp":
            peer = socket.create_connection((place.host, place.port), DIAL)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            return _other(place, writes=True)
        return (peer, False) if context is None else (_secure(context, peer, name), False)


class Waiting:
    """Waits for who connects. Raises HostError, ConfigError that names the file.

    Args:
        tls_dir: directory with ``ca-cert.pem``, ``server-cert.pem`` and ``server-key.pem``; who connects has to show a
            certificate that this authority signed.
        tls: what :func:`tls_context` made of such a directory, instead.
        listening: a socket that listens there already.
    """

    def __init__(
        self,
        place: Place,
        tls_dir: str | os.PathLike[str] | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        listening: socket.socket | None = None,
    ) -> None:
        self.place, self._socket = place, listening
        self._context = tls if tls_dir is None else tls_context(tls_dir, server=True)
        if self._context is not None:
            _may_tls(place)
        if listening is not None:
            return
        with _told(place):
            if place.scheme == "unix":
                path = Path(os.path.abspath(place.rest))
                if path.exists() and not stat.S_ISSOCK(path.lstat().st_mode):
                    raise ConfigError("is there already, and no socket", file=str(path))
                self._socket = listen_at(str(path))
                self._socket.setblocking(True)
            elif place.scheme == "tcp":
                both = place.host in ("", "::") and socket.has_dualstack_ipv6()
                kind = socket.AF_INET6 if both or ":" in place.host else socket.AF_INET
                self._socket = socket.create_server(
                    (place.host, place.port), family=kind, backlog=4, dualstack_ipv6=both
                )

    @property
    def address(self) -> tuple[str, int] | None:
        """Address and port of ``tcp:``, also where 0 was asked for; None elsewhere, and once it is closed."""
        with suppress(OSError):
            if self._socket is not None and self.place.scheme == "tcp":
                host, port, *_ = self._socket.getsockname()
                return str(host), int(port)
        return None

    @property
    def port(self) -> int:
        """The port of ``tcp:``, also where 0 was asked for."""
        assert self.address is not None
        return self.address[1]

    def fileno(self) -> int:
        """The socket's descriptor, -1 where there is none."""
        return -1 if self._socket is None else self._socket.fileno()

    @property
    def secure(self) -> bool:
        """TLS is spoken."""
        return self._context is not None

    @property
    def only_one(self) -> bool:
        """True where only one can come, once."""
        return self._socket is None

    def accept(self, timeout: float | None = None) -> tuple[Peer, bool]:
        """The next who comes, and whether nothing can be said back. Raises HostError; TimeoutError."""
        if self._socket is None:
            with _told(self.place):
                return _other(self.place, writes=False)
        self._socket.settimeout(timeout)
        peer, _ = self._socket.accept()
        with _told(self.place):
            peer.settimeout(DIAL)
            if self.place.scheme == "tcp":
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            elif not is_ours(peer):
                peer.close()
                raise HostError(f"{self.place}: somebody else's process connected")
            return (peer, False) if self._context is None else (_secure(self._context, peer, None), False)

    def close(self) -> None:
        """Wait no longer. Idempotent."""
        if self._socket is not None:
            if self._socket.fileno() >= 0 and self.place.scheme == "unix":
                with suppress(OSError):
                    os.unlink(os.path.abspath(self.place.rest))
            self._socket.close()


class _told:
    """Errors of the system name the place."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        import ssl

        if isinstance(error, ssl.SSLError):
            why = getattr(error, "verify_message", "") or error.reason or error
            raise HostError(f"{self._place}: TLS: {str(why).replace('_', ' ').lower()}") from error
        if isinstance(error, OSError):
            raise HostError(f"{self._place}: {error.strerror or error}") from error


def _other(place: Place, *, writes: bool) -> tuple[Peer, bool]:
    if place.scheme == "exec":
        if is_inside():
            what = "in its jail the process starts no program: cardcage migrate starts it outside, and getfd hands over"
            raise HostError(f"{place}: {what} what it is connected to")
        return Program(place.rest), False
    if place.scheme == "fd":
        try:
            fd = os.dup(int(place.rest))
        except OSError as error:
            raise HostError(f"{place}: {error.strerror}") from error
        return adopted(fd)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if writes else os.O_RDONLY
    return Pipe(os.open(place.rest, flags | os.O_CLOEXEC, 0o600)), True


def adopted(fd: int) -> tuple[Peer, bool]:
    """A connection of this descriptor, which it closes, and whether nothing can come back on it."""
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        return socket.socket(fileno=fd), False
    return Pipe(fd), True


def hang_up(one: Any) -> None:
    """Let whoever waits at *one*, a connection or a :class:`Waiting`, wait no longer; at a pipe nobody is woken."""
    with suppress(OSError, ValueError):
        if (fd := one.fileno()) >= 0 and stat.S_ISSOCK(os.fstat(fd).st_mode):
            with socket.socket(fileno=os.dup(fd)) as same:
                same.shutdown(socket.SHUT_RDWR)


class Program:
    """A command of the shell, whose standard input and output are the connection."""

    def __init__(self, command: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(["/bin/sh", "-c", command], stdin=theirs.fileno(), stdout=theirs.fileno())
        self._peer = ours

    def recv_into(self, buffer: memoryview, /) -> int:
        """See :class:`~cardcage_migrate.wire.Peer`."""
        return self._peer.recv_into(buffer)

    def sendall(self, data: Buffer, /) -> None:
        """See :class:`~cardcage_migrate.wire.Peer`."""
        self._peer.sendall(data)

    def settimeout(self, seconds: float | None, /) -> None:
        """See :class:`~cardcage_migrate.wire.Peer`."""
        self._peer.settimeout(seconds)

    def fileno(self) -> int:
        """The descriptor of this end."""
        return self._peer.fileno()

    def finish(self, waits: Callable[[], bool]) -> None:
        """Say that nothing more comes, and wait until the program has made what it makes of it; no longer than *waits*
        says so. Raises HostError for a program that failed."""
        self._peer.shutdown(socket.SHUT_WR)
        while waits():
            try:
                status = self._process.wait(STEP)
            except subprocess.TimeoutExpired:
                continue
            if status:
                how = f"with status {status}" if status > 0 else f"by signal {-status}"
                raise HostError(f"the program ended {how}")
            return

    def close(self) -> None:
        """Hang up; a program that does not end by that is ended, and all that it has started with it."""
        self._peer.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST)
            return
        there: list[int] = []
        for pid in _descendants(self._process.pid):
            with suppress(ProcessLookupError):
                there.append(os.pidfd_open(pid))  # whoever has the number later is not meant
        for sign in (signal.SIGTERM, signal.SIGKILL):
            until = time.monotonic() + STEP
            for one in there:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(one, sign)
            for one in there:  # it is readable once the process has ended
                select.select([one], [], [], max(until - time.monotonic(), 0))
        for one in there:
            os.close(one)
        self._process.wait()


def _descendants(pid: int) -> list[int]:
    """The process *pid*, which nobody has waited for, and those below it. The last are first: who starts others is
    ended after them."""
    below: dict[int, list[int]] = {}
    for one in os.listdir("/proc"):
        if one.isdigit():
            with suppress(OSError):  # it has ended
                facts = Path(f"/proc/{one}/stat").read_text(errors="replace")  # its name may hold anything
                below.setdefault(int(facts.rpartition(")")[2].split()[1]), []).append(int(one))
    found = [pid]
    for at in found:
        found += below.get(at, ())
    return found[::-1]


def _may_tls(place: Place) -> None:
    if place.scheme not in ("tcp", "unix"):
        raise UsageError(f"{place}: TLS is for tcp: and unix:")


def tls_context(folder: str | os.PathLike[str], *, server: bool) -> ssl.SSLContext:
    """Certificates, those shown and those wanted, by QEMU's names. Raises ConfigError that names the file."""
    import ssl

    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.verify_mode = ssl.CERT_REQUIRED
    side = "server" if server else "client"
    where = Path(folder)
    for names, load in (
        (("ca-cert.pem",), made.load_verify_locations),
        ((f"{side}-cert.pem", f"{side}-key.pem"), made.load_cert_chain),
    ):
        try:
            for name in names:
                if not (where / name).is_file():
                    raise ConfigError("expected a file in PEM", file=str(where / name))
            load(*(str(where / name) for name in names))
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot be used: {why}", file=str(where / names[0])) from error
    return made


def _secure(context: ssl.SSLContext, peer: socket.socket, name: str | None) -> ssl.SSLSocket:
    try:
        if name is None:
            return context.wrap_socket(peer, server_side=True)
        return context.wrap_socket(peer, server_hostname=name)
    except BaseException:
        peer.close()
        raise
