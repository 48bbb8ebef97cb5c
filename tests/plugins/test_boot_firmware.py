"""What each boot protocol's guest finds of the firmware, and that the map it is told agrees with it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from boot_kit import bzimage, elf32, elf64, multiboot_header, pvh_note
from cardcage import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

SPIN = b"\xeb\xfe"
MIB = 1 << 20
MTRR_DEF_TYPE = 0x2FF
KERNELS = {
    "linux": (bzimage(SPIN), {"protocol": "linux"}),
    "pvh": (elf64(SPIN, MIB, pvh_note(MIB)), {"protocol": "pvh"}),
    "multiboot": (elf32(multiboot_header(3) + SPIN, MIB, entry=MIB + 12), {"protocol": "multiboot"}),
    "flat multiboot": (multiboot_header(0x10003, MIB, MIB, 0, 0, MIB + 32) + SPIN, {"protocol": "multiboot"}),
    "raw 16": (SPIN, {"protocol": "raw"}),
    "raw 32": (SPIN, {"protocol": "raw", "mode": 32}),
    "raw 64": (SPIN, {"protocol": "raw", "mode": 64, "address": MIB}),
}


@pytest.fixture(params=KERNELS)
def machine(request: pytest.FixtureRequest, accel: str, tmp_path: Path) -> Iterator[Machine]:
    """A machine of two processors, paused after a reset in which it found low memory overwritten."""
    kernel, boot = KERNELS[request.param]
    path = tmp_path / "kernel"
    path.write_bytes(kernel)
    keys = {**boot, "image" if boot["protocol"] == "raw" else "kernel": str(path)}
    with Machine(memory="16M", cpus=2, accel=accel, boot=keys) as made:
        made.start()
        made.pause()
        made.memory.write(0, bytes(0x500))
        made.memory.write(0x9F000, bytes(0x1000))
        made.resume()
        made.reset()
        made.pause()
        yield made


def told_map(machine: Machine) -> list[tuple[int, int, int]]:
    """The memory map as the protocol tells it: (address, size, type); empty where it tells none."""
    read, registers = machine.memory.read, machine.vcpus[0].get_state().registers
    assert machine.config.boot is not None
    match machine.config.boot["protocol"]:
        case "linux":
            page = bytes(read(registers.rsi, 4096))
            return [struct.unpack_from("<QQI", page, 0x2D0 + 20 * at) for at in range(page[0x1E8])]
        case "pvh":
            where, count = struct.unpack("<QI", read(registers.rbx + 40, 12))
            return [struct.unpack("<QQI", read(where + 24 * at, 20)) for at in range(count)]
        case "multiboot":
            size, where = struct.unpack("<II", read(registers.rbx + 44, 8))
            return [struct.unpack("<QQI", read(where + 24 * at + 4, 20)) for at in range(size // 24)]
    return []


def kind(told: list[tuple[int, int, int]], address: int) -> int:
    return next((one[2] for one in told if one[0] <= address < one[0] + one[1]), 0)


def test_data_areas_and_map_agree(machine: Machine) -> None:
    """At each boot base memory, extended area and the map that the guest is told end and begin at the same address."""
    read = machine.memory.read
    (base,), (segment,) = struct.unpack("<H", read(0x413, 2)), struct.unpack("<H", read(0x40E, 2))
    start = segment << 4
    assert (base << 10, start + (read(start, 1)[0] << 10)) == (start, 0xA0000)
    assert struct.unpack("<4H", read(0x400, 8)) == (0x3F8, 0, 0, 0)
    if told := told_map(machine):
        assert [kind(told, at) for at in (0, start - 1, start, 0x9FFFF, 0xA0000, 0xFFFFF, MIB)] == [1, 1, 2, 2, 2, 2, 1]


def test_tables_are_where_guests_search(machine: Machine) -> None:
    """RSDP, SMBIOS entry point and MP floating pointer each lie where the specifications say, and sum up to 0."""
    (segment,) = struct.unpack("<H", machine.memory.read(0x40E, 2))
    extended, rom = machine.memory.read(segment << 4, 1024), machine.memory.read(0xE0000, 0x20000)
    places = ((rom, b"RSD PTR ", 20), (rom[0x10000:], b"_SM_", 31), (extended, b"_MP_", 16))
    for area, mark, size in places:
        at = next(one for one in range(0, len(area), 16) if area[one : one + len(mark)] == mark)
        assert sum(area[at : at + size]) & 0xFF == 0


def test_chips_and_processors_are_as_a_bios_leaves_them(machine: Machine) -> None:
    """The 8259s are at vectors 0x08 and 0x70, the tick runs, and MTRRs are on in both processors that have them."""
    devices: dict[str, Any] = {name: one.device for name, one in machine.devices.items()}
    pic, tick = devices["pic"], devices["pit"].state.channels[0]
    assert (pic.master.base, pic.slave.base, pic.master.imr, pic.slave.imr) == (0x08, 0x70, 0xF8, 0xEE)
    assert (tick.loaded, tick.mode, tick.count) == (True, 2, 0x10000)
    for vcpu in machine.vcpus:
        assert vcpu.get_state().msrs.get(MTRR_DEF_TYPE, 0xC06) == 0xC06
    assert machine.vcpus[1].get_state().events.startup == "wait-for-sipi"


def test_firmware_finds_a_machine_after_reset(accel: str, tmp_path: Path) -> None:
    """With a ROM nothing of this is done, at the first boot and at the next."""
    path = tmp_path / "rom"
    path.write_bytes((bytes(65520) + SPIN).ljust(65536, b"\x90"))
    with Machine(memory="16M", accel=accel, boot={"firmware": str(path)}) as machine:
        machine.start()
        for _ in range(2):
            machine.pause()
            assert not any(machine.memory.read(0, 0x500))
            assert not any(machine.memory.read(0x9F000, 0x1000))
            pic: Any = machine.devices["pic"].device
            state = machine.vcpus[0].get_state()
            assert (pic.master.base, pic.master.imr) == (0, 0)
            assert state.msrs.get(MTRR_DEF_TYPE) != 0xC06
            machine.resume()
            machine.reset()
