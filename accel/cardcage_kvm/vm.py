"""A KVM virtual machine: its descriptors, vCPUs, memory slots, interrupts, quiescence."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

from cardcage.errors import AcceleratorError, ConfigError, StateError, UsageError

from cardcage_kvm import abi, chips, cpuid, state
from cardcage_kvm.debug import DebugStops
from cardcage_kvm.dirty import DirtyPages
from cardcage_kvm.eventfds import EventFds
from cardcage_kvm.forking import Forking
from cardcage_kvm.gate import Gate
from cardcage_kvm.kick import kick_signal
from cardcage_kvm.parking import Parking
from cardcage_kvm.routing import IOAPIC_PINS, MSI_LEVEL, Routes, high_part
from cardcage_kvm.slots import Slots
from cardcage_kvm.vcpu import KvmVCpu

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage.accelerator import MemorySlot, VmSpec

# Three pages for the TSS and one for the identity map that Intel processors without unrestricted guest need, in the
# firmware hole below 4 GiB where QEMU has them too.
IDENTITY_MAP_ADDRESS, TSS_ADDRESS = 0xFEFFC000, 0xFEFFD000
GSI_COUNT = 24


class KvmVm:
    """See :class:`cardcage.accelerator.AcceleratedVm`. Made by :meth:`cardcage_kvm.accel.Kvm.create_vm`.

    Args:
        system_fd: ``/dev/kvm``, owned by this object from now on. spec: what the machine asks for.
        dirty_ring: entries of each vCPU's dirty ring, 0 for the dirty log.
        emulated: tells whether this KVM emulates instructions.
    """

    def __init__(
        self, system_fd: int, spec: VmSpec, dirty_ring: int = 0, emulated: Callable[[], bool] = lambda: False
    ) -> None:
        self.system_fd, self.irqchip, self.cpus = system_fd, spec.irqchip, spec.cpus
        self.fd, self.emulated = -1, emulated
        self.vcpus: list[KvmVCpu] = []
        self.slots, self.gate = Slots(), Gate()
        self.extint = False
        self.dirty = log = DirtyPages(self, dirty_ring)
        self.add_writer, self.remove_writer = log.add_writer, log.remove_writer
        self.start_dirty_log, self.fetch_dirty_log, self.stop_dirty_log = log.start, log.fetch, log.stop
        self.debug = stops = DebugStops(self)
        self.set_breakpoints, self.set_stepping, self.debug_stop = stops.set_points, stops.set_how, stops.stop_of
        self.events = found = EventFds(self)
        self.add_doorbell, self.remove_doorbell = found.add_doorbell, found.remove_doorbell
        self.add_irqfd, self.remove_irqfd = found.add_irqfd, found.remove_irqfd
        self.routes, parking, forking = Routes(spec.irqchip), Parking(self), Forking(self)
        self.may_park, self.park, self.unpark = parking.may_park, parking.park, parking.unpark
        self.may_fork, self.before_fork, self.after_fork = forking.may_fork, forking.before_fork, forking.after_fork
        try:
            self._create(spec)
        except BaseException:
            self.close()
            raise

    def _create(self, spec: VmSpec) -> None:
        self._kick_signal = kick_signal()
        limit = _extension(self.system_fd, abi.Cap.MAX_VCPUS)
        if spec.cpus > limit:
            raise ConfigError(f"{spec.cpus} vCPUs: this host's KVM has at most {limit}")
        offered = cpuid.supported(self.system_fd)
        self._cpuid = cpuid.model(
            offered,
            spec.cpu,
            spec.features,
            irqchip=spec.irqchip,
            deadline=bool(_extension(self.system_fd, abi.Cap.TSC_DEADLINE_TIMER)),
        )
        self.msr_list = state.msr_list(self.system_fd)
        self.has_xcrs = any(leaf.function == 1 and leaf.ecx & 1 << 26 for leaf in offered)
        self.open()
        self.xsave_size = max(_extension(self.fd, abi.Cap.XSAVE2), 4096)
        found = {"dirty-log"}
        if self.debug.usable():
            found.add("guest-debug")
        if _extension(self.fd, abi.Cap.IOEVENTFD):
            found.add("doorbells")
        if _extension(self.fd, abi.Cap.VCPU_ATTRIBUTES):  # the TSC's offset, which Linux has from 5.16 on
            found.add("parking")
        if spec.irqchip != "none":
            found.add("irqfds")
        if spec.irqchip == "full":
            found.add("irqchip-full")
        self.capabilities = frozenset(found)

    def open(self) -> None:
        """Have KVM make it, with the slots and routes that there are; vCPUs follow."""
        self.fd = abi.ioctl(self.system_fd, abi.CREATE_VM)
        abi.ioctl(self.fd, abi.SET_IDENTITY_MAP_ADDR, ctypes.c_uint64(IDENTITY_MAP_ADDRESS))
        abi.ioctl(self.fd, abi.SET_TSS_ADDR, TSS_ADDRESS)
        if self.irqchip == "split":
            _enable(self.fd, abi.Cap.SPLIT_IRQCHIP, IOAPIC_PINS)
        elif self.irqchip == "full":
            abi.ioctl(self.fd, abi.CREATE_IRQCHIP)
            abi.ioctl(self.fd, abi.CREATE_PIT2, abi.PitConfig(flags=abi.PIT_SPEAKER_DUMMY))
        if self.irqchip != "none" and _extension(self.fd, abi.Cap.X2APIC_API):
            _enable(self.fd, abi.Cap.X2APIC_API, abi.X2APIC_USE_32BIT_IDS | abi.X2APIC_DISABLE_BROADCAST_QUIRK)
        self.dirty.enable()
        self.slots.open(self.fd)
        self.routes.open(self.fd)

    def forget(self) -> None:
        """This is a forked process: give back what it has of its parent's, and leave that as it is."""
        for vcpu in self.vcpus:
            vcpu.close()
        self.dirty.close()
        os.close(self.fd)
        self.fd = -1

    def cpuid(self, leaf: int, sub: int, /) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX that guests see, but for what depends on the vCPU; zeros for a leaf that is not there."""
        for one in self._cpuid:
            if (one.function, one.index) == (leaf, sub):
                return one.eax, one.ebx, one.ecx, one.edx
        return 0, 0, 0, 0

    def create_vcpu(self, index: int, /) -> KvmVCpu:
        """Create processor *index*, 0 to ``cpus - 1``, in its state after reset."""
        if not 0 <= index < self.cpus or any(one.index == index for one in self.vcpus):
            raise UsageError(f"vCPU {index}: expected each of 0 to {self.cpus - 1} once")
        vcpu = KvmVCpu(self, index, self._kick_signal)
        try:
            self.prepare(vcpu)
            vcpu.power_up = state.power_up(vcpu)
        except BaseException:
            vcpu.close()
            raise
        self.vcpus.append(vcpu)
        return vcpu

    def prepare(self, vcpu: KvmVCpu) -> None:
        """Tell KVM what *vcpu*, which it has just made, is like."""
        abi.ioctl(vcpu.fd, abi.SET_CPUID2, cpuid.for_vcpu(self._cpuid, vcpu.index, self.cpus))
        self.dirty.attach(vcpu)

    # memory

    def map_memory(self, slot: MemorySlot, /) -> None:
        """Add a slot of guest memory."""
        self.slots.map(slot)

    def unmap_memory(self, slot: MemorySlot, /) -> None:
        """Remove exactly this slot."""
        self.slots.unmap(slot)

    def memory_written(self, address: int, size: int, /) -> None:
        """Note it in the dirty log. KVM derives nothing from memory's contents that the processor does not keep
        coherent."""
        self.dirty.written(((address, size),))

    def memory_written_many(self, ranges: Sequence[tuple[int, int]], /) -> None:
        """:meth:`memory_written` for each."""
        self.dirty.written(ranges)

    # quiescence

    def quiesce(self) -> contextlib.AbstractContextManager[None]:
        """All vCPUs out of guest code while the block runs; may be nested and called within *ops*."""
        return self.gate.closed(self.vcpus)

    # interrupts

    def set_extint(self, level: bool, /) -> None:
        """Drive the 8259's INTR output into the boot processor (irqchip ``none`` and ``split``)."""
        if self.irqchip == "full":
            raise StateError("irqchip full: the 8259 is KVM's own")
        if level != self.extint:
            self.extint = level
            if level and self.vcpus:
                next((vcpu for vcpu in self.vcpus if vcpu.index == 0), self.vcpus[0]).interrupt()

    def set_irq(self, gsi: int, level: bool, /) -> None:
        """Drive input *gsi*, 0 to 23, of KVM's PIC and IOAPIC (irqchip ``full`` only)."""
        if self.irqchip != "full":
            raise StateError(f"irqchip {self.irqchip}: PIC and IOAPIC are not KVM's")
        if not 0 <= gsi < GSI_COUNT:
            raise UsageError(f"GSI {gsi}: expected 0 to {GSI_COUNT - 1}")
        abi.ioctl(self.fd, abi.IRQ_LINE, abi.IrqLevel(irq=gsi, level=int(level)))

    def signal_msi(self, address: int, data: int, /) -> None:
        """Deliver a message-signalled interrupt. Thread-safe.

        The guest chose address and data: a message that no local APIC accepts goes nowhere, as on the bus.
        """
        if self.irqchip == "none":
            return
        if data & MSI_LEVEL:
            self.routes.announce_level(address, data)
        message = abi.Msi(address_lo=address & 0xFFFFFFFF, address_hi=high_part(address), data=data & 0xFFFFFFFF)
        with contextlib.suppress(AcceleratorError):  # KVM's answer when nobody took it
            abi.ioctl(self.fd, abi.SIGNAL_MSI, message)

    def save_chips(self) -> bytes:
        """The interrupt controllers and the timer that are KVM's; empty where they are the machine's cards."""
        return chips.save(self)

    def load_chips(self, data: bytes, /) -> None:
        """Put them back as they were; before the vCPUs' states. Raises :exc:`~cardcage.errors.UsageError`."""
        chips.load(self, data)

    def inject_nmi(self, index: int, /) -> None:
        """Send an NMI to vCPU *index*. Thread-safe."""
        for vcpu in self.vcpus:
            if vcpu.index == index:
                vcpu.post_nmi()
                return
        raise UsageError(f"no vCPU {index}")

    def close(self) -> None:
        """Release everything. Idempotent; no vCPU may be running."""
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus.clear()
        self.slots.known.clear()
        self.dirty.close()
        self.events.close()
        for name in ("fd", "system_fd"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)


def _extension(fd: int, cap: abi.Cap) -> int:
    return abi.ioctl(fd, abi.CHECK_EXTENSION, int(cap))


def _enable(fd: int, cap: abi.Cap, argument: int) -> None:
    enable = abi.EnableCap(cap=int(cap))
    enable.args[0] = argument
    abi.ioctl(fd, abi.ENABLE_CAP, enable)
