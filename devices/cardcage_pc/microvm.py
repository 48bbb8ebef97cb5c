"""Platform ``microvm``: a board for virtio over MMIO, after QEMU's of this name.

There is no PCI bus, unless it is asked for, no chipset and no keyboard controller. A kernel is booted without firmware,
and finds its devices by ACPI. The interrupt controller and timer of a PC, its clock and its serial port may be left
out: Linux needs none of the first three where the processor has the TSC deadline timer and kvmclock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.errors import ConfigError
from cardcage.values import frozen

from cardcage_pc.platform import Pc, serial_port

if TYPE_CHECKING:
    from cardcage.config import Config
    from cardcage.device import Slot

__all__ = ["RESET", "RESET_PORT", "Microvm", "MicrovmBoard", "MicrovmOptions"]

PCI_LINES = [20, 21, 22, 23]
"""Of the PCI interrupt links: without an 8259, Linux has no use for those below 16."""
RESET_PORT, RESET = 0x610, 1
"""The ACPI reset register, and the value that resets."""


@frozen
class MicrovmOptions:
    """Options of ``microvm``: what is on the board.

    Attributes:
        pic: the two 8259A. pit: the 8254. rtc: clock and CMOS RAM. serial: a serial port at 0x3F8.
        acpi: ACPI tables and power management; without them the kernel has to be told of each device.
        pci: a PCI bus.
    """

    pic: bool = True
    pit: bool = True
    rtc: bool = True
    serial: bool = True
    acpi: bool = True
    pci: bool = False


class MicrovmBoard:
    """The device ``microvm``: its options say what the platform puts on the board, and its port resets."""

    def __init__(self, options: MicrovmOptions | None = None) -> None:
        self.options = options or MicrovmOptions()

    def plug(self, slot: Slot, /) -> None:
        options = self.options
        if slot.interrupts.irqchip == "full" and not (options.pic and options.pit):
            raise ConfigError('pic = false, pit = false: irqchip "full" has both in the accelerator', key="pic")
        self._power = slot.power

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None:
        if value & 0xFF == RESET:
            self._power.reset("ACPI reset register")


class Microvm(Pc):
    """The platform; RAM is where the platform ``pc`` has it."""

    def devices(self, config: Config, /) -> list[dict[str, Any]]:
        chosen, usual = _chosen(config), MicrovmOptions()

        def on(name: str) -> bool:
            return bool(chosen.get(name, getattr(usual, name)))

        boot = config.boot or {}
        if "firmware" in boot or "firmware" in boot.get("table", {}):
            raise config.place("boot.firmware").error('platform "microvm" boots a kernel by itself, without firmware')
        types = ["microvm", "fw_cfg", "pvpanic", *(one for one in ("pic", "pit", "rtc") if on(one)), "ioapic"]
        if config.machine.irqchip == "full":
            types = [one for one in types if one not in ("pic", "pit", "ioapic")]
        elif config.machine.irqchip == "none":
            types.remove("ioapic")
        if on("acpi"):
            types += ["acpi-pm", "acpi"]
        configured = {one.type for one in config.devices}
        tables: list[dict[str, Any]] = [{"type": one} for one in (*types, "bios-data") if one not in configured]
        if on("pci"):
            bus: tuple[dict[str, Any], ...] = (
                {"type": "pci-host", "pirqs": PCI_LINES},
                {"type": "i440fx", "address": "00.0"},
            )
            tables += [one for one in bus if one["type"] not in configured]
        return [*tables, *(serial_port(config) if on("serial") else [])]


def _chosen(config: Config) -> dict[str, Any]:
    """What the configuration says of the board, before it is checked: that is done where the device is made."""
    found = next((dict(one.options) for one in config.devices if one.type == "microvm"), {})
    for one in config.defaults:
        if one.device == "microvm" and len(one.path) == 1:
            found[one.path[0]] = one.value
    return found
