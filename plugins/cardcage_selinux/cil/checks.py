"""Checks of a whole policy: users, contexts, neverallow rules, type bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_selinux.errors import PolicyError
from cardcage_selinux.server.context import members

if TYPE_CHECKING:
    from cardcage_selinux.cil.build import Build
    from cardcage_selinux.cil.origins import Origins, Rule
    from cardcage_selinux.server.tables import Tables

__all__ = ["check_bounds", "check_chains", "check_contexts", "check_neverallow", "check_users"]

CHAIN = 50
"""Types that may bound one another, one above the other."""


def check_users(state: Build) -> None:
    """With levels, each user has a level and a range. Raises PolicyError."""
    if not state.tables.mls:
        return
    for user in state.users.members:
        for keyword in ("userrange", "userlevel"):
            if (keyword, user.index) not in state.origins.first:
                raise PolicyError(f'user "{user.name}" has no {keyword}', user.node)
    if not state.sensitivities:
        raise PolicyError("a policy with levels needs a sensitivity", state.users.members[0].node)


def check_chains(tables: Tables, origins: Origins) -> None:
    """Bounds are bounded by bounds no more than CHAIN deep, which decisions follow. Raises PolicyError."""
    for child, parent in tables.bounds.items():
        depth, above = 1, parent
        while above in tables.bounds:
            depth, above = depth + 1, tables.bounds[above]
            if depth > CHAIN:
                problem = f'"{tables.types[child]}" is bounded through more than {CHAIN} types'
                raise PolicyError(problem, origins.bounds[child])


def check_contexts(state: Build) -> None:
    """The contexts in the policy are valid. Raises PolicyError. Fills in those of sids."""
    for label, context, node in state.contexts:
        problem = state.tables.problem(context)
        if problem:
            raise PolicyError(problem, node)
        if label:
            state.tables.sids[label] = state.tables.text(context)


def check_neverallow(tables: Tables, origins: Origins) -> None:
    """No allow rule, conditional or not, grants what a neverallow rule forbids. Raises PolicyError that names both."""
    by_class: dict[int, list[Rule]] = {}
    for rule in origins.rules:
        if rule.kind == "allow":
            by_class.setdefault(rule.class_.index, []).append(rule)
    for never in origins.never:
        for rule in by_class.get(never.class_.index, ()):
            if rule.mask & never.mask and (pair := clash(rule, never)):
                source, target = (tables.types[number] for number in pair)
                words = " ".join(never.class_.names(rule.mask & never.mask))
                raise PolicyError(
                    f"{rule} lets {source} have {target} ({rule.class_.name} ({words})), which the neverallow at "
                    f"{never.node.place} forbids: {never.node}",
                    rule.node,
                )


def clash(rule: Rule, never: Rule) -> tuple[int, int] | None:
    """A pair of types that both rules cover, ``None`` if there is none."""
    sources = rule.sources & never.sources
    if rule.is_self or never.is_self:
        both = sources & (rule.sources if rule.is_self else rule.targets)
        both &= never.sources if never.is_self else never.targets
        return (first := (both & -both).bit_length() - 1, first) if both else None
    targets = rule.targets & never.targets
    if not sources or not targets:
        return None
    return (sources & -sources).bit_length() - 1, (targets & -targets).bit_length() - 1


def granted(tables: Tables, source: int, target: int, class_: int, when: tuple[int, bool] | None) -> int:
    """Return the rules' grants to a pair of types, always and while *when* holds."""
    mask = 0
    for one in tables.type_ids[source]:
        for other in tables.type_ids[target]:
            entry = tables.vectors.get((one, other, class_))
            mask |= entry[0] if entry else 0
            for condition, branch, slot, bits in tables.conditional.get((one, other, class_), ()):
                if slot == 0 and (condition, branch) == when:
                    mask |= bits
    return mask


def check_bounds(tables: Tables, origins: Origins) -> None:
    """A bounded type is granted nothing that its parent is not. Raises PolicyError that names the rule."""
    for child, parent in tables.bounds.items():
        place = origins.bounds[child]
        for rule in origins.rules:
            if rule.kind != "allow" or not rule.sources >> child & 1:
                continue
            for target in [child] if rule.is_self else members(rule.targets):
                above = tables.bounds.get(target, target)
                over = rule.mask & ~granted(tables, parent, above, rule.class_.index, rule.when)
                if over:
                    raise PolicyError(
                        f"{rule} grants {tables.types[child]}, bounded by {tables.types[parent]} at {place.place}, "
                        f"more than its parent has on {tables.types[above]}: {' '.join(rule.class_.names(over))}",
                        rule.node,
                    )
