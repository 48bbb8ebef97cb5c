"""Differences between processors that a guest could see: it goes on only where all features are that it was told of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cardcage.abilities import has
from cardcage.errors import ConfigError

if TYPE_CHECKING:
    from cardcage.accelerator import AcceleratedVm
    from cardcage.vcpu import VCpu
    from cardcage.x86 import VCpuState

__all__ = ["TellsCpuid", "check_features", "features_of", "known_msrs"]

WORDS = ((1, 2), (1, 3), (7, 1), (7, 2), (7, 3), (0x80000001, 2), (0x80000001, 3))
"""Leaf, and register (1 EBX, 2 ECX, 3 EDX) that hold features (Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E)."""
CHANGING = {(1, 2): 1 << 27 | 1 << 31, (1, 3): 1 << 28, (7, 2): 1 << 4}
"""Bits that follow from what the guest set, or say nothing of the processor: OSXSAVE, hypervisor, HTT, OSPKE."""
NAMES = {
    (1, 2): "sse3 pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 - - fma cx16 - pdcm - pcid dca sse4.1 sse4.2 "
    "x2apic movbe popcnt tsc-deadline aes xsave osxsave avx f16c rdrand hypervisor",
    (
        1,
        3,
    ): "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds acpi mmx fxsr sse "
    "sse2 ss ht tm - pbe",
    (7, 1): "fsgsbase tsc-adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm - - mpx - avx512f avx512dq rdseed adx "
    "smap avx512ifma - clflushopt clwb - - - avx512cd sha avx512bw avx512vl",
    (7, 2): "- avx512vbmi umip pku ospke waitpkg avx512vbmi2 - gfni vaes vpclmulqdq avx512vnni avx512bitalg - "
    "avx512vpopcntdq - la57 - - - - - rdpid",
    (
        7,
        3,
    ): "- - - - fsrm - - - - - md-clear - - - serialize - - - - - - - - - - - ibrs stibp l1d-flush "
    "arch-capabilities core-capabilities ssbd",
    (0x80000001, 2): "lahf cmp-legacy svm - cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop "
    "skinit wdt - lwp fma4 tce - - - tbm topoext perfctr-core",
    (0x80000001, 3): "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr-opt pdpe1gb rdtscp - lm",
}
MACHINE_CHECKS = {0x179, 0x17A, 0x17B, *range(0x400, 0x480)}
"""MCG_CAP, MCG_STATUS, MCG_CTL, and the banks."""
EDX_SHARED = 0x0183F3FF
"""Bits of leaf 80000001 that repeat those of leaf 1 (AMD)."""


class TellsCpuid(Protocol):
    """A VM that says what its guests are told of the processor."""

    def cpuid(self, leaf: int, sub: int, /) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX of a leaf and subleaf; zeros for one that is not there."""


def features_of(vm: AcceleratedVm) -> list[int]:
    """The words of features, as guests see them; empty where the VM does not say."""
    if not has(vm, TellsCpuid):
        return []
    return [vm.cpuid(leaf, 0)[register] & ~CHANGING.get((leaf, register), 0) for leaf, register in WORDS]


def check_features(saved: list[int], vm: AcceleratedVm) -> None:
    """Raise ConfigError that names the features that a guest was told of and would miss here."""
    ours = features_of(vm)
    if not saved or not ours:
        return
    if len(saved) != len(WORDS):
        raise ConfigError(f"{len(saved)} words of CPU features: expected {len(WORDS)}")
    missing = []
    for word, before, now in zip(WORDS, saved, ours, strict=True):
        lost = before & ~now & 0xFFFFFFFF & ~CHANGING.get(word, 0)
        if word == (0x80000001, 3):
            lost &= ~EDX_SHARED
        names = NAMES[word].split()
        for bit in range(32):
            if lost >> bit & 1:
                known = names[bit] if bit < len(names) else "-"
                missing.append(known if known != "-" else f"bit {bit} of {'abcd'[word[1]]} in CPUID {word[0]:#x}")
    if missing:
        raise ConfigError(
            f"the saved machine's processor has {', '.join(missing)}, which this one has not: give machines that move "
            "the same machine.cpu and machine.features, or let the guest meet another processor (any_cpu, --any-cpu)"
        )


def known_msrs(vcpu: VCpu, state: VCpuState, *, any_cpu: bool) -> VCpuState:
    """The *state* without registers that this vCPU has not and that hold 0, as after power-up.

    With *any_cpu* without all that it has not, and without those of machine checks, which are each processor's own.
    """
    from attrs import evolve

    known = vcpu.get_state().msrs
    if any_cpu:
        known = {number: 0 for number in known if number not in MACHINE_CHECKS}
    kept = {number: value for number, value in state.msrs.items() if number in known or (value and not any_cpu)}
    return evolve(state, msrs=kept)
