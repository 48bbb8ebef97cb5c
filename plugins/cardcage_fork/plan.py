"""Obstacles to a fork, found before anything stops."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cardcage.abilities import has
from cardcage.accelerator import AcceleratedVm
from cardcage.device import Forkable
from cardcage.errors import StateError

if TYPE_CHECKING:
    from cardcage.machine import Machine
    from cardcage.ram import RamBlock

__all__ = ["ForkableVm", "blocks_of", "holders", "refuse"]


class ForkableVm(AcceleratedVm, Protocol):
    """A VM of an accelerator whose memory and code can be another process's as well."""

    def may_fork(self) -> str:
        """In one line why that cannot be now; empty when it can."""

    def before_fork(self) -> None:
        """The process is about to fork; the VM is parked."""

    def after_fork(self, *, child: bool) -> None:
        """It has forked; still parked. Called in the child, and in the parent when it has made all its children."""


def blocks_of(machine: Machine) -> list[RamBlock]:
    """The blocks that the machine's RAM is of."""
    return list({id(one.block): one.block for one in machine.memory.ranges}.values())


def holders(machine: Machine) -> list[Any]:
    """Devices, back ends and checkers that have something to do in the new process."""
    found: list[Any] = []
    for plugged in machine.devices.values():
        found += [one for one in (*plugged.slot.host.opened, plugged.device) if has(one, Forkable)]
    return found + [one for one in machine.mediator.checkers if has(one, Forkable)]


def refuse(machine: Machine) -> None:
    """Raise StateError, in one line that names what is in the way; what a card raises (an admission policy); or do
    nothing."""
    if why := next(iter(_obstacles(machine)), ""):
        raise StateError(f"{machine.name} cannot be forked: {why}")


def _obstacles(machine: Machine) -> list[str]:
    if why := machine.why_not_parked():
        return [why]
    if not has(machine.vm, ForkableVm):
        return [f'the accelerator "{machine.accelerator.name}" keeps a machine in one process; "tcg" does not']
    found = [machine.vm.may_fork()]
    if shared(blocks_of(machine)):
        found.append(f"RAM of type {machine.config.memory.type} would be shared")
    for plugged in machine.devices.values():
        for backend in plugged.slot.host.opened:
            if not (plugged.slot.host.has_console and hasattr(backend, "expect")):  # the machine's own
                found.append(_backend(plugged.id, backend))
        if "fork" in plugged.abilities:
            found.append(plugged.device.may_fork())
        elif {"unplug", "needs"} & plugged.abilities:
            found.append(f"{plugged.who} holds something of the host, and does not say how a copy has it")
    for checker in machine.mediator.checkers:
        who = type(checker).__name__
        found.append(checker.may_fork() if has(checker, Forkable) else f"the security checker {who} is one process's")
    found += machine.host.phases.call("forking", machine)
    return [one for one in found if one]


def _backend(device: str, backend: Any) -> str:
    if not has(backend, Forkable):
        return f'a back end of device "{device}" ({type(backend).__name__}) does not say how a copy has it'
    return f'device "{device}": {why}' if (why := backend.may_fork()) else ""


def shared(blocks: list[RamBlock]) -> bool:
    """True where the writes of one process are seen by another that has the RAM from a fork (proc_pid_maps(5))."""
    text = Path("/proc/self/maps").read_text()
    for block in blocks:
        for found in re.finditer(r"^([0-9a-f]+)-([0-9a-f]+) ..(.)(.)", text, re.M):
            if int(found[1], 16) <= block.host_address < int(found[2], 16):
                if found[4] == "s":
                    return True
                break
    return False
