"""IA-PC HPET (Intel specification 1.0a) with three periodic-capable comparators and legacy routing.

The main counter runs at 100 MHz, 64 bits wide, and is computed from the machine's clock. In legacy replacement mode
comparator 0 is interrupt 0 and comparator 1 interrupt 8, and the 8254 and the RTC are taken off them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from attrs import field
from cardcage.device import Resource
from cardcage.values import define

from cardcage_pc.chips.copying import copied
from cardcage_pc.chips.pit import SHORTEST, Pit
from cardcage_pc.chips.rtc import Rtc

if TYPE_CHECKING:
    from cardcage.device import Slot

__all__ = ["ADDRESS", "CAPABILITIES", "Hpet", "HpetState"]

ADDRESS, TIMERS, PERIOD = 0xFED00000, 3, 10_000_000
"""Base, comparators, femtoseconds of a tick (10 ns)."""
TICK = 10
CAPABILITIES = PERIOD << 32 | 0x8086 << 16 | 1 << 15 | 1 << 13 | TIMERS - 1 << 8 | 1
ROUTES = 0x00F00004
"""Lines that a comparator can be routed to: 2 and 20 to 23."""
LEVEL, ENABLE, PERIODIC, CAN_PERIODIC, WIDE, SET_VALUE, NARROW = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 8
WRITABLE = LEVEL | ENABLE | PERIODIC | SET_VALUE | NARROW | 0x3E00
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


@define
class Comparator:
    """One timer block."""

    version: ClassVar[int] = 1
    config: int = 0
    value: int = MASK64
    period: int = 0
    due: int | None = None
    """Ticks on the never-wrapping count at which it fires next."""

    @property
    def mask(self) -> int:
        """Bits that are compared."""
        return MASK32 if self.config & NARROW else MASK64


@define
class HpetState:
    """General registers and comparators. The counter stands at ``count``, or counts on from it since ``start``."""

    version: ClassVar[int] = 1
    config: int = 0
    status: int = 0
    count: int = 0
    start: int = 0
    timers: list[Comparator] = field(factory=lambda: [Comparator() for _ in range(TIMERS)])


class Hpet:
    """Memory-mapped at 0xFED00000, 1 KiB."""

    def __init__(self) -> None:
        self.state = HpetState()

    def plug(self, slot: Slot, /) -> None:
        self._slot, self._clock = slot, slot.clock
        self._lines = {gsi: slot.interrupts.line(gsi) for gsi in (0, 8, 20, 21, 22, 23)}
        slot.ranges.announce(Resource(hid="PNP0103", name="HPET"))
        self._alarms = [slot.clock.timer(partial(self._fire, at)) for at in range(TIMERS)]

    def reset(self) -> None:
        was = self.state.config & 2
        self.state = HpetState()
        for line in self._lines.values():
            line.set(False)
        for alarm in self._alarms:
            alarm.cancel()
        if was:
            self._route_legacy(False)

    def save(self) -> HpetState:
        self._settle_all()
        return copied(self.state)

    def unchanged(self, state: HpetState, /) -> bool:
        """True where :meth:`load` would change nothing."""
        return self.state == state

    def load(self, state: HpetState, /) -> None:
        self.state = copied(state)
        self._arm_all()
        self._levels()

    def _route_legacy(self, on: bool) -> None:
        for plugged in self._slot.board.devices.values():
            if isinstance(plugged.device, (Pit, Rtc)):
                plugged.device.disconnect(on)

    # time

    def count(self) -> int:
        """The main counter, not cut to 64 bits."""
        state = self.state
        return state.count + ((self._clock.now() - state.start) // TICK if state.config & 1 else 0)

    def _arm(self, at: int) -> None:
        """Find when comparator *at* matches next and set its alarm."""
        timer, count = self.state.timers[at], self.count()
        if not self.state.config & 1:
            self._alarms[at].cancel()
            timer.due = None
            return
        ahead = (timer.value - count) & timer.mask
        timer.due = count + (ahead or timer.mask + 1)
        if not timer.config & (LEVEL | ENABLE):
            self._alarms[at].cancel()  # nobody would notice; a guest leaves one periodic for good
            return
        when = self.state.start + (timer.due - self.state.count) * TICK
        self._alarms[at].arm(max(when, self._clock.now() + SHORTEST) if timer.config & PERIODIC else when)

    def _arm_all(self) -> None:
        for at in range(TIMERS):
            self._arm(at)

    def _settle(self, at: int) -> bool:
        """Move on a comparator that has matched, be it long ago; False where it has not."""
        timer, count = self.state.timers[at], self.count()
        if timer.due is None or count < timer.due:
            return False
        if timer.config & PERIODIC and timer.period:
            missed = (count - timer.due) // timer.period  # a late alarm keeps the phase
            timer.value = (timer.value + (missed + 1) * timer.period) & timer.mask
        self._arm(at)
        return True

    def _settle_all(self) -> None:
        """Those without an alarm, before anybody looks at one, or changes what moves it on."""
        for at, timer in enumerate(self.state.timers):
            if not timer.config & (LEVEL | ENABLE):
                self._settle(at)

    def _fire(self, at: int) -> None:
        timer = self.state.timers[at]
        if not self._settle(at):
            self._arm(at)
            return
        if timer.config & LEVEL:
            self.state.status |= 1 << at
            self._levels()
        elif timer.config & ENABLE and (line := self._line(at)) is not None:
            self._lines[line].pulse()

    # interrupts

    def _line(self, at: int) -> int | None:
        if self.state.config & 2 and at < 2:
            return 8 if at else 0
        route = self.state.timers[at].config >> 9 & 31
        return None if not ROUTES >> route & 1 else 0 if route == 2 else route

    def _levels(self) -> None:
        high = {
            self._line(at)
            for at, timer in enumerate(self.state.timers)
            if timer.config & LEVEL and timer.config & ENABLE and self.state.status >> at & 1
        }
        for number, line in self._lines.items():
            line.set(number in high)

    # registers: 64 bits wide, read and written as 32 or 64

    def read(self, offset: int, size: int, /) -> int:
        return self._get(offset & ~7) >> 8 * (offset & 7) & (1 << 8 * size) - 1

    def _get(self, offset: int) -> int:
        state = self.state
        match offset:
            case 0x00:
                return CAPABILITIES
            case 0x10:
                return state.config
            case 0x20:
                return state.status
            case 0xF0:
                return self.count() & MASK64
        at, register = divmod(offset - 0x100, 0x20)
        if not 0 <= at < TIMERS:
            return 0
        timer = state.timers[at]
        match register:
            case 0x00:
                return timer.config & ~SET_VALUE | CAN_PERIODIC | WIDE | ROUTES << 32
            case 0x08:
                self._settle_all()
                return timer.value
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None:
        if size < 4 or offset & (size - 1):
            return  # the specification allows aligned 32- and 64-bit accesses only
        shift = 8 * (offset & 7)
        mask = (1 << 8 * size) - 1 << shift
        self._put(offset & ~7, value << shift & mask, mask)

    def _put(self, offset: int, value: int, mask: int) -> None:
        state = self.state
        self._settle_all()
        match offset:
            case 0x10:
                self._configure((state.config & ~mask | value) & 3)
            case 0x20:
                state.status &= ~value
                self._levels()
            case 0xF0:
                now = self._clock.now()
                state.count, state.start = (self.count() & MASK64 & ~mask) | value, now
                self._arm_all()
        at, register = divmod(offset - 0x100, 0x20)
        if 0 <= at < TIMERS and register in (0, 8):
            timer = state.timers[at]
            if register == 0:
                timer.config = (timer.config & ~mask | value) & WRITABLE
                if timer.config & NARROW:
                    timer.value &= MASK32
                if not timer.config & LEVEL:
                    state.status &= ~(1 << at)
                self._levels()
            else:
                self._compare(timer, value, mask)
            self._arm(at)

    def _compare(self, timer: Comparator, value: int, mask: int) -> None:
        """Write a comparator. In periodic mode that is the period; the accumulator changes only after SETVAL."""
        if timer.config & PERIODIC:
            timer.period = (timer.period & ~mask | value) & timer.mask
        if not timer.config & PERIODIC or timer.config & SET_VALUE:
            timer.value = (timer.value & ~mask | value) & timer.mask
        timer.config &= ~SET_VALUE

    def _configure(self, config: int) -> None:
        state, old = self.state, self.state.config
        if (config ^ old) & 1:
            now = self._clock.now()
            state.count, state.start = self.count() & MASK64, now
        state.config = config
        self._arm_all()
        if (config ^ old) & 2:
            for line in self._lines.values():
                line.set(False)
            self._route_legacy(bool(config & 2))
            self._levels()
