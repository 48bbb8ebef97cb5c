"""``cardcage stop``, ``shutdown``, ``kill``, ``pause``, ``resume``, ``inspect``: what is asked of machines that run."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, ConfigError, HostError, UsageError
from cardcage.units import Duration
from cardcage_fleet.control import command, find
from cardcage_fleet.held import is_held, is_held_by
from cardcage_fleet.roster import Roster

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable

    from cardcage.host import Host
    from cardcage_fleet.roster import RosterEntry

__all__ = ["gone", "run_inspect", "run_kill", "run_pause", "run_resume", "run_shutdown", "run_stop"]

MACHINE = "a running machine: its name, pid, or number (PID-0)"
PATIENCE = 10.0
"""Seconds that a process has to give all back once its machine has ended, and that ``kill`` waits for an answer."""
LOOK = 0.02
FOREVER = 2.0 * 24 * 3600


def _names(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="+", help=MACHINE)


def configure_stop(parser: ArgumentParser) -> None:
    """The arguments."""
    _names(parser)
    parser.add_argument(
        "--timeout", metavar="TIME", help="how long the guest has to power off; by default its machine.stop_timeout"
    )


def configure_shutdown(parser: ArgumentParser) -> None:
    """The arguments."""
    _names(parser)
    parser.add_argument("--wait", metavar="TIME", help="wait so long until it has ended; status 1 if it has not")


configure_kill = configure_pause = configure_resume = _names


def configure_inspect(parser: ArgumentParser) -> None:
    """The arguments."""
    _names(parser)
    parser.add_argument("--json", action="store_true", help="a list of tables; this is what it prints anyway")


def run_stop(host: Host, arguments: Namespace) -> int:
    """End machines, and wait until they have given all back."""
    given = {} if arguments.timeout is None else {"timeout": float(_time(arguments.timeout, "--timeout"))}

    def act(entry: RosterEntry) -> None:
        command(entry, "stop", given, FOREVER)
        await_gone(entry)

    return each(arguments.name, act)


def run_shutdown(host: Host, arguments: Namespace) -> int:
    """Press power buttons."""
    patience = None if arguments.wait is None else _time(arguments.wait, "--wait")

    def act(entry: RosterEntry) -> None:
        command(entry, "shutdown", {})
        if patience is not None and not gone(entry, patience):
            raise HostError(f"machine {entry.name} (pid {entry.pid}) did not power off within {patience:g} s")

    return each(arguments.name, act, failed=1)


def run_kill(host: Host, arguments: Namespace) -> int:
    """End machines at once; a process that does not answer is killed."""
    return each(arguments.name, kill)


def kill(entry: RosterEntry) -> None:
    """End one. Raises UsageError for a process that hangs, and holds other machines too or is not the machine's."""
    try:
        command(entry, "kill", {}, PATIENCE)
    except HostError:  # it does not answer
        others = [one.name for one in Roster().read()[0] if one.pid == entry.pid and one.file != entry.file]
        if others or not entry.here:
            whose = f"its process, which has {', '.join(others)} too" if others else "its process, of another namespace"
            raise UsageError(f"machine {entry.name} does not answer, and {whose}, is left alone") from None
        _slay(entry)
    await_gone(entry)


def _slay(entry: RosterEntry) -> None:
    """Kill the process that *entry* names, if it is the one that holds the entry: the file's word alone counts nothing.

    A machine that an intruder has taken over may write to the run directory.
    """
    process = -1
    with suppress(ProcessLookupError):
        process = os.pidfd_open(entry.pid)  # first: what is found out below is of this process, or of none
    try:
        if process >= 0 and is_held_by(entry.pid, Path(entry.file)):
            with suppress(ProcessLookupError):  # it has ended meanwhile
                signal.pidfd_send_signal(process, signal.SIGKILL)
            print(f"{entry.name}: did not answer, and was killed (pid {entry.pid})", file=sys.stderr)
        elif not _released(entry):
            what = f"process {entry.pid}, which the roster names, is not the one that holds {entry.file}"
            raise UsageError(f"machine {entry.name} does not answer, and {what}: it is left alone")
    finally:
        if process >= 0:
            os.close(process)


def run_pause(host: Host, arguments: Namespace) -> int:
    """Bring machines to a stand."""
    return each(arguments.name, lambda entry: command(entry, "pause", {}))


def run_resume(host: Host, arguments: Namespace) -> int:
    """Let machines go on."""
    return each(arguments.name, lambda entry: command(entry, "resume", {}))


def run_inspect(host: Host, arguments: Namespace) -> int:
    """Print what machines tell of themselves, and what the roster has."""
    found: list[dict[str, Any]] = []
    for entry in [find(name) for name in arguments.name]:
        told = command(entry, "inspect", {})
        roster = {"since": entry.since, "memory_group": entry.group or None, "run_file": entry.file}
        found.append({**told, "host": roster})
    print(json.dumps(found, indent=2))
    return 0


def each(names: list[str], act: Callable[[RosterEntry], object], failed: int = 0) -> int:
    """Do *act* to each machine; of several, all are tried, and what failed is told of each. Raises what one raises.

    Args:
        failed: status where a lone machine did not do what it was asked; 0 to raise.
    """
    entries = [find(name) for name in names]  # a wrong name before anything is done
    wrong = 0
    for entry in entries:
        try:
            act(entry)
        except CardcageError as error:
            if len(entries) == 1 and not (failed and isinstance(error, HostError)):
                raise
            wrong = 1
            print(f"{entry.name} (pid {entry.pid}): {error}", file=sys.stderr)
    return wrong


def gone(entry: RosterEntry, patience: float) -> bool:
    """Wait until a machine is off the roster; False after *patience* seconds."""
    until = time.monotonic() + patience
    while not _released(entry):
        if time.monotonic() > until:
            return False
        time.sleep(LOOK)
    return True


def await_gone(entry: RosterEntry) -> None:
    """Wait until a machine that has ended is off the roster. Raises HostError when its process hangs."""
    if not gone(entry, PATIENCE):
        raise HostError(f"machine {entry.name} has ended, but its process (pid {entry.pid}) has not given all back")


def _released(entry: RosterEntry) -> bool:
    return not is_held(Path(entry.file))


def _time(text: str, flag: str) -> float:
    try:
        return Duration(text)
    except ValueError as error:
        raise ConfigError(str(error), file=flag) from error
