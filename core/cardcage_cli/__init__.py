"""The command line: ``cardcage run``, ``cards``, ``doctor``, and the commands that cards register.

What a card's command uses (``run(host, arguments) -> int``, ``configure(parser)``):

- :func:`add_machine_arguments` ``(parser)``: ``--name --set --accel --memory --cpus --timeout --detach``, and the
  registered flags;
- :func:`draft_of` ``(arguments)``: a :class:`~cardcage.config.Draft` with what they said; :func:`timeout_of` likewise;
- :func:`detach` ``(host, arguments) -> int | None``: first of all, for ``--detach``;
- :func:`run_machine` ``(machine, timeout=...) -> int``: start, attach the terminal, wait, close, print the ``outcome:``
  line, give the exit status.

Errors are raised, not printed: :func:`main` turns them into one line and a status (docs/cli.md has the table).
"""

from __future__ import annotations

import gc
import sys

from cardcage.lazy import lazy_names

TYPE_CHECKING = False  # typing is slow to import, and until main() runs a Ctrl-C is a traceback

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from cardcage_cli.arguments import add_machine_arguments, draft_of, timeout_of
    from cardcage_cli.leaving import Detaching, detach, detaching
    from cardcage_cli.running import EXIT, SWITCH_INTERVAL, report, run_machine

__all__ = [
    "EXIT",
    "EXIT_STATUS",
    "SWITCH_INTERVAL",
    "Detaching",
    "ExitStatus",
    "add_machine_arguments",
    "detach",
    "detaching",
    "draft_of",
    "main",
    "report",
    "run_machine",
    "timeout_of",
]

__getattr__ = lazy_names(
    "cardcage_cli",
    arguments="add_machine_arguments draft_of timeout_of",
    leaving="Detaching detach detaching",
    running="EXIT EXIT_STATUS SWITCH_INTERVAL ExitStatus report run_machine",
)


def main(argv: Sequence[str] | None = None, *, cards: Iterable[Any] = ()) -> int:
    """The console script. Returns the exit status.

    Args:
        argv: the words after the program's name, by default the process's, which is then there for nothing else: a
            signal may end it on the spot, and does once this has returned, and a running machine is put into a jail.
        cards: loaded besides the installed cards, for programs that bring their own.
    """
    if argv is None:
        gc.disable()  # until the command begins: what is imported stays
    try:
        from cardcage_cli.ending import Ending

        with Ending(alone=argv is None) as ending:  # handlers first, imports after
            from cardcage_cli.program import run_program

            return run_program(sys.argv[1:] if argv is None else argv, cards, ending)
    except KeyboardInterrupt:  # before there was anything that could say more
        print("outcome: interrupted", file=sys.stderr)
        return 130
