"""The machine's interrupt wiring: 24 lines, the controllers that take them in, and the way back (INTA, EOI)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.interrupts import Line

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.accelerator import AcceleratedVm

LINES = 24
"""Global system interrupts: the inputs of a PC's one IOAPIC."""


class Wiring:
    """Joins lines to controllers. All under the machine's lock.

    Args:
        vm: whose irqchip takes the lines when *irqchip* is ``full``; else the registered controllers do.
        wake: called when an external interrupt came up, for a processor that waits in HLT outside the accelerator.
    """

    def __init__(self, vm: AcceleratedVm, irqchip: str, wake: Callable[[], None]) -> None:
        self._vm, self._wake = vm, wake
        self.lines = [Line(self._changed(gsi, irqchip == "full")) for gsi in range(LINES)]
        self.controllers: list[Callable[[int, bool], None]] = []
        self.eoi_listeners: list[Callable[[int], None]] = []
        self.extint_source: Callable[[], int | None] | None = None
        self.extint_level = False

    def _changed(self, gsi: int, full: bool) -> Callable[[bool], None]:
        def tell(level: bool) -> None:
            for controller in self.controllers:
                controller(gsi, level)

        def tell_accelerator(level: bool) -> None:
            self._vm.set_irq(gsi, level)

        return tell_accelerator if full else tell

    def add_controller(self, set_irq: Callable[[int, bool], None], /) -> None:
        """See :class:`cardcage.device.Controllers`."""
        self.controllers.append(set_irq)

    def set_extint_source(self, acknowledge: Callable[[], int | None], /) -> None:
        """See :class:`cardcage.device.Controllers`."""
        self.extint_source = acknowledge

    def add_eoi_listener(self, listener: Callable[[int], None], /) -> None:
        """See :class:`cardcage.device.Controllers`."""
        self.eoi_listeners.append(listener)

    def set_extint(self, level: bool, /) -> None:
        """See :class:`cardcage.device.Controllers`."""
        self.extint_level = level
        self._vm.set_extint(level)
        if level:
            self._wake()

    def acknowledge(self) -> int | None:
        """The INTA cycle: the vector, None when nothing is pending any longer."""
        return None if self.extint_source is None else self.extint_source()

    def end_of_interrupt(self, vector: int) -> None:
        """An EOI broadcast of a local APIC."""
        for listener in self.eoi_listeners:
            listener(vector)
