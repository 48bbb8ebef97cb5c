"""A jail for the gate too: it makes connections and looks names up, and nothing else."""

from __future__ import annotations

from cardcage.security import Needs
from cardcage_jail import confine_program

__all__ = ["confine"]

OF_RESOLVERS = ("/etc", "/run/systemd/resolve", "/run/nscd", "/run/resolvconf", "/run/NetworkManager", "/var/lib/sss")
"""Where the C library reads how names are looked up."""


def confine() -> None:
    """Give up all capabilities, files but those that are read for names, and system calls; as far as the host can.

    Raises HostError.
    """
    confine_program(Needs(read=OF_RESOLVERS, sockets=("inet", "unix")))
