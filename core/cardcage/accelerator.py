"""The accelerator seam: what runs guest code. KVM and the translator are interchangeable behind it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from attrs import field
from attrs.validators import ge, in_

from cardcage.abilities import has, require
from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cardcage.vcpu import VCpu

__all__ = [
    "AcceleratedVm",
    "Accelerator",
    "DirtyLog",
    "Doorbells",
    "ForeignRings",
    "ForeignWriter",
    "GuestDebug",
    "IrqFds",
    "MemorySlot",
    "Parkable",
    "Probe",
    "VmSpec",
    "WrittenMany",
    "check_vm",
]


@frozen
class Probe:
    """An accelerator's answer: is it usable here?

    Attributes:
        usable: a virtual machine can be created.
        speed: ``"native"``, ``"translated"`` or ``"emulated"``, from fast to slow.
        reason: one line: why not, or what to know (``"/dev/kvm: permission denied"``); advice is for a doctor's line.
        executable: it makes memory executable that it wrote itself (a translator): the machine asks for ``execmem``.
        code_memory: name of the memfd that holds generated code, by which its cost is told apart; empty without one.
    """

    usable: bool
    speed: str = field(default="native", validator=in_(("native", "translated", "emulated")))
    reason: str = ""
    executable: bool = False
    code_memory: str = ""


@frozen
class VmSpec:
    """The machine's requirements for a new virtual machine.

    Attributes:
        cpus: number of vCPUs that will be created, 1 to 255.
        irqchip: ``"none"``: no local APIC, HLT comes back as an exit, interrupts only as ExtINT;
            ``"split"``: local APICs in the accelerator, PIC and IOAPIC are the machine's cards;
            ``"full"``: PIC, PIT and IOAPIC too are in the accelerator (needs the capability ``irqchip-full``).
        cpu: CPU model: ``"host"`` for all that can be offered, ``"max"`` likewise, or ``"x86-64-v2"``.
        features: CPU features switched on or off by name, as ``{"avx2": True}``.
        options: the accelerator's own options, already structured (its card's attrs class), or ``None``.
    """

    cpus: int = field(default=1, validator=ge(1))
    irqchip: str = field(default="split", validator=in_(("none", "split", "full")))
    cpu: str = "max"
    features: dict[str, bool] = field(factory=dict)
    options: object = None


@frozen
class MemorySlot:
    """A range of guest-physical addresses backed by host memory.

    Attributes:
        address: guest-physical, page aligned.
        size: bytes, a multiple of 4096, greater than 0.
        host_address: where it is mapped in this process, page aligned.
        readonly: guest writes go to ``mmio_write`` instead (ROM).
    """

    address: int
    size: int
    host_address: int
    readonly: bool = False


class AcceleratedVm(Protocol):
    """A virtual machine inside an accelerator.

    ``capabilities`` names the opt-in abilities that this VM really has: ``irqchip-full``, ``doorbells``
    (:class:`Doorbells`), ``irqfds`` (:class:`IrqFds`), ``dirty-log`` (:class:`DirtyLog`), ``foreign-rings``
    (:class:`ForeignRings`), ``parking`` (:class:`Parkable`), ``guest-debug`` (:class:`GuestDebug`).
    """

    capabilities: frozenset[str]

    def create_vcpu(self, index: int, /) -> VCpu:
        """Create processor *index* (0 is the boot processor). Its state is that after reset."""

    def map_memory(self, slot: MemorySlot, /) -> None:
        """Add a slot. Call with all vCPUs quiescent or not yet running; slots never overlap."""

    def unmap_memory(self, slot: MemorySlot, /) -> None:
        """Remove exactly this slot."""

    def memory_written(self, address: int, size: int, /) -> None:
        """The host wrote guest-physical memory (a device, a loader): forget what was derived from the old bytes."""

    def quiesce(self) -> AbstractContextManager[None]:
        """All vCPUs out of guest code while the block runs. Never call it while the machine's lock is held
        by the caller in a way that a vCPU thread waits for. May be called on a vCPU's own thread, within *ops*."""

    def set_extint(self, level: bool, /) -> None:
        """Drive the 8259's INTR output: LINT0 of the boot processor, or its INTR pin without a local APIC."""

    def set_irq(self, gsi: int, level: bool, /) -> None:
        """Drive input *gsi* of the in-accelerator PIC and IOAPIC (irqchip ``full`` only)."""

    def signal_msi(self, address: int, data: int, /) -> None:
        """Deliver a message-signalled interrupt (Intel SDM vol. 3, 11.11). Thread-safe."""

    def inject_nmi(self, index: int, /) -> None:
        """Send an NMI to vCPU *index*. Thread-safe."""

    def close(self) -> None:
        """Release everything. Idempotent; no vCPU may be running."""


class Parkable(Protocol):
    """Capability ``parking`` of a VM, and an ability of devices: its threads can end and be started anew, in a forked
    process too. A VM's clocks (TSC, timers) stand still meanwhile. Not under the machine's lock."""

    def may_park(self) -> str:
        """In one line why that cannot be now; empty when it can."""

    def park(self) -> None:
        """The machine is paused: end all threads."""

    def unpark(self) -> None:
        """Start them anew; the machine is still paused."""


class WrittenMany(Protocol):
    """A VM that hears of many ranges at the cost of one."""

    def memory_written_many(self, ranges: Sequence[tuple[int, int]], /) -> None:
        """:meth:`AcceleratedVm.memory_written` for each (address, size)."""


class Accelerator(Protocol):
    """An accelerator card's factory product."""

    name: str

    def probe(self) -> Probe:
        """Say whether it works here, in milliseconds and without side effects."""

    def create_vm(self, spec: VmSpec, /) -> AcceleratedVm:
        """Create a virtual machine. Raises :exc:`~cardcage.errors.AcceleratorError` in words a user understands."""


class Doorbells(Protocol):
    """Capability ``doorbells``: writes that signal an eventfd without leaving guest code (KVM ioeventfd)."""

    def add_doorbell(self, fd: int, address: int, size: int, *, pio: bool, value: int | None) -> None:
        """Signal eventfd *fd* when the guest writes *size* bytes (1, 2, 4, 8; 0: any) at *address*, and with *value*
        only that one. Such a write does not reach the machine. Raises AcceleratorError where another doorbell is."""

    def remove_doorbell(self, fd: int, address: int, size: int, *, pio: bool, value: int | None) -> None: ...


class IrqFds(Protocol):
    """Capability ``irqfds``: an eventfd that delivers an MSI without this process (KVM irqfd)."""

    def add_irqfd(self, fd: int, address: int, data: int, /) -> int:
        """Route eventfd *fd* to an MSI message; returns a route number. What it has counted already is delivered."""

    def remove_irqfd(self, fd: int, route: int, /) -> None: ...


class ForeignRings(Protocol):
    """Capability ``foreign-rings``: this accelerator derives things from guest memory, as translated code, and can find
    out by itself what another process that serves a split virtqueue (virtio 1.2, 2.7) wrote. Where a VM has it, such
    a device has to use it; others need no telling."""

    def add_foreign_ring(self, size: int, table: int, avail: int, used: int, /) -> int:
        """From now on, forget what was derived of a buffer's old bytes before the guest sees it as used.

        *size* entries; descriptor table, available and used ring at guest-physical *table*, *avail* and *used*. Returns
        a number. Call it before the other process begins, with nothing in flight.
        """

    def foreign_ring_heads(self, number: int, /) -> tuple[int, list[int]]:
        """The available index now, and the heads of the requests up to it that are not used: what is in flight with the
        other process, which has ended or stopped."""

    def remove_foreign_ring(self, number: int, /) -> None:
        """The other process has ended its work on the ring."""


class ForeignWriter(Protocol):
    """A device that another process serves, which writes guest memory by itself, for :class:`DirtyLog`. Both are called
    under the machine's lock where there is a machine."""

    def log_writes(self, on: bool, /) -> None:
        """From now on keep what is written, or no longer."""

    def collect_writes(self) -> Sequence[tuple[int, int]]:
        """(address, size) of what may have been written since the last time."""


class DirtyLog(Protocol):
    """Capability ``dirty-log``: which pages were written, by the guest, by whoever reports it with ``memory_written``,
    and by other processes."""

    def add_writer(self, writer: ForeignWriter, /) -> None:
        """Ask *writer*, too, until :meth:`remove_writer`."""

    def remove_writer(self, writer: ForeignWriter, /) -> None: ...

    def start_dirty_log(self) -> None: ...

    def fetch_dirty_log(self, slot: MemorySlot, /) -> bytes:
        """A bitmap of the slot's 4 KiB pages written since the last fetch (little-endian bit order), and clear it."""

    def stop_dirty_log(self) -> None: ...


class GuestDebug(Protocol):
    """Capability ``guest-debug``: stops for a debugger, as :attr:`~cardcage.vcpu.Exit.DEBUG`, which no guest sees.
    For the device that provides the service ``guest-debug``, while no vCPU runs. A point is (kind, linear address,
    size): ``execute`` before an instruction; ``write``, ``read``, ``access`` behind one that does it to a byte."""

    def set_breakpoints(self, points: Sequence[tuple[str, int, int]], /) -> None:
        """Stop at these, on each vCPU, and at no others. Raises AcceleratorError for more than it can; none change."""

    def set_stepping(self, cpu: int, how: str, /) -> None:
        """Have *cpu* ``run``, ``step`` (stop behind its next instruction; no interrupt comes between) or ``hold``."""

    def debug_stop(self, cpu: int, /) -> tuple[str, int, int] | None:
        """The point that *cpu* stopped at last; None for a step, or when it did not stop."""


CAPABILITIES: dict[str, Any] = {
    "doorbells": Doorbells,
    "irqfds": IrqFds,
    "dirty-log": DirtyLog,
    "foreign-rings": ForeignRings,
    "parking": Parkable,
    "guest-debug": GuestDebug,
}
"""A capability that a VM may state, to the protocol that it then must have."""
VM: tuple[Any, ...] = (AcceleratedVm, WrittenMany, *CAPABILITIES.values())
"""Protocols that are looked for in a VM; the first it must have."""


def check_vm(vm: Any, who: str) -> AcceleratedVm:
    """Hold a VM to its protocol, and to those of the capabilities that it states. Raises CardError."""
    found = require(vm, AcceleratedVm, who)
    has(vm, WrittenMany, who)
    for word, protocol in CAPABILITIES.items():
        if word in found.capabilities:
            require(vm, protocol, who)
    return found
