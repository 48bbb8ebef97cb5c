"""The driver's side of virtio, for tests and benchmarks of devices: no guest, no machine.

    bench = Bench(Rng(RngOptions()))
    bench.driver(0).add([], [16])
    bench.kick(0)
    (token, data), = bench.driver(0).used()

:class:`Driver` is the driver's half of one queue, split or packed, on any guest memory.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from typing import TYPE_CHECKING, Any

from cardcage.abilities import near_misses
from cardcage.memory import PhysicalMemory, RamBlock, RamRange
from cardcage.ram import Memfd
from cardcage_testing import TestSlot

from cardcage_virtio.device import OPTIONAL, VirtioDevice
from cardcage_virtio.virtio import COMMON, F_EVENT_IDX, F_PACKED, Virtio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage.memory import GuestMemory

__all__ = ["Bench", "Driver", "ram"]

NEXT, WRITE, INDIRECT = 1, 2, 4


def ram(size: int, *, shared: bool = False) -> PhysicalMemory:
    """Guest memory of *size* bytes from address 0."""
    memory = PhysicalMemory()
    memory.add(RamRange(0, size, RamBlock(size, backend=Memfd() if shared else None)))
    return memory


class Driver:
    """The driver's half of a queue.

    Args:
        memory: guest memory. base: page-aligned address of free memory; rings, then buffers, go there.
        size: ring entries. room: bytes from *base* that it may use.
        packed, event_index, indirect: the form of ring that was agreed.
    """

    def __init__(
        self,
        memory: GuestMemory,
        base: int,
        size: int,
        *,
        room: int = 1 << 20,
        packed: bool = False,
        event_index: bool = True,
        indirect: bool = False,
    ) -> None:
        self.memory, self.size, self.packed, self.event_index, self.indirect = (
            memory,
            size,
            packed,
            event_index,
            indirect,
        )
        self.table = base
        self.driver = self.table + 16 * size
        self.device = (self.driver + 6 + 2 * size + 3) & ~3
        self._free_memory = (self.device + 6 + 8 * size + 4095) & ~4095
        self._end = base + room
        memory.write(base, bytes(self._free_memory - base))
        self._recycled: dict[int, list[int]] = {}
        self.adopt(memory)
        self._free = deque(range(size))
        self._held: dict[int, tuple[list[int], list[tuple[int, int]], list[tuple[int, int]]]] = {}
        self._made = self._seen = self._kicked = 0
        self._at, self._wrap, self._used_at, self._used_wrap = 0, 1, 0, 1

    def adopt(self, memory: GuestMemory) -> None:
        """Go on in *memory*, which holds the same bytes at the same addresses (a machine's state was loaded)."""
        self.memory, size = memory, self.size
        self._table = memory.view(self.table, 16 * size)
        self._table16 = self._table.cast("H")
        self._driver16 = memory.view(self.driver, 6 + 2 * size & ~1).cast("H")
        self._device_view = memory.view(self.device, 6 + 8 * size)
        self._device16 = self._device_view[: len(self._device_view) & ~1].cast("H")

    def place(self, size: int) -> int:
        """Address of a buffer of *size* bytes."""
        kept = self._recycled.get(size)
        if kept:
            return kept.pop()
        address = self._free_memory
        self._free_memory += (size + 15) & ~15
        if self._free_memory > self._end:
            raise MemoryError("the driver's room is used up")
        return address

    @property
    def free(self) -> int:
        """Ring entries not in use."""
        return len(self._free)

    def add(self, readable: Sequence[bytes] = (), writable: Sequence[int] = ()) -> int:
        """Make a buffer available: bytes for the device, then sizes that it may write; returns its token."""
        parts = [(self.place(len(data)), len(data), 0) for data in readable]
        for (address, _, _), data in zip(parts, readable, strict=True):
            self.memory.write(address, data)
        parts += [(self.place(size), size, WRITE) for size in writable]
        return self.add_raw(parts)

    def add_raw(self, parts: Sequence[tuple[int, int, int]]) -> int:
        """Make ``(address, length, flags)`` descriptors available as they are; returns the buffer's token."""
        held = [(address, length) for address, length, flags in parts]
        wanted = [(address, length) for address, length, flags in parts if flags & WRITE]
        if self.indirect:
            table = self.place(16 * len(parts))
            rows = b""
            for at, (address, length, flags) in enumerate(parts):
                more = 0 if self.packed or at == len(parts) - 1 else NEXT
                rows += struct.pack("<QIHH", address, length, *((0, flags) if self.packed else (flags | more, at + 1)))
            self.memory.write(table, rows)
            held.append((table, len(rows)))
            parts = [(table, len(rows), INDIRECT)]
        return (self._add_packed if self.packed else self._add_split)(parts, held, wanted)

    def _add_split(
        self, parts: Sequence[tuple[int, int, int]], held: list[tuple[int, int]], wanted: list[tuple[int, int]]
    ) -> int:
        if len(self._free) < len(parts):
            raise MemoryError("the ring is full")
        slots = [self._free.popleft() for _ in parts]
        for at, (slot, (address, length, flags)) in enumerate(zip(slots, parts, strict=True)):
            last = at == len(parts) - 1
            following = 0 if last else slots[at + 1]
            struct.pack_into(
                "<QIHH", self._table, 16 * slot, address, length, flags if last else flags | NEXT, following
            )
        self._held[slots[0]] = (slots, held, wanted)
        self._driver16[2 + self._made % self.size] = slots[0]
        self._made = self._made + 1 & 0xFFFF
        self._driver16[1] = self._made
        return slots[0]

    def _add_packed(
        self, parts: Sequence[tuple[int, int, int]], held: list[tuple[int, int]], wanted: list[tuple[int, int]]
    ) -> int:
        if len(self._free) < len(parts):
            raise MemoryError("the ring is full")
        slots = [self._free.popleft() for _ in parts]
        id, head, head_flags = slots[0], self._at, 0
        for at, (address, length, flags) in enumerate(parts):
            flags |= NEXT if at < len(parts) - 1 else 0
            flags |= 1 << 7 if self._wrap else 1 << 15
            struct.pack_into("<QIH", self._table, 16 * self._at, address, length, id)
            if at:
                self._table16[8 * self._at + 7] = flags
            else:
                head_flags = flags
            self._at += 1
            if self._at == self.size:
                self._at, self._wrap = 0, self._wrap ^ 1
        self._table16[8 * head + 7] = head_flags
        self._held[id] = (slots, held, wanted)
        return id

    def wants_kick(self) -> bool:
        """True if the device asked to be notified of the requests added since the last call."""
        if self.packed:
            return self._device16[1] != 1
        before, self._kicked = self._kicked, self._made
        if self.event_index:
            event = self._device16[2 + 4 * self.size]
            return (self._made - event - 1) & 0xFFFF < (self._made - before) & 0xFFFF
        return not self._device16[0] & 1

    def want_interrupts(self, wanted: bool = True) -> None:
        """Ask for an interrupt at the next used buffer, or for none."""
        if self.packed:
            self._driver16[1] = 0 if wanted else 1
        elif self.event_index:
            self._driver16[2 + self.size] = self._seen if wanted else self._seen - 1 & 0xFFFF
        else:
            self._driver16[0] = 0 if wanted else 1

    def used(self) -> list[tuple[int, bytes]]:
        """Buffers that came back: ``(token, bytes the device says it wrote)``."""
        return [
            (token, b"".join(self.memory.read(*area) for area in self._clip(wanted, written)))
            for token, written, wanted in self.collect()
        ]

    @staticmethod
    def _clip(areas: list[tuple[int, int]], written: int) -> list[tuple[int, int]]:
        found = []
        for address, length in areas:
            found.append((address, min(length, written)))
            written -= found[-1][1]
        return found

    def collect(self) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """Buffers that came back: ``(token, written, writable areas)``."""
        found = []
        while (entry := self._next_used()) is not None:
            token, written = entry
            slots, held, wanted = self._held.pop(token)
            self._free.extend(slots)
            for address, length in held:
                self._recycled.setdefault(length, []).append(address)
            found.append((token, written, wanted))
        if not self.packed and self.event_index:
            self._driver16[2 + self.size] = self._seen
        return found

    def _next_used(self) -> tuple[int, int] | None:
        if self.packed:
            flags = self._table16[8 * self._used_at + 7]
            if flags >> 7 & 1 != self._used_wrap or flags >> 15 != self._used_wrap:
                return None
            written, id = struct.unpack_from("<IH", self._table, 16 * self._used_at + 8)
            self._used_at += 1 if self.indirect else len(self._held[id][0])
            if self._used_at >= self.size:
                self._used_at, self._used_wrap = self._used_at - self.size, self._used_wrap ^ 1
            return id, written
        if self._device16[1] == self._seen:
            return None
        token, written = struct.unpack_from("<II", self._device_view, 4 + 8 * (self._seen % self.size))
        self._seen = self._seen + 1 & 0xFFFF
        return token, written


class Bench:
    """A virtio device with a driver in front of it, past DRIVER_OK.

    Raises AssertionError for a method that is nearly called as one that is looked for (``drian`` for ``drain``).

    Args:
        device: the author's object. features: bits that the driver accepts of those on offer (those of the ring are
            added). size: of each queue, at most. shared: make memory a memfd. start: go on to DRIVER_OK.
        vm: the accelerator's VM with its ``capabilities``, where the device asks for some.
    """

    def __init__(
        self,
        device: Any,
        *,
        features: int = (1 << 64) - 1,
        packed: bool = False,
        event_index: bool = True,
        indirect: bool = False,
        size: int = 256,
        memory: int = 64 << 20,
        shared: bool = False,
        backends: dict[str, Any] | None = None,
        start: bool = True,
        vm: Any = None,
    ) -> None:
        misses = near_misses(device, (VirtioDevice, *OPTIONAL))
        assert not misses, f"{type(device).__name__}: {'; '.join(misses)}"
        self.device, self.memory = device, ram(memory, shared=shared)
        self.slot = TestSlot(memory=self.memory)
        self.slot.host.opened = backends if backends is not None else {}
        self.slot.interrupts.vm = vm or self.slot.interrupts.vm
        self.interrupts: list[int] = []
        self.config_interrupts = 0
        self.virtio = Virtio(device, self)
        if packed:
            self.virtio.offered |= F_PACKED
        try:
            self.virtio.plug(self.slot)
        except BaseException:
            self.slot.close()
            self.memory.close()
            raise
        self.virtio.offered |= F_PACKED if packed else 0
        self._form = {"packed": packed, "event_index": event_index, "indirect": indirect}
        self._size, self._features = size, features
        self.drivers: dict[int, Driver] = {}
        if start:
            self.start()

    def start(self) -> None:
        """Reset, negotiate, set all queues up, DRIVER_OK."""
        virtio = self.virtio
        virtio.set_status(0)
        virtio.set_status(3)
        wanted = self._features | COMMON
        wanted &= ~(0 if self._form["packed"] else F_PACKED) & ~(0 if self._form["event_index"] else F_EVENT_IDX)
        virtio.driver_features = virtio.offered & wanted
        virtio.set_status(11)
        room = (self.memory.slots[0].size - 4096) // max(len(virtio.queues), 1) & ~4095
        for index, queue in enumerate(virtio.queues):
            queue.size = min(self._size, queue.maximum)
            driver = Driver(self.memory, 4096 + room * index, queue.size, room=room, **self._form)
            queue.table, queue.driver, queue.device = driver.table, driver.driver, driver.device
            self.drivers[index] = driver
            virtio.enable(index)
        virtio.set_status(15)

    def moved(self, device: Any, *, backends: dict[str, Any] | None = None, through: Callable[[Any], Any]) -> Bench:
        """Another bench, whose *device* goes on from this one's state, as in a machine that is restored.

        The memory is copied, and the drivers go along with what they have in flight; this bench's are of no use then.

        Args:
            backends: of the new device. through: takes a saved state and gives what is loaded, such as by way of JSON.
        """
        self.virtio.pause()
        state = through(self.virtio.save())
        size = sum(one.size for one in self.memory.slots)
        made = Bench(
            device,
            features=self._features,
            size=self._size,
            memory=size,
            backends=backends,
            start=False,
            vm=self.slot.interrupts.vm,
            **self._form,
        )
        for one in self.memory.slots:
            made.memory.write(one.address, self.memory.read(one.address, one.size))
        made.slot.clock.skip(self.slot.clock.now())
        made.drivers = dict(self.drivers)
        for driver in made.drivers.values():
            driver.adopt(made.memory)
        made.virtio.load(state)
        made.virtio.resume()
        return made

    def queue_interrupt(self, index: int) -> None:
        self.interrupts.append(index)

    def config_interrupt(self) -> None:
        self.config_interrupts += 1

    def connect(self, index: int, kick: int, call: int) -> None:
        """A back end outside this process took the queue: what transports do, with interrupts read in ``poll``."""
        self._outside = {**getattr(self, "_outside", {}), index: kick}

        def called() -> None:
            os.eventfd_read(call)
            self.interrupts.append(index)

        self.slot.loop.add_reader(call, called)
        self._called = {**getattr(self, "_called", {}), index: call}

    def disconnect(self, index: int) -> None:
        """Undo :meth:`connect`."""
        self._outside.pop(index)
        self.slot.loop.remove_reader(self._called.pop(index))

    def driver(self, index: int = 0) -> Driver:
        return self.drivers[index]

    def kick(self, index: int = 0) -> None:
        """Notify the device of queue *index*, as the transport would."""
        outside: dict[int, int] = getattr(self, "_outside", {})
        with self.slot.loop.lock:
            if index in outside:
                os.eventfd_write(outside[index], 1)
            else:
                self.virtio.kick(index)

    def call(self, readable: Sequence[bytes], writable: Sequence[int] = (), *, queue: int = 0) -> bytes:
        """Send one request and wait for its answer (10 seconds at most)."""
        token = self.driver(queue).add(readable, writable)
        self.kick(queue)
        return self.wait(queue, 1)[token]

    def wait(self, queue: int, count: int = 1) -> dict[int, bytes]:
        """Wait until *count* buffers came back in *queue* (10 seconds at most): token to written bytes."""
        found: dict[int, bytes] = {}

        def enough() -> bool:
            found.update(self.driver(queue).used())
            return len(found) >= count

        self.until(enough)
        return found

    def until(self, true: Callable[[], bool], turns: int = 10000) -> None:
        """Run the loop until *true()*; raises TimeoutError after *turns* turns of a millisecond."""
        for _ in range(turns):
            if true():
                return
            self.slot.loop.poll(0.001)
        raise TimeoutError(f"the device did not answer; logged: {self.slot.log.entries}")

    def close(self) -> None:
        """Reset the device and give everything back."""
        self.virtio.reset()
        self.virtio.unplug()
        self.slot.close()
        self.memory.close()
