"""``cardcage logs``: what a machine wrote on its console, and what was said of it."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from cardcage.errors import UsageError, near
from cardcage_fleet.control import find
from cardcage_fleet.held import is_held
from cardcage_fleet.roster import Roster
from cardcage_fleet.session import converse

from cardcage_verbs.keep import is_written, log_of
from cardcage_verbs.terminal import Terminal

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator

    from cardcage.host import Host

__all__ = ["configure_logs", "run_logs"]

LOOK = 0.2
PATIENCE = 10.0
"""Seconds that a process has to say how its machine ended, once that is off the roster."""


def configure_logs(parser: ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("name", metavar="NAME", help="a machine that runs, or one that ran with --detach")
    parser.add_argument("--follow", "-f", action="store_true", help="go on with what comes, until the machine ends")
    parser.add_argument("--console", action="store_true", help="only the console: what is kept of it, 1 MiB")


def run_logs(host: Host, arguments: Namespace) -> int:
    """Print the log of a machine that was left running; of any other the console, since it speaks to who started it."""
    path = log_of(arguments.name)
    if path.exists() and not arguments.console:
        for piece in pieces(path, arguments.name, follow=arguments.follow):
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        return 0
    try:
        entry = find(arguments.name)
    except UsageError:
        if arguments.console and path.exists():
            raise
        names = [one.stem for one in path.parent.glob("*.log")] + [one.name for one in Roster().read()[0]]
        what = f'no machine "{arguments.name}" of this user runs, or ran with --detach'
        raise UsageError(f"{what}.{near(arguments.name, names)}".rstrip(".")) from None
    if not arguments.console:
        print(f"cardcage: the console of {entry.name}; it says the rest where it was started", file=sys.stderr)
    asked = {"write": False, "history": 1 << 20, "follow": bool(arguments.follow)}
    with converse(entry, "console", asked) as talk:
        talk.result(Terminal(talk, read=False, raw=False).run())
    return 0


def pieces(path: Path, name: str, *, follow: bool) -> Iterator[bytes]:
    """The contents of the log of machine *name*, the older file first; with *follow* what comes until the machine ends.

    Of one that has just ended, what its process has yet to say (the outcome) is waited for.
    """
    with suppress(FileNotFoundError):
        yield Path(f"{path}.1").read_bytes()
    file: BinaryIO = path.open("rb")
    until = 0.0
    try:
        while True:
            if runs(name):  # asked first: what it wrote before is there then
                ended = not follow
            else:
                until = until or time.monotonic() + PATIENCE
                ended = not is_written(path) or time.monotonic() > until
            yield from rest(file)
            fresh = newer(path, file)
            if fresh is not None:
                yield from rest(file)
                file.close()
                file = fresh
            elif ended:
                return
            else:
                time.sleep(LOOK)
    finally:
        file.close()


def rest(file: BinaryIO) -> Iterator[bytes]:
    """The pieces that are left of a file."""
    while data := file.read(1 << 16):
        yield data


def newer(path: Path, file: BinaryIO) -> BinaryIO | None:
    """The file that is at *path* now, opened, when that is another than *file*."""
    try:
        if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            return None
        return path.open("rb")
    except FileNotFoundError:
        return None


def runs(name: str) -> bool:
    """True while a machine of this name is on the roster."""
    return any(one.name == name and is_held(Path(one.file)) for one in Roster().read()[0])
