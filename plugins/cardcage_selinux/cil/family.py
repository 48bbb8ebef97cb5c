"""Sets of names: types with their attributes, and likewise roles, users and categories, as bits of an integer."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from attrs import define, field

from cardcage_selinux.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_selinux.cil.scope import Scope, Symbol
    from cardcage_selinux.cil.sexpr import Node

__all__ = ["Family", "evaluate", "ordered"]

NESTING = 100
"""How deep attributes may be made of attributes."""


def evaluate(
    node: Node, leaf: Callable[[Node], int], everything: int, span: Callable[[Node, Node], int] | None = None
) -> int:
    """The bits that a set expression means. Raises PolicyError.

    Args:
        leaf: bits of a name.
        everything: what ``all`` means, and ``not`` is taken from.
        span: bits of ``(range A B)``, where that is allowed.
    """
    if node.items is None:
        return everything if node.text == "all" and not node.quoted else leaf(node)
    if not node.items:
        raise PolicyError("expected names, found nothing", node)
    word = node.head
    if word not in ("and", "or", "xor", "not", "all") and not (span and word == "range"):
        bits = 0
        for item in node.items:
            bits |= evaluate(item, leaf, everything, span)
        return bits
    operands = node.items[1:]
    wanted = {"all": 0, "not": 1}.get(word, 2)
    if len(operands) != wanted:
        raise PolicyError(f"{word} takes {wanted} operand{'s' if wanted != 1 else ''}", node)
    if word == "all":
        return everything
    if word == "range" and span:
        return span(operands[0], operands[1])
    first = evaluate(operands[0], leaf, everything, span)
    if word == "not":
        return everything & ~first
    second = evaluate(operands[1], leaf, everything, span)
    return first & second if word == "and" else first | second if word == "or" else first ^ second


@define(eq=False)
class Family:
    """The names of one name space.

    Attributes:
        space: ``type``, ``role``, ``user`` or ``category``; group: the kind of the sets among them.
        members, groups: in the order in which they were declared (or ordered); ``index`` of a member is its bit.
    """

    space: str
    group: str
    members: list[Symbol] = field(factory=list)
    groups: list[Symbol] = field(factory=list)
    _known: dict[int, int] = field(factory=dict)
    _busy: list[Symbol] = field(factory=list)

    def add(self, symbol: Symbol) -> None:
        """Take a symbol that was declared; aliases are only names."""
        if symbol.kind == self.group:
            symbol.index = len(self.groups)
            self.groups.append(symbol)
        elif not symbol.kind.endswith("alias"):
            symbol.index = len(self.members)
            self.members.append(symbol)

    @property
    def everything(self) -> int:
        """The bits of all members."""
        return (1 << len(self.members)) - 1

    def find(self, node: Node, scope: Scope) -> Symbol:
        """A member or group."""
        return scope.find(self.space, node)

    def one(self, node: Node, scope: Scope) -> Symbol:
        """A member. Raises PolicyError for a group."""
        symbol = scope.find(self.space, node)
        if symbol.kind == self.group:
            raise PolicyError(f'expected a {self.space}, "{symbol.name}" is a {self.group}', node)
        return symbol

    def set(self, node: Node, scope: Scope) -> Symbol:
        """A group. Raises PolicyError for a member."""
        symbol = scope.find(self.space, node)
        if symbol.kind != self.group:
            raise PolicyError(f'expected a {self.group}, "{symbol.name}" is a {symbol.kind}', node)
        return symbol

    def named(self, node: Node, scope: Scope) -> int:
        """The bits of a member or group that is named."""
        return self.bits(self.find(node, scope))

    def bits(self, symbol: Symbol) -> int:
        """The bits of a member or group. Raises PolicyError for a group that is made of itself."""
        if symbol.kind != self.group:
            return 1 << symbol.index
        known = self._known.get(id(symbol))
        if known is not None:
            return known
        if symbol in self._busy:
            raise PolicyError(f'{symbol.kind} "{symbol.name}" is made of itself', symbol.node)
        if len(self._busy) >= NESTING:
            raise PolicyError(f"sets nest deeper than {NESTING}", symbol.node)
        self._busy.append(symbol)
        try:
            found = 0
            for node, scope in symbol.parts:
                found |= self.expression(node, scope)
        finally:
            self._busy.pop()
        self._known[id(symbol)] = found
        return found

    def expression(self, node: Node, scope: Scope) -> int:
        """The bits of an expression. Raises PolicyError, Unresolved."""
        node, scope = scope.follow(self.space, node)

        def leaf(one: Node) -> int:
            meant, where = scope.follow(self.space, one)
            return self.named(one, scope) if meant.items is None else self.expression(meant, where)

        def span(first: Node, last: Node) -> int:
            low, high = self.one(first, scope), self.one(last, scope)
            if low.index > high.index:
                raise PolicyError(f'"{low.name}" comes after "{high.name}"', first)
            return (2 << high.index) - (1 << low.index)

        return evaluate(node, leaf, self.everything, span if self.space == "category" else None)


def ordered(symbols: list[Symbol], chains: list[list[tuple[Symbol, Node]]], keyword: str) -> list[Symbol]:
    """*symbols* in the one order that all *chains* agree on. Raises PolicyError when there is none or several."""
    after: dict[int, set[int]] = {id(one): set() for one in symbols}
    before = {id(one): 0 for one in symbols}
    named = {id(symbol) for chain in chains for symbol, _ in chain}
    for symbol in symbols:
        if id(symbol) not in named:
            raise PolicyError(f'{symbol.kind} "{symbol.name}" is in no {keyword}', symbol.node)
    for chain in chains:
        for (low, _), (high, _) in pairwise(chain):
            if id(high) not in after[id(low)]:
                after[id(low)].add(id(high))
                before[id(high)] += 1
    by_id = {id(one): one for one in symbols}
    ready = [one for one in symbols if not before[id(one)]]
    result = []
    while ready:
        if len(ready) > 1:
            raise PolicyError(
                f'no {keyword} says which of "{ready[0].name}" and "{ready[1].name}" is first', ready[1].node
            )
        symbol = ready.pop()
        result.append(symbol)
        for number in after[id(symbol)]:
            before[number] -= 1
            if not before[number]:
                ready.append(by_id[number])
    if len(result) < len(symbols):
        rest = next(one for one in symbols if before[id(one)])
        raise PolicyError(f'{keyword}: "{rest.name}" comes before itself', rest.node)
    for index, symbol in enumerate(result):
        symbol.index = index
    return result
