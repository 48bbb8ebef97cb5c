"""Memory policies: what a policy card is, what it sees of a machine, and the verbs it acts with.

A policy is any object with ``attach(memory)``, called once for each machine that it is for. Optional are
``detach(memory)``, which puts everything back, and ``step()``, which a thread of the policy's own calls every
``interval`` seconds (1 by default) while machines are attached: it may take its time, it holds up no machine. The three
never overlap.

What it sees: a :class:`MachineMemory` for each machine, and the host's by
:func:`cardcage_fleet.hostmemory.read_host_memory`. How it acts:
``advise``, ``merge``, ``reclaim``, ``set_target``. An exception in ``step`` ends the machines of that policy, as any
card's does: memory that nobody steers any more would be the host's to kill.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from cardcage.security import HasNeeds

if TYPE_CHECKING:
    from cardcage_memory_policies.memory import MachineMemory

__all__ = ["POLICY", "Detachable", "Policy", "Stepping"]


class Policy(Protocol):
    """A policy card's factory product."""

    def attach(self, memory: MachineMemory, /) -> None:
        """*memory* is this policy's from now on: the machine is built, and has not started. Raise to refuse it."""


class Detachable(Protocol):
    """A policy that puts back what it did."""

    def detach(self, memory: MachineMemory, /) -> None:
        """Put back what was done to *memory*; ``memory.ending`` says that it is about to be freed anyway."""


class Stepping(Protocol):
    """A policy that acts from time to time: every ``interval`` seconds, an attribute, where it has one (else 1)."""

    def step(self) -> None:
        """Called on a thread of the policy's own, while it has a machine."""


POLICY: tuple[Any, ...] = (Policy, Detachable, Stepping, HasNeeds)
"""Protocols that are looked for in a policy; the first it must have."""
