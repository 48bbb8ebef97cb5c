"""Extended attributes, of both servers: ``user.*`` are those of the host's files, and others are kept under such names.

``trusted.*`` and ``security.*`` mean something to the host's kernel, and only root may set them. The guest's own (of
overlayfs, of setcap) are kept beside: ``trusted.x`` as ``user.virtiofs.trusted.x``, as virtiofsd's ``xattrmap`` would
have it. The host's are neither seen nor set, and no user of the guest can get at those kept by another name.
"""

from __future__ import annotations

import errno
import os
import struct
from struct import Struct
from typing import TYPE_CHECKING

from cardcage_virtio.share import hostcalls

if TYPE_CHECKING:
    from cardcage_virtio.share.fuse import Args
    from cardcage_virtio.share.p9_tree import Node

__all__ = ["VALUE_MAX", "fuse_get", "fuse_list", "fuse_remove", "fuse_set", "names", "remove", "set_", "value"]

U32X2 = Struct("<II")
VALUE_MAX = 1 << 16
"""The longest value (``XATTR_SIZE_MAX``)."""
OURS, KEPT = b"user.", b"user.virtiofs."
GUESTS = (b"trusted.", b"security.")


def _on_host(name: bytes) -> bytes:
    """The host's name for the guest's. Raises OSError for one that is not served."""
    if name.startswith(GUESTS):
        return KEPT + name
    if not name.startswith(OURS):
        raise OSError(errno.EOPNOTSUPP, "only user.*, trusted.* and security.*")
    return name


def names(node: Node) -> list[bytes]:
    """The attributes that *node* has for the guest."""
    found = hostcalls.list_attributes(node.proc)
    kept = [name.removeprefix(KEPT) for name in found if name.startswith(tuple(KEPT + guest for guest in GUESTS))]
    return [name for name in found if name.startswith(OURS) and not name.startswith(KEPT)] + kept


def value(node: Node, name: bytes) -> bytes:
    """Raises OSError, ENODATA where there is none."""
    host = _on_host(name)
    if name.startswith(KEPT):
        raise OSError(errno.ENODATA, "kept by another name")
    return os.getxattr(node.proc, host)


def set_(node: Node, name: bytes, data: bytes, flags: int) -> None:
    """*flags* as of setxattr(2). Raises OSError."""
    host = _on_host(name)
    if name.startswith(KEPT):
        raise OSError(errno.EPERM, "kept by another name")
    os.setxattr(node.proc, host, data, flags)


def remove(node: Node, name: bytes) -> None:
    """Raises OSError, ENODATA where there is none."""
    host = _on_host(name)
    if name.startswith(KEPT):
        raise OSError(errno.ENODATA, "kept by another name")
    os.removexattr(node.proc, host)


def _sized(data: bytes, size: int) -> bytes:
    """The answer where the guest has room for *size* bytes, 0: it wants to know how many there are."""
    if not size:
        return struct.pack("<II", len(data), 0)
    if len(data) > size:
        raise OSError(errno.ERANGE, "more than there is room for")
    return data


def fuse_get(node: Node, args: Args) -> bytes:
    """FUSE_GETXATTR."""
    size, _ = args.take(U32X2)
    return _sized(value(node, args.name()), size)


def fuse_list(node: Node, args: Args) -> bytes:
    """FUSE_LISTXATTR."""
    size, _ = args.take(U32X2)
    return _sized(b"".join(name + b"\0" for name in names(node)), size)


def fuse_set(node: Node, args: Args) -> bytes:
    """FUSE_SETXATTR."""
    size, flags = args.take(U32X2)
    name = args.name()
    data = args.rest()
    if len(data) < size:
        raise OSError(errno.EINVAL, "message cut short")
    set_(node, name, data[:size], flags)
    return b""


def fuse_remove(node: Node, args: Args) -> bytes:
    """FUSE_REMOVEXATTR."""
    remove(node, args.name())
    return b""
