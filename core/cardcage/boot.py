"""Booting: what a boot protocol finds (the concrete :class:`~cardcage.device.BootContext`), and its replay at reset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.assembly import allow_files
from cardcage.device import E820Entry
from cardcage.errors import ConfigError, UsageError
from cardcage.memory import GIB, split_ram
from cardcage.x86 import reset_state

if TYPE_CHECKING:
    from cardcage.device import BootImage
    from cardcage.machine import Machine
    from cardcage.memory import GuestMemory

__all__ = ["MachineBoot", "carve", "load_boot", "open_boot"]

LOW_HOLE = (0xA0000, 0x60000)
"""Video memory, option ROMs and the BIOS: never free RAM on a PC."""


def carve(entries: list[E820Entry], address: int, size: int, type: int) -> list[E820Entry]:
    """Cut ``[address, address+size)`` out of *entries*, put it in as *type*; sorted, touching equals joined."""
    end = address + size
    left = [E820Entry(address, size, type)]
    for one in entries:
        if one.address < address:
            left.append(E820Entry(one.address, min(one.address + one.size, address) - one.address, one.type))
        if one.address + one.size > end:
            start = max(one.address, end)
            left.append(E820Entry(start, one.address + one.size - start, one.type))
    left.sort(key=lambda one: one.address)
    joined: list[E820Entry] = []
    for one in left:
        last = joined[-1] if joined else None
        if last is not None and last.type == one.type and last.address + last.size == one.address:
            joined[-1] = E820Entry(last.address, last.size + one.size, one.type)
        else:
            joined.append(one)
    return joined


class MachineBoot:
    """Made anew at each boot or reset. ``machine`` is there for platform cards."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.memory: GuestMemory = machine.memory
        self.cpus = len(machine.vcpus)
        self.ram_below_4g, self.ram_above_4g = split_ram(machine.config.machine.memory)
        self.e820 = [E820Entry(0, self.ram_below_4g)]
        if self.ram_above_4g:
            self.e820.append(E820Entry(4 * GIB, self.ram_above_4g))
        self.rsdp: int | None = None
        self.firmware = bool(getattr(machine.boot_image, "firmware", False))
        self.msrs: dict[int, int] = {}
        self.reserve(*LOW_HOLE)

    def reserve(self, address: int, size: int, type: int = 2, /) -> None:
        """Carve a range out of the memory map as *type* (2 reserved, 3 ACPI reclaimable, 4 ACPI NVS)."""
        if size <= 0 or address < 0:
            raise UsageError(f"e820: {address:#x}+{size:#x} is no range")
        self.e820 = carve(self.e820, address, size, type)


def open_boot(machine: Machine) -> BootImage | None:
    """Read and check what ``[boot]`` names; None without one. Raises ConfigError that names the file or key."""
    config, host = machine.config, machine.host
    table = dict(config.boot or {})
    if not table:
        return None
    place = config.place("boot")
    file = next((config.place(f"boot.{key}").file for key in table), None)
    name = table.pop("protocol", "auto")
    offer = host.registry.get("boot", str(name), file=file, key="boot.protocol")
    options = host.options(offer, table, file=file, key="boot")
    allow_files(machine, table, "open", "read")
    try:
        factory = offer.load()
        image: BootImage = (factory(options) if options is not None else factory()).open()
    except ConfigError as error:
        if error.file is not None:  # the kernel's own path says more than the key does
            raise
        raise ConfigError(error.problem, file=file, key=error.key or place.key) from error
    return image


def load_boot(machine: Machine) -> None:
    """Let contributors write, load the boot image (at reset: again), and put the vCPUs in their first states.

    No vCPU may be in guest code. Without an image the boot processor starts as after power-up.
    """
    context = MachineBoot(machine)
    with machine.lock:
        for plugged in machine.devices.values():
            if "boot" in plugged.abilities:
                plugged.device.contribute(context)
        first = machine.boot_image.load(context) if machine.boot_image is not None else reset_state()
    for vcpu in machine.vcpus:
        vcpu.set_state(first if vcpu.index == 0 else reset_state(bootstrap=False))
        if context.msrs:
            state = vcpu.get_state()
            state.msrs |= {index: value for index, value in context.msrs.items() if index in state.msrs}
            vcpu.set_state(state)
    machine.gate.wake()
