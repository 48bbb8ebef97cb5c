"""Containers taken apart: blocks, inheritance, macros, calls, optionals and tunables become a flat list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_selinux.cil.conditions import condition, truth
from cardcage_selinux.cil.expressions import holds
from cardcage_selinux.cil.scope import Argument, Scope, Statement, Symbol
from cardcage_selinux.cil.sexpr import MAX_DEPTH
from cardcage_selinux.cil.syntax import IN_CONDITION, SYNTAX, arguments, declared_name
from cardcage_selinux.errors import PolicyError, Unresolved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cardcage_selinux.cil.sexpr import Node

    Note = Callable[[Statement, Unresolved], None]

__all__ = ["PARAMETERS", "Expander"]

LIMIT = 300_000
"""Statements after all macros and blocks are copied: far more than this object manager's policies have."""

ORDER = ("tunableif", "in", "blockinherit", "in after", "blockabstract", "call")
"""Which containers are taken apart before which others, as in secilc."""

PARAMETERS = {
    "type": "type",
    "typealias": "type",
    "role": "role",
    "user": "user",
    "sensitivity": "sensitivity",
    "category": "category",
    "categoryset": "category",
    "level": "level",
    "levelrange": "levelrange",
    "class": "class",
    "classmap": "class",
    "classpermission": "classpermission",
    "boolean": "boolean",
    "tunable": "tunable",
    "name": "name",
    "string": "name",
    "block": "block",
    "macro": "block",
}
"""Kinds of a macro's parameters, each with the name space of its arguments."""


class Expander:
    """Makes the flat list. *disabled* names the optionals to leave out."""

    def __init__(self, disabled: set[str]) -> None:
        self.root = Scope(None, name="")
        self.statements: list[Statement] = []
        self.tunables: dict[int, bool] = {}
        self._disabled = disabled
        self._linked: dict[int, Symbol] = {}
        self._optionals: dict[int, Statement | None] = {}
        self._waiting: dict[str, list[Statement]] = {keyword: [] for keyword in ORDER}
        self._seen = 0

    def run(self, nodes: list[Node], note: Note) -> list[Statement]:
        """All statements that count. Raises PolicyError; *note* hears of names that are not declared."""
        self._scan(nodes, Statement(nodes[0], self.root) if nodes else None)
        acts = {
            "tunableif": self._tunableif,
            "in": self._in,
            "in after": self._in,
            "blockinherit": self._inherit,
            "blockabstract": self._abstract,
            "call": self._call,
        }
        while keyword := next((one for one in ORDER if self._waiting[one]), None):
            batch, self._waiting[keyword] = self._waiting[keyword], []
            if keyword == "blockinherit":  # all names are looked up before any block is copied, as in secilc
                batch = [one for one in batch if self._guarded(self._link, one, note)]
            for statement in batch:
                if keyword != "call" or not statement.scope.is_abstract():
                    self._guarded(acts[keyword], statement, note)
        return [one for one in self.statements if not one.scope.is_abstract()]

    def _guarded(self, act: Callable[[Statement], None], statement: Statement, note: Note) -> bool:
        try:
            act(statement)
        except Unresolved as error:
            note(statement, error)
            return False
        return True

    def _scan(self, nodes: Iterable[Node], like: Statement | None, scope: Scope | None = None) -> None:
        """Take *nodes*, which stand where *like* stands (in *scope*, when that differs)."""
        if like is None:
            return
        for node in nodes:
            self._seen += 1
            if self._seen > LIMIT:
                raise PolicyError(f"macros and blocks grow to more than {LIMIT} statements", node)
            self._one(Statement(node, scope or like.scope, like.optional, like.condition))

    def _one(self, statement: Statement) -> None:
        node = statement.node
        keyword, given = node.head, arguments(node)
        if keyword == "block":
            self._block(statement)
        elif keyword == "macro":
            self._macro(statement)
        elif keyword == "optional":
            self._optional(statement)
        elif keyword == "tunable":
            symbol = statement.scope.declare("tunable", "tunable", declared_name(given[0]), node)
            self.tunables[id(symbol)] = truth(given[1])
        elif keyword == "booleanif":
            self.statements.append(statement)
            for branch in given[1:]:
                inner = Statement(node, statement.scope, statement.optional)
                inner.condition = given[0], statement.scope, branch.head == "true"
                self._scan((branch.items or [])[1:], inner)
        elif keyword == "in" and given[0].text in ("before", "after") and len(given) > 1 and given[1].items is None:
            self._waiting["in" if given[0].text == "before" else "in after"].append(statement)
        elif keyword in self._waiting:
            self._waiting[keyword].append(statement)
        else:
            assert keyword in SYNTAX  # check_keywords saw to it
            self.statements.append(statement)

    def _optional(self, statement: Statement) -> None:
        node, owner = statement.node, statement.scope.owner()
        word, *body = arguments(node)
        name = f"{statement.scope.path}/{node.place}"
        there = owner.symbols.get(("block", declared_name(word, container=True)))
        if there is None:  # several optionals may have the same name: the first is the one that "in" reaches
            there = statement.scope.declare("block", "optional", word.text, node)
            self._optionals[id(there)] = None if name in self._disabled else statement
        elif there.kind != "optional":
            raise PolicyError(f'{there.kind} "{there.name}" is already declared at {there.node.place}', node)
        if name not in self._disabled:
            statement.optional += (name,)
            self._scan(body, statement)

    def _block(self, statement: Statement) -> None:
        node, scope = statement.node, statement.scope
        given = arguments(node)
        symbol = scope.declare("block", "block", declared_name(given[0], container=True), node)
        body = Scope(scope, name=symbol.name, path=f"{scope.path}/{node.place}", depth=scope.depth + 1)
        symbol.body = body
        self._deep(body, node)
        body.bodies.append((given[1:], statement.optional))
        self._scan(given[1:], statement, body)

    def _deep(self, scope: Scope, node: Node) -> None:
        if scope.depth > MAX_DEPTH:
            raise PolicyError(f"blocks, inheritance and calls nest deeper than {MAX_DEPTH}", node)

    def _macro(self, statement: Statement) -> None:
        node = statement.node
        name, parameters, *_ = arguments(node)
        names = set()
        for parameter in parameters.list("the parameters"):
            pair = parameter.list("a kind and a name")
            if len(pair) != 2:
                raise PolicyError("expected (KIND NAME)", parameter)
            kind, word = pair[0].symbol("a kind"), declared_name(pair[1])
            if kind not in PARAMETERS:
                raise PolicyError(f'no parameter of kind "{kind}" is supported', pair[0])
            if word in names:
                raise PolicyError(f'parameter "{word}" is given twice', pair[1])
            names.add(word)
        statement.scope.declare("block", "macro", declared_name(name, container=True), node)

    def _find(self, statement: Statement, name: Node, kind: str) -> Symbol:
        symbol = statement.scope.find("block", name)
        if symbol.kind != kind:
            raise PolicyError(f'"{symbol.name}" is a {symbol.kind}, expected a {kind}', name)
        return symbol

    def _in(self, statement: Statement) -> None:
        given = arguments(statement.node)
        if given[0].text in ("before", "after") and len(given) > 1 and given[1].items is None:
            given = given[1:]
        symbol = statement.scope.find("block", given[0])
        if symbol.kind == "optional":
            like = self._optionals[id(symbol)]
            if like is not None:
                self._scan(given[1:], like)
        elif symbol.kind == "macro":
            symbol.parts += [(node, statement.scope) for node in given[1:]]
        elif symbol.body is not None:
            symbol.body.bodies.append((given[1:], statement.optional))
            self._scan(given[1:], statement, symbol.body)

    def _copy(self, statement: Statement, symbol: Symbol) -> Scope:
        """A scope for a copy of *symbol*. Raises PolicyError when it would hold itself."""
        scope: Scope | None = statement.scope
        while scope is not None:
            if scope.source is symbol.node or (symbol.body is not None and scope is symbol.body):
                raise PolicyError(f'"{symbol.name}" holds itself', statement.node)
            scope = scope.parent
        here = statement.scope
        path = f"{here.path}/{statement.node.place}"
        call = symbol.kind == "macro"
        copy = Scope(here, origin=symbol.scope, source=symbol.node, call=call, path=path, depth=here.depth + 1)
        self._deep(copy, statement.node)
        return copy

    def _link(self, statement: Statement) -> None:
        (name,) = arguments(statement.node)
        self._linked[id(statement)] = self._find(statement, name, "block")

    def _inherit(self, statement: Statement) -> None:
        symbol = self._linked[id(statement)]
        assert symbol.body is not None  # a block has one
        copy = self._copy(statement, symbol)
        for nodes, optional in list(symbol.body.bodies):
            like = Statement(statement.node, copy, statement.optional + optional, statement.condition)
            self._scan((one for one in nodes if one.head != "blockabstract"), like)

    def _abstract(self, statement: Statement) -> None:
        (name,) = arguments(statement.node)
        body = self._find(statement, name, "block").body
        assert body is not None  # a block has one
        body.abstract = True

    def _tunableif(self, statement: Statement) -> None:
        test, *branches = arguments(statement.node)
        values = {}

        def leaf(node: Node) -> str:
            symbol = statement.scope.find("tunable", node)
            values[symbol.name] = self.tunables[id(symbol)]
            return symbol.name

        chosen = holds(condition(test, leaf), values)
        for branch in branches:
            if (branch.head == "true") is chosen:
                self._scan((branch.items or [])[1:], statement)

    def _call(self, statement: Statement) -> None:
        name, *rest = arguments(statement.node)
        macro = self._find(statement, name, "macro")
        copy = self._copy(statement, macro)
        _, parameters, *body = arguments(macro.node)
        body += [node for node, _ in macro.parts]
        wanted = parameters.items or []
        given = rest[0].list("the arguments") if rest else []
        if len(given) != len(wanted):
            raise PolicyError(
                f'macro "{macro.name}" takes {len(wanted)} arguments, {len(given)} are given', statement.node
            )
        for parameter, value in zip(wanted, given, strict=True):
            kind, word = parameter.items or []
            copy.arguments[PARAMETERS[kind.text], word.text] = Argument(value, statement.scope)
        if statement.condition:
            self._fits(body, statement)
        self._scan(body, statement, copy)

    def _fits(self, body: list[Node], statement: Statement) -> None:
        for node in body:
            if node.head not in IN_CONDITION:
                raise PolicyError(f"{node.head} cannot stand in a booleanif, as this call has it", statement.node)
