"""Mediation: who is asked, when, what a denial leaves, checkers that stack, and checkers that break."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pytest
from cardcage._machine.bus import Bus
from cardcage.device import Mmio, Pio
from cardcage.errors import CardError, ConfigError, Denied
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.security import Act, Mediator
from cardcage_snapshot.state import capture, restore
from guarded import Back, Cards, Guard, machine
from leftovers import Leftovers
from scripted import Scripted


def test_acts_are_asked_about_with_labels() -> None:
    """Each act is asked about with the labels of both sides, its class and its permissions."""
    guard = Guard()
    with machine(guard, devices=[{"type": "unit", "char": "back", "irq": 5}]) as vm:
        unit = vm.devices["unit"].device
        unit.slot.memory.write(0, b"x")
        unit.slot.interrupts.line()
        unit.slot.interrupts.line(4)
        unit.slot.interrupts.msi(0xFEE00000, 1)
        unit.slot.ranges.mappings[0].move(0x200)
        assert vm.label == "operator:vm"
    at, me = "operator:vm", "operator:unit"
    assert guard.asked == [
        Act("operator", at, "machine", ("create",)),
        Act(at, at, "memory", ("map",)),
        Act(at, me, "device", ("attach", "configure")),
        Act(me, at, "bus", ("claim",)),
        Act(me, "char:back", "backend", ("open",)),
        Act(me, "/the/file", "image", ("open", "write")),
        Act(me, at, "memory", ("dma_read",)),
        Act(me, at, "memory", ("dma_write",)),
        Act(me, me, "interrupt", ("raise",)),
        Act(me, "gsi4", "interrupt", ("raise",)),
        Act(me, at, "interrupt", ("route",)),
        Act(me, at, "bus", ("move",)),
        Act("operator", at, "machine", ("destroy",)),
        Act(at, me, "device", ("detach",)),
    ]
    assert guard.released == [at]
    assert guard.closed == 1
    assert not guard.callbacks


@pytest.mark.parametrize(
    "refused",
    ["machine create", "memory map", "device attach", "device configure", "bus claim", "backend open", "image open"],
)
def test_a_refused_creation_leaves_nothing(refused: str) -> None:
    """When any act of building a machine is refused, no machine, thread, claim or label is left."""
    tclass, permission = refused.split()
    guard, left = Guard(refused={(tclass, permission)}), Leftovers()
    host = Host([Scripted(), Cards(guard)], installed=False)
    keys = {"platform": "none", "memory": "1M", "accel": "scripted", "name": "vm"}
    with pytest.raises(Denied, match=f"may not {permission} {tclass}"):
        Machine(host=host, machine=keys, fragments=[{"security": "guard"}], devices=[{"type": "unit", "char": "back"}])
    assert host.machines == []
    assert left.threads() == []
    assert guard.released == ["operator:vm"]


def test_a_refused_act_changes_nothing() -> None:
    """Each act on a machine that exists can be refused, and the machine is as before."""
    guard = Guard()
    with machine(guard, devices=[{"type": "unit"}]) as vm:
        slot = vm.devices["unit"].slot
        state = capture(vm)
        for tclass, permission, act in (
            ("machine", "add", lambda: vm.add("unit", port=0x300)),
            ("device", "attach", lambda: vm.add("unit", port=0x300)),
            ("machine", "start", vm.start),
            ("machine", "save", lambda: capture(vm)),
            ("machine", "load", lambda: restore(vm, state)),
            ("machine", "stop", vm.stop),
            ("machine", "destroy", vm.close),
            ("device", "detach", vm.close),
            ("bus", "claim", lambda: slot.ranges.pio(Pio(1), 0x10, vm.devices["unit"].device)),
            ("bus", "move", lambda: slot.ranges.mappings[0].move(0x400)),
            ("backend", "open", lambda: slot.host.open("char", "back")),
            ("image", "write", lambda: slot.host.open("char", "back")),
            ("interrupt", "raise", lambda: slot.interrupts.line(4)),
            ("memory", "share", lambda: slot.host.shared_memory(lambda: None, lambda: None)),
            ("management", "reach", lambda: slot.board),
        ):
            guard.refused = {(tclass, permission)}
            with pytest.raises((Denied, CardError), match=f"may not {permission} {tclass}"):
                act()
            guard.refused = set()
            assert vm.state == "built"
            assert list(vm.devices) == ["unit"]
            assert [(claim.base, claim.size) for claim in vm.pio] == [(0x100, 4)]
        vm.start()
        for permission, act in (("pause", vm.pause), ("reset", vm.reset), ("stop", vm.stop)):
            guard.refused = {("machine", permission)}
            with pytest.raises(Denied):
                act()
            assert vm.state == "running"
        guard.refused = set()
        vm.pause()
        guard.refused = {("machine", "resume")}
        with pytest.raises(Denied):
            vm.resume()
        assert vm.state == "paused"
        guard.refused = set()


def test_a_denial_while_the_guest_runs_does_not_stop_it() -> None:
    """What a device is denied in a guest's access or on the loop thread is logged; the access is an open bus's."""
    guard = Guard()
    with machine(guard, devices=[{"type": "unit"}]) as vm:
        vm.start()
        guard.refused = {("management", "reach")}
        assert vm._board.ops.pio_read(0x100, 2) == 0xFFFF
        vm._board.ops.pio_write(0x100, 2, 1)
        done = threading.Event()

        def act() -> None:
            done.set()
            vm.devices["unit"].device.write(0, 1, 0)

        vm.loop.call_soon(act)
        assert done.wait(20)
        vm.pause()  # carried out on the loop thread, after the above
        assert vm.state == "paused"


def test_a_bar_may_not_move_over_another() -> None:
    """Moving a range over another device's asks about that device; a refusal leaves both where they were."""
    guard = Guard()
    with machine(guard, devices=[{"type": "unit"}, {"type": "unit", "port": 0x200}]) as vm:
        first, second = (one.slot.ranges.mappings[0] for one in vm.devices.values())
        guard.refused = {("bus", "move")}
        with pytest.raises(Denied):
            second.move(0x102)
        assert guard.asked[-1] == Act("operator:unit", vm.devices["unit"].slot.label, "bus", ("move",))
        assert (first.address, second.address) == (0x100, 0x200)
        guard.refused = set()
        with pytest.raises(ConfigError):  # and the bus has its own rule
            second.move(0x102)


def test_two_checkers_stack_restrictively() -> None:
    """All must allow; the first that has a label gives it."""
    first, second = Guard(), Guard(refused={("a", "b")})

    class Silent:
        def check(self, *_: Any) -> None: ...

    mediator = Mediator((Silent(), first, second))
    with pytest.raises(Denied, match="x may not b a"):
        mediator.check(Act("x", "y", "a", ("b",)))
    assert (len(first.asked), len(second.asked)) == (1, 1)
    assert mediator.ask(Act("x", "y", "device", ("c",)), "z") == "x:z"


class Broken:
    """Raises whatever it is asked."""

    def __init__(self, *works: str) -> None:
        for name in works:
            setattr(self, name, (lambda _: list) if name == "subscribe" else lambda *_: None)

    def check(self, *_: Any) -> None:
        raise KeyError("oops")

    label = subscribe = check


@pytest.mark.parametrize("works", [(), ("check",), ("label", "subscribe"), ("check", "label")])
def test_a_checker_that_breaks_refuses(works: tuple[str, ...]) -> None:
    """An error in any answer of a checker refuses the machine with one clear line, and leaves nothing."""
    with pytest.raises(Denied, match=r"a checker failed: KeyError: 'oops' \(in check, .*test_core_security") as caught:
        machine(Broken(*works))
    assert "\n" not in str(caught.value)


def test_nothing_is_asked_without_checkers() -> None:
    """Without checkers names are labels, nothing is refused, and devices hold the real things."""
    assert Mediator().ask(Act("a", "b", "c", ("e",)), "d") == "d"
    host = Host([Scripted(), Cards()], installed=False)
    keys = {"platform": "none", "memory": "1M", "accel": "scripted"}
    with Machine(host=host, machine=keys, devices=[{"type": "unit", "char": "back"}]) as vm:
        unit = vm.devices["unit"]
        assert unit.slot.memory is vm.memory
        assert type(unit.device.back) is Back
        assert (vm.label, unit.slot.label) == ("machine", "unit")


def test_ranges_of_memory_are_claimed_with_their_bus() -> None:
    """The facts of a claim say which bus and where."""
    seen: list[Mapping[str, object]] = []

    class Notes:
        def check(self, act: Act, /) -> None:
            if act.tclass == "bus":
                seen.append(act.facts)

    with machine(Notes(), devices=[{"type": "unit"}]) as vm:
        slot = vm.devices["unit"].slot
        slot.ranges.mmio(Mmio(0x1000), 0xE0000000, slot.board.devices["unit"].device)
        assert isinstance(vm.mmio, Bus)
    assert [(one["bus"], one["address"], one["size"]) for one in seen] == [
        ("pio", "0x100", 4),
        ("mmio", "0xe0000000", 4096),
    ]
