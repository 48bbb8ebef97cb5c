"""Mediation: who is asked, when, what a denial leaves, grants that are revoked and restored, checkers that break."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from attrs import define, field, frozen
from cardcage.bus import Bus
from cardcage.device import Mmio, Pio, Slot
from cardcage.errors import CardError, ConfigError, Denied
from cardcage.granted import GrantedLine, GrantedMemory, GrantedVm, MemoryDenied
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.interrupts import Line
from cardcage.log import Log, LogSink
from cardcage.machine import Machine
from cardcage.memory import GuestMemoryError, PhysicalMemory, RamBlock, RamRange
from cardcage.registry import Registry
from cardcage.security import Mediator
from cardcage.state import capture, restore
from cardcage.testing import check_memory
from scripted import Scripted


@define(eq=False)
class Guard:
    """Refuses what is in ``refused`` ((class, permission) pairs), and remembers what it was asked."""

    refused: set[tuple[str, str]] = field(factory=set)
    asked: list[tuple[str, str, str, tuple[str, ...]]] = field(factory=list)
    callbacks: list[Callable[[], None]] = field(factory=list)
    released: list[str] = field(factory=list)
    closed: int = 0

    def check(self, source: str, target: str, tclass: str, permissions: tuple[str, ...], facts: Any, /) -> None:
        self.asked.append((source, target, tclass, permissions))
        for permission in permissions:
            if (tclass, permission) in self.refused:
                raise Denied(f"{source} may not {permission} {tclass}")

    def label(self, source: str, target: str, tclass: str, name: str, permissions: Any, facts: Any, /) -> str | None:
        return f"{source.partition(':')[0]}:{name}" if tclass in ("device", "machine") else None

    def release(self, label: str, tclass: str, /) -> None:
        self.released.append(label)

    def subscribe(self, changed: Callable[[], None], /) -> Callable[[], None]:
        self.callbacks.append(changed)
        return lambda: self.callbacks.remove(changed)

    def close(self) -> None:
        self.closed += 1

    def now(self, *refused: tuple[str, str]) -> None:
        """Change the policy."""
        self.refused = set(refused)
        for changed in list(self.callbacks):
            changed()


@frozen
class Options:
    char: str = "none"


class Unit:
    """A device that opens a back end, if told to."""

    def __init__(self, options: Options) -> None:
        self.options, self.back = options, None

    def plug(self, slot: Slot, /) -> None:
        self.slot = slot
        if self.options.char != "none":
            self.back = slot.open("char", self.options.char)

    def read(self, offset: int, size: int, /) -> int:
        return self.slot.machine.name and 1  # asks for "reach" each time

    def write(self, offset: int, size: int, value: int, /) -> None:
        self.slot.machine.pause()


class Back:
    """A char back end that asks for its file."""

    def __init__(self, slot: Slot) -> None:
        slot.ask("image", "/the/file", ("open", "write"))
        self.written: list[bytes] = []
        self.received: Any = None

    def start(self, received: Callable[[bytes], None], /) -> None:
        self.received = received

    def write(self, data: bytes, /) -> None:
        self.written.append(data)

    def close(self) -> None: ...


class Cards:
    def __init__(self, guard: Any = None) -> None:
        self.guard = guard

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.device("unit", Unit, options=Options, regions=(Pio(4, 0x100),))
        registry.backend("char", "back", Back)
        registry.security("guard", lambda: self.guard)


def machine(guard: Any, **more: Any) -> Machine:
    """A bare scripted machine that only *guard* watches."""
    host = Host([Scripted(), Cards(guard)], installed=False)
    keys = {"platform": "none", "memory": "1M", "accel": "scripted", "name": "vm"}
    return Machine(host=host, machine=keys, fragments=[{"security": {"checkers": ["guard"]}}], **more)


def test_acts_are_asked_about_with_labels() -> None:
    """Each act is asked about with the labels of both sides, its class and its permissions."""
    guard = Guard()
    with machine(guard, devices=[{"type": "unit", "char": "back", "irq": 5}]) as vm:
        unit = vm.devices["unit"].device
        unit.slot.memory.write(0, b"x")
        unit.slot.irq()
        unit.slot.irq(4)
        unit.slot.msi(0xFEE00000, 1)
        unit.slot.mappings[0].move(0x200)
        assert vm.label == "operator:vm"
    at, me = "operator:vm", "operator:unit"
    assert guard.asked == [
        ("operator", at, "machine", ("create",)),
        (at, at, "memory", ("map",)),
        (at, me, "device", ("attach", "configure")),
        (me, at, "bus", ("claim",)),
        (me, "char:back", "backend", ("open",)),
        (me, "/the/file", "image", ("open", "write")),
        (me, at, "memory", ("dma_read",)),
        (me, at, "memory", ("dma_write",)),
        (me, me, "interrupt", ("raise",)),
        (me, "gsi4", "interrupt", ("raise",)),
        (me, at, "interrupt", ("route",)),
        (me, at, "bus", ("move",)),
        ("operator", at, "machine", ("destroy",)),
        (at, me, "device", ("detach",)),
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
    guard, threads = Guard(refused={(tclass, permission)}), threading.active_count()
    host = Host([Scripted(), Cards(guard)], installed=False)
    keys = {"platform": "none", "memory": "1M", "accel": "scripted", "name": "vm"}
    with pytest.raises(Denied, match=f"may not {permission} {tclass}"):
        Machine(host=host, machine=keys, fragments=[{"security": "guard"}], devices=[{"type": "unit", "char": "back"}])
    assert host.machines == []
    assert threading.active_count() == threads
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
            ("bus", "claim", lambda: slot.map_pio(Pio(1), 0x10, vm.devices["unit"].device)),
            ("bus", "move", lambda: slot.mappings[0].move(0x400)),
            ("backend", "open", lambda: slot.open("char", "back")),
            ("image", "write", lambda: slot.open("char", "back")),
            ("interrupt", "raise", lambda: slot.irq(4)),
            ("memory", "share", lambda: slot.shared_memory(lambda: None, lambda: None)),
            ("management", "reach", lambda: slot.machine),
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
        assert vm.ops.pio_read(0x100, 2) == 0xFFFF
        vm.ops.pio_write(0x100, 2, 1)
        done = threading.Event()

        def act() -> None:
            done.set()
            vm.devices["unit"].device.write(0, 1, 0)

        vm.events.call_soon(act)
        assert done.wait(20)
        vm.pause()  # carried out on the loop thread, after the above
        assert vm.state == "paused"


def test_a_bar_may_not_move_over_another() -> None:
    """Moving a range over another device's asks about that device; a refusal leaves both where they were."""
    guard = Guard()
    with machine(guard, devices=[{"type": "unit"}, {"type": "unit", "port": 0x200}]) as vm:
        first, second = (one.slot.mappings[0] for one in vm.devices.values())
        guard.refused = {("bus", "move")}
        with pytest.raises(Denied):
            second.move(0x102)
        assert guard.asked[-1] == ("operator:unit", vm.devices["unit"].slot.label, "bus", ("move",))
        assert (first.address, second.address) == (0x100, 0x200)
        guard.refused = set()
        with pytest.raises(ConfigError):  # and the bus has its own rule
            second.move(0x102)


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
        line = slot.irq()
        line.set(True)
        assert vm.lines[5].level
        guard.now(("interrupt", "raise"))
        assert not vm.lines[5].level
        line.set(False)
        line.set(True)
        line.pulse()
        assert not vm.lines[5].level
        guard.now()
        assert vm.lines[5].level
        slot.msi(0xFEE00000, 1)
        guard.now(("interrupt", "route"))
        slot.msi(0xFEE00000, 2)
        guard.now()
        slot.msi(0xFEE00000, 3)
        assert messages == [1, 3]


def test_back_ends_are_revoked_and_restored() -> None:
    """A back end is shut while anything that it was granted is refused: bytes are lost in both directions."""
    guard = Guard()
    with machine(guard, devices=[{"type": "unit", "char": "back"}]) as vm:
        back: Any = vm.devices["unit"].device.back
        seen: list[bytes] = []
        back.start(seen.append)
        for refused in (("image", "write"), ("backend", "open")):
            guard.now(refused)
            back.write(b"lost")
            back.received(b"lost")
        guard.now(("image", "write"), ("backend", "open"))
        guard.now(("image", "write"))
        back.write(b"lost")
        guard.now()
        back.write(b"kept")
        back.received(b"kept")
        assert back.written == seen == [b"kept"]


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

    granted = GrantedVm(vm, route)
    made = granted.add_irqfd(7, 0xFEE00000, 1)
    turns[0]()
    assert not vm.routes
    turns[1]()
    assert vm.routes
    granted.remove_irqfd(7, made)
    assert not vm.routes
    assert dropped


def test_two_checkers_stack_restrictively() -> None:
    """All must allow; the first that has a label gives it."""
    first, second = Guard(), Guard(refused={("a", "b")})

    class Silent:
        def check(self, *_: Any) -> None: ...

    mediator = Mediator((Silent(), first, second))
    with pytest.raises(Denied, match="x may not b a"):
        mediator.check("x", "y", "a", ("b",))
    assert (len(first.asked), len(second.asked)) == (1, 1)
    assert mediator.ask("x", "y", "device", "z", ("c",)) == "x:z"


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


def test_a_broken_security_card_stops_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A security card that cannot be loaded or made is an error of Host, never a card that is left out."""
    from cardcage import host as hosts
    from cardcage.config import Draft
    from cardcage.discovery import Announcement

    def announce(guard: Any) -> None:
        def load(one: Announcement) -> Any:
            if guard is None:
                raise ImportError("broken")
            return Cards(guard if one.name == "guard" else None)

        monkeypatch.setattr(Announcement, "load", load)
        monkeypatch.setattr(hosts, "announced", lambda group: [Announcement("guard", "g", "stranger", "1", "")])

    wanted = Draft.of({"policy": {"security": ["guard"]}}).config().security
    announce(None)
    with pytest.raises(CardError, match=r'card "guard" \(stranger 1\) is broken'):
        Host(security=wanted)
    announce(guard := Guard())
    with Host(security=wanted) as host:
        assert host.mediator.checkers == (guard,)
    assert guard.closed == 1
    with pytest.raises(ConfigError, match='no card offers security "other"'):
        Host(security=Draft.of({"security": "other"}).config().security)


def test_security_cards_load_before_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The named security card is found by its entry point, and asked about each card that follows."""
    from cardcage import host as hosts
    from cardcage.config import Draft
    from cardcage.discovery import Announcement

    guard, loaded = Guard(), []

    class Other:
        @hookimpl
        def cardcage_register(self, registry: Registry) -> None: ...

    def load(one: Announcement) -> Any:
        loaded.append(one.name)
        return Cards(guard) if one.name == "guard" else Other()

    names = ("abc", "guard", "xyz")
    monkeypatch.setattr(Announcement, "load", load)
    monkeypatch.setattr(hosts, "announced", lambda group: [Announcement(name, "g", "far", "1", "") for name in names])
    config = Draft.of({"security": {"checkers": ["guard"]}}).config()
    with Host(security=config.security):
        assert loaded == ["guard", "abc", "xyz"]
        assert guard.asked == [("host", "far", "card", ("load",))] * 2


def test_nothing_is_asked_without_checkers() -> None:
    """Without checkers names are labels, nothing is refused, and devices hold the real things."""
    assert Mediator().ask("a", "b", "c", "d", ("e",)) == "d"
    host = Host([Scripted(), Cards()], installed=False)
    keys = {"platform": "none", "memory": "1M", "accel": "scripted"}
    with Machine(host=host, machine=keys, devices=[{"type": "unit", "char": "back"}]) as vm:
        unit = vm.devices["unit"]
        assert unit.slot.memory is vm.memory
        assert type(unit.device.back) is Back
        assert (vm.label, unit.slot.label) == ("machine", "unit")


def test_granted_things_keep_their_contracts() -> None:
    """Guest memory and lines seen through grants are still what they are."""
    memory = PhysicalMemory()
    memory.add(RamRange(0, 0x1000, RamBlock(0x1000)))
    check_memory(GrantedMemory(memory, Log(LogSink())), 0, 0x1000)
    memory.close()
    levels: list[bool] = []
    line = GrantedLine(Line(levels.append).source())
    line.set(True)
    line.set(False)
    line.pulse()
    assert levels == [True, False, True, False]


def test_the_configuration_names_checkers() -> None:
    """`security = "default"`, `[security] checkers` and `[policy] security` are one list; other keys are refused."""
    from cardcage.config import Draft

    for table in (
        {"security": "default"},
        {"policy": {"security": "default"}},
        {"security": {"checkers": ["selinux"]}},
    ):
        config = Draft.of(table).config()
        assert [one.name for one in config.security] == ["selinux"]
        assert config.policy == {}
    both = Draft.of({"security": {"checkers": ["a"]}, "policy": {"security": [{"type": "b", "k": 1}], "memory": "c"}})
    assert [(one.name, one.options) for one in both.config().security] == [("a", {}), ("b", {"k": 1})]
    assert both.config().policy == {"memory": "c"}
    with pytest.raises(ConfigError, match=r"security.chekers: no such key. Did you mean"):
        Draft.of({"security": {"chekers": []}}).config()


def test_ranges_of_memory_are_claimed_with_their_bus() -> None:
    """The facts of a claim say which bus and where."""
    seen: list[dict[str, Any]] = []

    class Notes:
        def check(self, source: str, target: str, tclass: str, permissions: Any, facts: Any, /) -> None:
            if tclass == "bus":
                seen.append(facts)

    with machine(Notes(), devices=[{"type": "unit"}]) as vm:
        slot = vm.devices["unit"].slot
        slot.map_mmio(Mmio(0x1000), 0xE0000000, slot.machine.devices["unit"].device)
        assert isinstance(vm.mmio, Bus)
    assert [(one["bus"], one["address"], one["size"]) for one in seen] == [
        ("pio", "0x100", 4),
        ("mmio", "0xe0000000", 4096),
    ]


# the command line


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> Guard:
    """A security card that is installed, as `guard`."""
    from cardcage import host as hosts
    from cardcage.discovery import Announcement

    guard = Guard()
    monkeypatch.setattr(Announcement, "load", lambda one: Cards(guard))
    monkeypatch.setattr(hosts, "announced", lambda group: [Announcement("guard", "g", "stranger", "1", "")])
    return guard


RUN = '[machine]\nplatform = "none"\nmemory = "1M"\naccel = "scripted"\nname = "vm"\n'


@pytest.mark.parametrize("named", ["file", "option", "set", "environment"])
def test_the_command_line_loads_security_first(
    named: str, announced: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Wherever the security card is named, it is asked about each other card, the command, and the machine."""
    from cardcage.cli import main

    (tmp_path / "vm.toml").write_text(RUN + ('[policy]\nsecurity = "guard"\n' if named == "file" else ""))
    more = {"option": ["--security", "guard"], "set": ["--set", 'security.checkers=["guard"]']}.get(named, [])
    if named == "environment":
        monkeypatch.setenv("CARDCAGE_SECURITY", "guard")
    announced.refused = {("machine", "create")}
    assert main(["run", str(tmp_path / "vm.toml"), *more], cards=[Scripted()]) == 2
    assert "outcome: denied: operator may not create machine" in capfd.readouterr().err
    assert announced.asked == [
        ("host", "given to Host", "card", ("load",)),
        ("operator", "run", "management", ("command",)),
        ("operator", "operator:vm", "machine", ("create",)),
    ]
    announced.refused = {("management", "command")}
    assert main(["run", str(tmp_path / "vm.toml"), *more], cards=[Scripted()]) == 2
    assert "may not command management" in capfd.readouterr().err


def test_security_that_comes_too_late_is_refused(
    announced: Guard, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A security card that only the whole configuration names, after the other cards were loaded, is an error."""
    from cardcage.cli import main

    (tmp_path / "vm.conf").write_text(RUN + 'policy.security = "guard"\n'.replace("policy.", "[policy]\n"))
    assert main(["run", str(tmp_path / "vm.conf")], cards=[Scripted()]) == 2
    assert "policy.security: a security card is loaded before all others" in capfd.readouterr().err
