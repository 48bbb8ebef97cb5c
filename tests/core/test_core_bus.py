"""Buses and interrupt lines, physical memory and its map."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from cardcage._machine.booting import carve
from cardcage._machine.bus import Bus, Claim
from cardcage._memory.limits import check_ram
from cardcage.boot import E820Entry
from cardcage.errors import ConfigError, HostError, UsageError
from cardcage.interrupts import Line
from cardcage.memory import GuestMemoryError, PhysicalMemory, RamBlock, RamRange
from cardcage.ram import Memfd
from cardcage_pc.platform import split_ram
from cardcage_testing import check_memory
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    pass


def recorder(log: list[Any], base: int, size: int, name: str = "") -> Claim:
    """A claim that records its accesses and reads as its offset plus one."""
    return Claim(
        base,
        size,
        lambda offset, width: log.append(("r", offset, width)) or offset + 1,
        lambda offset, width, value: log.append(("w", offset, width, value)),
        name,
    )


def test_accesses_go_whole_or_byte_by_byte() -> None:
    """An access inside a range goes whole; one that reaches past an end is split; open bus reads as 0xFF."""
    log: list[Any] = []
    bus = Bus("pio", 16)
    bus.add(recorder(log, 0x10, 4))
    assert bus.read(0x10, 4) == 1
    assert bus.read(0x12, 4) == 0xFFFF0403
    assert bus.read(0x0E, 4) == 0x0201FFFF
    bus.write(0x13, 2, 0xBBAA)
    bus.write(0x20, 4, 1)
    assert bus.read(0xFFFF, 4) == 0xFFFFFFFF
    assert log == [("r", 0, 4), ("r", 2, 1), ("r", 3, 1), ("r", 0, 1), ("r", 1, 1), ("w", 3, 1, 0xAA)]


def test_ranges_are_disjoint_and_inside() -> None:
    """Overlaps and ranges outside the bus are refused and change nothing; removing wants the very claim."""
    bus = Bus("pio", 16)
    first = recorder([], 0x10, 4, "first")
    bus.add(first)
    for base, size in ((0x0F, 2), (0x13, 1), (0x10, 4), (0, 0x100), (0xFFFF, 2), (-1, 1), (5, 0)):
        with pytest.raises(ConfigError):
            bus.add(recorder([], base, size, "second"))
    assert list(bus) == [first]
    assert bus.read(0x10, 1) == 1
    with pytest.raises(UsageError):
        bus.remove(recorder([], 0x10, 4))
    bus.remove(first)
    assert bus.read(0x10, 1) == 0xFF


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=20),
    st.integers(0, 310),
    st.sampled_from([1, 2, 4, 8]),
)
def test_the_bus_is_a_byte_map(ranges: list[tuple[int, int]], address: int, size: int) -> None:
    """Whatever ranges there are, each byte is answered by the range that holds it."""
    bus = Bus("memory", 32)
    owner: dict[int, int] = {}
    for number, (base, length) in enumerate(ranges, 1):
        pattern = int.from_bytes(bytes([number]) * 8, "little")
        claim = Claim(base, length, lambda _offset, _size, pattern=pattern: pattern, lambda *_: None)
        try:
            bus.add(claim)
        except ConfigError:
            assert owner.keys() & range(base, base + length)
        else:
            owner.update(dict.fromkeys(range(base, base + length), number))
    expected = bytes(owner.get(address + at, 0xFF) for at in range(size))
    assert bus.read(address, size) == int.from_bytes(expected, "little")
    assert bus.read(address, size) == int.from_bytes(expected, "little")


# lines
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans())))
def test_a_line_is_the_or_of_its_sources(steps: list[tuple[int, bool]]) -> None:
    """A line is high while a source drives it, and tells only changes."""
    seen: list[bool] = []
    line = Line(seen.append)
    sources = [line.source() for _ in range(4)]
    high: set[int] = set()
    for source, level in steps:
        sources[source].set(level)
        (high.add if level else high.discard)(source)
        assert line.level == bool(high)
    assert all(one != other for one, other in itertools.pairwise(seen))
    seen.clear()
    for one in sources:
        one.set(False)
    seen.clear()
    sources[0].pulse()
    assert seen == [True, False]


# memory
def test_memory_keeps_its_contract() -> None:
    """PhysicalMemory passes the public contract, also across two blocks that touch."""
    memory = PhysicalMemory()
    first, second = RamBlock(0x1000), RamBlock(0x2000, backend=Memfd())
    memory.add(RamRange(0x10000, 0x1000, first), RamRange(0x11000, 0x2000, second))
    check_memory(memory, 0x11000, 0x2000)
    memory.write(0x10FFE, b"abcd")
    assert memory.read(0x10FFE, 4) == b"abcd"
    assert (bytes(first.view[-2:]), bytes(second.view[:2])) == (b"ab", b"cd")
    assert not memory.contains(0x10FFE, 4)
    memory.close()
    memory.close()
    with pytest.raises(GuestMemoryError):
        memory.read(0x10000, 1)


def test_priorities_decide_what_shows() -> None:
    """Of ranges that overlap the higher priority shows; the listener hears of disjoint slots in a safe order."""
    memory = PhysicalMemory()
    ram, rom = RamBlock(0x4000), RamBlock(0x1000)
    seen: list[Any] = []

    class Listener:
        def map_memory(self, slot: Any, /) -> None:
            seen.append(slot)

        def unmap_memory(self, slot: Any, /) -> None:
            seen.remove(slot)

    memory.add(RamRange(0, 0x4000, ram))
    memory.attach(Listener())
    over = RamRange(0x1000, 0x1000, rom, readonly=True, priority=1)
    memory.add(over)
    assert sorted((one.address, one.size, one.readonly) for one in seen) == [
        (0, 0x1000, False),
        (0x1000, 0x1000, True),
        (0x2000, 0x2000, False),
    ]
    memory.write(0x0FFF, b"123")
    assert (bytes(ram.view[0xFFF:0x1001]), bytes(rom.view[:2])) == (b"1\0", b"23")
    memory.change(remove=(over,))
    assert [(one.address, one.size) for one in seen] == [(0, 0x4000)]
    for wrong in (RamRange(1, 0x1000, rom), RamRange(0, 0x1001, rom), RamRange(0, 0, rom), RamRange(0, 0x2000, rom)):
        with pytest.raises(UsageError):
            memory.add(wrong)
    memory.close()
    rom.close()


def test_ram_is_split_as_qemu_does() -> None:
    """Up to 3.5 GiB all RAM is at 0; above, 3 GiB stays there; amounts that the host has not are refused."""
    assert split_ram(0xE0000000) == (0xE0000000, 0)
    assert split_ram(4 << 30) == (3 << 30, 1 << 30)
    for size in (0, 4096, 1 << 60):
        with pytest.raises(ConfigError):
            check_ram(size)
    with pytest.raises(HostError, match="cannot give"):
        RamBlock(1 << 62)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20), st.sampled_from([2, 3, 4])), max_size=8))
def test_the_memory_map_stays_sorted_and_disjoint(cuts: list[tuple[int, int, int]]) -> None:
    """Carving keeps the map sorted, disjoint and joined, and each byte has the type of the last cut over it."""
    entries = [E820Entry(0, 40)]
    expected = dict.fromkeys(range(40), 1)
    for address, size, kind in cuts:
        entries = carve(entries, address, size, kind)
        expected.update(dict.fromkeys(range(address, address + size), kind))
    assert {byte: one.type for one in entries for byte in range(one.address, one.address + one.size)} == expected
    assert sum(one.size for one in entries) == len(expected)
    assert all(
        one.address + one.size < other.address or (one.address + one.size == other.address and one.type != other.type)
        for one, other in itertools.pairwise(entries)
    )
