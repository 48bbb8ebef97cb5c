"""Memory as one vCPU's instructions see it: through its page tables, devices included."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from cardcage_tcg import layout as L
from cardcage_tcg.cpu.faults import Fault
from cardcage_tcg.cpu.msr import Msrs

if TYPE_CHECKING:
    from cardcage.vcpu import Ops

    from cardcage_tcg.cpu.msr import Msrs
    from cardcage_tcg.cpu.registers import RegisterFile
    from cardcage_tcg.vm import TcgVm

__all__ = ["LinearMemory", "pieces"]

PF_VECTOR = 14


class LinearMemory:
    """Accesses at linear addresses that Python does for a vCPU."""

    def __init__(self, vm: TcgVm, registers: RegisterFile, msrs: Msrs) -> None:
        self._vm, self._native, self._registers, self._msrs = vm, vm.native, registers, msrs
        self._pointer = registers.pointer
        self._phys, self._code = ctypes.c_uint64(), (ctypes.c_char * 16)()

    def walk(self, linear: int, access: int = 0, *, user: bool | None = None) -> tuple[int, int]:
        """(vector, physical address): vector 0 when it is mapped. Sets CR2 for a page fault."""
        level = (self._registers.halves[L.CPL // 4] == 3) if user is None else user
        vector = self._native.walk(self._pointer, linear, access, level, ctypes.byref(self._phys))
        return vector, self._phys.value

    def fault(self, vector: int) -> Fault:
        return Fault(vector, self._registers.words[L.SCRATCH // 8 + 3] & 0xFFFFFFFF if vector == PF_VECTOR else 0)

    def fetch_bytes(self, linear: int, size: int) -> bytes:
        """Up to *size* (at most 16) code bytes, fewer where the next page is missing. Raises Fault."""
        with self._vm.lock:
            got = self._native.fetch(self._pointer, linear, self._code, size)
            if got < 0:
                raise self.fault(-got)
            return self._code.raw[:got]

    def fetch_fault(self, linear: int) -> None:
        """Raise the fault of fetching the byte at *linear*."""
        with self._vm.lock:
            vector, _ = self.walk(linear, 2)
        if vector:
            raise self.fault(vector)

    def read(self, linear: int, size: int, ops: Ops) -> bytes:
        """Data at a linear address, devices included. Raises Fault."""
        buffer = (ctypes.c_char * size)()
        user = self._registers.halves[L.CPL // 4] == 3
        with self._vm.lock:
            vector = self._native.vread(self._pointer, linear, buffer, size, user)
            if not vector:
                return bytes(buffer)
            if vector > 0:
                raise self.fault(vector)
            pieces = [(phys, take, self._vm.memory.peek(phys, take)) for phys, take in self.pages(linear, size, 0)]
        return b"".join(self._read_device(phys, take, ops) if data is None else data for phys, take, data in pieces)

    def _read_device(self, phys: int, size: int, ops: Ops) -> bytes:
        if self._msrs.apic_page(phys) is not None:
            value = ctypes.c_uint32()
            self._native.apic_read(self._pointer, phys & 0xFF0, ctypes.byref(value))
            return value.value.to_bytes(4, "little")[phys & 3 :][:size].ljust(size, b"\0")
        return b"".join(ops.mmio_read(at, width).to_bytes(width, "little") for at, width in pieces(phys, size))

    def pages(self, linear: int, size: int, access: int) -> list[tuple[int, int]]:
        """(physical address, size) of the pieces of an operand by page; *access* 1 for a write. Raises Fault."""
        found, at = [], 0
        with self._vm.lock:
            while at < size:
                vector, phys = self.walk(self._registers.linear_after(linear, at), access)
                if vector:
                    raise self.fault(vector)
                take = min(size - at, 4096 - (phys & 0xFFF))
                found.append((phys, take))
                at += take
        return found

    def write(self, linear: int, data: bytes, ops: Ops) -> None:
        """Write at a linear address, devices and code included. Raises Fault before anything is written."""
        user = self._registers.halves[L.CPL // 4] == 3
        with self._vm.lock:
            vector = self._native.vwrite(self._pointer, linear, data, len(data), user)
            if not vector:
                return
            if vector > 0:
                raise self.fault(vector)
            pages = self.pages(linear, len(data), 1)
        self.write_pages(pages, data, ops)

    def write_pages(self, pages: list[tuple[int, int]], data: bytes, ops: Ops) -> None:
        at, devices = 0, []
        with self._vm.lock:
            for phys, take in pages:
                part = data[at : at + take]
                if not self._vm.memory.poke(phys, part):
                    devices.append((phys, part))
                at += take
        for phys, part in devices:
            if self._msrs.apic_page(phys) is not None:
                self._apic_write(ops, phys & 0xFF0, int.from_bytes(part[:4], "little"))
            else:
                self._mmio_write(ops, phys, len(part), int.from_bytes(part, "little"))

    def _mmio_write(self, ops: Ops, address: int, size: int, value: int) -> None:
        for at, width in pieces(address, size):
            part = value >> (at - address) * 8 & ((1 << width * 8) - 1)
            if not self.rings_bell(False, at, width, part):
                ops.mmio_write(at, width, part)

    def _apic_write(self, ops: Ops, offset: int, value: int) -> None:
        """A register of the local APIC, while a helper may wait with operands of its own."""
        at = L.INFO // 8
        info = self._registers.words[at : at + 4].tolist()
        if self._native.apic_write(self._pointer, offset, value) == L.H_EXIT:
            ops.end_of_interrupt(self._registers.words[at])
        for i, word in enumerate(info):
            self._registers.words[at + i] = word

    def probe_write(self, linear: int, size: int) -> None:
        """Raise the Fault that writing would, and write nothing."""
        self.pages(linear, size, 1)

    def supervisor_read(self, linear: int, size: int) -> bytes:
        buffer = (ctypes.c_char * size)()
        with self._vm.lock:
            vector = self._native.vread(self._pointer, linear, buffer, size, L.AS_SYSTEM)
        if vector > 0:
            raise self.fault(vector)
        return bytes(buffer) if not vector else b"\xff" * size

    def rings_bell(self, pio: bool, address: int, size: int, value: int) -> bool:
        """Doorbells that the shorter way in native code did not meet: string stores, OUT by permission bitmap."""
        return self._vm.events.has_bells and bool(self._native.ring_bell(self._vm.pointer, pio, address, size, value))


def pieces(address: int, size: int) -> list[tuple[int, int]]:
    """Accesses of 1, 2, 4 or 8 bytes that make up a wider or odd one."""
    if size in (1, 2, 4, 8):
        return [(address, size)]
    found = []
    while size:
        width = 8 if size >= 8 else 4 if size >= 4 else 2 if size >= 2 else 1
        found.append((address, width))
        address, size = address + width, size - width
    return found
