"""The jail: what is given up, and what stays for the machine's cards."""

from __future__ import annotations

import os
import resource
import socket
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cardcage.abilities import has
from cardcage.config import beside
from cardcage.errors import CardError, HostError
from cardcage.security import HasNeeds, Needs

from cardcage_jail import landlock, outside, seccomp
from cardcage_jail.broker import begin
from cardcage_jail.threads import in_all_threads

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cardcage.machine import Machine

__all__ = ["CAPABILITIES", "enter", "forked", "forking", "joined", "wanted"]

CHOICES = ("on", "off", "require")
CAPABILITIES = (
    "chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable net_bind_service "
    "net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot sys_ptrace sys_pacct sys_admin "
    "sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease audit_write audit_control setfcap mac_override "
    "mac_admin syslog wake_alarm block_suspend audit_read perfmon bpf checkpoint_restore"
).split()
"""Names of capabilities(7), each at its number."""

RESTRICT_SELF, CAPSET, PRCTL, NO_NEW_PRIVS = 446, 126, 157, 38
CAPABILITY_VERSION = 0x20080522

OF_THE_HOST = (
    "/proc/self",  # names this process
    "/proc/meminfo",
    "/proc/stat",
    "/proc/pressure",
    "/proc/mounts",
    "/proc/cpuinfo",
    "/proc/sys/vm",
    "/sys/devices/system",
    "/dev/null",
    "/dev/zero",
    "/dev/urandom",
    "/etc/localtime",
    "/etc/ld.so.cache",
    "/usr/share/zoneinfo",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
)
"""Read by the interpreter, the C library, and cards that look at the host's memory. None of it is a secret."""


def wanted(machine: Machine) -> str:
    """``on``, ``off`` or ``require``, as the configuration says. Raises ConfigError."""
    value = machine.config.guards.get("jail")
    if value is None:
        return "on" if machine.host.owns_process else "off"
    if value not in CHOICES:
        expected = ", ".join(f'"{one}"' for one in CHOICES)
        raise machine.config.place("security.jail").error(f"expected one of {expected}, got {value!r}")
    return str(value)


def opened_later(machine: Machine) -> Needs:
    """The paths that ``security.open_later`` names, for files that nobody knows of yet. Raises ConfigError."""
    place = machine.config.place("security.open_later")
    value = machine.config.guards.get("open_later", [])
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise place.error(f"expected a list of paths, got {value!r}")
    paths = [os.path.abspath(beside(one)) for one in value]
    for at, path in enumerate(paths):
        if not os.path.exists(path):
            raise place.below(f"[{at}]").error(f"{path}: expected a file or directory that is there")
    return Needs(write=tuple(paths))


def enter(machine: Machine) -> None:
    """Put this process into the jail that *machine* needs, as far as the host knows how; for good.

    Raises ConfigError for a wrong value, HostError where the jail is required and the host has none.
    """
    choice, later = wanted(machine), opened_later(machine)
    entered = machine.host.share("jail:entered", dict)
    if choice == "off" or entered:
        return
    missing = [name for name, there in (("Landlock", landlock.abi()), ("seccomp", seccomp.is_offered())) if not there]
    if missing:
        text = f"the host's kernel has no {' and no '.join(missing)}"
        if choice == "require":
            raise HostError(f'security.jail = "require": {text}')
        machine.log.warning("no jail, or half a jail", why=text)
    stated = needs_of(machine)
    needs = joined([COMMON, later, *(one for _, one in stated)])
    refusals = seccomp.Refusals()
    no_core_dumps()
    ours = children()
    way = begin(machine, stated, refusals.write)
    calls = [(PRCTL, (NO_NEW_PRIVS, 1)), capset(needs.capabilities)]
    ruleset = -1
    if "Landlock" not in missing:
        ruleset = landlock.make_ruleset(rules_of(needs), inet="inet" in needs.sockets, unix="unix" in needs.sockets)
        calls.append((RESTRICT_SELF, (ruleset, 0)))
    try:
        in_all_threads(calls)
    finally:
        if ruleset >= 0:
            os.close(ruleset)
    listener = -1
    if "seccomp" not in missing:
        listener = seccomp.confine(ours, needs.sockets, forks=needs.processes > 0)
    socket.send_fds(way, [b"begin"], [listener] if listener >= 0 else [])
    if listener >= 0:
        os.close(listener)
    outside.join(way)
    entered.update(refusals=refusals, forks=listener >= 0 or "seccomp" in missing, needed=needs.processes)
    machine.host.sealed = partial(sealed, later.write)
    _hear(machine, refusals)
    machine.defer(lambda: machine.loop.remove_reader(refusals.fd))
    machine.defer(_close)


def _close() -> None:
    """Nothing more is lent to this machine."""
    with suppress(OSError):  # the broker is gone
        outside.ask({"do": "close"})


def _hear(machine: Machine, refusals: seccomp.Refusals) -> None:
    def told() -> None:
        for call in refusals.read():
            machine.log.warning(f"jail: refused {call}")

    machine.loop.add_reader(refusals.fd, told)


def forking(machine: Machine) -> str | None:
    """See :func:`cardcage_jail.cardcage_forking`."""
    entered = machine.host.share("jail:entered", dict)
    if not entered or entered["forks"]:
        return None
    if entered["needed"]:
        return "its process is in a jail, in which the host's kernel does not ask about forks (Linux 5.7 or later does)"
    return 'its process is in a jail, in which no process begins (security.jail = "off")'


def forked(machine: Machine) -> None:
    """See :func:`cardcage_jail.cardcage_forked`."""
    if entered := machine.host.share("jail:entered", dict):
        refusals = entered["refusals"]
        machine.loop.remove_reader(refusals.fd)
        refusals.renew()
        _hear(machine, refusals)


def sealed(later: tuple[str, ...], tclass: str, name: str) -> str:
    """The reason why the object *name* of class *tclass* is out of reach for a device that is added in the jail."""
    if name.startswith("/proc/self/fd/"):
        return ""  # it has that open
    real = os.path.realpath(name)
    if tclass == "image" and any(os.path.commonpath((real, one)) == one for one in map(os.path.realpath, later)):
        return ""
    if tclass == "image":
        with suppress(OSError):
            os.close(outside.open_file(real, os.O_RDONLY | os.O_NONBLOCK))  # it is lent
            return ""
    how = "name it in security.open_later" if tclass == "image" else "plug it in before the guest starts"
    return f"the process is in its jail, and opens nothing that it was not started with ({how})"


COMMON = Needs(read=OF_THE_HOST)


def needs_of(machine: Machine) -> list[tuple[str, Needs]]:
    """The needs of the machine's cards, devices, back ends, memory and checkers, each with the label of who will ask.

    Raises CardError.
    """
    who, own = "memory back end or checker", machine.label
    owners: list[tuple[str, Any, str]] = [
        (own, one, who) for one in (machine.memory_backend, *machine.mediator.checkers)
    ]
    for plugged in machine.devices.values():
        parts = (plugged.device, *plugged.slot.host.opened)
        owners += [(plugged.slot.label, one, plugged.who) for one in parts]
    found = [(own, one) for one in machine.host.phases.call("needs", machine)]
    found += [(label, one.needs()) for label, one, who in owners if has(one, HasNeeds, who)]
    for _, one in found:
        if not isinstance(one, Needs):
            raise CardError(f"needs: expected a cardcage.security.Needs, got {one!r}")
    return found


def joined(needs: Iterable[Needs]) -> Needs:
    """All of *needs* in one."""
    all_of = list(needs)

    def texts(name: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(text for one in all_of for text in getattr(one, name)))

    return Needs(
        read=texts("read"),
        write=texts("write"),
        remove=texts("remove"),
        sockets=texts("sockets"),
        capabilities=texts("capabilities"),
        scratch=texts("scratch"),
        processes=sum(one.processes for one in all_of),
        programs=tuple(dict.fromkeys(words for one in all_of for words in one.programs)),
    )


def rules_of(needs: Needs) -> list[tuple[str, int]]:
    """Landlock's rules for *needs*, and for the code of this program, parts of which are imported when first used."""
    prefixes = (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix)  # all that sysconfig names is below
    code = {*sys.path, sys.pycache_prefix, *prefixes}
    return [
        *((path, landlock.READ) for path in (*needs.read, *sorted(filter(None, code)))),
        *((path, landlock.WRITE) for path in needs.write),
        *((path, landlock.REMOVE) for path in needs.remove),
        ("/dev/null", landlock.WRITE),
    ]


def capset(kept: Iterable[str]) -> tuple[int, tuple[int, ...]]:
    """The system call that gives up all capabilities but *kept*, of those that the process has. Raises HostError."""
    import ctypes

    mask = 0
    for name in kept:
        if name not in CAPABILITIES:
            raise HostError(f'jail: a card needs the capability "{name}", which there is not')
        mask |= 1 << CAPABILITIES.index(name)
    status = Path("/proc/self/status").read_text()
    held = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapPrm:"))
    mask &= held
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    _kept_alive.append((header, data))
    return CAPSET, (ctypes.addressof(header), ctypes.addressof(data))


_kept_alive: list[object] = []
"""Memory that the system calls of other threads point to."""


def no_core_dumps() -> None:
    """No dump of this process has a guest's memory in it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):  # a kernel without CONFIG_ELF_CORE
        Path("/proc/self/coredump_filter").write_text("0")  # where dumps go to a program, the limit does not count


def children() -> list[int]:
    """Processes of ours, such as a network's engine: they may still be ended."""
    found: list[int] = []
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # ended meanwhile, or a kernel without CONFIG_PROC_CHILDREN
            found += map(int, Path(f"/proc/self/task/{thread}/children").read_text().split())
    return found
