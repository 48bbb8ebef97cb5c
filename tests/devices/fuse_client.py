"""The guest's side of FUSE over a virtio-fs device, for its tests."""

from __future__ import annotations

import errno
import itertools
import os
import struct
from typing import TYPE_CHECKING, Any

import pytest
from cardcage_virtio.share import fuse
from cardcage_virtio.share.fs import Fs, FsOptions
from cardcage_virtio.share.fuse import Op
from cardcage_virtio.testing import Bench

if TYPE_CHECKING:
    from pathlib import Path


class FuseError(Exception):
    """A negative ``error``; ``code`` is its errno."""

    def __init__(self, code: int) -> None:
        super().__init__(errno.errorcode.get(code, code))
        self.code = code


def fails(code: int) -> Any:
    return pytest.raises(FuseError, match=errno.errorcode[code])


class Client:
    """The guest's side of the protocol, past ``FUSE_INIT``."""

    def __init__(
        self, path: Path, *, init: bool = True, user: int | None = None, group: int | None = None, **options: Any
    ) -> None:
        self.user = os.getuid() if user is None else user
        self.group = os.getgid() if group is None else group
        self.bench = Bench(Fs(FsOptions(path=str(path), **options)))
        self.unique = itertools.count(1)
        if init:
            data = self.call(Op.INIT, 0, struct.pack("<IIII", 7, 38, 65536, 0xFFFFFFFF))
            assert (len(data), struct.unpack_from("<II", data)) == (64, (7, 31))

    def send(self, op: int, node: int, body: bytes = b"") -> bytes:
        head = fuse.IN_HEADER.pack(40 + len(body), op, next(self.unique), node, self.user, self.group, 1, 0)
        return head + body

    def call(self, op: int, node: int = 1, body: bytes = b"", room: int = 70000) -> bytes:
        request = self.send(op, node, body)
        data = self.bench.call([request[:40], request[40:]] if body else [request], [room], queue=1)
        length, error, unique = fuse.OUT_HEADER.unpack_from(data)
        assert (length, unique) == (len(data), struct.unpack_from("<Q", request, 8)[0])
        if error:
            assert length == 16
            raise FuseError(-error)
        return data[16:]

    def lookup(self, name: bytes, node: int = 1) -> int:
        return int.from_bytes(self.call(Op.LOOKUP, node, name + b"\0")[:8], "little")

    def open(self, node: int, flags: int = 0, op: int = Op.OPEN) -> int:
        return int.from_bytes(self.call(op, node, struct.pack("<II", flags, 0))[:8], "little")

    def create(self, name: bytes, flags: int = os.O_RDWR, mode: int = 0o644, node: int = 1) -> tuple[int, int]:
        data = self.call(Op.CREATE, node, struct.pack("<IIII", flags, mode, 0, 0) + name + b"\0")
        return int.from_bytes(data[:8], "little"), struct.unpack_from("<Q", data, 128)[0]

    def read(self, handle: int, offset: int = 0, size: int = 60000) -> bytes:
        return self.call(Op.READ, 1, struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0))

    def write(self, handle: int, offset: int, data: bytes, flags: int = 0) -> int:
        body = struct.pack("<QQIIQII", handle, offset, len(data), 0, 0, flags, 0) + data
        return int.from_bytes(self.call(Op.WRITE, 1, body)[:4], "little")

    def names(self, node: int = 1, *, plus: bool = False, size: int = 200) -> dict[bytes, int]:
        handle = self.open(node, op=Op.OPENDIR)
        found: dict[bytes, int] = {}
        offset, skip = 0, 128 if plus else 0
        op = Op.READDIRPLUS if plus else Op.READDIR
        while rows := self.call(op, node, struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0)):
            while rows:
                _, offset, length, _ = fuse.DIRENT.unpack_from(rows, skip)
                name = rows[skip + 24 :][:length]
                found[name] = int.from_bytes(rows[:8], "little") if plus else 0
                rows = rows[skip + 24 + (length + 7 & ~7) :]
        self.call(Op.RELEASEDIR, node, struct.pack("<QIIQ", handle, 0, 0, 0))
        return found

    def setattr(self, node: int, valid: int, **fields: int) -> os.stat_result | bytes:
        names = "valid _ fh size _1 atime mtime _2 atime_ns mtime_ns _3 mode _4 uid gid _5".split()
        values = [valid if name == "valid" else fields.get(name, 0) for name in names]
        return self.call(Op.SETATTR, node, struct.pack("<IIQQQqqqIIIIIIII", *values))

    def forget(self, node: int, lookups: int) -> None:
        self.bench.driver(0).add([self.send(Op.FORGET, node, struct.pack("<Q", lookups))], [])
        self.bench.kick(0)
        self.bench.wait(0)

    def close(self) -> None:
        self.bench.close()
