"""``cardcage fork``: copies of a machine that runs in another process, by its control socket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.errors import UsageError

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from cardcage.host import Host
    from cardcage.machine import Machine

__all__ = ["answer", "configure", "run"]


def configure(parser: ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("machine", metavar="NAME", help="the machine's name, pid or number")
    parser.add_argument("-n", "--copies", type=int, default=1, metavar="COUNT", help="how many, 1 by default")


def run(host: Host, arguments: Namespace) -> int:
    """Print a line for each copy: its name and pid."""
    from cardcage_fleet import command, find

    found = command(find(arguments.machine), "fork", {"copies": arguments.copies})
    for one in found.get("copies", ()):
        print(f"{one['name']}\t{one['pid']}")
    return 0


def answer(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """The command in the machine's process: the copies go on by themselves."""
    from cardcage_fork.copy import fork

    count = arguments.get("copies", 1)
    if type(count) is not int or arguments.keys() - {"copies"}:
        raise UsageError('expected {"copies": COUNT}')
    copies = fork(machine, count)
    for one in copies:
        one.detach()
    return {"copies": [{"name": one.name, "pid": one.pid} for one in copies]}
