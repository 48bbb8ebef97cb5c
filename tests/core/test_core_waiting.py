"""Pauses that devices ask for: who may end them, and what is said."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from cardcage.errors import StateError
from machine_kit import panel


class Follower:
    """The states that a machine goes through, to wait for."""

    def __init__(self, machine: Any) -> None:
        self.machine, self.told = machine, []
        self._changed = threading.Condition()
        machine.observers.add("state", self._hear)
        machine.observers.add("waiting", lambda who, why: self.told.append((who, why)))

    def _hear(self, state: str) -> None:
        with self._changed:
            self._changed.notify_all()

    def until(self, state: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.machine.state == state, 20)


@pytest.fixture
def waiting(make_machine: Any) -> Any:
    machine = make_machine(devices=[{"type": "panel", "id": "panel"}])
    follower = Follower(machine)
    machine.start()
    return machine, panel(machine).slot.power, follower


def settle(machine: Any) -> None:
    """Return when the loop thread has done what it was asked for until now."""
    done = threading.Event()
    machine.loop.post(done.set)
    assert done.wait(20)


def test_a_device_pauses_its_machine(waiting: Any) -> None:
    """A device pauses its machine with a reason, which the machine and an event tell, and lets it go on again."""
    machine, power, follower = waiting
    power.pause("no room")
    follower.until("paused")
    assert machine.waiting == {"panel": "no room"}
    assert follower.told == [("panel", "no room")]
    power.resume()
    follower.until("running")
    assert machine.waiting == {}
    power.resume()  # nothing waits
    settle(machine)
    assert machine.state == "running"


def test_the_operator_goes_on_before_the_device(waiting: Any) -> None:
    """The operator may resume a machine that waits, after which the device's own resume changes nothing."""
    machine, power, follower = waiting
    power.pause("no room")
    follower.until("paused")
    machine.resume()
    assert (machine.state, machine.waiting) == ("running", {})
    machine.pause()
    power.resume()
    settle(machine)
    assert machine.state == "paused"


def test_the_operators_pause_takes_over(waiting: Any) -> None:
    """A machine that waits and is then paused by its operator stays paused until the operator resumes it."""
    machine, power, follower = waiting
    power.pause("no room")
    follower.until("paused")
    machine.pause()
    power.resume()
    settle(machine)
    assert (machine.state, machine.waiting) == ("paused", {})
    with pytest.raises(StateError):
        machine.pause()
    machine.resume()
    assert machine.state == "running"


def test_a_device_does_not_end_a_pause_that_was_there(waiting: Any) -> None:
    """A device that asks for a pause in a machine that its operator paused does not end that pause."""
    machine, power, follower = waiting
    machine.pause()
    power.pause("no room")
    power.resume()
    settle(machine)
    assert (machine.state, follower.told) == ("paused", [])


def test_a_machine_goes_on_when_the_last_device_does(waiting: Any) -> None:
    """Of two devices that wait, the one that lets go first does not let the machine go on."""
    machine, power, follower = waiting
    other = type(power)(power._life, "other")
    power.pause("no room")
    other.pause("no room either")
    follower.until("paused")
    settle(machine)
    assert machine.waiting == {"panel": "no room", "other": "no room either"}
    power.resume()
    settle(machine)
    assert machine.state == "paused"
    other.resume()
    follower.until("running")


def test_a_machine_that_waits_can_end(waiting: Any) -> None:
    """A machine that waits is reset and stopped as any that is paused."""
    machine, power, follower = waiting
    power.pause("no room")
    follower.until("paused")
    machine.reset()
    assert machine.state == "paused"
    machine.stop()
    assert machine.state == "stopped"
    power.pause("no room")
    power.resume()
    settle(machine)
    assert machine.state == "stopped"
