"""A vCPU's registers between ``struct cpu`` and the values of :mod:`cardcage.x86`."""

from __future__ import annotations

from struct import pack, pack_into, unpack_from
from typing import TYPE_CHECKING

from cardcage.errors import UsageError
from cardcage.x86 import DescriptorTable, Events, Fpu, Registers, Segment, SystemRegisters, VCpuState

from cardcage_tcg import layout as L
from cardcage_tcg.cpu.faults import Fault
from cardcage_tcg.cpu.msr import TSC_ADJUST, TSC_DEADLINE

if TYPE_CHECKING:
    from cardcage_tcg.cpu.vcpu import TcgVCpu

__all__ = ["describe", "get_state", "set_state"]

PKRU = 1 << 9
"""State component of protection keys; in our images at 832, as CPUID 0xD says."""
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr")
GENERAL = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()


def describe(cpu: TcgVCpu) -> str:
    """Registers and the bytes at RIP, for a person."""
    state = get_state(cpu)
    r, s = state.registers, state.system
    names = " ".join(f"{name}={getattr(r, name):#x}" for name in (*GENERAL, "rip", "rflags"))
    try:
        code = cpu.linear.fetch_bytes(
            r.rip if cpu.registers.mode & L.MODE_64 else s.cs.base + r.rip & 0xFFFFFFFF, 16
        ).hex(" ")
    except Fault:
        code = "not mapped"
    return (
        f"{names} cs={s.cs.selector:#x}:{s.cs.base:#x} ss={s.ss.selector:#x} cr0={s.cr0:#x} "
        f"cr2={s.cr2:#x} cr3={s.cr3:#x} cr4={s.cr4:#x} efer={s.efer:#x} code at rip: {code}"
    )


def _segment(cpu: TcgVCpu, number: int) -> Segment:
    base, limit, selector, attr = unpack_from("<QIHH", cpu.raw, L.SEG + L.SIZEOF_SEG * number)
    return Segment(
        selector=selector, base=base, limit=limit, type=attr & 15, s=attr >> 4 & 1, dpl=attr >> 5 & 3,
        present=attr >> 7 & 1, avl=attr >> 8 & 1, l=attr >> 9 & 1, db=attr >> 10 & 1, g=attr >> 11 & 1,
        unusable=attr >> 12 & 1,
    )  # fmt: skip


def get_state(cpu: TcgVCpu) -> VCpuState:
    """All registers, as values."""
    q, d = cpu.words, cpu.halves
    registers = Registers(**{name: q[L.GPR // 8 + i] for i, name in enumerate(GENERAL)})
    registers.rip, registers.rflags = q[L.RIP // 8], cpu.native.get_eflags(cpu.pointer)
    system = SystemRegisters()
    for i, name in enumerate(SEGMENTS):
        setattr(system, name, _segment(cpu, i))
    system.gdt = DescriptorTable(q[L.GDT // 8], d[L.GDT // 4 + 2])
    system.idt = DescriptorTable(q[L.IDT // 8], d[L.IDT // 4 + 2])
    system.cr0, system.cr2, system.cr3, system.cr4 = (q[at // 8] for at in (L.CR0, L.CR2, L.CR3, L.CR4))
    system.cr8, system.efer, system.apic_base = (q[at // 8] for at in (L.CR8, L.EFER, L.APIC_BASE))
    xsave = bytearray(cpu.raw[L.FX : L.FX + (832 if cpu.registers.xcr0 & 4 else 576)])
    if not cpu.registers.xcr0 & 4:
        pack_into("<Q", xsave, 512, 3)
    if cpu.vm.model.xcr0 & PKRU:
        xsave = xsave.ljust(832, b"\0") + pack("<Q", d[L.PKRU // 4])
        pack_into("<Q", xsave, 512, xsave[512] | PKRU)
    events = Events(
        nmi_pending=bool(d[(L.LAPIC + L.LAPIC_NMI) // 4]),
        nmi_blocked=bool(d[L.NMI_BLOCKED // 4]),
        interrupt_shadow=bool(d[L.SHADOW // 4]),
        halted=bool(d[L.HALTED // 4]),
        startup="wait-for-sipi" if d[L.STARTUP // 4] else "running",
    )
    dr = q[L.DR // 8 : L.DR // 8 + 8]
    msrs = cpu.msrs.all()  # the timer may expire now: its deadline first, so that it or its interrupt is there, or both
    lapic = cpu.msrs.lapic_image() if cpu.vm.lapic else None
    tsc = cpu.native.tsc() + q[L.TSC_OFFSET // 8] & 0xFFFFFFFFFFFFFFFF
    return VCpuState(
        registers, system, Fpu(bytes(xsave), cpu.registers.xcr0), events, msrs,
        (dr[0], dr[1], dr[2], dr[3], dr[6], dr[7]), lapic, tsc,
    )  # fmt: skip


def set_state(cpu: TcgVCpu, state: VCpuState) -> None:
    """Put *state* into the processor. Raises UsageError for what it cannot hold."""
    q, d = cpu.words, cpu.halves
    for i, name in enumerate(GENERAL):
        q[L.GPR // 8 + i] = getattr(state.registers, name) & 0xFFFFFFFFFFFFFFFF
    system = state.system
    for i, name in enumerate(SEGMENTS):
        s: Segment = getattr(system, name)
        attr = (
            s.type
            | s.s << 4
            | s.dpl << 5
            | s.present << 7
            | s.avl << 8
            | s.l << 9
            | s.db << 10
            | s.g << 11
            | s.unusable << 12
        )
        pack_into("<QIHH", cpu.raw, L.SEG + L.SIZEOF_SEG * i, s.base, s.limit, s.selector, attr)
    for at, table in ((L.GDT, system.gdt), (L.IDT, system.idt)):
        q[at // 8], d[at // 4 + 2] = table.base, table.limit
    for at, value in (
        (L.CR0, system.cr0 | 0x10), (L.CR2, system.cr2), (L.CR3, system.cr3), (L.CR4, system.cr4),
        (L.CR8, system.cr8), (L.EFER, system.efer), (L.APIC_BASE, system.apic_base),
    ):  # fmt: skip
        q[at // 8] = value
    _set_fpu(cpu, state.fpu)
    q[L.RIP // 8] = state.registers.rip
    cpu.native.set_eflags(cpu.pointer, state.registers.rflags)
    events = state.events
    for at, flag in (
        (L.NMI_BLOCKED, events.nmi_blocked),
        (L.SHADOW, events.interrupt_shadow),
        (L.HALTED, events.halted),
    ):
        d[at // 4] = int(flag)
    d[(L.LAPIC + L.LAPIC_NMI) // 4] = int(events.nmi_pending)
    d[L.STARTUP // 4] = int(cpu.vm.lapic and events.startup != "running")
    for i, value in zip((0, 1, 2, 3, 6, 7), state.debug, strict=True):
        q[L.DR // 8 + i] = value
    if cpu.vm.lapic:
        cpu.msrs.set_lapic(state.lapic, fresh=(state.lapic is None and events.startup != "running") or not state.msrs)
    cpu.msrs.set_all(state.msrs)  # TSC_ADJUST moves the TSC
    if state.tsc is not None:
        q[L.TSC_OFFSET // 8] = _tsc_offset(cpu, state.tsc, state.msrs.get(TSC_ADJUST, 0))
    cpu.msrs.kvmclock_goes_on()
    if cpu.vm.lapic:
        cpu.msrs.tsc_deadline(state.msrs.get(TSC_DEADLINE, 0))
    cpu.native.load_pdptes(cpu.pointer)
    cpu.native.reset(cpu.pointer)
    if events.exception is not None:
        cpu.raise_exception(events.exception, events.error_code)
    if events.interrupt is not None:
        cpu.native.deliver_interrupt(cpu.pointer, events.interrupt)


def _tsc_offset(cpu: TcgVCpu, tsc: int, adjust: int) -> int:
    """The offset to the host's TSC with which the processor's is *tsc* now; or, where that is less than a second apart
    from the first processor's, but for *adjust*, which is the guest's, with which they are equal. Both were read, and
    are set, one after the other: a guest whose TSCs are not equal sees time go back as it goes from one to the other.
    """
    offset: int = tsc - cpu.native.tsc()
    first = next(iter(cpu.vm.cpus), cpu)
    if first is not cpu:
        equal = first.words[L.TSC_OFFSET // 8] - first.words[L.TSC_ADJUST // 8] + adjust
        second = cpu.vm.clock.tsc_khz * 1000
        if (offset - equal + second) & 0xFFFFFFFFFFFFFFFF < 2 * second:
            offset = equal
    return offset & 0xFFFFFFFFFFFFFFFF


def _set_fpu(cpu: TcgVCpu, fpu: Fpu) -> None:
    if len(fpu.xsave) < 576:
        raise UsageError(f"FPU state has {len(fpu.xsave)} bytes: expected at least 576")
    image = bytearray(fpu.xsave[: 832 if cpu.avx else 576].ljust(832, b"\0"))
    present = image[512]
    if not present & 1:  # a state that is not there is the initial one
        image[0:24] = pack("<H22x", 0x37F)
        image[32:160] = bytes(128)
    if not present & 2:
        image[160:416] = bytes(256)
        if not present & 4:
            image[24:28] = pack("<I", 0x1F80)
    image[512:576] = pack("<B63x", present & 7)
    cpu.raw[L.FX : L.FX + 832] = image
    known = cpu.vm.model.xcr0
    cpu.halves[L.GUEST_XCR0 // 4] = fpu.xcr0 & known | 1
    has_keys = known & PKRU and len(fpu.xsave) >= 840 and unpack_from("<Q", fpu.xsave, 512)[0] & PKRU
    cpu.halves[L.PKRU // 4] = unpack_from("<I", fpu.xsave, 832)[0] if has_keys else 0
