"""Extended attributes of ``virtio-fs``: those that a user may set (``user.*``), of files and directories.

Others mean something to the host (``security.*``, ``trusted.*``, ``system.*``): the guest neither sees nor sets them,
and hears EOPNOTSUPP.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from struct import Struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cardcage_virtio.share.fuse import Args
    from cardcage_virtio.share.p9_tree import Node

__all__ = ["get", "listing", "remove", "set_"]

U32X2 = Struct("<II")
PREFIX = b"user."


def _path(node: Node, name: bytes = PREFIX) -> str:
    """Where the attribute *name* can be reached. Raises OSError for one that is not served."""
    mode = node.stat().st_mode
    if not name.startswith(PREFIX) or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EOPNOTSUPP, "only user.* of files and directories")
    return node.proc


def _sized(data: bytes, size: int) -> bytes:
    """The answer where the guest has room for *size* bytes, 0: it wants to know how many there are."""
    if not size:
        return struct.pack("<II", len(data), 0)
    if len(data) > size:
        raise OSError(errno.ERANGE, "more than there is room for")
    return data


def get(node: Node, args: Args) -> bytes:
    """FUSE_GETXATTR."""
    size, _ = args.take(U32X2)
    name = args.name()
    return _sized(os.getxattr(_path(node, name), name), size)


def listing(node: Node, args: Args) -> bytes:
    """FUSE_LISTXATTR; other kinds of file have none."""
    size, _ = args.take(U32X2)
    mode = node.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        return _sized(b"", size)
    names = [os.fsencode(name) for name in os.listxattr(node.proc)]
    return _sized(b"".join(name + b"\0" for name in names if name.startswith(PREFIX)), size)


def set_(node: Node, args: Args) -> bytes:
    """FUSE_SETXATTR."""
    size, flags = args.take(U32X2)
    name = args.name()
    value = args.rest()
    if len(value) < size:
        raise OSError(errno.EINVAL, "message cut short")
    os.setxattr(_path(node, name), name, value[:size], flags)
    return b""


def remove(node: Node, args: Args) -> bytes:
    """FUSE_REMOVEXATTR."""
    name = args.name()
    os.removexattr(_path(node, name), name)
    return b""
