"""The balloon policy's plan: floors, rates, budget, convergence, no oscillation, for any machines and any load."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
from attrs import evolve
from cardcage_balloon.plan import MIB, Rules, Seen, plan
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("CARDCAGE_BALLOON_EXAMPLES", "300"))
RULES = st.builds(
    Rules,
    margin=st.floats(0, 0.5),
    spare=st.integers(0, 128 * MIB),
    least=st.integers(0, 64 * MIB),
    shrink=st.integers(8 * MIB, 1024 * MIB),
    grow=st.integers(8 * MIB, 1024 * MIB),
    band=st.integers(1, 64 * MIB),
)


@st.composite
def machines(draw: st.DrawFn, wild: bool = True, most: int = 4096) -> list[Seen]:
    found = []
    for _ in range(draw(st.integers(1, 6))):
        size = draw(st.integers(1, most)) * MIB
        floor = draw(st.integers(0, size))
        target = draw(st.integers(min(floor, size), size))
        kept = draw(st.integers(0, size)) if wild else target
        used = draw(st.integers(0, 2 * size if wild else size))
        found.append(
            Seen(size, floor, kept, target, used, draw(st.booleans()) if wild else True, draw(st.integers(-1, 1)))
        )
    return found


BUDGETS = st.integers(-1024 * MIB, 16384 * MIB)


@given(RULES, machines(), BUDGETS, st.floats(0, 10), st.floats(0, 1))
@settings(max_examples=EXAMPLES, deadline=None)
@pytest.mark.once
def test_targets_stay_within_floor_size_and_rate(
    rules: Rules, seen: list[Seen], budget: int, seconds: float, surplus: float
) -> None:
    """No target is below the floor or above the size, moves faster than its rate, or moves where nobody follows."""
    made = plan(rules, seen, budget, seconds, surplus)
    assert made.short >= 0
    for one, target in zip(seen, made.targets, strict=True):
        assert one.floor <= target <= one.size
        assert -rules.shrink * seconds - 1 <= target - one.target <= rules.grow * seconds + 1
        assert one.steered or target == one.target


@given(RULES, machines(), BUDGETS, st.floats(0, 10))
@settings(max_examples=EXAMPLES, deadline=None)
def test_growth_is_paid_for(rules: Rules, seen: list[Seen], budget: int, seconds: float) -> None:
    """Nothing grows beyond the budget: what all hold or may hold is no more than it, or no more than it was."""
    targets = plan(rules, seen, budget, seconds).targets
    before = sum(max(one.kept, one.target) for one in seen)
    after = sum(max(one.kept, target) for one, target in zip(seen, targets, strict=True))
    assert after <= max(before, budget)
    if before > budget:
        assert all(target <= one.target for one, target in zip(seen, targets, strict=True)) or after <= budget


@given(RULES, machines(), BUDGETS, st.floats(0, 10))
@settings(max_examples=EXAMPLES, deadline=None)
@pytest.mark.once
def test_nobody_is_driven_into_what_it_uses(rules: Rules, seen: list[Seen], budget: int, seconds: float) -> None:
    """A guest is never asked for memory that would leave it less than it uses and the least free memory."""
    for one, target in zip(seen, plan(rules, seen, budget, seconds).targets, strict=True):
        if target < one.target:
            assert target >= min(one.size, one.used + rules.least)


def run(rules: Rules, seen: list[Seen], budget: int, steps: int, pace: int) -> list[list[int]]:
    """Targets over time, of guests that give *pace* bytes a step, but never what they use."""
    history = [[one.target for one in seen]]
    for _ in range(steps):
        targets = plan(rules, seen, budget, 1.0).targets
        seen = [
            evolve(one, target=target, kept=max(target, min(one.kept, max(one.used, one.kept - pace))))
            for one, target in zip(seen, targets, strict=True)
        ]
        history.append(targets)
    return history


@given(RULES, machines(wild=False, most=512), BUDGETS, st.integers(8 * MIB, 512 * MIB))
@settings(max_examples=EXAMPLES // 3, deadline=None)
@pytest.mark.once
def test_targets_converge_without_oscillation(rules: Rules, seen: list[Seen], budget: int, pace: int) -> None:
    """With a steady load every target moves one way only, and stands still in the end."""
    history = run(rules, seen, budget, 400, pace)
    for at in range(len(seen)):
        moves = [after[at] - before[at] for before, after in pairwise(history)]
        assert not (any(move > 0 for move in moves) and any(move < 0 for move in moves)), moves
        assert not any(moves[-20:])


def test_memory_flows_from_the_idle_to_the_busy() -> None:
    """Four machines of 1 GiB on 1.6 GiB: the busy one gets what it needs, within the budget."""
    rules, budget = Rules(), 1600 * MIB
    seen = [Seen(1024 * MIB, 64 * MIB, 1024 * MIB, 1024 * MIB, 100 * MIB) for _ in range(4)]
    for busy in (0, 1, 2, 3, 0):
        for _ in range(12):
            made = plan(rules, seen, budget, 1.0)
            seen = [
                evolve(one, target=target, kept=target, used=(800 if at == busy else 100) * MIB)
                for at, (one, target) in enumerate(zip(seen, made.targets, strict=True))
            ]
        assert sum(one.target for one in seen) <= budget + rules.band
        assert seen[busy].target >= 880 * MIB - rules.band
        assert made.short == 0


def test_a_budget_that_is_too_small_is_said() -> None:
    """When the least of all is more than the budget, the plan says by how much, and nobody goes below its least."""
    seen = [Seen(1024 * MIB, 0, 1024 * MIB, 1024 * MIB, 500 * MIB) for _ in range(2)]
    made = plan(Rules(), seen, 800 * MIB, 10.0)
    assert made.short == 2 * 524 * MIB - 800 * MIB
    assert made.targets == [524 * MIB, 524 * MIB]


def test_pressure_keeps_the_surplus_with_the_host() -> None:
    """With no surplus to give, guests keep what they need although the budget has more."""
    seen = [Seen(1024 * MIB, 0, 1024 * MIB, 1024 * MIB, 100 * MIB)]
    assert plan(Rules(), seen, 4096 * MIB, 100.0, surplus=0.0).targets == [100 * MIB + int(1024 * MIB * 0.08)]
    assert plan(Rules(), seen, 4096 * MIB, 100.0).targets == [1024 * MIB]


def test_the_lowest_priority_gives_first() -> None:
    """When the needs are more than the budget, a higher priority keeps its margin while others can give."""
    seen = [Seen(1024 * MIB, 0, 1024 * MIB, 1024 * MIB, 500 * MIB, priority=at) for at in (0, 5)]
    need = 500 * MIB + int(1024 * MIB * 0.08)
    assert plan(Rules(), seen, 2 * need - 30 * MIB, 10.0).targets == pytest.approx([need - 30 * MIB, need], abs=1)
    assert plan(Rules(), seen, 2 * 524 * MIB, 10.0).targets == [524 * MIB, 524 * MIB]
