"""What ``check_device`` finds, and what it lets pass."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.device import Mmio, Pio
from cardcage_testing import TestSlot, check_device
from cardcage_testing import device as kit
from leftovers import Leftovers

if TYPE_CHECKING:
    from cardcage.device import Slot

REGION = Pio(4, 0x10)


class Sound:
    """Keeps bytes, counts time, clears on read, asks for alarms and callbacks, and forgets all of it at a reset."""

    def plug(self, slot: Slot, /) -> None:
        self.slot = slot
        self.timer = slot.clock.timer(self.alarm)
        self.reading, self.writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        slot.loop.add_reader(self.reading, self.readable)
        self.begin()

    def unplug(self) -> None:
        os.close(self.reading)
        os.close(self.writing)

    def begin(self) -> None:
        self.bytes, self.cleared = bytearray(2), 0
        self.timer.arm(self.slot.clock.now() + 3_600_000_000_000)

    def read(self, offset: int, size: int, /) -> int:
        value = self.slot.clock.now()
        if offset < 2:
            value = int.from_bytes(self.bytes[offset:], "little")
        elif offset == 2:
            value, self.cleared = self.cleared, self.cleared + 1
        return value & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int, /) -> None:
        if offset < 2:
            self.bytes[offset] = value & 0xFF
        elif offset == 2:
            self.slot.loop.call_soon(self.soon)
        else:
            os.write(self.writing, b"x")

    def readable(self) -> None:
        os.read(self.reading, 64)

    def soon(self) -> None: ...
    def alarm(self) -> None:
        self.timer.arm(self.slot.clock.now() + 1)

    def reset(self) -> None:
        self.begin()

    def pause(self) -> None: ...
    def resume(self) -> None: ...


def spoiled(method: str, act: Any) -> type[Sound]:
    """A device whose *method* does what *act* does besides."""

    def instead(self: Sound, *values: Any) -> Any:
        found = getattr(Sound, method)(self, *values)
        act(self)
        return found

    parameters = {"read": ("offset", "size"), "write": ("offset", "size", "value")}.get(method, ())
    names = "".join(f", {one}" for one in parameters)
    made: dict[str, Any] = {}
    exec(f"def {method}(self{names}): return instead(self{names})", {"instead": instead}, made)
    return type("Spoiled", (Sound,), made)


def fetch(device: Sound) -> None:
    """Reads where the guest says: one byte of the address, so that a mebibyte of RAM has them all."""
    device.slot.memory.read(device.bytes[0] << 12, 4)


METHODS = ("read", "write", "alarm", "soon", "readable", "reset", "pause", "resume")


def test_a_sound_device_passes() -> None:
    """Time, reads that clear, alarms in an hour and without end, readers and callbacks break no contract."""
    left = Leftovers()
    for seed in range(5):
        check_device(Sound, REGION, Mmio(8, 0x1000), seed=seed)
    assert left() == []


@pytest.mark.parametrize("method", METHODS)
def test_a_wild_address_that_is_let_out_is_found(method: str) -> None:
    """Wherever a device lets a GuestMemoryError out, it is named with the call and the line."""
    at = f"{re.escape(__file__)}:{fetch.__code__.co_firstlineno + 2}"
    with pytest.raises(AssertionError, match=f"Spoiled: .* let a GuestMemoryError out at {at}: .*catch it"):
        check_device(spoiled(method, fetch), REGION)


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_is_found(method: str) -> None:
    """Wherever a device raises, a timer that fires in an hour included, it is named with the call and the line."""
    with pytest.raises(AssertionError, match=r"Spoiled: .* raised ValueError: .* \(in <lambda>, "):
        check_device(spoiled(method, lambda device: int("x")), REGION)


def test_a_reset_that_resets_nothing_is_found() -> None:
    """A device that saves no state is held to what a new device reads as."""
    forgetful = type("Forgetful", (Sound,), {"reset": lambda self: None})
    with pytest.raises(AssertionError, match=r"Forgetful: after reset\(\), read\(0x0, 1\) gives 0x.*new device 0x0"):
        check_device(forgetful, REGION)


def test_a_call_that_takes_long_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds the machine's lock for longer than it may is named."""
    monkeypatch.setattr(kit, "HELD", -1)
    with pytest.raises(AssertionError, match=r"Sound: .* held the machine's lock for 0\.0 seconds"):
        check_device(Sound, REGION)


def test_a_negative_read_is_found() -> None:
    """A value below 0 is named with what was expected."""
    negative = type("Negative", (Sound,), {"read": lambda self, offset, size: -1})
    with pytest.raises(AssertionError, match=r"read\(.*\) gave -0x1, expected 0 to 0x"):
        check_device(negative, REGION)


def test_a_test_clock_tells_the_next_alarm() -> None:
    """``next`` is the time of the earliest timer that is armed; ``skip`` passes it, and it fires late."""
    slot, fired = TestSlot(), []
    first, second = slot.clock.timer(lambda: fired.append(1)), slot.clock.timer(lambda: fired.append(2))
    assert slot.clock.next is None
    first.arm(10)
    second.arm(20)
    first.cancel()
    assert slot.clock.next == 20
    slot.clock.skip(30)
    assert (slot.clock.now(), fired) == (30, [])
    slot.clock.advance(0)
    assert (slot.clock.now(), fired, slot.clock.next) == (30, [2], None)
    slot.close()
