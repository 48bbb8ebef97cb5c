"""What a compiled policy decides by. Types, roles, users and classes are numbers; sets of them are bits of integers.

Nothing here refers to the policy's text: that is in :mod:`cardcage_selinux.origins`. So the tables are plain data,
which can be kept between runs (:mod:`cardcage_selinux.kept`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from attrs import define, field

from cardcage_selinux.context import Context, Names

if TYPE_CHECKING:
    from cardcage_selinux.context import Range
    from cardcage_selinux.expressions import Expression

__all__ = ["KINDS", "Class", "Defaults", "Tables"]

KINDS = ("allow", "auditallow", "dontaudit")
"""Kinds of access rules, in the order of an entry's masks."""


class Class:
    """A class of objects.

    Attributes:
        name: with the names of its blocks; index: its number, from 0.
        permissions: each with its bit number; those of the common come first.
    """

    __slots__ = ("index", "name", "permissions")

    def __init__(self, name: str, index: int, permissions: dict[str, int] | None = None) -> None:
        self.name, self.index = name, index
        self.permissions: dict[str, int] = permissions if permissions is not None else {}

    @property
    def everything(self) -> int:
        """The bits of all permissions."""
        return (1 << len(self.permissions)) - 1

    def names(self, mask: int) -> tuple[str, ...]:
        """The permissions in *mask*, lowest bit first."""
        return tuple(name for name, bit in self.permissions.items() if mask >> bit & 1)


class Defaults(NamedTuple):
    """Where the parts of a new context come from: ``source``, ``target``, ``glblub``, ``None`` for the usual."""

    user: str | None = None
    role: str | None = None
    type: str | None = None
    range: tuple[str, str] | None = None


@define(eq=False, repr=False)
class Tables:
    """The tables.

    Attributes:
        types, roles, users: names by number; ``*_number``: numbers by name, aliases too.
        attributes: the types of each, as bits.
        type_ids: for each type its number and those of its attributes (which follow those of the types).
        conditions: of each ``booleanif`` its expression.
        vectors: (source id, target id, class) to the masks of :data:`KINDS`; conditional: likewise, to
            (condition, branch, kind, mask).
        type_rules: (keyword, source, target, class) to each result with its condition and branch, None outside of
            conditions; named: (source, target, class, name) to the result of a ``typetransition`` with a name.
        bounds: child type to parent; permissive: bits of types.
        constraints, transitions: of each class (mask, what must hold for it to be granted), transitions with mask 0.
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
    conditions: list[Expression] = field(factory=list)
    vectors: dict[tuple[int, int, int], list[int]] = field(factory=dict)
    conditional: dict[tuple[int, int, int], list[tuple[int, bool, int, int]]] = field(factory=dict)
    type_rules: dict[tuple[str, int, int, int], list[tuple[int, tuple[int, bool] | None]]] = field(factory=dict)
    named: dict[tuple[int, int, int, str], int] = field(factory=dict)
    role_transitions: dict[tuple[int, int, int], int] = field(factory=dict)
    range_transitions: dict[tuple[int, int, int], Range] = field(factory=dict)
    role_allows: set[tuple[int, int]] = field(factory=set)
    role_types: dict[int, int] = field(factory=dict)
    user_roles: dict[int, int] = field(factory=dict)
    user_ranges: dict[int, Range] = field(factory=dict)
    permissive: int = 0
    bounds: dict[int, int] = field(factory=dict)
    constraints: dict[int, list[tuple[int, Expression]]] = field(factory=dict)
    transitions: dict[int, list[tuple[int, Expression]]] = field(factory=dict)
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
