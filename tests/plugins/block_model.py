"""A file that can lose power, and a model of a disk that knows which values a sector may have afterwards."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SECTOR = 512


class VolatileFile:
    """A file in memory whose writes are only safe after ``sync``; satisfies :class:`cardcage_block.hostfile.File`."""

    def __init__(self, content: bytes, path: str = "volatile.qcow2") -> None:
        self.path, self.fd, self.alignment = path, -1, 1
        self.now = bytearray(content)
        self.stable = bytearray(content)
        self.pending: list[tuple[int, bytes]] = []
        self.syncs = 0
        self.fail_sync: OSError | None = None
        self.room: int | None = None

    def read(self, offset: int, buffers: Sequence[memoryview], length: int, /) -> None:
        data = bytes(self.now[offset : offset + length]).ljust(length, b"\0")
        for buffer in buffers:
            buffer[:] = data[: len(buffer)]
            data = data[len(buffer) :]

    def write(self, offset: int, buffers: Sequence[memoryview], length: int, /) -> None:
        data = b"".join(buffers)
        assert len(data) == length
        if self.room is not None and offset + length > self.room:
            raise OSError(28, "No space left on device")
        if len(self.now) < offset:
            self.now.extend(bytes(offset - len(self.now)))
        self.now[offset : offset + length] = data
        self.pending.append((offset, data))

    def sync(self) -> None:
        if self.fail_sync is not None:
            raise self.fail_sync
        self.stable, self.pending, self.syncs = bytearray(self.now), [], self.syncs + 1

    def size(self) -> int:
        return len(self.now)

    def truncate(self, size: int, /) -> None:
        assert size >= len(self.now), "an image never shrinks while it is written"
        if self.room is not None and size > self.room:
            raise OSError(28, "No space left on device")
        self.now.extend(bytes(size - len(self.now)))

    def punch(self, offset: int, length: int, /) -> bool:
        end = min(offset + length, len(self.now))
        if offset < end:
            self.now[offset:end] = bytes(end - offset)
            self.pending.append((offset, bytes(end - offset)))
        return True

    def zero(self, offset: int, length: int, /) -> None:
        self.write(offset, [memoryview(bytes(length))], length)

    def close(self) -> None:
        self.fd = -1

    def power_cut(self, choose: random.Random) -> bytes:
        """What the platter may hold now: of each sector, any state since the last sync; of the length likewise."""
        left = bytearray(self.stable)
        versions: dict[int, list[bytes]] = {}
        for offset, data in self.pending:
            first = offset // SECTOR
            for sector in range(first, -(-(offset + len(data)) // SECTOR)):
                start = sector * SECTOR
                older = versions.get(sector, [bytes(left[start : start + SECTOR]).ljust(SECTOR, b"\0")])[-1]
                cut = bytearray(older)
                low, high = max(start, offset), min(start + SECTOR, offset + len(data))
                cut[low - start : high - start] = data[low - offset : high - offset]
                versions.setdefault(sector, []).append(bytes(cut))
        keep = choose.random()
        for sector, states in versions.items():
            if choose.random() < keep:
                start = sector * SECTOR
                if len(left) < start + SECTOR:
                    left.extend(bytes(start + SECTOR - len(left)))
                left[start : start + SECTOR] = choose.choice(states)
        if choose.random() < 0.5 and len(left) < len(self.now):
            left.extend(bytes(len(self.now) - len(left)))
        return bytes(left)


class DiskModel:
    """What a disk holds, and what each sector may hold after a crash."""

    def __init__(self, content: bytes) -> None:
        self.now = bytearray(content)
        self.flushed = bytes(content)
        self.since: dict[int, set[bytes]] = {}

    def write(self, offset: int, data: bytes) -> None:
        self.now[offset : offset + len(data)] = data
        for at in range(0, len(data), SECTOR):
            self.since.setdefault((offset + at) // SECTOR, set()).add(data[at : at + SECTOR])

    def flush(self) -> None:
        self.flushed, self.since = bytes(self.now), {}

    def settle(self, found: bytes) -> None:
        """After a crash the disk holds *found*: check that no flushed write is lost, and go on from there."""
        for sector in range(len(found) // SECTOR):
            start = sector * SECTOR
            value = found[start : start + SECTOR]
            before = self.flushed[start : start + SECTOR]
            if value != before:
                assert value in self.since.get(sector, ()), f"sector {sector} holds what was never written there"
        self.now = bytearray(found)
        self.flush()
