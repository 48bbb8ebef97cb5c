"""The PC's pair of 8259A interrupt controllers (Intel 8259A data sheet) with the PIIX's edge/level registers.

The chips' INTR output goes to the accelerator (LINT0 of the boot processor); the vector is asked for with
:meth:`Pic.acknowledge` in the INTA cycle. ICW1's level bit is ignored: ELCR decides, as in Intel's PIIX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from attrs import field
from attrs.validators import deep_iterable, ge, instance_of, le
from cardcage.device import Resource
from cardcage.values import define, frozen

from cardcage_pc.chips.bytewise import read_bytes, write_bytes
from cardcage_pc.chips.copying import copied

if TYPE_CHECKING:
    from cardcage.boot import BootContext
    from cardcage.device import Slot

__all__ = ["Chip", "Pic", "PicOptions", "PicState"]

CASCADE = 2
BIOS_BASES, BIOS_MASKS = (0x08, 0x70), (0xF8, 0xEE)
"""Vectors, and what stays unmasked: timer, keyboard and the slave; clock and mouse."""


@frozen
class PicOptions:
    """Options of ``pic``.

    Attributes:
        level: lines 3 to 15 (not 8, 13) that are level-triggered after reset, as firmware would set them: the SCI and
            the PCI interrupts.
    """

    level: tuple[int, ...] = field(
        default=(9, 10, 11), validator=deep_iterable(member_validator=[instance_of(int), ge(0), le(15)])
    )


@define
class Chip:
    """One 8259A. ``lines`` are the levels at its pins; a request is a latched edge, or a high line in level mode."""

    version: ClassVar[int] = 1
    elcr: int = 0
    level_mask: int = 0
    """Lines whose mode ELCR cannot set: the cascade input follows the slave."""
    lines: int = 0
    edges: int = 0
    imr: int = 0
    isr: int = 0
    base: int = 0
    lowest: int = 7
    """The line of lowest priority."""
    step: int = 0
    """Initialization word that is awaited, 0 for none."""
    single: bool = False
    wants_icw4: bool = False
    auto_eoi: bool = False
    rotate_auto: bool = False
    nested: bool = False
    """Special fully nested mode."""
    special_mask: bool = False
    read_isr: bool = False
    poll: bool = False

    @property
    def irr(self) -> int:
        """Interrupt request register."""
        level = self.elcr | self.level_mask
        return self.edges & ~level | self.lines & level

    def drive(self, line: int, level: bool) -> None:
        """Set the level at pin *line*."""
        bit = 1 << line
        if level:
            self.edges |= bit & ~self.lines
            self.lines |= bit
        else:
            self.lines &= ~bit

    def pending(self) -> int | None:
        """The line that INTR is raised for, ``None`` when it is low."""
        wanted = self.irr & ~self.imr
        if not wanted:
            return None
        serving = self.isr & ~self.imr if self.special_mask else self.isr
        for at in range(1, 9):
            line = self.lowest + at & 7
            bit = 1 << line
            if self.nested and self.level_mask & bit:
                serving &= ~bit  # a higher line of the slave may interrupt the slave's service
            if wanted & bit and not serving & bit:
                return line
            if serving & bit:
                return None
        return None

    def accept(self, line: int) -> None:
        """INTA: *line* goes into service."""
        self.edges &= ~(1 << line)
        if not self.auto_eoi:
            self.isr |= 1 << line
        elif self.rotate_auto:
            self.lowest = line

    def read(self, offset: int) -> int:
        if self.poll:
            self.poll = False
            line = self.pending()
            if line is None:
                return 0
            self.accept(line)
            return 0x80 | line
        if offset:
            return self.imr
        return self.isr if self.read_isr else self.irr

    def write(self, offset: int, value: int) -> list[int]:
        """Write a control word; returns the lines whose service ended."""
        if offset == 0:
            if value & 0x10:
                self._icw1(value)
            elif value & 0x08:
                self._ocw3(value)
            else:
                return self._ocw2(value)
        elif self.step == 2:
            self.base = value & 0xF8
            self.step = (4 if self.wants_icw4 else 0) if self.single else 3
        elif self.step == 3:
            self.step = 4 if self.wants_icw4 else 0
        elif self.step == 4:
            self.nested, self.auto_eoi, self.step = bool(value & 0x10), bool(value & 0x02), 0
        else:
            self.imr = value
        return []

    def _icw1(self, value: int) -> None:
        self.edges = self.imr = self.isr = 0
        self.lowest, self.step = 7, 2
        self.single, self.wants_icw4 = bool(value & 0x02), bool(value & 0x01)
        self.auto_eoi = self.rotate_auto = self.nested = self.special_mask = self.read_isr = self.poll = False

    def _ocw3(self, value: int) -> None:
        if value & 0x40:
            self.special_mask = bool(value & 0x20)
        if value & 0x02:
            self.read_isr = bool(value & 0x01)
        self.poll = bool(value & 0x04)

    def _ocw2(self, value: int) -> list[int]:
        command, line = value >> 5, value & 7
        ended = []
        if command in (1, 5):  # non-specific: the line of highest priority in service
            serving = self.isr & ~self.imr if self.special_mask else self.isr
            line = next((at & 7 for at in range(self.lowest + 1, self.lowest + 9) if serving >> (at & 7) & 1), -1)
        if command in (1, 3, 5, 7) and line >= 0 and self.isr >> line & 1:
            self.isr &= ~(1 << line)
            ended.append(line)
        if (command in (6, 7) or (command == 5 and ended)) and line >= 0:
            self.lowest = line
        if command in (0, 4):
            self.rotate_auto = command == 4
        return ended


@define
class PicState:
    """Both chips."""

    version: ClassVar[int] = 1
    master: Chip
    slave: Chip


class Pic:
    """Master at 0x20, slave at 0xA0 on the master's line 2, edge/level registers at 0x4D0."""

    def __init__(self, options: PicOptions) -> None:
        self.options = options
        self._level = False
        self.reset_chips()

    def reset_chips(self) -> None:
        """Both chips as after power-on, with the trigger modes of the options."""
        level = sum(1 << line for line in set(self.options.level))
        self.master = Chip(level_mask=1 << CASCADE, elcr=level & 0xF8)
        self.slave = Chip(elcr=level >> 8 & 0xDE)

    def plug(self, slot: Slot, /) -> None:
        self._lines, self._controllers = slot.board.lines, slot.board.controllers
        self._controllers.add_controller(self.set_irq)
        self._controllers.set_extint_source(self.acknowledge)
        slot.ranges.announce(Resource(hid="PNP0000", name="PIC", irqs=(CASCADE,)))

    def reset(self) -> None:
        lines = self.master.lines | self.slave.lines << 8
        self.reset_chips()
        self.master.lines, self.slave.lines = lines & 0xFF & ~(1 << CASCADE), lines >> 8
        self._update()

    def contribute(self, context: BootContext, /) -> None:
        """Without firmware, the chips are as a BIOS leaves them: initialized, with the lines that it serves open."""
        if not context.firmware:
            self.master.base, self.slave.base = BIOS_BASES
            self.master.imr, self.slave.imr = BIOS_MASKS
            self._update()

    def save(self) -> PicState:
        return copied(PicState(self.master, self.slave))

    def unchanged(self, state: PicState, /) -> bool:
        """True where :meth:`load` would change nothing."""
        return self.master == state.master and self.slave == state.slave

    def load(self, state: PicState, /) -> None:
        kept = copied(state)
        self.master, self.slave = kept.master, kept.slave
        self._update()

    # lines in, INTR out

    def set_irq(self, gsi: int, level: bool, /) -> None:
        """Drive line 0 to 15; others, and the cascade line 2, are not wired here."""
        if gsi == CASCADE or not 0 <= gsi < 16:
            return
        (self.slave if gsi & 8 else self.master).drive(gsi & 7, level)
        self._update()

    def acknowledge(self) -> int | None:
        """INTA cycle: the vector, that of line 7 when the request went away (spurious)."""
        if not self._level:
            return None
        line = self.master.pending()
        if line is None:
            vector = self.master.base + 7
        else:
            self.master.accept(line)
            vector = self.master.base + line
            if line == CASCADE:
                line = self.slave.pending()
                if line is not None:
                    self.slave.accept(line)
                vector = self.slave.base + (7 if line is None else line)
        self._update()
        return vector

    def _update(self) -> None:
        self.master.drive(CASCADE, self.slave.pending() is not None)
        level = self.master.pending() is not None
        if level != self._level:
            self._level = level
            self._controllers.set_extint(level)

    # ports

    def read_master(self, offset: int, size: int, /) -> int:
        return self._read(self.master, offset, size)

    def read_slave(self, offset: int, size: int, /) -> int:
        return self._read(self.slave, offset, size)

    def write_master(self, offset: int, size: int, value: int, /) -> None:
        self._write(self.master, 0, offset, size, value)

    def write_slave(self, offset: int, size: int, value: int, /) -> None:
        self._write(self.slave, 8, offset, size, value)

    def _read(self, chip: Chip, offset: int, size: int) -> int:
        value = read_bytes(chip.read, offset, size)
        self._update()
        return value

    def _write(self, chip: Chip, first: int, offset: int, size: int, value: int) -> None:
        def put(at: int, byte: int) -> None:
            ended = chip.write(at, byte)
            self._update()
            for line in ended:
                if chip.elcr >> line & 1:
                    self._lines[first + line].resample()

        write_bytes(put, offset, size, value)

    def read_elcr(self, offset: int, size: int, /) -> int:
        return read_bytes(lambda at: (self.slave if at else self.master).elcr, offset, size)

    def write_elcr(self, offset: int, size: int, value: int, /) -> None:
        def put(at: int, byte: int) -> None:
            if at:
                self.slave.elcr = byte & 0xDE
            else:
                self.master.elcr = byte & 0xF8

        write_bytes(put, offset, size, value)
        self._update()
