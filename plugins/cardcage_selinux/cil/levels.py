"""Levels and ranges of a policy: ``(s0 (c0 (range c3 c5)))`` and ``(LOW HIGH)``, or names of these."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_selinux.errors import PolicyError
from cardcage_selinux.server.context import Level, Range

if TYPE_CHECKING:
    from cardcage_selinux.cil.build import Build, Handler
    from cardcage_selinux.cil.scope import Scope, Statement
    from cardcage_selinux.cil.sexpr import Node

__all__ = ["LEVELS", "level", "level_range"]


def level(state: Build, node: Node, scope: Scope) -> Level:
    """A level, named or written out. Raises PolicyError, also for categories that its sensitivity may not carry."""
    node, scope = scope.follow("level", node)
    if node.items is None:
        ((meaning, where),) = scope.find("level", node).parts
        if meaning.items is None:
            raise PolicyError(f"expected (SENSITIVITY [CATEGORIES]), found {meaning}", meaning)
        return level(state, meaning, where)
    if len(node.items) not in (1, 2):
        raise PolicyError("expected (SENSITIVITY [CATEGORIES])", node)
    symbol = scope.find("sensitivity", node.items[0])
    bits = state.categories.expression(node.items[1], scope) if len(node.items) == 2 else 0
    wrong = bits & ~state.sensitivity_categories.get(symbol.index, 0)
    if wrong:
        name = state.categories.members[(wrong & -wrong).bit_length() - 1].name
        raise PolicyError(f'sensitivity "{symbol.name}" may not carry category "{name}"', node)
    return Level(symbol.index, bits)


def level_range(state: Build, node: Node, scope: Scope) -> Range:
    """A range, named or written out. Raises PolicyError, also when its high does not dominate its low."""
    node, scope = scope.follow("levelrange", node)
    if node.items is None:
        ((meaning, where),) = scope.find("levelrange", node).parts
        if meaning.items is None:
            raise PolicyError(f"expected (LOW HIGH), found {meaning}", meaning)
        return level_range(state, meaning, where)
    if len(node.items) != 2:
        raise PolicyError("expected (LOW HIGH)", node)
    low, high = (level(state, one, scope) for one in node.items)
    if not high.dominates(low):
        raise PolicyError("the high level of this range does not dominate its low level", node)
    return Range(low, high)


def _sensitivitycategory(state: Build, statement: Statement, given: list[Node]) -> None:
    symbol = statement.scope.find("sensitivity", given[0])
    bits = state.categories.expression(given[1], statement.scope)
    state.sensitivity_categories[symbol.index] = state.sensitivity_categories.get(symbol.index, 0) | bits


LEVELS: dict[str, Handler] = {"sensitivitycategory": _sensitivitycategory}
