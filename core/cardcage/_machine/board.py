"""A machine's board: its buses, memory, lines, processors and devices, and their part in its transitions."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from cardcage._machine.booting import MachineBoot
from cardcage._machine.bus import Bus
from cardcage._machine.faults import MISTAKES
from cardcage._machine.ops import MachineOps, ObservedOps
from cardcage._machine.plugged import able
from cardcage._machine.runner import run_vcpu
from cardcage._machine.services import Services
from cardcage._machine.wiring import Wiring
from cardcage.abilities import has
from cardcage.device import DetachingBus
from cardcage.errors import FAULTS, in_words
from cardcage.security import Act
from cardcage.waiting import Condition
from cardcage.x86 import reset_state

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage._host.log import Log
    from cardcage._machine.life import Life
    from cardcage._machine.observers import Observers
    from cardcage._machine.plugged import PluggedDevice
    from cardcage.accelerator import AcceleratedVm
    from cardcage.boot import BootImage
    from cardcage.device import RamSpan
    from cardcage.memory import PhysicalMemory, RamRange
    from cardcage.security import Mediator
    from cardcage.vcpu import VCpu


class Board:
    """What a machine is made of; satisfies :class:`~cardcage._machine.life.Steps`.

    Args:
        spans: where RAM shows. reserved: ranges that the boot's memory map leaves out, ``(address, size)``.
        vcpus: the machine's processors, added by who makes them.

    Attributes: ``name label mediator log vm irqchip memory vcpus pio mmio wiring lines devices services ops``.
    """

    def __init__(
        self,
        name: str,
        label: str,
        mediator: Mediator,
        log: Log,
        *,
        life: Life,
        observers: Observers,
        vm: AcceleratedVm,
        irqchip: str,
        memory: PhysicalMemory,
        spans: Sequence[RamSpan],
        reserved: Sequence[tuple[int, int]],
        vcpus: list[VCpu],
    ) -> None:
        self.name, self.label, self.mediator, self.log = name, label, mediator, log
        self.vm, self.irqchip, self.memory, self.vcpus = vm, irqchip, memory, vcpus
        self.life, self._observers = life, observers
        self._spans, self._reserved = spans, reserved
        self.pio, self.mmio = Bus("pio", 16, life.faults.misread), Bus("mmio", 52, life.faults.misread)
        self.wiring = Wiring(vm, irqchip, life.gate.wake)
        self.lines = self.wiring.lines
        self.devices: dict[str, PluggedDevice] = {}
        self.changed = Condition(life.lock)  # notified when a device was taken out, after taken_out()
        self.taken_out: Callable[[], None] = lambda: None
        self.services = Services()
        self._image: BootImage | None = None
        self.choose_ops()
        observers.follow(self.choose_ops)

    def choose_ops(self) -> None:
        """vCPUs serve accesses through an object without any hook in it, unless somebody observes."""
        parts = (self.life.lock, self.pio, self.mmio, self.wiring, self.life.faults)
        observed = self._observers.has("pio", "mmio")
        self.ops = ObservedOps(*parts, self._observers.emit) if observed else MachineOps(*parts)
        self.life.kick()  # the next run takes the new one

    def carrier(self, bus: str, id: str | None) -> Any:
        """The device that carries others as *bus* (and is called *id*, where that is given), None without one."""
        for plugged in self.devices.values():
            if "bus" in plugged.abilities and plugged.device.bus_type == bus and id in (None, plugged.id):
                return plugged.device
        return None

    def occupant(self, bus: Bus, mapping: Any, address: int, size: int) -> str | None:
        """The label of another device that answers in a range of *bus*; None when it is free."""
        for one in self.devices.values():
            for other in one.slot.ranges.mappings:
                if other.bus is bus and other is not mapping and other.overlaps(address, size):
                    return one.slot.label
        return None

    def change_memory(self, add: tuple[RamRange, ...] = (), remove: tuple[RamRange, ...] = ()) -> None:
        """Change which RAM shows where (PAM, ROM) before the next instruction. Under the lock. Raises Denied."""
        self.mediator.check(Act(self.label, self.label, "memory", ("map",), {"machine": self.name}))
        with self.vm.quiesce():
            self.memory.change(add, remove)

    # transitions

    def insert(self, image: BootImage | None) -> None:
        """*image* is what boots."""
        self._image = image

    def boot(self) -> None:
        """Let contributors write, load the boot image (at reset: again), and put the vCPUs in their first states.

        Without an image nothing is loaded, and at a reset the boot processor starts as after power-up.
        """
        context = MachineBoot(self.memory, self._spans, self._reserved, len(self.vcpus), self._image)
        with self.life.lock:
            for device in able(self.devices, "boot"):
                device.contribute(context)
            first = self._image.load(context) if self._image is not None else reset_state()
        for vcpu in self.vcpus:
            vcpu.set_state(first if vcpu.index == 0 else reset_state(bootstrap=False))
            if context.msrs:
                state = vcpu.get_state()  # but for the TSC: it runs on, in step with the others'
                state.tsc, state.msrs = None, state.msrs | {i: v for i, v in context.msrs.items() if i in state.msrs}
                vcpu.set_state(state)
        self.life.gate.wake()

    def show_firmware(self) -> None:
        """Put firmware that is the boot image into the address space, for a guest that goes on from its state."""
        context = MachineBoot(self.memory, self._spans, self._reserved, len(self.vcpus), self._image)
        if context.firmware and self._image is not None:
            with self.life.lock:
                self._image.load(context)

    @property
    def bootable(self) -> bool:
        """True when there is an image to boot."""
        return self._image is not None

    def threads(self) -> list[threading.Thread]:
        """A thread for each vCPU, not started."""
        return [
            threading.Thread(
                target=partial(run_vcpu, self.life, self.wiring, lambda: self.ops, self._observers, vcpu),
                name=f"{self.name}-cpu{vcpu.index}",
                daemon=True,
            )
            for vcpu in self.vcpus
        ]

    def freeze(self) -> None:
        """Devices leave guest memory alone. Under the lock."""
        self._each("pause", lambda device: device.pause())

    def thaw(self) -> None:
        """Devices go on. Under the lock."""
        self._each("pause", lambda device: device.resume())

    def reset(self) -> None:
        """Devices are put back. Under the lock."""
        self._each("reset", lambda device: device.reset())

    def _each(self, ability: str, act: Callable[[Any], None]) -> None:
        for plugged in [*self.devices.values()]:  # a reset can take some out
            if ability in plugged.abilities and plugged.id in self.devices:
                try:
                    act(plugged.device)
                except MISTAKES as error:  # a guest can ask for a reset, with any address in a register
                    self.life.faults.spare(error, plugged.id)

    def may_unplug(self, plugged: PluggedDevice) -> None:
        """Raises Denied where the machine may not take it out."""
        facts = {"machine": self.name, "device": plugged.id}
        self.mediator.check(Act(self.label, plugged.slot.label, "device", ("detach",), facts))

    def unplug(self, id: str) -> None:
        """Take device *id* out, and what it carries. Under the lock. Raises Denied."""
        for one in [one for one in self.devices.values() if one.carrier is self.devices[id].device]:
            self.unplug(one.id)
        self.may_unplug(self.devices[id])
        self._take_out(self.devices.pop(id))
        self.taken_out()
        self._observers.emit("device", id, False)
        self.changed.notify_all()

    def unplug_all(self) -> None:
        """Take the devices out, the last first; vCPU threads have ended."""
        with self.life.lock:
            for plugged in reversed(self.devices.values()):
                self._take_out(plugged)

    def _take_out(self, plugged: PluggedDevice) -> None:
        try:
            with ExitStack() as end:
                end.callback(plugged.slot.close)
                if has(plugged.carrier, DetachingBus):
                    end.callback(plugged.carrier.detach, plugged.device)
                if "unplug" in plugged.abilities:
                    plugged.device.unplug()
        except FAULTS as error:  # one card's fault must not keep the others from giving back what they hold
            self.log.error("unplug failed", who=plugged.who, error=in_words(error))
