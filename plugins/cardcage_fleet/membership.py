"""A machine's membership: admitted, put on the roster, answering there, and taken off it at its end."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from cardcage.errors import HostError, StateError
from cardcage.machine import rename
from cardcage.security import OPERATOR, Act, Needs
from cardcage.units import say_size
from cardcage_jail import is_inside, listen_at

from cardcage_fleet import ControlOffer, SessionOffer
from cardcage_fleet.admission import Starter, admissions, rooms_of
from cardcage_fleet.hostmemory import MemoryGroup, memory_limits, own_memory_group
from cardcage_fleet.roster import BROKERS, Roster, RosterEntry, pid_namespace
from cardcage_fleet.rundir import run_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage.host import Host
    from cardcage.machine import Machine

    from cardcage_fleet.control import Door
    from cardcage_fleet.roster import Record

__all__ = ["admit", "forked", "forking", "publish", "record_of"]

UNSEEN = "not on the roster: cardcage stats will not show this machine"


def _records(host: Host) -> WeakKeyDictionary[Machine, Record]:
    found: WeakKeyDictionary[Machine, Record] = host.share("fleet:records", WeakKeyDictionary)
    return found


def record_of(machine: Machine) -> Record | None:
    """The machine's record on the roster; None where no roster can be kept."""
    return _records(machine.host).get(machine)


def admit(machine: Machine) -> None:
    """Let the machine in: it is on the roster then, until it has given its RAM back.

    Raises ConfigError when a policy refuses or all of RAM is wanted at once and is not there, HostError when a policy
    is to be asked and there is no roster.
    """
    check_preallocation(machine)
    policies = admissions(machine)
    _enroll(machine, policies, machine.log.warning if "machine.name" in machine.config.origins else machine.log.info)


def _enroll(machine: Machine, policies: Sequence[Callable[..., None]], say: Callable[..., None]) -> None:
    with ExitStack() as held:
        try:
            roster = Roster(known=machine.host.share("fleet:known", dict))
            held.enter_context(roster.locked())
            alive, ended, _ = roster.read()
        except (HostError, OSError) as error:
            if policies:
                raise HostError(f"admission needs to know the other machines: {error}") from error
            machine.log.warning(UNSEEN, reason=str(error))
            return
        roster.tidy(ended)
        tell_apart(machine, {one.name for one in alive}, say)
        entry = entry_of(machine)
        _ask(policies, entry, alive)
        try:
            record = roster.add(entry)
        except OSError as error:  # a full disk, or a limit of file sizes
            if policies:
                raise HostError(f"admission needs to put the machine on the roster: {error}") from error
            machine.log.warning(UNSEEN, reason=str(error))
            return
        _records(machine.host)[machine] = record
        machine.defer(record.close)


def _enroll_copy(machine: Machine, parent: Record) -> bool:
    """Put a copy on the roster; False where that cannot be, which the log tells.

    It has the number of its process in its name, and its entry beside its parent's: so nothing need be known of other
    machines, which a process in its jail does not, and whose files take a new process long to read. Raises OSError in a
    jail, where nobody could find the copy otherwise.
    """
    facts: dict[str, Any] = {} if is_inside() else {"namespace": pid_namespace(), "oom_kills": _kills(parent.entry)}
    facts |= {"name": machine.name, "pid": os.getpid(), "label": machine.label, "since": time.time(), "balloon": False}
    try:
        record = parent.copy(facts)
    except OSError as error:
        if is_inside():
            raise
        machine.log.warning(UNSEEN, reason=str(error))
        return False
    _records(machine.host)[machine] = record
    machine.defer(record.close)
    return True


def _kills(entry: RosterEntry) -> int:
    """How many processes of an entry's cgroup the OOM killer has ended by now; -1 for unknown."""
    if not entry.group_version:
        return -1
    kills = MemoryGroup(entry.group, Path(entry.group_folder), entry.group_version).oom_kills()
    return -1 if kills is None else kills


def _ask(policies: Sequence[Callable[..., None]], entry: RosterEntry, alive: list[RosterEntry]) -> None:
    rooms = rooms_of(memory_limits(), alive) if policies else ()
    for ask in policies:
        ask(Starter(entry.name, entry.promised, entry.priority), rooms)


def forking(machine: Machine) -> None:
    """Ask the admission policies about one machine more. Raises ConfigError when one refuses, StateError in a jail."""
    if policies := admissions(machine):
        if is_inside():
            raise StateError(
                f"{machine.name} cannot be forked: admission policies need to know the other machines, which a process "
                'in its jail does not (security.jail = "off")'
            )
        roster = Roster(known=machine.host.share("fleet:known", dict))
        with roster.locked():
            _ask(policies, entry_of(machine), roster.read()[0])


def forked(machine: Machine) -> None:
    """This is a forked process: its machine has an entry and a door of its own, under a name that nobody has. The guest
    need not wait for them: it takes more time than all else."""
    record = _records(machine.host).pop(machine, None)
    if record is None:
        return
    if (door := _doors(machine.host).pop(machine, None)) is not None:
        door.abandon()
    if (fd := record.abandon()) >= 0:
        machine.loop.remove_reader(fd)
    rename(machine, f"{machine.name}-{os.getpid()}")

    def enroll() -> None:
        if _enroll_copy(machine, record):
            _publish(machine, answers=door is not None)

    later: list[Callable[[], object]] = machine.host.share("fork:later", list)  # see cardcage_fork.process
    later.append(enroll)


def _doors(host: Host) -> WeakKeyDictionary[Machine, Door]:
    found: WeakKeyDictionary[Machine, Door] = host.share("fleet:doors", WeakKeyDictionary)
    return found


def tell_apart(machine: Machine, taken: set[str], say: Callable[..., None]) -> None:
    """Give the machine a name that no other of this account has: a number is added, and said by *say*.

    Commands find machines by their names, and network cards have MAC addresses made from them.
    """
    name, number = machine.name, 2
    if name not in taken:
        return
    while f"{name}-{number}" in taken:
        number += 1
    rename(machine, f"{name}-{number}")
    say("another machine of this account has the name: a number is added", name=name)


def check_preallocation(machine: Machine) -> None:
    """Refuse RAM that is to be taken at once (``memory.preallocate``) and is not there: the host would kill for it."""
    wanted = machine.config.machine.memory
    if not machine.config.memory.preallocate or not machine.memory_backend.takes_ram:
        return
    room = min(memory_limits(), key=lambda one: one.available)
    if wanted > room.available:
        raise machine.config.place("memory.preallocate").error(
            f"{say_size(wanted)} cannot be allocated at once: {room.name} has {say_size(room.available)} left of "
            f"{say_size(room.size)}"
        )


def publish(machine: Machine) -> None:
    """Say on the roster where its RAM is and what becomes of the machine, and answer for it there."""
    record = record_of(machine)
    if record is None:
        return
    group = group_facts()  # again: a policy may have moved the process
    block = machine.memory.ranges[0].block
    chosen = machine.accelerator
    record.update(start=block.host_address, accelerator=chosen.name, code=chosen.probe.code_memory, **group)
    names = machine.host.registry.names
    _publish(machine, answers=bool(names(ControlOffer) or names(SessionOffer)))


def _publish(machine: Machine, *, answers: bool) -> None:
    record = _records(machine.host)[machine]
    machine.observers.add("state", lambda state: record.update(state=str(state)))
    if answers:
        from cardcage_fleet.control import Door  # most machines have no command to hear

        door = _doors(machine.host)[machine] = Door(machine, record.entry)
        machine.defer(door.close)
    balloon = machine.services.get("balloon")
    if balloon is not None:
        # Not the machine: the loop thread would keep one that nobody else holds.
        facts = {"machine": machine.name, "name": "stats"}
        mediator, act = machine.mediator, Act(OPERATOR, machine.label, "management", ("reach",), facts)

        def told() -> dict[str, int]:
            mediator.check(act)
            report = balloon.report
            available = report.values.get("available_memory") if report is not None else None
            return {"ballooned": balloon.size, **({"available": available} if available is not None else {})}

        machine.loop.add_reader(record.listen().fileno(), lambda: record.answer(told))


def needs(machine: Machine) -> Needs:
    """See :func:`cardcage_fleet.cardcage_needs`."""
    record = record_of(machine)
    if record is None:
        return Needs()
    with suppress(OSError, HostError):  # then files are lent nowhere
        run_directory(BROKERS)
        place = os.path.abspath(record.entry.broker)
        lenders: list[Any] = machine.host.share("jail:lenders", list)
        lenders.append((listen_at(place), place))
    return Needs(write=(str(record.folder),))


def entry_of(machine: Machine) -> RosterEntry:
    """The roster's entry of a machine of this process."""
    config = machine.config.machine
    return RosterEntry(
        machine.name,
        os.getpid(),
        config.memory,
        label=machine.label,
        cpus=config.cpus,
        backend=machine.config.memory.type,
        promised=config.memory if machine.memory_backend.takes_ram else 0,
        priority=config.priority,
        since=time.time(),
        namespace=pid_namespace(),
        **group_facts(),
    )


def group_facts() -> dict[str, Any]:
    """An entry's facts about this process's memory cgroup."""
    group = own_memory_group()
    if group is None:
        return {}
    kills = group.oom_kills()
    facts = {"group": group.path, "group_folder": str(group.folder), "group_version": group.version}
    return {**facts, "oom_kills": -1 if kills is None else kills}
