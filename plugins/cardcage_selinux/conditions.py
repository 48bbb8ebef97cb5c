"""Conditions over booleans and tunables: ``(and a (not b))``, as functions of their values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_selinux.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cardcage_selinux.sexpr import Node

    Test = Callable[[Mapping[str, bool]], bool]

__all__ = ["condition", "truth"]


def truth(node: Node) -> bool:
    """``true`` or ``false``. Raises PolicyError."""
    word = node.symbol("true or false")
    if word not in ("true", "false"):
        raise PolicyError(f'expected true or false, found "{word}"', node)
    return word == "true"


def condition(node: Node, leaf: Callable[[Node], str]) -> Test:
    """A condition; *leaf* turns the node of a name into the key of its value. Raises PolicyError."""
    if node.items is None:
        name = leaf(node)
        return lambda values: values[name]
    operator, *operands = node.items or [node]
    if operator.items is None and not operands and node.items:
        return condition(operator, leaf)
    word = operator.symbol("an operator")
    if word not in ("and", "or", "xor", "eq", "neq", "not"):
        raise PolicyError(f'expected and, or, xor, eq, neq or not, found "{word}"', operator)
    if len(operands) != (1 if word == "not" else 2):
        raise PolicyError(f"{word} takes {1 if word == 'not' else 2} operands", node)
    first = condition(operands[0], leaf)
    if word == "not":
        return lambda values: not first(values)
    second = condition(operands[1], leaf)
    if word == "and":
        return lambda values: first(values) and second(values)
    if word == "or":
        return lambda values: first(values) or second(values)
    if word == "eq":
        return lambda values: first(values) is second(values)
    return lambda values: first(values) is not second(values)
