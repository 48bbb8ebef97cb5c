"""``cardcage console``: this terminal at a machine's console, until its user leaves or the machine ends."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cardcage.errors import ConfigError
from cardcage_fleet.control import find
from cardcage_fleet.session import converse

from cardcage_verbs.acts import MACHINE
from cardcage_verbs.terminal import Terminal, is_terminal

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from cardcage.host import Host

__all__ = ["configure_console", "key", "run_console"]

HISTORY = 1024
"""Bytes of what was written before that are shown first: about a screen's last lines."""


def configure_console(parser: ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("name", metavar="NAME", help=MACHINE)
    parser.add_argument("--read-only", "-r", action="store_true", help="watch: type nothing; any number may")
    parser.add_argument("--detach-key", metavar="KEY", default="^]", help="key that leaves: ^] (Ctrl-]), or none")
    parser.add_argument("--history", action="store_true", help="show all that is kept of its output first: 1 MiB")


def key(text: str) -> bytes:
    """The byte of a key: ``^]``, one character, or ``none``. Raises ConfigError."""
    if text == "none":
        return b""
    if len(text) == 2 and text[0] == "^" and "@" <= text[1].upper() <= "_":
        return bytes([ord(text[1].upper()) & 0x1F])
    if len(text) == 1 and text.isascii():
        return text.encode()
    raise ConfigError(f'expected a key such as "^]", one character, or none, got "{text}"', file="--detach-key")


def run_console(host: Host, arguments: Namespace) -> int:
    """Attach. Returns 0, also when the machine ended meanwhile."""
    leave, write = key(arguments.detach_key), not arguments.read_only
    history = 1 << 20 if arguments.history else HISTORY
    entry = find(arguments.name)
    raw = is_terminal()
    with converse(entry, "console", {"write": write, "history": history, "follow": True}) as talk:
        if raw:
            how = f"{arguments.detach_key} leaves" if leave else "no key leaves"
            print(f"cardcage: the console of {entry.name}; {how}", file=sys.stderr, flush=True)
        terminal = Terminal(talk, read=write or raw, raw=raw, leave=leave)
        last = terminal.run()
        if terminal.left:
            print(f"\ncardcage: left {entry.name}, which goes on", file=sys.stderr)
            return 0
        outcome = talk.result(last).get("outcome")
        if outcome:
            print(f"cardcage: {entry.name} ended: {outcome}", file=sys.stderr)
    return 0
