"""Where in its text a policy says what its tables hold: for errors, and for those who ask why."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from attrs import define, field

from cardcage_selinux.cil.expressions import holds

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from cardcage_selinux.cil.expressions import Expression
    from cardcage_selinux.cil.sexpr import Node
    from cardcage_selinux.server.tables import Class

__all__ = ["Condition", "Origins", "Rule"]


@define(eq=False, frozen=True)
class Condition:
    """A ``booleanif``: its expression, and the booleans in it, sorted."""

    node: Node
    expression: Expression
    names: tuple[str, ...]

    def test(self, values: dict[str, bool]) -> bool:
        """True if it holds when its booleans have *values*."""
        return holds(self.expression, values)

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
        """True if it only concerns pairs of a type with itself."""
        return self.target == "self"

    def covers(self, source: int, target: int) -> bool:
        """True if it is about this pair of types."""
        if not self.sources >> source & 1:
            return False
        return source == target if self.is_self else bool(self.targets >> target & 1)

    def __str__(self) -> str:
        return (
            f"({self.kind} {self.source} {self.target} ({self.class_.name} ({' '.join(self.class_.names(self.mask))})))"
        )


@define(eq=False)
class Origins:
    """The statements of a policy.

    Attributes:
        rules: all access rules; never: the neverallow rules.
        conditions: as many as the tables have, in their order.
        constraints, transitions: of each class the statements, in the tables' order.
        bounds: of each child type the statement that bounds it.
        first: of what may be said once only, by table and key, the statement that did.
    """

    rules: list[Rule] = field(factory=list)
    never: list[Rule] = field(factory=list)
    conditions: list[Condition] = field(factory=list)
    constraints: dict[int, list[Node]] = field(factory=dict)
    transitions: dict[int, list[Node]] = field(factory=dict)
    bounds: dict[int, Node] = field(factory=dict)
    first: dict[tuple[str, Hashable], Node] = field(factory=dict)
