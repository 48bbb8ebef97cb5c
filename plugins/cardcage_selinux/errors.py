"""Errors in policies and contexts, in the project's error tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cardcage_selinux.cil.sexpr import Node

__all__ = ["ContextError", "PolicyError", "Unresolved"]


class PolicyError(ConfigError):
    """A policy is at fault; ``str()`` begins with ``file:line:column``, both counted from 1.

    Attributes:
        line, column: the place in the file.
    """

    def __init__(self, problem: str, node: Node) -> None:
        self.node, self.line, self.column = node, node.line, node.column
        super().__init__(problem, file=node.place)


class Unresolved(PolicyError):
    """A name is not declared; inside an ``optional`` that leaves the optional out."""

    def __init__(self, space: str, name: str, node: Node, known: Iterable[str] = ()) -> None:
        self.space, self.name, self.known = space, name, known
        super().__init__(f'no {space} is called "{name}"', node)


class ContextError(UsageError):
    """Text that is not a valid security context under this policy."""
