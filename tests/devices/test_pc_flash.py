"""The flash that firmware keeps its variables in, and the chipset's functions that firmware looks for."""

from __future__ import annotations

import fcntl
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cardcage import Machine
from cardcage.errors import ConfigError
from cardcage_pc.chips.flash import Flash, FlashOptions, FlashState
from cardcage_pc.chips.piix import PowerManagement
from hypothesis import given, settings
from hypothesis import strategies as st
from pc_kit import Kit, KitMapping

SIZE, TOP = 0x10000, 1 << 32
BASE = TOP - SIZE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "flash"
    path.write_bytes(b"\xff" * SIZE)
    return path


def machine(**options: Any) -> Machine:
    return Machine(memory="16M", accel="tcg", devices=[{"type": "pflash", **options}])


def shown(vm: Machine) -> bool:
    """Whether the array shows as memory."""
    return any(slot.address == BASE for slot in vm.memory.slots)


def put(vm: Machine, *writes: tuple[int, int]) -> None:
    with vm.lock:
        for offset, value in writes:
            vm.mmio.write(BASE + offset, 1, value)


def get(vm: Machine, offset: int) -> int:
    """What the guest reads: of memory where that shows."""
    with vm.lock:
        return vm.memory.read(BASE + offset, 1)[0] if shown(vm) else vm.mmio.read(BASE + offset, 1)


def test_bytes_are_programmed_and_sectors_erased(file: Path) -> None:
    """Reads give the status meanwhile, and the array again after the command for it; the file has it at once."""
    with machine(file=str(file)) as vm:
        assert (shown(vm), get(vm, 5)) == (True, 0xFF)
        put(vm, (5, 0x10), (5, 0x42), (6, 0x40), (6, 0x43))
        assert (shown(vm), get(vm, 5)) == (False, 0x80)
        assert file.read_bytes()[4:8] == b"\xff\x42\x43\xff"
        put(vm, (0, 0xFF))
        assert (shown(vm), get(vm, 5)) == (True, 0x42)
        put(vm, (4096, 0x10), (4096, 0), (5, 0x20), (5, 0xD0), (5, 0xFF))
        assert (get(vm, 5), get(vm, 4096)) == (0xFF, 0)
        put(vm, (8192, 0xE8), (8192, 2), (8192, 1), (8193, 2), (8194, 3))
        assert file.read_bytes()[8192:8195] == b"\xff" * 3
        put(vm, (8192, 0xD0), (0, 0xFF))
        assert file.read_bytes()[8192:8196] == b"\1\2\3\xff"


def test_a_state_out_of_a_file_reaches_no_further_than_the_chip(file: Path) -> None:
    """Bytes to be programmed beyond it, values that are none, and endless commands of a saved state do nothing."""
    with machine(file=str(file)) as vm:
        flash = vm.devices["pflash"].device
        with vm.lock:
            flash.load(FlashState(0xE8, 1, 0x180, {-1: 0, -5: 7, SIZE: 7, 1 << 70: 7, 3: 0x1FF, 4: -1}))
        put(vm, (0, 0xD0), (0, 0xFF))
        assert file.read_bytes() == b"\xff" * SIZE
        with vm.lock:
            flash.load(FlashState(0xE8, 1 << 70, 0, {-1: 0}))
        assert flash.state.left < 4096


def test_a_driver_finds_out_that_it_is_flash(file: Path) -> None:
    """The probe of OVMF, the identity, and the query structure with the chip's size."""
    with machine(file=str(file)) as vm:
        put(vm, (0, 0x50), (0, 0x70))
        assert get(vm, 0) == 0
        put(vm, (0, 0x90))
        assert (get(vm, 0), get(vm, 1), get(vm, 2)) == (0x89, 0x18, 0)
        put(vm, (0, 0x98))
        assert bytes(get(vm, at) for at in range(0x10, 0x13)) == b"QRY"
        assert (1 << get(vm, 0x27), get(vm, 0x2D) + 1) == (SIZE, SIZE // 4096)
        vm.devices["pflash"].device.reset()
        assert shown(vm)


def test_a_read_only_flash_says_so(file: Path) -> None:
    """Programming and erasing fail with the chip's error bits, and the file stays as it is."""
    with machine(file=str(file), readonly=True) as vm:
        put(vm, (5, 0x10), (5, 0))
        assert get(vm, 0) == 0x90
        put(vm, (5, 0x20), (5, 0xD0))
        assert get(vm, 0) == 0xB0
    assert file.read_bytes() == b"\xff" * SIZE


def test_a_wrong_file_is_one_error(file: Path, tmp_path: Path) -> None:
    """No file, an odd size, one that another machine writes, a firmware ROM that is not there."""
    odd = tmp_path / "odd"
    odd.write_bytes(b"abc")
    with pytest.raises(ConfigError, match=r"odd: 3 bytes: expected flash of 4 KiB to 16 MiB in whole pages"):
        machine(file=str(odd))
    with pytest.raises(ConfigError, match="nonesuch: flash cannot be opened: No such file"):
        machine(file=str(tmp_path / "nonesuch"))
    with pytest.raises(ConfigError, match="nonesuch: firmware ROM cannot be read"):
        machine(file=str(file), below=str(tmp_path / "nonesuch"))
    with file.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(ConfigError, match="flash: flash is in use by another machine"):
            machine(file=str(file))
    with machine(file=str(file)):
        pass


@pytest.mark.once
@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), max_size=60))
@settings(max_examples=200)
def test_no_sequence_of_commands_hurts(tmp_path_factory: Any, writes: list[tuple[int, int]]) -> None:
    """Whatever is written, reads are bytes, the state is bounded, and the file is what the array shows."""
    path = tmp_path_factory.getbasetemp() / "hostile"
    path.write_bytes(b"\xff" * 4096)
    flash, kit = Flash(FlashOptions(str(path))), Kit()
    kit.plugged(flash)
    for offset, value in writes:
        flash.write(offset, 1, value)
        assert 0 <= flash.read(offset, 1) <= 255
        assert len(flash.state.pending) <= 257
    flash.reset()
    assert bytes(flash.read(at, 1) for at in range(4096)) == path.read_bytes()
    flash.unplug()


def test_firmware_moves_the_acpi_registers() -> None:
    """They are off until firmware gives them a base and switches them on, and off again after a reset."""
    kit, pm, config = Kit(), PowerManagement(), bytearray(256)
    mapping = KitMapping(None, 0x600)
    ranges = SimpleNamespace(mappings=[mapping, KitMapping(None, 0xAFE0)])
    kit.devices["acpi-pm"] = SimpleNamespace(device=object(), slot=SimpleNamespace(ranges=ranges), type="acpi-pm")
    pm.plug_pci(SimpleNamespace(config=config))
    kit.plugged(pm)
    assert mapping.address is None
    config[0x40:0x42] = b"\1\xb0"
    pm.config_written(0x40, 4)
    assert mapping.address is None
    config[0x80] = 1
    pm.config_written(0x80, 1)
    assert mapping.address == 0xB000
    other = pm.save()
    pm.reset()
    assert mapping.address is None
    pm.load(other)
    assert mapping.address == 0xB000
    config[0x40:0x42] = b"\1\0"
    pm.config_written(0x41, 1)
    assert mapping.address is None
