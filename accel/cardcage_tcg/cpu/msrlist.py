"""The model-specific registers that Python keeps, of the family that CPUID names: AMD's family 15, model 107.

What each does is from AMD APM vol. 2 (chapter or section in the comments; its appendix A lists all MSRs), AMD's "BIOS
and Kernel Developer's Guide for AMD NPT Family 0Fh Processors" (publication 32559, "BKDG"), and for those that only a
virtual machine has, Linux' Documentation/virt/kvm/x86/msr.rst. An MSR in no table raises #GP, as do all that CPUID
would have to announce: SPEC_CTRL, SVM's, OSVW's, the core performance counters of later families, XSS, CET's. Native
code (``native/system/control.c``) does TSC, APIC_BASE and the x2APIC's, SYSENTER's three, TSC_DEADLINE, EFER, STAR,
LSTAR, CSTAR, SFMASK, FS_BASE, GS_BASE, KERNEL_GS_BASE and TSC_AUX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "HWCR",
    "MC_BANKS",
    "MC_STATUS",
    "MC_STATUS_WRITABLE",
    "MSRS",
    "PHYS_BITS",
    "SYSTEM_TIME",
    "WALL_CLOCK",
    "Msr",
]

ALL = (1 << 64) - 1
PHYS_BITS = 40
"""MAXPHYADDR (CPUID 80000008), as ``PHYS_BITS`` in ``native/cpu.h``."""
TOO_HIGH = ALL >> PHYS_BITS << PHYS_BITS
WALL_CLOCK, SYSTEM_TIME = 0x4B564D00, 0x4B564D01
MC_BANKS = 10
"""Banks of the machine check architecture (APM vol. 2, chapter 9; SDM vol. 3, chapter 16), as many as QEMU's.
Nothing is ever reported in them: a fault of the host's memory kills the VMM, or the host tells no guest."""
MC_STATUS = frozenset(0x401 + 4 * bank for bank in range(MC_BANKS))
HWCR = 0xC0010015
MC_STATUS_WRITABLE = 1 << 18
MEMORY_TYPES = frozenset((0, 1, 4, 5, 6))
"""UC, WC, WT, WP, WB: types of MTRRs; PAT has UC- (7), too."""


@frozen
class Msr:
    """A model-specific register.

    Attributes:
        reset: its value after power-up. INIT changes none of these (SDM vol. 3, table 10-1).
        kept: the bits that hold what is written; the others stay as they are.
        refused: bits that raise #GP when they are written as one.
        valid: whether a value can be written; else #GP.
        readonly: each write raises #GP.
    """

    reset: int = 0
    kept: int = ALL
    refused: int = 0
    valid: Callable[[int], bool] | None = None
    readonly: bool = False


def _memory_types(value: int) -> bool:
    return all(one in MEMORY_TYPES for one in value.to_bytes(8, "little"))


def _attributes(value: int) -> bool:
    return all(one in MEMORY_TYPES or one == 7 for one in value.to_bytes(8, "little"))


def _type(value: int) -> bool:
    return value & 0xFF in MEMORY_TYPES


def _all_or_nothing(value: int) -> bool:
    """A machine check control: KVM takes zeros or ones, but for two bits that kernels clear (errata of K8 and P6)."""
    return value == 0 or value | 1 << 10 | 1 == ALL


ZERO = Msr(kept=0)
"""Reads as zero and swallows writes, as without the unit behind it."""
PERFORMANCE = {0xC0010000 + at: ZERO for at in range(8)}
"""PerfEvtSel0-3 and PerfCtr0-3 (13.2): every processor of AMD's has them, no bit of CPUID says so. They count nothing,
and do not hold values: Linux' probe of them (``check_hw_exists``) then says that there are none, and uses software
events. KVM without a virtual PMU does the same."""
MTRRS = {
    0xFE: Msr(0x508, readonly=True),  # MTRRcap: 8 variable ranges, fixed ranges, write-combining
    **{0x200 + 2 * at: Msr(refused=TOO_HIGH | 0xF00, valid=_type) for at in range(8)},  # MTRRphysBase
    **{0x201 + 2 * at: Msr(refused=TOO_HIGH | 0x7FF) for at in range(8)},  # MTRRphysMask
    **dict.fromkeys((0x250, 0x258, 0x259, *range(0x268, 0x270)), Msr(valid=_memory_types)),
    0x277: Msr(0x0007040600070406, valid=_attributes),  # PAT (7.8)
    0x2FF: Msr(refused=ALL & ~0xCFF, valid=_type),  # MTRRdefType
}
"""Memory types (7.7; SDM vol. 3, 12.11). They hold what is written and change nothing: RAM is the host's, devices are
not cached. RESET turns them off, and firmware's first deed is to turn them on; without firmware they stay on, too
(docs/boot.md): Linux uses PAT only where they are."""
MACHINE_CHECK = {
    0x179: Msr(MC_BANKS | 1 << 8, readonly=True),  # MCG_CAP: MCG_CTL is there
    0x17A: Msr(),  # MCG_STATUS
    0x17B: Msr(ALL, valid=_all_or_nothing),  # MCG_CTL
    **{0x400 + 4 * bank: Msr(ALL, valid=_all_or_nothing) for bank in range(MC_BANKS)},  # MCi_CTL
    **{index: Msr() for index in MC_STATUS},  # only zero can be written, unless HWCR lets more pass
    **{0x402 + 4 * bank + at: Msr() for bank in range(MC_BANKS) for at in (0, 1)},  # MCi_ADDR, MCi_MISC
    **{0xC0010044 + at: Msr() for at in range(5)},  # MC0_CTL_MASK to MC4_CTL_MASK (BKDG)
}
DEBUG = {
    0x1D9: Msr(kept=0x3C, refused=ALL & ~0x3F),  # DebugCtl (13.1.1): LBR and BTF are not done, and do not stick
    **{0x1DB + at: Msr(readonly=True) for at in range(4)},  # last branch and last exception, from and to
}
SYSTEM = {
    0x8B: ZERO,  # PATCH_LEVEL: no microcode
    0xC0010020: ZERO,  # PATCH_LOADER
    0xC0010010: ZERO,  # SYSCFG (3.2.1): no modification of fixed MTRRs by RdMem and WrMem, TOP_MEM2 not in use
    HWCR: Msr(kept=MC_STATUS_WRITABLE | 1 << 6, refused=ALL >> 25 << 25),  # (3.2.10); FFDIS, which Linux sets on K8
    **{0xC0010016 + at: Msr(refused=TOO_HIGH) for at in range(4)},  # IORRBase0 to IORRMask1 (7.9.2)
    0xC001001A: Msr(refused=TOO_HIGH),  # TOP_MEM (7.9.4)
    0xC001001D: Msr(refused=TOO_HIGH),  # TOP_MEM2
    **dict.fromkeys((0xC001001F, 0xC0010055), ZERO),  # NB_CFG, INT_PENDING (BKDG): no C1E
    **dict.fromkeys((0xC0010111, 0xC0010112, 0xC0010113, 0xC0010114), ZERO),  # SMM_BASE, SMM_ADDR, SMM_MASK, VM_CR
    **dict.fromkeys((0xC0011029, 0xC001102C), ZERO),  # of later families, which Linux touches unasked
}
FOREIGN = {
    0x1A0: Msr(0x1801, kept=ALL & ~0x1880),  # MISC_ENABLE: fast strings, neither BTS nor PEBS
    0x17: ZERO,  # PLATFORM_ID
    0x2A: ZERO,  # EBL_CR_POWERON
    0x34: ZERO,  # SMI_COUNT
    0xCD: ZERO,  # FSB_FREQ
    0xCE: ZERO,  # PLATFORM_INFO
    0x1D6: ZERO,
    0x3A: Msr(1, kept=0),  # FEATURE_CONTROL: locked
}
"""Intel's, which firmware and kernels read on any processor; KVM has nearly all of them for AMD's, too (SDM vol. 4)."""
KVM = {WALL_CLOCK: Msr(), SYSTEM_TIME: Msr(), 0x4B564D02: Msr(refused=0x30)}
"""kvmclock, which CPUID 40000001 announces; and ASYNC_PF_EN, which KVM takes unannounced, too: whoever turns it on must
not rely on a fault to be asynchronous, and none is."""

MSRS: dict[int, Msr] = {**PERFORMANCE, **MTRRS, **MACHINE_CHECK, **DEBUG, **SYSTEM, **FOREIGN, **KVM}
