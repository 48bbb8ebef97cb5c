"""A KVM virtual machine: memory slots, interrupts, doorbells, irqfds, quiescence, dirty tracking."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from typing import TYPE_CHECKING

from cardcage.errors import AcceleratorError, ConfigError, StateError, UsageError

from cardcage_kvm import abi, cpuid, report, state
from cardcage_kvm.dirty import DirtyPages
from cardcage_kvm.kick import kick_signal
from cardcage_kvm.routing import IOAPIC_PINS, MSI_LEVEL, Routes, high_part
from cardcage_kvm.vcpu import KvmVCpu

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cardcage.accelerator import ForeignWriter, MemorySlot, VmSpec

# Three pages for the TSS and one for the identity map that Intel processors without unrestricted guest need, in the
# firmware hole below 4 GiB where QEMU has them too.
IDENTITY_MAP_ADDRESS, TSS_ADDRESS = 0xFEFFC000, 0xFEFFD000
GSI_COUNT = 24


class KvmVm:
    """See :class:`cardcage.accelerator.AcceleratedVm`. Made by :meth:`cardcage_kvm.accel.Kvm.create_vm`.

    Args:
        system_fd: ``/dev/kvm``, owned by this object from now on. spec: what the machine asks for.
        dirty_ring: entries of each vCPU's dirty ring, 0 for the dirty log.
    """

    def __init__(self, system_fd: int, spec: VmSpec, dirty_ring: int = 0) -> None:
        self.system_fd, self.irqchip, self.cpus = system_fd, spec.irqchip, spec.cpus
        self.fd = -1
        self.vcpus: list[KvmVCpu] = []
        self.slots: dict[int, MemorySlot] = {}
        self.extint, self.stopping = False, 0
        self._dirty = DirtyPages(self, dirty_ring)
        self._gate = threading.Condition()
        self._slot_lock = threading.Lock()
        try:
            self._create(spec)
        except BaseException:
            self.close()
            raise

    def _create(self, spec: VmSpec) -> None:
        self._kick_signal = kick_signal()
        limit = self._extension(abi.Cap.MAX_VCPUS)
        if spec.cpus > limit:
            raise ConfigError(f"{spec.cpus} vCPUs: this host's KVM has at most {limit}")
        offered = cpuid.supported(self.system_fd)
        self._cpuid = cpuid.model(
            offered,
            spec.cpu,
            spec.features,
            irqchip=spec.irqchip,
            deadline=bool(self._extension(abi.Cap.TSC_DEADLINE_TIMER)),
        )
        self.fd = abi.ioctl(self.system_fd, abi.CREATE_VM)
        abi.ioctl(self.fd, abi.SET_IDENTITY_MAP_ADDR, ctypes.c_uint64(IDENTITY_MAP_ADDRESS))
        abi.ioctl(self.fd, abi.SET_TSS_ADDR, TSS_ADDRESS)
        self.msr_list = state.msr_list(self.system_fd)
        self.xsave_size = max(self._extension(abi.Cap.XSAVE2), 4096)
        self.has_xcrs = any(leaf.function == 1 and leaf.ecx & 1 << 26 for leaf in offered)
        if spec.irqchip == "split":
            self._enable(abi.Cap.SPLIT_IRQCHIP, IOAPIC_PINS)
        elif spec.irqchip == "full":
            abi.ioctl(self.fd, abi.CREATE_IRQCHIP)
            abi.ioctl(self.fd, abi.CREATE_PIT2, abi.PitConfig(flags=abi.PIT_SPEAKER_DUMMY))
        if spec.irqchip != "none" and self._extension(abi.Cap.X2APIC_API):
            self._enable(abi.Cap.X2APIC_API, abi.X2APIC_USE_32BIT_IDS | abi.X2APIC_DISABLE_BROADCAST_QUIRK)
        self._routes = Routes(self.fd, spec.irqchip)
        self._dirty.enable()
        found = {"dirty-log"}
        if self._extension(abi.Cap.IOEVENTFD):
            found.add("doorbells")
        if spec.irqchip != "none":
            found.add("irqfds")
        if spec.irqchip == "full":
            found.add("irqchip-full")
        self.capabilities = frozenset(found)

    def _extension(self, cap: abi.Cap) -> int:
        return abi.ioctl(self.fd if self.fd >= 0 else self.system_fd, abi.CHECK_EXTENSION, int(cap))

    def _enable(self, cap: abi.Cap, argument: int) -> None:
        enable = abi.EnableCap(cap=int(cap))
        enable.args[0] = argument
        abi.ioctl(self.fd, abi.ENABLE_CAP, enable)

    def create_vcpu(self, index: int, /) -> KvmVCpu:
        """Create processor *index*, 0 to ``cpus - 1``, in its state after reset."""
        if not 0 <= index < self.cpus or any(one.index == index for one in self.vcpus):
            raise UsageError(f"vCPU {index}: expected each of 0 to {self.cpus - 1} once")
        vcpu = KvmVCpu(self, index, self._kick_signal)
        try:
            abi.ioctl(vcpu.fd, abi.SET_CPUID2, cpuid.for_vcpu(self._cpuid, index, self.cpus))
            vcpu.power_up = state.power_up(vcpu)
            self._dirty.attach(vcpu)
        except BaseException:
            vcpu.close()
            raise
        self.vcpus.append(vcpu)
        return vcpu

    # memory

    def map_memory(self, slot: MemorySlot, /) -> None:
        """Add a slot of guest memory."""
        if (slot.address | slot.size | slot.host_address) % abi.PAGE or slot.size <= 0 or slot.address < 0:
            raise UsageError(f"memory slot {slot.address:#x}+{slot.size:#x}: not made of whole pages")
        with self._slot_lock:
            number = next(one for one in range(len(self.slots) + 1) if one not in self.slots)
            self._set_region(number, slot, slot.size)
            self.slots[number] = slot

    def unmap_memory(self, slot: MemorySlot, /) -> None:
        """Remove exactly this slot."""
        with self._slot_lock:
            number = self.slot_number(slot)
            self._set_region(number, slot, 0)
            del self.slots[number]

    def slot_number(self, slot: MemorySlot) -> int:
        """KVM's number of a mapped slot. Raises :exc:`~cardcage.errors.UsageError` when it is not mapped."""
        for number, known in self.slots.items():
            if known == slot:
                return number
        raise UsageError(f"memory slot {slot.address:#x}+{slot.size:#x}: not mapped")

    def _set_region(self, number: int, slot: MemorySlot, size: int) -> None:
        flags = (abi.MEM_READONLY if slot.readonly else 0) | (abi.MEM_LOG_DIRTY_PAGES if self._dirty.logging else 0)
        region = abi.UserspaceMemoryRegion(
            slot=number,
            flags=flags if size else 0,
            guest_phys_addr=slot.address,
            memory_size=size,
            userspace_addr=slot.host_address,
        )
        abi.ioctl(self.fd, abi.SET_USER_MEMORY_REGION, region)

    def refresh_slots(self) -> None:
        """Tell KVM all slots again, after their flags changed."""
        with self._slot_lock:
            for number, slot in self.slots.items():
                self._set_region(number, slot, slot.size)

    def memory_written(self, address: int, size: int, /) -> None:
        """Note it in the dirty log. KVM derives nothing from memory's contents that the processor does not keep
        coherent."""
        self._dirty.written(((address, size),))

    def memory_written_many(self, ranges: Sequence[tuple[int, int]], /) -> None:
        """:meth:`memory_written` for each."""
        self._dirty.written(ranges)

    def peek(self, address: int, size: int) -> bytes:
        """Guest-physical bytes for a report: as many of *size* as lie in one slot."""
        for slot in self.slots.values():
            if slot.address <= address < slot.address + slot.size:
                offset = address - slot.address
                return report.read_host(slot.host_address + offset, min(size, slot.size - offset))
        return b""

    # quiescence

    @contextlib.contextmanager
    def quiesce(self) -> Iterator[None]:
        """All vCPUs out of guest code while the block runs; may be nested and called within *ops*."""
        with self._gate:
            self.stopping += 1
        for vcpu in self.vcpus:
            vcpu.interrupt()
        try:
            with self._gate:
                while any(vcpu.inside for vcpu in self.vcpus):
                    self._gate.wait()
            yield
        finally:
            with self._gate:
                self.stopping -= 1
                self._gate.notify_all()

    def left_guest(self) -> None:
        """A vCPU with something to attend to came out of KVM_RUN: whoever waits for that looks again."""
        with self._gate:
            self._gate.notify_all()

    def wait_while_stopped(self) -> None:
        """Hold a vCPU's thread until nobody wants the VM quiescent."""
        with self._gate:
            while self.stopping:
                self._gate.wait()

    # interrupts

    def set_extint(self, level: bool, /) -> None:
        """Drive the 8259's INTR output into the boot processor (irqchip ``none`` and ``split``)."""
        if self.irqchip == "full":
            raise StateError("irqchip full: the 8259 is KVM's own")
        if level != self.extint:
            self.extint = level
            if level and self.vcpus:
                self._boot_processor().interrupt()

    def _boot_processor(self) -> KvmVCpu:
        return next((vcpu for vcpu in self.vcpus if vcpu.index == 0), self.vcpus[0])

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
            self._routes.announce_level(address, data)
        message = abi.Msi(address_lo=address & 0xFFFFFFFF, address_hi=high_part(address), data=data & 0xFFFFFFFF)
        with contextlib.suppress(AcceleratorError):  # KVM's answer when nobody took it
            abi.ioctl(self.fd, abi.SIGNAL_MSI, message)

    def inject_nmi(self, index: int, /) -> None:
        """Send an NMI to vCPU *index*. Thread-safe."""
        for vcpu in self.vcpus:
            if vcpu.index == index:
                vcpu.post_nmi()
                return
        raise UsageError(f"no vCPU {index}")

    # capabilities

    def add_doorbell(self, fd: int, address: int, size: int, *, pio: bool, value: int | None) -> None:
        """Signal eventfd *fd* when the guest writes *size* bytes (0: any) at *address*, equal to *value* if given."""
        self._doorbell(fd, address, size, pio, value, 0)

    def remove_doorbell(self, fd: int, address: int, size: int, *, pio: bool, value: int | None) -> None:
        """Take a doorbell away; arguments as given to :meth:`add_doorbell`."""
        self._doorbell(fd, address, size, pio, value, abi.IOEVENTFD_DEASSIGN)

    def _doorbell(self, fd: int, address: int, size: int, pio: bool, value: int | None, flags: int) -> None:
        if size not in (0, 1, 2, 4, 8):
            raise UsageError(f"doorbell at {address:#x}: {size} bytes; expected 0, 1, 2, 4 or 8")
        flags |= (abi.IOEVENTFD_PIO if pio else 0) | (abi.IOEVENTFD_DATAMATCH if value is not None else 0)
        abi.ioctl(
            self.fd, abi.IOEVENTFD, abi.IoEventFd(datamatch=value or 0, addr=address, len=size, fd=fd, flags=flags)
        )

    def add_irqfd(self, fd: int, address: int, data: int, /) -> int:
        """Route eventfd *fd* to an MSI message; returns a route number."""
        if self.irqchip == "none":
            raise StateError("irqchip none: KVM has nothing to deliver an irqfd to")
        route = self._routes.add(address, data)
        try:
            abi.ioctl(self.fd, abi.IRQFD, abi.IrqFd(fd=fd, gsi=route))
        except AcceleratorError:
            self._routes.remove(route)
            raise
        return route

    def remove_irqfd(self, fd: int, route: int, /) -> None:
        """Take the route of :meth:`add_irqfd` away."""
        abi.ioctl(self.fd, abi.IRQFD, abi.IrqFd(fd=fd, gsi=route, flags=abi.IRQFD_DEASSIGN))
        self._routes.remove(route)

    def add_writer(self, writer: ForeignWriter, /) -> None:
        """Ask *writer* too what it wrote."""
        self._dirty.add_writer(writer)

    def remove_writer(self, writer: ForeignWriter, /) -> None:
        """Ask it no more."""
        self._dirty.remove_writer(writer)

    def start_dirty_log(self) -> None:
        """From now on remember which pages are written."""
        self._dirty.start()

    def fetch_dirty_log(self, slot: MemorySlot, /) -> bytes:
        """Bitmap of the slot's pages written since the last fetch, which it clears."""
        return self._dirty.fetch(slot)

    def stop_dirty_log(self) -> None:
        """Stop remembering."""
        self._dirty.stop()

    def collect_dirty_rings(self) -> None:
        """A vCPU's dirty ring is full: empty them all."""
        self._dirty.collect()

    def close(self) -> None:
        """Release everything. Idempotent; no vCPU may be running."""
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus.clear()
        self.slots.clear()
        self._dirty.close()
        for name in ("fd", "system_fd"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)
