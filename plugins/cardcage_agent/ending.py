"""The end of a machine, as those see it who wait for its agent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.machine import State

from cardcage_agent.errors import AgentError

if TYPE_CHECKING:
    from cardcage.machine import Machine
    from cardcage.outcome import Outcome

    from cardcage_agent.link import Link
    from cardcage_agent.qga import QgaLink

__all__ = ["watch"]


def watch(machine: Machine, link: Link | QgaLink) -> None:
    """End what waits on *link* when *machine* stops."""

    def ended(outcome: Outcome) -> None:
        link.fail(AgentError(f"{machine.name}: the machine ended ({outcome}) before the agent had answered"))

    def changed(state: State) -> None:
        if state == State.STOPPED and machine.outcome is None:  # by an error, which wait() raises
            link.fail(AgentError(f"{machine.name}: the machine ended by an error before the agent had answered"))

    machine.observers.add("outcome", ended)
    machine.observers.add("state", changed)
