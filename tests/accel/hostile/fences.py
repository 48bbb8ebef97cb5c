"""Fences round the translator's memory, in the check build: pages that nobody may touch before and behind each Area,
and what an Area has beyond its structure poisoned for AddressSanitizer.

Native code does not know these mappings from others, and AddressSanitizer sees no mmap(2): the pages catch what runs
off, translated code too; the poison catches what instrumented code does to the rest of a structure's last page.
"""

from __future__ import annotations

import ctypes
import mmap

import cardcage_tcg.cpu.vcpu
import cardcage_tcg.memory
import cardcage_tcg.translate.store
import cardcage_tcg.vm
from cardcage_tcg import layout as L
from cardcage_tcg.library import Area

__all__ = ["fence"]

PAGE = 4096
_libc = ctypes.CDLL(None)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class FencedArea(Area):
    """An Area whose end is, but for the rest of a page, the end of what may be touched."""

    def __init__(self, size: int) -> None:
        whole = (size + PAGE - 1) // PAGE * PAGE
        self.map = mmap.mmap(-1, whole + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
        self._export = ctypes.c_char.from_buffer(self.map)
        start = ctypes.addressof(self._export)
        for at in (start, start + PAGE + whole):
            if _libc.mprotect(at, PAGE, 0):
                raise OSError("mprotect")
        self.address = start + PAGE
        self._whole = memoryview(self.map)
        self.view = self._whole[PAGE : PAGE + size]
        self._poisoned = 0, 0
        for used in (L.SIZEOF_VM, cardcage_tcg.cpu.vcpu.STACK + L.SIZEOF_CPU):
            if size == used + 4096:
                self._poison(used, size)

    def _poison(self, low: int, high: int) -> None:
        try:
            _libc.__asan_poison_memory_region(ctypes.c_void_p(self.address + low), ctypes.c_size_t(high - low))
        except AttributeError:
            return  # this build has no AddressSanitizer
        self._poisoned = self.address + low, high - low

    def close(self) -> None:
        if self._poisoned[1]:
            _libc.__asan_unpoison_memory_region(ctypes.c_void_p(self._poisoned[0]), ctypes.c_size_t(self._poisoned[1]))
        self.view.release()
        self._whole.release()
        del self._export
        self.map.close()


def fence() -> None:
    """From now on each Area that the translator makes has fences."""
    for module in (cardcage_tcg.vm, cardcage_tcg.memory, cardcage_tcg.cpu.vcpu, cardcage_tcg.translate.store):
        module.Area = FencedArea  # type: ignore[attr-defined]  # imported there, not exported
