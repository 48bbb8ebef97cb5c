"""The watchdog timer i6300esb: registers, stages, and what it does to a machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cardcage import Machine
from cardcage.errors import UsageError
from cardcage_pci.host import PciHost, PciHostOptions
from cardcage_testing import TestSlot, check_device
from cardcage_watchdog.i6300esb import I6300esb, I6300esbOptions, I6300esbState
from hypothesis import given
from hypothesis import strategies as st
from qmp_kit import Client

SECOND = 1_000_000_000
TICK = (1 << 15) * SECOND // 33_000_000
HALT = b"\xfa\xf4\xeb\xfd"


class Board:
    """The watchdog on a bus, driven as Linux's driver does."""

    def __init__(self, action: Any = "reset") -> None:
        self.slot = TestSlot(id="w")
        self.device = I6300esb(I6300esbOptions(action))
        self.host = PciHost(PciHostOptions())
        self.host.attach(self.device, self.slot, "05.0")
        self.device.plug(self.slot)
        self.acts: list[str] = []
        self.device.listeners.append(self.acts.append)

    def get(self, offset: int, size: int) -> int:
        return self.host.config_read(5 << 3, offset, size)

    def put(self, offset: int, size: int, value: int) -> None:
        self.host.config_write(5 << 3, offset, size, value)

    def unlocked(self, offset: int, size: int, value: int) -> None:
        self.device.write(0xC, 2, 0x80)
        self.device.write(0xC, 2, 0x86)
        self.device.write(offset, size, value)

    def begin(self, ticks: int) -> None:
        self.put(0x60, 2, 3)
        self.unlocked(0, 4, ticks)
        self.unlocked(4, 4, ticks)
        self.put(0x68, 1, 2)

    def feed(self) -> None:
        self.unlocked(0xC, 2, 0x100)


def test_a_guest_that_feeds_it_and_stops() -> None:
    """Nothing happens while it is fed; after both stages without, the machine is reset, and the next system finds
    that out until it clears it."""
    board = Board()
    assert board.get(0, 4) == 0x25AB8086
    board.begin(1000)
    for _ in range(5):
        board.slot.clock.advance(1900 * TICK)
        board.feed()
    assert (board.slot.power.requests, board.device.read(0xC, 2)) == ([], 0)
    board.slot.clock.advance(1999 * TICK)
    assert board.acts == []
    board.slot.clock.advance(2 * TICK)
    assert board.acts == ["reset"]
    assert len(board.slot.power.requests) == 1
    board.device.reset()
    assert board.device.read(0xC, 2) == 0x1200
    board.unlocked(0xC, 2, 0x200)
    assert board.device.read(0xC, 2) == 0


def test_registers_that_are_locked() -> None:
    """A write without its key changes nothing, a wrong key is none, and the lock register stays as it was locked."""
    board = Board()
    board.device.write(0, 4, 5)
    board.device.write(0xC, 2, 0x86)
    board.device.write(0, 4, 5)
    board.unlocked(8, 4, 5)
    board.device.write(0, 4, 5)
    assert board.device.state.ticks == (0xFFFFF, 0xFFFFF)
    board.put(0x68, 1, 3)
    board.put(0x68, 1, 0)
    assert board.get(0x68, 1) == 3
    board.put(0x60, 2, 0xFFFF)
    assert board.get(0x60, 2) == 0x27


def test_the_other_ways_of_its_timer() -> None:
    """The fast clock, one that changes nothing at its end, one that begins again, one that is switched off."""
    board = Board("none")
    board.begin(1000)
    board.put(0x60, 2, 4)
    board.feed()
    board.slot.clock.advance(2 * 1000 * 32 * SECOND // 33_000_000 + SECOND // 500)
    assert board.acts == ["none"]
    board = Board("none")
    board.put(0x68, 1, 4)
    board.begin(1000)
    board.put(0x60, 2, 0x23)
    board.slot.clock.advance(3000 * TICK)
    assert board.acts == []
    board.put(0x60, 2, 3)
    board.put(0x68, 1, 0)
    board.put(0x68, 1, 6)
    board.slot.clock.advance(4001 * TICK)
    assert board.acts == ["none", "none"]
    board.put(0x68, 1, 0)
    board.slot.clock.advance(9000 * TICK)
    assert len(board.acts) == 2


def test_a_button_that_it_presses() -> None:
    """The action can be changed; ``shutdown`` presses the power button, and no other word is one."""
    board = Board()
    with pytest.raises(UsageError, match="expected one of reset"):
        board.device.set_action("explode")
    pressed: list[bool] = []
    button = SimpleNamespace(power_button=lambda: pressed.append(True))
    board.slot.board.devices["pm"] = SimpleNamespace(device=button)
    board.device.set_action("shutdown")
    board.begin(1)
    board.slot.clock.advance(SECOND)
    assert pressed == [True]


def test_the_contract_of_devices() -> None:
    """What every device keeps to: signatures, reset, states that are saved and loaded."""
    check_device(lambda: I6300esb(I6300esbOptions()))


@given(
    st.lists(
        st.tuples(st.sampled_from("prwc"), st.integers(0, 15), st.sampled_from((1, 2, 4)), st.integers(0, 0xFFFFFFFF)),
        max_size=60,
    )
)
def test_whatever_a_guest_writes(steps: list[tuple[str, int, int, int]]) -> None:
    """No access ends in an exception; a state that was saved in the middle, loaded, goes on the same."""
    board, other = Board("none"), Board("none")
    for kind, offset, size, value in steps:
        for one in (board, other):
            if kind == "p":
                one.put(0x60 + offset, size, value & (1 << 8 * size) - 1)
            elif kind == "w":
                one.unlocked(offset, size, value & (1 << 8 * size) - 1)
            elif kind == "r":
                one.device.read(offset, size)
            else:
                one.slot.clock.advance(value << 8)
        state = other.device.save()
        other.device.load(I6300esbState())
        other.device.load(state)
        assert other.device.save() == board.device.save()
    assert other.acts == board.acts


@pytest.mark.parametrize("action", ["pause", "reset", "poweroff"])
def test_a_machine_with_it(tmp_path: Path, action: str) -> None:
    """QMP hears WATCHDOG with the action that set-action chose, and the machine is as that says."""
    (tmp_path / "image").write_bytes(HALT)
    boot = {"protocol": "raw", "image": str(tmp_path / "image")}
    devices = [{"type": "i6300esb"}, {"type": "qmp", "socket": f"unix:{tmp_path}/qmp"}]
    keys = {"on_reset": "stop"}
    with (
        Machine(boot=boot, memory="16M", accel="tcg", devices=devices, machine=keys) as vm,
        Client(tmp_path / "qmp") as peer,
    ):
        assert "does not accept" in peer.ask("set-action", watchdog="inject-nmi")["error"]["desc"]
        assert peer.ask("set-action", watchdog=action) == {"return": {}}
        vm.start()
        device = vm.devices["i6300esb"].device
        with vm.lock:
            device.state.ticks = (1, 1)
            device._function.config[0x68] = 2
            device.config_written(0x68, 1)
        assert peer.event("WATCHDOG")["data"] == {"action": action}
        if action == "pause":
            peer.event("STOP")
            assert peer.ask("query-status")["return"]["status"] == "watchdog"
            assert peer.ask("cont") == {"return": {}}
            vm.stop()
        outcome = str(vm.wait(60))
        assert "watchdog expired" in outcome or action == "pause", outcome
