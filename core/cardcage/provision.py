"""Giving a machine its RAM: its memory back end, admission, the layout, and what the roster says of it."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from cardcage.abilities import check_signature
from cardcage.admission import Request, admissions, rooms_of
from cardcage.assembly import allow_files, blamed
from cardcage.config import Place
from cardcage.control import Door
from cardcage.errors import ConfigError, HostError
from cardcage.hostmemory import memory_group, memory_limits
from cardcage.memory import GIB, RamRange, check_ram, split_ram
from cardcage.ram import Anonymous, RamBlock
from cardcage.roster import Entry, Roster, pid_namespace
from cardcage.security import OPERATOR

if TYPE_CHECKING:
    from cardcage.accounting import MachineStats
    from cardcage.config import Config
    from cardcage.machine import Machine
    from cardcage.ram import MemoryBackend

__all__ = ["free_ram", "memory_backend", "provide_ram", "publish", "stats_of"]

VIDEO = (0xA0000, 0xC0000)
"""Where a PC has video memory: no RAM shows there."""


def provide_ram(machine: Machine) -> None:
    """Ask admission, allocate RAM, show it, and tell the accelerator.

    Raises ConfigError for a key that is to blame or when admission refuses, HostError when the host has not that.
    """
    config, backend, memory = machine.config, memory_backend(machine), machine.memory
    try:
        size = check_ram(config.machine.memory, limited=backend.takes_ram)
    except ConfigError as error:
        raise config.place("machine.memory").error(error.problem) from error
    admit(machine, backend)
    block = allocate(backend, size, config)
    low, high = split_ram(size)
    ranges = [RamRange(0, min(low, VIDEO[0]), block)]
    if low > VIDEO[1]:
        ranges.append(RamRange(VIDEO[1], low - VIDEO[1], block, offset=VIDEO[1]))
    if high:
        ranges.append(RamRange(4 * GIB, high, block, offset=low))
    memory.add(*ranges)  # the space owns the block from here on, whatever fails next
    memory.attach(machine.vm)
    memory.report_to(machine.vm)


def free_ram(machine: Machine) -> None:
    """Give RAM back, and only then what was promised on the roster. Idempotent."""
    machine.memory.close()
    if machine.record is not None:
        machine.record.close()


def stats_of(machine: Machine) -> MachineStats:
    """What the machine's memory costs the host, looked at exactly now: about 30 µs for each resident MiB."""
    from cardcage.accounting import look_at  # not needed to start a machine

    return look_at(machine)


def watch_ram(machine: Machine) -> None:
    """Stop the machine, in words, when the host takes memory away under it."""
    block = machine.memory.ranges[0].block

    def taken() -> None:
        if (error := block.fault()) is not None and block.watch is not None:
            machine.events.remove_reader(block.watch.fd)
            machine.fail(error)

    if block.watch is not None:
        machine.events.add_reader(block.watch.fd, taken)


def publish(machine: Machine) -> None:
    """Watch its RAM, say on the roster where it is and what becomes of the machine, and answer for it there."""
    record, balloon = machine.record, machine.balloon
    watch_ram(machine)
    if record is None:
        return
    group = group_facts()  # again: a policy may have moved the process
    record.update(start=machine.memory.ranges[0].block.host_address, accelerator=machine.accelerator.name, **group)
    machine.observers.add("state", lambda state: record.update(state=state))
    if machine.host.registry.names("control"):
        machine._cleanup.callback(Door(machine, record.entry).close)
    if balloon is not None:

        def told() -> dict[str, int]:
            facts = {"machine": machine.name, "name": "stats"}
            machine.mediator.check(OPERATOR, machine.label, "management", ("reach",), facts)
            report = balloon.report
            available = report.values.get("available_memory") if report is not None else None
            return {"ballooned": balloon.size, **({"available": available} if available is not None else {})}

        machine.events.add_reader(record.listen().fileno(), lambda: record.answer(told))


def memory_backend(machine: Machine) -> MemoryBackend:
    """What ``[memory]`` names. The default is the core's own, so that a machine needs no card for it."""
    chosen, place = machine.config.memory, machine.config.place("memory.type")
    if chosen.type == "anonymous" and not chosen.options:
        return Anonymous()
    offer = machine.host.registry.get("memory", chosen.type, file=place.file, key="memory.type")
    facts = {"machine": machine.name}
    machine.mediator.ask(machine.label, machine.label, "backend", f"memory:{chosen.type}", ("open",), facts)
    allow_files(machine, chosen.options, "open", "read", "write", "create")
    options = machine.host.options(offer, chosen.options, file=place.file, key="memory")
    who = f'memory "{offer.name}" (card {offer.card}, {offer.distribution})'
    made: MemoryBackend = blamed(
        who, Place(place.file, "memory"), lambda: offer.load()(options) if options is not None else offer.load()()
    )
    check_signature(made, "allocate", 2, who)
    return made


def allocate(backend: MemoryBackend, size: int, config: Config) -> RamBlock:
    """One block for all of the machine's RAM; errors get the place of the key that is to blame."""
    try:
        return RamBlock(size, "ram", backend, config.memory)
    except ConfigError as error:
        key = f"memory.{error.key}" if error.key else "machine.memory"
        raise config.place(key).error(error.problem) from error


def admit(machine: Machine, backend: MemoryBackend) -> None:
    """Let the machine in: it is on the roster then.

    Raises ConfigError when a policy refuses, HostError when one is to be asked and there is no roster.
    """
    policies = admissions(machine)
    with ExitStack() as held:
        try:
            roster = Roster()
            held.enter_context(roster.locked())
            alive, ended, _ = roster.read()
        except (HostError, OSError) as error:
            if policies:
                raise HostError(f"admission needs to know the other machines: {error}") from error
            machine.log.warning("not on the roster: cardcage stats will not show this machine", reason=str(error))
            return
        roster.tidy(ended)
        entry = entry_of(machine, backend)
        rooms = rooms_of(memory_limits(), alive) if policies else ()
        for ask in policies:
            ask(Request(entry.name, entry.promised, entry.priority), rooms)
        machine.record = roster.add(entry)


def entry_of(machine: Machine, backend: MemoryBackend) -> Entry:
    """What the roster says of a machine of this process."""
    config = machine.config.machine
    return Entry(
        machine.name,
        os.getpid(),
        config.memory,
        label=machine.label,
        backend=machine.config.memory.type,
        promised=config.memory if backend.takes_ram else 0,
        priority=config.priority,
        since=time.time(),
        namespace=pid_namespace(),
        **group_facts(),
    )


def group_facts() -> dict[str, Any]:
    """What an entry says of this process's memory cgroup."""
    group = memory_group()
    if group is None:
        return {}
    kills = group.oom_kills()
    facts = {"group": group.path, "group_folder": str(group.folder), "group_version": group.version}
    return {**facts, "oom_kills": -1 if kills is None else kills}
