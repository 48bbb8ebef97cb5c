"""The process of a machine on its host: ``[policy.process]`` gives it CPUs, a niceness and a control group."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field
from attrs.validators import ge, le, optional
from cardcage.config import HostPath
from cardcage.errors import HostError
from cardcage.security import HOST, OPERATOR, Act
from cardcage.values import frozen

from cardcage_verbs import ProcessOffer

if TYPE_CHECKING:
    from cardcage.config import Place
    from cardcage.machine import Machine

__all__ = ["ProcessOptions", "apply", "parse_cpus"]

MOST = 1 << 16


@frozen
class ProcessOptions:
    """Keys of ``[policy.process]``.

    Attributes:
        cpus: CPUs of the host that it may run on, such as ``0-3,8``; by default those that it has.
        nice: -20 to 19: how much it gives way to others; by default as it was started. Below that needs CAP_SYS_NICE.
        cgroup: directory of a control group, such as ``/sys/fs/cgroup/machines/lab``, made where only it is missing;
            the process moves there before RAM is taken.
    """

    cpus: str = ""
    nice: int | None = field(default=None, validator=optional([ge(-20), le(19)]))
    cgroup: HostPath = ""


def parse_cpus(text: str) -> set[int]:
    """The numbers of ``0-3,8``. Raises ValueError."""
    found: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not all(one.isascii() and one.isdigit() and len(one) < 6 for one in ((low, high) if dash else (low,))):
            raise ValueError(f'expected CPUs such as "0-3,8", got "{text}"')
        first, last = int(low), int(high or low)
        if first > last or last >= MOST:
            raise ValueError(f'"{part}" is no range of CPUs')
        found |= set(range(first, last + 1))
    return found


def apply(machine: Machine) -> None:
    """Give this process what the configuration says.

    Raises ConfigError, Denied, or HostError where the host refuses.
    """
    place = machine.config.place("policy.process")
    offer = machine.host.registry.get(ProcessOffer, "process")
    table = machine.config.policy["process"]
    if not isinstance(table, dict):
        raise place.error("expected a table")
    options: ProcessOptions = machine.host.options(offer, table, file=place.file, key=place.key)
    if not machine.host.owns_process:
        raise place.error("only for a process that is there for its machine, as the command line's is")
    if options.cgroup:
        _enter(machine, options.cgroup, place.below("cgroup"))
    threads = [int(one) for one in os.listdir("/proc/self/task")]  # those to come are as the one that starts them
    if options.cpus:
        _confine(options.cpus, threads, place.below("cpus"))
    if options.nice is not None:
        try:
            for one in threads:
                os.setpriority(os.PRIO_PROCESS, one, options.nice)
        except PermissionError as error:
            raise HostError(f"policy.process.nice: {options.nice}: {error.strerror}: needs CAP_SYS_NICE") from error


def _confine(text: str, threads: list[int], place: Place) -> None:
    try:
        wanted = parse_cpus(text)
    except ValueError as error:
        raise place.error(str(error)) from error
    try:
        for one in threads:
            os.sched_setaffinity(one, wanted)
    except OSError as error:  # EINVAL: none of them is there, or in the cpuset
        raise place.error(f'"{text}": this process may run on none of these CPUs') from error
    if missing := wanted - os.sched_getaffinity(0):
        raise place.error(f"this process may not run on CPU {', '.join(map(str, sorted(missing)))}")


def _enter(machine: Machine, path: str, place: Place) -> None:
    folder = Path(path)
    acts = ("write",) if folder.exists() else ("create", "write")
    machine.mediator.ask(Act(OPERATOR, HOST, "image", acts, {"readonly": False}), path)
    try:
        if not (folder.parent / "cgroup.procs").exists():
            raise place.error(f"{path}: expected a directory of a cgroup file system")
        folder.mkdir(exist_ok=True)
        (folder / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        raise HostError(f"{place.key}: {path}: {error.strerror}") from error
