"""One ``struct cpu`` of the translator's native half, for tests that call its helpers one by one."""

from __future__ import annotations

import ctypes
import mmap
import struct
from pathlib import Path

from cardcage_tcg import layout as L

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
ES, CS, SS, DS, FS, GS, LDTR, TR = range(8)
DE, DB, UD, DF, TS, NP, SF, GP, PF = 0, 1, 6, 8, 10, 11, 12, 13, 14
IF, TF, NT, VM = 0x200, 0x100, 0x4000, 0x20000
RAM = 0x400000
GDT, IDT, TSS, TABLES = 0x10000, 0x11000, 0x12000, 0x20000
CODE0, DATA0, CODE3, DATA3, CODE64, CODE64U, TSSSEL, CONFORM, ABSENT, READONLY, GATE, TSS2SEL, CODE16, DATA16 = (
    8 * i for i in (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 16, 17)
)  # TSSSEL and GATE take two entries in long mode


def descriptor(access: int, flags: int, base: int = 0, limit: int = 0xFFFFF) -> bytes:
    """A GDT entry: access byte, and flags G D L AVL in bits 3-0."""
    return struct.pack(
        "<HHBBBB", limit & 0xFFFF, base & 0xFFFF, base >> 16 & 255, access, flags << 4 | limit >> 16, base >> 24
    )


class Cpu:
    """One ``struct cpu`` in a VM with 4 MiB of RAM at 0, driven through ``tcg_helper``."""

    def __init__(self, library: ctypes.CDLL, shared: Cpu | None = None) -> None:
        self.lib = library
        self._area = mmap.mmap(-1, L.SIZEOF_CPU + 4096)
        self.at = ctypes.addressof(ctypes.c_char.from_buffer(self._area))
        if shared is None:
            self.ram = mmap.mmap(-1, RAM)
            self._vm = mmap.mmap(-1, L.SIZEOF_VM + 4096)
            self._pages = mmap.mmap(-1, RAM // 4096 * L.SIZEOF_PAGE)
            self.vm_at = ctypes.addressof(ctypes.c_char.from_buffer(self._vm))
            host = ctypes.addressof(ctypes.c_char.from_buffer(self.ram))
            pages = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
            struct.pack_into("<QQQQ", self._vm, L.VM_SLOTS, 0, RAM, host, pages)
            for name, value in (("NSLOTS", 1), ("HAS_LAPIC", 1 | L.H_LAPIC_X2 | L.H_LAPIC_DEADLINE)):
                struct.pack_into("<I", self._vm, getattr(L, f"VM_{name}"), value)
            for name, value in (("TSC_KHZ", 2_000_000), ("APIC_BUS_HZ", 1_000_000_000)):
                struct.pack_into("<Q", self._vm, getattr(L, f"VM_{name}"), value)
        else:
            self.ram, self._vm, self.vm_at = shared.ram, shared._vm, shared.vm_at
        index = struct.unpack_from("<I", self._vm, L.VM_NCPUS)[0]
        struct.pack_into("<Q", self._vm, L.VM_CPUS + 8 * index, self.at)
        struct.pack_into("<I", self._vm, L.VM_NCPUS, index + 1)
        self.put("VM", self.vm_at)
        self.put32("INDEX", index)
        self.put("EFLAGS", 2)
        self.put("APIC_BASE", 0xFEE00800 | (0x100 if index == 0 else 0))
        self.put("CR0", 0x10)
        self.put32("IDT", 0x3FF, 8)
        for i in range(6):
            self.seg(i, 0, 0, 0xFFFF, 0x93)
        self.seg(LDTR, 0, 0, 0, 0x1000)
        self.call("reset")
        self.call("apic_reset")
        self.put32("POLL", 0)

    # state

    def get(self, name: str, offset: int = 0) -> int:
        return int(struct.unpack_from("<Q", self._area, getattr(L, name) + offset)[0])

    def put(self, name: str, value: int, offset: int = 0) -> None:
        struct.pack_into("<Q", self._area, getattr(L, name) + offset, value)

    def get32(self, name: str, offset: int = 0) -> int:
        return int(struct.unpack_from("<I", self._area, getattr(L, name) + offset)[0])

    def put32(self, name: str, value: int, offset: int = 0) -> None:
        struct.pack_into("<I", self._area, getattr(L, name) + offset, value)

    def __getitem__(self, register: int) -> int:
        return self.get("GPR", 8 * register)

    def __setitem__(self, register: int, value: int) -> None:
        self.put("GPR", value, 8 * register)

    @property
    def flags(self) -> int:
        return int(self.call("get_eflags", result=ctypes.c_uint64))

    @flags.setter
    def flags(self, value: int) -> None:
        self.call("set_eflags", ctypes.c_uint64(value))
        self.call("update_mode")

    @property
    def rip(self) -> int:
        return self.get("RIP")

    def seg(self, n: int, selector: int, base: int, limit: int, attr: int) -> None:
        struct.pack_into("<QIHH", self._area, L.SEG + 16 * n, base, limit, selector, attr)

    def sel(self, n: int) -> int:
        return int(struct.unpack_from("<H", self._area, L.SEG + 16 * n + 12)[0])

    def base(self, n: int) -> int:
        return self.get("SEG", 16 * n)

    def attr(self, n: int) -> int:
        return int(struct.unpack_from("<H", self._area, L.SEG + 16 * n + 14)[0])

    def read(self, at: int, form: str) -> tuple[int, ...]:
        return struct.unpack_from("<" + form, self.ram, at)

    def write(self, at: int, form: str, *values: int) -> None:
        struct.pack_into("<" + form, self.ram, at, *values)

    # calls

    def call(self, name: str, *arguments: object, result: object = ctypes.c_int) -> int:
        function = getattr(self.lib, f"tcg_{name}")
        function.restype = result
        return int(function(ctypes.c_void_p(self.at), *arguments) or 0)

    def do(self, helper: str, imm: int = 0, length: int = 2, info: tuple[int, ...] = ()) -> int:
        """Run a helper as translated code does."""
        for i, value in enumerate(info):
            self.put("INFO", value, 8 * i)
        return self.call("helper", ctypes.c_uint32(getattr(L, f"HLP_{helper}") | length << 8 | imm << 12))

    # modes

    def tables(self, *, wide: bool) -> None:
        """GDT, IDT and TSS; interrupt gates to 0x8000 + 16 * vector with DPL 0, vector 0x80 with DPL 3."""
        entries = {
            CODE0: descriptor(0x9A, 12), DATA0: descriptor(0x92, 12), CODE3: descriptor(0xFA, 12),
            DATA3: descriptor(0xF2, 12),
            CODE64: descriptor(0x9A, 10), CODE64U: descriptor(0xFA, 10), CONFORM: descriptor(0x9E, 12),
            ABSENT: descriptor(0x12, 12),
            READONLY: descriptor(0x90, 12), TSSSEL: descriptor(0x89, 0, TSS, 0xFFF),
            TSS2SEL: descriptor(0x89, 0, TSS + 0x1000, 0xFFF),
            CODE16: descriptor(0x9A, 0, 0x30000, 0xFFFF), DATA16: descriptor(0x92, 0, 0x30000, 0xFFFF),
        }  # fmt: skip
        for selector, entry in entries.items():
            self.ram[GDT + selector : GDT + selector + 8] = entry
        for vector in range(256):
            target, access = 0x8000 + 16 * vector, 0xEE if vector == 0x80 else 0x8E
            if wide:
                self.write(IDT + 16 * vector, "HHBBHII", target, CODE64, 0, access, 0, 0, 0)
            else:
                self.write(IDT + 8 * vector, "HHBBH", target, CODE0, 0, access, 0)
        self.put("GDT", GDT)
        self.put32("GDT", 0xFFF, 8)
        self.put("IDT", IDT)
        self.put32("IDT", 0xFFF, 8)
        self.seg(TR, TSSSEL, TSS, 0xFFF, 0x8B)
        self.put("RIP", 0x7000)
        self[RSP] = 0x40000

    def protected(self, cpl: int = 0) -> None:
        """Flat 32-bit protected mode without paging."""
        self.tables(wide=False)
        self.write(TSS + 4, "IH", 0x50000, 0)
        self.write(TSS + 8, "H", DATA0)
        self.put("CR0", 0x11)
        self.seg(CS, CODE3 | 3 if cpl else CODE0, 0, 0xFFFFFFFF, 0xCFB if cpl else 0xC9B)
        for i in (ES, SS, DS, FS, GS):
            self.seg(i, DATA3 | 3 if cpl else DATA0, 0, 0xFFFFFFFF, 0xCF3 if cpl else 0xC93)
        self.call("update_mode")

    def long(self, cpl: int = 0) -> None:
        """64-bit mode, 2 MiB identity pages for the first 4 MiB, all user-accessible."""
        self.tables(wide=True)
        self.write(TABLES, "Q", TABLES + 0x1000 | 7)
        self.write(TABLES + 0x1000, "Q", TABLES + 0x2000 | 7)
        self.write(TABLES + 0x2000, "QQ", 0x87, 0x200087)
        self.write(TSS + 4, "Q", 0x50008)
        self.write(TSS + 36, "Q", 0x60008)
        for name, value in (("CR0", 0x80010011), ("CR4", 0x20), ("CR3", TABLES), ("EFER", 0x501)):
            self.put(name, value)
        self.seg(CS, CODE64U | 3 if cpl else CODE64, 0, 0xFFFFFFFF, 0xAFB if cpl else 0xA9B)
        for i in (ES, SS, DS, FS, GS):
            self.seg(i, DATA3 | 3 if cpl else DATA0, 0, 0xFFFFFFFF, 0xCF3 if cpl else 0xC93)
        self.call("reset")

    def real(self) -> None:
        self.put("RIP", 0x7000)
        self[RSP] = 0x1000
        self.seg(SS, 0x3000, 0x30000, 0xFFFF, 0x93)
        self.seg(CS, 0x100, 0x1000, 0xFFFF, 0x93)
        self.call("update_mode")

    def taken(self) -> int:
        """The vector whose handler is next."""
        assert self.rip & 15 == 0
        return (self.rip - 0x8000) // 16


def load() -> ctypes.CDLL:
    """The native library."""
    return ctypes.CDLL(str(Path(L.__file__ or "").with_name("_native.so")))
