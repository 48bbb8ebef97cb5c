"""The policy of running machines: what they execute when another process asks, and ``cardcage policy`` that asks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, ConfigError, UsageError
from cardcage_fleet.control import command, find
from cardcage_fleet.roster import Roster

from cardcage_selinux.card import Selinux

if TYPE_CHECKING:
    import argparse

    from cardcage.machine import Machine

__all__ = ["configure", "flag", "policy_reload", "policy_set", "policy_show", "run"]

ABSENT = "does not use the security card selinux"
WORDS = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}


# the machine's end


def cards(machine: Machine) -> list[Selinux]:
    """Those that *machine* asks. Raises UsageError when there is none."""
    found = [one for one in machine.mediator.checkers if isinstance(one, Selinux)]
    if not found:
        raise UsageError(f'machine "{machine.name}" {ABSENT}')
    return found


def only(arguments: dict[str, Any], *known: str) -> None:
    """Raises UsageError for other arguments."""
    if other := sorted(arguments.keys() - set(known)):
        raise UsageError(f"no such argument: {', '.join(other)}; known: {', '.join(known) or 'none'}")


def policy_reload(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """Read the files anew; booleans get their configured values. Returns how many cards did, which may be none."""
    only(arguments)
    found = [one for one in machine.mediator.checkers if isinstance(one, Selinux)]
    for card in found:
        card.reload()
    return {"cards": len(found)}


def policy_set(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """Give booleans values, or set the mode."""
    only(arguments, "booleans", "enforcing")
    booleans, enforcing = arguments.get("booleans", {}), arguments.get("enforcing")
    if not isinstance(booleans, dict) or not all(isinstance(one, bool) for one in booleans.values()):
        raise UsageError("booleans: expected a table of true and false")
    if not isinstance(enforcing, bool | None):
        raise UsageError("enforcing: expected true or false")
    if booleans and enforcing is not None:
        raise UsageError("booleans and enforcing are set one after the other")
    found = cards(machine)
    for card in found:  # an unknown name before anything changes
        card.avc.policy.with_booleans(booleans)
    for card in found:
        if booleans:
            card.set_booleans(**booleans)
        if enforcing is not None:
            card.set_enforcing(enforcing)
    return {}


def policy_show(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """Mode and booleans of the first card."""
    only(arguments)
    avc = cards(machine)[0].avc
    return {"enforcing": avc.enforcing, "booleans": avc.policy.booleans, "changes": avc.sequence}


# the asking end


def configure(acts: Any) -> None:
    """Add the acts to those of ``cardcage policy``."""
    machine = "a running machine: its name, pid, or number (PID-0)"
    again = acts.add_parser("reload", help="reload the policies of running machines from their files")
    again.add_argument("vm", metavar="VM", nargs="*", help=f"{machine}; by default all machines that have a policy")
    put = acts.add_parser("set-boolean", help="set booleans of a running machine's policy")
    put.add_argument("vm", metavar="VM", help=machine)
    put.add_argument("booleans", metavar="NAME=VALUE", nargs="+", help="true or false (on, off, 1, 0)")
    mode = acts.add_parser("set-enforcing", help="set a running machine's policy to enforcing or permissive")
    mode.add_argument("vm", metavar="VM", help=machine)
    mode.add_argument("value", metavar="VALUE", help="true or false (on, off, 1, 0)")
    show = acts.add_parser("show", help="print a running machine's mode and booleans")
    show.add_argument("vm", metavar="VM", help=machine)


def flag(text: str, file: str) -> tuple[str, bool]:
    """``NAME=VALUE``. Raises ConfigError."""
    name, equals, value = text.partition("=")
    if not name or not equals or value not in WORDS:
        raise ConfigError(f"expected BOOLEAN=true or BOOLEAN=false, got {text}", file=file)
    return name, WORDS[value]


def run(arguments: argparse.Namespace) -> int:
    """Carry out the act. Raises what a machine refuses with; of several machines, each is told, and the status is 1."""
    if arguments.act == "reload":
        return _reload(arguments.vm)
    entry = find(arguments.vm)
    if arguments.act == "show":
        found = command(entry, "policy-show", {})
        print("enforcing" if found.get("enforcing") else "permissive")
        for name, value in sorted(dict(found.get("booleans", {})).items()):
            print(f"{name}={str(value).lower()}")
        return 0
    if arguments.act == "set-enforcing":
        wanted: dict[str, Any] = {"enforcing": flag(f"VALUE={arguments.value}", "set-enforcing")[1]}
    else:
        wanted = {"booleans": dict(flag(text, "set-boolean") for text in arguments.booleans)}
    command(entry, "policy-set", wanted)
    return 0


def _reload(names: list[str]) -> int:
    if len(names) == 1:
        entry = find(names[0])
        if not command(entry, "policy-reload", {}).get("cards"):
            raise UsageError(f'machine "{entry.name}" {ABSENT}')
        return 0
    entries = [find(name) for name in names] or Roster().read()[0]
    failed = done = 0
    for entry in entries:
        try:
            if command(entry, "policy-reload", {}).get("cards"):
                done += 1
                print(f"{entry.name} (pid {entry.pid}): reloaded")
            elif names:
                raise UsageError(f'machine "{entry.name}" {ABSENT}')
        except CardcageError as error:
            failed += 1
            print(f"{entry.name} (pid {entry.pid}): {error}", file=sys.stderr)
    if not done and not failed:
        raise UsageError("no running machine has a policy of the card selinux")
    return int(bool(failed))
