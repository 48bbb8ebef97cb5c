"""A policy that answers: access vectors, contexts of new objects, validity, booleans.

Source: ``libsepol/src/services.c``: ``context_struct_compute_av``, ``type_attribute_bounds_av``, ``sepol_compute_sid``;
``libsepol/src/mls.c``: ``mls_compute_sid``. Names of new objects are the kernel's (``security/selinux/ss/services.c``).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from cardcage.errors import ConfigError, UsageError, near
from cardcage.files import read_file

from cardcage_selinux.cil.expressions import holds, satisfied
from cardcage_selinux.errors import ContextError, PolicyError
from cardcage_selinux.server.context import Context, Level, Range

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cardcage_selinux.cil.origins import Origins
    from cardcage_selinux.server.tables import Class, Tables

__all__ = ["AccessVector", "Policy", "compiled", "load", "texts"]

MOST = 64 << 20
"""Bytes of a file of a policy."""
CONTEXTS = 1024
"""Valid contexts whose text a policy remembers."""

FULL = 0xFFFFFFFF
"""All bits of an access vector."""


class AccessVector(NamedTuple):
    """The decision about a pair of contexts and a class, each mask with one bit for a permission.

    Attributes:
        allowed: what is granted.
        auditallow: what is logged when it is granted.
        auditdeny: what is logged when it is denied (all, but for ``dontaudit`` rules).
        permissive: the source's type is permissive: what is denied is logged, and done.
    """

    allowed: int
    auditallow: int
    auditdeny: int
    permissive: bool


def load(sources: Iterable[str | os.PathLike[str]] | str | os.PathLike[str], *, check: bool = True) -> Policy:
    """Compile CIL. Raises PolicyError with file, line and column; ConfigError for a file that cannot be read.

    Args:
        sources: paths, or CIL text (a ``str`` with a bracket in it); several make one policy.
        check: whether neverallow rules and type bounds are checked.
    """
    return compiled(texts(sources), check=check)


def texts(sources: Iterable[str | os.PathLike[str]] | str | os.PathLike[str]) -> list[tuple[str, str]]:
    """The names and texts of :func:`load`'s sources. Raises PolicyError, ConfigError."""
    found = []
    for number, source in enumerate([sources] if isinstance(sources, str | os.PathLike) else sources, 1):
        if isinstance(source, str) and ("(" in source or ";" in source or not source.strip()):
            found.append((f"<text {number}>", source))
        else:
            found.append((os.fspath(source), _read(source)))
    return found


def compiled(texts: Iterable[tuple[str, str]], *, check: bool = True) -> Policy:
    """Compile CIL that was read. Raises PolicyError."""
    from cardcage_selinux.cil.build import build  # the compiler is half of this package: a kept policy does without
    from cardcage_selinux.cil.sexpr import parse

    nodes = [node for name, text in texts for node in parse(text, name)]
    return Policy(*build(nodes, check=check))


def _read(path: str | os.PathLike[str]) -> str:
    try:
        return read_file(path, MOST, "policy").decode()
    except UnicodeDecodeError as error:
        from cardcage_selinux.cil.sexpr import Node, Source

        source = Source(os.fspath(path), error.object.decode("latin-1"))  # a character for each byte
        raise PolicyError("this is not UTF-8 text", Node("", None, source, error.start)) from error


class Policy:
    """A compiled policy with values of its booleans. It never changes; any thread may ask.

    Attributes:
        tables: what it holds.
        sequence: one higher in each policy that :meth:`with_booleans` makes.
    """

    __slots__ = ("_contexts", "_origins", "_states", "_values", "sequence", "tables")

    def __init__(
        self,
        tables: Tables,
        origins: Origins | None = None,
        values: Mapping[str, bool] | None = None,
        sequence: int = 0,
    ) -> None:
        self.tables, self.sequence, self._origins = tables, sequence, origins
        self._contexts: dict[str, Context] = {}
        self._values = dict(tables.booleans if values is None else values)
        self._states = tuple(holds(condition, self._values) for condition in tables.conditions)

    @classmethod
    def compile(cls, sources: Iterable[str | os.PathLike[str]]) -> Policy:
        """The same as :func:`load`."""
        return load(sources)

    @property
    def origins(self) -> Origins:
        """Where its text says what. Raises UsageError for a policy from the cache, which has no text."""
        if self._origins is None:
            raise UsageError(
                "this policy comes from the cache of compiled policies: load() its files to ask for places in them"
            )
        return self._origins

    @property
    def booleans(self) -> dict[str, bool]:
        """Booleans and their values (a copy)."""
        return dict(self._values)

    def with_booleans(self, changes: Mapping[str, bool]) -> Policy:
        """This policy with other values. Raises UsageError for a name that is no boolean."""
        for name, value in changes.items():
            if name not in self._values:
                raise UsageError(f'no boolean is called "{name}".{near(name, self._values)}'.rstrip("."))
            if not isinstance(value, bool):
                raise UsageError(f"boolean {name}: expected True or False, got {value!r}")
        return Policy(self.tables, self._origins, {**self._values, **changes}, self.sequence + 1)

    # contexts

    def context(self, text: str) -> Context:
        """Text as a valid context. Raises ContextError with the reason."""
        found = self._contexts.get(text)
        if found is not None:
            return found
        try:
            context = self.tables.parse(text)
        except ValueError as error:
            raise ContextError(f'"{text}" is not a security context: {error}') from error
        problem = self.tables.problem(context)
        if problem:
            raise ContextError(f'"{text}" is not a valid security context: {problem}')
        if len(self._contexts) >= CONTEXTS:
            self._contexts.clear()
        self._contexts[text] = context
        return context

    def valid_context(self, text: str) -> bool:
        """True if *text* is a valid context."""
        try:
            self.context(text)
        except ContextError:
            return False
        return True

    def canonical(self, text: str) -> str:
        """A context without aliases and with its categories in order. Raises ContextError."""
        return self.tables.text(self.context(text))

    # permissions

    def class_of(self, tclass: str) -> Class | None:
        """The class of that name, ``None`` when the policy has none."""
        return self.tables.classes.get(tclass)

    def mask(self, tclass: str, permissions: Iterable[str]) -> int:
        """The bits of permissions that the policy has; others are left out."""
        class_ = self.tables.classes.get(tclass)
        known = class_.permissions if class_ else {}
        return sum(1 << known[name] for name in set(permissions) if name in known)

    def permissions(self, tclass: str, mask: int) -> tuple[str, ...]:
        """The names of the bits in *mask*, lowest first."""
        class_ = self.tables.classes.get(tclass)
        return class_.names(mask) if class_ else ()

    def require(self, classes: Mapping[str, Iterable[str]]) -> None:
        """Refuse a policy that says ``(handleunknown reject)`` and lacks one of *classes*. Raises ConfigError."""
        if self.tables.handle_unknown != "reject":
            return
        for name, permissions in classes.items():
            class_ = self.tables.classes.get(name)
            if class_ is None:
                raise ConfigError(f"the policy rejects what it does not know, and has no class {name}")
            lacks = [one for one in permissions if one not in class_.permissions]
            if lacks:
                raise ConfigError(
                    f"the policy rejects what it does not know, and class {name} lacks {', '.join(lacks)}"
                )

    # decisions

    def compute_av(self, scontext: str, tcontext: str, tclass: str) -> AccessVector:
        """Return the permissions of the source on the target. Raises ContextError.

        A class that the policy does not have is granted whole when it says ``(handleunknown allow)``, else not at all.
        """
        source, target = self.context(scontext), self.context(tcontext)
        class_ = self.tables.classes.get(tclass)
        permissive = bool(self.tables.permissive >> source.type & 1)
        if class_ is None:
            return AccessVector(FULL if self.tables.handle_unknown == "allow" else 0, 0, FULL, permissive)
        return self.decide(source, target, class_)

    def decide(self, source: Context, target: Context, class_: Class) -> AccessVector:
        """:meth:`compute_av` of contexts that were looked up already."""
        tables = self.tables
        allowed, auditallow, dontaudit = self.rules(source.type, target.type, class_)
        for mask, expression in tables.constraints.get(class_.index, ()):
            if mask & allowed and not satisfied(expression, (source, target, target)):
                allowed &= ~mask
        roles = source.role, target.role
        if class_.name == "process" and roles[0] != roles[1] and roles not in tables.role_allows:
            allowed &= ~self.mask("process", ("transition", "dyntransition"))
        allowed = self._bounded(source, target, class_, allowed)
        return AccessVector(allowed, auditallow, FULL & ~dontaudit, bool(tables.permissive >> source.type & 1))

    def rules(self, source: int, target: int, class_: Class) -> tuple[int, int, int]:
        """Return the permissions in rules between two types: allow, auditallow and dontaudit."""
        tables = self.tables
        masks = [0, 0, 0]
        for one in tables.type_ids[source]:
            for other in tables.type_ids[target]:
                key = one, other, class_.index
                entry = tables.vectors.get(key)
                if entry:
                    masks = [mask | bits for mask, bits in zip(masks, entry, strict=True)]
                for condition, branch, slot, bits in tables.conditional.get(key, ()):
                    if self._states[condition] is branch:
                        masks[slot] |= bits
        return masks[0], masks[1], masks[2]

    def _bounded(self, source: Context, target: Context, class_: Class, allowed: int) -> int:
        bounds = self.tables.bounds
        if not allowed or source.type not in bounds:
            return allowed
        parent = source._replace(type=bounds[source.type])
        above = target._replace(type=bounds[target.type]) if target.type in bounds else target
        return allowed & self.decide(parent, above, class_).allowed

    def state(self, condition: int) -> bool:
        """True if the condition of that number holds now."""
        return self._states[condition]

    def validate_transition(self, old: str, new: str, task: str, tclass: str) -> bool:
        """True if *task* may relabel an object from *old* to *new* (``validatetrans``). Raises ContextError."""
        first, second, third = self.context(old), self.context(new), self.context(task)
        class_ = self.tables.classes.get(tclass)
        rules = self.tables.transitions.get(class_.index, ()) if class_ else ()
        return all(satisfied(expression, (first, second, third)) for _, expression in rules)

    # new objects

    def compute_create(self, scontext: str, tcontext: str, tclass: str, name: str | None = None) -> str:
        """The context of an object that the source makes in the target. Raises ContextError, also when there is none.

        Args:
            name: the last component of its name, for ``typetransition`` rules with a name.
        """
        return self._compute("typetransition", scontext, tcontext, tclass, name)

    def compute_relabel(self, scontext: str, tcontext: str, tclass: str) -> str:
        """The context that the target takes when the source begins to use it (``typechange``). Raises ContextError."""
        return self._compute("typechange", scontext, tcontext, tclass)

    def compute_member(self, scontext: str, tcontext: str, tclass: str) -> str:
        """The context of the source's own instance of the target (``typemember``). Raises ContextError."""
        return self._compute("typemember", scontext, tcontext, tclass)

    def _compute(self, kind: str, scontext: str, tcontext: str, tclass: str, name: str | None = None) -> str:
        source, target = self.context(scontext), self.context(tcontext)
        tables = self.tables
        class_ = tables.classes.get(tclass)
        number = class_.index if class_ else -1
        default = tables.defaults.get(number)
        process = tclass == "process"
        user = source.user
        if kind == "typemember" or (default and default.user == "target"):
            user = target.user
        sides = {"source": source, "target": target}
        role = source.role if process else 0
        if default and default.role:
            role = sides[default.role].role
        type_ = source.type if process else target.type
        if default and default.type:
            type_ = sides[default.type].type
        type_ = self._type_rule(kind, source.type, target.type, number, type_)
        if kind == "typetransition":
            named = tables.named.get((source.type, target.type, number, name)) if name is not None else None
            type_ = type_ if named is None else named
            role = tables.role_transitions.get((source.role, target.type, number), role)
        range_ = self._new_range(kind, source, target, number)
        made = Context(user, role, type_, range_)
        problem = tables.problem(made)
        if problem:
            raise ContextError(f'"{tables.text(made)}", of a new {tclass}, is not a valid security context: {problem}')
        return tables.text(made)

    def _type_rule(self, kind: str, source: int, target: int, number: int, default: int) -> int:
        rules = self.tables.type_rules.get((kind, source, target, number), ())
        for result, when in sorted(rules, key=lambda one: one[1] is not None):
            if when is None or self._states[when[0]] is when[1]:
                return result
        return default

    def _new_range(self, kind: str, source: Context, target: Context, number: int) -> Range | None:
        if source.range is None or target.range is None:
            return None
        if kind == "typetransition":
            found = self.tables.range_transitions.get((source.type, target.type, number))
            if found:
                return found
            default = self.tables.defaults.get(number)
            if default and default.range:
                return _default_range(default.range, source.range, target.range)
        process = self.tables.classes.get("process")
        if kind != "typemember" and process is not None and number == process.index:
            return source.range
        return Range(source.range.low, source.range.low)


def _default_range(default: tuple[str, str], source: Range, target: Range) -> Range:
    side, part = default
    if side == "glblub":
        return _glblub(source, target)
    range_ = source if side == "source" else target
    if part == "low-high":
        return range_
    level = range_.low if part == "low" else range_.high
    return Range(level, level)


def _glblub(first: Range, second: Range) -> Range:
    """The range that two have in common (``mls_range_glblub``). Raises ContextError when they have none."""
    low = max(first.low.sensitivity, second.low.sensitivity)
    high = min(first.high.sensitivity, second.high.sensitivity)
    if low > high:
        raise ContextError("the ranges of source and target have no level in common")
    return Range(
        Level(low, first.low.categories & second.low.categories),
        Level(high, first.high.categories & second.high.categories),
    )
