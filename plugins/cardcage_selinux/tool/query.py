"""Paths by which a type can reach another, over the access rules of a policy.

Types alone are looked at, with bounds and the booleans' values: what constraints, roles and levels take away depends on
contexts, and ``explain`` says it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage_selinux.cil.origins import Rule
    from cardcage_selinux.server.policy import Policy
    from cardcage_selinux.server.tables import Class

__all__ = ["READS", "WRITES", "Step", "Wanted", "attributes_between", "direct", "path"]

BOTH = frozenset(
    "map share merge connect listen backend.open tap.open machine.load program.start management.reach".split()
)
READS = BOTH | frozenset("read dma_read getattr receive recv recvfrom save card.load".split())
"""Permissions (or ``class.permission``) by which information comes from the target to the source."""

WRITES = BOTH | frozenset(
    "write dma_write append setattr send sendto create configure raise route setbool policy.load".split()
)
"""Permissions by which information goes from the source to the target."""


@frozen
class Wanted:
    """Which permissions count.

    Attributes:
        flow: follow information (``READS`` backwards, ``WRITES`` forwards) instead of permissions.
        tclass, permission: only these, empty for any.
    """

    flow: bool = False
    tclass: str = ""
    permission: str = ""

    def mask(self, class_: Class, backwards: bool) -> int:
        """The permissions of a class that lead from a source to a target (or back)."""
        if self.tclass not in ("", class_.name):
            return 0
        allowed = (READS if backwards else WRITES) if self.flow else None
        if backwards and not self.flow:
            return 0
        return sum(
            1 << bit
            for name, bit in class_.permissions.items()
            if self.permission in ("", name)
            and (allowed is None or not allowed.isdisjoint((name, f"{class_.name}.{name}")))
        )


@frozen
class Step:
    """One step: the rules by which *first* reaches *second* (written for ``second`` when backwards)."""

    first: int
    second: int
    rules: tuple[tuple[Rule, int], ...]
    backwards: bool = False


def _grants(policy: Policy, wanted: Wanted, source: int, backwards: bool) -> Iterator[tuple[Rule, int, int]]:
    """(rule, target, permissions) of what *source* may do, less what its bound takes away."""
    for rule in policy.origins.rules:
        if rule.kind != "allow" or not rule.sources >> source & 1:
            continue
        if rule.when is not None and policy.state(rule.when[0]) is not rule.when[1]:
            continue
        mask = rule.mask & wanted.mask(rule.class_, backwards)
        targets = 1 << source if rule.is_self else rule.targets
        while mask and targets:
            low = targets & -targets
            target = low.bit_length() - 1
            targets ^= low
            left = mask & _bound(policy, source, target, rule.class_)
            if left:
                yield rule, target, left


def _bound(policy: Policy, source: int, target: int, class_: Class) -> int:
    """Return the permissions left by the rules of all that bounds *source*."""
    bounds, mask = policy.tables.bounds, class_.everything
    while source in bounds:
        source, target = bounds[source], bounds.get(target, target)
        mask &= policy.rules(source, target, class_)[0]
    return mask


def _edges(policy: Policy, wanted: Wanted) -> dict[int, dict[int, Step]]:
    """All steps, by first and second type; one that goes forwards is preferred."""
    found: dict[tuple[int, int, bool], list[tuple[Rule, int]]] = {}
    for source in range(len(policy.tables.types)):
        for backwards in (False, True) if wanted.flow else (False,):
            for rule, target, mask in _grants(policy, wanted, source, backwards):
                if target != source:
                    pair = (target, source) if backwards else (source, target)
                    found.setdefault((*pair, backwards), []).append((rule, mask))
    edges: dict[int, dict[int, Step]] = {}
    for (first, second, backwards), rules in sorted(found.items(), key=lambda item: item[0]):
        edges.setdefault(first, {}).setdefault(second, Step(first, second, tuple(rules), backwards))
    return edges


def direct(policy: Policy, source: int, target: int, wanted: Wanted) -> list[tuple[Rule, int]]:
    """The rules by which *source* may act on *target* itself."""
    return [(rule, mask) for rule, one, mask in _grants(policy, wanted, source, False) if one == target]


def path(
    policy: Policy, source: int, target: int, wanted: Wanted, without: frozenset[int] = frozenset()
) -> list[Step] | None:
    """The shortest chain of steps from *source* to *target* that meets no type of *without*, or ``None``."""
    edges = _edges(policy, wanted)
    came: dict[int, Step] = {}
    waiting = deque([source])
    while waiting:
        here = waiting.popleft()
        for step in edges.get(here, {}).values():
            if step.second not in came and step.second != source and step.second not in without:
                came[step.second] = step
                waiting.append(step.second)
        if target in came:
            break
    if target not in came:
        return None
    steps: list[Step] = []
    while target != source:
        steps.append(came[target])
        target = came[target].first
    return steps[::-1]


def attributes_between(policy: Policy, rule: Rule, source: int, target: int) -> str:
    """Which attributes brought the two types under *rule*, for people."""
    names = policy.tables.types
    parts = []
    if rule.source != names[source]:
        parts.append(f"{names[source]} has {rule.source}")
    if not rule.is_self and rule.target != names[target]:
        parts.append(f"{names[target]} has {rule.target}")
    return f" ({', '.join(parts)})" if parts else ""
