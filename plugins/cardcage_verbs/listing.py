"""``cardcage ps``: the machines of this user that run."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from cardcage.units import say_size
from cardcage_fleet.oom import killed_pids, why_ended
from cardcage_fleet.roster import Roster

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from cardcage.host import Host
    from cardcage_fleet.roster import RosterEntry

__all__ = ["configure_ps", "run_ps"]


def configure_ps(parser: ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("--json", action="store_true", help="a list of tables, sizes in bytes, times in seconds")
    parser.add_argument("--quiet", "-q", action="store_true", help="only the names, a line each")


def run_ps(host: Host, arguments: Namespace) -> int:
    """Print a line for each machine; those that ended without a word, once, on standard error."""
    roster = Roster()
    alive, ended, problems = roster.read()
    for text in problems:
        print(text, file=sys.stderr)
    if arguments.quiet:
        for one in alive:
            print(one.name)
        return 0
    killed = killed_pids() if ended else None
    for one in ended:
        print(f"{one.name} (pid {one.pid}): {why_ended(one, killed)}", file=sys.stderr)
        roster.forget(one)
    if arguments.json:
        print(json.dumps([table(one) for one in alive], indent=2))
        return 0
    rows = [["NAME", "PID", "STATE", "ACCEL", "CPUS", "MEMORY", "UP"], *(cells(one) for one in alive)]
    wide = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(wide[at]) for at, cell in enumerate(row)).rstrip())
    return 0


def table(entry: RosterEntry) -> dict[str, Any]:
    """An entry for ``--json``."""
    return {
        "name": entry.name,
        "pid": entry.pid,
        "state": entry.state,
        "accelerator": entry.accelerator,
        "cpus": entry.cpus or None,
        "memory": entry.size,
        "label": entry.label,
        "since": entry.since,
        "up": round(max(time.time() - entry.since, 0.0), 3),
    }


def cells(entry: RosterEntry) -> list[str]:
    """An entry for a person."""
    up = max(time.time() - entry.since, 0.0)
    return [
        entry.name,
        str(entry.pid),
        entry.state,
        entry.accelerator or "-",
        str(entry.cpus or "-"),
        say_size(entry.size),
        duration(up),
    ]


def duration(seconds: float) -> str:
    """Two units at most: ``42s``, ``3m 5s``, ``2h 10m``, ``4d 3h``."""
    left = int(seconds)
    found: list[str] = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        number, left = divmod(left, size)
        if number or (unit == "s" and not found):
            found.append(f"{number}{unit}")
    return " ".join(found[:2])
