"""Bus, lines, memory, clock and loop, gate, slot back ends, log, state."""

from __future__ import annotations

import itertools
import os
import threading
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from attrs import define, field, frozen
from cardcage.boot import carve
from cardcage.bus import Bus, Claim
from cardcage.device import E820Entry, Pio, Region, Slot
from cardcage.errors import CardError, ConfigError, HostError, StateError, UsageError
from cardcage.eventloop import EventLoop, MachineClock
from cardcage.gate import Gate
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.interrupts import Line
from cardcage.log import Log, LogSink
from cardcage.machine import Machine
from cardcage.memory import GuestMemoryError, PhysicalMemory, RamBlock, RamRange, check_ram, split_ram
from cardcage.policy import MachineMemory
from cardcage.ram import Memfd
from cardcage.registry import Registry
from cardcage.state import capture, dumps, loads, restore
from cardcage.testing import TestSlot, check_device, check_memory
from hypothesis import given
from hypothesis import strategies as st
from scripted import Scripted

if TYPE_CHECKING:
    from pathlib import Path

# the bus


def recorder(log: list[Any], base: int, size: int, name: str = "") -> Claim:
    """A claim that records its accesses and reads as its offset plus one."""
    return Claim(
        base,
        size,
        lambda offset, width: log.append(("r", offset, width)) or offset + 1,
        lambda offset, width, value: log.append(("w", offset, width, value)),
        name,
    )


def test_accesses_go_whole_or_byte_by_byte() -> None:
    """An access inside a range goes whole; one that reaches past an end is split; open bus reads as 0xFF."""
    log: list[Any] = []
    bus = Bus("pio", 16)
    bus.add(recorder(log, 0x10, 4))
    assert bus.read(0x10, 4) == 1
    assert bus.read(0x12, 4) == 0xFFFF0403
    assert bus.read(0x0E, 4) == 0x0201FFFF
    bus.write(0x13, 2, 0xBBAA)
    bus.write(0x20, 4, 1)
    assert bus.read(0xFFFF, 4) == 0xFFFFFFFF
    assert log == [("r", 0, 4), ("r", 2, 1), ("r", 3, 1), ("r", 0, 1), ("r", 1, 1), ("w", 3, 1, 0xAA)]


def test_ranges_are_disjoint_and_inside() -> None:
    """Overlaps and ranges outside the bus are refused and change nothing; removing wants the very claim."""
    bus = Bus("pio", 16)
    first = recorder([], 0x10, 4, "first")
    bus.add(first)
    for base, size in ((0x0F, 2), (0x13, 1), (0x10, 4), (0, 0x100), (0xFFFF, 2), (-1, 1), (5, 0)):
        with pytest.raises(ConfigError):
            bus.add(recorder([], base, size, "second"))
    assert list(bus) == [first]
    assert bus.read(0x10, 1) == 1
    with pytest.raises(UsageError):
        bus.remove(recorder([], 0x10, 4))
    bus.remove(first)
    assert bus.read(0x10, 1) == 0xFF


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=20),
    st.integers(0, 310),
    st.sampled_from([1, 2, 4, 8]),
)
def test_the_bus_is_a_byte_map(ranges: list[tuple[int, int]], address: int, size: int) -> None:
    """Whatever ranges there are, each byte is answered by the range that holds it."""
    bus = Bus("memory", 32)
    owner: dict[int, int] = {}
    for number, (base, length) in enumerate(ranges, 1):
        pattern = int.from_bytes(bytes([number]) * 8, "little")
        claim = Claim(base, length, lambda _offset, _size, pattern=pattern: pattern, lambda *_: None)
        try:
            bus.add(claim)
        except ConfigError:
            assert owner.keys() & range(base, base + length)
        else:
            owner.update(dict.fromkeys(range(base, base + length), number))
    expected = bytes(owner.get(address + at, 0xFF) for at in range(size))
    assert bus.read(address, size) == int.from_bytes(expected, "little")
    assert bus.read(address, size) == int.from_bytes(expected, "little")


# lines


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans())))
def test_a_line_is_the_or_of_its_sources(steps: list[tuple[int, bool]]) -> None:
    """A line is high while a source drives it, and tells only changes."""
    seen: list[bool] = []
    line = Line(seen.append)
    sources = [line.source() for _ in range(4)]
    high: set[int] = set()
    for source, level in steps:
        sources[source].set(level)
        (high.add if level else high.discard)(source)
        assert line.level == bool(high)
    assert all(one != other for one, other in itertools.pairwise(seen))
    seen.clear()
    for one in sources:
        one.set(False)
    seen.clear()
    sources[0].pulse()
    assert seen == [True, False]


# memory


def test_memory_keeps_its_contract() -> None:
    """PhysicalMemory passes the public contract, also across two blocks that touch."""
    memory = PhysicalMemory()
    first, second = RamBlock(0x1000), RamBlock(0x2000, backend=Memfd())
    memory.add(RamRange(0x10000, 0x1000, first), RamRange(0x11000, 0x2000, second))
    check_memory(memory, 0x11000, 0x2000)
    memory.write(0x10FFE, b"abcd")
    assert memory.read(0x10FFE, 4) == b"abcd"
    assert (bytes(first.view[-2:]), bytes(second.view[:2])) == (b"ab", b"cd")
    assert not memory.contains(0x10FFE, 4)
    memory.close()
    memory.close()
    with pytest.raises(GuestMemoryError):
        memory.read(0x10000, 1)


def test_priorities_decide_what_shows() -> None:
    """Of ranges that overlap the higher priority shows; the listener hears of disjoint slots in a safe order."""
    memory = PhysicalMemory()
    ram, rom = RamBlock(0x4000), RamBlock(0x1000)
    seen: list[Any] = []

    class Listener:
        def map_memory(self, slot: Any, /) -> None:
            seen.append(slot)

        def unmap_memory(self, slot: Any, /) -> None:
            seen.remove(slot)

    memory.add(RamRange(0, 0x4000, ram))
    memory.attach(Listener())
    over = RamRange(0x1000, 0x1000, rom, readonly=True, priority=1)
    memory.add(over)
    assert sorted((one.address, one.size, one.readonly) for one in seen) == [
        (0, 0x1000, False),
        (0x1000, 0x1000, True),
        (0x2000, 0x2000, False),
    ]
    memory.write(0x0FFF, b"123")
    assert (bytes(ram.view[0xFFF:0x1001]), bytes(rom.view[:2])) == (b"1\0", b"23")
    memory.change(remove=(over,))
    assert [(one.address, one.size) for one in seen] == [(0, 0x4000)]
    for wrong in (RamRange(1, 0x1000, rom), RamRange(0, 0x1001, rom), RamRange(0, 0, rom), RamRange(0, 0x2000, rom)):
        with pytest.raises(UsageError):
            memory.add(wrong)
    memory.close()
    rom.close()


def test_ram_is_split_as_qemu_does() -> None:
    """Up to 3.5 GiB all RAM is at 0; above, 3 GiB stays there; amounts that the host has not are refused."""
    assert split_ram(0xE0000000) == (0xE0000000, 0)
    assert split_ram(4 << 30) == (3 << 30, 1 << 30)
    for size in (0, 4096, 1 << 60):
        with pytest.raises(ConfigError):
            check_ram(size)
    with pytest.raises(HostError, match="cannot give"):
        RamBlock(1 << 62)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20), st.sampled_from([2, 3, 4])), max_size=8))
def test_the_memory_map_stays_sorted_and_disjoint(cuts: list[tuple[int, int, int]]) -> None:
    """Carving keeps the map sorted, disjoint and joined, and each byte has the type of the last cut over it."""
    entries = [E820Entry(0, 40)]
    expected = dict.fromkeys(range(40), 1)
    for address, size, kind in cuts:
        entries = carve(entries, address, size, kind)
        expected.update(dict.fromkeys(range(address, address + size), kind))
    assert {byte: one.type for one in entries for byte in range(one.address, one.address + one.size)} == expected
    assert sum(one.size for one in entries) == len(expected)
    assert all(
        one.address + one.size < other.address or (one.address + one.size == other.address and one.type != other.type)
        for one, other in itertools.pairwise(entries)
    )


# the loop and the clock


class Rig:
    """A loop and a clock with a lock, and what failed."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.failed: list[BaseException] = []
        self.events = EventLoop("test", self.call)
        self.clock = MachineClock(self.events)

    def call(self, callback: Any) -> None:
        with self.lock:
            callback()

    def close(self) -> None:
        self.events.close()
        self.clock.close()


@pytest.fixture
def rig() -> Any:
    """A loop and a clock."""
    made = Rig()
    yield made
    made.close()


def test_timers_fire_in_order_on_the_loop_thread(rig: Rig) -> None:
    """Timers fire once each, in the order of their times: re-armed ones at the new one, cancelled ones never."""
    seen: list[Any] = []
    done = threading.Event()
    with rig.lock:
        timers = {name: rig.clock.timer(lambda name=name: seen.append(name)) for name in "abcd"}
        last = rig.clock.timer(lambda: (seen.append(rig.events.here), done.set()))
        timers["a"].arm(3_000_000)
        timers["b"].arm(1_000_000)
        timers["c"].arm(2_000_000)
        timers["d"].arm(500_000)
        timers["b"].arm(4_000_000)
        timers["d"].cancel()
        last.arm(5_000_000)
        rig.clock.resume()
    assert done.wait(20)
    assert seen == ["c", "a", "b", True]
    assert rig.clock.now() >= 5_000_000


def test_guest_time_stands_still_while_paused(rig: Rig) -> None:
    """Before resume and after pause the clock does not move and no timer fires; set() continues a saved time."""
    done = threading.Event()
    with rig.lock:
        assert rig.clock.now() == 0
        rig.clock.set(1_000_000_000)
        rig.clock.timer(done.set).arm(1_000_000_001)
        rig.clock.resume()
    assert done.wait(20)
    with rig.lock:
        rig.clock.pause()
        late = rig.clock.timer(lambda: rig.failed.append(ValueError()))
        late.arm(0)
        stood = rig.clock.now()
    with rig.lock:
        assert rig.clock.now() == stood >= 1_000_000_000
    assert not rig.failed


def test_timers_that_are_armed_over_and_over_take_no_room(rig: Rig) -> None:
    """Re-arming does not make the heap grow, and times beyond any clock are no error."""
    timer = rig.clock.timer(lambda: None)
    with rig.lock:
        rig.clock.resume()
        for step in range(10_000):
            timer.arm((1 << 63) + step)
        assert len(rig.clock._heap) < 100


def test_readers_are_called_and_forgotten(rig: Rig) -> None:
    """A reader is called when its descriptor is readable; once removed it is not, though the number is used again."""
    seen: list[str] = []
    read, write = os.pipe()
    got = threading.Semaphore(0)

    def reader(name: str) -> Any:
        return lambda: (seen.append(name), os.read(read, 1), got.release())

    with rig.lock:
        rig.events.add_reader(read, reader("first"))
    os.write(write, b"x")
    assert got.acquire(timeout=20)
    with rig.lock:
        rig.events.remove_reader(read)
        os.close(read)
        os.close(write)
        again, write = os.pipe()
        assert again == read
        rig.events.add_reader(read, reader("second"))
    os.write(write, b"x")
    assert got.acquire(timeout=20)
    assert seen == ["first", "second"]
    with rig.lock:
        rig.events.remove_reader(read)
    os.close(read)
    os.close(write)


def test_call_soon_runs_under_the_lock(rig: Rig) -> None:
    """call_soon runs on the loop thread; after close it does nothing and raises nothing."""
    done = threading.Event()
    rig.events.call_soon(done.set)
    assert done.wait(20)
    rig.events.close()
    rig.events.close()
    rig.events.call_soon(lambda: rig.failed.append(ValueError()))
    assert not rig.failed


def test_no_post_is_lost(rig: Rig) -> None:
    """What many threads post, and what runs on the loop thread posts again, all runs, each thread's in its order."""
    seen: list[tuple[int, int]] = []
    done = threading.Semaphore(0)

    def post(source: int) -> None:
        for number in range(500):
            again = lambda number=number: (seen.append((source, number)), done.release())  # noqa: E731  # bound to this turn
            rig.events.post(lambda again=again: rig.events.post(again))

    threads = [threading.Thread(target=post, args=(source,)) for source in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(2000):
        assert done.acquire(timeout=20)
    for source in range(4):
        assert [number for where, number in seen if where == source] == list(range(500))


def test_a_regular_file_cannot_be_waited_for(rig: Rig, tmp_path: Path) -> None:
    """Who asks for what epoll does not take hears of it at once."""
    with (tmp_path / "file").open("w") as file, rig.lock, pytest.raises(PermissionError):
        rig.events.add_reader(file.fileno(), lambda: None)


def test_the_gate_waits_for_all_to_come_out() -> None:
    """close() returns once nobody is inside; end() lets the threads go."""
    inside, kicked = threading.Semaphore(0), threading.Event()
    gate = Gate(kicked.set)
    order: list[str] = []

    def vcpu() -> None:
        while gate.enter(0):
            inside.release()
            kicked.wait()
            order.append("out")
            kicked.clear()

    thread = threading.Thread(target=vcpu)
    thread.start()
    gate.open()
    assert inside.acquire(timeout=20)
    gate.close()
    order.append("closed")
    gate.open()
    assert inside.acquire(timeout=20)
    gate.end()
    thread.join(20)
    assert not thread.is_alive()
    assert order[:2] == ["out", "closed"]


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
        self.back = slot.open("char", self.options.char)

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
        registry.policy("greedy", Greedy, options=GreedyOptions)
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
    host = Host([Scripted(), Cards()], installed=False)
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
        policy = vm.policies[0].policy
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
        vm.start()
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
        (Shared, "another's state"),
        (Returns, "expected None"),
    ):
        with pytest.raises(AssertionError, match=error):
            check_device(broken, Pio(1, 0x10))
    with pytest.raises(IndexError):
        check_device(Raises, Pio(1, 0x10))
    with pytest.raises(CardError):
        check_device(Counter, Region(1, 0x10, write="wirte"))


def test_the_test_slot_shows_what_a_device_does() -> None:
    """TestSlot keeps lines, messages, requests, log entries and time where a test can look at them."""
    slot = TestSlot()
    line, fired = slot.irq(), []
    line.pulse()
    slot.msi(1, 2)
    slot.control.request_debug_exit(3)
    slot.log.warning("odd", value=1)
    timer = slot.clock.timer(lambda: fired.append(slot.clock.now()))
    timer.arm(10)
    slot.clock.advance(20)
    assert slot.levels == {5: [True, False]}
    assert (slot.messages, slot.requests, fired) == ([(1, 2)], [("debug-exit", 3)], [10])
    assert slot.log.entries == [("warning", "odd", {"value": 1})]
    check_memory(slot.memory, 0, 1 << 20)
    slot.close()
