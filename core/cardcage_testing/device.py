"""``check_device``: the contract that every device is held to."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from cardcage._machine.abilities import ABILITIES, abilities_of
from cardcage.abilities import check_signature, near_misses
from cardcage.device import Pio

from cardcage_testing.slot import TestSlot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cardcage.device import Region

__all__ = ["check_device"]


def check_device(
    factory: Callable[[], Any],
    *regions: Region,
    slot: Callable[[], TestSlot] = TestSlot,
    accesses: int = 2000,
    seed: int = 1,
    protocols: Iterable[Any] = (),
) -> None:
    """Hold a device to the contract; raises AssertionError with what it broke.

    Args:
        factory: makes one device. regions: as registered. slot: makes the slot it is plugged into.
        accesses: how many random accesses of all sizes and offsets a hostile guest makes. seed: of their choice.
        protocols: what else is looked for in it, such as what its bus asks.

    The contract: methods have the agreed signatures, and none is nearly called as one that the machine looks for
    (``rest`` for ``reset``); no access raises or returns a value that does not fit its size;
    two devices share no state; after ``reset`` a device reads as a new device does where reads have no effect on one
    another; ``load`` takes what ``save`` gave, on a new device too, and gives it again; memory outside guest RAM is
    never asked for with success.
    """
    first, first_slot = _plugged(factory, regions, slot)
    who = type(first).__name__
    abilities = abilities_of(first, who)
    misses = near_misses(first, (*ABILITIES.values(), *protocols))
    assert not misses, f"{who}: {'; '.join(misses)}"
    for region in regions:
        check_signature(first, region.read, 2, who)
        check_signature(first, region.write, 3, who)
    fresh = _state(first) if "state" in abilities else None
    _hammer(first, first_slot, regions, accesses, seed)
    if "state" in abilities:
        second, second_slot = _plugged(factory, regions, slot)
        assert _state(second) == fresh, f"{who}: a new device has the state of another device"
        saved = first.save()
        second.load(saved)
        assert _state(second) == _as_values(saved), (
            f"{who}: after load(), save() does not return the state that was loaded"
        )
        second_slot.close()
    if "reset" in abilities:
        first.reset()
        if fresh is not None:
            assert _state(first) == fresh, f"{who}: reset() does not restore the state of a new device"
    if "unplug" in abilities:
        first.unplug()
    first_slot.close()


def _plugged(
    factory: Callable[[], Any], regions: tuple[Region, ...], slot: Callable[[], TestSlot]
) -> tuple[Any, TestSlot]:
    device, made = factory(), slot()
    made.bind(device, *regions)
    if "plug" in abilities_of(device, type(device).__name__):
        device.plug(made)
    return device, made


def _state(device: Any) -> Any:
    return _as_values(device.save())


def _as_values(state: Any) -> Any:
    from attrs import asdict, has

    assert has(type(state)), f"save() returned {type(state).__name__}, expected an attrs instance"
    return asdict(state)


def _hammer(device: Any, slot: TestSlot, regions: tuple[Region, ...], accesses: int, seed: int) -> None:
    choice = random.Random(seed)
    who = type(device).__name__
    for _ in range(accesses if regions else 0):
        region = choice.choice(regions)
        size = choice.choice(
            [one for one in ((1, 2, 4) if isinstance(region, Pio) else (1, 2, 4, 8)) if one <= region.size]
        )
        offset = choice.randrange(region.size - size + 1)
        if choice.random() < 0.5:
            value = getattr(device, region.read)(offset, size)
            assert isinstance(value, int), f"{who}: read({offset:#x}, {size}) gave {value!r}, expected an integer"
            assert 0 <= value < 1 << 8 * size, (
                f"{who}: read({offset:#x}, {size}) gave {value:#x}, more than {size} bytes"
            )
        else:
            value = choice.choice((0, 1, (1 << 8 * size) - 1, choice.getrandbits(8 * size)))
            found = getattr(device, region.write)(offset, size, value)
            assert found is None, f"{who}: write({offset:#x}, {size}, {value:#x}) gave {found!r}, expected None"
        if choice.random() < 0.1:
            slot.clock.advance(choice.randrange(1_000_000))
            slot.loop.run_soon()
