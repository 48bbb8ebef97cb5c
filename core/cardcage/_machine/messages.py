"""A device's interrupts: the concrete :class:`~cardcage.device.Interrupts`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import evolve

from cardcage._machine.granted import GrantedVm, LineGate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage._machine.asking import Asking
    from cardcage.accelerator import AcceleratedVm
    from cardcage.config import Place
    from cardcage.interrupts import IrqLine, Line


class DeviceInterrupts:
    """Lines, and messages to local APICs.

    Args:
        number: the ``irq`` key, None where the configuration has none. place: the device's, for errors.
        owns: says if the device answers at all of a range: ``owns(pio, address, size)``.
    """

    def __init__(
        self,
        asking: Asking,
        lines: Sequence[Line],
        vm: AcceleratedVm,
        irqchip: str,
        number: int | None,
        place: Place,
        log: Any,
        owns: Callable[[bool, int, int], bool],
    ) -> None:
        self._asking, self._lines, self._real, self._place, self._log = asking, lines, vm, place, log
        self.irqchip, self.number = irqchip, number
        self.vm = GrantedVm(vm, owns, self._route)
        self.gsis: list[int] = []
        self._messages: Callable[[int, int], None] | None = None

    def line(self, gsi: int | None = None, /) -> IrqLine:
        """A source of line *gsi* (0 to 23), by default of the ``irq`` key's."""
        asking, own = self._asking, gsi is None or gsi == self.number
        gsi = self.number if gsi is None else gsi
        if gsi is None:
            raise self._place.error(f'device "{asking.device}" needs an interrupt: give it the key irq')
        if not 0 <= gsi < len(self._lines):
            most = len(self._lines) - 1
            raise self._place.error(f'device "{asking.device}": interrupt {gsi}: expected 0 to {most}')
        self.gsis.append(gsi)
        if not asking.active:
            return self._lines[gsi].source()
        gate, act = LineGate(self._lines[gsi]), asking.act(asking.machine_label, "interrupt", ("raise",), gsi=gsi)
        target = asking.label if own else asking.mediator.label(act, f"gsi{gsi}")  # own: the operator gave it this one
        asking.grant(evolve(act, target=target), gate.revoke, gate.restore)
        return gate.source

    def msi(self, address: int, data: int, /) -> None:
        """Send a message-signalled interrupt; lost while it is not granted."""
        if self._messages is None:
            self._messages = self._real.signal_msi
            self._route(lambda: self._send_by(self._lose), lambda: self._send_by(self._real.signal_msi))
        self._messages(address, data)

    def _send_by(self, messages: Callable[[int, int], None]) -> None:
        self._messages = messages

    def _lose(self, address: int, data: int, /) -> None:
        self._log.warning("security: message refused", address=hex(address))

    def _route(self, revoke: Callable[[], None], restore: Callable[[], None]) -> Callable[[], None]:
        asking = self._asking
        act = asking.act(asking.machine_label, "interrupt", ("route",))
        return asking.grant(act, revoke, restore, must=False)
