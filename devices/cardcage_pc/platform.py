"""Platform ``pc``: which devices a PC has when the configuration does not say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cardcage.config import Config

__all__ = ["expand"]

COM1 = 0x3F8


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
    if irqchip == "full":
        types = [one for one in types if one not in ("pic", "ioapic", "pit", "hpet")]
    elif irqchip == "none":
        types.remove("ioapic")
    tables: list[dict[str, Any]] = [{"type": one} for one in types if one not in configured]
    if "i440fx" not in configured:
        tables.append({"type": "i440fx", "address": "00.0"})
    serial = [one for one in config.devices if one.type == "isa-serial"]
    if not any(one.port in (None, COM1, [COM1]) for one in serial):
        taken = any("console" in one.options.values() for one in config.devices)
        tables.append({"type": "isa-serial", "port": COM1, "irq": 4, "char": "null" if taken else "console"})
    return tables + [{"type": one} for one in ("acpi", "smbios", "bios-data") if one not in configured]
