"""Extended attributes, for the 9P server: a fid that is read, or that is written and sets the value when given up."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from cardcage_virtio.share import xattr

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage_virtio.share.p9_files import Fid
    from cardcage_virtio.share.p9_tree import Node
    from cardcage_virtio.share.p9_wire import Message

__all__ = ["Attribute", "Attributes"]

REPLACE = 2
HELD = 64
"""Values that a guest may hold at once, each up to :data:`xattr.VALUE_MAX` bytes."""


class Attribute:
    """A value, or the list of names, that is being read or written.

    Args:
        size: bytes that are to be written. data: those there are. writing: it is set once it was written.
    """

    __slots__ = ("__weakref__", "_flags", "_name", "_size", "data", "writing")

    def __init__(self, name: bytes, flags: int, size: int, data: bytes, writing: bool) -> None:
        self._name, self._flags, self._size, self.data, self.writing = name, flags, size, bytearray(data), writing

    def row(self) -> tuple[bytes, int, int, bytes, bool]:
        """For a state."""
        return self._name, self._flags, self._size, bytes(self.data), self.writing

    def read(self, offset: int, count: int) -> bytes:
        if self.writing:
            raise OSError(errno.EBADF, "written, not read")
        return bytes(self.data[offset : offset + count])

    def write(self, offset: int, data: bytes) -> int:
        if not self.writing:
            raise OSError(errno.EBADF, "read, not written")
        if offset != len(self.data) or offset + len(data) > self._size:
            raise OSError(errno.EINVAL, "expected the value from its start to its end")
        self.data += data
        return len(data)

    def end(self, node: Node) -> None:
        """Set what was written. An empty value that replaces another removes it: so the protocol says it."""
        if not self.writing:
            return
        if len(self.data) != self._size:
            raise OSError(errno.EINVAL, "a value cut short")
        if not self._size and self._flags == REPLACE:
            xattr.remove(node, self._name)
        else:
            xattr.set_(node, self._name, bytes(self.data), self._flags)


class Attributes:
    """Calls that begin to read or write one.

    Args:
        fid: reads a fid's number from a message. Raises OSError EBADF when there is none.
    """

    def __init__(self, fid: Callable[[Message], Fid]) -> None:
        self._fid = fid
        self._held: WeakSet[Attribute] = WeakSet()

    def _hold(self, *row: Any) -> Attribute:
        if len(self._held) >= HELD:
            raise OSError(errno.ENFILE, "too many attributes at once")
        made = Attribute(*row)
        self._held.add(made)
        return made

    def read(self, node: Node, name: bytes) -> Attribute:
        """The value of *name*, or the names there are where that is empty. Raises OSError."""
        data = xattr.value(node, name) if name else b"".join(one + b"\0" for one in xattr.names(node))
        return self._hold(name, 0, 0, data, False)

    def create(self, message: Message) -> bytes:
        """Txattrcreate: *fid* takes a value from now on."""
        fid, name, size, flags = self._fid(message), message.text(), message.number(8), message.number(4)
        if size > xattr.VALUE_MAX:
            raise OSError(errno.E2BIG, "too long a value")
        if fid.fd >= 0 or fid.attribute is not None:
            raise OSError(errno.EBADF, "open already")
        fid.attribute = self._hold(name, flags, size, b"", True)
        return b""

    def restore(self, row: Sequence[Any]) -> Attribute:
        """One of a saved state."""
        return self._hold(*row)
