"""``--detach``: a command that returns once its machine runs, and leaves it running.

The machine's process is a child with a session of its own. What it says until the guest runs goes where the command's
words go; its status, should it end before, is the command's.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from cardcage.errors import UsageError

from cardcage_cli.streams import Messages

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

    from cardcage.host import Host
    from cardcage.machine import Machine

__all__ = ["Detaching", "detach", "detaching"]

KEY = "cardcage_cli.leaving"


class Detaching:
    """The streams of a process that is left, once its machine runs.

    Attributes:
        asked: ``--detach`` was given, and this is the machine's own process.
        output: a descriptor that standard output and standard error become then, which a card may set in
            ``cardcage_built``; -1 for ``/dev/null``.
        written: called after each message that was written to standard error then.
    """

    def __init__(self) -> None:
        self.asked, self.output = False, -1
        self.written: Callable[[], object] | None = None
        self._tells = self._null = -1

    def leave(self) -> int | None:
        """Go on in a child. The parent gets its exit status, once there is one to give; the child None."""
        told, tells = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child:
            os.close(tells)
            return _status(told, child)
        os.close(told)
        os.setsid()
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(self._null, 0)
        os.dup2(self._null, 1)  # standard output of the command is the machine's name, and nothing else
        self.asked, self._tells = True, tells
        return None

    def running(self, machine: Machine) -> None:
        """Tell the parent that *machine* runs, and leave its streams alone from now on."""
        if not self.asked or self._tells < 0:
            return
        sys.stderr.flush()
        for fd in (1, 2):
            os.dup2(self._null if self.output < 0 else self.output, fd)
        if isinstance(sys.stderr, Messages):
            sys.stderr.written = self.written
        os.write(self._tells, machine.name.encode() + b"\n")
        os.close(self._tells)
        self._tells = -1


def detaching(host: Host) -> Detaching:
    """The state of ``--detach`` in a host's command."""
    found: Detaching = host.share(KEY, Detaching)
    return found


def detach(host: Host, arguments: Namespace) -> int | None:
    """Where ``--detach`` was given, go on in a child: the parent gets the exit status, the child None.

    A command calls this before it makes anything. Raises UsageError in a process that is not there for the command.
    """
    if not arguments.detach:
        return None
    if not host.owns_process:
        raise UsageError("--detach: only the command line's own process can be left")
    return detaching(host).leave()


def _status(told: int, child: int) -> int:
    """Wait until the child's machine runs, or it ended; print the name, or give its status. A signal ends both."""
    import signal

    try:
        with os.fdopen(told) as lines:
            name = lines.readline()
    except BaseException:  # a signal: nobody is left with half a machine
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    if not name:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else 128 - status)  # the child has told why, and given all back
    try:
        sys.stdout.write(name)
        sys.stdout.flush()
    finally:
        os._exit(0)  # what was opened is the child's
