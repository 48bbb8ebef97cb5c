"""Grants: what a device holds is revoked and restored when policy changes; revoked, it lets nothing through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from cardcage._host.log import Log, LogSink
from cardcage._machine.granted import GrantedVm, LineGate, MemoryDenied, MemoryGate
from cardcage.errors import Denied
from cardcage.interrupts import Line
from cardcage.memory import GuestMemoryError, PhysicalMemory, RamBlock, RamRange
from cardcage_testing import check_memory
from guarded import Guard, machine


def test_memory_is_revoked_and_restored() -> None:
    """DMA that is refused later finds no memory; kept views are given up; allowed again, it goes on."""
    guard = Guard()
    with machine(guard, devices=[{"type": "unit"}]) as vm:
        memory: Any = vm.devices["unit"].slot.memory
        memory.write(0, b"data")
        before = memory.generation
        guard.now(("memory", "dma_read"), ("memory", "dma_write"))
        assert memory.generation != before
        for act in (
            lambda: memory.read(0, 1),
            lambda: memory.write(0, b"x"),
            lambda: memory.view(0, 1),
            lambda: memory.span(0),
            lambda: memory.discard(0, 4096),
        ):
            with pytest.raises(GuestMemoryError, match="refused by the security policy"):
                act()
        guard.now(("memory", "dma_write"))
        assert memory.read(0, 4) == b"data"
        with pytest.raises(MemoryDenied):  # a view is writable
            memory.view(0, 1)
        guard.now()
        assert bytes(memory.view(0, 4)) == b"data"
        assert vm.memory.read(0, 4) == b"data"


def test_memory_that_is_refused_from_the_start() -> None:
    """A device without DMA rights is plugged in; its memory refuses, and works once policy allows it."""
    guard = Guard(refused={("memory", "dma_read"), ("memory", "dma_write")})
    with machine(guard, devices=[{"type": "unit"}]) as vm:
        memory = vm.devices["unit"].slot.memory
        with pytest.raises(MemoryDenied):
            memory.read(0, 1)
        guard.now()
        assert memory.read(0, 1) == b"\0"


def test_interrupts_are_revoked_and_restored() -> None:
    """A revoked line is low whatever the device drives, and takes up what it drives when it is allowed again."""
    guard = Guard()
    with machine(guard, devices=[{"type": "unit", "irq": 5}]) as vm:
        slot, messages = vm.devices["unit"].slot, []
        vm.vm.signal_msi = lambda address, data: messages.append(data)
        line = slot.interrupts.line()
        line.set(True)
        assert vm.lines[5].level
        guard.now(("interrupt", "raise"))
        assert not vm.lines[5].level
        line.set(False)
        line.pulse()
        line.set(True)
        assert not vm.lines[5].level
        guard.now()
        assert vm.lines[5].level
        slot.interrupts.msi(0xFEE00000, 1)
        guard.now(("interrupt", "route"))
        slot.interrupts.msi(0xFEE00000, 2)
        guard.now()
        slot.interrupts.msi(0xFEE00000, 3)
        assert messages == [1, 3]


def test_routes_of_eventfds_are_revoked_and_restored() -> None:
    """A route is taken out of the accelerator while it is refused, put back after, and gone once removed."""

    class Vm:
        capabilities = frozenset({"irqfds"})
        routes: ClassVar[set[int]] = set()
        count = 0

        def add_irqfd(self, fd: int, address: int, data: int, /) -> int:
            self.count += 1
            self.routes.add(self.count)
            return self.count

        def remove_irqfd(self, fd: int, route: int, /) -> None:
            self.routes.remove(route)

    vm, dropped, turns = Vm(), [], []

    def route(*both: Callable[[], None]) -> Callable[[], None]:
        turns.extend(both)
        return lambda: dropped.append(True)

    granted = GrantedVm(vm, lambda *_: False, route)
    made = granted.add_irqfd(7, 0xFEE00000, 1)
    turns[0]()
    assert not vm.routes
    turns[1]()
    assert vm.routes
    granted.remove_irqfd(7, made)
    assert not vm.routes
    assert dropped


def test_granted_things_keep_their_contracts() -> None:
    """Guest memory and lines seen through grants are still what they are."""
    memory = PhysicalMemory()
    memory.add(RamRange(0, 0x1000, RamBlock(0x1000)))
    check_memory(MemoryGate(memory, Log(LogSink())).memory, 0, 0x1000)
    memory.close()
    levels: list[bool] = []
    line = LineGate(Line(levels.append)).source
    line.set(True)
    line.set(False)
    line.pulse()
    assert levels == [True, False, True, False]


def test_a_kept_call_of_memory_is_revoked() -> None:
    """Reads, writes, views and discards that a device kept from before find no memory, and find it again after."""
    guard = Guard()
    with machine(guard, devices=[{"type": "unit"}]) as vm:
        memory: Any = vm.devices["unit"].slot.memory
        read, write, view, span, discard = memory.read, memory.write, memory.view, memory.span, memory.discard
        for _ in range(2):
            write(0, b"data")
            assert (read(0, 4), bytes(view(0, 4)), bytes(span(0)[1][:4])) == (b"data", b"data", b"data")
            guard.now(("memory", "dma_read"), ("memory", "dma_write"))
            for call in (
                lambda: read(0, 4),
                lambda: write(0, b"lost"),
                lambda: view(0, 4),
                lambda: span(0),
                lambda: discard(0, 4096),
            ):
                with pytest.raises(MemoryDenied):
                    call()
            guard.now(("memory", "dma_write"))
            assert read(0, 4) == b"data"
            with pytest.raises(MemoryDenied):
                write(0, b"lost")
            guard.now()


def test_granted_memory_follows_the_layout() -> None:
    """RAM that is shown or taken away is so for a device at once, and for one whose memory was revoked meanwhile."""
    guard = Guard()
    more = RamRange(0x40000000, 0x1000, RamBlock(0x1000))
    with machine(guard, devices=[{"type": "unit"}]) as vm:
        memory = vm.devices["unit"].slot.memory
        with vm.lock:
            vm._board.change_memory(add=(more,))
        memory.write(more.address, b"there")
        assert vm.memory.read(more.address, 5) == b"there"
        guard.now(("memory", "dma_read"), ("memory", "dma_write"))
        with vm.lock:
            vm._board.change_memory(remove=(more,))
        guard.now()
        with pytest.raises(GuestMemoryError, match="not RAM"):
            memory.read(more.address, 1)
        assert not memory.contains(more.address, 1)
        more.block.close()


def test_a_kept_call_of_a_line_is_revoked() -> None:
    """A line's `set` and `pulse` that a device kept do not reach the line; what it wants is driven when allowed."""
    guard = Guard()
    with machine(guard, devices=[{"type": "unit", "irq": 5}]) as vm:
        line = vm.devices["unit"].slot.interrupts.line()
        drive, pulse, wire = line.set, line.pulse, vm.lines[5]
        seen: list[bool] = []
        drive(True)
        guard.now(("interrupt", "raise"))
        wire._changed = seen.append
        drive(False)
        pulse()
        drive(True)
        assert not seen
        guard.now()
        assert seen == [True]
        drive(False)
        assert not wire.level


def test_what_a_device_holds_does_not_open_itself() -> None:
    """Nothing that is handed out has the gate's own acts, or shows what it stands before."""
    guard = Guard()
    with machine(guard, devices=[{"type": "unit", "char": "back", "irq": 5}]) as vm:
        unit: Any = vm.devices["unit"]
        for held in (unit.slot.memory, unit.slot.interrupts.line(), unit.device.back):
            for name in ("reads", "writes", "switch", "turn", "revoke", "restore", "shut", "open", "before"):
                assert not hasattr(held, name)


def test_shared_memory_is_no_way_into_ram() -> None:
    """Who may share memory is told where it is, and gets neither its contents nor a say in the layout."""
    guard = Guard(refused={("memory", "dma_read"), ("memory", "dma_write")})
    with machine(guard, devices=[{"type": "unit"}]) as vm:
        held: Any = vm.devices["unit"].slot.host.shared_memory(lambda: None, lambda: None)
        assert [(one.address, one.fd, one.host_address) for one in held] == [
            (one.address, one.block.fd, one.block.host_address) for one in vm.memory.ranges
        ]
        for name in ("read", "write", "view", "change", "ranges", "slots", "close", "block", "on_written"):
            assert not any(hasattr(one, name) for one in (held, *held))


def test_what_devices_share_is_revoked() -> None:
    """What a device has by `share` refuses its calls while `backend open` is refused, kept ones too."""

    class Common:
        def post(self, what: str) -> str:
            return what

    guard = Guard()
    with machine(guard, devices=[{"type": "unit"}]) as vm:
        slot = vm.devices["unit"].slot
        common = slot.host.share("test:common", Common)
        post = common.post
        assert (post("a"), common.post("b")) == ("a", "b")
        guard.now(("backend", "open"))
        for call in (post, lambda what: common.post(what)):
            with pytest.raises(Denied):
                call("lost")
        with pytest.raises(Denied):
            slot.host.share("test:common", Common)
        guard.now()
        assert post("c") == "c"


class Rings:
    """A VM with doorbells and foreign rings."""

    capabilities = frozenset({"doorbells", "foreign-rings", "irqfds"})

    def __init__(self) -> None:
        self.bells: list[tuple[int, int]] = []
        self.rings: list[int] = []

    def add_doorbell(self, fd: int, address: int, size: int, *, pio: bool, value: int | None) -> None:
        self.bells.append((fd, address))

    def remove_doorbell(self, fd: int, address: int, size: int, *, pio: bool, value: int | None) -> None:
        self.bells.remove((fd, address))

    def add_foreign_ring(self, size: int, table: int, avail: int, used: int, /) -> int:
        self.rings.append(len(self.rings))
        return self.rings[-1]

    def foreign_ring_heads(self, number: int, /) -> tuple[int, list[int]]:
        return number, []

    def remove_foreign_ring(self, number: int, /) -> None:
        self.rings.remove(number)

    def add_irqfd(self, fd: int, address: int, data: int, /) -> int:
        return 1

    def remove_irqfd(self, fd: int, route: int, /) -> None: ...


def test_a_doorbell_stays_in_the_devices_own_ranges() -> None:
    """A device cannot take the guest's writes to another's ports, or to addresses that it does not answer at."""
    guard = Guard()
    with machine(guard, devices=[{"type": "unit"}, {"type": "unit", "port": 0x200}]) as vm:
        slot, real = vm.devices["unit"].slot, Rings()
        slot.interrupts.vm._vm = real
        slot.interrupts.vm.add_doorbell(7, 0x102, 2, pio=True, value=None)
        for address, size, pio in ((0x103, 2, True), (0x200, 2, True), (0x100, 2, False), (0xFF, 2, True)):
            with pytest.raises(Denied):
                slot.interrupts.vm.add_doorbell(7, address, size, pio=pio, value=None)
        assert real.bells == [(7, 0x102)]
        slot.ranges.mappings[0].move(None)
        with pytest.raises(Denied):
            slot.interrupts.vm.add_doorbell(7, 0x100, 2, pio=True, value=None)
        slot.interrupts.vm.remove_doorbell(7, 0x102, 2, pio=True, value=None)
        assert not real.bells


def test_a_device_reaches_only_what_it_added_to_the_vm() -> None:
    """Another device's doorbells, rings and routes can be neither looked at nor removed."""
    real = Rings()
    one, other = (GrantedVm(real, lambda *_: True, lambda *_: lambda: None) for _ in range(2))
    one.add_doorbell(7, 0x100, 2, pio=True, value=None)
    ring, route = one.add_foreign_ring(8, 0, 0x1000, 0x2000), one.add_irqfd(8, 0xFEE00000, 1)
    for act in (
        lambda: other.remove_doorbell(7, 0x100, 2, pio=True, value=None),
        lambda: other.foreign_ring_heads(ring),
        lambda: other.remove_foreign_ring(ring),
        lambda: other.remove_irqfd(8, route),
    ):
        with pytest.raises(Denied):
            act()
    assert (real.bells, real.rings) == ([(7, 0x100)], [ring])
    assert one.foreign_ring_heads(ring) == (ring, [])
    one.remove_foreign_ring(ring)
    one.remove_irqfd(8, route)
    one.remove_doorbell(7, 0x100, 2, pio=True, value=None)
    assert (real.bells, real.rings) == ([], [])
