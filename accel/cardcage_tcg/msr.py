"""Model-specific registers that native code leaves to Python: kvmclock, PAT, and what Linux and firmware ask for."""

from __future__ import annotations

import ctypes
import time
from struct import pack
from typing import TYPE_CHECKING

from cardcage.errors import UsageError

from cardcage_tcg import layout as L

if TYPE_CHECKING:
    from cardcage_tcg.vcpu import TcgVCpu
    from cardcage_tcg.vm import TcgVm

__all__ = ["TSC_DEADLINE", "Msrs"]

FIELDS = {
    0x1B: L.APIC_BASE, 0x174: L.SYSENTER_CS, 0x175: L.SYSENTER_ESP, 0x176: L.SYSENTER_EIP, 0xC0000080: L.EFER,
    0xC0000081: L.STAR, 0xC0000082: L.LSTAR, 0xC0000083: L.CSTAR, 0xC0000084: L.SFMASK, 0xC0000102: L.KERNEL_GS_BASE,
    0xC0000103: L.TSC_AUX,
}  # fmt: skip
"""MSRs kept in ``struct cpu``: part of the state, handled natively for the guest."""
TSC_DEADLINE = 0x6E0
WALL_CLOCK, SYSTEM_TIME = 0x4B564D00, 0x4B564D01
OLD = {0x11: WALL_CLOCK, 0x12: SYSTEM_TIME}
MC_BANKS = 10
"""Banks of the machine check architecture (SDM vol. 3, chapter 16; AMD APM vol. 2, chapter 9), as many as QEMU's.
Nothing is ever reported in them: a fault of the host's memory kills the VMM, or the host tells no guest."""
STORED = {
    0x17A: 0,  # MCG_STATUS
    0x17B: (1 << 64) - 1,  # MCG_CTL
    **{0x400 + 4 * bank: (1 << 64) - 1 for bank in range(MC_BANKS)},  # MCi_CTL
    0x277: 0x0007040600070406,
    0x2FF: 0,
    0x8B: 0,
    0x17: 0,
    0x1A0: 1,
    0x1D9: 0,
    0x3A: 1,
    SYSTEM_TIME: 0,
    WALL_CLOCK: 0,
}
"""MSRs that hold what is written; the value is that after reset."""
FIXED = {
    0xFE: 0,
    0x2A: 0,
    0x34: 0,
    0xCD: 0,
    0xCE: 0,
    0x1D6: 0,
    0x1DB: 0,
    0xC0010010: 0,
    0xC0010015: 0,
    0xC001001F: 0,
    0xC0010055: 0,
    0xC0010112: 0,
    0xC0010113: 0,
    0xC0010114: 0,
    0xC001102C: 0,
    0xC0011029: 0,
}
"""MSRs that read as a constant and swallow writes: AMD's family registers that Linux and SeaBIOS touch."""
MCG_CAP = 0x179
MC_REPORTS = frozenset(0x401 + 4 * bank + more for bank in range(MC_BANKS) for more in range(3))
"""MCi_STATUS, MCi_ADDR, MCi_MISC: 0, and only 0 can be written."""


class Msrs:
    """One vCPU's MSRs."""

    def __init__(self, vm: TcgVm, cpu: TcgVCpu) -> None:
        self._vm, self._cpu = vm, cpu
        self._values = dict(STORED)
        self._version = 0  # of the structure that kvmclock shows; a new number at each change

    def read(self, index: int) -> int | None:
        index = OLD.get(index, index)
        if index in FIELDS:
            return self._cpu.field(FIELDS[index])
        if index in self._values:
            return self._values[index]
        if index == MCG_CAP:
            return MC_BANKS | 1 << 8  # MCG_CTL_P
        return 0 if index in MC_REPORTS else FIXED.get(index)

    def write(self, index: int, value: int) -> bool:
        index = OLD.get(index, index)
        if index in FIXED or (index in MC_REPORTS and value == 0):
            return True
        if index not in self._values:
            return False
        self._values[index] = value
        if index == SYSTEM_TIME and value & 1:
            self._system_time(value & ~1)
        elif index == WALL_CLOCK:
            self._wall_clock(value)
        return True

    def all(self) -> dict[int, int]:
        """All of them, for a snapshot."""
        deadline = {TSC_DEADLINE: self.tsc_deadline()} if self._vm.lapic else {}
        return (
            self._values
            | deadline
            | {index: self._cpu.field(at) for index, at in FIELDS.items() if index not in (0x1B, 0xC0000080)}
        )

    def set_all(self, values: dict[int, int]) -> None:
        """Set those given; the others take their reset value. Raises UsageError for one that is unknown."""
        for index in values:
            if index not in FIELDS and index not in STORED and index != TSC_DEADLINE:
                raise UsageError(f"the translator has no MSR {index:#x}")
        self._values = STORED | {index: value for index, value in values.items() if index in STORED}
        for index, at in FIELDS.items():
            if index not in (0x1B, 0xC0000080):
                self._cpu.set_field(at, values.get(index, 0))
        if self._values[SYSTEM_TIME] & 1:
            self._system_time(self._values[SYSTEM_TIME] & ~1)

    def tsc_deadline(self, value: int | None = None) -> int:
        """The APIC timer's deadline, 0 when it is not armed; set to *value* first, once the TSC is right."""
        word = ctypes.c_uint64(value or 0)
        self._vm.native.apic_msr(self._cpu.pointer, TSC_DEADLINE, value is not None, ctypes.byref(word))
        return word.value

    # ---- kvmclock (Documentation/virt/kvm/x86/msr.rst) ----

    def _system_time(self, address: int) -> None:
        vm = self._vm
        tsc, nanoseconds = vm.clock_pair()
        guest_tsc = tsc + self._cpu.field(L.TSC_OFFSET) & 0xFFFFFFFFFFFFFFFF
        multiplier, shift = vm.clock_scale
        self._version += 2
        body = pack("<IIQQIbB2x", self._version, 0, guest_tsc, nanoseconds - vm.clock_zero, multiplier, shift, 1)
        vm.poke_physical(address, body)

    def _wall_clock(self, address: int) -> None:
        now = time.time_ns() - (time.monotonic_ns() - self._vm.clock_zero)
        self._vm.poke_physical(address, pack("<III", 2, now // 1_000_000_000, now % 1_000_000_000))

    # ---- the local APIC's registers as KVM shows them (KVM_GET_LAPIC) ----

    def apic_page(self, phys: int) -> int | None:
        """The offset in the APIC's page, None where *phys* is not the xAPIC of this vCPU."""
        base = self._cpu.field(L.APIC_BASE)
        if self._vm.lapic and base & 0xC00 == 0x800 and phys >> 12 == base >> 12:
            return phys & 0xFFF
        return None

    def lapic_image(self) -> bytes:
        """1024 bytes, a register every 16."""
        page = (ctypes.c_uint32 * 256)()
        self._vm.native.apic_save(self._cpu.pointer, page)
        return bytes(page)

    def set_lapic(self, image: bytes | None, *, fresh: bool) -> None:
        """Set them from *image*; without one, *fresh* puts the reset state and else nothing changes."""
        if image is not None:
            if len(image) != 1024:
                raise UsageError(f"local APIC state has {len(image)} bytes: expected 1024")
            self._vm.native.apic_load(self._cpu.pointer, (ctypes.c_uint32 * 256).from_buffer_copy(image))
        elif fresh:
            self._vm.native.apic_reset(self._cpu.pointer)
