"""One guest of the translator whose ring 3 code runs from any registers and ends at its first exception."""

from __future__ import annotations

import struct

from cardcage.accelerator import VmSpec
from cardcage.memory import PhysicalMemory, RamBlock, RamRange
from cardcage.vcpu import Exit
from cardcage.x86 import DescriptorTable, Segment
from cardcage_tcg import layout as L
from cardcage_tcg.accel import Tcg
from cardcage_tcg.vm import TcgOptions
from tcg_host import CODE, CODE_SIZE, DATA, DATA_SIZE, READONLY, XSTATE_SIZE, State, normalize

__all__ = ["Guest", "NoDevices"]

RAM = 0x100000
PML4, PDPT, PD_LOW, PT_LOW, PD_0, PT_CODE, PT_DATA = range(0x1000, 0x8000, 0x1000)
GDT, IDT, TSS, HANDLERS, STACK = 0x9000, 0xA000, 0xB000, 0xC000, 0xF000
CODE_AT, DATA_AT = 0x20000, 0x30000
SEGMENTS = (8, 0x10, 0x18, 0x20, 0x28, 0x30)
SIGNALS = {
    0: "SIGFPE", 16: "SIGFPE", 19: "SIGFPE", 6: "SIGILL", 13: "SIGSEGV", 14: "SIGSEGV", 4: "SIGSEGV", 5: "SIGSEGV",
    17: "SIGBUS", 12: "SIGBUS", 1: "SIGTRAP", 3: "SIGTRAP",
}  # fmt: skip


class NoDevices:
    """Serves nothing: a case that gets here fails."""

    def pio_read(self, port: int, size: int, /) -> int:
        raise AssertionError(f"port {port:#x}")

    def pio_write(self, port: int, size: int, value: int, /) -> None:
        raise AssertionError(f"port {port:#x}")

    def mmio_read(self, address: int, size: int, /) -> int:
        raise AssertionError(f"device at {address:#x}")

    def mmio_write(self, address: int, size: int, value: int, /) -> None:
        raise AssertionError(f"device at {address:#x}")

    def acknowledge_extint(self) -> int | None:
        return None

    def end_of_interrupt(self, vector: int, /) -> None:
        raise AssertionError(f"EOI {vector}")


class Guest:
    """A long mode guest with the same code and data addresses, and the same selectors, as the host's child."""

    def __init__(self, *, avx: bool = False, pku: bool = False, cpu: str = "max", code_cache: int = 256) -> None:
        features = {"avx": True, "avx2": True, "fma": True, "f16c": True, "pku": pku} if avx else {}
        self.avx = avx
        options = TcgOptions(code_cache=code_cache)
        self.vm = Tcg().create_vm(VmSpec(cpus=1, irqchip="none", cpu=cpu, features=features, options=options))
        self.memory, self.ram = PhysicalMemory(), RamBlock(RAM)
        self.memory.add(RamRange(0, RAM, self.ram))
        self.memory.attach(self.vm)
        self.memory.on_written = self.vm.memory_written
        self._tables()
        self.cpu = self.vm.create_vcpu(0)
        self._ops = NoDevices()
        state = self.cpu.get_state()
        system = state.system
        system.cr0, system.cr3, system.cr4, system.efer = 0x80050033, PML4, 0x6A0 | (1 << 18 if avx else 0), 0xD01
        system.gdt, system.idt = DescriptorTable(GDT, 0x7F), DescriptorTable(IDT, 0xFFF)
        system.tr = Segment(selector=0x40, base=TSS, limit=0x67, type=11)
        state.fpu.xcr0 = 7 if avx else 1
        user = {"base": 0, "limit": 0xFFFFFFFF, "s": 1, "dpl": 3, "present": 1, "g": 1, "unusable": 0}
        system.cs = Segment(selector=0x33, type=11, l=1, db=0, **user)
        system.ss = Segment(selector=0x2B, type=3, l=0, db=1, **user)
        for name in ("ds", "es", "fs", "gs"):
            setattr(system, name, Segment(selector=0, type=3, l=0, db=1, **user))
        self.cpu.set_state(state)
        raw = self.cpu.raw
        self._long = bytes(raw[L.SEG : L.LAPIC])
        system.cs = Segment(selector=0x23, type=11, l=0, db=1, **user)
        for name in ("ds", "es"):
            setattr(system, name, Segment(selector=0x2B, type=3, l=0, db=1, **user))
        for name in ("fs", "gs"):
            setattr(system, name, Segment(selector=0, unusable=1))
        self.cpu.set_state(state)
        self._compat = bytes(raw[L.SEG : L.LAPIC])
        small = {"s": 1, "dpl": 3, "present": 1, "unusable": 0, "g": 0, "l": 0, "db": 0}
        system.cs = Segment(selector=7, base=CODE, limit=0xFFFF, type=11, **small)
        for name in ("ds", "es", "ss"):
            setattr(system, name, Segment(selector=15, base=DATA, limit=DATA_SIZE - 1, type=3, **small))
        self.cpu.set_state(state)
        self._small = bytes(raw[L.SEG : L.LAPIC])

    def _tables(self) -> None:
        def put(at: int, value: int) -> None:
            self.memory.write(at, struct.pack("<Q", value))

        put(PML4, PDPT | 7)
        put(PDPT, PD_LOW | 7)
        put(PD_LOW, PT_LOW | 7)
        for i in range(256):
            put(PT_LOW + 8 * i, i << 12 | 3)
        put(PD_LOW + 8 * (CODE >> 21), PT_CODE | 7)
        put(PD_LOW + 8 * (DATA >> 21), PT_DATA | 7)
        for i in range(CODE_SIZE >> 12):
            put(PT_CODE + 8 * i, CODE_AT + (i << 12) | 5)
        for i in range(DATA_SIZE >> 12):
            put(PT_DATA + 8 * i, DATA_AT + (i << 12) | 1 << 63 | (5 if i == READONLY >> 12 else 7))
        for selector, access, flags in (
            (0x10, 0x9B, 0xA), (0x18, 0x93, 0xC), (0x20, 0xFB, 0xC), (0x28, 0xF3, 0xC), (0x30, 0xFB, 0xA),
        ):  # fmt: skip
            put(GDT + selector, 0xFFFF | access << 40 | (flags << 4 | 0xF) << 48)
        put(TSS + 4, STACK)
        for vector in range(32):
            self.memory.write(HANDLERS + 16 * vector, b"\xf4")
            target = HANDLERS + 16 * vector
            dpl = 3 if vector in (3, 4) else 0
            put(IDT + 16 * vector, target & 0xFFFF | 0x10 << 16 | (0x8E00 | dpl << 13) << 32 | target >> 16 << 48)

    def run(self, code: bytes, start: State, memory: bytes, *, bits: int = 64) -> State:
        """As :meth:`Host.run`; ``ended`` names the signal that Linux would send."""
        cpu = self.cpu
        base = 0 if bits == 16 else CODE
        self.memory.write(CODE_AT + start.rip - base, code)
        self.memory.write(DATA_AT, memory)
        raw = cpu.raw
        raw[L.SEG : L.LAPIC] = {64: self._long, 32: self._compat, 16: self._small}[bits]
        struct.pack_into("<16Q", raw, L.GPR, *start.general)
        cpu.registers.rip = start.rip
        struct.pack_into("<I", raw, L.HALTED, 0)
        if bits == 64:
            for segment, value in ((4, start.fs), (5, start.gs)):
                struct.pack_into("<Q", raw, L.SEG + L.SIZEOF_SEG * segment + L.SEG_BASE, value)
        raw[L.FX : L.FX + XSTATE_SIZE] = start.xstate
        native = self.vm.native
        native.set_eflags(cpu.pointer, start.flags)
        native.update_mode(cpu.pointer)
        ended = cpu.run(self._ops)
        assert ended.reason is Exit.HALTED, f"{ended}"
        vector, inside = divmod(cpu.registers.rip - HANDLERS, 16)
        assert (inside, vector) in [(1, one) for one in range(32)], f"ended at {cpu.registers.rip:#x}: {cpu.describe()}"
        has_error = vector in (8, 10, 11, 12, 13, 14, 17)
        frame = struct.unpack("<6Q", self.memory.read(STACK - 48, 48))
        _, rip, _, flags, rsp, _ = frame if has_error else (0, *frame[1:])
        general = list(struct.unpack_from("<16Q", raw, L.GPR))
        general[4] = rsp
        image = bytearray(raw[L.FX : L.FX + XSTATE_SIZE])
        if not self.avx:
            image[512:520] = struct.pack("<Q", 3)
        normalize(image)
        name = SIGNALS.get(vector, f"vector {vector}")
        offset = rip - base
        if name == "SIGILL" and 0 <= offset < CODE_SIZE and self.memory.read(CODE_AT + offset, 2) == b"\x0f\x0b":
            name = ""
        return State(general, rip, flags, bytes(image), ended=name, memory=self.memory.read(DATA_AT, DATA_SIZE),
                     address=cpu.registers.field(L.CR2) if vector == 14 else None)  # fmt: skip

    def close(self) -> None:
        """Give everything back."""
        self.vm.close()
        self.memory.close()
