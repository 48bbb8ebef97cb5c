"""Register state of an x86-64 logical processor, as plain values (Intel SDM vol. 1 chapter 3, vol. 3 chapter 2).

Every class here is a value: it is read whole from a vCPU, changed, and set whole. Integers are unsigned.
"""

from __future__ import annotations

from attrs import Factory

from cardcage.values import define, frozen

__all__ = [
    "CR0_AM",
    "CR0_CD",
    "CR0_EM",
    "CR0_ET",
    "CR0_MP",
    "CR0_NE",
    "CR0_NW",
    "CR0_PE",
    "CR0_PG",
    "CR0_TS",
    "CR0_WP",
    "CR4_OSFXSR",
    "CR4_OSXMMEXCPT",
    "CR4_OSXSAVE",
    "CR4_PAE",
    "CR4_PGE",
    "CR4_PSE",
    "EFER_LMA",
    "EFER_LME",
    "EFER_NXE",
    "EFER_SCE",
    "DescriptorTable",
    "Events",
    "Fpu",
    "Registers",
    "Segment",
    "SystemRegisters",
    "VCpuState",
    "reset_state",
]

CR0_PE, CR0_MP, CR0_EM, CR0_TS, CR0_ET, CR0_NE = 1, 2, 4, 8, 16, 32
CR0_WP, CR0_AM, CR0_NW, CR0_CD, CR0_PG = 1 << 16, 1 << 18, 1 << 29, 1 << 30, 1 << 31
CR4_PSE, CR4_PAE, CR4_PGE, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_OSXSAVE = 1 << 4, 1 << 5, 1 << 7, 1 << 9, 1 << 10, 1 << 18
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1, 1 << 8, 1 << 10, 1 << 11


@define
class Registers:
    """General-purpose registers, 64 bits each."""

    rax: int = 0
    rcx: int = 0
    rdx: int = 0
    rbx: int = 0
    rsp: int = 0
    rbp: int = 0
    rsi: int = 0
    rdi: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2


@frozen
class Segment:
    """A segment register with its hidden part (Intel SDM vol. 3, 3.4.3).

    Attributes:
        selector: visible selector, 16 bits.
        base: linear base, 64 bits.
        limit: in bytes (granularity already applied), 32 bits.
        type: descriptor type field, 4 bits. s: 1 for code or data, 0 for a system segment.
        dpl: privilege level, 0 to 3.
        present, avl, l, db, g: descriptor bits. unusable: loaded with a null selector.
    """

    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF
    type: int = 3
    s: int = 1
    dpl: int = 0
    present: int = 1
    avl: int = 0
    l: int = 0  # noqa: E741  the manual's name
    db: int = 0
    g: int = 0
    unusable: int = 0

    @classmethod
    def real(cls, selector: int) -> Segment:
        """A real-mode data segment: base is the selector times 16, limit 64 KiB."""
        return cls(selector=selector, base=selector << 4)

    @classmethod
    def flat(cls, selector: int, *, code: bool = False, bits: int = 32, dpl: int = 0) -> Segment:
        """A flat 4 GiB segment; *bits* is 16, 32 or 64 (64 sets L on code segments)."""
        return cls(
            selector=selector,
            limit=0xFFFFFFFF,
            type=11 if code else 3,
            dpl=dpl,
            l=int(code and bits == 64),
            db=int(bits == 32),
            g=1,
        )


@frozen
class DescriptorTable:
    """GDTR or IDTR: linear base and limit in bytes minus one."""

    base: int = 0
    limit: int = 0xFFFF


@define
class SystemRegisters:
    """Segments, control registers and the MSRs that shape the mode (Intel SDM vol. 3, 2.1)."""

    cs: Segment = Segment(selector=0xF000, base=0xFFFF0000, type=11)
    ds: Segment = Segment()
    es: Segment = Segment()
    fs: Segment = Segment()
    gs: Segment = Segment()
    ss: Segment = Segment()
    ldt: Segment = Segment(type=2, s=0)
    tr: Segment = Segment(type=11, s=0)
    gdt: DescriptorTable = DescriptorTable()
    idt: DescriptorTable = DescriptorTable()
    cr0: int = 0x60000010
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    apic_base: int = 0xFEE00900


@define
class Fpu:
    """x87, SSE and extended state in the standard (not compacted) XSAVE format (Intel SDM vol. 1, 13.4): *xsave* has at
    least 576 bytes, the legacy FXSAVE area, the header and then components by their CPUID offsets; *xcr0* says which
    components the guest has enabled."""

    xsave: bytes = b"\x7f\x03" + bytes(22) + b"\x80\x1f\0\0\xff\xff\0\0" + bytes(544)
    xcr0: int = 1


@define
class Events:
    """Events pending or blocked between two instructions (KVM API, KVM_GET_VCPU_EVENTS).

    Attributes:
        exception: vector of an exception that is to be delivered, or ``None``.
        error_code: its error code, or ``None``.
        interrupt: vector of an external interrupt already accepted, or ``None``.
        nmi_pending, nmi_blocked: non-maskable interrupt state.
        interrupt_shadow: the instruction after STI or MOV SS.
        halted: waiting in HLT.
        startup: ``"running"``, ``"wait-for-sipi"`` or ``"init"``.
    """

    exception: int | None = None
    error_code: int | None = None
    interrupt: int | None = None
    nmi_pending: bool = False
    nmi_blocked: bool = False
    interrupt_shadow: bool = False
    halted: bool = False
    startup: str = "running"


@define
class VCpuState:
    """All that must be kept to continue a vCPU elsewhere.

    Attributes:
        msrs: MSR index to 64-bit value; those a set does not know are refused, and those it does not name take their
            value after power-up.
        debug: DR0, DR1, DR2, DR3, DR6, DR7.
        lapic: the 1024-byte local APIC register page, ``None`` if there is none. Without MSRs, too, as
            :func:`reset_state` gives it, the local APIC is set to what it is after power-up: nothing is pending.
        tsc: time-stamp counter at the moment of reading.
    """

    registers: Registers = Factory(Registers)
    system: SystemRegisters = Factory(SystemRegisters)
    fpu: Fpu = Factory(Fpu)
    events: Events = Factory(Events)
    msrs: dict[int, int] = Factory(dict)
    debug: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0xFFFF0FF0, 0x400)
    lapic: bytes | None = None
    tsc: int | None = None


def reset_state(*, bootstrap: bool = True) -> VCpuState:
    """Return the state after power-up or RESET (Intel SDM vol. 3, table 10-1).

    Args:
        bootstrap: the boot processor starts at F000:FFF0; the others wait for a SIPI.
    """
    system = SystemRegisters(apic_base=0xFEE00900 if bootstrap else 0xFEE00800)
    events = Events(startup="running" if bootstrap else "wait-for-sipi")
    return VCpuState(Registers(rip=0xFFF0, rdx=0x600), system, events=events)
