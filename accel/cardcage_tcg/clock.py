"""The host's time-stamp counter and clock, from which guests have theirs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cardcage_tcg.library import Native

__all__ = ["Clock"]

SHORTEST, LONGEST = 10_000_000, 1_000_000_000
"""Nanoseconds that the frequency is measured over: enough for some ppm, and not so long that the host slept."""

_khz: int | None = None


class Clock:
    """One VM's clocks.

    Attributes:
        tsc_khz: frequency of the time-stamp counter. scale: that of kvmclock, (multiplier, shift).
        tsc_zero: the counter when the VM was made.
        ahead: nanoseconds that kvmclock shows more than the TSC: in a machine that began under another one.
    """

    def __init__(self, native: Native) -> None:
        self._native = native
        self.tsc_khz = self._frequency()
        self.scale = _pvclock_scale(self.tsc_khz)
        self.tsc_zero, self.ahead = self.pair()[0], 0

    def pair(self) -> tuple[int, int]:
        """(host TSC, CLOCK_MONOTONIC in nanoseconds) at one moment."""
        return self._native.now()

    def skip(self, since: tuple[int, int]) -> tuple[int, int]:
        """Take out what passed *since* that pair: (ticks of the counter, nanoseconds)."""
        tsc, now = self.pair()
        ticks, elapsed = tsc - since[0], now - since[1]
        self.tsc_zero += ticks
        return ticks, elapsed

    def nanoseconds(self, tsc: int) -> int:
        """Nanoseconds that the counter takes to *tsc*, by kvmclock's reckoning."""
        multiplier, shift = self.scale
        return (tsc << shift if shift >= 0 else tsc >> -shift) * multiplier >> 32

    def _frequency(self) -> int:
        """kHz of the time-stamp counter, measured once a process against CLOCK_MONOTONIC, from its library's load."""
        global _khz
        first = self._native.loaded
        while _khz is None:
            tsc, ns = self.pair()
            if SHORTEST <= ns - first[1] <= LONGEST:
                _khz = round((tsc - first[0]) * 1_000_000 / (ns - first[1]))
            elif ns - first[1] > LONGEST:
                first = tsc, ns
            else:
                threading.Event().wait((SHORTEST - ns + first[1]) / 1e9)
        return _khz


def _pvclock_scale(tsc_khz: int) -> tuple[int, int]:
    """(multiplier, shift) with ns = (tsc << shift) * multiplier >> 32 (negative shift: to the right)."""
    shift, scaled, base = 0, 1_000_000_000, tsc_khz * 1000
    while base > scaled * 2 or base >> 32:
        base >>= 1
        shift -= 1
    while base <= scaled or scaled >> 32:
        if scaled >> 32 or base >> 31:
            scaled >>= 1
        else:
            base <<= 1
        shift += 1
    return (scaled << 32) // base, shift
