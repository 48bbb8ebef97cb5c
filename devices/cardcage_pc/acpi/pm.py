"""ACPI fixed hardware (ACPI 6.4, 4.8): PM1 event and control blocks, PM timer, SCI, power button, S5.

Ports as QEMU's ``pc``: 0x600 PM1a event, 0x604 PM1a control, 0x608 timer (24 bits), 0xAFE0 general-purpose events (16
status bits, 16 to enable them). There is no SMI command port: the machine is in ACPI mode from power-on, SCI_EN always
reads 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cardcage.values import define

from cardcage_pc.chips.copying import copied

if TYPE_CHECKING:
    from cardcage.device import Slot

__all__ = ["BASE", "FREQUENCY", "GPE_BASE", "SCI", "SLP_TYP_S5", "AcpiPm", "AcpiPmState"]

BASE, GPE_BASE, FREQUENCY, SCI = 0x600, 0xAFE0, 3_579_545, 9
SECOND = 1_000_000_000
TIMER_STS, GLOBAL_STS, POWER_STS, RTC_STS, WAKE_STS = 1 << 0, 1 << 5, 1 << 8, 1 << 10, 1 << 15
EVENTS = TIMER_STS | GLOBAL_STS | POWER_STS | RTC_STS
SCI_EN, SLP_EN = 1, 1 << 13
SLP_TYP_S5 = 0
OFF = "the guest powered itself off, and is kept"
HALF = 1 << 23
"""TMR_STS is set each time bit 23 of the timer changes."""


@define
class AcpiPmState:
    """Status, enable and control registers."""

    version: ClassVar[int] = 1
    status: int = 0
    enable: int = 0
    control: int = SCI_EN
    half: int = 0
    """How often bit 23 of the timer had changed when the status was last worked out."""
    gpe_status: int = 0
    gpe_enable: int = 0


class AcpiPm:
    """Sixteen ports from 0x600, four from 0xAFE0; SCI is level-triggered GSI 9.

    Attributes:
        keeps: a guest that powers itself off is paused, and not ended: a reset and a resume start it again.
        is_off: the guest is off, and kept.
    """

    def __init__(self) -> None:
        self.state = AcpiPmState()
        self.keeps = self.is_off = False

    def plug(self, slot: Slot, /) -> None:
        self._clock, self._power, self._log = slot.clock, slot.power, slot.log
        self._irq, self._timer = slot.interrupts.line(SCI), slot.clock.timer(self._update)

    def reset(self) -> None:
        self.is_off = False
        self.state = AcpiPmState(half=self.ticks() // HALF)
        self._update()

    def save(self) -> AcpiPmState:
        return copied(self.state)

    def unchanged(self, state: AcpiPmState, /) -> bool:
        """True where :meth:`load` would change nothing."""
        return self.state == state

    def load(self, state: AcpiPmState, /) -> None:
        self.state = copied(state)
        self._update()

    def power_button(self) -> None:
        """Press the power button: the guest is told by SCI and shuts down if it wants to."""
        self.state.status |= POWER_STS
        self._update()

    def end(self) -> None:
        """Power off a machine that was kept."""
        self._power.off()

    def general_event(self, number: int) -> None:
        """General-purpose event *number*, 0 to 15, happened."""
        self.state.gpe_status |= 1 << number
        self._update()

    @property
    def button_enabled(self) -> bool:
        """The guest asked to be told of the power button."""
        return bool(self.state.enable & POWER_STS)

    def ticks(self) -> int:
        """PM timer ticks since the machine was built, not cut to 24 bits."""
        return self._clock.now() * FREQUENCY // SECOND

    def _update(self) -> None:
        state, half = self.state, self.ticks() // HALF
        if half != state.half:
            state.half, state.status = half, state.status | TIMER_STS
        self._irq.set(bool(state.status & state.enable & EVENTS or state.gpe_status & state.gpe_enable))
        if state.enable & TIMER_STS and not state.status & TIMER_STS:
            self._timer.arm(-(-(half + 1) * HALF * SECOND // FREQUENCY))
        else:
            self._timer.cancel()

    def read(self, offset: int, size: int, /) -> int:
        if offset == 8 and size == 4:
            return self.ticks() & 0xFFFFFF
        self._update()
        state = self.state
        block = state.status | state.enable << 16 | state.control << 32 | (self.ticks() & 0xFFFFFF) << 64
        return block >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int, /) -> None:
        self._update()
        state, shift = self.state, 8 * offset
        mask, value = (1 << 8 * size) - 1 << shift, value << shift
        state.status &= ~value & 0xFFFF  # write one to clear
        if mask & 0xFFFF0000:
            state.enable = (state.enable & ~(mask >> 16) | value >> 16) & EVENTS
        if mask & 0xFFFF_00000000:
            control = (state.control & ~(mask >> 32) | value >> 32) & 0xFFFF
            state.control = control & ~SLP_EN & 0x1C06 | SCI_EN
            if control & SLP_EN:
                self._sleep(control >> 10 & 7)
        self._update()

    def read_gpe(self, offset: int, size: int, /) -> int:
        return (self.state.gpe_status | self.state.gpe_enable << 16) >> 8 * offset & (1 << 8 * size) - 1

    def write_gpe(self, offset: int, size: int, value: int, /) -> None:
        state, shift = self.state, 8 * offset
        mask, value = (1 << 8 * size) - 1 << shift, value << shift
        state.gpe_status &= ~value & 0xFFFF  # write one to clear
        state.gpe_enable = (state.gpe_enable & ~(mask >> 16) | value >> 16) & 0xFFFF
        self._update()

    def _sleep(self, kind: int) -> None:
        if kind == SLP_TYP_S5 and self.keeps:
            self.is_off = True
            self._power.pause(OFF)
        elif kind == SLP_TYP_S5:
            self._power.off()
        else:
            self._log.warning("sleep state not offered by this machine", slp_typ=kind)
