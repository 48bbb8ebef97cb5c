"""The accelerator card: is KVM usable here, at what speed, and the VMs it creates."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from functools import cache
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import ge
from cardcage.accelerator import MemorySlot, Probe, VmSpec
from cardcage.errors import AcceleratorError, ConfigError
from cardcage.x86 import CR0_ET, CR0_PE, DescriptorTable, Registers, Segment

from cardcage_kvm import abi
from cardcage_kvm.vm import KvmVm

if TYPE_CHECKING:
    from cardcage_kvm.vcpu import KvmVCpu

DEVICE = "/dev/kvm"
# mov ecx, LOOPS; l: dec ecx; jnz l; hlt
LOOPS, TRIES = 1000, 3
PROGRAM = b"\xb9" + LOOPS.to_bytes(4, "little") + b"\x49\x75\xfd\xf4"
# A processor does the loop's two instructions in under a nanosecond; KVM's instruction emulator needs about half a
# microsecond each. In between lies a factor of several hundred.
EMULATED_NS = 100


@frozen
class KvmOptions:
    """Options of the accelerator ``kvm``.

    Attributes:
        dirty_ring: entries of each vCPU's dirty ring, a power of two from 1024; 0 uses the dirty log.
    """

    dirty_ring: int = field(default=0, validator=ge(0))


class Kvm:
    """Linux KVM; satisfies :class:`cardcage.accelerator.Accelerator`.

    Args:
        device: the KVM device file.
    """

    name = "kvm"

    def __init__(self, device: str = DEVICE) -> None:
        self._device = device

    def probe(self) -> Probe:
        """Probe KVM; a guest of some thousand instructions tells hardware from instruction emulation.

        The answer is kept for the process: some 10 ms the first time.
        """
        return _probe(self._device)

    def create_vm(self, spec: VmSpec, /) -> KvmVm:
        """Create a VM. Raises :exc:`~cardcage.errors.AcceleratorError`, or ConfigError for an impossible spec."""
        options = spec.options
        if options is not None and not isinstance(options, KvmOptions):
            raise ConfigError(f"accelerator kvm: options of {type(options).__name__}; expected KvmOptions")
        ring = options.dirty_ring if options else 0
        return KvmVm(_open(self._device), spec, ring, lambda: _probe(self._device).speed == "emulated")


def _open(device: str) -> int:
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise AcceleratorError(f"{device}: {_why(error)}") from error
    try:
        version = abi.ioctl(fd, abi.GET_API_VERSION)
        if version != abi.API_VERSION:
            raise AcceleratorError(f"{device}: KVM API version {version}; expected {abi.API_VERSION}")
        for cap in (abi.Cap.USER_MEMORY, abi.Cap.IMMEDIATE_EXIT, abi.Cap.VCPU_EVENTS, abi.Cap.XSAVE):
            if not abi.ioctl(fd, abi.CHECK_EXTENSION, int(cap)):
                raise AcceleratorError(f"{device}: this host's KVM lacks {cap.name}: its kernel is too old")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _why(error: OSError) -> str:
    match error.errno:
        case errno.EACCES | errno.EPERM:
            return "permission denied"
        case errno.ENOENT:
            return "does not exist"
        case errno.ENODEV | errno.ENXIO:
            return "no such device"
        case _:
            return os.strerror(error.errno or 0)


@cache  # a fact about the host that does not change while the process lives
def _probe(device: str) -> Probe:
    try:
        nanoseconds = _time_loop(device) / LOOPS
    except AcceleratorError as error:
        return Probe(usable=False, reason=str(error))
    if nanoseconds < EMULATED_NS:
        return Probe(usable=True, speed="native")
    mips = 2000 / nanoseconds
    return Probe(
        usable=True,
        speed="emulated",
        reason=f"{device} is instruction-emulated by this host: {mips:.1f} MIPS",
    )


def _time_loop(device: str) -> int:
    """Nanoseconds for the loop of :data:`PROGRAM` in 32-bit protected mode; the best try, as others use the host."""
    page = mmap.mmap(-1, abi.PAGE)
    page[: len(PROGRAM)] = PROGRAM
    vm = KvmVm(_open(device), VmSpec(irqchip="none"))
    try:
        vm.map_memory(MemorySlot(0x1000, abi.PAGE, ctypes.addressof(ctypes.c_char.from_buffer(page))))
        vcpu, best = vm.create_vcpu(0), 1 << 62
        for _ in range(TRIES):
            best = min(best, _run(vcpu))
            if best < EMULATED_NS * LOOPS:
                break
        return best
    finally:
        vm.close()


def _run(vcpu: KvmVCpu) -> int:
    state = vcpu.get_state()
    state.registers, state.events.halted = Registers(rip=0x1000), False
    system = state.system
    system.cr0 = CR0_PE | CR0_ET
    system.cs, flat = Segment.flat(8, code=True), Segment.flat(16)
    system.ds = system.es = system.fs = system.gs = system.ss = flat
    system.gdt = system.idt = DescriptorTable(0, 0)
    vcpu.set_state(state)
    begin = time.perf_counter_ns()
    vcpu.run(_NoDevices())
    took = time.perf_counter_ns() - begin
    if vcpu.get_state().registers.rcx & 0xFFFFFFFF:
        raise AcceleratorError("KVM ran a test guest wrongly")
    return took


class _NoDevices:
    """The probe's guest touches none."""

    def pio_read(self, port: int, size: int, /) -> int:
        return 0

    def pio_write(self, port: int, size: int, value: int, /) -> None: ...

    def mmio_read(self, address: int, size: int, /) -> int:
        return 0

    def mmio_write(self, address: int, size: int, value: int, /) -> None: ...

    def acknowledge_extint(self) -> int | None:
        return None

    def end_of_interrupt(self, vector: int, /) -> None: ...
