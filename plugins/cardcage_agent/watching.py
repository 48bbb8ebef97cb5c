"""Changes of a directory or file in the guest, as inotify(7) tells of them."""

from __future__ import annotations

import os
import struct
import time
from typing import TYPE_CHECKING

from attrs import frozen

from cardcage_agent.errors import AgentError, AgentTimeout, ProtocolError
from cardcage_agent.frames import WINDOW

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from cardcage_agent.link import Call, Link

__all__ = ["FileEvent", "Watch"]

EVENT = struct.Struct("<iIII")
NAME_MAX = 256
KINDS = {
    0x2: "modify",
    0x4: "attrib",
    0x8: "close_write",
    0x40: "moved_from",
    0x80: "moved_to",
    0x100: "create",
    0x200: "delete",
    0x400: "delete_self",
    0x800: "move_self",
    0x2000: "unmount",
    0x4000: "overflow",
    0x8000: "ignored",
}
DIRECTORY = 0x40000000


@frozen
class FileEvent:
    """A change.

    Attributes:
        kind: ``create``, ``modify``, ``close_write`` (a file that was open for writing was closed), ``attrib``,
            ``delete``, ``moved_from``, ``moved_to``, ``delete_self``, ``move_self``, ``unmount`` (its file system
            was), ``overflow`` (events were lost), or ``ignored``: nothing more comes.
        name: the last part of its path, in a directory; empty for what is watched itself.
        is_dir: it is about a directory. cookie: the same for the two of a move, else 0.
    """

    kind: str
    name: str
    is_dir: bool
    cookie: int


class Watch:
    """Changes as they come, an iterator: it ends when what is watched is gone. Close it, or use it in a ``with``."""

    def __init__(self, link: Link, call: Call, name: str, check: Callable[[], None]) -> None:
        self._link, self._call, self._name, self._check = link, call, name, check
        self._kept, self._closed = b"", False

    def get(self, timeout: float | None = None) -> FileEvent | None:
        """The next change; None when what is watched is gone, or this is closed.

        Raises AgentTimeout after *timeout* seconds, and what ended the machine or its agent.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        inbox = self._call.inboxes[0]
        while True:
            found = self._parsed()
            if found is not None:
                return found
            over = self._call.over  # asked first: what came before it is there then
            if piece := self._link.receive(self._call, 1, WINDOW):
                self._kept += piece
            elif over:
                if not self._closed:
                    self._check()
                return None
            elif not self._link.wait(self._call, lambda: bool(inbox.kept), deadline):
                raise AgentTimeout(f"{self._name}: no change within {timeout:g} s")

    def _parsed(self) -> FileEvent | None:
        """The first event of what came, when it is whole."""
        if len(self._kept) < EVENT.size:
            return None
        _, mask, cookie, size = EVENT.unpack_from(self._kept)
        if size > NAME_MAX:
            self.close()
            raise ProtocolError(f"{self._name}: an event with a name of {size} bytes: expected {NAME_MAX} at most")
        if len(self._kept) < EVENT.size + size:
            return None
        name = os.fsdecode(self._kept[EVENT.size : EVENT.size + size].partition(b"\0")[0])
        self._kept = self._kept[EVENT.size + size :]
        kind = next((text for bit, text in KINDS.items() if mask & bit), "")
        if not kind or "/" in name or name in (".", ".."):
            self.close()
            raise AgentError(f"{self._name}: an event {mask:#x} about {name!r}, which is none of inotify's")
        if kind == "ignored":
            self.close()
        return FileEvent(kind, name, bool(mask & DIRECTORY), cookie)

    def close(self) -> None:
        """Watch no more. Idempotent."""
        self._closed = True
        self._link.cancel(self._call)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> FileEvent:
        if (found := self.get()) is None:
            raise StopIteration
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
