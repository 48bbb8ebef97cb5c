"""Model-specific registers that native code leaves to Python (:mod:`cardcage_tcg.cpu.msrlist`), and kvmclock."""

from __future__ import annotations

import ctypes
import time
from struct import pack, unpack
from typing import TYPE_CHECKING

from cardcage.errors import UsageError

from cardcage_tcg import layout as L
from cardcage_tcg.cpu.msrlist import HWCR, MC_STATUS, MC_STATUS_WRITABLE, MSRS, SYSTEM_TIME, WALL_CLOCK

if TYPE_CHECKING:
    from cardcage_tcg.cpu.registers import RegisterFile
    from cardcage_tcg.vm import TcgVm

__all__ = ["TSC_ADJUST", "TSC_DEADLINE", "Msrs"]

FIELDS = {
    0x1B: L.APIC_BASE, 0x174: L.SYSENTER_CS, 0x175: L.SYSENTER_ESP, 0x176: L.SYSENTER_EIP, 0xC0000080: L.EFER,
    0xC0000081: L.STAR, 0xC0000082: L.LSTAR, 0xC0000083: L.CSTAR, 0xC0000084: L.SFMASK, 0xC0000102: L.KERNEL_GS_BASE,
    0xC0000103: L.TSC_AUX, 0x3B: L.TSC_ADJUST,
}  # fmt: skip
"""MSRs kept in ``struct cpu``: part of the state, handled natively for the guest."""
TSC_ADJUST, TSC_DEADLINE = 0x3B, 0x6E0
OLD = {0x11: WALL_CLOCK, 0x12: SYSTEM_TIME}
RESET = {index: msr.reset for index, msr in MSRS.items()}
HELD = frozenset(index for index, msr in MSRS.items() if msr.kept and not msr.readonly)
"""Those that are part of the state."""

KNOWN = {*FIELDS, *MSRS, TSC_DEADLINE}
MASK = (1 << 64) - 1
ROUNDED = 1000
"""Nanoseconds by which two processors' structures may differ without being of two clocks."""


class Msrs:
    """One vCPU's MSRs."""

    def __init__(self, vm: TcgVm, registers: RegisterFile) -> None:
        self._vm, self._registers = vm, registers
        self._values = dict(RESET)
        self._adjusts = "tsc-adjust" in vm.model.features
        self._before: tuple[dict[int, int], dict[int, int]] = {}, dict(RESET)
        """The last argument of :meth:`set_all`, and its values: a way back gives the same a thousand times."""
        self._version = 0  # of the structure that kvmclock shows; a new number at each change

    def read(self, index: int) -> int | None:
        index = OLD.get(index, index)
        if index in FIELDS and (index != TSC_ADJUST or self._adjusts):
            return self._registers.field(FIELDS[index])
        return self._values.get(index)

    def write(self, index: int, value: int) -> bool:
        index = OLD.get(index, index)
        if index == TSC_ADJUST and self._adjusts:
            moved = value - self._registers.field(L.TSC_ADJUST) + self._registers.field(L.TSC_OFFSET)
            self._registers.set_field(L.TSC_OFFSET, moved & MASK)
            self._registers.set_field(L.TSC_ADJUST, value)
            return True
        msr = MSRS.get(index)
        if msr is None or msr.readonly or value & msr.refused or (msr.valid is not None and not msr.valid(value)):
            return False
        if index in MC_STATUS and value and not self._values[HWCR] & MC_STATUS_WRITABLE:
            return False
        self._values[index] = self._values[index] & ~msr.kept | value & msr.kept
        if index == SYSTEM_TIME and value & 1:
            self._system_time(value & ~1)
        elif index == WALL_CLOCK:
            self._wall_clock(value)
        return True

    def all(self) -> dict[int, int]:
        """All of them, for a snapshot."""
        deadline = {TSC_DEADLINE: self.tsc_deadline()} if self._vm.lapic else {}
        return (
            {index: self._values[index] for index in HELD}
            | deadline
            | {index: self._registers.field(at) for index, at in FIELDS.items() if index not in (0x1B, 0xC0000080)}
        )

    def set_all(self, values: dict[int, int]) -> None:
        """Set those given; the others take their reset value. Raises UsageError for an unknown MSR."""
        if values != self._before[0]:
            if unknown := values.keys() - KNOWN:
                raise UsageError(f"the translator has no MSR {min(unknown):#x}")
            made = RESET | {index: value & MASK for index, value in values.items() if index in HELD}
            self._before = dict(values), made
        self._values = dict(self._before[1])
        added = values.get(TSC_ADJUST, 0) - self._registers.field(L.TSC_ADJUST)
        self._registers.set_field(L.TSC_OFFSET, self._registers.field(L.TSC_OFFSET) + added & MASK)
        for index, at in FIELDS.items():
            if index not in (0x1B, 0xC0000080):
                self._registers.set_field(at, values.get(index, 0))

    def tsc_deadline(self, value: int | None = None) -> int:
        """The APIC timer's deadline, 0 when it is not armed; set to *value* first, once the TSC is right."""
        word = ctypes.c_uint64(value or 0)
        self._vm.native.apic_msr(self._registers.pointer, TSC_DEADLINE, value is not None, ctypes.byref(word))
        return word.value

    # ---- kvmclock (Documentation/virt/kvm/x86/msr.rst): the TSC but for what the guest added to it, in ns ----
    # All processors have that counter in common, and so one clock, which Linux relies on where the flag says "stable".

    def kvmclock_goes_on(self) -> None:
        """Show kvmclock as the structure in memory and the TSC have it, which both came with a state: in a guest that
        is put back, or comes from another VM, it would else jump by what passed since, or back to when this one was
        made."""
        if not self._values[SYSTEM_TIME] & 1:
            return
        address, clock = self._values[SYSTEM_TIME] & ~1, self._vm.clock
        tsc = clock.pair()[0] + self._registers.field(L.TSC_OFFSET) & MASK
        shown = self._shown(address, tsc)
        if shown is not None:
            ahead = shown - clock.nanoseconds(tsc - self._registers.field(L.TSC_ADJUST) & MASK)
            if abs(ahead - clock.ahead) > ROUNDED:
                clock.ahead = ahead
        self._system_time(address)

    def _system_time(self, address: int) -> None:
        (multiplier, shift), ahead = self._vm.clock.scale, self._vm.clock.ahead & MASK
        self._version = self._version + 2 & 0xFFFFFFFF
        zero = self._registers.field(L.TSC_ADJUST)
        self._vm.memory.poke_physical(address, pack("<IIQQIbB2x", self._version, 0, zero, ahead, multiplier, shift, 1))

    def _shown(self, address: int, tsc: int) -> int | None:
        """Nanoseconds that the structure at *address* shows at that TSC, None where it is none that a host has made."""
        with self._vm.lock:
            raw = self._vm.memory.peek(address, 32) if address & 0xFFF <= 4096 - 32 else None
        if raw is None:
            return None
        version, _, since, time, multiplier, shift, _ = unpack("<IIQQIbB2x", raw)
        passed = tsc - since & MASK
        if not version or version & 1 or not -32 < shift < 32 or passed >= 1 << 62:
            return None
        self._version = version  # a guest that was stopped as it read sees by another one that it has to read again
        found: int = time + ((passed << shift if shift >= 0 else passed >> -shift) * multiplier >> 32) & MASK
        return found if found < 1 << 62 else None

    def _wall_clock(self, address: int) -> None:
        tsc = self._vm.clock.pair()[0] + self._registers.field(L.TSC_OFFSET) - self._registers.field(L.TSC_ADJUST)
        now = time.time_ns() - self._vm.clock.nanoseconds(tsc & MASK) - self._vm.clock.ahead
        self._vm.memory.poke_physical(address, pack("<III", 2, now // 1_000_000_000, now % 1_000_000_000))

    # ---- the local APIC's registers as KVM shows them (KVM_GET_LAPIC) ----

    def apic_page(self, phys: int) -> int | None:
        """The offset in the APIC's page, None where *phys* is not the xAPIC of this vCPU."""
        base = self._registers.field(L.APIC_BASE)
        if self._vm.lapic and base & 0xC00 == 0x800 and phys >> 12 == base >> 12:
            return phys & 0xFFF
        return None

    def lapic_image(self) -> bytes:
        """1024 bytes, a register every 16."""
        page = (ctypes.c_uint32 * 256)()
        self._vm.native.apic_save(self._registers.pointer, page)
        return bytes(page)

    def set_lapic(self, image: bytes | None, *, fresh: bool) -> None:
        """Set them from *image*; without it, *fresh* puts the reset state and else nothing changes."""
        if image is not None:
            if len(image) != 1024:
                raise UsageError(f"local APIC state has {len(image)} bytes: expected 1024")
            self._vm.native.apic_load(self._registers.pointer, (ctypes.c_uint32 * 256).from_buffer_copy(image))
        elif fresh:
            self._vm.native.apic_reset(self._registers.pointer)
