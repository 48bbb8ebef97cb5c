"""What a BIOS leaves: the data areas, the vectors and their handlers, the MP tables, interrupt controller and timer."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import pytest
from cardcage.device import Pio, Resource
from cardcage_pc.chips.pic import Pic, PicOptions
from cardcage_pc.chips.pit import Pit
from cardcage_pc.firmware import mptable
from cardcage_pc.firmware.bios import BiosData, data_area, interrupt_vectors
from pc_kit import SECOND, Kit, KitMapping


class Bridge:
    """A PCI host with functions in slots 0 and 3."""

    bus_type = "pci"
    ecam = None
    functions: dict[int, Any] = {0: None, 3 << 3: None, 3 << 3 | 1: None}  # noqa: RUF012 (never changed)
    routing = tuple((slot, pin, 10 + (slot + pin) % 2) for slot in range(32) for pin in range(4))


def machine(*ports: int, irqchip: str = "split", pci: bool = True) -> Any:
    """A machine with serial ports at *ports*, a mouse and a PCI host."""
    kit = Kit()
    kit.interrupts.irqchip = irqchip

    def plug(name: str, device: Any, mappings: list[Any], *announced: Resource) -> None:
        slot = SimpleNamespace(ranges=SimpleNamespace(mappings=mappings, resources=list(announced)))
        kit.devices[name] = SimpleNamespace(device=device, slot=slot, type=name)

    if pci:
        plug("pci-host", Bridge(), [])
    for port in ports:
        plug(f"com{port:x}", object(), [KitMapping(Pio(8), port)], Resource("PNP0501", "COM"))
    plug("i8042", object(), [KitMapping(Pio(1), 0x60)], Resource("PNP0303", "KBD"), Resource("PNP0F13", "MOU"))
    return kit


class Context:
    """A boot context with a MiB of memory."""

    def __init__(self, cpus: int = 1, *, firmware: bool = False) -> None:
        self.cpus, self.firmware, self.memory = cpus, firmware, self
        self.bytes, self.reserved = bytearray(1 << 20), [(0xA0000, 0x60000)]
        self.msrs: dict[int, int] = {}

    def write(self, address: int, data: bytes, /) -> None:
        self.bytes[address : address + len(data)] = data

    def reserve(self, address: int, size: int, type: int = 2, /) -> None:
        self.reserved.append((address, size))


def booted(kit: Any, context: Context) -> bytearray:
    card = BiosData()
    card.plug(kit)
    card.contribute(context)  # type: ignore[arg-type]  # a stand-in
    return context.bytes


def word(memory: bytearray, address: int) -> int:
    return int.from_bytes(memory[address : address + 2], "little")


def test_serial_ports_are_listed_in_a_bios_order_and_without_gaps() -> None:
    """COM ports come as 0x3F8, 0x2F8, 0x3E8, 0x2E8 whatever the order they are plugged in; others are not listed."""
    memory = booted(machine(0x2E8, 0x5000, 0x3F8, 0x3E8), Context())
    assert struct.unpack_from("<4H", memory, 0x400) == (0x3F8, 0x3E8, 0x2E8, 0)
    assert word(memory, 0x410) == 3 << 9 | 1 << 2 | 1 << 1  # three serial ports, mouse, FPU
    assert memory[0x47C:0x480] == b"\x0a\x0a\x0a\0"


@pytest.mark.parametrize("cpus", [1, 8, 255])
def test_base_memory_extended_area_and_memory_map_agree(cpus: int) -> None:
    """Base memory ends where the extended area begins, whose first byte is its size, and the map reserves all of it."""
    context = Context(cpus)
    memory = booted(machine(0x3F8), context)
    base, segment = word(memory, 0x413), word(memory, 0x40E)
    assert base << 10 == segment << 4
    assert memory[segment << 4] << 10 == 0xA0000 - (segment << 4)
    assert (segment << 4, 0xA0000 - (segment << 4)) in context.reserved
    assert base == 639 or cpus > 8


def test_the_keyboard_buffer_is_empty_and_there_is_no_display() -> None:
    """Head and tail of the keyboard buffer are its start; the video fields are 0."""
    area = data_area([], [0x378], mouse=False, base_kib=639)
    assert struct.unpack_from("<HH", area, 0x1A) == struct.unpack_from("<HH", area, 0x80)[:1] * 2 == (0x1E, 0x1E)
    assert struct.unpack_from("<H", area, 0x08) == (0x378,)
    assert not any(area[0x49:0x67])


def tables(memory: bytearray) -> tuple[bytes, list[bytes]]:
    """The MP configuration table's header and entries, found as a kernel finds them; sums are checked."""
    start = word(memory, 0x40E) << 4
    at = next(one for one in range(start, start + 1024, 16) if memory[one : one + 4] == b"_MP_")
    pointer = bytes(memory[at : at + 16])
    (where,) = struct.unpack_from("<I", pointer, 4)
    length = word(memory, where + 4)
    table = bytes(memory[where : where + length])
    assert sum(pointer) & 0xFF == sum(table) & 0xFF == 0
    assert (table[:4], where + length <= 0xA0000) == (b"PCMP", True)
    entries, offset = [], 44
    while offset < length:
        size = 20 if table[offset] == 0 else 8
        entries.append(table[offset : offset + size])
        offset += size
    assert len(entries) == word(bytearray(table), 34)
    return table[:44], entries


@pytest.mark.parametrize("cpus", [1, 255])
def test_mp_tables_name_the_processors(cpus: int) -> None:
    """Each processor has its entry, and only the first is the boot processor."""
    _, entries = tables(booted(machine(0x3F8), Context(cpus)))
    assert [(one[1], one[3]) for one in entries if one[0] == 0] == [(at, 1 | (at == 0) << 1) for at in range(cpus)]


def test_mp_tables_route_interrupts_as_acpi_does() -> None:
    """ISA 0 arrives at input 2, the PCI slots that are there are level-triggered at theirs, and no ISA line is too."""
    _, entries = tables(booted(machine(0x3F8), Context()))
    routes = {(one[4], one[5]): (word(bytearray(one), 2), one[7]) for one in entries if one[0] == 3}
    assert routes[1, 0] == (0, 2)
    assert routes[1, 9] == (0x0D, 9)
    assert routes[0, 3 << 2 | 1] == (0x0D, 10)
    assert {slot >> 2 for bus, slot in routes if bus == 0} == {0, 3}
    assert not {(1, 2), (1, 10), (1, 11)} & set(routes)
    assert [one[1] for one in entries if one[0] == 4] == [3, 1]  # ExtINT, NMI


@pytest.mark.parametrize(("pci", "buses"), [(True, [b"PCI   ", b"ISA   "]), (False, [b"ISA   "])])
def test_mp_tables_name_the_buses(pci: bool, buses: list[bytes]) -> None:
    """The PCI bus is named where there is one; without it no route belongs to it."""
    _, entries = tables(booted(machine(0x3F8, pci=pci), Context()))
    assert [one[2:8] for one in entries if one[0] == 1] == buses
    assert pci or all(one[4] == 1 for one in entries if one[0] == 3)


def test_no_local_apics_no_mp_tables() -> None:
    """A machine with irqchip none has an extended area without tables."""
    memory = booted(machine(0x3F8, irqchip="none"), Context())
    assert b"_MP_" not in memory
    assert (memory[0x9FC00], mptable.size(machine(irqchip="none").board, 4, "none")) == (1, 0)


def test_every_real_mode_vector_has_a_handler() -> None:
    """All 256 vectors point into the handlers below 1 MiB, hardware interrupts to those that end them."""
    memory = booted(machine(0x3F8), Context())
    vectors = [struct.unpack_from("<HH", memory, 4 * at) for at in range(256)]
    assert bytes(memory[:1024]) == interrupt_vectors()
    places = [segment * 16 + offset for offset, segment in vectors]
    assert memory[places[0x21]] == 0xCF  # IRET
    assert memory[places[0x0C]] == memory[places[0x74]] == 0x50  # PUSH AX
    assert all(0xFFF20 <= one < 0xFFFF0 for one in places)
    assert memory[0xFFFFE] == 0xFC


def test_with_firmware_nothing_is_written(kit: Kit) -> None:
    """Firmware does all this itself: memory, map, MSRs, interrupt controller and timer are left as after reset."""
    context = Context(firmware=True)
    memory = booted(machine(0x3F8), context)
    pic, pit = kit.plugged(Pic(PicOptions())), kit.plugged(Pit())
    pic.contribute(context)  # type: ignore[arg-type]  # a stand-in
    pit.contribute(context)  # type: ignore[arg-type]  # a stand-in
    assert not any(memory)
    assert (len(context.reserved), context.msrs) == (1, {})
    assert (pic.master.base, pic.master.imr, pit.state.channels[0].loaded) == (0, 0, False)


@pytest.fixture
def kit() -> Kit:
    return Kit()


def test_the_timer_ticks_at_vector_8(kit: Kit) -> None:
    """Without a word to either chip, the timer interrupts 18.2 times a second at vector 8, also after a reset."""
    pic, pit = kit.plugged(Pic(PicOptions())), kit.plugged(Pit())
    for _ in range(2):
        pic.contribute(Context())  # type: ignore[arg-type]  # a stand-in
        pit.contribute(Context())  # type: ignore[arg-type]  # a stand-in
        assert (kit.extint, pic.read_master(1, 1), pic.read_slave(1, 1)) == (False, 0xF8, 0xEE)
        before = kit.edges[0]
        kit.clock.advance(SECOND)
        assert kit.edges[0] - before == 18
        assert (kit.extint, pic.acknowledge()) == (True, 0x08)
        pic.reset()
        pit.reset()


def test_lines_that_a_bios_does_not_serve_are_masked(kit: Kit) -> None:
    """Of the others, the clock's interrupt comes at vector 0x70 and a serial port's does not come."""
    pic = kit.plugged(Pic(PicOptions()))
    pic.contribute(Context())  # type: ignore[arg-type]  # a stand-in
    kit.interrupts.line(4).set(True)
    assert pic.acknowledge() is None
    kit.interrupts.line(8).set(True)
    assert pic.acknowledge() == 0x70
