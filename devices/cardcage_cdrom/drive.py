"""A CD-ROM drive by its commands: SPC-4 and MMC-6, as much of them as systems and firmware use.

A command is bytes, and so is what comes of it; nothing here knows how they travel.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.backends import BlockBackend

__all__ = ["SECTOR", "Answer", "Disc", "Drive"]

SECTOR = 2048
GOOD, CHECK_CONDITION = 0, 2
NOT_READY, MEDIUM_ERROR, ILLEGAL, ATTENTION = 2, 3, 5, 6
"""Sense keys."""
NO_MEDIUM_CLOSED, NO_MEDIUM_OPEN = (0x3A, 1), (0x3A, 2)
UNKNOWN, OUT_OF_RANGE, INVALID_FIELD, CHANGED, LOCKED, UNREADABLE = (
    (0x20, 0),
    (0x21, 0),
    (0x24, 0),
    (0x28, 0),
    (0x53, 2),
    (0x11, 0),
)
"""Additional sense codes and their qualifiers."""
VENDOR, PRODUCT, REVISION = b"CARDCAGE", b"CD-ROM".ljust(16), b"1.0 "
CD_PROFILE, DVD_PROFILE = 8, 0x10
LARGEST_CD = 360_000
"""Sectors from which on a disc is a DVD: 80 minutes."""


class Answer(NamedTuple):
    """How a command ended.

    Attributes:
        status: SAM status. sense: sense data of a CHECK CONDITION. data: for the host, not longer than it asked for.
        read: instead of *data*: byte offset and size on the disc.
    """

    status: int = GOOD
    sense: bytes = b""
    data: bytes = b""
    read: tuple[int, int] | None = None


class Disc:
    """The disc in the drive.

    Attributes:
        image: the bytes. sectors: of 2048 bytes, a last one that is not whole included.
    """

    def __init__(self, image: BlockBackend) -> None:
        self.image, self.size = image, image.info.size
        self.sectors = -(-self.size // SECTOR)


def sense(key: int, code: tuple[int, int]) -> bytes:
    """Sense data in the fixed format (SPC-4, 4.5.3)."""
    return struct.pack(">BxB4xB4xBB4x", 0x70, key, 10, *code)


def check(key: int, code: tuple[int, int]) -> Answer:
    """A CHECK CONDITION."""
    return Answer(CHECK_CONDITION, sense(key, code))


class Drive:
    """The drive. Thread-safe.

    Attributes:
        disc: what lies in it; None for nothing. locked: the host forbade to eject it. open: the tray is out.
    """

    def __init__(self, disc: Disc | None, serial: bytes = b"cage-cd") -> None:
        self.disc, self._serial = disc, serial
        self.locked = self.open = False
        self._lock = threading.RLock()
        self._attention = self._event = 0
        self._commands: dict[int, Callable[[bytes], Answer]] = {
            0x00: lambda cdb: self._ready() or Answer(),
            0x03: lambda cdb: Answer(data=sense(0, (0, 0))[: cdb[4]]),
            0x12: self._inquiry,
            0x1A: lambda cdb: self._mode(cdb[2], cdb[4], 4),
            0x1B: self._start_stop,
            0x1E: self._prevent,
            0x25: self._capacity,
            0x28: lambda cdb: self._read(int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[7:9], "big")),
            0x2F: lambda cdb: self._ready() or Answer(),
            0x43: self._toc,
            0x46: self._configuration,
            0x4A: self._event_status,
            0x51: self._disc_information,
            0x5A: lambda cdb: self._mode(cdb[2], int.from_bytes(cdb[7:9], "big"), 8),
            0xA0: lambda cdb: Answer(data=struct.pack(">I12x", 8)[: struct.unpack_from(">I", cdb, 6)[0]]),
            0xA8: lambda cdb: self._read(int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[6:10], "big")),
            0xBD: lambda cdb: Answer(data=bytes(8)[: struct.unpack_from(">H", cdb, 8)[0]]),
        }

    def change(self, disc: Disc | None, *, force: bool = False) -> Disc | None:
        """Put *disc* in, or nothing; returns what was in it. Raises ValueError where the host has locked the tray.

        Args:
            force: whether or not it has.
        """
        with self._lock:
            if self.locked and not force and self.disc is not None:
                raise ValueError("the guest has locked the tray: unmount the disc there")
            before, self.disc = self.disc, disc
            self.open, self.locked = disc is None, False
            self._attention, self._event = int(disc is not None), 2 if disc is not None else 3
            return before

    def execute(self, cdb: bytes) -> Answer:
        """Carry a command out: at least 12 bytes, of which its length needs to be there."""
        with self._lock:
            code = cdb[0]
            if self._attention and code not in (0x03, 0x12, 0x46, 0x4A, 0xA0):
                self._attention = 0
                return check(ATTENTION, CHANGED)
            command = self._commands.get(code)
            return check(ILLEGAL, UNKNOWN) if command is None else command(cdb)

    def _ready(self) -> Answer | None:
        if self.disc is None:
            return check(NOT_READY, NO_MEDIUM_OPEN if self.open else NO_MEDIUM_CLOSED)
        return None

    def _inquiry(self, cdb: bytes) -> Answer:
        size = struct.unpack_from(">H", cdb, 3)[0]
        if not cdb[1] & 1:
            if cdb[2]:
                return check(ILLEGAL, INVALID_FIELD)
            return Answer(data=(struct.pack(">8B", 5, 0x80, 5, 2, 31, 0, 0, 2) + VENDOR + PRODUCT + REVISION)[:size])
        name = VENDOR + PRODUCT + self._serial
        pages = {
            0x00: bytes([0x00, 0x80, 0x83]),
            0x80: self._serial,
            0x83: bytes([2, 1, 0, len(name)]) + name,
        }
        page = pages.get(cdb[2])
        if page is None:
            return check(ILLEGAL, INVALID_FIELD)
        return Answer(data=(bytes([5, cdb[2], 0, len(page)]) + page)[:size])

    def _mode(self, page: int, size: int, head: int) -> Answer:
        if page >> 6 == 3 or page & 0x3F not in (0x2A, 0x3F):
            return check(ILLEGAL, INVALID_FIELD)
        # reads CD-R, CD-RW and DVD-ROM; can be locked, ejects, has a tray (MMC-3, 5.5.10)
        found = struct.pack(">BBBBBBBBHHHH", 0x2A, 18, 0x0B, 0, 0x71, 0, 0x29 | self.locked << 1, 0, 706, 2, 512, 706)
        found += bytes(4)
        medium = 0x70 if self.disc is None else 0x01
        if head == 4:
            return Answer(data=(bytes([len(found) + 3, medium, 0, 0]) + found)[:size])
        return Answer(data=(struct.pack(">HB5x", len(found) + 6, medium) + found)[:size])

    def _start_stop(self, cdb: bytes) -> Answer:
        if cdb[4] & 2:
            if cdb[4] & 1:
                self.open = False
            elif self.locked and self.disc is not None:
                return check(ILLEGAL, LOCKED)
            else:
                self.disc, self.open, self._event = None, True, 3
        return Answer()

    def _prevent(self, cdb: bytes) -> Answer:
        self.locked = bool(cdb[4] & 1)
        return Answer()

    def _capacity(self, cdb: bytes) -> Answer:
        if self.disc is None or not self.disc.sectors:
            return self._ready() or check(MEDIUM_ERROR, UNREADABLE)
        return Answer(data=struct.pack(">II", min(self.disc.sectors - 1, 0xFFFFFFFF), SECTOR))

    def _read(self, sector: int, count: int) -> Answer:
        if self.disc is None:
            return check(NOT_READY, NO_MEDIUM_OPEN if self.open else NO_MEDIUM_CLOSED)
        if sector + count > self.disc.sectors:
            return check(ILLEGAL, OUT_OF_RANGE)
        return Answer(read=(sector * SECTOR, count * SECTOR))

    def _toc(self, cdb: bytes) -> Answer:
        if self.disc is None:
            return self._ready() or Answer()
        size, msf, form = struct.unpack_from(">H", cdb, 7)[0], cdb[1] & 2, cdb[2] & 0xF or cdb[9] >> 6

        def at(sector: int) -> bytes:
            if not msf:
                return struct.pack(">I", sector)
            minutes, left = divmod(min(sector + 150, 99 * 4500 + 4499), 4500)
            return bytes([0, minutes, left // 75, left % 75])

        if form == 0 and cdb[6] in (0, 1, 0xAA):
            tracks = b"" if cdb[6] == 0xAA else bytes([0, 0x14, 1, 0]) + at(0)
            data = tracks + bytes([0, 0x14, 0xAA, 0]) + at(self.disc.sectors)
        elif form == 1:
            data = bytes([0, 0x14, 1, 0]) + at(0)
        else:
            return check(ILLEGAL, INVALID_FIELD)
        return Answer(data=(struct.pack(">HBB", len(data) + 2, 1, 1) + data)[:size])

    def _configuration(self, cdb: bytes) -> Answer:
        size = struct.unpack_from(">H", cdb, 7)[0]
        dvd = self.disc is not None and self.disc.sectors > LARGEST_CD
        profile = 0 if self.disc is None else DVD_PROFILE if dvd else CD_PROFILE
        profiles = struct.pack(">HBBHBBHBB", 0, 3, 8, DVD_PROFILE, dvd, 0, CD_PROFILE, profile == CD_PROFILE, 0)
        return Answer(data=(struct.pack(">IHH", len(profiles) + 4, 0, profile) + profiles)[:size])

    def _event_status(self, cdb: bytes) -> Answer:
        size = struct.unpack_from(">H", cdb, 7)[0]
        if not cdb[1] & 1:  # only polled
            return check(ILLEGAL, INVALID_FIELD)
        if not cdb[4] & 0x10:
            return Answer(data=struct.pack(">HBB", 2, 0x80, 0x10)[:size])
        event, self._event = self._event, 0
        status = (self.disc is not None) << 1 | self.open
        return Answer(data=struct.pack(">HBBBBBB", 6, 4, 0x10, event, status, 0, 0)[:size])

    def _disc_information(self, cdb: bytes) -> Answer:
        if self.disc is None:
            return self._ready() or Answer()
        size = struct.unpack_from(">H", cdb, 7)[0]
        return Answer(data=(struct.pack(">HBBBBBB", 32, 0x0E, 1, 1, 1, 1, 0x20) + bytes(26))[:size])
