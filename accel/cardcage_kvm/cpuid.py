"""CPUID leaves for a guest: what KVM can offer here, filtered by CPU model and named features.

Bits by name are those of Intel SDM vol. 2 CPUID and AMD APM vol. 3 appendix E; models follow the x86-64 psABI levels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen
from cardcage.errors import AcceleratorError, ConfigError, near

from cardcage_kvm import abi

if TYPE_CHECKING:
    from collections.abc import Iterable

MODELS = ("host", "max", "x86-64-v2", "x86-64-v3")


@frozen
class Leaf:
    """One CPUID answer."""

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def _bits(function: int, index: int, register: str, names: str, first: int = 0) -> dict[str, tuple[int, int, str, int]]:
    """Names of consecutive bits from *first*; ``-`` skips one."""
    return {name: (function, index, register, first + at) for at, name in enumerate(names.split()) if name != "-"}


FEATURES: dict[str, tuple[int, int, str, int]] = {
    **_bits(1, 0, "edx", "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush"),
    **_bits(1, 0, "edx", "mmx fxsr sse sse2 ss ht", 23),
    **_bits(1, 0, "ecx", "sse3 pclmulqdq dtes64 monitor - vmx smx est tm2 ssse3 - - fma cx16 - pdcm - pcid dca sse4.1"),
    **_bits(1, 0, "ecx", "sse4.2 x2apic movbe popcnt tsc-deadline aes xsave osxsave avx f16c rdrand hypervisor", 20),
    **_bits(7, 0, "ebx", "fsgsbase tsc-adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm - - mpx - avx512f"),
    **_bits(
        7, 0, "ebx", "avx512dq rdseed adx smap avx512ifma - clflushopt clwb - - - avx512cd sha avx512bw avx512vl", 17
    ),
    **_bits(7, 0, "ecx", "- avx512vbmi umip pku ospke waitpkg avx512vbmi2 - gfni vaes vpclmulqdq avx512vnni"),
    **_bits(7, 0, "ecx", "avx512bitalg - avx512vpopcntdq - la57 - - - - - rdpid", 12),
    **_bits(7, 0, "edx", "fsrm", 4),
    **_bits(0x80000001, 0, "ecx", "lahf - svm - cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop"),
    **_bits(0x80000001, 0, "edx", "syscall - - - - - - - - nx - mmxext - - fxsr-opt pdpe1gb rdtscp - lm", 11),
    **_bits(0xD, 1, "eax", "xsaveopt xsavec xgetbv1 xsaves"),
}
V2_NAMES = """
    fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 ht sse3 ssse3 cx16
    sse4.1 sse4.2 popcnt lahf syscall nx lm pdpe1gb rdtscp x2apic tsc-deadline hypervisor tsc-adjust smep smap umip
    rdrand
"""
V3_NAMES = "xsave osxsave avx avx2 bmi1 bmi2 f16c fma abm movbe xgetbv1 xsaveopt xsavec fsgsbase"
KEPT = {
    "x86-64-v2": frozenset(V2_NAMES.split()),
    "x86-64-v3": frozenset(V2_NAMES.split()) | frozenset(V3_NAMES.split()),
}


def supported(system_fd: int) -> list[Leaf]:
    """Return the CPUID that KVM can offer on this host (KVM_GET_SUPPORTED_CPUID)."""
    for room in (128, 512, 2048):
        both, entries = abi.flexible(abi.Cpuid, "nent", abi.CpuidEntry, room)
        try:
            abi.ioctl(system_fd, abi.GET_SUPPORTED_CPUID, both)
        except AcceleratorError:
            if room == 2048:
                raise
            continue
        return [
            Leaf(one.function, one.index, one.flags, one.eax, one.ebx, one.ecx, one.edx)
            for one in entries[: both.header.nent]
        ]
    raise AssertionError("unreachable")


def model(leaves: Iterable[Leaf], cpu: str, features: dict[str, bool], *, irqchip: str, deadline: bool) -> list[Leaf]:
    """The leaves of CPU model *cpu* with *features* switched.

    Args:
        irqchip: without a local APIC (``"none"``) the guest must not be told of it.
        deadline: the host's KVM has the TSC deadline timer, which KVM_GET_SUPPORTED_CPUID does not say.

    Raises :exc:`~cardcage.errors.ConfigError` for a model or feature that is unknown, or that this host cannot offer.
    """
    if cpu not in MODELS:
        raise ConfigError(f"no CPU model {cpu!r}.{near(cpu, MODELS) or ' Known: ' + ', '.join(MODELS) + '.'}")
    found = {(one.function, one.index): one for one in leaves}
    _switch(found, "hypervisor", True)
    if deadline and irqchip != "none":
        _switch(found, "tsc-deadline", True)
    if irqchip == "none":
        for name in ("apic", "x2apic", "tsc-deadline"):
            _switch(found, name, False)
    kept = KEPT.get(cpu)
    if kept is not None:
        for name in FEATURES:
            if name not in kept:
                _switch(found, name, False)
    offered = {(one.function, one.index): one for one in leaves}
    for name, wanted in features.items():
        if name not in FEATURES:
            raise ConfigError(f"no CPU feature {name!r}.{near(name, FEATURES)}")
        if wanted and not (_has(found, name) or _has(offered, name)):
            raise ConfigError(f"CPU feature {name}: this host's KVM cannot offer it")
        _switch(found, name, wanted)
    if kept is not None:
        _trim_extended_state(found)
        for function, index in list(found):
            if function in (0x14, 0x1D, 0x1E, 0x24):  # processor trace, AMX, AVX10: of no model
                del found[function, index]
    return list(found.values())


def _trim_extended_state(found: dict[tuple[int, int], Leaf]) -> None:
    """Leave leaf 0xD only the XSAVE components whose features are there: x87 and SSE, AVX, AVX-512."""
    components = 3 | (4 if _has(found, "avx") else 0) | (0xE0 if _has(found, "avx512f") else 0)
    if not _has(found, "xsave"):
        components = 0
    for function, index in list(found):
        if function == 0xD and (not components or (index > 1 and not components >> index & 1)):
            del found[function, index]
    main = found.get((0xD, 0))
    if main is not None:
        ends = [one.ebx + one.eax for (function, index), one in found.items() if function == 0xD and index > 1]
        found[0xD, 0] = evolve(main, eax=main.eax & components, ecx=max([576, *ends]), edx=0)


def _has(leaves: dict[tuple[int, int], Leaf], name: str) -> bool:
    function, index, register, bit = FEATURES[name]
    leaf = leaves.get((function, index))
    return leaf is not None and bool(getattr(leaf, register) >> bit & 1)


def _switch(leaves: dict[tuple[int, int], Leaf], name: str, on: bool) -> None:
    function, index, register, bit = FEATURES[name]
    leaf = leaves.get((function, index))
    if leaf is not None:
        value = getattr(leaf, register)
        leaves[function, index] = evolve(leaf, **{register: value | 1 << bit if on else value & ~(1 << bit)})


def for_vcpu(leaves: Iterable[Leaf], index: int, cpus: int) -> Any:
    """The ``kvm_cpuid2`` of processor *index*: topology of *cpus* single-threaded cores in one package."""
    bits = max(cpus - 1, 0).bit_length()
    mine = []
    for leaf in leaves:
        match leaf.function:
            case 1:
                ebx = leaf.ebx & 0xFFFF | min(1 << bits, 255) << 16 | (index & 0xFF) << 24
                edx = leaf.edx | 1 << 28 if cpus > 1 else leaf.edx & ~(1 << 28)
                leaf = evolve(leaf, ebx=ebx, edx=edx)
            case 4 if leaf.eax & 0x1F:
                shared = (1 << bits) - 1 if leaf.eax >> 5 & 7 >= 3 else 0
                leaf = evolve(leaf, eax=leaf.eax & 0x3FFF | shared << 14 | ((1 << bits) - 1 & 0x3F) << 26)
            case 0xB | 0x1F:
                continue  # given anew below
            case 0x80000008:
                leaf = evolve(leaf, ecx=leaf.ecx & ~0xF0FF | bits << 12 | max(cpus - 1, 0) & 0xFF)
            case 0x8000001D if leaf.eax & 0x1F:
                shared = (1 << bits) - 1 if leaf.eax >> 5 & 7 >= 3 else 0
                leaf = evolve(leaf, eax=leaf.eax & 0x3FFF | shared << 14)
            case 0x8000001E:
                leaf = evolve(leaf, eax=index, ebx=index & 0xFF, ecx=0)
            case _:
                pass
        mine.append(leaf)
    if any(leaf.function == 0 and leaf.eax >= 0xB for leaf in mine):
        significant = abi.CPUID_SIGNIFICANT_INDEX
        mine.append(Leaf(0xB, 0, significant, 0, 1, 0x100, index))  # SMT level: one thread a core
        mine.append(Leaf(0xB, 1, significant, bits, cpus, 0x201, index))
        mine.append(Leaf(0xB, 2, significant, 0, 0, 2, index))
    both, entries = abi.flexible(abi.Cpuid, "nent", abi.CpuidEntry, len(mine))
    for entry, leaf in zip(entries, mine, strict=True):
        for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx"):
            setattr(entry, name, getattr(leaf, name))
    return both
