"""Conditions over booleans and tunables: ``(and a (not b))``, as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_selinux.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_selinux.cil.expressions import Expression
    from cardcage_selinux.cil.sexpr import Node

__all__ = ["condition", "truth"]


def truth(node: Node) -> bool:
    """``true`` or ``false``. Raises PolicyError."""
    word = node.symbol("true or false")
    if word not in ("true", "false"):
        raise PolicyError(f'expected true or false, found "{word}"', node)
    return word == "true"


def condition(node: Node, leaf: Callable[[Node], str]) -> Expression:
    """A condition, for :func:`~cardcage_selinux.cil.expressions.holds`. Raises PolicyError.

    Args:
        leaf: turns the node of a name into the key of its value.
    """
    if node.items is None:
        return leaf(node)
    operator, *operands = node.items or [node]
    if operator.items is None and not operands and node.items:
        return condition(operator, leaf)
    word = operator.symbol("an operator")
    if word not in ("and", "or", "xor", "eq", "neq", "not"):
        raise PolicyError(f'expected and, or, xor, eq, neq or not, found "{word}"', operator)
    if len(operands) != (1 if word == "not" else 2):
        raise PolicyError(f"{word} takes {1 if word == 'not' else 2} operands", node)
    return (word, *(condition(one, leaf) for one in operands))
