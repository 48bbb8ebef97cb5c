"""Waits that an exception of a signal handler ends, wherever it comes, leave nobody behind who hangs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from cardcage import waiting
from cardcage.waiting import Condition, Event


class Interrupted(Exception):
    """As a signal handler raises it."""


def interrupted(act: Callable[[], object], at: int) -> bool:
    """Do *act*, with an exception at the *at*-th line, call or return of it; False where it has not so many."""
    left = at

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in (threading.__file__, waiting.__file__):
            return trace
        left -= 1
        if left == 0:
            raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except (Interrupted, RuntimeError):  # of a lock that the wait had let go of as it came
        pass
    finally:
        sys.settrace(before)
    return left <= 0


def ends(act: Callable[[], object]) -> bool:
    """True where another thread comes to the end of *act*."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(30)
    return not thread.is_alive()


def test_an_event_can_be_set_after_an_interrupted_wait() -> None:
    """Wherever in wait() an exception comes, set() does not hang, and all that wait are woken."""
    for at in range(1, 1000):
        event = Event()
        event.set() if at % 2 else None
        more = interrupted(lambda event=event: event.wait(0.001), (at + 1) // 2)
        assert ends(event.set), at
        assert event.wait(0)
        assert ends(event.wait), at
        if not more:
            assert at > 8
            return
    raise AssertionError("it has no end")


def test_a_condition_can_be_had_after_an_interrupted_wait() -> None:
    """Wherever an exception comes as a condition is entered, waited for and left, another thread can notify."""
    for at in range(1, 1000):
        condition = Condition()

        def wait(condition: Condition = condition) -> None:
            with condition:
                condition.wait(0.001)

        def notify(condition: Condition = condition) -> None:
            with condition:
                condition.notify_all()

        more = interrupted(wait, at)
        assert ends(notify), at
        if not more:
            assert at > 8
            return
    raise AssertionError("it has no end")


def test_an_event_is_one() -> None:
    """wait() is False after its time, True once it was set, for every thread that waits, and set() may come again."""
    event = Event()
    assert (event.wait(0.01), event.is_set()) == (False, False)
    threads = [threading.Thread(target=event.wait) for _ in range(8)]
    for one in threads:
        one.start()
    event.set()
    event.set()
    for one in threads:
        one.join(60)
    assert not any(one.is_alive() for one in threads)
    assert (event.wait(), event.wait(0), event.is_set()) == (True, True, True)


@pytest.mark.parametrize("lock", [None, threading.RLock(), threading.Lock()])
def test_a_condition_is_one(lock: Any) -> None:
    """Conditions are those of threading, whatever their lock is."""
    condition, said = Condition(lock), list[int]()

    def other() -> None:
        with condition:
            said.append(1)
            condition.notify()

    with condition:
        thread = threading.Thread(target=other)
        thread.start()
        assert condition.wait_for(lambda: said, 60)
        assert not condition.wait(0.001)
    thread.join()
    with pytest.raises(RuntimeError):
        condition.notify()
