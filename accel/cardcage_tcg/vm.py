"""A virtual machine of the translator: its native structure, vCPUs, interrupt entry, the timer thread."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from attrs import field
from cardcage.errors import AcceleratorError, UsageError
from cardcage.values import frozen

from cardcage_tcg import MAX_INSTRUCTIONS
from cardcage_tcg import layout as L
from cardcage_tcg.clock import Clock
from cardcage_tcg.cpu.cpuid import CpuModel
from cardcage_tcg.cpu.vcpu import TcgVCpu
from cardcage_tcg.debug import DebugStops
from cardcage_tcg.dirty import DirtyPages
from cardcage_tcg.eventfds import EventFds
from cardcage_tcg.forking import Forks
from cardcage_tcg.holding import Holds
from cardcage_tcg.library import Area, CodeBuffer, load
from cardcage_tcg.memory import GuestMemory
from cardcage_tcg.parking import ParksThreads
from cardcage_tcg.translate.recipes import mark_process
from cardcage_tcg.translate.store import TemplateStore, store_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cardcage.accelerator import MemorySlot, VmSpec

    from cardcage_tcg.translate.blocks import Blocks

__all__ = ["TcgOptions", "TcgVm"]

HASH_BITS = 18


@frozen
class TcgOptions:
    """Options of the accelerator (``[accel.tcg]``).

    Attributes:
        code_cache: MiB of executable memory, 8 to 1024; when it is full, all blocks are forgotten.
        block_size: the most instructions in one block, 1 to 64 (1 is a lockstep aid).
        templates: directory where instruction templates are kept between runs; empty for the user's cache,
            ``none`` for nowhere.
    """

    code_cache: int = field(default=256)
    templates: str = ""
    block_size: int = field(default=MAX_INSTRUCTIONS)

    @code_cache.validator
    def _cache(self, _: object, value: int) -> None:
        if not 8 <= value <= 1024:
            raise ValueError(f"{value} MiB: expected 8 to 1024")

    @block_size.validator
    def _block(self, _: object, value: int) -> None:
        if not 1 <= value <= MAX_INSTRUCTIONS:
            raise ValueError(f"{value}: expected 1 to {MAX_INSTRUCTIONS}")


def _hash_key() -> memoryview:
    return memoryview(bytes(byte | (at % 8 == 0) for at, byte in enumerate(os.urandom(32)))).cast("Q")


class TcgVm(ParksThreads, Forks, Holds):
    """Satisfies :class:`cardcage.accelerator.AcceleratedVm`."""

    def __init__(self, spec: VmSpec) -> None:
        if spec.irqchip == "full":
            raise AcceleratorError('tcg: irqchip "full" is KVM\'s; expected "split" or "none"')
        if spec.cpus > L.MAX_CPUS:
            raise AcceleratorError(f"tcg: {spec.cpus} vCPUs: expected at most {L.MAX_CPUS}")
        options = spec.options if isinstance(spec.options, TcgOptions) else TcgOptions()
        super().__init__()
        self.native = load()
        self.lapic = spec.irqchip == "split"
        self._area = Area(L.SIZEOF_VM + 4096)
        self._hash, self._cross = Area(8 << HASH_BITS), Area(8 * L.MAX_CROSS)
        self.code = CodeBuffer(options.code_cache << 20)
        self.pointer = self._area.address
        q, d = self._area.view[: L.SIZEOF_VM].cast("Q"), self._area.view[: L.SIZEOF_VM].cast("I")
        self._q, self._d = q, d
        d[L.VM_NCPUS // 4] = spec.cpus
        d[L.VM_HAS_LAPIC // 4] = int(self.lapic)
        q[L.VM_CODE_RX // 8], q[L.VM_CODE_RW // 8], q[L.VM_CODE_SIZE // 8] = (
            self.code.rx,
            self.code.rw,
            self.code.size,
        )
        self._chunks = Area(L.SIZEOF_CHUNK * (self.code.size >> L.CHUNK_BITS))
        q[L.VM_CHUNKS // 8] = self._chunks.address
        q[L.VM_HASH_KEY // 8 : L.VM_HASH_KEY // 8 + 4] = _hash_key()
        q[L.VM_HASH // 8], q[L.VM_HASH_MASK // 8] = self._hash.address, (1 << HASH_BITS) - 1
        q[L.VM_CROSS // 8] = self._cross.address
        q[L.VM_APIC_BUS_HZ // 8] = 1_000_000_000
        self.clock = Clock(self.native)
        q[L.VM_TSC_KHZ // 8] = self.clock.tsc_khz
        self.model = CpuModel(
            self.native, spec.cpu, dict(spec.features), spec.cpus, lapic=self.lapic, tsc_khz=self.clock.tsc_khz
        )
        self.cpuid = self.model.told
        self.cr4_allowed = self._cr4()
        if self.lapic:
            shown = (("x2apic", L.H_LAPIC_X2), ("tsc-deadline", L.H_LAPIC_DEADLINE))
            d[L.VM_HAS_LAPIC // 4] |= sum(bit for name, bit in shown if name in self.model.features)
        self.store = TemplateStore(store_path(options.templates, self.model.lacking))
        q[L.VM_STORE // 8], q[L.VM_BLOCK_LIMIT // 8] = self.store.area.address, options.block_size
        self._blocks: Blocks | None = None
        self.lock = threading.RLock()
        """Held while slots change, which takes several steps, and by whoever looks at memory or makes templates in
        Python: stopping the world keeps vCPUs out of native code only. Never held while a device is called."""
        self._stopped = 0
        self.memory = GuestMemory(self, self._area.view)
        self.cpus: list[TcgVCpu] = []
        self.range = self.native.add_range(self.code.rx, self.code.rx + self.code.size)
        self.native.signals()
        self.events = EventFds(self)
        self.dirty = log = DirtyPages(self)
        self.add_writer, self.remove_writer = log.add_writer, log.remove_writer
        self.start_dirty_log, self.fetch_dirty_log, self.stop_dirty_log = log.start, log.fetch, log.stop
        self.set_revert_bases, self.revert_dirty_log = log.set_bases, log.revert
        self.stops = stops = DebugStops(self)
        self.set_breakpoints, self.set_stepping, self.debug_stop = stops.set_points, stops.set_how, stops.stop_of
        found = {"dirty-log", "doorbells", "foreign-rings", "guest-debug", "parking"}
        self.capabilities = frozenset(found | {"irqfds"} if self.lapic else found)
        self._closed = False
        if self.store.is_new or self.store.recipes.names():  # on this thread, before the guest waits for it
            self.blocks.prepare()

    @property
    def blocks(self) -> Blocks:
        """The translator's Python half, loaded when something has no template, or memory under code changes."""
        if self._blocks is None:
            with self.lock:
                if self._blocks is None:
                    from cardcage_tcg.translate.blocks import Blocks

                    self._blocks = Blocks(self, self.store)
        return self._blocks

    def set_word(self, offset: int, value: int) -> None:
        """Set a 64-bit field of ``struct vm``."""
        self._q[offset // 8] = value

    @property
    def generation(self) -> int:
        """How often all code was forgotten."""
        return self._q[L.VM_GENERATION // 8]

    def set_half(self, offset: int, value: int) -> None:
        """Set a 32-bit field of ``struct vm``."""
        self._d[offset // 4] = value

    def _cr4(self) -> int:
        allowed = 0x7FC  # TSD to OSXMMEXCPT; no VME
        for feature, bit in (("umip", 11), ("fsgsbase", 16), ("xsave", 18), ("smep", 20), ("smap", 21), ("pku", 22)):
            if feature in self.model.features:
                allowed |= 1 << bit
        return allowed

    # ---- the accelerator's seam ----

    def create_vcpu(self, index: int, /) -> TcgVCpu:
        mark_process()
        cpu = TcgVCpu(self, index)
        cpu.registers.set_field(L.TSC_OFFSET, -self.clock.tsc_zero & 0xFFFFFFFFFFFFFFFF)
        self.cpus.append(cpu)
        self._q[L.VM_CPUS // 8 + index] = cpu.pointer
        if self._ticker is None and self.lapic:
            self.start_ticker()
        return cpu

    def map_memory(self, slot: MemorySlot, /) -> None:
        self.memory.map(slot)

    def unmap_memory(self, slot: MemorySlot, /) -> None:
        self.memory.unmap(slot)

    def flush_translations(self) -> None:
        """Empty all soft TLBs; the world is stopped."""
        for cpu in self.cpus:
            self.native.tlb_flush(cpu.pointer)

    def memory_written(self, address: int, size: int, /) -> None:
        self.memory.written(address, size)

    def memory_written_many(self, ranges: Sequence[tuple[int, int]], /) -> None:
        self.memory.written_many(ranges)

    @contextmanager
    def quiesce(self) -> Iterator[None]:
        with self.lock:
            if not self._stopped:
                self.native.stop_world(self.pointer)
            self._stopped += 1
            try:
                yield
            finally:
                self._stopped -= 1
                if not self._stopped:
                    self.native.start_world(self.pointer)

    def set_extint(self, level: bool, /) -> None:
        if self.cpus:
            self.native.set_extint(self.cpus[0].pointer, level)

    def set_irq(self, gsi: int, level: bool, /) -> None:
        raise UsageError(f"tcg: line {gsi} ({level}): this accelerator has no PIC or IOAPIC of its own")

    def signal_msi(self, address: int, data: int, /) -> None:
        self.native.apic_message(self.pointer, address, data)

    def inject_nmi(self, index: int, /) -> None:
        self.native.inject_nmi(self.cpus[index].pointer)

    # ---- capabilities ----

    def add_doorbell(self, fd: int, address: int, size: int, *, pio: bool, value: int | None) -> None:
        """Signal eventfd *fd* when the guest writes *size* bytes (0: any) at *address*, equal to *value* if given."""
        self.events.add_bell(fd, address, size, pio, value)

    def remove_doorbell(self, fd: int, address: int, size: int, *, pio: bool, value: int | None) -> None:
        """Take a doorbell away; arguments as given to :meth:`add_doorbell`."""
        self.events.remove_bell(fd, address, size, pio, value)

    def add_irqfd(self, fd: int, address: int, data: int, /) -> int:
        """Route eventfd *fd* to an MSI message; returns a route number."""
        return self.events.add_route(fd, address, data)

    def remove_irqfd(self, fd: int, route: int, /) -> None:
        """Take the route of :meth:`add_irqfd` away."""
        self.events.remove_route(fd, route)

    def add_foreign_ring(self, size: int, table: int, avail: int, used: int, /) -> int:
        """Another process serves this split virtqueue; returns its number."""
        return self.events.add_ring(size, table, avail, used)

    def foreign_ring_heads(self, number: int, /) -> tuple[int, list[int]]:
        """The available index, and what is in flight up to it."""
        return self.events.ring_heads(number)

    def remove_foreign_ring(self, number: int, /) -> None:
        """It does no more."""
        self.events.remove_ring(number)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.native.close(self.pointer)
        self.events.close()
        if self._ticker is not None:
            self._ticker.join()
        self.native.freeze(self.range, None, 0)
        self.native.remove_range(self.range)
        self.dirty.close()
        self.stops.close()
        for cpu in self.cpus:
            cpu.close()
        self.cpus = []
        self._q.release()
        self._d.release()
        self.store.close()
        self.memory.close()
        for area in (self._area, self._hash, self._cross, self._chunks):
            area.close()
        self.code.close()
