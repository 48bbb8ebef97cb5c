"""``virtio-cdrom``: a SCSI host (virtio 1.2, section 5.6) with one target, a CD-ROM drive."""

from __future__ import annotations

import errno
import os
import struct
import threading
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field
from attrs.validators import max_len
from cardcage.values import define, frozen
from cardcage_block.readonly import ReadOnly
from cardcage_virtio.queue.request import RingError
from cardcage_virtio.queue.workers import Workers

from cardcage_cdrom.drive import CHECK_CONDITION, GOOD, MEDIUM_ERROR, UNREADABLE, Disc, Drive, sense

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cardcage.device import Slot
    from cardcage_virtio.queue.request import Request
    from cardcage_virtio.virtio import Virtio

__all__ = ["Cdrom", "CdromOptions", "CdromState", "OpenFile", "parse_flag"]

CONTROL, EVENTS, COMMANDS = range(3)
OK, BAD_TARGET = 0, 3
CDB, SENSE = 32, 96
HEAD = struct.Struct("<IIHBB")
CONFIG = struct.Struct("<7IHHI")
PIECE = 1 << 20
"""Bytes that are read of an image at once where they do not fit a buffer of the guest's."""
TRANSFER_MAX = 64 << 20
"""Bytes of one command."""


@frozen
class CdromOptions:
    """Options of ``virtio-cdrom``.

    Attributes:
        drive: back end of kind ``block`` with the image, which is only read; empty for a drive without a disc.
        serial: up to 20 bytes that the guest can ask for.
    """

    drive: str | dict[str, Any] = ""
    serial: str = field(default="cage-cd", validator=max_len(20))


def parse_flag(text: str) -> dict[str, Any]:
    """``--cdrom FILE``. Raises ValueError."""
    if not text:
        raise ValueError("expected the path of an ISO image")
    drive = {"file": text, "format": "raw", "readonly": True}
    return {"device": [{"type": "virtio-cdrom", "drive": drive}]}


@define
class CdromState:
    """Saved state: whether a disc is in the drive, and its tray."""

    version: ClassVar[int] = 1
    loaded: bool = False
    locked: bool = False
    open: bool = False


class OpenFile(ReadOnly):
    """An image by a descriptor that somebody opened. Satisfies :class:`cardcage.backends.BlockBackend`; read only."""

    def __init__(self, fd: int) -> None:
        super().__init__(-(-os.fstat(fd).st_size // 512) * 512, "a disc")
        self._fd = fd

    def readv(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        """Fill the *buffers*, with zeros behind the file's end."""
        for one in buffers:
            done = os.preadv(self._fd, [one], offset)
            one[done:] = bytes(len(one) - done)
            offset += len(one)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


class Cdrom:
    """The controller and its drive.

    Attributes:
        drive: the drive, whose disc :meth:`change` changes.
    """

    device_id, features = 8, 0
    queue_sizes = (16, 16, 128)

    def __init__(self, options: CdromOptions) -> None:
        self.options = options
        self._sizes = [SENSE, CDB]
        self._own: OpenFile | None = None
        self._busy = threading.Lock()  # a command is carried out, or the disc is changed

    def plug(self, slot: Slot) -> None:
        self._slot = slot
        disc = Disc(slot.host.open("block", self.options.drive)) if self.options.drive else None
        self.drive = Drive(disc, self.options.serial.encode())

    def plug_virtio(self, io: Virtio) -> None:
        self._io = io
        self._workers = Workers(io, self._process, 1, self._slot.id)

    def unplug(self) -> None:
        self._workers.close()
        if self._own is not None:
            self._own.close()

    def change(self, fd: int | None, *, force: bool = False) -> None:
        """Put the image behind *fd* into the drive, which is closed with it; None ejects. Thread-safe.

        Raises ValueError where the guest has locked the tray, unless *force*.
        """
        image = None if fd is None else OpenFile(fd)
        # Draining the workers does not do: the guest's next notification would wake one, to read from a descriptor that
        # is closed here, and may be another file's by then.
        with self._busy:
            try:
                self.drive.change(None if image is None else Disc(image), force=force)
            except ValueError:
                if image is not None:
                    image.close()
                raise
            before, self._own = self._own, image
            if before is not None:
                before.close()

    # configuration

    def config(self) -> bytes:
        return CONFIG.pack(1, 126, TRANSFER_MAX // 512, 1, 0, *self._sizes, 0, 0, 0)

    def config_written(self, offset: int, data: bytes) -> None:
        """The driver chooses the sizes of sense data and commands."""
        at = {20: 0, 24: 1}.get(offset)
        value = int.from_bytes(data, "little")
        if at is not None and len(data) == 4 and (18, 12)[at] <= value <= 255:
            self._sizes[at] = value

    def stop(self) -> None:
        self._sizes = [SENSE, CDB]

    def save(self) -> CdromState:
        return CdromState(self.drive.disc is not None, self.drive.locked, self.drive.open)

    def load(self, state: CdromState) -> None:
        if not state.loaded:
            self.drive.disc = None
        self.drive.locked, self.drive.open = state.locked, state.open

    def drain(self) -> None:
        self._workers.drain()

    # requests

    def notified(self, index: int) -> None:
        if index == COMMANDS:
            self._workers.notify(index)
        elif index == CONTROL:
            ring = self._io.rings[index]
            while ring is not None:
                request = ring.pop()
                if request is not None:
                    request.done(self._control(request))
                elif not ring.rearm():
                    return

    def _control(self, request: Request) -> int:
        """Task management, and asynchronous notifications: commands are over before anybody could end them."""
        kind = int.from_bytes(request.read()[:4], "little")
        return request.write(bytes(1) if kind == 0 else bytes(5))

    def _process(self, request: Request) -> int | None:
        """Carry one command out; returns the bytes written to the guest."""
        with self._busy:
            return self._carry_out(request)

    def _carry_out(self, request: Request) -> int:
        sense_size, cdb_size = self._sizes
        head = request.read()[: 19 + cdb_size] if request.readable_size <= PIECE else b""
        room = request.writable_size - HEAD.size - sense_size
        if len(head) < 19 + cdb_size or room < 0:
            raise RingError("a SCSI request that is too short, or too long")
        target, lun = head[1], int.from_bytes(head[2:4], "big") & 0x3FFF
        if head[0] != 1 or target or lun:
            return request.write(HEAD.pack(0, 0, 0, 0, BAD_TARGET))
        answer = self.drive.execute(head[19:].ljust(16, b"\0"))
        start, status, told, moved = HEAD.size + sense_size, answer.status, answer.sense, 0
        if answer.read is not None:
            offset, size = answer.read
            moved = min(size, room, TRANSFER_MAX)
            try:
                self._read(request, start, offset, moved)
            except OSError as error:
                self._io.warn("a read of the disc failed", offset=offset, error=str(error))
                status, told, moved = CHECK_CONDITION, sense(MEDIUM_ERROR, UNREADABLE), 0
        elif answer.data:
            moved = request.write(answer.data[:room], start)
        told = told[:sense_size]
        request.write(HEAD.pack(len(told), room - moved, 0, status, OK) + told.ljust(sense_size, b"\0"))
        return start + moved if status == GOOD else start

    def _read(self, request: Request, start: int, offset: int, size: int) -> None:
        disc = self.drive.disc
        if disc is None:
            raise OSError(errno.ENOMEDIUM, "the disc is gone")
        done = 0
        while done < size:
            count = min(PIECE, size - done)
            piece = bytearray(count)
            inside = max(min(count, disc.size - offset - done) // 512 * 512, 0)
            if inside:
                disc.image.readv(offset + done, [memoryview(piece)[:inside]])
            request.write(piece, start + done)
            done += count
