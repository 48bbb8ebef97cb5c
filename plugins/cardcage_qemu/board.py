"""``-machine``: the board, and where its devices are found."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from cardcage.errors import ConfigError
from cardcage_qmp.names import DEVICES, ON_PCI

from cardcage_qemu import backends

if TYPE_CHECKING:
    from cardcage_qemu.keyval import Options
    from cardcage_qemu.line import Line

__all__ = ["add_accelerator", "choose_memory", "on_machine", "settle"]

PC = re.compile(r"pc|pc-i440fx-\d+\.\d+")
Q35 = re.compile(r"q35|pc-q35-\d+\.\d+")
BOTH = ("acpi", "pic", "pit")
"""Parts of either board; a pc always has them."""
PARTS = {"acpi": "acpi", "pic": "pic", "pit": "pit", "rtc": "rtc", "isa-serial": "serial", "pcie": "pci"}
"""Of microvm: the property, and the option of the device ``microvm`` that it becomes."""
QUIET = ("ioapic2", "x-option-roms")
"""Properties of microvm that change nothing here: devices share lines, and a kernel needs no option ROM."""
FIRST, SIZE, MOST = 0xFEB00000, 0x200, 24
"""Registers of the first virtio-mmio device and of each, and how many there may be."""
LINES, LOW_LINES = range(16, 24), (5, 6, 7, 10, 11, 12, 14, 15)
"""Interrupts of devices that ACPI tells of, and of those that the kernel's command line names."""
VIRTIO = ("virtio-", "vhost-user-")


def on_machine(line: Line, options: Options) -> None:
    kind = options.take("type")
    options.harmless(usb="on off", vmport="off auto", graphics="off", smm="off auto", nvdimm="off")
    options.harmless(dump_guest_core="", mem_merge="", hpet="on", sata="off", smbus="")
    if kind is not None:
        line.bare, line.micro = kind == "none", kind == "microvm"
    if kind is not None and Q35.fullmatch(kind):
        line.warnings.append(f"-machine {kind}: the guest finds cardcage's pc, an i440FX, and no PCI Express")
    elif kind not in (None, "none", "microvm") and not PC.fullmatch(kind):
        raise options.error(f"{kind}: cardcage has pc, an i440FX, q35 as another name for it, microvm, and none")
    for key in (*PARTS, *QUIET, "auto-kernel-cmdline"):
        if (value := options.take(key)) is not None:
            if value not in ("on", "off", "auto"):
                raise options.error(f"{key}={value}: expected on, off or auto")
            line.board[key] = value, options
    if (accelerators := options.take("accel")) is not None:
        for name in accelerators.split(":"):
            add_accelerator(line, options, name)
    if (chip := options.take("kernel-irqchip", "kernel_irqchip")) is not None:
        known = {"on": "full", "off": "none", "split": "split"}
        if chip not in known:
            raise options.error(f"kernel-irqchip={chip}: expected on, off or split")
        if chip != "off":
            line.machine["irqchip"] = known[chip]
    if (memory := options.take("memory-backend")) is not None:
        line.later.append(lambda: choose_memory(line, options, memory))
    for key in ("kernel", "initrd", "append", "firmware"):
        if (value := options.take(key)) is not None:
            line.boot[key] = value
    for unit in (0, 1):
        if (node := options.take(f"pflash{unit}")) is not None:
            if node not in line.nodes:
                raise backends.unknown(options, "-blockdev", node, line.nodes)
            line.flash_chip(options, line.nodes[node], unit)
    options.end()


def choose_memory(line: Line, options: Options, name: str) -> None:
    """The machine's memory is the object *name*. Raises ConfigError."""
    if name not in line.objects:
        raise backends.unknown(options, "-object", name, line.objects)
    if "memory" not in line.objects[name]:
        raise options.error(f"memory-backend={name}: no memory backend")
    line.memory |= line.objects[name]["memory"]
    line.machine["memory"] = line.objects[name]["size"]


def add_accelerator(line: Line, options: Options, name: str) -> None:
    """One more to try. Raises ConfigError."""
    if name not in ("kvm", "tcg"):
        raise options.error(f"accel={name}: cardcage has kvm and tcg")
    if name not in line.accelerators:
        line.accelerators.append(name)


def settle(line: Line) -> None:
    """Put the devices onto the board that was chosen, once all options are read. Raises ConfigError."""
    if line.micro:
        _microvm(line)
        return
    for key, (value, options) in line.board.items():
        if key not in BOTH:
            raise options.error(f"{key}={value}: the property is microvm's")
        if value != "on":
            raise options.error(f"{key}={value}: cardcage's pc has it on alone")
    for options, _, wire in line.wires:
        if wire == "mmio":
            raise options.error("virtio over MMIO is microvm's: say -machine microvm, or the name that ends in -pci")


def _microvm(line: Line) -> None:
    chosen: dict[str, bool] = {}
    for key, part in PARTS.items():
        if key not in line.board:
            continue
        value, options = line.board[key]
        if value != "auto" and (value == "on") is (part == "pci"):
            chosen[part] = value == "on"
        if value == "off" and part in ("pic", "pit") and line.machine.get("irqchip") == "full":
            raise options.error(f"{key}=off: the accelerator's irqchip has it: say kernel-irqchip=split")
    if line.flash or "firmware" in line.boot or "kernel" not in line.boot:
        raise ConfigError("it boots a kernel by itself: say -kernel, without -bios and flash", file="-machine microvm")
    line.silent = not chosen.get("serial", True)
    if line.silent and (line.serials or any(one["type"] == "isa-serial" for one in line.devices)):
        raise line.board["isa-serial"][1].error("isa-serial=off: there is no port for -serial")
    on_mmio = _wire(line, pci=chosen.get("pci", False))
    if len(on_mmio) > MOST:
        raise ConfigError(f"{len(on_mmio)} virtio devices: microvm has room for {MOST}", file="-device")
    acpi = chosen.get("acpi", True)
    lines = LINES if acpi else LOW_LINES
    told = []
    for at, device in enumerate(on_mmio):
        device["type"] += "-mmio"
        device["address"], device["irq"] = FIRST + at * SIZE, lines[at % len(lines)]
        told.append(f"virtio_mmio.device={SIZE}@{device['address']:#x}:{device['irq']}")
    if told and not acpi and line.board.get("auto-kernel-cmdline", ("on",))[0] != "off":
        line.boot["append"] = " ".join(one for one in (line.boot.get("append", ""), *told) if one)
    line.machine["platform"] = "microvm"
    if chosen:
        line.devices.insert(0, {"type": "microvm", **chosen})


def _wire(line: Line, *, pci: bool) -> list[dict[str, Any]]:
    """The devices that are virtio over MMIO: those named so, and without a PCI bus all that are named neither way."""
    named = {id(device): (wire, options) for options, device, wire in line.wires}
    found = []
    for device in line.devices:
        wire, options = named.get(id(device), ("", None))
        on_pci = wire == "pci" or (pci and not wire)
        if wire == "mmio" or (device["type"].startswith(VIRTIO) and not on_pci):
            found.append(device)
        elif options is not None and not pci:
            raise options.error("microvm has no PCI bus: say the name that ends in -device, or -machine pcie=on")
    return found


def wire_of(name: str, full: str) -> str:
    """How the device that -device calls *name* is wired: ``pci``, ``mmio``, or empty where its name does not say."""
    if full.endswith("-device"):
        return "mmio"
    virtio = full.startswith(VIRTIO)
    return "pci" if full in DEVICES and DEVICES[full].parent in ON_PCI and (name == full or not virtio) else ""
