"""Blocks of a VM's code: what has no template yet, instructions that run alone, and forgetting all."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from iced_x86 import (
    Code,
    FlowControl,
)

from cardcage_tcg import layout as L
from cardcage_tcg.cpu.faults import Fault
from cardcage_tcg.translate.access import pushes_memory, reads_memory, writes_memory
from cardcage_tcg.translate.allowed import MASKED_MOVES, MASKED_STORES, waits
from cardcage_tcg.translate.store import TemplateStore
from cardcage_tcg.translate.translator import Translator

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cardcage_tcg.cpu.vcpu import TcgVCpu
    from cardcage_tcg.vm import TcgVm

__all__ = ["Blocks"]

ANYWHERE = 0x1000
"""An address for code that has none: templates do not depend on it."""
UD = 6
TRIES = 200
"""How often one instruction is translated in a row: a few times suffice, unless others keep patching it."""


def _field(block: int, offset: int) -> int:
    """A 64-bit field of ``struct block``."""
    return ctypes.c_uint64.from_address(block + offset).value


class Blocks:
    """The translator as a VM's vCPUs need it. Native code makes the blocks themselves.

    Args:
        store: the templates, closed with this.
    """

    def __init__(self, vm: TcgVm, store: TemplateStore) -> None:
        self._vm, self._native, self.store = vm, vm.native, store
        hidden, note = vm.model.hidden, store.recipes.note
        self.translator = Translator(store, vm.native.head_length, hidden=hidden, note=note)
        self._singles: dict[tuple[int, int, int, bytes], int] = {}

    def prepare(self) -> None:
        """Make the templates that earlier runs needed, and keep them, before this process runs a guest."""
        self.follow(self.store.recipes.take())
        if self.translator.made:
            self.store.save()
            self.translator.made = 0

    def follow(self, entries: Iterable[tuple[int, bytes]]) -> None:
        """Make the templates of instructions, ``(key, bytes)``, until the store is full."""
        for key, raw in entries:
            single = bool(key & L.KEY_SINGLE)
            mode = key & ~L.KEY_SINGLE
            if not self.translator.make(mode, ANYWHERE, raw, self._add_template, self._has_template, single=single):
                return

    def flush(self) -> None:
        """Forget all blocks; the world is stopped."""
        self._native.flush_blocks(self._vm.pointer)
        self._singles.clear()

    def translate(self, cpu: TcgVCpu) -> None:
        """Native code met instructions without a template at the vCPU's RIP, or a full buffer. Fetching may fault."""
        with self._vm.lock:
            if cpu.registers.field(L.INFO + 16) == L.TRANSLATE_FULL:
                self._flush_stopped()
                return
            try:
                linear, phys = self._fetched(cpu)
                self._make(cpu, phys, linear, single=False)
            except Fault as fault:
                cpu.raise_exception(fault.vector, fault.error)

    def _flush_stopped(self) -> None:
        with self._vm.quiesce():
            self.flush()

    def _make(self, cpu: TcgVCpu, phys: int, linear: int, *, single: bool) -> None:
        mode, pc = cpu.registers.mode, cpu.registers.rip
        skip = cpu.registers.field(L.INFO + 24)  # the instructions before this one have templates
        if skip and not single:
            phys, linear, pc = phys + skip, linear + skip, pc + skip
        data = self._code_bytes(cpu, phys, linear, mode, pc)
        if not single:  # other code at this place, as a debugger or an emulator in the guest puts there, is another try
            tried = pc, mode, data[:15]
            cpu.tries = cpu.tries + 1 if tried == cpu.tried else 0
            cpu.tried = tried
            if cpu.tries > TRIES:
                raise Fault(UD)
        if self._vm.memory.host(phys) is None:
            raise Fault(UD)  # code outside RAM: an open bus, all ones
        if not self.translator.make(mode, pc, data, self._add_template, self._has_template, single=single):
            # a guest that tries all encodings there are: what is still needed is made again
            with self._vm.quiesce():
                self.flush()
                self.store.clear()

    def _add_template(self, data: bytes, link: bool) -> bool:
        return not self._native.add_template(self._vm.pointer, data, len(data), link)

    def _has_template(self, key: int, raw: bytes) -> int:
        found: int = self._native.has_template(self._vm.pointer, key, raw, len(raw))
        return found

    def _code_bytes(self, cpu: TcgVCpu, phys: int, linear: int, mode: int, pc: int) -> bytes:
        """Code from *phys* to the end of its page, or into the next page where the first instruction reaches there."""
        room = 4096 - (phys & 0xFFF)
        data = self._vm.memory.peek(phys, min(room, 1024))
        if data is None:
            data = b"\xff" * 15
        if room < 15 and self.translator.decode(mode, pc, data, 1)[0][0].code == Code.INVALID:
            vector, second = cpu.linear.walk(cpu.registers.linear_after(linear, room), 2)
            if vector:
                raise Fault(vector, cpu.registers.field(L.SCRATCH + 24) & 0xFFFFFFFF)
            more = self._vm.memory.peek(second, 15)
            return data + (more if more is not None else b"\xff" * 15)
        return data

    def prepare_single(self, cpu: TcgVCpu) -> tuple[int, bool, bool] | None:
        """Have the instruction at RIP run alone next, its write going to ``cpu.write_ptr``: how many bytes it writes,
        whether they are read first, and whether x87 stores them; 0 bytes when memory changed meanwhile; None for one
        that Python does. Raises Fault."""
        with self._vm.lock:
            linear, phys = self._fetched(cpu)
            data = cpu.linear.fetch_bytes(linear, 15)
            mode, pc = cpu.registers.mode, cpu.registers.rip
            ins = self.translator.decode(mode, pc, data, 1)[0][0]
            if (
                ins.code == Code.INVALID
                or ins.flow_control != FlowControl.NEXT
                or not writes_memory(ins)
                or pushes_memory(ins)
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
            cpu.resume_at(_field(block, L.BLOCK_CODE), L.RESUME_SINGLE)
            written = _field(block, L.BLOCK_WRITTEN)
            return written, reads_memory(ins), waits(ins)

    def prepare_again(self, cpu: TcgVCpu) -> None:
        """Have the instruction at RIP run alone next, from its start, with the answer that a device has given it."""
        with self._vm.lock:
            linear, phys = self._fetched(cpu)
            block = self._once(cpu, phys, linear, L.MAKE_AGAIN, b"")
            if block is not None:
                cpu.resume_at(_field(block, L.BLOCK_CODE), L.RESUME_AGAIN)

    @staticmethod
    def _fetched(cpu: TcgVCpu) -> tuple[int, int]:
        """Linear and physical address of the code at RIP. Raises Fault."""
        linear = (
            cpu.registers.rip
            if cpu.registers.mode & L.MODE_64
            else cpu.registers.cs_base + cpu.registers.rip & 0xFFFFFFFF
        )
        vector, phys = cpu.linear.walk(linear, 2)
        if vector:
            raise Fault(vector, cpu.registers.field(L.SCRATCH + 24) & 0xFFFFFFFF)
        return linear, phys

    def _once(self, cpu: TcgVCpu, phys: int, linear: int, what: int, data: bytes) -> int | None:
        """Address of the header of a block for one run (``MAKE_*``); it is of the present generation, under the lock.
        None when the instruction is not one that *data* begins with (empty: any)."""
        for _ in range(TRIES):
            block = self._native.once(cpu.pointer, phys, linear, what, data, len(data))
            if block > L.TRANSLATE_MISSING:
                found: int = block
                return found
            if block == L.TRANSLATE_MISSING:
                self._make(cpu, phys, linear, single=what == L.MAKE_SINGLE)
            elif block == L.TRANSLATE_FULL:
                self._flush_stopped()
            else:
                break
        return None
