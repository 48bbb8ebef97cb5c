"""Names: what is declared where, and how a name is looked up from inside blocks and macros.

Source: ``cil_resolve_ast.c`` (``__cil_resolve_name_with_parents``): from a call first its arguments, then (unless
the macro declares the name) where the macro is defined, then where it is called; from an inherited block first where it
is inherited, then where it is defined.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define, field

from cardcage_selinux.errors import PolicyError, Unresolved

if TYPE_CHECKING:
    from cardcage_selinux.cil.sexpr import Node

__all__ = ["Argument", "Scope", "Statement", "Symbol"]


@define(eq=False)
class Symbol:
    """Something with a name.

    Attributes:
        space: the name space it lives in; kind: what it is (``type``, ``typeattribute``, ``typealias`` ...).
        name: with the names of its blocks before it.
        index: its number among its like, given when all are known.
        actual: what an alias stands for.
        parts: expressions that make a set, each with the scope in which its names are meant.
        body: the scope of a block.
    """

    space: str
    kind: str
    name: str
    node: Node
    scope: Scope
    index: int = -1
    actual: Symbol | None = None
    parts: list[tuple[Node, Scope]] = field(factory=list)
    body: Scope | None = None


@define(eq=False)
class Argument:
    """The argument of a macro's parameter: an expression where the macro is called."""

    node: Node
    scope: Scope


@define(eq=False)
class Scope:
    """Where statements stand: the whole policy, a block, an inherited block or a call of a macro.

    Attributes:
        parent: the scope around it, ``None`` for the whole.
        name: that of a block or the whole (empty), ``None`` for the others, whose names go to the block around.
        origin: where an inherited block or a macro is defined.
        source: what is inherited or called, to see cycles; call: whether it is called.
        path: tells scopes apart, the same in each pass.
    """

    parent: Scope | None
    name: str | None = None
    origin: Scope | None = None
    source: Node | None = None
    call: bool = False
    path: str = ""
    depth: int = 0
    abstract: bool = False
    symbols: dict[tuple[str, str], Symbol] = field(factory=dict)
    arguments: dict[tuple[str, str], Argument] = field(factory=dict)
    declared: set[tuple[str, str]] = field(factory=set)
    bodies: list[tuple[list[Node], tuple[str, ...]]] = field(factory=list)

    def owner(self) -> Scope:
        """The block (or the whole) that holds what is declared here."""
        scope = self
        while scope.name is None and scope.parent is not None:
            scope = scope.parent
        return scope

    def declare(self, space: str, kind: str, name: str, node: Node) -> Symbol:
        """A new symbol. Raises PolicyError when the name is taken."""
        owner = self.owner()
        key = space, name
        there = owner.symbols.get(key)
        if there is not None:
            raise PolicyError(f'{there.kind} "{there.name}" is already declared at {there.node.place}', node)
        scope = self
        while scope is not owner and scope.parent is not None:
            scope.declared.add(key)
            scope = scope.parent
        symbol = Symbol(space, kind, f"{owner.name}.{name}" if owner.name else name, node, self)
        owner.symbols[key] = symbol
        return symbol

    def is_abstract(self) -> bool:
        """True if it stands in an abstract block, which only counts where it is inherited."""
        scope: Scope | None = self
        while scope is not None:
            if scope.abstract:
                return True
            scope = scope.parent
        return False

    def lookup(self, space: str, name: str) -> Symbol | Argument | None:
        """Return the meaning of *name* here, ``None`` if it has none."""
        if "." in name:
            return self._qualified(space, name)
        key = space, name
        seen: set[int] = set()
        stack: list[Scope | None] = [self]
        while stack:
            scope = stack.pop()
            if scope is None or id(scope) in seen:
                continue
            seen.add(id(scope))
            found = scope.symbols.get(key) or scope.arguments.get(key)
            if found is not None:
                return found
            if scope.call:  # the last that is added is looked at first, with all that is around it
                stack += [scope.parent, None if key in scope.declared else scope.origin]
            else:
                stack += [scope.origin, scope.parent]
        return None

    def _qualified(self, space: str, name: str) -> Symbol | Argument | None:
        first, *path, last = name.split(".")
        scope: Scope | None = self
        if first:
            block = self.lookup("block", first)
            while isinstance(block, Argument):
                block = block.scope.lookup("block", block.node.text)
            scope = block.body if block else None
        else:
            while scope is not None and scope.parent is not None:
                scope = scope.parent
        for part in path:
            inner = scope.symbols.get(("block", part)) if scope else None
            scope = inner.body if inner else None
        return scope.symbols.get((space, last)) if scope else None

    def follow(self, space: str, node: Node) -> tuple[Node, Scope]:
        """Replace a macro's parameter by what it stands for, with the scope that is meant."""
        scope = self
        while node.items is None and not node.quoted:
            found = scope.lookup(space, node.text)
            if not isinstance(found, Argument):
                break
            node, scope = found.node, found.scope
        return node, scope

    def find(self, space: str, node: Node) -> Symbol:
        """The symbol, aliases followed. Raises Unresolved, or PolicyError for what is not a name."""
        meant, scope = self.follow(space, node)
        name = meant.symbol(f"the name of a {space}")
        found = scope.lookup(space, name)
        for _ in range(100):
            if not isinstance(found, Symbol):
                raise Unresolved(space, name, node)
            if not found.kind.endswith("alias"):
                return found
            if found.actual is None:
                raise PolicyError(f'{found.kind} "{found.name}" stands for nothing', found.node)
            found = found.actual
        raise PolicyError(f'alias "{name}" stands for itself', node)


@define(eq=False)
class Statement:
    """One statement where it counts.

    Attributes:
        optional: the optionals around it, outermost first.
        condition: the ``booleanif`` around it with its branch.
    """

    node: Node
    scope: Scope
    optional: tuple[str, ...] = ()
    condition: tuple[Node, Scope, bool] | None = None
