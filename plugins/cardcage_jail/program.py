"""A jail for a program that a card starts beside the machine: a gate, a pager. It does its one task alone."""

from __future__ import annotations

import os

from cardcage.security import Needs

from cardcage_jail import landlock, seccomp
from cardcage_jail.jail import NO_NEW_PRIVS, OF_THE_HOST, PRCTL, RESTRICT_SELF, capset, no_core_dumps, rules_of
from cardcage_jail.threads import in_all_threads

__all__ = ["confine_program"]


def confine_program(needs: Needs, *, imports: bool = True) -> None:
    """Give up all capabilities, and, as far as the host can, files and system calls but those of *needs*; for good.

    Args:
        imports: the files of *needs* and of the interpreter may be opened still; else none.

    Raises HostError.
    """
    rules = rules_of(Needs(read=(*OF_THE_HOST, *needs.read), sockets=needs.sockets)) if imports else []
    no_core_dumps()
    calls = [(PRCTL, (NO_NEW_PRIVS, 1)), capset(())]
    ruleset = -1
    if landlock.abi():
        ruleset = landlock.make_ruleset(rules, inet="inet" in needs.sockets, unix="unix" in needs.sockets)
        calls.append((RESTRICT_SELF, (ruleset, 0)))
    in_all_threads(calls)
    if ruleset >= 0:
        os.close(ruleset)
    if seccomp.is_offered():
        seccomp.Refusals()  # a call that is refused fails, and does not end the process
        seccomp.confine([], needs.sockets)
