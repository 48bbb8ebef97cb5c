"""The CPU model that guests see (Intel SDM vol. 2 CPUID; AMD APM vol. 3 appendix E; KVM's leaves 0x40000000)."""

from __future__ import annotations

import ctypes
from functools import cached_property
from typing import TYPE_CHECKING

from cardcage.errors import ConfigError, near

from cardcage_tcg.cpu.msrlist import PHYS_BITS

if TYPE_CHECKING:
    from cardcage_tcg.library import Native

__all__ = ["CpuModel"]

# name: (leaf, register index in EAX EBX ECX EDX, bit)
FEATURES = {
    "sse3": (1, 2, 0), "pclmulqdq": (1, 2, 1), "ssse3": (1, 2, 9), "fma": (1, 2, 12), "cx16": (1, 2, 13),
    "sse4.1": (1, 2, 19), "sse4.2": (1, 2, 20), "x2apic": (1, 2, 21), "movbe": (1, 2, 22), "popcnt": (1, 2, 23),
    "tsc-deadline": (1, 2, 24), "aes": (1, 2, 25), "xsave": (1, 2, 26), "avx": (1, 2, 28), "f16c": (1, 2, 29),
    "rdrand": (1, 2, 30), "fsgsbase": (7, 1, 0), "bmi1": (7, 1, 3), "avx2": (7, 1, 5), "smep": (7, 1, 7),
    "bmi2": (7, 1, 8), "erms": (7, 1, 9), "rdseed": (7, 1, 18), "adx": (7, 1, 19), "smap": (7, 1, 20),
    "clflushopt": (7, 1, 23), "clwb": (7, 1, 24), "tsc-adjust": (7, 1, 1),
    "sha-ni": (7, 1, 29), "umip": (7, 2, 2), "pku": (7, 2, 3), "fsrm": (7, 3, 4),
    "lahf_lm": (0x80000001, 2, 0), "abm": (0x80000001, 2, 5), "3dnowprefetch": (0x80000001, 2, 8),
}  # fmt: skip
BASE_1D = 0x078BFBFD
"""FPU DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2."""
APIC = 1 << 9
V2 = ("sse3", "ssse3", "cx16", "sse4.1", "sse4.2", "popcnt", "lahf_lm", "x2apic", "tsc-deadline")
MORE = (
    "pclmulqdq", "movbe", "aes", "rdrand", "fsgsbase", "bmi1", "bmi2", "erms", "rdseed", "adx", "sha-ni", "fsrm",
    "abm", "3dnowprefetch", "smep", "umip", "clflushopt", "clwb",
    "tsc-adjust",
)  # fmt: skip
WIDE = ("xsave", "avx", "avx2", "f16c", "fma")
OURS = {
    "x2apic",
    "tsc-deadline",
    "smep",
    "smap",
    "pku",
    "umip",
    "fsgsbase",
    "erms",
    "fsrm",
    "cx16",
    "lahf_lm",
    "3dnowprefetch",
    "clflushopt",
    "clwb",
    "tsc-adjust",
}
"""Features that the translator itself provides, whatever the host has."""


DECODED = {
    "sse3": "SSE3", "ssse3": "SSSE3", "sse4.1": "SSE4_1", "sse4.2": "SSE4_2", "pclmulqdq": "PCLMULQDQ",
    "aes": "AES", "sha-ni": "SHA", "avx": "AVX", "avx2": "AVX2", "fma": "FMA", "f16c": "F16C", "cx16": "CMPXCHG16B",
    "movbe": "MOVBE", "popcnt": "POPCNT", "rdrand": "RDRAND", "rdseed": "RDSEED", "adx": "ADX",
    "bmi1": "BMI1", "bmi2": "BMI2", "pku": "PKU", "smap": "SMAP",
    "clflushopt": "CLFLUSHOPT", "clwb": "CLWB",
}  # fmt: skip
"""The decoder's names for the instructions of a feature."""


class CpuModel:
    """A CPU model: which features, and the leaves that say so.

    Args:
        name: ``x86-64-v2``, ``max`` or ``host`` (all that the translator does natively here; AVX only on request).
        features: names switched on or off; raises ConfigError for a feature that is unknown, or that this host lacks.
    """

    def __init__(
        self, native: Native, name: str, features: dict[str, bool], cpus: int, *, lapic: bool, tsc_khz: int
    ) -> None:
        self._native = native
        wanted = set(V2)
        if name in ("max", "host"):
            wanted |= {one for one in MORE if one in OURS or self._host_has(one)}
        elif name != "x86-64-v2":
            hint = near(name, ("max", "host", "x86-64-v2")) or " Known: max, host, x86-64-v2."
            raise ConfigError(f'no CPU model "{name}".{hint}', key="machine.cpu")
        for feature, on in features.items():
            if feature not in FEATURES:
                raise ConfigError(f'no CPU feature "{feature}".{near(feature, FEATURES)}', key="machine.features")
            if on and feature not in OURS and not self._host_has(feature):
                raise ConfigError(f'this host\'s processor has no "{feature}"', key="machine.features")
            (wanted.add if on else wanted.discard)(feature)
        if wanted & {"xsave", "avx", "avx2", "f16c", "fma", "pku"}:  # Linux uses no keys without XSAVE
            if not (self._host_has("xsave") and self._host_has("avx")):
                raise ConfigError("this host's processor has no AVX", key="machine.features")
            wanted |= {"avx", "xsave"}  # one does not come without the other
        if not lapic:
            wanted -= {"x2apic", "tsc-deadline"}
        self.features = frozenset(wanted)
        self.avx = "avx" in wanted
        self.xcr0 = 7 | (1 << 9 if "pku" in wanted else 0) if self.avx else 3  # what XCR0 may hold
        self.lacking = frozenset(DECODED) - wanted
        self._cpus, self._lapic, self._tsc_khz = cpus, lapic, tsc_khz

    @cached_property
    def hidden(self) -> frozenset[int]:
        """``iced_x86.CpuidFeature`` of the instructions that guests must not have."""
        from iced_x86 import CpuidFeature

        return frozenset(getattr(CpuidFeature, DECODED[feature]) for feature in self.lacking)

    def takes_xcr0(self, value: int) -> bool:
        """True if XSETBV takes it: x87 always, AVX only with SSE, nothing that the guest has not."""
        return self.avx and not value & ~self.xcr0 and value & 7 in (1, 3, 7)

    def _host(self, leaf: int, sub: int = 0) -> tuple[int, int, int, int]:
        out = (ctypes.c_uint32 * 4)()
        self._native.cpuid(leaf, sub, out)
        return out[0], out[1], out[2], out[3]

    def _host_has(self, feature: str) -> bool:
        leaf, register, bit = FEATURES[feature]
        return bool(self._host(leaf)[register] >> bit & 1)

    def _bits(self, leaf: int, register: int) -> int:
        return sum(
            1 << bit
            for name, (at, index, bit) in FEATURES.items()
            if (at, index) == (leaf, register) and name in self.features
        )

    def told(self, leaf: int, sub: int, /) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX that guests see, but for what depends on the vCPU and on what they set themselves."""
        return self.leaf(leaf, sub, 0, cr4=0, apic=True, xcr0=1)

    def leaf(self, leaf: int, sub: int, index: int, *, cr4: int, apic: bool, xcr0: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX of processor *index* for a leaf and subleaf; *apic*: APIC_BASE enables the local APIC."""
        if leaf == 0:
            return 0xD, 0x68747541, 0x444D4163, 0x69746E65  # AuthenticAMD
        if leaf == 1:
            eax = 0x00060FB1  # family 15, model 107, stepping 1: no erratum or mitigation applies to it
            ecx = self._bits(1, 2) | 1 << 31 | (1 << 27 if cr4 & 1 << 18 else 0)
            edx = BASE_1D | (1 << 28 if self._cpus > 1 else 0)
            if not apic:
                edx &= ~APIC
            return eax, index << 24 | self._cpus << 16 | 8 << 8, ecx, edx
        if leaf == 7 and sub == 0:
            ospke = 1 << 4 if cr4 & 1 << 22 else 0
            return 0, self._bits(7, 1), self._bits(7, 2) | ospke, self._bits(7, 3)
        if leaf == 0xB:  # no level has a type: the topology is that of 80000008; the x2APIC ID is on all subleaves
            return 0, 0, sub & 0xFF, index
        if leaf == 0xD and "xsave" in self.features:
            return self._xsave(sub, xcr0)
        if leaf == 0x40000000:
            return 0x40000010, 0x4B4D564B, 0x564B4D56, 0x4D
        if leaf == 0x40000001:
            return 1 | 1 << 1 | 1 << 3 | 1 << 24, 0, 0, 0
        if leaf == 0x40000010:
            return self._tsc_khz, 1_000_000, 0, 0
        if leaf == 0x80000000:
            return 0x80000008, 0x68747541, 0x444D4163, 0x69746E65
        if leaf == 0x80000001:
            edx = BASE_1D & 0x0183F3FF | 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29
            if not apic:
                edx &= ~APIC
            return 0x00060FB1, 0, self._bits(0x80000001, 2) | (2 if self._cpus > 1 else 0), edx
        if 0x80000002 <= leaf <= 0x80000004:
            brand = b"cardcage TCG virtual CPU".ljust(48, b"\0")
            part = brand[(leaf - 0x80000002) * 16 :][:16]
            values = tuple(int.from_bytes(part[at : at + 4], "little") for at in (0, 4, 8, 12))
            return values[0], values[1], values[2], values[3]
        if leaf == 0x80000007:
            return 0, 0, 0, 1 << 8
        if leaf == 0x80000008:
            return 48 << 8 | PHYS_BITS, 0, self._cpus - 1 if self._cpus > 1 else 0, 0
        return 0, 0, 0, 0

    def _xsave(self, sub: int, xcr0: int) -> tuple[int, int, int, int]:
        size = 840 if xcr0 & 1 << 9 else 832 if xcr0 & 4 else 576
        pku = "pku" in self.features
        if sub == 0:
            return self.xcr0, size, 840 if pku else 832, 0
        if sub == 1:
            compact = 576 + (256 if xcr0 & 4 else 0) + (8 if xcr0 & 1 << 9 else 0)
            return self._host(0xD, 1)[0] & 3, compact, 0, 0  # XSAVEOPT, XSAVEC
        if sub == 2:
            return 256, 576, 0, 0
        if sub == 9 and pku:
            return 8, 832, 0, 0
        return 0, 0, 0, 0
