"""The command line: ``cardcage run``, ``cards``, ``doctor``, and the commands that cards register.

What a card's command uses (``run(host, arguments) -> int``, ``configure(parser)``):

- :func:`add_machine_arguments` ``(parser)``: ``--set --accel --memory --cpus --timeout``, and the registered flags;
- :func:`draft_of` ``(arguments)``: a :class:`~cardcage.config.Draft` with what they said; :func:`timeout_of` likewise;
- :func:`run_machine` ``(machine, timeout=...) -> int``: start, attach the terminal, wait, close, print the ``outcome:``
  line, give the exit status.

Errors are raised, not printed: :func:`main` turns them into one line and a status (docs/cli.md has the table).
"""

from __future__ import annotations

from cardcage.cli.arguments import add_machine_arguments, draft_of, timeout_of
from cardcage.cli.main import main
from cardcage.cli.running import EXIT, report, run_machine

__all__ = ["EXIT", "add_machine_arguments", "draft_of", "main", "report", "run_machine", "timeout_of"]
