"""Interrupt lines and messages: a protocol of its own beside the bus.

A :class:`Line` is a wire with any number of sources, wired OR: it is high while at least one source drives it high.
The machine numbers its lines as the PC does (global system interrupts, GSI 0 to 23; ISA interrupts keep their numbers,
GSI 2 is where the 8254's IRQ 0 arrives at the IOAPIC).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["InterruptController", "IrqLine", "IrqSource", "Line"]


class IrqLine(Protocol):
    """A device's end of an interrupt line: one source of that line."""

    def set(self, level: bool, /) -> None:
        """Drive this source; only changes travel on."""

    def pulse(self) -> None:
        """High and low again: one edge."""


class InterruptController(Protocol):
    """The receiver of lines: the accelerator's in-kernel irqchip, or the PIC and IOAPIC cards."""

    def set_irq(self, gsi: int, level: bool, /) -> None: ...


class Line:
    """A wired-OR line.

    Args:
        changed: called with the new level each time it changes.

    A level-triggered consumer that was served calls :meth:`resample`: sources that are still high raise it again
    through their ``on_resample``, as KVM's resample eventfd does.
    """

    __slots__ = ("_changed", "_high", "level", "resamplers")

    def __init__(self, changed: Callable[[bool], None]) -> None:
        self._changed = changed
        self._high: set[object] = set()
        self.level = False
        self.resamplers: list[Callable[[], None]] = []

    def source(self) -> IrqSource:
        """A new source of this line, low."""
        return IrqSource(self)

    def drive(self, source: object, level: bool) -> None:
        """Set what *source* contributes."""
        (self._high.add if level else self._high.discard)(source)
        now = bool(self._high)
        if now != self.level:
            self.level = now
            self._changed(now)

    def resample(self) -> None:
        """The consumer acknowledged (EOI): tell the sources that want to know."""
        for call in self.resamplers:
            call()


class IrqSource:
    """One source of a :class:`Line`; satisfies :class:`IrqLine`."""

    __slots__ = ("_line",)

    def __init__(self, line: Line) -> None:
        self._line = line

    @property
    def high(self) -> bool:
        """True if this source drives the line."""
        return self in self._line._high

    def move(self, line: Line) -> None:
        """Let go of its line and drive *line* instead, at the same level."""
        high = self.high
        self.set(False)
        self._line = line
        self.set(high)

    def set(self, level: bool, /) -> None:
        self._line.drive(self, level)

    def pulse(self) -> None:
        self._line.drive(self, True)
        self._line.drive(self, False)
