"""A jail for the gate too: it makes connections and looks names up, and nothing else."""

from __future__ import annotations

import os

from cardcage.security import Needs
from cardcage_jail import landlock, seccomp
from cardcage_jail.jail import NO_NEW_PRIVS, OF_THE_HOST, PRCTL, RESTRICT_SELF, capset, no_core_dumps, rules_of
from cardcage_jail.threads import in_all_threads

__all__ = ["confine"]

OF_RESOLVERS = ("/etc", "/run/systemd/resolve", "/run/nscd", "/run/resolvconf", "/run/NetworkManager", "/var/lib/sss")
"""Where the C library reads how names are looked up."""


def confine() -> None:
    """Give up all capabilities, files but those that are read for names, and system calls; as far as the host can.

    Raises HostError.
    """
    needs = Needs(read=(*OF_THE_HOST, *OF_RESOLVERS), sockets=("inet", "unix"))
    no_core_dumps()
    calls = [(PRCTL, (NO_NEW_PRIVS, 1)), capset(())]
    ruleset = -1
    if landlock.abi():
        ruleset = landlock.make_ruleset(rules_of(needs), inet=True, unix=True)
        calls.append((RESTRICT_SELF, (ruleset, 0)))
    in_all_threads(calls)
    if ruleset >= 0:
        os.close(ruleset)
    if seccomp.is_offered():
        seccomp.Refusals()  # a call that is refused fails, and does not end the process
        seccomp.confine([], needs.sockets)
