"""The Linux KVM API as types: structures, ioctl requests and capabilities (Linux Documentation/virt/kvm/api.rst).

Request numbers are computed from a direction, a number and the structure's size, as the kernel's ``_IO`` macros do
(include/uapi/asm-generic/ioctl.h), so a structure declared wrongly is refused by the kernel instead of misread.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from ctypes import Structure, Union, c_int32, c_uint8, c_uint16, c_uint32, c_uint64, sizeof
from enum import IntEnum
from typing import Any

from attrs import frozen
from cardcage.errors import AcceleratorError

KVMIO = 0xAE
API_VERSION = 12
PAGE = 4096
MEM_LOG_DIRTY_PAGES, MEM_READONLY = 1, 2
CPUID_SIGNIFICANT_INDEX = 1
IRQCHIP_PIC_MASTER, IRQCHIP_PIC_SLAVE, IRQCHIP_IOAPIC = 0, 1, 2
ROUTING_IRQCHIP, ROUTING_MSI = 1, 2
IRQFD_DEASSIGN = 1
IOEVENTFD_DATAMATCH, IOEVENTFD_PIO, IOEVENTFD_DEASSIGN = 1, 2, 4
PIT_SPEAKER_DUMMY = 1
PIT_HPET_LEGACY = 1
TSC_CTRL, TSC_OFFSET = 0, 0
EVENT_NMI_PENDING, EVENT_SHADOW = 1, 4
SHADOW_STI = 2
X2APIC_USE_32BIT_IDS, X2APIC_DISABLE_BROADCAST_QUIRK = 1, 2
DIRTY_RING_PAGE_OFFSET = 64
DIRTY_GFN_DIRTY, DIRTY_GFN_RESET = 1, 2
GUESTDBG_ENABLE, GUESTDBG_SINGLESTEP = 1, 2
GUESTDBG_USE_HW_BP, GUESTDBG_INJECT_DB, GUESTDBG_BLOCKIRQ = 1 << 17, 1 << 18, 1 << 20


class Cap(IntEnum):
    """Capabilities asked for with KVM_CHECK_EXTENSION."""

    USER_MEMORY = 3
    SET_GUEST_DEBUG = 23
    IOEVENTFD = 36
    VCPU_EVENTS = 41
    XSAVE = 55
    MAX_VCPUS = 66
    TSC_DEADLINE_TIMER = 72
    SPLIT_IRQCHIP = 121
    VCPU_ATTRIBUTES = 127
    X2APIC_API = 129
    IMMEDIATE_EXIT = 136
    DIRTY_LOG_RING = 192
    SET_GUEST_DEBUG2 = 195
    XSAVE2 = 208
    DIRTY_LOG_RING_ACQ_REL = 223


class ExitReason(IntEnum):
    """``kvm_run.exit_reason`` on x86."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    NMI = 16
    INTERNAL_ERROR = 17
    WATCHDOG = 21
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26
    HYPERV = 27
    X86_RDMSR = 29
    X86_WRMSR = 30
    DIRTY_RING_FULL = 31
    AP_RESET_HOLD = 32
    X86_BUS_LOCK = 33
    XEN = 34
    NOTIFY = 37
    MEMORY_FAULT = 39


class MpState(IntEnum):
    """``kvm_mp_state.mp_state`` on x86."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4


class UserspaceMemoryRegion(Structure):
    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]


class Regs(Structure):
    _fields_ = [
        (name, c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *(f"r{number}" for number in range(8, 16)),
            *("rip", "rflags"),
        )
    ]


class SegmentRegister(Structure):
    _fields_ = [
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        *((name, c_uint8) for name in ["type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable", "padding"]),
    ]


class Dtable(Structure):
    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class Sregs(Structure):
    _fields_ = [
        *((name, SegmentRegister) for name in ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"]),
        ("gdt", Dtable),
        ("idt", Dtable),
        *((name, c_uint64) for name in ["cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"]),
        ("interrupt_bitmap", c_uint64 * 4),
    ]


class MsrEntry(Structure):
    _fields_ = [("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64)]


class Msrs(Structure):
    """``kvm_msrs`` without its flexible array; see :func:`msrs`."""

    _fields_ = [("nmsrs", c_uint32), ("pad", c_uint32)]


class MsrList(Structure):
    _fields_ = [("nmsrs", c_uint32)]


class CpuidEntry(Structure):
    _fields_ = [
        *((name, c_uint32) for name in ["function", "index", "flags", "eax", "ebx", "ecx", "edx"]),
        ("padding", c_uint32 * 3),
    ]


class Cpuid(Structure):
    _fields_ = [("nent", c_uint32), ("padding", c_uint32)]


class Xsave(Structure):
    _fields_ = [("region", c_uint8 * 4096)]


class Xcr(Structure):
    _fields_ = [("xcr", c_uint32), ("reserved", c_uint32), ("value", c_uint64)]


class Xcrs(Structure):
    _fields_ = [("nr_xcrs", c_uint32), ("flags", c_uint32), ("xcrs", Xcr * 16), ("padding", c_uint64 * 16)]


class LapicState(Structure):
    _fields_ = [("regs", c_uint8 * 1024)]


class MpStateStruct(Structure):
    _fields_ = [("mp_state", c_uint32)]


class VcpuEvents(Structure):
    _fields_ = [
        ("exception_injected", c_uint8),
        ("exception_nr", c_uint8),
        ("exception_has_error_code", c_uint8),
        ("exception_pending", c_uint8),
        ("exception_error_code", c_uint32),
        ("interrupt_injected", c_uint8),
        ("interrupt_nr", c_uint8),
        ("interrupt_soft", c_uint8),
        ("interrupt_shadow", c_uint8),
        ("nmi_injected", c_uint8),
        ("nmi_pending", c_uint8),
        ("nmi_masked", c_uint8),
        ("nmi_pad", c_uint8),
        ("sipi_vector", c_uint32),
        ("flags", c_uint32),
        ("smi", c_uint8 * 4),
        ("triple_fault_pending", c_uint8),
        ("reserved", c_uint8 * 26),
        ("exception_has_payload", c_uint8),
        ("exception_payload", c_uint64),
    ]


class DebugRegs(Structure):
    _fields_ = [
        ("db", c_uint64 * 4),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
        ("flags", c_uint64),
        ("reserved", c_uint64 * 9),
    ]


class GuestDebug(Structure):
    _fields_ = [("control", c_uint32), ("pad", c_uint32), ("debugreg", c_uint64 * 8)]


class Interrupt(Structure):
    _fields_ = [("irq", c_uint32)]


class IrqLevel(Structure):
    _fields_ = [("irq", c_uint32), ("level", c_uint32)]


class PitConfig(Structure):
    _fields_ = [("flags", c_uint32), ("pad", c_uint32 * 15)]


class PitState(Structure):
    """``kvm_pit_state2``, whose channels are put back as they were found."""

    _fields_ = [("channels", c_uint8 * 72), ("flags", c_uint32), ("reserved", c_uint32 * 9)]


class Irqchip(Structure):
    """``kvm_irqchip``, whose chip is put back as it was found."""

    _fields_ = [("chip_id", c_uint32), ("pad", c_uint32), ("chip", c_uint8 * 512)]


class ClockData(Structure):
    _fields_ = [
        ("clock", c_uint64),
        ("flags", c_uint32),
        ("pad0", c_uint32),
        ("realtime", c_uint64),
        ("host_tsc", c_uint64),
        ("pad", c_uint32 * 4),
    ]


class DeviceAttr(Structure):
    _fields_ = [("flags", c_uint32), ("group", c_uint32), ("attr", c_uint64), ("addr", c_uint64)]


class Msi(Structure):
    _fields_ = [
        *((name, c_uint32) for name in ["address_lo", "address_hi", "data", "flags", "devid"]),
        ("pad", c_uint8 * 12),
    ]


class IrqFd(Structure):
    _fields_ = [*((name, c_uint32) for name in ["fd", "gsi", "flags", "resamplefd"]), ("pad", c_uint8 * 16)]


class IoEventFd(Structure):
    _fields_ = [
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    ]


class EnableCap(Structure):
    _fields_ = [("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64)]


class DirtyLogStruct(Structure):
    _fields_ = [("slot", c_uint32), ("padding1", c_uint32), ("dirty_bitmap", c_uint64)]


class Translation(Structure):
    _fields_ = [
        ("linear_address", c_uint64),
        ("physical_address", c_uint64),
        *((name, c_uint8) for name in ["valid", "writeable", "usermode"]),
        ("pad", c_uint8 * 5),
    ]


class RoutingIrqchip(Structure):
    _fields_ = [("irqchip", c_uint32), ("pin", c_uint32)]


class RoutingMsi(Structure):
    _fields_ = [(name, c_uint32) for name in ["address_lo", "address_hi", "data", "devid"]]


class RoutingTarget(Union):
    _fields_ = [("irqchip", RoutingIrqchip), ("msi", RoutingMsi), ("pad", c_uint32 * 8)]


class RoutingEntry(Structure):
    _fields_ = [*((name, c_uint32) for name in ["gsi", "type", "flags", "pad"]), ("u", RoutingTarget)]


class Routing(Structure):
    _fields_ = [("nr", c_uint32), ("flags", c_uint32)]


class EmulationFailure(Structure):
    """``kvm_run.emulation_failure`` (and ``internal``, whose data follow ``ndata``)."""

    _fields_ = [
        ("suberror", c_uint32),
        ("ndata", c_uint32),
        ("flags", c_uint64),
        ("insn_size", c_uint8),
        ("insn_bytes", c_uint8 * 15),
    ]


class DirtyGfn(Structure):
    _fields_ = [("flags", c_uint32), ("slot", c_uint32), ("offset", c_uint64)]


@frozen
class Request:
    """One ioctl: its name for errors, and its number."""

    name: str
    number: int


def _io(number: int, name: str) -> Request:
    return Request(name, KVMIO << 8 | number)


def _sized(direction: int, number: int, name: str, structure: type[Any]) -> Request:
    return Request(name, direction << 30 | sizeof(structure) << 16 | KVMIO << 8 | number)


def _iow(number: int, name: str, structure: type[Any]) -> Request:
    return _sized(1, number, name, structure)


def _ior(number: int, name: str, structure: type[Any]) -> Request:
    return _sized(2, number, name, structure)


def _iowr(number: int, name: str, structure: type[Any]) -> Request:
    return _sized(3, number, name, structure)


GET_API_VERSION = _io(0x00, "KVM_GET_API_VERSION")
CREATE_VM = _io(0x01, "KVM_CREATE_VM")
GET_MSR_INDEX_LIST = _iowr(0x02, "KVM_GET_MSR_INDEX_LIST", MsrList)
CHECK_EXTENSION = _io(0x03, "KVM_CHECK_EXTENSION")
GET_VCPU_MMAP_SIZE = _io(0x04, "KVM_GET_VCPU_MMAP_SIZE")
GET_SUPPORTED_CPUID = _iowr(0x05, "KVM_GET_SUPPORTED_CPUID", Cpuid)
CREATE_VCPU = _io(0x41, "KVM_CREATE_VCPU")
GET_DIRTY_LOG = _iow(0x42, "KVM_GET_DIRTY_LOG", DirtyLogStruct)
SET_USER_MEMORY_REGION = _iow(0x46, "KVM_SET_USER_MEMORY_REGION", UserspaceMemoryRegion)
SET_TSS_ADDR = _io(0x47, "KVM_SET_TSS_ADDR")
SET_IDENTITY_MAP_ADDR = _iow(0x48, "KVM_SET_IDENTITY_MAP_ADDR", c_uint64)
CREATE_IRQCHIP = _io(0x60, "KVM_CREATE_IRQCHIP")
IRQ_LINE = _iow(0x61, "KVM_IRQ_LINE", IrqLevel)
GET_IRQCHIP = _iowr(0x62, "KVM_GET_IRQCHIP", Irqchip)
SET_IRQCHIP = _ior(0x63, "KVM_SET_IRQCHIP", Irqchip)
SET_GSI_ROUTING = _iow(0x6A, "KVM_SET_GSI_ROUTING", Routing)
IRQFD = _iow(0x76, "KVM_IRQFD", IrqFd)
CREATE_PIT2 = _iow(0x77, "KVM_CREATE_PIT2", PitConfig)
IOEVENTFD = _iow(0x79, "KVM_IOEVENTFD", IoEventFd)
SET_CLOCK = _iow(0x7B, "KVM_SET_CLOCK", ClockData)
GET_CLOCK = _ior(0x7C, "KVM_GET_CLOCK", ClockData)
RUN = _io(0x80, "KVM_RUN")
GET_REGS = _ior(0x81, "KVM_GET_REGS", Regs)
SET_REGS = _iow(0x82, "KVM_SET_REGS", Regs)
GET_SREGS = _ior(0x83, "KVM_GET_SREGS", Sregs)
SET_SREGS = _iow(0x84, "KVM_SET_SREGS", Sregs)
TRANSLATE = _iowr(0x85, "KVM_TRANSLATE", Translation)
INTERRUPT = _iow(0x86, "KVM_INTERRUPT", Interrupt)
GET_MSRS = _iowr(0x88, "KVM_GET_MSRS", Msrs)
SET_MSRS = _iow(0x89, "KVM_SET_MSRS", Msrs)
GET_LAPIC = _ior(0x8E, "KVM_GET_LAPIC", LapicState)
SET_LAPIC = _iow(0x8F, "KVM_SET_LAPIC", LapicState)
SET_CPUID2 = _iow(0x90, "KVM_SET_CPUID2", Cpuid)
GET_MP_STATE = _ior(0x98, "KVM_GET_MP_STATE", MpStateStruct)
SET_MP_STATE = _iow(0x99, "KVM_SET_MP_STATE", MpStateStruct)
SET_GUEST_DEBUG = _iow(0x9B, "KVM_SET_GUEST_DEBUG", GuestDebug)
NMI = _io(0x9A, "KVM_NMI")
GET_VCPU_EVENTS = _ior(0x9F, "KVM_GET_VCPU_EVENTS", VcpuEvents)
SET_VCPU_EVENTS = _iow(0xA0, "KVM_SET_VCPU_EVENTS", VcpuEvents)
GET_PIT2 = _ior(0x9F, "KVM_GET_PIT2", PitState)
SET_PIT2 = _iow(0xA0, "KVM_SET_PIT2", PitState)
GET_DEBUGREGS = _ior(0xA1, "KVM_GET_DEBUGREGS", DebugRegs)
SET_DEBUGREGS = _iow(0xA2, "KVM_SET_DEBUGREGS", DebugRegs)
ENABLE_CAP = _iow(0xA3, "KVM_ENABLE_CAP", EnableCap)
GET_XSAVE = _ior(0xA4, "KVM_GET_XSAVE", Xsave)
SET_XSAVE = _iow(0xA5, "KVM_SET_XSAVE", Xsave)
SIGNAL_MSI = _iow(0xA5, "KVM_SIGNAL_MSI", Msi)
GET_XCRS = _ior(0xA6, "KVM_GET_XCRS", Xcrs)
SET_XCRS = _iow(0xA7, "KVM_SET_XCRS", Xcrs)
RESET_DIRTY_RINGS = _io(0xC7, "KVM_RESET_DIRTY_RINGS")
GET_XSAVE2 = _ior(0xCF, "KVM_GET_XSAVE2", Xsave)
SET_DEVICE_ATTR = _iow(0xE1, "KVM_SET_DEVICE_ATTR", DeviceAttr)
GET_DEVICE_ATTR = _iow(0xE2, "KVM_GET_DEVICE_ATTR", DeviceAttr)


def ioctl(fd: int, request: Request, argument: Any = 0) -> int:
    """Call an ioctl. *argument* is an integer, or a ctypes structure or array that is read and written in place.

    Raises :exc:`~cardcage.errors.AcceleratorError` with the request's name and the host's reason.
    """
    try:
        if not isinstance(argument, int):
            result: int = fcntl.ioctl(fd, request.number, argument, True)
            return result
        if argument < 1 << 31:
            return fcntl.ioctl(fd, request.number, argument)
        return _wide(fd, request, argument)
    except OSError as error:
        raise failure(request, error) from error


def _wide(fd: int, request: Request, argument: int) -> int:
    """Python's own ioctl passes integers as a C int, which the kernel would see with its sign extended."""
    call = ctypes.CDLL(None, use_errno=True).ioctl
    call.argtypes, call.restype = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong), ctypes.c_int
    result: int = call(fd, request.number, argument)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def failure(request: Request, error: OSError) -> AcceleratorError:
    """The project's error for a failed ioctl."""
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    return AcceleratorError(f"{request.name}: {os.strerror(error.errno or 0)} ({name})")


def flexible(header: type[Structure], count_field: str, element: type[Any], count: int) -> tuple[Any, Any]:
    """A header followed by *count* elements in one buffer: (the buffer with the header's fields, the elements).

    For the API's structures that end in a flexible array: pass the first to :func:`ioctl`, use the second.
    """

    class Both(Structure):
        _pack_ = 1
        _fields_ = [("header", header), ("elements", element * count)]

    both = Both()
    setattr(both.header, count_field, count)
    return both, both.elements
