"""SMBIOS tables (DMTF DSP0134, entry point 2.8): what ``dmidecode``, cloud-init and systemd read of the machine.

Written below 1 MiB at each boot, or left in fw_cfg for firmware, which moves them and fixes the entry point.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from attrs import field
from attrs.validators import matches_re
from cardcage.errors import ConfigError
from cardcage.values import frozen

from cardcage_pc.chips.fw_cfg import FwCfg

if TYPE_CHECKING:
    from cardcage.boot import BootContext
    from cardcage.device import Slot

__all__ = ["AREA", "Smbios", "SmbiosOptions", "entry_point", "tables"]

AREA, AREA_END = 0xF0000, 0x100000
"""Where the entry point is looked for, at multiples of 16."""
BIOS, SYSTEM, CHASSIS, BOOT, END = 0, 1, 3, 32, 127
UUID_ITEM = 2
"""fw_cfg's number for the machine's UUID."""

printable = matches_re(r"[\x20-\x7e]{0,64}")


@frozen
class SmbiosOptions:
    """Options of ``smbios``: printable ASCII, at most 64 characters each, as QEMU's ``-smbios type=1``.

    Attributes:
        manufacturer, product, version, serial, sku, family: of the system; empty when there is none.
        uuid: of the system, such as ``"2f3e6f6e-..."``; empty for none.
    """

    manufacturer: str = field(default="cardcage", validator=printable)
    product: str = field(default="Standard PC", validator=printable)
    version: str = field(default="", validator=printable)
    serial: str = field(default="", validator=printable)
    sku: str = field(default="", validator=printable)
    family: str = field(default="", validator=printable)
    uuid: str = ""


def _structure(type: int, body: bytes, *strings: str) -> bytes:
    """A structure whose *body* refers to *strings* by number from 1; the type is its handle too."""
    text = b"".join(one.encode() + b"\0" for one in strings) + b"\0"
    return struct.pack("<BBH", type, 4 + len(body), type) + body + (text if strings else b"\0\0")


def tables(options: SmbiosOptions, uuid: bytes) -> tuple[bytes, int, int]:
    """All structures; returns them, their number and the size of the largest. Structures 0, 1, 3, 32 and 127.

    Args:
        uuid: 16 bytes, the first three fields little-endian.
    """
    wanted = [options.manufacturer, options.product, options.version, options.serial, options.sku, options.family]
    given = [one for one in wanted if one]
    maker, product, version, serial, sku, family = (given.index(one) + 1 if one else 0 for one in wanted)
    identity = bytes((maker, product, version, serial)) + uuid + bytes((6, sku, family))  # power switch
    characteristics = 1 << 3  # none are stated
    virtual = 1 << 4 | 1 << 3  # extension byte 2: a virtual machine, UEFI not
    made = [
        _structure(
            BIOS,
            struct.pack("<BBHBBQBBBBBB", 1, 2, AREA >> 4, 3, 0, characteristics, 0, virtual & 0x10, 0, 1, 0xFF, 0xFF),
            "cardcage",
            "0.1",
            "11/22/2026",
        ),
        _structure(SYSTEM, identity, *given),
        _structure(CHASSIS, struct.pack("<BBBBBBBBBIBBBB", 1, 1, 0, 0, 0, 3, 3, 3, 2, 0, 0, 0, 0, 0), "cardcage"),
        _structure(BOOT, bytes(7)),
        _structure(END, b""),
    ]
    return b"".join(made), len(made), max(len(one) for one in made)


def entry_point(address: int, length: int, count: int, largest: int) -> bytes:
    """The 2.1 entry point (31 bytes) for tables at *address*, with both its sums."""
    data = bytearray(
        struct.pack(
            "<4sBBBBHB5s5sBHIHB", b"_SM_", 0, 31, 2, 8, largest, 0, bytes(5), b"_DMI_", 0, length, address, count, 0x28
        )
    )
    data[21] = -sum(data[16:]) & 0xFF
    data[4] = -sum(data) & 0xFF
    return bytes(data)


class Smbios:
    """No hardware: gives the guest its tables at each boot."""

    def __init__(self, options: SmbiosOptions) -> None:
        self._uuid = little = bytes(16)
        if options.uuid:
            from uuid import UUID  # only who gives one pays for it

            try:
                self._uuid, little = UUID(options.uuid).bytes, UUID(options.uuid).bytes_le
            except ValueError as error:
                raise ConfigError(f'"{options.uuid}" is not a UUID', key="uuid") from error
        self._data, self._count, self._largest = tables(options, little)

    def plug(self, slot: Slot, /) -> None:
        self._board: Any = slot.board

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None:
        """No ranges are claimed."""

    def contribute(self, context: BootContext, /) -> None:
        """Leave the tables in memory (unless a ROM shows there) and in fw_cfg."""
        for plugged in self._board.devices.values():
            if isinstance(plugged.device, FwCfg):
                anchor = entry_point(0, len(self._data), self._count, self._largest)
                plugged.device.set_file("etc/smbios/smbios-anchor", anchor)
                plugged.device.set_file("etc/smbios/smbios-tables", self._data)
                plugged.device.items[UUID_ITEM] = self._uuid
        shown = self._board.memory.slots
        if any(one.readonly and one.address < AREA_END and one.address + one.size > AREA for one in shown):
            return  # firmware's ROM
        at = AREA + 32
        context.memory.write(AREA, entry_point(at, len(self._data), self._count, self._largest))
        context.memory.write(at, self._data)
