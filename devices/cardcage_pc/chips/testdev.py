"""``pc-testdev``: what suites of test kernels ask a machine for, at the addresses of QEMU's device of that name.

(kvm-unit-tests' ``ioapic``, ``realmode`` and ``emulator``, among others.) Never there unless the configuration says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cardcage.values import define

if TYPE_CHECKING:
    from cardcage.device import Slot

__all__ = ["LINES", "MEMORY", "PcTestdev", "PcTestdevState"]

LINES, MEMORY = 24, 0x10000


@define
class PcTestdevState:
    """The register at ports 0xE0 and 0xE8, the memory, and the interrupt lines that are driven as bits."""

    version: ClassVar[int] = 1
    register: bytes = bytes(4)
    memory: bytes = bytes(MEMORY)
    lines: int = 0


class PcTestdev:
    """A register that holds what is written, memory behind the memory-mapped bus, and a switch for each interrupt."""

    def __init__(self) -> None:
        self._register, self._memory, self._lines = bytearray(4), bytearray(MEMORY), 0

    def plug(self, slot: Slot, /) -> None:
        self._irqs = [slot.interrupts.line(gsi) for gsi in range(LINES)]

    def reset(self) -> None:
        self.load(PcTestdevState())

    def save(self) -> PcTestdevState:
        return PcTestdevState(bytes(self._register), bytes(self._memory), self._lines)

    def load(self, state: PcTestdevState, /) -> None:
        self._register[:], self._memory[:] = (
            state.register[:4].ljust(4, b"\0"),
            state.memory.ljust(MEMORY, b"\0")[:MEMORY],
        )
        self._lines = state.lines & (1 << LINES) - 1
        for gsi, line in enumerate(self._irqs):
            line.set(bool(self._lines >> gsi & 1))

    # ports 0xE0 and 0xE8: one register, the second for accesses that come byte by byte

    def read(self, offset: int, size: int, /) -> int:
        return int.from_bytes(self._register[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int, /) -> None:
        self._register[offset : offset + size] = value.to_bytes(size, "little")[: 4 - offset]

    def read_flush(self, offset: int, size: int, /) -> int:
        return 0

    def write_flush(self, offset: int, size: int, value: int, /) -> None:
        """QEMU takes the host's mapping of a page away and gives it back: a guest cannot tell, and nothing is done."""

    # ports 0x2000 to 0x2017: the level of interrupt 0 to 23

    def read_line(self, offset: int, size: int, /) -> int:
        return self._lines >> offset & 1

    def write_line(self, offset: int, size: int, value: int, /) -> None:
        self._lines = self._lines & ~(1 << offset) | bool(value & 0xFF) << offset
        self._irqs[offset].set(bool(value & 0xFF))

    # memory at 0xFF000000

    def read_memory(self, offset: int, size: int, /) -> int:
        return int.from_bytes(self._memory[offset : offset + size], "little")

    def write_memory(self, offset: int, size: int, value: int, /) -> None:
        self._memory[offset : offset + size] = value.to_bytes(size, "little")[: MEMORY - offset]
