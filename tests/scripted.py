"""A test double for the accelerator seam: guest code is a Python generator per vCPU.

The script yields requests and gets their results: ``("out", port, size, value)``, ``("in", port, size)``,
``("store", address, size, value)``, ``("load", address, size)``, ``("inta",)``, ``("eoi", vector)``,
``("wait",)`` (until kicked), ``("exit", Exit, detail)``. When it ends, the vCPU spins until it is kicked for good.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from attrs import define, field
from cardcage.accelerator import MemorySlot, Probe, VmSpec
from cardcage.hookspecs import hookimpl
from cardcage.registry import Registry
from cardcage.vcpu import Exit, Ops, VCpuExit
from cardcage.x86 import VCpuState, reset_state

Script = Callable[["ScriptedVCpu"], Generator[tuple[Any, ...], Any, None]]


class ScriptedVCpu:
    def __init__(self, vm: ScriptedVm, index: int, script: Script) -> None:
        self.vm, self.index = vm, index
        self._script, self._kicked = script, threading.Event()
        self._state = reset_state(bootstrap=index == 0)
        self._running: Generator[tuple[Any, ...], Any, None] | None = None
        self._pending: Any = None

    def run(self, ops: Ops, /) -> VCpuExit:
        if self._running is None:
            self._running = self._script(self)
            self._pending = None
        while True:
            if self._kicked.is_set():
                self._kicked.clear()
                return VCpuExit(Exit.KICKED)
            try:
                request, self._pending = self._running.send(self._pending), None
            except StopIteration:
                self._running = iter_for_ever()
                continue
            match request:
                case ("out", port, size, value):
                    ops.pio_write(port, size, value)
                case ("in", port, size):
                    self._pending = ops.pio_read(port, size)
                case ("store", address, size, value):
                    ops.mmio_write(address, size, value)
                case ("load", address, size):
                    self._pending = ops.mmio_read(address, size)
                case ("inta",):
                    self._pending = ops.acknowledge_extint()
                case ("eoi", vector):
                    ops.end_of_interrupt(vector)
                case ("wait",):
                    self._kicked.wait()
                case ("exit", reason, detail):
                    return VCpuExit(reason, detail)

    def kick(self) -> None:
        self._kicked.set()

    def get_state(self) -> VCpuState:
        return self._state

    def set_state(self, state: VCpuState, /) -> None:
        self._state = state
        self._running = None


def iter_for_ever() -> Generator[tuple[Any, ...], Any, None]:
    while True:
        yield ("wait",)


class ScriptedVm:
    def __init__(self, spec: VmSpec, scripts: tuple[Script, ...], log: list[tuple[Any, ...]]) -> None:
        self.spec, self.log, self._scripts = spec, log, scripts
        self.capabilities: frozenset[str] = frozenset({"irqchip-full"} if spec.irqchip == "full" else ())
        self.slots: list[MemorySlot] = []
        self.closed = False

    def create_vcpu(self, index: int, /) -> ScriptedVCpu:
        return ScriptedVCpu(
            self, index, self._scripts[index] if index < len(self._scripts) else lambda _: iter_for_ever()
        )

    def map_memory(self, slot: MemorySlot, /) -> None:
        self.slots.append(slot)

    def unmap_memory(self, slot: MemorySlot, /) -> None:
        self.slots.remove(slot)

    def memory_written(self, address: int, size: int, /) -> None:
        self.log.append(("written", address, size))

    @contextmanager
    def quiesce(self) -> Iterator[None]:
        self.log.append(("quiesce",))
        yield

    def set_extint(self, level: bool, /) -> None:
        self.log.append(("extint", level))

    def set_irq(self, gsi: int, level: bool, /) -> None:
        self.log.append(("irq", gsi, level))

    def signal_msi(self, address: int, data: int, /) -> None:
        self.log.append(("msi", address, data))

    def inject_nmi(self, index: int, /) -> None:
        self.log.append(("nmi", index))

    def close(self) -> None:
        self.closed = True


@define
class Scripted:
    """A card, given to ``Host(cards=[...])``, that offers the accelerator ``scripted``."""

    scripts: tuple[Script, ...] = ()
    probe_result: Probe = field(default=Probe(True, "native", "scripted by the test"))
    name: str = "scripted"
    log: list[tuple[Any, ...]] = field(factory=list)
    vms: list[ScriptedVm] = field(factory=list)
    extra: Callable[[Registry], None] = lambda registry: None

    @property
    def __name__(self) -> str:
        return self.name

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.accelerator(self.name, lambda: self)
        self.extra(registry)

    def probe(self) -> Probe:
        return self.probe_result

    def create_vm(self, spec: VmSpec, /) -> ScriptedVm:
        self.vms.append(ScriptedVm(spec, self.scripts, self.log))
        return self.vms[-1]
