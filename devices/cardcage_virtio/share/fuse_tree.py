"""A FUSE guest's view of a host directory tree: inodes by number, and open files by handle."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from cardcage_virtio.share.hostcalls import open_cached
from cardcage_virtio.share.p9_tree import Node, check_name, names_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ROOT", "Handle", "Inode", "Tree", "WaitsError"]

ROOT = 1
"""The root's number (``FUSE_ROOT_ID``)."""
MOST_INODES = 1 << 20


class WaitsError(Exception):
    """This might wait for the host, and was not done."""


class Inode:
    """A file that the guest knows, by any of its names.

    Attributes:
        number: the guest's name for it. key: device, inode number and file type on the host.
        parent, name: where it was found last. lookups: how often the guest was told its number.
        node: its descriptor, ``None`` while closed to save descriptors.
    """

    __slots__ = ("key", "lookups", "name", "node", "number", "parent")

    def __init__(self, number: int, parent: Inode | None, name: bytes, node: Node) -> None:
        self.number, self.parent, self.name, self.lookups = number, parent, name, 0
        self.node: Node | None = node
        self.key = key_of(node.stat())

    @property
    def path(self) -> tuple[bytes, ...]:
        """Names from the root."""
        return names_of(self)


def key_of(found: os.stat_result) -> tuple[int, int, int]:
    """Return the identity of a file on the host: device, number and type."""
    return found.st_dev, found.st_ino, stat.S_IFMT(found.st_mode)


class Handle:
    """An open file or directory."""

    __slots__ = ("__weakref__", "fd", "flags", "inode")

    def __init__(self, inode: Inode, fd: int, flags: int) -> None:
        self.inode, self.fd, self.flags = inode, fd, flags


class Tree:
    """The inodes under one directory.

    Args:
        root: the directory.
        descriptors: how many inodes may be open at once. One that was closed is found again by its name, and is stale
            (ESTALE) when another file has the name now.

    Attributes:
        quick: while set, what might wait for a disk raises :exc:`WaitsError`.
    """

    def __init__(self, root: Node, descriptors: int) -> None:
        self.root, self._top = Inode(ROOT, None, b"", root), root
        self._descriptors, self.quick = max(descriptors, 16), False
        self.clear()

    def clear(self) -> None:
        """Forget all but the root."""
        self._inodes = {ROOT: self.root}
        self._by_key = {self.root.key: self.root}
        self._open: dict[int, Inode] = {}  # in the order of their last use
        self._next = ROOT + 1

    def __len__(self) -> int:
        return len(self._inodes)

    def __iter__(self) -> Iterator[Inode]:
        return iter(self._inodes.values())

    def inode(self, number: int) -> Inode:
        """Raises OSError ESTALE for a number that the guest does not hold."""
        found = self._inodes.get(number)
        if found is None:
            raise OSError(errno.ESTALE, "no such inode")
        return found

    def node(self, inode: Inode) -> Node:
        """The inode's descriptor, opened again if need be."""
        if inode.parent is None:
            return self._top
        if self.quick and (inode.node is None or inode.key[0] != self.root.key[0]):
            raise WaitsError
        closed: list[Inode] = [inode]
        above: Inode | None = inode.parent
        while closed[-1].node is None and above is not None:  # no recursion: a guest nests directories without end
            closed.append(above)
            above = above.parent
        node = closed[-1].node or self._top
        for one in reversed(closed[:-1]):
            try:
                node = self._walk(node, one.name)
            except OSError as error:
                raise OSError(errno.ESTALE, "gone meanwhile") from error
            if key_of(node.stat()) != one.key:
                raise OSError(errno.ESTALE, "replaced meanwhile")
            one.node = node
            self._use(one)
        self._use(inode)
        return node

    def _use(self, inode: Inode) -> None:
        """It was used last, and is put away last."""
        self._open.pop(inode.number, None)
        self._open[inode.number] = inode
        if len(self._open) > self._descriptors:
            oldest = next(iter(self._open))
            self._open.pop(oldest).node = None

    def _walk(self, parent: Node, name: bytes) -> Node:
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        check_name(name)
        if not self.quick:
            return Node(os.open(name, flags, dir_fd=parent.fd))
        try:
            return Node(open_cached(parent.fd, name, flags))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise WaitsError from error

    def lookup(self, parent: Inode, name: bytes) -> Inode:
        """The entry *name* of *parent*, which the guest holds once more."""
        return self.adopt(parent, name, self._walk(self.node(parent), name))

    def adopt(self, parent: Inode, name: bytes, node: Node) -> Inode:
        """As :meth:`lookup`, of a file that is open already."""
        inode = self._by_key.get(key_of(node.stat()))
        if inode is None:
            if len(self._inodes) >= MOST_INODES:
                raise OSError(errno.ENFILE, "the guest holds too many files")
            inode = Inode(self._next, parent, name, node)
            self._next += 1
            self._inodes[inode.number] = self._by_key[inode.key] = inode
        elif inode.parent is not None:
            self._place(inode, parent, name)
            inode.node = node
        if inode.parent is not None:
            inode.lookups += 1
            self._use(inode)
        return inode

    @staticmethod
    def _place(inode: Inode, parent: Inode, name: bytes) -> None:
        above: Inode | None = parent
        while above is not None:  # the host may have moved a directory below what the guest knows as its child
            if above is inode:
                raise OSError(errno.ESTALE, "moved meanwhile")
            above = above.parent
        inode.parent, inode.name = parent, name

    def forget(self, number: int, lookups: int) -> None:
        """The guest holds *number* so many times less. What it does not hold is ignored."""
        inode = self._inodes.get(number)
        if inode is None or inode.parent is None:
            return
        inode.lookups -= lookups
        if inode.lookups <= 0:
            del self._inodes[number], self._by_key[inode.key]
            self._open.pop(number, None)

    def moved(self, new: Inode, new_name: bytes) -> None:
        """An entry was renamed to *new_name* of *new*, where it is found from now on, unless the host moved it."""
        with suppress(OSError):
            node = self._walk(self.node(new), new_name)
            inode = self._by_key.get(key_of(node.stat()))
            if inode is not None and inode.parent is not None:
                self._place(inode, new, new_name)

    def restore(self, number: int, lookups: int, path: list[bytes], known: dict[tuple[bytes, ...], Inode]) -> Inode:
        """An inode of a saved state; *known* are those restored before, by path. Raises OSError when it is gone."""
        at, names = known.get(tuple(path[:-1]), self.root), path[-1:]
        if at is self.root:
            names = path
        node = self.node(at)
        for name in names[:-1]:
            node = self._walk(node, name)
            at = self._by_key.get(key_of(node.stat())) or Inode(0, at, name, node)
        inode = Inode(number, at, names[-1], self._walk(node, names[-1]))
        inode.lookups = lookups
        self._inodes[number] = self._by_key[inode.key] = inode
        self._next = max(self._next, number + 1)
        self._use(inode)
        known[tuple(path)] = inode
        return inode
