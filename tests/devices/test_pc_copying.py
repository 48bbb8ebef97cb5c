"""Copies of chips' states."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from attrs import Factory, define
from cardcage.machine import Machine
from cardcage_pc.chips.copying import copied


@define
class Inner:
    """A part of a state."""

    bits: list[int] = Factory(lambda: [1, 2])


@define
class Outer:
    """A state."""

    inner: Inner = Factory(Inner)
    rows: list[Any] = Factory(lambda: [Inner(), [3], {"a": [4]}, (5, b"6")])
    name: str | None = None


def test_nothing_of_a_copy_is_the_states() -> None:
    """A copy is equal to its state, and what is changed in it, however deep, is not changed there."""
    state = Outer()
    found = copied(state)
    assert found == deepcopy(state) == state
    found.inner.bits.append(3)
    found.rows[0].bits.append(3)
    found.rows[1].append(4)
    found.rows[2]["a"].append(5)
    assert state == Outer()


@pytest.mark.once
def test_the_states_of_all_chips() -> None:
    """The state of each device of a PC has an equal copy of the same class."""
    with Machine(memory="16M", accel="tcg") as vm:
        for one in vm.devices.values():
            if "state" in one.abilities:
                state = one.device.save()
                assert copied(state) == state
                assert type(copied(state)) is type(state)
