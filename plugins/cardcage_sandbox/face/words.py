"""Files, changes and commands in the words of the protocol, and what callers say in them."""

from __future__ import annotations

import base64
import binascii
import signal
import threading
import time
import zlib
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError

from cardcage_sandbox.face.connect import Failed
from cardcage_sandbox.face.control import Refused
from cardcage_sandbox.face.guard import UPLOAD, TooLarge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cardcage_sandbox.files import Change, Entry, Watch

__all__ = ["Watcher", "changed", "ended", "flat", "given", "number", "plain", "shape", "text", "told"]

EVENTS = 10_000
"""Events that a watcher keeps."""
TYPES = {"file": "FILE_TYPE_FILE", "dir": "FILE_TYPE_DIRECTORY", "symlink": "FILE_TYPE_SYMLINK"}
CHANGES = {
    "create": "EVENT_TYPE_CREATE",
    "moved_to": "EVENT_TYPE_CREATE",
    "modify": "EVENT_TYPE_WRITE",
    "delete": "EVENT_TYPE_REMOVE",
    "delete_self": "EVENT_TYPE_REMOVE",
    "moved_from": "EVENT_TYPE_RENAME",
    "move_self": "EVENT_TYPE_RENAME",
    "attrib": "EVENT_TYPE_CHMOD",
}


class Watcher:
    """Changes of a directory that are kept until somebody asks; of more than :data:`EVENTS` the first are lost."""

    def __init__(self, sandbox: str, watch: Watch) -> None:
        self.sandbox, self._watch = sandbox, watch
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self.asked, self.over = time.monotonic(), False
        threading.Thread(target=self._read, name="sandbox-watch", daemon=True).start()

    def _read(self) -> None:
        with suppress(CardcageError, OSError, ValueError):  # it was closed, or the sandbox ended
            for change in self._watch:
                if (event := changed(change)) is not None:
                    self._events.append(event)
        self.over = True

    def take(self) -> list[dict[str, Any]]:
        """Changes since the last time."""
        self.asked = time.monotonic()
        found = []
        with suppress(IndexError):
            while True:
                found.append(self._events.popleft())
        return found

    def close(self) -> None:
        """Watch no more."""
        self._watch.close()


async def plain(parts: AsyncIterator[bytes], coding: str) -> AsyncIterator[bytes]:
    """A body without its coding, within the bounds of one. Raises Refused or TooLarge."""
    if coding not in ("", "identity", "gzip"):
        raise Refused(400, f"content-encoding {coding[:40]!r}: expected gzip")
    if coding != "gzip":
        async for part in parts:
            yield part
        return
    left, unpacker = UPLOAD, zlib.decompressobj(31)
    async for part in parts:
        try:
            while part:
                piece = unpacker.decompress(part, 1 << 16)
                left -= len(piece)
                if left < 0:
                    raise TooLarge
                yield piece
                part = unpacker.unconsumed_tail
        except zlib.error as problem:
            raise Refused(400, f"not gzip: {problem}") from problem
    if not unpacker.eof:
        raise Refused(400, "the body ended inside its gzip stream")


def text(message: dict[str, Any], key: str) -> str:
    """A key of a message. Raises Failed."""
    found = message.get(key)
    if not isinstance(found, str) or not found:
        raise Failed("invalid_argument", f"{key}: expected text")
    return found


def number(message: dict[str, Any], key: str, default: int) -> int:
    """A key of a message, 0 to 1000. Raises Failed."""
    found = message.get(key, default)
    if type(found) is not int or not 0 <= found <= 1000:
        raise Failed("invalid_argument", f"{key}: expected 0 to 1000")
    return found


def flat(message: dict[str, Any]) -> None:
    """Raises Failed for a watcher that is asked for more than there is."""
    for key in ("recursive", "includeEntry"):
        if message.get(key):
            raise Failed("unimplemented", f"{key}: a directory is watched, not what is deeper, and names are told")


def shape(pty: Any) -> list[int]:
    """Rows and columns. Raises Failed."""
    size = pty.get("size") if isinstance(pty, dict) else None
    size = size if isinstance(size, dict) else {}
    found = [size.get("rows", 24), size.get("cols", 80)]
    if not all(type(one) is int and 0 < one < 65536 for one in found):
        raise Failed("invalid_argument", "pty: expected rows and columns from 1 to 65535")
    return found


def given(message: dict[str, Any]) -> bytes:
    """The bytes of an input. Raises Failed."""
    found = message.get("input")
    found = found if isinstance(found, dict) else {}
    data = found.get("stdin", found.get("pty"))
    try:
        return base64.b64decode(data if isinstance(data, str) else "", validate=True)
    except (binascii.Error, ValueError) as problem:
        raise Failed("invalid_argument", f"input: expected base64: {problem}") from problem


def told(entry: Entry) -> dict[str, Any]:
    """A file as the protocol has it."""
    when, rest = divmod(entry.modified, 10**9)
    found = {
        "name": entry.name,
        "type": TYPES.get(entry.type, "FILE_TYPE_UNSPECIFIED"),
        "path": entry.path,
        "size": str(entry.size),
        "mode": entry.mode,
        "permissions": entry.permissions,
        "owner": entry.owner,
        "group": entry.group,
        "modifiedTime": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(when))}.{rest:09d}Z",
    }
    if entry.target is not None:
        found.update(symlinkTarget=entry.target, isSymlink=True)
    return found


def changed(change: Change) -> dict[str, Any] | None:
    """A change as the protocol has it; None for one that it has no word for."""
    kind = CHANGES.get(change.kind)
    return None if kind is None else {"name": change.name, "type": kind}


def ended(status: int) -> dict[str, Any]:
    """The end of a command as the protocol has it."""
    if status >= 0:
        return {"exitCode": status, "exited": True, "status": f"exit status {status}"}
    try:
        name = (signal.strsignal(-status) or "").lower()
    except ValueError:
        name = ""
    why = f"signal: {name or -status}"
    return {"exitCode": -1, "exited": False, "status": why, "error": why}
