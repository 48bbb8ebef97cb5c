"""Classes and permissions: commons, maps and named sets, resolved to (class, bits)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define, field
from cardcage.errors import near

from cardcage_selinux.cil.family import evaluate
from cardcage_selinux.cil.syntax import declared_name
from cardcage_selinux.errors import PolicyError, Unresolved
from cardcage_selinux.server.tables import Class

if TYPE_CHECKING:
    from cardcage_selinux.cil.scope import Scope, Symbol
    from cardcage_selinux.cil.sexpr import Node

__all__ = ["Classes"]

WIDTH = 32
"""Permissions of a class: an access vector has 32 bits."""

NESTING = 50
"""How deep sets of permissions may be made of sets."""


@define(eq=False)
class Map:
    """A class map: permissions, each a set of (class, permissions)."""

    permissions: dict[str, list[tuple[Node, Scope]]]


@define(eq=False)
class Classes:
    """All classes while a policy is compiled; keys are ``id`` of symbols."""

    known: dict[int, Class] = field(factory=dict)
    maps: dict[int, Map] = field(factory=dict)
    commons: dict[int, list[str]] = field(factory=dict)
    _own: dict[int, tuple[Symbol, list[str], Node]] = field(factory=dict)
    _common: dict[int, Symbol] = field(factory=dict)
    _busy: list[tuple[int, str]] = field(factory=list)
    _resolved: dict[tuple[int, str], dict[int, tuple[Class, int]]] = field(factory=dict)

    def add(self, symbol: Symbol, permissions: Node) -> None:
        """Take a ``class``, ``common`` or ``classmap`` with its list of permissions."""
        names: list[str] = []
        for node in permissions.list("the permissions"):
            name = declared_name(node)
            if name in names:
                raise PolicyError(f'permission "{name}" is given twice', node)
            names.append(name)
        if symbol.kind == "classmap":
            self.maps[id(symbol)] = Map({name: [] for name in names})
        elif symbol.kind == "common":
            self.commons[id(symbol)] = names
        else:
            self.known[id(symbol)] = Class(symbol.name, len(self.known))
            self._own[id(symbol)] = symbol, names, permissions

    def join(self, node: Node, scope: Scope) -> None:
        """``(classcommon CLASS COMMON)``."""
        _, class_, common = node.items or []
        symbol = self.one(class_, scope)
        if id(symbol) in self._common:
            raise PolicyError(f'class "{symbol.name}" already has a common', node)
        self._common[id(symbol)] = scope.find("common", common)

    def number(self) -> None:
        """Give bits to permissions, once all commons are known."""
        for key, (symbol, own, place) in self._own.items():
            common = self._common.get(key)
            names = [*self.commons[id(common)], *own] if common else own
            twice = next((name for name in own if names.count(name) > 1), None)
            if twice:
                raise PolicyError(f'permission "{twice}" of class "{symbol.name}" is in its common too', place)
            if len(names) > WIDTH:
                raise PolicyError(f'class "{symbol.name}" has {len(names)} permissions, {WIDTH} are possible', place)
            self.known[key].permissions = {name: bit for bit, name in enumerate(names)}

    def one(self, node: Node, scope: Scope) -> Symbol:
        """A class. Raises PolicyError for a map."""
        symbol = scope.find("class", node)
        if symbol.kind != "class":
            raise PolicyError(f'expected a class, "{symbol.name}" is a {symbol.kind}', node)
        return symbol

    def several(self, node: Node, scope: Scope) -> list[Class]:
        """A class, or the classes of a map."""
        node, scope = scope.follow("class", node)
        symbol = scope.find("class", node)
        if symbol.kind == "class":
            return [self.known[id(symbol)]]
        found: dict[int, Class] = {}
        for parts in self.maps[id(symbol)].permissions.values():
            for part, where in parts:
                for class_, _ in self.resolve(part, where):
                    found[class_.index] = class_
        return list(found.values())

    def map(self, statement: Node, scope: Scope) -> None:
        """``(classmapping CLASSMAP PERMISSION CLASSPERMISSIONS)``."""
        _, name, permission, meaning = statement.items or []
        symbol = scope.find("class", name)
        if symbol.kind != "classmap":
            raise PolicyError(f'expected a classmap, "{symbol.name}" is a {symbol.kind}', name)
        known = self.maps[id(symbol)].permissions
        word = permission.symbol("a permission")
        if word not in known:
            raise PolicyError(f'classmap "{symbol.name}" has no permission "{word}".{near(word, known)}', permission)
        known[word].append((meaning, scope))

    def resolve(self, node: Node, scope: Scope) -> list[tuple[Class, int]]:
        """Resolve ``(CLASS (PERMISSIONS))``, a name of a set or a list of these. Raises PolicyError, Unresolved."""
        found: dict[int, tuple[Class, int]] = {}
        self._resolve(node, scope, found)
        return list(found.values())

    def _resolve(self, node: Node, scope: Scope, found: dict[int, tuple[Class, int]]) -> None:
        node, scope = scope.follow("classpermission", node)
        if node.items is None:
            symbol = scope.find("classpermission", node)
            self._join(symbol, "", symbol.parts, node, found)
            return
        items = node.list("a class and its permissions")
        if not items:
            raise PolicyError("expected a class and its permissions, found nothing", node)
        if len(items) == 2 and items[0].items is None and items[1].items is not None:
            self._pair(items[0], items[1], scope, found)
            return
        for item in items:
            if item.items is None and len(items) > 1 and item.quoted:
                raise PolicyError(f"expected a class and its permissions, found {item}", item)
            self._resolve(item, scope, found)

    def _join(
        self,
        symbol: Symbol,
        word: str,
        parts: list[tuple[Node, Scope]],
        node: Node,
        found: dict[int, tuple[Class, int]],
    ) -> None:
        """Add what a named set, or permission *word* of a map, means. Raises PolicyError for one made of itself."""
        key = id(symbol), word
        if key in self._busy:
            raise PolicyError(f'"{symbol.name}" is made of itself', node)
        if len(self._busy) >= NESTING:
            raise PolicyError(f"sets of permissions nest deeper than {NESTING}", node)
        known = self._resolved.get(key)
        if known is None:
            known = {}
            self._busy.append(key)
            try:
                for part, where in parts:
                    self._resolve(part, where, known)
            finally:
                self._busy.pop()
            self._resolved[key] = known
        for index, (class_, mask) in known.items():
            found[index] = class_, found.get(index, (class_, 0))[1] | mask

    def _pair(self, name: Node, expression: Node, scope: Scope, found: dict[int, tuple[Class, int]]) -> None:
        symbol = scope.find("class", name)
        if symbol.kind == "class":
            class_ = self.known[id(symbol)]
            mask = self._mask(expression, list(class_.permissions), symbol)
            there = found.get(class_.index, (class_, 0))[1]
            found[class_.index] = class_, there | mask
            return
        known = self.maps[id(symbol)].permissions
        mask = self._mask(expression, list(known), symbol)
        for bit, (word, parts) in enumerate(known.items()):
            if mask >> bit & 1:
                self._join(symbol, word, parts, name, found)

    def _mask(self, expression: Node, names: list[str], symbol: Symbol) -> int:
        def leaf(node: Node) -> int:
            word = node.symbol("a permission")
            if word not in names:
                raise Unresolved(f"permission of {symbol.name}", word, node, names)
            return 1 << names.index(word)

        return evaluate(expression, leaf, (1 << len(names)) - 1)
