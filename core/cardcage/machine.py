"""The machine: built from a typed configuration, run by a thread per vCPU and one loop thread.

States and what holds in them::

    built     assembled, nothing ran yet; devices can be added, vCPU states set
    running   vCPU threads are in guest code or serving it; guest time runs
    paused    no vCPU is in guest code, guest time stands still; registers can be read and set
    stopped   has ended, with an outcome or a card's exception; memory and registers can still be read until ``close``

``start`` built -> running; ``pause`` running -> paused; ``resume`` paused -> running; ``reset`` running or paused,
which it stays; ``stop`` and each outcome: any -> stopped. A transition that fails leaves a machine that has not started
``built``, and stops any other with the error, which ``wait`` raises.

**The lock.** Device callbacks run under the machine's lock on whichever thread. Transitions take no lock: they are
carried out on the loop thread, one after another. What a device asks for (reset, power-off) is carried out after the
access that asked. A change of the RAM layout (``change_memory``) is made at once.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

from cardcage import outcome as outcomes
from cardcage.abilities import able
from cardcage.assembly import allow_end, blamed, create_vm, mediate, plug, plug_all
from cardcage.boot import load_boot, open_boot
from cardcage.bus import Bus
from cardcage.config import Config, DeviceConfig, Draft, Place
from cardcage.console import Console
from cardcage.errors import ConfigError, Denied, StateError
from cardcage.eventloop import EventLoop, MachineClock
from cardcage.events import Observers
from cardcage.gate import Gate
from cardcage.host import Host
from cardcage.memory import PhysicalMemory, RamRange
from cardcage.ops import MachineOps, ObservedOps
from cardcage.policy import attach_policies, detach_policies
from cardcage.provision import free_ram, provide_ram, publish, stats_of
from cardcage.runner import run_vcpu
from cardcage.security import OPERATOR, Mediator
from cardcage.wiring import Wiring

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from os import PathLike

    from cardcage.device import BootImage
    from cardcage.policy import AttachedPolicy, MemoryBalloon
    from cardcage.roster import Record
    from cardcage.slot import PluggedDevice
    from cardcage.vcpu import VCpu

__all__ = ["Machine"]


class Machine:
    """A virtual machine. The arguments are shorthand for a configuration; :meth:`from_config` takes a whole one.

    Args:
        kernel, initrd, append: keys of ``[boot]``.
        memory: bytes, or text such as ``"512M"``. cpus: 1 to 255. accel: names in the order to try, or one.
        devices: tables such as ``{"type": "debugcon", "port": 0xE9}``.
        machine, boot: further keys of ``[machine]`` and ``[boot]``.
        fragments: whole configuration fragments (``{"policy": ...}``), merged first.
        host: whose cards to use; by default a private one.

    Raises :exc:`~cardcage.errors.ConfigError`, CardError or HostError when it cannot be built; nothing is left then.
    Attributes that cards and callers use: ``config host memory vm irqchip vcpus lines pio mmio devices clock events
    console observers mediator label log state outcome accelerator policies balloon``.
    """

    def __init__(
        self,
        *,
        kernel: str | PathLike[str] | None = None,
        initrd: str | PathLike[str] | None = None,
        append: str | None = None,
        memory: int | str | None = None,
        cpus: int | None = None,
        accel: str | Iterable[str] | None = None,
        devices: Iterable[Mapping[str, Any]] = (),
        machine: Mapping[str, Any] | None = None,
        boot: Mapping[str, Any] | None = None,
        fragments: Iterable[Mapping[str, Any]] = (),
        host: Host | None = None,
    ) -> None:
        named = {"memory": memory, "cpus": cpus, "accel": accel if isinstance(accel, str | None) else list(accel)}
        files = {"kernel": kernel and str(kernel), "initrd": initrd and str(initrd), "append": append}
        keys = {**(machine or {}), **{key: value for key, value in named.items() if value is not None}}
        start = {**(boot or {}), **{key: value for key, value in files.items() if value is not None}}
        draft = Draft.of(*fragments, {"machine": keys, "device": [dict(one) for one in devices]})
        if start:
            draft.add({"boot": start})
        self._assemble(draft.config(), host)

    @classmethod
    def from_config(cls, config: Config, *, host: Host | None = None) -> Machine:
        """A machine from a checked configuration (:meth:`cardcage.config.Draft.config`)."""
        machine = cls.__new__(cls)
        machine._assemble(config, host)
        return machine

    @classmethod
    def from_toml(cls, path: str | PathLike[str], *, set: Iterable[str] = (), host: Host | None = None) -> Machine:
        """A machine from a TOML file, with ``key=value`` assignments on top."""
        draft = Draft()
        draft.add_file(str(path))
        for text in set:
            draft.set(text)
        return cls.from_config(draft.config(), host=host)

    # building

    def _assemble(self, config: Config, host: Host | None) -> None:
        self.config, self.name = config, config.machine.name
        self.host = host or Host(security=config.security)
        self.log = self.host.log.bind(machine=self.name)
        self.lock, self.state = threading.RLock(), "built"
        self.outcome: outcomes.Outcome | None = None
        self._failure: BaseException | None = None
        self._told = self._closed = False  # whether wait() has raised it, whether close() was called
        self._ended, self._ending = threading.Event(), threading.Lock()
        self.mediator, self.label = Mediator(), self.name  # until mediate() has asked the security cards
        self.observers = Observers(self.log, self._choose_ops)
        self.devices: dict[str, PluggedDevice] = {}
        self.vcpus: list[VCpu] = []
        self._threads: list[threading.Thread] = []
        self._loop_thread: threading.Thread | None = None
        self._cleanup = ExitStack()
        self.policies: list[AttachedPolicy] = []
        self.balloon: MemoryBalloon | None = None
        self.record: Record | None = None
        self.boot_image: BootImage | None = None
        self.boots_at_start = True  # not once a saved state was loaded
        try:
            self._build()
        except BaseException as error:
            self.dismantle()
            raise (self.host.blame(error) if isinstance(error, ConfigError) else error) from error.__cause__

    def _build(self) -> None:
        mediate(self, self._cleanup)
        self.memory = PhysicalMemory()
        self._cleanup.callback(free_ram, self)
        self.pio, self.mmio = Bus("pio", 16), Bus("mmio", 52)
        self.accelerator, self.vm, self.irqchip = create_vm(self)
        self._cleanup.callback(self.vm.close)
        provide_ram(self)
        self.gate = Gate(self._kick_all)
        self.wiring = Wiring(self.vm, self.irqchip, self.gate.wake)
        self.lines = self.wiring.lines
        self.events = EventLoop(self.name, self.deliver)
        self.clock = MachineClock(self.events)
        for close in (self.clock.close, self.events.close, self._unplug_all):
            self._cleanup.callback(close)
        self._loop_thread = self.events.thread
        self.console = Console(self.events.call_soon)
        self._choose_ops()
        self.vcpus = [self.vm.create_vcpu(index) for index in range(self.config.machine.cpus)]
        self.host.machines.append(self)
        with self.lock:
            plug_all(self)
        attach_policies(self)
        publish(self)
        self.boot_image = open_boot(self)

    def _allow(self, *permissions: str) -> None:
        self.mediator.check(OPERATOR, self.label, "machine", permissions, {"machine": self.name})

    def open_console(self, spec: str | dict[str, Any]) -> None:
        """Connect the console to a char back end (``"stdio"``). Raises ConfigError when no device has the console."""
        if not self.console.claimed:
            raise self.config.place("machine.console").error(
                'no device has the console: give a serial port char = "console", or leave machine.console at "none"'
            )
        owner = next(one for one in self.devices.values() if one.slot.has_console)
        place = self.config.place("machine.console")
        with self.lock:
            blamed(owner.who, place, lambda: self.console.connect(owner.slot.open_at("char", spec, place)))

    def add(self, type: str, /, **keys: Any) -> PluggedDevice:
        """Add a device before the machine starts: ``vm.add("virtio-blk", drive="scratch.qcow2")``.

        Raises StateError once it has started, ConfigError or CardError as a configuration would.
        """
        if self.state != "built":
            raise StateError(f"devices are added before the machine starts; it is {self.state}")
        self._allow("add")
        with self.lock:
            return plug(self, DeviceConfig.from_table({"type": type, **keys}, Place()))

    stats = stats_of

    # interrupts

    def add_controller(self, set_irq: Callable[[int, bool], None]) -> None:
        """For PIC and IOAPIC cards: ``set_irq(gsi, level)`` at each change of a line (not with irqchip ``full``)."""
        self.wiring.controllers.append(set_irq)

    def set_extint_source(self, acknowledge: Callable[[], int | None]) -> None:
        """For the PIC card: ``acknowledge()`` is the INTA cycle; it returns the vector, or None when there is none."""
        self.wiring.extint_source = acknowledge

    def set_extint(self, level: bool) -> None:
        """For the PIC card: drive its INTR output. Under the machine's lock."""
        self.wiring.set_extint(level)

    def add_eoi_listener(self, listener: Callable[[int], None]) -> None:
        """For the IOAPIC card: ``listener(vector)`` at each EOI broadcast of a local APIC (irqchip ``split``)."""
        self.wiring.eoi_listeners.append(listener)

    def inject_nmi(self, cpu: int = 0) -> None:
        """Send an NMI to vCPU *cpu*. Thread-safe."""
        self.mediator.check(OPERATOR, self.label, "interrupt", ("raise",), {"machine": self.name, "cpu": cpu})
        self.vm.inject_nmi(cpu)
        self.gate.wake()

    # the lock

    def _choose_ops(self) -> None:
        """vCPUs serve accesses through an object without any hook in it, unless somebody observes."""
        observed = self.observers.has("pio", "mmio")
        self.ops = ObservedOps(self) if observed else MachineOps(self)
        self._kick_all()  # the next run takes the new one

    def _kick_all(self) -> None:
        for vcpu in self.vcpus:
            vcpu.kick()

    def deliver(self, callback: Callable[[], None]) -> None:
        """A callback of a card, under the lock: of its timers and readers, or because a policy changed."""
        try:
            with self.lock:
                callback()
        except Denied as error:  # the act was refused before it was done: the guest goes on without
            self.log.warning("denied", why=str(error))
        except BaseException as error:  # a card's exception stops the machine, and is raised by wait()
            self.fail(error)

    def change_memory(self, add: tuple[RamRange, ...] = (), remove: tuple[RamRange, ...] = ()) -> None:
        """Change which RAM shows where (PAM, ROM) before the next instruction. Under the lock. Raises Denied."""
        self.mediator.check(self.label, self.label, "memory", ("map",), {"machine": self.name})
        with self.vm.quiesce():
            self.memory.change(add, remove)

    # requests of devices

    def request_reset(self, why: str = "", /) -> None:
        """The guest asked for a reset: carried out after the access."""
        if self.config.machine.on_reset == "stop":
            self.end(outcomes.Reset(why))
        else:
            self._hold(lambda: self._do_reset(why))

    def request_poweroff(self) -> None:
        """The guest powers itself off."""
        self.end(outcomes.PoweredOff())

    def request_panic(self, message: str, /) -> None:
        """The guest said that it panicked."""
        self.end(outcomes.Panicked(message))

    def request_debug_exit(self, code: int, /) -> None:
        """The guest ended with *code*, 0 to 255."""
        self.end(outcomes.DebugExit(code & 0xFF))

    def crash(self, cpu: int, detail: str) -> None:
        """A triple fault."""
        if self.config.machine.on_triple_fault == "reset":
            self._hold(lambda: self._do_reset(f"triple fault on cpu {cpu}"))
        else:
            self.end(outcomes.Crashed(cpu, detail))

    def debug_stop(self, cpu: int) -> None:
        """A breakpoint or single step: the machine pauses."""
        self.observers.emit("debug", cpu)
        self._hold(self._do_pause)

    def _hold(self, act: Callable[[], None]) -> None:
        """No vCPU runs another instruction until *act* was carried out on the loop thread."""
        self.gate.close(wait=False)
        self.events.post(lambda: self._guarded(act))

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:  # a card's, or the accelerator's: the machine cannot go on
            self.fail(error)

    # ends

    def end(self, outcome: outcomes.Outcome) -> None:
        """The machine has its outcome: the first one counts. Any thread, any lock."""
        # A guest whose memory the host took away sees zeros, and may crash before that is noticed.
        self._end(outcome, self.memory.fault())

    def fail(self, error: BaseException) -> None:
        """Stop with *error*, which :meth:`wait` and leaving the ``with`` raise. The first end counts. Any thread."""
        self._end(None, error)

    def _end(self, outcome: outcomes.Outcome | None, error: BaseException | None) -> None:
        with self._ending:
            if self.outcome is not None or self._failure is not None:
                return
            self.outcome, self._failure = outcome if error is None else None, error
        self.gate.end()
        self.events.post(lambda: self._do_stop(str(outcome) if error is None else f"{type(error).__name__}: {error}"))

    def _do_stop(self, why: str) -> None:
        self.gate.close()
        with self.lock:
            self.clock.pause()
        self._set_state("stopped")
        self.console.end(why)
        if self.outcome is not None:
            self.observers.emit("outcome", self.outcome)
        self._ended.set()

    def _set_state(self, state: str) -> None:
        self.state = state
        self.observers.emit("state", state)

    # transitions

    def _request(self, permission: str, states: tuple[str, ...], act: Callable[[], None]) -> None:
        """Carry *act* out on the loop thread; wait for it, except on the machine's own threads."""
        self._allow(permission)
        if self._closed or self.state not in states:
            raise StateError(f"cannot {permission}: the machine is {'closed' if self._closed else self.state}")
        done = threading.Event()
        problem: list[BaseException] = []

        def carry_out() -> None:
            try:
                if self.state in states:
                    act()
                else:
                    problem.append(StateError(f"cannot {permission}: the machine is {self.state}"))
            except BaseException as error:  # the caller's to hear, and the machine's end
                problem.append(error)
                if self.state != "built":
                    self.fail(error)
            done.set()

        if self.events.here:
            carry_out()
        else:
            self.events.post(carry_out)
            if threading.current_thread() in self._threads:
                return  # a vCPU's thread cannot wait until it is out itself
            done.wait()
        if problem:
            raise problem[0]

    def start(self) -> Machine:
        """Boot and run. Raises StateError unless built, ConfigError when what is to boot does not fit."""
        if threading.current_thread() is threading.main_thread():
            self.host.signals.verify()
        self._request("start", ("built",), self._do_start)
        return self

    def _do_start(self) -> None:
        if self.boot_image is not None and self.boots_at_start:
            load_boot(self)
        self._threads = [
            threading.Thread(target=run_vcpu, args=(self, vcpu), name=f"{self.name}-cpu{vcpu.index}", daemon=True)
            for vcpu in self.vcpus
        ]
        for thread in self._threads:
            thread.start()
        self._do_resume()

    def pause(self) -> None:
        """Bring all vCPUs out of guest code and stop guest time. Raises StateError unless running."""
        self._request("pause", ("running",), self._do_pause)

    def _do_pause(self) -> None:
        if self.state == "running":
            self.gate.close()
            with self.lock:
                self.clock.pause()
                for device in able(self.devices, "pause"):
                    device.pause()
            self._set_state("paused")

    def resume(self) -> None:
        """Go on after :meth:`pause`. Raises StateError unless paused."""
        if threading.current_thread() is threading.main_thread():
            self.host.signals.verify()
        self._request("resume", ("paused",), self._do_resume)

    def _do_resume(self) -> None:
        with self.lock:
            self.clock.resume()
            for device in able(self.devices, "pause"):
                device.resume()
        self._set_state("running")
        self.gate.open()

    def reset(self) -> None:
        """Put devices and vCPUs back, and boot again. Raises StateError unless running or paused."""
        self._request("reset", ("running", "paused"), lambda: self._do_reset("asked for by the host"))

    def _do_reset(self, why: str) -> None:
        if self.state not in ("running", "paused"):
            return
        self.gate.close()
        with self.lock:
            for device in able(self.devices, "reset"):
                device.reset()
        load_boot(self)
        self.observers.emit("reset", why)
        if self.state == "running":
            self.gate.open()

    def shutdown(self) -> None:
        """Press the power button (ACPI): the guest may power itself off. Raises StateError without one."""
        if self.state != "running":
            raise StateError(f"cannot shut down: the machine is {self.state}")
        if not (buttons := able(self.devices, "power-button")):
            raise StateError("no device of this machine has a power button; use stop()")
        self._allow("stop")
        self.events.call_soon(buttons[0].power_button)

    def stop(self, why: str = "") -> None:
        """End the machine now, as pulling the plug does. The outcome is Stopped, unless it has ended already."""
        self._allow("stop")
        self.end(outcomes.Stopped(why))
        if not self._on_own_thread():
            self._ended.wait()

    def _on_own_thread(self) -> bool:
        return threading.current_thread() in (*self._threads, self._loop_thread)

    def wait(self, timeout: float | None = None) -> outcomes.Outcome:
        """Wait for the end. Returns the outcome, :class:`~cardcage.outcome.TimedOut` after *timeout* seconds.

        An exception of a card, or of the accelerator, is raised here. Ctrl-C interrupts it.
        """
        if self.state == "built" and not self._ended.is_set():
            raise StateError("nothing to wait for: the machine was not started")
        if not self._ended.wait(timeout) and timeout is not None:
            return outcomes.TimedOut(timeout)
        if self._failure is not None:
            self._told = True
            raise self._failure
        if self.outcome is None:
            raise StateError("the machine was closed")
        return self.outcome

    def close(self) -> None:
        """Stop and give everything back: threads joined, devices unplugged, memory freed. Idempotent.

        Raises Denied when the operator may not destroy it; it then goes on.
        """
        allow_end(self)
        self.dismantle()

    def dismantle(self) -> None:
        """:meth:`close` without asking, for the host's own end."""
        if self._closed:
            return
        if self._on_own_thread():
            raise StateError("close() joins the machine's threads; call it from another one (stop() works from these)")
        self._closed = True
        self._cleanup.close()
        if self in self.host.machines:
            self.host.machines.remove(self)

    def _unplug_all(self) -> None:
        if self.state != "stopped":
            self.end(outcomes.Stopped("closed"))
            self._ended.wait()
        for thread in self._threads:
            thread.join()
        detach_policies(self)
        with self.lock:
            for plugged in reversed(self.devices.values()):
                try:
                    with closing(plugged.slot):
                        if "unplug" in plugged.abilities:
                            plugged.device.unplug()
                except Exception as error:  # one card's fault must not keep the others from giving back what they hold
                    self.log.error("unplug failed", device=plugged.id, error=repr(error))

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        failure = None if self._told else self._failure
        self.close()
        if failure is not None and error is None:
            raise failure

    def __repr__(self) -> str:
        return f"<Machine {self.name!r} {self.state}>"
