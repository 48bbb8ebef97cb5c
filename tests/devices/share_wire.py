"""The two protocols of shared directories behind one face: what a guest's kernel asks of a server, as calls.

Nodes are numbers, given by :meth:`lookup` and what makes files; open files are numbers too.
"""

from __future__ import annotations

import itertools
import os
import struct
from typing import TYPE_CHECKING, Any

import nine_client as nine
from cardcage_virtio.share import fuse
from cardcage_virtio.share.fuse import Op, Set
from cardcage_virtio.share.p9_wire import text
from fuse_client import Client, FuseError

if TYPE_CHECKING:
    from pathlib import Path

USER, GROUP = 7, 8
OMITTED = (1 << 30) - 2
NOW = (1 << 30) - 1


class FuseAttributes:
    """Extended attributes by FUSE."""

    client: Any

    def attribute(self, node: int, key: bytes) -> bytes:
        return self.client.call(Op.GETXATTR, node, struct.pack("<II", 65536, 0) + key + b"\0")

    def set_attribute(self, node: int, key: bytes, value: bytes, flags: int) -> None:
        self.client.call(Op.SETXATTR, node, struct.pack("<II", len(value), flags) + key + b"\0" + value)

    def remove_attribute(self, node: int, key: bytes) -> None:
        self.client.call(Op.REMOVEXATTR, node, key + b"\0")

    def attributes(self, node: int) -> list[bytes]:
        return sorted(self.client.call(Op.LISTXATTR, node, struct.pack("<II", 65536, 0)).split(b"\0")[:-1])


class Fuse(FuseAttributes):
    """FUSE, as a user and group of the guest."""

    error = FuseError

    def __init__(self, path: Path | str, user: int = USER, group: int = GROUP, **options: Any) -> None:
        self.client = Client(path, user=user, group=group, **options)  # type: ignore[arg-type]

    def close(self) -> None:
        self.client.close()

    def _made(self, op: int, node: int, form: str, *values: int, more: bytes) -> int:
        return int.from_bytes(self.client.call(op, node, struct.pack(form, *values) + more)[:8], "little")

    def lookup(self, node: int, name: bytes) -> int:
        return self.client.lookup(name, node)

    def about(self, node: int) -> list[int]:
        """Mode, links, user, group, size, device, and times to the nanosecond."""
        found = fuse.ATTR.unpack_from(self.client.call(Op.GETATTR, node, bytes(16)), 16)
        seconds = [value - (value >> 63 << 64) for value in found[3:5]]
        times = [whole * 10**9 + rest for whole, rest in zip(seconds, found[6:8], strict=True)]
        mode, links, user, group, device = found[9:14]
        return [mode, links, user, group, found[1], device, *times]

    def readlink(self, node: int) -> bytes:
        return self.client.call(Op.READLINK, node)

    def mkdir(self, node: int, name: bytes, mode: int) -> int:
        return self._made(Op.MKDIR, node, "<II", mode, 0, more=name + b"\0")

    def mknod(self, node: int, name: bytes, mode: int, device: int) -> int:
        return self._made(Op.MKNOD, node, "<IIII", mode, device, 0, 0, more=name + b"\0")

    def symlink(self, node: int, name: bytes, target: bytes) -> int:
        return self._made(Op.SYMLINK, node, "", more=name + b"\0" + target + b"\0")

    def link(self, target: int, node: int, name: bytes) -> None:
        self.client.call(Op.LINK, node, struct.pack("<Q", target) + name + b"\0")

    def unlink(self, node: int, name: bytes, directory: bool) -> None:
        self.client.call(Op.RMDIR if directory else Op.UNLINK, node, name + b"\0")

    def rename(self, node: int, name: bytes, to: int, new_name: bytes, flags: int) -> None:
        self.client.call(Op.RENAME2, node, struct.pack("<QII", to, flags, 0) + name + b"\0" + new_name + b"\0")

    def open(self, node: int, flags: int) -> int:
        return self.client.open(node, flags)

    def create(self, node: int, name: bytes, flags: int, mode: int) -> tuple[int, int]:
        return self.client.create(name, flags, mode, node)

    def temporary(self, node: int, flags: int, mode: int) -> tuple[int, int]:
        data = self.client.call(Op.TMPFILE, node, struct.pack("<IIII", flags, mode, 0, 0) + b"/\0")
        return int.from_bytes(data[:8], "little"), struct.unpack_from("<Q", data, 128)[0]

    def read(self, handle: int, offset: int, size: int) -> bytes:
        return self.client.read(handle, offset, size)

    def write(self, handle: int, offset: int, data: bytes, flags: int = 0) -> int:
        return self.client.write(handle, offset, data, flags)

    def drop(self, handle: int) -> None:
        self.client.call(Op.RELEASE, 1, struct.pack("<QIIQ", handle, 0, 0, 0))

    def sync(self, handle: int, data_only: bool) -> None:
        self.client.call(Op.FSYNC, 1, struct.pack("<QII", handle, data_only, 0))

    def set(self, node: int, handle: int = 0, **fields: Any) -> None:
        """Set ``mode``, ``uid``, ``gid``, ``size``, ``atime``, ``mtime``; the last two as (seconds, nanoseconds)."""
        valid, given = Set.FH if handle else 0, {"fh": handle}
        for name, value in fields.items():
            valid |= getattr(Set, name.upper())
            given[name] = value
            if name in ("atime", "mtime"):
                valid |= getattr(Set, f"{name.upper()}_NOW") if value[1] == NOW else 0
                given[name], given[f"{name}_ns"] = value
        self.client.setattr(node, valid, **given)

    def list(self, node: int) -> list[bytes]:
        return sorted(self.client.names(node, size=4096))

    def name_max(self, node: int) -> int:
        found: int = struct.unpack_from("<5Q2I", self.client.call(Op.STATFS, node))[6]
        return found


class NineAttributes:
    """Fids, and extended attributes by 9P2000.L."""

    client: Any
    fids: Any

    def _fid(self, node: int, *names: bytes) -> int:
        fid = next(self.fids)
        assert self.client.walk(node, fid, *names) == len(names)
        return fid

    def drop(self, handle: int) -> None:
        self.client.call(120, struct.pack("<I", handle))

    def _attribute(self, node: int, key: bytes) -> bytes:
        fid = next(self.fids)
        size = int.from_bytes(self.client.call(30, struct.pack("<II", node, fid) + text(key)), "little")
        data = b""
        while piece := self.client.read(fid, len(data), 30000):
            data += piece
        assert len(data) == size
        self.drop(fid)
        return data

    def attribute(self, node: int, key: bytes) -> bytes:
        return self._attribute(node, key)

    def set_attribute(self, node: int, key: bytes, value: bytes, flags: int) -> None:
        fid = self._fid(node)
        try:
            self.client.call(32, struct.pack("<I", fid) + text(key) + struct.pack("<QI", len(value), flags))
            for at in range(0, len(value), 30000):
                self.client.write(fid, at, value[at : at + 30000])
        except nine.NineError:
            self.drop(fid)
            raise
        self.drop(fid)

    def remove_attribute(self, node: int, key: bytes) -> None:
        self.set_attribute(node, key, b"", 2)

    def attributes(self, node: int) -> list[bytes]:
        return sorted(self._attribute(node, b"").split(b"\0")[:-1])


class Nine(NineAttributes):
    """9P2000.L, as a user and group of the guest. Its nodes and open files are fids."""

    error = nine.NineError

    def __init__(self, path: Path | str, user: int = USER, group: int = GROUP, **options: Any) -> None:
        self.group = group
        self.client = nine.Client(path, **options)  # type: ignore[arg-type]
        self.fids = itertools.count(2)
        body = struct.pack("<II", 1, 0xFFFFFFFF) + text(b"guest") + text(b"") + struct.pack("<I", user)
        self.client.call(104, body)

    def close(self) -> None:
        self.client.close()

    def lookup(self, node: int, name: bytes) -> int:
        return self._fid(node, name)

    def about(self, node: int) -> list[int]:
        data = self.client.call(24, struct.pack("<IQ", node, 0x7FF))
        mode, user, group, links, device, size = struct.unpack_from("<IIIQQQ", data, 8 + 13)
        accessed, accessed_ns, modified, modified_ns = struct.unpack_from("<4q", data, 8 + 13 + 12 + 40)
        return [mode, links, user, group, size, device, accessed * 10**9 + accessed_ns, modified * 10**9 + modified_ns]

    def readlink(self, node: int) -> bytes:
        return self.client.call(22, struct.pack("<I", node))[2:]

    def mkdir(self, node: int, name: bytes, mode: int) -> int:
        self.client.call(72, struct.pack("<I", node) + text(name) + struct.pack("<II", mode, self.group))
        return self.lookup(node, name)

    def mknod(self, node: int, name: bytes, mode: int, device: int) -> int:
        numbers = struct.pack("<IIII", mode, os.major(device), os.minor(device), self.group)
        self.client.call(18, struct.pack("<I", node) + text(name) + numbers)
        return self.lookup(node, name)

    def symlink(self, node: int, name: bytes, target: bytes) -> int:
        self.client.call(16, struct.pack("<I", node) + text(name) + text(target) + struct.pack("<I", self.group))
        return self.lookup(node, name)

    def link(self, target: int, node: int, name: bytes) -> None:
        self.client.call(70, struct.pack("<II", node, target) + text(name))

    def unlink(self, node: int, name: bytes, directory: bool) -> None:
        self.client.call(76, struct.pack("<I", node) + text(name) + struct.pack("<I", 0x200 if directory else 0))

    def rename(self, node: int, name: bytes, to: int, new_name: bytes, flags: int) -> None:
        assert not flags
        self.client.call(74, struct.pack("<I", node) + text(name) + struct.pack("<I", to) + text(new_name))

    def open(self, node: int, flags: int) -> int:
        fid = self._fid(node)
        self.client.open(fid, flags)
        return fid

    def create(self, node: int, name: bytes, flags: int, mode: int) -> tuple[int, int]:
        fid = self._fid(node)
        self.client.call(14, struct.pack("<I", fid) + text(name) + struct.pack("<III", flags, mode, self.group))
        return self.lookup(node, name), fid

    def read(self, handle: int, offset: int, size: int) -> bytes:
        return self.client.read(handle, offset, size)

    def write(self, handle: int, offset: int, data: bytes, flags: int = 0) -> int:
        return self.client.write(handle, offset, data)

    def sync(self, handle: int, data_only: bool) -> None:
        self.client.call(50, struct.pack("<II", handle, data_only))

    def set(self, node: int, handle: int = 0, **fields: Any) -> None:
        bits = {"mode": 1, "uid": 2, "gid": 4, "size": 8, "atime": 0x10, "mtime": 0x20}
        valid = sum(bits[name] for name in fields)
        times = []
        for name, set_ in (("atime", 0x80), ("mtime", 0x100)):
            seconds, rest = fields.get(name, (0, NOW))
            valid |= set_ if rest != NOW else 0
            times += [seconds & (1 << 64) - 1, 0 if rest == NOW else rest]
        numbers = [fields.get(name, 0) for name in ("mode", "uid", "gid", "size")]
        self.client.call(26, struct.pack("<IIIIIQQQQQ", handle or node, valid, *numbers, *times))

    def list(self, node: int) -> list[bytes]:
        fid = self.open(node, os.O_DIRECTORY)
        found = self.client.names(fid, size=4096)
        self.drop(fid)
        return sorted(found)

    def name_max(self, node: int) -> int:
        found: int = struct.unpack_from("<IIQQQQQQI", self.client.call(8, struct.pack("<I", node)))[8]
        return found


WIRES = {"fs": Fuse, "9p": Nine}
