"""The state a BIOS leaves in memory, for guests booted without a BIOS (IBM PC/AT Technical Reference, section 5).

Kernels read it without asking who wrote it: the end of base memory and the extended BIOS data area bound where Xen and
others put their trampolines, GRUB and DOS look for serial ports there, and multiprocessor kernels without ACPI search
the extended area's first KiB for the MP tables. There are no BIOS services behind it: in real mode every interrupt has
a handler that returns, hardware interrupts with the end of interrupt that they need, and the disk and system services
(INT 13h and 15h) with the carry flag set, "no such function".
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from cardcage.device import Pio

from cardcage_pc.firmware import mptable

if TYPE_CHECKING:
    from cardcage.boot import BootContext
    from cardcage.device import Slot

__all__ = ["COM_PORTS", "LOW_END", "BiosData", "data_area", "interrupt_vectors"]

LOW_END = 0xA0000
"""Base memory and the extended BIOS data area end where the video memory begins."""
AREA, KIB = 0x400, 1024
COM_PORTS, LPT_PORTS = (0x3F8, 0x2F8, 0x3E8, 0x2E8), (0x3BC, 0x378, 0x278)
SERIAL_ID, PARALLEL_ID, MOUSE_ID = "PNP0501", "PNP0400", "PNP0F13"
FPU, MOUSE = 1 << 1, 1 << 2
KEYS, KEYS_END = 0x1E, 0x3E
"""The keyboard buffer, as offsets in segment 0x40."""

SEGMENT, HANDLERS = 0xF000, 0xFF20
TICK, MASTER, SLAVE, NOTHING, DISK, SYSTEM = (HANDLERS + at for at in (0, 0x23, 0x28, 0x30, 0x31, 0x35))
CODE = bytes.fromhex(
    # tick: push ds; push ax; ds = 0; inc dword [46C]; at 1800B0, midnight, it is 0 and [470] 1; pop ax; pop ds
    "1e 50 31c0 8ed8 66ff066c04 66813e6c04b0001800 720b a36c04 a36e04 c606700401 58 1f"
    # master: push ax; mov al, 20; jmp last. slave: push ax; mov al, 20; out A0, al. last: out 20, al; pop ax
    "50 b020 eb05 50 b020 e6a0 e620 58"
    # nothing: iret. disk: mov ah, 1; jmp refuse. system: mov ah, 86. refuse: set CF in the flags that IRET takes; iret
    "cf b401 eb02 b486 55 89e5 804e0601 5d cf"
)
MTRRS = {
    0x2FF: 0xC06,  # enabled, with the fixed ranges; write-back by default: nothing here is slower or faster for it
    0x250: 0x0606060606060606,
    0x258: 0x0606060606060606,
    0x259: 0,  # 0xA0000 to 0xBFFFF: uncacheable
    **dict.fromkeys(range(0x268, 0x270), 0x0505050505050505),  # from 0xC0000: write-protected
}
"""Memory type range registers (Intel SDM vol. 3, 12.11). A kernel that finds them disabled does without PAT."""
MODEL = 0xFFFFE, b"\xfc"
"""The model byte of a PC/AT."""


def data_area(serial: list[int], parallel: list[int], *, mouse: bool, base_kib: int) -> bytes:
    """The 256 bytes at 0x400.

    Args:
        serial, parallel: the ports there are; those of a PC are listed, in a BIOS's order and without gaps.
        mouse: a PS/2 mouse is there.
        base_kib: KiB of base memory, which the extended BIOS data area follows.

    There is no display: the video fields are 0.
    """
    area = bytearray(256)
    com = [port for port in COM_PORTS if port in serial]
    lpt = [port for port in LPT_PORTS if port in parallel]
    equipment = FPU | (MOUSE if mouse else 0) | len(com) << 9 | len(lpt) << 14
    struct.pack_into(f"<{len(com)}H", area, 0x00, *com)
    struct.pack_into(f"<{len(lpt)}H", area, 0x08, *lpt)
    struct.pack_into("<HHxH", area, 0x0E, base_kib << 6, equipment, base_kib)
    struct.pack_into("<HH", area, 0x1A, KEYS, KEYS)  # the keyboard buffer is empty
    struct.pack_into("<HH", area, 0x80, KEYS, KEYS_END)
    area[0x78 : 0x78 + len(lpt)] = b"\x14" * len(lpt)  # time-outs: 20 for a printer, 10 for a serial line
    area[0x7C : 0x7C + len(com)] = b"\x0a" * len(com)
    area[0x96] = 0x10  # a keyboard of 101 keys
    return bytes(area)


def interrupt_vectors() -> bytes:
    """The real-mode interrupt vector table, 256 times offset and segment."""
    offsets = [NOTHING] * 256
    offsets[0x08], offsets[0x13], offsets[0x15] = TICK, DISK, SYSTEM
    offsets[0x09:0x10], offsets[0x70:0x78] = [MASTER] * 7, [SLAVE] * 8
    return b"".join(struct.pack("<HH", offset, SEGMENT) for offset in offsets)


class BiosData:
    """No hardware: writes the BIOS's part of the first MiB at each boot without firmware."""

    def plug(self, slot: Slot, /) -> None:
        self._board: Any = slot.board
        self._irqchip = slot.interrupts.irqchip

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None:
        """No ranges are claimed."""

    def contribute(self, context: BootContext, /) -> None:
        """Vectors and handlers, both data areas (the map reserves the extended area), MP tables, and MTRRs."""
        if context.firmware:
            return
        room = mptable.size(self._board, context.cpus, self._irqchip)
        extended = max(-(-(mptable.OFFSET + room) // KIB), 1)
        start = LOW_END - extended * KIB
        context.reserve(start, extended * KIB)
        mouse = any(one.hid == MOUSE_ID for plugged in self._devices() for one in plugged.slot.ranges.resources)
        write = context.memory.write
        write(0, interrupt_vectors())
        write(AREA, data_area(self._ports(SERIAL_ID), self._ports(PARALLEL_ID), mouse=mouse, base_kib=start // KIB))
        write(start, bytes((extended,)).ljust(extended * KIB, b"\0"))
        if room:
            at = start + mptable.OFFSET
            write(at, mptable.render(self._board, context.cpus, at))
        write((SEGMENT << 4) + HANDLERS, CODE)
        write(*MODEL)
        context.msrs |= MTRRS

    def _devices(self) -> list[Any]:
        return list(self._board.devices.values())

    def _ports(self, hid: str) -> list[int]:
        """First ports of the devices that announce themselves as *hid*."""
        return [
            mapping.address
            for plugged in self._devices()
            if any(one.hid == hid for one in plugged.slot.ranges.resources)
            for mapping in plugged.slot.ranges.mappings
            if isinstance(mapping.region, Pio) and mapping.address is not None
        ]
