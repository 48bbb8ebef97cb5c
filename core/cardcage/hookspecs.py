"""The hooks of cardcage, in the order of a host's and a machine's life. All but ``needs`` and ``forking`` return None.

Hooks assemble, protocols operate: none of these is called while a guest runs. They go through pluggy's own caller, in
the order that it knows: cards loaded later are called earlier, unless one asks for ``tryfirst`` or ``trylast``, and
wrappers surround the others. *machine* is a :class:`cardcage.machine.Machine`.

A card that takes something in a hook gives it back by ``machine.defer(callback)``, which is called when the machine has
closed, or could not be built, in the reverse order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from cardcage.registry import Registry
    from cardcage.security import Needs

__all__ = ["Hooks", "hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("cardcage")
hookimpl = pluggy.HookimplMarker("cardcage")


class Hooks:
    """Hooks that a card may implement, as module-level functions marked with :data:`hookimpl`."""

    # a host

    @hookspec
    def cardcage_register(self, registry: Registry) -> None:
        """Say what the card offers. Called once per host and card; only registers, with lazy references."""

    # a machine

    @hookspec
    def cardcage_admit(self, machine: Any) -> None:
        """Refuse a machine, before anything is taken for it: raise ConfigError, HostError or Denied. Or rename it.

        The machine has its ``config name label mediator log observers memory_backend``, and no accelerator, RAM or
        device yet.
        """

    @hookspec
    def cardcage_built(self, machine: Any) -> None:
        """The machine is whole: its devices are plugged in, its boot image is open, nothing ran. Raise to refuse it."""

    @hookspec
    def cardcage_starting(self, machine: Any) -> None:
        """The first instruction is next; all files that the machine needs are open. Raise to keep it from starting.

        Called on the thread that starts it; again where that was refused, or one that comes got ready before its RAM.
        """

    @hookspec
    def cardcage_needs(self, machine: Any) -> Needs | None:
        """Say what the card itself, not a device or back end of its, still needs of the host once *machine* runs.

        Asked by who is about to take the rest away, before the first instruction.
        """

    @hookspec
    def cardcage_forking(self, machine: Any) -> str | None:
        """Say in one line why *machine*'s process cannot become two (devices are :class:`cardcage.device.Forkable`)."""

    @hookspec
    def cardcage_forked(self, machine: Any) -> None:
        """This is the new process: make anew what the card holds for *machine*. The parent's files are the parent's."""

    @hookspec
    def cardcage_closing(self, machine: Any) -> None:
        """The machine has stopped, its threads have ended, its devices and memory are still there.

        Called once for a machine that was built, or refused while ``cardcage_built`` was called. Each card is called
        on its own: an error of one is logged, and keeps no other card from it.
        """
