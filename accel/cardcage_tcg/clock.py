"""The host's time-stamp counter and clock, from which guests have theirs."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cardcage_tcg.library import Native

__all__ = ["Clock"]


class Clock:
    """One VM's clocks.

    Attributes:
        tsc_khz: frequency of the time-stamp counter. scale: that of kvmclock, (multiplier, shift).
        zero: CLOCK_MONOTONIC when the VM was made. tsc_zero: the counter then.
    """

    def __init__(self, native: Native) -> None:
        self._native, self._pair = native, (ctypes.c_uint64 * 2)()
        self.tsc_khz = self._measure(self.pair())
        self.scale = _pvclock_scale(self.tsc_khz)
        self.tsc_zero, self.zero = self.pair()

    def pair(self) -> tuple[int, int]:
        """(host TSC, CLOCK_MONOTONIC in nanoseconds) at one moment."""
        self._native.rdtsc_pair(self._pair)
        return self._pair[0], self._pair[1]

    def _measure(self, first: tuple[int, int]) -> int:
        """kHz of the time-stamp counter, against CLOCK_MONOTONIC over at least 10 ms."""
        while True:
            tsc, ns = self.pair()
            if ns - first[1] >= 10_000_000:
                return round((tsc - first[0]) * 1_000_000 / (ns - first[1]))
            threading.Event().wait(0.002)


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
