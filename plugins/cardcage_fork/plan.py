"""Obstacles to a fork, found before anything stops."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from cardcage.abilities import has
from cardcage.accelerator import AcceleratedVm
from cardcage.device import Forkable
from cardcage.errors import StateError
from cardcage.security import Needs
from cardcage_jail import open_file

if TYPE_CHECKING:
    from cardcage.machine import Machine
    from cardcage.ram import RamBlock

__all__ = ["MOST", "ForkableVm", "blocks_of", "holders", "needs", "refuse"]

MOST = 1000
"""Copies at once, and of one machine that are alive in a jail."""


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


def needs(machine: Machine) -> Needs | None:
    """See :func:`cardcage_fork.cardcage_needs`: processes, unless :func:`refuse` would always refuse this machine."""
    return None if any(_for_good(machine)) else Needs(processes=MOST)


def _obstacles(machine: Machine) -> list[str]:
    if why := machine.why_not_parked():
        return [why]
    found = _for_good(machine)
    if found or not has(machine.vm, ForkableVm):
        return found
    found.append(machine.vm.may_fork())
    for plugged in machine.devices.values():
        for one in (*plugged.slot.host.opened, plugged.device):
            if has(one, Forkable) and (why := one.may_fork()):
                found.append(f'device "{plugged.id}": {why}' if one is not plugged.device else why)
    found += [one.may_fork() for one in machine.mediator.checkers if has(one, Forkable)]
    found += machine.host.phases.call("forking", machine)
    return [one for one in found if one]


def _for_good(machine: Machine) -> list[str]:
    """Obstacles that stay as long as the machine has these parts."""
    if not has(machine.vm, ForkableVm):
        return [f'the accelerator "{machine.accelerator.name}" keeps a machine in one process; "kvm" and "tcg" do not']
    found = [f"RAM of type {machine.config.memory.type} would be shared"] if shared(blocks_of(machine)) else []
    for plugged in machine.devices.values():
        host = plugged.slot.host
        for one in host.opened:
            if not has(one, Forkable) and not (host.has_console and hasattr(one, "expect")):  # the machine's own
                who = type(one).__name__
                found.append(f'a back end of device "{plugged.id}" ({who}) does not say how a copy has it')
        if "fork" not in plugged.abilities and {"unplug", "needs"} & plugged.abilities:
            found.append(f"{plugged.who} holds something of the host, and does not say how a copy has it")
    for checker in machine.mediator.checkers:
        if not has(checker, Forkable):
            found.append(f"the security checker {type(checker).__name__} is one process's")
    return found


_shared: WeakKeyDictionary[RamBlock, bool] = WeakKeyDictionary()
"""Blocks that were looked for: their mappings stay what they are, and translated code is in a thousand others."""


def shared(blocks: list[RamBlock]) -> bool:
    """True where the writes of one process are seen by another that has the RAM from a fork (proc_pid_maps(5))."""
    if unknown := [one for one in blocks if one not in _shared]:
        with open("/proc/self/maps", opener=open_file) as file:  # of a copy, too, which may not open it
            rows = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ..(.)(.)", file.read(), re.M)
        for block in unknown:
            of = (kind for low, high, _, kind in rows if int(low, 16) <= block.host_address < int(high, 16))
            _shared[block] = next(of, "p") == "s"
    return any(_shared[one] for one in blocks)
