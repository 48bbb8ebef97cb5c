"""``check_snapshot``: the contract of a device that is saved in the middle of its work and goes on in another machine.

    check_snapshot(lambda: Serial(SerialOptions()), Pio(8, base=0x3F8))

A device is driven by a guest at random: accesses of all sizes, alarms that come, bytes from its char back ends that
nobody has read yet. At many moments it is saved, and a new one loads that state, by way of JSON as a file has it. From
then on both are given the same, and must do the same: what they read, interrupts and their levels, what goes out, what
is written to guest memory, when the next alarm comes. A device that has ``unchanged`` (:mod:`cardcage_fork.reverting`)
is true to it.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import attrs
from cardcage.abilities import has
from cardcage.device import HasState, Pausable, Pluggable, Resettable, Unpluggable
from cardcage.errors import in_words
from cardcage_testing import TestSlot

from cardcage_snapshot.manifest import converter

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Region

__all__ = ["check_snapshot", "saved_and_loaded"]

FLOOD = 40
"""Bytes that come from a back end at once, at most."""


def saved_and_loaded(state: Any, who: str = "") -> Any:
    """The *state* that a device's ``save`` gave, as a file gives it back. *who* is the device.

    Raises AssertionError for what JSON cannot hold.
    """
    assert attrs.has(type(state)), f"{who}: save() returned {type(state).__name__}, expected an attrs instance"
    try:
        return converter().structure(json.loads(json.dumps(converter().unstructure(state))), type(state))
    except Exception as error:  # whatever a field is made of
        raise AssertionError(f"{who}: its state does not come back from JSON: {in_words(error)}") from error


def check_snapshot(
    make: Callable[[], Any],
    *regions: Region,
    slot: Callable[[], TestSlot] = TestSlot,
    points: int = 40,
    before: int = 60,
    after: int = 60,
    seed: int = 1,
) -> None:
    """Hold a device to the contract; raises AssertionError with what it broke.

    Args:
        make: makes one device. regions: as registered. slot: makes the slot it is plugged into.
        points: at how many moments it is saved. before, after: acts until then, at most, and of both from then on.
        seed: of their choice.

    A device without ``save`` has to be one that has nothing to save: a new one does the same as one that has worked.
    """
    for point in range(points):
        choice = random.Random(f"{seed} {point}")
        first = _Twin(make, regions, slot)
        for _ in range(choice.randrange(before + 1)):
            first.do(_act(choice, first))
        if point % 2:  # in the middle of what the last act began
            first.do(("time", choice.randrange(1 << choice.randrange(10, 24)), 0, 0, 0))
        second = first.successor(make, slot)
        try:
            first.compare(second, "right after load()")
            kept = second.what_it_says()
            for number in range(after):
                act = _act(choice, first)
                results = first.do(act), second.do(act)
                what = f"act {number + 1} after the snapshot, {_words(act)}"
                assert results[0] == results[1], (
                    f"{first.who}: {what}: the loaded device gave {results[1]}, the saved one {results[0]}"
                )
                first.compare(second, what, ram=number == after - 1)
                second.hold_to(kept, what)
        finally:
            second.close()
            first.close()


Act = tuple[str, int, int, int, int]
"""Kind, then: the region's number, offset, size, value; or a number of nanoseconds; or a seed and a length."""


def _act(choice: random.Random, twin: _Twin) -> Act:
    kind = choice.choices(("read", "write", "time", "alarm", "type", "turn"), (35, 40, 8, 7, 5, 5))[0]
    if kind in ("read", "write") and twin.regions:
        at = choice.randrange(len(twin.regions))
        region = twin.regions[at]
        size = choice.choice([one for one in (1, 2, 4, 8) if one <= min(region.size, 8)])
        offset = choice.randrange(region.size - size + 1)
        return kind, at, offset, size, choice.choice((0, 1, (1 << 8 * size) - 1, choice.getrandbits(8 * size)))
    if kind == "time":
        return kind, choice.randrange(1 << choice.randrange(10, 27)), 0, 0, 0
    if kind == "type":
        return kind, choice.getrandbits(32), choice.randint(1, FLOOD), 0, 0
    return ("alarm" if kind == "alarm" else "turn"), 0, 0, 0, 0


def _words(act: Act) -> str:
    kind, first, second, size, value = act
    match kind:
        case "read":
            return f"a read of {size} at {second:#x} of region {first}"
        case "write":
            return f"a write of {value:#x}, {size} bytes, at {second:#x} of region {first}"
        case "type":
            return f"{second} bytes from its back end"
        case "time":
            return f"{first} ns later"
    return {"alarm": "its next alarm"}.get(kind, "a turn of the loop")


class _Twin:
    """A device in a slot of its own."""

    def __init__(self, make: Callable[[], Any], regions: tuple[Region, ...], slot: Callable[[], TestSlot]) -> None:
        self.device, self.slot, self.regions = make(), slot(), regions
        self.who = type(self.device).__name__
        self.slot.bind(self.device, *regions)
        if has(self.device, Pluggable):
            self.device.plug(self.slot)
        self._marks: dict[str, int] = {}

    def do(self, act: Act) -> Any:
        """Carry *act* out; its result."""
        kind, first, second, size, value = act
        slot = self.slot
        if kind in ("read", "write"):
            region = self.regions[first]
            if kind == "read":
                return getattr(self.device, region.read)(second, size)
            return getattr(self.device, region.write)(second, size, value)
        if kind == "type":
            data = random.Random(first).randbytes(second)
            for back in self._chars():
                back.type(data)
        elif kind == "time":
            slot.clock.advance(first)
        elif kind == "alarm" and slot.clock.next is not None:
            slot.clock.advance(max(slot.clock.next - slot.clock.now(), 0))
        slot.loop.poll()
        return None

    def _chars(self) -> list[Any]:
        return [one for one in self.slot.host.opened.values() if hasattr(one, "type") and hasattr(one, "output")]

    def successor(self, make: Callable[[], Any], slot: Callable[[], TestSlot]) -> _Twin:
        """Another device that goes on from here: paused, saved, loaded, and both resumed."""
        if has(self.device, Pausable):
            self.device.pause()
        state = self.device.save() if has(self.device, HasState) else None
        kept = saved_and_loaded(state, self.who) if state is not None else None
        second = _Twin(make, self.regions, slot)
        second.slot.clock.skip(self.slot.clock.now())
        second.slot.memory.ranges[0].block.view[:] = self._ram()
        if kept is not None:
            second.device.load(kept)
        elif has(self.device, Resettable):
            raise AssertionError(f"{self.who}: has reset() and no save(): a state that a snapshot would lose")
        for one in (self, second):
            if has(one.device, Pausable):
                one.device.resume()
            one.slot.loop.poll()
            one.mark()
        return second

    def _ram(self) -> bytes:
        """RAM, which was there first; not the memory that devices show."""
        return bytes(self.slot.memory.ranges[0].block.view)

    def _heard(self) -> dict[str, Any]:
        """All that the device did to others, in lists that grow."""
        slot = self.slot
        heard: dict[str, Any] = {"messages": slot.interrupts.messages, "requests": slot.power.requests}
        heard |= {f"output {at}": one.output for at, one in enumerate(self._chars())}
        heard |= {f"line {gsi}": levels for gsi, levels in slot.interrupts.levels.items()}
        return heard

    def mark(self) -> None:
        """From now on only what comes is compared."""
        self.slot.written.clear()
        self._marks = {name: len(one) for name, one in self._heard().items()}

    def _since(self) -> dict[str, Any]:
        found = {name: one[self._marks.get(name, 0) :] for name, one in self._heard().items()}
        return {name: list(one) for name, one in found.items() if one}

    def levels(self) -> dict[int, bool]:
        """The interrupt lines that are high."""
        return {gsi: levels[-1] for gsi, levels in self.slot.interrupts.levels.items() if levels and levels[-1]}

    def compare(self, other: _Twin, when: str, *, ram: bool = False) -> None:
        """Raise AssertionError where *other* did, or is about to do, anything else; with *ram* look at all of that."""
        for what, mine, theirs in (
            ("drives interrupt lines", self.levels(), other.levels()),
            ("has its next alarm at", self.slot.clock.next, other.slot.clock.next),
            ("did", self._since(), other._since()),
        ):
            assert mine == theirs, (
                f"{self.who}: {when}: the loaded device {what} {theirs or 'none'}, the saved one {mine or 'none'}"
            )
        if self.slot.written != other.slot.written or (ram and self._ram() != other._ram()):
            raise AssertionError(f"{self.who}: {when}: the loaded device wrote other bytes to guest memory")
        self.slot.written.clear()
        other.slot.written.clear()

    def what_it_says(self) -> tuple[Any, Any]:
        """Its state, and all else that follows from that; nothing for a device that does not tell if it has changed."""
        if not hasattr(self.device, "unchanged"):
            return None, None
        state = saved_and_loaded(self.device.save(), self.who)
        return state, (self.levels(), self.slot.clock.next)

    def unchanged(self, state: Any) -> bool:
        """What it says to *state*, paused."""
        device = self.device
        if not has(device, Pausable):
            return bool(device.unchanged(state))
        device.pause()
        found = bool(self.device.unchanged(state))
        device.resume()
        return found

    def hold_to(self, kept: tuple[Any, Any], when: str) -> None:
        """Raise AssertionError where it says that it is as :meth:`what_it_says` had it, and is not."""
        state, rest = kept
        if state is not None and self.unchanged(state):
            now = saved_and_loaded(self.device.save(), self.who), (self.levels(), self.slot.clock.next)
            assert now == (state, rest), f"{self.who}: {when}: unchanged() is true of a state that it no longer has"

    def close(self) -> None:
        """Take it out."""
        if has(self.device, Unpluggable):
            self.device.unplug()
        self.slot.close()
