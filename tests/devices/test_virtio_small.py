"""Entropy and balloon devices."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from cardcage_virtio.devices.balloon import Balloon, BalloonOptions
from cardcage_virtio.devices.rng import Rng, RngOptions
from cardcage_virtio.testing import Bench
from hypothesis import given, settings
from hypothesis import strategies as st

ALL = (1 << 64) - 1
DATA = 32 << 20


def test_entropy_fills_the_buffer() -> None:
    """A buffer comes back full of bytes that differ, up to the configured most."""
    bench = Bench(Rng(RngOptions(max_bytes=100)))
    first, second = bench.call([], [60, 20]), bench.call([], [60, 20])
    assert len(first) == 80
    assert first != second
    assert len(bench.call([], [1000])) == 100
    bench.close()


@pytest.mark.parametrize("shared", [False, True])
def test_inflated_pages_go_back_to_the_host(shared: bool) -> None:
    """Pages that the guest gives are freed and read as zeros; their neighbours stay."""
    bench = Bench(Balloon(), shared=shared)
    bench.memory.write(DATA, b"x" * 4096 * 8)
    pages = [(DATA >> 12) + at for at in (1, 2, 3, 6)]
    bench.driver(0).add([struct.pack("<4I", *reversed(pages))])
    bench.kick(0)
    kept = [bench.memory.read(DATA + 4096 * at, 1) for at in range(8)]
    assert kept == [b"x", b"\0", b"\0", b"\0", b"x", b"x", b"\0", b"x"]
    assert len(bench.driver(0).used()) == 1
    bench.driver(1).add([struct.pack("<4I", *pages)])
    bench.kick(1)
    assert len(bench.driver(1).used()) == 1
    bench.close()


def test_target_and_actual_are_in_the_configuration() -> None:
    """A new target interrupts the driver; what it writes back is the actual size."""
    bench = Bench(Balloon())
    bench.device.set_target(1000)
    assert (bench.config_interrupts, bench.virtio.config_read(0, 4)) == (1, 1000)
    bench.virtio.config_write(4, 4, 900)
    assert bench.device.actual == 900
    bench.close()


def test_statistics_arrive_when_asked() -> None:
    """The driver's first buffer waits; asking returns it, and the next one is the answer."""
    bench = Bench(Balloon(BalloonOptions(stats_interval=2)))
    heard: list[Any] = []
    bench.device.on_statistics = heard.append
    bench.driver(2).add([struct.pack("<HQHQHQ", 4, 123, 5, 456, 99, 1)])
    bench.kick(2)
    assert bench.driver(2).used() == []
    assert bench.device.statistics == {"free_memory": 123, "total_memory": 456}
    bench.slot.clock.advance(2_000_000_000)
    assert len(bench.driver(2).used()) == 1
    bench.driver(2).add([struct.pack("<HQ", 4, 7)])
    bench.kick(2)
    assert heard[-1] == {"free_memory": 7}
    bench.close()


@pytest.mark.parametrize(("queue", "features"), [(3, ALL), (4, ALL), (2, ALL & ~2)])
def test_reported_pages_go_back(queue: int, features: int) -> None:
    """Free pages reported on any numbering of the queue are freed, unless the guest poisons them."""
    bench = Bench(Balloon(), features=features)
    bench.memory.write(DATA, b"x" * 8192)
    bench.driver(queue).add_raw([(DATA, 4096, 2)])
    bench.kick(queue)
    assert bench.memory.read(DATA, 1) + bench.memory.read(DATA + 4096, 1) == b"\0x"
    assert bench.device.reported == 4096
    bench.virtio.config_write(12, 4, 0xAA)
    bench.driver(queue).add_raw([(DATA + 4096, 4096, 2)])
    bench.kick(queue)
    assert bench.memory.read(DATA + 4096, 1) == b"x"
    bench.close()


def test_pages_that_are_not_ram_are_refused() -> None:
    """Page numbers outside RAM are logged and change nothing; a malformed list breaks the device."""
    bench = Bench(Balloon())
    bench.driver(0).add([struct.pack("<II", 0xFFFFFFFF, 1 << 20)])
    bench.kick(0)
    assert [what for _, what, _ in bench.slot.log.entries] == ["balloon: not RAM"] * 2
    assert len(bench.driver(0).used()) == 1
    bench.driver(0).add([b"abc"])
    bench.kick(0)
    assert bench.virtio.status & 64
    bench.close()


@given(st.lists(st.tuples(st.integers(0, 4), st.binary(max_size=40), st.integers(0, 9000)), max_size=20), st.booleans())
@settings(deadline=None)
def test_random_buffers_never_hurt(buffers: list[tuple[int, bytes, int]], packed: bool) -> None:
    """Any buffers in any queue of the balloon are served or refused; a reset brings it back."""
    bench = Bench(Balloon(), packed=packed)
    for queue, data, size in buffers:
        bench.driver(queue).add([data], [size])
        bench.kick(queue)
        bench.device.ask_statistics()
    bench.start()
    bench.driver(0).add([struct.pack("<I", DATA >> 12)])
    bench.kick(0)
    assert len(bench.driver(0).used()) == 1
    bench.close()
