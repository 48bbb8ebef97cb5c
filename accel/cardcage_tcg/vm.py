"""A virtual machine of the translator: memory slots, code buffer, blocks, interrupt entry, the timer thread."""

from __future__ import annotations

import ctypes
import os
import threading
from array import array
from bisect import bisect_right
from contextlib import contextmanager
from itertools import chain
from struct import pack_into
from typing import TYPE_CHECKING

from attrs import field, frozen
from cardcage.errors import AcceleratorError, UsageError
from cardcage.segments import Areas
from iced_x86 import (
    Code,
    FlowControl,
    Instruction,
    InstructionInfoFactory,
    MemorySizeInfo,
    Mnemonic,
    OpAccess,
    OpKind,
)

from cardcage_tcg import layout as L
from cardcage_tcg.allowed import MASKED_MOVES, MASKED_STORES, waits
from cardcage_tcg.cpuid import CpuModel
from cardcage_tcg.emulate import UD, Fault
from cardcage_tcg.eventfds import EventFds
from cardcage_tcg.library import Area, CodeBuffer, load
from cardcage_tcg.store import TemplateStore, store_path
from cardcage_tcg.translate import MAX_INSTRUCTIONS, Translator
from cardcage_tcg.vcpu import TcgVCpu

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cardcage.accelerator import MemorySlot, VmSpec

__all__ = ["TcgOptions", "TcgVm"]

HASH_BITS = 18
TRIES = 200
"""How often one instruction is translated in a row: a few times suffice, unless others keep patching it."""


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


class TcgVm:
    """Satisfies :class:`cardcage.accelerator.AcceleratedVm`."""

    def __init__(self, spec: VmSpec) -> None:
        if spec.irqchip == "full":
            raise AcceleratorError('tcg: irqchip "full" is KVM\'s; expected "split" or "none"')
        if spec.cpus > L.MAX_CPUS:
            raise AcceleratorError(f"tcg: {spec.cpus} vCPUs: expected at most {L.MAX_CPUS}")
        options = spec.options if isinstance(spec.options, TcgOptions) else TcgOptions()
        self.native = load()
        self.lapic = spec.irqchip == "split"
        pair = (ctypes.c_uint64 * 2)()
        self._pair = pair
        first = self.clock_pair()
        self._area = Area(L.SIZEOF_VM + 4096)
        self._hash, self._cross = Area(8 << HASH_BITS), Area(8 * L.MAX_CROSS)
        self._code = CodeBuffer(options.code_cache << 20)
        self.pointer = self._area.address
        q, d = self._area.view[: L.SIZEOF_VM].cast("Q"), self._area.view[: L.SIZEOF_VM].cast("I")
        self._q, self._d = q, d
        d[L.VM_NCPUS // 4] = spec.cpus
        d[L.VM_HAS_LAPIC // 4] = int(self.lapic)
        q[L.VM_CODE_RX // 8], q[L.VM_CODE_RW // 8], q[L.VM_CODE_SIZE // 8] = (
            self._code.rx,
            self._code.rw,
            self._code.size,
        )
        self._marks = Area(4 * (self._code.size >> 16))
        q[L.VM_MARKS // 8] = self._marks.address
        q[L.VM_HASH_KEY // 8 : L.VM_HASH_KEY // 8 + 4] = self._hash_key()
        q[L.VM_HASH // 8], q[L.VM_HASH_MASK // 8] = self._hash.address, (1 << HASH_BITS) - 1
        q[L.VM_CROSS // 8] = self._cross.address
        q[L.VM_APIC_BUS_HZ // 8] = 1_000_000_000
        self.tsc_khz = self._measure_tsc(first)
        q[L.VM_TSC_KHZ // 8] = self.tsc_khz
        self.clock_scale = _pvclock_scale(self.tsc_khz)
        start = self.clock_pair()
        self.clock_zero = start[1]
        self._tsc_zero = start[0]
        self.model = CpuModel(
            self.native, spec.cpu, dict(spec.features), spec.cpus, lapic=self.lapic, tsc_khz=self.tsc_khz
        )
        self.cr4_allowed = self._cr4()
        if self.lapic:
            shown = (("x2apic", L.H_LAPIC_X2), ("tsc-deadline", L.H_LAPIC_DEADLINE))
            d[L.VM_HAS_LAPIC // 4] |= sum(bit for name, bit in shown if name in self.model.features)
        self._store = TemplateStore(store_path(options.templates, self.model.hidden))
        self._translator = Translator(self._store, self.native.head_length, hidden=self.model.hidden)
        q[L.VM_STORE // 8], q[L.VM_BLOCK_LIMIT // 8] = self._store.area.address, options.block_size
        self.lock = threading.RLock()
        """Held while slots change, which takes several steps, and by whoever looks at memory or makes templates in
        Python: stopping the world keeps vCPUs out of native code only. Never held while a device is called."""
        self._stopped = 0
        self._slots: list[MemorySlot] = []
        self._starts: list[int] = []
        self._pages: dict[MemorySlot, Area] = {}
        self._cpus: list[TcgVCpu] = []
        self._singles: dict[tuple[int, int, int, bytes], int] = {}
        self._range = self.native.add_range(self._code.rx, self._code.rx + self._code.size)
        self.native.signals()
        self._ticker: threading.Thread | None = None
        if self.lapic:
            self._ticker = threading.Thread(
                target=self.native.ticker, args=(self.pointer,), name="tcg-timer", daemon=True
            )
        self.events = EventFds(self)
        self.capabilities = frozenset({"doorbells", "foreign-rings", *(["irqfds"] if self.lapic else [])})
        self._closed = False

    @staticmethod
    def _hash_key() -> memoryview:
        return memoryview(bytes(byte | (at % 8 == 0) for at, byte in enumerate(os.urandom(32)))).cast("Q")

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

    # ---- time ----

    def clock_pair(self) -> tuple[int, int]:
        """(host TSC, CLOCK_MONOTONIC in nanoseconds) at one moment."""
        self.native.rdtsc_pair(self._pair)
        return self._pair[0], self._pair[1]

    def _measure_tsc(self, first: tuple[int, int]) -> int:
        """kHz of the time-stamp counter, against CLOCK_MONOTONIC over at least 10 ms."""
        while True:
            tsc, ns = self.clock_pair()
            if ns - first[1] >= 10_000_000:
                return round((tsc - first[0]) * 1_000_000 / (ns - first[1]))
            threading.Event().wait(0.002)

    def _cr4(self) -> int:
        allowed = 0x7FC  # TSD to OSXMMEXCPT; no VME
        for feature, bit in (("umip", 11), ("fsgsbase", 16), ("xsave", 18), ("smep", 20), ("smap", 21), ("pku", 22)):
            if feature in self.model.features:
                allowed |= 1 << bit
        return allowed

    # ---- the accelerator's seam ----

    def create_vcpu(self, index: int, /) -> TcgVCpu:
        cpu = TcgVCpu(self, index)
        cpu.set_field(L.TSC_OFFSET, -self._tsc_zero & 0xFFFFFFFFFFFFFFFF)
        self._cpus.append(cpu)
        self._q[L.VM_CPUS // 8 + index] = cpu.pointer
        if self._ticker is not None and self._ticker.ident is None:
            self._ticker.start()
        return cpu

    def map_memory(self, slot: MemorySlot, /) -> None:
        if len(self._slots) >= L.MAX_SLOTS:
            raise AcceleratorError(f"tcg: more than {L.MAX_SLOTS} memory slots")
        with self._changed_slots():
            self._slots.append(slot)
            self._pages[slot] = Area(slot.size // 4096 * L.SIZEOF_PAGE)

    def unmap_memory(self, slot: MemorySlot, /) -> None:
        if slot not in self._slots:
            raise UsageError(f"tcg: no memory slot at {slot.address:#x}")
        with self._changed_slots():
            self._slots.remove(slot)
        self._pages.pop(slot).close()

    @contextmanager
    def _changed_slots(self) -> Iterator[None]:
        """Blocks and translations derive from the slots: both go when the slots change."""
        with self.quiesce():
            self._flush()
            yield
            self._slots.sort(key=lambda one: -one.size)  # look-ups go through them in order: main memory first
            ordered = sorted(self._slots, key=lambda one: one.address)
            table = bytearray(L.VM_NSLOTS + 4 - L.VM_SLOTS)
            for i, slot in enumerate(self._slots):
                pack_into(
                    "<QQQQII", table, L.SIZEOF_SLOT * i,
                    slot.address, slot.size, slot.host_address, self._pages[slot].address, slot.readonly, 1,
                )  # fmt: skip
            pack_into("<I", table, L.VM_NSLOTS - L.VM_SLOTS, len(self._slots))
            self._area.view[L.VM_SLOTS : L.VM_NSLOTS + 4] = table  # in one step: see library.py
            self._starts, self._ordered = [one.address for one in ordered], ordered
            self.flush_translations()

    def flush_translations(self) -> None:
        """Empty all soft TLBs; the world is stopped."""
        for cpu in self._cpus:
            self.native.tlb_flush(cpu.pointer)

    def memory_written(self, address: int, size: int, /) -> None:
        self.native.memory_written(self.pointer, address, size)

    def memory_written_many(self, ranges: Sequence[tuple[int, int]], /) -> None:
        """:meth:`memory_written` for each (address, size)."""
        flat = ranges.words() if type(ranges) is Areas else array("Q", chain.from_iterable(ranges))
        self.native.memory_written_many(self.pointer, flat.buffer_info()[0], len(flat) // 2)

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
        if self._cpus:
            self.native.set_extint(self._cpus[0].pointer, level)

    def set_irq(self, gsi: int, level: bool, /) -> None:
        raise UsageError(f"tcg: line {gsi} ({level}): this accelerator has no PIC or IOAPIC of its own")

    def signal_msi(self, address: int, data: int, /) -> None:
        self.native.apic_message(self.pointer, address, data)

    def inject_nmi(self, index: int, /) -> None:
        self.native.inject_nmi(self._cpus[index].pointer)

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
        if self._ticker is not None and self._ticker.ident is not None:
            self._ticker.join()
        self.native.remove_range(self._range)
        for cpu in self._cpus:
            cpu.close()
        self._cpus = []
        self._q.release()
        self._d.release()
        self._store.close()
        for area in (*self._pages.values(), self._area, self._hash, self._cross, self._marks):
            area.close()
        self._code.close()

    # ---- guest-physical memory ----

    def host(self, phys: int) -> tuple[int, MemorySlot] | None:
        """(host address, slot) of a guest-physical address, None where there is no RAM."""
        at = bisect_right(self._starts, phys) - 1
        if at < 0:
            return None
        slot = self._ordered[at]
        offset = phys - slot.address
        return (slot.host_address + offset, slot) if offset < slot.size else None

    def peek(self, phys: int, size: int) -> bytes | None:
        """Bytes inside one page, None where there is no RAM."""
        found = self.host(phys)
        return None if found is None else ctypes.string_at(found[0], size)

    def poke(self, phys: int, data: bytes) -> bool:
        """Write bytes inside one page; False where there is no writable RAM."""
        found = self.host(phys)
        if found is None or found[1].readonly:
            return False
        ctypes.memmove(found[0], data, len(data))
        self.native.memory_written(self.pointer, phys, len(data))
        return True

    def poke_physical(self, phys: int, data: bytes) -> None:
        """Write bytes that may cross a page; what is not RAM is dropped."""
        first = 4096 - (phys & 0xFFF)
        with self.lock:
            for at, part in ((phys, data[:first]), (phys + first, data[first:])):
                if part:
                    self.poke(at, part)

    # ---- translation ----

    def _flush(self) -> None:
        """Forget all blocks; the world is stopped."""
        self.native.flush_blocks(self.pointer)
        self._singles.clear()

    def translate(self, cpu: TcgVCpu) -> None:
        """Native code met instructions without a template at the vCPU's RIP, or a full buffer. Fetching may fault."""
        with self.lock:
            if cpu.field(L.INFO + 16) == L.TRANSLATE_FULL:
                self._flush_stopped()
                return
            try:
                linear, phys = self._fetched(cpu)
                self._make(cpu, phys, linear, single=False)
            except Fault as fault:
                cpu.raise_exception(fault.vector, fault.error)

    def _flush_stopped(self) -> None:
        with self.quiesce():
            self._flush()

    def _make(self, cpu: TcgVCpu, phys: int, linear: int, *, single: bool) -> None:
        mode, pc = cpu.mode, cpu.rip
        skip = cpu.field(L.INFO + 24)  # the instructions before this one have templates
        if skip and not single:
            phys, linear, pc = phys + skip, linear + skip, pc + skip
        data = self._code_bytes(cpu, phys, linear, mode, pc)
        if not single:  # other code at this place, as a debugger or an emulator in the guest puts there, is another try
            tried = pc, mode, data[:15]
            cpu.tries = cpu.tries + 1 if tried == cpu.tried else 0
            cpu.tried = tried
            if cpu.tries > TRIES:
                raise Fault(UD)
        if self.host(phys) is None:
            raise Fault(UD)  # code outside RAM: an open bus, all ones
        if not self._translator.make(mode, pc, data, self._add_template, self._has_template, single=single):
            # a guest that tries all encodings there are: what is still needed is made again
            with self.quiesce():
                self._flush()
                self._store.clear()

    def _add_template(self, data: bytes, link: bool) -> bool:
        return not self.native.add_template(self.pointer, data, len(data), link)

    def _has_template(self, key: int, raw: bytes) -> int:
        found: int = self.native.has_template(self.pointer, key, raw, len(raw))
        return found

    def _code_bytes(self, cpu: TcgVCpu, phys: int, linear: int, mode: int, pc: int) -> bytes:
        """Code from *phys* to the end of its page, or into the next page where the first instruction reaches there."""
        room = 4096 - (phys & 0xFFF)
        data = self.peek(phys, min(room, 1024))
        if data is None:
            data = b"\xff" * 15
        if room < 15 and self._translator.decode(mode, pc, data, 1)[0][0].code == Code.INVALID:
            vector, second = cpu.walk(cpu.linear_after(linear, room), 2)
            if vector:
                raise Fault(vector, cpu.field(L.SCRATCH + 24) & 0xFFFFFFFF)
            more = self.peek(second, 15)
            return data + (more if more is not None else b"\xff" * 15)
        return data

    def prepare_single(self, cpu: TcgVCpu) -> tuple[int, bool, bool] | None:
        """Have the instruction at RIP run alone next, its write going to ``cpu.write_ptr``: how many bytes it writes,
        whether they are read first, and whether x87 stores them; 0 bytes when memory changed meanwhile; None for one
        that Python does. Raises Fault."""
        with self.lock:
            linear, phys = self._fetched(cpu)
            data = cpu.fetch_bytes(linear, 15)
            mode, pc = cpu.mode, cpu.rip
            ins = self._translator.decode(mode, pc, data, 1)[0][0]
            if (
                ins.code == Code.INVALID
                or ins.flow_control != FlowControl.NEXT
                or not _writes_memory(ins)
                or _pushes_memory(ins)
                or ins.mnemonic in MASKED_STORES
                or ins.mnemonic in MASKED_MOVES
            ):
                return None
            key = mode, pc, phys, data
            block = self._singles.get(key)
            if block is None:
                if len(self._singles) > 4096:
                    self._singles.clear()
                block = self._once(cpu, phys, linear, L.MAKE_SINGLE, data)
                if block is None:
                    return 0, False, False
                self._singles[key] = block
            cpu.resume_at(block, L.RESUME_SINGLE)
            written = ctypes.c_uint64.from_address(block - L.SIZEOF_BLOCK + L.BLOCK_WRITTEN).value
            return written, _reads_memory(ins), waits(ins)

    def prepare_again(self, cpu: TcgVCpu) -> None:
        """Have the instruction at RIP run alone next, from its start, with the answer that a device has given it."""
        with self.lock:
            linear, phys = self._fetched(cpu)
            block = self._once(cpu, phys, linear, L.MAKE_AGAIN, b"")
            if block is not None:
                cpu.resume_at(block, L.RESUME_AGAIN)

    @staticmethod
    def _fetched(cpu: TcgVCpu) -> tuple[int, int]:
        """Linear and physical address of the code at RIP. Raises Fault."""
        linear = cpu.rip if cpu.mode & L.MODE_64 else cpu.cs_base + cpu.rip & 0xFFFFFFFF
        vector, phys = cpu.walk(linear, 2)
        if vector:
            raise Fault(vector, cpu.field(L.SCRATCH + 24) & 0xFFFFFFFF)
        return linear, phys

    def _once(self, cpu: TcgVCpu, phys: int, linear: int, what: int, data: bytes) -> int | None:
        """Host address of a block for one run (``MAKE_*``); it is of the present generation, under the lock. None when
        the instruction is not one that *data* begins with (empty: any)."""
        for _ in range(TRIES):
            block = self.native.once(cpu.pointer, phys, linear, what, data, len(data))
            if block > L.TRANSLATE_MISSING:
                found: int = block + L.SIZEOF_BLOCK
                return found
            if block == L.TRANSLATE_MISSING:
                self._make(cpu, phys, linear, single=what == L.MAKE_SINGLE)
            elif block == L.TRANSLATE_FULL:
                self._flush_stopped()
            else:
                break
        return None


_INFO = InstructionInfoFactory()


def _memory_access(ins: Instruction) -> int:
    """The access of the explicit memory operand, or of the stack for PUSH."""
    info = _INFO.info(ins)
    for i in range(ins.op_count):
        if ins.op_kind(i) == OpKind.MEMORY:
            access = info.op_access(i)
            if access not in (OpAccess.READ, OpAccess.COND_READ, OpAccess.NONE, OpAccess.NO_MEM_ACCESS):
                return access
    if ins.is_stack_instruction and ins.stack_pointer_increment < 0:
        return OpAccess.WRITE
    return OpAccess.NONE


def _writes_memory(ins: Instruction) -> bool:
    return not ins.is_string_instruction and _memory_access(ins) != OpAccess.NONE


def _pushes_memory(ins: Instruction) -> bool:
    return ins.mnemonic == Mnemonic.PUSH and ins.op0_kind == OpKind.MEMORY


def _reads_memory(ins: Instruction) -> bool:
    """Whether the bounce buffer must begin with what is there: also where not all bytes of the operand are written."""
    if ins.is_stack_instruction:
        return False
    partly = MemorySizeInfo(ins.memory_size).size in (0, 512)
    return partly or _memory_access(ins) not in (OpAccess.WRITE, OpAccess.NONE)


def _pvclock_scale(tsc_khz: int) -> tuple[int, int]:
    """(multiplier, shift) with ns = (tsc << shift) * multiplier >> 32 (negative shift: to the right)."""
    shift, scaled, base = 0, 1_000_000_000, tsc_khz * 1000
    while base > scaled * 2 or base >> 32:
        base >>= 1
        shift -= 1
    while base <= scaled or scaled >> 32:
        if scaled >> 32 or base >> 31:
            scaled >>= 1
        else:
            base <<= 1
        shift += 1
    return (scaled << 32) // base, shift
