"""Network device (virtio 1.2, section 5.1) on any back end that satisfies :class:`cardcage.backends.NetBackend`."""

from __future__ import annotations

from hashlib import sha256
from struct import pack, unpack_from
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field
from attrs.validators import ge, in_, le, matches_re, optional
from cardcage.memory import GuestMemoryError
from cardcage.values import define, frozen

from cardcage_virtio.queue.request import RingError

if TYPE_CHECKING:
    from cardcage.backends import NetBackend
    from cardcage.device import Slot

    from cardcage_virtio.queue.request import Request, Ring
    from cardcage_virtio.virtio import Virtio

__all__ = ["Net", "NetOptions", "NetState"]

HEADER = 12
ONE = b"\1\0"
PLAIN = bytes(HEADER - 2) + ONE
FRAME_MAX = 65550 + HEADER
PLAIN_MTU = 1500
F_CSUM, F_GUEST_CSUM, F_GUEST_OFFLOADS, F_MTU, F_MAC = 0, 1, 2, 3, 5
F_MRG, F_STATUS, F_CTRL, F_ANNOUNCE, F_MQ, F_CTRL_MAC = 15, 16, 17, 21, 22, 23
TO_GUEST = {"csum": 1, "tso4": 7, "tso6": 8, "ecn": 9, "ufo": 10}
FROM_GUEST = {"csum": 0, "tso4": 11, "tso6": 12, "ecn": 13, "ufo": 14}
LINK_UP, ANNOUNCE = 1, 2
ALONE = 0.0002
"""Seconds between two notifications from which on the later one is served at once."""


@frozen
class NetOptions:
    """Options of ``virtio-net``.

    Attributes:
        net: back end of kind ``net``: text or a table.
        mac: hardware address of one station (its first byte is even); by default in QEMU's range, made from the
            machine's and the device's name; machines of one account have different names.
        queues: pairs of queues, 1 to 64. queue_size: entries of each, a power of two. packed: offer packed rings.
        mergeable: offer mergeable receive buffers. offloads: offer what the back end can take over.
        mtu: announced to the guest, 0 for not; but 1500 is, where buffers are neither mergeable nor for segments.
    """

    net: str | dict[str, Any]
    mac: str | None = field(
        default=None, validator=optional(matches_re(r"[0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5}"))
    )
    queues: int = field(default=1, validator=[ge(1), le(64)])
    queue_size: int = field(default=256, validator=in_([1 << at for at in range(2, 11)]))
    packed: bool = False
    mergeable: bool = True
    offloads: bool = True
    mtu: int = field(default=0, validator=[ge(0), le(65535)])


@define
class NetState:
    """Saved state besides the rings."""

    version: ClassVar[int] = 1
    mac: bytes = b""
    pairs: int = 1
    status: int = LINK_UP
    offloads: int = 0


class Net:
    """A network card."""

    device_id = 1

    def __init__(self, options: NetOptions) -> None:
        self.options = options
        self.queue_sizes = (options.queue_size,) * (2 * options.queues) + (64,)
        self.features = 0
        self.backend: NetBackend
        self._io: Virtio
        self._pairs, self._status, self._offloads = 1, LINK_UP, 0
        self._starved: set[int] = set()
        self._gathering: set[int] = set()
        self._last = 0.0

    def plug(self, slot: Slot) -> None:
        options = self.options
        self._slot, self.backend = slot, slot.host.open("net", options.net)
        self.mac = self._own_mac = self._address()
        offered = self.backend.features
        self._vnet = bool(offered.vnet_header)
        large = options.mergeable or (self._vnet and options.offloads and {"tso4", "tso6"} & offered.offloads)
        # Else drivers have buffers for plain frames only, and must not take a larger MTU from DHCP.
        self._mtu = options.mtu or (0 if large else PLAIN_MTU)
        bits = {F_MAC, F_STATUS, F_CTRL, F_ANNOUNCE, F_CTRL_MAC}
        bits |= {F_MRG} if options.mergeable else set()
        bits |= {F_MTU} if self._mtu else set()
        bits |= {F_MQ} if options.queues > 1 else set()
        if self._vnet and options.offloads:
            bits |= {F_GUEST_OFFLOADS}
            for name in offered.offloads & TO_GUEST.keys():
                bits |= {TO_GUEST[name], FROM_GUEST[name]}
        self.features = sum(1 << bit for bit in bits) | options.packed << 34

    def _address(self) -> bytes:
        """The configured address, or one that is made from the machine's name."""
        name = f"{self._slot.machine}/{self._slot.id}"
        text = self.options.mac or f"525400{sha256(name.encode()).hexdigest()[:6]}"
        return bytes.fromhex(text.replace(":", ""))

    def may_fork(self) -> str:
        return ""

    def forked(self) -> None:
        """The copy's own address; a driver that runs has the old one until it is started again, or is told."""
        if self.mac == self._own_mac:
            self.mac = self._own_mac = self._address()

    def plug_virtio(self, io: Virtio) -> None:
        self._io = io
        self.backend.start(self.received)

    def config(self) -> bytes:
        return self.mac + pack("<HHHIB", self._status, self.options.queues, self._mtu, 0xFFFFFFFF, 0xFF)

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out (under the machine's lock)."""
        if up != bool(self._status & LINK_UP):
            self._status ^= LINK_UP
            self._io.config_changed()

    def announce(self) -> None:
        """Ask the guest to tell the network where it is now (after a migration)."""
        if self._io.has(F_ANNOUNCE):
            self._status |= ANNOUNCE
            self._io.config_changed()

    def start(self) -> None:
        self._agree(self._io.features)
        for queue in range(self.options.queues):
            self.backend.resume(queue)

    def stop(self) -> None:
        self._pairs, self.mac = 1, self._own_mac
        self._status &= ~ANNOUNCE
        self._starved.clear()
        self._gathering.clear()

    def _agree(self, features: int) -> None:
        self._offloads = features
        self._merge = bool(features >> F_MRG & 1)
        towards = frozenset(name for name, bit in TO_GUEST.items() if features >> bit & 1)
        self.backend.set_offloads(towards, HEADER if self._vnet else 0)

    # the driver's notifications

    def notified(self, index: int) -> None:
        ring = self._io.rings[index]
        if ring is None:
            return
        if index == 2 * self.options.queues:
            self._each(ring, self._control)
        elif index & 1:
            self._transmit_soon(ring)
        elif index in self._starved:
            self._starved.discard(index)
            self.backend.resume(index >> 1)

    def _transmit_soon(self, ring: Ring) -> None:
        """Send a lone frame at once; in a stream of them let the loop thread take what has gathered.

        The driver then goes on while frames are sent, notifies once for many, and is interrupted once for many.
        """
        now = monotonic()
        alone, self._last = now - self._last > ALONE, now
        if alone:
            self._each(ring, self._transmit)
        elif ring.index not in self._gathering:
            self._gathering.add(ring.index)
            ring.silence()
            self._slot.loop.call_soon(lambda: self._io.guarded(lambda: self._transmit_gathered(ring)))

    def _transmit_gathered(self, ring: Ring) -> None:
        self._gathering.discard(ring.index)
        if self._io.rings[ring.index] is ring and self._io.live:
            self._each(ring, self._transmit)

    def _each(self, ring: Ring, handle: Any) -> None:
        ring.batching = True
        try:
            for _ in range(4 * ring.size):
                request = ring.pop()
                if request is not None:
                    handle(request)
                elif not ring.rearm():
                    return
            self._slot.loop.call_soon(
                lambda: self._io.kick(ring.index)
            )  # others get their turn while a driver keeps adding
        finally:
            ring.batching = False
            ring.signal()

    def _transmit(self, request: Request) -> None:
        parts = request.readable
        if self._status & LINK_UP and parts and request.readable_size <= FRAME_MAX + HEADER:
            if not self._vnet:
                first = len(parts[0])
                if first > HEADER:
                    parts[0] = parts[0][HEADER:]
                elif first == HEADER:
                    del parts[0]
                else:
                    parts = [memoryview(request.read())[HEADER:]]
            size = sum(map(len, parts))
            if 14 <= size <= FRAME_MAX:
                self.backend.send(request.ring.index >> 1, parts)
        request.done()

    # towards the guest

    def received(self, queue: int, frame: bytes | memoryview) -> bool:
        """A frame from the back end (vnet header first where agreed). False: no buffer, call again after resume."""
        index = 2 * (queue % self._pairs)
        io = self._io
        ring = io.rings[index]
        if io.paused:
            self._starved.add(index)
            return False
        if ring is None or not io.live or not self._status & LINK_UP:
            return True  # no driver, or no cable: the frame is lost
        try:
            if self._vnet:
                return self._deliver(ring, bytes(frame[: HEADER - 2]) + ONE, frame[HEADER:])
            return self._deliver(ring, PLAIN, frame)
        except (RingError, GuestMemoryError) as error:
            io.break_down(f"queue {index}: {error}")
            return True

    def _deliver(self, ring: Ring, header: bytes, frame: bytes | memoryview) -> bool:
        request = ring.pop()
        if request is None:
            if not ring.rearm():
                self._starved.add(ring.index)
                return False
            request = ring.pop()
            if request is None:
                return True
        size = HEADER + len(frame)
        writable = request.writable
        if len(writable) == 1 and len(writable[0]) >= size:
            view = writable[0]
            view[:HEADER] = header
            view[HEADER:size] = frame
            request.done(size)
            return True
        return self._scatter(ring, request, header, memoryview(frame))

    def _scatter(self, ring: Ring, request: Request, header: bytes, left: memoryview) -> bool:
        """Deliver into more than one part, or more than one buffer where the driver merges them."""
        size = HEADER + len(left)
        taken, room = [request], request.writable_size
        while room < size and self._merge:
            more = ring.pop()
            if more is None:
                if len(taken) == ring.size:
                    break
                if ring.rearm():  # asked before they go back: the next new buffer is what to be told of
                    continue
                for one in reversed(taken):
                    ring.unpop(one)
                self._starved.add(ring.index)
                return False
            taken.append(more)
            room += more.writable_size
        if room < size or request.writable_size < HEADER:
            for one in taken:
                one.done(0)  # too small for the frame: the driver's mistake costs it the frame
            return True
        offset = request.write(header[: HEADER - 2] + pack("<H", len(taken)))
        done = []
        for one in taken:
            written = one.write(left, offset)
            left = left[written:]
            done.append((one, offset + written))
            offset = 0
        ring.push_many(done)  # at once: a driver that sees the first expects to find all
        ring.signal()
        return True

    # the control queue

    def _control(self, request: Request) -> None:
        data = request.read() if request.readable_size <= 4096 else b""
        ok = len(data) >= 2 and self._command(data[0], data[1], data[2:])
        request.done(request.write(b"\0" if ok else b"\1"))

    def _command(self, group: int, command: int, data: bytes) -> bool:
        if (group, command) == (1, 1) and len(data) == 6:
            self.mac = data
        elif (group, command) == (3, 0):
            self._status &= ~ANNOUNCE
        elif (group, command) == (4, 0) and len(data) >= 2:
            (pairs,) = unpack_from("<H", data)
            if not 1 <= pairs <= self.options.queues:
                return False
            self._pairs = pairs
        elif (group, command) == (5, 0) and len(data) == 8 and self._io.has(F_GUEST_OFFLOADS):
            (wanted,) = unpack_from("<Q", data)
            if wanted & ~(self._io.features & sum(1 << bit for bit in TO_GUEST.values())):
                return False
            self._agree(self._io.features & ~sum(1 << bit for bit in TO_GUEST.values()) | wanted)
        else:
            return False
        return True

    # state

    def save(self) -> NetState:
        return NetState(mac=self.mac, pairs=self._pairs, status=self._status, offloads=self._offloads)

    def unchanged(self, state: NetState) -> bool:
        return not self._starved and not self._gathering and self.save() == state

    def load(self, state: NetState) -> None:
        self.mac, self._pairs, self._status = state.mac, state.pairs, state.status
