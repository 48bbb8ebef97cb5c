"""The platform ``microvm``: what is on its board, and what its tables say of that."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import pytest
from cardcage.config import Draft
from cardcage.device import Mmio, Resource
from cardcage.errors import ConfigError
from cardcage_pc.acpi import tables as acpi
from cardcage_pc.firmware import mptable
from cardcage_pc.microvm import RESET_PORT, Microvm, MicrovmBoard, MicrovmOptions
from pc_kit import Kit, KitMapping

BOARD = {"microvm", "fw_cfg", "pvpanic", "ioapic", "bios-data"}
USUAL = {"pic", "pit", "rtc", "isa-serial", "acpi-pm", "acpi"}


def devices(*devices: dict[str, Any], sets: tuple[str, ...] = (), **tables: Any) -> list[dict[str, Any]]:
    draft = Draft.of({"machine": {"platform": "microvm"}, **tables, "device": list(devices)})
    for one in sets:
        draft.set(one)
    return Microvm().devices(draft.config())


def types(*args: Any, **more: Any) -> set[str]:
    return {one["type"] for one in devices(*args, **more)}


def test_the_board() -> None:
    """It has interrupt controllers, a timer, a clock, a serial port and ACPI; each may be left out, and PCI added."""
    assert types() == BOARD | USUAL
    off = {"type": "microvm", "pic": False, "pit": False, "rtc": False, "serial": False, "acpi": False}
    assert types(off) == BOARD - {"microvm"}
    assert types(sets=("device.microvm.pit=false",)) == (BOARD | USUAL) - {"pit"}
    assert types({"type": "microvm", "pci": True}) - types() == {"pci-host", "i440fx"}


@pytest.mark.parametrize(("irqchip", "gone"), [("full", {"pic", "pit", "ioapic"}), ("none", {"ioapic"})])
def test_what_steps_aside(irqchip: str, gone: set[str]) -> None:
    """What the accelerator has itself is left out."""
    assert types() - types(machine={"platform": "microvm", "irqchip": irqchip}) == gone


def test_what_it_cannot_be() -> None:
    """Firmware is refused, and so is a board without what a full irqchip has."""
    with pytest.raises(ConfigError, match="without firmware"):
        devices(boot={"firmware": "bios.bin"})
    kit = Kit()
    kit.interrupts.irqchip = "full"
    with pytest.raises(ConfigError, match='irqchip "full" has both'):
        kit.plugged(MicrovmBoard(MicrovmOptions(pit=False)))


def test_its_port_resets() -> None:
    """The value that the FADT names resets the machine, any other does nothing."""
    kit = Kit(RESET_PORT)
    board = kit.plugged(MicrovmBoard())
    board.write(0, 1, 6)
    assert not kit.requests
    board.write(0, 1, 1)
    assert len(kit.requests) == 1


def board(*types: str, irq: int = 16) -> Kit:
    """A machine with a virtio device at *irq* and devices of *types*, which say nothing of themselves."""
    kit = Kit()
    there: dict[str, tuple[list[Any], list[Resource]]] = {one: ([], []) for one in types}
    there["virtio"] = ([KitMapping(Mmio(0x200), 0xFEB00000)], [Resource("LNRO0005", irqs=(irq,), level=True)])
    for type, (mappings, resources) in there.items():
        slot = SimpleNamespace(ranges=SimpleNamespace(mappings=mappings, resources=resources))
        kit.devices[type] = SimpleNamespace(device=object(), slot=slot, type=type)
    return kit


@pytest.mark.parametrize(("there", "pcat", "flags"), [(("pic", "rtc"), 1, 0x05), ((), 0, 0x25)])
def test_tables_tell_what_is_missing(there: tuple[str, ...], pcat: int, flags: int) -> None:
    """The MADT says whether there is an 8259, the FADT whether a clock and how to reset."""
    blob, rsdt, _ = acpi.render(board("microvm", *there).board, 1, "split")
    found: dict[bytes, bytes] = {}
    for at in struct.unpack_from("<2I", blob.data, rsdt + 36):
        found[bytes(blob.data[at : at + 4])] = bytes(blob.data[at:])
    assert struct.unpack_from("<I", found[b"APIC"], 40) == (pcat,)
    assert struct.unpack_from("<H", found[b"FACP"], 109) == (flags,)
    assert struct.unpack_from("<QB", found[b"FACP"], 120) == (RESET_PORT, 1)


def test_mp_tables_have_level_triggered_lines() -> None:
    """A kernel without ACPI finds the line of a virtio device level-triggered."""
    entries = mptable._entries(board(irq=5).board, 1)
    lines = {one[5]: one[2] for one in entries if one[0] == mptable.IO_INTERRUPT}
    assert (lines[5], lines[4]) == (mptable.LEVEL_HIGH, 0)
