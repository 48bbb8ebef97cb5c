"""Conditions and constraints as plain data, and what they mean.

An expression over booleans is a name, or ``(operator, operands ...)``. One over contexts is ``and``, ``or`` and ``not``
over these: ``("in", who, part, bits)``, the user, role or type (part 0, 1, 2) of a context is one of *bits*; ``("same",
part)``, source and target have it in common; ``("level", a, b)`` and ``("dom", a, b)``, level a is, or dominates, level
b, each given as (who, 0 for low or 1 for high). *who* is 0 for the source, 1 for the target, 2 for the third context.

Source: ``libsepol/src/services.c`` (``constraint_expr_eval_reason``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cardcage_selinux.server.context import Context, Level

    Expression = Any  # nested tuples; marshal and the functions below take them as they are

__all__ = ["holds", "satisfied"]


def holds(expression: Expression, values: Mapping[str, bool]) -> bool:
    """True if a condition holds when booleans have these values."""
    if isinstance(expression, str):
        return values[expression]
    operator, first = expression[0], holds(expression[1], values)
    if operator == "not":
        return not first
    if operator == "and":
        return first and holds(expression[2], values)
    if operator == "or":
        return first or holds(expression[2], values)
    return (first is holds(expression[2], values)) is (operator == "eq")


def satisfied(expression: Expression, contexts: tuple[Context, Context, Context]) -> bool:
    """True if a constraint holds for source, target and third context."""
    operator, first, *rest = expression
    if operator == "and":
        return satisfied(first, contexts) and satisfied(rest[0], contexts)
    if operator == "or":
        return satisfied(first, contexts) or satisfied(rest[0], contexts)
    if operator == "not":
        return not satisfied(first, contexts)
    if operator == "in":
        return bool(rest[1] >> contexts[first].number(rest[0]) & 1)
    if operator == "same":
        return contexts[0].number(first) == contexts[1].number(first)
    one, other = _level(contexts, first), _level(contexts, rest[0])
    return one == other if operator == "level" else one.dominates(other)


def _level(contexts: tuple[Context, Context, Context], which: tuple[int, int]) -> Level:
    who, end = which
    range_ = contexts[who].range
    assert range_ is not None  # levels are compared only where there are some
    return range_[end]
