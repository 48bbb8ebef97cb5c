"""Rules resolved into tables: access, types, roles, users, constraints, defaults and contexts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from cardcage_selinux.cil.conditions import truth
from cardcage_selinux.cil.constraints import constraint
from cardcage_selinux.cil.levels import level, level_range
from cardcage_selinux.cil.origins import Rule
from cardcage_selinux.errors import PolicyError
from cardcage_selinux.server.context import Context, members
from cardcage_selinux.server.tables import KINDS, Defaults

if TYPE_CHECKING:
    from cardcage_selinux.cil.build import Build, Handler
    from cardcage_selinux.cil.scope import Scope, Statement
    from cardcage_selinux.cil.sexpr import Node

__all__ = ["RULES"]

K = TypeVar("K")
V = TypeVar("V")

PAIRS = 1 << 22
"""Pairs of types that the rules about new objects may grow to, all together."""


def _identity(state: Build, node: Node, scope: Scope) -> tuple[str, int, int]:
    """Name, number among types and attributes, and types as bits."""
    symbol = state.types.find(node, scope)
    is_set = symbol.kind == state.types.group
    return symbol.name, symbol.index + (len(state.types.members) if is_set else 0), state.types.bits(symbol)


def _access(state: Build, statement: Statement, given: list[Node]) -> None:
    node, scope, kind = statement.node, statement.scope, statement.node.head
    source, source_id, sources = _identity(state, given[0], scope)
    is_self = given[1].items is None and given[1].text == "self"
    target, target_id, targets = ("self", -1, sources) if is_self else _identity(state, given[1], scope)
    when = state.condition(statement)
    for class_, mask in state.classes.resolve(given[2], scope):
        rule = Rule(kind, source, target, sources, targets, class_, mask, node, when)
        if kind == "neverallow":
            state.origins.never.append(rule)
            continue
        state.origins.rules.append(rule)
        pairs = [(one, one) for one in members(sources)] if is_self else [(source_id, target_id)]
        slot = KINDS.index(kind)
        for pair in pairs:
            key = (*pair, class_.index)
            if when is None:
                state.tables.vectors.setdefault(key, [0, 0, 0])[slot] |= mask
            else:
                state.tables.conditional.setdefault(key, []).append((*when, slot, mask))


def _type_rule(state: Build, statement: Statement, given: list[Node]) -> None:
    scope, kind = statement.scope, statement.node.head
    _, _, sources = _identity(state, given[0], scope)
    is_self = given[1].items is None and given[1].text == "self"
    targets = 0 if is_self else _identity(state, given[1], scope)[2]
    result = state.types.one(given[-1], scope).index
    when = state.condition(statement)
    name = None
    if kind == "typetransition" and len(given) == 5:
        name = _file_name(given[3], scope)
        if when is not None:
            raise PolicyError("a typetransition with a name cannot stand in a booleanif", statement.node)
    classes = state.classes.several(given[2], scope)
    for source in members(sources):
        for target in [source] if is_self else members(targets):
            for class_ in classes:
                if name is None:
                    _add_type_rule(state, statement.node, (kind, source, target, class_.index), result, when)
                else:
                    _once(state, statement.node, state.tables.named, (source, target, class_.index, name), result)
                _room(state, statement.node)


def _file_name(node: Node, scope: Scope) -> str:
    node, _ = scope.follow("name", node)
    if node.items is not None:
        raise PolicyError(f"expected a name, found {node}", node)
    return node.text


def _room(state: Build, node: Node) -> None:
    if len(state.tables.type_rules) + len(state.tables.named) > PAIRS:
        raise PolicyError(f"rules about new objects grow to more than {PAIRS} pairs of types", node)


def _add_type_rule(
    state: Build, node: Node, key: tuple[str, int, int, int], result: int, when: tuple[int, bool] | None
) -> None:
    there = state.tables.type_rules.setdefault(key, [])
    for other, condition in there:
        if other == result:
            continue
        apart = condition and when and condition[0] == when[0] and condition[1] != when[1]
        if not apart:
            raise PolicyError(f"conflicts with the rule at {state.origins.first[key[0], (key, condition)].place}", node)
    there.append((result, when))
    state.origins.first.setdefault((key[0], (key, when)), node)


def _once(state: Build, node: Node, table: dict[K, V], key: K, result: V) -> None:
    """Enter a result that no rule contradicts. Raises PolicyError that says where it is contradicted."""
    first = state.origins.first.setdefault((node.head, key), node)
    if table.setdefault(key, result) != result:
        raise PolicyError(f"conflicts with the rule at {first.place}", node)


def _typebounds(state: Build, statement: Statement, given: list[Node]) -> None:
    parent = state.types.one(given[0], statement.scope).index
    child = state.types.one(given[1], statement.scope).index
    if child in state.tables.bounds:
        place = state.origins.bounds[child].place
        raise PolicyError(f'"{given[1].text}" is already bounded at {place}', statement.node)
    above: int | None = parent
    while above is not None:
        if above == child:
            raise PolicyError(f'"{given[1].text}" would bound itself', statement.node)
        above = state.tables.bounds.get(above)
    state.tables.bounds[child], state.origins.bounds[child] = parent, statement.node


def _typepermissive(state: Build, statement: Statement, given: list[Node]) -> None:
    state.tables.permissive |= 1 << state.types.one(given[0], statement.scope).index


def _expandtypeattribute(state: Build, statement: Statement, given: list[Node]) -> None:
    truth(given[1])  # how attributes are stored changes no decision; the names still have to be right
    for node in [given[0]] if given[0].items is None else given[0].items:
        state.types.set(node, statement.scope)


def _roletype(state: Build, statement: Statement, given: list[Node]) -> None:
    types = state.types.named(given[1], statement.scope)
    for role in members(state.roles.named(given[0], statement.scope)):
        state.tables.role_types[role] = state.tables.role_types.get(role, 0) | types


def _roleallow(state: Build, statement: Statement, given: list[Node]) -> None:
    old, new = (members(state.roles.named(node, statement.scope)) for node in given)
    for first in old:
        for second in new:
            state.tables.role_allows.add((first, second))


def _roletransition(state: Build, statement: Statement, given: list[Node]) -> None:
    scope = statement.scope
    result = state.roles.one(given[3], scope).index
    types = members(_identity(state, given[1], scope)[2])
    for role in members(state.roles.named(given[0], scope)):
        for type_ in types:
            for class_ in state.classes.several(given[2], scope):
                _once(state, statement.node, state.tables.role_transitions, (role, type_, class_.index), result)


def _rangetransition(state: Build, statement: Statement, given: list[Node]) -> None:
    scope = statement.scope
    range_ = level_range(state, given[3], scope)
    targets = members(_identity(state, given[1], scope)[2])
    for source in members(_identity(state, given[0], scope)[2]):
        for target in targets:
            for class_ in state.classes.several(given[2], scope):
                _once(state, statement.node, state.tables.range_transitions, (source, target, class_.index), range_)


def _userrole(state: Build, statement: Statement, given: list[Node]) -> None:
    roles = state.roles.named(given[1], statement.scope)
    for user in members(state.users.named(given[0], statement.scope)):
        state.tables.user_roles[user] = state.tables.user_roles.get(user, 0) | roles


def _userlevel(state: Build, statement: Statement, given: list[Node]) -> None:
    level(state, given[1], statement.scope)  # the level a login would start at: checked, and of no use to decisions
    for user in members(state.users.named(given[0], statement.scope)):
        if state.origins.first.setdefault(("userlevel", user), statement.node) is not statement.node:
            raise PolicyError(f'user "{state.users.members[user].name}" already has a level', statement.node)


def _userrange(state: Build, statement: Statement, given: list[Node]) -> None:
    range_ = level_range(state, given[1], statement.scope)
    for user in members(state.users.named(given[0], statement.scope)):
        if state.origins.first.setdefault(("userrange", user), statement.node) is not statement.node:
            raise PolicyError(f'user "{state.users.members[user].name}" already has a range', statement.node)
        state.tables.user_ranges[user] = range_


def _constrain(state: Build, statement: Statement, given: list[Node]) -> None:
    levels = statement.node.head == "mlsconstrain"
    expression = constraint(given[1], statement.scope, state.families(), levels=levels, third=False)
    for class_, mask in state.classes.resolve(given[0], statement.scope):
        if state.tables.mls or not levels:
            state.tables.constraints.setdefault(class_.index, []).append((mask, expression))
            state.origins.constraints.setdefault(class_.index, []).append(statement.node)


def _validatetrans(state: Build, statement: Statement, given: list[Node]) -> None:
    levels = statement.node.head == "mlsvalidatetrans"
    expression = constraint(given[1], statement.scope, state.families(), levels=levels, third=True)
    for class_ in state.classes.several(given[0], statement.scope):
        if state.tables.mls or not levels:
            state.tables.transitions.setdefault(class_.index, []).append((0, expression))
            state.origins.transitions.setdefault(class_.index, []).append(statement.node)


def _default(state: Build, statement: Statement, given: list[Node]) -> None:
    part = statement.node.head.removeprefix("default")
    side = given[1].symbol("source or target")
    if side not in ("source", "target") and not (part == "range" and side == "glblub"):
        raise PolicyError(f'expected source or target, found "{side}"', given[1])
    value: str | tuple[str, str] = side
    if part == "range":
        which = given[2].symbol("low, high or low-high") if len(given) == 3 else ""
        if which not in (("",) if side == "glblub" else ("low", "high", "low-high")):
            raise PolicyError(f"expected low, high or low-high after {side}", statement.node)
        value = side, which
    for node in [given[0]] if given[0].items is None else given[0].items:
        for class_ in state.classes.several(node, statement.scope):
            defaults = state.tables.defaults.get(class_.index, Defaults())
            if getattr(defaults, part) not in (None, value):
                raise PolicyError(f'class "{class_.name}" has another {statement.node.head} already', statement.node)
            changed: dict[str, Any] = {part: value}
            state.tables.defaults[class_.index] = defaults._replace(**changed)


def _read_context(state: Build, label: str, node: Node, scope: Scope) -> None:
    """Keep ``(USER ROLE TYPE RANGE)``, to be checked when all rules are known."""
    items = node.list("(USER ROLE TYPE RANGE)")
    if len(items) not in ((4,) if state.tables.mls else (3, 4)):
        raise PolicyError("expected (USER ROLE TYPE RANGE)", node)
    families = (state.users, state.roles, state.types)
    user, role, type_ = (sets.one(one, scope).index for sets, one in zip(families, items, strict=False))
    range_ = level_range(state, items[3], scope) if len(items) == 4 else None
    state.contexts.append((label, Context(user, role, type_, range_ if state.tables.mls else None), node))


def _context(state: Build, statement: Statement, given: list[Node]) -> None:
    _read_context(state, "", given[1], statement.scope)


def _sidcontext(state: Build, statement: Statement, given: list[Node]) -> None:
    name = statement.scope.find("sid", given[0]).name
    if any(one == name for one, _, _ in state.contexts):
        raise PolicyError(f'sid "{name}" already has a context', statement.node)
    node, scope = statement.scope.follow("context", given[1])
    if node.items is None:
        ((node, scope),) = scope.find("context", node).parts
    _read_context(state, name, node, scope)


def _resolved(state: Build, statement: Statement, given: list[Node]) -> None:
    """Sets of permissions that nothing uses have to be right too."""
    state.classes.resolve(given[-1], statement.scope)


def _booleanif(state: Build, statement: Statement, given: list[Node]) -> None:
    statement.condition = given[0], statement.scope, True
    state.condition(statement)


def _named_level(state: Build, statement: Statement, given: list[Node]) -> None:
    act = level if statement.node.head == "level" else level_range
    act(state, given[1], statement.scope)


def _categoryset(state: Build, statement: Statement, given: list[Node]) -> None:
    state.categories.expression(given[1], statement.scope)


RULES: dict[str, Handler] = {
    **dict.fromkeys(("allow", "auditallow", "dontaudit", "neverallow"), _access),
    **dict.fromkeys(("typetransition", "typechange", "typemember"), _type_rule),
    **dict.fromkeys(("constrain", "mlsconstrain"), _constrain),
    **dict.fromkeys(("validatetrans", "mlsvalidatetrans"), _validatetrans),
    **dict.fromkeys(("defaultuser", "defaultrole", "defaulttype", "defaultrange"), _default),
    **dict.fromkeys(("classmapping", "classpermissionset"), _resolved),
    **dict.fromkeys(("level", "levelrange"), _named_level),
    "categoryset": _categoryset,
    "context": _context,
    "typebounds": _typebounds,
    "typepermissive": _typepermissive,
    "expandtypeattribute": _expandtypeattribute,
    "roletype": _roletype,
    "roleallow": _roleallow,
    "roletransition": _roletransition,
    "rangetransition": _rangetransition,
    "userrole": _userrole,
    "userlevel": _userlevel,
    "userrange": _userrange,
    "sidcontext": _sidcontext,
    "booleanif": _booleanif,
}
