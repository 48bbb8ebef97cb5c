"""Register state between a KVM vCPU and :mod:`cardcage.x86` (KVM API, KVM_GET_REGS and its relatives)."""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING, Any

from cardcage.errors import AcceleratorError, UsageError
from cardcage.x86 import DescriptorTable, Events, Fpu, Registers, Segment, SystemRegisters, VCpuState

from cardcage_kvm import abi

if TYPE_CHECKING:
    from cardcage_kvm.vcpu import KvmVCpu

MSR_TSC, MSR_TSC_DEADLINE = 0x10, 0x6E0
MTRRS = (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF)
REGISTERS = tuple(field[0] for field in abi.Regs._fields_)
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
SEGMENT_FIELDS = ("selector", "base", "limit", "type", "s", "dpl", "present", "avl", "l", "db", "g", "unusable")
STARTUP = {
    abi.MpState.UNINITIALIZED: "wait-for-sipi",
    abi.MpState.INIT_RECEIVED: "init",
}


def read(vcpu: KvmVCpu) -> VCpuState:
    """All registers of *vcpu*, which must not be running."""
    in_kernel = vcpu.vm.irqchip != "none"
    msrs = read_msrs(vcpu.fd, vcpu.vm.msr_list)
    tsc = msrs.pop(MSR_TSC, None)
    return VCpuState(
        registers=read_registers(vcpu.fd),
        system=read_system(vcpu.fd),
        fpu=_read_fpu(vcpu),
        events=_read_events(vcpu.fd),
        msrs=msrs,
        debug=_read_debug(vcpu.fd),
        lapic=read_lapic(vcpu.fd) if in_kernel else None,
        tsc=tsc,
    )


def power_up(vcpu: KvmVCpu) -> tuple[dict[int, int], bytes | None]:
    """MSRs, the time-stamp counter aside, and the local APIC of a vCPU just made, whose CPUID is set."""
    msrs = read_msrs(vcpu.fd, vcpu.vm.msr_list)
    msrs.pop(MSR_TSC, None)
    return msrs, read_lapic(vcpu.fd) if vcpu.vm.irqchip != "none" else None


def write(vcpu: KvmVCpu, new: VCpuState) -> None:
    """Set all registers, in the order that KVM needs: modes before what depends on them, timers last."""
    fd, in_kernel = vcpu.fd, vcpu.vm.irqchip != "none"
    fresh_msrs, lapic = vcpu.power_up
    if new.lapic is not None or new.msrs:
        lapic = new.lapic
    if new.lapic is not None and not in_kernel:
        raise UsageError(f"vCPU {vcpu.index}: has no local APIC (irqchip none) to hold the state's")
    if new.lapic is not None and len(new.lapic) != 1024:
        raise UsageError(f"vCPU {vcpu.index}: a local APIC page has 1024 bytes, not {len(new.lapic)}")
    if new.events.startup not in ("running", *STARTUP.values()):
        raise UsageError(f"vCPU {vcpu.index}: unknown startup state {new.events.startup!r}")
    unknown = sorted(set(new.msrs) - set(vcpu.vm.msr_list))
    if unknown:
        raise UsageError(f"vCPU {vcpu.index}: KVM here has no MSR {', '.join(hex(one) for one in unknown)}")
    try:
        _write_system(fd, new.system)
        _set(fd, abi.SET_REGS, _registers(new.registers))
        _write_fpu(vcpu, new.fpu)
        msrs = {**_changed(vcpu, fresh_msrs.keys() - new.msrs.keys()), **new.msrs}
        deadline = msrs.pop(MSR_TSC_DEADLINE, None)
        if new.tsc is not None:
            msrs[MSR_TSC] = new.tsc
        write_msrs(vcpu, msrs)
        if lapic is not None:
            _set(fd, abi.SET_LAPIC, abi.LapicState.from_buffer_copy(lapic))
        if deadline is not None:
            write_msrs(vcpu, {MSR_TSC_DEADLINE: deadline})
        _write_events(vcpu, new.events)
        _write_debug(fd, new.debug)
    except AcceleratorError as error:
        raise UsageError(f"vCPU {vcpu.index}: cannot hold this state: {error}") from error
    except (TypeError, OverflowError) as error:
        raise UsageError(f"vCPU {vcpu.index}: a register's value does not fit: {error}") from error


def _changed(vcpu: KvmVCpu, indices: set[int]) -> dict[int, int]:
    """Power-up values of those MSRs that have another value now."""
    fresh, _ = vcpu.power_up
    return {at: fresh[at] for at, value in read_msrs(vcpu.fd, tuple(sorted(indices))).items() if value != fresh[at]}


def read_registers(fd: int) -> Registers:
    """The general-purpose registers."""
    regs = _get(fd, abi.GET_REGS, abi.Regs)
    return Registers(**{name: getattr(regs, name) for name in REGISTERS})


def read_system(fd: int) -> SystemRegisters:
    """Segments, tables and control registers."""
    sregs = _get(fd, abi.GET_SREGS, abi.Sregs)
    parts: dict[str, Any] = {name: _segment(getattr(sregs, name)) for name in SEGMENTS}
    parts |= {name: getattr(sregs, name) for name in CONTROL}
    return SystemRegisters(
        gdt=DescriptorTable(sregs.gdt.base, sregs.gdt.limit),
        idt=DescriptorTable(sregs.idt.base, sregs.idt.limit),
        **parts,
    )


def _get(fd: int, request: abi.Request, kind: type[Any]) -> Any:
    found = kind()
    abi.ioctl(fd, request, found)
    return found


def _set(fd: int, request: abi.Request, value: Any) -> None:
    abi.ioctl(fd, request, value)


def _registers(registers: Registers) -> abi.Regs:
    return abi.Regs(**{name: _u64(getattr(registers, name), name) for name in REGISTERS})


def _u64(value: int, name: str) -> int:
    if not 0 <= value < 1 << 64:
        raise UsageError(f"{name}: {value:#x} is not an unsigned 64-bit value")
    return value


def _segment(found: Any) -> Segment:
    return Segment(**{name: getattr(found, name) for name in SEGMENT_FIELDS})


def _write_system(fd: int, system: SystemRegisters) -> None:
    sregs = _get(fd, abi.GET_SREGS, abi.Sregs)
    for name in SEGMENTS:
        segment, target = getattr(system, name), getattr(sregs, name)
        for part in SEGMENT_FIELDS:
            setattr(target, part, getattr(segment, part))
    for name in CONTROL:
        setattr(sregs, name, _u64(getattr(system, name), name))
    for name in ("gdt", "idt"):
        table, found = getattr(system, name), getattr(sregs, name)
        found.base, found.limit = _u64(table.base, name), table.limit
    sregs.interrupt_bitmap[:] = [0, 0, 0, 0]  # an accepted interrupt is set with the events
    _set(fd, abi.SET_SREGS, sregs)


def _read_fpu(vcpu: KvmVCpu) -> Fpu:
    xsave, xcr0 = _xsave(vcpu), 1
    abi.ioctl(vcpu.fd, abi.GET_XSAVE2 if vcpu.vm.xsave_size > 4096 else abi.GET_XSAVE, xsave)
    if vcpu.vm.has_xcrs:
        xcrs = _get(vcpu.fd, abi.GET_XCRS, abi.Xcrs)
        xcr0 = next((one.value for one in xcrs.xcrs[: xcrs.nr_xcrs] if one.xcr == 0), 1)
    return Fpu(xsave=bytes(xsave), xcr0=xcr0)


def _xsave(vcpu: KvmVCpu) -> Any:
    return (ctypes.c_uint8 * vcpu.vm.xsave_size)()


def _write_fpu(vcpu: KvmVCpu, fpu: Fpu) -> None:
    if not 576 <= len(fpu.xsave) <= vcpu.vm.xsave_size:
        raise UsageError(
            f"vCPU {vcpu.index}: XSAVE state of {len(fpu.xsave)} bytes; expected 576 to {vcpu.vm.xsave_size}"
        )
    if vcpu.vm.has_xcrs:
        xcrs = abi.Xcrs(nr_xcrs=1)
        xcrs.xcrs[0].value = fpu.xcr0
        _set(vcpu.fd, abi.SET_XCRS, xcrs)
    area = bytearray(fpu.xsave)
    if not any(area[512:520]):
        area[512] = 3  # a legacy image: x87 and SSE are in it, whatever its header left out
    xsave = _xsave(vcpu)
    xsave[: len(area)] = area
    _set(vcpu.fd, abi.SET_XSAVE, xsave)


def _read_events(fd: int) -> Events:
    events = _get(fd, abi.GET_VCPU_EVENTS, abi.VcpuEvents)
    mp_state = _get(fd, abi.GET_MP_STATE, abi.MpStateStruct).mp_state
    exception = events.exception_injected or events.exception_pending
    return Events(
        exception=events.exception_nr if exception else None,
        error_code=events.exception_error_code if exception and events.exception_has_error_code else None,
        interrupt=events.interrupt_nr if events.interrupt_injected else None,
        nmi_pending=bool(events.nmi_pending or events.nmi_injected),
        nmi_blocked=bool(events.nmi_masked),
        interrupt_shadow=bool(events.interrupt_shadow),
        halted=mp_state == abi.MpState.HALTED,
        startup=STARTUP.get(mp_state, "running"),
    )


def _write_events(vcpu: KvmVCpu, new: Events) -> None:
    fd, in_kernel = vcpu.fd, vcpu.vm.irqchip != "none"
    if in_kernel:
        mp_state = next((code for code, word in STARTUP.items() if word == new.startup), abi.MpState.RUNNABLE)
        if new.halted and mp_state == abi.MpState.RUNNABLE:
            mp_state = abi.MpState.HALTED
        _set(fd, abi.SET_MP_STATE, abi.MpStateStruct(mp_state=mp_state))
    elif new.startup != "running":
        raise UsageError(f"vCPU {vcpu.index}: start-up by SIPI needs a local APIC (irqchip split or full)")
    events = _get(fd, abi.GET_VCPU_EVENTS, abi.VcpuEvents)
    events.exception_pending, events.exception_injected = 0, int(new.exception is not None)
    events.exception_nr, events.exception_has_error_code = new.exception or 0, int(new.error_code is not None)
    events.exception_error_code = new.error_code or 0
    events.interrupt_injected, events.interrupt_nr = int(new.interrupt is not None), new.interrupt or 0
    events.interrupt_soft, events.nmi_injected = 0, 0
    events.nmi_pending, events.nmi_masked = int(new.nmi_pending), int(new.nmi_blocked)
    events.interrupt_shadow = abi.SHADOW_STI if new.interrupt_shadow else 0
    events.flags = abi.EVENT_NMI_PENDING | abi.EVENT_SHADOW
    _set(fd, abi.SET_VCPU_EVENTS, events)


def read_events(fd: int) -> abi.VcpuEvents:
    """Events that wait for delivery, with all that KVM tells of them: more than :class:`cardcage.x86.Events` has."""
    found: abi.VcpuEvents = _get(fd, abi.GET_VCPU_EVENTS, abi.VcpuEvents)
    return found


def _read_debug(fd: int) -> tuple[int, int, int, int, int, int]:
    found = _get(fd, abi.GET_DEBUGREGS, abi.DebugRegs)
    return (found.db[0], found.db[1], found.db[2], found.db[3], found.dr6, found.dr7)


def _write_debug(fd: int, debug: tuple[int, int, int, int, int, int]) -> None:
    registers = abi.DebugRegs(dr6=debug[4], dr7=debug[5])
    registers.db[:] = debug[:4]
    _set(fd, abi.SET_DEBUGREGS, registers)


def read_lapic(fd: int) -> bytes:
    """The registers of a local APIC."""
    return bytes(_get(fd, abi.GET_LAPIC, abi.LapicState).regs)


def msr_list(system_fd: int) -> tuple[int, ...]:
    """The MSRs that this host's KVM keeps for a guest: those that it lists, and the MTRRs, which it does not list."""
    probe, _ = abi.flexible(abi.MsrList, "nmsrs", ctypes.c_uint32, 0)
    with contextlib.suppress(AcceleratorError):  # E2BIG is the answer: the count is now in nmsrs
        abi.ioctl(system_fd, abi.GET_MSR_INDEX_LIST, probe)
    both, indices = abi.flexible(abi.MsrList, "nmsrs", ctypes.c_uint32, probe.header.nmsrs)
    abi.ioctl(system_fd, abi.GET_MSR_INDEX_LIST, both)
    return tuple(dict.fromkeys((*indices, *MTRRS)))


def read_msrs(fd: int, indices: tuple[int, ...]) -> dict[int, int]:
    """Values of the MSRs that can be read: KVM lists some that this vCPU's CPUID hides."""
    found: dict[int, int] = {}
    rest = list(indices)
    while rest:
        both, entries = abi.flexible(abi.Msrs, "nmsrs", abi.MsrEntry, len(rest))
        for entry, index in zip(entries, rest, strict=True):
            entry.index = index
        done = abi.ioctl(fd, abi.GET_MSRS, both)
        found.update((entry.index, entry.data) for entry in entries[:done])
        rest = rest[done + 1 :]  # KVM stops at the first one it refuses
    return found


def write_msrs(vcpu: KvmVCpu, msrs: dict[int, int]) -> None:
    """Set MSRs. Raises :exc:`~cardcage.errors.UsageError` naming an MSR that is refused.

    KVM lists some MSRs that it lets nobody write on this vCPU; an MSR that already has the wanted value is no failure.
    """
    rest = list(msrs.items())
    while rest:
        both, entries = abi.flexible(abi.Msrs, "nmsrs", abi.MsrEntry, len(rest))
        for entry, (index, value) in zip(entries, rest, strict=True):
            entry.index, entry.data = index, _u64(value, f"MSR {index:#x}")
        done = abi.ioctl(vcpu.fd, abi.SET_MSRS, both)
        if done < len(rest):
            index, value = rest[done]
            if read_msrs(vcpu.fd, (index,)).get(index) != value:
                raise UsageError(f"vCPU {vcpu.index}: KVM refuses {value:#x} in MSR {index:#x}")
        rest = rest[done + 1 :]
