"""A machine's life: its states, the transitions between them, and its end. It knows no device.

**The lock.** Device callbacks run under the machine's lock on whichever thread. Transitions take no lock: they are
carried out on the loop thread, one after another. What a device asks for (reset, power-off) is carried out after the
access that asked.
"""

from __future__ import annotations

import threading
from enum import StrEnum
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from cardcage import outcome as outcomes
from cardcage._machine.console import Console
from cardcage._machine.eventloop import EventLoop, MachineClock
from cardcage._machine.faults import HELD, SPARED
from cardcage._machine.gate import Gate
from cardcage.errors import StateError
from cardcage.waiting import Event

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage._host.log import Log
    from cardcage._machine.faults import Faults
    from cardcage._machine.observers import Observers
    from cardcage.config import MachineConfig
    from cardcage.ram import RamBlock
    from cardcage.vcpu import VCpu

LOOK = 5.0
"""Seconds after which who waits for the end looks if the lock can be had."""


class State(StrEnum):
    """A machine's state; equal to its name as text."""

    BUILT = "built"
    """Assembled, nothing ran yet; devices can be added, vCPU states set."""
    RUNNING = "running"
    """vCPU threads are in guest code or serve it; guest time runs."""
    PAUSED = "paused"
    """No vCPU is in guest code, guest time stands still; registers can be read and set."""
    STOPPED = "stopped"
    """It has ended, with an outcome or an exception; memory and registers can be read until it is closed."""


class Steps(Protocol):
    """The board's part in transitions. Each is called on the loop thread, while no vCPU is in guest code."""

    @property
    def bootable(self) -> bool:
        """True when there is an image to boot."""

    def boot(self) -> None:
        """Load the boot image, if there is one, and set the vCPUs."""

    def show_firmware(self) -> None:
        """Map a ROM that was booted before."""

    def threads(self) -> list[threading.Thread]:
        """Make a thread for each vCPU."""

    def freeze(self) -> None:
        """The machine pauses. Under the lock."""

    def thaw(self) -> None:
        """It goes on. Under the lock."""

    def reset(self) -> None:
        """Put the devices back. Under the lock."""


class Life:
    """States, transitions and the end of one machine, with what they start and stop: loop thread, clock, gate, console.

    Args:
        vcpus: kicked out of guest code where a transition needs it; the machine adds to the list.
        fault: what took memory away under the guest, None when nothing did.
    """

    def __init__(
        self,
        config: MachineConfig,
        faults: Faults,
        observers: Observers,
        vcpus: list[VCpu],
        fault: Callable[[], BaseException | None],
    ) -> None:
        self.state = State.BUILT
        self.outcome: outcomes.Outcome | None = None
        self.failure: BaseException | None = None
        self.told = False  # wait() has raised the failure
        self._doomed: outcomes.Panicked | None = None
        self._closed = False
        self.lock = threading.RLock()
        self._config, self.faults, self._observers, self._vcpus, self._fault = config, faults, observers, vcpus, fault
        self._ended, self._ending = Event(), threading.RLock()
        self._threads: list[threading.Thread] = []
        self._steps: Steps | None = None
        self.gate = Gate(self.kick)
        self.loop = EventLoop(config.name, self.deliver)
        self.clock = MachineClock(self.loop)
        self.console = Console(self.loop.call_soon)
        self.waits = Waits(self, faults.log, observers)

    def bind(self, steps: Steps) -> None:
        """The board is complete: from now on the machine can start."""
        self._steps = steps

    @property
    def steps(self) -> Steps:
        """The board's part. Raises StateError while there is none."""
        if self._steps is None:
            raise StateError("the machine is not built yet")
        return self._steps

    def kick(self) -> None:
        """Bring all vCPUs out of guest code soon."""
        for vcpu in self._vcpus:
            vcpu.kick()

    def deliver(self, callback: Callable[[], None]) -> None:
        """Run a callback of a card under the lock: of its timers and readers, or because a policy changed."""
        try:
            with self.lock:
                began = monotonic()
                callback()
                if (held := monotonic() - began) > HELD:
                    self.faults.held(callback, held)
        except SPARED as error:  # the act was refused before it was done: the guest goes on without
            self.faults.spare(error, getattr(callback, "device", ""))
        except BaseException as error:  # a card's exception stops the machine, and is raised by wait()
            self.fail(error)

    # what vCPUs report

    def crash(self, cpu: int, detail: str) -> None:
        """A triple fault."""
        if self._config.on_triple_fault == "reset" and self._doomed is None:
            self.hold(lambda: self.do_reset(f"triple fault on cpu {cpu}"))
        else:
            self.end(outcomes.Crashed(cpu, detail))

    def request_reset(self, why: str = "") -> None:
        """The guest asked for a reset: carried out after the access."""
        if self._config.on_reset == "stop" or self._doomed is not None:
            self.end(outcomes.Reset(why))
        else:
            self.hold(lambda: self.do_reset(why))

    def debug_stop(self, cpu: int) -> None:
        """A breakpoint or single step: the machine pauses."""
        self._observers.emit("debug", cpu)
        self.hold(self.do_pause)

    def hold(self, act: Callable[[], None]) -> None:
        """No vCPU runs another instruction until *act* was carried out on the loop thread."""
        self.gate.close(wait=False)
        self.carry_out(act)

    def carry_out(self, act: Callable[[], None]) -> None:
        """Carry *act* out on the loop thread. Any thread."""

        def guarded() -> None:
            try:
                act()
            except BaseException as error:  # a card's, or the accelerator's: the machine cannot go on
                self.fail(error)

        self.loop.post(guarded)

    # ends

    def end(self, outcome: outcomes.Outcome, *, soon: bool = False) -> None:
        """The machine has its outcome: the first one counts. Any thread, any lock.

        A panic that comes *soon* stands for the next reset, and for whichever end but the host's.
        """
        if isinstance(outcome, outcomes.Panicked):
            if self._config.on_panic == "ignore":
                self.faults.log.warning("the guest panicked", message=outcome.message)
                return
            self._doomed = self._doomed or outcome
            if soon:
                return
        if self._doomed is not None and not isinstance(outcome, outcomes.Stopped):
            outcome = self._doomed
        # A guest whose memory the host took away sees zeros, and may crash before that is noticed.
        self._end(outcome, self._fault())

    def fail(self, error: BaseException) -> None:
        """Stop with *error*, which ``wait`` and leaving the ``with`` raise. The first end counts. Any thread."""
        self._end(None, error)

    def _end(self, outcome: outcomes.Outcome | None, error: BaseException | None) -> None:
        with self._ending:
            if self.outcome is not None or self.failure is not None:
                return
            self.outcome, self.failure = outcome if error is None else None, error
        self.gate.end()
        self.loop.post(lambda: self._do_stop(str(outcome) if error is None else f"{type(error).__name__}: {error}"))

    def _do_stop(self, why: str) -> None:
        self.gate.close()
        with self.lock:
            self.clock.pause()
        self._set_state(State.STOPPED)
        self.console.end(why, self.outcome.message if isinstance(self.outcome, outcomes.Panicked) else "")
        if self.outcome is not None:
            self._observers.emit("outcome", self.outcome)
        self._ended.set()

    def _set_state(self, state: State) -> None:
        self.state = state
        self._observers.emit("state", state)

    # transitions

    def transit(self, name: str, states: tuple[State, ...], act: Callable[[], None]) -> None:
        """Carry *act* out on the loop thread; wait for it, except on the machine's own threads.

        Raises StateError in other states than *states*, and what *act* raises. A transition that fails leaves a machine
        that has not started as it is, and stops any other with the error.
        """
        if self.state not in states:
            raise _why_not(self, name)
        done = Event()
        problem: list[BaseException] = []

        def carry_out() -> None:
            try:
                if self.state in states:
                    act()
                else:
                    problem.append(_why_not(self, name))
            except BaseException as error:  # the caller's to hear, and the machine's end
                problem.append(error)
                if self.state is not State.BUILT:
                    self.fail(error)
            done.set()

        if self.loop.here:
            carry_out()
        else:
            self.loop.post(carry_out)
            if threading.current_thread() in self._threads:
                return  # a vCPU's thread cannot wait until it is out itself
            done.wait()
        if problem:
            raise problem[0]

    def do_start(self, *, boot: bool) -> None:
        """Boot (unless the state that is there is to go on) and run, on the loop thread."""
        if not boot:
            self.steps.show_firmware()
        elif self.steps.bootable:
            self.steps.boot()
        self._threads = self.steps.threads()
        for thread in self._threads:
            thread.start()
        self.do_resume()

    def do_pause(self) -> None:
        """Bring all vCPUs out of guest code and stop guest time, on the loop thread."""
        if self.state is State.RUNNING:
            self.gate.close()
            with self.lock:
                self.clock.pause()
                self.steps.freeze()
            self._set_state(State.PAUSED)

    def do_resume(self) -> None:
        """Go on after a pause, on the loop thread."""
        self.waits.devices.clear()
        with self.lock:
            self.clock.resume()
            self.steps.thaw()
        self._set_state(State.RUNNING)
        self.gate.open()

    def do_reset(self, why: str) -> None:
        """Put devices and vCPUs back and boot again, on the loop thread; nothing once the machine has ended."""
        if self.state not in (State.RUNNING, State.PAUSED):
            return
        self.gate.close()
        self._doomed = None
        with self.lock:
            self.steps.reset()
        self.steps.boot()
        self._observers.emit("reset", why)
        if self.state is State.RUNNING:
            self.gate.open()

    # waiting

    @property
    def here(self) -> bool:
        """True on one of the machine's own threads."""
        return self.loop.here or threading.current_thread() in self._threads

    def await_end(self, timeout: float | None = None) -> bool:
        """Wait until the machine has stopped; False after *timeout* seconds. Who keeps it from all else is told of."""
        end = inf if timeout is None else monotonic() + timeout
        while not self._ended.wait(min(LOOK, max(end - monotonic(), 0))):
            if monotonic() >= end:
                return False
            self.faults.stuck(self.lock, (self.loop.thread, *self._threads))
        return True

    def watch(self, block: RamBlock) -> None:
        """Stop the machine, in words, when the host takes memory away under it."""

        def taken() -> None:
            if (error := block.fault()) is not None and block.watch is not None:
                self.loop.remove_reader(block.watch.fd)
                self.fail(error)

        if block.watch is not None:
            self.loop.add_reader(block.watch.fd, taken)

    def close(self) -> None:
        """End the loop thread and the clock. Idempotent."""
        self._closed = True
        self.loop.close()
        self.clock.close()

    def finish(self) -> None:
        """End a machine that has not, and wait for its vCPU threads. Not on the machine's own threads."""
        if self.state is not State.STOPPED:
            self.end(outcomes.Stopped("closed"))
            self.await_end()
        for thread in self._threads:
            thread.join()


class Waits:
    """Pauses that devices asked for: ``devices`` are those that wait, by id, and why. With the last of them gone the
    machine goes on. A pause of somebody else's (the operator, a breakpoint) stays; the operator's takes over.
    """

    def __init__(self, life: Life, log: Log, observers: Observers) -> None:
        self._life, self._log, self._observers = life, log, observers
        self.devices: dict[str, str] = {}

    def pause(self, who: str, why: str) -> None:
        """Pause the machine for device *who*. Any thread."""
        self._life.hold(lambda: self._pause(who, why))

    def _pause(self, who: str, why: str) -> None:
        if self._life.state is State.RUNNING or self.devices:
            self.devices[who] = why
            self._log.warning("machine paused", device=who, why=why)
            self._observers.emit("waiting", who, why)
            self._life.do_pause()

    def resume(self, who: str) -> None:
        """Device *who* no longer waits. Any thread."""
        self._life.carry_out(lambda: self._resume(who))

    def _resume(self, who: str) -> None:
        if self.devices.pop(who, None) is not None and not self.devices and self._life.state is State.PAUSED:
            self._log.warning("machine goes on", device=who)
            self._life.do_resume()

    def take_over(self) -> None:
        """The operator pauses, on the loop thread: what devices wait for does not end it."""
        self.devices.clear()
        self._life.do_pause()


class Power:
    """Requests that device *id* may make of its machine; satisfies :class:`~cardcage.device.Power`."""

    __slots__ = ("_id", "_life")

    def __init__(self, life: Life, id: str) -> None:
        self._life, self._id = life, id

    def reset(self, why: str = "", /) -> None:
        """The guest asked for a reset."""
        self._life.request_reset(why)

    def off(self) -> None:
        """The guest powers itself off."""
        self._life.end(outcomes.PoweredOff())

    def panic(self, message: str, /, *, soon: bool = False) -> None:
        """The guest said that it panicked."""
        self._life.end(outcomes.Panicked(message), soon=soon)

    def exit(self, code: int, /) -> None:
        """The guest ended with *code*, 0 to 255."""
        self._life.end(outcomes.DebugExit(code & 0xFF))

    def stop(self, why: str, /) -> None:
        """The host's side of the device asks for the end."""
        self._life.end(outcomes.Stopped(why))

    def pause(self, why: str, /) -> None:
        """Pause the machine until :meth:`resume`."""
        self._life.waits.pause(self._id, why)

    def resume(self) -> None:
        """The device no longer needs the pause that it asked for."""
        self._life.waits.resume(self._id)


def _why_not(life: Life, name: str) -> BaseException:
    """What keeps it from a transition: of one that failed before it was started, that."""
    if name == "start" and life.failure is not None:
        return life.failure
    return StateError(f"cannot {name}: the machine is {'closed' if life._closed else life.state}")
