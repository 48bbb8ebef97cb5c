"""Where conformance programs run: memory, ports and a record of what was seen, on any accelerator through the seam.

Guest-physical layout: tables 0x1000 to 0x3FFF, exception library 0x4000, its records 0x7000, the program 0x8000, stacks
0x20000 to 0x4FFFF, page tables 0x50000, free RAM 0x60000 to 0x8FFFF and 0x100000 to 8 MiB, ROM 0xF0000; a device that
remembers at 0xD0000000. Ports remember bytes too; 0xE0 asks the harness to act, 0xF4 ends, 0xF5 fails.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from attrs import define, field
from cardcage.abilities import near_misses
from cardcage.accelerator import VM, VmSpec, check_vm
from cardcage.memory import PhysicalMemory, RamBlock, RamRange
from cardcage.vcpu import Exit, VCpuExit

from cardcage_conformance.startmodes import LIBRARY, LOAD, enter, write_tables

if TYPE_CHECKING:
    from cardcage.accelerator import Accelerator
    from cardcage.vcpu import VCpu
    from cardcage.x86 import VCpuState

    from cardcage_conformance.conformance import Access, Program

__all__ = ["Assembled", "Lab", "assembled"]

RAM_SIZE, ROM_ADDRESS, ROM_SIZE = 8 << 20, 0xF0000, 0x10000
MMIO, MMIO_SIZE = 0xD0000000, 0x1000
FAULTS, IRQLOG = 0x7000, 0x7E10
HOST_PORT, DONE_PORT, FAIL_PORT = 0xE0, 0xF4, 0xF5
LIBRARIES = {"real16": "library16", "protected32": "library32", "paging32": "library32", "long64": "library64"}


@define
class Assembled:
    """Machine code and its ``at_...`` labels."""

    code: bytes
    labels: dict[str, int] = field(factory=dict)


@cache
def assembled() -> dict[str, Assembled]:
    """All programs and libraries as bytes, from the file that ``python -m cardcage_conformance.assemble`` writes."""
    text = resources.files("cardcage_conformance.programs").joinpath("assembled.json").read_text()
    return {name: Assembled(bytes.fromhex(one["code"]), one["labels"]) for name, one in json.loads(text).items()}


class Lab:
    """One program on one accelerator. Use it as a context manager, call :meth:`run` once."""

    def __init__(self, accelerator: Accelerator, program: Program, *, timeout: float = 20.0) -> None:
        self.program, self._timeout = program, timeout
        self.lock = threading.RLock()
        self.accesses: list[Access] = []
        self.eois: list[int] = []
        self.extints: list[int] = []
        self.done = self.failed = self.timed_out = False
        self.exits: dict[int, VCpuExit] = {}
        self.eventfds: list[int] = []
        self.route = 0
        self._errors: list[BaseException] = []
        self._ports = bytearray(at & 0xFF for at in range(0x10000))
        self._mmio = bytearray(at & 0xFF for at in range(MMIO_SIZE))
        self.memory = PhysicalMemory()
        self.ram, self.rom = RamBlock(RAM_SIZE, "lab"), RamBlock(ROM_SIZE, "rom")
        self.rom.view[:] = bytes((at & 0xFF) ^ 0x5A for at in range(ROM_SIZE))
        self.memory.add(
            RamRange(0, RAM_SIZE, self.ram), RamRange(ROM_ADDRESS, ROM_SIZE, self.rom, readonly=True, priority=1)
        )
        self.code = assembled()[program.name]
        vm = accelerator.create_vm(VmSpec(cpus=program.cpus, irqchip=program.irqchip))
        self.vm = check_vm(vm, accelerator.name)
        misses = near_misses(vm, VM)
        assert not misses, f"{accelerator.name}: {'; '.join(misses)}"
        self.vcpus: list[VCpu] = []

    def __enter__(self) -> Lab:
        self.memory.attach(self.vm)
        self.memory.report_to(self.vm)
        write_tables(self.memory, self.program.start)
        self.memory.write(LIBRARY, assembled()[LIBRARIES[self.program.start]].code)
        self.memory.write(LOAD, self.code.code)
        self.vcpus = [self.vm.create_vcpu(index) for index in range(self.program.cpus)]
        for vcpu in self.vcpus:
            if vcpu.index == 0 or self.program.irqchip == "none":
                vcpu.set_state(enter(vcpu.get_state(), self.program.start, vcpu.index))
        if self.program.prepare is not None:
            self.program.prepare(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.vm.close()
        for fd in self.eventfds:
            os.close(fd)
        self.memory.close()

    def run(self) -> VCpuExit:
        """Run the program to its end; returns processor 0's last exit. Raises what a callback raised."""
        watchdog = threading.Timer(self._timeout, self._give_up)
        watchdog.daemon = True
        threads = [
            threading.Thread(target=self._drive, args=(vcpu,), name=f"lab-cpu{vcpu.index}") for vcpu in self.vcpus[1:]
        ]
        watchdog.start()
        for thread in threads:
            thread.start()
        try:
            self._drive(self.vcpus[0])
        finally:
            self.stop()
            for thread in threads:
                thread.join()
            watchdog.cancel()
            watchdog.join()
        if self._errors:
            raise self._errors[0]
        return self.exits[0]

    def _drive(self, vcpu: VCpu) -> None:
        ops = _LabOps(self, vcpu)
        try:
            while True:
                ended = vcpu.run(ops)
                self.exits[vcpu.index] = ended
                if self.done or self.failed or self.timed_out:
                    return
                if ended.reason is Exit.KICKED:
                    continue
                with self.lock:
                    resume = self.program.on_halt
                    if ended.reason is Exit.HALTED and vcpu.index == 0 and resume is not None and resume(self):
                        continue
                return
        except BaseException as error:  # handed to the caller of run(), whichever thread met it
            self._errors.append(error)
        finally:
            if vcpu.index == 0 or self._errors:
                self.stop()

    def stop(self) -> None:
        """End the run of all processors."""
        self.done = True
        for vcpu in self.vcpus:
            vcpu.kick()

    def _give_up(self) -> None:
        self.timed_out = True
        self.stop()

    # what a program's callbacks use

    def eventfd(self) -> int:
        """One more eventfd, closed at the end."""
        self.eventfds.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        return self.eventfds[-1]

    def counted(self, which: int) -> int:
        """Return the count of eventfd *which* since the last time."""
        try:
            return os.eventfd_read(self.eventfds[which])
        except BlockingIOError:
            return 0

    def raise_extint(self, *vectors: int) -> None:
        """Have the 8259 that the harness plays ask for these interrupts, in order."""
        with self.lock:
            self.extints += vectors
            self.vm.set_extint(bool(self.extints))

    def write(self, address: int, data: bytes) -> None:
        """Write guest memory as a device would, by DMA."""
        self.memory.write(address, data)

    def read(self, address: int, size: int) -> bytes:
        """Read guest memory."""
        return self.memory.read(address, size)

    def word(self, address: int, size: int = 8) -> int:
        """Read an integer from guest memory."""
        return int.from_bytes(self.memory.read(address, size), "little")

    def state(self, index: int = 0) -> VCpuState:
        """Registers of a processor that does not run."""
        return self.vcpus[index].get_state()

    def faults(self) -> list[tuple[int, ...]]:
        """The exception library's records: vector, error, rip, cs, rflags, rsp, ss, cr2."""
        count = min(self.word(FAULTS, 4), 38)
        return [struct.unpack("<8Q", self.read(FAULTS + 64 + at * 64, 64)) for at in range(count)]

    def interrupts(self) -> tuple[int, ...]:
        """Vectors that the exception library took, in order."""
        return tuple(self.read(IRQLOG + 4, min(self.word(IRQLOG, 4), 200)))

    # the machine's side of the seam

    def port(self, port: int, size: int) -> int:
        answer = self.program.answers.get(port)
        data = self._ports[port : port + size].ljust(size, b"\xff")
        return int.from_bytes(data, "little") if answer is None else answer & (1 << size * 8) - 1

    def set_port(self, port: int, size: int, value: int) -> None:
        self._ports[port : port + size] = value.to_bytes(size, "little")[: len(self._ports) - port]

    def mmio(self, address: int, size: int) -> int:
        offset = address - MMIO
        if 0 <= offset <= MMIO_SIZE - size:
            return int.from_bytes(self._mmio[offset : offset + size], "little")
        return (1 << size * 8) - 1

    def set_mmio(self, address: int, size: int, value: int) -> None:
        offset = address - MMIO
        if 0 <= offset <= MMIO_SIZE - size:
            self._mmio[offset : offset + size] = value.to_bytes(size, "little")


class _LabOps:
    """:class:`cardcage.vcpu.Ops` for one processor."""

    def __init__(self, lab: Lab, vcpu: VCpu) -> None:
        self._lab, self._vcpu = lab, vcpu

    def pio_read(self, port: int, size: int, /) -> int:
        lab = self._lab
        with lab.lock:
            value = lab.port(port, size)
            lab.accesses.append(("in", port, size, value))
            return value

    def pio_write(self, port: int, size: int, value: int, /) -> None:
        lab = self._lab
        with lab.lock:
            if port in (DONE_PORT, FAIL_PORT):
                lab.failed = lab.failed or port == FAIL_PORT
                lab.stop()
            elif port == HOST_PORT and lab.program.on_host is not None:
                lab.program.on_host(lab, value)
            else:
                lab.accesses.append(("out", port, size, value))
                lab.set_port(port, size, value)

    def mmio_read(self, address: int, size: int, /) -> int:
        lab = self._lab
        with lab.lock:
            value = lab.mmio(address, size)
            lab.accesses.append(("read", address, size, value))
            return value

    def mmio_write(self, address: int, size: int, value: int, /) -> None:
        lab = self._lab
        with lab.lock:
            lab.accesses.append(("write", address, size, value))
            lab.set_mmio(address, size, value)

    def acknowledge_extint(self) -> int | None:
        lab = self._lab
        with lab.lock:
            vector = lab.extints.pop(0) if lab.extints else None
            lab.vm.set_extint(bool(lab.extints))
            return vector

    def end_of_interrupt(self, vector: int, /) -> None:
        with self._lab.lock:
            self._lab.eois.append(vector)
