"""Differences between the meanings of two policies: attributes are expanded, order and form do not count."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_selinux.server.context import members
from cardcage_selinux.server.tables import Defaults

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cardcage_selinux.server.policy import Policy

    Access = tuple[str, str, str, str, str]

__all__ = ["difference", "facts"]


def difference(old: Policy, new: Policy) -> list[str]:
    """Lines that begin with ``-`` (only *old* says so) or ``+`` (only *new*); sorted, access rules by source."""
    lines = []
    for sign, one, other in (("-", old, new), ("+", new, old)):
        lines += [(text, sign) for text in facts(one) - facts(other)]
        lines += [(text, sign) for text in _joined(access(one) - access(other))]
    return [f"{sign} {text}" for text, sign in sorted(lines)]


def facts(policy: Policy) -> set[str]:
    """Everything but access rules, as sentences in CIL's words."""
    return {" ".join(one.split()) for part in (_names, _identities, _objects, _limits) for one in part(policy)}


def _names(policy: Policy) -> Iterator[str]:
    tables = policy.tables
    yield f"(mls {str(tables.mls).lower()})"
    yield f"(handleunknown {tables.handle_unknown})"
    yield from (f"(policycap {name})" for name in tables.capabilities)
    yield from (f"(boolean {name} {str(value).lower()})" for name, value in tables.booleans.items())
    for class_ in tables.classes.values():
        yield f"(class {class_.name})"
        yield from (f"(class {class_.name}: {name})" for name in class_.permissions)
    yield from (f"(type {name})" for name in tables.types)
    yield from (f"(typealias {name})" for name in tables.type_number if name not in tables.types)
    for name, bits in tables.attributes.items():
        yield f"(typeattribute {name})"
        yield from (f"(typeattributeset {name} {tables.types[number]})" for number in members(bits))
    for level, bits in zip(tables.levels.sensitivities, tables.levels.allowed, strict=True):
        yield f"(sensitivitycategory {level} ({' '.join(tables.levels.categories[one] for one in members(bits))}))"
    yield f"(sensitivityorder ({' '.join(tables.levels.sensitivities)}))"
    yield f"(categoryorder ({' '.join(tables.levels.categories)}))"


def _identities(policy: Policy) -> Iterator[str]:
    tables = policy.tables
    for number, role in enumerate(tables.roles):
        yield f"(role {role})"
        yield from (f"(roletype {role} {tables.types[one]})" for one in members(tables.role_types.get(number, 0)))
    for old, new in tables.role_allows:
        yield f"(roleallow {tables.roles[old]} {tables.roles[new]})"
    for number, user in enumerate(tables.users):
        yield f"(user {user})"
        yield from (f"(userrole {user} {tables.roles[one]})" for one in members(tables.user_roles.get(number, 0)))
        if tables.mls:
            yield f"(userrange {user} {tables.levels.text(tables.user_ranges[number])})"
    yield from (f"(sidcontext {name} {context})" for name, context in tables.sids.items())


def _objects(policy: Policy) -> Iterator[str]:
    tables = policy.tables
    types = tables.types
    classes = {one.index: one.name for one in tables.classes.values()}
    for (kind, source, target, class_), rules in tables.type_rules.items():
        for result, condition in rules:
            when = f" when {_condition(policy, *condition)}" if condition else ""
            yield f"({kind} {types[source]} {types[target]} {classes[class_]} {types[result]}){when}"
    for (source, target, class_, name), result in tables.named.items():
        yield f'(typetransition {types[source]} {types[target]} {classes[class_]} "{name}" {types[result]})'
    for (role, target, class_), result in tables.role_transitions.items():
        yield f"(roletransition {tables.roles[role]} {types[target]} {classes[class_]} {tables.roles[result]})"
    for (source, target, class_), range_ in tables.range_transitions.items():
        text = tables.levels.text(range_)
        yield f"(rangetransition {types[source]} {types[target]} {classes[class_]} {text})"
    for class_, defaults in tables.defaults.items():
        for part in Defaults._fields:
            if value := getattr(defaults, part):
                yield f"(default{part} {classes[class_]} {value if isinstance(value, str) else ' '.join(value)})"


def _limits(policy: Policy) -> Iterator[str]:
    tables, origins = policy.tables, policy.origins
    types = tables.types
    yield from (f"(typebounds {types[parent]} {types[child]})" for child, parent in tables.bounds.items())
    yield from (f"(typepermissive {types[number]})" for number in members(tables.permissive))
    for class_ in tables.classes.values():
        nodes = origins.constraints.get(class_.index, ())
        for (mask, _), node in zip(tables.constraints.get(class_.index, ()), nodes, strict=True):
            head, expression = node.head, (node.items or [])[-1]
            yield from (f"({head} ({class_.name} ({name})) {expression})" for name in class_.names(mask))
        for node in origins.transitions.get(class_.index, ()):
            yield f"({node.head} {class_.name} {(node.items or [])[-1]})"
    for rule in origins.never:
        for name in rule.class_.names(rule.mask):
            yield f"(neverallow {rule.source} {rule.target} ({rule.class_.name} ({name})))"


def _condition(policy: Policy, number: int, branch: bool) -> str:
    """A condition that reads the same whenever it means the same: its truth table, for few booleans."""
    condition = policy.origins.conditions[number]
    if not condition.table():
        return f"{condition.node} is {str(branch).lower()}"
    rows = [row for row in condition.rows() if condition.test(row) is branch]
    return " or ".join(" and ".join(name if row[name] else f"not {name}" for name in row) for row in rows)


def access(policy: Policy) -> set[Access]:
    """(kind, source type, target type, class and permission, condition) of all access rules, attributes expanded."""
    found: set[Access] = set()
    conditions: dict[tuple[int, bool], str] = {}
    tables = policy.tables
    for rule in policy.origins.rules:
        when = ""
        if rule.when is not None:
            if rule.when not in conditions:
                conditions[rule.when] = _condition(policy, *rule.when)
            when = conditions[rule.when]
        words = [f"{rule.class_.name} {name}" for name in rule.class_.names(rule.mask)]
        targets = members(rule.targets)
        for source in members(rule.sources):
            for target in [source] if rule.is_self else targets:
                pair = tables.types[source], tables.types[target]
                found.update((rule.kind, *pair, word, when) for word in words)
    return found


def _joined(found: Iterable[Access]) -> list[str]:
    """Access facts with the permissions of a class, then the targets of a source, in one line."""
    permissions: dict[tuple[str, str, str, str, str], list[str]] = {}
    for kind, source, target, word, when in sorted(found):
        class_, _, name = word.partition(" ")
        permissions.setdefault((kind, source, target, class_, when), []).append(name)
    targets: dict[tuple[str, str, str, str], list[str]] = {}
    for (kind, source, target, class_, when), names in permissions.items():
        what = f"({class_} ({' '.join(names)}))"
        targets.setdefault((kind, source, what, when), []).append(target)
    return [
        f"({kind} {source} {names[0] if len(names) == 1 else '(' + ' '.join(names) + ')'} {what})"
        + (f" when {when}" if when else "")
        for (kind, source, what, when), names in targets.items()
    ]
