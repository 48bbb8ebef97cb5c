"""One translated vCPU: its registers in native memory, and the loop that serves what native code leaves to Python."""

from __future__ import annotations

import ctypes
from struct import pack_into, unpack_from
from typing import TYPE_CHECKING

from attrs import evolve
from cardcage.errors import AcceleratorError
from cardcage.vcpu import Exit, VCpuExit
from cardcage.x86 import Events, Segment, reset_state

from cardcage_tcg import layout as L
from cardcage_tcg import state
from cardcage_tcg.emulate import Emulator, Fault
from cardcage_tcg.library import Area
from cardcage_tcg.msr import TSC_DEADLINE, Msrs

if TYPE_CHECKING:
    from cardcage.vcpu import Ops
    from cardcage.x86 import VCpuState

    from cardcage_tcg.vm import TcgVm

__all__ = ["TcgVCpu"]

STACK = 512 << 10
SINGLE = L.BOUNCE + 4096
"""Where singles write; what they read from devices comes through the bounce buffer's first half."""
UNSTORED = 1 | 1 << 3 | 1 << 4
"""Unmasked, x87's invalid operation, overflow and underflow keep a result from being stored (SDM vol. 1, 8.5). None
was pending before, or the instruction would have raised it."""
PF_VECTOR, GP_VECTOR = 14, 13
KICKED = VCpuExit(Exit.KICKED)


class TcgVCpu:
    """Satisfies :class:`cardcage.vcpu.VCpu`."""

    def __init__(self, vm: TcgVm, index: int) -> None:
        self.index, self.vm, self.native = index, vm, vm.native
        self.avx = vm.model.avx
        self._area = Area(STACK + L.SIZEOF_CPU + 4096)
        self.pointer = self._area.address + STACK
        view = self._area.view[STACK : STACK + (L.SIZEOF_CPU + 7) // 8 * 8]
        self.words, self.halves, self.raw = view.cast("Q"), view.cast("I"), view
        self._enter = vm.native.enter
        self._emulator = Emulator(self)
        self.msrs = Msrs(vm, self)
        self._phys, self._code = ctypes.c_uint64(), (ctypes.c_char * 16)()
        self.tried, self.tries = (0, 0, b""), 0  # the code without a template last, and how often in a row
        self._single: tuple[list[tuple[int, int]], int, int, bool] = [], SINGLE, 0, False
        """Its operand, where its bytes are, how many, whether x87 stores them."""
        q, d = self.words, self.halves
        q[L.VM // 8] = vm.pointer
        d[L.INDEX // 4] = index
        for stub in range(L.STUB_LIMIT + 1):
            q[L.STUBS // 8 + stub] = vm.native.stub(stub)
        q[L.CR4_ALLOWED // 8] = vm.cr4_allowed
        self.set_state(reset_state(bootstrap=index == 0))

    # ---- the loop ----

    def kick(self) -> None:
        self.native.kick(self.pointer)

    def run(self, ops: Ops, /) -> VCpuExit:
        q, d, enter, pointer, emulate = self.words, self.halves, self._enter, self.pointer, self._emulator.run
        reason_at, info = L.REASON // 4, L.INFO // 8
        self.native.precise_timers()
        self.native.signals()  # somebody else (pytest's faulthandler) may have replaced the handlers
        while True:
            enter(pointer)
            reason = d[reason_at]
            if reason == L.R_EMULATE or reason == L.R_MSR:
                emulate(ops)
            elif reason == L.R_TRANSLATE:
                self.vm.translate(self)
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
                self.raw[L.BOUNCE : L.BOUNCE + size] = self.read_linear(linear, size, ops)
            except Fault as fault:
                self.words[L.RESUME // 8] = 0
                self.raise_exception(fault.vector, fault.error)
            return
        data = b"".join(ops.mmio_read(at, width).to_bytes(width, "little") for at, width in self._pieces(address, size))
        self.raw[L.BOUNCE : L.BOUNCE + size] = data

    def _mmio_write(self, ops: Ops, address: int, size: int, value: int) -> None:
        for at, width in self._pieces(address, size):
            part = value >> (at - address) * 8 & ((1 << width * 8) - 1)
            if not self._rings_bell(False, at, width, part):
                ops.mmio_write(at, width, part)

    def port_write(self, ops: Ops, port: int, size: int, value: int) -> None:
        """A write to a port that is allowed; doorbells first."""
        if not self._rings_bell(True, port, size, value):
            ops.pio_write(port, size, value)

    def _rings_bell(self, pio: bool, address: int, size: int, value: int) -> bool:
        """Doorbells that the shorter way in native code did not meet: string stores, OUT by permission bitmap."""
        return self.vm.events.has_bells and bool(self.native.ring_bell(self.vm.pointer, pio, address, size, value))

    @staticmethod
    def _pieces(address: int, size: int) -> list[tuple[int, int]]:
        """Accesses of 1, 2, 4 or 8 bytes that make up a wider or odd one."""
        if size in (1, 2, 4, 8):
            return [(address, size)]
        found = []
        while size:
            width = 8 if size >= 8 else 4 if size >= 4 else 2 if size >= 2 else 1
            found.append((address, width))
            address, size = address + width, size - width
        return found

    def _slow_write(self, ops: Ops, linear: int, size: int) -> None:
        """The instruction at RIP writes where one host store cannot: it goes on with a copy of its operand; or, in RAM
        that holds code, with the operand itself, so that it stays atomic."""
        try:
            with self.vm.lock:
                pages = self.pages(linear, size, 1)
                prepared = self.vm.prepare_single(self)
                direct = self.vm.host(pages[0][0]) if len(pages) == 1 else None
            if prepared is None:
                self._emulator.run(ops, pushed=self.field(L.SCRATCH + 24))
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
            self.raw[at : at + size] = self.read_linear(linear, size, ops) if reads else bytes(size)
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
                    self.write_linear(linear, value.to_bytes(8, "little")[:size], ops)
                else:
                    pack_into("<8s", self.raw, at + L.DEVICE_ACCESS_VALUE, self.read_linear(linear, size, ops))
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
        self._write_pages(pages, bytes(self.raw[at : at + size]), ops)

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
                self.vm.prepare_again(self)
                return
            prepared = self.vm.prepare_single(self)
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

    # ---- registers, for the emulator ----

    def field(self, offset: int) -> int:
        """A 64-bit field of ``struct cpu``."""
        return self.words[offset // 8]

    def set_field(self, offset: int, value: int) -> None:
        self.words[offset // 8] = value

    @property
    def mode(self) -> int:
        """``MODE_*`` bits."""
        return self.halves[L.MODE // 4]

    @property
    def rip(self) -> int:
        """Instruction pointer, an offset in CS."""
        return self.words[L.RIP // 8]

    @rip.setter
    def rip(self, value: int) -> None:
        self.words[L.RIP // 8] = value

    @property
    def cs_base(self) -> int:
        """Base of CS; 0 in 64-bit mode."""
        return 0 if self.mode & L.MODE_64 else self.segment_base(1)

    @property
    def eflags(self) -> int:
        """System flags, without the arithmetic ones."""
        return self.words[L.EFLAGS // 8]

    def arithmetic_flags(self) -> int:
        """CF PF AF ZF SF OF."""
        word = self.words[L.FL // 8]
        return word >> 8 & 0xD5 | (word & 1) << 11

    def gpr(self, number: int) -> int:
        """General register *number*, 64 bits."""
        return self.words[L.GPR // 8 + number]

    def set_gpr(self, number: int, value: int) -> None:
        self.words[L.GPR // 8 + number] = value

    def segment_base(self, number: int) -> int:
        return self.words[(L.SEG + L.SIZEOF_SEG * number + L.SEG_BASE) // 8]

    def selector(self, number: int) -> int:
        found: int = unpack_from("<H", self.raw, L.SEG + L.SIZEOF_SEG * number + L.SEG_SEL)[0]
        return found

    @property
    def xcr0(self) -> int:
        """Extended control register 0."""
        return self.halves[L.GUEST_XCR0 // 4]

    @xcr0.setter
    def xcr0(self, value: int) -> None:
        if value & 4 and not self.xcr0 & 4:
            self.raw[L.FX + 512] |= 3  # until now FXSAVE kept the state, which has no header
        self.halves[L.GUEST_XCR0 // 4] = value
        self.native.update_mode(self.pointer)

    def osxsave(self) -> bool:
        """CR4.OSXSAVE."""
        return bool(self.words[L.CR4 // 8] & 1 << 18)

    def cpuid(self, leaf: int, sub: int) -> tuple[int, int, int, int]:
        apic = self.vm.lapic and bool(self.words[L.APIC_BASE // 8] & 0x800)
        return self.vm.model.leaf(leaf, sub, self.index, cr4=self.field(L.CR4), apic=apic, xcr0=self.xcr0)

    def read_msr(self, index: int) -> int | None:
        """The MSR's value, None when there is no such MSR."""
        return self.msrs.read(index)

    def write_msr(self, index: int, value: int) -> bool:
        """Whether the MSR took the value."""
        return self.msrs.write(index, value)

    def raise_exception(self, vector: int, error: int | None) -> None:
        """Deliver an exception at the present RIP."""
        with self.vm.lock:
            self.native.raise_(self.pointer, vector, error is not None, error or 0)

    def met_port(self, port: int, size: int) -> None:
        """Ports were accessed: an I/O breakpoint there traps after the instruction."""
        if self.halves[L.ARMED // 4] & L.ARMED_PORT:
            self.native.debug_port(self.pointer, port, size)

    def goes_on(self) -> None:
        """The instruction at RIP is in the midst of its iterations: its restart hits no code breakpoint."""
        self.halves[L.DEBUG // 4] |= L.DEBUG_RF

    # ---- memory ----

    def walk(self, linear: int, access: int = 0, *, user: bool | None = None) -> tuple[int, int]:
        """(vector, physical address): vector 0 when it is mapped. Sets CR2 for a page fault."""
        level = (self.halves[L.CPL // 4] == 3) if user is None else user
        vector = self.native.walk(self.pointer, linear, access, level, ctypes.byref(self._phys))
        return vector, self._phys.value

    def _fault(self, vector: int) -> Fault:
        return Fault(vector, self.words[L.SCRATCH // 8 + 3] & 0xFFFFFFFF if vector == PF_VECTOR else 0)

    def fetch_bytes(self, linear: int, size: int) -> bytes:
        """Up to *size* (at most 16) code bytes, fewer where the next page is missing. Raises Fault."""
        with self.vm.lock:
            got = self.native.fetch(self.pointer, linear, self._code, size)
            if got < 0:
                raise self._fault(-got)
            return self._code.raw[:got]

    def fetch_fault(self, linear: int) -> None:
        """Raise the fault of fetching the byte at *linear*."""
        with self.vm.lock:
            vector, _ = self.walk(linear, 2)
        if vector:
            raise self._fault(vector)

    def read_linear(self, linear: int, size: int, ops: Ops) -> bytes:
        """Data at a linear address, devices included. Raises Fault."""
        buffer = (ctypes.c_char * size)()
        user = self.halves[L.CPL // 4] == 3
        with self.vm.lock:
            vector = self.native.vread(self.pointer, linear, buffer, size, user)
            if not vector:
                return bytes(buffer)
            if vector > 0:
                raise self._fault(vector)
            pieces = [(phys, take, self.vm.peek(phys, take)) for phys, take in self.pages(linear, size, 0)]
        return b"".join(self._read_device(phys, take, ops) if data is None else data for phys, take, data in pieces)

    def _read_device(self, phys: int, size: int, ops: Ops) -> bytes:
        if self.msrs.apic_page(phys) is not None:
            value = ctypes.c_uint32()
            self.native.apic_read(self.pointer, phys & 0xFF0, ctypes.byref(value))
            return value.value.to_bytes(4, "little")[phys & 3 :][:size].ljust(size, b"\0")
        return b"".join(ops.mmio_read(at, width).to_bytes(width, "little") for at, width in self._pieces(phys, size))

    def linear_after(self, linear: int, by: int) -> int:
        """The linear address *by* bytes behind another, for a program's access: 32 bits wide outside 64-bit mode."""
        return linear + by & (0xFFFFFFFFFFFFFFFF if self.mode & L.MODE_64 else 0xFFFFFFFF)

    def pages(self, linear: int, size: int, access: int) -> list[tuple[int, int]]:
        """(physical address, size) of the pieces of an operand by page; *access* 1 for a write. Raises Fault."""
        found, at = [], 0
        with self.vm.lock:
            while at < size:
                vector, phys = self.walk(self.linear_after(linear, at), access)
                if vector:
                    raise self._fault(vector)
                take = min(size - at, 4096 - (phys & 0xFFF))
                found.append((phys, take))
                at += take
        return found

    def write_linear(self, linear: int, data: bytes, ops: Ops) -> None:
        """Write at a linear address, devices and code included. Raises Fault before anything is written."""
        user = self.halves[L.CPL // 4] == 3
        with self.vm.lock:
            vector = self.native.vwrite(self.pointer, linear, data, len(data), user)
            if not vector:
                return
            if vector > 0:
                raise self._fault(vector)
            pages = self.pages(linear, len(data), 1)
        self._write_pages(pages, data, ops)

    def _write_pages(self, pages: list[tuple[int, int]], data: bytes, ops: Ops) -> None:
        at, devices = 0, []
        with self.vm.lock:
            for phys, take in pages:
                part = data[at : at + take]
                if not self.vm.poke(phys, part):
                    devices.append((phys, part))
                at += take
        for phys, part in devices:
            if self.msrs.apic_page(phys) is not None:
                self._apic_write(ops, phys & 0xFF0, int.from_bytes(part[:4], "little"))
            else:
                self._mmio_write(ops, phys, len(part), int.from_bytes(part, "little"))

    def _apic_write(self, ops: Ops, offset: int, value: int) -> None:
        """A register of the local APIC, while a helper may wait with operands of its own."""
        at = L.INFO // 8
        info = self.words[at : at + 4].tolist()
        if self.native.apic_write(self.pointer, offset, value) == L.H_EXIT:
            ops.end_of_interrupt(self.words[at])
        for i, word in enumerate(info):
            self.words[at + i] = word

    def probe_write(self, linear: int, size: int) -> None:
        """Raise the Fault that writing would, and write nothing."""
        self.pages(linear, size, 1)

    def port_allowed(self, port: int, size: int) -> bool:
        """The TSS's I/O permission bitmap (Intel SDM vol. 1, 19.5.2)."""
        base = self.segment_base(7)
        limit, attributes = unpack_from("<I2xH", self.raw, L.SEG + L.SIZEOF_SEG * 7 + L.SEG_LIMIT)
        if attributes & 0xF not in (9, 11) or limit < 103:
            return False
        header = self._supervisor_read(base + 102, 2)
        at = int.from_bytes(header, "little") + port // 8
        if at + 1 > limit:
            return False
        bits = int.from_bytes(self._supervisor_read(base + at, 2), "little")
        return not bits >> (port & 7) & ((1 << size) - 1)

    def _supervisor_read(self, linear: int, size: int) -> bytes:
        buffer = (ctypes.c_char * size)()
        with self.vm.lock:
            vector = self.native.vread(self.pointer, linear, buffer, size, L.AS_SYSTEM)
        if vector > 0:
            raise self._fault(vector)
        return bytes(buffer) if not vector else b"\xff" * size

    # ---- state ----

    def describe(self) -> str:
        """Registers and the bytes at RIP, for a person."""
        return state.describe(self)

    def get_state(self) -> VCpuState:
        return state.get_state(self)

    def set_state(self, new: VCpuState, /) -> None:
        state.set_state(self, new)

    def close(self) -> None:
        """Give its memory back."""
        for view in (self.words, self.halves, self.raw):
            view.release()
        self._area.close()
