"""check_snapshot: our devices and the examples keep it, and devices with a mistake do not."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from attrs import define
from cardcage.device import Pio, Slot
from cardcage.host import Host
from cardcage.registry import Registry
from cardcage_pc import cardcage_register
from cardcage_pci.host import PciHost
from cardcage_snapshot.state import capture, dumps, warm
from cardcage_snapshot.testing import check_snapshot
from cattrs import Converter

sys.path.append(str(Path(__file__).parents[1] / "devices"))
from pc_kit import Kit  # the PC's devices know each other by it
from snapshot_kit import counting
from test_pc_contract import OPTIONS

CHAR = {"debugcon": {"char": "stdio"}}  # a back end that is looked at
REGISTRY = Registry()
cardcage_register(REGISTRY)
DEVICES = {one.name: one for one in REGISTRY if one.kind == "device" and getattr(one, "bus", "") == "system"}


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_devices_of_the_pc_go_on_in_the_middle_of_their_work(name: str) -> None:
    """Each device of the platform that is saved with alarms armed, interrupts pending and bytes unread goes on in
    another machine as it does in its own."""
    offer: Any = DEVICES[name]
    factory, options = offer.load(), offer.load_options()
    check_snapshot(
        lambda: factory() if options is None else factory(options(**{**OPTIONS.get(name, {}), **CHAR.get(name, {})})),
        *offer.regions,
        slot=Kit,
        points=100 if os.environ.get("CARDCAGE_LONG_TESTS") else 12,
    )


def test_the_example_card_keeps_it() -> None:
    """The debug console of examples/debugcon-card has nothing to save, and goes on all the same."""
    device = pytest.importorskip("debugcon_card.device")
    check_snapshot(lambda: device.DebugConsole(device.Options(char="console")), Pio(1, base=0xE9), points=10)


def test_the_host_bridge_keeps_it() -> None:
    """PCI's configuration ports go on at the address that was chosen."""
    check_snapshot(
        PciHost,
        Pio(4, 0xCF8, "address", "read_address", "write_address"),
        Pio(4, 0xCFC, "data", "read_data", "write_data"),
        points=10,
    )


@define
class AlarmState:
    """The state of the device below."""

    version: ClassVar[int] = 1
    count: int = 0
    due: int | None = None
    high: bool = False


class Alarm:
    """A device that counts, and interrupts later: right as it is."""

    def __init__(self) -> None:
        self.state = AlarmState()

    def plug(self, slot: Slot) -> None:
        self.clock, self.irq = slot.clock, slot.interrupts.line()
        self.timer = slot.clock.timer(self.ring)
        self.char: Any = slot.host.open("char", "stdio")
        self.char.start(self.received)

    def received(self, data: bytes) -> None:
        self.state.count += len(data)

    def ring(self) -> None:
        self.state.due, self.state.high = None, True
        self.irq.set(True)

    def read(self, offset: int, size: int) -> int:
        self.state.high = False
        self.irq.set(False)
        return self.state.count & 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        self.state.count += 1
        self.state.due = self.clock.now() + 20_000_000
        self.timer.arm(self.state.due)
        self.char.write(bytes([self.state.count & 0xFF]))

    def save(self) -> AlarmState:
        return AlarmState(self.state.count, self.state.due, self.state.high)

    def load(self, state: AlarmState) -> None:
        self.state = state
        self.irq.set(state.high)
        if state.due is not None:
            self.timer.arm(state.due)


class Forgets(Alarm):
    """Leaves its count behind."""

    def load(self, state: AlarmState) -> None:
        super().load(AlarmState(0, state.due, state.high))


class Stuck(Alarm):
    """Does not arm its alarm again."""

    def load(self, state: AlarmState) -> None:
        self.state = state
        self.irq.set(state.high)


class Late(Alarm):
    """Counts the alarm's time from the beginning."""

    def load(self, state: AlarmState) -> None:
        super().load(AlarmState(state.count, state.due and self.clock.now() + 20_000_000, state.high))


class Quiet(Alarm):
    """Does not drive its interrupt line again."""

    def load(self, state: AlarmState) -> None:
        self.state = state
        if state.due is not None:
            self.timer.arm(state.due)


class Echoes(Alarm):
    """Tells the world about it."""

    def load(self, state: AlarmState) -> None:
        super().load(state)
        self.write(0, 1, 0)


@define
class Opaque:
    """Holds what no file can."""

    lock: Any = None


class Unsaved(Alarm):
    """Has a state and no way to save it."""

    save = load = None  # type: ignore[assignment]

    def reset(self) -> None:
        """Puts it back."""


class Hidden(Unsaved):
    """Has a state of which nothing tells."""

    reset = None  # type: ignore[assignment]


class Plain(Alarm):
    """Saves what is no attrs instance."""

    def save(self) -> Any:
        return {"count": self.state.count}


class Holds(Alarm):
    """Saves what JSON cannot hold."""

    def save(self) -> Any:
        return Opaque(object())


class Alike(Alarm):
    """Says that it is as it was saved when only its count is."""

    def unchanged(self, state: AlarmState) -> bool:
        return self.state.count == state.count


MISTAKES = [
    (Forgets, "after the snapshot"),
    (Stuck, "has its next alarm at none, the saved one"),
    (Late, "has its next alarm at"),
    (Quiet, "drives interrupt lines none, the saved one {5: True}"),
    (Echoes, "right after load"),
    (Unsaved, "has reset() and no save()"),
    (Hidden, "the loaded device"),
    (Plain, "save() returned dict, expected an attrs instance"),
    (Holds, "does not come back from JSON"),
    (Alike, "unchanged() is true of a state that it no longer has"),
]


def test_a_device_without_mistakes_keeps_it() -> None:
    """The device that the mistakes below are made in."""
    check_snapshot(Alarm, Pio(4, base=0x600))


@pytest.mark.parametrize(("device", "said"), MISTAKES, ids=lambda one: getattr(one, "__name__", ""))
def test_a_mistake_is_named(device: type[Alarm], said: str) -> None:
    """Each deliberate mistake is found and told in one sentence that begins with the device."""
    with pytest.raises(AssertionError) as caught:
        check_snapshot(device, Pio(4, base=0x600))
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{device.__name__}: ")


def test_nothing_is_made_when_a_warm_machine_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that stands still does not wait for functions that turn states into plain values: all were made before,
    those of classes inside of states too."""
    devices = [{"type": "virtio-rng"}]
    with Host() as host, counting(tmp_path, host, platform="pc", devices=devices) as vm:
        vm.start()
        warm(vm)
        made: list[type] = []
        make = Converter.gen_unstructure_attrs_fromdict

        def gen(self: Converter, cls: type) -> Any:
            made.append(cls)
            return make(self, cls)

        monkeypatch.setattr(Converter, "gen_unstructure_attrs_fromdict", gen)
        vm.pause()
        dumps(capture(vm))
        assert made == []
