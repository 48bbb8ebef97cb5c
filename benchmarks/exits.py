"""Cost of a port write that a Python device serves, beside the same loop in C on /dev/kvm.

    python benchmarks/exits.py [--accel kvm,tcg] [--rounds 20000] [--repeat 5]

The guest's loop is `out 0x10, al; jmp`. A row is the time from one port write's service to the next one's, in
microseconds: 10th percentile, median and 99th percentile of the best of some runs. ``over C`` is the difference of the
10th percentiles, which other work on the host hardly moves. ``alone``: one vCPU. ``spinning``: a second
vCPU runs `jmp $`. ``busy Python``: a thread of this process keeps the interpreter busy, as translating guest code does;
the switch interval is the command line's, 0.1 ms. C is compiled with gcc -O2 when the benchmark starts.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import entry_points
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING

from cardcage.accelerator import MemorySlot, VmSpec
from cardcage.errors import CardcageError, ConfigError
from cardcage.registry import AcceleratorOffer, Registry
from cardcage.x86 import CR0_ET, CR0_PE, Registers, Segment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage.accelerator import AcceleratedVm, Accelerator
    from cardcage.vcpu import VCpu

WRITER, SPINNER = bytes.fromhex("e610ebfc"), bytes.fromhex("ebfe")
CONDITIONS = ("alone", "spinning", "busy Python")


class Device:
    """Answers port 0x10: remembers when it was written, and stops the vCPU after enough."""

    def __init__(self, rounds: int, vcpu: VCpu) -> None:
        self.times: list[int] = []
        self._rounds, self._vcpu = rounds, vcpu

    def pio_write(self, port: int, size: int, value: int, /) -> None:
        self.times.append(perf_counter_ns())
        if len(self.times) > self._rounds:
            self._vcpu.kick()

    def pio_read(self, port: int, size: int, /) -> int:
        return 0

    def mmio_read(self, address: int, size: int, /) -> int:
        return 0

    def mmio_write(self, address: int, size: int, value: int, /) -> None: ...

    def acknowledge_extint(self) -> int | None:
        return None

    def end_of_interrupt(self, vector: int, /) -> None: ...


def find(name: str) -> Accelerator:
    """The installed accelerator card *name*."""
    registry = Registry()
    for point in entry_points(group="cardcage"):
        if point.name == name:
            point.load().cardcage_register(registry)
    accelerator: Accelerator = registry.get(AcceleratorOffer, name).load()()
    return accelerator


def start_state(vcpu: VCpu, rip: int) -> None:
    """32-bit protected mode, flat, at *rip*."""
    state = vcpu.get_state()
    state.registers = Registers(rip=rip)
    system, data = state.system, Segment.flat(16)
    system.cr0, system.cs = CR0_PE | CR0_ET, Segment.flat(8, code=True)
    system.ds = system.es = system.fs = system.gs = system.ss = data
    vcpu.set_state(state)


def measure(accelerator: Accelerator, condition: str, rounds: int) -> list[int]:
    """Nanoseconds between services of *rounds* port writes."""
    page = mmap.mmap(-1, 4096)
    page[: len(WRITER)], page[0x800 : 0x800 + len(SPINNER)] = WRITER, SPINNER
    vm = accelerator.create_vm(VmSpec(cpus=2, irqchip="none"))
    try:
        vm.map_memory(MemorySlot(0x1000, 4096, ctypes.addressof(ctypes.c_char.from_buffer(page))))
        vcpu, other = vm.create_vcpu(0), vm.create_vcpu(1)
        start_state(vcpu, 0x1000)
        start_state(other, 0x1800)
        device = Device(rounds, vcpu)
        with company(vm, other, condition):
            vcpu.run(device)
        return [b - a for a, b in zip(device.times, device.times[1:], strict=False)]
    finally:
        vm.close()


@contextlib.contextmanager
def company(vm: AcceleratedVm, other: VCpu, condition: str) -> Iterator[None]:
    """What else goes on meanwhile."""
    over = threading.Event()

    def busy() -> None:
        while not over.is_set():
            sum(range(100))

    work = {"spinning": lambda: other.run(Device(0, other)), "busy Python": busy}.get(condition)
    thread = threading.Thread(target=work) if work else None
    if thread:
        thread.start()
    try:
        yield
    finally:
        over.set()
        other.kick()
        if thread:
            thread.join()


def measure_c(program: Path, condition: str, rounds: int) -> list[int]:
    """The same in C."""
    command = [str(program), str(rounds), str(int(condition == "spinning"))]
    return [int(line) for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


def at(times: list[int], part: float) -> float:
    """A percentile in microseconds."""
    return sorted(times)[min(int(len(times) * part), len(times) - 1)] / 1000


def main() -> int:
    """Measure and print the table; returns the process's status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accel", default="kvm,tcg", help="accelerator cards, comma separated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20000)
    parser.add_argument("--repeat", type=int, default=5, help="runs of each row, in turn; the best one counts")
    given = parser.parse_args()
    sys.setswitchinterval(1e-4)
    rows: dict[tuple[str, str], list[list[int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "exits")
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["gcc", "-O2", "-pthread", "-o", str(program), str(source)], check=True)
        accelerators = {name: find(name) for name in given.accel.split(",")}
        for name, accelerator in accelerators.items():
            probe = accelerator.probe()
            if not probe.usable:
                raise ConfigError(f"{name}: {probe.reason}")
            print(f"{name}: {probe.speed} {probe.reason}")
        for _ in range(given.repeat):
            for condition in CONDITIONS:
                if condition != "busy Python" and "kvm" in accelerators:
                    rows.setdefault(("C on /dev/kvm", condition), []).append(
                        measure_c(program, condition, given.rounds)
                    )
                for name, accelerator in accelerators.items():
                    rows.setdefault((name, condition), []).append(measure(accelerator, condition, given.rounds))
    print(f"{'µs a port write':16} {'':12} {'p10':>8} {'median':>8} {'p99':>8} {'over C':>8}")
    for (name, condition), runs in sorted(rows.items(), key=lambda one: CONDITIONS.index(one[0][1])):
        quiet, middle, slow = (min(at(times, part) for times in runs) for part in (0.1, 0.5, 0.99))
        base = rows.get(("C on /dev/kvm", condition), []) if name == "kvm" else []
        over = f"{quiet - min(at(times, 0.1) for times in base):8.2f}" if base else ""
        print(f"{name:16} {condition:12} {quiet:8.2f} {middle:8.2f} {slow:8.2f} {over:>8}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CardcageError as error:
        sys.exit(str(error))
