"""What cards meet: slots, back ends, buses that carry devices, policies, the log, state, the public tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import cardcage_memory_policies
import pytest
from attrs import define, field, frozen
from cardcage._host.log import Log, LogSink
from cardcage.device import Pio, Region, Slot
from cardcage.errors import CardError, ConfigError, HostError, StateError
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.machine import Machine, reconfigure
from cardcage.registry import Registry
from cardcage_memory_policies import MachineMemory, PolicyOffer, policies_of
from cardcage_snapshot.state import capture, dumps, loads, restore
from cardcage_testing import TestSlot, check_device, check_memory
from scripted import Scripted

if TYPE_CHECKING:
    pass


# slots, back ends
@frozen
class FileOptions:
    path: str
    deep: dict[str, int] = field(factory=dict)


class Sink:
    def __init__(self, slot: Slot, options: FileOptions) -> None:
        if options.path == "gone":
            raise FileNotFoundError(2, "No such file or directory", "gone")
        self.options, self.closed = options, False

    def start(self, received: Any, /) -> None: ...

    def write(self, data: bytes, /) -> None: ...

    def close(self) -> None:
        self.closed = True


@frozen
class UserOptions:
    char: str | dict[str, Any] = "none"


class User:
    """A device that opens a back end."""

    def __init__(self, options: UserOptions) -> None:
        self.options = options

    def plug(self, slot: Slot, /) -> None:
        self.slot = slot
        self.back = slot.host.open("char", self.options.char)

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None: ...


@frozen
class Cards:
    """A card with a back end, a device that uses it, a policy and a bus."""

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.backend("char", "file", Sink, options=FileOptions, shorthand=lambda text: {"path": text})
        registry.device("user", User, options=UserOptions)
        registry.add(PolicyOffer("greedy", Greedy, options=GreedyOptions))
        registry.device("rack", Rack)
        registry.device("carried", Carried, bus="rack")


@frozen
class GreedyOptions:
    floor: int = 1


class Greedy:
    def __init__(self, options: GreedyOptions) -> None:
        self.options, self.calls = options, [f"floor {options.floor}"]

    def attach(self, memory: MachineMemory) -> None:
        self.calls.append(f"attach {memory.name}")

    def detach(self, memory: MachineMemory) -> None:
        self.calls.append(f"detach {memory.name}")


class Rack:
    """A device bus."""

    bus_type = "rack"

    def __init__(self) -> None:
        self.carried: list[Any] = []

    def attach(self, device: Any, slot: Slot, address: str | None, /) -> None:
        self.carried.append((slot.id, address))

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None: ...


class Carried:
    """A device on it."""

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None: ...


def machine(*fragments: dict[str, Any], **more: Any) -> Machine:
    """A bare scripted machine with these cards."""
    host = Host([Scripted(), cardcage_memory_policies, Cards()], installed=False)
    keys = {"platform": "none", "memory": "1M", "accel": "scripted"}
    return Machine(host=host, machine=keys, fragments=fragments, **more)


def test_back_ends_are_opened_by_spec_and_closed() -> None:
    """A spec is text or a table; what does not fit is named with the device's place; closing closes back ends."""
    with machine() as vm:
        text = vm.add("user", char="file:a:b").device.back
        table = vm.add("user", char={"type": "file", "path": "x", "deep": {"a": 1}}).device.back
        assert (text.options.path, table.options.deep) == ("a:b", {"a": 1})
        for spec, error in (
            ("fiel:x", 'no card offers backend "char:fiel"'),
            ({"path": "x"}, 'expected text such as "stdio" or a table with "type"'),
            ({"type": "file", "paht": "x"}, 'no such key. Did you mean "path"?'),
            ({"type": "file", "path": "x", "deep": {"a": "b"}}, "char.deep.a: expected a whole number"),
            ("file:gone", 'char back end "file" of device "user2": gone: No such file or directory'),
        ):
            with pytest.raises(ConfigError) as caught:
                vm.add("user", char=spec)
            assert error in str(caught.value)
    assert text.closed
    assert table.closed


def test_a_back_end_stands_for_an_earlier_one() -> None:
    """It is looked at first: one that does not fit is closed, and the earlier one stays; else that one is closed."""
    with machine() as vm:
        device: Any = vm.add("user", char="file:a").device
        seen: list[str] = []

        def fits(new: Sink) -> None:
            seen.append(new.options.path)
            assert not device.back.closed
            if new.options.path == "b":
                raise HostError("it does not fit")

        host = device.slot.host
        with pytest.raises(HostError, match="it does not fit"):
            host.open("char", "file:b", instead=device.back, fits=fits)
        assert (seen, device.back.closed) == (["b"], False)
        new = host.open("char", "file:c", instead=device.back, fits=fits)
        assert (seen, device.back.closed, new.closed) == (["b", "c"], True, False)
    assert new.closed


def test_options_that_a_card_has_changed_are_the_configurations() -> None:
    """A machine that is made from the configuration later has them; the machine's own keys and other options stay."""
    with machine(devices=[{"type": "user", "id": "one", "char": "file:a"}, {"type": "user", "char": "file:b"}]) as vm:
        with vm.lock:
            reconfigure(vm, "one", char="file:c")
        with Machine.from_config(vm.config, host=vm.host) as other:
            found = {id: one.device.back.options.path for id, one in other.devices.items()}
    assert found == {"one": "c", "user": "b"}


def test_devices_sit_on_their_bus_in_any_order() -> None:
    """A device waits for the bus that carries it, wherever it stands; `bus` chooses among several."""
    devices = [
        {"type": "carried", "address": "03.0"},
        {"type": "carried", "bus": "second"},
        {"type": "rack", "id": "first"},
        {"type": "rack", "id": "second"},
    ]
    with machine(devices=devices) as vm:
        assert vm.devices["first"].device.carried == [("carried", "03.0")]
        assert vm.devices["second"].device.carried == [("carried1", None)]
        with pytest.raises(ConfigError, match="address: expected text such as"):
            vm.add("carried", address=3)


def test_policies_are_attached_and_detached() -> None:
    """A policy gets its options and the machine, and hears of the end."""
    with machine({"policy": {"memory": [{"type": "greedy", "floor": 3}]}}) as vm:
        policy = policies_of(vm)[0].policy
    assert policy.calls == ["floor 3", "attach machine", "detach machine"]


# logs
def test_what_a_guest_repeats_is_limited(capfd: pytest.CaptureFixture[str]) -> None:
    """Entries below the level are dropped, repeated ones limited, and JSON lines carry the bound values."""
    log = Log(LogSink(level="warning", json=True, burst=3)).bind(device="uart")
    log.info("quiet")
    for _ in range(100):
        log.warning("loud", port=1)
    log.error("other")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 4
    assert '"device": "uart"' in lines[0]
    assert '"event": "other"' in lines[3]


# state
@define
class CounterState:
    version: ClassVar[int] = 2
    count: int = 0
    data: bytes = b""


class Counter:
    """A device with state."""

    def __init__(self) -> None:
        self.state = CounterState()

    def read(self, offset: int, size: int, /) -> int:
        return self.state.count & 0xFF

    def write(self, offset: int, size: int, value: int, /) -> None:
        self.state.count += value
        self.state.data += bytes([value & 0xFF])

    def reset(self) -> None:
        self.state = CounterState()

    def save(self) -> CounterState:
        return CounterState(self.state.count, self.state.data)

    def load(self, state: CounterState, /) -> None:
        self.state = CounterState(state.count, state.data)


def with_counter(**more: Any) -> Machine:
    """A machine with a counter."""

    class Card:
        @hookimpl
        def cardcage_register(self, registry: Registry) -> None:
            registry.device("counter", Counter, regions=(Pio(1, 0x10),))

    keys = {"platform": "none", "memory": "1M", "accel": "scripted", **more}
    return Machine(host=Host([Scripted(), Card()], installed=False), machine=keys, devices=[{"type": "counter"}])


def test_state_is_saved_and_loaded_as_json() -> None:
    """A machine's state survives JSON and loads into another machine, as often as one likes."""
    with with_counter() as first, with_counter() as second:
        first.pio.write(0x10, 1, 7)
        registers = first.vcpus[0].get_state()
        registers.registers.rip = 0x1234
        registers.msrs[0x10] = 5
        text = dumps(capture(first))
        for _ in range(2):
            restore(second, loads(text))
            assert second.pio.read(0x10, 1) == 7
            assert second.devices["counter"].device.state.data == b"\x07"
            assert second.vcpus[0].get_state() == registers


def test_states_that_do_not_fit_are_refused() -> None:
    """Another machine's state, a newer version, an unknown field or damaged text is refused before anything changes."""
    with with_counter() as vm, with_counter(cpus=2) as other:
        saved = capture(vm)
        with pytest.raises(ConfigError, match="number of vCPUs is 1, this one's 2"):
            restore(other, saved)
        newer = loads(dumps(saved))
        newer.devices["counter"].version = 3
        with pytest.raises(ConfigError, match="counter version 3; this machine has counter version 2"):
            restore(vm, newer)
        stranger = loads(dumps(saved))
        stranger.devices["counter"].fields["more"] = 1
        with pytest.raises(ConfigError, match=r"does not fit.*more"):
            restore(vm, stranger)
        older = loads(dumps(saved))
        older.devices["counter"].version = 1
        del older.devices["counter"].fields["data"]
        restore(vm, older)
        for text in ("{", "[]", "{}", dumps(saved)[:-5], dumps(saved).replace('"cpu"', '"cpuu"')):
            with pytest.raises(ConfigError, match="not a machine state"):
                loads(text)
        vm.start(boot=False)
        for act in (lambda: capture(vm), lambda: restore(vm, saved)):
            with pytest.raises(StateError):
                act()


# the public tests
def test_the_contract_is_kept_and_its_breach_found() -> None:
    """check_device passes a sound device and names what an unsound one breaks."""
    check_device(Counter, Pio(1, 0x10))

    class Wide(Counter):
        def read(self, offset: int, size: int, /) -> int:
            return 1 << 40

    class Raises(Counter):
        def write(self, offset: int, size: int, value: int, /) -> None:
            raise IndexError

    class Forgetful(Counter):
        def reset(self) -> None: ...

    class Shared(Counter):
        kept = CounterState()

        def __init__(self) -> None:
            self.state = self.kept

        def load(self, state: CounterState, /) -> None: ...

        def reset(self) -> None: ...

    class Returns(Counter):
        def write(self, offset: int, size: int, value: int, /) -> Any:
            return value

    for broken, error in (
        (Wide, "more than"),
        (Forgetful, "reset"),
        (Shared, "the state of another"),
        (Returns, "expected None"),
    ):
        with pytest.raises(AssertionError, match=error):
            check_device(broken, Pio(1, 0x10))
    with pytest.raises(AssertionError, match=r"write\(0x0, 1, .*\) raised IndexError"):
        check_device(Raises, Pio(1, 0x10))
    with pytest.raises(CardError):
        check_device(Counter, Region(1, 0x10, write="wirte"))


def test_the_test_slot_shows_what_a_device_does() -> None:
    """TestSlot keeps lines, messages, requests, log entries and time where a test can look at them."""
    slot = TestSlot()
    line, fired = slot.interrupts.line(), []
    line.pulse()
    slot.interrupts.msi(1, 2)
    slot.power.exit(3)
    slot.log.warning("odd", value=1)
    timer = slot.clock.timer(lambda: fired.append(slot.clock.now()))
    timer.arm(10)
    slot.clock.advance(20)
    assert slot.interrupts.levels == {5: [True, False]}
    assert (slot.interrupts.messages, slot.power.requests, fired) == ([(1, 2)], [("exit", 3)], [10])
    assert slot.log.entries == [("warning", "odd", {"value": 1})]
    check_memory(slot.memory, 0, 1 << 20)
    slot.close()
