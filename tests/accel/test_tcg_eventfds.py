"""The translator's doorbells, irqfds and rings of other processes; what guests see is in the conformance table."""

from __future__ import annotations

import os
import struct
import threading
from typing import TYPE_CHECKING

import pytest
from cardcage.accelerator import VmSpec
from cardcage.errors import AcceleratorError, StateError, UsageError
from cardcage.memory import PhysicalMemory, RamBlock, RamRange
from cardcage_tcg.vm import TcgVm
from hypothesis import given, settings
from hypothesis import strategies as st
from leftovers import Leftovers

if TYPE_CHECKING:
    from collections.abc import Iterator

RAM = 4 << 20


@pytest.fixture
def vm() -> Iterator[TcgVm]:
    made = TcgVm(VmSpec(irqchip="split"))
    yield made
    made.close()


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.eventfd(0, os.EFD_NONBLOCK)
    yield made
    os.close(made)


def test_doorbells_that_one_store_would_ring_collide(vm: TcgVm, fd: int) -> None:
    """As under KVM, a second doorbell for the same store is refused, one of another size, value or bus is not."""
    vm.add_doorbell(fd, 0x10, 2, pio=True, value=7)
    for size, value in ((2, 7), (2, None), (0, None)):
        with pytest.raises(AcceleratorError, match="one already"):
            vm.add_doorbell(fd, 0x10, size, pio=True, value=value)
    vm.add_doorbell(fd, 0x10, 2, pio=True, value=8)
    vm.add_doorbell(fd, 0x10, 4, pio=True, value=None)
    vm.add_doorbell(fd, 0x10, 2, pio=False, value=7)


def test_bad_doorbells_are_refused(vm: TcgVm, fd: int) -> None:
    """A size that no store has, a value without a size, what is no eventfd, and an unknown one to remove raise."""
    with pytest.raises(UsageError, match="3 bytes"):
        vm.add_doorbell(fd, 0x10, 3, pio=True, value=None)
    with pytest.raises(UsageError, match="has a size"):
        vm.add_doorbell(fd, 0x10, 0, pio=True, value=1)
    with pytest.raises(AcceleratorError, match="no eventfd"):
        vm.add_doorbell(0, 0x10, 1, pio=True, value=None)
    with pytest.raises(AcceleratorError, match="descriptor 9999"):
        vm.add_doorbell(9999, 0x10, 1, pio=True, value=None)
    with pytest.raises(AcceleratorError, match="no such doorbell"):
        vm.remove_doorbell(fd, 0x10, 1, pio=True, value=None)


def test_bad_irqfds_are_refused(vm: TcgVm, fd: int) -> None:
    """An eventfd has one route, a route is removed once and with its eventfd, and needs a local APIC."""
    route = vm.add_irqfd(fd, 0xFEE00000, 0x41)
    with pytest.raises(AcceleratorError, match="route already"):
        vm.add_irqfd(fd, 0xFEE00000, 0x42)
    with pytest.raises(UsageError, match="no interrupt route"):
        vm.remove_irqfd(fd + 1, route)
    vm.remove_irqfd(fd, route)
    with pytest.raises(UsageError, match="no interrupt route"):
        vm.remove_irqfd(fd, route)
    bare = TcgVm(VmSpec(irqchip="none"))
    assert bare.capabilities == {"doorbells", "foreign-rings", "guest-debug", "dirty-log", "parking"}
    with pytest.raises(StateError, match="no local APIC"):
        bare.add_irqfd(fd, 0xFEE00000, 0x41)
    bare.close()


def test_routes_come_and_go_while_eventfds_are_written(vm: TcgVm, fd: int) -> None:
    """A writer that never stops cannot make a removed route deliver, or the thread miss its end."""
    going = True

    def write() -> None:
        while going:
            os.eventfd_write(fd, 1)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for at in range(200):
            vm.remove_irqfd(fd, vm.add_irqfd(fd, 0xFEE00000, 0x40 + at % 16))
    finally:
        going = False
        writer.join()


def test_closing_ends_everything(fd: int) -> None:
    """A VM that is closed with doorbells, routes and rings leaves no thread and no descriptor behind."""
    left = Leftovers()
    made = TcgVm(VmSpec(irqchip="split"))
    memory = PhysicalMemory()
    memory.add(RamRange(0, RAM, RamBlock(RAM)))
    memory.attach(made)
    made.add_doorbell(fd, 0xD0000000, 4, pio=False, value=None)
    made.add_irqfd(fd, 0xFEE00000, 0x41)
    made.add_foreign_ring(8, 0x1000, 0x1800, 0x2000)
    made.close()
    memory.close()
    assert left() == []


def test_bad_rings_are_refused(vm: TcgVm) -> None:
    """A size that is no power of two, a used ring outside RAM and an unknown number raise."""
    with pytest.raises(UsageError, match="power of two"):
        vm.add_foreign_ring(6, 0, 0, 0)
    with pytest.raises(AcceleratorError, match="not RAM"):
        vm.add_foreign_ring(8, 0, 0, 1 << 40)
    with pytest.raises(UsageError, match="no ring 3"):
        vm.remove_foreign_ring(3)


descriptors = st.tuples(
    st.sampled_from((0, 0x1000, 0x3000, 0x3080, RAM - 8, 1 << 40, (1 << 64) - 1)),
    st.sampled_from((0, 1, 16, 128, 4096, RAM, (1 << 32) - 1)),
    st.integers(0, 7),
    st.integers(0, 17),
)


@settings(max_examples=100)
@given(
    rows=st.lists(descriptors, min_size=16, max_size=16),
    heads=st.lists(st.integers(0, 17), max_size=16),
    index=st.integers(0, 0xFFFF),
)
def test_whatever_is_in_a_ring_the_look_at_it_ends(
    rows: list[tuple[int, int, int, int]], heads: list[int], index: int
) -> None:
    """Loops, lengths, addresses and indices that a guest may make up are looked at within RAM, and in bounded time."""
    vm, memory = TcgVm(VmSpec()), PhysicalMemory()
    memory.add(RamRange(0, RAM, RamBlock(RAM)))
    memory.attach(vm)
    number = vm.add_foreign_ring(8, 0x1000, 0x1800, 0x2000)
    table = b"".join(struct.pack("<QIHH", *row) for row in rows)
    memory.write(0x1000, table[:128])
    memory.write(0x3000, table)
    memory.write(0x2000, struct.pack("<HH", 0, index) + b"".join(struct.pack("<II", head, 0) for head in heads[:8]))
    vm.remove_foreign_ring(number)
    vm.close()
    memory.close()
