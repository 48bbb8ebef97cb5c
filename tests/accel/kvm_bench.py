"""A small VM of the accelerator kvm, and what records its accesses."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

from cardcage.accelerator import MemorySlot, VmSpec
from cardcage.x86 import CR0_ET, CR0_PE, Registers, Segment
from cardcage_kvm.accel import Kvm
from cardcage_kvm.vcpu import KvmVCpu
from cardcage_kvm.vm import KvmVm

RAM = 0x10000


CODE = 0x1000


class Ops:
    """Records accesses; answers reads with *answer*; calls *on_write* for port writes."""

    def __init__(self, on_write: Callable[[int, int], None] | None = None, answer: int = 0) -> None:
        self.seen: list[tuple[str, int, int, int]] = []
        self.on_write, self.answer = on_write, answer

    def pio_read(self, port: int, size: int, /) -> int:
        self.seen.append(("in", port, size, self.answer))
        return self.answer

    def pio_write(self, port: int, size: int, value: int, /) -> None:
        self.seen.append(("out", port, size, value))
        if self.on_write is not None:
            self.on_write(port, value)

    def mmio_read(self, address: int, size: int, /) -> int:
        self.seen.append(("read", address, size, self.answer))
        return self.answer

    def mmio_write(self, address: int, size: int, value: int, /) -> None:
        self.seen.append(("write", address, size, value))

    def acknowledge_extint(self) -> int | None:
        return None

    def end_of_interrupt(self, vector: int, /) -> None:
        self.seen.append(("eoi", vector, 0, 0))


class Bench:
    """A VM with 64 KiB of RAM whose vCPUs start in flat 32-bit protected mode."""

    def __init__(self, spec: VmSpec) -> None:
        self.page = mmap.mmap(-1, RAM, flags=mmap.MAP_PRIVATE)  # as guests have it
        self.slot = MemorySlot(0, RAM, ctypes.addressof(ctypes.c_char.from_buffer(self.page)))
        self.vm: KvmVm = Kvm().create_vm(spec)
        self.vm.map_memory(self.slot)
        self.vcpus = [self.vm.create_vcpu(index) for index in range(spec.cpus)]

    def load(self, code: str, at: int = CODE, index: int = 0) -> KvmVCpu:
        data = bytes.fromhex(code)
        self.page[at : at + len(data)] = data
        vcpu = self.vcpus[index]
        state = vcpu.get_state()
        state.registers = Registers(rip=at, rsp=0x8000)
        system, flat = state.system, Segment.flat(16)
        system.cr0, system.cs = CR0_PE | CR0_ET, Segment.flat(8, code=True)
        system.ds = system.es = system.fs = system.gs = system.ss = flat
        state.events.startup, state.events.halted = "running", False
        vcpu.set_state(state)
        return vcpu


MakeBench = Callable[..., Bench]
