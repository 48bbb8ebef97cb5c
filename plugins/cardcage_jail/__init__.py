"""Card ``jail``: before a guest's first instruction, the process gives up what its machine does not need.

``[security] jail`` is ``"on"``, ``"off"`` or ``"require"``. It is on where the process exists for its machines, as the
command line's does; ``open_later`` names files that may be opened in it all the same. docs/security.md says what is
given up, and :class:`cardcage.security.Needs` how a card states what it needs. What a card opens in the jail after all
comes by :func:`open_file`, :func:`listen_at` and :func:`start_program` from a broker outside, by what was stated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.hookspecs import hookimpl
from cardcage.lazy import lazy_names

if TYPE_CHECKING:
    from cardcage.machine import Machine
    from cardcage.registry import Registry

    from cardcage_jail.outside import is_inside, is_ours, lend, listen_at, open_file, start_program
    from cardcage_jail.program import confine_program

__all__ = ["confine_program", "is_inside", "is_ours", "lend", "listen_at", "open_file", "start_program"]


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Read ``security.jail``, and offer a line of ``cardcage doctor``."""
    registry.policy_key("security.jail", help='"on", "off" or "require": give up what the machine does not need')
    registry.policy_key("security.open_later", help="files and directories that may still be opened in the jail")
    registry.doctor("jail", "cardcage_jail.check:jail", help="Landlock and seccomp, for the jail around the process")


@hookimpl
def cardcage_forking(machine: Machine) -> str | None:
    """Processes begin in the jail where a card stated that it needs them."""
    from cardcage_jail.jail import forking

    return forking(machine)


@hookimpl(tryfirst=True)  # what the others are refused is told here
def cardcage_forked(machine: Machine) -> None:
    """Refused calls of this process are told in its own log."""
    from cardcage_jail.jail import forked

    forked(machine)


@hookimpl
def cardcage_admit(machine: Machine) -> None:
    """Refuse wrong values before anything is taken."""
    from cardcage_jail.jail import opened_later, wanted

    wanted(machine)
    opened_later(machine)


@hookimpl(trylast=True)  # the other cards' files are open by then
def cardcage_starting(machine: Machine) -> None:
    """Put the process into its jail."""
    from cardcage_jail.jail import enter

    enter(machine)


_names: Any = lazy_names(
    "cardcage_jail",
    outside="is_inside is_ours lend listen_at open_file start_program",
    program="confine_program",
)
__getattr__ = _names
