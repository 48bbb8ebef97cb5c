"""Why an access is granted or denied: rules, constraints, roles, bounds, and the boolean that would change it."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

from attrs import define, field
from cardcage.errors import UsageError, near

from cardcage_selinux.cil.expressions import satisfied

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage.security import Act

    from cardcage_selinux.cil.origins import Rule
    from cardcage_selinux.server.context import Context
    from cardcage_selinux.server.policy import Policy
    from cardcage_selinux.server.tables import Class

__all__ = ["Explanation", "covering", "explain"]

FLIPS = 4
"""How many booleans at once are tried, to find what would change a decision."""


@define
class Explanation:
    """A decision with its reasons.

    Attributes:
        granted: whether the policy grants it (permissive types are denied, too).
        reasons: one line each, with the places of rules and constraints.
    """

    granted: bool
    reasons: list[str] = field(factory=list)


def covering(policy: Policy, source: int, target: int, class_: Class, mask: int) -> Iterator[tuple[Rule, bool]]:
    """Access rules about this pair of types that name a permission in *mask*, each with whether it holds now."""
    for rule in policy.origins.rules:
        if rule.class_ is class_ and rule.mask & mask and rule.covers(source, target):
            yield rule, rule.when is None or policy.state(rule.when[0]) is rule.when[1]


def explain(policy: Policy, act: Act) -> Explanation:
    """Say why. Raises ContextError, and UsageError for a class or permission that the policy lacks.

    Args:
        act: of one permission, between two contexts.
    """
    source, target, tclass = policy.context(act.source), policy.context(act.target), act.tclass
    (permission,) = act.permissions
    class_ = policy.class_of(tclass)
    if class_ is None:
        raise UsageError(f'the policy has no class "{tclass}".{near(tclass, policy.tables.classes)}'.rstrip("."))
    if permission not in class_.permissions:
        known = class_.permissions
        raise UsageError(f'class {tclass} has no permission "{permission}".{near(permission, known)}'.rstrip("."))
    mask = 1 << class_.permissions[permission]
    found = Explanation(bool(policy.decide(source, target, class_).allowed & mask))
    found.reasons += _rules(policy, source, target, class_, mask)
    if policy.rules(source.type, target.type, class_)[0] & mask:
        found.reasons += _limits(policy, source, target, class_, mask)
    found.reasons += _booleans(policy, source, target, class_, mask, found.granted)
    found.reasons += _audit(policy, source, target, class_, mask, found.granted)
    return found


def _rules(policy: Policy, source: Context, target: Context, class_: Class, mask: int) -> Iterator[str]:
    any_rule = False
    for rule, holds in covering(policy, source.type, target.type, class_, mask):
        if rule.kind != "allow":
            continue
        any_rule = any_rule or holds
        if rule.when is None:
            yield f"rule {rule.node.place}: {rule}"
        else:
            test = policy.origins.conditions[rule.when[0]].node
            state = "holds" if holds else "does not hold"
            yield f"rule {rule.node.place}: {rule}, when {test} is {str(rule.when[1]).lower()}, which {state} now"
    if not any_rule:
        names = policy.tables.types
        yield f"no rule in force lets {names[source.type]} do this to {names[target.type]}"


def _limits(policy: Policy, source: Context, target: Context, class_: Class, mask: int) -> Iterator[str]:
    """Yield the limits on the rules' grants."""
    tables = policy.tables
    constraints = tables.constraints.get(class_.index, ())
    for (bits, expression), node in zip(constraints, policy.origins.constraints.get(class_.index, ()), strict=True):
        if bits & mask and not satisfied(expression, (source, target, target)):
            yield f"constraint {node.place}: {node} does not hold"
    moves = policy.mask("process", ("transition", "dyntransition")) if class_.name == "process" else 0
    if mask & moves and source.role != target.role and (source.role, target.role) not in tables.role_allows:
        yield f"no roleallow lets role {tables.roles[source.role]} become {tables.roles[target.role]}"
    if source.type in tables.bounds:
        parent, node = tables.bounds[source.type], policy.origins.bounds[source.type]
        above = target._replace(type=tables.bounds[target.type]) if target.type in tables.bounds else target
        if not policy.decide(source._replace(type=parent), above, class_).allowed & mask:
            who, child, whom = (tables.types[one] for one in (parent, source.type, above.type))
            yield f"bounds {node.place}: {who}, which bounds {child}, may not do it to {whom}"


def _booleans(
    policy: Policy, source: Context, target: Context, class_: Class, mask: int, granted: bool
) -> Iterator[str]:
    """The fewest booleans whose change would turn the decision round."""
    tables = policy.tables
    types = {source.type}
    while bounded := {tables.bounds[one] for one in types if one in tables.bounds} - types:
        types |= bounded
    numbers = {
        rule.when[0]
        for rule in policy.origins.rules
        if rule.kind == "allow"
        and rule.when is not None
        and rule.class_ is class_
        and rule.mask & mask
        and any(rule.sources >> one & 1 for one in types)
    }
    names = sorted({name for number in numbers for name in policy.origins.conditions[number].names})
    values = policy.booleans
    for count in range(1, min(FLIPS, len(names)) + 1):
        for flipped in combinations(names, count):
            changes = {name: not values[name] for name in flipped}
            other = policy.with_booleans(changes).decide(source, target, class_)
            if bool(other.allowed & mask) is not granted:
                text = ", ".join(f"{name}={str(value).lower()}" for name, value in changes.items())
                yield f"with {text} it would be {'denied' if granted else 'granted'}"
                return


def _audit(policy: Policy, source: Context, target: Context, class_: Class, mask: int, granted: bool) -> Iterator[str]:
    for rule, holds in covering(policy, source.type, target.type, class_, mask):
        if holds and rule.kind == ("auditallow" if granted else "dontaudit"):
            yield f"{'logged' if granted else 'not logged'}: rule {rule.node.place}: {rule}"
    if not granted and policy.tables.permissive >> source.type & 1:
        yield f"type {policy.tables.types[source.type]} is permissive: it is logged, and passes"
