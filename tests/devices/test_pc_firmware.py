"""fw_cfg, the host bridge's PAM, and the small reporting ports."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.errors import ConfigError, Denied
from cardcage.memory import RamBlock, RamRange
from cardcage_pc.chips.debug import (
    DebugCon,
    DebugConOptions,
    IsaDebugExit,
    IsaDebugExitOptions,
    Port80,
    PvPanic,
)
from cardcage_pc.chips.fw_cfg import FwCfg, FwCfgOptions
from cardcage_pc.chips.i440fx import HostBridge
from cardcage_testing import TestSlot
from hypothesis import given, settings
from hypothesis import strategies as st
from pc_kit import Kit

if TYPE_CHECKING:
    from pathlib import Path

CONTEXT: Any = SimpleNamespace(ram_below_4g=256 << 20, ram_above_4g=0, cpus=2)
ERROR, READ, SKIP, SELECT, WRITE = 1, 2, 4, 8, 16


def item(card: FwCfg, key: int, size: int) -> bytes:
    card.write(0, 2, key)
    return bytes(card.read(1, 1) for _ in range(size))


def directory(card: FwCfg) -> dict[str, tuple[int, int]]:
    """Name to (key, size)."""
    (count,) = struct.unpack(">I", item(card, 0x19, 4))
    found = {}
    for _ in range(count):
        size, key, _, name = struct.unpack(">IHH56s", bytes(card.read(1, 1) for _ in range(64)))
        found[name.rstrip(b"\0").decode()] = key, size
    return found


def dma(kit: Kit, card: FwCfg, control: int, length: int, address: int, at: int = 0x1000) -> int:
    """Carry out a command; returns the control field afterwards."""
    kit.memory.write(at, struct.pack(">IIQ", control, length, address))
    card.write(4, 4, 0)
    card.write(8, 4, int.from_bytes(struct.pack(">I", at), "little"))
    (after,) = struct.unpack(">I", kit.memory.read(at, 4))
    return int(after)


@pytest.fixture
def kit() -> Kit:
    return Kit()


@pytest.fixture
def card(kit: Kit) -> FwCfg:
    card = kit.plugged(FwCfg(FwCfgOptions(files={"opt/org.test/name": "value"})))
    card.contribute(CONTEXT)
    return card


def test_signature_and_items(card: FwCfg) -> None:
    """Item 0 is QEMU, item 1 says that DMA is there, 3 and 5 tell memory and processors; past the end come zeros."""
    assert item(card, 0, 6) == b"QEMU\0\0"
    assert item(card, 1, 4) == b"\3\0\0\0"
    assert item(card, 3, 8) == struct.pack("<Q", 256 << 20)
    assert item(card, 5, 2) == b"\2\0"
    assert item(card, 0x7777, 2) == b"\0\0"


def test_files_are_listed_by_name_and_readable(card: FwCfg) -> None:
    """The directory is sorted, big-endian, and leads to each file's bytes."""
    files = directory(card)
    assert list(files) == sorted(files)
    key, size = files["opt/org.test/name"]
    assert item(card, key, size) == b"value"
    key, size = files["etc/sercon-port"]
    assert item(card, key, size) == struct.pack("<Q", 0x3F8)
    key, size = files["etc/e820"]
    assert item(card, key, size) == struct.pack("<QQI", 0, 256 << 20, 1)


def test_files_from_the_host(tmp_path: Path) -> None:
    """A path's content becomes a file; a missing one is a configuration error that names it."""
    (tmp_path / "blob").write_bytes(b"\0\1")
    card = FwCfg(FwCfgOptions(paths={"opt/blob": str(tmp_path / "blob")}))
    card.plug(slot := TestSlot())
    assert card.files["opt/blob"] == b"\0\1"
    assert slot.host.asked == [("image", str(tmp_path / "blob"), ("open", "read"))]
    with pytest.raises(ConfigError, match="gone"):
        FwCfg(FwCfgOptions(paths={"opt/blob": str(tmp_path / "gone")})).plug(slot)


def test_dma_select_skip_and_read(kit: Kit, card: FwCfg) -> None:
    """DMA selects an item, skips and copies, and fills what lies past the item's end with zeros."""
    key, _ = directory(card)["opt/org.test/name"]
    assert card.read(4, 4) == int.from_bytes(b"QEMU", "little")
    assert dma(kit, card, key << 16 | SELECT | SKIP, 2, 0) == 0
    kit.memory.write(0x2000, b"x" * 8)
    assert dma(kit, card, READ, 6, 0x2000) == 0
    assert kit.memory.read(0x2000, 8) == b"lue\0\0\0xx"


@pytest.mark.parametrize(("control", "address"), [(WRITE, 0x2000), (READ, 0xFFFFFFF0), (READ, 1 << 63)])
def test_dma_that_cannot_be_done_reports_an_error(kit: Kit, card: FwCfg, control: int, address: int) -> None:
    """Writing, and reading to where no RAM is, end with the error bit and change nothing."""
    assert dma(kit, card, SELECT | control, 16, address) == ERROR


def test_dma_of_four_gigabytes_stops_at_the_end_of_ram(kit: Kit, card: FwCfg) -> None:
    """A length of 2**32 - 1 is refused at the end of RAM and takes no such memory of ours."""
    assert dma(kit, card, SELECT | READ, 0xFFFFFFFF, 0x10000) == ERROR


def test_a_dma_command_outside_ram_is_logged(kit: Kit, card: FwCfg) -> None:
    """A command address that is no RAM leaves a log line."""
    card.write(8, 4, 0xFFFFFFFF)
    assert [one[0] for one in kit.log.entries] == ["warning"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 11), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1), st.binary(max_size=16)
        ),
        max_size=40,
    )
)
def test_no_sequence_of_accesses_breaks_it(steps: list[tuple[int, int, int, bytes]]) -> None:
    """Any accesses and DMA commands stay inside items and RAM."""
    kit = Kit()
    card = kit.plugged(FwCfg(FwCfgOptions()))
    for offset, size, value, block in steps:
        kit.memory.write(0, block)
        card.write(offset, size, value & (1 << 8 * size) - 1)
        card.write(4, 8, 0)
        assert 0 <= card.read(offset, size) < 1 << 8 * size


# PAM


class Pam:
    """A host bridge over 1 MiB of RAM with a ROM that shows from 0xE0000 up."""

    def __init__(self) -> None:
        self.kit = Kit()
        self.rom = RamBlock(0x20000, "rom")
        self.rom.view[:] = b"R" * 0x20000
        self.kit.memory.write(0xC0000, b"m" * 0x40000)
        self.kit.memory.add(RamRange(0xE0000, 0x20000, self.rom, 0, True, 10))
        self.bridge = self.kit.plugged(HostBridge())
        self.function = SimpleNamespace(config=bytearray(256))
        self.bridge.plug_pci(self.function)

    def set(self, register: int, value: int) -> None:
        self.function.config[register] = value
        self.bridge.config_written(register, 1)

    def shows(self, address: int) -> tuple[bytes, bool]:
        slot = next(one for one in self.kit.memory.slots if one.address <= address < one.address + one.size)
        return self.kit.memory.read(address, 1), slot.readonly


def test_pam_shows_ram_in_place_of_the_rom() -> None:
    """Reads and writes enabled show RAM, reads only read-only RAM, neither or writes only the ROM."""
    pam = Pam()
    assert pam.shows(0xF0000) == (b"R", True)
    for value, seen in ((0x30, (b"m", False)), (0x10, (b"m", True)), (0x20, (b"R", True)), (0x30, (b"m", False))):
        pam.set(0x59, value)
        assert pam.shows(0xF0000) == seen
        assert pam.shows(0xFFFFF) == seen
    pam.set(0x5F, 0x31)
    assert (pam.shows(0xE8000), pam.shows(0xEC000), pam.shows(0xE4000)) == ((b"m", True), (b"m", False), (b"R", True))


def test_a_denied_change_of_pam_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine may not map its memory, registers and memory stay as they were, also in a reset."""
    pam = Pam()
    pam.set(0x59, 0x30)

    def refuse(add: Any, remove: Any) -> None:
        raise Denied("no")

    with monkeypatch.context() as patch:
        patch.setattr(pam.bridge._board, "change_memory", refuse)
        with pytest.raises(Denied):
            pam.set(0x59, 0x10)
        pam.bridge.reset()
    assert (pam.function.config[0x59], pam.shows(0xF0000)) == (0x30, (b"m", False))
    pam.set(0x59, 0x10)
    assert pam.shows(0xF0000) == (b"m", True)
    pam.bridge.reset()
    assert (pam.function.config[0x59], pam.shows(0xF0000)) == (0, (b"R", True))


def test_reset_shows_the_rom_again_and_state_shows_ram_again() -> None:
    """Reset clears PAM; loading a saved state brings the saved view back."""
    pam = Pam()
    pam.set(0x59, 0x30)
    saved = pam.bridge.save()
    pam.bridge.reset()
    assert pam.shows(0xF0000) == (b"R", True)
    pam.bridge.load(saved)
    assert pam.shows(0xF0000) == (b"m", False)


# reporting ports


def test_pvpanic_reports_a_panic(kit: Kit) -> None:
    """Bit 0 is a panic; bit 1, a crash kernel was loaded, is only logged; reading tells both are known."""
    panic = kit.plugged(PvPanic())
    assert panic.read(0, 1) == 3
    panic.write(0, 1, 2)
    assert kit.requests == []
    panic.write(0, 1, 1)
    assert kit.requests[0][0] == "panic"


def test_debug_exit_ends_with_its_value() -> None:
    """The value written is the code; ``iobase`` and ``iosize`` move the ports as QEMU's options do."""
    kit = Kit(0xF4)
    device = kit.plugged(IsaDebugExit(IsaDebugExitOptions()))
    device.write(0, 4, 0x110)
    assert (kit.requests, kit.ranges.mappings[0].address) == ([("exit", 0x10)], 0xF4)
    moved = Kit(0xF4)
    moved.plugged(IsaDebugExit(IsaDebugExitOptions(iobase=0x501, iosize=2)))
    assert [(one.address, getattr(one.region, "size", None)) for one in moved.ranges.mappings] == [
        (None, None),
        (0x501, 2),
    ]


def test_debugcon_and_port_80(kit: Kit) -> None:
    """Debug console bytes reach the back end, its port reads 0xE9; a POST code is logged when it changes."""
    console, post = kit.plugged(DebugCon(DebugConOptions())), kit.plugged(Port80())
    console.write(0, 1, 0x41)
    assert (bytes(kit.wire.output), console.read(0, 1)) == (b"A", 0xE9)
    for value in (1, 1, 2):
        post.write(0, 1, value)
    assert (len(kit.log.entries), post.read(0, 1)) == (2, 2)
