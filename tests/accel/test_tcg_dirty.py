"""The translator's dirty log, and a VM that is parked: by native calls, without a guest."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from cardcage.accelerator import VmSpec
from cardcage.errors import StateError
from cardcage.memory import PhysicalMemory, RamBlock, RamRange
from cardcage_tcg.dirty import joined
from cardcage_tcg.vm import TcgVm
from hypothesis import given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES = 64


@pytest.fixture
def parts() -> Iterator[tuple[TcgVm, PhysicalMemory]]:
    """A VM with RAM at 0, of which the last two pages show at 1 MiB as well."""
    vm, memory = TcgVm(VmSpec(irqchip="split")), PhysicalMemory()
    vm.create_vcpu(0)
    block = RamBlock(PAGES * 4096)
    memory.add(RamRange(0, PAGES * 4096, block), RamRange(1 << 20, 8192, block, offset=(PAGES - 2) * 4096))
    memory.attach(vm)
    memory.report_to(vm)
    yield vm, memory
    vm.close()
    memory.close()


def written(vm: TcgVm, memory: PhysicalMemory, at: int = 0) -> list[int]:
    bitmap = int.from_bytes(vm.fetch_dirty_log(memory.slots[at]), "little")
    return [page for page in range(PAGES) if bitmap >> page & 1]


def test_the_log_has_what_is_told(parts: tuple[TcgVm, PhysicalMemory]) -> None:
    """Pages that the host or another process wrote are in the next fetch and only there, wherever they show; a log is
    one reader's."""
    vm, memory = parts
    with pytest.raises(StateError, match="not started"):
        vm.fetch_dirty_log(memory.slots[0])
    told = [(3 * 4096, 1)]
    switched: list[bool] = []
    writer = SimpleNamespace(log_writes=switched.append, collect_writes=lambda: [told.pop()] if told else [])
    vm.add_writer(writer)
    vm.start_dirty_log()
    with pytest.raises(StateError, match="in use"):
        vm.start_dirty_log()
    memory.write(4095, b"ab")
    memory.write((1 << 20) + 4096, b"c")  # the last page
    assert written(vm, memory) == [0, 1, 3, PAGES - 1]
    assert written(vm, memory) == []
    memory.write((PAGES - 2) * 4096, b"d")
    assert written(vm, memory, 1) == [0]
    assert written(vm, memory) == []
    vm.stop_dirty_log()
    vm.remove_writer(writer)
    assert switched == [True, False]


def test_a_write_that_meets_a_fetch_is_in_this_or_the_next(parts: tuple[TcgVm, PhysicalMemory]) -> None:
    """While a thread of the host tells of 100,000 writes, fetches one after another lose none of their pages."""
    vm, memory = parts
    vm.start_dirty_log()
    seen = [0] * PAGES
    done = threading.Event()

    def write() -> None:
        for at in range(100_000):
            vm.memory_written(at % (PAGES - 2) * 4096, 1)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        written(vm, memory)
    writer.join()
    written(vm, memory)
    for page in range(PAGES):  # one that was marked, but is in no list, would never be told of again
        vm.memory_written(page * 4096, 1)
    for page in written(vm, memory):
        seen[page] += 1
    assert seen == [1] * PAGES


def test_the_log_outlives_a_change_of_what_shows(parts: tuple[TcgVm, PhysicalMemory]) -> None:
    """Pages in the log stay in it when RAM is shown elsewhere, and new RAM comes in clean."""
    vm, memory = parts
    vm.start_dirty_log()
    memory.write(5 * 4096, b"x")
    more = RamBlock(8192)
    memory.add(RamRange(2 << 20, 8192, more))
    memory.write((2 << 20) + 4096, b"y")
    assert written(vm, memory) == [5]
    assert written(vm, memory, 2) == [1]


@settings(max_examples=40, deadline=None)
@given(writes=st.lists(st.tuples(st.integers(0, PAGES * 4096 - 9000), st.binary(min_size=1, max_size=9000))))
def test_a_revert_puts_all_back(writes: list[tuple[int, bytes]]) -> None:
    """Whatever is written, a revert leaves the bytes that there were, in as many pages as were written."""
    vm, memory = TcgVm(VmSpec()), PhysicalMemory()
    block = RamBlock(PAGES * 4096)
    try:
        memory.add(RamRange(0, PAGES * 4096, block))
        memory.attach(vm)
        memory.report_to(vm)
        memory.write(0, bytes(range(256)) * 16 * PAGES)
        base = ctypes.create_string_buffer(memory.read(0, PAGES * 4096), PAGES * 4096)
        vm.start_dirty_log()
        vm.set_revert_bases([(block.host_address, block.size, ctypes.addressof(base))])
        pages = set()
        for address, data in writes:
            memory.write(address, data)
            pages |= set(range(address // 4096, (address + len(data) - 1) // 4096 + 1))
        assert vm.revert_dirty_log() == len(pages)
        assert memory.read(0, PAGES * 4096) == base.raw
        assert vm.revert_dirty_log() == 0
    finally:
        vm.close()
        memory.close()


def test_ram_that_came_since_is_not_put_back(parts: tuple[TcgVm, PhysicalMemory]) -> None:
    """A page that was written and has no bytes to go back to is refused, and stays in the log; nothing is put back."""
    vm, memory = parts
    block = memory.ranges[0].block
    base = ctypes.create_string_buffer(block.size)
    vm.start_dirty_log()
    vm.set_revert_bases([(block.host_address, block.size, ctypes.addressof(base))])
    memory.add(RamRange(2 << 20, 8192, RamBlock(8192)))
    memory.write(5 * 4096, b"x")
    assert vm.revert_dirty_log() == 1
    memory.write(5 * 4096, b"y")
    memory.write(2 << 20, b"z")
    with pytest.raises(StateError, match="came since"):
        vm.revert_dirty_log()
    assert (memory.read(5 * 4096, 1), memory.read(2 << 20, 1)) == (b"y", b"z")
    assert written(vm, memory) == [5]


def test_stretches_are_joined() -> None:
    """Slots that overlap in host memory are one stretch of the log; those that touch are two: maybe of two blocks."""
    slots = [SimpleNamespace(host_address=at, size=size) for at, size in ((0, 8), (4, 8), (12, 4), (32, 4), (33, 1))]
    assert joined(slots) == [(0, 12), (12, 4), (32, 4)]  # type: ignore[arg-type]  # as much of slots as it looks at


def test_a_parked_vm_has_no_thread_and_no_time(parts: tuple[TcgVm, PhysicalMemory]) -> None:
    """While a VM is parked its timer thread has ended, and its time-stamp counter stands."""
    vm, _ = parts
    vcpu = vm.cpus[0]
    before = vcpu.get_state().tsc
    assert before is not None
    vm.park()
    assert not [one for one in threading.enumerate() if one.name.startswith("tcg-")]
    threading.Event().wait(1.2)
    vm.unpark()
    after = vcpu.get_state().tsc
    assert after is not None
    assert after - before < vm.clock.tsc_khz * 1000
    assert [one.name for one in threading.enumerate() if one.name.startswith("tcg-")] == ["tcg-timer"]
