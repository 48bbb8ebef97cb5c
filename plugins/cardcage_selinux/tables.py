"""What a compiled policy holds. Types, roles, users and classes are numbers; sets of them are bits of integers."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from attrs import define, field

from cardcage_selinux.context import Context, Names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cardcage_selinux.classes import Class
    from cardcage_selinux.constraints import Constraint
    from cardcage_selinux.context import Range
    from cardcage_selinux.sexpr import Node

__all__ = ["KINDS", "Condition", "Defaults", "Rule", "Tables", "TypeRule"]

KINDS = ("allow", "auditallow", "dontaudit")
"""Kinds of access rules, in the order of an entry's masks."""


@define(eq=False, frozen=True)
class Condition:
    """A ``booleanif``: its expression, as a function of the booleans' values, and the booleans in it, sorted."""

    node: Node
    test: Callable[[Mapping[str, bool]], bool]
    names: tuple[str, ...]

    def rows(self) -> Iterator[dict[str, bool]]:
        """All values that its booleans can have."""
        for values in product((False, True), repeat=len(self.names)):
            yield dict(zip(self.names, values, strict=True))

    def table(self) -> tuple[bool, ...]:
        """Its truth table, by which conditions that mean the same are the same; empty for more booleans than ten."""
        return tuple(self.test(row) for row in self.rows()) if len(self.names) <= 10 else ()


@define(eq=False, frozen=True)
class Rule:
    """One access rule for one class.

    Attributes:
        kind: ``allow``, ``auditallow``, ``dontaudit`` or ``neverallow``.
        source, target: as written; target may be ``self``.
        sources, targets: the types they mean, as bits; those of ``self`` are the sources.
        when: number of the condition, and the branch that it stands in; ``None`` outside of conditions.
    """

    kind: str
    source: str
    target: str
    sources: int
    targets: int
    class_: Class
    mask: int
    node: Node
    when: tuple[int, bool] | None = None

    @property
    def is_self(self) -> bool:
        """Whether it only concerns pairs of a type with itself."""
        return self.target == "self"

    def covers(self, source: int, target: int) -> bool:
        """Whether it is about this pair of types."""
        if not self.sources >> source & 1:
            return False
        return source == target if self.is_self else bool(self.targets >> target & 1)

    def __str__(self) -> str:
        return (
            f"({self.kind} {self.source} {self.target} ({self.class_.name} ({' '.join(self.class_.names(self.mask))})))"
        )


@define(eq=False, frozen=True)
class TypeRule:
    """The result of a ``typetransition``, ``typechange`` or ``typemember`` for one pair of types."""

    result: int
    node: Node
    when: tuple[int, bool] | None = None


@define(eq=False)
class Defaults:
    """Where the parts of a new context come from: ``source``, ``target``, ``glblub``, ``None`` for the usual."""

    user: str | None = None
    role: str | None = None
    type: str | None = None
    range: tuple[str, str] | None = None


@define(eq=False)
class Tables:
    """The tables.

    Attributes:
        types, roles, users: names by number; ``*_number``: numbers by name, aliases too.
        attributes: the types of each, as bits.
        type_ids: for each type its number and those of its attributes (which follow those of the types).
        rules: all access rules; never: the neverallow rules.
        vectors: (source id, target id, class) to the masks of :data:`KINDS`; conditional: likewise, to
            (condition, branch, kind, mask).
        bounds: child type to parent; permissive: bits of types.
    """

    mls: bool = False
    handle_unknown: str = "deny"
    capabilities: set[str] = field(factory=set)
    classes: dict[str, Class] = field(factory=dict)
    types: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    type_number: dict[str, int] = field(factory=dict)
    role_number: dict[str, int] = field(factory=dict)
    user_number: dict[str, int] = field(factory=dict)
    attributes: dict[str, int] = field(factory=dict)
    type_ids: list[tuple[int, ...]] = field(factory=list)
    levels: Names = field(factory=lambda: Names((), (), {}, {}, ()))
    booleans: dict[str, bool] = field(factory=dict)
    conditions: list[Condition] = field(factory=list)
    rules: list[Rule] = field(factory=list)
    never: list[Rule] = field(factory=list)
    vectors: dict[tuple[int, int, int], list[int]] = field(factory=dict)
    conditional: dict[tuple[int, int, int], list[tuple[int, bool, int, int]]] = field(factory=dict)
    type_rules: dict[tuple[str, int, int, int], list[TypeRule]] = field(factory=dict)
    named: dict[tuple[int, int, int, str], TypeRule] = field(factory=dict)
    role_transitions: dict[tuple[int, int, int], tuple[int, Node]] = field(factory=dict)
    range_transitions: dict[tuple[int, int, int], tuple[Range, Node]] = field(factory=dict)
    role_allows: dict[tuple[int, int], Node] = field(factory=dict)
    role_types: dict[int, int] = field(factory=dict)
    user_roles: dict[int, int] = field(factory=dict)
    user_ranges: dict[int, Range] = field(factory=dict)
    user_levels: dict[int, Node] = field(factory=dict)
    permissive: int = 0
    bounds: dict[int, tuple[int, Node]] = field(factory=dict)
    constraints: dict[int, list[Constraint]] = field(factory=dict)
    transitions: dict[int, list[Constraint]] = field(factory=dict)
    defaults: dict[int, Defaults] = field(factory=dict)
    sids: dict[str, str] = field(factory=dict)

    def problem(self, context: Context) -> str:
        """Why a context is not valid, empty when it is."""
        user, role, type_, range_ = context
        if role:  # object_r, number 0, goes with every user and type
            if not self.role_types.get(role, 0) >> type_ & 1:
                return f"role {self.roles[role]} may not have type {self.types[type_]}"
            if not self.user_roles.get(user, 0) >> role & 1:
                return f"user {self.users[user]} may not have role {self.roles[role]}"
        if range_ is None:
            return ""
        if not self.levels.valid(range_):
            return f"range {self.levels.text(range_)} is not valid"
        if role and not self.user_ranges[user].contains(range_):
            return f"user {self.users[user]} may not have range {self.levels.text(range_)}"
        return ""

    def text(self, context: Context) -> str:
        """A context as text."""
        user, role, type_, range_ = context
        head = f"{self.users[user]}:{self.roles[role]}:{self.types[type_]}"
        return f"{head}:{self.levels.text(range_)}" if range_ is not None else head

    def parse(self, text: str) -> Context:
        """The context that *text* means, valid or not. Raises ValueError saying what is wrong."""
        parts = text.split(":", 3)
        if len(parts) < 3:
            raise ValueError("expected user:role:type" + ":level" * self.mls)
        numbers = []
        for kind, name, known in zip(
            ("user", "role", "type"), parts, (self.user_number, self.role_number, self.type_number), strict=False
        ):
            if name not in known:
                raise ValueError(f'no {kind} is called "{name}"')
            numbers.append(known[name])
        if (len(parts) == 4) is not self.mls:
            raise ValueError("a level is missing" if self.mls else "this policy has no levels")
        user, role, type_ = numbers
        return Context(user, role, type_, self.levels.range(parts[3]) if self.mls else None)
