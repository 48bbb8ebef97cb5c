"""Messages between a process and a machine that it forked: JSON with a length before it, and descriptors beside it.

Neither side believes the other more than it must: the copy has run a guest's code since.
"""

from __future__ import annotations

import array
import base64
import errno
import json
import os
import re
import socket
import struct
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

from attrs import asdict
from cardcage import errors, outcome
from cardcage.errors import CardcageError, HostError

__all__ = ["DESCRIPTORS", "Peer", "close_all", "pack_error", "pack_value", "raise_error", "unpack_value"]

HEAD = struct.Struct("<IB")
MOST = 256 << 20
"""Bytes of a message."""
DESCRIPTORS = 250
"""Of a message: the kernel takes 253."""
BROKEN = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, re.error)
"""Exceptions of values that are none."""
NONSENSE = "a forked machine's process gave an answer that cannot be understood"
OUTCOMES = {name: getattr(outcome, name) for name in outcome.__all__ if name != "Outcome"}


class Peer:
    """One end of a link."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def fileno(self) -> int:
        """Its descriptor, -1 once closed."""
        return self._end.fileno()

    def send(self, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
        """Send a message. Raises OSError when the other is gone."""
        data = json.dumps(message).encode()
        head = HEAD.pack(len(data), len(descriptors))
        if descriptors:
            socket.send_fds(self._end, [head], list(descriptors))
        else:
            self._end.sendall(head)
        self._end.sendall(data)

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """Wait for a message. Raises EOFError when the other is gone, HostError for what is none."""
        head, descriptors = self._head()
        try:
            size, count = HEAD.unpack(head)
            if size > MOST or count != len(descriptors):
                raise HostError("a forked machine's process sent what is no message")
            found = json.loads(self._exactly(size))
            if not isinstance(found, dict):
                raise HostError("a forked machine's process sent what is no message")
        except (ValueError, RecursionError) as error:
            close_all(descriptors)
            raise HostError(f"a forked machine's process sent what is no message: {error}") from error
        except BaseException:
            close_all(descriptors)
            raise
        return found, descriptors

    def _head(self) -> tuple[bytes, list[int]]:
        room = socket.CMSG_SPACE(DESCRIPTORS * array.array("i").itemsize)
        try:
            data, ancillary, _, _ = self._end.recvmsg(HEAD.size, room, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            data, ancillary = b"", []
        found = array.array("i")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found.frombytes(payload[: len(payload) // found.itemsize * found.itemsize])
        try:
            return data + self._exactly(HEAD.size - len(data), begun=bool(data)), list(found)
        except BaseException:
            close_all(list(found))
            raise

    def _exactly(self, size: int, *, begun: bool = True) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                piece = self._end.recv(min(size - len(data), 1 << 20)) if begun else b""
            except ConnectionResetError:
                piece = b""
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._end.close()


def close_all(descriptors: list[int]) -> None:
    """Close descriptors that came."""
    for one in descriptors:
        os.close(one)


def pack_value(value: Any) -> Any:
    """A value as JSON has it. Raises TypeError for one of another kind than the verbs have."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case bytes() | bytearray():
            return {"bytes": base64.b64encode(value).decode()}
        case os.PathLike():
            return str(os.fspath(value))
        case list() | tuple():
            return [pack_value(one) for one in value]
        case dict():
            return {"table": [[str(key), pack_value(one)] for key, one in value.items()]}
        case re.Pattern():
            return {"pattern": [value.pattern, value.flags]}
        case CompletedProcess():
            return {
                "completed": [pack_value(one) for one in (value.args, value.returncode, value.stdout, value.stderr)]
            }
    if type(value).__name__ in OUTCOMES and type(value) is OUTCOMES[type(value).__name__]:
        return {"outcome": [type(value).__name__, asdict(value)]}
    raise TypeError(f"{type(value).__name__} does not pass between processes")


def unpack_value(value: Any) -> Any:
    """The value again. Raises HostError for what none can be."""
    try:
        return _unpack(value)
    except BROKEN as error:
        raise HostError(f"{NONSENSE}: {error}") from error


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(one) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "bytes":
            return base64.b64decode(inner)
        case "table":
            return {str(key): _unpack(one) for key, one in inner}
        case "pattern":
            return re.compile(str(inner[0]), int(inner[1]))
        case "completed":
            return CompletedProcess(*(_unpack(one) for one in inner))
        case "outcome":
            return OUTCOMES[inner[0]](**inner[1])
    raise ValueError(f"a value of kind {kind!r}")


def pack_error(error: BaseException) -> dict[str, Any]:
    """An exception as a message has it."""
    if isinstance(error, TimeoutExpired):
        return {"timeout": [pack_value(one) for one in (error.cmd, error.timeout, error.output, error.stderr)]}
    if isinstance(error, OSError) and error.errno:
        return {"os": [error.errno, str(error.filename or "")]}
    known = (one.__name__ for one in type(error).__mro__ if one.__name__ in errors.__all__)
    return {"class": next(known, ""), "text": str(error) or type(error).__name__}


def raise_error(packed: Any) -> None:
    """Raise what was raised there: of the classes that :mod:`cardcage.errors` has, and those of a command's end."""
    match packed:
        case {"timeout": [_, int() | float(), _, _]}:
            raise TimeoutExpired(*unpack_value(packed["timeout"]))
        case {"os": [int(number), str(name)]} if number in errno.errorcode:
            raise OSError(number, os.strerror(number), name or None)
        case {"class": _, "text": _}:
            pass
        case _:
            raise HostError(NONSENSE)
    kind = getattr(errors, str(packed.get("class")), None) if packed.get("class") in errors.__all__ else None
    text = "".join(one if one.isprintable() or one == "\n" else "?" for one in str(packed.get("text")))
    raise kind(text) if isinstance(kind, type) and issubclass(kind, CardcageError) else HostError(text)
