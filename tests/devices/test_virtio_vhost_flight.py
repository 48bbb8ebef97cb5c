"""What is in flight with a back end that keeps no note of it: counted, and named anew for the next one."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.accelerator import VmSpec
from cardcage.errors import HostError
from cardcage.memory import PhysicalMemory, RamBlock, RamRange
from cardcage_tcg.vm import TcgVm
from cardcage_virtio.vhost.flight import Flight, RingCount
from cardcage_virtio.virtio import Queue
from hypothesis import given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    pass

SIZE, TABLE, AVAIL, USED = 8, 0x1000, 0x1800, 0x2000


class World:
    """Driver and back end of a ring, at any index; heads are reused as the driver likes."""

    def __init__(self, start: int) -> None:
        self.memory = PhysicalMemory()
        self.memory.add(RamRange(0, 0x4000, RamBlock(0x4000)))
        self.queue = Queue(SIZE, SIZE, TABLE, AVAIL, USED, enabled=True)
        self.avail = self.memory.view(AVAIL, 6 + 2 * SIZE).cast("H")
        self.used = self.memory.view(USED, 6 + 8 * SIZE)
        self.used16 = self.used.cast("H")
        self.avail[1] = self.used16[1] = start
        self.free, self.flying = list(range(SIZE)), list[int]()
        self.total, self.born, self.old = 0, dict[int, int](), set[int]()

    def make(self, choice: int) -> None:
        if self.free:
            head = self.free.pop(choice % len(self.free))
            self.flying.append(head)
            self.total += 1
            self.born[head] = self.total
            self.old.discard(head)
            self.avail[2 + self.avail[1] % SIZE] = head
            self.avail[1] = self.avail[1] + 1 & 0xFFFF

    def use(self, choice: int) -> None:
        if self.flying:
            head = self.flying.pop(choice % len(self.flying))
            self.free.append(head)
            struct.pack_into("<II", self.used, 4 + 8 * (self.used16[1] % SIZE), head, 0)
            self.used16[1] = self.used16[1] + 1 & 0xFFFF

    def check(self) -> None:
        """The next back end would take what is in flight, each once; in its order, where the ring still has that."""
        found = self.waiting()
        assert sorted(found) == sorted(self.flying)
        self.old |= {head for head in self.flying if self.total - self.born[head] >= SIZE}  # others took their entries
        assert [one for one in found if one not in self.old] == [one for one in self.flying if one not in self.old]

    def waiting(self) -> list[int]:
        """What the next back end would take."""
        count = self.avail[1] - self.used16[1] & 0xFFFF
        return [self.avail[2 + (self.used16[1] + at) % SIZE] for at in range(count)]


ACTS = st.lists(
    st.tuples(st.sampled_from(["make", "make", "use", "use", "look", "die"]), st.integers(0, 63)), max_size=60
)


@pytest.mark.parametrize("native", [False, True])
@settings(max_examples=300, deadline=None)
@given(start=st.sampled_from([0, 1, 7, 0xFFF8, 0xFFFF]), acts=ACTS)
def test_the_next_back_end_is_told_what_is_in_flight(native: bool, start: int, acts: list[tuple[str, int]]) -> None:
    """However requests ended, the available ring then names each one in flight once, and those whose entries it still
    had in the order they were made."""
    world = World(start)
    vm: Any = TcgVm(VmSpec()) if native else SimpleNamespace()
    if native:
        world.memory.attach(vm)
        number = vm.add_foreign_ring(SIZE, TABLE, AVAIL, USED)
    slot: Any = SimpleNamespace(memory=world.memory, interrupts=SimpleNamespace(vm=vm), id="test")
    flight = Flight(slot)
    count = RingCount(world.memory, world.queue)
    flight._rings[0] = world.queue, number if native else count
    since = 0
    try:
        for what, choice in acts:
            if what == "make":
                world.make(choice)
            elif what == "use":
                world.use(choice)
            elif what == "die":
                flight.settle(0)
                world.check()
            since = 0 if what in ("look", "die") else since + 1
            if since == SIZE or what == "look":  # an interrupt, at the latest after a ring
                vm.foreign_ring_heads(number) if native else count.look()
                since = 0
        flight.settle(0)
        world.check()
    finally:
        if native:
            vm.remove_foreign_ring(number)
            vm.close()
        world.avail.release()
        world.used16.release()
        world.used.release()


def test_what_is_not_known_is_not_guessed() -> None:
    """A driver that used more than a ring without an interrupt, and one whose rings make no sense, are not followed."""
    world = World(0)
    flight = Flight(SimpleNamespace(memory=world.memory, interrupts=SimpleNamespace(vm=None), id="test"))  # type: ignore[arg-type]  # all it asks for
    flight._rings[0] = world.queue, RingCount(world.memory, world.queue)
    for _ in range(SIZE + 1):
        world.make(0)
        world.use(0)
    with pytest.raises(HostError, match="not known"):
        flight.settle(0)
    flight._rings[0] = world.queue, RingCount(world.memory, world.queue)
    world.avail[2 + world.avail[1] % SIZE] = 9  # no head of this ring
    world.avail[1] += 1
    with pytest.raises(HostError, match="0 requests are in flight, but the rings say 1"):
        flight.settle(0)
