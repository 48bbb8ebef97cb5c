"""``check_device``: the contract that every device is held to."""

from __future__ import annotations

import random
from contextlib import contextmanager
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from cardcage._machine.abilities import ABILITIES, abilities_of
from cardcage._machine.faults import HELD, line_of
from cardcage.abilities import check_signature, near_misses
from cardcage.device import Pio
from cardcage.errors import in_words
from cardcage.memory import GuestMemoryError

from cardcage_testing.slot import TestSlot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from cardcage.device import Region

__all__ = ["check_device"]

T = TypeVar("T")
FIRINGS = 100
"""Alarms that one device is given at most, one after another: periodic timers never end."""
LOOKED_AT = 512
"""Bytes of a region that are compared after a reset."""


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
    (``rest`` for ``reset``); no access raises or returns a value that does not fit its size, and neither does a timer,
    a reader, what ``call_soon`` runs, ``pause``, ``resume`` or ``reset`` raise, wherever the guest says that its memory
    is (some of the accesses come from one without RAM); none holds the machine's lock for more than a second; two
    devices share no state; after ``reset`` a device has a new device's state, and reads as one where neither time nor
    other reads change what is read; ``load`` takes what ``save`` gave, on a new device too, and gives it again.
    """
    choice = random.Random(seed)
    first = _Checked(factory, regions, slot)
    who, abilities = first.who, first.abilities
    misses = near_misses(first.device, (*ABILITIES.values(), *protocols))
    assert not misses, f"{who}: {'; '.join(misses)}"
    for region in regions:
        check_signature(first.device, region.read, 2, who)
        check_signature(first.device, region.write, 3, who)
    fresh = first.state() if "state" in abilities else None
    first.hammer(accesses, choice)
    if fresh is not None:
        second = _Checked(factory, regions, slot)
        assert second.state() == fresh, f"{who}: a new device has the state of another device"
        saved = first.device.save()
        second.device.load(saved)
        assert second.state() == _as_values(saved), (
            f"{who}: after load(), save() does not return the state that was loaded"
        )
        second.close()
    if "reset" in abilities:
        first.call("reset")
        if fresh is not None:
            assert first.state() == fresh, f"{who}: reset() does not restore the state of a new device"
        _compare_reads(first, _Checked(factory, regions, slot), _Checked(factory, regions, slot))
    first.close()
    _live_long(_Checked(factory, regions, slot), accesses // 4, choice)


def _live_long(device: _Checked, accesses: int, choice: random.Random) -> None:
    """Hammer a device while every alarm comes, also where no address is RAM, through a pause and a reset."""
    for method in ("pause", "resume", "reset"):
        device.fire()
        device.hammer(accesses, choice)
        device.fire()
        with device.without_ram():
            device.hammer(accesses, choice)
            device.fire()
            if ("pause" if method == "resume" else method) in device.abilities:
                device.call(method)
    device.hammer(accesses, choice)
    device.close()


class _Checked:
    """A device in a slot of its own, whose every call is watched."""

    def __init__(self, factory: Callable[[], Any], regions: tuple[Region, ...], slot: Callable[[], TestSlot]) -> None:
        self.device, self.slot, self.regions = factory(), slot(), regions
        self.who = type(self.device).__name__
        self.abilities = abilities_of(self.device, self.who)
        self.slot.bind(self.device, *regions)
        if "plug" in self.abilities:
            self.device.plug(self.slot)

    def close(self) -> None:
        """Take it out."""
        if "unplug" in self.abilities:
            self.device.unplug()
        self.slot.close()

    def state(self) -> Any:
        """Its saved state as plain values."""
        return _as_values(self.device.save())

    def watched(self, what: str, act: Callable[[], T]) -> T:
        """What *act* returns. Raises AssertionError that begins with *what* where it raises or takes long."""
        began = monotonic()
        try:
            found = act()
        except GuestMemoryError as error:
            at = line_of(error.__traceback__, None)
            problem = f"let a GuestMemoryError out at {at}: the guest chose the address, so catch it ({error})"
            raise AssertionError(f"{self.who}: {what} {problem}") from error
        except Exception as error:  # a device's fault, whatever it is
            raise AssertionError(f"{self.who}: {what} raised {in_words(error)}") from error
        took = monotonic() - began
        assert took <= HELD, f"{self.who}: {what} held the machine's lock for {took:.1f} seconds"
        return found

    def call(self, method: str) -> None:
        """Call *method*, then what it asked for."""
        self.watched(f"{method}()", getattr(self.device, method))
        self.turn()

    def turn(self) -> None:
        """A turn of the loop: readers, and what ``call_soon`` asked for."""
        self.watched("a reader, or what call_soon runs,", self.slot.loop.poll)

    def read(self, region: Region, offset: int, size: int) -> int:
        """Read, and hold the value to what fits."""
        what = f"{region.read}({offset:#x}, {size})"
        value = self.watched(what, lambda: getattr(self.device, region.read)(offset, size))
        assert isinstance(value, int), f"{self.who}: {what} gave {value!r}, expected an integer"
        fits = 0 <= value < 1 << 8 * size
        assert fits, (
            f"{self.who}: {what} gave {value:#x}, expected 0 to {(1 << 8 * size) - 1:#x}: more than {size} bytes"
        )
        return value

    def write(self, region: Region, offset: int, size: int, value: int) -> None:
        """Write, which returns nothing."""
        what = f"{region.write}({offset:#x}, {size}, {value:#x})"
        found = self.watched(what, lambda: getattr(self.device, region.write)(offset, size, value))
        assert found is None, f"{self.who}: {what} gave {found!r}, expected None"

    def hammer(self, accesses: int, choice: random.Random) -> None:
        """Random accesses, between which time passes and timers fire."""
        for _ in range(accesses if self.regions else 0):
            region = choice.choice(self.regions)
            size = choice.choice(_sizes(region))
            offset = choice.randrange(region.size - size + 1)
            if choice.random() < 0.5:
                self.read(region, offset, size)
            else:
                value = choice.choice((0, 1, (1 << 8 * size) - 1, choice.getrandbits(8 * size)))
                self.write(region, offset, size, value)
            if choice.random() < 0.1:
                self.pass_time(self.slot.clock.now() + choice.randrange(1_000_000))

    def pass_time(self, until: int) -> None:
        """Let timers fire up to a time, but no more than some, as each may arm others."""
        self.fire(until)
        self.slot.clock.skip(until)

    def fire(self, until: float = inf) -> None:
        """Let time pass from alarm to alarm."""
        clock = self.slot.clock
        for _ in range(FIRINGS):
            when = clock.next
            if when is None or when > until:
                break
            self.watched("a timer", partial(clock.advance, max(when - clock.now(), 0)))
        self.turn()

    @contextmanager
    def without_ram(self) -> Iterator[None]:
        """Meanwhile no address is RAM."""
        memory = self.slot.memory
        ranges = tuple(memory.ranges)
        memory.change(remove=ranges)
        try:
            yield
        finally:
            memory.change(add=ranges)

    def look(self) -> dict[tuple[str, int, int], int]:
        """What each place of each region reads as, by the method's name, offset and size."""
        return {
            (region.read, offset, size): self.read(region, offset, size)
            for region in self.regions
            for size in _sizes(region)
            for offset in range(0, min(region.size, LOOKED_AT) - size + 1, size)
        }


def _sizes(region: Region) -> list[int]:
    sizes = (1, 2, 4) if isinstance(region, Pio) else (1, 2, 4, 8)
    return [one for one in sizes if one <= region.size]


def _compare_reads(reset: _Checked, early: _Checked, late: _Checked) -> None:
    """Hold a device that was reset to two new ones, where these agree at two times and twice."""
    late.pass_time(reset.slot.clock.now())
    expected, later, found = early.look(), late.look(), reset.look()
    again = early.look()
    for place, value in expected.items():
        if value == later[place] == again[place]:
            name, offset, size = place
            assert found[place] == value, (
                f"{reset.who}: after reset(), {name}({offset:#x}, {size}) gives {found[place]:#x}, "
                f"and that of a new device {value:#x}"
            )
    early.close()
    late.close()


def _as_values(state: Any) -> Any:
    from attrs import asdict, has

    assert has(type(state)), f"save() returned {type(state).__name__}, expected an attrs instance"
    return asdict(state)
