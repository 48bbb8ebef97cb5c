"""Block device (virtio 1.2, section 5.2) on any back end that satisfies :class:`cardcage.backends.BlockBackend`.

Requests are taken and served on worker threads: see :mod:`cardcage_virtio.queue.workers`. A back end that has
``try_readv`` or ``try_writev`` gets plain reads and writes there first, on the thread that notifies.
"""

from __future__ import annotations

from functools import partial
from struct import Struct, pack
from time import perf_counter as now
from typing import TYPE_CHECKING, Any, Literal, Protocol

from attrs import field
from attrs.validators import ge, in_, le, max_len
from cardcage.abilities import has
from cardcage.backends import TryReads, TryWrites
from cardcage.errors import ConfigError, HostError, UsageError
from cardcage.segments import total
from cardcage.values import define, frozen

from cardcage_virtio.devices.blk_errors import NO_ROOM, PROBE, Patience
from cardcage_virtio.parking import HoldsNothing, ParksWorkers
from cardcage_virtio.queue.lane import MAY_READ, MAY_WRITE, MOST, OTHER, Lane, why_not
from cardcage_virtio.queue.request import RingError
from cardcage_virtio.queue.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from cardcage.device import Slot

    from cardcage_virtio.queue.request import Request, Ring
    from cardcage_virtio.virtio import Virtio

__all__ = ["Blk", "BlkOptions", "Grows", "Placed", "Plain"]

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_MQ, F_DISCARD, F_ZEROES = 2, 5, 6, 9, 10, 12, 13, 14
SECTOR, SEGMENTS, SECTORS_MAX = 512, 16, 1 << 21
FEW = 2
"""Requests from which it pays to ask where they lie in a file before native code moves them."""
AT_ONCE = 1 << 20
"""Bytes after which no further request is served before the driver hears of the last."""
header = Struct("<I4xQ").unpack_from
segment = Struct("<QII").iter_unpack


class Grows(Protocol):
    """A block back end whose disk can become larger while it is used."""

    def grow(self, size: int, /) -> None:
        """Make the disk *size* bytes long, more than now, as ``info`` says then; what is added reads as zeros. Raises
        OSError; the disk is as before then."""


class Plain(Protocol):
    """A block back end whose bytes are those of a file, at the same offsets: most requests are then served past it, by
    native code."""

    def plain(self) -> tuple[int, int, int, int, int] | None:
        """The file as it may be used now, for some requests: its descriptor; the flags by which preadv2(2) and
        pwritev2(2) take no waiting, below 0 where they may; and from where to where it may be written, in whole pages.
        A request that such a call does not serve in full goes to the back end. None when there is no such file."""

    def took(self, seconds: float, size: int, /) -> None:
        """Some such requests took so long, and wrote *size* bytes."""


class Placed(Plain, Protocol):
    """As :class:`Plain`, where the bytes lie elsewhere in the file, and not all at once."""

    def places(self, rows: Sequence[tuple[int, int, bool]], /) -> AbstractContextManager[Sequence[int | None]]:
        """Where in the file each (offset, length, to be written) of the disk lies as one run, while the block lasts;
        None for one that the back end has to serve itself."""


class ChangesHands(Protocol):
    """A block back end whose disk somebody else may open meanwhile (``cardcage_migrate.Movable``)."""

    def let_go(self) -> None:
        """Make all that was written stable, and let others have the disk. No request is under way. Raises OSError."""

    def take_back(self) -> None:
        """It is this back end's again, as it was. Raises HostError."""


@frozen
class BlkOptions:
    """Options of ``virtio-blk``.

    Attributes:
        drive: back end of kind ``block``: a file name, or a table.
        serial: up to 20 bytes that the guest can ask for.
        readonly: refuse writes even where the back end allows them.
        queues: 1 to 64. queue_size: entries of each, a power of two. packed: offer packed rings.
        threads: worker threads, 1 to 64.
        logical_block: bytes of a sector, 512 to 4096, that the guest's requests are multiples of; the drive's size has
            to be one. 0 for the drive's own.
        physical_block: bytes of a physical block, for the guest's alignment.
        optimal_io: bytes of the best request size, 0 for none to say.
        werror, rerror: when the host fails a write (flushes and discards included) or a read: ``report`` it to the
            guest, ``ignore`` it, or ``stop``: pause the machine and try again when it goes on. ``enospc`` stops where
            the host has no room, and goes on once it has, and reports all else.
    """

    drive: str | dict[str, Any]
    serial: str = field(default="", validator=max_len(20))
    readonly: bool = False
    queues: int = field(default=1, validator=[ge(1), le(64)])
    queue_size: int = field(default=256, validator=in_([1 << at for at in range(2, 11)]))
    packed: bool = False
    threads: int = field(default=2, validator=[ge(1), le(64)])
    logical_block: int = field(default=0, validator=in_([0, *(512 << at for at in range(4))]))
    physical_block: int = field(default=4096, validator=in_([512 << at for at in range(8)]))
    optimal_io: int = field(default=0, validator=ge(0))
    werror: Literal["report", "ignore", "stop", "enospc"] = "enospc"
    rerror: Literal["report", "ignore", "stop"] = "report"


@define
class Counts:
    """Requests that a disk served since it was made; two at once may count as one."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    flushes: int = 0
    failed_reads: int = 0
    failed_writes: int = 0


class Blk(ParksWorkers, HoldsNothing):
    """A disk.

    Attributes:
        counts: what it did so far.
    """

    device_id, segments = 2, True

    def __init__(self, options: BlkOptions) -> None:
        self.options = options
        self.queue_sizes = (options.queue_size,) * options.queues
        self.features = 0
        self.counts = Counts()
        self.backend: Any  # a BlockBackend, whose calls are looked up each time: they can be revoked
        self._io: Virtio
        self._workers: Workers

    def plug(self, slot: Slot) -> None:
        self._slot, options = slot, self.options
        self.backend = slot.host.open("block", options.drive)
        info = self.info = self.backend.info
        own = info.block_size if info.size % info.block_size == 0 else SECTOR
        self.block = options.logical_block or own
        if info.size % self.block:
            raise ConfigError(f"{slot.id}: the drive's {info.size} bytes are not a multiple of {self.block}")
        self._patience = Patience(slot.power, f"{slot.id}-room")
        self.readonly = options.readonly or info.readonly
        self._know(self.backend)
        bits = [F_SEG_MAX, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY]
        bits += [F_RO] * self.readonly + [F_MQ] * (options.queues > 1)
        if not self.readonly:
            bits += [F_DISCARD] * info.discard + [F_ZEROES] * info.write_zeroes
        self.features = sum(1 << bit for bit in bits) | options.packed << 34

    def _know(self, backend: Any) -> None:
        """Look what it can do besides. Raises CardError."""
        self._plain, self._placed = has(backend, Plain), has(backend, Placed)
        self._try_read, self._try_write = has(backend, TryReads), has(backend, TryWrites) and not self.readonly

    def plug_virtio(self, io: Virtio) -> None:
        self._io = io
        quick = self._quick if self._try_read or self._try_write else None
        self._lanes: list[Lane | None] = [None] * len(self.queue_sizes)
        bulk = None if (why := why_not()) else self._bulk
        if self._plain and why:
            self._slot.log.info("requests are served by Python alone", why=why)
        self._workers = Workers(io, self._process, self.options.threads, self._slot.id, quick, bulk)

    def unplug(self) -> None:
        self._patience.end()
        self._workers.close()

    # life

    def pause(self) -> None:
        """The rings are left alone by then."""

    def resume(self) -> None:
        self._patience.end()
        self._workers.retry()

    def stop(self) -> None:
        if self._patience.end():  # what it waited for is no longer asked
            self._slot.power.resume()

    def save(self) -> None:
        if kept := self._workers.kept:
            raise HostError(f"{self._slot.id}: {kept} requests wait for the host, and cannot be saved: make room first")

    def unchanged(self, state: Any) -> bool:
        return not self._workers.kept

    def load(self, state: Any) -> None:
        """Nothing is saved."""

    def config(self) -> bytes:
        info, options = self.info, self.options
        block = self.block
        physical = max(options.physical_block, block)
        return pack(
            "<QII4xIBBHIBxHIIIIIB3x",
            info.size // SECTOR,
            0,
            options.queue_size - 2,
            block,
            (physical // block).bit_length() - 1,
            0,
            max(physical // block, 1),
            options.optimal_io // block,
            1,
            options.queues,
            SECTORS_MAX,
            SEGMENTS,
            block // SECTOR,
            SECTORS_MAX,
            SEGMENTS,
            1,
        )

    def grow_drive(self, size: int, /) -> None:
        """Make the disk *size* bytes long, and tell the guest; no smaller than now. Not under the machine's lock.

        Raises UsageError for a size that cannot be, HostError where the drive has one size or the host fails it.
        """
        name = self._slot.id
        if size % self.block:
            raise UsageError(f"{name}: {size} bytes: expected a multiple of {self.block}")
        if size < self.info.size:
            raise UsageError(f"{name}: {size} bytes are less than its {self.info.size}: a disk in use only grows")
        grows = not self.readonly and has(self.backend, Grows)
        if not grows:
            raise HostError(f"{name}: its drive is only read, or is of a kind that has one size")
        try:
            if size > self.info.size:
                self.backend.grow(size)
        except OSError as error:
            raise HostError(f"{name}: {error.strerror or error}") from error
        self.info = self.backend.info
        self._slot.loop.call_soon(self._io.config_changed)

    def change_drive(self, drive: str | dict[str, Any], /) -> None:
        """Have *drive* in the place of the one that is there: the same disk to the guest, which is told nothing. Under
        the machine's lock. Raises what opening it raises, or HostError; the disk is as before then."""
        name, old = self._slot.id, self.backend
        if not has(old, ChangesHands):
            raise HostError(f"{name}: its drive is of a kind that nobody else can have meanwhile")
        if kept := self._workers.kept:
            raise HostError(f"{name}: {kept} requests wait for the host: make room first")
        self._workers.drain()
        try:
            new = self._exchanged(old, drive)
            self._know(new)
            self.backend, self.info = new, new.info
        except OSError as error:
            raise HostError(f"{name}: {error.strerror or error}") from error
        finally:
            self._io.guarded(partial(_kick_all, self._io, len(self.queue_sizes)))

    def _exchanged(self, old: Any, drive: str | dict[str, Any]) -> Any:
        """The back end of *drive*, which *old* has let go for."""

        def fits(new: Any) -> None:
            if new.info.size != self.info.size or (new.info.readonly and not self.readonly):
                raise HostError(f"{self._slot.id}: {drive}: expected {self.info.size} bytes that can be written")

        try:
            old.let_go()
            return self._slot.host.open("block", drive, instead=old, fits=fits)
        except BaseException:
            old.take_back()
            raise

    def notified(self, index: int) -> None:
        self._workers.notify(index)

    def drain(self) -> None:
        self._workers.drain()

    # requests

    def _bulk(self, ring: Ring) -> int:
        """Serve what native code can."""
        if not self._plain:
            return OTHER
        found = self._lanes[ring.index]
        if found is None or found.ring is not ring:
            found = self._lanes[ring.index] = Lane.of(ring, self._slot.memory)
        try:
            file = self.backend.plain() if found is not None else None
        except OSError:  # it was revoked: each request is told
            return OTHER
        if found is None or file is None or (self._placed and found.ring.waiting < FEW):
            return OTHER
        lane = found.lane
        lane.fd, reads, writes, lane.write_low, high = file
        lane.write_high = max(high, 0)
        may_write = writes >= 0 and not self.readonly and self._io.has(F_FLUSH)
        lane.may = MAY_READ * (reads >= 0) | MAY_WRITE * may_write
        lane.read_flags, lane.write_flags = reads, writes
        lane.bytes, lane.mask, lane.budget = self.info.size, self.block - 1, AT_ONCE
        began, before = now(), self.counts.written_bytes
        try:
            why = found.serve(MOST, self._count, self.backend.places if self._placed else None)
        except OSError:  # as above
            return OTHER
        if written := self.counts.written_bytes - before:
            self.backend.took(now() - began, written)
        return why

    def _count(self, lane: Any) -> None:
        counts = self.counts
        counts.reads += lane.reads
        counts.read_bytes += lane.read_bytes
        counts.writes += lane.writes
        counts.written_bytes += lane.write_bytes

    def _quick(self, request: Request) -> int | None:
        """Serve a plain read whose bytes the host has at hand, or a plain write that it takes at once."""
        readable, writable = request.readable, request.writable
        if not readable or len(readable[0]) != 16 or not writable or len(writable[-1]) != 1:
            return None
        kind, sector = header(readable[0])
        written = 1
        try:
            if kind == IN and len(readable) == 1 and self._try_read:
                target = writable[:-1]
                size = total(target)
                if self._check(sector, size) != OK:
                    return None
                if not self.backend.try_readv(sector * SECTOR, target):
                    return None
                written += size
                self.counts.reads += 1
                self.counts.read_bytes += size
            elif kind == OUT and len(writable) == 1 and self._try_write and self._io.has(F_FLUSH):
                source = readable[1:]
                size = total(source)
                if self._check(sector, size) != OK:
                    return None
                if not self.backend.try_writev(sector * SECTOR, source):
                    return None
                self.counts.writes += 1
                self.counts.written_bytes += size
            else:
                return None
        except OSError:  # the worker meets it again, and reports it
            return None
        writable[-1][0] = OK
        return written

    def _process(self, request: Request) -> int | None:
        """Serve one; returns the bytes written to the guest, its status byte included; None to try again later."""
        readable, writable = request.readable, request.writable
        if not writable or not readable:
            raise RingError("a block request without header or status")
        if len(readable[0]) == 16:
            kind, sector = header(readable[0])
            source = readable[1:]
        else:
            kind, sector, source = self._loose_header(readable)
        if len(writable[-1]) == 1:
            status, target = writable[-1], writable[:-1]
        else:
            status, target = writable[-1][-1:], [*writable[:-1], writable[-1][:-1]]
        size = 0
        try:
            if kind == IN:
                size = total(target)
                code = self._check(sector, size)
                if code == OK:
                    self.backend.readv(sector * SECTOR, target)
                    self.counts.reads += 1
                    self.counts.read_bytes += size
            elif kind == OUT:
                length = total(source)
                code = IOERR if self.readonly else self._check(sector, length)
                if code == OK:
                    self.backend.writev(sector * SECTOR, source)
                    if not self._io.has(F_FLUSH):
                        self.backend.flush()
                    self.counts.writes += 1
                    self.counts.written_bytes += length
            elif kind == FLUSH:
                self.backend.flush()
                self.counts.flushes += 1
                code = OK
            elif kind == GET_ID:
                size = total(target)
                code = OK if size >= 20 else IOERR
                request.write(self.options.serial.encode()[:20].ljust(20, b"\0")[:size])
            elif kind in (DISCARD, WRITE_ZEROES):
                code = self._ranges(kind, b"".join(source))
            else:
                code = UNSUPP
        except OSError as error:
            policy = self.options.rerror if kind == IN else self.options.werror
            room = error.errno in NO_ROOM
            if policy == "stop" or (policy == "enospc" and room):
                again = self._attempt(kind, sector, source) if room else None
                self._patience.begin(f"the host failed a block request: {error.strerror or error}", again)
                return None
            if kind == IN:
                self.counts.failed_reads += 1
            else:
                self.counts.failed_writes += 1
            self._io.warn("block request failed", type=kind, sector=sector, error=str(error))
            code = OK if policy == "ignore" else IOERR
            size = total(target)
        status[0] = code
        return size + 1

    def _attempt(self, kind: int, sector: int, source: Sequence[memoryview]) -> Callable[[], object]:
        """Return what tells if a request that found no room finds some now. It writes what the request writes."""
        if kind == OUT:
            data = b""
            for part in source:
                data += bytes(part[: PROBE - len(data)])
            return partial(self.backend.writev, sector * SECTOR, [memoryview(data)])
        if kind == FLUSH:
            return self.backend.flush  # type: ignore[no-any-return]  # of a back end
        return partial(self._ranges, kind, b"".join(source))

    @staticmethod
    def _loose_header(readable: Sequence[memoryview]) -> tuple[int, int, list[memoryview]]:
        """Header and data of a request whose header is not a descriptor of its own."""
        start = b"".join(bytes(part[:16]) for part in readable[:16])[:16]
        if len(start) < 16:
            raise RingError(f"a block request with a header of {len(start)} bytes")
        left, source = 16, []
        for part in readable:
            if left < len(part):
                source.append(part[left:])
            left = max(left - len(part), 0)
        kind, sector = header(start)
        return kind, sector, source

    def _check(self, sector: int, size: int) -> int:
        at, block = sector * SECTOR, self.block
        return IOERR if size % block or at % block or at + size > self.info.size else OK

    def _ranges(self, kind: int, data: bytes) -> int:
        offered = self._io.has(F_DISCARD if kind == DISCARD else F_ZEROES)
        if not offered:
            return UNSUPP
        if not data or len(data) % 16 or len(data) > 16 * SEGMENTS:
            return IOERR
        rows = list(segment(data))
        for sector, count, flags in rows:
            if flags & (~1 if kind == WRITE_ZEROES else ~0):
                return UNSUPP
            if count > SECTORS_MAX or self._check(sector, count * SECTOR) != OK:
                return IOERR
        for sector, count, flags in rows:
            if kind == DISCARD:
                self.backend.discard(sector * SECTOR, count * SECTOR)
            else:
                self.backend.write_zeroes(sector * SECTOR, count * SECTOR, unmap=bool(flags & 1))
        return OK


def _kick_all(io: Virtio, count: int) -> None:
    for index in range(count):
        io.kick(index)
