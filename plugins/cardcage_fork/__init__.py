"""Card ``fork``: running copies of a running machine, in processes of their own, and a way back to a checkpoint.

::

    copies = vm.fork(3)
    print(copies[0].run("hostname", text=True).stdout)

    vm.checkpoint()
    ...
    vm.revert()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.hookspecs import hookimpl
from cardcage.lazy import lazy_names

if TYPE_CHECKING:
    from cardcage.machine import Machine
    from cardcage.registry import Registry
    from cardcage.security import Needs

    from cardcage_fork.copy import Copy, fork
    from cardcage_fork.reverting import Checkpoint, checkpoint, revert

__all__ = ["Checkpoint", "Copy", "checkpoint", "fork", "revert"]


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the verbs ``fork``, ``checkpoint`` and ``revert``, and the command ``fork``, here and in the machine."""
    from cardcage_fleet import ControlOffer

    registry.verb("fork", "cardcage_fork.copy:fork", help="running copies, each a process of its own")
    registry.verb("checkpoint", "cardcage_fork.reverting:checkpoint", help="a point to come back to")
    registry.verb("revert", "cardcage_fork.reverting:revert", help="back to the checkpoint")
    registry.command(
        "fork",
        "cardcage_fork.command:run",
        configure="cardcage_fork.command:configure",
        help="make running copies of a running machine",
    )
    registry.add(ControlOffer("fork", "cardcage_fork.command:answer", help="make running copies of the machine"))


@hookimpl
def cardcage_needs(machine: Machine) -> Needs | None:
    """Processes, where the machine is one that can be forked."""
    from cardcage_fork.plan import needs

    return needs(machine)


_names: Any = lazy_names("cardcage_fork", reverting="Checkpoint checkpoint revert", copy="Copy fork")
__getattr__ = _names
