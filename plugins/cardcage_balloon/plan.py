"""Who gets how much: a pure function from what is seen to targets.

1. A guest *uses* what it keeps less what it says is available. It *needs* that and a margin, at least its floor. It can
   do with the *least*: what it uses and a little free memory.
2. What the host can give (the budget), less the needs, is shared in proportion to what each lacks of its size. When
   the needs are more than the budget, they are cut towards the least: those of the lowest priority first, and all of
   one priority in the same proportion.
3. Who has too much shrinks at once, at a rate. Who has too little grows by what the budget holds over what all hold
   now, so that memory is given only when it has come; those below their need first.
4. Differences below a band stay as they are, unless somebody is short of its least, or all together have too much.

So the sum of what guests may take stays within the budget once it was, whatever their load does between two steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Plan", "Rules", "Seen", "plan"]

MIB = 1 << 20


@frozen
class Rules:
    """How targets move. Bytes, and bytes in a second.

    Attributes:
        margin: of a guest's size, what it shall have available, 0 to 1. spare: the same in bytes, at least.
        least: bytes that stay available whatever the host lacks.
        shrink, grow: how fast a target moves.
        band: differences that are not worth a move.
    """

    margin: float = 0.08
    spare: int = 48 * MIB
    least: int = 24 * MIB
    shrink: int = 128 * MIB
    grow: int = 512 * MIB
    band: int = 16 * MIB


@frozen
class Seen:
    """A machine as it is now, in bytes.

    Attributes:
        size: RAM. floor: what it shall always keep. kept: what it has not given. target: what it was asked to keep.
        used: what its programs and kernel use; it cannot give that.
        steered: whether it follows; memory kept by a guest that does not is simply gone.
        priority: who has the lowest gives first when there is too little for all.
    """

    size: int
    floor: int
    kept: int
    target: int
    used: int = 0
    steered: bool = True
    priority: int = 0

    def holding(self, free: int) -> int:
        """Return its used memory plus *free* bytes, not below its floor nor above its size."""
        return max(min(self.size, max(self.floor, self.used + free)), min(self.floor, self.size))


@frozen
class Plan:
    """Targets in the order of what was seen, and by how much the budget is too small for the least of all."""

    targets: list[int] = field(factory=list)
    short: int = 0


def plan(rules: Rules, seen: Sequence[Seen], budget: int, seconds: float, surplus: float = 1.0) -> Plan:
    """New targets, *seconds* after the last.

    Args:
        budget: bytes that all of *seen* may keep together.
        surplus: of what nobody needs, the part that guests get (0 to 1); the rest stays with the host.
    """
    goals, short = _goals(rules, seen, budget, surplus)
    down, up = round(rules.shrink * seconds), round(rules.grow * seconds)
    hurry = any(one.steered and one.target < one.holding(rules.least) for one in seen)
    hurry = hurry or sum(max(one.kept, one.target) for one in seen) > budget + rules.band
    targets = [one.target for one in seen]
    for at, (one, goal) in enumerate(zip(seen, goals, strict=True)):
        over = goal < one.target and (one.target - goal >= rules.band or hurry)
        if one.steered and over:
            targets[at] = max(goal, one.target - down)
    pool = budget - sum(max(one.kept, target) for one, target in zip(seen, targets, strict=True))
    for free in (_margin(rules, seen), None):  # first what is needed, then what is left over
        wants = [
            _growth(rules, one, target, goal if free is None else min(goal, one.holding(free[at])), up)
            for at, (one, target, goal) in enumerate(zip(seen, targets, goals, strict=True))
        ]
        total = sum(wants)
        share = 0.0 if pool <= 0 else 1.0 if total <= pool else pool / total
        for at, want in enumerate(wants):
            given = int(want * share)
            targets[at] += given
            pool -= given
    return Plan(targets, short)


def _margin(rules: Rules, seen: Sequence[Seen]) -> list[int]:
    return [max(rules.least, rules.spare, int(one.size * rules.margin)) for one in seen]


def _goals(rules: Rules, seen: Sequence[Seen], budget: int, surplus: float) -> tuple[list[int], int]:
    """Where each target should be in the end; those that are not steered keep what they have."""
    steered = [one.steered for one in seen]
    needs = [
        one.holding(free) if one.steered else one.kept for one, free in zip(seen, _margin(rules, seen), strict=True)
    ]
    spare = budget - sum(needs)
    if spare >= 0:
        lack = [one.size - need if ours else 0 for one, need, ours in zip(seen, needs, steered, strict=True)]
        ratio = surplus * min(1.0, spare / sum(lack)) if any(lack) else 0.0
        return [need + int(more * ratio) for need, more in zip(needs, lack, strict=True)], 0
    least = [
        min(need, one.holding(rules.least)) if one.steered else need for one, need in zip(seen, needs, strict=True)
    ]
    goals, missing = list(needs), -spare
    for priority in sorted({one.priority for one in seen}):
        tier = [at for at, one in enumerate(seen) if one.priority == priority]
        give = sum(needs[at] - least[at] for at in tier)
        ratio = max(0.0, 1.0 - missing / give) if give else 0.0
        for at in tier:
            goals[at] = least[at] + int((needs[at] - least[at]) * ratio)
        missing = max(0, missing - give)
    return goals, missing


def _growth(rules: Rules, one: Seen, target: int, goal: int, most: int) -> int:
    """How much more it wants now, at most *most* above its last target."""
    if not one.steered or goal <= target or (goal - target < rules.band and target >= one.holding(rules.least)):
        return 0
    return max(0, min(goal, one.target + most) - target)
