"""ACPI tables (ACPI 6.4, chapter 5), rendered at each boot from what the machine's devices announced.

They are laid out as one blob with relative pointers, so that the same bytes serve both ways to the guest: into the area
at 0xE0000 for a kernel that is booted directly, or through fw_cfg with a linker script (QEMU ``docs/specs/fw_cfg``,
``bios-linker-loader``) for firmware, which allocates them and fixes the pointers.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from attrs import field
from cardcage.device import Pio
from cardcage.errors import ConfigError
from cardcage.values import define

from cardcage_pc import microvm
from cardcage_pc.acpi import aml, hotplug
from cardcage_pc.acpi import pm as acpi_pm
from cardcage_pc.chips import hpet, ioapic
from cardcage_pc.chips.fw_cfg import FwCfg

if TYPE_CHECKING:
    from cardcage.boot import BootContext
    from cardcage.device import Resource, Slot

__all__ = ["Acpi", "Blob", "dsdt", "linker_script", "render"]

AREA, AREA_END = 0xE0000, 0xF0000
TABLES, RSDP = "etc/acpi/tables", "etc/acpi/rsdp"
CENTURY = 0x32


@define
class Blob:
    """Tables one after another; ``pointers`` are (offset, bytes) of fields that hold offsets into the blob.

    ``checksums`` are (offset of the sum, start, length), to be filled in once the pointers are right.
    """

    data: bytearray = field(factory=bytearray)
    pointers: list[tuple[int, int]] = field(factory=list)
    checksums: list[tuple[int, int, int]] = field(factory=list)

    def add(self, data: bytes, align: int = 16) -> int:
        """Append *data*; returns its offset."""
        self.data += bytes(-len(self.data) % align)
        at = len(self.data)
        self.data += data
        return at

    def table(self, signature: str, revision: int, body: bytes, pointers: tuple[tuple[int, int], ...] = ()) -> int:
        """Append a table with its header; *pointers* are (offset in the table, bytes). Returns its offset."""
        header = struct.pack(
            "<4sIBB6s8sI4sI", signature.encode(), 36 + len(body), revision, 0, b"CARDCG", b"CARDCAGE", 1, b"CDCG", 1
        )
        at = self.add(header + body)
        self.pointers += [(at + offset, size) for offset, size in pointers]
        self.checksums.append((at + 9, at, 36 + len(body)))
        return at

    def relocated(self, base: int) -> bytes:
        """The blob as it is to stand at address *base*."""
        data = bytearray(self.data)
        for offset, size in self.pointers:
            value = int.from_bytes(data[offset : offset + size], "little") + base
            data[offset : offset + size] = value.to_bytes(size, "little")
        for offset, start, length in self.checksums:
            data[offset] = 0
            data[offset] = -sum(data[start : start + length]) & 0xFF
        return bytes(data)


def _gas(port: int, bits: int) -> bytes:
    """Generic address structure of an I/O port; all zeros for none."""
    access = {0: 0, 8: 1, 16: 2, 32: 3}[bits]
    return struct.pack("<BBBBQ", 1, bits, 0, access, port) if bits else bytes(12)


class _Names:
    """Four-character names and unique ids of devices in one scope."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._uids: Counter[str] = Counter()

    def name(self, wanted: str) -> str:
        """*wanted*, with a number in its end when it is short or taken."""
        base = wanted if re.fullmatch(r"[A-Z_][A-Z0-9_]{0,3}", wanted) else "DEV"
        numbered = (f"{base[: 4 - len(f'{at:X}')]}{at:X}" for at in range(1, 0x1000))
        candidates = chain([base] if len(base) == 4 else [], numbered)
        found = next(one for one in candidates if one not in self._taken)
        self._taken.add(found)
        return found

    def uid(self, hid: str) -> int:
        self._uids[hid] += 1
        return self._uids[hid]


def _device(names: _Names, resource: Resource, mappings: list[Any]) -> bytes:
    """One announced device with its ``_CRS``: its mapped regions, what it states besides, its interrupts."""
    crs = [
        (aml.io_ports if isinstance(one.region, Pio) else aml.memory_range)(one.address, one.region.size)
        for one in mappings
        if one.address is not None
    ]
    crs += [aml.io_ports(*one) for one in resource.io] + [aml.memory_range(*one) for one in resource.memory]
    crs += [aml.interrupt(gsi, level=resource.level) for gsi in resource.irqs]
    terms = [
        aml.name("_HID", aml.hardware_id(resource.hid)),
        aml.name("_UID", aml.integer(names.uid(resource.hid))),
        aml.name("_STA", aml.integer(0x0F)),
    ]
    if crs:
        terms.append(aml.name("_CRS", aml.resources(*crs)))
    return aml.device(names.name(resource.name), *terms, resource.extra)


def _pci_root(host: Any, *more: bytes) -> bytes:
    """The PCI host bridge: windows and interrupt routing as :class:`cardcage_pci.host.PciHost` states them."""
    buses = host.ecam[1] >> 20 if host.ecam else 1
    crs = [aml.address_window("bus", 0, buses)]
    crs += [aml.address_window(kind, base, size) for kind, base, size in host.windows]
    by_slot = [
        aml.package(aml.integer(slot << 16 | 0xFFFF), aml.integer(pin), aml.integer(0), aml.integer(gsi))
        for slot, pin, gsi in host.routing
    ]
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.hardware_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name("_CRS", aml.resources(*crs)),
        aml.name("_PRT", aml.package(*by_slot)),
        *more,
    )


def dsdt(board: Any) -> bytes:
    r"""The DSDT's body: ``\_S5`` and ``\_SB`` with each announced device, the PCI root, and motherboard resources."""
    names, devices, host, rest = _Names(), [], _pci_host(board), b""
    reserved = [aml.io_ports(_pm_base(board), 16), aml.io_ports(acpi_pm.GPE_BASE, 4)]
    if host is not None:
        if comes_and_goes := _has(board, "pci-hotplug"):
            reserved.append(aml.io_ports(hotplug.BASE, hotplug.SIZE))
            rest = hotplug.events()
        devices.append(_pci_root(host, *([hotplug.slots()] if comes_and_goes else [])))
        names.name("PCI0")
        if host.ecam:
            reserved.append(aml.memory_range(*host.ecam))
    devices.append(
        aml.device(
            names.name("MBRD"),
            aml.name("_HID", aml.hardware_id("PNP0C02")),
            aml.name("_CRS", aml.resources(*reserved)),
        )
    )
    for plugged in board.devices.values():
        mappings = list(plugged.slot.ranges.mappings)
        for resource in plugged.slot.ranges.resources:
            if resource.hid:
                devices.append(_device(names, resource, mappings))
                mappings = []  # a second device on the same card, as the mouse on the i8042, has no ranges of its own
    sleep = aml.package(*[aml.integer(acpi_pm.SLP_TYP_S5)] * 2, aml.integer(0), aml.integer(0))
    return aml.name("\\_S5", sleep) + aml.scope("\\_SB", *devices) + rest


def _bases(plugged: Any) -> tuple[int | None, ...]:
    """Where a device that is announced answers; other devices' ranges move without the tables."""
    ranges = plugged.slot.ranges
    return tuple(one.address for one in ranges.mappings) if ranges.resources else ()


def _pci_host(board: Any) -> Any:
    return next((one.device for one in board.devices.values() if getattr(one.device, "bus_type", "") == "pci"), None)


def _pm_base(board: Any) -> int:
    """Where the power management registers answer, or will when firmware has not said yet."""
    found = [one.slot.ranges.mappings[0].address for one in board.devices.values() if one.type == "acpi-pm"]
    return int(found[0]) if found and found[0] is not None else acpi_pm.BASE


def _has(board: Any, kind: str) -> bool:
    return any(one.type == kind for one in board.devices.values())


def _fadt(board: Any, facs: int, tables: int) -> bytes:
    host = _pci_host(board)
    # port 0xCF9 is a PCI host's; without one the board's register or the keyboard controller resets
    reset_port, reset_value = (0xCF9, 0x06) if host is not None else (0x64, 0xFE)
    if _has(board, "microvm"):
        reset_port, reset_value = microvm.RESET_PORT, microvm.RESET
    base = _pm_base(board)
    # legacy devices; 8042; no VGA; no CMOS clock
    architecture = 1 | (2 if _has(board, "i8042") else 0) | 4 | (0 if _has(board, "rtc") else 1 << 5)
    flags = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 10  # WBINVD, C1, no sleep button, no RTC wake, reset register
    fixed = struct.pack("<IIBBHIBBBB", facs, tables, 0, 0, acpi_pm.SCI, 0, 0, 0, 0, 0)
    blocks = struct.pack("<8I", base, 0, base + 4, 0, 0, base + 8, acpi_pm.GPE_BASE, 0)
    lengths = struct.pack("<8B", 4, 2, 0, 4, 4, 0, 0, 0)
    rest = struct.pack("<4H5BHBI", 0xFFF, 0xFFF, 0, 0, 0, 0, 0, 0, CENTURY, architecture, 0, flags)
    reset = _gas(reset_port, 8) + struct.pack("<BHB", reset_value, 0, 0)
    wide = _gas(base, 32) + _gas(0, 0) + _gas(base + 4, 16) + _gas(0, 0) * 2 + _gas(base + 8, 32)
    wide += struct.pack("<BBBBQ", 1, 32, 0, 1, acpi_pm.GPE_BASE) + _gas(0, 0)  # bit by bit of its bytes
    return fixed + blocks + lengths + rest + reset + struct.pack("<QQ", 0, tables) + wide


def _madt(board: Any, cpus: int, irqchip: str) -> bytes:
    entries = [struct.pack("<BBBBI", 0, 8, cpu, cpu, 1) for cpu in range(cpus)]
    entries.append(struct.pack("<BBBBII", 1, 12, 0, 0, ioapic.ADDRESS, 0))
    entries.append(struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0))
    host = _pci_host(board)
    level = {acpi_pm.SCI} | ({gsi for _, _, gsi in host.routing if gsi < 16} if host is not None else set())
    entries += [struct.pack("<BBBBIH", 2, 10, 0, gsi, gsi, 0x0D) for gsi in sorted(level)]  # active high, level
    entries.append(struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1))  # NMI at LINT1 of all
    pic = _has(board, "pic") or irqchip == "full"
    return struct.pack("<II", 0xFEE00000, int(pic)) + b"".join(entries)


def render(board: Any, cpus: int, irqchip: str) -> tuple[Blob, int, int]:
    """Lay out all tables; return the blob and the offsets of RSDT and XSDT."""
    blob = Blob()
    facs = blob.add(struct.pack("<4sI", b"FACS", 64) + bytes(24) + b"\x01" + bytes(31), align=64)
    dsdt_at = blob.table("DSDT", 2, dsdt(board))
    listed = [blob.table("FACP", 3, _fadt(board, facs, dsdt_at), ((36, 4), (40, 4), (140, 8)))]
    if irqchip != "none":
        listed.append(blob.table("APIC", 3, _madt(board, cpus, irqchip)))
    if _has(board, "hpet"):
        block = struct.pack("<BBBBQ", 0, 64, 0, 0, hpet.ADDRESS)
        listed.append(blob.table("HPET", 1, struct.pack("<I", hpet.CAPABILITIES & 0xFFFFFFFF) + block + bytes(4)))
    host = _pci_host(board)
    if host is not None and host.ecam:
        base, size = host.ecam
        listed.append(blob.table("MCFG", 1, bytes(8) + struct.pack("<QHBBI", base, 0, 0, (size >> 20) - 1, 0)))
    rsdt = blob.table(
        "RSDT", 1, struct.pack(f"<{len(listed)}I", *listed), tuple((36 + 4 * at, 4) for at in range(len(listed)))
    )
    xsdt = blob.table(
        "XSDT", 1, struct.pack(f"<{len(listed)}Q", *listed), tuple((36 + 8 * at, 8) for at in range(len(listed)))
    )
    return blob, rsdt, xsdt


def rsdp(rsdt: int, xsdt: int) -> bytes:
    """The root pointer, revision 2, with its two sums."""
    data = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, b"CARDCG", 2, rsdt, 36, xsdt, 0))
    data[8] = -sum(data[:20]) & 0xFF
    data[32] = -sum(data) & 0xFF
    return bytes(data)


def linker_script(blob: Blob) -> bytes:
    """``etc/table-loader``: allocate both files, add addresses to pointers, fill in the sums; 128 bytes a command."""

    def file(name: str) -> bytes:
        return name.encode().ljust(56, b"\0")

    def pointer(where: str, offset: int, size: int) -> bytes:
        return struct.pack("<I56s56sIB", 2, file(where), file(TABLES), offset, size)

    def checksum(where: str, offset: int, start: int, length: int) -> bytes:
        return struct.pack("<I56sIII", 3, file(where), offset, start, length)

    commands = [
        struct.pack("<I56sIB", 1, file(RSDP), 16, 2),  # below 1 MiB, where it is looked for
        struct.pack("<I56sIB", 1, file(TABLES), 64, 1),
        *(pointer(TABLES, offset, size) for offset, size in blob.pointers),
        *(checksum(TABLES, *one) for one in blob.checksums),
        pointer(RSDP, 16, 4),
        pointer(RSDP, 24, 8),
        checksum(RSDP, 8, 0, 20),
        checksum(RSDP, 32, 0, 36),
    ]
    return b"".join(command.ljust(128, b"\0") for command in commands)


def _unsummed(blob: Blob) -> bytes:
    """The tables as the linker script takes them."""
    data = bytearray(blob.data)
    for offset, _, _ in blob.checksums:
        data[offset] = 0
    return bytes(data)


class Acpi:
    """No hardware: gives the guest its tables at each boot."""

    def plug(self, slot: Slot, /) -> None:
        self._board, self._irqchip = slot.board, slot.interrupts.irqchip
        self._rendered: tuple[Any, tuple[Blob, int, int]] | None = None

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None:
        """No ranges are claimed."""

    def contribute(self, context: BootContext, /) -> None:
        """Render the tables; leave them in memory (unless a ROM shows there) and in fw_cfg."""
        blob, rsdt, xsdt = self._tables(context.cpus)
        host = _pci_host(self._board)
        if host is not None and host.ecam:
            context.reserve(*host.ecam)
        for plugged in self._board.devices.values():
            if isinstance(plugged.device, FwCfg):
                unsummed = bytearray(rsdp(rsdt, xsdt))
                unsummed[8] = unsummed[32] = 0
                plugged.device.set_file(TABLES, _unsummed(blob), partial(self._again, context.cpus))
                plugged.device.set_file(RSDP, bytes(unsummed))
                plugged.device.set_file("etc/table-loader", linker_script(blob))
                plugged.device.reserve(*([host.ecam] if host is not None and host.ecam else []))
        base = AREA + 64
        if base + len(blob.data) > AREA_END:
            raise ConfigError(f"the ACPI tables of this machine take {len(blob.data)} bytes: too many devices")
        if any(one.readonly and one.address < AREA_END and one.address + one.size > AREA for one in self._shown()):
            return  # firmware's ROM shows there: it gets the tables through fw_cfg
        context.memory.write(base, blob.relocated(base))
        context.memory.write(AREA, rsdp(base + rsdt, base + xsdt))
        context.rsdp = AREA

    def _again(self, cpus: int) -> bytes:
        """The tables when firmware asks for them: it has chosen the ports of power management by then."""
        return _unsummed(self._tables(cpus)[0])

    def _tables(self, cpus: int) -> tuple[Blob, int, int]:
        """The tables, rendered anew only where what they say has changed since the last boot."""
        host = _pci_host(self._board)
        said = [
            cpus,
            _pm_base(self._board),
            None if host is None else (host.ecam, tuple(host.windows), tuple(host.routing)),
            *((one.type, tuple(one.slot.ranges.resources), _bases(one)) for one in self._board.devices.values()),
        ]
        if self._rendered is None or self._rendered[0] != said:
            self._rendered = said, render(self._board, cpus, self._irqchip)
        return self._rendered[1]

    def _shown(self) -> Any:
        return self._board.memory.slots
