"""The machine: the face of what runs a guest.

A machine has a *life* (its states, transitions and end; :class:`State` says what holds in each) and a *board* (buses,
memory, lines, processors, devices). ``start`` built -> running; ``pause`` running -> paused; ``resume`` paused ->
running; ``reset`` running or paused, which it stays; ``stop`` and each outcome: any -> stopped. A transition that fails
leaves a machine that has not started ``built``, and stops any other with the error, which ``wait`` raises.

Device callbacks run under the machine's lock on whichever thread. Transitions take no lock: they are carried out on the
loop thread, one after another. A device's requests (reset, power-off) are carried out after the access that asked.
"""

from __future__ import annotations

import sys
import threading
import warnings
from contextlib import ExitStack
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import ref

from attrs import evolve

from cardcage import outcome as outcomes
from cardcage._config.places import Place, placed
from cardcage._host.discovery import announced
from cardcage._machine import building
from cardcage._machine.board import Board
from cardcage._machine.faults import MISTAKES, Faults
from cardcage._machine.life import Life, State
from cardcage._machine.observers import Observers
from cardcage._machine.parking import Parking
from cardcage._machine.plugged import PluggedDevice, able
from cardcage._machine.plugging import Plugging, restate
from cardcage.abilities import has
from cardcage.config import Config, DeviceConfig, Draft
from cardcage.device import HotplugBus
from cardcage.errors import FAULTS, CardError, ConfigError, EjectTimeout, GuestError, StateError, in_words, near
from cardcage.host import Host
from cardcage.memory import PhysicalMemory
from cardcage.registry import VerbOffer
from cardcage.security import OPERATOR, Act, Mediator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from os import PathLike
    from typing import Self

    from cardcage.vcpu import VCpu

__all__ = ["GuestFailed", "Machine", "Observers", "PluggedDevice", "State", "reconfigure", "rename"]


class GuestFailed(GuestError):
    """A machine, by name, ended with an *outcome* that it should not have (``wait(check=True)``), and these words."""

    def __init__(self, machine: str, outcome: outcomes.Outcome) -> None:
        self.machine, self.outcome = machine, outcome
        super().__init__(f"{machine}: {outcome}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.machine, self.outcome)


def _dropped(machine: Machine) -> None:
    """Warn of an open machine that nobody holds any more, and close it.

    The collector calls from any thread, whatever that holds or is in the middle of: threads are joined by another.
    """
    if getattr(machine, "_closed", True) or sys.is_finalizing():
        return
    what = f"unclosed {machine!r}: use it in a with block, or close() it"
    threading.Thread(target=machine.dismantle, name=f"{machine.name}-dropped", daemon=True).start()
    machine.log.warning("nobody holds the machine any more: it is closed")
    warnings.warn(what, ResourceWarning, stacklevel=2, source=machine)


MAKERS = "cardcage.makers"  # entry points: ways to make a machine, functions whose first argument is the class


class _Makers(type):
    """Finds the ways to make a machine that are announced, as attributes of the class.

    They are no offers: a host would load all cards, and a card that has imported Machine is asked for hooks meanwhile.
    """

    if not TYPE_CHECKING:  # types come with the card: a face of the class that has its verbs

        def __getattr__(cls, name: str) -> Any:
            found = [] if name.startswith("_") else announced(MAKERS)
            for one in (one for one in found if one.name == name):
                try:
                    return one.load().__get__(cls)
                except FAULTS as error:
                    raise CardError(f"maker {name!r} ({one.project} {one.version}): {in_words(error)}") from error
            hint = near(name, [one.name for one in found])
            raise AttributeError(f"the class Machine has no attribute {name!r}, and no card makes one.{hint}")


def _said(self: Machine) -> str:
    return f"<Machine {self.name!r} {self.state}>"


def _awaited(self: Machine, timeout: float | None) -> outcomes.Outcome:
    life = self._life
    if self.state is State.BUILT and not life.await_end(0):
        raise StateError("nothing to wait for: the machine was not started")
    if not life.await_end(timeout) and timeout is not None:
        return outcomes.TimedOut(timeout)
    if life.failure is not None:
        life.told = True
        raise life.failure
    if life.outcome is None:
        raise StateError("the machine was closed")
    return life.outcome


class Machine(Parking, metaclass=_Makers):
    """A virtual machine. The arguments are shorthand for a configuration; :meth:`from_config` takes a whole one.

    Args:
        name: of the machine; a number is added to one that is taken. kernel, initrd, append: keys of ``[boot]``.
        memory: bytes, or text such as ``"512M"``. cpus: 1 to 255. accel: names in the order to try, or one.
        devices: tables such as ``{"type": "debugcon", "port": 0xE9}``.
        machine, boot: further keys of ``[machine]`` and ``[boot]``.
        fragments: whole configuration fragments (``{"policy": ...}``), merged first.
        host: whose cards to use; by default a private one.

    Raises :exc:`~cardcage.errors.ConfigError`, CardError or HostError when it cannot be built; nothing is left then.
    One that is dropped without :meth:`close` is closed with a ResourceWarning.
    Attributes that cards and callers use: ``config name host log mediator label observers memory_backend accelerator
    vm irqchip memory vcpus pio mmio lines devices services clock loop console lock state outcome waiting`` (devices
    that paused it, by id, and why). Nobody but the machine sets them.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
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
        named = {
            "name": name,
            "memory": memory,
            "cpus": cpus,
            "accel": accel if isinstance(accel, str | None) else list(accel),
        }
        files = {"kernel": kernel and str(kernel), "initrd": initrd and str(initrd), "append": append}
        keys = {**(machine or {}), **{key: value for key, value in named.items() if value is not None}}
        start = {**(boot or {}), **{key: value for key, value in files.items() if value is not None}}
        draft = Draft.of(*fragments, {"machine": keys, "device": [dict(one) for one in devices]})
        if start:
            draft.add({"boot": start})
        self._assemble(draft.config(), host)

    @classmethod
    def from_config(cls, config: Config, *, host: Host | None = None) -> Self:
        """A machine from a checked configuration (:meth:`cardcage.config.Draft.config`)."""
        machine = cls.__new__(cls)
        machine._assemble(config, host)
        return machine

    @classmethod
    def from_toml(cls, path: str | PathLike[str], *, set: Iterable[str] = (), host: Host | None = None) -> Self:
        """A machine from a TOML file, with ``key=value`` assignments on top."""
        draft = Draft()
        draft.add_file(str(path))
        for text in set:
            draft.set(text)
        return cls.from_config(draft.config(), host=host)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            host = None if name.startswith("_") else vars(self).get("host")  # None while it is being made
            verbs = {one.name: one for one in host.registry.offers(VerbOffer)} if host else {}
            if name not in verbs:
                raise AttributeError(f"a machine has no attribute {name!r}, and no card offers it.{near(name, verbs)}")
            return verbs[name].load().__get__(self)

    # building

    def _assemble(self, config: Config, host: Host | None) -> None:
        self.config, self.name = config, config.machine.name
        self._standard: list[DeviceConfig] | None = None  # the platform's own devices, once they are all there
        self.host = host or Host(security=config.security)
        self.log = self.host.log.bind(machine=self.name)
        faults = Faults(self.log, self.host.cards)
        self.observers = Observers(self.log, faults)
        self.memory = PhysicalMemory()
        self.vcpus: list[VCpu] = []
        self.mediator, self.label = Mediator(), self.name  # until the security cards were asked
        self._closed = self.is_parked = False
        self._end = ExitStack()
        self._life = Life(config.machine, faults, self.observers, self.vcpus, self.memory.fault)
        self.lock, self.clock = self._life.lock, self._life.clock
        self.loop, self.console, self.waiting = self._life.loop, self._life.console, self._life.waits.devices
        with self.host.signals.held():
            try:
                self._build()
            except BaseException as error:
                self.dismantle()
                raise (self.host.blame(error) if isinstance(error, ConfigError) else error) from error.__cause__
        self.host.tell_broken()

    def _build(self) -> None:
        """In this order: security, admission, the VM, RAM, processors, devices, the boot image, the other cards."""
        config, host, life, end = self.config, self.host, self._life, self._end
        end.callback(life.close)
        self.mediator, self.label = building.mediate(host, config, self.log, life.deliver, end)
        building.check_policy_keys(host, config)
        platform = building.make_platform(host, config)
        self.memory_backend = building.make_memory_backend(host, config, self.mediator, self.label, self.log)
        self.accelerator = building.choose_accelerator(host, config)
        host.phases.call("admit", self)
        config = self.config  # renamed, perhaps
        end.callback(self.memory.close)
        self.vm, self.irqchip = building.create_vm(host, config, self.mediator, self.label, self.accelerator, self.log)
        end.callback(self.vm.close)
        spans = platform.ram(config.machine.memory)
        block = building.allocate_ram(self.memory_backend, config)
        self.memory.add(*building.ranges_of(block, spans))  # the space owns the block from here on
        self.memory.attach(self.vm)
        self.memory.report_to(self.vm)
        life.watch(block)
        self._board = board = Board(
            *(self.name, self.label, self.mediator, self.log),
            life=life,
            observers=self.observers,
            vm=self.vm,
            irqchip=self.irqchip,
            memory=self.memory,
            spans=spans,
            reserved=platform.reserved,
            vcpus=self.vcpus,
        )
        end.callback(life.close)
        end.callback(board.unplug_all)
        self.pio, self.mmio, self.lines = board.pio, board.mmio, board.lines
        self.devices, self.services = board.devices, board.services
        self.vcpus += [self.vm.create_vcpu(index) for index in range(config.machine.cpus)]
        host.add(self)
        self._plugging = Plugging(host, board)
        with self.lock:
            self._plugging.plug_all(standard := building.platform_devices(platform, config), config.devices)
        self._standard, here = standard, ref(self)  # the board does not keep the machine
        board.taken_out = lambda: restate(here())
        if config.machine.console != "none":
            self.open_console(config.machine.console)
        board.insert(building.open_boot(host, config, self.mediator, self.label))
        life.bind(board)
        end.callback(partial(host.phases.each, "closing", self, self.log))
        host.phases.call("built", self)

    def open_console(self, spec: str | dict[str, Any]) -> None:
        """Connect the console to a char back end (``"stdio"``). Raises ConfigError when no device has the console."""
        place = self.config.place("machine.console")
        if not self.console.claimed:
            raise place.error(
                'no device has the console: give a serial port char = "console", or leave machine.console at "none"'
            )
        owner = next(one for one in self.devices.values() if one.slot.host.has_console)
        with self.lock:
            backend = place.blamed(owner.who, lambda: owner.slot.host.open("char", placed(spec, place)))
            place.blamed(owner.who, lambda: self.console.connect(backend))

    def add(self, type: str, /, **keys: Any) -> PluggedDevice:
        """Add a device: ``vm.add("virtio-blk", drive="scratch.qcow2")``. A guest that runs is told of it (hot-plug).

        Raises StateError once the machine has ended, or where its bus tells no guest; ConfigError or CardError as a
        configuration would.
        """
        self._allow("add")
        with self.lock:
            if self.outcome is not None or self._life.failure is not None:
                raise StateError("a machine that has ended takes no more devices")
            plugged = self._plugging.plug(DeviceConfig.from_table({"type": type, **keys}, Place()))
            restate(self)
            self.observers.emit("device", plugged.id, True)
        return plugged

    def remove(self, id: str, /, *, timeout: float = 30) -> None:
        """Take device *id* out. A guest that runs is asked to let go of it, and has *timeout* seconds.

        It may still let go later. Raises :exc:`~cardcage.errors.EjectTimeout` when it has not; StateError for a device
        that is not there or cannot be taken out, while the machine is paused, and when it ends meanwhile; Denied.
        """
        self._allow("add")
        board, life = self._board, self._life
        with self.lock:
            if (plugged := self.devices.get(id)) is None:
                raise StateError(f'this machine has no device "{id}".{near(id, self.devices)}')
            if not has(plugged.carrier, HotplugBus):
                raise StateError(f'device "{id}" cannot be taken out: it is on no bus whose devices come and go')
            if self.state not in (State.BUILT, State.RUNNING):
                raise StateError(f'device "{id}" cannot be taken out while the machine is {self.state}')
            board.may_unplug(plugged)
            if self.state is State.BUILT:
                board.unplug(id)
                return
            if life.here:
                raise StateError("remove() waits for the guest; call it from a thread that is not the machine's")
            plugged.carrier.request_removal(plugged.device)
            end = monotonic() + timeout
            while self.devices.get(id) is plugged:
                if life.await_end(0):
                    raise StateError(f'the machine ended before device "{id}" was taken out')
                if (left := end - monotonic()) <= 0:
                    raise EjectTimeout(f'device "{id}": the guest did not let go of it within {timeout:g} seconds')
                board.changed.wait(min(left, 0.5))  # the machine's end notifies nobody

    def defer(self, callback: Callable[[], object], /) -> None:
        """Call *callback* once the machine is closed, or could not be built: what was deferred last is called first.

        What a card defers in ``cardcage_admit`` is called when RAM has been given back already; what it defers later,
        while the machine still has its devices, but no running vCPU.
        """
        self._end.callback(callback)

    def _allow(self, permission: str) -> None:
        self.mediator.check(Act(OPERATOR, self.label, "machine", (permission,), {"machine": self.name}))

    # life

    @property
    def state(self) -> State:
        """Built, running, paused or stopped."""
        return self._life.state

    @property
    def outcome(self) -> outcomes.Outcome | None:
        """How it ended; None before that, and where an exception ended it."""
        return self._life.outcome

    def inject_nmi(self, cpu: int = 0) -> None:
        """Send an NMI to vCPU *cpu*. Thread-safe."""
        self.mediator.check(Act(OPERATOR, self.label, "interrupt", ("raise",), {"machine": self.name, "cpu": cpu}))
        self.vm.inject_nmi(cpu)
        self._life.gate.wake()

    def fail(self, error: BaseException) -> None:
        """Stop with *error*, which :meth:`wait` and leaving the ``with`` raise. The first end counts. Any thread.

        A :exc:`~cardcage.memory.GuestMemoryError` is a guest's doing: it is logged, and the machine goes on.
        """
        if isinstance(error, MISTAKES):
            self._life.faults.spare(error)
        else:
            self._life.fail(error)

    def start(self, *, boot: bool = True) -> Self:
        """Boot and run. Raises StateError unless built, ConfigError when what is to boot does not fit.

        Args:
            boot: False to go on from the state that the processors, devices and memory were given.
        """
        if threading.current_thread() is threading.main_thread():
            self.host.signals.verify()
        self._allow("start")
        if self.state is State.BUILT:
            self.host.phases.call("starting", self)
        self._life.transit("start", (State.BUILT,), partial(self._life.do_start, boot=boot))
        return self

    def pause(self) -> None:
        """Bring all vCPUs out of guest code and stop guest time. Raises StateError unless running, or waiting."""
        self._allow("pause")
        states = (State.RUNNING, State.PAUSED) if self.waiting else (State.RUNNING,)
        self._life.transit("pause", states, self._life.waits.take_over)

    def resume(self) -> None:
        """Go on after :meth:`pause`. Raises StateError unless paused."""
        if threading.current_thread() is threading.main_thread():
            self.host.signals.verify()
        self._allow("resume")
        self._life.transit("resume", (State.PAUSED,), self._life.do_resume)

    def reset(self) -> None:
        """Put devices and vCPUs back, and boot again. Raises StateError unless running or paused."""
        self._allow("reset")
        states = (State.RUNNING, State.PAUSED)
        self._life.transit("reset", states, partial(self._life.do_reset, "asked for by the host"))

    def shutdown(self, timeout: float | None = None) -> None:
        """Press the power button (ACPI): the guest may power itself off.

        Args:
            timeout: wait so many seconds for the end, then :meth:`stop`; a guest that would not hear the button is
                stopped at once. By default, nobody waits.

        Raises StateError unless it runs; without *timeout*, also for a machine that has no power button.
        """
        if self.state is not State.RUNNING:
            raise StateError(f"cannot shut down: the machine is {self.state}")
        buttons = able(self.devices, "power-button")
        if timeout is not None and not any(getattr(one, "button_enabled", True) for one in buttons):
            return self.stop("the guest does not hear a power button")
        if not buttons:
            raise StateError("no device of this machine has a power button; use stop()")
        self._allow("stop")
        self.loop.call_soon(buttons[0].power_button)
        if timeout is not None and not self._life.await_end(timeout):
            self.stop(f"the guest did not power off within {timeout:g} s")
        return None

    def stop(self, why: str = "") -> None:
        """End the machine now, as pulling the plug does. The outcome is Stopped, unless it has ended already."""
        self._allow("stop")
        self._life.end(outcomes.Stopped(why))
        if not self._life.here:
            self._life.await_end()

    def wait(self, timeout: float | None = None, *, check: bool = False) -> outcomes.Outcome:
        """Wait for the end. Returns the outcome, :class:`~cardcage.outcome.TimedOut` after *timeout* seconds.

        Args:
            check: raise :exc:`GuestFailed` for a panic, a crash, a debug exit with another code than 0, and TimedOut.

        An exception of a card, or of the accelerator, is raised here. Ctrl-C interrupts it.
        """
        found = _awaited(self, timeout)
        if check and (found.code if isinstance(found, outcomes.DebugExit) else found.status):
            raise GuestFailed(self.name, found)
        return found

    # its end

    def close(self) -> None:
        """Stop and give everything back: threads joined, devices unplugged, memory freed. Idempotent.

        Raises Denied when the operator may not destroy it; it then goes on.
        """
        if not self._closed:
            self._allow("destroy")
            for one in self.devices.values():
                facts = {"machine": self.name, "device": one.id}
                self.mediator.check(Act(self.label, one.slot.label, "device", ("detach",), facts))
        self.dismantle()

    def dismantle(self) -> None:
        """:meth:`close` without asking, for the host's own end."""
        if self._closed:
            return
        if self._life.here:
            raise StateError("close() joins the machine's threads; call it from another one (stop() works from these)")
        with self.host.signals.held():
            self._closed = True
            self._life.finish()
            try:
                self._end.close()
            finally:
                self.host.forget(self)

    __del__ = _dropped
    __repr__ = _said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        failure = None if self._life.told else self._life.failure
        self.close()
        if failure is not None and error is None:
            raise failure


def rename(machine: Machine, name: str) -> None:
    """Call *machine* something else: for a card that tells machines apart, in ``cardcage_admit`` or ``_forked``.

    Its label is the new name where nobody gave it one. Raises StateError once something was made in its name.
    """
    if "vm" in vars(machine) and not machine.is_parked:
        raise StateError(f"{machine.name}: a machine is renamed while it is admitted, not later")
    for one in machine.devices.values() if machine.is_parked else ():
        one.slot.machine = one.slot._asking.machine = name
    if machine.config.machine.label is None and not machine.mediator.checkers:
        machine.label = name
    machine.name = name
    machine.config = evolve(machine.config, machine=evolve(machine.config.machine, name=name))
    machine.log.add(machine=name)


def reconfigure(machine: Machine, id: str, **options: Any) -> None:
    """Note that device *id* has these options now, as its card has changed it: what is built from the machine's
    configuration later has them too. Not for the platform's own devices. Under the machine's lock."""
    plugged = machine.devices[id]
    plugged.config = evolve(plugged.config, options={**plugged.config.options, **options})
    restate(machine)
