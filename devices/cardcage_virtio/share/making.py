"""Files that a guest makes in a shared directory: with the mode that it asked for, and for its user.

In each function *parent* is the directory, *mode* the permissions, and *owner* the guest's user and group, to whom a
VMM that runs as root gives the file. All raise OSError.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from cardcage_virtio.share.p9_tree import MODE, OPEN_FLAGS, Node, check_name

__all__ = ["NOBODY", "create", "mkdir", "mknod", "symlink", "temporary"]

NOBODY = 0xFFFFFFFF
ANYBODY = NOBODY, NOBODY
"""In place of a user and a group, or either: as the host has it."""
RACES = 8


def create(parent: Node, name: bytes, flags: int, mode: int, owner: tuple[int, int]) -> tuple[Node, int]:
    """Make (or open, unless ``O_EXCL``) a file; returns it and a descriptor."""
    made = flags & OPEN_FLAGS | os.O_EXCL | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    parent.check_room()
    for _ in range(RACES):
        try:
            fd = os.open(check_name(name), made, mode & MODE, dir_fd=parent.fd)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            with suppress(FileNotFoundError):  # the host removed it meanwhile
                node = parent.walk(name)
                if stat.S_ISDIR(node.stat().st_mode):
                    raise OSError(errno.EISDIR, "a directory") from None
                return node, node.open(flags)
        else:
            return _opened(parent, fd, name, mode, owner), fd
    raise OSError(errno.EAGAIN, "made and removed again and again")


def temporary(parent: Node, flags: int, mode: int, owner: tuple[int, int]) -> tuple[Node, int]:
    """Make a file without a name (``O_TMPFILE``), which :meth:`Node.link` may give one; returns it and a descriptor."""
    parent.check_room()
    flags = flags & (OPEN_FLAGS & ~os.O_TRUNC | os.O_EXCL) | os.O_TMPFILE | os.O_CLOEXEC
    fd = os.open(parent.proc, flags, mode & MODE)
    return _opened(parent, fd, b"", mode, owner), fd


def _opened(parent: Node, fd: int, name: bytes, mode: int, owner: tuple[int, int]) -> Node:
    try:
        node = Node(os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC), parent, name)
        return _settled(parent, node, stat.S_IFREG | mode, owner)
    except OSError:
        os.close(fd)
        raise


def mkdir(parent: Node, name: bytes, mode: int, owner: tuple[int, int]) -> Node:
    os.mkdir(check_name(name), mode & MODE, dir_fd=parent.fd)
    return _settled(parent, parent.walk(name), stat.S_IFDIR | mode, owner)


def symlink(parent: Node, name: bytes, target: bytes, owner: tuple[int, int]) -> Node:
    os.symlink(target, check_name(name), dir_fd=parent.fd)
    return _settled(parent, parent.walk(name), stat.S_IFLNK, owner)


def mknod(parent: Node, name: bytes, mode: int, device: int, owner: tuple[int, int]) -> Node:
    """Regular files, FIFOs and sockets; no devices but 0:0, which is none: overlayfs marks with it what is gone."""
    kind = stat.S_IFMT(mode) or stat.S_IFREG
    if kind not in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK) and (kind != stat.S_IFCHR or device):
        raise OSError(errno.EPERM, "no device nodes")
    os.mknod(check_name(name), kind | mode & MODE, 0, dir_fd=parent.fd)
    return _settled(parent, parent.walk(name), kind | mode, owner)


def _settled(parent: Node, made: Node, mode: int, owner: tuple[int, int]) -> Node:
    """*made* here just now, with *mode*, of which this process's umask may have taken some, and for *owner*.

    The umask is of all threads, and so left alone. Where the directory has a default ACL it does not count.
    """
    found = made.stat()
    if stat.S_IFMT(found.st_mode) != stat.S_IFMT(mode):
        return made  # the host put something else there
    missing = mode & MODE & ~found.st_mode
    if missing and not _has_default_acl(parent):
        with suppress(OSError):  # a file system that has no such modes
            os.chmod(made.proc, stat.S_IMODE(found.st_mode) | missing)
    if os.geteuid() == 0 and owner != ANYBODY:
        keep_group = owner[1] == NOBODY or parent.stat().st_mode & stat.S_ISGID
        made.chown(-1 if owner[0] == NOBODY else owner[0], -1 if keep_group else owner[1])
    return made


def _has_default_acl(parent: Node) -> bool:
    try:
        return bool(os.getxattr(parent.proc, "system.posix_acl_default"))
    except OSError:
        return False
