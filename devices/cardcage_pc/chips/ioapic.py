"""82093AA I/O APIC with 24 inputs (Intel data sheet 290566), version 0x20: it has the EOI register.

Messages leave through :meth:`Slot.msi <cardcage.device.Slot.msi>`; the local APICs, and the EOI broadcasts of
level-triggered vectors, are the accelerator's. ISA interrupt 0 arrives at input 2, where the MADT says it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from attrs import field
from cardcage.values import define

from cardcage_pc.chips.copying import copied

if TYPE_CHECKING:
    from cardcage.device import Slot

__all__ = ["ADDRESS", "PINS", "IoApic", "IoApicState"]

ADDRESS, PINS, VERSION = 0xFEC00000, 24, 0x20
IOREGSEL, IOWIN, EOIR = 0x00, 0x10, 0x40
REMOTE_IRR, LEVEL, MASKED = 1 << 14, 1 << 15, 1 << 16
WRITABLE = 0xFF000000_0001AFFF
"""Bits of a redirection entry that software sets: not delivery status, remote IRR and what is reserved."""


@define
class IoApicState:
    """Index, id, redirection table, and the levels at the inputs."""

    version: ClassVar[int] = 1
    index: int = 0
    id: int = 0
    entries: list[int] = field(factory=lambda: [MASKED] * PINS)
    lines: int = 0


class IoApic:
    """Memory-mapped at 0xFEC00000."""

    def __init__(self) -> None:
        self.state = IoApicState()

    def plug(self, slot: Slot, /) -> None:
        self._msi, self._lines = slot.interrupts.msi, slot.board.lines
        slot.board.controllers.add_controller(self.set_irq)
        slot.board.controllers.add_eoi_listener(self.end_of_interrupt)

    def reset(self) -> None:
        """The table is masked again; the inputs stay as they are driven."""
        self.state = IoApicState(lines=self.state.lines)

    def save(self) -> IoApicState:
        return copied(self.state)

    def unchanged(self, state: IoApicState, /) -> bool:
        """True where :meth:`load` would change nothing."""
        return self.state == state

    def load(self, state: IoApicState, /) -> None:
        self.state = copied(state)

    # inputs

    def set_irq(self, gsi: int, level: bool, /) -> None:
        """Drive line *gsi*. A rising edge at a masked edge-triggered input is lost, as the data sheet has it."""
        pin = 2 if gsi == 0 else gsi
        if not 0 <= pin < PINS or gsi == 2:
            return
        state, bit = self.state, 1 << pin
        was = state.lines & bit
        state.lines = state.lines | bit if level else state.lines & ~bit
        if state.entries[pin] & LEVEL:
            self._service(pin)
        elif level and not was and not state.entries[pin] & MASKED:
            self._deliver(pin)

    def _service(self, pin: int) -> None:
        """Send a level-triggered input that is high and not yet being served."""
        entry = self.state.entries[pin]
        if entry & LEVEL and not entry & (MASKED | REMOTE_IRR) and self.state.lines >> pin & 1:
            self.state.entries[pin] |= REMOTE_IRR
            self._deliver(pin)

    def _deliver(self, pin: int) -> None:
        entry = self.state.entries[pin]
        level = entry & LEVEL
        address = 0xFEE00000 | entry >> 56 << 12 | entry >> 9 & 4  # destination; bit 11: logical
        self._msi(address, entry & 0x7FF | level | (1 << 14 if level else 0))

    def end_of_interrupt(self, vector: int) -> None:
        """A local APIC ended *vector*: inputs that are still high are sent again."""
        for pin, entry in enumerate(self.state.entries):
            if entry & REMOTE_IRR and entry & 0xFF == vector:
                self.state.entries[pin] &= ~REMOTE_IRR
                self._lines[0 if pin == 2 else pin].resample()
                self._service(pin)

    # registers

    def read(self, offset: int, size: int, /) -> int:
        state = self.state
        match offset & ~3:
            case 0x00:
                value = state.index
            case 0x10:
                value = self._get(state.index)
            case _:
                value = 0
        return value >> 8 * (offset & 3)

    def _get(self, index: int) -> int:
        if index in (0, 2):  # identification, arbitration
            return self.state.id << 24
        if index == 1:
            return (PINS - 1) << 16 | VERSION
        pin, high = divmod(index - 0x10, 2)
        if 0 <= pin < PINS:
            return self.state.entries[pin] >> 32 * high & 0xFFFFFFFF
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None:
        if offset == IOREGSEL:
            self.state.index = value & 0xFF
        elif offset == IOWIN:
            self._put(self.state.index, value & 0xFFFFFFFF)
        elif offset == EOIR:
            self.end_of_interrupt(value & 0xFF)

    def _put(self, index: int, value: int) -> None:
        if index == 0:
            self.state.id = value >> 24 & 15
        pin, high = divmod(index - 0x10, 2)
        if not 0 <= pin < PINS:
            return
        old = self.state.entries[pin]
        kept = old & 0xFFFFFFFF if high else old >> 32 << 32
        entry = (kept | value << 32 * high) & WRITABLE | old & REMOTE_IRR
        if not entry & LEVEL:  # an input made edge-triggered forgets its service: how old kernels end a stuck one
            entry &= ~REMOTE_IRR
        self.state.entries[pin] = entry
        self._service(pin)
