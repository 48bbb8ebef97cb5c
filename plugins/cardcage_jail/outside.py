"""The way out of the jail: what a process in it asks of the broker outside (:mod:`cardcage_jail.broker`).

A request is one datagram with one descriptor, the end of a socket pair on which its answer comes: so all processes of
a machine, its copies too, have one way, and none gets another's answer. Outside a jail, these functions do what they
say themselves.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from cardcage.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["ask", "is_inside", "is_ours", "join", "lend", "listen_at", "open_file", "start_program"]

PATIENCE = 10.0
"""Seconds that the broker may take for its answer."""
ANSWER = 4096
FILES = 64
"""Files that a process may lend at once."""
_ways: list[socket.socket] = []


def is_inside() -> bool:
    """True once this process is in its jail and there is a broker."""
    return bool(_ways)


def join(way: socket.socket) -> None:
    """This process is in its jail; *way* leads to the broker."""
    _ways[:] = [way]


def ask(request: dict[str, Any]) -> int:
    """Have the broker do something; return the descriptor that came with its answer, -1 for none. Raises OSError.

    A broker that is gone is refused permission (EACCES).
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs, suppress(IndexError):
            try:
                socket.send_fds(_ways[0], [json.dumps(request).encode()], [theirs.fileno()])
            except (BrokenPipeError, ConnectionError) as error:
                raise PermissionError(errno.EACCES, "the jail's broker is gone") from error
        ours.settimeout(PATIENCE)
        try:
            text, found, _, _ = socket.recv_fds(ours, ANSWER, 1, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            text, found = b"", []
    number = json.loads(text).get("errno", 0) if text else errno.EACCES
    if number:
        for one in found:
            os.close(one)
        raise OSError(number, os.strerror(number))
    return found[0] if found else -1


def open_file(path: str, flags: int, mode: int = 0o600) -> int:
    """As :func:`os.open`, closed on exec; in a jail, what may not be opened there is asked of the broker.

    It opens what an operator lends (:func:`lend`), and what a card stated: files without a name (``O_TMPFILE``) in the
    directories of ``Needs.scratch``, and the calling process's own ``/proc/self/maps`` and ``pagemap``, which one that
    was forked in the jail may not open. Fits ``open(path, opener=open_file)``. Raises OSError.
    """
    try:
        return os.open(path, flags | os.O_CLOEXEC, mode)
    except PermissionError as refused:
        if not _ways:
            raise
        try:
            return ask({"do": "open", "path": os.path.abspath(path), "flags": flags & ~os.O_CLOEXEC})
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), path) from refused


def listen_at(path: str) -> socket.socket:
    """A stream socket that listens at *path*, with mode 0600, in place of one left behind there. Raises OSError.

    In a jail it may be in any directory of ``Needs.write``; it comes from the broker, and nothing can be connected.
    """
    if _ways:
        return socket.socket(fileno=ask({"do": "listen", "path": os.path.abspath(path)}))
    folder, name = os.path.split(os.path.abspath(path))
    at = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    try:
        return bound(at, name)
    finally:
        os.close(at)


def start_program(words: tuple[str, ...]) -> socket.socket:
    """In a jail, have the broker start a program of ``Needs.programs``; return a stream socket whose other end it has.

    One that it started before by the same words is ended. Raises OSError.
    """
    return socket.socket(fileno=ask({"do": "start", "program": words}))


@contextmanager
def lend(place: str, paths: Mapping[str, bool]) -> Iterator[None]:
    """Lend files to the jailed machine whose broker listens at *place*, while the block runs: an operator's process
    does.

    *paths* are absolute; with True, one is opened for writing too where this process may. Nothing where no broker
    listens. Raises OSError for a file that cannot be opened, HostError when the broker refuses or is not there.
    """
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(PATIENCE)
        try:
            at = os.open(os.path.dirname(place), os.O_PATH | os.O_CLOEXEC)
            try:
                peer.connect(f"/proc/self/fd/{at}/{os.path.basename(place)}")
            finally:
                os.close(at)
        except (FileNotFoundError, ConnectionRefusedError):
            yield  # it is in no jail
            return
        for path, writable in paths.items():
            fd = _opened(path, writable=writable)
            try:
                socket.send_fds(peer, [json.dumps({"lend": path}).encode()], [fd])
                why = json.loads(peer.recv(ANSWER) or b'{"error": "it hung up"}')["error"]
            except OSError as error:
                why = str(error)
            finally:
                os.close(fd)
            if why:
                raise HostError(f"{path}: the machine's broker does not take it: {why}")
        yield


def _opened(path: str, *, writable: bool) -> int:
    if writable:
        try:
            return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
                raise
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def is_ours(peer: socket.socket) -> bool:
    """True when the other end is a process of this user's, or root's."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1] in (os.geteuid(), 0)


def bound(folder: int, name: str) -> socket.socket:
    """A socket that listens in the open directory *folder*. Raises OSError."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
        os.fchmod(made.fileno(), 0o600)  # the file's mode, from its first moment on (unix(7))
        made.bind(f"/proc/self/fd/{folder}/{name}")  # however long the directory's path is
        made.listen(8)
    except BaseException:
        made.close()
        raise
    return made
