"""Errors between a host and the agent in its guest."""

from __future__ import annotations

from cardcage.errors import GuestError

__all__ = ["AgentError", "AgentTimeout", "NoAgent", "ProtocolError"]


class AgentError(GuestError):
    """The agent, or the guest that it runs in, could not do what was asked for."""


class NoAgent(AgentError):
    """No agent has answered: the guest has none, or is not up yet."""


class AgentTimeout(AgentError, TimeoutError):
    """The agent went silent for longer than the caller waits."""


class ProtocolError(AgentError):
    """The guest sent what no agent sends."""
