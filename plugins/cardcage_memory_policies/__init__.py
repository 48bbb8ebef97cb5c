"""Card ``memory_policies``: policies that steer the memory of machines; ``[policy] memory`` names them.

Other cards offer one by :class:`PolicyOffer`. A policy sees a
:class:`~cardcage_memory_policies.memory.MachineMemory` for each machine, and acts by its verbs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from cardcage.hookspecs import hookimpl
from cardcage.lazy import lazy_names
from cardcage.registry import Offer

if TYPE_CHECKING:
    from cardcage.machine import Machine
    from cardcage.registry import Registry
    from cardcage.security import Needs

    from cardcage_memory_policies.memory import MachineMemory
    from cardcage_memory_policies.policy import Policy
    from cardcage_memory_policies.run import AttachedPolicy, PolicyRun, policies_of
    from cardcage_memory_policies.smaps import HostMapping, mappings

__all__ = [
    "AttachedPolicy",
    "HostMapping",
    "MachineMemory",
    "Policy",
    "PolicyOffer",
    "PolicyRun",
    "mappings",
    "policies_of",
]


class PolicyOffer(Offer):
    """A memory policy: ``factory(options)`` gives a :class:`~cardcage_memory_policies.policy.Policy`.

    Attributes:
        shared: one for all machines of a host that name it with equal options, instead of one for each machine.
    """

    kind: ClassVar[str] = "policy"

    def __init__(self, name: str, factory: Any, *, shared: bool = False, **common: Any) -> None:
        super().__init__(name, factory, **common)
        self.shared = shared

    def protocols(self) -> tuple[Any, ...]:
        from cardcage_memory_policies.policy import POLICY

        return POLICY


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Read ``policy.memory``."""
    registry.policy_key("memory", help="the policies of the machine's memory")


@hookimpl
def cardcage_built(machine: Machine) -> None:
    """Attach the policies that the machine names."""
    if machine.config.policy.get("memory"):
        from cardcage_memory_policies.run import attach_policies

        attach_policies(machine)


@hookimpl
def cardcage_needs(machine: Machine) -> Needs | None:
    """The needs of the machine's policies, and the host's figures, at which they look."""
    if not machine.config.policy.get("memory"):
        return None
    from cardcage_memory_policies.run import needs

    return needs(machine)


@hookimpl
def cardcage_forking(machine: Machine) -> str | None:
    """Policies run on threads of the process, which a new one has not."""
    return "its memory policies (policy.memory) work for one process" if machine.config.policy.get("memory") else None


@hookimpl
def cardcage_closing(machine: Machine) -> None:
    """Take the machine from its policies."""
    if machine.config.policy.get("memory"):
        from cardcage_memory_policies.run import detach_policies

        detach_policies(machine)


_names: Any = lazy_names(
    "cardcage_memory_policies",
    smaps="HostMapping mappings",
    memory="MachineMemory",
    policy="Policy",
    run="AttachedPolicy PolicyRun policies_of",
)
__getattr__ = _names
