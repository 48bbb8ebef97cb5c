"""MC146818 real-time clock with 128 bytes of CMOS RAM (Motorola data sheet; PC layout as SeaBIOS reads it).

The time is the host's at power-on (or the option ``base``) plus the machine's clock. Flags are worked out when they
are looked at; timers run only for interrupts that the guest switched on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar

from attrs import field
from cardcage.device import Resource
from cardcage.errors import ConfigError
from cardcage.values import define, frozen

from cardcage_pc.chips.bytewise import read_bytes, write_bytes
from cardcage_pc.chips.copying import copied

if TYPE_CHECKING:
    from cardcage.boot import BootContext
    from cardcage.device import Slot

__all__ = ["Rtc", "RtcOptions", "RtcState"]

SECOND = 1_000_000_000
DAY = 86_400
SEC, SEC_ALARM, MIN, MIN_ALARM, HOUR, HOUR_ALARM, WEEKDAY, DAY_OF_MONTH, MONTH, YEAR = range(10)
REG_A, REG_B, REG_C, REG_D, CENTURY = 10, 11, 12, 13, 0x32
TIME = frozenset({SEC, MIN, HOUR, WEEKDAY, DAY_OF_MONTH, MONTH, YEAR, CENTURY})
B_SET, B_PIE, B_AIE, B_UIE, B_SQWE, B_BINARY, B_24H = 0x80, 0x40, 0x20, 0x10, 0x08, 0x04, 0x02
C_IRQ, C_PF, C_AF, C_UF = 0x80, 0x40, 0x20, 0x10
UPDATE = 244_141
"""Nanoseconds from UIP to the update."""


@frozen
class RtcOptions:
    """Options of ``rtc``.

    Attributes:
        base: ``"utc"``, ``"localtime"`` (of the host), or an ISO 8601 date and time to start from.
        boot: boot order for firmware, letters as QEMU's: ``a`` floppy, ``c`` disk, ``d`` CD, ``n`` network; at most 3.
    """

    base: str = "utc"
    boot: str = "cdn"


@define
class RtcState:
    """CMOS bytes and time. ``offset`` is the calendar time in ns since 1970 at clock 0."""

    version: ClassVar[int] = 1
    cmos: list[int] = field(factory=lambda: [0] * 128)
    index: int = 0
    offset: int = 0
    stopped: bool = False
    """SET, or the divider held in reset: the time registers are plain memory."""
    checked: int = 0
    """Clock up to which flags have been worked out."""
    disconnected: bool = False


class Rtc:
    """Index at port 0x70, data at 0x71, interrupt 8."""

    def __init__(self, options: RtcOptions) -> None:
        if len(options.boot) > 3 or set(options.boot) - set("acdn"):
            raise ConfigError(f'boot "{options.boot}": expected up to three letters out of a, c, d and n')
        self.options, self.state = options, RtcState()
        cmos = self.state.cmos
        cmos[REG_A], cmos[REG_B], cmos[REG_D] = 0x26, B_24H, 0x80
        order = [{"a": 1, "c": 2, "d": 3, "n": 4}[letter] for letter in options.boot] + [0, 0, 0]
        cmos[0x3D], cmos[0x38] = order[0] | order[1] << 4, order[2] << 4 | 1  # bit 0: no floppy signature check
        cmos[0x14] = 0x06  # equipment: mouse, FPU; no floppy

    def plug(self, slot: Slot, /) -> None:
        self._clock, self._irq, self._timer = slot.clock, slot.interrupts.line(8), slot.clock.timer(self._check)
        self._set_from_host()
        slot.ranges.announce(Resource(hid="PNP0B00", name="RTC", irqs=(8,)))

    def _set_from_host(self) -> None:
        self.state.offset = self._host_time() - self._clock.now()
        self.state.checked = self._clock.now()

    def _host_time(self) -> int:
        if self.options.base == "utc":
            return time.time_ns()
        if self.options.base == "localtime":
            return time.time_ns() + time.localtime().tm_gmtoff * SECOND
        from datetime import UTC, datetime  # only who sets a date pays for it

        try:
            start = datetime.fromisoformat(self.options.base)
            return int((start if start.tzinfo else start.replace(tzinfo=UTC)).timestamp()) * SECOND
        except ValueError as error:
            raise ConfigError(f'base "{self.options.base}": expected utc, localtime or YYYY-MM-DDTHH:MM:SS') from error

    def contribute(self, context: BootContext, /) -> None:
        """Leave the sizes of memory and the number of processors where firmware looks for them."""
        if self._clock.now() == 0:  # the first boot, which may come long after the machine was built
            self._set_from_host()
        cmos, low, high = self.state.cmos, context.ram_below_4g, context.ram_above_4g
        extended = min(max(low - 0x100000, 0) >> 10, 0xFFFF)
        above_16m = min(max(low - 0x1000000, 0) >> 16, 0xFFFF)
        for at, value in ((0x15, min(low >> 10, 640)), (0x17, extended), (0x30, extended), (0x34, above_16m)):
            cmos[at : at + 2] = value.to_bytes(2, "little")
        cmos[0x5B:0x5E] = min(high >> 16, 0xFFFFFF).to_bytes(3, "little")
        cmos[0x5F] = min(context.cpus - 1, 255)

    def reset(self) -> None:
        """RESET# clears the interrupt enables and flags; time and memory stay."""
        self.state.cmos[REG_B] &= ~(B_PIE | B_AIE | B_UIE | B_SQWE) & 0xFF
        self.state.cmos[REG_C] = 0
        self.state.disconnected = False
        self._check()

    def save(self) -> RtcState:
        return copied(self.state)

    def unchanged(self, state: RtcState, /) -> bool:
        """True where :meth:`load` would change nothing."""
        return self.state == state

    def load(self, state: RtcState, /) -> None:
        self.state = copied(state)
        self._check()

    def disconnect(self, off: bool) -> None:
        """Take the clock off interrupt 8: the HPET's legacy replacement."""
        self.state.disconnected = off
        self._check()

    # ports

    def read(self, offset: int, size: int, /) -> int:
        return read_bytes(self._get, offset, size)

    def write(self, offset: int, size: int, value: int, /) -> None:
        write_bytes(self._put, offset, size, value)

    def _get(self, offset: int) -> int:
        state = self.state
        if offset == 0:
            return 0xFF
        at, now = state.index, self._clock.now()
        if at in TIME and not state.stopped:
            self._store_time((state.offset + now) // SECOND)
        elif at == REG_A:
            left = SECOND - (state.offset + now) % SECOND
            return state.cmos[REG_A] | (0x80 if left <= UPDATE and not state.stopped else 0)
        elif at == REG_C:
            self._check()
            value, state.cmos[REG_C] = state.cmos[REG_C], 0
            self._check()
            return value
        return state.cmos[at]

    def _put(self, offset: int, value: int) -> None:
        state = self.state
        if offset == 0:
            state.index = value & 0x7F
            return
        at, now = state.index, self._clock.now()
        self._check()
        if at in (REG_C, REG_D):
            return
        if at in TIME and not state.stopped:
            self._store_time((state.offset + now) // SECOND)
            state.cmos[at] = value
            state.offset = self._load_time() * SECOND + (state.offset + now) % SECOND - now
            return
        if at in (REG_A, REG_B):
            if not state.stopped:
                self._store_time((state.offset + now) // SECOND)
            state.cmos[at] = value & 0x7F if at == REG_A else value & ~B_UIE if value & B_SET else value
            self._start_or_stop(now, held=at == REG_A)
        else:
            state.cmos[at] = value
        self._check()

    def _start_or_stop(self, now: int, *, held: bool) -> None:
        state = self.state
        stopped = bool(state.cmos[REG_B] & B_SET) or state.cmos[REG_A] >> 4 & 7 >= 6
        if state.stopped and not stopped:
            # the first update comes half a second after the divider is released
            state.offset = self._load_time() * SECOND + (SECOND // 2 if held else 0) - now
            state.checked = now
        state.stopped = stopped

    # calendar

    def _encode(self, value: int) -> int:
        return value if self.state.cmos[REG_B] & B_BINARY else value // 10 % 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self.state.cmos[REG_B] & B_BINARY else (value >> 4) * 10 + (value & 15)

    def _hour(self, value: int) -> int:
        if self.state.cmos[REG_B] & B_24H:
            return self._decode(value)
        return self._decode(value & 0x7F) % 12 + (12 if value & 0x80 else 0)

    def _store_time(self, seconds: int) -> None:
        cmos, now = self.state.cmos, time.gmtime(seconds)
        hour = now.tm_hour
        if cmos[REG_B] & B_24H:
            cmos[HOUR] = self._encode(hour)
        else:
            cmos[HOUR] = self._encode(hour % 12 or 12) | (0x80 if hour >= 12 else 0)
        cmos[SEC], cmos[MIN] = self._encode(now.tm_sec), self._encode(now.tm_min)
        cmos[WEEKDAY] = (now.tm_wday + 1) % 7 + 1  # Sunday is 1
        cmos[DAY_OF_MONTH], cmos[MONTH] = self._encode(now.tm_mday), self._encode(now.tm_mon)
        cmos[YEAR], cmos[CENTURY] = self._encode(now.tm_year % 100), self._encode(now.tm_year // 100 % 100)

    def _load_time(self) -> int:
        """Seconds since 1970 of the time registers; what is no date (month 0, hour 99) is carried over or cut."""
        cmos = self.state.cmos
        year = min(max(self._decode(cmos[CENTURY]) * 100 + self._decode(cmos[YEAR]), 1), 9000)
        month = min(max(self._decode(cmos[MONTH]), 1), 12)
        # days since 1970, with the year taken to begin in March, so that the leap day is its last
        year -= month < 3
        days = 365 * year + year // 4 - year // 100 + year // 400 + (153 * ((month + 9) % 12) + 2) // 5 - 719_469
        hours = (days + self._decode(cmos[DAY_OF_MONTH])) * 24 + self._hour(cmos[HOUR])
        return (hours * 60 + self._decode(cmos[MIN])) * 60 + self._decode(cmos[SEC])

    def _next_alarm(self, after: int) -> int | None:
        """The first second past *after* (since 1970) that the alarm registers match, ``None`` for never."""
        cmos = self.state.cmos
        wanted = []
        for at, decode, limit in (
            (HOUR_ALARM, self._hour, 24),
            (MIN_ALARM, self._decode, 60),
            (SEC_ALARM, self._decode, 60),
        ):
            value = decode(cmos[at])
            wanted.append(range(limit) if cmos[at] >= 0xC0 else range(value, value + 1))
            if cmos[at] < 0xC0 and value >= limit:
                return None
        hours, minutes, seconds = wanted
        day, rest = divmod(after + 1, DAY)
        first = (rest // 3600, rest // 60 % 60, rest % 60)
        for hour in hours:
            if hour < first[0]:
                continue
            for minute in minutes:
                if (hour, minute) < first[:2]:
                    continue
                for second in seconds:
                    if (hour, minute, second) >= first:
                        return day * DAY + hour * 3600 + minute * 60 + second
        return (day + 1) * DAY + hours[0] * 3600 + minutes[0] * 60 + seconds[0]

    # flags and interrupt

    def _period(self) -> int:
        """Periodic interrupt rate in units of 1/32768 s, 0 for none."""
        rate = self.state.cmos[REG_A] & 15
        if not rate or self.state.cmos[REG_A] >> 4 & 7 >= 6:
            return 0
        return 1 << (rate + 6 if rate < 3 else rate - 1)

    def _check(self) -> None:
        """Work out the flags up to now, drive the interrupt and set the timer for the next one."""
        state, now = self.state, self._clock.now()
        cmos, before = state.cmos, state.checked
        state.checked = max(now, before)
        flags, wake = 0, []
        if period := self._period():
            ticks = now * 32768 // SECOND // period
            if ticks > before * 32768 // SECOND // period:
                flags |= C_PF
            if cmos[REG_B] & B_PIE:
                wake.append(-(-(ticks + 1) * period * SECOND // 32768))
        if not state.stopped:
            second = (state.offset + now) // SECOND
            last = (state.offset + before) // SECOND
            if second > last:
                flags |= C_UF
            if cmos[REG_B] & B_UIE:
                wake.append((second + 1) * SECOND - state.offset)
            alarm = self._next_alarm(last)
            if alarm is not None and alarm <= second:
                flags |= C_AF
            if cmos[REG_B] & B_AIE and (alarm := self._next_alarm(second)) is not None:
                wake.append(alarm * SECOND - state.offset)
        cmos[REG_C] = (cmos[REG_C] | flags) & 0x70
        active = cmos[REG_C] & cmos[REG_B] & 0x70
        if active:
            cmos[REG_C] |= C_IRQ
        self._irq.set(bool(active) and not state.disconnected)
        if wake and not active:  # reading register C comes back here
            self._timer.arm(min(wake))
        else:
            self._timer.cancel()
