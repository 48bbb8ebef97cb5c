"""The machine's life: building, states, outcomes, failures, reset, interrupts, console."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
from attrs import define, field, frozen
from cardcage.accelerator import Probe
from cardcage.config import Draft
from cardcage.console import ConsoleTimeout
from cardcage.device import BootContext, E820Entry, Mmio, Pio, Slot
from cardcage.errors import AcceleratorError, CardError, ConfigError, GuestError, HostError, StateError
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.memory import RamBlock, RamRange
from cardcage.outcome import Crashed, DebugExit, Panicked, PoweredOff, Reset, Stopped, TimedOut
from cardcage.registry import Registry
from cardcage.vcpu import Exit
from cardcage.x86 import VCpuState, reset_state
from scripted import Script, Scripted, ScriptedVCpu

Steps = Generator[tuple[Any, ...], Any, None]


class Panel:
    """A device for tests: writes ask the machine for things, reads tell what happened."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def plug(self, slot: Slot, /) -> None:
        self.slot = slot
        self.char = slot.open("char", "console")
        self.char.start(lambda data: self.calls.append(data))

    def unplug(self) -> None:
        self.calls.append("unplug")

    def reset(self) -> None:
        self.calls.append("reset")

    def power_button(self) -> None:
        self.calls.append("button")
        self.slot.control.request_poweroff()

    def contribute(self, context: BootContext, /) -> None:
        self.calls.append("contribute")
        context.reserve(0x9000, 0x1000, 4)

    def read(self, offset: int, size: int, /) -> int:
        return len(self.calls)

    def write(self, offset: int, size: int, value: int, /) -> None:
        control = self.slot.control
        match offset:
            case 0:
                control.request_poweroff()
            case 1:
                control.request_reset("asked")
            case 2:
                control.request_panic("oops")
            case 3:
                control.request_debug_exit(value)
            case 4:
                raise ZeroDivisionError("a card's bug")
            case 5:
                self.char.write(bytes([value]))
            case 6:
                self.calls.append(value)


@frozen
class RawOptions:
    fill: int = 0xAB


@define
class RawBoot:
    """A boot protocol that fills a page and counts how often it was loaded."""

    options: RawOptions
    loads: int = 0
    e820: list[E820Entry] = field(factory=list)

    def open(self) -> RawBoot:
        return self

    def load(self, context: BootContext, /) -> VCpuState:
        self.loads += 1
        context.memory.write(0x1000, bytes([self.options.fill, self.loads]))
        self.e820 = list(context.e820)
        state = reset_state()
        state.registers.rip = 0x1000
        return state


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Machine]]:
    """Makes machines with scripted vCPUs, a panel at port 0x80 and the boot protocol ``fill``; closes them."""
    machines: list[Machine] = []

    def build(*scripts: Script, probe: Probe | None = None, cards: tuple[Any, ...] = (), **arguments: Any) -> Machine:
        def extra(registry: Registry) -> None:
            registry.device("panel", Panel, regions=(Pio(8, 0x80),))
            registry.boot("fill", RawBoot, options=RawOptions)

        card = Scripted(scripts, extra=extra)
        keys = {"platform": "none", **arguments.pop("machine", {})}
        devices = arguments.pop("devices", [{"type": "panel"}])
        machine = Machine(
            host=Host([card, *cards], installed=False),
            accel=arguments.pop("accel", "scripted"),
            memory=arguments.pop("memory", "2M"),
            machine=keys,
            devices=devices,
            **arguments,
        )
        machine.scripted = card  # type: ignore[attr-defined]
        machines.append(machine)
        return machine

    yield build
    for machine in machines:
        machine.close()


def out(offset: int, value: int = 1) -> Script:
    """A guest that writes once to the panel."""

    def script(_: ScriptedVCpu) -> Steps:
        yield ("out", 0x80 + offset, 1, value)

    return script


def panel(machine: Machine) -> Panel:
    """The machine's panel."""
    found: Panel = machine.devices["panel"].device
    return found


@pytest.mark.parametrize(
    ("offset", "outcome", "status"),
    [(0, PoweredOff(), 0), (2, Panicked("oops"), 10), (3, DebugExit(7), 15)],
)
def test_the_guest_ends_the_machine(make: Any, offset: int, outcome: Any, status: int) -> None:
    """Power-off, panic and debug exit are distinct outcomes with the documented statuses."""
    machine = make(out(offset, 7))
    assert machine.start().wait(20) == outcome
    assert outcome.status == status
    assert machine.state == "stopped"


def test_a_cards_exception_is_raised_by_wait_and_with(make: Any) -> None:
    """An exception in a device's write stops the machine and is raised with the device's own traceback."""
    machine = make(out(4))
    with pytest.raises(ZeroDivisionError, match="a card's bug") as caught:
        machine.start().wait(20)
    assert any(entry.name == "write" for entry in caught.traceback)
    assert machine.state == "stopped"
    machine.__exit__(None, None, None)  # wait() has told: nothing more to raise
    untold = make(out(4))
    ended = threading.Event()
    untold.observers.add("state", lambda state: ended.set() if state == "stopped" else None)

    def leave() -> None:
        with untold:
            untold.start()
            assert ended.wait(20)

    with pytest.raises(ZeroDivisionError):
        leave()


def test_an_exception_on_the_loop_thread_stops_the_machine(make: Any) -> None:
    """A timer callback that raises is as good as a write that raises."""
    machine = make()
    with machine.lock:
        machine.clock.timer(lambda: 1 / 0).arm(1)
    with pytest.raises(ZeroDivisionError):
        machine.start().wait(20)


def test_accelerator_exits_have_their_meaning(make: Any) -> None:
    """A triple fault crashes with its detail, a failed accelerator raises, a processor's reset resets."""

    def shutdown(_: ScriptedVCpu) -> Steps:
        yield ("exit", Exit.SHUTDOWN, "rip=0x7")

    def failed(_: ScriptedVCpu) -> Steps:
        yield ("exit", Exit.FAILED, "cannot emulate 0f 0b")

    def reset(_: ScriptedVCpu) -> Steps:
        yield ("exit", Exit.RESET, "")

    crashed = make(shutdown).start().wait(20)
    assert crashed == Crashed(0, "rip=0x7")
    assert crashed.status == 12
    with pytest.raises(AcceleratorError, match="cannot emulate 0f 0b"):
        make(failed).start().wait(20)
    assert isinstance(make(reset, machine={"on_reset": "stop"}).start().wait(20), Reset)


def test_reset_replays_the_boot_after_the_access(make: Any) -> None:
    """A reset that the guest asks for resets devices and replays the boot image; all vCPUs start as at first."""

    def script(cpu: ScriptedVCpu) -> Steps:
        calls = yield ("in", 0x80, 1)
        if calls < 4:
            yield ("out", 0x81, 1, 1)
            raise AssertionError("an instruction ran after the reset was asked for")
        yield ("out", 0x80, 1, 1)

    machine = make(script, boot={"protocol": "fill", "fill": 7}, cpus=2)
    resets: list[str] = []
    machine.observers.add("reset", resets.append)
    assert machine.start().wait(20) == PoweredOff()
    assert panel(machine).calls == ["contribute", "reset", "contribute", "reset", "contribute"]
    assert machine.memory.read(0x1000, 2) == bytes([7, 3])
    assert resets == ["asked", "asked"]
    assert machine.vcpus[0].get_state().registers.rip == 0x1000
    assert machine.vcpus[1].get_state().events.startup == "wait-for-sipi"


def test_on_reset_and_on_triple_fault_choose(make: Any) -> None:
    """``on_reset = "stop"`` ends with Reset; ``on_triple_fault = "reset"`` boots again."""
    assert make(out(1), machine={"on_reset": "stop"}).start().wait(20) == Reset("asked")

    def script(_: ScriptedVCpu) -> Steps:
        if (yield ("in", 0x80, 1)) < 2:
            yield ("exit", Exit.SHUTDOWN, "")
        yield ("out", 0x80, 1, 1)

    machine = make(script, machine={"on_triple_fault": "reset"}, boot={"protocol": "fill"})
    assert machine.start().wait(20) == PoweredOff()


def test_the_boot_context_describes_ram(make: Any) -> None:
    """The memory map has RAM, the hole below 1 MiB reserved, and what contributors carved out."""
    machine = make(out(0), boot={"protocol": "fill"}, memory="2M")
    machine.start().wait(20)
    assert machine.boot_image.e820 == [
        E820Entry(0, 0x9000),
        E820Entry(0x9000, 0x1000, 4),
        E820Entry(0xA000, 0x96000),
        E820Entry(0xA0000, 0x60000, 2),
        E820Entry(0x100000, 0x100000),
    ]


def test_pause_stops_guest_and_time(make: Any) -> None:
    """While paused no vCPU makes a step and guest time stands still; resume goes on; wrong states raise StateError."""

    def script(_: ScriptedVCpu) -> Steps:
        while True:
            yield ("out", 0x86, 1, 1)

    machine = make(script, cpus=2)
    with pytest.raises(StateError, match="cannot pause: the machine is built"):
        machine.pause()
    states: list[str] = []
    machine.observers.add("state", states.append)
    machine.start()
    machine.pause()
    with pytest.raises(StateError, match="cannot pause: the machine is paused"):
        machine.pause()
    then = len(panel(machine).calls), machine.clock.now()
    assert (len(panel(machine).calls), machine.clock.now()) == then
    machine.reset()
    assert panel(machine).calls[-1] == "contribute" or panel(machine).calls[-1] == "reset"
    machine.resume()
    machine.shutdown()
    assert machine.wait(20) == PoweredOff()
    assert states == ["running", "paused", "running", "stopped"]
    for act in (machine.start, machine.pause, machine.resume, machine.reset, machine.shutdown):
        with pytest.raises(StateError):
            act()


def test_stop_timeout_and_close(make: Any) -> None:
    """wait() gives TimedOut and lets the machine run; stop() ends it with Stopped; close() is idempotent and joins."""
    machine = make()
    with pytest.raises(StateError, match="not started"):
        machine.wait()
    machine.start()
    assert machine.wait(0.01) == TimedOut(0.01)
    assert machine.state == "running"
    machine.stop("enough")
    assert machine.wait(20) == Stopped("enough")
    threads = {thread.name for thread in threading.enumerate()}
    assert "machine-loop" in threads
    machine.close()
    machine.close()
    assert not {thread.name for thread in threading.enumerate()} & {"machine-loop", "machine-cpu0"}
    assert panel(machine).calls[-1] == "unplug"
    assert machine.scripted.vms[0].closed


def test_close_without_start(make: Any) -> None:
    """A machine that never started gives everything back too, and leaves its host."""
    machine = make()
    host = machine.host
    assert host.machines == [machine]
    with machine:
        pass
    assert host.machines == []
    assert machine.scripted.vms[0].closed
    with pytest.raises(StateError, match="closed"):
        machine.start()


def test_the_first_end_counts(make: Any) -> None:
    """What comes after the first outcome changes nothing."""
    machine = make()
    machine.start()
    machine.end(PoweredOff())
    machine.end(Panicked("late"))
    machine.fail(RuntimeError("later"))
    assert machine.wait(20) == PoweredOff()


def test_several_machines_in_a_process(make: Any) -> None:
    """Machines share nothing: each has its own outcome and memory."""
    first, second = make(out(3, 1)), make(out(3, 2))
    first.memory.write(0, b"1")
    assert [one.start().wait(20) for one in (first, second)] == [DebugExit(1), DebugExit(2)]
    assert second.memory.read(0, 1) == b"\0"


def test_devices_are_added_before_the_start(make: Any) -> None:
    """add() plugs a device with its own keys, refuses what does not fit, and raises StateError later."""
    machine = make(out(0), devices=[])
    added = machine.add("panel", id="second", port=0x80)
    assert added.slot.mappings[0].address == 0x80
    with pytest.raises(ConfigError, match="the console already belongs to device"):
        machine.add("panel", port=0x90)
    with pytest.raises(ConfigError, match="pio 0x84-0x8b overlaps second at 0x80-0x87"):
        machine.add("panel", port=0x84)
    with pytest.raises(ConfigError, match='the id "second" is taken'):
        machine.add("panel", id="second", port=0x90)
    with pytest.raises(ConfigError, match="no such key"):
        machine.add("panel", sped=1)
    assert set(machine.devices) == {"second"}
    assert machine.start().wait(20) == PoweredOff()
    with pytest.raises(StateError, match="before the machine starts"):
        machine.add("panel")


class Wrong:
    """A device with a method that cannot be called as agreed."""

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None: ...

    def reset(self, hard: bool) -> None: ...


class Half(Wrong):
    def save(self) -> None: ...

    def reset(self) -> None: ...


class Raises(Wrong):
    def __init__(self) -> None:
        raise KeyError("boom")


class NoWrite:
    def read(self, offset: int, size: int, /) -> int:
        return 0


class MmioThing(NoWrite):
    def write(self, offset: int, size: int, value: int, /) -> None: ...


@pytest.mark.parametrize(
    ("factory", "error"),
    [
        (Wrong, "reset(hard: 'bool') -> 'None' does not take 0 positional arguments"),
        (Half, "has 'save' but no 'load'"),
        (Raises, "KeyError: 'boom'"),
        (NoWrite, "has no method 'write'"),
    ],
)
def test_a_broken_device_is_named(make: Any, factory: Any, error: str) -> None:
    """A device that breaks the contract is a CardError that names it and its card; nothing of it stays."""

    class Card:
        from cardcage.hookspecs import hookimpl

        @hookimpl
        def cardcage_register(self, registry: Registry) -> None:
            registry.device("wrong", factory, regions=(Pio(1, 0x200),))

    machine = make(cards=(Card(),))
    with pytest.raises(CardError, match=re.escape(error)):
        machine.add("wrong")
    assert "wrong" not in machine.devices
    assert machine.pio.find(0x200) is None


def test_addresses_are_checked(make: Any) -> None:
    """A region needs an address, may not lie on RAM, and the keys must fit the regions that the card has."""

    class Card:
        from cardcage.hookspecs import hookimpl

        @hookimpl
        def cardcage_register(self, registry: Registry) -> None:
            registry.device("mmio", MmioThing, regions=(Mmio(0x1000),))
            registry.device("carried", MmioThing, bus="pci")

    machine = make(cards=(Card(),))
    for keys, error in (
        ({}, 'device "mmio" needs the key address'),
        ({"address": 0x100000}, "overlaps RAM at 0xc0000-0x1fffff"),
        ({"address": "03.0"}, 'expected a number, got "03.0"'),
        ({"port": 3, "address": 1 << 30}, 'port: "mmio" has 0 to give, got 1'),
        ({"address": 1 << 60}, "outside the mmio bus"),
    ):
        with pytest.raises(ConfigError, match=re.escape(error)):
            machine.add("mmio", **keys)
    machine.add("mmio", address=[1 << 30])
    with pytest.raises(ConfigError, match='"carried" needs a pci bus, which this machine does not have'):
        make(cards=(Card(),), devices=[{"type": "carried"}])


def test_building_fails_without_leaving_anything(make: Any) -> None:
    """A machine that cannot be built closes its VM and threads and leaves its host."""
    before = threading.active_count()
    for arguments in (
        {"devices": [{"type": "panle"}]},
        {"boot": {"protocol": "fill", "fil": 1}},
        {"boot": {"protocol": "lniux"}},
        {"memory": "100T"},
        {"memory": 4097},
        {"machine": {"platform": "mac"}},
        {"machine": {"console": "stdio"}, "devices": []},
        {"accel": "kvm"},
        {"fragments": [{"policy": {"memory": "ksm"}}]},
        {"fragments": [{"security": {"checkers": ["selinux"]}}]},
        {"fragments": [{"accel": {"scripted": {"x": 1}}}]},
        {"fragments": [{"accel": {"other": {}}}]},
    ):
        with pytest.raises(ConfigError):
            make(**arguments)
    assert threading.active_count() == before


def test_the_accelerator_is_the_first_usable_and_fast(make: Any) -> None:
    """Unusable ones are passed over with their reason, an emulated one is taken only when nothing is faster."""
    absent = Scripted(probe_result=Probe(False, "native", "no device"), name="absent")
    slow = Scripted(probe_result=Probe(True, "emulated", "2 MIPS"), name="slow")
    machine = make(cards=(absent, slow), accel=["absent", "slow", "scripted"])
    assert machine.accelerator.why == "scripted: scripted by the test (absent: no device; slow: 2 MIPS)"
    assert make(cards=(absent, slow), accel=["absent", "slow"]).accelerator.name == "slow"
    with pytest.raises(HostError, match=re.escape("no accelerator is usable here (absent: no device)")):
        make(cards=(absent,), accel="absent")
    with pytest.raises(ConfigError, match=re.escape('machine.accel[0]: no card offers accelerator "scriptde"')):
        make(accel="scriptde")


def test_lines_reach_controllers_or_the_accelerator(make: Any) -> None:
    """Lines reach the cards' controllers, or with a full irqchip the accelerator; INTA and EOI come back."""

    class Pic:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def set_irq(self, gsi: int, level: bool, /) -> None:
            self.seen.append((gsi, level))

        def acknowledge(self) -> int | None:
            return 0x30

    pic = Pic()

    def script(_: ScriptedVCpu) -> Steps:
        pic.seen.append((yield ("inta",)))
        yield ("eoi", 0x31)
        yield ("out", 0x80, 1, 1)

    machine = make(script)
    machine.add_controller(pic.set_irq)
    machine.set_extint_source(pic.acknowledge)
    machine.add_eoi_listener(pic.seen.append)
    source, other = machine.lines[5].source(), machine.lines[5].source()
    source.set(True)
    other.set(True)
    source.set(False)
    other.set(False)
    machine.start().wait(20)
    assert pic.seen == [(5, True), (5, False), 0x30, 0x31]
    full = make(machine={"irqchip": "full"})
    full.add_controller(pic.set_irq)
    full.lines[3].source().set(True)
    assert full.scripted.log[-1] == ("irq", 3, True)
    assert len(pic.seen) == 4


def test_hlt_outside_the_accelerator_waits_for_extint(make: Any) -> None:
    """After HALTED the vCPU runs again once the PIC drives INTR, and not before."""
    halted = threading.Event()

    def script(_: ScriptedVCpu) -> Steps:
        halted.set()
        yield ("exit", Exit.HALTED, "")
        yield ("out", 0x80, 1, 1)

    machine = make(script, machine={"irqchip": "none"})
    machine.start()
    assert halted.wait(20)
    machine.pause()
    machine.resume()
    assert machine.outcome is None
    with machine.lock:
        machine.set_extint(True)
    assert machine.wait(20) == PoweredOff()


def test_observers_are_told_and_bad_ones_removed(make: Any) -> None:
    """Accesses are observed only while someone does; an observer that raises is removed and the guest goes on."""

    def script(_: ScriptedVCpu) -> Steps:
        yield ("in", 0x80, 1)
        yield ("out", 0x86, 1, 9)
        yield ("store", 1 << 40, 4, 5)
        yield ("load", 1 << 40, 4)
        yield ("out", 0x80, 1, 1)

    machine = make(script)
    seen: list[Any] = []
    machine.observers.add("pio", lambda *values: 1 / 0)
    machine.observers.add("pio", lambda *values: seen.append(values))
    machine.observers.add("mmio", lambda *values: seen.append(values))
    machine.observers.add("outcome", seen.append)
    assert machine.start().wait(20) == PoweredOff()
    assert seen == [
        (0x80, 1, 0, False),
        (0x86, 1, 9, True),
        (1 << 40, 4, 5, True),
        (1 << 40, 4, 0xFFFFFFFF, False),
        (0x80, 1, 1, True),
        PoweredOff(),
    ]


def test_the_console_expects_and_types(make: Any) -> None:
    """expect() returns text up to its match, goes on after it, and says what came when nothing matches."""
    text = "login: \N{SNOWMAN}\nlogin: done"

    def script(_: ScriptedVCpu) -> Steps:
        for byte in text.encode():
            yield ("out", 0x85, 1, byte)

    machine = make(script)
    machine.console.send("early\n")
    machine.start()
    assert machine.console.expect("login:", 20) == "login:"
    assert machine.console.expect(re.compile("l.gin"), 20) == " \N{SNOWMAN}\nlogin"
    assert machine.console.expect("done", 20) == ": done"
    with pytest.raises(ConsoleTimeout, match=r"(?s)'never' did not come within 0.01 s; .*login: done"):
        machine.console.expect("never", 0.01)
    waiting = threading.Thread(target=machine.stop)
    waiting.start()
    with pytest.raises(GuestError, match="the machine ended"):
        machine.console.expect("never", 20)
    waiting.join()
    assert b"early\n" in panel(machine).calls
    assert machine.console.output == text


def test_ram_shows_around_the_video_hole(make: Any) -> None:
    """RAM is at 0, not at 0xA0000-0xBFFFF, and above; more than the hole allows goes on from 4 GiB."""
    machine = make(memory="2M")
    assert [(one.address, one.size) for one in machine.memory.slots] == [(0, 0xA0000), (0xC0000, 0x140000)]
    assert machine.vm.slots == machine.memory.slots
    machine.memory.write(0x100, b"x")
    assert machine.scripted.log[-1] == ("written", 0x100, 1)
    machine.memory.add(RamRange(0xFFF00000, 0x1000, RamBlock(0x1000), readonly=True))
    assert machine.vm.slots[-1].readonly


def test_toml_and_python_make_the_same_machine(tmp_path: Any) -> None:
    """A TOML file gives the same configuration as keyword arguments."""
    file = tmp_path / "vm.toml"
    file.write_text('[machine]\naccel = "scripted"\nmemory = "2M"\nplatform = "none"\n')
    host = Host([Scripted()], installed=False)
    with Machine.from_toml(file, host=host, set=["machine.cpus=2"]) as first:
        keys = {"memory": "2M", "accel": ["scripted"], "cpus": 2}
        draft = Draft.of({"machine": {**keys, "platform": "none"}})
        with Machine.from_config(draft.config(), host=host) as second:
            assert first.config.machine == second.config.machine
            assert len(first.vcpus) == len(second.vcpus) == 2
