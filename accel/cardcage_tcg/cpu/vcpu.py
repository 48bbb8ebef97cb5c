"""One translated vCPU: its registers in native memory, and the loop that serves what native code leaves to Python."""

from __future__ import annotations

import threading
from functools import cached_property
from struct import pack_into, unpack_from
from typing import TYPE_CHECKING

from attrs import evolve
from cardcage.errors import AcceleratorError
from cardcage.vcpu import Exit, VCpuExit
from cardcage.x86 import Events, Segment, reset_state

from cardcage_tcg import layout as L
from cardcage_tcg.cpu import state
from cardcage_tcg.cpu.faults import Fault
from cardcage_tcg.cpu.linear import LinearMemory, pieces
from cardcage_tcg.cpu.msr import TSC_DEADLINE, Msrs
from cardcage_tcg.cpu.registers import RegisterFile
from cardcage_tcg.library import Area

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.vcpu import Ops
    from cardcage.x86 import VCpuState

    from cardcage_tcg.cpu.emulate import Emulator
    from cardcage_tcg.vm import TcgVm

__all__ = ["TcgVCpu"]

STACK = 512 << 10
NEVER = (1 << 64) - 1
SINGLE = L.BOUNCE + 4096
"""Where singles write; what they read from devices comes through the bounce buffer's first half."""
UNSTORED = 1 | 1 << 3 | 1 << 4
"""Unmasked, x87's invalid operation, overflow and underflow keep a result from being stored (SDM vol. 1, 8.5). None
was pending before, or the instruction would have raised it."""
KICKED = VCpuExit(Exit.KICKED)


class TcgVCpu:
    """Satisfies :class:`cardcage.vcpu.VCpu`."""

    def __init__(self, vm: TcgVm, index: int) -> None:
        self.index, self.vm, self.native = index, vm, vm.native
        self.avx = vm.model.avx
        self._area = Area(STACK + L.SIZEOF_CPU + 4096)
        self.pointer = self._area.address + STACK
        view = self._area.view[STACK : STACK + (L.SIZEOF_CPU + 7) // 8 * 8]
        self.registers = RegisterFile(vm.native, self.pointer, view)
        self.words, self.halves, self.raw = self.registers.words, self.registers.halves, view
        self._enter = vm.native.run
        self.msrs = Msrs(vm, self.registers)
        self.linear = LinearMemory(vm, self.registers, self.msrs)
        self.tried, self.tries = (0, 0, b""), 0  # the code without a template last, and how often in a row
        self.held: threading.Event | None = None  # a debugger holds it: set by a kick
        self._single: tuple[list[tuple[int, int]], int, int, bool] = [], SINGLE, 0, False
        """Its operand, where its bytes are, how many, whether x87 stores them."""
        q, d = self.words, self.halves
        self._seen = Area(2 * (vm.code.size // L.HEADER_ALIGN))
        q[L.VM // 8], q[L.SEEN // 8] = vm.pointer, self._seen.address
        d[L.INDEX // 4] = index
        for stub in range(L.STUB_SHARE_WRITE_U + 1):
            q[L.STUBS // 8 + stub] = vm.native.stub(stub)
        q[L.CR4_ALLOWED // 8] = vm.cr4_allowed
        self.set_state(reset_state(bootstrap=index == 0))

    @cached_property
    def _emulator(self) -> Emulator:
        """Loaded when the guest has the first instruction that native code does not do."""
        from cardcage_tcg.cpu.emulate import Emulator

        return Emulator(self)

    # ---- the loop ----

    def kick(self) -> None:
        self.native.kick(self.pointer)
        if (held := self.held) is not None:
            held.set()

    def run(self, ops: Ops, /) -> VCpuExit:
        q, d, enter, pointer = self.words, self.halves, self._enter, self.pointer
        emulate: Callable[[Ops], None] | None = None
        reason_at, info = L.REASON // 4, L.INFO // 8
        d[L.STILL // 4] = 0  # and then the look: who holds it does so in the other order
        if self.vm.holds:
            self.vm.await_release(self)
        if (held := self.held) is not None:
            held.wait()
            held.clear()
            return KICKED
        self.native.precise_timers()
        self.native.signals()  # somebody else (pytest's faulthandler) may have replaced the handlers
        while True:
            enter(pointer)
            reason = d[reason_at]
            if reason == L.R_EMULATE or reason == L.R_MSR:
                emulate = emulate or self._emulator.run
                emulate(ops)
            elif reason == L.R_TRANSLATE:
                self.vm.blocks.translate(self)
            elif reason == L.R_MMIO_READ:
                self._mmio_read(ops, q[info], q[info + 1], q[info + 2])
            elif reason == L.R_MMIO_WRITE:
                ops.mmio_write(q[info], q[info + 1], q[info + 2])
            elif reason == L.R_SLOW_WRITE:
                self._slow_write(ops, q[info], q[info + 1])
            elif reason == L.R_SINGLE:
                self._end_single(ops)
            elif reason == L.R_DEVICE:
                self._device(ops)
            elif reason == L.R_EXTINT:
                vector = ops.acknowledge_extint()
                if vector is not None:
                    with self.vm.lock:
                        self.native.deliver_interrupt(pointer, vector)
            elif reason == L.R_EOI:
                ops.end_of_interrupt(q[info])
            elif reason == L.R_POLL:
                return KICKED
            elif reason == L.R_DEBUG:
                return self.vm.stops.stopped(self)
            elif reason == L.R_HALTED:
                return VCpuExit(Exit.HALTED)
            elif reason == L.R_SHUTDOWN:
                return VCpuExit(Exit.SHUTDOWN, f"triple fault (first vector {q[info]}): {self.describe()}")
            elif reason == L.R_RESTART:
                self._restart()
            elif reason == L.R_SIGNAL:
                raise AcceleratorError(
                    f"signal {q[info]} (trap {q[info + 2]}) at host {q[info + 1]:#x}, which no guest can cause: "
                    f"{self.describe()}"
                )
            elif reason == L.R_INIT:
                self._init()
            elif reason == L.R_SIPI:
                self._start(q[info])
            else:
                return VCpuExit(Exit.FAILED, f"translator came back with reason {reason}: {self.describe()}")

    def _mmio_read(self, ops: Ops, address: int, size: int, linear: int) -> None:
        if (address & 0xFFF) + size > 4096:  # from a page of RAM to a device, or from one device's to another's
            try:
                self.raw[L.BOUNCE : L.BOUNCE + size] = self.linear.read(linear, size, ops)
            except Fault as fault:
                self.words[L.RESUME // 8] = 0
                self.raise_exception(fault.vector, fault.error)
            return
        data = b"".join(ops.mmio_read(at, width).to_bytes(width, "little") for at, width in pieces(address, size))
        self.raw[L.BOUNCE : L.BOUNCE + size] = data

    def _slow_write(self, ops: Ops, linear: int, size: int) -> None:
        """The instruction at RIP writes where one host store cannot: it goes on with a copy of its operand; or, in RAM
        that holds code, with the operand itself, so that it stays atomic."""
        try:
            with self.vm.lock:
                pages = self.linear.pages(linear, size, 1)
                prepared = self.vm.blocks.prepare_single(self)
                direct = self.vm.memory.host(pages[0][0]) if len(pages) == 1 else None
            if prepared is None:
                self._emulator.run(ops, pushed=self.registers.field(L.SCRATCH + 24))
                return
            written, reads, x87 = prepared
            if written != size:  # another instruction is there by now
                self.words[L.RESUME // 8] = 0
                return
            if direct is not None and not direct[1].readonly:
                self.words[L.WRITE_PTR // 8] = direct[0]  # of the block's generation
                self.words[L.SINGLE_PHYS // 8], self.words[L.SINGLE_SIZE // 8] = pages[0]
                return
            at = SINGLE + (linear & 63)  # as misaligned as the operand
            self.words[L.SINGLE_SIZE // 8] = 0
            self.raw[at : at + size] = self.linear.read(linear, size, ops) if reads else bytes(size)
            self.words[L.WRITE_PTR // 8] = self.pointer + at
            self._single = pages, at, size, x87
        except Fault as fault:
            self.words[L.RESUME // 8] = 0
            self.raise_exception(fault.vector, fault.error)

    def _device(self, ops: Ops) -> None:
        """Accesses of a native helper to what is not RAM, until it is done."""
        again = True
        while again:
            count = self.halves[(L.DEVICE + L.DEVICE_COUNT) // 4]
            at = L.DEVICE + L.DEVICE_LOG + L.SIZEOF_DEVICE_ACCESS * count
            linear, value, size, write = unpack_from("<QQII", self.raw, at)
            try:
                if write:
                    self.linear.write(linear, value.to_bytes(8, "little")[:size], ops)
                else:
                    pack_into("<8s", self.raw, at + L.DEVICE_ACCESS_VALUE, self.linear.read(linear, size, ops))
            except Fault as fault:
                self.raise_exception(fault.vector, fault.error)
                return
            self.halves[(L.DEVICE + L.DEVICE_COUNT) // 4] = count + 1
            again = bool(self.native.helper_again(self.pointer))

    def _end_single(self, ops: Ops) -> None:
        """The single has run to its end (a fault of its other operand goes to the guest's handler). It writes where its
        operand was when it began, as a processor that holds the translation does."""
        pages, at, size, x87 = self._single
        control, status = unpack_from("<HH", self.raw, L.FX)
        if x87 and status & ~control & UNSTORED:
            return
        self.linear.write_pages(pages, bytes(self.raw[at : at + size]), ops)

    def _restart(self) -> None:
        """The code that was to go on is gone: the buffer was emptied while this vCPU was here."""
        single = self.halves[L.RESUME_KIND // 4] == L.RESUME_SINGLE
        self.words[L.RESUME // 8] = 0
        if single and self.words[L.SINGLE_SIZE // 8]:
            self.words[L.SINGLE_SIZE // 8] = 0  # nothing was done yet, and there may be other memory: from its start
            self.halves[L.DEBUG // 4] &= L.DEBUG_RF
            return
        try:
            if not single:
                self.vm.blocks.prepare_again(self)
                return
            prepared = self.vm.blocks.prepare_single(self)
            if prepared is None or prepared[0] != self._single[2]:
                self.words[L.RESUME // 8] = 0  # another instruction is there by now
        except Fault as fault:
            self.raise_exception(fault.vector, fault.error)

    def resume_at(self, code: int, kind: int) -> None:
        """Native code goes on at host address *code* (``RESUME_*`` says why), which is of the present generation."""
        self.words[L.RESUME // 8] = code
        self.halves[L.RESUME_KIND // 4] = kind
        self.words[L.RESUME_GENERATION // 8] = self.vm.generation

    def _init(self) -> None:
        """INIT: as after reset, but x87, SSE, MSRs, TSC and the APIC's id stay (Intel SDM vol. 3, table 10-1)."""
        now = self.get_state()
        fresh = reset_state(bootstrap=self.index == 0)
        fresh.fpu, fresh.lapic, fresh.tsc = now.fpu, now.lapic, None
        fresh.system.apic_base = now.system.apic_base
        fresh.events = evolve(fresh.events, startup="wait-for-sipi" if self.index else "running")
        fresh.msrs = {index: value for index, value in now.msrs.items() if index != TSC_DEADLINE}
        self.set_state(fresh)
        if self.vm.lapic:
            self.native.apic_init(self.pointer)
        self.halves[L.STARTUP // 4] = 1 if self.index else 0

    def _start(self, vector: int) -> None:
        now = self.get_state()
        now.system.cs = Segment(selector=vector << 8, base=vector << 12, type=11)
        now.registers.rip = 0
        now.events = Events()
        now.lapic, now.tsc = None, None
        self.set_state(now)
        self.halves[L.STARTUP // 4] = 0

    def cpuid(self, leaf: int, sub: int) -> tuple[int, int, int, int]:
        apic = self.vm.lapic and bool(self.words[L.APIC_BASE // 8] & 0x800)
        return self.vm.model.leaf(
            leaf, sub, self.index, cr4=self.registers.field(L.CR4), apic=apic, xcr0=self.registers.xcr0
        )

    def raise_exception(self, vector: int, error: int | None) -> None:
        """Deliver an exception at the present RIP."""
        with self.vm.lock:
            self.native.raise_(self.pointer, vector, error is not None, error or 0)

    def get_ready(self) -> None:
        """Load the emulator."""
        assert self._emulator

    def clear_still(self) -> None:
        """It is about to go into native code (:mod:`cardcage_tcg.holding`)."""
        self.halves[L.STILL // 4] = 0

    # ---- state ----

    def shift_clock(self, ticks: int, elapsed: int) -> None:
        """The machine stood for so many ticks of the host's TSC, and nanoseconds: its TSC and APIC timer go on from
        where they were."""
        q = self.words
        q[L.TSC_OFFSET // 8] = (q[L.TSC_OFFSET // 8] - ticks) & NEVER
        for field in (L.LAPIC_TIMER_NEXT, L.LAPIC_TIMER_START):
            at = (L.LAPIC + field) // 8
            if q[at] not in (0, NEVER):
                q[at] = min(q[at] + elapsed, NEVER - 1)

    def describe(self) -> str:
        """Registers and the bytes at RIP, for a person."""
        return state.describe(self)

    def get_state(self) -> VCpuState:
        return state.get_state(self)

    def set_state(self, new: VCpuState, /) -> None:
        state.set_state(self, new)

    def close(self) -> None:
        """Give its memory back."""
        self.registers.release()
        self._area.close()
        self._seen.close()
