"""The host bridge's own PCI function: the identity of Intel's 82441FX and its PAM registers (data sheet 290549).

PAM decides for each part of 0xC0000 to 0xFFFFF whether RAM or what lies under it (the firmware's ROM) answers. Firmware
looks for this function at 00.0, makes the area writable RAM, and copies itself there. A part that is "write only"
(writes to RAM, reads from the ROM) is shown as the ROM. At a boot without firmware nothing lies above the RAM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from cardcage.errors import Denied
from cardcage.memory import RamRange
from cardcage.values import define

if TYPE_CHECKING:
    from cardcage.device import Slot
    from cardcage.memory import RamBlock

__all__ = ["HostBridge", "HostBridgeState"]

PAM, SMRAM = 0x59, 0x72
PRIORITY = 20
"""Above the firmware's ROM."""
SEGMENTS = [(0xF0000, 0x10000, PAM, 4)] + [
    (0xC0000 + 0x4000 * at, 0x4000, PAM + 1 + at // 2, 4 * (at % 2)) for at in range(12)
]
"""Address, size, register and shift of the two bits: 1 reads, 2 writes come to RAM."""


@define
class HostBridgeState:
    """The seven PAM registers."""

    version: ClassVar[int] = 1
    pam: bytes = bytes(7)


class HostBridge:
    """A device on the ``pci`` bus, at 00.0."""

    def __init__(self) -> None:
        # 82441FX, revision 2; subsystem as QEMU's, which guests take as the sign of a virtual machine
        self.pci: dict[str, Any] = {
            "vendor": 0x8086,
            "device": 0x1237,
            "class_code": 0x060000,
            "revision": 2,
            "subsystem_vendor": 0x1AF4,
            "subsystem": 0x1100,
            "config": {SMRAM: b"\x02"},
            "writable": {PAM: b"\x30" + b"\x33" * 6, SMRAM: b"\x58"},
        }
        self._ranges: dict[int, RamRange] = {}
        self._pam = bytes(7)

    def plug(self, slot: Slot, /) -> None:
        self._board, self._log = slot.board, slot.log

    def plug_pci(self, function: Any) -> None:
        self._function = function

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None:
        """No BARs."""

    def config_written(self, offset: int, size: int) -> None:
        """The guest wrote configuration space: show RAM and ROM as PAM now says."""
        if offset < PAM + 7 and offset + size > PAM:
            self._apply()

    def reset(self) -> None:
        try:
            self.load(HostBridgeState())
        except Denied as error:  # memory stays as it is, and so do the registers
            self._log.warning("denied", why=str(error))

    def save(self) -> HostBridgeState:
        return HostBridgeState(bytes(self._function.config[PAM : PAM + 7]))

    def unchanged(self, state: HostBridgeState, /) -> bool:
        """True where :meth:`load` would change nothing."""
        return self._pam == state.pam and self._function.config[PAM : PAM + 7] == state.pam

    def load(self, state: HostBridgeState, /) -> None:
        self._function.config[PAM : PAM + 7] = state.pam
        self._apply()

    def _apply(self) -> None:
        config, ranges = self._function.config, dict(self._ranges)
        add, remove = [], []
        for address, size, register, shift in SEGMENTS:
            access = config[register] >> shift & 3
            old = ranges.get(address)
            readonly = access == 1
            if old is not None and (not access & 1 or old.readonly != readonly):
                remove.append(ranges.pop(address))
                old = None
            if old is None and access & 1:
                block, at = self._ram(address)
                ranges[address] = RamRange(address, size, block, at, readonly, PRIORITY)
                add.append(ranges[address])
        if add or remove:
            try:
                self._board.change_memory(tuple(add), tuple(remove))
            except Denied:  # the registers say what memory shows
                config[PAM : PAM + 7] = self._pam
                raise
        self._ranges, self._pam = ranges, bytes(config[PAM : PAM + 7])

    def _ram(self, address: int) -> tuple[RamBlock, int]:
        """The block of RAM at *address* and the offset in it."""
        for one in self._board.memory.ranges:
            if one.priority == 0 and one.address <= address < one.address + one.size:
                return one.block, one.offset + address - one.address
        raise AssertionError(f"no RAM at {address:#x}: a machine has at least 1 MiB")
