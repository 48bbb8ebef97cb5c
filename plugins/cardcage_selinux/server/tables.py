"""The tables of a compiled policy. Types, roles, users and classes are numbers; sets of them are bits of integers.

Nothing here refers to the policy's text: that is in :mod:`cardcage_selinux.cil.origins`. So the tables are plain data,
which can be kept between runs (:mod:`cardcage_selinux.server.kept`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cardcage_selinux.server.context import Context, Names

if TYPE_CHECKING:
    from cardcage_selinux.cil.expressions import Expression
    from cardcage_selinux.server.context import Range

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

    def __init__(self) -> None:
        self.mls: bool = False
        self.handle_unknown: str = "deny"
        self.capabilities: set[str] = set()
        self.classes: dict[str, Class] = {}
        self.types: tuple[str, ...] = ()
        self.roles: tuple[str, ...] = ()
        self.users: tuple[str, ...] = ()
        self.type_number: dict[str, int] = {}
        self.role_number: dict[str, int] = {}
        self.user_number: dict[str, int] = {}
        self.attributes: dict[str, int] = {}
        self.type_ids: list[tuple[int, ...]] = []
        self.levels: Names = Names((), (), {}, {}, ())
        self.booleans: dict[str, bool] = {}
        self.conditions: list[Expression] = []
        self.vectors: dict[tuple[int, int, int], list[int]] = {}
        self.conditional: dict[tuple[int, int, int], list[tuple[int, bool, int, int]]] = {}
        self.type_rules: dict[tuple[str, int, int, int], list[tuple[int, tuple[int, bool] | None]]] = {}
        self.named: dict[tuple[int, int, int, str], int] = {}
        self.role_transitions: dict[tuple[int, int, int], int] = {}
        self.range_transitions: dict[tuple[int, int, int], Range] = {}
        self.role_allows: set[tuple[int, int]] = set()
        self.role_types: dict[int, int] = {}
        self.user_roles: dict[int, int] = {}
        self.user_ranges: dict[int, Range] = {}
        self.permissive: int = 0
        self.bounds: dict[int, int] = {}
        self.constraints: dict[int, list[tuple[int, Expression]]] = {}
        self.transitions: dict[int, list[tuple[int, Expression]]] = {}
        self.defaults: dict[int, Defaults] = {}
        self.sids: dict[str, str] = {}

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
