"""The guest's side of 9P2000.L over a virtio-9p device, for its tests."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Any

import pytest
from cardcage_virtio.share.p9 import P9, P9Options
from cardcage_virtio.share.p9_wire import text
from cardcage_virtio.testing import Bench

if TYPE_CHECKING:
    from pathlib import Path


class NineError(Exception):
    """An Rlerror; ``code`` is its errno."""

    def __init__(self, code: int) -> None:
        super().__init__(errno.errorcode.get(code, code))
        self.code = code


class Client:
    """The guest's side of the protocol."""

    def __init__(self, path: Path, *, packed: bool = False, **options: Any) -> None:
        self.bench = Bench(P9(P9Options(path=str(path), **options)), packed=packed)
        assert self.call(100, struct.pack("<I", 65536) + text(b"9P2000.L"))[4:] == text(b"9P2000.L")
        self.attach(0)

    def call(self, kind: int, body: bytes, room: int = 65536) -> bytes:
        data = self.bench.call([struct.pack("<IBH", 7 + len(body), kind, 9) + body], [room])
        size, answer, tag = struct.unpack_from("<IBH", data)
        assert (size, tag) == (len(data), 9)
        if answer == 7:
            raise NineError(struct.unpack_from("<I", data, 7)[0])
        assert answer == kind + 1
        return data[7:]

    def attach(self, fid: int) -> bytes:
        return self.call(104, struct.pack("<II", fid, 0xFFFFFFFF) + text(b"root") + text(b"") + bytes(4))

    def walk(self, fid: int, new: int, *names: bytes) -> int:
        body = struct.pack("<IIH", fid, new, len(names)) + b"".join(map(text, names))
        return int.from_bytes(self.call(110, body)[:2], "little")

    def open(self, fid: int, flags: int = 0) -> None:
        self.call(12, struct.pack("<II", fid, flags))

    def create(self, fid: int, name: bytes, flags: int = os.O_RDWR, mode: int = 0o644) -> None:
        self.call(14, struct.pack("<I", fid) + text(name) + struct.pack("<III", flags, mode, 0))

    def read(self, fid: int, offset: int = 0, count: int = 60000) -> bytes:
        data = self.call(116, struct.pack("<IQI", fid, offset, count))
        assert len(data) == 4 + int.from_bytes(data[:4], "little")
        return data[4:]

    def write(self, fid: int, offset: int, data: bytes) -> int:
        return int.from_bytes(self.call(118, struct.pack("<IQI", fid, offset, len(data)) + data), "little")

    def names(self, fid: int, size: int = 200) -> list[bytes]:
        found: list[bytes] = []
        offset = 0
        while rows := self.call(40, struct.pack("<IQI", fid, offset, size))[4:]:
            while rows:
                offset, _, length = struct.unpack_from("<QBH", rows, 13)
                found.append(rows[24 : 24 + length])
                rows = rows[24 + length :]
        return found

    def fails(self, code: int) -> Any:
        return pytest.raises(NineError, match=errno.errorcode[code])

    def close(self) -> None:
        self.bench.close()
