"""``cardcage exec NAME -- COMMAND``: a command in a machine's guest, with its input, outputs and status apart."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from typing import TYPE_CHECKING, Any

from cardcage.errors import ConfigError
from cardcage.units import Duration
from cardcage_fleet.control import find
from cardcage_fleet.session import converse

from cardcage_verbs.acts import MACHINE
from cardcage_verbs.terminal import Terminal, is_terminal, size

if TYPE_CHECKING:
    from cardcage.host import Host

__all__ = ["configure_exec", "run_exec"]

WINDOW = 1 << 18
"""Bytes of standard input on their way: what the machine's end has room for."""
NOT_FOUND, NOT_RUN = 127, 126
"""Statuses of a shell for a command that is not there, and for one that cannot be run."""


def configure_exec(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("--user", "-u", metavar="USER", help="name or number of the guest's user (root)")
    parser.add_argument("--workdir", "-w", metavar="DIR", help="directory to run it in (the user's home)")
    parser.add_argument(
        "--env",
        "-e",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a variable, besides PATH, HOME, USER and TERM; may be repeated",
    )
    terminal = parser.add_mutually_exclusive_group()
    terminal.add_argument(
        "--tty", "-t", action="store_true", default=None, help="with a terminal; by default when this is one"
    )
    terminal.add_argument("--no-tty", "-T", action="store_false", dest="tty", help="with pipes: input, output, errors")
    parser.add_argument("--no-stdin", "-n", action="store_true", help="with no input")
    parser.add_argument("--timeout", metavar="TIME", default="60s", help="how long to wait for the agent (60s)")
    parser.add_argument("name", metavar="NAME", help=MACHINE)
    parser.add_argument("words", metavar="COMMAND", nargs=argparse.REMAINDER, help="the command (sh), behind --")


def run_exec(host: Host, arguments: argparse.Namespace) -> int:
    """Run it. Returns its status: 128 and the number of the signal that ended it, 127 where it was not found."""
    words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    tty = is_terminal() if arguments.tty is None else arguments.tty
    try:
        timeout = Duration(arguments.timeout)
    except ValueError as error:
        raise ConfigError(str(error), file="--timeout") from error
    asked: dict[str, Any] = {"command": words or ["sh"], "timeout": float(timeout), "input": not arguments.no_stdin}
    if arguments.user is not None:
        asked["user"] = arguments.user
    if arguments.workdir is not None:
        asked["cwd"] = arguments.workdir
    variables = dict(_variable(one) for one in arguments.env)
    if tty:
        asked["pty"] = list(size())
        variables.setdefault("TERM", os.environ.get("TERM", "dumb"))
    if variables:
        asked["env"] = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **variables}
    entry = find(arguments.name)
    with converse(entry, "exec", asked, timeout + 60) as talk:
        if "errno" in talk.told:
            print(f"cardcage: {talk.told.get('error')}", file=sys.stderr)
            return NOT_FOUND if talk.told["errno"] == errno.ENOENT else NOT_RUN
        raw = tty and os.isatty(0)
        terminal = Terminal(talk, read=not arguments.no_stdin, raw=raw, window=WINDOW, interrupt=True)
        status = talk.result(terminal.run()).get("status")
    if not isinstance(status, int):
        raise ConfigError("the machine gave no status", file="exec")
    return status & 0xFF if status >= 0 else min(128 - status, 255)


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ConfigError(f'expected NAME=VALUE, got "{text}"', file="--env")
    return name, value
