"""Intel 8254 programmable interval timer (data sheet 231164) and port 0x61, which gates and reads its channel 2.

Counters are computed from the machine's clock, never counted down, so a guest that calibrates against them reads
exact time. A count that is written restarts the counter at once, also in modes 2 and 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from attrs import field
from cardcage.device import Resource
from cardcage.values import define

from cardcage_pc.chips.bytewise import read_bytes, write_bytes
from cardcage_pc.chips.copying import copied

if TYPE_CHECKING:
    from cardcage.boot import BootContext
    from cardcage.device import Slot

__all__ = ["FREQUENCY", "SHORTEST", "Channel", "Pit", "PitState"]

FREQUENCY = 1_193_182
SECOND = 1_000_000_000
SHORTEST = 50_000
"""Nanoseconds: a guest that asks for periodic interrupts more often than this loses the rest, not the host's time."""


@define
class Channel:
    """One counter. Times are nanoseconds of the machine's clock, ``elapsed`` is in ticks."""

    version: ClassVar[int] = 1
    mode: int = 3
    bcd: bool = False
    access: int = 3
    """1 low byte, 2 high byte, 3 low then high."""
    reload: int = 0
    """Count as written, 0 for the largest."""
    loaded: bool = False
    """A count was written since the mode was set."""
    gate: bool = True
    triggered: bool = False
    """Modes 1 and 5: the gate rose since the count was written."""
    start: int = 0
    held: int = 0
    """Ticks that had passed when a low gate stopped the counter."""
    write_low: int | None = None
    read_high: bool = False
    latched: list[int] = field(factory=list)
    """Bytes that reads return first."""
    status: int | None = None

    @property
    def count(self) -> int:
        """Ticks of one period, 1 to 65536."""
        if self.bcd:
            return sum((self.reload >> 4 * at & 15) * 10**at for at in range(4)) or 10000
        return self.reload or 0x10000

    def running(self) -> bool:
        """True if ticks count now."""
        if not self.loaded:
            return False
        return self.triggered if self.mode in (1, 5) else self.gate

    def elapsed(self, now: int) -> int:
        """Ticks since the count was loaded."""
        if not self.running():
            return self.held
        return self.held + max(now - self.start, 0) * FREQUENCY // SECOND

    def output(self, now: int) -> bool:
        """The OUT pin."""
        ticks, count = self.elapsed(now), self.count
        match self.mode:
            case 0:
                return self.loaded and ticks >= count
            case 1:
                return not self.triggered or ticks >= count
            case 2:
                return not self.running() or ticks % count != count - 1
            case 3:
                return not self.running() or ticks % count < (count + 1) // 2
            case _:
                return not (self.loaded and ticks == count)

    def value(self, now: int) -> int:
        """The counting element, as 16 bits (BCD digits in BCD mode)."""
        ticks, count = self.elapsed(now), self.count
        if not self.loaded:
            left = 0
        elif self.mode == 2:
            left = count - ticks % count
        elif self.mode == 3:
            left = count - 2 * ticks % count
        else:
            left = count - ticks
        if self.bcd:
            left %= 10000
            return sum(left // 10**at % 10 << 4 * at for at in range(4))
        return left & 0xFFFF

    def next_rise(self, now: int) -> int | None:
        """When OUT next goes from low to high after *now*, ``None`` for never."""
        if not self.running():
            return None
        ticks, count = self.elapsed(now), self.count
        if self.mode in (2, 3):
            target = (ticks // count + 1) * count
        else:
            target = count + (self.mode in (4, 5))
            if ticks >= target:
                return None
        return self.start - (-(target - self.held) * SECOND // FREQUENCY)

    def set_gate(self, level: bool, now: int) -> None:
        """Drive the GATE pin (data sheet, figure 21)."""
        if level == self.gate:
            return
        if level and self.mode in (1, 2, 3, 5):  # a rising edge restarts
            self.gate, self.triggered, self.held, self.start = True, self.loaded, 0, now
        elif self.mode in (0, 4):
            self.held = self.elapsed(now)
            self.gate, self.start = level, now
        else:
            self.gate = level

    def set_mode(self, value: int, now: int) -> None:
        """A control word with a read/write field other than 0."""
        mode = value >> 1 & 7
        self.mode, self.bcd, self.access = mode & 3 if mode > 5 else mode, bool(value & 1), value >> 4 & 3
        self.loaded = self.triggered = self.read_high = False
        self.write_low, self.status, self.held, self.start = None, None, 0, now
        self.latched.clear()

    def load(self, value: int, now: int) -> None:
        """A whole count was written."""
        self.reload, self.loaded, self.triggered, self.start, self.held = value, True, False, now, 0

    def latch(self, now: int) -> None:
        """Keep the count for reading; a second latch before the first is read does nothing."""
        if not self.latched:
            value = self.value(now)
            low, high = value & 0xFF, value >> 8
            self.latched[:] = [[], [low], [high], [low, high]][self.access]

    def latch_status(self, now: int) -> None:
        if self.status is None:
            self.status = (
                self.output(now) << 7 | (not self.loaded) << 6 | self.access << 4 | self.mode << 1 | int(self.bcd)
            )

    def read(self, now: int) -> int:
        if self.status is not None:
            status, self.status = self.status, None
            return status
        if self.latched:
            return self.latched.pop(0)
        value = self.value(now)
        high = self.access == 2 or (self.access == 3 and self.read_high)
        if self.access == 3:
            self.read_high = not self.read_high
        return value >> 8 if high else value & 0xFF

    def write(self, value: int, now: int) -> bool:
        """Write a byte of the count; returns whether the count is whole."""
        if self.access == 3 and self.write_low is None:
            self.write_low = value
            if self.mode == 0:  # the first byte stops counting
                self.loaded = False
            return False
        if self.access == 3:
            value = value << 8 | (self.write_low or 0)
            self.write_low = None
        elif self.access == 2:
            value <<= 8
        self.load(value, now)
        return True


@define
class PitState:
    """The three channels and port 0x61's speaker bit."""

    version: ClassVar[int] = 1
    channels: list[Channel]
    speaker: bool = False
    disconnected: bool = False
    due: int | None = None
    """Clock at which channel 0 is looked at next."""


def _fresh() -> PitState:
    return PitState([Channel(), Channel(), Channel(gate=False)])


class Pit:
    """Channel 0 drives interrupt 0, channel 2 the speaker."""

    def __init__(self) -> None:
        self.state = _fresh()

    def plug(self, slot: Slot, /) -> None:
        self._clock, self._timer, self._irq = slot.clock, slot.clock.timer(self._rise), slot.interrupts.line(0)
        slot.ranges.announce(Resource(hid="PNP0100", name="TMR", irqs=(0,)))

    def reset(self) -> None:
        self.state = _fresh()
        self._schedule()

    def contribute(self, context: BootContext, /) -> None:
        """Without firmware, as SeaBIOS leaves it: channel 0 gives the 18.2 Hz tick (mode 2 with the largest count)."""
        if not context.firmware:
            now, channel = self._clock.now(), self.state.channels[0]
            channel.set_mode(0x34, now)
            channel.load(0, now)
            self._schedule()

    def save(self) -> PitState:
        return copied(self.state)

    def unchanged(self, state: PitState, /) -> bool:
        """True where :meth:`load` would change nothing."""
        return self.state == state

    def load(self, state: PitState, /) -> None:
        self.state = copied(state)
        self._schedule()
        if state.due is not None and self.state.due is not None:  # it was put off for a guest that asks too often
            self._arm(state.due)

    def disconnect(self, off: bool) -> None:
        """Take channel 0 off interrupt 0: the HPET's legacy replacement."""
        self.state.disconnected = off
        self._schedule()

    # ports 0x40 to 0x43

    def read(self, offset: int, size: int, /) -> int:
        return read_bytes(self._get, offset, size)

    def _get(self, offset: int) -> int:
        return 0 if offset == 3 else self.state.channels[offset].read(self._clock.now())

    def write(self, offset: int, size: int, value: int, /) -> None:
        write_bytes(self._put, offset, size, value)

    def _put(self, offset: int, value: int) -> None:
        now, channels = self._clock.now(), self.state.channels
        if offset < 3:
            channels[offset].write(value, now)
        elif value >> 6 == 3:  # read-back command
            for at in range(3):
                if value >> at + 1 & 1:
                    if not value & 0x20:
                        channels[at].latch(now)
                    if not value & 0x10:
                        channels[at].latch_status(now)
        elif value & 0x30:
            channels[value >> 6].set_mode(value, now)
        else:
            channels[value >> 6].latch(now)
        if offset in (0, 3):
            self._schedule()

    # port 0x61

    def read_speaker(self, offset: int, size: int, /) -> int:
        now, channel = self._clock.now(), self.state.channels[2]
        refresh = now // 15_085 & 1  # the DRAM refresh request toggles each 15.085 us
        return channel.gate | self.state.speaker << 1 | refresh << 4 | channel.output(now) << 5

    def write_speaker(self, offset: int, size: int, value: int, /) -> None:
        self.state.channels[2].set_gate(bool(value & 1), self._clock.now())
        self.state.speaker = bool(value & 2)

    # interrupt 0

    def _schedule(self) -> None:
        """Modes 0 and 1 are levels; of the others only the rising edge counts, and it comes as a pulse."""
        now, channel = self._clock.now(), self.state.channels[0]
        connected = channel.loaded and not self.state.disconnected
        self._irq.set(connected and channel.mode < 2 and channel.output(now))
        when = channel.next_rise(now) if connected else None
        if when is None:
            self.state.due = None
            self._timer.cancel()
        else:
            self._arm(max(when, now + SHORTEST) if channel.mode in (2, 3) else when)

    def _arm(self, when: int) -> None:
        self.state.due = when
        self._timer.arm(when)

    def _rise(self) -> None:
        if self.state.channels[0].mode >= 2:
            self._irq.pulse()
        self._schedule()
