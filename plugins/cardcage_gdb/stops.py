"""How a machine stops for gdb, and what it is told of that.

All stops, always: while gdb has the machine stopped it is paused, and all its processors with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.errors import CardcageError, StateError
from cardcage.machine import State
from cardcage.security import HOST, OPERATOR, Act
from cardcage_qmp import Session

from cardcage_gdb.memory import Memory
from cardcage_gdb.points import Points
from cardcage_gdb.wire import hexadecimal

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.machine import Machine
    from cardcage.x86 import VCpuState
    from cardcage_qmp import Control

__all__ = ["Stops"]

SIGINT, SIGTRAP, SIGABRT = 2, 5, 6
WATCHES = {"write": b"watch", "read": b"rwatch", "access": b"awatch"}


class Stops:
    """A machine as gdb knows it.

    Args:
        control: the machine's monitor. go: lets a machine start that waits for gdb.

    Attributes:
        running: gdb waits to hear of a stop. ended: it wants no more. quiet: it wants no acknowledgements from now on.
    """

    def __init__(self, control: Control, go: Callable[[], None]) -> None:
        self._control, self._go = control, go
        self._session = Session(control)
        self._session.ready = True
        machine = control.machine
        self.running = self.ended = self.quiet = False
        self._mine = False
        self._early = machine.state is State.BUILT
        self._points = Points(machine)
        self._memory = Memory(machine)
        self._states: dict[int, VCpuState] = {}
        self._stopped: list[int] = []
        self._cpu = self._resumed = 0
        self._multi = self._says_why = self._described = False
        self._how = ["run"] * len(machine.vcpus)

    @property
    def machine(self) -> Machine:
        """The machine. Raises StateError once it is gone."""
        return self._control.machine

    def met(self, cpu: int) -> None:
        """*cpu* came out at a breakpoint or step; the machine is about to pause. On its thread."""
        self._stopped.append(cpu)

    # gdb comes and goes

    def attach(self) -> None:
        """gdb has come: the machine stops. Raises Denied."""
        machine = self.machine
        facts = {"machine": machine.name, "name": "gdb"}
        machine.mediator.check(Act(OPERATOR, machine.label, "management", ("reach",), facts))
        machine.mediator.ask(Act(OPERATOR, HOST, "management", ("command",), facts), "gdb")
        self._pause()

    def leave(self, *, resume: bool) -> None:
        """gdb has gone: nothing of it stays. A machine that it stopped goes on."""
        machine = self.machine
        if machine.state is State.RUNNING and (self._points.set or "run" not in self._how):
            self._pause()
            self._mine = True
        try:
            self._points.clear()
            self._direct(["run"] * len(self._how))
            if machine.state is State.PAUSED and (resume or self._mine):
                machine.resume()
        except CardcageError as error:
            machine.log.warning("what gdb left behind stays", error=str(error))

    def slipped(self) -> bool:
        """True when the machine has started since gdb came, and not because gdb said so."""
        found = self._early and not self.running and self.machine.state is State.RUNNING
        self._early = self._early and not found
        return found

    def catch(self) -> None:
        """Stop the machine that slipped away."""
        self._states.clear()
        self._pause()

    def _pause(self) -> None:
        machine = self.machine
        if machine.state is State.RUNNING:
            try:
                machine.pause()
                self._mine = True
            except StateError:  # it paused or ended meanwhile
                pass

    # stops

    def news(self) -> bytes | None:
        """The stop or the end that gdb waits for, once it has come."""
        if not self.running:
            return None
        machine = self.machine
        if machine.state is State.STOPPED:
            self.running = False
            return self._end()
        if machine.state is not State.PAUSED:
            return None
        self.running, self._mine = False, True
        self._states.clear()
        return self._stop()

    def _end(self) -> bytes:
        outcome = self.machine.outcome
        return b"W%02x" % (outcome.status & 0xFF) if outcome is not None else b"X%02x" % SIGABRT

    def _stop(self) -> bytes:
        """The stop that is told: of the first processor that met something."""
        stopped, self._stopped[:] = list(dict.fromkeys(self._stopped)), []
        if not stopped:
            return self._said(SIGINT)
        cpu = self._cpu = self._resumed = stopped[0]
        # A code breakpoint is met again by those that are not told of; what was watched would be missed.
        self._stopped += [one for one in stopped[1:] if self._points.watched(one)]
        return self._said(SIGTRAP, self._why(cpu))

    def _why(self, cpu: int) -> bytes:
        point = self._points.stop_of(cpu)
        if point is None:
            return b""
        if point[0] in WATCHES:
            return b"%b:%x;" % (WATCHES[point[0]], point[1])
        return self._points.word(point[1]) + b":;" if self._says_why else b""

    def _said(self, signal: int, why: bytes = b"") -> bytes:
        return b"T%02xthread:%b;%b" % (signal, self._thread(self._cpu), why)

    def _thread(self, cpu: int) -> bytes:
        return b"p01.%02x" % (cpu + 1) if self._multi else b"%02x" % (cpu + 1)

    def _cpu_of(self, text: bytes) -> int | None:
        """The processor of a thread's id; -1 for all, None for none."""
        process, dot, thread = text.rpartition(b".")
        if dot and process not in (b"p1", b"p01", b"p-1", b"p0"):
            return None
        if not dot and text[:1] == b"p":
            return -1 if text in (b"p1", b"p01", b"p-1", b"p0") else None
        if thread == b"-1":
            return -1
        number = hexadecimal(thread)
        if number is None or number > len(self._how):
            return None
        return number - 1 if number else self._cpu

    def _direct(self, how: list[str]) -> None:
        for cpu, (old, new) in enumerate(zip(self._how, how, strict=True)):
            if old != new:
                self._points.vm.set_stepping(cpu, new)
        self._how = how
