"""Virtqueues: the device's side against the driver kit, whole and hostile."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import pytest
from cardcage_virtio.testing import INDIRECT, NEXT, WRITE, Bench, Driver, ram
from cardcage_virtio.virtio import NEEDS_RESET
from hypothesis import given
from hypothesis import strategies as st

FORMS = [
    {"packed": packed, "event_index": event_index, "indirect": indirect}
    for packed, event_index, indirect in itertools.product((False, True), repeat=3)
]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(k for k, v in form.items() if v) or "plain")


class Echo:
    """Writes back what it read, upper case."""

    device_id = 42
    queue_sizes = (256, 16)

    def handle(self, request: Any) -> None:
        request.done(request.write(request.read().upper()))


class Later:
    """Keeps requests until told."""

    device_id = 42
    queue_sizes = (256,)

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def handle(self, request: Any) -> None:
        self.kept.append(request)

    def drain(self) -> None:
        self.kept.clear()


@forms
def test_buffers_come_back_with_what_was_written(form: dict[str, bool]) -> None:
    """Chains of several readable and writable parts are served in each form of ring, many times around it."""
    bench = Bench(Echo(), size=16, **form)
    for turn in range(100):
        text = b"turn %d" % turn
        assert bench.call([text[:3], text[3:]], [2, 100]) == text.upper()
    bench.close()


@forms
def test_out_of_order_completion(form: dict[str, bool]) -> None:
    """Buffers completed in another order come back with their own tokens."""
    device = Later()
    bench = Bench(device, size=8, **form)
    for _ in range(20):
        tokens = [bench.driver().add([b"%d" % at], [10]) for at in range(4)]
        bench.kick()
        for request in reversed(device.kept):
            request.done(request.write(b"got " + request.read()))
        device.kept.clear()
        found = dict(bench.driver().used())
        assert [found[token] for token in tokens] == [b"got %d" % at for at in range(4)]
    bench.close()


@forms
def test_interrupts_are_sent_when_wanted(form: dict[str, bool]) -> None:
    """One batch makes one interrupt; none comes while the driver does not want any."""
    bench = Bench(Echo(), size=32, **form)
    for _ in range(5):
        bench.driver().add([b"x"], [1])
    bench.kick()
    assert bench.interrupts == [0]
    bench.driver().collect()
    bench.driver().want_interrupts(False)
    bench.driver().add([b"x"], [1])
    bench.kick()
    assert bench.interrupts == [0]
    bench.driver().collect()
    bench.driver().want_interrupts()
    bench.driver().add([b"x"], [1])
    bench.kick()
    assert bench.interrupts == [0, 0]
    bench.close()


@forms
def test_kicks_are_asked_for(form: dict[str, bool]) -> None:
    """After a ring was drained the device wants to hear of the next buffer."""
    bench = Bench(Echo(), size=32, **form)
    for _ in range(70):
        bench.driver().add([b"x"], [1])
        assert bench.driver().wants_kick()
        bench.kick()
        bench.driver().collect()
    bench.close()


@forms
def test_requests_of_a_reset_ring_go_nowhere(form: dict[str, bool]) -> None:
    """Completing a request after its device or queue was reset changes nothing in the new ring."""
    device = Later()
    bench = Bench(device, size=8, **form)
    bench.driver().add([b"x"], [4])
    bench.kick()
    old = device.kept[0]
    bench.start()
    old.done(4)
    assert bench.driver().used() == []
    bench.driver().add([b"y"], [4])
    bench.kick()
    fresh = device.kept[0]
    bench.virtio.reset_queue(0)
    assert bench.virtio.rings[0] is None
    assert not bench.virtio.queues[0].enabled
    fresh.done(4)
    assert bench.driver().used() == []
    bench.close()


def test_a_queue_can_be_reset_and_used_again() -> None:
    """Per-queue reset leaves the other queues and takes a new ring."""
    bench = Bench(Echo())
    assert bench.call([b"a"], [1], queue=1) == b"A"
    bench.virtio.reset_queue(1)
    queue = bench.virtio.queues[1]
    driver = Driver(bench.memory, 60 << 20, 8)
    queue.size, queue.table, queue.driver, queue.device = 8, driver.table, driver.driver, driver.device
    bench.virtio.enable(1)
    bench.drivers[1] = driver
    assert bench.call([b"b"], [1], queue=1) == b"B"
    assert bench.call([b"c"], [1], queue=0) == b"C"
    bench.close()


@forms
def test_state_continues_in_another_device(form: dict[str, bool]) -> None:
    """A saved device loads over the same memory and goes on in the middle of its rings."""
    bench = Bench(Echo(), size=8, **form)
    for _ in range(11):
        bench.call([b"x"], [1])
    state = bench.virtio.save()
    other = Bench(Echo(), size=8, start=False, **form)
    other.slot.memory = bench.memory
    other.drivers = bench.drivers
    other.virtio.load(state)
    for _ in range(11):
        assert other.call([b"y"], [1]) == b"Y"
    other.close()


def broken(bench: Bench) -> bool:
    return bool(bench.virtio.status & NEEDS_RESET) and len(bench.slot.log.entries) == 1


def raw(bench: Bench, index: int, *fields: int) -> None:
    struct.pack_into("<QIHH", bench.driver()._table, 16 * index, *fields)


def available(bench: Bench, heads: list[int], index: int | None = None) -> None:
    driver = bench.driver()
    for at, head in enumerate(heads):
        driver._driver16[2 + at] = head
    driver._driver16[1] = len(heads) if index is None else index


GOOD = 8 << 20


@pytest.mark.parametrize(
    ("table", "heads", "index"),
    [
        ({}, [300], None),
        ({}, [0], 1000),
        ({0: (GOOD, 8, NEXT, 0)}, [0], None),
        ({0: (GOOD, 8, NEXT, 1), 1: (GOOD, 8, NEXT, 0)}, [0], None),
        ({0: (GOOD, 8, NEXT, 77)}, [0], None),
        ({0: (1 << 40, 8, 0, 0)}, [0], None),
        ({0: ((64 << 20) - 4, 8, 0, 0)}, [0], None),
        ({0: ((1 << 64) - 4, 8, 0, 0)}, [0], None),
        ({0: (GOOD, 0xFFFFFFFF, WRITE, 0)}, [0], None),
        ({0: (GOOD, 8, WRITE | NEXT, 1), 1: (GOOD, 8, 0, 0)}, [0], None),
        ({0: (GOOD, 0, INDIRECT, 0)}, [0], None),
        ({0: (GOOD, 24, INDIRECT, 0)}, [0], None),
        ({0: (GOOD, 16, INDIRECT | NEXT, 0)}, [0], None),
        ({0: (1 << 40, 16, INDIRECT, 0)}, [0], None),
        ({0: (GOOD, 16 << 16, INDIRECT, 0)}, [0], None),
        ({0: (4096, 64, INDIRECT, 0)}, [0], None),
    ],
)
def test_a_broken_split_ring_needs_reset(table: dict[int, Any], heads: list[int], index: int | None) -> None:
    """Loops, bad heads, lengths, addresses, orders and tables stop the device with one log line, until a reset."""
    bench = Bench(Echo(), size=64)
    for at, fields in table.items():
        raw(bench, at, *fields)
    available(bench, heads, index)
    bench.kick()
    bench.kick()
    assert broken(bench)
    assert bench.config_interrupts == 1
    bench.start()
    assert bench.call([b"works"], [5]) == b"WORKS"
    bench.close()


def test_a_ring_outside_memory_needs_reset() -> None:
    """Ring addresses and sizes that cannot be stop the device at DRIVER_OK."""
    for change in (
        {"table": 1 << 45},
        {"driver": 3},
        {"size": 24},
        {"size": 0},
        {"size": 4096},
        {"device": (1 << 64) - 2},
    ):
        bench = Bench(Echo(), start=False)
        bench.virtio.set_status(3)
        bench.virtio.driver_features = bench.virtio.offered
        bench.virtio.set_status(11)
        queue = bench.virtio.queues[0]
        queue.size, queue.table, queue.driver, queue.device = 16, 4096, 8192, 12288
        for name, value in change.items():
            setattr(queue, name, value)
        bench.virtio.enable(0)
        bench.virtio.set_status(15)
        assert broken(bench), change
        bench.close()


def test_only_a_reset_clears_a_status_bit() -> None:
    """A driver that takes DRIVER_OK back starts nothing twice, and its requests end before pause and reset."""

    class Told(Later):
        def __init__(self) -> None:
            super().__init__()
            self.told: list[str] = []

        def start(self) -> None:
            self.told.append("start")

        def drain(self) -> None:
            super().drain()
            self.told.append("drain")

        def stop(self) -> None:
            self.told.append("stop")

    device = Told()
    bench = Bench(device)
    del device.told[:-1]  # the driver kit resets first
    for value in (3, 15, 1):
        bench.virtio.set_status(value)
        assert bench.virtio.status == 15
    features = bench.virtio.features
    bench.virtio.driver_features = 1 << 32
    bench.virtio.set_status(11)
    assert bench.virtio.features == features
    bench.virtio.pause()
    bench.virtio.resume()
    bench.virtio.set_status(0)
    assert device.told == ["start", "drain", "drain", "stop"]
    assert bench.virtio.status == 0
    bench.close()


def test_features_not_on_offer_are_refused() -> None:
    """FEATURES_OK does not stick for unknown features or without VERSION_1."""
    bench = Bench(Echo(), start=False)
    for wrong in (1 << 50 | 1 << 32, 1 << 28):
        bench.virtio.set_status(0)
        bench.virtio.set_status(3)
        bench.virtio.driver_features = wrong
        bench.virtio.set_status(11)
        assert not bench.virtio.status & 8
    bench.close()


def test_a_buffer_may_span_two_ram_ranges() -> None:
    """A buffer across the border of two blocks of memory is one buffer."""
    from cardcage.memory import RamBlock, RamRange

    bench = Bench(Echo(), memory=4 << 20)
    bench.memory.add(RamRange(4 << 20, 1 << 20, RamBlock(1 << 20)))
    bench.memory.write((4 << 20) - 3, b"border")
    bench.driver().add_raw([((4 << 20) - 3, 6, 0), ((4 << 20) - 4000, 3900, WRITE)])
    bench.kick()
    assert [data for _, data in bench.driver().used()] == [b"BORDER"]
    bench.close()


FILL = st.lists(st.tuples(st.integers(0, 4095), st.binary(min_size=1, max_size=24)), max_size=60)


@given(FILL, st.booleans(), st.integers(0, 65535), st.data())
def test_random_rings_never_hurt(fill: list[tuple[int, bytes]], packed: bool, index: int, data: Any) -> None:
    """Whatever the rings hold, the device serves it or goes to NEEDS_RESET, and touches only guest memory."""
    bench = Bench(Echo(), size=16, packed=packed, memory=1 << 20, indirect=data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(0, 3))):
        bench.driver().add([b"abc"], [8])
    for at, what in fill:
        bench.memory.write(4096 + at, what)
    if not packed:
        bench.driver()._driver16[1] = index
    for _ in range(3):
        bench.kick()
        bench.slot.loop.poll()
    bench.start()
    assert bench.call([b"fine"], [4]) == b"FINE"
    bench.close()


DESCRIPTORS = st.lists(
    st.tuples(
        st.sampled_from([0, 4096, 8192, GOOD, (64 << 20) - 1, 1 << 32, (1 << 64) - 1]),
        st.sampled_from([0, 1, 16, 32, 4096, 1 << 20, 0xFFFFFFFF]),
        st.integers(0, 7),
        st.integers(0, 17),
    ),
    min_size=16,
    max_size=16,
)


@given(DESCRIPTORS, st.booleans(), st.lists(st.integers(0, 17), max_size=16))
def test_plausible_hostile_descriptors(rows: list[tuple[int, int, int, int]], packed: bool, heads: list[int]) -> None:
    """Descriptors that are nearly right are served or refused, and the device recovers by reset."""
    bench = Bench(Echo(), size=16, packed=packed)
    for at, (address, length, flags, following) in enumerate(rows):
        if packed:
            raw(bench, at, address, length, following, flags | 1 << 7)
        else:
            raw(bench, at, address, length, flags, following)
    if not packed:
        available(bench, heads)
    bench.kick()
    bench.start()
    assert bench.call([b"fine"], [4]) == b"FINE"
    bench.close()


class Whole:
    """Keeps what each request was, however it holds its parts."""

    device_id = 42
    queue_sizes = (64,)

    def __init__(self, segments: bool) -> None:
        self.segments = segments
        self.seen: list[Any] = []

    def handle(self, request: Any) -> None:
        parts = [bytes(part) for part in request.readable]
        self.seen.append((parts, list(map(len, request.writable)), list(request.areas)))
        for part in request.writable:
            part[:] = b"w" * len(part)
        request.done(request.writable_size)


ROWS = st.lists(st.tuples(st.integers(0, 255), st.one_of(st.just(4096), st.integers(0, 9000))), min_size=1, max_size=60)
WRONG = st.one_of(
    st.none(),
    st.tuples(
        st.integers(0, 59),
        st.sampled_from([(0, "<Q"), (8, "<I"), (12, "<H"), (14, "<H")]),
        st.one_of(st.integers(0, 8), st.integers(0, 1 << 40)),
    ),
)


@given(ROWS, st.integers(0, 60), st.booleans(), WRONG)
def test_long_tables_are_read_alike(
    rows: list[tuple[int, int]], readable: int, packed: bool, wrong: tuple[int, tuple[int, str], int] | None
) -> None:
    """A device that takes segments sees, writes and refuses of any indirect table what one sees that takes lists."""
    outcomes = []
    for segments in (False, True):
        device = Whole(segments)
        bench = Bench(device, size=64, packed=packed, indirect=True, memory=4 << 20)
        bench.memory.write(2 << 20, bytes(range(256)) * 4096)
        driver = bench.driver()
        spare = driver.place(0)
        parts = [((2 << 20) + page * 4096, length, WRITE * (at >= readable)) for at, (page, length) in enumerate(rows)]
        driver.add_raw(parts)
        if wrong is not None and wrong[0] < len(rows):
            (field, form), value = wrong[1], wrong[2]
            value &= (1 << 8 * struct.calcsize(form)) - 1
            bench.memory.write(spare + 16 * wrong[0] + field, struct.pack(form, value))
        bench.kick()
        outcomes.append((device.seen, bench.virtio.status, bench.memory.read(2 << 20, 2 << 20)))
        bench.close()
    assert outcomes[0] == outcomes[1]


def test_ram_is_plain_guest_memory() -> None:
    """The kit's memory starts at 0 and refuses what is outside."""
    memory = ram(1 << 16)
    assert memory.contains(0, 1 << 16)
    assert not memory.contains(1, 1 << 16)
    memory.close()
