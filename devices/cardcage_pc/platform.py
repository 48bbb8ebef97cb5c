"""Platform ``pc``: the devices and the memory layout of a PC when the configuration does not say.

RAM follows QEMU's ``pc``: up to 3.5 GiB all of it starts at 0; with more, 3 GiB stays below and the rest starts at
4 GiB. None shows at 0xA0000-0xBFFFF, where a PC has video memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.device import RamSpan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cardcage.config import Config

__all__ = ["Pc", "expand", "serial_port", "split_ram"]

COM1 = 0x3F8
GIB = 1 << 30
VIDEO = (0xA0000, 0xC0000)
"""Video memory: no RAM shows there."""


class Pc:
    """The platform; satisfies :class:`~cardcage.device.Platform`."""

    reserved: Sequence[tuple[int, int]] = ((0xA0000, 0x60000),)
    """Video memory, option ROMs and the BIOS."""

    def devices(self, config: Config, /) -> list[dict[str, Any]]:
        return expand(config)

    def ram(self, size: int, /) -> Sequence[RamSpan]:
        low, high = split_ram(size)
        spans = [RamSpan(0, min(low, VIDEO[0]), 0)]
        if low > VIDEO[1]:
            spans.append(RamSpan(VIDEO[1], low - VIDEO[1], VIDEO[1]))
        if high:
            spans.append(RamSpan(4 * GIB, high, low))
        return spans


def split_ram(size: int) -> tuple[int, int]:
    """Return (bytes from address 0, bytes from 4 GiB) for *size* bytes of RAM."""
    return (size, 0) if size <= 0xE0000000 else (3 * GIB, size - 3 * GIB)


def expand(config: Config) -> list[dict[str, Any]]:
    """The default device tables of a machine.

    A type that the configuration has a device of is left to it. COM1 is left out when a serial port is configured
    there, and has the console unless a configured device takes that. PIC, PIT and IOAPIC step aside for an
    accelerator's full irqchip, and so does the HPET, whose legacy replacement could not silence the accelerator's
    timer; without local APICs there is no IOAPIC.
    """
    irqchip = config.machine.irqchip
    configured = {one.type for one in config.devices}
    types = ["pic", "ioapic", "pit", "rtc", "hpet", "i8042", "acpi-pm", "fw_cfg", "port80", "pvpanic", "pci-host"]
    types.append("pci-hotplug")
    if irqchip == "full":
        types = [one for one in types if one not in ("pic", "ioapic", "pit", "hpet")]
    elif irqchip == "none":
        types.remove("ioapic")
    tables: list[dict[str, Any]] = [{"type": one} for one in types if one not in configured]
    if "i440fx" not in configured:
        tables.append({"type": "i440fx", "address": "00.0"})
    boot = config.boot or {}
    if "firmware" in boot or "firmware" in boot.get("table", {}):  # a protocol may have the table of another one
        wanted = {"piix3": "01.0", "piix4-pm": "01.3"}
        tables += [{"type": one, "address": at} for one, at in wanted.items() if one not in configured]
    tables += serial_port(config)
    return tables + [{"type": one} for one in ("acpi", "smbios", "bios-data") if one not in configured]


def serial_port(config: Config) -> list[dict[str, Any]]:
    """COM1, where the configuration has none there; it has the console unless a configured device takes that."""
    serial = [one for one in config.devices if one.type == "isa-serial"]
    if any(one.port in (None, COM1, [COM1]) for one in serial):
        return []
    taken = any("console" in one.options.values() for one in config.devices)
    return [{"type": "isa-serial", "port": COM1, "irq": 4, "char": "null" if taken else "console"}]
