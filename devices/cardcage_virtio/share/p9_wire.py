"""Fields of 9P messages: little-endian numbers, and strings with a 16-bit length."""

from __future__ import annotations

import errno
from struct import pack

__all__ = ["Message", "text"]


def text(value: bytes) -> bytes:
    """A string as it stands in a message."""
    return pack("<H", len(value)) + value


class Message:
    """The body of a request, read field by field; OSError EPROTO when it ends too soon.

    Attributes:
        room: bytes that the body of the answer may have.
    """

    __slots__ = ("_at", "_data", "room")

    def __init__(self, data: bytes) -> None:
        self._data, self._at, self.room = data, 0, 0

    def again(self) -> Message:
        """The same message from its start."""
        return Message(self._data)

    def take(self, size: int) -> bytes:
        """The next *size* bytes."""
        end = self._at + size
        if end > len(self._data):
            raise OSError(errno.EPROTO, "message cut short")
        found, self._at = self._data[self._at : end], end
        return found

    def number(self, size: int) -> int:
        """An unsigned number of *size* bytes."""
        return int.from_bytes(self.take(size), "little")

    def text(self) -> bytes:
        """A string."""
        return self.take(self.number(2))
