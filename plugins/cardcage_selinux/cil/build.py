"""A policy compiled: statements are declared, resolved in phases, and become the tables of a :class:`Policy`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define, field
from cardcage.errors import near

from cardcage_selinux.cil.classes import Classes
from cardcage_selinux.cil.conditions import condition, truth
from cardcage_selinux.cil.expand import Expander
from cardcage_selinux.cil.family import Family, ordered
from cardcage_selinux.cil.origins import Condition, Origins
from cardcage_selinux.cil.sexpr import Node, Source
from cardcage_selinux.cil.syntax import arguments, check_keywords, declared_name
from cardcage_selinux.errors import PolicyError, Unresolved
from cardcage_selinux.server.context import Names, members
from cardcage_selinux.server.tables import Tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cardcage_selinux.cil.scope import Statement, Symbol
    from cardcage_selinux.server.context import Context

    Handler = Callable[["Build", Statement, list[Node]], None]

__all__ = ["Build", "build"]


@define(eq=False)
class Build:
    """The state of one compilation.

    Attributes:
        tables: what the policy will hold; origins: what said it.
        types, roles, users, categories: the names, as sets.
        sensitivities: in order; chains: the orders that statements give, by keyword.
        said: statements that may stand once only.
        unresolved: for each optional that cannot stay, why.
        missing: the first name outside of optionals that is not declared.
    """

    tables: Tables = field(factory=Tables)
    origins: Origins = field(factory=Origins)
    types: Family = field(factory=lambda: Family("type", "typeattribute"))
    roles: Family = field(factory=lambda: Family("role", "roleattribute"))
    users: Family = field(factory=lambda: Family("user", "userattribute"))
    categories: Family = field(factory=lambda: Family("category", "categoryset"))
    classes: Classes = field(factory=Classes)
    sensitivities: list[Symbol] = field(factory=list)
    sensitivity_categories: dict[int, int] = field(factory=dict)
    chains: dict[str, list[list[tuple[Symbol, Node]]]] = field(factory=dict)
    aliases: list[tuple[str, Symbol]] = field(factory=list)
    said: dict[str, Node] = field(factory=dict)
    contexts: list[tuple[str, Context, Node]] = field(factory=list)
    conditions: dict[tuple[int, str], int] = field(factory=dict)
    tests: dict[tuple[tuple[str, ...], tuple[bool, ...]], int] = field(factory=dict)
    unresolved: dict[str, Unresolved] = field(factory=dict)
    missing: Unresolved | None = None

    def note(self, statement: Statement, error: Unresolved) -> None:
        """Remember that a name in *statement* is not declared."""
        if statement.optional:
            self.unresolved.setdefault(statement.optional[-1], error)
        elif self.missing is None:
            self.missing = error

    def families(self) -> dict[str, Family]:
        """Users, roles and types by the letters that constraints use."""
        return {"u": self.users, "r": self.roles, "t": self.types}

    def condition(self, statement: Statement) -> tuple[int, bool] | None:
        """The number of the condition around a statement, and its branch."""
        if statement.condition is None:
            return None
        node, scope, branch = statement.condition
        key = id(node), scope.path
        if key not in self.conditions:
            names: list[str] = []

            def leaf(one: Node) -> str:
                names.append(scope.find("boolean", one).name)
                return names[-1]

            expression = condition(node, leaf)
            found = Condition(node, expression, tuple(sorted(set(names))))
            table = found.table()
            same = self.tests.setdefault((found.names, table), len(self.tables.conditions)) if table else None
            if same is None or same == len(self.tables.conditions):
                self.tables.conditions.append(expression)
                self.origins.conditions.append(found)
                same = len(self.tables.conditions) - 1
            self.conditions[key] = same
        return self.conditions[key], branch


def build(nodes: list[Node], *, check: bool = True) -> tuple[Tables, Origins]:
    """Compile the statements of all files, to tables and what said them. Raises PolicyError.

    Args:
        check: whether neverallow rules and type bounds are checked (``secilc`` without ``-N``).
    """
    check_keywords(nodes)
    disabled: set[str] = set()
    while True:
        state = Build()
        expander = Expander(disabled)
        try:
            _compile(state, expander, nodes)
            if not state.unresolved and state.missing is None:
                _finish(state, check=check)
        except RecursionError:
            raise PolicyError("sets, conditions and constraints nest too deep", nodes[0]) from None
        if state.unresolved:
            disabled.update(state.unresolved)
            continue
        if state.missing is not None:
            error = state.missing
            known = list(error.known) or [name for space, name in expander.root.symbols if space == error.space]
            raise PolicyError(f"{error.problem}.{near(error.name, known)}".rstrip("."), error.node)
        return state.tables, state.origins


def _compile(state: Build, expander: Expander, nodes: list[Node]) -> None:
    from cardcage_selinux.cil.levels import LEVELS
    from cardcage_selinux.cil.rules import RULES

    object_r = expander.root.declare("role", "role", "object_r", _nowhere())
    state.roles.add(object_r)
    statements = expander.run(nodes, state.note)
    phases: tuple[dict[str, Handler], ...] = (DECLARATIONS, ACTUALS, SETS, LEVELS, RULES)
    for phase in phases:
        for statement in statements:
            handler = phase.get(statement.node.head)
            if handler is None:
                continue
            try:
                handler(state, statement, arguments(statement.node))
            except Unresolved as error:
                state.note(statement, error)
        if phase is ACTUALS:
            state.classes.number()
        elif phase is SETS and not state.unresolved and state.missing is None:
            _order(state)
        if state.unresolved or state.missing is not None:
            return  # what follows would only fail for the same reason


def _nowhere() -> Node:
    return Node("object_r", None, Source("predefined", ""), 0)


def _order(state: Build) -> None:
    state.sensitivities = ordered(state.sensitivities, state.chains.get("sensitivityorder", []), "sensitivityorder")
    state.categories.members = ordered(state.categories.members, state.chains.get("categoryorder", []), "categoryorder")


# what declares names


def _declare(space: str, take: Callable[[Build, Symbol, Statement, list[Node]], None]) -> Handler:
    def handler(state: Build, statement: Statement, given: list[Node]) -> None:
        keyword = statement.node.head
        name = declared_name(given[0])
        if keyword == "role" and name == "object_r" and statement.scope.parent is None:
            return  # every policy has it
        take(state, statement.scope.declare(space, keyword, name, statement.node), statement, given)

    return handler


def _member(space: str) -> Handler:
    families = {"type": "types", "role": "roles", "user": "users", "category": "categories"}

    def take(state: Build, symbol: Symbol, statement: Statement, given: list[Node]) -> None:
        if symbol.kind == "categoryset":
            symbol.parts.append((given[1], statement.scope))
        if symbol.kind.endswith("alias"):
            state.aliases.append((space, symbol))
        family: Family = getattr(state, families[space])
        family.add(symbol)

    return _declare(space, take)


def _class(state: Build, symbol: Symbol, statement: Statement, given: list[Node]) -> None:
    state.classes.add(symbol, given[1])


def _sensitivity(state: Build, symbol: Symbol, statement: Statement, given: list[Node]) -> None:
    if symbol.kind == "sensitivity":
        state.sensitivities.append(symbol)
    else:
        state.aliases.append(("sensitivity", symbol))


def _boolean(state: Build, symbol: Symbol, statement: Statement, given: list[Node]) -> None:
    state.tables.booleans[symbol.name] = truth(given[1])


def _meaning(state: Build, symbol: Symbol, statement: Statement, given: list[Node]) -> None:
    symbol.parts += [(node, statement.scope) for node in given[1:]]


DECLARATIONS: dict[str, Handler] = {
    **{word: _member("type") for word in ("type", "typeattribute", "typealias")},
    **{word: _member("role") for word in ("role", "roleattribute")},
    **{word: _member("user") for word in ("user", "userattribute")},
    **{word: _member("category") for word in ("category", "categoryalias", "categoryset")},
    **{word: _declare("sensitivity", _sensitivity) for word in ("sensitivity", "sensitivityalias")},
    **{word: _declare("class", _class) for word in ("class", "classmap")},
    "common": _declare("common", _class),
    "classpermission": _declare("classpermission", _meaning),
    "boolean": _declare("boolean", _boolean),
    "level": _declare("level", _meaning),
    "levelrange": _declare("levelrange", _meaning),
    "context": _declare("context", _meaning),
    "sid": _declare("sid", _meaning),
}


# what aliases and commons stand for, and the orders


def _actual(space: str) -> Handler:
    def handler(state: Build, statement: Statement, given: list[Node]) -> None:
        word = given[0].symbol(f"the name of a {space}alias")
        alias = statement.scope.lookup(space, word)
        if alias is None:
            raise Unresolved(space, word, given[0])
        if getattr(alias, "kind", "") != f"{space}alias":
            raise PolicyError(f'"{word}" is not a {space}alias', given[0])
        if getattr(alias, "actual", None) is not None:
            raise PolicyError(f'{space}alias "{word}" already has a meaning', given[0])
        found = statement.scope.lookup(space, given[1].symbol(f"the name of a {space}"))
        if found is None:
            raise Unresolved(space, given[1].text, given[1])
        target = found if getattr(found, "kind", "") == f"{space}alias" else statement.scope.find(space, given[1])
        if getattr(target, "kind", "") not in (space, f"{space}alias"):
            raise PolicyError(f'expected a {space}, "{given[1].text}" is a {getattr(target, "kind", "")}', given[1])
        alias.actual = target  # type: ignore[union-attr]  # both are symbols, as their kinds say

    return handler


def _chain(space: str) -> Handler:
    def handler(state: Build, statement: Statement, given: list[Node]) -> None:
        nodes = given[0].list("names in order")
        if nodes and nodes[0].text == "unordered" and space in ("class", "sid"):
            nodes = nodes[1:]
        found: list[tuple[Symbol, Node]] = []
        for node in nodes:
            symbol = statement.scope.find(space, node)
            if symbol.kind != space:
                raise PolicyError(f'expected a {space}, "{symbol.name}" is a {symbol.kind}', node)
            found.append((symbol, node))
        if not found:
            raise PolicyError(f"expected the names of {space}s, found nothing", given[0])
        state.chains.setdefault(statement.node.head, []).append(found)

    return handler


def _once(state: Build, statement: Statement) -> None:
    keyword = statement.node.head
    if keyword in state.said:
        raise PolicyError(f"{keyword} is already given at {state.said[keyword].place}", statement.node)
    state.said[keyword] = statement.node


def _mls(state: Build, statement: Statement, given: list[Node]) -> None:
    _once(state, statement)
    state.tables.mls = truth(given[0])


def _handleunknown(state: Build, statement: Statement, given: list[Node]) -> None:
    _once(state, statement)
    word = given[0].symbol("allow, deny or reject")
    if word not in ("allow", "deny", "reject"):
        raise PolicyError(f'expected allow, deny or reject, found "{word}"', given[0])
    state.tables.handle_unknown = word


def _policycap(state: Build, statement: Statement, given: list[Node]) -> None:
    state.tables.capabilities.add(declared_name(given[0]))


def _classcommon(state: Build, statement: Statement, given: list[Node]) -> None:
    state.classes.join(statement.node, statement.scope)


ACTUALS: dict[str, Handler] = {
    "typealiasactual": _actual("type"),
    "sensitivityaliasactual": _actual("sensitivity"),
    "categoryaliasactual": _actual("category"),
    "classcommon": _classcommon,
    "mls": _mls,
    "handleunknown": _handleunknown,
    "policycap": _policycap,
}


# what sets are made of


def names_in(node: Node, words: Iterable[str]) -> list[Node]:
    """The symbols in an expression that are not operators."""
    if node.items is None:
        return [] if node.text in words else [node]
    return [name for item in node.items for name in names_in(item, words)]


def _set(family: str) -> Handler:
    def handler(state: Build, statement: Statement, given: list[Node]) -> None:
        sets: Family = getattr(state, family)
        for name in names_in(given[1], ("and", "or", "xor", "not", "all")):
            sets.find(name, statement.scope)
        sets.set(given[0], statement.scope).parts.append((given[1], statement.scope))

    return handler


def _classmapping(state: Build, statement: Statement, given: list[Node]) -> None:
    state.classes.map(statement.node, statement.scope)


def _classpermissionset(state: Build, statement: Statement, given: list[Node]) -> None:
    statement.scope.find("classpermission", given[0]).parts.append((given[1], statement.scope))


SETS: dict[str, Handler] = {
    "typeattributeset": _set("types"),
    "roleattributeset": _set("roles"),
    "userattributeset": _set("users"),
    "classmapping": _classmapping,
    "classpermissionset": _classpermissionset,
    **{f"{space}order": _chain(space) for space in ("sensitivity", "category", "class", "sid")},
}


def _finish(state: Build, *, check: bool) -> None:
    """Fill the tables with names and sets, and check what concerns the whole."""
    from cardcage_selinux.cil.checks import check_bounds, check_chains, check_contexts, check_neverallow, check_users

    tables, types = state.tables, state.types
    tables.classes = {one.name: one for one in state.classes.known.values()}
    tables.types = tuple(one.name for one in types.members)
    tables.roles = tuple(one.name for one in state.roles.members)
    tables.users = tuple(one.name for one in state.users.members)
    tables.attributes = {one.name: types.bits(one) for one in types.groups}
    ids: list[list[int]] = [[number] for number in range(len(types.members))]
    for group in types.groups:
        for number in members(types.bits(group)):
            ids[number].append(len(types.members) + group.index)
    tables.type_ids = [tuple(one) for one in ids]
    for family, numbers in (
        (types, tables.type_number),
        (state.roles, tables.role_number),
        (state.users, tables.user_number),
    ):
        numbers.update({one.name: one.index for one in family.members})
    tables.levels = Names(
        tuple(one.name for one in state.sensitivities),
        tuple(one.name for one in state.categories.members),
        {one.name: one.index for one in state.sensitivities},
        {one.name: one.index for one in state.categories.members},
        tuple(state.sensitivity_categories.get(one.index, 0) for one in state.sensitivities),
    )
    by_space = {
        "type": tables.type_number,
        "sensitivity": tables.levels.sensitivity,
        "category": tables.levels.category,
    }
    for space, alias in state.aliases:
        actual: Symbol | None = alias
        for _ in range(100):
            if actual is None or not actual.kind.endswith("alias"):
                break
            actual = actual.actual
        if actual is None or actual.kind.endswith("alias"):
            raise PolicyError(f'{alias.kind} "{alias.name}" stands for nothing', alias.node)
        by_space[space][alias.name] = actual.index
    check_users(state)
    check_chains(tables, state.origins)
    check_contexts(state)
    if check:
        check_neverallow(tables, state.origins)
        check_bounds(tables, state.origins)
