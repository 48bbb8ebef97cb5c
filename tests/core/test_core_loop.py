"""The event loop, the clock and the gate."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
from cardcage._machine.eventloop import EventLoop, MachineClock
from cardcage._machine.gate import Gate

if TYPE_CHECKING:
    from pathlib import Path


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
